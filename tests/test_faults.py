"""What goes wrong beside the program: disks, clocks, memory, signals, numbers. `docs/faults.md` has the whole matrix.

Every draw follows from AGENTARK_FAULT_SEED.
"""

import ast
import asyncio
import errno
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import test_training
from aiohttp import web
from faults import SEED, Steady, serving
from real_server import requests
from rich.console import Console
from test_store import QUESTION
from test_training import compilation_cache  # noqa: F401 (a fixture: the fits here are mostly the same ones)

import agentark_jax
from agentark_jax import cli, stages
from agentark_jax.cast import check_found
from agentark_jax.data.render import PlainFormat
from agentark_jax.data.tokenizer import Tokenizer
from agentark_jax.engines.config import EngineConfig
from agentark_jax.engines.local import LocalEngine
from agentark_jax.engines.sglang import SGLangEngine
from agentark_jax.errors import AgentArkError, memory_for
from agentark_jax.files import write_json, write_text
from agentark_jax.generation import Generation, Model, Seat
from agentark_jax.models.config import load_config
from agentark_jax.models.weights import load_params, weights_fingerprint
from agentark_jax.progress import Display
from agentark_jax.protocols.calls import Caller, Draw
from agentark_jax.protocols.single import answer
from agentark_jax.protocols.table import Agent, Pool
from agentark_jax.records import Question
from agentark_jax.stages import Run, Work, locked
from agentark_jax.traces.store import TraceStore
from agentark_jax.training import loop, rl, scoring
from agentark_jax.training.checkpoint import Checkpointer, Retention
from agentark_jax.training.metrics import MetricsLog

ROOT = Path(__file__).parent.parent
PACKAGE = Path(agentark_jax.__file__).parent


def draws(name: str) -> random.Random:
    return random.Random(f"{SEED} {name}")


# --- disks


def broken(code: int):
    def refuse(*arguments, **settings):
        raise OSError(code, os.strerror(code))

    return refuse


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EROFS, errno.EDQUOT])
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_file_that_cannot_be_written_stays_as_it_was(tmp_path, monkeypatch, code, call):
    """`results.json`, `report.html`, `summary.md`, `config.yaml`, manifests and labels are all written so."""
    path = tmp_path / "results.json"
    write_json(path, {"a": 1})
    with monkeypatch.context() as fault:
        fault.setattr(f"agentark_jax.files.os.{call}", broken(code))
        with pytest.raises(
            AgentArkError, match=rf"results\.json: cannot be written \({os.strerror(code)}\)\. Free disk"
        ):
            write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [each.name for each in tmp_path.iterdir()] == ["results.json"]
    write_text(path, "free again")
    assert path.read_text() == "free again"


def test_a_metrics_log_on_a_full_disk_is_named(tmp_path):
    def write():
        with MetricsLog(tmp_path, 0) as log:
            log._file.close()
            log._file = open("/dev/full", "w")  # noqa: SIM115 (the log closes it)
            log.write({"step": 1, "loss": 1.0})

    with pytest.raises(AgentArkError, match=r"metrics\.jsonl: cannot be written \(.*No space left on device"):
        write()


@pytest.mark.parametrize("command", ["run", "attribute"])
def test_a_file_system_that_is_read_only_is_one_clear_error(command, capsys):
    """/sys is one, for everybody."""
    root = "/sys/kernel/agentark"
    assert cli.main([command, "--config", str(ROOT / "tests" / "tiny.yaml"), "--root", root]) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"error: {root}/tiny: cannot be written (")
    assert said.endswith("Choose another --root.\n")


def ask_all(store, url, model, count=24, **settings):
    """Questions of one sample each to a server, all at once; the engine's retries."""

    async def everything():
        tokenizer = Tokenizer(model)
        config = EngineConfig(servers=[url], **settings)
        async with SGLangEngine(config, model, tokenizer, model="tiny", weights="v0") as engine:
            pool = Pool((Agent(Caller(engine, store, PlainFormat(tokenizer), seed=0)),))
            asked = [Question.make("task", "debate", f"What is {number}?", "7") for number in range(count)]
            store.put_questions(asked)
            await asyncio.gather(*(answer(each, pool, Draw(1.0, 8), protocol="single") for each in asked))
            return engine.retries

    return asyncio.run(everything())


