"""Whatever comes from outside, a documented outcome: configurations, files, imports, texts, answers, damaged stores.

`AGENTARK_EXAMPLES=1000 python -m pytest -n 0 tests/test_properties.py` tries so many of each, other ones every time.
"""

import asyncio
import dataclasses
import gzip
import itertools
import json
import math
import os
import random
import shutil
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import jax
import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from test_selection import VERDICTS, make_row, make_selection, said, values
from test_store import QUESTION, assert_same, make_turn

from agentark_jax import config
from agentark_jax.data.loader import packed_batches
from agentark_jax.data.render import completion_example
from agentark_jax.data.tokenizer import Tokenizer, train_tokenizer
from agentark_jax.engines import http
from agentark_jax.engines.base import Request
from agentark_jax.engines.config import EngineConfig
from agentark_jax.engines.openai import OpenAIEngine
from agentark_jax.engines.sglang import SGLangEngine
from agentark_jax.errors import AgentArkError, UsageError
from agentark_jax.models.config import load_config
from agentark_jax.models.source import ScratchConfig
from agentark_jax.models.transformer import param_shapes
from agentark_jax.models.weights import save_pretrained
from agentark_jax.records import Question, Sampling
from agentark_jax.tasks.config import FieldsConfig
from agentark_jax.tasks.grading import GRADERS, grader
from agentark_jax.tasks.own import read_own
from agentark_jax.tasks.rows import Row, read_file
from agentark_jax.traces.config import SelectionConfig, Variant
from agentark_jax.traces.exchange import export_parquet, merge
from agentark_jax.traces.foreign import read_debate, turns_of
from agentark_jax.traces.matching import MATCH_TOLERANCE, match, within_budget
from agentark_jax.traces.selection import subset
from agentark_jax.traces.store import TraceStore
from agentark_jax.traces.variants import select

MANY = os.environ.get("AGENTARK_EXAMPLES")


def tried(examples: int):
    """So many examples, the same ones every time, where the environment does not ask for others."""
    return settings(
        max_examples=int(MANY or examples),
        derandomize=MANY is None,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
    )


def outcome(action, refusal: type[AgentArkError] = AgentArkError) -> tuple[Any, str]:
    """What an action comes to, or else what it was refused with."""
    try:
        return action(), ""
    except refusal as error:
        return None, str(error)


numbers = st.one_of(
    st.integers(-5, 70), st.integers(-(10**400), 10**400), st.floats(), st.sampled_from([math.inf, -math.inf, math.nan])
)
texts = st.text(max_size=12) | st.sampled_from(["", " ", "stop", "#### 5", "The answer is 5."])


def values_of(texts: st.SearchStrategy) -> st.SearchStrategy:
    """What JSON can say."""
    return st.recursive(
        st.one_of(st.none(), st.booleans(), numbers, texts),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
        max_leaves=8,
    )


json_values = values_of(texts | st.just("\ud800"))  # half a surrogate pair, which JSON can say and UTF-8 cannot


# Configurations


@cache
def keys(group: type = config.RunConfig, prefix: str = "") -> dict[str, Any]:
    """The keys of a configuration, dotted, groups among them, and their types."""
    found: dict[str, Any] = {}
    for name, hint in get_type_hints(group).items():
        found[f"{prefix}{name}"] = hint
        if dataclasses.is_dataclass(hint):
            found |= keys(hint, f"{prefix}{name}.")
    return found


def of_type(hint: Any) -> st.SearchStrategy:
    """Values of the type of a key, sensible or not."""
    if get_origin(hint) is Literal:
        return st.sampled_from(get_args(hint))
    if dataclasses.is_dataclass(hint):
        return st.just({})
    if get_origin(hint) in (list, tuple):
        return st.lists(of_type(get_args(hint)[0]), max_size=3)
    if get_origin(hint) is dict or hint is Any:
        return st.dictionaries(st.sampled_from(["completion", "reasoning", "answer"]), st.floats(0, 3), max_size=2)
    if get_args(hint):
        return st.one_of(*map(of_type, get_args(hint)))
    simple = {
        bool: st.booleans(),
        int: st.integers(-1, 9),
        float: st.floats(-1, 9),
        str: st.sampled_from(["a", "run-2", "", "student"]),
        type(None): st.none(),
    }
    return simple[hint]


