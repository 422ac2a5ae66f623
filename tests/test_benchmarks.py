"""The benchmarks' arithmetic against independent counts, the schema of their results, and the process harness."""

import json
import os
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from agentark_jax.data.tokenizer import Tokenizer, train_tokenizer
from agentark_jax.errors import AgentArkError, UsageError
from agentark_jax.models import flops
from agentark_jax.models.config import ModelConfig, load_config
from agentark_jax.models.transformer import param_shapes
from agentark_jax.models.weights import load_params, save_pretrained
from agentark_jax.tasks.config import TaskConfig
from agentark_jax.tasks.word_problems import WordProblems
from benchmarks import compile_time, dry_runs, engine_client, generation, peers, results, run
from benchmarks.inputs import prompts
from benchmarks.workers import ROOT, Side, Worker, interleaved

VOCABULARY, WINDOW, BATCH, LENGTH = 97, 5, 2, 12
GEMMA = {
    "model_type": "gemma3_text",
    "vocab_size": VOCABULARY,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "query_pre_attn_scalar": 6,
    "rms_norm_eps": 1e-6,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 64,
    "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "rope_parameters": {
        "full_attention": {"rope_type": "default", "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    },
    "attention_bias": False,
    "attention_dropout": 0.0,
    "tie_word_embeddings": True,
}
CONFIG = ModelConfig.from_hf(GEMMA, "test")


@pytest.fixture(scope="module")
def peer():
    """The same model in transformers, with attention as plain matrix products that torch can count."""
    pytest.importorskip("torch", reason="torch is not installed (extra `test`)")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra `test`)")
        config = transformers.Gemma3TextConfig(**{key: value for key, value in GEMMA.items() if key != "model_type"})
        return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").train()


def random_ids() -> np.ndarray:
    return np.random.default_rng(0).integers(0, VOCABULARY, (BATCH, LENGTH))


