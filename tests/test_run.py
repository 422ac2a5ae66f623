"""The whole run, on a tiny model from scratch: what it leaves behind, what it reuses, what kills it survives."""

import json
import os
import random
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest
import real_server
from faults import SEED

from agentark_jax.cli import main
from agentark_jax.evaluation.statistics import holm
from agentark_jax.models.weights import weights_fingerprint
from agentark_jax.traces.rows import canonical_record
from agentark_jax.traces.store import TraceStore

ROOT = Path(__file__).parent.parent
CONFIG = ROOT / "tests" / "tiny.yaml"


def start(
    root: Path, *arguments: str, part: str = "run", config: Path = CONFIG, **environment: str
) -> subprocess.Popen:
    command = [sys.executable, "-m", "agentark_jax.cli", part, "--config", str(config), "--root", str(root), *arguments]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "COLUMNS": "120", **environment},
    )


def complete(root: Path, *arguments: str, part: str = "run", config: Path = CONFIG, **environment: str) -> str:
    process = start(root, *arguments, part=part, config=config, **environment)
    shown, _ = process.communicate(timeout=900)
    assert process.returncode == 0, shown
    return shown


def without_timing(directory: Path) -> dict:
    results = json.loads((directory / "results.json").read_text())
    del results["timing"]
    return results


def refused(root: Path, *arguments: str, part: str = "run") -> str:
    process = start(root, *arguments, part=part)
    shown, _ = process.communicate(timeout=300)
    assert process.returncode == 2, shown
    assert "Traceback" not in shown
    return shown


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    os.environ.setdefault("AGENTARK_CACHE", str(tmp_path_factory.mktemp("cache")))
    complete(root)
    return root / "tiny"


def test_a_run_leaves_everything_behind(finished):
    for name in ("config.yaml", "traces.sqlite", "stages.json", "results.json", "report.html", "summary.md"):
        assert (finished / name).stat().st_size > 0
    for name in ("config.json", "model.safetensors", "tokenizer.json", "generation_config.json", "README.md"):
        assert (finished / "model" / name).exists()
    stages = {path.parent.name for path in finished.glob("*/manifest.json")}
    assert {"raw_model", "questions", "warm_start_answers", "base", "debate", "select", "student", "control"} <= stages
    assert {"evaluate_base", "evaluate_student", "evaluate_control", "evaluate_vote", "evaluate_debate"} <= stages
    assert not list(finished.rglob("checkpoints"))
    assert not list(finished.rglob("begun.json"))


def test_the_report_states_what_the_store_holds(finished):
    results = json.loads((finished / "results.json").read_text())
    store = sqlite3.connect(f"file:{finished / 'traces.sqlite'}?mode=ro", uri=True)

    def count(query: str, *values: object) -> int:
        return store.execute(f"SELECT {query}", values).fetchone()[0]

    questions = dict(store.execute("SELECT split, count(*) FROM questions GROUP BY split").fetchall())
    assert questions == {"warm_start": 200, "validation": 16, "debate": 48, "held_out": 16}
    debated = "turns t JOIN questions q ON q.id = t.question_id WHERE t.protocol = 'debate' AND q.split = 'debate'"
    adjusted = [difference["p_holm"] for difference in results["differences"]]
    assert adjusted == holm([difference["p_value"] for difference in results["differences"]])
    assert results["debate"]["turns"] == count(f"count(*) FROM {debated}") == 48 * 3 * 2
    for one in results["debate"]["accuracy_by_round"]:
        where = debated.replace("WHERE", "JOIN labels l ON l.call_key = t.call_key WHERE")
        right = count(f"count(*) FROM {where} AND t.round = ? AND l.verdict = 'right'", one["round"] - 1)
        assert one["accuracy"] * one["n"] == pytest.approx(right)
    flips = {key: value for key, value in results["debate"]["flips"][0].items() if "→" in key}
    assert sum(flips.values()) == 48 * 3
    (step,) = results["telemetry"]["transitions"]
    assert (step["flips"], step["peers_heard"]) == (flips, 2)
    drift = results["telemetry"]["drift"][0]["difference"]
    assert drift * 48 * 3 == pytest.approx(flips["wrong→right"] - flips["right→wrong"])
    generated = count(f"sum(completion_tokens) FROM {debated}")
    assert results["telemetry"]["points"][-1]["tokens"] == pytest.approx(generated / 48)
    greedy = count("count(*) FROM turns WHERE protocol = 'single_greedy'")
    assert greedy == 16 * 4  # base, student, control, half-data student
    assert results["arms"]["vote"]["n"] == results["arms"]["debate"]["n"] == 8
    for arm in results["arms"].values():
        assert 0 <= arm["low"] <= arm["accuracy"] == arm["correct"] / arm["n"] <= arm["high"] <= 1
    tokens = count(
        "sum(completion_tokens) FROM turns WHERE protocol = 'single_greedy' AND weights = ?", base_weights(finished)
    )
    assert results["arms"]["base"]["tokens_per_question"]["completion"] == pytest.approx(tokens / 16)
    store.close()


