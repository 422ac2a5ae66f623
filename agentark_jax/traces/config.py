"""Settings of the choice of training trajectories."""

from dataclasses import dataclass
from typing import Literal, get_args

from agentark_jax.errors import UsageError

Variant = Literal["corrective_first", "round1_only"]


@dataclass(frozen=True)
class SelectionConfig:
    """Which of the correct turns become training trajectories.

    Attributes:
        variant: `corrective_first` takes last-round turns, those of agents that were wrong before first;
            `round1_only` takes first-round turns, which saw no peers: what one agent alone can teach.
        per_question: at most so many trajectories of one question.
        limit: at most so many trajectories in all; null for no limit.
        fraction: share of the questions whose trajectories are kept, in (0, 1]; smaller shares lie within larger ones.
        seed: decides which questions `fraction` keeps and which trajectories a match drops.
    """

    variant: Variant = "corrective_first"
    per_question: int = 2
    limit: int | None = None
    fraction: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.variant not in get_args(Variant):
            raise UsageError(f"select.variant is {self.variant!r}: choose one of {', '.join(get_args(Variant))}.")
        if self.per_question < 1:
            raise UsageError(f"select.per_question is {self.per_question}: give a positive number.")
        if self.limit is not None and self.limit < 1:
            raise UsageError(f"select.limit is {self.limit}: give a positive number, or null for no limit.")
        if not 0 < self.fraction <= 1:
            raise UsageError(f"select.fraction is {self.fraction}: give a share above 0 and at most 1.")
