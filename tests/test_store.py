"""The trace store: exact round trips, nothing paid twice, nothing lost or half-written, nothing altered unseen."""

import asyncio
import dataclasses
import hashlib
import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from agentark_jax.errors import AgentArkError
from agentark_jax.records import Call, Completion, Label, Question, Sampling, Turn
from agentark_jax.traces import rows
from agentark_jax.traces.store import TraceStore, Usage
from agentark_jax.traces.writer import TurnWriter
from benchmarks.store import debate as make_debate
from benchmarks.store import prompt_share

QUESTION = Question("q0", "sums", "train", "1 + 1?", "2", "1 + 1 = 2", {"steps": [2], "name": "Zoë"})


def make_call(**changes) -> Call:
    call = Call(
        question_id="q0",
        protocol="debate",
        agent=0,
        role="debater",
        round=0,
        sample=0,
        parents=(),
        model="m",
        weights="w",
        tokenizer="t",
        template="p",
        sampling=Sampling(0.8, 16, (1, 7), 5),
        prompt=((2, 3), (4, 5, 6)),
    )
    return dataclasses.replace(call, **changes)


def make_turn(agent: int = 0, attempt: int = 0, text: str = "so 2", error: str | None = None, **changes) -> Turn:
    call = make_call(agent=agent, **changes)
    if error is not None:
        return Turn(call, attempt, None, error)
    ids = np.arange(agent, agent + 4, dtype=np.int32)
    return Turn(call, attempt, Completion(ids, -ids.astype(np.float32) / 3, text, "stop", 5, 2, 0.25))


def text_only(turn: Turn, **changes) -> Turn:
    """The turn, had a server told nothing but its text."""
    return dataclasses.replace(turn, completion=dataclasses.replace(turn.completion, logprobs=None, **changes))


def assert_same(one: Turn, other: Turn) -> None:
    assert one.call == other.call
    assert one.call.key == other.call.key
    assert (one.attempt, one.error) == (other.attempt, other.error)
    assert (one.completion is None) == (other.completion is None)
    if one.completion is not None:
        for field in dataclasses.fields(Completion):
            a, b = getattr(one.completion, field.name), getattr(other.completion, field.name)
            if isinstance(a, np.ndarray):
                assert a.dtype == b.dtype
                assert a.tobytes() == b.tobytes()
            else:
                assert type(a) is type(b)
                assert a == b


@pytest.fixture
def store(tmp_path):
    with TraceStore(tmp_path / "traces.sqlite") as store:
        store.put_question(QUESTION)
        yield store


def tamper(path: Path, statement: str, *values) -> None:
    with sqlite3.connect(path) as connection:
        assert connection.execute(statement, values).rowcount >= 1
    connection.close()


# Round trips

int32 = st.integers(-(2**31), 2**31 - 1)
words = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
small = st.integers(0, 9)
samplings = st.builds(
    Sampling,
    temperature=st.one_of(st.floats(0, 2), st.integers(0, 2)),
    max_tokens=small,
    stop_ids=st.lists(int32, max_size=3).map(tuple),
    seed=st.integers(0, 2**64 - 1),
    top_p=st.floats(0.1, 1),
    regex=st.none() | words,
)
calls = st.builds(
    Call,
    question_id=st.just("q0"),
    protocol=words,
    agent=small,
    role=words,
    round=small,
    sample=small,
    parents=st.lists(words, max_size=3).map(tuple),
    model=words,
    weights=words,
    tokenizer=words,
    template=words,
    sampling=samplings,
    prompt=st.lists(st.lists(int32, max_size=4).map(tuple), max_size=3).map(tuple),
)


@st.composite
def turns(draw) -> Turn:
    if draw(st.booleans()):
        return Turn(draw(calls), draw(small), None, draw(words))
    ids = draw(st.lists(int32, max_size=5))
    logprobs = draw(st.lists(st.floats(width=32, max_value=0), min_size=len(ids), max_size=len(ids)))
    text_only = ids and draw(st.booleans())
    completion = Completion(
        ids=np.asarray(ids, np.int32),
        logprobs=None if text_only else np.asarray(logprobs, np.float32),
        text=draw(words),
        finish=draw(st.sampled_from(["stop", "length"])),
        prompt_tokens=draw(small),
        cached_tokens=draw(small),
        seconds=draw(st.floats(0, 1e6)),
        server=draw(st.none() | words),
    )
    return Turn(draw(calls), draw(small), completion)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(turns(), max_size=4, unique_by=lambda turn: turn.key))
def test_turns_round_trip_exactly(tmp_path_factory, given_turns):
    path = tmp_path_factory.mktemp("round_trip") / "traces.sqlite"
    with TraceStore(path) as store:
        store.put_question(QUESTION)
        store.record_many(given_turns)
    with TraceStore(path, read_only=True) as store:
        assert store.verify() == []
        found = list(store.turns())
        for one, other in zip(sorted(given_turns, key=lambda turn: turn.key), found, strict=True):
            assert_same(one, other)
        done = {turn.key: turn for turn in given_turns if turn.error is None}
        answers = store.completions(turn.key for turn in given_turns)
        assert set(answers) == set(done)
        for key, found in answers.items():
            wanted = done[key].completion.ids, done[key].completion.logprobs
            assert found.parents == done[key].call.parents
            assert [None if a is None else (a.dtype, a.tobytes()) for a in found[:2]] == [
                None if a is None else (a.dtype, a.tobytes()) for a in wanted
            ]
        assert store.texts(turn.key for turn in given_turns) == {
            key: turn.completion.text for key, turn in done.items()
        }
        assert store.unanswered(turn.key for turn in given_turns) == {
            turn.key for turn in given_turns if turn.error is not None
        }