def base_weights(finished: Path) -> str:
    return json.loads((finished / "base" / "manifest.json").read_text())["counts"]["revision"]


def test_student_and_control_learn_from_equally_many_tokens(finished):
    counts = json.loads((finished / "select" / "manifest.json").read_text())["counts"]["selections"]
    student, control = counts["student"]["tokens"], counts["control"]["tokens"]
    assert abs(student - control) <= 0.01 * min(student, control)
    trained = json.loads((finished / "results.json").read_text())["training"]
    assert trained["student"]["loss_tokens"] == 2 * student
    assert trained["control"]["loss_tokens"] == 2 * control
    for funnel in (counts["student"]["funnel"], counts["control"]["funnel"]):
        for before, after in pairwise(funnel):
            assert after["kept"] + after["dropped"] == before["kept"]


def test_a_second_run_does_nothing_and_says_so(finished):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("manifest.json")}
    results = (finished / "results.json").read_bytes()
    shown = complete(finished.parent)
    assert "Everything was up to date" in shown
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("manifest.json")} == before
    assert (finished / "results.json").read_bytes() == results


def test_another_configuration_needs_to_be_meant(finished):
    shown = refused(finished.parent, "--fit.learning_rate", "1e-3")
    assert "fit.learning_rate (0.0003 → 0.001)" in shown
    assert "--update" in shown


def test_what_changes_no_result_may_change(finished):
    shown = complete(finished.parent, "--fit.mesh.data", "-1", "--fit.mesh.fsdp", "1", "--engine.slots", "8")
    assert "Everything was up to date" in shown


def test_the_exported_model_is_what_transformers_computes(finished):
    import numpy as np
    import torch
    import transformers

    from agentark_jax.models import transformer, weights
    from agentark_jax.models.config import load_config

    directory = finished / "model"
    config = load_config(directory)
    params = weights.load_params(directory, config)
    ids = np.random.default_rng(0).integers(0, config.vocab_size, (2, 200)).astype(np.int32)
    hidden = transformer.hidden_states(config, params, ids, np.broadcast_to(np.arange(200), (2, 200)), None)
    ours = np.asarray(transformer.logits(config, params, hidden))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(directory)
    with torch.no_grad():
        reference = theirs(torch.from_numpy(ids).long()).logits.numpy()
    np.testing.assert_allclose(ours, reference, atol=1e-4)
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(directory)
    assert tokenizer.decode(tokenizer.encode("3 + 4 = 7.")) == "3 + 4 = 7."


def test_a_damaged_stage_is_named_and_nothing_is_lost(finished, tmp_path):
    root = tmp_path / "runs"
    shutil.copytree(finished, root / "tiny")
    (root / "tiny" / "select" / "student.parquet").write_bytes(b"garbage")
    process = start(root)
    shown, _ = process.communicate(timeout=300)
    assert process.returncode == 1
    assert "student.parquet" in shown
    assert "Delete" in shown
    shutil.rmtree(root / "tiny" / "select")
    complete(root)
    assert without_timing(root / "tiny")["arms"] == without_timing(finished)["arms"]


