"""What a fit reports while it runs: `metrics.jsonl`, one line per step, and TensorBoard events."""

import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

import jax
from tensorboardX import SummaryWriter

from agentark_jax.errors import AgentArkError
from agentark_jax.files import write_text


class MetricsLog:
    """Writes below `directory`, after dropping the lines of steps after `step` (they are about to be repeated).

    Of several processes the first one writes; the others' logs do nothing.
    """

    def __init__(self, directory: Path, step: int) -> None:
        self._path = directory / "metrics.jsonl"
        self._writes = jax.process_index() == 0
        if not self._writes:
            return
        try:
            directory.mkdir(parents=True, exist_ok=True)
            _truncate(self._path, step)
            self._file = self._path.open("a", encoding="utf-8")
            self._events = SummaryWriter(str(directory / "tensorboard"), purge_step=step + 1)
        except OSError as error:
            raise _unwritable(self._path, error) from error

    def write(self, record: Mapping[str, float]) -> None:
        """One line, on disk when this returns (as far as a killed process is concerned), and one event per value."""
        if not self._writes:
            return
        try:
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()
        except OSError as error:
            raise _unwritable(self._path, error) from error
        for name, value in record.items():
            if name != "step":
                self._events.add_scalar(name, value, int(record["step"]))

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._writes:
            self._events.close()
            self._file.close()


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
