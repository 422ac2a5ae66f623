"""Process-aware distillation as part of a run: on the embedded engine and a real server, killed and resumed."""

import json
import os
import random
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
import real_server
from faults import SEED
from tiny_models import write_model

from agentark_jax.models.config import load_config
from agentark_jax.models.heads import load_heads
from agentark_jax.models.weights import weights_fingerprint
from agentark_jax.process import LABELS
from agentark_jax.traces.selection import load_selection
from agentark_jax.traces.step_labels import load_step_labels
from agentark_jax.traces.store import TraceStore

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
CONFIGS = [ROOT / "tests" / "tiny.yaml", ROOT / "tests" / "tiny_pad.yaml"]
NAME = "tiny_pad"
STEP_LABELS = ("step_labels", "step_labels_outcome", "step_labels_random")
# What follows from rollouts, and is made again when it is gone.
REINFORCED = ("vr", "pad", "evaluate_vr", "evaluate_pad")


def start(root: Path, *arguments: str, **environment: str) -> subprocess.Popen:
    configs = [option for config in CONFIGS for option in ("--config", str(config))]
    command = [sys.executable, "-m", "agentark_jax.cli", "run", *configs, "--root", str(root), *arguments]
    variables = {**os.environ, "JAX_PLATFORMS": "cpu", "COLUMNS": "120", **environment}
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=variables
    )


def complete(root: Path, *arguments: str, **environment: str) -> str:
    process = start(root, *arguments, **environment)
    shown, _ = process.communicate(timeout=1200)
    assert process.returncode == 0, shown
    return shown


def training(directory: Path, arm: str) -> dict:
    return json.loads((directory / arm / "training.json").read_text())


def counts(directory: Path, stage: str) -> dict:
    return json.loads((directory / stage / "manifest.json").read_text())["counts"]


def rollouts(directory: Path) -> list[tuple]:
    store = sqlite3.connect(directory / "traces.sqlite")
    columns = "call_key, attempt, text, hex(completion_ids), hex(logprobs)"
    rows = store.execute(
        f"SELECT {columns} FROM turns WHERE protocol = 'rollout' ORDER BY call_key, attempt"
    ).fetchall()
    store.close()
    return rows


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    os.environ.setdefault("AGENTARK_CACHE", str(tmp_path_factory.mktemp("cache")))
    complete(root, "--rl.iterations", "8")
    return root / NAME


def test_a_policy_learns_from_rollouts_judged_by_a_model_of_the_debate(finished):
    labels, prm, pad = (counts(finished, stage) for stage in ("step_labels", "prm", "pad"))
    assert 0 < labels["labelled"] <= labels["turns"]
    assert min(labels["right"], labels["wrong"]) > 0
    model = finished / "prm" / prm["location"]
    assert load_heads(model, load_config(model))["prm"]["weight"].shape == (2, 48)
    assert pad["iterations"] == 8
    assert pad["examples"] == pad["rollouts"]["rollouts"] == 8 * 7 * 4
    assert pad["stopped"] == "completed"
    records = training(finished, "pad")["iterations"]
    assert all({"process", "accuracy", "reward/process", "reward/verifiable"} <= record.keys() for record in records)
    assert all(record["logprob_gap/max"] < 1e-4 for record in records)
    assert "process" not in training(finished, "vr")["iterations"][0]
    first = [training(finished, arm)["iterations"][0]["accuracy"] for arm in ("vr", "pad")]
    assert first[0] == first[1]  # the same questions and seeds, and the same weights
    revisions = {counts(finished, stage)["revision"] for stage in ("base", "vr", "pad", "student_budget")}
    assert len(revisions) == 4
    assert not list(finished.rglob("checkpoints*"))
    results = json.loads((finished / "results.json").read_text())
    assert {"vr", "pad", "student_budget"} <= results["arms"].keys()
    assert {("pad", "vr"), ("pad", "student_budget")} <= {(each["a"], each["b"]) for each in results["differences"]}
    assert "Rollouts by iteration" in (finished / "report.html").read_text()