def test_arms_that_are_not_matched_are_not_compared(finished, tmp_path, monkeypatch, capsys):
    """Neither where figures were changed, nor where nothing can be matched: the arms are named and nothing is made."""
    from agentark_jax.cli import main
    from agentark_jax.traces import matching

    shutil.copytree(finished, tmp_path / "tiny")
    stages = {path: path.stat().st_mtime_ns for path in (tmp_path / "tiny").glob("*/manifest.json")}
    select = tmp_path / "tiny" / "select" / "manifest.json"
    told = json.loads(select.read_text())
    tokens = told["counts"]["matched"]["tokens"]
    tokens["control"] = int(1.1 * tokens["control"])
    select.write_text(json.dumps(told))
    arguments = ["attribute", "--config", str(CONFIG), "--root", str(tmp_path)]
    assert main(arguments) == 1
    assert "The arms student, control are not matched any more: control has" in capsys.readouterr().err
    monkeypatch.setattr(matching, "_likeness", lambda a, b: matching.Likeness(1.0, 0.0))
    assert main([*arguments, "--update", "--select.seed", "1"]) == 1
    message = capsys.readouterr().err
    assert "The arms cannot be matched" in message
    assert "student (corrective_first)" in message
    assert "control (round1_only)" in message
    del stages[select]
    assert {path: path.stat().st_mtime_ns for path in stages} == stages


def debated(run: Path) -> list[dict]:
    """The turns of a run's debate stage, without what differs between equal runs."""
    keys = json.loads((run / "debate" / "keys.json").read_text())
    with TraceStore(run / "traces.sqlite", read_only=True) as store:
        return [canonical_record(turn) for turn in store.turns(keys=keys)]


@pytest.mark.slow
def test_workers_share_a_debate(finished, tmp_path):
    """Each has its questions and its store; one is killed. What the run gathers is what one process would have said."""
    assert "no finished base" in refused(tmp_path, "--shard", "0/2", part="debate")
    complete(tmp_path, part="warm-start")
    run = tmp_path / "tiny"
    assert not (run / "debate").exists()
    killed, other = (start(tmp_path, "--shard", f"{shard}/2", part="debate") for shard in range(2))
    store = run / "shards" / "0-of-2" / "traces.sqlite"
    while killed.poll() is None and not (store.exists() and count_turns(store)):
        time.sleep(0.02)
    killed.kill()
    killed.communicate()
    shown, _ = other.communicate(timeout=300)
    assert other.returncode == 0, shown
    complete(tmp_path, "--shard", "0/2", part="debate")
    shards = [count_turns(run / "shards" / f"{shard}-of-2" / "traces.sqlite") for shard in range(2)]
    assert min(shards) > 0
    assert sum(shards) == 48 * 3 * 2
    shown = complete(tmp_path, part="debate")
    assert f"0-of-2: {shards[0]} turns added" in shown
    assert count_turns(run / "traces.sqlite") == sum(shards) + 40 * 2  # and those of the warm start
    assert debated(run) == debated(finished)
    assert not (run / "select").exists()


def count_turns(path: Path) -> int:
    try:
        store = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
        return store.execute("SELECT count(*) FROM turns").fetchone()[0]
    except sqlite3.OperationalError:  # it is being made
        return 0


def test_a_shard_must_be_one_of_them(tmp_path):
    for wrong in ("2/2", "1", "-1/2", "a/b"):
        assert "give I/N" in refused(tmp_path, f"--shard={wrong}", part="debate")
    assert "Debate without --shard" in refused(tmp_path, "--shard", "0/2", "--debate.peers", "other", part="debate")
    assert "--update does not go with --shard" in refused(tmp_path, "--shard", "0/2", "--update", part="debate")


