"""The fit: equal results however it is cut up, resumed or interrupted; and what it refuses."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from faults import SEED

from agentark_jax.data.loader import packed_batches
from agentark_jax.errors import AgentArkError, UsageError
from agentark_jax.models.config import Lora, ModelConfig, Rope
from agentark_jax.models.lora import init_adapter, join
from agentark_jax.models.transformer import hidden_states, param_shapes
from agentark_jax.objectives.sft import SFT, sft_loss, term_totals
from agentark_jax.records import Example
from agentark_jax.training import checkpoint
from agentark_jax.training.checkpoint import Checkpointer, Retention
from agentark_jax.training.config import FitConfig, MeshConfig
from agentark_jax.training.loop import Memory, fit
from agentark_jax.training.mesh import make_mesh
from agentark_jax.training.metrics import StepClock
from agentark_jax.training.peaks import peak_flops
from agentark_jax.training.state import (
    TrainState,
    initial_state,
    is_decayed,
    learning_rates,
    make_optimizer,
    partition,
    state_shardings,
)
from agentark_jax.training.step import make_evaluation, make_step

MODEL = ModelConfig(
    model_type="gemma3_text",
    vocab_size=61,
    hidden_size=16,
    intermediate_size=24,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    layer_types=("sliding_attention", "sliding_attention"),
    sliding_window=5,
    rope_full=Rope(1e6),
    rope_sliding=Rope(1e4),
    activation="gelu_tanh",
    norm_eps=1e-6,
    norm_weight_offset=1.0,
    embedding_scale=4.0,
    query_scale=8**-0.5,
    qk_norm=True,
    sandwich_norms=True,
    attention_bias=False,
    attention_softcap=None,
    final_softcap=20.0,
    tie_embeddings=True,
    max_positions=64,
    initializer_range=0.3,
)
MIXED = replace(MODEL, layer_types=("sliding_attention", "full_attention", "sliding_attention"))  # with a remainder
CONFIG = FitConfig(learning_rate=1e-2, epochs=2, rows=2, row_length=24, checkpoint_every=3, warmup_fraction=0.1)


def make_examples(count, seed=0):
    rng = np.random.default_rng(seed)
    examples = []
    for index in range(count):
        length = int(rng.integers(5, 14))
        weights = {"completion": (np.arange(length) >= 3).astype(np.float32)}
        if index % 2:
            weights["answer"] = (np.arange(length) >= length - 2).astype(np.float32)
        ids = rng.integers(1, MODEL.vocab_size, length).astype(np.int32)
        examples.append(Example(ids, weights, f"q{index}", "test"))
    return examples


EXAMPLES, VALIDATION = make_examples(24), make_examples(6, seed=1)
COEFFICIENTS = {"answer": 0.5, "completion": 1.0}


@pytest.fixture(scope="module", autouse=True)
def compilation_cache(tmp_path_factory):
    """Every fit compiles its own step; here they are mostly the same one."""
    directory = str(tmp_path_factory.mktemp("compiled"))
    options = {
        "jax_compilation_cache_dir": directory,
        "jax_persistent_cache_min_compile_time_secs": 0.2,
        "jax_persistent_cache_min_entry_size_bytes": 0,
    }
    before = {name: getattr(jax.config, name) for name in options}
    for name, value in options.items():
        jax.config.update(name, value)
    yield directory
    for name, value in before.items():
        jax.config.update(name, value)


def make_params(model=MODEL):
    """Parameters drawn by NumPy: nothing to compile, and the same in every process."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: jnp.asarray(model.initializer_range * rng.normal(size=leaf.shape), leaf.dtype), param_shapes(model)
    )


@pytest.fixture(scope="module")
def params():
    return make_params()


def metrics_of(directory):
    """The lines of metrics.jsonl without what depends on the clock."""
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "timing"} for line in lines]


def run_fit(directory, params, config=CONFIG, **changes):
    arguments = {"directory": directory, "seed": 7, "fingerprint": {"model": "tiny"}, **changes}
    examples = arguments.pop("examples", EXAMPLES)
    return fit(config, MODEL, copied(params), examples, **arguments)


def copied(params):
    """A fit uses up the parameters it is given."""
    return jax.tree.map(jnp.copy, params)


def assert_identical(one, other):
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), one, other)


def assert_relative(actual, expected, tolerance=1e-5):
    def check(a, b):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert np.abs(a - b).max() <= tolerance * max(np.abs(b).max(), 1e-8)

    jax.tree.map(check, actual, expected)