def torch_counts(work) -> SimpleNamespace:
    """FLOPs that torch counts while `work` runs: `mm` for weights, `bmm` for attention."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with FlopCounterMode(display=False) as counter:
            work()
    counted = counter.get_flop_counts()["Global"]
    return SimpleNamespace(mm=counted[torch.ops.aten.mm], bmm=counted[torch.ops.aten.bmm])


def loss_at(peer, positions: slice):
    """A loss on some positions of every row, as the peer with its head on loss tokens computes it."""
    import torch

    ids = torch.from_numpy(random_ids()).long()
    hidden = peer.model(input_ids=ids, use_cache=False).last_hidden_state[:, positions]
    return torch.nn.functional.cross_entropy(peer.lm_head(hidden.flatten(0, 1)), ids[:, positions].flatten())


@pytest.mark.parametrize("loss_tokens_per_row", [LENGTH, 7])
def test_training_flops_are_those_torch_counts(peer, loss_tokens_per_row):
    counted = torch_counts(lambda: loss_at(peer, slice(0, loss_tokens_per_row)).backward())
    ours = flops.sft_flops(CONFIG, lengths=[LENGTH] * BATCH, loss_tokens=BATCH * loss_tokens_per_row, train_head=True)
    assert ours["trunk"] + ours["head"] == counted.mm
    # Torch multiplies all pairs of positions; counted are those that the masks allow.
    allowed = brute_force_pairs(LENGTH)
    assert ours["attention"] * LENGTH**2 * CONFIG.num_layers == counted.bmm * allowed


@pytest.mark.parametrize(("part", "setting"), [("lm_head", "train_head"), ("model.layers", "train_layers")])
def test_a_part_that_is_not_trained_saves_its_own_gradient(peer, part, setting):
    frozen = peer.get_submodule(part).requires_grad_(False)
    try:
        counted = torch_counts(lambda: loss_at(peer, slice(0, 7)).backward())
    finally:
        frozen.requires_grad_(True)
    trained = {"train_head": True, setting: False}
    ours = flops.sft_flops(CONFIG, lengths=[LENGTH] * BATCH, loss_tokens=7 * BATCH, **trained)
    assert ours["trunk"] + ours["head"] == counted.mm


def test_forward_flops_are_those_torch_counts(peer):
    import torch

    ids = torch.from_numpy(random_ids()).long()
    with torch.no_grad():
        counted = torch_counts(lambda: peer(input_ids=ids, use_cache=False))
    lengths, new_tokens = [5, 9, 1], 3
    steps = generation.schedule(lengths, [new_tokens] * 3, 3)
    total = generation.decoding(CONFIG, steps, flops.prefill_flops(CONFIG, lengths))
    forward_tokens = sum(length - 1 + new_tokens for length in lengths)  # the last token drawn is never read
    per_token = counted.mm // (BATCH * LENGTH)
    assert total["trunk"] + total["head"] == per_token * forward_tokens - 2 * VOCABULARY * CONFIG.hidden_size * sum(
        length - 1 for length in lengths
    )
    pairs = sum(brute_force_pairs(length - 1 + new_tokens) for length in lengths)
    assert total["attention"] == 4 * CONFIG.num_heads * CONFIG.head_dim * pairs


def brute_force_pairs(length: int) -> int:
    """Pairs (query, key) over all layers, counted in masks."""
    query, key = np.mgrid[:length, :length]
    full = key <= query
    sliding = full & (query - key < WINDOW)
    return int(full.sum() + 2 * sliding.sum())


def test_decode_bytes_are_weights_and_the_attended_cache(peer):
    weights = [weight for name, weight in peer.named_parameters() if "norm" not in name]
    positions = [0, 3, 11]
    cached = sum((position + 1) + 2 * min(position + 1, WINDOW) for position in positions)
    numbers = sum(weight.numel() for weight in weights) + cached * 2 * CONFIG.num_kv_heads * CONFIG.head_dim
    assert flops.decode_bytes(CONFIG, positions) == 4 * numbers


MACHINE_REPLY = {"seconds": 1.0, "rates": {"trunk": 2e9, "head": 4e9}, "bandwidth": 5e9, "peak_rss_gb": 1.0}


def side(*seconds: float, memory: float = 3.0) -> list[dict]:
    return [{"seconds": value, "peak_rss_gb": memory, "threads": 2} for value in seconds]


GROUPS = [
    {"machine": [MACHINE_REPLY] * 3, "a": side(9, 2, 4), "b": side(9, 4, 4)},
    {"machine": [MACHINE_REPLY] * 3, "a": side(7, 1, 2, memory=4.0), "c": side(5, 5, 20)},
]


def make_result() -> results.Result:
    names = {"a": "side a", "b": "side b", "c": "side c", "absent": "did not run"}
    work = {"trunk": 10, "head": 4}
    return results.Result(
        benchmark="sft",
        title="Title",
        unit="tokens/s",
        quick=True,
        model={"name": "tiny"},
        sizes={"batch": 4},
        rows=results.rows_of(GROUPS, names, lambda name: work, lambda name, able: 0.5, tokens=8),
        ratios=results.ratios_of(GROUPS, "a", {"b": 1.6, "c": None, "absent": None}),
        checks=[results.Check("difference", 1e-6, 1e-4)],
        rates=results.rates_of(GROUPS),
        environment=results.environment(),
    )


def test_rows_and_ratios_leave_out_the_warmup_and_pair_neighbours():
    result = make_result()
    assert [row.name for row in result.rows] == ["a", "b", "c"]
    first = result.rows[0]
    assert first.tokens_per_second == results.Spread(4.0, 2.0, 8.0, [4.0, 2.0, 8.0, 4.0])
    assert first.floor_fraction.values == [0.25, 0.125, 0.5, 0.25]
    assert (first.peak_rss_gb, first.warmup_seconds) == (4.0, 8.0)
    assert {ratio.over: ratio.value.values for ratio in result.ratios} == {"b": [2.0, 1.0], "c": [5.0, 10.0]}
    assert result.rates["head"].median == 4.0
    assert result.rates["bandwidth"].median == 5.0


def test_a_result_file_is_read_back_as_it_was_written(tmp_path):
    result = make_result()
    path = results.write(result, tmp_path / "new")
    assert path.name == "sft.quick.json"
    assert [other.name for other in path.parent.iterdir()] == [path.name]
    assert results.read(path) == result
    table = results.table(result)
    assert "| side b | 2.0 (2.0 – 2.0) | **1.50×** (1.00 – 2.00, goal 1.6×) | 12% (12% – 12%) | 3.0 GB |" in table


def make_comparison() -> results.Comparison:
    return results.Comparison(
        benchmark="sft_memory",
        title="Title",
        quick=False,
        model={"name": "tiny"},
        sizes={"steps": 3},
        measured=[
            results.Measured("a", "side a", "GB", results.Spread.of([1.0, 3.0])),
            results.Measured("b", "side b", "GB", results.Spread.of([4.0])),
        ],
        ratios=[results.Ratio("a", "b", results.Spread.of([0.5]), 0.6)],
        checks=[],
        environment=results.environment(),
    )


def test_quantities_that_are_no_speeds_have_files_and_tables_too(tmp_path):
    comparison = make_comparison()
    assert results.read(results.write(comparison, tmp_path)) == comparison
    table = results.table(comparison)
    assert "| side a | 2.00 GB (1.00 – 3.00) | **0.50×** (0.50 – 0.50, goal at most 0.6×) of b |" in table


def test_result_files_of_another_shape_are_refused(tmp_path):
    value = make_result().to_json()
    broken = [{**value, "surprise": 1}, {key: part for key, part in value.items() if key != "rows"}, [], None]
    broken.append({**make_comparison().to_json(), "surprise": 1})
    for content in [*map(json.dumps, broken), "{"]:
        path = tmp_path / "sft.json"
        path.write_text(content)
        with pytest.raises(AgentArkError, match=r"sft\.json"):
            results.read(path)


MEASURED = sorted(set((ROOT / "benchmarks" / "results").glob("*.json")) - {dry_runs.RESULTS})


@pytest.mark.parametrize("path", MEASURED, ids=lambda path: path.name)
def test_the_result_files_of_this_repository_have_the_schema(path: Path):
    result = results.read(path)
    assert path == results.path_of(path.parent, result.benchmark, result.quick)
    assert any(result.benchmark.split(".")[0] in suite for suite in run.SUITES.values())
    assert all(check.limit is None or check.value <= check.limit for check in result.checks)
    assert {"cpu", "cores", "packages", "git_revision"} <= set(result.environment)
    assert f"{os.sep}home{os.sep}" not in path.read_text()


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with random weights of the config above and a tokenizer trained on a few questions."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("models") / "tiny"
    texts = [question.prompt for question in WordProblems(TaskConfig()).questions("warm_start", 40)]
    train_tokenizer(texts, 320, source)
    # A head of its own: a tied one would only repeat the last token.
    raw = {**GEMMA, "vocab_size": Tokenizer(source).vocabulary_size, "tie_word_embeddings": False}
    raw["max_position_embeddings"] = 128
    (source / "config.json").write_text(json.dumps(raw))
    config = ModelConfig.from_hf(raw, "test")
    random = np.random.default_rng(0)
    # Large weights, so that no two tokens score nearly the same.
    params = jax.tree.map(lambda leaf: random.normal(0, 0.4, leaf.shape).astype(np.float32), param_shapes(config))
    return save_pretrained(target, config, params, source)


def test_prompts_have_the_lengths_that_are_claimed(tiny_model: Path):
    made = prompts(tiny_model, 9)
    assert [len(ids) for ids in made] == [48, 52, 56, 60, 64, 68, 72, 76, 80]
    tokenizer = Tokenizer(tiny_model)
    assert {ids[0] for ids in made} == {tokenizer.bos_id}
    assert all(tokenizer.decode(ids).endswith("\nAnswer:") for ids in made)


def test_sides_take_turns_in_processes_of_their_own():
    shapes = {"product": [64, 32, 16]}
    setup = {"side": "machine", "shapes": shapes, "seconds": 0.0, "bandwidth_bytes": 2**16}
    said: list[str] = []
    checked: list[dict] = []
    sides = [Side(name, "benchmarks.jax_sides", setup) for name in ("a", "b")]
    replies = interleaved(sides, 1, checked.append, said.append)
    assert [line.split(": ")[1] for line in said[2:]] == ["a", "b", "b", "a"]
    assert checked == [{name: found[0] for name, found in replies.items()}]
    for found in replies.values():
        assert len(found) == 2
        assert found[1]["rates"]["product"] > 0
        assert found[1]["bandwidth"] > 0
        assert 0 < found[1]["seconds"] <= found[1]["wall_seconds"]
        assert found[1]["peak_rss_gb"] > 0.05


@pytest.mark.parametrize("family", compile_time.FAMILIES.values(), ids=compile_time.FAMILIES)
def test_the_deep_model_repeats_the_pattern_of_the_shallow_one(family):
    deep, shallow = (ModelConfig.from_hf(family(layers), "test") for layers in (36, 12))
    assert deep.period == shallow.period
    assert (deep.num_layers, shallow.num_layers) == (36, 12)
    assert deep.num_periods == 3 * shallow.num_periods


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return engine_client.make_model(tmp_path_factory.mktemp("talker") / "model")


def test_prompts_are_those_of_the_peer():
    """The numbers are from `sglang.benchmark.datasets.random` of SGLang 0.5.23."""
    theirs = {
        0: [[2732, 2733, 2734, 2735], [2608, 2609, 2610, 2611], [1655, 1656, 1657, 1658]],
        3: [[1898, 1899, 1900, 1901], [1689, 1690, 1691, 1692], [3323, 3324, 3325, 3326]],
    }
    assert {seed: engine_client.random_ids(4096, 3, 4, seed).tolist() for seed in theirs} == theirs


def test_clients_ask_a_server_that_answers_at_once(talker: Path):
    """Every call once; whoever keeps turns has them all; the engine's texts are the server's."""
    common = {"model": str(talker), "prompt_tokens": 20, "new_tokens": 8, "calls": 40, "in_flight": 16}
    with Worker(Side("loopback", "benchmarks.loopback", {"model": str(talker)})) as loopback:
        replies = {
            side: engine_client.build({**common, "side": side, "url": loopback.ready["url"]})[0](0)
            for side in (engine_client.ENGINE, engine_client.STORED, engine_client.BARE)
        }
    assert {side: reply["calls"] for side, reply in replies.items()} == dict.fromkeys(replies, 40)
    assert all(reply["seconds"] > 0 for reply in replies.values())
    assert [replies[side]["stored"] for side in (engine_client.ENGINE, engine_client.STORED)] == [0, 40]
    # Answers repeat after 64, the warm-up took one more.
    assert len(set(replies[engine_client.ENGINE]["texts"])) == 40


def test_the_talker_says_neither_its_end_nor_half_a_character(talker: Path):
    tokenizer, embedding = Tokenizer(talker), load_params(talker, load_config(talker))["embedding"]
    unsaid = {token for token in range(len(embedding)) if not np.any(embedding[token])}
    assert tokenizer.eos_id in unsaid
    assert len(unsaid) < 200
    said = [token for token in range(len(embedding)) if token not in unsaid]
    assert "\ufffd" not in "".join(tokenizer.decode([token]) for token in said)
    assert len(embedding) == tokenizer.vocabulary_size == engine_client.VOCABULARY


def test_clients_that_did_other_work_are_not_compared():
    def replies(*texts: str) -> dict[str, dict]:
        return {engine_client.ENGINE: {"texts": ["a"] * 100}, engine_client.PEER: {"texts": list(texts)}}

    assert engine_client.compare_answers(replies(*["a"] * 96, *["b"] * 4)).value == pytest.approx(0.04)
    with pytest.raises(AgentArkError, match="same work"):
        engine_client.compare_answers(replies(*["a"] * 94, *["b"] * 6))


def test_milliseconds_and_ratios_of_clients_are_per_call_and_round():
    sides = {
        side: [{"seconds": seconds, "calls": calls} for seconds in (9.0, *timed)]
        for side, calls, timed in (("a", 10, (1.0, 3.0)), ("b", 20, (4.0, 4.0)))
    }
    assert engine_client.milliseconds(sides["a"]) == [100.0, 300.0]
    found = engine_client.ratio(sides, "here", "a", "b", 1.05)
    assert (found.of, found.over, found.value.values) == ("a, here", "b, here", [0.5, 1.5])


def test_the_environment_of_the_peer_is_asked_for(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("SGLANG_PYTHON", raising=False)
    with pytest.raises(UsageError, match=r"SGLANG_PYTHON is not set.*install_cpu\.sh"):
        engine_client.peer_python()
    monkeypatch.setenv("SGLANG_PYTHON", sys.executable)
    with pytest.raises(UsageError, match="has no sglang; install it there"):
        engine_client.peer_python()


@pytest.mark.slow
def test_without_peers_only_the_client_itself_is_measured(tmp_path: Path):
    (found,) = engine_client.run(tmp_path, "nothing", quick=True, peers=False, say=lambda message: None)
    assert results.read(results.write(found, tmp_path)) == found
    assert {entry.name.split(", ")[1] for entry in found.measured} == {engine_client.LOOPBACK}
    table = results.table(found)
    assert "answers at once: aiohttp alone" in table
    assert "goal" not in table


def test_a_side_that_dies_is_named(capfd):
    with pytest.raises(AgentArkError, match="the side 'lost'"):
        Worker(Side("lost", "benchmarks.jax_sides", {"side": "nothing"}))
    assert "KeyError" in capfd.readouterr().err


def test_what_cannot_be_run_is_refused(tmp_path, capsys):
    assert run.main(["--only", "speed"]) == UsageError.exit_code
    assert "sft, sft_epoch, sft_memory" in capsys.readouterr().err
    assert run.main(["--table", "--results", str(tmp_path)]) == UsageError.exit_code
    results.write(make_result(), tmp_path)
    assert run.main(["--table", "--quick", "--results", str(tmp_path)]) == 0
    assert capsys.readouterr().out.startswith("### Title\n")


def test_tables_are_of_quick_results_or_of_full_ones_and_of_one_benchmark(tmp_path: Path):
    for name in ("sft.short", "sft_epoch", "sft"):
        for quick in (False, True):
            results.write(replace(make_result(), benchmark=name, quick=quick), tmp_path)
    for quick in (False, True):
        found = results.paths_of(tmp_path, "sft", quick)
        assert found == sorted(results.path_of(tmp_path, name, quick) for name in ("sft", "sft.short"))


def test_an_environment_half_made_or_of_other_versions_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(peers, "PLACE", tmp_path)
    with pytest.raises(UsageError, match=r"no environment of trl yet; make it by: python -m benchmarks\.peers trl"):
        peers.python("trl")
    marker = tmp_path / "trl" / "requirements.txt"
    marker.parent.mkdir()
    marker.write_text("\n".join(peers.REQUIREMENTS["trl"]) + "\n")
    assert peers.python("trl") == str(tmp_path / "trl" / "bin" / "python")
    marker.write_text("trl==0.1\n")
    with pytest.raises(UsageError, match="no environment of trl yet"):
        peers.python("trl")
    assert peers.main(["none"]) == UsageError.exit_code