@pytest.mark.slow
def test_a_team_of_different_agents_and_other_methods(tmp_path):
    """Agents with another model, tokenizer, temperature or prompt debate; the student is the base; methods are arms."""
    other = real_server.make_model(tmp_path / "other", 7, positions=1024)
    team = [{"model": None}, {"model": str(other)}, {"temperature": 0.5}]
    draw = {"temperature": 0.7, "max_tokens": 24}
    methods = {name: {"draw": draw} for name in ("mad", "dylan", "mav", "macnet", "agentverse", "self_consistency")}
    methods["single"] = {"draw": draw, "cot": True}
    given = ("--model.scratch.max_positions", "1024", "--methods", json.dumps({**methods, "context": 700}))
    complete(tmp_path, "--team", json.dumps(team), *given)
    run = tmp_path / "tiny"
    results = json.loads((run / "results.json").read_text())
    assert {results["arms"][name]["n"] for name in methods} == {8}
    assert "a team of the base, " in results["arms"]["mad"]["description"]
    keys = json.loads((run / "debate" / "keys.json").read_text())
    with TraceStore(run / "traces.sqlite", read_only=True) as store:
        turns = list(store.turns(keys=keys))
        assert store.verify() == []
    base, weights = base_weights(run), weights_fingerprint(other)
    assert {(turn.call.agent, turn.call.weights, turn.call.sampling.temperature) for turn in turns} == {
        *((0, base, 1.0), (1, weights, 1.0), (2, base, 0.5))
    }
    assert len({turn.call.tokenizer for turn in turns}) == 2
    debate = json.loads((run / "debate" / "manifest.json").read_text())
    assert debate["counts"]["notes"]["retokenised"] == 48 * 3  # in the second round everyone reads a foreign text
    moved = json.dumps([{**team[0], "servers": ["http://127.0.0.1:9"]}, *team[1:]])
    assert "Everything was up to date" in complete(tmp_path, "--team", moved, *given)


@pytest.mark.slow
def test_the_options_of_a_debate_reach_the_run(tmp_path):
    options = {"peers": "other", "layout": "shared_first", "named": "true", "early_stop": "consensus"}
    options |= {"aggregation": "weighted"}
    complete(tmp_path, *(part for key, value in options.items() for part in (f"--debate.{key}", value)))
    run = tmp_path / "tiny"
    manifest = json.loads((run / "debate" / "manifest.json").read_text())
    assert {key: manifest["config"]["debate"][key] for key in options} == {**options, "named": True}
    assert sum(manifest["counts"]["stopped"].values()) == 48
    assert manifest["counts"]["notes"] == {}
    store = sqlite3.connect(f"file:{run / 'traces.sqlite'}?mode=ro", uri=True)
    questions = dict(store.execute("SELECT call_key, question_id FROM turns").fetchall())
    seen = store.execute("SELECT question_id, parents FROM turns WHERE protocol = 'debate' AND round = 1").fetchall()
    store.close()
    assert seen
    for question, parents in seen:
        assert [questions[key] == question for key in json.loads(parents)] == [True, False, False]
    described = json.loads((run / "results.json").read_text())["arms"]["debate"]["description"]
    assert "peers other; named True; layout shared_first" in described