def test_packed_equals_unpacked_and_accumulated_equals_one_batch():
    terms = tuple(COEFFICIENTS)
    params = make_params(MIXED)
    data = packed_batches(EXAMPLES, seed=0, epochs=1, rows=12, row_length=48, terms=terms)
    assert len(data) == 1
    assert sum(len(row) > 1 for row in data.plan[0]) >= 3
    packed = next(data.iterate(0, 1))
    alone = [packed_batches([one], seed=0, epochs=1, rows=1, row_length=48, terms=terms) for one in EXAMPLES]
    unpacked = [
        jax.tree.map(lambda *rows: np.concatenate(rows), *part)
        for part in ([next(data.iterate(0, 1)) for data in alone[start : start + 12]] for start in (0, 12))
    ]

    @jax.jit
    def loss_and_gradient(batch, totals):
        def loss(params):
            return sft_loss(MIXED, params, batch, totals, COEFFICIENTS, chunk_bytes=5 * 61 * 4)

        return jax.value_and_grad(loss, has_aux=True)(params)

    expected = loss_and_gradient(packed, term_totals(packed))
    totals = jax.tree.map(jnp.add, *(term_totals(part) for part in unpacked))
    assert_relative(totals, term_totals(packed))
    accumulated = jax.tree.map(jnp.add, *(loss_and_gradient(part, totals) for part in unpacked))
    assert_relative(accumulated, expected)


def one_step(params, config, batch):
    trainable, frozen = partition(copied(params), config.freeze)
    optimizer = make_optimizer(config, 10)
    shardings = state_shardings(make_mesh(MeshConfig()), optimizer, trainable)
    state = initial_state(make_mesh(MeshConfig()), optimizer, trainable)
    state, metrics = make_step(config, MODEL, SFT(COEFFICIENTS), 10, shardings)(state, frozen, batch)
    return state, {name: float(value) for name, value in metrics.items()}


def test_a_step_with_accumulation_or_remat_equals_one_without(params):
    batch = next(packed_batches(EXAMPLES, seed=0, epochs=1, rows=6, row_length=24).iterate(0, 1))
    # Adam's first update is little more than a sign, so gradients are compared through Adam's first moment instead.
    whole, metrics = one_step(params, replace(CONFIG, rows=6), batch)
    other, other_metrics = one_step(params, replace(CONFIG, rows=6, accumulation=3, remat="full"), batch)
    moments, other_moments = (optax.tree.get(state.optimizer, "mu") for state in (whole, other))
    assert_relative(other_moments, moments)
    assert_relative(other_metrics, metrics)


def test_bfloat16_computes_in_it_and_keeps_everything_else_in_float32(params):
    batch = next(packed_batches(EXAMPLES, seed=0, epochs=1, rows=6, row_length=24).iterate(0, 1))
    exact, metrics = one_step(params, replace(CONFIG, rows=6), batch)
    rough, rough_metrics = one_step(params, replace(CONFIG, rows=6, compute_dtype="bfloat16"), batch)
    moments, rough_moments = (optax.tree.get(state.optimizer, "mu") for state in (exact, rough))
    assert all(leaf.dtype == jnp.float32 for leaf in rough_moments.values())
    assert rough_metrics["loss"] != metrics["loss"]  # or nothing was computed in bfloat16
    assert rough_metrics["loss"] == pytest.approx(metrics["loss"], rel=0.01)
    assert rough_metrics["gradient_norm"] == pytest.approx(metrics["gradient_norm"], rel=0.05)
    for path, moment in moments.items():
        difference = np.linalg.norm(rough_moments[path] - moment) / np.linalg.norm(moment)
        assert difference < 0.1, path

    def gradients(dtype):
        def loss(params):
            return sft_loss(MODEL, params, batch, term_totals(batch), COEFFICIENTS, dtype=dtype)[0]

        return jax.eval_shape(jax.grad(loss), params)

    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(gradients("bfloat16")))


