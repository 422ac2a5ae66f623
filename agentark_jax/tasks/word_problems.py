"""Word problems of a few arithmetic steps on small positive integers, with gold rationales.

What must not recur across splits is the *structure* of a question: its scene, the sentence form of each step, and all
numbers. The hash of the structure alone says to which split a question belongs, whatever the seed, so no split can hold
a question that differs from another split's only in names, objects, opening or closing sentence.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import TypeVar

from agentark_jax.errors import UsageError
from agentark_jax.records import Grade, Question, stable_hash
from agentark_jax.tasks.config import TaskConfig
from agentark_jax.tasks.grading import grader
from agentark_jax.tasks.grading.reading import ANSWER_PHRASE
from agentark_jax.tasks.sentences import CONTAINERS, MEN, OBJECTS, SCENES, WOMEN, Form, Scene
from agentark_jax.tasks.task import SPLITS, check_request

NAME = "word_problems"
_GRADER = grader("final_answer")
# So many draws in a row without a new question mean that there is none left to find.
PATIENCE = 20_000
# An equation of two whole numbers that is no part of a longer formula, and the number of a step.
_EQUATION = re.compile(
    r"(?<![\w.+*/×=(-])(?<![+*/×=(-]\s)(\d{1,9})\s?([+*×-])\s?(\d{1,9})\s?=\s?(\d{1,9})(?!\w|\s?[+*/×=)-]|\.\d)"
)
_NUMBERED = re.compile(r"\A\s*(?:step\s)?\d{1,3}[.:)]\s", re.I)
_CONNECTIVES = ("", "", "then ", "later ", "next ")
_T = TypeVar("_T")


@dataclass(frozen=True)
class Arithmetic:
    """The sum behind a question: a first number, then one operation and operand per step."""

    start: int
    operations: tuple[str, ...]
    operands: tuple[int, ...]

    @property
    def values(self) -> tuple[int, ...]:
        """The value after each step."""
        values, value = [], self.start
        for operation, operand in zip(self.operations, self.operands, strict=True):
            value = _apply(operation, value, operand)
            values.append(value)
        return tuple(values)

    @property
    def rationale(self) -> str:
        """The steps and the answer, a line each: "3+4=7", "7*2=14", "The answer is 14.".

        Small pretrained models calculate better line by line than in running text: Gemma 3 270M, four-shot, completes
        36 of 48 sums and differences of one-digit numbers written so, and 21 of the same 48 written as sentences.
        """
        values = (self.start, *self.values)
        steps = [
            f"{before}{operation}{operand}={after}"
            for before, operation, operand, after in zip(
                values, self.operations, self.operands, values[1:], strict=False
            )
        ]
        return "\n".join([*steps, f"{ANSWER_PHRASE} {values[-1]}."])


class WordProblems:
    """The built-in task; a pure function of its config."""

    name = NAME
    grader_id = _GRADER.id
    counts: Mapping[str, int] = {}

    def __init__(self, config: TaskConfig) -> None:
        self._config = config

    def questions(self, split: str, count: int) -> list[Question]:
        """The first `count` questions of a split, cycling through the step counts; a larger count only appends.

        Raises UsageError when the difficulty knobs allow fewer different questions.
        """
        check_request(split, count)
        config = self._config
        draws = Random(stable_hash([NAME, config.seed, split]))
        found: dict[str, Question] = {}
        while len(found) < count:
            steps = config.steps[len(found) % len(config.steps)]
            for _ in range(PATIENCE):
                question = _draw(draws, config, steps, split)
                if question is not None and question.prompt not in found:
                    found[question.prompt] = question
                    break
            else:
                raise UsageError(
                    f"the split {split!r} was asked for {count} word problems, but with this difficulty only "
                    f"{len(found)} could be made (no further one of {steps} steps). Ask for fewer questions, or raise "
                    "task.max_number, task.max_value or task.max_factor, or add to task.operations."
                )
        return list(found.values())

    def grade(self, question: Question, text: str) -> Grade:
        return _GRADER(question, text)


def exact_step_truth(question: Question, steps: Sequence[str]) -> tuple[bool, ...] | None:
    """Which steps of an answer to a word problem are right; `steps` are its parts, which together are its text.

    A step is right if its equations ("3+4=7", "4 + 3 = 7") are those of the question, the numbers before and after
    each of its operations; the last one, if it gives the final answer, if that is right, too. From the first wrong step
    on all are wrong. None where this cannot be told for certain: before the first wrong step there is one without an
    equation that is not the final answer, or with other numbers or formulas; or the final answer is right and an
    equation that holds is not of the question, so that this may be another way to it.
    """
    values = (question.meta["start"], *question.meta["values"])
    known = set(zip(values, question.meta["operations"], question.meta["operands"], values[1:], strict=False))
    known |= {(b, operation, a, value) for a, operation, b, value in known if operation != "-"}
    verdict = _GRADER(question, "".join(steps)).verdict
    truth: list[bool] = []
    for index, step in enumerate(steps):
        if truth and not truth[-1]:
            truth.append(False)
            continue
        found = _EQUATION.findall(step)
        equations = {(int(a), operation.replace("×", "*"), int(b), int(value)) for a, operation, b, value in found}
        foreign = equations - known
        if foreign and verdict == "right" and all(_apply(sign, a, b) == value for a, sign, b, value in foreign):
            return None
        is_answer = index == len(steps) - 1 and verdict != "unparseable"
        rest = _EQUATION.sub("", _NUMBERED.sub("", step))
        if not (foreign or is_answer) and (not equations or re.search(r"[\d=]", rest)):
            return None
        truth.append(not foreign and (not is_answer or verdict == "right"))
    return tuple(truth)


def split_of(structure: str) -> str:
    """The split to which all questions of one structure belong."""
    return SPLITS[int(stable_hash([NAME, structure])[:8], 16) % len(SPLITS)]


def _apply(operation: str, value: int, operand: int) -> int:
    return {"+": value + operand, "-": value - operand, "*": value * operand}[operation]


def _pick(draws: Random, options: Sequence[_T]) -> _T:
    # `random()` is the only method whose stream Python promises to keep between versions.
    return options[int(draws.random() * len(options))]


def _draw(draws: Random, config: TaskConfig, steps: int, split: str) -> Question | None:
    """One question, or None when the draw ran into a dead end or belongs to another split."""
    arithmetic = _draw_arithmetic(draws, config, steps)
    if arithmetic is None:
        return None
    scene = _pick(draws, SCENES)
    forms = tuple(
        _pick(draws, [form for form in scene.forms[operation] if form.only in (None, operand)])
        for operation, operand in zip(arithmetic.operations, arithmetic.operands, strict=True)
    )
    structure = f"{scene.name}: {arithmetic.start} " + " | ".join(
        f"{form.text} {operand}" for form, operand in zip(forms, arithmetic.operands, strict=True)
    )
    if split_of(structure) != split:
        return None
    return Question.make(
        NAME,
        split,
        _tell(draws, scene, arithmetic, forms),
        str(arithmetic.values[-1]),
        arithmetic.rationale,
        steps=steps,
        start=arithmetic.start,
        operations=list(arithmetic.operations),
        operands=list(arithmetic.operands),
        values=list(arithmetic.values),
        structure=structure,
    )


def _draw_arithmetic(draws: Random, config: TaskConfig, steps: int) -> Arithmetic | None:
    """Uniform over what is possible at each step: first the operation, then its operand.

    Only the last value may be 1: what is multiplied or taken from stays a plural.
    """
    value = start = _pick(draws, range(2, min(config.max_number, config.max_value) + 1))
    operations, operands = [], []
    for step in range(steps):
        smallest = 1 if step == steps - 1 else 2
        ranges = {
            "+": range(1, min(config.max_number, config.max_value - value) + 1),
            "-": range(1, min(config.max_number, value - smallest) + 1),
            "*": range(2, min(config.max_factor, config.max_value // value) + 1),
        }
        possible = [operation for operation in config.operations if ranges[operation]]
        if not possible:
            return None
        operations.append(_pick(draws, possible))
        operands.append(_pick(draws, ranges[operations[-1]]))
        value = _apply(operations[-1], value, operands[-1])
    return Arithmetic(start, tuple(operations), tuple(operands))


def _tell(draws: Random, scene: Scene, arithmetic: Arithmetic, forms: Sequence[Form]) -> str:
    woman, man, item = _pick(draws, WOMEN), _pick(draws, MEN), _pick(draws, OBJECTS)
    told_of_woman = draws.random() < 0.5
    words = {
        "name": woman if told_of_woman else man,
        "friend": man if told_of_woman else woman,
        "she": "she" if told_of_woman else "he",
        "her": "her" if told_of_woman else "him",
        "object": item,
        "objects": item + "s",
        "container": _pick(draws, CONTAINERS),
    }
    sentences = [_pick(draws, scene.openings).format(n=arithmetic.start, **words)]
    for form, operand in zip(forms, arithmetic.operands, strict=True):
        text = form.text.format(n=operand, **words, **{"is": "is" if operand == 1 else "are"})
        # "then soon" and "later now" would contradict each other.
        connective = "" if text.startswith(("soon ", "now ")) else _pick(draws, _CONNECTIVES)
        sentences.append(_capitalised(connective + text) + ".")
    sentences.append(_pick(draws, scene.questions).format(**words))
    return " ".join(sentences)


def _capitalised(sentence: str) -> str:
    return sentence[0].upper() + sentence[1:]
