"""DyLAN: layers of agents that rate each other; the best go on (Liu et al. 2023, arXiv 2310.02170).

All agents answer; in every later layer each reads the answers of the layer before, rates them from 1 to 5 and answers
again. More than two thirds of a layer in agreement end it. After the second layer a ranker keeps the best two. At most
2 × agents + 1 + 2 × (rounds - 2) calls.
"""

import asyncio
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from agentark_jax.protocols.calls import SAMPLED, Draw
from agentark_jax.protocols.config import check_counts
from agentark_jax.protocols.table import CLOSING, Pool, Result, Table, answered_by_several
from agentark_jax.records import Question, Turn
from agentark_jax.traces.labels import majority_vote

KEPT = 2
RATE = (
    '\n\nFirst rate each answer from 1 (wrong) to 5 (right), in one line each, as "Rating of answer 1: 5". '
    "Then answer the question yourself." + CLOSING
)
RANK = '\n\nWhich two answers are the best? End with "The best are answers i and j", i and j their numbers.'
# A number with thousands of digits is no answer's, and Python refuses to read it.
_RATING = re.compile(r"\brating of answer (\d{1,4}): ([1-5])\b", re.I)
_BEST = re.compile(r"\bbest are answers (\d{1,4} and \d{1,4})\b", re.I)


@dataclass(frozen=True)
class DylanConfig:
    agents: int = 4
    rounds: int = 3
    draw: Draw = SAMPLED

    def __post_init__(self) -> None:
        check_counts(self, agents=1, rounds=1)


# By agent that answered in a layer: the shares of its rating that it gave to those of the layer before.
Ratings = dict[int, dict[int, float]]


async def dylan(question: Question, pool: Pool, config: DylanConfig) -> Result:
    """Let a layered network of agents answer one question; the majority of the last layer decides.

    An agent whose call fails is out of that layer. Ratings that cannot be read count as equal, and where the ranker
    fails or cannot be read the ratings choose. `scores` are the agents' importance: 1 shared by the last layer, handed
    back layer by layer as the ratings share it, and summed.
    """
    table = Table(question, pool, "dylan", config.draw)
    active = list(range(config.agents))
    layers: list[Ratings] = []
    last: list[Turn] = []
    stopped = "rounds"

    async def speak(agent: int, round: int) -> Turn:
        if not last:
            return await table.pose(agent, role="solver", round=round)
        return await table.tell(agent, [*answered_by_several(question, last), RATE], role="solver", round=round)

    for round in range(config.rounds):
        turns = table.answered(await asyncio.gather(*(speak(agent, round) for agent in active)))
        layers.append({turn.call.agent: _shares(turn, last) for turn in turns})
        last = turns
        if 3 * majority_vote([table.read(turn) for turn in turns])[1] > 2 * len(active):
            stopped = "consensus"
            break
        if round == 1 and len(turns) > KEPT and config.rounds > 2:
            parts = [*answered_by_several(question, turns), RANK]
            ranker = await table.tell(config.agents, parts, role="ranker", round=round, temperature=0.0)
            active = _best(table.said(ranker, _BEST), turns, _importance(layers))
    return table.result(last, stopped, _importance(layers))


def _shares(turn: Turn, rated: Sequence[Turn]) -> dict[int, float]:
    """How a turn's ratings divide 1 among the agents it rated; equally where one is missing."""
    assert turn.completion is not None, "only answers rate"
    said = {int(number): int(rating) for number, rating in _RATING.findall(turn.completion.text)}
    ratings = [said.get(number, 0) for number in range(1, len(rated) + 1)]
    if not all(ratings):
        ratings = [1] * len(rated)
    return {each.call.agent: rating / sum(ratings) for each, rating in zip(rated, ratings, strict=True)}


def _importance(layers: Sequence[Ratings]) -> dict[int, float]:
    current = dict.fromkeys(layers[-1], 1 / len(layers[-1]))
    total = dict(current)
    for layer in reversed(layers[1:]):
        handed: dict[int, float] = {}
        for agent, shares in layer.items():
            for rated, share in shares.items():
                handed[rated] = handed.get(rated, 0.0) + current[agent] * share
        for agent, amount in handed.items():
            total[agent] = total.get(agent, 0.0) + amount
        current = handed
    return dict(sorted(total.items()))


def _best(picked: str | None, turns: Sequence[Turn], importance: Mapping[int, float]) -> list[int]:
    """The agents that go on: those picked by number, or those that their peers rate best, ties to the first."""
    numbers = {int(number) for number in (picked or "").split(" and ") if number}
    if len(numbers) == KEPT and all(1 <= number <= len(turns) for number in numbers):
        return [turns[number - 1].call.agent for number in sorted(numbers)]
    best = sorted((turn.call.agent for turn in turns), key=lambda agent: -importance[agent])
    return sorted(best[:KEPT])