def test_gradient_reach_and_frozen_parameters(params, tmp_path):
    before = jax.tree.map(np.array, params)
    batch = next(packed_batches(EXAMPLES, seed=0, epochs=1, rows=6, row_length=24).iterate(0, 1))
    state, _ = one_step(params, replace(CONFIG, rows=6), batch)
    assert all(np.abs(moment).max() > 0 for moment in optax.tree.get(state.optimizer, "mu").values())
    every_layer = optax.tree.get(state.optimizer, "mu")["scanned.00.mlp.up"]
    assert np.all(np.abs(every_layer).max(axis=(1, 2)) > 0)

    config = replace(CONFIG, freeze=["embedding", "scanned.00.mlp"], steps=4)
    result = run_fit(tmp_path, params, config)
    assert_identical(params, before)  # the caller's arrays are neither changed nor donated
    assert jax.tree.structure(result.params) == jax.tree.structure(params)
    assert_identical(result.params["embedding"], before["embedding"])
    assert_identical(result.params["scanned"]["00"]["mlp"], before["scanned"]["00"]["mlp"])
    trainable, frozen = partition(result.params, config.freeze)
    original, _ = partition(before, config.freeze)
    assert set(frozen) == {"embedding", *(f"scanned.00.mlp.{name}" for name in ("gate", "up", "down"))}
    for path, leaf in trainable.items():
        assert np.any(np.asarray(leaf) != original[path]), path
    with Checkpointer(tmp_path / "checkpoints", {}, Retention(1)) as checkpointer:
        saved = json.loads((tmp_path / "checkpoints" / str(checkpointer.latest) / "record" / "metadata").read_text())
    assert saved["step"] == 4
    stored = (tmp_path / "checkpoints" / "4" / "state" / "_METADATA").read_text()
    assert "final_norm.weight" in stored
    assert "embedding" not in stored


ADAPTING = replace(CONFIG, epochs=6, learning_rate=0.05, lora=Lora(2, 4.0, ("q_proj", "down_proj")))


def test_adapters_alone_are_trained_and_come_back_merged(params, tmp_path):
    before = jax.tree.map(np.array, params)
    result = run_fit(tmp_path, params, ADAPTING)
    assert_identical(params, before)
    assert result.history[-1][1] < 0.9 * result.history[0][1]

    stored = next((tmp_path / "checkpoints").glob("*/state/_METADATA")).read_text()
    assert "scanned.00.attention.adapters.query.a" in stored
    assert not any(name in stored for name in ("embedding", "norm", "mlp.up", "attention.key"))

    adapted = replace(MODEL, lora=ADAPTING.lora)
    fresh = init_adapter(adapted, seed=7)
    assert jax.tree.structure(result.adapter) == jax.tree.structure(fresh)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool(jnp.any(a != b)), result.adapter, fresh))

    (trained, frozen), targets = partition(result.params, ["embedding"]), {"query", "down"}
    assert jax.tree.structure(result.params) == jax.tree.structure(params)
    for path, leaf in {**trained, **frozen}.items():
        was = partition(before, [])[0][path]
        assert np.any(np.asarray(leaf) != was) == (path.rsplit(".")[-1] in targets), path

    batch = next(packed_batches(EXAMPLES, seed=0, epochs=1, rows=6, row_length=24).iterate(0, 1))
    inputs = (batch["ids"], batch["positions"], batch["segment_ids"])
    applied = hidden_states(adapted, join(params, result.adapter), *inputs)
    np.testing.assert_allclose(hidden_states(MODEL, result.params, *inputs), applied, rtol=1e-4, atol=1e-4)


def test_adapters_resume_bit_by_bit(params, tmp_path):
    whole = run_fit(tmp_path / "whole", params, ADAPTING)

    def die(done, total, tokens):
        if done == 5:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        run_fit(tmp_path / "cut", params, ADAPTING, progress=die)
    with pytest.raises(AgentArkError, match=r"another fit: fit\.lora was"):
        run_fit(tmp_path / "cut", params, replace(ADAPTING, lora=Lora(2, 8.0)))
    resumed = run_fit(tmp_path / "cut", params, ADAPTING)
    assert_identical((resumed.params, resumed.adapter), (whole.params, whole.adapter))
    assert metrics_of(tmp_path / "cut") == metrics_of(tmp_path / "whole")


def test_only_fits_of_adapters_are_fingerprinted_with_them():
    assert "lora" not in CONFIG.fingerprint()
    assert ADAPTING.fingerprint()["lora"] == {"rank": 2, "alpha": 4.0, "targets": ("q_proj", "down_proj")}


def test_the_step_compiles_once_and_donates_its_state(params):
    data = packed_batches(EXAMPLES, seed=0, epochs=2, rows=2, row_length=24)
    trainable, frozen = partition(copied(params), [])
    optimizer = make_optimizer(CONFIG, 10)
    shardings = state_shardings(make_mesh(MeshConfig()), optimizer, trainable)
    state = initial_state(make_mesh(MeshConfig()), optimizer, trainable)
    step = make_step(CONFIG, MODEL, SFT(COEFFICIENTS), 10, shardings)
    first = state.params["final_norm.weight"]
    for batch in data.iterate(0, 4):
        state, _ = step(state, frozen, batch)
    assert step._cache_size() == 1
    assert first.is_deleted()
    assert int(state.step) == 4