def test_a_slow_disk_costs_time_only(models, tmp_path, monkeypatch):
    """Commits and fsyncs that take long: no call is given up, repeated or lost."""
    rng, commit, sync = draws("slow"), TraceStore.record_many, os.fsync
    slept = []

    def slowly(function):
        def call(*arguments):
            slept.append(rng.uniform(0.05, 0.2))
            time.sleep(slept[-1])
            return function(*arguments)

        return call

    monkeypatch.setattr(TraceStore, "record_many", slowly(commit))
    monkeypatch.setattr("agentark_jax.files.os.fsync", slowly(sync))
    with serving(Steady(models[0]).handle) as url, TraceStore(tmp_path / "traces.sqlite") as store:
        assert ask_all(store, url, models[0]) == 0
        total = store.ledger()[0]
        assert (total.calls, total.failed) == (24, 0)
        assert store.verify() == []
        write_json(tmp_path / "results.json", {"calls": total.calls})
    assert slept


# --- clocks


def test_nothing_is_measured_by_the_clock_on_the_wall():
    """What it says may go back or ahead at any moment. It is for people to read: in the store and in TensorBoard."""
    for path in sorted(set(PACKAGE.rglob("*.py")) - {PACKAGE / "training" / "metrics.py"}):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute):
                name = ast.unparse(node)
                assert name not in ("time.time", "time.time_ns"), path
                assert not re.fullmatch(r"(datetime\.)*(datetime|date)\.(now|utcnow|today)", name), path
            if isinstance(node, ast.ImportFrom) and node.module == "time":
                assert not {"time", "time_ns"} & {alias.name for alias in node.names}, path


@pytest.fixture
def jumping(monkeypatch):
    """Each look at the clock finds it up to thirty years before or after."""
    rng, clock = draws("clock"), time.time
    monkeypatch.setattr(time, "time", lambda: max(0.0, clock() + rng.uniform(-1e9, 1e9)))


def test_a_clock_that_jumps_changes_nothing(jumping, models, tmp_path, monkeypatch):
    """Retries, locks, checkpoints and a resumed training are as on any other day."""
    monkeypatch.setattr("agentark_jax.engines.http._PAUSE", 0.001)
    calls, server = [0], Steady(models[0])

    async def handle(request):
        calls[0] += 1
        if request.path == "/generate" and calls[0] % 4 == 0:
            return web.Response(status=503, text="busy")
        return await server.handle(request)

    with serving(handle) as url, TraceStore(tmp_path / "traces.sqlite") as store:
        assert ask_all(store, url, models[0], timeout=30.0) > 0
        assert (store.ledger()[0].calls, store.ledger()[0].failed) == (24, 0)

    held = threading.Event()

    def hold():
        with locked(tmp_path / "run"):
            held.set()
            time.sleep(0.3)

    holder = threading.Thread(target=hold)
    holder.start()
    held.wait()
    with locked(tmp_path / "run", patience=60.0):
        holder.join()

    config, params = replace(test_training.SHORT, checkpoint_every=1), test_training.make_params()
    whole = test_training.run_fit(tmp_path / "whole", params, config)
    with pytest.raises(KeyboardInterrupt):
        test_training.run_fit(tmp_path / "cut", params, config, progress=interrupted_at(2))
    resumed = test_training.run_fit(tmp_path / "cut", params, config)
    test_training.assert_identical(resumed.params, whole.params)
    assert 0 <= resumed.seconds < 3600


def interrupted_at(step: int):
    def progress(done, total, tokens):
        if done == step:
            raise KeyboardInterrupt

    return progress


# --- files that are damaged


def test_a_flipped_bit_of_a_model_is_named_before_anything_is_made_of_it(tmp_path, monkeypatch):
    """Large files are not read at every start; a stage that is up to date needs none of them."""
    monkeypatch.setattr(stages, "_HASHED_BYTES", 1000)
    rng, made = draws("model"), []

    def model(work: Work) -> None:
        (work.directory / "model").mkdir()
        (work.directory / "model" / "model.safetensors").write_bytes(rng.randbytes(5000))

    def everything(run: Run, change: int):
        first = run.produce("base", model, version=1, config={}, inputs={})
        return run.produce(
            "student", lambda work: made.append(change), version=1, config={"a": change}, inputs={"m": first}
        )

    everything(Run(tmp_path), 0)
    file = tmp_path / "base" / "model" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    file.write_bytes(bytes(content))
    assert everything(Run(tmp_path), 0).reused
    with pytest.raises(
        AgentArkError, match=r"base/model/model\.safetensors: changed since .* Delete .*base and run again"
    ):
        everything(Run(tmp_path), 1)
    assert made == [0]
    assert (tmp_path / "student" / "manifest.json").exists(), "what was there is not removed"


