"""Processes as on a cluster: who is killed and when, and an orchestrator that starts again whatever ends."""

import argparse
import os
import random
import re
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from agentark_jax.errors import AgentArkError
from agentark_jax.progress import Display

ROOT = Path(__file__).resolve().parents[2]
STUDENTS = ("student", "control")
WORKERS, TRAINERS = 3, 2
PATIENCE = 3600.0  # seconds for everything, a multiple of what it takes
STARTS = 30  # of one job: what fails more often does not fail because of the kills
PAUSES = (0.5, 2.0, 5.0, 10.0)  # seconds before a job is started again; the last from then on

_PHASES = {
    "worker": ("debate",),
    "server": ("debate", *STUDENTS, "evaluation"),
    "trainer": (*STUDENTS, "evaluation"),
}


@dataclass(frozen=True)
class Kill:
    """SIGKILL to a process when a phase has come so far.

    Of the debate turns count, a worker's own or those of all; of a student its steps; of the evaluation its turns.
    """

    victim: str
    phase: str
    after: int

    def __str__(self) -> str:
        return f"{self.victim}@{self.phase}:{self.after}"

    @property
    def job(self) -> str:
        """What has to be started again."""
        return "trainer" if self.victim.startswith("trainer") else self.victim


def read_kill(text: str) -> Kill:
    """VICTIM@PHASE:AFTER. Raises ArgumentTypeError for what is none, or a process not at work in that phase."""
    found = re.fullmatch(rf"((worker)-[0-{WORKERS - 1}]|(server)|(trainer)-[0-{TRAINERS - 1}])@(\w+):(\d+)", text)
    phases = _PHASES[found[2] or found[3] or found[4]] if found else ()
    if found is None or found[5] not in phases:
        known = "; ".join(f"{victim}: {', '.join(phases)}" for victim, phases in _PHASES.items())
        raise argparse.ArgumentTypeError(
            f"{text!r}: give VICTIM@PHASE:AFTER, such as server@debate:40 or trainer-0@student:9, of a phase in "
            f"which the victim is at work ({known})"
        )
    return Kill(found[1], found[5], int(found[6]))


def draw_kills(seed: int, shares: Sequence[int], steps: int, evaluated: int) -> list[Kill]:
    """A worker, the server and a trainer, at moments that follow from the seed.

    Args:
        shares: calls of each worker.
        steps: of each student.
        evaluated: calls of the evaluation.
    """
    draws = random.Random(seed)
    worker, trainer = draws.randrange(WORKERS), draws.randrange(TRAINERS)
    ends = {"debate": sum(shares), **dict.fromkeys(STUDENTS, steps - 1), "evaluation": evaluated - 1}
    served, trained = draws.choice(("debate", "evaluation")), draws.choice(_PHASES["trainer"])
    return [
        Kill(f"worker-{worker}", "debate", draws.randint(1, shares[worker])),
        Kill("server", served, draws.randint(1, ends[served])),
        Kill(f"trainer-{trainer}", trained, draws.randint(1, ends[trained])),
    ]


@dataclass
class Job:
    """Processes that live and die together: when one of them fails, all are started again.

    Args:
        commands: by the name of the process.
        environment: of each process, beside this process's own.
        log: gets what all of them print.
    """

    name: str
    commands: Mapping[str, Sequence[str]]
    environment: Mapping[str, Mapping[str, str]]
    log: Path
    starts: int = 0
    failed: float | None = None
    done: bool = False
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def start(self) -> None:
        self.starts, self.failed = self.starts + 1, None
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            log.write(f"--- start {self.starts}\n".encode())
            log.flush()
            for name, command in self.commands.items():
                self.processes[name] = subprocess.Popen(
                    command,
                    cwd=ROOT,
                    env={**_environment(), **self.environment.get(name, {})},
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )

    def kill(self, name: str) -> None:
        """End a process and its children at once."""
        process = self.processes[name]
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def stop(self) -> None:
        for name in self.processes:
            self.kill(name)

    def tail(self) -> str:
        return self.log.read_text(errors="replace")[-3000:] if self.log.exists() else ""


