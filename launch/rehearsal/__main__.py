"""Rehearses a run on a cluster, small and on one machine, and kills parts of it on the way.

  3 workers, a shard of the debate each ─► sglang-router ─► a proxy that counts ─► a real SGLang server on CPU
       └► Parquet exports in a directory that stands for an object store
             └► merged ─► 2 JAX processes × 4 virtual devices train on a mesh of 2 × 2 × 2, and evaluate by the server

All of it is done by `agentark` and launch/sglang/serve.sh, in processes of their own, as on a cluster. A worker, the
server and one of the training processes get SIGKILL, with all their children, as when their machines are lost, at
moments of the work that --seed draws. What ends is started again by the same command, as JobSet, Slurm or a supervisor
would do it; processes that train together are started again together. At the end it is proven that

- every call of an undisturbed debate with the same seeds is in the merged store, once, with the answer that the server
  gave to it last, by the right weights (on CPU the server ignores seeds, so that answers are not those of another run);
- no call was asked again after its answer was committed: the proxy knows when each was asked, the store when each
  answer was committed. What was sent more than once was on its way when its worker or the server was killed: of each
  process at most engine.in_flight calls at a kill;
- the students are those of an undisturbed training on the same data, bit by bit;
- every arm was evaluated on all its questions.

Figures and what was found go to rehearsal.json. Exit code 0 if all of this holds, else 1. sglang-router comes with
install_cpu.sh; an environment without it is rehearsed without it.

  launch/sglang/install_cpu.sh .venv-sglang
  python -m launch.rehearsal
  python -m launch.rehearsal --seed 7 --directory runs/rehearsal7 --keep
  python -m launch.rehearsal --kill worker-2@debate:20 --kill server@evaluation:5 --kill trainer-0@control:9
"""

import argparse
import json
import os
import shutil
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from agentark_jax.errors import AgentArkError, UsageError
from agentark_jax.files import write_json
from agentark_jax.progress import Display
from agentark_jax.traces.exchange import shard_of
from launch.rehearsal.cluster import ROOT, STUDENTS, TRAINERS, WORKERS, Cluster, Job, Kill, draw_kills, read_kill
from launch.rehearsal.proof import SENT, audit, compare_debates, debate_calls, difference, in_flight, stored_turns
from launch.rehearsal.proxy import Proxy

CONFIG = Path(__file__).with_name("config.yaml")
AGENTARK = (sys.executable, "-m", "agentark_jax.cli")
DEVICES = 4  # of each training process
MESH = ("--fit.mesh.data", "2", "--fit.mesh.fsdp", "2", "--fit.mesh.tensor", "2")

_ANSWERED = "SELECT count(finish) FROM turns JOIN questions ON questions.id = question_id WHERE split = ?"
# Of sglang the router would take tracing alone, and on CPU its import fails without `cpu_server.py`.
_ROUTER = "import sys; sys.modules['sglang'] = None; from sglang_router"


