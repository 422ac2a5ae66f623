"""Workers that share the arms of a run: who makes what, and that it comes to the same as one process."""

import json
import os
import sqlite3
import time
from pathlib import Path

import pytest
from test_refusals import cache  # noqa: F401 - a fixture
from test_run import CONFIG, complete, start, without_timing

from agentark_jax.arms import dealt
from agentark_jax.cli import main
from agentark_jax.config import parse
from agentark_jax.errors import AgentArkError
from agentark_jax.evaluation.predictions import load_predictions
from agentark_jax.stages import Run, locked, read_manifest
from agentark_jax.traces.store import TraceStore
from agentark_jax.workers import _cores, make_all

ARMS = ("gold", "student_after_gold", "samples_budget", "twin", "planted")
# Students that hardly differ from the base, so that the twin does not either.
SETTINGS = (
    *("--arms", f"[{', '.join(ARMS)}]", "--curve", "[]", "--fit.learning_rate", "1e-6"),
    *("--questions.held_out", "40", "--evaluate.planted", "0.1"),
)


def test_students_are_dealt_out_in_turn_and_go_where_what_they_are_made_from_is():
    names = ["student", *ARMS, "gold_after_student_after_gold", "student_50pct"]
    assert dealt(["student", "gold", "gold_after_student", "vr"], 2) == [
        ["student", "gold_after_student"],
        ["gold", "vr"],
    ]
    assert dealt(["student", *ARMS, "student_50pct"], 2) == [
        ["student", "twin", "planted", "student_50pct"],
        ["gold", "student_after_gold", "samples_budget"],
    ]
    for workers in range(1, 9):
        shares = dealt(names[:-2], workers)
        assert len(shares) == workers
        assert sorted(name for share in shares for name in share) == sorted(names[:-2])


def test_cores_are_shared_out_where_there_are_enough(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 4, 5, 6}, raising=False)
    assert _cores(2) == [[0, 1], [4, 5, 6]]
    assert _cores(6) == [[]] * 6


def make(run: Run, text: str, calls: list[str], version: int = 1, fail: bool = False):
    def build(work):
        calls.append(text)
        (work.directory / "half.txt").write_text(text)
        if fail:
            raise RuntimeError("killed")
        (work.directory / "out.txt").write_text(text)

    return run.produce("stage", build, version=version, config={}, inputs={})


def test_stages_of_others_are_lent_or_taken_over_where_they_are_what_is_wanted(tmp_path):
    calls: list[str] = []
    own, lent, left = (tmp_path / name for name in ("own", "lent", "left"))
    make(Run(lent), "lent", calls)
    make(Run(left), "left", calls)
    assert make(Run(own, lent=[lent]), "own", calls).directory == lent / "stage"
    assert not own.exists()
    found = make(Run(own, left=[tmp_path / "nowhere", left]), "own", calls)
    assert (found.directory, found.reused) == (own / "stage", True)
    assert (own / "stage" / "out.txt").read_text() == "left"
    assert not (left / "stage").exists()
    assert calls == ["lent", "left"]
    make(Run(left), "another", calls, version=2)
    assert make(Run(own, left=[left]), "own", calls).reused, "what is there and wanted stays"
    assert make(Run(own, lent=[lent], left=[left]), "own", calls, version=3).reused is False
    assert read_manifest(left / "stage").version == 2, "what is not wanted stays where it is"


def test_what_a_worker_began_is_gone_on_with(tmp_path):
    calls: list[str] = []
    own, left = tmp_path / "own", tmp_path / "left"
    with pytest.raises(RuntimeError, match="killed"):
        make(Run(left), "begun", calls, fail=True)
    run = Run(own, left=[left])

    def build(work):
        assert (work.directory / "half.txt").read_text() == "begun"

    assert not run.produce("stage", build, version=1, config={}, inputs={}).reused
    assert not (left / "stage").exists()


@pytest.fixture
def refusal(tmp_path, capsys):
    """What the command says that it cannot carry out."""

    def run(*arguments: str) -> str:
        command, *options = arguments
        assert main([command, "--config", str(CONFIG), "--root", str(tmp_path), *options]) == 2
        return capsys.readouterr().err

    return run


def test_shards_and_workers_must_make_sense(refusal):
    assert "give I/N" in refusal("attribute", "--shard", "2/2")
    assert "give how many, 1 or more" in refusal("attribute", "--workers", "0")
    assert "does not go with --shard" in refusal("attribute", "--shard", "0/2", "--update")
    assert "does not go with --shard" in refusal("attribute", "--shard", "0/2", "--workers", "2")


def test_a_worker_that_was_killed_is_told_of(tmp_path, monkeypatch):
    killed = tmp_path / "killed"
    killed.write_text("#!/bin/sh\nkill -9 $$\n")
    killed.chmod(0o755)
    monkeypatch.setattr("agentark_jax.workers.sys.executable", str(killed))
    config, _ = parse(["--config", str(CONFIG), "--root", str(tmp_path)], "agentark attribute", "")
    with pytest.raises(
        AgentArkError, match=r"worker 0 \(killed by signal 9\) and 1 \(killed by signal 9\) of 2 failed"
    ):
        make_all(config, [], 2, update=False)


