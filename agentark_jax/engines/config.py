"""Settings of the embedded engine."""

from dataclasses import dataclass

from agentark_jax.errors import UsageError


@dataclass(frozen=True)
class EngineConfig:
    """The embedded JAX engine.

    Attributes:
        slots: sequences decoded together in one step.
        context: longest prompt plus completion, in tokens; the cache holds slots × context positions. Null: as much as
            the run's longest call can need.
        chunk: decode steps between two visits of the host, at most.
        prompt_bucket: prompts are padded to a multiple of this many tokens, so that few programs are compiled.
    """

    slots: int = 32
    context: int | None = None
    chunk: int = 32
    prompt_bucket: int = 32

    def __post_init__(self) -> None:
        for key in ("slots", "context", "chunk", "prompt_bucket"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise UsageError(f"engine.{key} is {value}: give a positive number.")