class Rehearsal:
    """One rehearsal in a directory of its own."""

    def __init__(self, directory: Path, venv: Path, display: Display):
        self.directory, self.venv, self.display = directory, venv, display
        self.run = directory / "runs" / "rehearsal"
        self.settings: dict[str, Any] = yaml.safe_load(CONFIG.read_text())
        self.router: str | None = None

    def __call__(self, seed: int, kills: Sequence[Kill]) -> dict[str, Any]:
        """Rehearse, and return the record. Raises AgentArkError where it does not come to its end."""
        started, pending, port = time.monotonic(), list[Kill](), free_port()
        with Proxy(f"http://127.0.0.1:{port}") as proxy, Cluster(self.display, pending, self.reached) as cluster:
            warm, raw = self.job("warm-start", self.agentark("warm-start")), self.run / "raw_model"
            cluster.start(warm)
            cluster.until("a model in Hugging Face format", lambda: (raw / "manifest.json").exists() or warm.done)
            cluster.start(self.serve(raw / "model", port))
            cluster.until("warm start", lambda: warm.done)
            alone = self.copied("debate")
            cluster.run("an undisturbed debate", self.job("alone", self.agentark("debate", alone)))
            cluster.until("an SGLang server", lambda: answers(f"http://127.0.0.1:{port}/health"))
            address = self.route(cluster, proxy.url)
            shares = self.shares()
            pending += kills or draw_kills(seed, shares, self.settings["fit"]["steps"], self.evaluated())
            planned = list(map(str, pending))
            self.display.say(f"to be killed: {', '.join(planned)}")
            cluster.run(f"{WORKERS} workers debate", *self.workers(address), watch=lambda: (self.said(), sum(shares)))
            exports = map(self.export, range(WORKERS))
            cluster.run("merge", self.job("merge", (*AGENTARK, "traces", "merge", str(self.run), *exports)))
            calm = self.copied("training")
            trainer = self.trainer("trainer", self.run, "run", "--engine.servers", f"[{address}]")
            cluster.run(f"{TRAINERS} × {DEVICES} devices train; evaluation", trainer, watch=self.trained)
            cluster.run("an undisturbed training", self.trainer("calm", calm, "fit"))
            cluster.run("verify", self.job("verify", (*AGENTARK, "traces", "verify", str(self.run))))
            if pending:
                raise AgentArkError(f"{', '.join(map(str, pending))}: that moment never came.")
        turns = stored_turns(self.run, asker)
        figures, problems = audit(turns, proxy.asked, cluster.ends)
        calls = debate_calls(self.run)
        problems += compare_debates(calls, debate_calls(alone))
        if len(calls) != sum(shares):
            problems.append(f"the debate has {len(calls)} calls, not {sum(shares)}")
        differ = {student: difference(self.run / student / "model", calm / student / "model") for student in STUDENTS}
        problems += [f"{name}: weights differ by up to {by:.3g}" for name, by in differ.items() if by is not None]
        found = json.loads((self.run / "results.json").read_text())["arms"]
        evaluated = {arm: found[arm]["n"] if arm in found else 0 for arm in self.arms()}
        missed = [arm for arm, wanted in self.arms().items() if evaluated[arm] != wanted]
        problems += [f"{arm} was evaluated on {evaluated[arm]} of {self.arms()[arm]} questions" for arm in missed]
        ends = [
            {
                "job": end.job,
                "kill": None if end.kill is None else str(end.kill),
                "why": end.why,
                "in_flight": in_flight(turns, proxy.asked, end),
            }
            for end in cluster.ends
        ]
        return {
            "seed": seed,
            "kills": planned,
            "ends": ends,
            "router": self.router,
            "calls": figures,
            "weights_differ_by": differ,
            "evaluated": evaluated,
            "problems": problems,
            "timing": {"total_seconds": round(time.monotonic() - started, 1)},
        }

    # What runs

    def agentark(self, command: str, run: Path | None = None, *options: str) -> tuple[str, ...]:
        return (*AGENTARK, command, "--config", str(CONFIG), "--root", str((run or self.run).parent), *options)

    def job(self, name: str, command: Sequence[str], **environment: str) -> Job:
        cache = os.environ.get("AGENTARK_CACHE", str(self.directory / "cache"))
        log = self.directory / "logs" / f"{name}.log"
        return Job(name, {name: command}, {name: {"AGENTARK_CACHE": cache, **environment}}, log)

    def serve(self, model: Path, port: int) -> Job:
        """The server; it tells of its health without generating, so that the router may ask often."""
        command = ("bash", str(ROOT / "launch" / "sglang" / "serve.sh"), str(model), "--log-level", "warning")
        variables = {"DEVICE": "cpu", "PORT": str(port), "VENV": str(self.venv)}
        return self.job("server", command, **variables, SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION="0")

    def route(self, cluster: Cluster, url: str) -> str:
        """The address that clients are given: that of a router before the proxy, where sglang-router is installed.

        The router repeats no call, as clients do, and sees within a second that a server is back.
        """
        python = str(self.venv / "bin" / "python")
        version = [python, "-c", f"{_ROUTER} import version; print(version.__version__)"]
        told = subprocess.run(version, capture_output=True, text=True)
        if told.returncode:
            self.display.say("sglang-router is not installed there: clients ask the server itself")
            return url
        self.router, port = told.stdout.strip(), str(free_port())
        options = ["--worker-urls", url, "--host", "127.0.0.1", "--port", port, "--prometheus-port", str(free_port())]
        options += ["--disable-retries", "--disable-circuit-breaker", "--log-level", "warn"]
        options += ["--health-check-interval-secs", "1", "--health-success-threshold", "1"]
        start = [python, "-c", f"{_ROUTER}.launch_router import main; main()", *options]
        cluster.start(self.job("router", start))
        cluster.until(f"sglang-router {self.router}", lambda: answers(f"http://127.0.0.1:{port}/readiness"))
        return f"http://127.0.0.1:{port}"

    def export(self, worker: int) -> str:
        return f"file://{self.directory}/bucket/worker-{worker}"

    def workers(self, address: str) -> list[Job]:
        """Each debates its share and exports its store; started again, it does what is missing."""
        jobs = []
        for worker in range(WORKERS):
            share = ("--shard", f"{worker}/{WORKERS}", "--engine.servers", f"[{address}]")
            debate = self.agentark("debate", None, *share)
            export = (*AGENTARK, "traces", "export", str(self.store(worker)), "--parquet", self.export(worker))
            one_then_other = '"${@:2:$1}" && exec "${@:$1+2}"'
            command = ("bash", "-c", one_then_other, "-", str(len(debate)), *debate, *export)
            jobs.append(self.job(f"worker-{worker}", command))
        return jobs

    def trainer(self, name: str, run: Path, command: str, *options: str) -> Job:
        """The processes that train together; JAX finds the others by these variables."""
        one = self.job(name, self.agentark(command, run, *MESH, *options))
        common = {
            **one.environment[name],
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={DEVICES}",
            "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}",
            "JAX_NUM_PROCESSES": str(TRAINERS),
        }
        environment = {f"{name}-{number}": {**common, "JAX_PROCESS_ID": str(number)} for number in range(TRAINERS)}
        return Job(name, dict.fromkeys(environment, one.commands[name]), environment, one.log)

    def copied(self, name: str) -> Path:
        """A copy of the run as it is, for what nobody disturbs."""
        target = self.directory / "undisturbed" / name / "rehearsal"
        shutil.copytree(self.run, target)
        return target

    # How far it has come, and how far it goes

    def store(self, worker: int) -> Path:
        return self.run / "shards" / f"{worker}-of-{WORKERS}" / "traces.sqlite"

    def said(self, *workers: int) -> int:
        """Turns of these workers, or of all."""
        return sum(count(self.store(worker), "debate") for worker in workers or range(WORKERS))

    def steps(self, student: str) -> int:
        metrics = self.run / student / "metrics.jsonl"
        return len(metrics.read_text().splitlines()) if metrics.exists() else 0

    def measured(self) -> int:
        """Turns of the evaluation."""
        return count(self.run / "traces.sqlite", "held_out")

    def trained(self) -> tuple[int, int]:
        """Steps and turns of the evaluation, so far and in all."""
        steps = len(STUDENTS) * self.settings["fit"]["steps"]
        return sum(map(self.steps, STUDENTS)) + self.measured(), steps + self.evaluated()

    def reached(self, kill: Kill) -> int:
        if kill.phase == "debate":
            return self.said(*([] if kill.victim == "server" else [int(kill.victim[-1])]))
        return self.measured() if kill.phase == "evaluation" else self.steps(kill.phase)

    def shares(self) -> list[int]:
        """Calls of each worker."""
        lines = (self.run / "questions" / "questions.jsonl").read_text().splitlines()
        questions = [question["id"] for question in map(json.loads, lines) if question["split"] == "debate"]
        dealt = Counter(shard_of(question, WORKERS) for question in questions)
        calls = self.settings["debate"]["agents"] * self.settings["debate"]["rounds"]
        return [dealt[worker] * calls for worker in range(WORKERS)]

    def arms(self) -> dict[str, int]:
        """Questions of each arm."""
        whole, few = self.settings["questions"]["held_out"], self.settings["evaluate"]["multi_call_questions"]
        return {**dict.fromkeys(("base", *STUDENTS), whole), **dict.fromkeys(("vote", "debate"), few)}

    def evaluated(self) -> int:
        """Calls of the evaluation."""
        several, agents = self.settings["evaluate"], self.settings["debate"]["agents"]
        calls = {"vote": several["vote_samples"], "debate": agents * several["rounds"]}
        return sum(questions * calls.get(arm, 1) for arm, questions in self.arms().items())


