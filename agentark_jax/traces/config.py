"""Settings of the choice of training trajectories."""

from dataclasses import dataclass
from typing import Literal, get_args

from agentark_jax.data.weighting import Weighting
from agentark_jax.errors import UsageError

Variant = Literal[
    "corrective_first",
    "corrective_only",
    "non_corrective_matched",
    "final_only",
    "consensus_only",
    "all_correct",
    "diverse_k1",
    "diverse_k2",
    "diverse_k3",
    "round1_only",
    "dialogue",
    "summary",
    "majority",
    "random",
]
# What asks no gold answer: neither which turns are taken nor which are left out follows from one.
GOLDLESS: tuple[Variant, ...] = ("consensus_only", "majority", "random")
# Trajectories of a question, where the variant says how many.
_TAKEN = {"final_only": 1, "diverse_k1": 1, "diverse_k2": 2, "diverse_k3": 3, "summary": 1}


@dataclass(frozen=True)
class SelectionConfig:
    """Which turns become training trajectories: correct ones, but for `consensus_only`, `majority` and `random`.

    Attributes:
        variant: of the last round, `corrective_first` takes the turns of agents that were wrong before first,
            `corrective_only` no others, and `non_corrective_matched` as many of agents that were always right, as long
            and as far as possible of the same questions; `final_only` takes one that gave the majority's answer;
            `diverse_k1`, `_k2` and `_k3` take so many, as different as can be, where two agents or more were right (DA
            in AgentArk). `all_correct` takes turns of every round. `round1_only` takes first-round turns, which saw no
            peers: what one agent alone can teach. `dialogue` takes turns as `corrective_first` does, each with all that
            it was shown: the agent's own earlier answers, its peers', then the better one, as one answer. `summary`
            takes what the summariser of `debate.aggregation` wrote. Three ask no gold answer: `consensus_only` takes
            turns of the last round that gave the answer of more than half of the agents, `majority` those that gave
            the most frequent one (of independent samples, self-consistency's), first agents first, and `random` any
            that can be read and are whole.
        per_question: at most so many trajectories of one question, where the variant does not say; null for no limit.
        limit: at most so many trajectories in all; null for no limit.
        fraction: share of the questions whose trajectories are kept, in (0, 1]; smaller shares lie within larger ones.
        weighting: what a token of one of a question's k trajectories counts in training: `tokens` 1, `questions` 1/k,
            `paths` 1/(k · its trajectory's tokens). Null: `questions` for `diverse_k…`, else `tokens`.
        seed: decides which turns `random` takes, which questions `fraction` keeps, and which trajectories a match
            drops.
    """

    variant: Variant = "corrective_first"
    per_question: int | None = 2
    limit: int | None = None
    fraction: float = 1.0
    weighting: Weighting | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.variant not in get_args(Variant):
            raise UsageError(f"select.variant is {self.variant!r}: choose one of {', '.join(get_args(Variant))}.")
        if self.per_question is not None and self.per_question < 1:
            raise UsageError(
                f"select.per_question is {self.per_question}: give a positive number, or null for no limit."
            )
        if self.limit is not None and self.limit < 1:
            raise UsageError(f"select.limit is {self.limit}: give a positive number, or null for no limit.")
        if self.weighting not in (None, *get_args(Weighting)):
            raise UsageError(f"select.weighting is {self.weighting!r}: choose {' or '.join(get_args(Weighting))}.")
        if not 0 < self.fraction <= 1:
            raise UsageError(f"select.fraction is {self.fraction}: give a share above 0 and at most 1.")

    @property
    def weighs(self) -> Weighting:
        """What a token counts."""
        return self.weighting or ("questions" if self.variant.startswith("diverse") else "tokens")

    @property
    def taken(self) -> int | None:
        """At most so many trajectories of one question."""
        return _TAKEN.get(self.variant, self.per_question)