def test_a_model_of_others_that_changed_is_named(models, tmp_path):
    directory = tmp_path / "model"
    directory.mkdir()
    for path in models[0].iterdir():
        (directory / path.name).write_bytes(path.read_bytes())

    def build(work: Work) -> None:
        work.counts = {"location": str(directory), "revision": weights_fingerprint(directory)}

    found = Run(tmp_path / "run").produce("raw_model", build, version=1, config={}, inputs={})
    check_found(found)
    rng, file = draws("raw"), directory / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    file.write_bytes(bytes(content))
    with pytest.raises(AgentArkError, match=rf"{directory}: the config, weights or tokenizer there are not those"):
        check_found(found)


def test_a_flipped_bit_of_a_checkpoint_is_found_wherever_it_is(tmp_path):
    """In the state or in its record: the step is named, and the one before it is used only when it is asked for."""
    config = replace(test_training.SHORT, checkpoint_every=1, keep=2)
    params = test_training.make_params()
    whole = test_training.run_fit(tmp_path, params, config)
    rng, last = draws("checkpoint"), tmp_path / "checkpoints" / "3"
    held = [path for path in sorted(last.rglob("*")) if path.is_file() and path.stat().st_size]
    arrays = [path for path in held if (path.parent / ".zarray").exists() and path.name != ".zarray"]
    record = last / "record" / "metadata"
    recorded = re.search(rb'"sha256":\s*"([0-9a-f]{64})"', record.read_bytes()).span(1)
    array = rng.choice(arrays)
    for file, span in ((array, (0, array.stat().st_size)), (record, recorded)):
        before = file.read_bytes()
        content = bytearray(before)
        content[rng.randrange(*span)] ^= 1 << rng.randrange(8)
        file.write_bytes(bytes(content))
        with pytest.raises(AgentArkError, match=r"checkpoints/3: the checkpoint .*delete"):
            test_training.run_fit(tmp_path, params, config)
        assert last.exists()
        file.write_bytes(before)
    subprocess.run(["rm", "-r", str(last)], check=True)
    test_training.assert_identical(test_training.run_fit(tmp_path, params, config).params, whole.params)


# --- memory


def exhausted(*arguments, **settings):
    """More than there is anywhere: what XLA says then."""
    jnp.zeros(1 << 45, jnp.float32).block_until_ready()


def test_who_runs_out_of_memory_hears_which_keys_to_change(tmp_path, monkeypatch):
    for fault, said in ((exhausted, "RESOURCE_EXHAUSTED"), (lambda: np.zeros(1 << 50), "Unable to allocate")):
        with (
            pytest.raises(AgentArkError, match=rf"work: out of memory \({said}.*\)\. Lower x"),
            memory_for("work", "Lower x"),
        ):
            fault()
    with pytest.raises(RuntimeError, match="another"), memory_for("work", "Lower x"):
        raise RuntimeError("another")

    params = test_training.make_params()
    with monkeypatch.context() as fault:
        fault.setattr(loop, "make_step", lambda *arguments: exhausted)
        with pytest.raises(AgentArkError, match=r"training: out of memory .*accumulation.*row_length.*remat"):
            test_training.run_fit(tmp_path / "fit", params, test_training.SHORT)
        fault.setattr(rl, "_Loop", exhausted)
        needs = type("Config", (), {"needs_prm": False})()
        with pytest.raises(AgentArkError, match=r"reinforcement: out of memory .*rl\.fit\.rows"):
            rl.learn(needs, None, params, [], None, max_tokens=1, directory=tmp_path, seed=0, fingerprint={})
        fault.setattr(scoring, "_scorer", lambda *arguments: exhausted)
        mesh = test_training.make_mesh(test_training.MeshConfig())
        with pytest.raises(AgentArkError, match=r"scoring steps: out of memory .*--batch_tokens"):
            scoring.score_steps(test_training.MODEL, params, None, [([1, 2, 3], [2])], mesh)
    result = test_training.run_fit(tmp_path / "fit", params, test_training.SHORT)
    assert result.steps == 3, "with what helps, the same directory goes on"


