"""What a user waits for beside training and generation: start-up, grading, selection, scoring of steps, compilation.

Each is a case with a result of its own. There is no peer: what a framework of this kind costs beside its main work has
to be small by itself.
"""

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from agentark_jax.errors import AgentArkError
from agentark_jax.models.config import ModelConfig, load_config
from agentark_jax.models.flops import Flops, matmul_params, sequence_attention_flops
from benchmarks.results import (
    MACHINE,
    Check,
    Comparison,
    Measured,
    Ratio,
    Result,
    Spread,
    environment,
    rates_of,
    rows_of,
)
from benchmarks.store import GROW, SELECT
from benchmarks.workers import ROOT, Side, Worker, interleaved

NAME = "overheads"
SIDES = "benchmarks.overhead_sides"
KINDS = ("numeric", "choice", "symbolic")
HELP_SECONDS = 0.5
SCORE_LIMIT = 1e-4
OURS = "agentark_jax"
NO_MODEL = {"name": "no model"}

Say = Callable[[str], None]


@dataclass(frozen=True)
class Sizes:
    """Lengths of scored sequences go evenly from `shortest` to `longest` tokens; `batch` × `length` is compiled."""

    starts: int = 7
    answers: int = 200
    turns: int = 20_000
    sequences: int = 64
    shortest: int = 64
    longest: int = 448
    step_tokens: int = 24
    batch: int = 4
    length: int = 256
    repetitions: int = 3


QUICK = Sizes(starts=2, answers=30, turns=1500, sequences=32, longest=256, batch=2, length=64, repetitions=1)


def run(model: Path, name: str, *, quick: bool, peers: bool, say: Say) -> Iterator[Result | Comparison]:
    """`peers` plays no part. Raises AgentArkError for answers that are not graded as they are meant, or steps whose
    scores depend on what else is scored.
    """
    sizes = QUICK if quick else Sizes()
    yield startup(sizes, quick, say)
    yield grading(sizes, quick, say)
    yield selection(sizes, quick, say)
    yield prm_scoring(model, name, sizes, quick, say)
    yield compilation(model, name, sizes, quick, say)


def startup(sizes: Sizes, quick: bool, say: Say) -> Comparison:
    """Fresh processes, in turns; the first of each, which also compiles Python to bytecode, is not counted."""
    commands = {
        "python": ["-c", "pass"],
        "import": ["-c", "import agentark_jax"],
        "help": ["-m", "agentark_jax.cli", "--help"],
        "run help": ["-m", "agentark_jax.cli", "run", "--help"],
    }
    words = {
        "python": "Python that does nothing",
        "import": "import agentark_jax",
        "help": "agentark --help",
        "run help": "agentark run --help",
    }
    before = environment()
    seconds: dict[str, list[float]] = {key: [] for key in commands}
    for repetition in range(sizes.starts + 1):
        for key, arguments in commands.items():
            started = time.perf_counter()
            subprocess.run([sys.executable, *arguments], cwd=ROOT, stdout=subprocess.DEVNULL, check=True)
            if repetition:
                seconds[key].append(time.perf_counter() - started)
    say(", ".join(f"{words[key]} {statistics.median(taken):.2f} s" for key, taken in seconds.items()))
    return Comparison(
        benchmark=f"{NAME}.startup",
        title="Start-up",
        quick=quick,
        model=NO_MODEL,
        sizes={"processes": sizes.starts},
        measured=[Measured(key, words[key], "s", Spread.of(taken)) for key, taken in seconds.items()],
        ratios=[],
        checks=[Check("agentark --help, seconds", statistics.median(seconds["help"]), HELP_SECONDS)],
        environment=before,
    )


def grading(sizes: Sizes, quick: bool, say: Say) -> Comparison:
    """One answer after the other, each of a hundred words of reasoning and a last line that states it."""
    before = environment()
    measured, checks = [], []
    for kind in KINDS:
        with Worker(Side(kind, SIDES, {"side": "grading", "kind": kind, "answers": sizes.answers})) as worker:
            replies = [worker.repeat(index) for index in range(sizes.repetitions)]
        as_meant = sum(reply["as_meant"] for reply in replies)
        if as_meant != sizes.repetitions * sizes.answers:
            raise AgentArkError(
                f"{NAME}: {as_meant} of {sizes.repetitions * sizes.answers} {kind} answers got the verdict that they "
                "should get; speed says nothing before all do"
            )
        times = [np.asarray(reply["times"]) * 1e6 for reply in replies]
        for share, what in ((50, "median"), (99, "99th percentile")):
            spread = Spread.of([float(np.percentile(each, share)) for each in times])
            measured.append(Measured(f"{kind}, {what}", f"{kind}: {what} of an answer", "µs", spread))
        speed = sizes.answers / statistics.median(reply["seconds"] for reply in replies)
        checks.append(Check(f"{kind}: answers a second", speed, None))
        say(f"{kind}: {speed:.0f} answers/s")
    return Comparison(
        benchmark=f"{NAME}.grading",
        title="Grading",
        quick=quick,
        model=NO_MODEL,
        sizes={"answers": sizes.answers, "repetitions": sizes.repetitions},
        measured=measured,
        ratios=[],
        checks=checks,
        environment=before,
    )