def test_the_optimizer_equals_a_numpy_adamw():
    config = FitConfig(
        learning_rate=0.1, schedule="linear", warmup_fraction=0.4, weight_decay=0.5, clip_norm=1.0, rows=1
    )
    optimizer = make_optimizer(config, 5)
    weights = {"mlp.up": np.array([1.0, -2.0]), "scanned.00.mlp_norm.weight": np.array([[0.5]])}
    gradients = {"mlp.up": np.array([3.0, 4.0]), "scanned.00.mlp_norm.weight": np.array([[12.0]])}
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), weights)
    state = optimizer.init(params)
    rates = [0.05, 0.1, 0.1, 0.1 * 2 / 3, 0.1 / 3]
    assert_relative([learning_rates(config, 5)(step) for step in range(5)], rates)
    mean = dict.fromkeys(weights, 0.0)
    square = dict.fromkeys(weights, 0.0)
    for step, rate in enumerate(rates, 1):
        updates, state = optimizer.update(
            jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), gradients), state, params
        )
        params = optax.apply_updates(params, updates)
        for name, gradient in gradients.items():
            clipped = gradient / 13.0
            mean[name] = 0.9 * mean[name] + 0.1 * clipped
            square[name] = 0.999 * square[name] + 0.001 * clipped**2
            update = (mean[name] / (1 - 0.9**step)) / (np.sqrt(square[name] / (1 - 0.999**step)) + 1e-8)
            decay = 0.5 * weights[name] if name == "mlp.up" else 0.0
            weights[name] = weights[name] - rate * (update + decay)
    assert_relative(params, weights, 1e-4)  # float32 sums against float64


def test_schedules_and_decay_by_name():
    for schedule, last in (("constant", 1.0), ("cosine", 0.0), ("linear", 0.0)):
        rates = learning_rates(replace(CONFIG, learning_rate=1.0, schedule=schedule, warmup_fraction=0.0), 100)
        assert float(rates(0)) == pytest.approx(1.0)
        assert float(rates(100)) == pytest.approx(last, abs=1e-6)
    flat, _ = partition(make_params(), [])
    undecayed = {path for path in flat if not is_decayed(path)}
    assert undecayed == {path for path in flat if path.endswith("norm.weight")}
    assert len(undecayed) == 7
    assert not is_decayed("scanned.00.attention.query_bias")


def test_the_loss_falls_and_the_same_config_gives_the_same_result(params, tmp_path):
    calls = []
    config = replace(CONFIG, epochs=6)
    first = run_fit(tmp_path / "a", params, config, progress=lambda *values: calls.append(values))
    second = run_fit(tmp_path / "b", params, config)
    assert_identical(first.params, second.params)
    assert first.history == second.history
    assert first.stopped == "completed"
    assert first.history[-1][1] < 0.7 * first.history[0][1]
    assert [step for step, _ in first.history] == list(range(1, first.steps + 1))
    assert first.tokens == 6 * sum(len(example.ids) for example in EXAMPLES)
    assert calls[-1] == (first.steps, first.steps, first.tokens)
    assert len(calls) == first.steps
    lines = [json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == first.history
    assert list((tmp_path / "a" / "tensorboard").glob("events.*"))
    assert len([path for path in (tmp_path / "a" / "checkpoints").iterdir() if path.is_dir()]) == config.keep
    started = time.monotonic()
    again = run_fit(tmp_path / "a", params, config)
    assert time.monotonic() - started < 5
    assert_identical(again.params, first.params)
    assert (again.history, again.tokens, again.seconds) == (first.history, first.tokens, first.seconds)


EARLY = replace(
    CONFIG, epochs=40, learning_rate=0.05, schedule="constant", eval_every=2, patience=3, min_improvement=0.01
)


def test_early_stopping(params, tmp_path):
    result = run_fit(tmp_path, params, EARLY, validation=VALIDATION)
    assert result.stopped == "early"
    assert result.steps < 200
    losses = [loss for _, loss in result.validation_history]
    best, since = np.inf, 0
    for loss in losses:  # the rule, written a second time
        assert since < 3
        best, since = (loss, 0) if loss < best - 0.01 else (best, since + 1)
    assert since == 3
    trainable, frozen = partition(result.params, [])
    data = packed_batches(VALIDATION, seed=0, epochs=1, rows=2, row_length=24)
    evaluate = make_evaluation(EARLY, MODEL, SFT({"answer": 1.0, "completion": 1.0}), make_mesh(MeshConfig()))
    sums = [evaluate(trainable, frozen, batch) for batch in data.iterate(0, len(data))]
    nll, totals = jax.tree.map(lambda *leaves: float(sum(leaves)), *sums)
    assert sum(nll[term] / totals[term] for term in nll) == pytest.approx(losses[-1], rel=1e-5)
    again = run_fit(tmp_path, params, EARLY, validation=VALIDATION)
    assert (again.steps, again.stopped) == (result.steps, "early")
    assert again.validation_history == result.validation_history
    assert_identical(again.params, result.params)


CHILD = """
import sys, time
from pathlib import Path
sys.path[:0] = sys.argv[3:]
import test_training as t
pause = float(sys.argv[2])
def progress(done, total, tokens):
    print(done, flush=True)
    time.sleep(pause)
t.run_fit(Path(sys.argv[1]), t.make_params(), t.KILLED, validation=t.VALIDATION, progress=progress)
"""
KILLED = replace(EARLY, epochs=3, checkpoint_every=2, patience=50, freeze=["embedding"])


def child_environment():
    return {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(jax.config.jax_compilation_cache_dir),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
    }


def start_child(directory, pause):
    here = Path(__file__).resolve()
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, str(directory), str(pause), str(here.parent), str(here.parent.parent)],
        stdout=subprocess.PIPE,
        text=True,
        env=child_environment(),
    )