def nested(values: dict[str, Any]) -> dict[str, Any]:
    """Dotted keys as groups in groups."""
    result: dict[str, Any] = {}
    for key, value in values.items():
        *groups, last = key.split(".")
        place = result
        for group in groups:
            place = place.setdefault(group, {})
        place[last] = value
    return result


def parse(path: Path) -> config.RunConfig:
    return config.parse(["--config", str(path)], "agentark run", "")[0]


@st.composite
def keys_and_values(draw, junk: bool) -> dict[str, Any]:
    known = sorted(name for name, hint in keys().items() if junk or not dataclasses.is_dataclass(hint))
    names = draw(st.lists(st.sampled_from(known), min_size=1, max_size=1 if junk else 3, unique=True))
    return {name: draw(values_of(texts) if junk else of_type(keys()[name])) for name in names}


@tried(7)
@given(keys_and_values(junk=False))
def test_a_configuration_survives_yaml_or_is_refused_by_key(tmp_path, given_keys):
    path, again = tmp_path / "given.yaml", tmp_path / "again.yaml"
    path.write_text(yaml.safe_dump(nested(given_keys)))
    parsed, complaint = outcome(lambda: parse(path), UsageError)
    if parsed is None:
        assert any(part in complaint for name in given_keys for part in name.split("."))
        return
    again.write_text(config.to_yaml(parsed))
    assert parse(again) == parsed


@tried(7)
@given(keys_and_values(junk=True))
@example({"task": 5})
@example({"warm_start.answer": "fast"})
def test_a_value_of_any_kind_is_taken_or_refused_by_key(tmp_path, given_keys):
    path, again = tmp_path / "given.yaml", tmp_path / "again.yaml"
    path.write_bytes(yaml.safe_dump(nested(given_keys), allow_unicode=False).encode())
    parsed, complaint = outcome(lambda: parse(path), UsageError)
    if parsed is None:
        assert any(name.split(".")[-1] in complaint for name in given_keys)
        return
    again.write_text(config.to_yaml(parsed))
    assert parse(again) == parsed


@tried(3)
@given(st.sampled_from(sorted(keys())), st.from_regex(r"[a-z_]{3,9}", fullmatch=True))
def test_an_unknown_key_is_named(tmp_path, neighbour, key):
    *groups, _ = neighbour.split(".")
    wrong = ".".join([*groups, key])
    assume(wrong not in keys())
    (tmp_path / "given.yaml").write_text(yaml.safe_dump(nested({wrong: 1})))
    with pytest.raises(UsageError, match=key):
        parse(tmp_path / "given.yaml")


@tried(4)
@example(b"\x80")
@given(st.one_of(st.binary(max_size=60), st.text(max_size=40).map(str.encode), json_values.map(repr).map(str.encode)))
def test_a_file_of_any_bytes_is_a_configuration_or_refused_by_name(tmp_path, content):
    path = tmp_path / "given.yaml"
    path.write_bytes(content)
    parsed, complaint = outcome(lambda: parse(path), UsageError)
    assert parsed is not None or "given.yaml" in complaint


# Files of questions


row_lines = st.dictionaries(
    st.sampled_from(["question", "answer", "rationale", "choices", "context"]), json_values, min_size=1, max_size=4
)


@st.composite
def files(draw) -> tuple[str, bytes]:
    """JSON lines, some of them bent or cut, under any of the names."""
    lines = [json.dumps(each).encode() for each in draw(st.lists(row_lines, max_size=3))]
    content = draw(st.sampled_from([b"\n", b"\r\n"])).join(lines)
    bent = draw(st.sampled_from(["not", "cut", "changed", "binary"]))
    if bent == "cut":
        content = content[: draw(st.integers(0, len(content)))]
    elif bent == "changed" and content:
        place = draw(st.integers(0, len(content) - 1))
        content = content[:place] + draw(st.binary(max_size=2)) + content[place + 1 :]
    elif bent == "binary":
        content = draw(st.binary(max_size=40))
    name = draw(st.sampled_from(["q.jsonl", "q.json", "q.jsonl.gz", "q.parquet"]))
    return name, gzip.compress(content) if name.endswith("gz") and draw(st.booleans()) else content


CHOSEN = FieldsConfig(choices=("choices",))


