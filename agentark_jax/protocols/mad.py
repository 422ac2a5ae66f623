"""MAD: two sides argue, a moderator may end it, a judge does in the end (Liang et al. 2023, arXiv 2305.19118).

Each round the affirmative speaks, then the negative, whose task is to disagree where it can; the moderator then names
the side that is right, or leaves it open. After the last round a judge writes the answer. 3 calls a round, and one for
the judge: 3 × rounds + 1 at most.
"""

import re
from dataclasses import dataclass
from typing import Final

from agentark_jax.protocols.calls import SAMPLED, Draw
from agentark_jax.protocols.config import check_counts
from agentark_jax.protocols.table import CLOSING, Part, Pool, Result, Table
from agentark_jax.records import Question, Turn

SIDES: Final = ("affirmative", "negative")
SCENE = "Two sides debate the answer to a question.\n\nQuestion:\n{question}"
SPEAK = {
    "affirmative": "\n\nYou are the affirmative side. State your answer and defend it, or correct it.",
    "negative": "\n\nYou are the negative side. Look for errors in what the affirmative side said, and state your own "
    "answer.",
}
MODERATE = (
    "\n\nYou are the moderator. If one side's answer is clearly right, the debate is over; otherwise it stays open. "
    'End with "Verdict: affirmative", "Verdict: negative" or "Verdict: open".'
)
JUDGE = "\n\nYou are the judge, and the debate is over. Weigh both sides and write the right answer with its reasoning."
_VERDICT = re.compile(r"\bverdict: (affirmative|negative|open)\b", re.I)


@dataclass(frozen=True)
class MadConfig:
    rounds: int = 3
    draw: Draw = SAMPLED

    def __post_init__(self) -> None:
        check_counts(self, rounds=1)


async def mad(question: Question, pool: Pool, config: MadConfig) -> Result:
    """Let two sides debate one question.

    A speech that fails is missing from the debate (a round without any is an error), a moderator that fails leaves it
    open, and without a judge the sides' last speeches stand, the affirmative first.
    """
    table = Table(question, pool, "mad", config.draw)
    speeches: list[Turn] = []

    def debated(instruction: str) -> list[Part]:
        said = [part for turn in speeches for part in (f"\n\nThe {turn.call.role} side said:\n", turn)]
        return [SCENE.format(question=question.prompt), *said, instruction]

    def last(side: str) -> list[Turn]:
        return [turn for turn in speeches if turn.call.role == side][-1:]

    for round in range(config.rounds):
        spoken = []
        for agent, side in enumerate(SIDES):
            turn = await table.tell(agent, debated(SPEAK[side] + CLOSING), role=side, round=round)
            spoken.append(turn)
            speeches += [turn] if turn.error is None else []
        table.answered(spoken)
        moderator = await table.tell(2, debated(MODERATE), role="moderator", round=round, temperature=0.0)
        verdict = table.said(moderator, _VERDICT)
        if verdict is not None and (winner := last(verdict.lower())):
            return table.result(winner, "verdict")
    judge = await table.tell(3, debated(JUDGE + CLOSING), role="judge", round=config.rounds, temperature=0.0)
    final = [judge] if judge.error is None else [turn for side in SIDES for turn in last(side)]
    return table.result(final, "judge")
