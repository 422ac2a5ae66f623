"""AgentVerse: recruit experts, let them decide, evaluate, and begin again (Chen et al. 2023, arXiv 2308.10848).

A recruiter names a panel; its first expert solves and the others criticise until all agree (the vertical structure); an
evaluator accepts the solution or advises the next turn. At most turns × (2 + critic_rounds × agents) calls.
"""

import asyncio
import re
from dataclasses import dataclass

from agentark_jax.protocols.calls import SAMPLED, Draw
from agentark_jax.protocols.config import check_counts
from agentark_jax.protocols.table import CLOSING, Part, Pool, Result, Table
from agentark_jax.records import Question, Turn

HEAD = "A panel of experts answers a question.\n\nQuestion:\n{question}"
RECRUIT = "\n\nWhich {agents} experts should sit on the panel? Describe each in one numbered line."
PANEL = "\n\nThe panel:\n"
SOLUTION = "\n\nThe solution so far:\n"
REVIEW = "\n\nAn expert says of it:\n"
ADVICE = "\n\nAn evaluator says of an earlier solution:\n"
SOLVE = "\n\nYou are expert 1 of the panel. Write the solution, with all that was said in mind." + CLOSING
CRITICISE = (
    "\n\nYou are expert {number} of the panel. If the solution is right, say [Agree] and nothing else. Otherwise say "
    "what to change."
)
EVALUATE = (
    '\n\nIs the solution right and complete? Say what to do better, then end with "Score: 1" if it is, or "Score: 0".'
)
_AGREES = re.compile(r"(\[agree\])", re.I)
_SCORE = re.compile(r"\bscore: ([01])\b", re.I)


@dataclass(frozen=True)
class AgentverseConfig:
    """`agents`: experts on the panel, the solver among them; `critic_rounds`: solutions tried in a turn, at most."""

    agents: int = 2
    turns: int = 3
    critic_rounds: int = 3
    draw: Draw = SAMPLED

    def __post_init__(self) -> None:
        check_counts(self, agents=1, turns=1, critic_rounds=1)


async def agentverse(question: Question, pool: Pool, config: AgentverseConfig) -> Result:
    """Let a recruited panel answer one question; its last solution is the answer.

    Without a recruiter the experts have no description, a solver that fails leaves the solution before it (without any,
    that is an error), a critic that fails has no objection, and an evaluator that fails, or gives no score that can be
    read, has not accepted. The recruiter is the pool's agent 0, the experts follow, then the evaluator.
    """
    table = Table(question, pool, "agentverse", config.draw)
    head = HEAD.format(question=question.prompt)
    solutions: list[Turn] = []
    advice: list[Part] = []

    for turn in range(config.turns):
        start = turn * config.critic_rounds
        recruiter = await table.tell(
            0, [head, *advice, RECRUIT.format(agents=config.agents)], role="recruiter", round=start
        )
        recruited: list[Part] = [PANEL, recruiter] if recruiter.error is None else []
        panel = [head, *recruited, *advice]
        reviews: list[Part] = []
        for round in range(start, start + config.critic_rounds):
            before: list[Part] = [part for solution in solutions[-1:] for part in (SOLUTION, solution)]
            solution = await table.tell(1, [*panel, *before, *reviews, SOLVE], role="solver", round=round)
            solutions = table.answered([*solutions, solution])
            solved = [*panel, SOLUTION, solutions[-1]]
            critics = await asyncio.gather(
                *(
                    table.tell(number, [*solved, CRITICISE.format(number=number)], role="critic", round=round)
                    for number in range(2, config.agents + 1)
                )
            )
            objections = [each for each in critics if each.completion and not _AGREES.search(each.completion.text)]
            if not objections:
                break
            reviews = [part for each in objections for part in (REVIEW, each)]
        evaluator = await table.tell(
            config.agents + 1, [*solved, EVALUATE], role="evaluator", round=round, temperature=0.0
        )
        if table.said(evaluator, _SCORE) == "1":
            return table.result(solutions[-1:], "accepted")
        advice = [ADVICE, evaluator] if evaluator.error is None else []
    return table.result(solutions[-1:], "turns")