@pytest.mark.slow
def test_kills_at_random_moments_change_nothing(finished, tmp_path):
    """SIGKILL again and again; the results are those of the undisturbed run and no turn is there twice."""
    draws = random.Random(SEED)
    undisturbed = json.loads((finished / "results.json").read_text())["timing"]["total_seconds"]
    kills = 0
    while True:
        # With a cache of its own it compiles anew, as the undisturbed run did, and takes as long.
        process = start(tmp_path, AGENTARK_CACHE=str(tmp_path / "cache"))
        try:
            shown, _ = process.communicate(timeout=draws.uniform(0.08, 0.3) * undisturbed * (1 + kills / 8))
        except subprocess.TimeoutExpired:
            os.kill(process.pid, signal.SIGKILL)
            process.communicate()
            kills += 1
            assert kills < 100, "a run that is killed makes no progress"
            continue
        assert process.returncode == 0, shown
        break
    assert kills >= 2
    disturbed, calm = without_timing(tmp_path / "tiny"), without_timing(finished)
    disturbed["run"].pop("command")
    calm["run"].pop("command")
    assert disturbed == calm
    stores = [sqlite3.connect(directory / "traces.sqlite") for directory in (tmp_path / "tiny", finished)]
    columns = "call_key, attempt, text, hex(completion_ids), hex(logprobs)"
    rows = [store.execute(f"SELECT {columns} FROM turns ORDER BY call_key, attempt").fetchall() for store in stores]
    assert rows[0] == rows[1]
    for store in stores:
        store.close()


@pytest.mark.slow
def test_a_kill_while_checkpoints_are_removed_costs_time_only(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "tiny")
    stage = tmp_path / "tiny" / "student"
    fingerprint = json.loads((stage / "manifest.json").read_text())["fingerprint"]
    (stage / "manifest.json").unlink()
    (stage / "begun.json").write_text(json.dumps({"fingerprint": fingerprint}))
    (stage / "checkpoints.removed" / "2" / "state").mkdir(parents=True)
    complete(tmp_path)
    assert not list(stage.glob("checkpoints*"))
    assert without_timing(tmp_path / "tiny")["arms"] == without_timing(finished)["arms"]


@pytest.mark.slow
def test_students_trained_by_adapters(finished, tmp_path):
    """The model is the base with the adapter that lies beside it; what came before training is reused."""
    import jax
    import numpy as np

    from agentark_jax.models.config import load_config
    from agentark_jax.models.lora import join, load_adapter, merge
    from agentark_jax.models.weights import load_params

    shutil.copytree(finished, tmp_path / "tiny")
    complete(tmp_path, "--update", "--fit.lora", "{rank: 2, alpha: 4}")
    student = tmp_path / "tiny" / "student"
    base = load_config(tmp_path / "tiny" / "base" / "model")
    adapted, adapter = load_adapter(student / "adapter", base)
    merged = merge(adapted, join(load_params(tmp_path / "tiny" / "base" / "model", base), adapter))[1]
    found = load_params(student / "model", base)
    assert jax.tree.all(jax.tree.map(np.array_equal, found, merged))
    counts = json.loads((student / "manifest.json").read_text())["counts"]
    assert counts["trainable"] == sum(leaf.size for leaf in jax.tree.leaves(adapter))
    assert not list((tmp_path / "tiny").rglob("checkpoints"))


@pytest.mark.slow
def test_other_trajectories_with_other_weights(finished, tmp_path):
    """A question's paths share what it counts, R-SFT's terms have coefficients; the control is weighed alike."""
    shutil.copytree(finished, tmp_path / "tiny")
    chosen = ("--select.weighting", "questions", "--fit.coefficients", "{reasoning: 1.0, answer: 2.0}")
    complete(tmp_path, "--update", *chosen)
    run = tmp_path / "tiny"
    for arm in ("student", "control"):
        manifest = json.loads((run / arm / "manifest.json").read_text())
        assert manifest["config"]["weighting"] == "questions"
        lines = (run / arm / "metrics.jsonl").read_text().splitlines()
        assert {"nll/reasoning", "nll/answer"} <= json.loads(lines[0]).keys()
    counts = json.loads((run / "select" / "manifest.json").read_text())["counts"]
    found = {arm: counts["selections"][arm]["tokens"] for arm in ("student", "control")}
    assert counts["matched"]["tokens"] == found