def test_a_text_is_never_taken_for_sampled_ids(store, tmp_path):
    """Not in the store, nor what it exports; nor can one be made the other unseen."""
    sampled, said = make_turn(), text_only(make_turn(agent=1))
    empty = make_turn(agent=2)
    empty = dataclasses.replace(
        empty, completion=dataclasses.replace(empty.completion, ids=np.zeros(0, np.int32), logprobs=np.zeros(0, "f4"))
    )
    store.record_many([sampled, said, empty])
    found = [store.lookup(turn.key).completion for turn in (sampled, said, empty)]
    assert [completion.text_only for completion in found] == [False, True, False]
    rows_found = {key: each.logprobs for key, each in store.completions([said.key, sampled.key, empty.key]).items()}
    assert rows_found[said.key] is None
    assert rows_found[sampled.key].tolist() == sampled.completion.logprobs.tolist()
    assert rows_found[empty.key].tolist() == []
    store.export_canonical(tmp_path / "lines")
    lines = {line["key"]: line for line in map(json.loads, (tmp_path / "lines").read_text().splitlines())}
    assert lines[said.key]["completion"]["logprobs"] is None
    assert lines[said.key]["completion"]["ids"] == said.completion.ids.tolist()
    assert lines[empty.key]["completion"]["logprobs"] == []
    assert store.verify() == []
    tamper(store.path, "UPDATE turns SET logprobs = x'' WHERE agent = 0")
    (problem,) = store.verify()
    assert sampled.key in problem
    assert "answer is not the one" in problem


def test_questions_round_trip_and_may_not_change(store):
    other = Question.make("sums", "test", "2 + 2?", "4")
    store.put_questions([other, QUESTION])
    assert store.questions() == sorted([QUESTION, other], key=lambda question: question.id)
    for changed in (dataclasses.replace(QUESTION, answer="3"), dataclasses.replace(QUESTION, split="test")):
        with pytest.raises(AgentArkError, match="question q0 is already stored and differs"):
            store.put_questions([Question.make("sums", "test", "unseen", "5"), changed])
    assert len(store.questions()) == 2, "a refused call keeps nothing"


# Nothing is paid for twice


def test_recording_the_same_turn_again_changes_nothing(store):
    failed, done = make_turn(error="timeout"), make_turn(attempt=1)
    store.record_many([failed, done, done])
    store.record(done)
    store.record_many([done, failed])
    assert [turn.attempt for turn in store.turns()] == [0, 1]
    assert store.attempts(done.key) == 2
    assert [turn.attempt for turn in store.turns(errors=False)] == [1]
    assert_same(store.lookup(done.key), done)


@pytest.mark.parametrize(
    "second",
    [
        make_turn(attempt=1),
        make_turn(text="another"),
        make_turn(error="same attempt, other outcome"),
        dataclasses.replace(make_turn(), completion=dataclasses.replace(make_turn().completion, seconds=9.0)),
    ],
)
def test_a_second_success_or_a_changed_attempt_is_refused_whole(store, second):
    store.record(make_turn())
    with pytest.raises(AgentArkError, match=make_turn().key):
        store.record_many([make_turn(agent=1), second])
    with pytest.raises(AgentArkError, match=make_turn(agent=2).key):
        store.record_many([make_turn(agent=2), make_turn(agent=2, attempt=1)])
    assert [turn.call.agent for turn in store.turns()] == [0], "a refused batch keeps nothing"
    assert_same(store.lookup(make_turn().key), make_turn())


def test_the_tables_themselves_allow_one_success_per_call_and_one_outcome_per_attempt(store):
    store.record(make_turn())
    columns = ", ".join(name for _, name, *_ in store._connection.execute("PRAGMA table_info(turns)"))
    copied = columns.replace("attempt", "attempt + 1")
    with pytest.raises(sqlite3.IntegrityError, match="an answer, already"):
        store._connection.execute(f"INSERT INTO turns ({columns}) SELECT {copied} FROM turns")
    failed = ("completion_ids", "logprobs", "text", "finish", "prompt_tokens", "cached_tokens", "seconds")
    copied = columns.replace("completion_tokens", "NULL").replace("error", "'x'")
    for column in failed:
        copied = copied.replace(f" {column},", " NULL,")
    with pytest.raises(sqlite3.IntegrityError, match="that attempt"):
        store._connection.execute(f"INSERT INTO turns ({columns}) SELECT {copied} FROM turns")
    store._connection.execute(
        f"INSERT INTO turns ({columns}) SELECT {copied.replace('attempt', 'attempt + 1')} FROM turns"
    )
    store._connection.execute("DROP TRIGGER one_success_per_call")
    store._connection.execute(
        f"INSERT INTO turns ({columns}) SELECT {columns.replace('attempt', 'attempt + 2')} FROM turns WHERE attempt = 0"
    )
    assert any("more than one answer" in problem for problem in store.verify())


def test_a_failed_call_has_attempts_but_no_answer(store):
    failed = make_turn(error="server gone")
    assert store.attempts(failed.key) == 0
    store.record(failed)
    assert store.lookup(failed.key) is None
    assert store.completions([failed.key]) == {}
    assert store.attempts(failed.key) == 1