def selection(sizes: Sizes, quick: bool, say: Say) -> Comparison:
    """Opening a store of debates, loading its labels, selecting and matching two arms, writing and loading them."""
    before = environment()
    setup = {"stored": sizes.turns, "looked_up": 1}
    seconds, trajectories = [], 0
    with tempfile.TemporaryDirectory() as place:
        with Worker(Side(GROW, "benchmarks.store", {**setup, "side": GROW, "place": place})) as worker:
            worker.repeat(0)
        for _ in range(sizes.repetitions):
            with Worker(Side(SELECT, "benchmarks.store", {**setup, "side": SELECT, "place": place})) as worker:
                reply = worker.repeat(0)
            seconds.append(reply["seconds"])
            trajectories = reply["trajectories"]
            say(f"selection among {sizes.turns} turns: {seconds[-1]:.2f} s")
    return Comparison(
        benchmark=f"{NAME}.selection",
        title="Selection of two matched arms",
        quick=quick,
        model=NO_MODEL,
        sizes={"turns": sizes.turns, "trajectories": trajectories, "repetitions": sizes.repetitions},
        measured=[Measured("selection", f"from a store of {sizes.turns:,} turns", "s", Spread.of(seconds))],
        ratios=[],
        checks=[],
        environment=before,
    )


def lengths(sizes: Sizes) -> list[int]:
    return np.linspace(sizes.shortest, sizes.longest, sizes.sequences).astype(int).tolist()


def scoring_flops(config: ModelConfig, of: list[int]) -> Flops:
    """One forward pass over sequences of these lengths; the head on the ends of steps is nothing beside it."""
    return {
        "trunk": 2 * matmul_params(config) * sum(of),
        "attention": sum(sequence_attention_flops(config, length) for length in of),
    }


def prm_scoring(model: Path, name: str, sizes: Sizes, quick: bool, say: Say) -> Result:
    config, of = load_config(model), lengths(sizes)
    before = environment()
    work = scoring_flops(config, of)
    shapes = {"trunk": (1024, config.hidden_size, config.intermediate_size)}
    machine = {"side": MACHINE, "shapes": shapes, "seconds": 0.5, "bandwidth_bytes": 2**28}
    setup = {"side": "prm_scoring", "model": str(model), "lengths": of, "step_tokens": sizes.step_tokens}
    sides = [Side(MACHINE, "benchmarks.jax_sides", machine), Side(OURS, SIDES, setup)]
    gaps = []

    def check(replies: dict[str, dict[str, float]]) -> None:
        gaps.append(replies[OURS]["gap"])
        if not gaps[-1] <= SCORE_LIMIT:
            raise AgentArkError(
                f"{NAME}: a step scored alone gets a probability that differs by {gaps[-1]:.2g} from what it gets "
                f"among others (at most {SCORE_LIMIT:g} may be); speed says nothing before they agree"
            )

    measured = [interleaved(sides, sizes.repetitions, check, say)]
    return Result(
        benchmark=f"{NAME}.prm_scoring",
        title="Scoring steps by a process reward model",
        unit="tokens/s",
        quick=quick,
        model={"name": name, "model_type": config.model_type},
        sizes={
            "sequences": sizes.sequences,
            "shortest": sizes.shortest,
            "longest": sizes.longest,
            "tokens": sum(of),
            "step_tokens": sizes.step_tokens,
            "repetitions": sizes.repetitions,
        },
        rows=rows_of(
            measured,
            {OURS: "agentark_jax, padding not counted as tokens"},
            lambda side: work,
            lambda side, able: sum(work.values()) / able["rates"]["trunk"],
            sum(of),
        ),
        ratios=[],
        checks=[Check("p(right) of a step scored alone and among others, difference", gaps[0], SCORE_LIMIT)],
        rates=rates_of(measured),
        environment=before,
    )


def compilation(model: Path, name: str, sizes: Sizes, quick: bool, say: Say) -> Comparison:
    """Every figure is one of a fresh process: cold with an empty cache, warm with what the cold one left there."""
    config = load_config(model)
    before = environment()
    measured, ratios = [], []
    for side, what in (("compile_step", "training step"), ("compile_engine", "embedded engine")):
        seconds: dict[str, list[float]] = {"cold": [], "warm": []}
        for _ in range(sizes.repetitions):
            with tempfile.TemporaryDirectory() as cache:
                setup = {
                    "side": side,
                    "model": str(model),
                    "batch": sizes.batch,
                    "length": sizes.length,
                    "cache": cache,
                }
                for state, taken in seconds.items():
                    with Worker(Side(f"{what}, {state}", SIDES, setup)) as worker:
                        taken.append(worker.repeat(0)["seconds"])
                    say(f"{what}, {state}: {taken[-1]:.2f} s")
        for state, taken in seconds.items():
            measured.append(Measured(f"{what}, {state}", f"{what}, {state} cache", "s", Spread.of(taken)))
        pairs = [warm / cold for cold, warm in zip(seconds["cold"], seconds["warm"], strict=True)]
        ratios.append(Ratio(f"{what}, warm", f"{what}, cold", Spread.of(pairs), None))
    return Comparison(
        benchmark=f"{NAME}.compilation",
        title="Compilation, with an empty cache and with a full one",
        quick=quick,
        model={"name": name, "model_type": config.model_type},
        sizes={"batch": sizes.batch, "length": sizes.length, "repetitions": sizes.repetitions},
        measured=measured,
        ratios=ratios,
        checks=[],
        environment=before,
    )