@pytest.mark.slow
def test_several_seeds_share_a_report(finished, tmp_path):
    """The first seed's figures are those of its own run; the pooled ones cover both."""
    shutil.copytree(finished, tmp_path / "alone" / "tiny")
    complete(tmp_path / "alone", "--update", "--arms", "[gold]")
    complete(tmp_path, "--seeds", "[0, 1]", "--arms", "[gold]")
    pooled, alone = without_timing(tmp_path / "tiny"), without_timing(tmp_path / "alone" / "tiny")
    assert [seed["seed"] for seed in pooled["per_seed"]] == [0, 1]
    for arm, figures in alone["arms"].items():
        assert pooled["per_seed"][0]["arms"][arm] == figures["accuracy"]
        assert pooled["arms"][arm]["n"] == 2 * figures["n"]
    for difference in pooled["differences"]:
        a, b = difference["a"], difference["b"]
        if pooled["arms"][a]["n"] == pooled["arms"][b]["n"]:
            first, second = (seed["arms"][a] - seed["arms"][b] for seed in pooled["per_seed"])
            assert (difference["seed_low"] is None) == (abs(first - second) < 1e-12)
    for seed in (0, 1):
        assert (tmp_path / "tiny" / f"seed-{seed}" / "model" / "model.safetensors").exists()
    assert "Everything was up to date" in complete(tmp_path, "--seeds", "[0, 1]", "--arms", "[gold]")


