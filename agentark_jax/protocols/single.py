"""One agent, one call: directly, or told to think step by step (Kojima et al. 2022, arXiv 2205.11916)."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace

from agentark_jax.data.render import Format, Prompt
from agentark_jax.protocols.calls import GREEDY, Draw
from agentark_jax.protocols.table import CLOSING, Pool, Result, Table
from agentark_jax.records import Question, Turn

STEP_BY_STEP = "\n\nThink step by step."
HINT = (
    "Question: {question}\n\nThe right answer is {answer}. Write a solution that finds it step by step and does not "
    "say that the answer was known."
)


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


async def answer(question: Question, pool: Pool, draw: Draw, *, samples: int = 1, protocol: str) -> list[Turn]:
    """Ask one question `samples` times independently, agents in turn; the turns in sample order.

    A failed call is an error.
    """
    return await _independent(question, pool, draw, samples, protocol, lambda form: form.question(question))


async def explain(question: Question, pool: Pool, draw: Draw, *, samples: int = 1, protocol: str) -> list[Turn]:
    """As `answer`, but the agents are told the right answer and asked for a way to it (Zelikman et al. 2022,
    arXiv 2203.14465).
    """
    return await _independent(question, pool, draw, samples, protocol, lambda form: hinted(question, form))


def hinted(question: Question, form: Format) -> Prompt:
    """What `explain` asks."""
    return form.instruction([HINT.format(question=question.prompt, answer=question.answer) + CLOSING])


async def _independent(
    question: Question, pool: Pool, draw: Draw, samples: int, protocol: str, prompt: Callable[[Format], Prompt]
) -> list[Turn]:
    def one(sample: int) -> Awaitable[Turn]:
        agent = pool[sample]
        own = draw if agent.temperature is None else replace(draw, temperature=agent.temperature)
        asked = prompt(agent.caller.form)
        return agent.caller.ask(question, asked, own, protocol=protocol, role="solver", sample=sample)

    return await asyncio.gather(*map(one, range(samples)))
