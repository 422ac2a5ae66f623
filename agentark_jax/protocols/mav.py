"""MAV: several answers, each checked in several aspects; most approvals win (Lifshitz et al. 2025, arXiv 2502.20379).

`candidates` × (1 + `aspects`) calls; the verifiers answer greedily.
"""

import asyncio
import re
from dataclasses import dataclass

from agentark_jax.errors import UsageError
from agentark_jax.protocols.calls import SAMPLED, Draw
from agentark_jax.protocols.config import check_counts
from agentark_jax.protocols.table import Pool, Result, Table
from agentark_jax.records import Question

ASPECTS = (
    "whether every calculation is correct",
    "whether every step follows from the ones before it",
    "whether it uses all that the question gives, and nothing it does not give",
    "whether it answers what is asked, in the unit that is asked for",
    "whether the final answer is the one that the reasoning comes to",
    "whether the facts it relies on are true",
    "whether another way of solving the question comes to the same answer",
    "whether the answer is plausible in size and kind",
)
VERIFY = (
    "Check one aspect of an answer to a question.\n\nQuestion:\n{question}\n\nAnswer:\n",
    '\n\nCheck {aspect}, and nothing else. End with "Approved: yes" or "Approved: no".',
)
_APPROVED = re.compile(r"\bapproved: (yes|no)\b", re.I)


@dataclass(frozen=True)
class MavConfig:
    """`aspects`: how many of `ASPECTS` are checked, from the first."""

    candidates: int = 4
    aspects: int = 3
    draw: Draw = SAMPLED

    def __post_init__(self) -> None:
        check_counts(self, candidates=1, aspects=1)
        if self.aspects > len(ASPECTS):
            raise UsageError(f"MavConfig.aspects is {self.aspects}: there are {len(ASPECTS)}.")


async def mav(question: Question, pool: Pool, config: MavConfig) -> Result:
    """Answer several times and keep what most verifiers approve; ties go to the first.

    Candidates that fail are out; a verifier that fails, or whose verdict cannot be read, does not approve. `scores` are
    the approvals of each candidate. Candidates are the pool's agent 0, verifiers the agents after it.
    """
    table = Table(question, pool, "mav", config.draw)
    asked = (table.pose(0, role="solver", sample=sample) for sample in range(config.candidates))
    candidates = table.answered(await asyncio.gather(*asked))
    before, after = VERIFY
    verdicts = await asyncio.gather(
        *(
            table.tell(
                1 + number,
                [before.format(question=question.prompt), candidate, after.format(aspect=aspect)],
                role="verifier",
                round=1,
                sample=candidate.call.sample,
                temperature=0.0,
            )
            for candidate in candidates
            for number, aspect in enumerate(ASPECTS[: config.aspects])
        )
    )
    approvals = {candidate.call.sample: 0.0 for candidate in candidates}
    for verdict in verdicts:
        approvals[verdict.call.sample] += (table.said(verdict, _APPROVED) or "").lower() == "yes"
    winner = max(candidates, key=lambda candidate: approvals[candidate.call.sample])
    return table.result([winner], "verified", approvals)