def test_judges_that_know_nothing_of_steps(finished, tmp_path):
    """Beside what is there: an outcome judge and a placebo, of another size than the student."""
    directory = tmp_path / NAME
    shutil.copytree(finished, directory)
    raw = finished / "raw_model" / "model"
    larger = shutil.copytree(raw, tmp_path / "larger", ignore=shutil.ignore_patterns("*.safetensors"))
    write_model(larger, load_config(raw).vocab_size, hidden_size=64, max_positions=1024)
    arms = ["pad_outcome", "pad_random"]
    options = ("--update", "--rl.iterations", "2", "--arms", f"[{', '.join(arms)}]", "--prm.model", str(larger))
    complete(tmp_path, *options)
    told = {stage: load_step_labels(directory / stage / LABELS) for stage in STEP_LABELS}
    with TraceStore(directory / "traces.sqlite", read_only=True) as store:
        (grader,) = store.graders()
        verdicts = {key: label.verdict for key, label in store.labels(grader).items()}
    assert {each.key: set(each.right) for each in told["step_labels_outcome"]} == {
        each.key: {float(verdicts[each.key] == "right")} for each in told["step_labels_outcome"]
    }
    values, placebo = ([x for each in told[stage] for x in each.right] for stage in STEP_LABELS[::2])
    assert sorted(values) == sorted(placebo)
    assert values != placebo
    for stage in ("prm_outcome", "prm_random"):
        model = directory / stage / counts(directory, stage)["location"]
        assert load_heads(model, load_config(model))["prm"]["weight"].shape == (2, 64)
    assert len({counts(directory, stage)["revision"] for stage in ("prm", "prm_outcome", "prm_random")}) == 3
    assert len({counts(directory, arm)["revision"] for arm in ("base", "student", *arms)}) == 4
    results = json.loads((directory / "results.json").read_text())
    assert results["judges"].keys() == {"prm_outcome", "prm_random"}
    assert set(arms) <= results["arms"].keys()
    assert "Everything was up to date" in complete(tmp_path, *options[1:])


def test_a_verifier_chooses_what_it_calls_right(finished, tmp_path):
    """What so small a model calls right is chance: too little of it, and the run says so and ends."""
    directory = tmp_path / NAME
    shutil.copytree(finished, directory)
    process = start(tmp_path, "--update", "--arms", "[verifier]")
    shown, _ = process.communicate(timeout=1200)
    with TraceStore(directory / "traces.sqlite", read_only=True) as store:
        (verifier,) = {name for name in store.graders() if name.startswith("verifier")}
        called = {key: label.verdict for key, label in store.labels(verifier).items()}
        last = {turn.key for turn in store.turns(keys=called) if turn.call.round == 1}
    assert last == called.keys()
    assert counts(directory, "verdicts")["right"] == sum(verdict == "right" for verdict in called.values())
    if "right" not in called.values():
        assert process.returncode == 1
        assert "it calls none" in " ".join(shown.split())
    elif process.returncode:
        assert "The arms cannot be matched" in " ".join(shown.split()), shown
    else:
        chosen, student = (
            [t.turn_key for t in load_selection(directory / "select" / f"{name}.parquet").trajectories]
            for name in ("verifier", "student")
        )
        assert len(chosen) == len(student) > 0
        assert {called[key] for key in chosen} == {"right"}
        assert "verifier" in json.loads((directory / "results.json").read_text())["arms"]


def test_more_debates_pay_as_much_as_the_rollouts(finished):
    debate, debates = counts(finished, "debate"), counts(finished, "turns_debates")
    assert debates["calls"] == 2 * debate["calls"]
    assert debates["completion_tokens"] >= debate["completion_tokens"] + counts(finished, "pad")["tokens"]
    with TraceStore(finished / "traces.sqlite", read_only=True) as store:
        debated = [turn for turn in store.turns(protocol="debate") if turn.call.weights == revision(finished)]
    assert {turn.call.sample for turn in debated} == {0, 1}


def revision(finished: Path) -> str:
    return counts(finished, "base")["revision"]


def test_a_second_run_does_nothing(finished):
    assert "Everything was up to date" in complete(finished.parent, "--rl.iterations", "8")
    for stage in ("pad", "evaluate_pad"):
        shutil.rmtree(finished / stage)
    before = rollouts(finished)
    shown = complete(finished.parent, "--rl.iterations", "8")  # the stage is made again of the rollouts that are there
    assert re.search(r"pad: sampling \d+%, scoring \d+%, rewards \d+%, training \d+%, weights handed out \d+%", shown)
    assert rollouts(finished) == before


