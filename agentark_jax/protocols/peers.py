"""Whom an agent hears, and what it hears in the place of each: the peer itself, another question's answer, or noise.

Sparse topologies: Li et al. 2024, arXiv 2406.11776. The other two sources are placebos: what they leave of a debate's
gain comes from being asked again, not from what peers say.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from agentark_jax.data.render import Format, Segment
from agentark_jax.errors import UsageError
from agentark_jax.records import Question, Turn, stable_hash


@dataclass(frozen=True)
class Peer:
    """What an agent is shown as peer `agent`'s last answer: a turn, or ids (in its own tokenizer) that nobody said."""

    agent: int
    said: Turn | Segment


class PeerSource(Protocol):
    """What agent `agent` sees of its peers in round `round`; `seen` are their last answers by agent, ascending."""

    async def __call__(
        self, question: Question, agent: int, round: int, seen: Mapping[int, Turn], form: Format
    ) -> list[Peer]: ...


def neighbours(topology: str, agents: int, agent: int) -> list[int]:
    """The agents that one of `agents` hears, ascending; topologies as in `DebateConfig`."""
    everyone = [peer for peer in range(agents) if peer != agent]
    if topology == "full" or (topology == "star" and agent == 0):
        return everyone
    if topology == "star":
        return [0]
    if topology == "none":
        return []
    steps = (-1, 1) if topology == "ring" else range(1, int(topology.removeprefix("sparse-")) + 1)
    return sorted({(agent + step) % agents for step in steps} - {agent})


async def real(question: Question, agent: int, round: int, seen: Mapping[int, Turn], form: Format) -> list[Peer]:
    """The peers themselves."""
    return [Peer(peer, turn) for peer, turn in seen.items()]


def another_question(turns: Iterable[Turn], seed: int) -> PeerSource:
    """In each peer's place what it first said on another question; `turns` are a debate's on at least two questions."""
    first: dict[str, dict[int, Turn]] = {}
    for turn in turns:
        if turn.call.round == 0 and turn.error is None:
            first.setdefault(turn.call.question_id, {})[turn.call.agent] = turn
    partner = derangement(first, seed)

    async def source(question: Question, agent: int, round: int, seen: Mapping[int, Turn], form: Format) -> list[Peer]:
        other = first[partner[question.id]]
        return [Peer(peer, other[peer]) for peer in seen if peer in other]

    return source


def noise(seed: int) -> PeerSource:
    """In each peer's place as many random tokens of the ordinary vocabulary as it said, the same for all who hear."""

    async def source(question: Question, agent: int, round: int, seen: Mapping[int, Turn], form: Format) -> list[Peer]:
        return [Peer(peer, _random(form, turn, [seed, question.id, round, peer])) for peer, turn in seen.items()]

    return source


def _random(form: Format, turn: Turn, place: list[object]) -> Segment:
    assert turn.completion is not None, "only answers are shown"
    length = len(form.shown(turn.completion.ids.tolist()))
    generator = np.random.default_rng(int(stable_hash(place)[:16], 16))
    return tuple(generator.choice(form.tokenizer.ordinary_ids, length).tolist())


def derangement(ids: Iterable[str], seed: int) -> dict[str, str]:
    """A seeded permutation in one cycle, so that nothing is mapped to itself.

    Raises:
        UsageError: fewer than two ids.
    """
    order = sorted(ids, key=lambda each: stable_hash([seed, each]))
    if len(order) < 2:
        raise UsageError("debate.peers is 'other', which needs a second question: ask more, or set it to real.")
    return dict(zip(order, [*order[1:], order[0]], strict=True))
