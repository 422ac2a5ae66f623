"""What benchmarks on a GPU have in common: shapes of models, and sides that follow one another."""

from collections.abc import Callable
from typing import Any

import numpy as np

from agentark_jax.errors import AgentArkError, UsageError
from agentark_jax.models.published import PUBLISHED
from benchmarks.results import Group
from benchmarks.workers import Reply, Side, Worker

# The shape of `tiny NAME`, to rehearse with where there is no GPU: that of NAME but for these.
_TINY = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 512}
_TINY |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}


def shape_of(name: str) -> dict[str, Any]:
    """The `config.json` of a published model; of `tiny NAME` one of its kind that runs anywhere."""
    *_, known = name.split()
    return {**PUBLISHED[known], **(_TINY if is_tiny(name) else {})}


def is_tiny(name: str) -> bool:
    return name.startswith("tiny ")


def alone(
    sides: list[Side],
    repetitions: int,
    check: Callable[[dict[str, Reply]], None],
    say: Callable[[str], None],
    *,
    anywhere: bool,
) -> Group:
    """Every side's replies, one side after the other, each in a process that has the GPU for itself.

    Repetition 0 compiles and warms up; `check` gets those of all sides so far and raises when they disagree, before any
    time is spent on this side's speed. It stays in the result, first in each list.

    Raises UsageError where a side finds no GPU, unless it may run `anywhere`.
    """
    replies: Group = {}
    for side in sides:
        say(f"starting {side.name}")
        with Worker(side) as worker:
            if worker.ready["platform"] != "gpu" and not anywhere:
                raise UsageError(
                    f"--suite gpu: {side.name!r} finds no GPU; run it on a machine that has one, with JAX for CUDA "
                    "(pip install -e '.[cuda]') and peers whose torch is for CUDA (python -m benchmarks.peers trl)"
                )
            replies[side.name] = [{**worker.ready, **worker.repeat(0)}]
            check({name: found[0] for name, found in replies.items()})
            replies[side.name] += [{**worker.ready, **worker.repeat(index)} for index in range(1, repetitions + 1)]
        taken = ", ".join(f"{reply['seconds']:.3f}" for reply in replies[side.name])
        say(f"{side.name}: {taken} s")
    return replies


def device_memory(replies: list[Reply]) -> float:
    """The most that a side had in use on its device, in 10⁹ bytes; 0 where that is not known."""
    return max(float(reply["peak_device_gb"]) for reply in replies)


def agree(what: str, values: dict[str, float], limit: float) -> float:
    """The range of some values over the largest. Raises AgentArkError when that is more than `limit`, or no number."""
    found = np.array(list(values.values()))  # where one of them is NaN, so is the range
    difference = float(np.ptp(found) / np.abs(found).max())
    if not difference <= limit:
        raise AgentArkError(f"the sides do not do the same work: {what} {values}; speed says nothing before they agree")
    return difference
