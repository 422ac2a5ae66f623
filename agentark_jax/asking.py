"""The ways in which questions are put to models: one answer, samples, debates, other methods; what they come to.

What training runs and evaluations share. Each function gives every question's turns, and those of them whose majority
is its answer.
"""

import asyncio
import json
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace

from agentark_jax.evaluation.predictions import predict, save_predictions
from agentark_jax.generation import Asked, Generation, Seat
from agentark_jax.outcome import KEYS, PREDICTIONS
from agentark_jax.protocols.calls import Draw
from agentark_jax.protocols.config import DebateConfig
from agentark_jax.protocols.debate import debate
from agentark_jax.protocols.methods import Settings, carry_out
from agentark_jax.protocols.peers import PeerSource, another_question, noise, real
from agentark_jax.protocols.single import answer
from agentark_jax.protocols.table import Pool, Result
from agentark_jax.records import Label, Question, Turn
from agentark_jax.stages import Work

# Protocols of independent answers, as the store names them: one greedy, one sampled, several sampled.
GREEDY, ONCE, SAMPLED = "single_greedy", "single_once", "single_sampled"


def ask_alone(
    generation: Generation,
    work: Work,
    title: str,
    *,
    seats: Sequence[Seat],
    questions: Sequence[Question],
    draw: Draw,
    samples: int,
    protocol: str,
    context: int,
    how: Callable[..., Awaitable[list[Turn]]] = answer,
) -> tuple[Asked, Asked]:
    """Independent answers to each question, and again as those that vote on it."""

    async def ask(question: Question, pool: Pool) -> list[Turn]:
        return await how(question, pool, draw, samples=samples, protocol=protocol)

    turns = generation.ask(work, title, seats, questions, ask, calls=samples, context=context)
    return turns, turns


def ask_debate(
    generation: Generation,
    work: Work,
    title: str,
    *,
    seats: Sequence[Seat],
    questions: Sequence[Question],
    settings: DebateConfig,
    seed: int,
    context: int,
    read: Callable[[Question, str], str],
    debates: int = 1,
) -> tuple[Asked, Asked]:
    """Every question's debate, or so many of them: their turns, and those whose majority is the first's answer."""
    results: dict[str, Result] = {}

    def everyone(settings: DebateConfig, peers: PeerSource) -> Asked:
        async def one(question: Question, pool: Pool) -> Sequence[Turn]:
            held = (debate(question, pool, settings, peers, sample=number) for number in range(debates))
            several = await asyncio.gather(*held)
            results[question.id] = several[0]
            return [turn for each in several for turn in each.turns]

        calls = settings.agents * settings.rounds * debates
        return generation.ask(work, title, seats, questions, one, calls=calls, context=context, read=read)

    peers = real if settings.peers == "real" else noise(seed)
    if settings.peers == "other":
        # The first rounds alone; the debates then find them in the store.
        first = replace(settings, rounds=1, aggregation="majority")
        peers = another_question(flatten(everyone(first, real)), seed)
    turns = everyone(settings, peers)
    return turns, _finals(work, results)


def ask_method(
    generation: Generation,
    work: Work,
    title: str,
    *,
    seats: Sequence[Seat],
    questions: Sequence[Question],
    method: Settings,
    context: int,
    read: Callable[[Question, str], str],
) -> tuple[Asked, Asked]:
    """Another method on every question; what it gives is that of `ask_debate`."""
    results: dict[str, Result] = {}

    async def one(question: Question, pool: Pool) -> Sequence[Turn]:
        results[question.id] = await carry_out(question, pool, method)
        return results[question.id].turns

    turns = generation.ask(work, title, seats, questions, one, calls=None, context=context, read=read)
    return turns, _finals(work, results)


def keep_predictions(
    work: Work, questions: Sequence[Question], turns: Asked, voters: Asked, labels: Mapping[str, Label]
) -> None:
    """Write what each question's answer came to, and the keys of all turns, into a stage's folder."""
    predictions = [predict(turns[question.id], voters[question.id], labels) for question in questions]
    save_predictions(work.directory / PREDICTIONS, predictions)
    keep_keys(work, turns)


def keep_keys(work: Work, turns: Mapping[str, Sequence[Turn]]) -> None:
    """Write the keys of a stage's turns into its folder."""
    (work.directory / KEYS).write_text(json.dumps([turn.key for turn in flatten(turns)]))


def flatten(turns: Mapping[str, Sequence[Turn]]) -> list[Turn]:
    """All turns, question by question."""
    return [turn for each in turns.values() for turn in each]


def _finals(work: Work, results: Mapping[str, Result]) -> Asked:
    """The turns behind each question's answer; why conversations ended, and what went wrong, is counted."""
    work.counts |= {
        "stopped": dict(Counter(result.stopped for result in results.values())),
        "notes": dict(Counter(note.kind for result in results.values() for note in result.notes)),
    }
    return {question_id: list(result.final) for question_id, result in results.items()}
