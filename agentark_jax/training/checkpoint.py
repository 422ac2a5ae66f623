"""Checkpoints of a fit: trainable parameters, optimizer, step and what the loop must remember, written by orbax.

Saves are synchronous unless asked otherwise: an asynchronous one holds a second copy of the state in memory. A
checkpoint carries digests of its arrays and of its record, so that one which the file system damaged is an error and
not a wrong result. It can be restored onto any mesh and by any number of processes.
"""

import hashlib
import json
import logging
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from absl import logging as absl_logging
from jaxtyping import Array, UInt32

from agentark_jax.errors import AgentArkError
from agentark_jax.training.state import TrainState

FORMAT = 3
# Where each checksum begins to count places, and an odd factor that spreads the bits of a count.
_MIXERS = ((0x243F6A88, 0x21F0AAAD), (0x85A308D3, 0x735A2D97))
_LIBRARIES = ("jax", "jaxlib", "optax", "orbax-checkpoint", "numpy")


def state_digest(state: TrainState) -> str:
    """SHA-256 over the paths, dtypes, shapes and checksums of all leaves; the same wherever the leaves live."""
    digest = hashlib.sha256()
    sums = jax.device_get(_checksums(state))
    for (path, leaf), checksum in zip(jax.tree_util.tree_leaves_with_path(state), sums, strict=True):
        digest.update(f"{jax.tree_util.keystr(path)} {leaf.dtype} {leaf.shape} {checksum.tolist()}\n".encode())
    return digest.hexdigest()


@jax.jit
def _checksums(state: TrainState) -> list[UInt32[Array, "2"]]:
    """Of each leaf two sums, modulo 2³², of its elements' bits, each times an odd number that depends on its place.

    Sums in any order are equal, so every device sums what it has and nothing is gathered; no change of a single element
    leaves them as they were, and two changes cancel in about one case of 2⁶².
    """
    return [_checksum(leaf) for leaf in jax.tree.leaves(state)]


def _checksum(leaf: Array) -> Array:
    words = jax.lax.bitcast_convert_type(leaf, f"uint{8 * leaf.dtype.itemsize}").astype(jnp.uint32)
    place = jnp.zeros(leaf.shape, jnp.uint32)
    for axis, size in enumerate(leaf.shape):
        place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)

    def mixed(x: Array, factor: int) -> Array:
        for shift in (16, 15):
            x = (x ^ (x >> shift)) * jnp.uint32(factor)
        return (x ^ (x >> 16)) | jnp.uint32(1)

    return jnp.stack(
        [jnp.sum(words * mixed(place + jnp.uint32(start), factor), dtype=jnp.uint32) for start, factor in _MIXERS]
    )


@dataclass
class Retention:
    """Which checkpoints stay on disk: the `newest` so many, every step that `every` divides, and the `best` step."""

    newest: int
    every: int | None = None
    best: int | None = None

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """One answer for each of the checkpoints, which orbax sorts by step; it deletes the others."""
        newest = [info.step for info in checkpoints][-self.newest :]
        return [
            info.step in newest or info.step == self.best or bool(self.every and info.step % self.every == 0)
            for info in checkpoints
        ]