@pytest.mark.parametrize(
    ("turn", "message"),
    [
        (Turn(make_call(), 0, None), "exactly one"),
        (dataclasses.replace(make_turn(), error="both"), "exactly one"),
        (
            dataclasses.replace(
                make_turn(), completion=dataclasses.replace(make_turn().completion, logprobs=np.zeros(2, np.float32))
            ),
            "do not go with",
        ),
        (text_only(make_turn(), ids=np.zeros(0, np.int32)), "needs the ids that it encodes to"),
        (dataclasses.replace(make_turn(), call=make_call(question_id="nowhere")), "questions into the store before"),
        (make_turn(text="\ud800"), "Unicode"),
    ],
)
def test_impossible_turns_are_refused(store, turn, message):
    with pytest.raises(AgentArkError, match=message):
        store.record(turn)
    assert list(store.turns()) == []
    store.record(make_turn())


# Reading


def test_turns_are_sorted_and_filtered_while_the_caller_writes(store):
    every = [
        make_turn(agent=agent, round=round, protocol=protocol)
        for agent in range(150)
        for round in range(2)
        for protocol in ("debate", "single")
    ]
    store.record_many(every[::-1])
    keys = []
    for turn in store.turns(protocol="debate", round=1):
        store.put_labels([Label(turn.key, "g", "right", "2")])
        keys.append(turn.key)
    expected = [turn.key for turn in every if (turn.call.protocol, turn.call.round) == ("debate", 1)]
    assert keys == sorted(expected)
    assert [turn.key for turn in store.turns()] == sorted(turn.key for turn in every)
    assert list(store.labels("g")) == keys
    assert list(store.turns(weights="other")) == []


def test_pages_are_never_sorted_and_counting_reads_indexes_only(store):
    store.record_many([make_turn(agent=agent, round=agent % 2) for agent in range(5)])
    statements: list[str] = []
    store._connection.set_trace_callback(statements.append)
    for filters in ({}, {"protocol": "debate"}, {"role": "debater"}, {"round": 1, "weights": "w"}):
        for errors in (True, False):
            assert len(list(store.turns(**filters, errors=errors))) == (2 if "round" in filters else 5)
    read = [statement for statement in statements if " turns " in statement]
    statements.clear()
    assert len(list(store.labelled("g", protocol="debate", role="debater", weights="w"))) == 5
    for by in (("protocol", "role", "round"), ("question_id",), ("agent",), ()):
        store.ledger(*by)
    counted = statements[:]
    store.unanswered([make_turn().key])
    asked = statements[-1]
    store._connection.set_trace_callback(None)

    def plan(statement: str) -> str:
        return " ".join(row[3] for row in store._connection.execute(f"EXPLAIN QUERY PLAN {statement}"))

    assert len(read) == 8
    assert len(counted) == 5
    assert not [statement for statement in read if "TEMP B-TREE" in plan(statement)]
    assert all("COVERING INDEX turns_ledger" in plan(statement) for statement in counted)
    assert "COVERING INDEX turns_of_call" in plan(asked)


def test_the_ledger_adds_up(store):
    store.record_many([make_turn(agent=agent) for agent in range(3)])
    store.record_many([make_turn(agent=5, error="x"), make_turn(round=1), make_turn(role="judge")])
    assert store.ledger("protocol", "role", "round") == [
        Usage(("debate", "debater", 0), 3, 1, 15, 6, 12, 0.75),
        Usage(("debate", "debater", 1), 1, 0, 5, 2, 4, 0.25),
        Usage(("debate", "judge", 0), 1, 0, 5, 2, 4, 0.25),
    ]
    assert store.ledger() == [Usage((), 5, 1, 25, 10, 20, 1.25)]
    assert store.ledger()[0].price(2.0, 1.0, 10.0) == (15 * 2 + 10 * 1 + 20 * 10) / 1e6
    with pytest.raises(ValueError, match="seconds"):
        store.ledger("seconds")


def test_labels_belong_to_successful_turns_and_are_replaced(store):
    done, failed = make_turn(), make_turn(agent=1, error="x")
    store.record_many([done, failed])
    store.put_labels([Label(done.key, "strict", "wrong", "1"), Label(done.key, "other", "right", "2")])
    store.put_labels([Label(done.key, "strict", "right", "2")])
    assert store.labels("strict") == {done.key: Label(done.key, "strict", "right", "2")}
    for key in (failed.key, "unknown"):
        with pytest.raises(AgentArkError, match="to label"):
            store.put_labels([Label(done.key, "strict", "wrong", "3"), Label(key, "strict", "wrong", "")])
    assert store.labels("strict")[done.key].verdict == "right"


def test_export_does_not_depend_on_order_time_or_cache(tmp_path):
    every = [make_turn(agent=agent, attempt=1) for agent in range(20)]
    every += [make_turn(agent=agent, error="slow") for agent in range(0, 20, 3)]
    exports = []
    for name, order in (("a", every), ("b", every[::-1])):
        with TraceStore(tmp_path / f"{name}.sqlite") as store:
            store.put_question(QUESTION)
            for turn in order:
                if turn.completion is not None:
                    extra = {"seconds": len(exports) + 0.5, "cached_tokens": len(exports)}
                    turn = dataclasses.replace(turn, completion=dataclasses.replace(turn.completion, **extra))
                store.record(turn)
            assert store.export_canonical(tmp_path / f"{name}.jsonl") == len(every)
        exports.append((tmp_path / f"{name}.jsonl").read_bytes())
    assert exports[0] == exports[1]
    lines = [json.loads(line) for line in exports[0].splitlines()]
    assert [(line["key"], line["attempt"]) for line in lines] == sorted((turn.key, turn.attempt) for turn in every)
    first = next(turn for turn in every if (turn.key, turn.attempt) == (lines[0]["key"], lines[0]["attempt"]))
    assert lines[0]["call"]["prompt"] == [list(segment) for segment in first.call.prompt]
    assert list(tmp_path.glob(".*")) == []


# Writers

