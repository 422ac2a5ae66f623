"""The rehearsal of a cluster: with a real server, and whether what it claims to prove could fail."""

import argparse
import json
import math
import os
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from safetensors.numpy import save_file

from agentark_jax.errors import AgentArkError
from agentark_jax.progress import Display
from benchmarks import servers
from launch.rehearsal import cluster
from launch.rehearsal.cluster import ROOT, Cluster, End, Job, Kill, draw_kills, read_kill
from launch.rehearsal.proof import Stored, audit, compare_debates, difference, in_flight
from launch.rehearsal.proxy import Asked, Proxy


@pytest.mark.slow
@pytest.mark.sglang
@pytest.mark.skipif(not os.environ.get("AGENTARK_REHEARSAL"), reason="minutes of its own: set AGENTARK_REHEARSAL=1")
def test_kills_lose_nothing_and_repeat_nothing(tmp_path):
    python = os.environ.get(servers.PYTHON)
    if not python:
        pytest.skip(f"{servers.PYTHON} is not set; launch/sglang/install_cpu.sh makes an environment for it")
    directory, venv = tmp_path / "rehearsal", Path(python).parents[1]
    command = [sys.executable, "-m", "launch.rehearsal", "--directory", str(directory), "--venv", str(venv)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((directory / "rehearsal.json").read_text())
    assert record["problems"] == []
    assert {end["kill"] for end in record["ends"]} - {None} == set(record["kills"])
    assert {kill.split("-")[0].split("@")[0] for kill in record["kills"]} == {"worker", "server", "trainer"}
    calls = record["calls"]
    assert calls["stored"] == calls["needed"] == 48 * 3 * 2 + 16 * 3 + 8 * 3 + 8 * 3 * 2
    assert calls["sent"] - calls["needed"] <= sum(end["in_flight"] for end in record["ends"]) + calls["refused"]
    assert record["weights_differ_by"] == {"student": None, "control": None}
    assert record["evaluated"] == {"base": 16, "student": 16, "control": 16, "vote": 8, "debate": 8}
    assert sorted(path.name for path in directory.iterdir()) == ["logs", "rehearsal.json"]


def test_seeds_draw_moments_within_the_work():
    drawn = [draw_kills(seed, [90, 60, 138], 24, 120) for seed in range(300)]
    assert drawn[0] == draw_kills(0, [90, 60, 138], 24, 120)
    ends = {"server@debate": 288, "server@evaluation": 119, "trainer@student": 23, "trainer@control": 23}
    ends |= {"trainer@evaluation": 119, "worker-0@debate": 90, "worker-1@debate": 60, "worker-2@debate": 138}
    seen = set()
    for kills in drawn:
        assert [read_kill(str(kill)) for kill in kills] == kills
        for kill in kills:
            place = f"{'trainer' if kill.job == 'trainer' else kill.victim}@{kill.phase}"
            assert 1 <= kill.after <= ends[place]
            seen.add(place)
    assert seen == ends.keys()
    assert {kill.victim for kills in drawn for kill in kills if kill.job == "trainer"} == {"trainer-0", "trainer-1"}


@pytest.mark.parametrize(
    "text", ["worker-3@debate:1", "worker-0@student:1", "trainer-0@debate:1", "server@debate", "x"]
)
def test_a_kill_of_nobody_at_work_is_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match="give VICTIM@PHASE:AFTER"):
        read_kill(text)


# What is proven. A call is asked at 1 and answered at 2; its worker commits it at 2.5.

CALL = (7, "v1", (3, 4))
TURN = Stored(CALL, "worker-0", (5, 6), 2.5)


def asked(began=1.0, ended=2.0, status=200, by="v1", ids=(5, 6)):
    return Asked(CALL, began, status, by, ids, ended)


def broken(began=1.0, ended=2.0):
    return asked(began, ended, None, None, ())


def test_a_call_is_sent_once():
    figures, problems = audit([TURN], [asked()], [])
    assert problems == []
    assert (figures["needed"], figures["sent"], figures["stored"]) == (1, 1, 1)


@pytest.mark.parametrize(
    ("before", "job", "at", "kind"),
    [
        (asked(0.1, 0.3, ids=(9,)), "worker-0", 0.35, "answered_to_the_dead"),
        (broken(0.1, 0.3), "worker-0", 0.2, "broken_off"),
        (broken(0.1, 0.3), "server", 0.2, "broken_off"),
        (asked(0.1, 0.3, status=503, ids=()), "server", 0.05, "refused"),
        (asked(0.1, 0.3, by="default", ids=(9,)), "server", 0.05, "of_other_weights"),
    ],
)  # fmt: skip
def test_what_was_on_its_way_at_a_kill_may_be_sent_again_and_nothing_else(before, job, at, kind):
    figures, problems = audit([TURN], [before, asked()], [End(job, at, "killed")])
    assert problems == []
    assert (figures["sent"], figures["stored"], figures[kind]) == (2, 1, 1)
    for ends in ([], [End("worker-1", at, "killed")], [End(job, 2.6, "killed")]):
        assert len(audit([TURN], [before, asked()], ends)[1]) == 1


def test_a_call_whose_answer_was_committed_is_not_asked_again():
    late = broken(2.6, 2.7)
    (problem,) = audit([TURN], [asked(), late], [End("server", 2.65, "killed")])[1]
    assert "asked again after its answer was committed" in problem


def test_what_is_lost_or_invented_is_found():
    assert "not what the server answered last" in audit([TURN], [asked(ids=(5, 7))], [])[1][0]
    assert "not what the server answered last" in audit([TURN], [], [])[1][0]
    assert "1 calls were asked whose answers are not in the store" in audit([], [asked()], [])[1][0]