@tried(150)
@given(files(), st.sampled_from([FieldsConfig(), FieldsConfig(context="context"), CHOSEN]), st.sampled_from(GRADERS))
@example(
    ("q.jsonl", b'{"question": "Which?", "choices": ["\\ud800", "b"], "answer": "B"}'), CHOSEN, "choice"
)  # half a surrogate pair in a choice
def test_a_file_is_questions_or_an_error_that_names_it(tmp_path, file, fields, judge):
    name, content = file
    path = tmp_path / name
    path.write_bytes(content)
    assume((judge == "choice") == bool(fields.choices))
    found, complaint = outcome(lambda: read_own(read_file(path), fields, judge), UsageError)
    if found is None:
        assert name in complaint
        return
    items, counts = found
    assert counts["read"] == len(items) + counts["duplicates_dropped"] > 0
    for item in items:
        assert item.question.strip()
        assert item.answer.strip()
        json.dumps(dataclasses.asdict(item), ensure_ascii=False).encode()  # UTF-8 can hold all of it


# Debates of others, and exports


@tried(150)
@given(json_values | st.lists(st.lists(st.none() | texts, min_size=1, max_size=3), min_size=1, max_size=3))
@example([["half \ud800 of a pair"]])
def test_a_debate_of_others_is_turns_or_refused_by_line(form, told):
    row = Row("debates.jsonl, line 7", 7, {"question": "2 + 3?", "answer": "5", "rounds": told})
    debate, complaint = outcome(lambda: read_debate(row, FieldsConfig(), "rounds", "numeric", "task"), UsageError)
    if debate is None:
        assert "debates.jsonl, line 7" in complaint
        return
    turns = list(turns_of(debate, form, "theirs"))
    spoken = [(r, a, t.strip()) for r, told_then in enumerate(told) for a, t in enumerate(told_then) if t is not None]
    assert [(turn.call.round, turn.call.agent, turn.completion.text) for turn in turns] == spoken
    assert len({turn.key for turn in turns}) == len(turns)
    by_round = {r: tuple(turn.key for turn in turns if turn.call.round == r) for r in range(-1, len(told))}
    assert all(turn.call.parents == by_round[turn.call.round - 1] for turn in turns)
    assert turns == [] or [t.key for t in turns_of(debate, form, "theirs")] == [turn.key for turn in turns]


TURNS = [make_turn(0), make_turn(1, error="gone"), make_turn(1, 1), make_turn(2, text="héé"), make_turn(3, round=1)]


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("exported")
    with TraceStore(directory / "traces.sqlite") as store:
        store.put_question(QUESTION)
        store.record_many(TURNS)
        export_parquet(store, str(directory / "export"))
    return directory / "export"


def damage(path: Path, place: int, bits: int) -> None:
    """Turn these bits of the byte at a place, counted around; with none, cut the file off there."""
    content = bytearray(path.read_bytes())
    place %= len(content)
    if bits:
        content[place] ^= bits
    else:
        del content[max(place, 1) :]  # an empty file is a new store
    path.write_bytes(content)


anywhere, bits = st.integers(0, 10**6), st.just(0) | st.integers(1, 255)


@tried(60)
@given(st.sampled_from(["questions", "segments", "turns", "labels"]), anywhere, bits)
@example("turns", 3174, 128)  # a text that is no UTF-8
def test_a_damaged_export_is_refused_whole_or_brings_what_was_exported(exported, tmp_path_factory, table, place, bits):
    damaged = shutil.copytree(exported, tmp_path_factory.mktemp("damaged") / "export")
    damage(damaged / f"{table}.parquet", place, bits)
    with TraceStore(damaged.parent / "into.sqlite") as store:
        added, complaint = outcome(lambda: merge(store, str(damaged)))
        if added is None:
            assert str(damaged) in complaint
            assert list(store.turns()) == store.questions() == []
            return
        assert added == len(TURNS)
        assert store.verify() == []
        for ours, theirs in zip(store.turns(), sorted(TURNS, key=lambda turn: (turn.key, turn.attempt)), strict=True):
            assert_same(ours, theirs)


# Graders


PIECES = (
    *(
        "The answer is ",
        "the final answer is",
        "#### ",
        "\\boxed{",
        "}",
        "{",
        "Answer: ",
        "A: ",
        "(B)",
        "not ",
        "wait, ",
    ),
    *(
        "\\frac{1}{2}",
        "\\sqrt",
        "^",
        "_",
        "\\text{ cm}",
        "7",
        "-",
        "1,000",
        "0.5",
        "%",
        "$",
        ".",
        "\n",
        " or ",
        "=",
        "B",
    ),
)
soup = st.lists(st.sampled_from(PIECES) | st.text(max_size=5), max_size=8).map("".join)