WRITER = """
import sys
import test_store
from agentark_jax.traces.store import TraceStore
with TraceStore(sys.argv[1]) as store:
    store.put_question(test_store.QUESTION)
    print("open", flush=True)
    for batch in range(10**6):
        store.record(test_store.make_turn(agent=batch))
        store.record_many([test_store.make_turn(agent=batch, sample=1 + i) for i in range(50)])
        print(batch, flush=True)
"""


def start_writer(path: Path, script: str = WRITER, *arguments: str) -> subprocess.Popen:
    tests = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tests.parent), str(tests)])}
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(path), *arguments], stdout=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdout.readline() == "open\n"
    return process


def test_a_killed_writer_leaves_whole_turns_and_a_free_lock(tmp_path):
    path = tmp_path / "traces.sqlite"
    committed = -1
    for _ in range(2):  # the second writer goes on in the store of the first
        process = start_writer(path)
        try:
            with TraceStore(path, read_only=True) as reader:
                acknowledged = [int(process.stdout.readline()) for _ in range(committed + 15)][-1]
                assert reader.ledger()[0].calls >= 51 * (acknowledged + 1)
            with pytest.raises(AgentArkError, match=f"process {process.pid} on "):
                TraceStore(path)
        finally:
            process.send_signal(signal.SIGKILL)
            rest, _ = process.communicate()
        lines = [line for line in rest.split("\n")[:-1] if line]
        committed = int(lines[-1]) if lines else acknowledged
        with TraceStore(path) as store:
            assert store.verify() == []
            found = list(store.turns())
            found = [turn for turn in found if turn.error is None]
            singles = sum(turn.call.sample == 0 for turn in found)
            assert singles > committed
            assert len(found) - singles in (50 * singles, 50 * (singles - 1)), "a batch is whole or absent"
            store.record(make_turn(agent=10**6 + committed, error="the next writer can write"))


def test_two_writers_in_one_process(tmp_path):
    path = tmp_path / "traces.sqlite"
    with TraceStore(path), pytest.raises(AgentArkError, match=f"process {os.getpid()} on .* read-only"):
        TraceStore(path)
    with TraceStore(path):
        pass


# Many callers


def record_all(store: TraceStore, every: list[Turn]) -> list[BaseException | None]:
    async def together():
        writer = TurnWriter(store)
        return await asyncio.gather(*(writer.record(turn) for turn in every), return_exceptions=True)

    return asyncio.run(together())


def test_turns_that_finish_together_are_one_transaction(store):
    statements = []
    store._connection.set_trace_callback(statements.append)
    every = [make_turn(agent=agent) for agent in range(100)]
    assert record_all(store, every) == [None] * 100
    assert sum("COMMIT" in statement for statement in statements) == 1
    assert store.unanswered(turn.key for turn in every) == set()


def test_a_turn_is_acknowledged_only_when_others_can_read_it(store):
    async def one_after_the_other():
        writer = TurnWriter(store)
        with TraceStore(store.path, read_only=True) as reader:
            for agent in range(3):
                await writer.record(make_turn(agent=agent))
                assert reader.ledger()[0].calls == agent + 1

    asyncio.run(one_after_the_other())


def test_a_turn_that_cannot_be_kept_takes_no_other_with_it(store):
    every = [make_turn(), make_turn(agent=1, text="\ud800"), make_turn(agent=2), make_turn(attempt=1)]
    outcomes = record_all(store, every)
    assert [type(outcome) for outcome in outcomes] == [type(None), AgentArkError, type(None), AgentArkError]
    assert "Unicode" in str(outcomes[1])
    assert "paid twice" in str(outcomes[3])
    assert sorted(turn.call.agent for turn in store.turns()) == [0, 2]


def test_a_cancelled_caller_loses_no_turn(store):
    async def cancel_one():
        writer = TurnWriter(store)
        tasks = [asyncio.create_task(writer.record(make_turn(agent=agent))) for agent in range(3)]
        await asyncio.sleep(0)  # all have handed over their turn, nothing is committed
        assert list(store.turns()) == []
        tasks[1].cancel()
        return await asyncio.gather(*tasks, return_exceptions=True)

    outcomes = asyncio.run(cancel_one())
    assert [type(outcome) for outcome in outcomes] == [type(None), asyncio.CancelledError, type(None)]
    assert sorted(turn.call.agent for turn in store.turns()) == [0, 1, 2]


def test_a_failure_reaches_every_caller_and_nothing_is_lost(store):
    store.record(make_turn())
    full = [make_turn(agent=agent, text="x" * 500) for agent in range(1, 50)]
    set_limit(store, 0)
    outcomes = record_all(store, full)
    refused = [turn for turn, outcome in zip(full, outcomes, strict=True) if outcome is not None]
    assert len(refused) > 30, "one by one a few may still fit"
    assert all("Free disk space" in str(outcome) for outcome in outcomes if outcome is not None)
    assert store.unanswered(turn.key for turn in full) == {turn.key for turn in refused}
    set_limit(store, 10_000)
    assert record_all(store, refused) == [None] * len(refused)
    assert store.verify() == []
    assert store.ledger()[0].calls == 50
    store.close()
    assert {type(outcome) for outcome in record_all(store, full[:2])} == {sqlite3.ProgrammingError}


def set_limit(store: TraceStore, more_pages: int) -> None:
    """Let the file grow by so many pages and no further, as on a disk that is nearly full."""
    pages = store._connection.execute("PRAGMA page_count").fetchone()[0]
    store._connection.execute(f"PRAGMA max_page_count = {pages + more_pages}")