def test_kills_at_random_moments_change_nothing(finished, tmp_path):
    """SIGKILL while policies learn, up to twenty times: all that they leave is what the undisturbed run left."""
    directory = tmp_path / NAME
    shutil.copytree(finished, directory)
    for stage in REINFORCED:
        shutil.rmtree(directory / stage)
    (directory / "results.json").unlink()
    store = sqlite3.connect(directory / "traces.sqlite")
    with store:
        keys = "SELECT call_key FROM turns WHERE protocol = 'rollout'"
        store.execute(f"DELETE FROM labels WHERE call_key IN ({keys})")
        store.execute("DELETE FROM turns WHERE protocol = 'rollout'")
    store.close()
    draws, kills, seconds = random.Random(7 + SEED), 0, 4.0
    while True:
        process = start(tmp_path, "--rl.iterations", "8")
        try:
            shown, _ = process.communicate(timeout=draws.uniform(0.5, 1.5) * seconds if kills < 12 else 1200)
        except subprocess.TimeoutExpired:
            os.kill(process.pid, signal.SIGKILL)
            process.communicate()
            kills += 1
            seconds *= 1.07
            continue
        assert process.returncode == 0, shown
        break
    assert kills >= 3  # a fast machine is done before there were twelve
    for arm in ("vr", "pad"):
        assert training(directory, arm) == training(finished, arm)
        assert weights_fingerprint(directory / arm / "model") == weights_fingerprint(finished / arm / "model")
        assert counts(directory, arm)["rollouts"] == counts(finished, arm)["rollouts"]
    assert rollouts(directory) == rollouts(finished)


def test_the_alarm_ends_a_policy_that_games_its_reward(finished, tmp_path):
    """A reward that pays for length alone: the policy fills its limit, and training goes back to where it did not."""
    module = tmp_path / "greedy_rewards.py"
    module.write_text("def longer(rollout):\\n    return len(rollout.ids) / 32\\n".replace("\\n", "\n"))
    shutil.copytree(finished, tmp_path / NAME)
    options = (
        *("--update", "--arms", "[gold, vr]", "--rl.iterations", "40", "--rl.fit.learning_rate", "3e-3"),
        *("--rl.rewards.coefficients", '{"greedy_rewards:longer": 1.0, "verifiable": 0.0}'),
        *("--rl.alarms.action", "rollback", "--rl.alarms.length_ratio", "1.3", "--rl.alarms.patience", "2"),
        *("--rl.alarms.truncated", "0.3"),
        # what else goes wrong on the way depends on the last digits: these two are to be seen
        *(part for name in ("kl", "entropy_fall", "step_ratio") for part in (f"--rl.alarms.{name}", "null")),
    )
    shown = complete(tmp_path, *options, PYTHONPATH=f"{tmp_path}:{ROOT}")
    found = counts(tmp_path / NAME, "vr")
    assert found["stopped"] == "rolled_back", shown
    assert found["iterations"] < 40
    assert any("completions have" in alarm or "cut off" in alarm for alarm in found["alarms"])
    assert "taken back to its last good checkpoint" in (tmp_path / NAME / "report.html").read_text()


@pytest.mark.sglang
def test_a_server_samples_the_rollouts(finished, tmp_path):
    """It is given every policy, shows that it computes with it, and the trainer agrees with what it sampled."""
    shutil.copytree(finished, tmp_path / NAME)
    for stage in REINFORCED:
        shutil.rmtree(tmp_path / NAME / stage)
    with real_server.serving(finished / "base" / "model", tmp_path / "server.log") as url:
        complete(
            tmp_path, "--rl.iterations", "8", "--rl.temperature", "0.9", "--update", "--engine.servers", f"[{url}]"
        )
        records = training(tmp_path / NAME, "pad")["iterations"]
    assert len(records) == 8
    assert all(record["logprob_gap/max"] < 1e-3 for record in records)
    with TraceStore(tmp_path / NAME / "traces.sqlite", read_only=True) as store:
        served = [turn for turn in store.turns(protocol="rollout") if turn.completion and turn.completion.server]
    assert len({turn.call.weights for turn in served}) == 2 * 8
    assert len(served) == 2 * 8 * 7 * 4
