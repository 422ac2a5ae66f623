"""What is learned from: trajectories, how they were arrived at, and the file they are kept in.

Random choices hash the seed with the thing chosen, so they are the same on every machine and for every library version.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float32, Int32

from agentark_jax.errors import AgentArkError, UsageError
from agentark_jax.files import atomic_path
from agentark_jax.records import ids_hash, stable_hash
from agentark_jax.traces.config import Variant

_FORMAT = "1"
_SCHEMA = pa.schema(
    [
        ("question_id", pa.string()),
        ("turn_key", pa.string()),
        ("trace_keys", pa.list_(pa.string())),
        ("completion_ids", pa.list_(pa.int32())),
        ("logprobs", pa.list_(pa.float32())),
        ("corrective", pa.bool_()),
        ("agent", pa.int32()),
        ("round", pa.int32()),
    ]
)


@dataclass(frozen=True, eq=False)
class Trajectory:
    """One completion to learn from.

    `trace_keys` are the keys of the agent's turns up to this one, `turn_key`, in round order. `corrective`: the agent
    was wrong (or unparseable) in an earlier round. `logprobs` are those of the sampled tokens, `completion_ids`; None
    where these were encoded from a text (`Completion.text_only`).

    Of a `dialogue`, `trace_keys` are those of the turns that it tells, in that order, `turn_key` last. `completion_ids`
    are what was said in them, each part in its speaker's tokenizer, without the end tokens inside; the words between
    are the student's format's (`render.dialogue_example`). No part but the first was sampled after what stands before
    it here, so `logprobs` is None.
    """

    question_id: str
    turn_key: str
    trace_keys: tuple[str, ...]
    completion_ids: Int32[np.ndarray, " tokens"]
    logprobs: Float32[np.ndarray, " tokens"] | None
    corrective: bool
    agent: int
    round: int


@dataclass(frozen=True)
class FunnelStep:
    """What one filter did; `kept` + `dropped` is what the step before kept."""

    filter: str
    kept: int
    dropped: int


@dataclass(frozen=True, eq=False)
class Selection:
    """The trajectories of one arm, sorted by question, and how they were arrived at."""

    variant: Variant
    trajectories: tuple[Trajectory, ...]
    funnel: tuple[FunnelStep, ...]

    @property
    def tokens(self) -> int:
        """Completion tokens of all trajectories."""
        return sum(len(trajectory.completion_ids) for trajectory in self.trajectories)

    @property
    def figures(self) -> dict[str, Any]:
        """What a manifest says of it, as JSON values."""
        return {
            "trajectories": len(self.trajectories),
            "tokens": self.tokens,
            "questions": len({trajectory.question_id for trajectory in self.trajectories}),
            "corrective": sum(trajectory.corrective for trajectory in self.trajectories),
            "funnel": [asdict(step) for step in self.funnel],
        }


def subset(selection: Selection, fraction: float, seed: int) -> Selection:
    """The trajectories of a share of the questions (at least one); a smaller share lies within a larger one.

    Raises:
        UsageError: `fraction` is not in (0, 1].
    """
    if not 0 < fraction <= 1:
        raise UsageError(f"select.fraction is {fraction}: give a share above 0 and at most 1.")
    questions = sorted(
        {trajectory.question_id for trajectory in selection.trajectories},
        key=lambda name: (stable_hash([seed, name]), name),
    )
    chosen = set(questions[: max(1, round(fraction * len(questions)))])
    return keep_only(selection, "subset", lambda trajectory: trajectory.question_id in chosen)


def check_filled(name: str, selection: Selection) -> None:
    """Raises AgentArkError where the arm `name` would learn from nothing."""
    if not selection.trajectories:
        funnel = ", ".join(f"{step.filter}: {step.kept} left" for step in selection.funnel)
        raise AgentArkError(
            f"The selection {name} ({selection.variant}) is empty, so nothing can be learned from it ({funnel}). Ask "
            "easier questions, let warm_start.answer teach longer, or debate more questions."
        )


def keep_only(selection: Selection, name: str, test: Callable[[Trajectory], bool]) -> Selection:
    """The trajectories that pass a test, with the filter's step added to the funnel."""
    kept = tuple(trajectory for trajectory in selection.trajectories if test(trajectory))
    step = FunnelStep(name, len(kept), len(selection.trajectories) - len(kept))
    return replace(selection, trajectories=kept, funnel=(*selection.funnel, step))


