"""Which answers of a debate a verifier calls right: a model that is told no right answer, in the place of a grader.

The body of a stage, as those of `process`. What the verifier says is kept in the trace store as it comes, as labels of
a grader of its own (`traces.judge`): a stage that was killed asks only for what is missing.
"""

import asyncio
from collections.abc import Iterable, Sequence
from dataclasses import asdict

from agentark_jax.generation import Generation, Seat
from agentark_jax.progress import Display
from agentark_jax.records import JUDGE, SUMMARISER
from agentark_jax.stages import Work
from agentark_jax.traces.audit import agreement
from agentark_jax.traces.judge import Judge, judge_store, undecided
from agentark_jax.traces.labels import LabelledTurn, labelled_turns
from agentark_jax.traces.store import TraceStore


def last_answers(rows: Iterable[LabelledTurn]) -> list[LabelledTurn]:
    """What the debaters of each question answered in its last round, in the order of `rows`, if it can be read.

    An answer that the grader cannot read may be right, but neither the vote nor chance (`majority`, `random`) takes it.
    """
    said = [row for row in rows if row.role not in (JUDGE, SUMMARISER)]
    last: dict[str, int] = {}
    for row in said:
        last[row.question_id] = max(row.round, last.get(row.question_id, 0))
    return [row for row in said if row.round == last[row.question_id] and row.verdict != "unparseable"]


def verify(
    work: Work, rows: Sequence[LabelledTurn], store: TraceStore, *, generation: Generation, seat: Seat, display: Display
) -> None:
    """Asks a model of each of these answers whether it is right; the labels are in the store.

    Args:
        work: gets the verifier's id as `grader`, how many `turns` it calls `right` and `wrong`, and how many it does
            not decide, `unparseable`, of which some are `too_long` for it; and its `agreement` with the labels of
            `rows`, which decides nothing.
        rows: with any grader's labels.
        seat: who is asked, at temperature 0.

    Raises:
        AgentArkError: the engine cannot serve, or an answer's question is not in the store.
    """
    keys = [row.key for row in rows]
    questions = {question.id: question for question in store.questions()}
    texts, form = store.texts(keys), seat.model.form
    longest = max(
        (Judge.length(form, questions[row.question_id], texts[row.key], blind=True) for row in rows), default=1
    )

    async def ask() -> Judge:
        async with generation.engine(seat, longest) as engine:
            judge = Judge(engine, form, blind=True)
            missing = undecided(keys, store.labels(judge.id))
            with display.bar("verify answers", total=len(missing)) as bar:
                await judge_store(store, judge, missing, bar.more)
        return judge

    judge = asyncio.run(ask())
    work.tokens = judge.tokens
    verdicts = {row.key: row.verdict for row in labelled_turns(store, judge.id, keys=keys)}
    said = list(verdicts.values())
    work.counts = {
        "grader": judge.id,
        "turns": len(rows),
        **{verdict: said.count(verdict) for verdict in ("right", "wrong", "unparseable")},
        "too_long": judge.too_long,
        "agreement": asdict(agreement([verdicts[key] for key in keys], [row.verdict for row in rows])),
    }