def test_generation_that_runs_out_of_memory_names_its_keys(models, tmp_path):
    """With a cache for more sequences than fit anywhere; no turn is recorded, so nothing is taken for an answer."""
    tokenizer = Tokenizer(models[0])
    model = Model("tiny", models[0], "v0", load_config(models[0]), PlainFormat(tokenizer))
    with TraceStore(tmp_path / "traces.sqlite") as store:
        store.put_question(QUESTION)
        generation = Generation(EngineConfig(slots=10**10), store, Display(Console(quiet=True)), seed=0)

        async def ask(question, pool):
            return await answer(question, pool, Draw(1.0, 8), protocol="single")

        with pytest.raises(AgentArkError, match=r"generation: out of memory .*engine\.slots or engine\.context"):
            generation.ask(Work(tmp_path), "ask", [Seat(model, ())], [QUESTION], ask, calls=1, context=128)
        assert store.ledger()[0].calls == store.ledger()[0].failed == 0


# --- numbers


def test_the_checkpoint_before_a_step_that_is_not_finite_is_kept(tmp_path, monkeypatch):
    """The step is named, nothing of it is saved, and with a cure the same directory goes on from the one before."""
    config = replace(test_training.SHORT, checkpoint_every=1, keep=3)
    params, make, bad = test_training.make_params(), loop.make_step, draws("nan").randint(2, 3)
    whole = test_training.run_fit(tmp_path / "whole", params, config)

    def poisoned(*arguments):
        step = make(*arguments)

        def run(state, *rest):
            state, metrics = step(state, *rest)
            return state, {**metrics, "loss": metrics["loss"] * jnp.where(state.step == bad, jnp.nan, 1.0)}

        return run

    with monkeypatch.context() as fault:
        fault.setattr(loop, "make_step", poisoned)
        with pytest.raises(
            AgentArkError, match=rf"step {bad}: the loss is nan .*last checkpoint is that of step {bad - 1}"
        ):
            test_training.run_fit(tmp_path / "nan", params, config)
    with Checkpointer(tmp_path / "nan" / "checkpoints", {}, Retention(3)) as kept:
        assert kept.latest == bad - 1
    test_training.assert_identical(test_training.run_fit(tmp_path / "nan", params, config).params, whole.params)


def test_log_probs_that_are_no_numbers_are_no_answer(models):
    """Of the embedded engine; what servers say is looked at in `test_loopback`."""
    config, tokenizer = load_config(models[0]), Tokenizer(models[0])
    params = load_params(models[0], config)
    params["final_norm"]["weight"] = params["final_norm"]["weight"].at[0].set(jnp.nan)
    engine = LocalEngine(EngineConfig(slots=2), config, params, tokenizer, context=128, model="m", weights="w1")
    with pytest.raises(AgentArkError, match=r"m: a log-probability is nan: weights w1 are damaged"):
        asyncio.run(engine.generate(requests(1)[0]))
    with pytest.raises(AgentArkError, match=r"m: a log-probability is nan"):
        asyncio.run(engine.score(requests(1)[0].prompt_ids))
    engine.update_weights(load_params(models[0], config), "w2")
    assert np.isfinite(asyncio.run(engine.generate(requests(1)[0])).logprobs).all()


# --- signals

PARENT = """
import sys
from agentark_jax import cli, workers
workers.sys.executable = sys.argv[1]
sys.exit(cli.main(["attribute", "--config", sys.argv[2], "--root", sys.argv[3], "--workers", "2"]))
"""


def test_workers_end_with_who_started_them(tmp_path):
    worker = tmp_path / "worker"
    worker.write_text("#!/bin/sh\necho at work $$\nexec sleep 600\n")
    worker.chmod(0o755)
    command = [sys.executable, "-c", PARENT, str(worker), str(ROOT / "tests" / "tiny.yaml"), str(tmp_path / "runs")]
    parent = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, stderr=subprocess.DEVNULL)
    pids = [int(parent.stdout.readline().split()[-1]) for _ in range(2)]
    parent.send_signal(signal.SIGTERM)
    parent.communicate()
    assert parent.returncode == 143
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    with locked(tmp_path / "runs" / "tiny"):
        pass


# --- the matrix

OF_THE_MATRIX = "test_every_test_that_the_matrix_names_is_there"


def test_every_test_that_the_matrix_names_is_there():
    page = (ROOT / "docs" / "faults.md").read_text()
    named = set(re.findall(r"`(test_\w+)\.(test_\w+)`", page))
    assert len(named) > 60
    for module, name in sorted(named):
        source = (ROOT / "tests" / f"{module}.py").read_text()
        assert re.search(rf"^def {name}\(", source, re.M), f"{module}.{name}"
    for module in ("test_faults", "test_untrusted"):
        written = re.findall(r"^def (test_\w+)\(", (ROOT / "tests" / f"{module}.py").read_text(), re.M)
        assert not {(module, name) for name in written} - named - {("test_faults", OF_THE_MATRIX)}
