"""How far graders agree: with each other, and with labels that were given by others."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agentark_jax.errors import UsageError
from agentark_jax.records import Question, Verdict
from agentark_jax.tasks.grading.bertscore import BERTScore
from agentark_jax.tasks.grading.short import SCORES, gold_answers, read_free, scores
from agentark_jax.tasks.rows import read_file
from agentark_jax.traces.store import TraceStore


@dataclass(frozen=True)
class Labelled:
    """A text, its question, and whether others say that its answer is right."""

    question: Question
    text: str
    right: bool


@dataclass(frozen=True)
class Agreement:
    """Verdicts of two graders on the same texts, where both decided: counts of the four cases."""

    both_right: int
    first_right: int
    second_right: int
    both_wrong: int

    @property
    def n(self) -> int:
        return self.both_right + self.first_right + self.second_right + self.both_wrong

    @property
    def agreed(self) -> int:
        return self.both_right + self.both_wrong

    @property
    def kappa(self) -> float | None:
        """Cohen's kappa; None where one of the graders says the same of everything."""
        from statsmodels.stats.inter_rater import cohens_kappa

        table = [[self.both_right, self.first_right], [self.second_right, self.both_wrong]]
        varied = all(any(row) for row in table) and all(any(column) for column in zip(*table, strict=True))
        return float(cohens_kappa(table, return_results=False)) if varied else None


def agreement(first: Sequence[Verdict], second: Sequence[Verdict]) -> Agreement:
    """Compares two graders' verdicts on the same texts, in the same order."""
    counts = Counter(zip(first, second, strict=True))
    return Agreement(
        counts["right", "right"], counts["right", "wrong"], counts["wrong", "right"], counts["wrong", "wrong"]
    )


# Protocol, role and round.
Group = tuple[str, str, int]


def scores_by_group(
    store: TraceStore, keys: Iterable[str], bertscore: BERTScore | None = None
) -> dict[Group, dict[str, list[tuple[float, ...]]]]:
    """How close these turns come to the gold answers, by `SCORES` and perhaps, as the last, by BERTScore.

    Returns, of each group, for each question, a row a turn.
    """
    questions = {question.id: question for question in store.questions()}
    places, rows, answers, golds = [], [], [], []
    for turn in store.turns(keys=keys, errors=False):
        assert turn.completion is not None
        call, question = turn.call, questions[turn.call.question_id]
        near = scores(question, turn.completion.text)
        places.append(((call.protocol, call.role, call.round), question.id))
        rows.append(tuple(near[name] for name in SCORES))
        answers.append(read_free(question, turn.completion.text))
        golds.append(gold_answers(question))
    if bertscore is not None:
        rows = [(*row, score) for row, score in zip(rows, bertscore(answers, golds), strict=True)]
    found: dict[Group, dict[str, list[tuple[float, ...]]]] = defaultdict(lambda: defaultdict(list))
    for (group, name), row in zip(places, rows, strict=True):
        found[group][name].append(row)
    return found


def read_labelled(path: Path) -> list[Labelled]:
    """Labelled texts from JSON lines, gzip-compressed or not.

    A line is {"question", "gold", "text", "right"} with, where the grader needs them, "choices" or "answers"; or one of
    GSM8K's `example_model_solutions.jsonl`: a question, its ground truth and four {"solution", "is_correct"}.

    Raises as `tasks.rows.read_file`, and UsageError for a line that is neither; names the line.
    """
    labelled = []
    for row in read_file(path, "--labelled"):
        try:
            labelled += _texts(row.values)
        except (KeyError, TypeError) as error:
            raise UsageError(
                f'{row.where}: {error!r}; each line needs "question", "gold" and "text", which are text, and "right", '
                "which is true or false."
            ) from error
    return labelled


def _texts(row: Mapping[str, Any]) -> list[Labelled]:
    if "ground_truth" in row:
        gold = row["ground_truth"].rpartition("A:")[2].strip()
        question = Question.make("labelled", "audit", row["question"], gold)
        solved = [value for value in row.values() if isinstance(value, Mapping)]
        return [Labelled(question, _text(each, "solution"), _flag(each, "is_correct")) for each in solved]
    meta = {key: row[key] for key in ("choices", "answers") if key in row}
    question = Question.make("labelled", "audit", _text(row, "question"), _text(row, "gold"), **meta)
    return [Labelled(question, _text(row, "text"), _flag(row, "right"))]


def _text(row: Mapping[str, Any], key: str) -> str:
    if not isinstance(row[key], str):
        raise TypeError(f"{key} is {row[key]!r}")
    return str(row[key])


def _flag(row: Mapping[str, Any], key: str) -> bool:
    if not isinstance(row[key], bool):
        raise TypeError(f"{key} is {row[key]!r}")
    return bool(row[key])
