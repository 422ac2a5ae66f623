"""One agent, one call: directly, or told to think step by step (Kojima et al. 2022, arXiv 2205.11916)."""

import asyncio
from dataclasses import dataclass

from agentark_jax.protocols.calls import GREEDY, Caller, Draw
from agentark_jax.protocols.table import CLOSING, Pool, Result, Table
from agentark_jax.records import Question, Turn

STEP_BY_STEP = "\n\nThink step by step."


@dataclass(frozen=True)
class SingleConfig:
    """`cot`: the agent is told to think step by step; else it sees the question alone."""

    cot: bool = False
    draw: Draw = GREEDY


async def single(question: Question, pool: Pool, config: SingleConfig) -> Result:
    """One call; if it fails, that is an error."""
    if config.cot:
        table = Table(question, pool, "cot", config.draw)
        turn = await table.tell(0, [question.prompt, STEP_BY_STEP, CLOSING], role="solver")
    else:
        table = Table(question, pool, "direct", config.draw)
        turn = await table.pose(0, role="solver")
    return table.result(table.answered([turn]), "answered")


async def answer(question: Question, caller: Caller, draw: Draw, *, samples: int = 1, protocol: str) -> list[Turn]:
    """Ask one question `samples` times independently; the turns in sample order. A failed call is an error."""
    prompt = caller.form.question(question)
    return await asyncio.gather(
        *(
            caller.ask(question, prompt, draw, protocol=protocol, role="solver", sample=sample)
            for sample in range(samples)
        )
    )
