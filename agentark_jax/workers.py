"""Workers that share the arms of a run: each trains and evaluates some of the students, of every seed.

What all arms of a seed are made from is made once, in the seed's directory, by whoever holds that; students go to a
directory and a trace store of the worker's own, and `experiment.run` takes them from there.
"""

import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack

from rich.console import Console

from agentark_jax.arms import dealt
from agentark_jax.config import RunConfig
from agentark_jax.directory import announcer, keep_config
from agentark_jax.errors import AgentArkError, UsageError
from agentark_jax.experiment import idle_workers, seed_directory, worker_directory
from agentark_jax.outcome import STORE
from agentark_jax.pipeline import SHARDS, Common, Pipeline, students_of
from agentark_jax.progress import Display
from agentark_jax.stages import Manifest, Run, locked
from agentark_jax.traces.store import TraceStore

_MOMENT = 30.0  # seconds for which others hold the run directory to say that they have begun
_FOREVER = -1.0


def make_share(config: RunConfig, shard: int, shards: int) -> None:
    """Train and evaluate the students of worker `shard` (from 0) of `shards`, for every seed.

    Raises:
        UsageError: the run directory belongs to another configuration, or to a process that does all of the run; or
            this worker is at work already.
        AgentArkError: a stage failed; what is done stays done.
    """
    started = time.monotonic()
    display = Display(Console())
    mine = dealt(students_of(config), shards)[shard]
    with ExitStack() as stack:
        with locked(config.directory, patience=_MOMENT):
            keep_config(config, update=False)
            stack.enter_context(locked(worker_directory(config.directory, shard, shards)))
        display.say(f"worker {shard} of {shards}: {', '.join(mine) or 'no student'}; seeds {config.seeds}")
        for seed in config.seeds[shard::shards]:
            _make_common(config, seed, display)
        for seed in config.seeds if mine else []:
            display.say(f"[bold]seed {seed}[/bold]")
            common = _make_common(config, seed, display)
            directory = seed_directory(config, seed)
            own = worker_directory(directory, shard, shards)
            own.mkdir(parents=True, exist_ok=True)
            with (
                TraceStore(own / STORE) as store,
                TraceStore(directory / STORE, read_only=True) as heard,
            ):
                run = Run(own, on_stage=_news(display), lent=[directory])
                Pipeline(config, seed, run, store, display, heard).make_arms(common, mine)
    display.say(f"worker {shard} of {shards} is done, in {time.monotonic() - started:,.0f} s.")


def _make_common(config: RunConfig, seed: int, display: Display) -> Common:
    """What all arms of a seed are made from; most often somebody has made it."""
    directory = seed_directory(config, seed)

    def waiting(owner: str) -> None:
        display.say(f"seed {seed}: {owner} makes what all arms are made from; waiting for it")

    with (
        locked(directory / SHARDS, patience=_FOREVER, on_wait=waiting),
        TraceStore(directory / STORE) as store,
    ):
        return Pipeline(config, seed, Run(directory, on_stage=_news(display)), store, display).make_common()


def _news(display: Display) -> Callable[[Manifest], None]:
    """Tells of stages that are made now: what is up to date is seen again for every share."""
    tell = announcer(display)
    return lambda manifest: None if manifest.reused else tell(manifest)


def make_all(config: RunConfig, arguments: Sequence[str], workers: int, *, update: bool) -> None:
    """Let so many workers on this machine make their shares, each on cores of its own; returns when they are done.

    What they say is shown with their number in front. They all end when this process is interrupted.

    Args:
        arguments: those of `agentark attribute` that say which run it is.
        update: go on in a directory that was made with another configuration.

    Raises:
        UsageError: as `make_share`; or a worker said that it cannot be carried out as written.
        AgentArkError: a worker failed; what is done stays done.
    """
    with locked(config.directory), idle_workers(config.directory):
        keep_config(config, update=update)
    command = [sys.executable, "-m", "agentark_jax.cli", "attribute", *arguments]
    width = shutil.get_terminal_size().columns - len(_said_by(workers, ""))
    at_work: list[subprocess.Popen[str]] = []
    shown: list[threading.Thread] = []
    try:
        for shard, cores in enumerate(_cores(workers)):
            worker = subprocess.Popen(
                [*command, "--shard", f"{shard}/{workers}"],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                env={**os.environ, "COLUMNS": str(width)},
            )
            at_work.append(worker)
            if cores:
                os.sched_setaffinity(worker.pid, cores)  # before it has threads: they all inherit this
            shown.append(threading.Thread(target=_show, args=(shard, worker)))
            shown[-1].start()
        codes = [worker.wait() for worker in at_work]
    finally:
        for worker in at_work:
            worker.terminate()
        for worker in at_work:
            worker.wait()
        for thread in shown:
            thread.join()
    failed = [shard for shard, code in enumerate(codes) if code]
    if failed:
        kind = UsageError if codes[failed[0]] == UsageError.exit_code else AgentArkError
        named = " and ".join(f"{shard}{_killed(codes[shard])}" for shard in failed)
        raise kind(f"worker {named} of {workers} failed, see above. What is done is kept: the same command goes on.")


def _cores(workers: int) -> list[list[int]]:
    """The cores of each worker; none where they cannot be chosen, or there are too few to go round."""
    here = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if len(here) < workers:
        return [[] for _ in range(workers)]
    return [here[len(here) * shard // workers : len(here) * (shard + 1) // workers] for shard in range(workers)]


def _killed(code: int) -> str:
    """What an exit code says of a worker that could not say it itself."""
    return f" (killed by signal {-code})" if code < 0 else ""


def _show(shard: int, worker: subprocess.Popen[str]) -> None:
    assert worker.stdout is not None, "it is piped"
    with worker.stdout:
        for line in worker.stdout:
            print(_said_by(shard, line), end="", flush=True)


def _said_by(shard: int, line: str) -> str:
    return f"[{shard}] {line}"
