"""The trace store: exact round trips, nothing paid twice, nothing lost or half-written, nothing altered unseen."""

import dataclasses
import json
import os
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agentark_jax.errors import AgentArkError
from agentark_jax.records import Call, Completion, Label, Question, Sampling, Turn
from agentark_jax.traces.store import TraceStore, Usage

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
    completion = Completion(
        ids=np.asarray(ids, np.int32),
        logprobs=np.asarray(logprobs, np.float32),
        text=draw(words),
        finish=draw(st.sampled_from(["stop", "length"])),
        prompt_tokens=draw(small),
        cached_tokens=draw(small),
        seconds=draw(st.floats(0, 1e6)),
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
        done = store.completed(turn.key for turn in given_turns)
        assert set(done) == {turn.key for turn in given_turns if turn.error is None}


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


def test_the_tables_themselves_allow_one_success_per_call(store):
    store.record(make_turn())
    columns = ", ".join(name for _, name, *_ in store._connection.execute("PRAGMA table_info(turns)"))
    copied = columns.replace("attempt", "attempt + 1")
    with pytest.raises(sqlite3.IntegrityError):
        store._connection.execute(f"INSERT INTO turns ({columns}) SELECT {copied} FROM turns")


def test_a_failed_call_has_attempts_but_no_answer(store):
    failed = make_turn(error="server gone")
    assert store.attempts(failed.key) == 0
    store.record(failed)
    assert store.lookup(failed.key) is None
    assert store.completed([failed.key]) == {}
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
    assert list(store.turns(question_id="other")) == []


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


def start_writer(path: Path) -> subprocess.Popen:
    tests = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tests.parent), str(tests)])}
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True, env=environment
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