def read_until(child, step):
    for line in child.stdout:
        if int(line) >= step:
            return
    raise AssertionError(f"the run ended before step {step}")


def test_a_run_killed_at_random_steps_resumes_bit_by_bit(params, tmp_path):
    undisturbed = run_fit(tmp_path / "whole", params, KILLED, validation=VALIDATION)
    rng = random.Random(5 + SEED)
    directory = tmp_path / "killed"
    for step in (rng.randint(3, 5), rng.randint(8, 11)):
        child = start_child(directory, 0.0)
        read_until(child, step)
        time.sleep(rng.random() * 0.05)  # anywhere: in a step, in an evaluation, in a save
        child.send_signal(signal.SIGKILL)
        child.communicate()
        assert child.returncode == -signal.SIGKILL
    resumed = run_fit(directory, params, KILLED, validation=VALIDATION)
    assert_identical(resumed.params, undisturbed.params)
    assert resumed.history == undisturbed.history
    assert resumed.validation_history == undisturbed.validation_history
    assert (resumed.steps, resumed.tokens, resumed.loss_tokens) == (
        undisturbed.steps,
        undisturbed.tokens,
        undisturbed.loss_tokens,
    )
    assert metrics_of(directory) == metrics_of(tmp_path / "whole")


def test_sigterm_saves_and_exits_with_143(params, tmp_path):
    child = start_child(tmp_path, 0.1)
    read_until(child, 3)
    child.send_signal(signal.SIGTERM)
    output, _ = child.communicate()
    assert child.returncode == 143
    with Checkpointer(tmp_path / "checkpoints", {}, Retention(2)) as checkpointer:
        assert checkpointer.latest is not None
        assert checkpointer.latest >= 3
        assert str(checkpointer.latest) == (["3", *output.split()])[-1]  # not one step after the last one was lost


class Wandb(ModuleType):
    """A stand-in for the package that remembers runs by their ids, like the service."""

    class Error(Exception):
        pass

    def __init__(self):
        super().__init__("wandb")
        self.__spec__ = ModuleSpec("wandb", None)
        self.runs, self.starts = {}, []

    def init(self, **arguments):
        if arguments["project"] == "nobody's":
            raise self.Error("no API key")
        self.starts.append(arguments)
        return self.runs.setdefault(arguments["id"], WandbRun())


class WandbRun:
    def __init__(self):
        self.rows, self.exit_codes, self.step = [], [], 0

    def log(self, values, step):
        assert step >= self.step, "the service warns and drops it"
        self.rows.append({"step": step, **values})
        self.step = step + 1

    def finish(self, exit_code):
        self.exit_codes.append(exit_code)