def asker(question_id: str, split: str) -> str | None:
    """The job that asks a server about a question; None where none does."""
    jobs = {"debate": f"worker-{shard_of(question_id, WORKERS)}", "held_out": "trainer"}
    return jobs.get(split)


def count(store: Path, split: str) -> int:
    """Answered turns on the questions of a split in a store, which may be in the making."""
    try:
        with closing(sqlite3.connect(f"file:{store}?mode=ro", uri=True)) as connection:
            return int(connection.execute(_ANSWERED, (split,)).fetchone()[0])
    except sqlite3.OperationalError:
        return 0


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def answers(url: str) -> bool:
    """Whether something answers there that all is well."""
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def summary(record: Mapping[str, Any]) -> Table:
    """What happened and what is proven, as a table."""
    table = Table("what", "found", title=f"Rehearsal, seed {record['seed']}", title_justify="left")
    for end in record["ends"]:
        table.add_row(end["kill"] or end["job"], f"{end['why']}, {end['in_flight']} calls in flight")
    calls = record["calls"]
    table.add_row("calls needed, and sent to the server", f"{calls['needed']}, and {calls['sent']}, of which")
    for kind in SENT:
        table.add_row(f"  {kind.replace('_', ' ')}", str(calls[kind]))
    for student, by in record["weights_differ_by"].items():
        told = "equal bit by bit" if by is None else f"differ by up to {by:.3g}"
        table.add_row(f"weights of {student}, disturbed and not", told)
    table.add_row("questions evaluated", ", ".join(f"{arm} {n}" for arm, n in record["evaluated"].items()))
    table.add_row("router", record["router"] or "none")
    table.add_row("seconds", f"{record['timing']['total_seconds']:.0f}")
    for problem in record["problems"]:
        table.add_row("[red]problem[/red]", problem)
    return table


