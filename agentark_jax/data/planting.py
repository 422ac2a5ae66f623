"""Errors planted in written solutions: one number of one step becomes another, so that what the step says is wrong."""

import re
from dataclasses import dataclass
from itertools import pairwise
from random import Random
from string import ascii_uppercase

from agentark_jax.data.steps import answer_begins, cuts
from agentark_jax.records import Question, stable_hash
from agentark_jax.tasks.items import answered

_NUMBER = re.compile(r"(?<![\w.])\d{1,3}(?:,\d{3}){1,20}(?![\d,])|(?<![\w.,])\d{1,12}(?!\w)")
# The number of a step is none of its results.
_NUMBERED = re.compile(r"\A[\s*#(]{0,9}(?:step\s)?\d{1,3}[.:)](?=\s)", re.I)


@dataclass(frozen=True)
class Planted:
    """A solution with one wrong step.

    Attributes:
        steps: its steps, that with the error among them; together they are the text.
        step: the index of the wrong one.
        before, after: the number as it was and as it is.
    """

    steps: tuple[str, ...]
    step: int
    before: str
    after: str

    @property
    def text(self) -> str:
        return "".join(self.steps)

    @property
    def beginning(self) -> str:
        """The text up to the end of the wrong step."""
        return "".join(self.steps[: self.step + 1])


def split(text: str) -> tuple[str, ...]:
    """The steps of a text (`steps.cuts`); together they are the text."""
    return tuple(text[start:end] for start, end in pairwise([0, *cuts(text), len(text)]))


def plantable(text: str) -> list[int]:
    """The steps in which an error can be planted: those with a number that come before the final answer."""
    steps = split(text)
    last = len(steps) - (answer_begins(text) is not None)
    return [place for place in range(last) if _result(steps[place]) is not None]


def recoverable(text: str) -> list[int]:
    """The plantable steps before any that states an answer, such as "\\boxed{7}": who has answered does not go on."""
    stated = (place for place, step in enumerate(split(text)) if answer_begins(step) is not None)
    first = next(stated, len(text))
    return [place for place in plantable(text) if place < first]


def plant(text: str, step: int, seed: int) -> Planted:
    """A text with an error in one of its plantable steps; the same seed, text and step give the same error.

    What changes is the first number after the step's last "=", or its last number where there is no such: by 1 to 9,
    and never below 0. So "3 + 4 = 7" becomes such as "3 + 4 = 9".

    Raises ValueError for a step that has no number.
    """
    steps = list(split(text))
    found = _result(steps[step])
    if found is None:
        raise ValueError(f"step {step} has no number: {steps[step]!r}")
    before = found.group()
    after = another_number(before, stable_hash([seed, text, step]))
    steps[step] = steps[step][: found.start()] + after + steps[step][found.end() :]
    return Planted(tuple(steps), step, before, after)


def wrong_answer(question: Question, seed: int) -> str | None:
    """Another answer than the gold one, of its kind: a letter among choices, a whole number; None for other kinds."""
    place, count = stable_hash([seed, question.id]), len(question.meta.get("choices", ()))
    letters = [letter for letter in ascii_uppercase[:count] if letter != question.answer]
    if letters:
        return Random(place).choice(letters)
    return another_number(question.answer, place) if _NUMBER.fullmatch(question.answer) else None


def wrong_solution(question: Question, seed: int) -> str | None:
    """The gold rationale with an error in its last step that can have one, and another answer; None as before.

    Where that step comes to the gold answer, the wrong number is the answer: who contradicts himself is not believed.
    """
    answer, text = wrong_answer(question, seed), question.rationale
    if answer is None:
        return None
    where = plantable(text)
    if where:
        error = plant(text, where[-1], seed)
        text = error.text
        if error.before.replace(",", "") == question.answer.replace(",", ""):
            answer = error.after
    return answered(text[: answer_begins(text)], answer)


def right_solution(question: Question) -> str:
    """The gold rationale and answer, written as `wrong_solution` writes them."""
    return answered(question.rationale[: answer_begins(question.rationale)], question.answer)


def another_number(number: str, seed: str) -> str:
    """A whole number (such as "1,234") off by 1 to 9, not below 0, written in the same way."""
    value, random = int(number.replace(",", "")), Random(seed)
    offset = random.randint(1, 9)
    other = value - offset if random.random() < 0.5 and value >= offset else value + offset
    return f"{other:,}" if "," in number else str(other)


def _result(step: str) -> re.Match[str] | None:
    """The number of a step that is to change."""
    numbered = _NUMBERED.match(step)
    numbers = list(_NUMBER.finditer(step, numbered.end() if numbered else 0))
    results = [found for found in numbers if found.start() > step.rfind("=")]
    if "=" in step and results:
        return results[0]
    return numbers[-1] if numbers else None