def ask(judge: str, gold: str) -> Question:
    meta = {"choices": ["seven", "half", "none of them"]} if judge == "choice" else {}
    return Question.make("task", "held_out", "How many apples?", gold, **meta)


@tried(60)
@given(st.sampled_from(GRADERS), soup, st.sampled_from(["7", "\\frac{1}{2}", "B", "x^2+1", "two words"]))
def test_any_text_gets_one_verdict(judge, text, gold):
    question = ask(judge, "B" if judge == "choice" else gold)
    grade = grader(judge)(question, text)
    assert grade.verdict in ("right", "wrong", "unparseable")
    assert (grade.answer == "") == (grade.verdict == "unparseable")


@tried(60)
@given(st.sampled_from(["final_answer", "numeric", "symbolic", "short"]), soup, st.integers(-(10**6), 10**6))
def test_what_stands_before_the_answers_sentence_changes_nothing(judge, before, value):
    question = ask(judge, str(value))
    assert grader(judge)(question, f"{before}\nThe answer is {value}.").verdict == "right"
    assert grader(judge)(question, f"{before}\nThe answer is {value + 1}.").verdict == "wrong"


@tried(60)
@given(st.text(st.characters(exclude_categories=["L", "Cs"]), max_size=40), st.sampled_from("ABC"))
def test_a_letter_in_its_sentence_is_read_after_anything_that_states_none(before, letter):
    assert grader("choice")(ask("choice", letter), f"{before}\nThe answer is ({letter}).").verdict == "right"


spelled = st.one_of(
    st.integers(-99, 99).map(str),
    st.tuples(st.integers(-9, 9), st.integers(1, 9)).map(lambda pair: f"{pair[0]}/{pair[1]}"),
    st.decimals(-9, 9, places=2, allow_nan=False).map(str),
    st.integers(1000, 9999).map(lambda value: f"{value:,}"),
)


@tried(60)
@given(st.sampled_from(["final_answer", "numeric", "symbolic"]), spelled, spelled)
def test_two_numbers_are_equal_whichever_is_gold(judge, one, other):
    rule = grader(judge)
    there, back = rule(ask(judge, other), f"The answer is {one}."), rule(ask(judge, one), f"The answer is {other}.")
    assert there.verdict == back.verdict != "unparseable"
    assert (there.answer == back.answer) == (there.verdict == "right")


# What servers answer


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A model directory whose weights nobody reads."""
    directory = tmp_path_factory.mktemp("model")
    train_tokenizer(["seven and five are twelve, yes or no"], 300, directory)
    scratch = ScratchConfig(hidden_size=16, layers=1, heads=2, head_dim=8, intermediate_size=16, max_positions=64)
    raw = scratch.to_hf(vocabulary=Tokenizer(directory).vocabulary_size, bos_id=2, eos_id=1)
    (directory / "config.json").write_text(json.dumps(raw))
    shape = load_config(directory)
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), param_shapes(shape))
    return save_pretrained(directory, shape, zeros, directory)


REQUEST = Request(np.arange(4, 12, dtype=np.int32), Sampling(1.0, 3, (1,), 5))
SAMPLED = {
    "text": "abc",
    "output_ids": [5, 6, 7],
    "meta_info": {
        "finish_reason": {"type": "length"},
        "prompt_tokens": 8,
        "cached_tokens": 2,
        "weight_version": "v0",
        "input_token_logprobs": None,
        "output_token_logprobs": [[-0.5, 5, None], [-1.5, 6, None], [-0.25, 7, None]],
    },
}
SPOKEN = {
    "choices": [{"text": "yes or no", "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 8, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 2}},
}


def places(value: Any, here: tuple = ()) -> list[tuple]:
    """Where something stands in a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [here, *(place for key, each in inner for place in places(each, (*here, key)))]


def put(value: Any, place: tuple, new: Any) -> Any:
    if not place:
        return new
    copied = dict(value) if isinstance(value, dict) else list(value)
    copied[place[0]] = put(copied[place[0]], place[1:], new)
    return copied


