"""Debates and training over and over in one process, disturbed at random: nothing is lost, and memory stays as it is.

    AGENTARK_SOAK_MINUTES=20 python -m pytest -n 0 -s -m slow tests/test_soak.py

Each iteration takes the laboratory's warm-started model through a debate, a selection and a training, in this process
or on a server before which answers break, with interrupts at random moments and files cut off in between; now and then
a process of its own does it and is killed. What comes out must be, byte for byte, what it is undisturbed.
"""

import asyncio
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import AsyncExitStack, contextmanager, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

import numpy as np
import psutil
import pytest
import real_server
import statsmodels.api as sm
from aiohttp import web

from agentark_jax import config as configuration
from agentark_jax import experiment
from agentark_jax.cache import enable_compilation_cache
from agentark_jax.data.tokenizer import Tokenizer
from agentark_jax.engines import http
from agentark_jax.engines.base import Request
from agentark_jax.engines.config import EngineConfig
from agentark_jax.engines.local import LocalEngine
from agentark_jax.errors import AgentArkError
from agentark_jax.models.config import load_config
from agentark_jax.models.weights import load_params
from agentark_jax.records import Sampling
from agentark_jax.traces.store import TraceStore
from agentark_jax.training.job import release_memory
from benchmarks.loopback import Loopback, listening

MINUTES = float(os.environ.get("AGENTARK_SOAK_MINUTES", 0))
LAB = Path(__file__).parent.parent / "configs" / "lab.yaml"
SMALL = {
    "questions": {"warm_start": 400, "validation": 0, "debate": 24, "held_out": 8},
    "warm_start.answer.steps": 80,
    "warm_start.revision": {"epochs": 1, "eval_every": None, "patience": None},
    "select.variant": "random",  # takes what can be read: so short a warm start teaches form, not sums
    "fit.checkpoint_every": 2,
    "fit.rows": 4,
    "engine.slots": 32,
    "engine.timeout": 20,
    "engine.attempts": 20,
    "arms": [],
    "curve": [],
}
MADE = ("debate", "select", "student")  # the stages of an iteration
WARM_UP = 1 / 3  # of the time: programs are compiled, caches fill
# Flat: at the upper end of the slope's 95 % interval, what the measured time adds is less than this share of the whole.
FLAT = 0.05


class Answering(Loopback):
    """Answers as SGLang does, with what the embedded engine samples of the weights that it is given."""

    def __init__(self, model: Path):
        super().__init__(model)
        self._tokens = Tokenizer(model)
        self._shape = load_config(model)
        self._engine: LocalEngine | None = None

    async def handle(self, request: web.BaseRequest) -> web.Response:
        if request.path == "/update_weights_from_disk":
            given = await request.json()
            params = load_params(Path(given["model_path"]), self._shape)
            settings = EngineConfig(slots=32, chunk=32)
            self._engine = LocalEngine(
                settings, self._shape, params, self._tokens, context=400, model="served", weights="served"
            )
        if request.path != "/generate":
            return await super().handle(request)
        assert self._engine is not None
        asked = await request.json()
        wanted = asked["sampling_params"]
        sampling = Sampling(
            wanted["temperature"],
            wanted["max_new_tokens"],
            tuple(wanted["stop_token_ids"]),
            wanted["sampling_seed"],
            wanted["top_p"],
        )
        said = await self._engine.generate(Request(np.asarray(asked["input_ids"], np.int32), sampling))
        sampled = zip(said.logprobs.tolist(), said.ids.tolist(), strict=True)
        meta = {
            "finish_reason": {"type": said.finish},
            "prompt_tokens": said.prompt_tokens,
            "cached_tokens": 0,
            "weight_version": self.version,
            "output_token_logprobs": [[logprob, token, None] for logprob, token in sampled],
        }
        return web.json_response({"text": said.text, "output_ids": said.ids.tolist(), "meta_info": meta})


def shortened(answer: dict) -> dict:
    answer["output_ids"] = answer["output_ids"][:-1]
    return answer


def without_meta(answer: dict) -> dict:
    del answer["meta_info"]
    return answer


def of_other_weights(answer: dict) -> dict:
    answer["meta_info"]["weight_version"] = "others"
    return answer


