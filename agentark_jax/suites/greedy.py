"""What suites have in common that ask a question once: the greedy answers, and rows of results in a stage's folder."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from agentark_jax.protocols.single import answer
from agentark_jax.protocols.table import Pool
from agentark_jax.records import Question, Turn
from agentark_jax.stages import Manifest, Work
from agentark_jax.suites.bench import Bench

# As the suite `accuracy` has it: what that has asked is found in the store.
PROTOCOL = "single_greedy"
_ROWS = "rows.jsonl"


def fitting(bench: Bench, questions: Iterable[Question]) -> list[Question]:
    """The questions, each once, that the model can take together with an answer."""
    room = min(bench.model.config.max_positions, bench.config.engine.context or bench.model.config.max_positions)
    different = {question.id: question for question in questions}.values()
    return [each for each in different if _length(bench, each) + bench.config.max_tokens <= room]


def greedy_turns(bench: Bench, work: Work, title: str, questions: Iterable[Question]) -> dict[str, Turn]:
    """The model's greedy answer to each question, by its id; the questions are kept in the store."""

    async def ask(question: Question, pool: Pool) -> list[Turn]:
        return await answer(question, pool, bench.greedy, protocol=PROTOCOL)

    different = list({question.id: question for question in questions}.values())
    bench.store.put_questions(different)
    asked = bench.ask(work, title, ask, calls=1, questions=different)
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