def save_selection(selection: Selection, path: str | Path) -> None:
    """Write a selection to a Parquet file; it appears whole or not at all.

    Raises:
        AgentArkError: the file cannot be written.
    """
    columns = {
        field.name: [getattr(trajectory, field.name) for trajectory in selection.trajectories]
        for field in fields(Trajectory)
    }
    metadata = {
        "format": _FORMAT,
        "variant": selection.variant,
        "funnel": json.dumps([asdict(step) for step in selection.funnel]),
        "digest": _digest(selection),
    }
    with atomic_path(Path(path)) as temporary:
        pq.write_table(pa.table(columns, schema=_SCHEMA.with_metadata(metadata)), temporary)


def load_selection(path: str | Path) -> Selection:
    """Read a selection that `save_selection` wrote.

    Raises:
        AgentArkError: the file is missing, damaged, or no selection.
    """
    path = Path(path)
    if not path.is_file():
        raise AgentArkError(f"{path}: there is no selection; run the select stage first.")
    try:
        table = pq.read_table(pa.BufferReader(path.read_bytes()))
        metadata = {name.decode(): value.decode() for name, value in (table.schema.metadata or {}).items()}
        if metadata["format"] != _FORMAT or metadata["variant"] not in get_args(Variant):
            raise ValueError(f"format {metadata['format']}, variant {metadata['variant']}")
        selection = Selection(
            variant=metadata["variant"],
            trajectories=tuple(_trajectories(table.select(_SCHEMA.names).cast(_SCHEMA))),
            funnel=tuple(FunnelStep(**step) for step in json.loads(metadata["funnel"])),
        )
        if metadata["digest"] != _digest(selection):
            raise ValueError("its contents are not those that were written")
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError, OverflowError) as error:
        raise AgentArkError(
            f"{path}: damaged or no selection ({error}). Delete it and run the select stage again."
        ) from error
    return selection


def _trajectories(table: pa.Table) -> Iterator[Trajectory]:
    # Token by token, Python's numbers would take ten times the memory.
    arrays = [name for name in _SCHEMA.names if name in ("completion_ids", "logprobs")]
    plain = table.drop_columns(arrays).to_pylist()
    for row, *found in zip(plain, *(_lists(table.column(name)) for name in arrays), strict=True):
        yield Trajectory(**{**row, "trace_keys": tuple(row["trace_keys"])}, **dict(zip(arrays, found, strict=True)))


def _lists(column: pa.ChunkedArray) -> Iterator[np.ndarray | None]:
    """The lists of numbers in a column, as parts of one array of each of its chunks; None where there is none."""
    for chunk in column.chunks:
        if chunk.values.null_count:
            raise ValueError("a trajectory lacks a number")
        values, known = chunk.values.to_numpy(), chunk.is_valid().to_pylist()
        for there, (first, end) in zip(known, pairwise(chunk.offsets.to_pylist()), strict=True):
            yield values[first:end] if there else None


def _digest(selection: Selection) -> str:
    digest = hashlib.sha256()
    digest.update(json.dumps([selection.variant, [asdict(step) for step in selection.funnel]]).encode())
    for t in selection.trajectories:
        digest.update(json.dumps([t.question_id, t.turn_key, t.trace_keys, t.corrective, t.agent, t.round]).encode())
        digest.update(ids_hash(t.completion_ids).encode())
        digest.update(b"text only" if t.logprobs is None else np.ascontiguousarray(t.logprobs, "<f4").tobytes())
    return digest.hexdigest()[:24]
