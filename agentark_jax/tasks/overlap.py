"""Contamination: questions to learn from that are, or nearly are, questions to measure by."""

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Literal

from agentark_jax.records import Question
from agentark_jax.tasks.grading import GRADERS, grader

# Of the 7,473 × 1,319 pairs of GSM8K's training and test questions, 2 share so much; of MATH's 7,500 and MATH-500's,
# 27; of GSM8K's test questions 750 with their variants in GSM-Plus.
WORDS, SHARE = 13, 0.5
# In the meta of questions that a program made: they repeat its words and differ in a number or a sign. That no two
# splits share one is for the program to see to.
GENERATOR = "generator"
_WORD = re.compile(r"[^\W_]+")


@dataclass(frozen=True)
class Overlap:
    """A question that is learned from and one that measures.

    `kind`: `exact` has the same text, `normalised` the same words (letters and digits, whatever their case and form),
    `words` at least `SHARE` of the measuring question's runs of `WORDS` successive words.
    """

    learned: Question
    measured: Question
    kind: Literal["exact", "normalised", "words"]
    share: float

    def __str__(self) -> str:
        one, other = self.learned, self.measured
        return (
            f"  {self.kind} ({self.share:.0%}): {one.split} {one.id} {one.asked[:200]!r} and {other.split} {other.id} "
            f"{other.asked[:200]!r}"
        )


def overlaps(learned: Iterable[Question], measured: Iterable[Question]) -> Iterator[Overlap]:
    """The pairs that overlap, in the order of `learned` and then of `measured`; the time is linear in all words.

    Questions of fewer than `WORDS` words only overlap with the same words, those of a `GENERATOR` with none. Memory is
    that of the measuring questions.
    """
    measuring = [question for question in measured if GENERATOR not in question.meta]
    words = [_words(question) for question in measuring]
    same: dict[tuple[str, ...], list[int]] = defaultdict(list)
    holders: dict[tuple[str, ...], list[int]] = defaultdict(list)  # which questions have a run of words
    for index, each in enumerate(words):
        same[each].append(index)
        for run in _runs(each):
            holders[run].append(index)
    for question in learned:
        mine = _words(question)
        hits = Counter(index for run in _runs(mine) for index in holders.get(run, ()))
        for index in sorted({*hits, *same.get(mine, ())}):
            share = 1.0 if words[index] == mine else hits[index] / len(_runs(words[index]))
            kind: Literal["exact", "normalised", "words"] = "words"
            if words[index] == mine:
                kind = "exact" if _text(question) == _text(measuring[index]) else "normalised"
            if share >= SHARE:
                yield Overlap(question, measuring[index], kind, share)


def _text(question: Question) -> str:
    """A question without the line that says how to end an answer: datasets with other graders have another one."""
    text, _, last = question.asked.rpartition("\n")
    return text if last in _instructions() else question.asked


@cache
def _instructions() -> frozenset[str]:
    return frozenset(grader(name).instruction for name in GRADERS)


def _words(question: Question) -> tuple[str, ...]:
    return tuple(_WORD.findall(unicodedata.normalize("NFKC", _text(question)).casefold()))


def _runs(words: tuple[str, ...]) -> set[tuple[str, ...]]:
    return {words[start : start + WORDS] for start in range(len(words) - WORDS + 1)}