def read_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m launch.rehearsal", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="draws who is killed, and when (default: 0)")
    parser.add_argument(
        "--kill",
        type=read_kill,
        action="append",
        default=[],
        metavar="VICTIM@PHASE:AFTER",
        help="instead of those that are drawn; may be repeated. VICTIM is worker-0 to worker-2, server, trainer-0 (it "
        "leads) or trainer-1; PHASE is debate or evaluation, where AFTER counts turns, or student or control, where it "
        "counts steps",
    )
    parser.add_argument(
        "--directory",
        type=Path,
        default=Path("runs/rehearsal"),
        metavar="DIR",
        help="where all happens; logs/ and rehearsal.json stay (default: runs/rehearsal)",
    )
    parser.add_argument("--keep", action="store_true", help="let everything stay: the run, stores, exports, models")
    parser.add_argument(
        "--venv",
        type=Path,
        default=Path(".venv-sglang"),
        metavar="DIR",
        help="environment that launch/sglang/install_cpu.sh made (default: .venv-sglang)",
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = read_arguments(arguments)
    directory, venv, console = options.directory.resolve(), options.venv.absolute(), Console()
    try:
        if not (venv / "bin" / "python").exists():
            raise UsageError(f"--venv {options.venv} has no bin/python: make it with launch/sglang/install_cpu.sh.")
        if directory.exists() and any(directory.iterdir()):
            raise UsageError(f"--directory {options.directory} is not empty: remove it, or choose another.")
        record = Rehearsal(directory, venv, Display(console))(options.seed, options.kill)
    except AgentArkError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted: everything that it started was ended.", file=sys.stderr)
        return 130
    write_json(directory / "rehearsal.json", record)
    console.print(summary(record))
    if not options.keep and not record["problems"]:
        for path in directory.iterdir():
            if path.is_dir() and path.name != "logs":
                shutil.rmtree(path)
    return 1 if record["problems"] else 0


if __name__ == "__main__":
    sys.exit(main())