def test_nobody_gathers_while_a_worker_is_at_work(tmp_path, refusal):
    with locked(tmp_path / "tiny" / "shards" / "arms-1-of-2"):
        for arguments in (["attribute"], ["run"], ["attribute", "--workers", "2"], ["attribute", "--shard", "1/2"]):
            assert f"arms-1-of-2: in use by process {os.getpid()}" in refusal(*arguments)
    assert not list(tmp_path.rglob("manifest.json"))


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    """The run of one process, on so many cores as each of two workers has."""
    os.environ.setdefault("AGENTARK_CACHE", str(tmp_path_factory.mktemp("cache")))
    root = tmp_path_factory.mktemp("alone")
    on_half(root, *SETTINGS)
    return root / "tiny"


def on_half(root: Path, *arguments: str) -> str:
    process = on_half_started(root, *arguments)
    shown, _ = process.communicate(timeout=1800)
    assert process.returncode == 0, shown
    return shown


def on_half_started(root: Path, *arguments: str):
    process = start(root, *arguments, part="attribute")
    if cores := _cores(2)[0]:
        os.sched_setaffinity(process.pid, cores)
    return process


def turns(run: Path) -> list[tuple]:
    store = sqlite3.connect(f"file:{run / 'traces.sqlite'}?mode=ro", uri=True)
    columns = "call_key, attempt, text, hex(completion_ids), hex(logprobs)"
    rows = store.execute(f"SELECT {columns} FROM turns ORDER BY call_key, attempt").fetchall()
    store.close()
    return rows


def same(run: Path, other: Path) -> None:
    found, wanted = without_timing(run), without_timing(other)
    for results in (found, wanted):
        del results["run"]["command"]  # the place
    assert found == wanted
    assert turns(run) == turns(other)


@pytest.mark.slow
def test_shares_that_are_killed_and_gone_on_with_come_to_what_one_process_makes(alone, tmp_path):
    run = tmp_path / "tiny"
    own = run / "shards" / "arms-0-of-2"
    killed = on_half_started(tmp_path, *SETTINGS, "--shard", "0/2")
    while killed.poll() is None and not (own / "student" / "manifest.json").exists():
        time.sleep(0.02)
    killed.kill()
    shown, _ = killed.communicate()
    assert killed.returncode < 0, shown
    kept = (own / "student" / "manifest.json").stat().st_mtime_ns
    assert not (run / "student").exists()
    other = on_half_started(tmp_path, *SETTINGS, "--shard", "1/2")
    again = on_half_started(tmp_path, *SETTINGS, "--shard", "0/2")
    for worker in (other, again):
        shown, _ = worker.communicate(timeout=1800)
        assert worker.returncode == 0, shown
        assert "warm_start_answers" not in shown, "what they have in common is made"
    assert (own / "student" / "manifest.json").stat().st_mtime_ns == kept
    assert not (run / "shards" / "arms-1-of-2" / "student").exists()
    shown = on_half(tmp_path, *SETTINGS)
    assert "Everything was up to date: nothing was generated or trained" in shown
    assert not list((run / "shards").glob("arms-*"))
    same(run, alone)
    shown = on_half(tmp_path, *SETTINGS, "--shard", "0/1")
    assert "worker 0 of 1 is done" in shown
    assert "✓" not in shown, "it finds all of it there"


@pytest.mark.slow
def test_workers_of_one_machine_come_to_the_same(alone, tmp_path):
    shown = complete(tmp_path, *SETTINGS, "--workers", "2", part="attribute")
    assert "[0] worker 0 of 2 is done" in shown
    assert "[1] worker 1 of 2 is done" in shown
    same(tmp_path / "tiny", alone)


@pytest.mark.slow
def test_a_worker_that_fails_is_told_of(tmp_path):
    process = start(tmp_path, "--workers", "2", "--fit.row_length", "16", part="attribute")
    shown, _ = process.communicate(timeout=1800)
    assert process.returncode in (1, 2)
    assert "row_length" in shown
    assert "of 2 failed, see above" in shown
    assert "Traceback" not in shown


@pytest.mark.slow
def test_checks_come_out_as_they_were_made(alone):
    results = without_timing(alone)
    aa, planted = results["checks"]
    # Once in twenty times chance shows a difference where there is none, and then it has to say so.
    assert aa["name"] == "A/A"
    assert aa["passed"] == (aa["found"]["low"] <= 0 <= aa["found"]["high"]), aa["sentence"]
    assert (planted["name"], planted["passed"]) == ("planted", True), planted["sentence"]
    assert planted["found"]["difference"] == pytest.approx(0.1)
    assert planted["expected"] == pytest.approx(0.1)
    compared = {name for difference in results["differences"] for name in (difference["a"], difference["b"])}
    assert not compared & {"twin", "planted"}, "no result is made of checks"
    for name in ("twin", "planted"):
        arm = results["arms"][name]
        assert arm["label"].startswith("check: ")
        assert "no result" in arm["description"]
    trained = results["training"]
    assert trained["twin"]["loss_tokens"] == trained["student"]["loss_tokens"]
    revisions = {
        json.loads((alone / name / "manifest.json").read_text())["counts"]["revision"] for name in ("student", "twin")
    }
    assert len(revisions) == 2, "another seed trains another model"
    said = {name: load_predictions(alone / f"evaluate_{name}" / "predictions.jsonl") for name in ("twin", "planted")}
    changed = [(a, b) for a, b in zip(said["twin"], said["planted"], strict=True) if a != b]
    assert [(a.verdict != "right", b.verdict) for a, b in changed] == [(True, "right")] * 4
    with TraceStore(alone / "traces.sqlite", read_only=True) as store:
        (one, *rest) = store.turns(protocol="planted")
        assert len(rest) == 3
        assert one.call.model.startswith("nobody")
        assert {each.key for each in (one, *rest)} == {key for _, b in changed for key in b.turn_keys}
        assert store.verify() == []
