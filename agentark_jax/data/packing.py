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


def grouped_plan(
    groups: Sequence[Sequence[int]], lengths: Sequence[int], *, seed: int, epoch: int, row_length: int, rows: int
) -> list[list[int]]:
    """As `packing_plan`, with each group of examples (all indices of `lengths`, once each) in one block of `rows` rows.

    Blocks follow one another, so that a step, or a micro-batch, of `rows` rows has whole groups only. The price is room
    at the end of blocks.

    Raises ValueError for an example longer than a row, and for a group that needs more than `rows` rows.
    """
    plan: list[list[int]] = []
    block: list[list[int]] = []
    for number in shuffled(len(groups), seed=seed, epoch=epoch):
        joined = _with_group(block, groups[number], lengths, row_length, rows)
        if joined is None:
            plan += block + [[] for _ in range(-len(block) % rows)]
            joined = _with_group([], groups[number], lengths, row_length, rows)
        if joined is None:
            raise ValueError(f"the examples {list(groups[number])} do not fit in {rows} rows of {row_length} tokens")
        block = joined
    return plan + block


def _with_group(
    block: Sequence[Sequence[int]], group: Sequence[int], lengths: Sequence[int], row_length: int, rows: int
) -> list[list[int]] | None:
    """A block of rows and a group in it, or None where there is no room for it."""
    filled = [list(row) for row in block]
    for index in group:
        fitting = next((row for row in filled if sum(lengths[i] for i in row) + lengths[index] <= row_length), None)
        if fitting is None and (len(filled) == rows or lengths[index] > row_length):
            return None
        if fitting is None:
            filled.append(fitting := [])
        fitting.append(index)
    return filled


def check_examples(examples: Sequence[Example], *, row_length: int, key: str = "row_length") -> None:
    """Refuses examples that cannot be trained on, naming the question and the fix.

    Raises UsageError for an example longer than `row_length` (`key` is its name in the config); AgentArkError for no
    examples at all, weights that do not match the ids or are not finite, steps that do not lie in the ids or have no
    probability as a label, and an example without a loss token (a weight at position 0 is none: nothing stands before
    it) or a step.
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
        if example.step_ends is not None:
            _check_steps(example, name)
            continue
        if not any(np.any(np.asarray(weights)[1:] != 0) for weights in example.weights.values()):
            raise AgentArkError(
                f"{name} has no token with loss; an example that teaches nothing is a rendering mistake"
            )


def _check_steps(example: Example, name: str) -> None:
    ends, labels = np.asarray(example.step_ends), np.asarray(example.step_labels, np.float64)
    if not len(ends):
        raise AgentArkError(f"{name} has no step; an example that teaches nothing is a rendering mistake")
    if ends.shape != labels.shape or ends[0] < 0 or ends[-1] >= len(example.ids) or np.any(np.diff(ends) <= 0):
        raise AgentArkError(f"{name} has {len(example.ids)} ids, steps that end at {ends} and labels {labels}")
    if not np.all((labels >= 0) & (labels <= 1)):
        raise AgentArkError(f"{name} has labels that are no probabilities: {labels}")
