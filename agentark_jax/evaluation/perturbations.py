"""The same question in other words: its choices in another order, or with a sentence that has nothing to do with it.

Pure functions of a question and a seed. The right answer stays the same, a letter apart.
"""

import re
from collections.abc import Sequence
from itertools import pairwise
from string import ascii_uppercase

import numpy as np

from agentark_jax.data.steps import cuts
from agentark_jax.records import Question, stable_hash
from agentark_jax.tasks.grading import GRADERS, grader

# A choice that names others by their place or letter: in another order it says something else.
_REFERS = re.compile(
    r"\bthe (?:above|below|following)\b|\babove (?:is|are)\b"
    r"|(?-i:\b[A-J] (?:and|or|&) [A-J]\b)|\b(?:option|choice)s? [A-J]\b",
    re.I,
)
# What points at something said before says something of the question that it is put into.
_POINTS_BACK = re.compile(r"(?:he|she|it|they|his|her|its|their|this|that|these|those|then|so|if|but|and|also)\b", re.I)
_WORD, _CAPITAL = re.compile(r"[a-z]{5,}"), re.compile(r"[A-Z][a-z]+")
_NAME = re.compile(r"(?<=[a-z,;] )[A-Z][a-z]+|\A[A-Z][a-z]+")
_FEWEST, _MOST = 4, 40  # words of a distractor

Order = tuple[int, ...]


def can_be_rearranged(question: Question) -> bool:
    """Whether it has choices, known by their words, none of which names others by their place."""
    choices = question.meta.get("choices")
    return isinstance(choices, Sequence) and not any(_REFERS.search(str(choice)) for choice in choices)


def arrangements(question: Question, seed: int, count: int) -> list[Order]:
    """`count` orders of a question's choices: one drawn by the seed, and its rotations.

    The choice at position p of an order is the one that stands at `order[p]` in the question. As many orders as there
    are choices have each of them at each position once; there are no more than that.
    """
    size = len(question.meta["choices"])
    draws = np.random.default_rng(int(stable_hash([seed, "choices", question.id])[:16], 16))
    drawn = draws.permutation(size).tolist()
    return [tuple(drawn[(place + turn) % size] for place in range(size)) for turn in range(min(count, size))]


def rearranged(question: Question, order: Order) -> Question:
    """A question with its choices in another order, and the letter of the right one; itself where that is its order.

    `meta["original"]` is the id of the question.
    """
    if list(order) == sorted(order):
        return question
    choices = question.meta["choices"]
    moved = [choices[place] for place in order]
    before, _, after = question.asked.rpartition(_listed(choices))
    right = ascii_uppercase[order.index(ascii_uppercase.index(question.answer))]
    return _asked_otherwise(question, f"{before}{_listed(moved)}{after}", right, choices=moved)


def distracted(question: Question, sentence: str) -> Question:
    """A question with another sentence before its last one; `meta["original"]` is its id, `meta["distractor"]` that."""
    words = body(question)
    last = max(cuts(words), default=0)
    rest = words[last:].lstrip()
    blank = words[last : len(words) - len(rest)]
    told = f"{words[:last]}{blank}{sentence} {rest}{question.asked[len(words) :]}"
    return _asked_otherwise(question, told, question.answer, distractor=sentence)


def distractors(questions: Sequence[Question], seed: int) -> dict[str, str]:
    """For each question, by id, a sentence of another that has nothing to do with it; none where there is no such.

    It is the first sentence of its question, a statement of 4 to 40 words that points at nothing before it. It shares
    no name with the question it is for, and no word of five letters or more. The seed decides among several.
    """
    firsts = sorted({first for question in questions if (first := _opening(question))})
    words = [set(_WORD.findall(first.lower())) for first in firsts]
    capitals = [set(_CAPITAL.findall(first)) for first in firsts]
    found = {}
    for question in questions:
        own = body(question)
        said, names = set(_WORD.findall(own.lower())), set(_NAME.findall(own))
        draws = np.random.default_rng(int(stable_hash([seed, "distractor", question.id])[:16], 16))
        for index in draws.permutation(len(firsts)):
            if words[index].isdisjoint(said) and capitals[index].isdisjoint(names) and firsts[index] not in own:
                found[question.id] = firsts[index]
                break
    return found


def body(question: Question) -> str:
    """The question's own words: what is asked without choices, and without what is said of the form of its answer."""
    asked, choices = question.asked, question.meta.get("choices")
    if isinstance(choices, Sequence) and _listed(choices) in asked:
        return asked.rpartition(_listed(choices))[0]
    for name in GRADERS:
        asked = asked.removesuffix(f"\n{grader(name).instruction}")
    return asked


def _opening(question: Question) -> str | None:
    """The first of several sentences, where it can stand in another question."""
    words = body(question)
    places = [0, *cuts(words), len(words)]
    first = words[slice(*next(pairwise(places)))].strip()
    fits = len(places) > 2 and first.endswith(".") and _FEWEST <= len(first.split()) <= _MOST
    return first if fits and "\n" not in first and not _POINTS_BACK.match(first) else None


def _listed(choices: Sequence[str]) -> str:
    """Choices as `tasks.items` writes them."""
    return "".join(f"\n{letter}) {choice}" for letter, choice in zip(ascii_uppercase, choices, strict=False))


def _asked_otherwise(question: Question, asked: str, answer: str, **changed: object) -> Question:
    meta = {**question.meta, **changed, "original": question.id}
    if "asked" in meta:
        meta["asked"] = asked
    prompt = question.prompt.removesuffix(question.asked) + asked
    return Question.make(question.task, question.split, prompt, answer, **meta)