RUN = """
import asyncio, random, sys
import test_store
from agentark_jax.traces.store import TraceStore
from agentark_jax.traces.writer import TurnWriter

async def ask(store, writer, agent):
    turn = test_store.make_turn(agent=agent)
    if store.lookup(turn.key) is None:
        await asyncio.sleep(random.random() / 4)
        await writer.record(turn)
        print(agent, flush=True)

async def everyone(store):
    writer = TurnWriter(store)
    await asyncio.gather(*(ask(store, writer, agent) for agent in range(400)))

with TraceStore(sys.argv[1]) as store:
    store.put_question(test_store.QUESTION)
    print("open", flush=True)
    asyncio.run(everyone(store))
"""


def test_a_run_killed_again_and_again_ends_as_an_undisturbed_one(tmp_path):
    path, acknowledged = tmp_path / "killed.sqlite", []
    for kill_after in (random.randrange(100), random.randrange(100), None):
        process = start_writer(path, RUN)
        lines = [process.stdout.readline() for _ in range(kill_after or 0)]
        if kill_after is not None:
            process.send_signal(signal.SIGKILL)
        rest, _ = process.communicate()
        acknowledged += [int(line) for line in (*lines, *rest.split("\n")[:-1])]
    assert sorted(acknowledged) == sorted(set(acknowledged)), "no turn was paid for twice after it was acknowledged"
    with TraceStore(tmp_path / "undisturbed.sqlite") as store:
        store.put_question(QUESTION)
        store.record_many(make_turn(agent=agent) for agent in range(400))
    for name in ("killed", "undisturbed"):
        with TraceStore(tmp_path / f"{name}.sqlite", read_only=True) as store:
            assert store.verify() == []
            store.export_canonical(tmp_path / f"{name}.jsonl")
    assert (tmp_path / "killed.jsonl").read_bytes() == (tmp_path / "undisturbed.jsonl").read_bytes()


RETRIES = """
import random, sys
import test_store
from agentark_jax.traces.store import TraceStore

# Every call fails so often before it is answered; batches are of any size, and some turns come twice.
chance = random.Random(sys.argv[2])
with TraceStore(sys.argv[1]) as store:
    store.put_question(test_store.QUESTION)
    print("open", flush=True)
    left = [agent for agent in range(test_store.CALLS) if store.lookup(test_store.make_turn(agent).key) is None]
    while left:
        batch = chance.sample(left, min(len(left), chance.choice([1, 1, 2, 7, 40])))
        turns = []
        for agent in batch:
            attempt = store.attempts(test_store.make_turn(agent).key)
            turns.append(test_store.make_turn(agent, attempt, error="slow" if attempt < agent % 3 else None))
        store.record_many(turns + chance.sample(turns, len(turns) // 3))
        left = [agent for agent in left if agent not in {turn.call.agent for turn in turns if turn.error is None}]
        print(*(f"{turn.call.agent}.{turn.attempt}" for turn in turns), flush=True)
"""
CALLS, KILLS = 3000, 20


@pytest.mark.slow
def test_twenty_kills_lose_nothing_and_double_nothing(tmp_path):
    path, known = tmp_path / "killed.sqlite", []
    # `agent`s fail `agent % 3` times, so the end is the same however often the writer was killed.
    every = [
        make_turn(agent, attempt, error="slow" if attempt < agent % 3 else None)
        for agent in range(CALLS)
        for attempt in range(agent % 3 + 1)
    ]
    for number in range(KILLS + 1):
        process = start_writer(path, RETRIES, str(number))
        lines = []
        if number < KILLS:
            lines = [process.stdout.readline() for _ in range(random.randrange(6))]
            time.sleep(random.uniform(0, 0.005))
            process.send_signal(signal.SIGKILL)
        rest, _ = process.communicate()
        assert process.returncode == (-signal.SIGKILL if number < KILLS else 0)
        whole = "".join(lines) + rest[: rest.rfind("\n") + 1]
        acknowledged = whole.split()
        with TraceStore(path, read_only=True) as store:
            assert store.verify() == []
            found = [f"{turn.call.agent}.{turn.attempt}" for turn in store.turns()]
        assert len(found) == len(set(found))
        assert set(known) | set(acknowledged) <= set(found)
        assert set(known).isdisjoint(acknowledged), "what was committed is not done again"
        known = found
    with TraceStore(tmp_path / "undisturbed.sqlite") as store:
        store.put_question(QUESTION)
        store.record_many(random.sample(every, len(every)))
        store.export_canonical(tmp_path / "undisturbed.jsonl")
    with TraceStore(path) as store:
        store.export_canonical(tmp_path / "killed.jsonl")
    assert (tmp_path / "killed.jsonl").read_bytes() == (tmp_path / "undisturbed.jsonl").read_bytes()


# Older stores

