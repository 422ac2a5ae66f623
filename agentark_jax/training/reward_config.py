"""What rollouts earn, as settings; `training.rewards` has the rules."""

import difflib
import math
from dataclasses import dataclass, field
from typing import Literal, get_args

from agentark_jax.errors import UsageError, require

Aggregate = Literal["minimum_form", "steps", "min", "mean", "last", "product"]

BUILT_IN = ("verifiable", "process", "format", "length")

# Advantages are computed in float32: their squares, and the difference of 1 beside others, must be numbers there.
LARGEST = 1e6


@dataclass(frozen=True)
class RewardConfig:
    """What rollouts earn. Invalid values raise UsageError.

    Args:
        coefficients: factor of each reward in the sum; 0 only logs it. By name: verifiable, 1 for a right answer and 0
            for a wrong or unparseable one; process, what a process reward model makes of the steps; format, 1 for an
            answer that can be read in a completion that ended by itself, else 0; length, 0 down to -1 for the last
            overlong_buffer tokens before max_tokens; package.module:function, a function of your own, called with each
            `training.rewards.Rollout`, that returns a number or one per token.
        aggregate: of p(right) of the steps. One number: min, mean, last or product. At the last tokens of steps: steps,
            each step's own (more steps earn more); minimum_form, weighted such that their sum is close to min (PURE).
        overlong_buffer: tokens, for length (DAPO).
    """

    coefficients: dict[str, float] = field(default_factory=lambda: {"verifiable": 1.0})
    aggregate: Aggregate = "minimum_form"
    overlong_buffer: int | None = None

    def __post_init__(self) -> None:
        given = self.coefficients
        require(any(given.values()), "coefficients", given, "at least one reward that counts, such as verifiable: 1")
        for name, value in self.coefficients.items():
            module, colon, function = name.partition(":")
            if name not in BUILT_IN and not (module and colon and function.isidentifier()):
                near = difflib.get_close_matches(name, BUILT_IN, n=3, cutoff=0.5)
                meant = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(BUILT_IN)}, and"
                raise UsageError(
                    f"coefficients.{name}: there is no such reward; {meant} functions of your own, named as "
                    "package.module:function"
                )
            fix = f"a finite number, at most {LARGEST:g} in size"
            require(math.isfinite(value) and abs(value) <= LARGEST, f"coefficients.{name}", value, fix)
        allowed = get_args(Aggregate)
        require(self.aggregate in allowed, "aggregate", self.aggregate, f"one of {', '.join(allowed)}")
        buffer, wanted = self.overlong_buffer, "length" in self.coefficients
        fix = "at least 1 beside coefficients.length" if wanted else "null without coefficients.length"
        require((buffer is not None and buffer >= 1) if wanted else buffer is None, "overlong_buffer", buffer, fix)