class Checkpointer:
    """The checkpoints below one directory; a context manager, at whose end all of them are complete.

    `fingerprint` says which fit they belong to.
    """

    def __init__(
        self, directory: Path, fingerprint: Mapping[str, Any], retention: Retention, asynchronous: bool = False
    ) -> None:
        """Opens or creates `directory`; what an interrupted save left behind is removed.

        With `asynchronous`, `save` returns when the state is copied and is written while steps go on.

        Raises AgentArkError if the directory cannot be written.
        """
        absl_logging.set_verbosity(absl_logging.ERROR)
        logging.getLogger("orbax").setLevel(logging.ERROR)
        self.directory = directory.absolute()
        self.fingerprint = json.loads(json.dumps(dict(fingerprint)))  # as it will be read back
        self._retention, self._writing = retention, 0
        options = ocp.CheckpointManagerOptions(
            preservation_policy=retention, enable_async_checkpointing=asynchronous, cleanup_tmp_directories=True
        )
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._manager = ocp.CheckpointManager(self.directory, options=options, item_handlers=_handlers())
        except OSError as error:
            raise AgentArkError(
                f"{self.directory}: cannot keep checkpoints here ({error}); make the directory writable, free space, "
                "or choose another one"
            ) from error

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._finish()
        except AgentArkError:
            if error is None:
                raise
        finally:
            self._manager.close()

    @property
    def latest(self) -> int | None:
        """The step of the newest complete checkpoint."""
        return self._manager.latest_step()

    def save(
        self, state: TrainState, memory: Mapping[str, Any], best: int | None = None, number: int | None = None
    ) -> None:
        """Writes the state and the JSON-serialisable `memory` of the loop; returns when both are on disk or, if saves
        are asynchronous, when the state may change. `best` is the step whose checkpoint is the best so far. The
        checkpoint goes by the state's step, or by a `number` above those of all before.

        Raises AgentArkError when they cannot be written, or the one before this could not; the others are untouched.
        """
        self._retention.best = best
        self._finish()
        step = int(state.step) if number is None else number
        if step == self.latest:
            return
        record: dict[str, Any] = {
            "format": FORMAT,
            "fingerprint": self.fingerprint,
            "step": step,
            "sha256": state_digest(state),
            "versions": {name: version(name) for name in _LIBRARIES},
            "memory": dict(memory),
        }
        record["record_sha256"] = _record_digest(record)
        arguments = ocp.args.Composite(state=ocp.args.PyTreeSave(state._asdict()), record=ocp.args.JsonSave(record))
        self._writing = step
        try:
            self._manager.save(step, args=arguments, force=True)
        except Exception as error:  # tensorstore reports a full disk as ValueError, Python as OSError
            raise self._unwritten(error) from error

    def _finish(self) -> None:
        """Waits for the save that is under way, if one is."""
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise self._unwritten(error) from error

    def _unwritten(self, error: Exception) -> AgentArkError:
        self._remove(self._writing)
        return AgentArkError(
            f"{self.directory / str(self._writing)}: the checkpoint could not be written ({_first_line(error)}); "
            "free space or make the directory writable, and run the same command again"
        )

    def restore(self, like: TrainState, step: int | None = None) -> tuple[TrainState, dict[str, Any]] | None:
        """A checkpoint, the newest if none is named, as (state, memory), or None if there is none. `like` gives shapes
        and shardings.

        Raises AgentArkError for a checkpoint of another fingerprint (naming the keys that differ) and for a damaged
        one.
        """
        step = self.latest if step is None else step
        if step is None:
            return None
        place = self.directory / str(step)
        damaged = (
            f"{place}: the checkpoint is damaged%s; delete this directory to go on from the checkpoint before it, "
            "or from the start if there is none"
        )
        try:
            arguments = ocp.args.Composite(record=ocp.args.JsonRestore())
            record = self._manager.restore(step, args=arguments)["record"]
            intact = record.pop("record_sha256") == _record_digest(record)
            written, memory, digest = record["fingerprint"], record["memory"], record["sha256"]
            intact = intact and record["step"] == step
        except Exception as error:  # orbax has no exception of its own for a damaged checkpoint
            raise AgentArkError(damaged % f" ({_first_line(error)})") from error
        if not intact:
            raise AgentArkError(damaged % " (the SHA-256 of its record does not match)")
        self._refuse_other(place, written, record["format"])
        try:
            wanted = like._asdict()
            placed = ocp.checkpoint_utils.construct_restore_args(wanted)
            arguments = ocp.args.Composite(state=ocp.args.PyTreeRestore(wanted, restore_args=placed))
            with _abandoned_reads_silenced():
                state = TrainState(**self._manager.restore(step, args=arguments)["state"])
        except Exception as error:
            raise AgentArkError(damaged % f" ({_first_line(error)})") from error
        if state_digest(state) != digest:
            raise AgentArkError(damaged % " (its SHA-256 does not match)")
        return state, memory

    def _refuse_other(self, place: Path, written: Mapping[str, Any], written_format: Any) -> None:
        if written_format != FORMAT:
            raise AgentArkError(
                f"{place}: checkpoint format {written_format}, expected {FORMAT}; delete {place.parent}"
            )
        mine = self.fingerprint
        differing = sorted(key for key in {*written, *mine} if written.get(key) != mine.get(key))
        if differing:
            changes = "; ".join(f"{key} was {written.get(key)!r} and is {mine.get(key)!r}" for key in differing)
            raise AgentArkError(
                f"{place}: the checkpoint belongs to another fit: {changes}. Restore the old values to resume it, "
                f"use another run directory, or delete {place.parent} to start again"
            )

    def _remove(self, step: int) -> None:
        for leftover in self.directory.glob(f"{step}*"):
            if leftover.name == str(step) or leftover.name.startswith(f"{step}.orbax"):
                shutil.rmtree(leftover, ignore_errors=True)


def remove_checkpoints(directory: Path) -> None:
    """Removes the `checkpoints` of a directory, if it has any, and what a kill left of such a removal.

    They serve to resume a fit; once its model is exported they are 3/4 of the disk it takes. They are renamed first, so
    that a kill leaves all of them or none: half of one would be taken for a damaged one.
    """
    checkpoints, removed = directory / "checkpoints", directory / "checkpoints.removed"
    if removed.exists():
        shutil.rmtree(removed)
    if checkpoints.exists():
        checkpoints.rename(removed)
        shutil.rmtree(removed)


def _handlers() -> dict[str, Any]:
    """How orbax writes the state: as it is, an array a folder.

    Parameters and moments hardly compress, and compressing, or one database for all, needs memory for up to two copies
    of the state and takes ten times as long.
    """
    state = ocp.PyTreeCheckpointHandler(use_compression=False, use_ocdbt=False)
    return {"state": state, "record": ocp.JsonCheckpointHandler()}


@contextmanager
def _abandoned_reads_silenced() -> Iterator[None]:
    """When one read fails, orbax abandons the others, which end with tracebacks about its closed event loop."""
    shown = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if "Event loop is closed" not in str(unraisable.exc_value):
            shown(unraisable)

    sys.unraisablehook = hook
    try:
        yield
    except Exception:  # whichever it was, it is raised again once the others have ended
        time.sleep(1)
        raise
    finally:
        sys.unraisablehook = shown


def _record_digest(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:300]