@st.composite
def answers(draw, right: dict[str, Any]) -> tuple[int, bytes]:
    """A right answer, bent in up to two places, cut off, or anything else."""
    value = right
    for _ in range(draw(st.integers(0, 2))):
        value = put(value, draw(st.sampled_from(places(value))), draw(json_values))
    content = json.dumps(value).encode()
    kind = draw(st.sampled_from(["whole", "whole", "whole", "cut", "bytes", "deep"]))
    if kind == "cut":
        content = content[: draw(st.integers(0, len(content)))]
    elif kind == "bytes":
        content = draw(st.binary(max_size=30))
    elif kind == "deep":
        content = b"[" * 100_000
    return draw(st.sampled_from([200, 200, 200, 200, 204, 302, 400, 401, 404, 429, 500])), content


class Wired(http.Servers):
    """Servers that are asked nothing: `table` has what they answer, by path."""

    table: dict[str, tuple[int, bytes]]

    async def _exchange(self, server, method, path, body=None):
        status, content = self.table[path]
        if status in (401, 403):
            raise UsageError(f"{server.url} refuses the token")
        return status, content


def asked(engine, table, monkeypatch):
    monkeypatch.setattr(http, "_PAUSE", 0.0)
    engine._servers.__class__ = Wired
    engine._servers.table = {path: each if isinstance(each, tuple) else (200, each) for path, each in table.items()}

    async def ask():
        async with engine:
            return await engine.generate(REQUEST)

    return asyncio.run(ask())


def sglang(model: Path, monkeypatch, **changed) -> Any:
    tokenizer = Tokenizer(model)
    table = {
        "/model_info": {"model_path": "elsewhere", "weight_version": "v0"},
        "/workers": {"workers": [{"url": "http://nowhere", "is_healthy": True}]},
        "/server_info": {"dtype": "float32"},
        "/tokenize": {"tokens": list(tokenizer.encode(http.PROBE))},
        "/generate": SAMPLED,
        "/update_weights_from_disk": {"success": True},
    }
    given_answers = {path: json.dumps(each).encode() for path, each in table.items()} | changed
    settings = EngineConfig(servers=["http://nowhere"], attempts=2, timeout=0.1)
    return asked(SGLangEngine(settings, model, tokenizer, model="m", weights="v0"), given_answers, monkeypatch)


def openai(model: Path, monkeypatch, **changed) -> Any:
    table = {"/models": {"data": [{"id": "m", "max_model_len": 64}]}, "/completions": SPOKEN}
    given_answers = {path: json.dumps(each).encode() for path, each in table.items()} | changed
    settings = EngineConfig(servers=["http://nowhere"], attempts=2, timeout=0.1)
    return asked(OpenAIEngine(settings, Tokenizer(model), context=64, model="m"), given_answers, monkeypatch)


def check_completion(found, vocabulary: int) -> None:
    assert 0 < len(found.ids) <= 3
    assert found.ids.dtype == np.int32
    assert 0 <= found.ids.min() <= found.ids.max() < vocabulary
    assert found.finish in ("stop", "length")
    assert 0 <= found.cached_tokens <= found.prompt_tokens
    found.text.encode()
    if found.logprobs is not None:
        assert found.logprobs.dtype == np.float32
        assert found.logprobs.shape == found.ids.shape
        assert np.all(np.isfinite(found.logprobs) & (found.logprobs <= 1e-3))
        assert found.prompt_tokens == len(REQUEST.prompt_ids)


def check_completion_or_error(found, complaint, vocabulary: int) -> None:
    if found is None:
        assert "http://nowhere" in complaint
    else:
        check_completion(found, vocabulary)


def bent(right: dict[str, Any], *place: Any, to: Any) -> tuple[int, bytes]:
    return 200, json.dumps(put(right, place, to)).encode()


@tried(150)
@given(answers(SAMPLED))
@example((200, b"[" * 100_000))
@example(bent(SAMPLED, "meta_info", "prompt_tokens", to=math.inf))
@example(bent(SAMPLED, "meta_info", "finish_reason", to="stop"))
@example(bent(SAMPLED, "meta_info", "output_token_logprobs", 0, 0, to=-(10**400)))
@example(bent(SAMPLED, "meta_info", "output_token_logprobs", 0, 0, to=-1e300))
def test_whatever_an_sglang_server_answers_is_a_completion_or_an_error(model, monkeypatch, answer):
    found, complaint = outcome(lambda: sglang(model, monkeypatch, **{"/generate": answer}))
    check_completion_or_error(found, complaint, load_config(model).vocab_size)


