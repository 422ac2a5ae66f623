"""Solutions whose first wrong line somebody has marked, and what follows from that for the steps of a completion."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from agentark_jax.data.render import Format
from agentark_jax.data.steps import Step, steps
from agentark_jax.errors import UsageError
from agentark_jax.records import Example, Question, stable_hash
from agentark_jax.tasks.rows import read_file


@dataclass(frozen=True)
class Solution:
    """Lines as their dataset divides them; the wrong one that comes first, from 0, or None if all are right.

    `kind` is what the dataset tells of the error or the solution: its class, subject or model. `values`, from 0 to 1,
    are how probably each line is right, where the dataset says that of each; `origin` is the question that this one is
    a variant of, where the dataset has changed it. One that is not `whole` is the beginning of an answer, of which it
    is not known where the first error is.
    """

    question: str
    lines: tuple[str, ...]
    first_error: int | None
    kind: str
    values: tuple[float, ...] | None = None
    origin: str | None = None
    whole: bool = True

    @property
    def text(self) -> str:
        return "\n".join(self.lines)

    @property
    def source(self) -> str:
        """The name of the question, or of the one that it is a variant of: see `question_name`."""
        return question_name(self.question if self.origin is None else self.origin)

    @property
    def asked(self) -> Question:
        return Question.make("prm", "published", self.question, "")


def question_name(text: str) -> str:
    """What a question is known by among those that a process reward model has learned: a hash that is the same however
    the text is spaced and capitalised.
    """
    return stable_hash(["question", " ".join(text.split()).casefold()])


class OtherText(ValueError):
    """Tokens do not say the text that they were made of: the tokenizer changes it."""


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
        OtherText: the steps do not say the solution's text.
    """
    first, last, lines = _placed(solution, steps)
    if solution.first_error is None:
        return LineLabels(np.ones(len(steps), bool), np.ones(len(steps), bool), lines)
    begin, end = first[solution.first_error], last[solution.first_error]
    number = np.arange(len(steps))
    lines[begin : end + 1] = solution.first_error
    return LineLabels(number < begin, (number < begin) | (number >= end), lines)


def step_targets(solution: Solution, steps: Sequence[Step]) -> tuple[Float[np.ndarray, " S"], Bool[np.ndarray, " S"]]:
    """How probably each of the steps of a completion of a solution's text is right, and of which that is known.

    Where the dataset has a value for each line, it goes to the step that the line's last letter is in (the least one,
    where a step has several); steps that a line has before are known only if it is right for sure. Else as
    `line_labels`, and raises as that.
    """
    if solution.values is None:
        labels = line_labels(solution, steps)
        return labels.right.astype(np.float32), labels.known
    right, known = np.ones(len(steps), np.float32), np.zeros(len(steps), bool)
    first, last, _ = _placed(solution, steps)
    for value, begin, end in zip(solution.values, first, last, strict=True):
        known[begin:end] = value == 1
        known[end] = True
        right[end] = min(right[end], value)
    return right, known


def _placed(
    solution: Solution, steps: Sequence[Step]
) -> tuple[Int[np.ndarray, " L"], Int[np.ndarray, " L"], Int[np.ndarray, " S"]]:
    """The steps that the first and the last letter of each line are in, and the line that each step begins in."""
    said = "".join(step.text for step in steps)
    offset = said.find(solution.text)
    if offset < 0:
        raise OtherText(f"these are not the steps of this solution: {said[:80]!r} instead of {solution.text[:80]!r}")
    lengths = [len(line) + 1 for line in solution.lines]
    begins = offset + np.cumsum([0, *lengths[:-1]])
    starts = np.asarray([0, *accumulate(len(step.text) for step in steps)][:-1])
    # What stands before a step's first word is of no line.
    words = starts + np.asarray([len(step.text) - len(step.text.lstrip()) for step in steps])
    lines = np.maximum(np.searchsorted(begins, words, side="right") - 1, 0)
    # A line without a word says it where the line before ends.
    letters = [
        (len(line) - len(line.lstrip()), len(line.rstrip()) - 1) if line.strip() else (-1, -1)
        for line in solution.lines
    ]
    first, last = np.maximum(np.searchsorted(starts, begins[:, None] + np.asarray(letters), side="right") - 1, 0).T
    return first, last, lines


