"""Both ends of a side that runs in its own process and speaks JSON lines over stdin and stdout.

torch and JAX thus never share a process, the peak memory of each side is its own, and the sides can take turns.
"""

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from agentark_jax.errors import AgentArkError, UsageError

ROOT = Path(__file__).resolve().parent.parent

Reply = dict[str, Any]
Repeat = Callable[[int], Reply]


@dataclass(frozen=True)
class Side:
    """One side of a comparison: what a `module` of this package is to build from `setup`.

    `python`: that of the environment in which it runs (see `peers`); ours unless said otherwise.
    """

    name: str
    module: str
    setup: Mapping[str, Any]
    python: str = sys.executable


class Worker:
    """The parent's end: starts the process, hands over the setup, asks for repetitions. Use as a context manager."""

    def __init__(self, side: Side) -> None:
        self.name = side.name
        self._process = subprocess.Popen(
            [side.python, "-m", side.module], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
        )
        try:
            self.ready = self._ask(side.setup)
        except BaseException:  # an interrupt must not leave the process behind either
            self._stop()
            raise

    def repeat(self, index: int) -> Reply:
        """The figures of one repetition. Raises AgentArkError when the process ended instead."""
        return self._ask({"repetition": index})

    def _ask(self, message: Mapping[str, Any]) -> Reply:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(BrokenPipeError):  # it is gone; reading below finds no line and says so
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            raise AgentArkError(f"the side {self.name!r} ended with code {code}; its own message stands above")
        reply: Reply = json.loads(line)
        return reply

    def _stop(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.kill()
        self._process.wait()
        self._process.stdout.close()
        with suppress(BrokenPipeError):  # the unsent rest of a message to a process that is gone
            self._process.stdin.close()

    def __enter__(self) -> "Worker":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()


def interleaved(
    sides: list[Side],
    repetitions: int,
    check: Callable[[dict[str, Reply]], None],
    say: Callable[[str], None],
) -> dict[str, list[Reply]]:
    """Starts all sides, then lets them take turns, each time another first: A B B A … Returns every side's replies.

    Repetition 0 compiles and warms up; `check` gets its replies by side and raises when they disagree, before any time
    is spent on speed. It stays in the result, first in each list.
    """
    with ExitStack() as stack:
        workers = []
        for side in sides:
            say(f"starting {side.name}")
            workers.append(stack.enter_context(Worker(side)))
        replies: dict[str, list[Reply]] = {worker.name: [] for worker in workers}
        for index in range(repetitions + 1):
            first = index % len(workers)
            for worker in workers[first:] + workers[:first]:
                reply = {**worker.ready, **worker.repeat(index)}
                replies[worker.name].append(reply)
                step = f"repetition {index} of {repetitions}" if index else "warm-up"
                say(f"{step}: {worker.name}: {reply['seconds']:.2f} s")
            if index == 0:
                check({name: found[0] for name, found in replies.items()})
        return replies


def serve(build: Callable[[Mapping[str, Any]], tuple[Repeat, Reply]]) -> None:
    """The child's end: `build(setup)` gives the function that runs repetition i, and facts such as `threads`.

    A repetition times itself and returns at least `seconds`; `peak_rss_gb` and `wall_seconds` are added here. Ends with
    stdin. Whatever else is written to stdout goes to stderr.
    """
    with os.fdopen(os.dup(1), "w") as channel:
        os.dup2(2, 1)

        def send(reply: Reply) -> None:
            channel.write(json.dumps(reply) + "\n")
            channel.flush()

        repeat, facts = build(json.loads(sys.stdin.readline()))
        send(facts)
        for line in sys.stdin:
            started = time.perf_counter()
            reply = repeat(json.loads(line)["repetition"])
            send({**reply, "wall_seconds": time.perf_counter() - started, "peak_rss_gb": peak_rss_gb()})


def peak_rss_gb() -> float:
    """The largest resident memory of this process so far, in 10⁹ bytes."""
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage: bytes there, kibibytes elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def peaks_of_steps(step: Repeat, count: int) -> Reply:
    """Makes `count` steps: the seconds of all, and by step the loss and the peak of memory in it, in 10⁹ bytes."""
    started = time.perf_counter()
    done, peaks = [], []
    for number in range(count):
        reset_peak_rss()
        done.append(step(number))
        peaks.append(peak_rss_gb())
    return {
        "seconds": time.perf_counter() - started,
        "losses": [reply["loss"] for reply in done],
        "peak_rss_gb_of_steps": peaks,
        "loss_tokens": done[0]["loss_tokens"],
    }


def reset_peak_rss() -> None:
    """From here on `peak_rss_gb` counts anew. Raises UsageError where the system cannot do that."""
    path = Path("/proc/self/clear_refs")
    if not path.exists():
        raise UsageError(f"{path} does not exist, so the memory of a single step cannot be told; measure on Linux")
    path.write_text("5")