V1 = """
CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE questions (
  id TEXT PRIMARY KEY, task TEXT NOT NULL, split TEXT NOT NULL, prompt TEXT NOT NULL, answer TEXT NOT NULL,
  rationale TEXT NOT NULL, meta TEXT NOT NULL);
CREATE TABLE segments (hash TEXT PRIMARY KEY, ids BLOB NOT NULL);
CREATE TABLE turns (
  call_key TEXT NOT NULL, attempt INTEGER NOT NULL CHECK (attempt >= 0),
  question_id TEXT NOT NULL REFERENCES questions (id), protocol TEXT NOT NULL, agent INTEGER NOT NULL,
  role TEXT NOT NULL, round INTEGER NOT NULL, sample INTEGER NOT NULL, parents TEXT NOT NULL, model TEXT NOT NULL,
  weights TEXT NOT NULL, tokenizer TEXT NOT NULL, template TEXT NOT NULL, sampling TEXT NOT NULL, prompt TEXT NOT NULL,
  completion_ids BLOB, logprobs BLOB, text TEXT, finish TEXT CHECK (finish IN ('stop', 'length')),
  prompt_tokens INTEGER, cached_tokens INTEGER, completion_tokens INTEGER, seconds REAL, error TEXT,
  digest TEXT NOT NULL, created TEXT NOT NULL DEFAULT (strftime('%Y-%m-%dT%H:%M:%fZ', 'now')),
  PRIMARY KEY (call_key, attempt),
  CHECK ((error IS NULL) = (completion_ids IS NOT NULL AND logprobs IS NOT NULL AND text IS NOT NULL
    AND finish IS NOT NULL AND prompt_tokens IS NOT NULL AND cached_tokens IS NOT NULL
    AND completion_tokens IS NOT NULL AND seconds IS NOT NULL)));
CREATE UNIQUE INDEX one_success_per_call ON turns (call_key) WHERE error IS NULL;
CREATE INDEX turns_of_question ON turns (question_id, call_key, attempt);
CREATE TABLE labels (
  call_key TEXT NOT NULL, grader TEXT NOT NULL, verdict TEXT NOT NULL
  CHECK (verdict IN ('right', 'wrong', 'unparseable')), answer TEXT NOT NULL,
  PRIMARY KEY (grader, call_key)) WITHOUT ROWID;
INSERT INTO meta VALUES ('schema_version', '1');
INSERT INTO questions VALUES ('q0', 'sums', 'train', '1 + 1?', '2', '1 + 1 = 2', '{"name": "Zoë", "steps": [2]}');
INSERT INTO segments VALUES ('0c40fc912bea3d01b4dbad07', x'0200000003000000');
INSERT INTO segments VALUES ('8ca6ee1043defcfd05aa29de', x'040000000500000006000000');
INSERT INTO turns VALUES ('a634510ac46eed13e4dbc30b', 0, 'q0', 'debate', 0, 'debater', 0, 0, '[]', 'm', 'w', 't', 'p',
  '{"temperature": 0.8, "max_tokens": 16, "stop_ids": [1, 7], "seed": 5, "top_p": 1.0}',
  '["0c40fc912bea3d01b4dbad07", "8ca6ee1043defcfd05aa29de"]', NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL,
  'server gone', '64ca4f3f4e97779222b9c99d', '2026-01-02T03:04:05.678Z');
INSERT INTO turns VALUES ('a634510ac46eed13e4dbc30b', 1, 'q0', 'debate', 0, 'debater', 0, 0, '[]', 'm', 'w', 't', 'p',
  '{"temperature": 0.8, "max_tokens": 16, "stop_ids": [1, 7], "seed": 5, "top_p": 1.0}',
  '["0c40fc912bea3d01b4dbad07", "8ca6ee1043defcfd05aa29de"]', x'00000000010000000200000003000000',
  x'00000080abaaaabeabaa2abf000080bf', 'so 2', 'stop', 5, 2, 4, 0.25, NULL, '168f5a300994ae8a1f20db25',
  '2026-01-02T03:04:06.789Z');
INSERT INTO labels VALUES ('a634510ac46eed13e4dbc30b', 'g', 'right', '2');
"""
V2 = """
ALTER TABLE turns ADD COLUMN server TEXT;
CREATE INDEX turns_ledger ON turns (
  protocol, role, round, agent, question_id, prompt_tokens, cached_tokens, completion_tokens, seconds);
ALTER TABLE questions ADD COLUMN digest TEXT NOT NULL DEFAULT '';
ALTER TABLE labels ADD COLUMN digest TEXT NOT NULL DEFAULT '';
UPDATE questions SET digest = 'edb991cbb7beacee528e1b9f';
UPDATE labels SET digest = '63634e42b7ab636f42d16493';
UPDATE turns SET server = 'http://a' WHERE attempt = 1;
UPDATE meta SET value = '2';
"""
V1_EXPORT = "d355bbd51460031d57338b849ecb9549e45ecbcad1531679d0b6f0a2b38265f3"


@pytest.fixture(params=["1", "2"])
def old(tmp_path, request) -> Path:
    """A store as an older version wrote it."""
    path = tmp_path / "old.sqlite"
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.executescript(V1 if request.param == "1" else V1 + V2)
    connection.close()
    return path


def dump(path: Path) -> list[str]:
    connection = sqlite3.connect(path)
    content = list(connection.iterdump())
    connection.close()
    return content


@pytest.mark.parametrize("read_only", [False, True])
def test_an_old_store_is_brought_up_to_date_and_loses_nothing(old, tmp_path, read_only):
    server = "http://a" if "http://a" in "".join(dump(old)) else None
    with TraceStore(old, read_only=read_only) as store:
        assert store.verify() == []
        first, second = store.turns()
        assert_same(first, make_turn(error="server gone"))
        answered = make_turn(attempt=1)
        assert_same(
            second, dataclasses.replace(answered, completion=dataclasses.replace(answered.completion, server=server))
        )
        assert store.questions() == [QUESTION]
        assert store.labels("g") == {first.key: Label(first.key, "g", "right", "2")}
        assert store.ledger() == [Usage((), 1, 1, 5, 2, 4, 0.25)]
        store.export_canonical(tmp_path / "old.jsonl")
    assert hashlib.sha256((tmp_path / "old.jsonl").read_bytes()).hexdigest() == V1_EXPORT
    with TraceStore(old) as store, TraceStore(tmp_path / "new.sqlite") as new:
        store.put_questions([QUESTION])
        store.record(second)
        store.record(make_turn(agent=1))

        def shape(each: TraceStore) -> set[tuple]:
            tables = ("meta", *rows.TABLES)
            columns = {
                (table, *row[1:]) for table in tables for row in each._connection.execute(f"PRAGMA table_info({table})")
            }
            return columns | set(
                each._connection.execute("SELECT type, name, tbl_name FROM sqlite_master WHERE type != 'table'")
            )

        assert shape(store) == shape(new)


