"""Settings of the objectives that have any, apart from these, so that reading them does not wait for JAX."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from agentark_jax.errors import require

Aggregation = Literal["token", "sequence", "constant"]
Ratio = Literal["token", "sequence"]

# The terms of the loss of a process reward model (`objectives.prm`), and the factors of those that AgentArk has.
Term = Literal["cross_entropy", "contrastive", "supervised_contrastive"]
PAPER: Mapping[Term, float] = {"contrastive": 1.0}
RELEASE: Mapping[Term, float] = {"cross_entropy": 1.0, "supervised_contrastive": 0.5}


@dataclass(frozen=True)
class PolicyLossConfig:
    """Which policy loss. Invalid values raise UsageError.

    Args:
        aggregation: what is averaged: token, all sampled tokens of the step (DAPO); sequence, the means of the
            completions (GRPO, GSPO); constant, their sums divided by max_tokens (Dr. GRPO).
        max_tokens: tokens of the longest completion that can be sampled, for constant.
        ratio: token, that of each token; sequence, the geometric mean of a completion's ratios on each of its tokens
            (GSPO, arXiv 2507.18071, in its token form: §4.3, which is the same where a completion has one advantage).
        clip_low: the objective gains nothing from ratios below 1 - clip_low. GSPO needs some 3e-4.
        clip_high: nor from those above 1 + clip_high; DAPO has 0.28. GSPO needs some 4e-4.
        rollout_cap: truncated importance sampling: tokens count by min(π_old / π_rollout, rollout_cap), because the
            engine's probabilities are not quite the trainer's; null for no such weights.
        kl_coefficient: factor of the KL divergence to the reference in the loss (k3); 0 for none.
        temperature: at which the completions were sampled.
        on_policy: the policy that is updated is the one that sampled (one update per rollout), so ratios are 1.
    """

    aggregation: Aggregation = "token"
    max_tokens: int | None = None
    ratio: Ratio = "token"
    clip_low: float = 0.2
    clip_high: float = 0.2
    rollout_cap: float | None = 2.0
    kl_coefficient: float = 0.0
    temperature: float = 1.0
    on_policy: bool = False

    def __post_init__(self) -> None:
        for key, choices in (("aggregation", Aggregation), ("ratio", Ratio)):
            value, allowed = getattr(self, key), get_args(choices)
            require(value in allowed, key, value, f"one of {', '.join(allowed)}")
        constant = self.aggregation == "constant"
        wanted = "at least 1 when aggregation is constant" if constant else "null unless aggregation is constant"
        holds = (self.max_tokens is not None and self.max_tokens >= 1) if constant else self.max_tokens is None
        require(holds, "max_tokens", self.max_tokens, wanted)
        require(0 < self.clip_low <= 1, "clip_low", self.clip_low, "above 0 and at most 1")
        for key in ("clip_high", "temperature"):
            value = getattr(self, key)
            require(value > 0 and math.isfinite(value), key, value, "a positive number")
        cap, kl = self.rollout_cap, self.kl_coefficient
        require(cap is None or cap > 0, "rollout_cap", cap, "a positive number, or null")
        require(kl >= 0 and math.isfinite(kl), "kl_coefficient", kl, "zero or a positive number")


@dataclass(frozen=True)
class ValueLossConfig:
    """How values are learned. Invalid values raise UsageError.

    Args:
        coefficient: factor of the value loss beside the policy's; 0 trains no values.
        clip: a value gains nothing from being further than this from its old one (PPO2); null for no such bound.
            Rewards are of the order of 1.
    """

    coefficient: float = 0.5
    clip: float | None = 0.2

    def __post_init__(self) -> None:
        factor, clip = self.coefficient, self.clip
        require(factor >= 0 and math.isfinite(factor), "coefficient", factor, "zero or a positive number")
        require(clip is None or clip > 0, "clip", clip, "a positive number, or null")
