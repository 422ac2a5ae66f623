"""The packing plan: which examples share a row.

The plan is a pure function of the example lengths, a seed, the epoch and the row length, so the position in the data
is one global index and a resumed run sees exactly the rows that it would have seen.
"""

import hashlib
from collections.abc import Sequence

import numpy as np

from agentark_jax.errors import AgentArkError, UsageError
from agentark_jax.records import Example

OPEN_ROWS = 64


def shuffled(count: int, *, seed: int, epoch: int) -> list[int]:
    """0 … count-1 in an order given by hashes alone, hence the same under every version of every library."""

    def key(index: int) -> bytes:
        return hashlib.blake2b(f"{seed}/{epoch}/{index}".encode(), digest_size=16).digest()

    return sorted(range(count), key=key)


def packing_plan(
    lengths: Sequence[int], *, seed: int, epoch: int, row_length: int, open_rows: int = OPEN_ROWS
) -> list[list[int]]:
    """Rows of example indices; every index occurs once, and no row's lengths sum to more than `row_length`.

    Examples are shuffled by (seed, epoch) and put into the first row with room among the `open_rows` newest rows. The
    bound keeps a row's examples near each other in the shuffled order and the plan linear in their number.

    Raises ValueError for an example longer than a row (`check_examples` says so in the user's words).
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for index in shuffled(len(lengths), seed=seed, epoch=epoch):
        length = lengths[index]
        if not 0 < length <= row_length:
            raise ValueError(f"example {index} has {length} tokens; a row holds 1 to {row_length}")
        first = max(0, len(rows) - open_rows)
        fitting = next((row for row in range(first, len(rows)) if room[row] >= length), None)
        if fitting is None:
            rows.append([index])
            room.append(row_length - length)
        else:
            rows[fitting].append(index)
            room[fitting] -= length
    return rows


def check_examples(examples: Sequence[Example], *, row_length: int, key: str = "row_length") -> None:
    """Refuses examples that cannot be trained on, naming the question and the fix.

    Raises UsageError for an example longer than `row_length` (`key` is its name in the config); AgentArkError for no
    examples at all, weights that do not match the ids or are not finite, and an example without a loss token (a weight
    at position 0 is none: nothing stands before it).
    """
    if not examples:
        raise AgentArkError("there is no example to train on: every one was filtered out, or the input is empty")
    for example in examples:
        name = f"the example of question {example.question_id} ({example.variant})"
        if len(example.ids) > row_length:
            raise UsageError(
                f"{key}: {name} has {len(example.ids)} tokens and a row holds {row_length}; "
                f"set {key} to at least {max(len(other.ids) for other in examples)}, or generate shorter completions"
            )
        for term, weights in example.weights.items():
            if np.shape(weights) != np.shape(example.ids):
                raise AgentArkError(
                    f"{name} has {len(example.ids)} ids and weights of shape {np.shape(weights)} for the term {term!r}"
                )
            if not np.all(np.isfinite(weights)):
                raise AgentArkError(f"{name} has a weight of the term {term!r} that is not finite")
        if not any(np.any(np.asarray(weights)[1:] != 0) for weights in example.weights.values()):
            raise AgentArkError(
                f"{name} has no token with loss; an example that teaches nothing is a rendering mistake"
            )
