"""Solutions whose first wrong line somebody has marked, and what follows from that for the steps of a completion."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from agentark_jax.data.steps import Step
from agentark_jax.errors import UsageError
from agentark_jax.tasks.rows import read_file


@dataclass(frozen=True)
class Solution:
    """Lines as their dataset divides them; the wrong one that comes first, from 0, or None if all are right.

    `kind` is what the dataset tells of the error or the solution: its class, subject or model.
    """

    question: str
    lines: tuple[str, ...]
    first_error: int | None
    kind: str

    @property
    def text(self) -> str:
        return "\n".join(self.lines)


class LineLabels(NamedTuple):
    """What a solution's lines say of the S steps of a completion of its text; see `line_labels`."""

    right: Bool[np.ndarray, " S"]
    known: Bool[np.ndarray, " S"]
    lines: Int[np.ndarray, " S"]


def line_labels(solution: Solution, steps: Sequence[Step]) -> LineLabels:
    """Labels of the steps (`data.steps.steps`) of a completion that says a solution.

    Steps are cut by other rules than lines: a line may have several, and a step several lines (what follows on the
    answer's phrase, display math). Steps are right that end before the first wrong line begins. That line's label goes
    to the step that its last letter is in, which is wrong, as are all after it. Those that it has before are not
    `known` (and not `right`): the error is in one of them, or in what they leave out. `lines` is where each step
    belongs, so that a first wrong step can be compared with the first wrong line: the line in which it begins, but the
    wrong line for all steps that have a part of it.

    Raises:
        ValueError: the steps do not say the solution's text.
    """
    said = "".join(step.text for step in steps)
    offset = said.find(solution.text)
    if offset < 0:
        raise ValueError(f"these are not the steps of this solution: {said[:80]!r} instead of {solution.text[:80]!r}")
    lengths = [len(line) + 1 for line in solution.lines]
    begins = offset + np.cumsum([0, *lengths[:-1]])
    starts = np.asarray([0, *accumulate(len(step.text) for step in steps)][:-1])
    # What stands before a step's first word is of no line.
    words = starts + np.asarray([len(step.text) - len(step.text.lstrip()) for step in steps])
    lines = np.maximum(np.searchsorted(begins, words, side="right") - 1, 0)
    if solution.first_error is None:
        return LineLabels(np.ones(len(steps), bool), np.ones(len(steps), bool), lines)
    line, begin = solution.lines[solution.first_error], begins[solution.first_error]
    inside = begin + np.asarray([len(line) - len(line.lstrip()), len(line.rstrip()) - 1])
    if not line.strip():  # wrong by saying nothing: where the line before ends
        inside = np.asarray([begin - 1, begin - 1])
    first, last = np.maximum(np.searchsorted(starts, inside, side="right") - 1, 0)
    number = np.arange(len(steps))
    lines[first : last + 1] = solution.first_error
    return LineLabels(number < first, (number < first) | (number >= last), lines)


def read_solutions(dataset: str, path: Path) -> list[Solution]:
    """The solutions of a file of a dataset of READERS, as it is published.

    Raises:
        UsageError: another dataset, or a row is not of that format; names the line. Else as `tasks.rows.read_file`.
    """
    if dataset not in READERS:
        raise UsageError(f"there is no reader of step labels for {dataset!r}; use one of: {', '.join(READERS)}.")
    solutions = []
    for row in read_file(path, dataset):
        try:
            solution = READERS[dataset](row.values)
        except (KeyError, TypeError, ValueError) as error:
            raise UsageError(
                f"{row.where}: {error!r}; this is no row of {dataset}: give its file as published."
            ) from error
        if solution is None:
            continue
        if solution.first_error is not None and not 0 <= solution.first_error < len(solution.lines):
            raise UsageError(
                f"{row.where}: line {solution.first_error + 1} is marked as wrong, but there are "
                f"{len(solution.lines)}; correct or remove the row."
            )
        solutions.append(solution)
    return solutions


def _mr_ben(row: Mapping[str, Any]) -> Solution:
    asked = "\n".join(part for part in (row["Question"], row["Options"]) if part)
    wrong = {"correct": False, "incorrect": True}[row["Model_Solution_Correctness"]]
    error = int(row["Model_Solution_First_Error_Step"]) - 1 if wrong else None
    return Solution(asked, tuple(row["Model_Solution_Steps"]), error, row["Sampled_Model"])


def _mr_gsm8k(row: Mapping[str, Any]) -> Solution:
    wrong = {"right": False, "correct": False, "wrong": True}[row["model_output_solution_correctness"]]
    error = int(row["model_output_solution_first_error_step"]) - 1 if wrong else None
    return Solution(row["question"], tuple(row["model_output_steps"]), error, row["question_type"])


def _prmbench(row: Mapping[str, Any]) -> Solution | None:
    lines = tuple(row["modified_process"])
    # Some rows mark steps past the end, and a few no other ones: their error is nowhere.
    marked = [step - 1 for step in row["error_steps"] if step <= len(lines)]
    return Solution(row["modified_question"], lines, min(marked), row["classification"]) if marked else None


def _big_bench_mistake(row: Mapping[str, Any]) -> Solution:
    kind = "right answer" if row["answer"] == row["target"] else "wrong answer"
    error = None if row["mistake_index"] is None else int(row["mistake_index"])
    return Solution(row["input"], tuple(row["steps"]), error, kind)


def _prm800k(row: Mapping[str, Any]) -> Solution:
    """The model's steps up to the first that people rated -1; where they went on with a step of their own, it erred."""
    lines: list[str] = []
    for step in row["label"]["steps"]:
        place = step["chosen_completion"]
        said = step["completions"][0 if place is None else place]
        lines.append(said["text"])
        if said["rating"] == -1:
            return Solution(row["question"]["problem"], tuple(lines), len(lines) - 1, "wrong")
        if place is None:
            break
    return Solution(row["question"]["problem"], tuple(lines), None, "right")


_TAG = "\u043a\u0438"  # Math-Shepherd's, Cyrillic, at the end of each step


def _math_shepherd(row: Mapping[str, Any]) -> Solution:
    *steps, rest = row["input"].split(_TAG)
    question, first, begun = steps[0].partition("Step 1:")
    if rest.strip() or not first:
        raise ValueError("input is no question and steps with tags")
    # In the label a sign stands where the tag is in the input.
    label, signs = row["label"], []
    for step in steps:
        label = label[len(step) :]
        signs.append(label[:1])
        label = label[1:]
    if not set(signs) <= {"+", "-"}:
        raise ValueError("label has no + or - at the place of each tag")
    lines = tuple(line.strip() for line in (first + begun, *steps[1:]))
    return Solution(question.strip(), lines, signs.index("-") if "-" in signs else None, str(row["task"]))


# By dataset: MR-Ben (github.com/dvlab-research/Mr-Ben, flattened to a row a solution), MR-GSM8K, PRMBench (rows whose
# every marked step is past the end are left out), BIG-Bench-Mistake, PRM800K, Math-Shepherd. (Math-APS has values of
# prefixes that do not continue each other, and so no solutions.)
READERS: Mapping[str, Callable[[Mapping[str, Any]], Solution | None]] = {
    "mr_ben": _mr_ben,
    "mr_gsm8k": _mr_gsm8k,
    "prmbench": _prmbench,
    "big_bench_mistake": _big_bench_mistake,
    "prm800k": _prm800k,
    "math_shepherd": _math_shepherd,
}
