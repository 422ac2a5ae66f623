"""The fine-tuning benchmarks: their lengths, packing and arithmetic by hand, and that sides do the same work."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from agentark_jax.data.packing import packing_plan
from agentark_jax.data.render import PlainFormat
from agentark_jax.data.tokenizer import Tokenizer, train_tokenizer
from agentark_jax.errors import AgentArkError, UsageError
from agentark_jax.models import published
from agentark_jax.models.config import Lora, ModelConfig, load_config
from agentark_jax.models.flops import sft_flops
from agentark_jax.models.transformer import init_params, param_shapes
from agentark_jax.models.weights import load_params, save_pretrained
from agentark_jax.tasks.rows import read_file
from agentark_jax.traces.foreign import read_debate, turns_of
from agentark_jax.traces.store import TraceStore
from benchmarks import peers, sft, sft_epoch, sft_inputs, sft_memory, sft_ours, trace_lengths
from benchmarks.models import random_model
from benchmarks.workers import Side, Worker

VOCABULARY, HIDDEN, INNER = 64, 16, 24
GEMMA = {
    "model_type": "gemma3_text",
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "query_pre_attn_scalar": 8,
    "rms_norm_eps": 1e-6,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 128,
    "sliding_window": 12,
    "layer_types": ["sliding_attention"],
    "rope_parameters": {
        "full_attention": {"rope_type": "default", "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    },
    "attention_bias": False,
    "attention_dropout": 0.0,
    "tie_word_embeddings": True,
}
CONFIG = ModelConfig.from_hf(GEMMA, "test")
PAIRS = [(5, 12), (4, 21), (3, 9), (9, 3)]
CASE = sft.Case("tiny", "Tiny", "short", len(PAIRS), 2, ((sft.OURS,),), trl=(2, False))


def test_committed_lengths_are_those_of_real_traces():
    for kind in ("short", "long"):
        pairs = trace_lengths.lengths(kind)
        assert len(pairs) == trace_lengths.MOST
        assert all(prompt > 0 and completion > 0 for prompt, completion in pairs)
        drawn = sft_inputs.draw(kind, 20)
        assert drawn == sft_inputs.draw(kind, 40)[:20]
        assert set(drawn) <= set(pairs)
    with pytest.raises(UsageError, match="300 short traces, not 301"):
        sft_inputs.draw("short", 301)


def test_lengths_are_counted_as_a_student_sees_the_traces(tmp_path: Path):
    texts = ["What is two and two?", "It is four, as everybody knows.", "Three!", "Four after all."]
    model = tmp_path / "model"
    model.mkdir()
    train_tokenizer(texts, 300, model)
    (model / "config.json").write_text(json.dumps({**GEMMA, "vocab_size": Tokenizer(model).vocabulary_size}))
    row = {"question": texts[0], "answer_idx": "B", "options": {"A": "3", "B": "4", "C": "5", "D": "6"}}
    file = tmp_path / "debates.jsonl"
    file.write_text(json.dumps({**row, "raw_responses": [texts[1:3], [texts[3], texts[1]]]}) + "\n")
    form = PlainFormat(Tokenizer(model))
    (debate,) = (
        read_debate(each, trace_lengths.COLUMNS, trace_lengths.ROUNDS, "choice", "t") for each in read_file(file)
    )
    store = tmp_path / "run" / "traces.sqlite"
    store.parent.mkdir()
    with TraceStore(store) as opened:
        opened.put_question(debate.question)
        opened.record_many(list(turns_of(debate, form, "someone"))[:1])
    out = tmp_path / "lengths.json"
    arguments = ["--store", str(store), "--debates", str(file), "--model", str(model), "--out", str(out)]
    assert trace_lengths.main(arguments) == 0
    prompt = sum(map(len, form.question(debate.question)))
    answers = [len(form.tokenizer.encode(text)) + 1 for text in (texts[1], texts[2], texts[3], texts[1])]
    assert trace_lengths.lengths("short", out) == [(prompt, answers[0])]
    assert sorted(trace_lengths.lengths("long", out)) == sorted((prompt, answer) for answer in answers)
    written = json.loads(out.read_text())
    assert written["short"]["source"] == "run/traces.sqlite"
    assert len(written["long"]["sha256"]) == 64
    assert texts[1] not in out.read_text()


@pytest.mark.parametrize(("tokens", "rows"), [([17, 25, 40, 12, 33, 61, 8], 3), ([50, 50, 50], 2), ([61, 8], 1)])
def test_rows_are_as_short_as_packing_allows(tokens: list[int], rows: int):
    length = sft_inputs.packed_length(tokens, rows)

    def needed(row_length: int) -> int:
        return len(packing_plan(tokens, seed=0, epoch=0, row_length=row_length))

    assert length % 16 == 0
    assert needed(length) <= rows
    assert length - 16 < max(tokens) or needed(length - 16) > rows
    both = sft_inputs.packed_length(tokens, rows, epochs=2)
    assert len(packing_plan(tokens, seed=0, epoch=1, row_length=both)) <= rows


def test_the_floor_of_a_step_by_hand():
    able = {"rates": {"trunk": 2e9, "head": 4e9}, "bandwidth": 1e9}
    assert sft.floor_seconds({"trunk": 6e9, "attention": 2e9, "head": 8e9, "bytes": 5e8}, able) == 4 + 2 + 0.5
    norms = 5 * HIDDEN + 2 * 8
    layer = HIDDEN * (2 * 16 + 2 * 8) + 3 * HIDDEN * INNER
    everything = VOCABULARY * HIDDEN + layer + norms
    lora = sft.Case("l", "L", "short", 4, 2, ((sft.OURS,),), trl=(2, False), lora=Lora(3, 6.0, ("q_proj", "o_proj")))
    adapters = 3 * 2 * (HIDDEN + 16)
    for case, side, trained, settings in (
        (CASE, sft.OURS, everything, {"train_head": True}),
        (CASE, sft.TRL, everything, {"train_head": True}),
        (CASE, sft.FROZEN, everything - VOCABULARY * HIDDEN, {"train_head": False}),
        (lora, sft.OURS, adapters, {"train_head": False, "train_layers": False}),
    ):
        expected = sft_flops(CONFIG, lengths=[17, 25, 12, 12], loss_tokens=45, **settings)
        assert sft.work(case, CONFIG, PAIRS, side) == {**expected, "bytes": 28 * trained}


def test_sides_that_disagree_have_no_speed():
    good = {"a": {"loss": 2.0, "loss_tokens": 8}, "b": {"loss": 2.0001, "loss_tokens": 8}}
    assert sft.compare_losses(good, 8).value == pytest.approx(5e-5, rel=1e-3)
    for reply in (
        {"loss": 2.001, "loss_tokens": 8},
        {"loss": 2.0, "loss_tokens": 9},
        {"loss": np.nan, "loss_tokens": 8},
    ):
        with pytest.raises(AgentArkError, match="do not compute the same step"):
            sft.compare_losses({**good, "b": reply}, 8)
    assert sft_epoch.compare_epochs({**good, "b": {"loss": 2.03, "loss_tokens": 8}}).value == pytest.approx(0.03 / 2.03)
    for reply in ({"loss": 2.1, "loss_tokens": 8}, {"loss": 2.0, "loss_tokens": 9}, {"loss": np.nan, "loss_tokens": 8}):
        with pytest.raises(AgentArkError, match="do not train on the same"):
            sft_epoch.compare_epochs({**good, "b": reply})


def test_later_losses_are_compared_without_the_frozen_side():
    def losses(*values: float) -> list[dict]:
        return [{"loss": value} for value in values]

    group = {"machine": losses(0, 0), sft.OURS: losses(5, 2), sft.FROZEN: losses(5, 9), sft.TRL: losses(5, 1)}
    assert sft.later_difference([group]) == pytest.approx(0.5)
    assert sft.later_difference([{sft.OURS: losses(5, 2)}]) == 0
    with pytest.raises(AgentArkError, match="not finite"):
        sft.later_difference([{**group, sft.TRL: losses(5, np.nan)}])


def test_what_ran_apart_is_compared_all_the_same():
    ours, theirs, padded = {sft.OURS: [1]}, {sft.TRL: [2]}, {sft.PADDED: [3]}
    assert sft.paired([ours, theirs]) == [{**ours, **theirs}]
    assert sft.paired([{**ours, **theirs}, padded]) == [{**ours, **theirs}, padded]


def test_memory_is_compared_without_the_state_and_in_total():
    sizes = sft_memory.Sizes(4, 512)
    replies = {
        sft.OURS: {"peak_rss_gb_of_steps": [9.0, 2.0, 3.0], "parameters": 10**8},
        sft.TRL: {"peak_rss_gb_of_steps": [9.0, 5.6, 4.0]},
        sft.TUNIX: {"peak_rss_gb_of_steps": [9.0, 6.0, 5.0]},
    }
    measured, (beyond, total) = sft_memory.quantities(sizes, replies)
    assert [entry.value.values for entry in measured] == [
        pytest.approx(values) for values in ([0.4, 1.4], [4.0, 2.4], [2.0, 3.0], [6.0, 5.0])
    ]
    assert (beyond.value.median, beyond.goal) == (pytest.approx(1.4 / 4.0), 0.5)
    assert (total.value.median, total.goal) == (0.5, 0.6)
    measured, ratios = sft_memory.quantities(sizes, {sft.OURS: replies[sft.OURS]})
    assert (len(measured), ratios) == (2, [])


def make_model(directory: Path, **changes: object) -> Path:
    """A Gemma 3 with large random weights, so that what is masked wrongly shows, and with a tokenizer."""
    source = directory / "source"
    source.mkdir()
    train_tokenizer(["some words, so that there is a tokenizer"], 60, source)
    (source / "config.json").write_text(json.dumps({**GEMMA, **changes}))
    config = load_config(source)
    params = jax.tree.map(lambda leaf: leaf * 20, init_params(config, 0))
    return save_pretrained(directory / "tiny", config, params, source)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models"))


def losses(side: Side, steps: int = 2) -> list[dict]:
    repeat, _ = sft_ours.build(side.setup)
    return [repeat(index) for index in range(steps)]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sft_inputs, "lengths", lambda kind: PAIRS)


def test_packed_and_padded_are_the_same_step(tiny: Path, drawn: None):
    sides = sft.sides_of(
        sft.Case("t", "T", "short", 4, 2, ((sft.OURS, sft.TRL), (sft.PADDED,)), trl=(2, False)),
        CONFIG,
        PAIRS,
        tiny,
        tiny,
        peers=False,
    )
    assert set(sides) == {sft.OURS, sft.PADDED}
    assert (sides[sft.OURS].setup["rows"], sides[sft.PADDED].setup["rows"]) == (2, 4)
    ours, padded = (losses(sides[side]) for side in (sft.OURS, sft.PADDED))
    assert sft.compare_losses({"a": ours[0], "b": padded[0]}, 45).value < 1e-5
    assert ours[1]["loss"] == pytest.approx(padded[1]["loss"], rel=1e-4)  # the optimizer did the same
    assert ours[1]["loss"] != pytest.approx(ours[0]["loss"], rel=1e-4)


@pytest.mark.slow
def test_each_step_has_a_peak_of_its_own(tiny: Path):
    side = sft_memory.side_of(sft.OURS, sft_memory.Sizes(2, 12, 2), tiny, VOCABULARY)
    with Worker(side) as worker:
        reply = worker.repeat(0)
    assert len(reply["losses"]) == len(reply["peak_rss_gb_of_steps"]) == 2
    assert reply["loss_tokens"] == 12
    assert min(reply["peak_rss_gb_of_steps"]) > 0.05
    assert reply["parameters"] == sum(leaf.size for leaf in jax.tree.leaves(param_shapes(CONFIG)))


@pytest.mark.slow
def test_an_epoch_is_the_second_of_a_fit(tiny: Path):
    traces = sft_inputs.random_traces(PAIRS, VOCABULARY, 0)
    setup = {**sft_inputs.TRAINING, "side": "epoch", "model": str(tiny), "steps": [traces], "rows": 1}
    repeat, _ = sft_ours.build({**setup, "row_length": sft_inputs.packed_length([17, 25, 12, 12], 2, epochs=2)})
    reply = repeat(0)
    assert reply["loss_tokens"] == 45
    assert reply["seconds"] > 0
    assert reply["loss"] == pytest.approx(losses_of_first_epoch(tiny, traces), rel=1e-2)


def losses_of_first_epoch(model: Path, traces: list) -> float:
    """About what they are when nothing is learned: the mean of steps of one row each, at the first weights."""
    setup = {**sft_inputs.TRAINING, "side": "training", "model": str(model), "lora": None, "steps": [traces]}
    tokens = [len(ids) for _, ids in traces]
    length = sft_inputs.packed_length(tokens, 2, epochs=2)
    plan = packing_plan(tokens, seed=0, epoch=0, row_length=length)
    rows = [sft_ours.build({**setup, "plan": [row], "rows": 1, "row_length": length})[0](0)["loss"] for row in plan]
    return float(np.mean(rows))


def test_random_models_are_made_once_and_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("benchmarks.models.PUBLISHED", {"org/tiny": GEMMA})
    directory = random_model("org/tiny", tmp_path)
    assert directory.parent.parent == tmp_path
    weights = load_params(directory, load_config(directory))
    expected = init_params(CONFIG, 0)
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a == b).all()), weights, expected)))
    changed = (directory / "config.json").stat().st_mtime_ns
    assert random_model("org/tiny", tmp_path) == directory
    assert (directory / "config.json").stat().st_mtime_ns == changed
    with pytest.raises(UsageError, match=r"no published shape 'org/none'.*org/tiny"):
        random_model("org/none", tmp_path)


def test_every_case_has_a_published_model_and_goals_where_they_belong():
    assert {case.model for case in sft.CASES} - {None} <= set(published.PUBLISHED)
    assert len({case.name for case in sft.CASES}) == len(sft.CASES)
    (headline,) = (case for case in sft.CASES if any(case.goals.values()))
    assert (headline.name, headline.goals, headline.floor_goal) == (
        "full_long",
        {sft.TRL: 1.4, sft.TUNIX: 2.0},
        {sft.OURS: 0.7},
    )


@pytest.mark.slow
def test_peers_do_the_same_steps(tmp_path: Path, drawn: None):
    try:
        for peer in sft.PEERS.values():
            peers.python(peer)
    except UsageError as error:
        pytest.skip(str(error))
    layers = [*["sliding_attention"] * 5, "full_attention", "sliding_attention"]
    model = make_model(tmp_path, num_hidden_layers=len(layers), layer_types=layers)
    groups = ((sft.OURS, sft.TRL, sft.TUNIX),)
    for case in (
        sft.Case("a", "A", "short", 4, 2, groups, trl=(2, False), tunix=2, repetitions=1),
        sft.Case("b", "B", "short", 4, 2, groups, trl=(4, True), tunix=4, repetitions=1),
        sft.Case("c", "C", "short", 4, 2, ((sft.OURS, sft.TRL),), trl=(4, True), lora=Lora(2, 4.0), repetitions=1),
    ):
        found = sft.measure(case, model, "tiny", tokenizer=model, quick=False, peers=True, say=print)
        first, later = found.checks
        assert first.value < sft.LOSS_LIMIT
        assert later.value < 1e-3
        assert {ratio.over for ratio in found.ratios} == {side for side in case.groups[0] if side in sft.PEERS}