@tried(100)
@given(answers(SPOKEN))
@example(bent(SPOKEN, "usage", "completion_tokens", to=math.inf))
@example(bent(SPOKEN, "choices", 0, "finish_reason", to=["stop"]))
def test_whatever_an_openai_endpoint_answers_is_a_completion_or_an_error(model, monkeypatch, answer):
    found, complaint = outcome(lambda: openai(model, monkeypatch, **{"/completions": answer}))
    check_completion_or_error(found, complaint, Tokenizer(model).vocabulary_size)


@tried(100)
@given(st.data())
def test_a_server_that_tells_anything_of_itself_is_admitted_or_refused_by_address(model, monkeypatch, data):
    routes = {
        "/model_info": {"model_path": "elsewhere", "weight_version": "v0"},
        "/server_info": {"dtype": "float32", "context_length": 64, "max_total_num_tokens": 1000},
        "/tokenize": {"tokens": list(Tokenizer(model).encode(http.PROBE))},
        "/update_weights_from_disk": {"success": True, "message": ""},
        "/models": {"data": [{"id": "m", "max_model_len": 64}]},
    }
    path = data.draw(st.sampled_from(sorted(routes)))
    use = openai if path == "/models" else sglang
    answer = data.draw(answers(routes[path]))
    found, complaint = outcome(lambda: use(model, monkeypatch, **{path: answer}))
    if found is None:
        assert "http://nowhere" in complaint or "exceed" in complaint  # it told of a small context
        return
    check_completion(found, load_config(model).vocab_size)


# Stores


batches = st.lists(
    st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=1, max_size=3), min_size=1, max_size=5
)


def written(store: TraceStore, wanted: list[list[tuple[int, bool]]]) -> list[list]:
    """Each batch as turns that the store did not have, with the attempts that come next."""
    made, attempts, answered = [], Counter(), set()
    for batch in wanted:
        turns = []
        for agent, fails in batch:
            if agent not in answered:
                turns.append(make_turn(agent, attempts[agent], error="gone" if fails else None))
                attempts[agent] += 1
                answered |= set() if fails else {agent}
        made.append(turns)
    return made


@tried(40)
@given(batches, st.data())
def test_of_a_killed_store_what_was_committed_is_there_once(tmp_path_factory, wanted, data):
    """A kill leaves the file and its write-ahead log, of which a power cut may lose any end."""
    directory = tmp_path_factory.mktemp("killed")
    path, killed = directory / "traces.sqlite", directory / "killed.sqlite"
    with TraceStore(path) as store:
        store.put_question(QUESTION)
        made = written(store, wanted)
        for turns in made:
            store.record_many(turns)
        log = Path(f"{path}-wal").read_bytes()
        shutil.copy(path, killed)
    end = data.draw(st.integers(0, len(log)) | st.just(len(log)))
    Path(f"{killed}-wal").write_bytes(log[:end])
    with TraceStore(killed) as store:
        assert store.verify() == []
        found = {(turn.key, turn.attempt) for turn in store.turns()}
        prefixes = [{(turn.key, turn.attempt) for turns in made[:n] for turn in turns} for n in range(len(made) + 1)]
        assert found in prefixes, "whole transactions, in their order"
        assert end < len(log) or found == prefixes[-1]
        store.put_question(QUESTION)
        for turns in made:
            store.record_many(turns)
        assert store.verify() == []
        every = sorted(itertools.chain(*made), key=lambda turn: (turn.key, turn.attempt))
        for ours, theirs in zip(store.turns(), every, strict=True):
            assert_same(ours, theirs)


@tried(60)
@given(anywhere, bits)
def test_a_store_that_was_cut_off_or_changed_anywhere_never_passes_for_whole(tmp_path_factory, place, bits):
    path = tmp_path_factory.mktemp("damaged") / "traces.sqlite"
    with TraceStore(path) as store:
        store.put_question(QUESTION)
        store.record_many(TURNS)
    damage(path, place, bits)

    def read():
        with TraceStore(path, read_only=True) as store:
            return list(store.turns()), store.questions(), store.verify()

    told, complaint = outcome(read)
    if told is None:
        assert "traces.sqlite" in complaint
        return
    found, questions, problems = told
    if problems:
        return
    assert questions == [QUESTION]
    for ours, theirs in zip(found, sorted(TURNS, key=lambda turn: (turn.key, turn.attempt)), strict=True):
        assert_same(ours, theirs)