def test_wandb_gets_every_step_once_in_one_run_however_often_the_fit_is_resumed(params, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", wandb := Wandb())
    config = replace(EARLY, wandb="debates")
    assert config.fingerprint() == replace(config, wandb=None).fingerprint()

    class Killed(Exception):
        pass

    def die(done, total, tokens):
        if done == 5:
            raise Killed

    with pytest.raises(Killed):
        run_fit(tmp_path / "cut", params, config, validation=VALIDATION, progress=die)
    whole = run_fit(tmp_path / "cut", params, config, validation=VALIDATION)
    (run,) = wandb.runs.values()
    assert [start["project"] for start in wandb.starts] == ["debates"] * 2
    assert wandb.starts[0]["name"].endswith("/cut")
    assert wandb.starts[0]["config"]["rows"] == config.rows
    assert wandb.starts[0]["resume"] == "allow"
    assert run.exit_codes == [1, 0]
    without_time = [{key: value for key, value in row.items() if not key.startswith("timing/")} for row in run.rows]
    assert without_time == metrics_of(tmp_path / "cut")
    assert [row["validation_loss"] for row in run.rows if "validation_loss" in row] == [
        loss for _, loss in whole.validation_history
    ]
    assert any(key.startswith("timing/") for key in run.rows[0])
    run_fit(tmp_path / "other", params, replace(SHORT, wandb="debates"))
    assert len(wandb.runs) == 2
    with pytest.raises(AgentArkError, match=r"wandb: .*\(no API key\); run `wandb login`, set WANDB_MODE=offline"):
        run_fit(tmp_path / "refused", params, replace(SHORT, wandb="nobody's"))


def test_early_stop_state_is_resumed(params, tmp_path):
    whole = run_fit(tmp_path / "whole", params, EARLY, validation=VALIDATION)

    class Killed(Exception):
        pass

    def die(done, total, tokens):
        if done >= whole.steps - 1:
            raise Killed

    with pytest.raises(Killed):
        run_fit(tmp_path / "cut", params, EARLY, validation=VALIDATION, progress=die)
    resumed = run_fit(tmp_path / "cut", params, EARLY, validation=VALIDATION)
    assert (resumed.steps, resumed.stopped) == (whole.steps, "early")
    assert resumed.validation_history == whole.validation_history
    assert_identical(resumed.params, whole.params)


def kept(directory):
    return sorted(int(path.name) for path in (directory / "checkpoints").iterdir())


def test_retention_keeps_the_newest_the_best_and_every_so_many(params, tmp_path):
    config = replace(EARLY, epochs=4, patience=None, keep=1, keep_every=4, keep_best=True, checkpoint_every=3)
    result = run_fit(tmp_path / "sync", params, config, validation=VALIDATION)
    best = min(result.validation_history, key=lambda entry: entry[1])[0]
    assert kept(tmp_path / "sync") == sorted({*range(4, result.steps + 1, 4), best, result.steps})

    interrupted = tmp_path / "async"
    config = replace(config, checkpoint_async=True)

    def die(done, total, tokens):
        if done == 7:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        run_fit(interrupted, params, config, validation=VALIDATION, progress=die)
    resumed = run_fit(interrupted, params, config, validation=VALIDATION)
    assert kept(interrupted) == kept(tmp_path / "sync")
    assert_identical(resumed.params, result.params)
    assert (resumed.history, resumed.validation_history) == (result.history, result.validation_history)


def test_metrics_time_and_profile(params, tmp_path, caplog):
    caplog.set_level("INFO", "agentark_jax")
    run_fit(tmp_path, params, replace(CONFIG, steps=3, profile_steps=[2, 3]))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        timing = line["timing"]
        assert line["pad_fraction"] == pytest.approx(1 - line["tokens"] / (2 * 24))
        assert timing["step_seconds"] == pytest.approx(timing["data_wait_seconds"] + timing["compute_seconds"])
        assert timing["tokens_per_second"] == pytest.approx(line["tokens"] / timing["step_seconds"])
        assert "mfu" not in timing  # no CPU is in the table of peaks
    assert len(list((tmp_path / "profile").rglob("*.xplane.pb"))) == 1
    said = [line for line in caplog.messages if line.startswith("attention")]
    assert said == ["attention: xla; there are no kernels for cpu"]

    clock = StepClock(peak_flops=1e12)
    for _ in clock.waiting(iter([0.02, 0.02])):
        time.sleep(0.01)
    timing = clock.lap(tokens=100, flops=10**9)
    assert timing["mfu"] == pytest.approx(1e9 / timing["step_seconds"] / 1e12)
    assert 0.02 <= timing["step_seconds"] < 1


def test_peaks():
    def devices(*kinds):
        return [SimpleNamespace(device_kind=kind) for kind in kinds]

    assert peak_flops(devices("TPU v5 lite")) == 197e12
    assert peak_flops(devices("TPU v5p", "TPU v5p")) == 2 * 459e12
    assert peak_flops(devices("NVIDIA H100 80GB HBM3")) == 989e12
    assert peak_flops(devices("NVIDIA L40S")) == 362e12
    assert peak_flops(devices("TPU v4", "cpu")) is None


def test_memory_survives_json():
    memory = Memory(tokens=3, history=[(1, 0.1 + 0.2)], validation_history=[(1, 1.0)])
    assert Memory.from_json(json.loads(json.dumps(memory.to_json()))) == memory


SHORT = replace(CONFIG, steps=3)


def test_a_loss_that_is_not_finite_names_step_and_questions(params, tmp_path):
    poisoned = {**params, "final_norm": {"weight": params["final_norm"]["weight"].at[0].set(jnp.nan)}}
    with pytest.raises(AgentArkError, match=r"step 1: the loss is nan .*questions q\d.*no checkpoint yet") as caught:
        run_fit(tmp_path, poisoned, replace(SHORT, checkpoint_every=1))
    assert caught.value.exit_code == 1
    with np.load(tmp_path / "not_finite_step_1.npz") as dumped:
        data = packed_batches(EXAMPLES, seed=7, epochs=2, rows=2, row_length=24)
        expected = next(data.iterate(0, 1))
        np.testing.assert_array_equal(dumped["ids"], expected["ids"])
        np.testing.assert_array_equal(dumped["weights.answer"], expected["weights"]["answer"])
        assert str(tmp_path / "not_finite_step_1.npz") in str(caught.value)
    with Checkpointer(tmp_path / "checkpoints", {}, Retention(2)) as checkpointer:
        assert checkpointer.latest is None


def test_a_checkpoint_of_another_fit_is_refused_with_the_keys_that_differ(params, tmp_path):
    run_fit(tmp_path, params, SHORT)
    with pytest.raises(AgentArkError, match=r"fit\.learning_rate was 0\.01 and is 0\.02"):
        run_fit(tmp_path, params, replace(SHORT, learning_rate=0.02))
    with pytest.raises(AgentArkError, match=r"another fit: model was 'tiny' and is 'other'"):
        run_fit(tmp_path, params, SHORT, fingerprint={"model": "other"})
    with pytest.raises(AgentArkError, match="another fit: seed was 7 and is 8"):
        run_fit(tmp_path, params, SHORT, seed=8)
    with pytest.raises(AgentArkError, match="another fit: examples was"):
        run_fit(tmp_path, params, SHORT, examples=make_examples(24, seed=9))
    run_fit(tmp_path, params, replace(SHORT, checkpoint_every=1, keep=1))  # bookkeeping may change


def damage(path, how):
    if how == "delete":
        path.unlink()
    elif how == "truncate":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    else:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 0x40
        path.write_bytes(bytes(content))


@pytest.mark.parametrize("how", ["delete", "truncate", "flip"])
@pytest.mark.parametrize("what", ["record/metadata", "state/data"])
def test_a_damaged_checkpoint_is_an_error_and_deleting_it_goes_on_from_the_one_before(params, tmp_path, how, what):
    optimizer = make_optimizer(SHORT, 3)
    trainable, _ = partition(params, [])
    state = initial_state(make_mesh(MeshConfig()), optimizer, trainable)
    with Checkpointer(tmp_path, {"a": 1}, Retention(2)) as checkpointer:
        for step in (1, 2):
            state = TrainState(jnp.asarray(step, jnp.int32), state.params, state.optimizer)
            checkpointer.save(state, {"note": step})
    place = tmp_path / "2"
    files = [
        path for path in (place / "state").rglob("*") if (path.parent / ".zarray").exists() and path.name != ".zarray"
    ]
    damage(place / what if what != "state/data" else max(files, key=lambda path: path.stat().st_size), how)
    with (
        Checkpointer(tmp_path, {"a": 1}, Retention(2)) as checkpointer,
        pytest.raises(AgentArkError, match=r"2: the checkpoint is damaged .*delete this directory"),
    ):
        checkpointer.restore(state)
    subprocess.run(["rm", "-r", str(place)], check=True)
    with Checkpointer(tmp_path, {"a": 1}, Retention(2)) as checkpointer:
        restored, memory = checkpointer.restore(state)
    assert memory == {"note": 1}
    assert_identical(restored.params, state.params)


def test_a_half_written_checkpoint_is_ignored(params, tmp_path):
    run_fit(tmp_path, params, SHORT)
    checkpoints = tmp_path / "checkpoints"
    (checkpoints / "3").rename(checkpoints / "3.orbax-checkpoint-tmp")
    result = run_fit(tmp_path, params, SHORT)
    assert result.steps == 3
    assert sorted(path.name for path in checkpoints.iterdir()) == ["3"]


def test_a_directory_that_cannot_be_written(params, tmp_path):
    (tmp_path / "checkpoints").write_text("in the way")
    with pytest.raises(AgentArkError, match=r"checkpoints: cannot keep checkpoints here"):
        run_fit(tmp_path, params, SHORT)


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
sys.path[:0] = sys.argv[2:]
import test_training as t
from agentark_jax.errors import AgentArkError
params = t.make_params()
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
def progress(done, total, tokens):
    if done == 2:
        resource.setrlimit(resource.RLIMIT_FSIZE, (6000, resource.RLIM_INFINITY))
try:
    t.run_fit(Path(sys.argv[1]), params, t.replace(t.SHORT, checkpoint_every=1), progress=progress)
except AgentArkError as error:
    print("refused:", error)
"""


def test_checkpoints_that_are_removed_are_gone_as_a_whole(tmp_path, monkeypatch):
    """Killed between renaming and removing, what is left is not taken for checkpoints, and goes the next time."""
    (tmp_path / "checkpoints" / "2" / "state").mkdir(parents=True)
    (tmp_path / "model").mkdir()
    with monkeypatch.context() as killed:
        killed.setattr(checkpoint.shutil, "rmtree", lambda path: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            checkpoint.remove_checkpoints(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoints.removed", "model"]
    (tmp_path / "checkpoints" / "4").mkdir(parents=True)  # the fit was done again
    for _ in range(2):
        checkpoint.remove_checkpoints(tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_full_disk_is_one_clear_error_and_the_checkpoint_before_stays(params, tmp_path):
    here = Path(__file__).resolve()
    child = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path), str(here.parent), str(here.parent.parent)],
        capture_output=True,
        text=True,
        check=True,
        env=child_environment(),
    )
    assert "refused:" in child.stdout
    assert "could not be written" in child.stdout
    assert "free space" in child.stdout
    assert run_fit(tmp_path, params, replace(SHORT, checkpoint_every=1)).steps == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learning_rate": -1.0}, "learning_rate: -1.0"),
        ({"learning_rate": float("nan")}, "learning_rate: nan"),
        ({"rows": 0}, "rows: 0"),
        ({"rows": 4, "accumulation": 3}, r"accumulation: 3 .* divisor of rows \(4\)"),
        ({"schedule": "step"}, "schedule: 'step'"),
        ({"patience": 2}, "patience: 2 .*eval_every"),
        ({"keep_best": True}, "keep_best: True .*eval_every"),
        ({"profile_steps": [3, 2]}, r"profile_steps: \[3, 2\]"),
        ({"keep_every": 0}, "keep_every: 0"),
        ({"warmup_fraction": 1.0}, "warmup_fraction: 1.0"),
        ({"steps": 0}, "steps: 0"),
        ({"remat": True}, "remat: True .* one of none, products, outputs, full"),
        ({"compute_dtype": "float16"}, "compute_dtype: 'float16'"),
        ({"coefficients": {"completion": float("inf")}}, r"coefficients\.completion: inf"),
        ({"lora": Lora(2, 4.0), "freeze": ["embedding"]}, r"freeze: \['embedding'\] .*empty beside lora"),
        ({"wandb": "project"}, r"wandb: 'project' .*pip install 'agentark-jax\[wandb\]'"),
    ],
)
def test_bad_config(change, message, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # not installed
    with pytest.raises(UsageError, match=message):
        replace(FitConfig(), **change)


def test_names_that_do_not_exist(params, tmp_path):
    with pytest.raises(UsageError, match=r"freeze: no parameter is called 'embed'; choose among embedding, final_norm"):
        run_fit(tmp_path, params, replace(SHORT, freeze=["embed"]))
    with pytest.raises(UsageError, match="leaves no parameter to train"):
        run_fit(tmp_path, params, replace(SHORT, freeze=sorted(params)))
    with pytest.raises(UsageError, match="no example has the loss term 'rationale'; choose among answer, completion"):
        run_fit(tmp_path, params, replace(SHORT, coefficients={"rationale": 1.0}))
    with pytest.raises(UsageError, match="eval_every: there are no validation examples"):
        run_fit(tmp_path, params, replace(SHORT, eval_every=1))
    with pytest.raises(UsageError, match=r"row_length: .* 13 tokens"):
        run_fit(tmp_path, params, replace(SHORT, row_length=12))
