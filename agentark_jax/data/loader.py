"""Packed batches of fixed shape, as a grain dataset whose position is one global index: the step.

The plan of the whole batch is known everywhere, so any number of hosts can share it: each reads its rows of each batch.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import grain
import numpy as np

from agentark_jax.data.packing import check_examples, grouped_plan, packing_plan
from agentark_jax.errors import UsageError
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
    """All batches of all epochs. `plan[step][row]` are the indices of the examples in that row.

    `steps` is how many steps (of a process reward model) a row of a batch has room for; 0 where there are none.
    """

    plan: tuple[tuple[tuple[int, ...], ...], ...]
    examples: Sequence[Example]
    row_length: int
    terms: tuple[str, ...]
    steps: int = 0

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
        if self.steps:
            listed = [self._steps(self.plan[step][row]) for row in chosen]
            stacked["steps"] = {name: np.stack([row[name] for row in listed]) for name in listed[0]}
        return stacked

    def _steps(self, row: Sequence[int]) -> Batch:
        """The steps of a row [S], as `objectives.prm.Steps` wants them; examples of a question are its trajectories."""
        filled = {
            "ends": np.zeros(self.steps, np.int32),
            "labels": np.zeros(self.steps, np.float32),
            "mask": np.zeros(self.steps, bool),
            "questions": np.zeros(self.steps, np.int32),
            "trajectories": np.zeros(self.steps, np.int32),
        }
        place = start = 0
        for index in row:
            ends = np.asarray(self.examples[index].step_ends)
            here = slice(place, place + len(ends))
            filled["ends"][here] = start + ends
            filled["labels"][here] = self.examples[index].step_labels
            filled["mask"][here] = True
            filled["questions"][here] = self._numbers[self.examples[index].question_id]
            filled["trajectories"][here] = index
            place += len(ends)
            start += len(self.examples[index].ids)
        return filled

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {name: number for number, name in enumerate(dict.fromkeys(each.question_id for each in self.examples))}

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
    together: int | None = None,
) -> PackedBatches:
    """Batches {ids, positions, segment_ids: [rows, row_length] int32; weights {term: [rows, row_length] float32}}.

    Examples with steps give `steps` {ends, labels, mask, questions, trajectories: [rows, S]} as well. The rows of all
    epochs follow one another; only the very last batch is filled up with empty rows. `terms` defaults to those of the
    examples. With `together`, which divides `rows`, the examples of a question share one block of so many rows.

    Raises what `check_examples` raises, and UsageError for a question whose examples do not fit in such a block.
    """
    check_examples(examples, row_length=row_length, key=key)
    names = tuple(terms) if terms is not None else term_names(examples)
    lengths = [len(example.ids) for example in examples]
    shape = {"seed": seed, "row_length": row_length}
    packed: list[tuple[int, ...]] = []
    if together is None:
        for epoch in range(epochs):
            packed += map(tuple, packing_plan(lengths, epoch=epoch, **shape))
    else:
        groups: dict[str, list[int]] = {}
        for index, example in enumerate(examples):
            groups.setdefault(example.question_id, []).append(index)
        for epoch in range(epochs):
            try:
                packed += map(tuple, grouped_plan(list(groups.values()), lengths, epoch=epoch, rows=together, **shape))
            except ValueError as error:
                raise UsageError(
                    f"{key}: {error}, but the trajectories of a question must be in one micro-batch; raise {key} or "
                    "rows, or lower accumulation"
                ) from error
            packed += [()] * (-len(packed) % together)
    packed += [()] * (-len(packed) % rows)
    plan = tuple(tuple(packed[start : start + rows]) for start in range(0, len(packed), rows))
    steps = [0 if example.step_ends is None else len(example.step_ends) for example in examples]
    most = max((sum(steps[index] for index in row) for row in packed), default=0)
    return PackedBatches(plan, examples, row_length, names, most)
