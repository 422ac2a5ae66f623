"""One agent, one call: greedy, or several independent samples (self-consistency, Wang et al. 2022, votes on them)."""

import asyncio

from agentark_jax.protocols.calls import Caller, Draw
from agentark_jax.records import Question, Turn


async def answer(question: Question, caller: Caller, draw: Draw, *, samples: int = 1, protocol: str) -> list[Turn]:
    """Ask one question `samples` times independently; the turns in sample order."""
    prompt = caller.form.question(question)
    return await asyncio.gather(
        *(
            caller.ask(question, prompt, draw, protocol=protocol, role="solver", sample=sample)
            for sample in range(samples)
        )
    )
