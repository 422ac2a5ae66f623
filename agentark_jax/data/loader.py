"""Packed batches of fixed shape, as a grain dataset whose position is one global index: the step.

The plan of the whole batch is known everywhere, so any number of hosts can share it: each reads its rows of each batch.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import grain
import numpy as np

from agentark_jax.data.packing import check_examples, packing_plan
from agentark_jax.records import Example

Batch = dict[str, Any]


def term_names(examples: Sequence[Example]) -> tuple[str, ...]:
    """The names of all loss terms of the examples, sorted."""
    return tuple(sorted({term for example in examples for term in example.weights}))


def pack_row(examples: Sequence[Example], *, row_length: int, terms: Sequence[str]) -> Batch:
    """One row [row_length]: `ids`, `positions` (from 0 in every segment), `segment_ids` (1 …; 0 is padding), `weights`.

    The weight at a segment's position 0 is cleared: what stands before it is another example. A term that an example
    lacks has weight 0 there.
    """
    ids, positions, segment_ids = (np.zeros(row_length, np.int32) for _ in range(3))
    weights = {term: np.zeros(row_length, np.float32) for term in terms}
    start = 0
    for segment, example in enumerate(examples, 1):
        end = start + len(example.ids)
        ids[start:end] = example.ids
        positions[start:end] = np.arange(end - start)
        segment_ids[start:end] = segment
        for term, values in example.weights.items():
            weights[term][start + 1 : end] = values[1:]
        start = end
    return {"ids": ids, "positions": positions, "segment_ids": segment_ids, "weights": weights}


@dataclass(frozen=True)
class PackedBatches:
    """All batches of all epochs. `plan[step][row]` are the indices of the examples in that row."""

    plan: tuple[tuple[tuple[int, ...], ...], ...]
    examples: Sequence[Example]
    row_length: int
    terms: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.plan)

    def question_ids(self, step: int) -> list[str]:
        """The questions whose examples are in batch `step` (from 0)."""
        return sorted({self.examples[index].question_id for row in self.plan[step] for index in row})

    def lengths(self, step: int) -> list[int]:
        """How many tokens each example in batch `step` (from 0) has."""
        return [len(self.examples[index].ids) for row in self.plan[step] for index in row]

    def batch(self, step: int, rows: Sequence[int] | None = None) -> Batch:
        """Batch `step` (from 0), or only these of its rows."""
        chosen = range(len(self.plan[step])) if rows is None else rows
        filled = [
            pack_row([self.examples[i] for i in self.plan[step][row]], row_length=self.row_length, terms=self.terms)
            for row in chosen
        ]
        stacked: Batch = {name: np.stack([row[name] for row in filled]) for name in ("ids", "positions", "segment_ids")}
        stacked["weights"] = {term: np.stack([row["weights"][term] for row in filled]) for term in self.terms}
        return stacked

    def iterate(self, start: int, stop: int, rows: Sequence[int] | None = None) -> Iterator[Batch]:
        """Batches `start` … `stop`-1, or only these rows of each, read ahead by one thread."""
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
        steps = grain.MapDataset.range(start, stop).map(lambda step: self.batch(step, rows))
        return iter(steps.to_iter_dataset(options))


def packed_batches(
    examples: Sequence[Example],
    *,
    seed: int,
    epochs: int,
    rows: int,
    row_length: int,
    terms: Sequence[str] | None = None,
    key: str = "row_length",
) -> PackedBatches:
    """Batches {ids, positions, segment_ids: [rows, row_length] int32; weights {term: [rows, row_length] float32}}.

    The rows of all epochs follow one another; only the very last batch is filled up with empty rows. `terms` defaults
    to those of the examples. Raises what `check_examples` raises.
    """
    check_examples(examples, row_length=row_length, key=key)
    names = tuple(terms) if terms is not None else term_names(examples)
    lengths = [len(example.ids) for example in examples]
    packed = [
        tuple(row)
        for epoch in range(epochs)
        for row in packing_plan(lengths, seed=seed, epoch=epoch, row_length=row_length)
    ]
    packed += [()] * (-len(packed) % rows)
    plan = tuple(tuple(packed[start : start + rows]) for start in range(0, len(packed), rows))
    return PackedBatches(plan, examples, row_length, names)