def solution_example(form: Format, solution: Solution) -> tuple[Example | None, int]:
    """What a process reward model learns from a solution: which of its steps are right, after the question alone.

    Steps of which that is not known (`step_targets`) are none that it learns, and counted; None where no other is left.
    Raises OtherText where the tokens do not say the solution's text.
    """
    prompt = [token for segment in form.question(solution.asked) for token in segment]
    completion = list(form.response(solution.text))
    while not solution.whole and completion and completion[-1] in form.stop_ids:
        completion.pop()
    found = steps(completion, form.tokenizer)
    right, known = step_targets(solution, found)
    unknown = int((~known).sum())
    if not known.any():
        return None, unknown
    ends = np.asarray([len(prompt) + step.end - 1 for step in found], np.int32)
    ids = np.asarray([*prompt, *completion], np.int32)
    name, labels = question_name(solution.question), right[known]
    return Example(ids, {}, name, "published", (), True, step_ends=ends[known], step_labels=labels), unknown


def held_out(solution: Solution, share: float, seed: int) -> bool:
    """Whether a solution is kept from training: so of about this share of questions, by a hash, with all variants."""
    return int(stable_hash(["held out", seed, solution.source])[:12], 16) < share * 16**12


def drawn(solutions: Sequence[Solution], limit: int | None, seed: int, *, whole: bool) -> list[int]:
    """The indices, ascending, of at most so many solutions, drawn by a hash; with `whole` by that of their questions,
    so that these have all of their solutions (the last one as far as the limit lets it).
    """

    def place(index: int) -> tuple[str, int]:
        solution = solutions[index]
        return stable_hash(["drawn", seed, solution.source, *([] if whole else [solution.text])]), index

    return sorted(sorted(range(len(solutions)), key=place)[:limit])


def read_solutions(dataset: str, path: Path) -> list[Solution]:
    """The solutions of a file of a dataset of READERS, as it is published.

    Raises:
        UsageError: another dataset, or a row is not of that format; names the line. Else as `tasks.rows.read_file`.
    """
    if dataset not in READERS:
        raise UsageError(f"there is no reader of step labels for {dataset!r}; use one of: {', '.join(READERS)}.")
    solutions: list[Solution] = []
    for row in read_file(path, dataset):
        try:
            found = READERS[dataset](row.values)
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            raise UsageError(
                f"{row.where}: {error!r}; this is no row of {dataset}: give its file as published."
            ) from error
        for solution in found:
            check_solution(solution, row.where)
        solutions += found
    # Errors were planted several times in one original.
    return list(dict.fromkeys(solutions)) if dataset == PAIRS else solutions


def check_solution(solution: Solution, where: str) -> None:
    """Raises UsageError, naming where it stands, for a solution of which nothing can be said."""
    texts = (solution.question, *solution.lines, "" if solution.origin is None else solution.origin)
    if not all(isinstance(text, str) for text in texts):
        raise UsageError(f"{where}: question and steps must be texts; correct or remove the row.")
    if not solution.text.strip():
        raise UsageError(f"{where}: a solution without a word has no steps; remove the row.")
    try:
        "".join(texts).encode()
    except UnicodeEncodeError as error:
        half = ascii(error.object[error.start])
        raise UsageError(f"{where}: has {half}, which is half of a character; correct or remove the row.") from error
    if solution.first_error is not None and not 0 <= solution.first_error < len(solution.lines):
        raise UsageError(
            f"{where}: line {solution.first_error + 1} is marked as wrong, but there are {len(solution.lines)}; "
            "correct or remove the row."
        )