def test_a_migration_that_fails_leaves_the_old_store(old, monkeypatch):
    before = dump(old)
    with monkeypatch.context() as broken:
        broken.setitem(rows.MIGRATIONS, "2", rows.MIGRATIONS["2"] + "UPDATE nowhere SET x = 1;\n")
        with pytest.raises(AgentArkError, match=r"old\.sqlite: cannot bring schema_version [12] to 3"):
            TraceStore(old)
    assert dump(old) == before
    with TraceStore(old) as store:
        assert store.verify() == []
    assert dump(old) != before


def test_an_old_store_that_another_process_writes_says_so(old):
    message = r"old\.sqlite: .*schema_version is [12], and it cannot be brought to 3 now: .* is writing"
    with FileLock(f"{old}.lock"), pytest.raises(AgentArkError, match=message):
        TraceStore(old, read_only=True)


def test_keys_are_what_they_have_always_been(store, tmp_path):
    assert make_call().key == "a634510ac46eed13e4dbc30b"
    constrained = make_call(sampling=dataclasses.replace(make_call().sampling, regex="[0-9]+"))
    assert constrained.key == "a34f9e0307c9a65c5006f6b6"
    elsewhere = make_turn(agent=1)
    elsewhere = dataclasses.replace(elsewhere, completion=dataclasses.replace(elsewhere.completion, server="http://b"))
    store.record_many([make_turn(agent=1), dataclasses.replace(make_turn(), call=constrained)])
    store.export_canonical(tmp_path / "a.jsonl")
    with TraceStore(tmp_path / "b.sqlite") as other:
        other.put_question(QUESTION)
        other.record_many([elsewhere, dataclasses.replace(make_turn(), call=constrained)])
        other.export_canonical(tmp_path / "b.jsonl")
        assert other.lookup(elsewhere.key).completion.server == "http://b"
    exported = (tmp_path / "a.jsonl").read_text()
    assert exported == (tmp_path / "b.jsonl").read_text()
    assert exported.count("regex") == 1


# Size


def test_prompts_of_a_debate_take_less_than_a_third_of_their_tokens(store):
    question, turns = make_debate(0)
    store.put_question(question)
    store.record_many(turns)
    assert len(turns) == 15
    assert prompt_share(store) <= 0.3


# Damage


@pytest.mark.parametrize(
    ("statement", "values", "found"),
    [
        ("UPDATE turns SET text = 'so 3'", (), "answer is not the one"),
        ("UPDATE turns SET logprobs = completion_ids", (), "answer is not the one"),
        ("UPDATE turns SET completion_ids = zeroblob(16)", (), "answer is not the one"),
        ("UPDATE turns SET completion_ids = zeroblob(3)", (), "cannot be read"),
        ("UPDATE turns SET cached_tokens = 0", (), "answer is not the one"),
        ("UPDATE turns SET attempt = 7", (), "answer is not the one"),
        ("UPDATE turns SET agent = 3", (), "key"),
        ("UPDATE turns SET prompt = '[]'", (), "key"),
        ("UPDATE turns SET prompt = 'nonsense'", (), "cannot be read"),
        ("UPDATE turns SET sampling = replace(sampling, '0.8', '0.9')", (), "key"),
        ("UPDATE turns SET sampling = '{}'", (), "cannot be read"),
        ("UPDATE turns SET sampling = sampling || ' '", (), "its sampling is not what was recorded"),
        ("UPDATE questions SET answer = '3'", (), "questions, q0: it is not what was recorded"),
        ("UPDATE labels SET verdict = 'wrong'", (), "it is not what was recorded"),
        ("UPDATE segments SET ids = ? WHERE length(ids) = 8", (np.asarray([2, 9], "<i4").tobytes(),), "its ids"),
        ("DELETE FROM segments WHERE length(ids) = 8", (), "cannot be read"),
        ("DELETE FROM questions", (), "question is missing"),
        ("DELETE FROM turns", (), "no such successful turn"),
    ],
)
def test_tampering_is_found(tmp_path, statement, values, found):
    path = tmp_path / "traces.sqlite"
    with TraceStore(path) as store:
        store.put_question(QUESTION)
        store.record(make_turn())
        store.put_labels([Label(make_turn().key, "g", "right", "2")])
        assert store.verify() == []
    tamper(path, statement, *values)
    with TraceStore(path, read_only=True) as store:
        problems = store.verify()
        assert any(found in problem for problem in problems), problems
        if "cannot be read" in found:
            with pytest.raises(AgentArkError, match="changed after it was recorded"):
                list(store.turns())
        if "zeroblob(3)" in statement:
            with pytest.raises(AgentArkError, match="changed after it was recorded"):
                store.completions([make_turn().key])


# What verify cannot see: nothing follows from when a turn was recorded, or which server answered.
UNSEEN = {("turns", "created"), ("turns", "server")}
CELLS = sorted({(table, column) for table, columns in rows.TABLES.items() for column in columns} - UNSEEN)