def test_calls_in_flight_are_those_of_the_dead_or_of_everybody():
    ends = [End(job, 2.2, "killed") for job in ("worker-0", "worker-1", "server")] + [End("worker-0", 2.6, "killed")]
    assert [in_flight([TURN], [asked()], end) for end in ends] == [1, 0, 1, 0]


def test_debates_are_compared_by_place_and_first_rounds_by_key():
    first, second = ("q", "debater", 0, 0, 0, 11), ("q", "debater", 0, 1, 0, 12)
    calls = {first: ["a"], second: ["b"]}
    assert compare_debates(calls, {first: ["a"], second: ["c"]}) == []
    assert compare_debates(calls, {first: ["c"], second: ["b"]}) == ["1 calls of the first round have other keys"]
    assert compare_debates(calls, {first: ["a"]}) == ["1 calls are not of the undisturbed debate"]
    assert compare_debates({first: ["a"]}, calls) == ["1 calls of the undisturbed debate are missing"]
    assert compare_debates({**calls, second: ["b", "d"]}, calls) == ["1 calls have several answers"]


def test_models_are_compared_bit_by_bit(tmp_path):
    for name, value in (("one", 1.0), ("same", 1.0), ("other", 1.25)):
        (tmp_path / name).mkdir()
        save_file({"a": np.asarray([0.5, value], np.float32)}, tmp_path / name / "model.safetensors")
    assert difference(tmp_path / "one", tmp_path / "same") is None
    assert difference(tmp_path / "one", tmp_path / "other") == 0.25


# Who starts again what ends


def make_job(tmp_path, name, **scripts):
    commands = {process: ("bash", "-c", f"cd {tmp_path}; {script}") for process, script in scripts.items()}
    return Job(name, commands, {}, tmp_path / f"{name}.log")


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(cluster, "PAUSES", (0.0,))


def orchestrate(kills=(), reached=lambda kill: 0):
    return Cluster(Display(Console()), list(kills), reached)


def test_what_works_together_is_started_again_together(tmp_path, impatient):
    """The first time one fails at once, and the other is ended before it has done anything."""
    once = "test -e second || { touch second; exit 3; }; echo one >>done"
    with orchestrate() as jobs:
        jobs.run("work", make_job(tmp_path, "pair", one=once, other="sleep 1; echo other >>done"))
    assert sorted((tmp_path / "done").read_text().split()) == ["one", "other"]
    assert [(end.job, end.why, end.kill) for end in jobs.ends] == [("pair", "one ended with 3", None)]
    assert (tmp_path / "pair.log").read_text() == "--- start 1\n--- start 2\n"


def test_a_kill_strikes_when_its_moment_has_come_and_takes_the_children_along(tmp_path, impatient):
    starts = tmp_path / "starts"
    serving = make_job(tmp_path, "server", server="sleep 600 & echo $! >>starts; wait")
    asking = make_job(tmp_path, "worker-0", worker="until [[ $(wc -l <starts) == 2 ]]; do sleep 0.02; done")
    kill = Kill("server", "debate", 1)

    def reached(kill):
        return len(starts.read_text().split()) if starts.exists() else 0

    with orchestrate([kill], reached) as jobs:
        jobs.start(serving)
        jobs.run("work", asking)
    assert [(end.job, end.kill) for end in jobs.ends] == [("server", kill)]
    children = [Path(f"/proc/{child}/cmdline") for child in starts.read_text().split()]
    end = time.monotonic() + 60
    while left := [child for child in children if child.exists() and child.read_bytes()]:  # a zombie has none
        assert time.monotonic() < end, left
        time.sleep(0.02)


def test_what_goes_on_failing_is_told_with_its_log(tmp_path, impatient):
    with orchestrate() as jobs, pytest.raises(AgentArkError, match=r"failed 30 times:\n(.*\n)*no such thing"):
        jobs.run("work", make_job(tmp_path, "broken", broken="echo no such thing; exit 1"))


class Upstream(BaseHTTPRequestHandler):
    """Answers as a server does; prompts that begin with 0 break the connection, those that begin with 1 are refused."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        first = body.get("input_ids", [9])[0]
        if first == 0:
            self.close_connection = True
            return
        answer = json.dumps({"output_ids": [5, 6], "meta_info": {"weight_version": "v1"}}).encode()
        self.send_response(503 if first == 1 else 200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *arguments):
        """Say nothing."""


def post(url, **body):
    """The status, or None where the connection breaks."""
    try:
        with urllib.request.urlopen(url, json.dumps(body).encode(), timeout=60) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code
    except (urllib.error.URLError, OSError):
        return None


def test_the_proxy_knows_what_was_sent_and_what_came_back():
    upstream = ThreadingHTTPServer(("127.0.0.1", 0), Upstream)
    thread = threading.Thread(target=upstream.serve_forever)
    thread.start()
    with Proxy(f"http://127.0.0.1:{upstream.server_port}") as proxy:

        def generate(*ids):
            return post(f"{proxy.url}/generate", input_ids=ids, sampling_params={"sampling_seed": 7})

        assert post(f"{proxy.url}/update_weights_from_disk", weight_version="v1") == 200
        assert [generate(3, 4), generate(1, 4), generate(0, 4)] == [200, 503, None]
        upstream.shutdown()
        upstream.server_close()
        thread.join()
        assert generate(3, 5) is None  # of this nothing reached a server
    assert [one.identity for one in proxy.asked] == [(7, "v1", (first, 4)) for first in (3, 1, 0)]
    assert [(one.status, one.by, one.ids) for one in proxy.asked] == [
        (200, "v1", (5, 6)),
        (503, None, ()),
        (None, None, ()),
    ]
    assert all(one.began <= one.ended < math.inf for one in proxy.asked)