BROKEN = (503, 429, "reset", "cut", shortened, without_meta, of_other_weights, lambda answer: b"\x00{[" * 9)


@contextmanager
def serving(model: Path, faults):
    """The URL of such a server behind a proxy, in a thread with an event loop of its own."""
    told, loop, stop = threading.Event(), asyncio.new_event_loop(), asyncio.Event()
    urls = []

    async def serve() -> None:
        async with AsyncExitStack() as stack:
            upstream = await stack.enter_async_context(listening(Answering(model)))
            urls.append(await stack.enter_async_context(real_server.faulty(upstream, faults)))
            told.set()
            await stop.wait()

    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()), name="server")
    thread.start()
    assert told.wait(60)
    try:
        yield urls[0]
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(60)
        loop.close()


@dataclass(frozen=True)
class Outcome:
    """What an iteration comes to, without what differs between equal ones."""

    turns: str
    selection: str
    student: str


def outcome_of(directory: Path) -> Outcome:
    with TraceStore(directory / "traces.sqlite", read_only=True) as store:
        assert store.verify() == []
        lines = directory / "canonical.jsonl"
        store.export_canonical(lines)
    made = directory / "select" / "student.parquet", directory / "student" / "model" / "model.safetensors"
    return Outcome(*(hashlib.sha256(path.read_bytes()).hexdigest() for path in (lines, *made)))