@pytest.fixture(scope="module")
def filled(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("filled") / "traces.sqlite"
    with TraceStore(path) as store:
        store.put_question(QUESTION)
        store.record_many([make_turn(error="server gone"), make_turn(attempt=1, parents=("p",))])
        store.record(make_turn(agent=1))
        store.put_labels([Label(make_turn(agent=1).key, "g", "right", "2")])
    return path


@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
@given(cell=st.sampled_from(CELLS), place=st.integers(0, 10**6), change=st.integers(1, 255))
def test_any_changed_byte_of_any_column_is_found(filled, tmp_path_factory, cell, place, change):
    table, column = cell
    path = tmp_path_factory.mktemp("changed") / "traces.sqlite"
    shutil.copy(filled, path)
    connection = sqlite3.connect(path)
    stored = connection.execute(
        f"SELECT rowid, {column} FROM {table}" if table != "labels" else f"SELECT 1, {column} FROM labels"
    )
    row, value = (found := stored.fetchall())[place % len(found)]
    if isinstance(value, str | bytes):
        content = bytearray(value.encode() if isinstance(value, str) else value)
        assume(content)
        content[place % len(content)] ^= change
        changed = bytes(content)
    else:
        changed = change if value is None else value + change
    assume(changed != value)
    try:
        where = "" if table == "labels" else f" WHERE rowid = {row}"
        new = "CAST(? AS TEXT)" if isinstance(value, str) else "?"
        connection.execute(f"UPDATE {table} SET {column} = {new}{where}", (changed,))
        connection.commit()
    except sqlite3.IntegrityError:
        assume(False)
    finally:
        connection.close()
    with TraceStore(path, read_only=True) as store:
        assert store.verify() != [], (table, column, value, changed)


@pytest.mark.parametrize("read_only", [False, True])
def test_files_that_are_no_usable_store(tmp_path, read_only):
    text = tmp_path / "notes.sqlite"
    text.write_text("not a database " * 100)
    with pytest.raises(AgentArkError, match=r"notes\.sqlite.*no trace store"):
        TraceStore(text, read_only=read_only)

    foreign = tmp_path / "foreign.sqlite"
    sqlite3.connect(foreign).execute("CREATE TABLE t (x)").connection.close()
    with pytest.raises(AgentArkError, match=r"foreign\.sqlite.*no trace store"):
        TraceStore(foreign, read_only=read_only)

    newer = tmp_path / "newer.sqlite"
    TraceStore(newer).close()
    tamper(newer, "UPDATE meta SET value = '99' WHERE name = 'schema_version'")
    with pytest.raises(AgentArkError, match=r"newer\.sqlite.*schema_version is 99"):
        TraceStore(newer, read_only=read_only)


def test_a_text_that_is_no_text_is_damage(tmp_path):
    path = tmp_path / "traces.sqlite"
    with TraceStore(path) as store:
        store.put_question(QUESTION)
        store.record_many([make_turn(), make_turn(agent=1)])
    tamper(path, "UPDATE turns SET text = CAST(x'ff' AS TEXT) WHERE agent = 1")
    with TraceStore(path) as store:
        assert len(store.verify()) == 1
        with pytest.raises(AgentArkError, match="damaged"):
            list(store.turns())
        assert store.lookup(make_turn().key).completion.text == "so 2"


def test_a_damaged_page_is_reported(tmp_path):
    path = tmp_path / "traces.sqlite"
    with TraceStore(path) as store:
        store.put_question(QUESTION)
        store.record_many([make_turn(agent=agent) for agent in range(300)])
    content = bytearray(path.read_bytes())
    for page in range(8, len(content) // 4096):
        content[page * 4096 : page * 4096 + 64] = b"\xff" * 64
    path.write_bytes(content)
    with TraceStore(path) as store, pytest.raises(AgentArkError, match=r"traces\.sqlite.*damaged"):
        list(store.turns())


def test_missing_unwritable_and_full(tmp_path, store):
    with pytest.raises(AgentArkError, match=r"absent\.sqlite.*no trace store"):
        TraceStore(tmp_path / "absent.sqlite", read_only=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(AgentArkError, match=r"traces\.sqlite\.lock.*writable"):
        TraceStore(tmp_path / "file" / "traces.sqlite")
    with TraceStore(store.path, read_only=True) as reader, pytest.raises(AgentArkError, match="read-only"):
        reader.record(make_turn())
    with pytest.raises(AgentArkError, match=r"out\.jsonl.*writable"):
        store.export_canonical(tmp_path / "file" / "out.jsonl")

    store.record(make_turn())
    pages = store._connection.execute("PRAGMA page_count").fetchone()[0]
    store._connection.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(AgentArkError, match=r"traces\.sqlite.*full.*Free disk space"):
        store.record_many([make_turn(agent=agent, text="x" * 500) for agent in range(1, 50)])
    store._connection.execute("PRAGMA max_page_count = 100000")
    assert len(list(store.turns())) == 1
    store.record_many([make_turn(agent=agent, text="x" * 500) for agent in range(1, 50)])
    assert store.verify() == []


FULL = """
import resource, sys
import test_store
from agentark_jax.errors import AgentArkError
from agentark_jax.traces.store import TraceStore
with TraceStore(sys.argv[1]) as store:
    store.put_question(test_store.QUESTION)
    store.record(test_store.make_turn())
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
    try:
        for batch in range(1000):
            store.record_many([test_store.make_turn(agent=batch, sample=1 + i, text="x" * 200) for i in range(20)])
    except AgentArkError as error:
        print(error)
"""


def test_a_write_that_the_system_refuses(tmp_path):
    path = tmp_path / "traces.sqlite"
    tests = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tests.parent), str(tests)])}
    run = subprocess.run([sys.executable, "-c", FULL, str(path)], capture_output=True, text=True, env=environment)
    assert "Free disk space" in run.stdout, run
    with TraceStore(path) as store:
        assert store.verify() == []
        assert store.ledger()[0].calls % 20 == 1
