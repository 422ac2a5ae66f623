"""Manifests and locks: reuse only what is whole and wanted, continue what was begun, refuse what is damaged."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from agentark_jax.errors import AgentArkError, UsageError
from agentark_jax.files import write_json
from agentark_jax.stages import Run, locked, read_manifest


def produce(run, config=None, inputs=None, text="result", calls=None, version=1):
    def build(work):
        if calls is not None:
            calls.append(sorted(path.name for path in work.directory.iterdir()))
        (work.directory / "out.txt").write_text(text)
        work.counts["lines"] = 1
        work.tokens = 5

    return run.produce("stage", build, version=version, config=config or {"a": 1}, inputs=inputs or {"before": "f0"})


def test_a_finished_stage_is_reused_and_a_changed_one_redone(tmp_path):
    calls = []
    first = produce(Run(tmp_path), calls=calls)
    again = produce(Run(tmp_path), calls=calls)
    assert (first.reused, again.reused, len(calls)) == (False, True, 1)
    assert again == first
    assert again.counts == {"lines": 1}
    for change in ({"config": {"a": 2}}, {"inputs": {"before": "f1"}}, {"version": 2}):
        before = len(calls)
        assert not produce(Run(tmp_path), calls=calls, **change).reused
        assert len(calls) == before + 1
        assert calls[-1] == ["begun.json"], "a stage redone for another fingerprint starts from an empty folder"


def test_a_stage_that_was_begun_is_continued_only_for_the_same_fingerprint(tmp_path):
    def broken(work):
        (work.directory / "half").write_text("half")
        raise AgentArkError("died")

    def attempt():
        Run(tmp_path).produce("stage", broken, version=1, config={"a": 1}, inputs={"before": "f0"})

    with pytest.raises(AgentArkError, match="died"):
        attempt()
    assert read_manifest(tmp_path / "stage") is None
    calls = []
    produce(Run(tmp_path), calls=calls)
    assert calls == [["begun.json", "half"]]
    (tmp_path / "stage" / "manifest.json").unlink()
    produce(Run(tmp_path), config={"a": 2}, calls=calls)
    assert calls[-1] == ["begun.json"]


@pytest.mark.parametrize("begun", [False, True])
def test_a_stage_that_was_half_removed_when_the_process_was_killed_is_redone(tmp_path, monkeypatch, begun):
    calls = []
    produce(Run(tmp_path))
    if begun:  # for the first configuration, with a file more
        fingerprint = json.loads((tmp_path / "stage" / "manifest.json").read_text())["fingerprint"]
        (tmp_path / "stage" / "manifest.json").unlink()
        (tmp_path / "stage" / "begun.json").write_text(json.dumps({"fingerprint": fingerprint}))

    def killed(directory):
        (directory / "out.txt").unlink()
        raise KeyboardInterrupt

    (tmp_path / "stage" / "other.txt").write_text("")
    monkeypatch.setattr("agentark_jax.stages.shutil.rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        produce(Run(tmp_path), config={"a": 2})
    monkeypatch.undo()
    produce(Run(tmp_path), calls=calls)
    assert calls == [["begun.json"]]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / "manifest.json").write_text("{"), "manifest.json: damaged"),
        (lambda d: (d / "manifest.json").write_text("[]"), "manifest.json: damaged"),
        (lambda d: (d / "manifest.json").write_text("{}"), "manifest.json: damaged"),
        (lambda d: (d / "out.txt").write_text("resulT"), "out.txt: changed"),
        (lambda d: (d / "out.txt").write_text("longer than before"), "out.txt: changed"),
        (lambda d: (d / "out.txt").unlink(), "out.txt: missing"),
    ],
)
def test_damage_is_named_with_its_fix_and_never_trusted(tmp_path, damage, message):
    produce(Run(tmp_path))
    damage(tmp_path / "stage")
    with pytest.raises(AgentArkError, match=message) as raised:
        produce(Run(tmp_path))
    assert f"Delete {tmp_path / 'stage'}" in str(raised.value)


def test_a_manifest_lists_files_of_its_own_stage_alone(tmp_path):
    produce(Run(tmp_path))
    (tmp_path / "secret").write_text("result")
    path = tmp_path / "stage" / "manifest.json"
    for elsewhere in ("../secret", str(tmp_path / "secret"), "/nowhere/secret"):
        stored = json.loads(path.read_text())
        stored["artefacts"][0]["path"] = elsewhere
        path.write_text(json.dumps(stored))
        with pytest.raises(AgentArkError, match=r"manifest\.json: damaged .*secret is not in"):
            read_manifest(tmp_path / "stage", models=False)


def test_the_manifest_tells_what_the_stage_did(tmp_path):
    produce(Run(tmp_path))
    manifest = json.loads((tmp_path / "stage" / "manifest.json").read_text())
    assert manifest["tokens"] == 5
    assert manifest["inputs"] == {"before": "f0"}
    assert [artefact["path"] for artefact in manifest["artefacts"]] == ["out.txt"]
    assert {"jax", "numpy"} <= manifest["versions"].keys()


def test_a_directory_has_one_owner_and_a_killed_owner_leaves_it_free(tmp_path):
    script = (
        "import sys, time, pathlib\nfrom agentark_jax.stages import locked\n"
        "with locked(pathlib.Path(sys.argv[1])):\n    print('held', flush=True)\n    time.sleep(60)\n"
    )
    owner = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert owner.stdout.readline() == "held\n"
    with pytest.raises(UsageError, match=f"process {owner.pid}"), locked(tmp_path):
        pass
    os.kill(owner.pid, signal.SIGKILL)
    owner.wait()
    owner.stdout.close()
    for _ in range(100):
        try:
            with locked(tmp_path):
                return
        except UsageError:
            time.sleep(0.05)
    pytest.fail("the lock of a killed process was never freed")


def test_what_cannot_be_written_is_an_error_that_names_it(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(AgentArkError, match="file"), locked(tmp_path / "file" / "run"):
        pass
    with pytest.raises(AgentArkError, match=r"x\.json"):
        write_json(tmp_path / "file" / "x.json", {})
