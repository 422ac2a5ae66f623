"""What suites have in common that ask a question once: the greedy answers, and rows of results in a stage's folder."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any, TypeVar

from agentark_jax.asking import GREEDY
from agentark_jax.records import Question, Turn, stable_hash
from agentark_jax.stages import Manifest, Work
from agentark_jax.suites.bench import Bench

T = TypeVar("T")

_ROWS = "rows.jsonl"


def fitting(bench: Bench, questions: Iterable[Question]) -> list[Question]:
    """The questions, each once, that the model can take together with an answer."""
    different = {question.id: question for question in questions}.values()
    return [each for each in different if _length(bench, each) + bench.config.max_tokens <= bench.limit]


def drawn(bench: Bench, found: Sequence[T], names: Sequence[str], count: int) -> list[T]:
    """`count` of them (0: all), by the seed and each one's name alone."""
    order = sorted(range(len(found)), key=lambda index: stable_hash([bench.seed, names[index]]))
    return [found[index] for index in order[: count or len(order)]]


def greedy_turns(bench: Bench, work: Work, title: str, questions: Iterable[Question]) -> dict[str, Turn]:
    """The model's greedy answer to each question, by its id; the questions are kept in the store.

    What the suite `accuracy` has asked is found there.
    """
    different = list({question.id: question for question in questions}.values())
    bench.store.put_questions(different)
    asked = bench.ask_alone(work, title, protocol=GREEDY, questions=different)
    return {name: turn for name, (turn,) in asked.items()}


def said(turn: Turn) -> str:
    """The text of an answer."""
    assert turn.completion is not None, "only answers are measured"
    return turn.completion.text


def save_rows(work: Work, rows: Sequence[Any]) -> None:
    """Keep rows (dataclasses, or JSON values) in a stage's folder."""
    values = [row if isinstance(row, dict | list) else asdict(row) for row in rows]
    (work.directory / _ROWS).write_text("".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values))


def load_rows(manifest: Manifest) -> list[Any]:
    """The JSON values of what `save_rows` kept."""
    return [json.loads(line) for line in (manifest.directory / _ROWS).read_text().split("\n") if line]


def _length(bench: Bench, question: Question) -> int:
    return sum(map(len, bench.form.question(question)))
