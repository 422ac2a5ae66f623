"""What a fit reports while it runs: `metrics.jsonl`, one line per step, TensorBoard events, Weights & Biases."""

import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import jax
from flax.traverse_util import flatten_dict
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar

from agentark_jax.errors import AgentArkError
from agentark_jax.files import write_text

T = TypeVar("T")


class MetricsLog:
    """Writes below `directory`, after dropping the lines of steps after `step` (they are about to be repeated).

    Of several processes the first one writes; the others' logs do nothing. `wandb` is what `wandb.init` takes, or None;
    with the `id` of an earlier log it goes on with that one's run.
    """

    def __init__(self, directory: Path, step: int, wandb: Mapping[str, Any] | None = None) -> None:
        self._path = directory / "metrics.jsonl"
        self._writes = jax.process_index() == 0
        if not self._writes:
            return
        self._wandb = None if wandb is None else _wandb_run(wandb)
        try:
            directory.mkdir(parents=True, exist_ok=True)
            _truncate(self._path, step)
            self._file = self._path.open("a", encoding="utf-8")
            (directory / "tensorboard").mkdir(exist_ok=True)
            # Not its SummaryWriter, whose thread ends with the first error, a full disk's: the queue to it then fills,
            # and the step that finds it full waits for ever.
            self._events = EventsWriter(str(directory / "tensorboard" / "events"))
            self._tell(step + 1, session_log=SessionLog(status=SessionLog.START))  # later steps of before are void
        except OSError as error:
            raise _unwritable(self._path, error) from error

    def write(self, record: Mapping[str, Any]) -> None:
        """One line, on disk when this returns (as far as a killed process is concerned), and one event per value.

        What depends on the clock stands apart, in the dict `timing` of the record: everything else is the same in every
        run.
        """
        if not self._writes:
            return
        try:
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()
            values = flatten_dict(record, sep="/")
            step = int(values.pop("step"))
            for name, value in values.items():
                self._tell(step, summary=scalar(name, value))
            self._events.flush()
        except OSError as error:
            raise _unwritable(self._path, error) from error
        if self._wandb is not None and step >= self._wandb.step:  # what it has cannot be replaced
            self._wandb.log(values, step=step)

    def _tell(self, step: int, **content: Any) -> None:
        """An event for TensorBoard, which shows the time of day beside it."""
        self._events.write_event(Event(step=step, wall_time=time.time(), **content))

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._writes:
            try:
                self._events.close()
                self._file.close()
            except OSError as failure:  # of what is still to be written
                if error is None:
                    raise _unwritable(self._path, failure) from failure
            if self._wandb is not None:
                self._wandb.finish(exit_code=0 if error is None else 1)


class StepClock:
    """Splits the wall time between the ends of two steps into waiting for data and the rest, computing.

    A step's metrics are fetched while the next one runs, so what is counted as waiting is what really held steps up.
    """

    def __init__(self, peak_flops: float | None) -> None:
        """`peak_flops` is the FLOP/s of all devices; None leaves the utilisation out."""
        self._peak = peak_flops
        self.restart()

    def restart(self) -> None:
        """The time since the last step was spent on something else: an evaluation, a checkpoint."""
        self._since, self._waited = time.monotonic(), 0.0

    def waiting(self, batches: Iterator[T]) -> Iterator[T]:
        """The same batches; the time that each takes to come is counted as waiting."""
        while True:
            asked = time.monotonic()
            batch = next(batches, None)
            self._waited += time.monotonic() - asked
            if batch is None:
                return
            yield batch

    def lap(self, tokens: int, flops: int) -> dict[str, float]:
        """The timing of the step that just ended, in which `tokens` without padding needed `flops`.

        `mfu` is model FLOPs utilisation (arXiv 2204.02311 appendix B, but with attention's real masks and the head only
        where there is loss): `flops` per second over the devices' peak.
        """
        seconds, waited = time.monotonic() - self._since, self._waited
        self.restart()
        timing = {
            "step_seconds": seconds,
            "data_wait_seconds": min(waited, seconds),
            "compute_seconds": max(seconds - waited, 0.0),
            "tokens_per_second": tokens / seconds,
        }
        return timing if self._peak is None else {**timing, "mfu": flops / seconds / self._peak}


def _wandb_run(arguments: Mapping[str, Any]) -> Any:
    # Imported here: it is not there for those who did not ask for it.
    import wandb

    try:
        return wandb.init(**arguments, resume="allow")
    except wandb.Error as error:
        raise AgentArkError(
            f"wandb: Weights & Biases cannot be used ({error}); run `wandb login`, set WANDB_MODE=offline, or set the "
            "key to null"
        ) from error


def _truncate(path: Path, step: int) -> None:
    """Keeps the lines of steps up to `step`; a line that a kill cut in half belongs to a later one."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] > step:
                break
        except (json.JSONDecodeError, KeyError, TypeError):
            break
        kept.append(line + "\n")
    write_text(path, "".join(kept))


def _unwritable(path: Path, error: OSError) -> AgentArkError:
    return AgentArkError(f"{path}: cannot be written ({error}); free space or make the directory writable, and rerun")