# Packing and masks


@st.composite
def sequences(draw) -> list:
    examples = []
    for number in range(draw(st.integers(1, 9))):
        prompt = draw(st.lists(st.integers(1, 99), max_size=5))
        completion = draw(st.lists(st.integers(1, 99), min_size=1, max_size=6))
        assume(prompt or len(completion) > 1)  # what nothing stands before cannot be learned
        cut = draw(st.integers(0, len(prompt)))
        question = f"q{draw(st.integers(0, 3))}"
        made = completion_example(
            (tuple(prompt[:cut]), tuple(prompt[cut:])), completion, question_id=question, variant=str(number)
        )
        if draw(st.booleans()):
            made = dataclasses.replace(made, weights={"other": made.weights["completion"] * 0.5})
        examples.append(made)
    return examples


@tried(60)
@given(sequences(), st.integers(11, 24), st.integers(1, 3), st.integers(1, 2), st.integers(0, 9), st.booleans())
def test_every_token_is_in_a_row_once_with_its_weight(examples, row_length, rows, epochs, seed, grouped):
    rows = rows * 2
    try:
        data = packed_batches(
            examples, seed=seed, epochs=epochs, rows=rows, row_length=row_length, together=rows if grouped else None
        )
    except UsageError:
        assert grouped, "only a group can be too large for its rows"
        return
    found: Counter = Counter()
    totals: Counter = Counter()
    for step in range(len(data)):
        batch = data.batch(step)
        halves = [data.batch(step, range(start, rows, 2)) for start in range(2)]  # as two hosts read them
        for name in ("ids", "positions", "segment_ids"):
            together = np.empty_like(batch[name])
            together[0::2], together[1::2] = halves[0][name], halves[1][name]
            np.testing.assert_array_equal(together, batch[name])
        for row in range(rows):
            ids, positions, segments = (batch[name][row] for name in ("ids", "positions", "segment_ids"))
            count = int(segments.max())
            assert np.all(np.diff(np.flatnonzero(segments)) == 1), "padding is at the end alone"
            for segment in range(1, count + 1):
                here = np.flatnonzero(segments == segment)
                np.testing.assert_array_equal(positions[here], np.arange(len(here)))
                weights = {term: batch["weights"][term][row][here] for term in data.terms}
                assert all(values[0] == 0 for values in weights.values())
                found[tuple(ids[here]), *(tuple(weights[term]) for term in data.terms)] += 1
                totals.update({term: float(values.sum()) for term, values in weights.items()})
            assert all(not batch["weights"][term][row][segments == 0].any() for term in data.terms)
    expected: Counter = Counter()
    for each in examples:
        zeros = np.zeros(len(each.ids), np.float32)
        weights = [np.concatenate([[0], each.weights.get(term, zeros)[1:]]) for term in data.terms]
        expected[tuple(each.ids), *(tuple(values) for values in weights)] += epochs
    assert found == expected
    for term in data.terms:
        assert totals[term] == epochs * sum(
            float(each.weights[term][1:].sum()) for each in examples if term in each.weights
        )


@tried(60)
@given(st.lists(st.lists(st.integers(0, 9), max_size=4), max_size=4), st.lists(st.integers(0, 9), max_size=5))
def test_a_completion_alone_has_loss_and_all_of_it(segments, completion):
    prompt = tuple(map(tuple, segments))
    if not completion:
        with pytest.raises(AgentArkError, match="question q"):
            completion_example(prompt, completion, question_id="q", variant="v")
        return
    made = completion_example(prompt, completion, question_id="q", variant="v")
    before = sum(map(len, prompt))
    assert made.ids.tolist() == [*itertools.chain(*prompt), *completion]
    assert made.weights["completion"].tolist() == [0.0] * before + [1.0] * len(completion)


# Selection


