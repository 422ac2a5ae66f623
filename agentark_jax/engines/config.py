"""Settings of the embedded engine."""

from dataclasses import dataclass
from typing import Any, Literal, get_args

from agentark_jax.errors import UsageError

CacheDtype = Literal["float32", "bfloat16"]

# They decide in what portions the work is done, not what comes out: a resumed run may change them.
BOOKKEEPING = ("slots", "context", "chunk", "prompt_bucket")


@dataclass(frozen=True)
class EngineConfig:
    """The embedded JAX engine.

    Attributes:
        slots: sequences decoded together in one step.
        context: longest prompt plus completion, in tokens; the cache holds slots × context positions, or slots × window
            in layers with a sliding window that is shorter. Null: as much as the run's longest call can need.
        chunk: decode steps between two visits of the host, at most.
        prompt_bucket: prompts are padded to a multiple of this many tokens, so that few programs are compiled.
        cache_dtype: in what keys and values are kept and multiplied: float32, or bfloat16 with half the memory and
            slightly other log-probs.
    """

    slots: int = 32
    context: int | None = None
    chunk: int = 32
    prompt_bucket: int = 32
    cache_dtype: CacheDtype = "float32"

    def __post_init__(self) -> None:
        for key in ("slots", "context", "chunk", "prompt_bucket"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise UsageError(f"engine.{key} is {value}: give a positive number.")
        if self.cache_dtype not in get_args(CacheDtype):
            raise UsageError(f"engine.cache_dtype is {self.cache_dtype!r}: choose {' or '.join(get_args(CacheDtype))}.")

    def fingerprint(self) -> dict[str, Any]:
        """What of this config the sampled tokens depend on, beyond rounding in float32."""
        return {} if self.cache_dtype == "float32" else {"cache_dtype": self.cache_dtype}
