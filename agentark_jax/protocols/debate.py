"""Multi-agent debate (Du et al. 2023; AgentArk §3, phase 1).

All agents answer alone; in every later round each sees the question, its own last answer and its peers' last answers,
and answers again. Updates are simultaneous: round k sees round k-1 only.
"""

import asyncio

from agentark_jax.protocols.calls import Caller, Draw
from agentark_jax.protocols.config import DebateConfig
from agentark_jax.records import Question, Turn

PROTOCOL = "debate"


async def debate(question: Question, caller: Caller, config: DebateConfig) -> list[list[Turn]]:
    """Let the agents debate one question; the turns by round, then agent.

    The number of rounds is no part of a call's identity: a longer debate continues a stored shorter one.
    """
    draw = Draw(config.temperature, config.max_tokens)

    async def first(agent: int) -> Turn:
        prompt = caller.form.question(question)
        return await caller.ask(question, prompt, draw, protocol=PROTOCOL, role="debater", agent=agent)

    async def revise(agent: int, round: int, last: list[Turn]) -> Turn:
        own = last[agent]
        peers = [turn for turn in last if turn is not own]
        prompt = caller.form.revision(question, _ids(own), [_ids(peer) for peer in peers])
        parents = (own.key, *(peer.key for peer in peers))
        return await caller.ask(
            question, prompt, draw, protocol=PROTOCOL, role="debater", agent=agent, round=round, parents=parents
        )

    rounds = [await asyncio.gather(*(first(agent) for agent in range(config.agents)))]
    for round in range(1, config.rounds):
        last = rounds[-1]
        rounds.append(await asyncio.gather(*(revise(agent, round, last) for agent in range(config.agents))))
    return rounds


def _ids(turn: Turn) -> list[int]:
    assert turn.completion is not None, "a protocol only sees turns that succeeded"
    return turn.completion.ids.tolist()