@pytest.mark.slow
def test_two_processes_make_the_run_together(tmp_path):
    """One of them leads, both train, and a second start finds everything up to date."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        several = {"JAX_COORDINATOR_ADDRESS": f"localhost:{free.getsockname()[1]}", "JAX_NUM_PROCESSES": "2"}
    for expected in ("debate student over single-agent student", "Everything was up to date"):
        processes = [start(tmp_path, **several, JAX_PROCESS_ID=str(number)) for number in range(2)]
        leader, follower = (process.communicate(timeout=900)[0] for process in processes)
        assert [process.returncode for process in processes] == [0, 0], leader + follower
        assert expected in leader
        assert "✓" not in follower
    results = json.loads((tmp_path / "tiny" / "results.json").read_text())
    assert results["arms"]["student"]["n"] == 16
    assert (tmp_path / "tiny" / "model" / "model.safetensors").exists()


@pytest.mark.slow
@pytest.mark.sglang
def test_a_server_generates_for_a_run(finished, tmp_path):
    """It gets the weights of every model that the run makes; what the store holds came from it."""
    raw = finished / "raw_model" / "model"
    with real_server.serving(raw, tmp_path / "server.log") as url:
        # An arm that has to be matched may find too few questions: what so small a model gets right is chance.
        options = ("--model.source", str(raw), "--engine.servers", f"[{url}]", "--arms", "[gold]")
        complete(tmp_path, *options)
        assert "Everything was up to date" in complete(tmp_path, *options)
    with TraceStore(tmp_path / "tiny" / "traces.sqlite", read_only=True) as store:
        assert store.verify() == []
        turns = list(store.turns())
    results = json.loads((tmp_path / "tiny" / "results.json").read_text())
    assert {turn.call.weights for turn in turns} >= {base_weights(tmp_path / "tiny")}
    assert len({turn.call.weights for turn in turns}) == 5  # what answers, the base, two students and gold's
    assert results["arms"]["student"]["n"] == results["arms"]["gold"]["n"] == 16
    assert len([turn for turn in turns if turn.call.protocol == "debate" and turn.call.round == 1]) >= 48 * 3


@pytest.mark.slow
@pytest.mark.sglang
def test_an_agent_behind_an_openai_endpoint(finished, tmp_path):
    """Its turns are text alone, and say so; the students learn from them all the same."""
    shutil.copytree(finished, tmp_path / "tiny")
    model = tmp_path / "teacher"
    shutil.copytree(finished / "base" / "model", model)
    with real_server.serving(model, tmp_path / "server.log") as url:
        member = {"model": str(model), "servers": [f"{url}/v1"], "api": "openai"}
        # An arm that has to be matched may find too few questions: what so small a model gets right is chance.
        complete(tmp_path, "--update", "--arms", "[gold]", "--team", json.dumps([{"model": None}, member]))
    keys = json.loads((tmp_path / "tiny" / "debate" / "keys.json").read_text())
    with TraceStore(tmp_path / "tiny" / "traces.sqlite", read_only=True) as store:
        turns = list(store.turns(keys=keys))
    assert {(turn.call.agent, turn.completion.text_only) for turn in turns} == {(0, False), (1, True), (2, False)}
    assert {turn.call.weights for turn in turns if turn.call.agent == 1} == {f"openai:{model}"}
    results = json.loads((tmp_path / "tiny" / "results.json").read_text())
    assert results["training"]["student"]["examples"] > 0


def moved(finished: Path, tmp_path: Path) -> Path:
    """A finished run at another place, of which only what was said and measured is left."""
    directory = tmp_path / "elsewhere"
    shutil.copytree(finished, directory)
    for name in ("results.json", "report.html", "summary.md"):
        (directory / name).unlink()
    for model in [path for path in directory.rglob("model") if path.is_dir()]:
        shutil.rmtree(model)
    assert not list(directory.rglob("*.safetensors"))
    return directory


def test_results_are_written_again_from_what_the_run_left(finished, tmp_path, monkeypatch):
    directory = moved(finished, tmp_path)
    monkeypatch.setattr("agentark_jax.experiment.Pipeline", None)
    # A stage that the run's configuration no longer has is no part of its results.
    shutil.copytree(directory / "evaluate_control", directory / "evaluate_gold")
    assert main(["report", str(directory)]) == 0
    assert without_timing(directory) == without_timing(finished)
    assert (directory / "summary.md").read_bytes() == (finished / "summary.md").read_bytes()
    assert (directory / "report.html").stat().st_size > 0
    first = (directory / "results.json").read_bytes()
    assert main(["report", str(directory)]) == 0
    assert (directory / "results.json").read_bytes() == first


def test_a_changed_prediction_is_named(finished, tmp_path, capsys):
    directory = moved(finished, tmp_path)
    path = directory / "evaluate_student" / "predictions.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    lines[5] = lines[5].replace('"agreement": 1.0', '"agreement": 0.9')
    path.write_text("".join(lines))
    assert main(["report", str(directory)]) == 1
    assert f"{path}: changed since" in capsys.readouterr().err
    assert not (directory / "results.json").exists()


@pytest.mark.parametrize(
    ("file", "content", "complaint"),
    [
        ("stages.json", None, "this run did not finish"),
        ("stages.json", "[]", "stages.json: damaged"),
        ("stages.json", '{"../elsewhere/questions": "f"}', "'../elsewhere/questions' is no stage of this directory"),
        ("results.json", "[]", "results.json: damaged"),
        ("results.json", '{"timing": 5}', "results.json: damaged"),
        ("results.json", '{"timing": {"stages": 5}}', "results.json: damaged"),
        ("select/manifest.json", None, "select: this stage is not finished"),
        ("config.yaml", None, "config.yaml: missing. Give the directory of a finished run"),
    ],
)
def test_a_run_that_is_not_whole_has_no_report(finished, tmp_path, capsys, file, content, complaint):
    directory = moved(finished, tmp_path)
    if content is None:
        (directory / file).unlink()
    else:
        (directory / file).write_text(content)
    assert main(["report", str(directory)]) in (1, 2)
    assert complaint in capsys.readouterr().err


def test_times_of_stages_that_are_no_more_are_not_told(finished, tmp_path):
    directory = moved(finished, tmp_path)
    results = json.loads((finished / "results.json").read_text())
    known = results["timing"]["stages"][0]
    for stage in (known | {"seconds": known["seconds"] + 1}, known | {"stage": "../<b>", "seconds": "long"}):
        results["timing"]["stages"][0] = stage
        (directory / "results.json").write_text(json.dumps(results))
        assert main(["report", str(directory)]) == 0
        told = json.loads((directory / "results.json").read_text())["timing"]["stages"][0]
        assert told == known | {"reused": True}
