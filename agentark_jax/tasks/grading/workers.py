"""Processes that compare formulas, each in a child that ends when one takes too long."""

import atexit
import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from threading import BoundedSemaphore
from typing import Any

from agentark_jax.errors import AgentArkError

_SCRIPT = Path(__file__).with_name("algebra.py")


class Workers:
    """At most one process for each core, started when first needed; any thread may ask.

    A worker ends by itself: at its alarm, and when this process, which holds its input, ends in whatever way.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._idle: list[subprocess.Popen[str]] = []
        self._free = BoundedSemaphore(os.cpu_count() or 1)
        atexit.register(self.close)

    def compare(self, gold: str, answer: str) -> dict[str, Any]:
        """What `algebra` says of two LaTeX answers; {"problem": …} where that took longer than `seconds`.

        Raises:
            AgentArkError: no worker can be started.
        """
        with self._free:
            worker = self._idle.pop() if self._idle else _start()
            assert worker.stdin is not None
            assert worker.stdout is not None
            try:
                worker.stdin.write(json.dumps([gold, answer, self.seconds]) + "\n")
                worker.stdin.flush()
                reply = worker.stdout.readline()
            except BrokenPipeError:
                reply = ""
            if reply:
                self._idle.append(worker)
                comparison: dict[str, Any] = json.loads(reply)
                if "killed" not in comparison:
                    return comparison
            else:
                _end(worker)
            return {"problem": f"not decided within {self.seconds:g} s"}

    def close(self) -> None:
        """End the idle workers."""
        while self._idle:
            _end(self._idle.pop())


def _start() -> subprocess.Popen[str]:
    # Run by its path, without this package: a worker needs math-verify alone. In a session of its own an interrupt at
    # the keyboard does not reach it.
    worker = subprocess.Popen(
        [sys.executable, "-P", "-W", "ignore", str(_SCRIPT)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert worker.stdout is not None
    if worker.stdout.readline() != "ready\n":
        _end(worker)
        raise AgentArkError(
            f"the process that compares formulas ({_SCRIPT.name}) ended at its start with code {worker.returncode}; "
            "what it printed says why. It needs math-verify: install the package with its dependencies."
        )
    return worker


def _end(worker: subprocess.Popen[str]) -> None:
    assert worker.stdin is not None
    assert worker.stdout is not None
    # Its child is of its session.
    with suppress(ProcessLookupError):
        os.killpg(worker.pid, signal.SIGKILL)
    worker.wait()
    worker.stdout.close()
    try:
        worker.stdin.close()
    except BrokenPipeError:
        return  # what was still to be written is of no use to anybody
