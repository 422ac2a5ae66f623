"""Whole debates on real questions: from a real server, through kills, from fewer rounds to more."""

import json
import random
import re
import shutil
import time
import urllib.request
from pathlib import Path

import pytest
import real_server
from faults import SEED
from test_run import base_weights, complete, count_turns, start

from agentark_jax.traces.rows import canonical_record
from agentark_jax.traces.store import TraceStore

pytestmark = pytest.mark.slow
QUESTIONS, AGENTS, ROUNDS = 64, 3, 3
DEBATE = ("--questions.debate", str(QUESTIONS), "--debate.agents", str(AGENTS), "--debate.rounds", str(ROUNDS))
GSM8K = Path(__file__).parents[1] / ".." / "shared" / "data" / "gsm8k" / "test.jsonl"


def export(run: Path, target: Path) -> bytes:
    with TraceStore(run / "traces.sqlite", read_only=True) as store:
        assert store.verify() == []
        store.export_canonical(target)
    return target.read_bytes()


@pytest.mark.sglang
def test_a_real_server_debates_gsm8k_and_the_ledger_is_its_counters(tmp_path):
    if not GSM8K.is_file():
        pytest.skip("GSM8K's test.jsonl is not here")
    lines = GSM8K.read_text().splitlines()
    brief = sorted(lines, key=lambda line: len(json.loads(line)["answer"]))[:200]  # a server on CPU is slow
    (tmp_path / "gsm8k.jsonl").write_text("\n".join(brief) + "\n")
    sizes = {"warm_start": 120, "validation": 0, "held_out": 1}
    fit = "{steps: 2, rows: 1, row_length: 1024, eval_every: null, patience: null}"
    options = (
        *("--task.path", str(tmp_path / "gsm8k.jsonl"), *DEBATE, "--debate.max_tokens", "100"),
        *("--model.scratch.vocabulary", "4000", "--model.scratch.max_positions", "2048"),
        *(part for split, count in sizes.items() for part in (f"--questions.{split}", str(count))),
        *(
            "--warm_start.answer",
            fit,
            "--warm_start.revision",
            fit,
            "--warm_start.revision_share",
            "0.1",
            "--fit.row_length",
            "1024",
        ),
    )
    complete(tmp_path, *options, part="warm-start")
    run = tmp_path / "tiny"
    before = usage(run)
    with real_server.serving(run / "base" / "model", tmp_path / "server.log", None, "--enable-metrics") as url:
        unused = counters(url)
        complete(tmp_path, *options, "--engine.servers", f"[{url}]", part="debate")
        wanted = difference(usage(run), before)
        end = time.monotonic() + 60  # the server counts a little late
        while (counted := difference(counters(url), unused)) != wanted and time.monotonic() < end:
            time.sleep(1)
    assert counted == wanted
    with TraceStore(run / "traces.sqlite", read_only=True) as store:
        assert store.verify() == []
        debated = [each for each in store.ledger("protocol", "round") if each.group[0] == "debate"]
        assert {turn.call.weights for turn in store.turns(protocol="debate")} == {base_weights(run)}
    assert [(each.calls, each.failed) for each in debated] == [(QUESTIONS * AGENTS, 0)] * ROUNDS


def usage(run: Path) -> tuple[int, ...]:
    """What `counters` are, by the ledger."""
    with TraceStore(run / "traces.sqlite", read_only=True) as store:
        total = store.ledger()[0]
    return total.calls, total.prompt_tokens, total.cached_tokens, total.completion_tokens


def counters(url: str) -> tuple[int, ...]:
    """Requests, prompt tokens, cached tokens and generated tokens that a server has counted."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=30) as answer:
        text = answer.read().decode()
    names = ("num_requests", "prompt_tokens", "cached_tokens", "generation_tokens")
    found = {name: re.findall(rf"^sglang:{name}_total(?:\{{.*\}})? (\S+)$", text, re.M) for name in names}
    return tuple(round(sum(map(float, found[name]))) for name in names)


def difference(after: tuple[int, ...], before: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(a - b for a, b in zip(after, before, strict=True))


@pytest.fixture(scope="module")
def warm(tmp_path_factory) -> Path:
    """A run that is ready to debate."""
    root = tmp_path_factory.mktemp("warm")
    complete(root, *DEBATE, part="warm-start")
    return root / "tiny"


def test_twenty_kills_leave_the_store_of_an_undisturbed_debate(warm, tmp_path):
    calm, killed = tmp_path / "calm" / "tiny", tmp_path / "killed" / "tiny"
    for run in (calm, killed):
        shutil.copytree(warm, run)
    complete(calm.parent, *DEBATE, part="debate")
    at_first, total = count_turns(warm / "traces.sqlite"), count_turns(calm / "traces.sqlite")
    assert total == at_first + QUESTIONS * AGENTS * ROUNDS
    draws = random.Random(SEED)
    # Kills fall on moments of the work, not of the start: after so many further turns, and up to a fifth of a second.
    marks = sorted(draws.sample(range(at_first + 1, total), 20))
    deaths = 0
    for mark in marks:
        process = start(killed.parent, *DEBATE, part="debate")
        while process.poll() is None and count_turns(killed / "traces.sqlite") < mark:
            time.sleep(0.005)
        time.sleep(draws.uniform(0, 0.2))
        if process.poll() is None:
            process.kill()
            deaths += 1
        process.communicate()
    assert deaths >= 10
    complete(killed.parent, *DEBATE, part="debate")
    assert export(killed, tmp_path / "killed.jsonl") == export(calm, tmp_path / "calm.jsonl")
    with TraceStore(killed / "traces.sqlite", read_only=True) as store:
        assert all(turn.attempt == 0 and turn.error is None for turn in store.turns())


def test_a_third_round_continues_the_first_two(warm, tmp_path):
    run = tmp_path / "tiny"
    shutil.copytree(warm, run)
    complete(tmp_path, *DEBATE, "--debate.rounds", "2", "--update", part="debate")
    with TraceStore(run / "traces.sqlite", read_only=True) as store:
        first = [canonical_record(turn) for turn in store.turns(protocol="debate")]
        marks = {turn.key for turn in store.turns()}
    assert len(first) == QUESTIONS * AGENTS * 2
    complete(tmp_path, *DEBATE, "--update", part="debate")
    with TraceStore(run / "traces.sqlite", read_only=True) as store:
        assert [canonical_record(turn) for turn in store.turns(protocol="debate") if turn.call.round < 2] == first
        added = [turn for turn in store.turns() if turn.key not in marks]
    assert len(added) == QUESTIONS * AGENTS
    assert {turn.call.round for turn in added} == {2}
    assert json.loads((run / "debate" / "manifest.json").read_text())["counts"]["calls"] == QUESTIONS * AGENTS * ROUNDS