def _environment() -> dict[str, str]:
    """That of this process, without what would make it one of several, and without a token of servers."""
    left_out = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID", "AGENTARK_SGLANG_TOKEN", "XLA_FLAGS")
    kept = {name: value for name, value in os.environ.items() if name not in left_out}
    return {**kept, "JAX_PLATFORMS": "cpu", "COLUMNS": "120", "PYTHONUNBUFFERED": "1"}


@dataclass(frozen=True)
class End:
    """When a job ended that had not done its work, and why."""

    job: str
    at: float
    why: str
    kill: Kill | None = None


class Cluster:
    """All jobs, and who starts them again. A context manager: at its end all of them are gone.

    Args:
        kills: what is still to be killed; each is taken from here when it is.
        reached: how far a kill's phase has come, as it counts.
    """

    def __init__(self, display: Display, kills: list[Kill], reached: Callable[[Kill], int]):
        self.jobs: dict[str, Job] = {}
        self.ends: list[End] = []
        self._display, self._kills, self._reached = display, kills, reached
        self._limit = time.monotonic() + PATIENCE

    def __enter__(self) -> "Cluster":
        return self

    def __exit__(self, *error: object) -> None:
        for job in self.jobs.values():
            job.stop()

    def start(self, *jobs: Job) -> None:
        for job in jobs:
            self.jobs[job.name] = job
            job.start()

    def run(self, title: str, *jobs: Job, watch: Callable[[], tuple[int, int]] | None = None) -> None:
        """Start jobs, and tend all there are until these are done."""
        self.start(*jobs)
        self.until(title, lambda: all(job.done for job in jobs), watch)

    def until(
        self, title: str, happened: Callable[[], bool], watch: Callable[[], tuple[int, int]] | None = None
    ) -> None:
        """Tend the jobs until something has happened; a bar shows what `watch` says is done, and of how much.

        Raises AgentArkError, with the ends of their logs, for a job that goes on failing, or when it takes too long.
        """
        started = time.monotonic()
        with self._display.bar(title, total=None) as bar:
            while not happened():
                self._tend()
                if watch is not None:
                    bar.set(*watch(), 0)
                if time.monotonic() > self._limit:
                    tails = "\n".join(f"{job.name}:\n{job.tail()}" for job in self.jobs.values() if not job.done)
                    raise AgentArkError(f"{title}: all took more than {PATIENCE:.0f} s\n{tails}")
                time.sleep(0.01)
        self._display.say(f"[green]✓[/green] {title:48} {time.monotonic() - started:8.1f} s")

    def _tend(self) -> None:
        for kill in [kill for kill in self._kills if kill.job in self.jobs]:
            job, come = self.jobs[kill.job], self._reached(kill)
            if job.failed is None and not job.done and come >= kill.after:
                self._kills.remove(kill)
                job.kill(kill.victim)
                self._ended(job, f"killed after {come}", kill)
        for job in self.jobs.values():
            if job.failed is not None:
                if time.time() - job.failed >= PAUSES[min(job.starts, len(PAUSES)) - 1]:
                    job.start()
                continue
            codes = {name: process.poll() for name, process in job.processes.items()}
            job.done = all(code == 0 for code in codes.values())
            failed = {name: code for name, code in codes.items() if code}
            if failed:
                self._ended(job, ", ".join(f"{name} ended with {code}" for name, code in failed.items()))

    def _ended(self, job: Job, why: str, kill: Kill | None = None) -> None:
        job.stop()
        job.failed = time.time()
        self.ends.append(End(job.name, job.failed, why, kill))
        self._display.say(f"[red]✗[/red] {kill or job.name}: {why}; is started again")
        if job.starts >= STARTS:
            raise AgentArkError(f"{job.name} failed {STARTS} times:\n{job.tail()}")