@st.composite
def labelled(draw) -> list:
    """Turns of debates, some of them summarised, with gaps."""
    seed, rounds = draw(st.integers(0, 10**6)), draw(st.integers(1, 3))
    rng = random.Random(seed)
    rows = []
    for question, agent, round in itertools.product(range(draw(st.integers(1, 8))), range(3), range(rounds)):
        if rng.random() > 0.1:
            verdict = rng.choice(VERDICTS)
            ids = [rng.randrange(4) for _ in range(rng.randint(1, 9))]
            finish = rng.choice(["stop"] * 4 + ["length"])
            parents = tuple(f"q{question}.{round - 1}.{other}.0" for other in range(3)) if round else ()
            row = make_row(f"q{question}", agent, round, verdict, ids, finish, answer=rng.choice("23"))
            rows.append(dataclasses.replace(row, parents=parents))
    keys = {row.key for row in rows}
    return [dataclasses.replace(row, parents=tuple(key for key in row.parents if key in keys)) for row in rows]


@tried(60)
@given(
    labelled(),
    st.sampled_from(sorted({*get_args(Variant)} - {"summary"})),
    st.integers(1, 3) | st.none(),
    st.integers(1, 9) | st.none(),
)
def test_whatever_the_variant_a_selection_is_within_its_bounds_and_depends_on_no_order(rows, variant, each, limit):
    wanted = SelectionConfig(variant, per_question=each, limit=limit, seed=3)
    selection = select(rows, wanted, said(rows))
    shuffled = random.Random(1).sample(rows, len(rows))
    assert values(select(shuffled, wanted, said(rows))) == values(selection)
    by_key = {row.key: row for row in rows}
    chosen = [trajectory.turn_key for trajectory in selection.trajectories]
    assert len(set(chosen)) == len(chosen)
    assert set(chosen) <= set(by_key)
    assert limit is None or len(chosen) <= limit
    most = max(Counter(by_key[key].question_id for key in chosen).values(), default=0)
    assert wanted.taken is None or most <= wanted.taken
    left = len(rows)
    for step in selection.funnel:
        assert step.kept + step.dropped == left
        left = step.kept
    assert left == len(chosen)
    for key in chosen:
        assert by_key[key].finish == "stop"
        assert variant in ("consensus_only", "majority", "random") or by_key[key].verdict == "right"
        assert by_key[key].verdict != "unparseable"


@tried(60)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=40), st.floats(0.01, 1), st.floats(0.01, 1), st.integers(0, 9))
def test_a_smaller_share_lies_within_a_larger(lengths, one, other, seed):
    selection = make_selection(lengths)
    small, large = (subset(selection, share, seed) for share in sorted((one, other)))
    assert {t.turn_key for t in small.trajectories} <= {t.turn_key for t in large.trajectories}
    assert values(subset(selection, 1.0, seed))[1] == values(selection)[1]
    assert small.trajectories


@tried(60)
@given(st.data())
def test_samples_never_cost_more_than_what_they_are_compared_with(data):
    rng = random.Random(data.draw(st.integers(0, 10**6)))
    count = data.draw(st.integers(1, 5))
    debates = [make_row(f"q{q}", a, ids=[1] * rng.randint(1, 9)) for q in range(count) for a in range(2)]
    samples = [make_row(f"q{q}", 0, ids=[1] * rng.randint(1, 9), sample=s) for q in range(count) for s in range(4)]
    kept = within_budget(samples, debates)
    assert {row.key for row in kept} == {row.key for row in within_budget(rng.sample(samples, len(samples)), debates)}
    assert {row.key for row in kept} <= {row.key for row in samples}
    for question in {row.question_id for row in samples}:
        spent, paid = (sum(row.tokens for row in rows if row.question_id == question) for rows in (kept, debates))
        assert spent <= paid


@tried(40)
@given(
    st.lists(st.integers(1, 40), min_size=8, max_size=60),
    st.lists(st.integers(1, 40), min_size=8, max_size=60),
)
def test_what_is_matched_is_alike_or_refused(one, other):
    arms = {"student": make_selection(one, name="s"), "control": make_selection(other, name="c", variant="round1_only")}
    found, complaint = outcome(lambda: match(arms, seed=0))
    if found is None:
        assert "student" in complaint
        return
    counts = [Counter(t.question_id for t in arm.trajectories) for arm in found.selections.values()]
    assert counts[0] == counts[1]
    assert len(counts[0]) == found.questions
    tokens = [arm.tokens for arm in found.selections.values()]
    assert max(tokens) <= (1 + MATCH_TOLERANCE) * min(tokens)
    assert all(likeness.alike for likeness in found.lengths.values())
    for name, arm in found.selections.items():
        assert {t.turn_key for t in arm.trajectories} <= {t.turn_key for t in arms[name].trajectories}
