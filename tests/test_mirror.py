"""A run directory's copy in object storage: exact, of one moment, and enough to go on from."""

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import fsspec
import jax.numpy as jnp
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from test_store import QUESTION, make_turn

from agentark_jax import mirror
from agentark_jax.cli import main
from agentark_jax.errors import AgentArkError, UsageError
from agentark_jax.traces.store import TraceStore

ROOT = Path(__file__).parents[1]
numbers = itertools.count()


@pytest.fixture(params=["memory", "file", "path"])
def url(request, tmp_path) -> str:
    places = {"file": f"file://{tmp_path}/bucket/run", "path": str(tmp_path / "bucket" / "run")}
    return places.get(request.param, f"memory://bucket/{next(numbers)}/run")


def write(directory: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def objects(url: str) -> set[str]:
    filesystem, root = fsspec.core.url_to_fs(url)
    return {path.removeprefix(root + "/") for path in filesystem.find(root)}


FILES = {"config.yaml": "a", "fit/begun.json": "{}", "fit/checkpoints/4/d/array": "4", "fit/metrics.jsonl": "1\n2\n"}
NOT_COPIED = {
    "lock": "",
    "lock.owner": "me",
    "fit/checkpoints/6.orbax-checkpoint-tmp-1/d": "half",
    "fit/.model.x/part": "half",
    ".config.yaml.partial": "half",
}


def test_a_copy_has_what_a_run_goes_on_from_and_nothing_is_sent_twice(tmp_path, url):
    run, other = tmp_path / "run", tmp_path / "elsewhere" / "run"
    write(run, FILES | NOT_COPIED)
    assert mirror.save(run, url) == len(FILES)
    assert mirror.save(run, url) == 0
    assert mirror.load(url, other) == len(FILES)
    assert contents(other) == {name: text.encode() for name, text in FILES.items()}
    assert mirror.save(other, url) == 0
    assert objects(url) == {"index.json", *(f"files/{name}" for name in FILES)}
    # A checkpoint later: one is removed, one is new, a file has grown.
    shutil.rmtree(other / "fit" / "checkpoints" / "4")
    write(other, {"fit/checkpoints/6/d/array": "6", "fit/metrics.jsonl": "1\n2\n3\n"})
    assert mirror.save(other, url) == 2
    assert len(objects(url)) == 1 + len(FILES)
    shutil.rmtree(run)
    mirror.load(url, run)
    assert contents(run) == contents(other)


def test_a_store_is_copied_whole_while_it_is_written_to(tmp_path):
    url = "memory://bucket/store"
    with TraceStore(tmp_path / "run" / "traces.sqlite") as store:
        store.put_questions([QUESTION])
        store.record(make_turn(agent=1))
        assert mirror.save(tmp_path / "run", url) == 1
        store.record(make_turn(agent=2))
        assert mirror.save(tmp_path / "run", url) == 1
        assert mirror.save(tmp_path / "run", url) == 0
        store.record(make_turn(agent=3))
    mirror.load(url, tmp_path / "other")
    with TraceStore(tmp_path / "other" / "traces.sqlite") as copy:
        assert copy.verify() == []
        assert {turn.call.agent for turn in copy.turns()} == {1, 2}
        copy.record(make_turn(agent=4))
    (tmp_path / "other" / "traces.sqlite").write_text("no store at all")
    with pytest.raises(AgentArkError, match=r"traces\.sqlite: cannot be copied"):
        mirror.save(tmp_path / "other", url)


def test_a_copy_that_was_interrupted_leaves_the_one_before(tmp_path, monkeypatch):
    run, url = tmp_path / "run", "memory://bucket/interrupted"
    write(run, FILES)
    mirror.save(run, url)
    later = {name: text + "!" for name, text in FILES.items()} | {"fit/model/weights": "new"}
    for refused in ("put", "pipe_file"):
        write(run, later)
        with monkeypatch.context() as patch:

            def fail(*arguments: object, **options: object) -> None:
                raise ConnectionError("the network is gone")

            patch.setattr(MemoryFileSystem, refused, fail)
            with pytest.raises(AgentArkError, match="memory://bucket/interrupted: the network is gone"):
                mirror.save(run, url)
        mirror.load(url, tmp_path / refused)
        assert contents(tmp_path / refused) == {name: text.encode() for name, text in FILES.items()}
    assert mirror.save(run, url) == len(later)
    assert len(objects(url)) == 1 + len(later)  # what the interrupted ones left is gone
    mirror.load(url, tmp_path / "whole")
    assert contents(tmp_path / "whole") == {name: text.encode() for name, text in later.items()}


def test_files_that_go_away_meanwhile_are_looked_for_again(tmp_path, monkeypatch):
    run, url = tmp_path / "run", "memory://bucket/away"
    write(run, FILES)
    still = mirror._still

    def gone(directory: Path, name: str, copy: Path) -> Path:
        if name == "fit/checkpoints/4/d/array":
            shutil.rmtree(run / "fit" / "checkpoints" / "4")
            write(run, {"fit/checkpoints/8/d/array": "8"})
        return still(directory, name, copy)

    monkeypatch.setattr(mirror, "_still", gone)
    mirror.save(run, url)
    mirror.load(url, tmp_path / "other")
    assert "fit/checkpoints/8/d/array" in contents(tmp_path / "other")
    assert contents(tmp_path / "other") == contents(run)

    def always(directory: Path, name: str, copy: Path) -> Path:
        (directory / name).rename(directory / f"{name}{next(numbers)}")
        return still(directory, name, copy)

    monkeypatch.setattr(mirror, "_still", always)
    write(run, {"new": ""})
    with pytest.raises(AgentArkError, match="files went away 5 times"):
        mirror.save(run, url)


def test_what_cannot_be_done_is_said(tmp_path, capsys):
    run, url = tmp_path / "run", f"file://{tmp_path}/bucket"
    write(run, FILES)
    with pytest.raises(UsageError, match="nowhere: no such directory"):
        mirror.save(tmp_path / "nowhere", url)
    with pytest.raises(UsageError, match="there is no copy of a run here"):
        mirror.load(url, tmp_path / "other")
    with pytest.raises(UsageError, match=r"xyz://b: .*Give a URL that fsspec knows"):
        mirror.save(run, "xyz://b")
    mirror.save(run, url)
    with pytest.raises(UsageError, match="run: there already"):
        mirror.load(url, run)
    index = tmp_path / "bucket" / "index.json"
    read = json.loads(index.read_text())
    for files, message in (
        ({"../out": ["config.yaml", 1, 1]}, "damaged .*is not in the copy"),
        ({"config.yaml": ["config.yaml", 7, 1]}, r"damaged \(config.yaml has not 7 bytes"),
        ({"config.yaml": ["gone", 1, 1]}, "gone"),
        ({"config.yaml": 3}, r"index\.json: not the index of a copy"),
    ):
        index.write_text(json.dumps({**read, "files": files}))
        with pytest.raises(AgentArkError, match=message):
            mirror.load(url, tmp_path / "other")
        assert not (tmp_path / "other").exists()
        assert not list(tmp_path.glob(".other*"))
    assert main(["mirror", "save", str(run), url]) == 1
    assert main(["mirror", "keep", str(run), url, "--every", "0", "--", "true"]) == 2
    assert main(["mirror", "keep", str(run), f"{url}2", "--", str(tmp_path / "no command")]) == 2
    assert main(["mirror", "save", str(run)]) == 2
    assert "cannot be run (No such file or directory)" in capsys.readouterr().err
    assert main(["mirror", "save", str(run), f"{url}2"]) == main(["mirror", "load", f"{url}2", str(run) + "2"]) == 0


def test_a_checkpoint_of_orbax_is_restored_from_a_copy(tmp_path):
    from agentark_jax.training.checkpoint import Checkpointer, Retention
    from agentark_jax.training.state import TrainState

    state = TrainState(jnp.asarray(3), {"w": jnp.arange(4.0)}, {"m": jnp.ones(4)})
    with Checkpointer(tmp_path / "run" / "checkpoints", {"a": 1}, Retention(1)) as checkpointer:
        checkpointer.save(state, {"tokens": 5})
        mirror.save(tmp_path / "run", "memory://bucket/orbax")
    mirror.load("memory://bucket/orbax", tmp_path / "other")
    with Checkpointer(tmp_path / "other" / "checkpoints", {"a": 1}, Retention(1)) as checkpointer:
        restored = checkpointer.restore(state)
    assert restored is not None
    assert restored[0].params["w"].tolist() == [0, 1, 2, 3]
    assert restored[1] == {"tokens": 5}


# A command that says how far it is, goes on from there, and needs to be told to stop.
COUNT = """
import os, pathlib, signal, sys, time
path = pathlib.Path(sys.argv[1])
path.mkdir(parents=True, exist_ok=True)
told = []
signal.signal(signal.SIGTERM, lambda number, frame: told.append(number))
count, fresh = path / "count", path / "count.partial"
while not told:
    fresh.write_text(str(int(count.read_text()) + 1 if count.exists() else 1))
    os.replace(fresh, count)
    time.sleep(0.02)
sys.exit(143)
"""


def keeping(directory: Path, url: str, *command: str) -> subprocess.Popen[str]:
    keep = [sys.executable, "-m", "agentark_jax.cli", "mirror", "keep", str(directory), url, "--every", "0.1", "--"]
    return subprocess.Popen([*keep, *command], cwd=ROOT, stderr=subprocess.PIPE, text=True)


def until(condition, seconds: float = 300.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def counted(url: str) -> int:
    there = Path(url.removeprefix("file://"))
    if not (there / "index.json").exists():
        return 0
    try:
        key = json.loads((there / "index.json").read_text())["files"]["count"][0]
        return int((there / "files" / key).read_text())
    except (FileNotFoundError, ValueError):  # it is just being replaced, which a folder does not do at once
        return 0


def test_a_command_goes_on_from_its_copy_on_another_machine(tmp_path):
    url = f"file://{tmp_path}/bucket"
    script = tmp_path / "count.py"
    script.write_text(COUNT)
    first = keeping(tmp_path / "one", url, sys.executable, str(script), str(tmp_path / "one"))
    until(lambda: counted(url) >= 3)
    child = int(Path(f"/proc/{first.pid}/task/{first.pid}/children").read_text())
    for process in (first.pid, child):  # the machine is gone
        os.kill(process, signal.SIGKILL)
    first.communicate()
    shutil.rmtree(tmp_path / "one")
    reached = counted(url)
    second = keeping(tmp_path / "two", url, sys.executable, str(script), str(tmp_path / "two"))
    until(lambda: counted(url) > reached)
    second.terminate()
    _, said = second.communicate(timeout=300)
    assert second.returncode == 143
    assert f"1 files loaded from {url}" in said
    assert counted(url) == int((tmp_path / "two" / "count").read_text()) > reached


def test_the_exit_code_is_the_commands_unless_its_work_was_not_saved(tmp_path):
    run, url = tmp_path / "run", f"file://{tmp_path}/bucket"
    write(run, FILES)
    for command, code in (("exit 3", 3), ("kill -9 $$", 137), ("exit 0", 0)):
        assert mirror.keep(run, url, ["bash", "-c", command], 60) == code
    assert mirror.load(url, tmp_path / "other") == len(FILES)
    ruin = f"echo x >{run}/new; echo x >{tmp_path}/bucket/index.json"
    assert mirror.keep(run, url, ["bash", "-c", ruin], 60) == 1
    assert mirror.keep(tmp_path / "not made", f"{url}2", ["true"], 60) == 0


@pytest.mark.slow
def test_a_run_goes_on_from_its_copy_and_ends_as_if_it_had_stayed(tmp_path):
    url, config = f"file://{tmp_path}/bucket", str(ROOT / "tests" / "tiny.yaml")

    def warm_start(root: str) -> list[str]:
        part = ["warm-start", "--config", config, "--root", str(tmp_path / root)]
        return [sys.executable, "-m", "agentark_jax.cli", *part]

    copied = Path(url.removeprefix("file://")) / "index.json"
    first = keeping(tmp_path / "one" / "tiny", url, *warm_start("one"))
    until(lambda: copied.exists() and "/checkpoints/" in copied.read_text())
    child = int(Path(f"/proc/{first.pid}/task/{first.pid}/children").read_text())
    for process in (first.pid, child):
        os.kill(process, signal.SIGKILL)
    first.communicate()
    shutil.rmtree(tmp_path / "one")
    second = keeping(tmp_path / "two" / "tiny", url, *warm_start("two"))
    second.communicate()
    assert second.returncode == 0
    subprocess.run(warm_start("three"), check=True)
    steps = [
        [json.loads(line)["loss"] for line in path.read_text().splitlines()]
        for path in sorted(tmp_path.glob("t*/tiny/*/metrics.jsonl"))
    ]
    assert len(steps) == 4
    assert steps[0] == steps[2]  # of the stages of two, then those of three
    assert steps[1] == steps[3]
    mirror.load(url, tmp_path / "four" / "tiny")
    weights = [tmp_path / root / "tiny" / "base" / "model" / "model.safetensors" for root in ("two", "three", "four")]
    assert len({path.read_bytes() for path in weights}) == 1
