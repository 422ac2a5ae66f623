"""What the sides of the fine-tuning benchmarks train on: random token ids in the lengths of real debate traces."""

from collections.abc import Mapping, Sequence

import numpy as np

from agentark_jax.data.packing import packing_plan, shuffled
from agentark_jax.errors import UsageError
from benchmarks.trace_lengths import Pair, lengths

TRAINING: Mapping[str, float] = {"learning_rate": 3e-5, "weight_decay": 0.01, "clip_norm": 1.0}
GRAIN = 16

Trace = tuple[int, list[int]]
"""How many tokens of the prompt have no loss, and all ids."""


def draw(kind: str, count: int) -> list[Pair]:
    """So many of the real lengths, `short` or `long`, in an order that has nothing to do with them.

    Raises UsageError when there are not so many.
    """
    pairs = lengths(kind)
    if count > len(pairs):
        raise UsageError(f"there are {len(pairs)} {kind} traces, not {count}")
    return [pairs[index] for index in shuffled(len(pairs), seed=0, epoch=0)[:count]]


def random_traces(pairs: Sequence[Pair], vocabulary: int, step: int) -> list[Trace]:
    """Traces of these lengths; the cost of a step does not depend on what they say."""
    random = np.random.default_rng(step)
    return [(prompt, random.integers(0, vocabulary, prompt + completion).tolist()) for prompt, completion in pairs]


def totals(pairs: Sequence[Pair]) -> list[int]:
    """Tokens of each trace."""
    return [prompt + completion for prompt, completion in pairs]


def loss_tokens(pairs: Sequence[Pair]) -> int:
    return sum(completion for _, completion in pairs)


def packed_length(tokens: Sequence[int], rows: int, epochs: int = 1) -> int:
    """The smallest row length, a multiple of 16, with which our packing fits traces of these lengths into `rows` rows.

    A run has a row length of its own choice and many more traces than a step, which fill its rows better than the few
    of one step fill rows of any other length. With several epochs each is packed anew and must fit.
    """

    def fits(row_length: int) -> bool:
        plans = (packing_plan(tokens, seed=0, epoch=epoch, row_length=row_length) for epoch in range(epochs))
        return all(len(plan) <= rows for plan in plans)

    length = round_up(max(*tokens, sum(tokens) // rows))
    while not fits(length):
        length += GRAIN
    return length


def round_up(tokens: int) -> int:
    """The next multiple of 16."""
    return -(-tokens // GRAIN) * GRAIN