def _lines(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise TypeError(f"{value!r:.80} is no list of steps")
    return tuple(value)


def _index(value: Any) -> int:
    number = int(value)
    if not isinstance(value, str) and number != value:
        raise ValueError(f"{value} is no number of a step")
    return number


def _mr_ben(row: Mapping[str, Any]) -> list[Solution]:
    asked = "\n".join(part for part in (row["Question"], row["Options"]) if part)
    wrong = {"correct": False, "incorrect": True}[row["Model_Solution_Correctness"]]
    error = _index(row["Model_Solution_First_Error_Step"]) - 1 if wrong else None
    return [Solution(asked, _lines(row["Model_Solution_Steps"]), error, row["Sampled_Model"])]


def _mr_gsm8k(row: Mapping[str, Any]) -> list[Solution]:
    wrong = {"right": False, "correct": False, "wrong": True}[row["model_output_solution_correctness"]]
    error = _index(row["model_output_solution_first_error_step"]) - 1 if wrong else None
    return [Solution(row["question"], _lines(row["model_output_steps"]), error, row["question_type"])]


def _prmbench(row: Mapping[str, Any]) -> list[Solution]:
    lines = _lines(row["modified_process"])
    # Some rows mark steps past the end, and a few no other ones: their error is nowhere.
    marked = [step - 1 for step in row["error_steps"] if step <= len(lines)]
    asked, origin = row["modified_question"], row["original_question"]
    return [Solution(asked, lines, min(marked), row["classification"], origin=origin)] if marked else []


def _prmbench_pairs(row: Mapping[str, Any]) -> list[Solution]:
    origin = row["original_question"]
    return [*_prmbench(row), Solution(origin, _lines(row["original_process"]), None, "original", origin=origin)]


def _big_bench_mistake(row: Mapping[str, Any]) -> list[Solution]:
    kind = "right answer" if row["answer"] == row["target"] else "wrong answer"
    error = None if row["mistake_index"] is None else _index(row["mistake_index"])
    return [Solution(row["input"], _lines(row["steps"]), error, kind)]


def _prm800k(row: Mapping[str, Any]) -> list[Solution]:
    """The model's steps up to the first that people rated -1; where they went on with a step of their own, it erred."""
    lines: list[str] = []
    for step in row["label"]["steps"]:
        place = step["chosen_completion"]
        said = step["completions"][0 if place is None else place]
        lines.append(said["text"])
        if said["rating"] == -1:
            return [Solution(row["question"]["problem"], tuple(lines), len(lines) - 1, "wrong")]
        if place is None:
            break
    return [Solution(row["question"]["problem"], tuple(lines), None, "right")] if lines else []


_TAG = "\u043a\u0438"  # Math-Shepherd's, Cyrillic, at the end of each step


def _math_shepherd(row: Mapping[str, Any]) -> list[Solution]:
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
    error = signs.index("-") if "-" in signs else None
    values = tuple(float(sign == "+") for sign in signs)
    return [Solution(question.strip(), lines, error, str(row["task"]), values)]


def _math_aps(row: Mapping[str, Any]) -> list[Solution]:
    """Beginnings of answers, each with the share of its continuations that end right; empty ones are left out."""
    question, found = row["question"], []
    for step in row["reasoning_steps"]:
        prefix, value = step["solution_prefix"], float(step["mc_value"])
        if not prefix.startswith(question) or not 0 <= value <= 1:
            raise ValueError("a solution_prefix does not begin with the question, or its mc_value is no share")
        said = prefix[len(question) :].strip()
        if said:
            found.append(Solution(question, (said,), None, "beginning", (value,), whole=False))
    return found


# By dataset: MR-Ben (github.com/dvlab-research/Mr-Ben, flattened to a row a solution), MR-GSM8K, PRMBench (rows whose
# every marked step is past the end are left out), the same with the right solutions that its errors were planted in,
# each once, BIG-Bench-Mistake, PRM800K (rows without a step are left out), Math-Shepherd, Math-APS (beginnings, which
# do not continue each other).
PAIRS = "prmbench_pairs"
READERS: Mapping[str, Callable[[Mapping[str, Any]], list[Solution]]] = {
    "mr_ben": _mr_ben,
    "mr_gsm8k": _mr_gsm8k,
    "prmbench": _prmbench,
    "big_bench_mistake": _big_bench_mistake,
    "prm800k": _prm800k,
    "math_shepherd": _math_shepherd,
    "math_aps": _math_aps,
    PAIRS: _prmbench_pairs,
}