class Soak:
    """Iterations of one process in `root`, whose randomness comes from a seed."""

    def __init__(self, root: Path, seed: int):
        self.root, self.draws, self.counts = root, random.Random(seed), Counter()
        self.breaks = False  # whether answers do, for now
        self._numbers = 0

    def options(self, directory: Path, served: str | None, rounds: int) -> list[str]:
        given = {**SMALL, "debate.rounds": rounds, "engine.servers": [served] if served else []}
        given |= {"root": str(directory.parent), "name": directory.name}
        return ["--config", str(LAB), *(part for key, value in given.items() for part in (f"--{key}", _told(value)))]

    def run(self, directory: Path, served: str | None, rounds: int, until: str = "fit") -> str:
        """Bring a run up to date as `agentark fit` does; what it printed."""
        config, _ = configuration.parse(self.options(directory, served, rounds), "soak", "")
        with redirect_stdout(StringIO()) as shown:
            experiment.run(config, update=True, until=until)
        return shown.getvalue()

    def fault(self, path: str, number: int):
        """What happens to a call to the server."""
        if not self.breaks or path != "/generate" or self.draws.random() > 0.1:
            return None
        self.counts["answers broken"] += 1
        return self.draws.choice(BROKEN)

    def fresh(self, base: Path) -> Path:
        self._numbers += 1
        directory = self.root / f"soak-{self._numbers}"
        shutil.copytree(base, directory)
        return directory

    def disturbed(self, base: Path, served: str | None, rounds: int, seconds: float) -> Outcome:
        """An iteration with faults, of which an undisturbed one takes so many seconds."""
        directory = self.fresh(base)
        self.breaks = True
        if served is None and self.draws.random() < 0.15:
            self._killed(directory, rounds)
        for _ in range(self.draws.randrange(4)):
            if self._interrupted(directory, served, rounds, self.draws.uniform(0, seconds) / 2):
                break
            if self.draws.random() < 0.4:
                self._cut(directory)
        while True:
            try:
                self.run(directory, served, rounds)
                break
            except AgentArkError as error:
                self._mend(directory, str(error))
        self.breaks = False
        assert "Everything was up to date" in self.run(directory, served, rounds)
        outcome = outcome_of(directory)
        shutil.rmtree(directory)
        return outcome

    def _interrupted(self, directory: Path, served: str | None, rounds: int, seconds: float) -> bool:
        """Whether a run, interrupted (Ctrl-C) after so many seconds, was done before that."""
        timer = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGINT))
        try:
            timer.start()
            try:
                self.run(directory, served, rounds)
            finally:
                timer.cancel()
                timer.join()
        except KeyboardInterrupt:
            self.counts["interrupts"] += 1
            return False
        except AgentArkError as error:  # what was cut off before
            self._mend(directory, str(error))
            return False
        return True

    def _killed(self, directory: Path, rounds: int) -> None:
        """The run in a process of its own, which is killed at some moment."""
        command = [sys.executable, "-m", "agentark_jax.cli", "fit", "--update", *self.options(directory, None, rounds)]
        process = subprocess.Popen(command, cwd=LAB.parent.parent, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            process.communicate(timeout=self.draws.uniform(3, 25))
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            self.counts["kills"] += 1

    def _cut(self, directory: Path) -> None:
        """Cut a file of an iteration's stages off anywhere."""
        files = [path for stage in MADE for path in sorted((directory / stage).rglob("*")) if path.is_file()]
        if files:
            path = self.draws.choice(files)
            os.truncate(path, self.draws.randint(0, path.stat().st_size))
            self.counts["files cut off"] += 1

    def _mend(self, directory: Path, message: str) -> None:
        """Do what an error says: remove the stage that it names."""
        named = re.search(rf"{re.escape(str(directory))}/({'|'.join(MADE)})\b", message)
        assert named is not None, f"the error names no stage: {message}"
        shutil.rmtree(directory / named[1])
        self.counts["damage told"] += 1


def _told(value) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def slope(times, values) -> tuple[float, float, float]:
    """Change per hour by least squares, with its 95 % interval (Newey-West: neighbours in time are alike)."""
    lags = max(1, round(len(times) ** (1 / 3)))
    found = sm.OLS(values, sm.add_constant(np.asarray(times) / 3600)).fit(cov_type="HAC", cov_kwds={"maxlags": lags})
    return float(found.params[1]), *map(float, found.conf_int()[1])


@pytest.mark.slow
@pytest.mark.skipif(not MINUTES, reason="takes as long as AGENTARK_SOAK_MINUTES says")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::RuntimeWarning")
def test_debates_and_training_go_on_for_long(tmp_path, monkeypatch):
    """An interrupt may strike where Python can only say that an exception was ignored."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # what is started in the background has none
    monkeypatch.setattr(http, "_PAUSE", 0.001)
    monkeypatch.setenv("AGENTARK_CACHE", str(tmp_path / "cache"))
    enable_compilation_cache()
    soak, process = Soak(tmp_path, 0), psutil.Process()
    soak.run(tmp_path / "base", None, 2, until="warm-start")
    base = tmp_path / "base"
    with serving(base / "base" / "model", soak.fault) as url:
        works = [(served, rounds) for served in (None, url) for rounds in (2, 3)]
        undisturbed, seconds = {}, {}
        for work in works:
            directory = soak.fresh(base)
            started = time.monotonic()
            soak.run(directory, *work)
            seconds[work] = time.monotonic() - started
            undisturbed[work] = outcome_of(directory)
            shutil.rmtree(directory)
        times, memory, threads, files = [], [], [], []
        began = time.monotonic()
        while time.monotonic() - began < 60 * MINUTES:
            work = soak.draws.choice(works)
            assert soak.disturbed(base, *work, seconds[work]) == undisturbed[work]
            soak.counts["iterations"] += 1
            release_memory()
            times.append(time.monotonic() - began)
            memory.append(process.memory_info().rss / 2**20)
            threads.append(process.num_threads())
            files.append(process.num_fds())
            print(f"{times[-1]:7.0f} s  {memory[-1]:7.1f} MB  {threads[-1]} threads  {files[-1]} files", flush=True)
    first = next(index for index, each in enumerate(times) if each >= WARM_UP * times[-1])
    change, low, high = slope(times[first:], memory[first:])
    hours = (times[-1] - times[first]) / 3600
    print(dict(soak.counts))
    print(
        f"memory: {change:+.1f} MB/h [{low:+.1f}, {high:+.1f}] over {60 * hours:.1f} min ({len(times) - first} "
        f"iterations) at {np.median(memory[first:]):.0f} MB"
    )
    if len(times) - first >= 20:  # of fewer nothing can be said
        assert high * hours < FLAT * np.median(memory[first:])
    assert max(threads[first:]) <= max(threads[: first + 1]) + 8
    assert max(files[first:]) <= max(files[: first + 1]) + 8
