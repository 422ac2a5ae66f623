"""A training loop that is not ours to cut up, run one step per repetition. Needs nothing but the standard library."""

import queue
import threading
import time
from collections.abc import Callable
from typing import Any

from benchmarks.workers import Reply

After = Callable[[Reply], None]


class Stepwise:
    """Runs `train(after)` in a thread; `after(facts)`, which it must call at the end of each step, waits for the next.

    The loop begins with the first repetition, whose time has the loop's start in it. The thread ends with the process.
    """

    def __init__(self, train: Callable[[After], Any]) -> None:
        self._train = train
        self._go = threading.Semaphore(0)
        self._done: queue.Queue[Reply | BaseException] = queue.Queue()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._began = 0.0

    def repeat(self, index: int) -> Reply:
        """What `after` was told of the next step, and its `seconds`. Raises what the loop raised instead."""
        if index == 0:
            self._thread.start()
        self._began = time.perf_counter()
        self._go.release()
        found = self._done.get()
        if isinstance(found, BaseException):
            raise found
        return found

    def _run(self) -> None:
        self._go.acquire()
        try:
            self._train(self._after)
            raise RuntimeError("the loop has ended: it was to have more steps than there are repetitions")
        except BaseException as error:  # whatever it is, the one who waits must hear of it
            self._done.put(error)

    def _after(self, facts: Reply) -> None:
        self._done.put({**facts, "seconds": time.perf_counter() - self._began})
        self._go.acquire()


def cheap_reward(ids: list[int]) -> float:
    """A rule that costs nothing and hardly ever gives all rollouts of a group the same, which would teach nothing."""
    return sum(ids) % 1000 / 1000
