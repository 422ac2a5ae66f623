"""The benchmarks of generation and of whole debates: their arithmetic, their checks, sides that do the same work."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from test_benchmarks import GEMMA

from agentark_jax.data.tokenizer import Tokenizer, train_tokenizer
from agentark_jax.errors import AgentArkError, UsageError
from agentark_jax.models import flops
from agentark_jax.models.config import ModelConfig
from agentark_jax.models.transformer import param_shapes
from agentark_jax.models.weights import save_pretrained
from agentark_jax.tasks.config import TaskConfig
from agentark_jax.tasks.word_problems import WordProblems
from benchmarks import debate, debate_ours, generation, jax_sides, peers, results
from benchmarks.inputs import completion_tokens, prompts
from benchmarks.workers import Side, Worker

CONFIG = ModelConfig.from_hf(GEMMA, "test")


def test_steps_are_those_of_slots_that_are_refilled():
    assert generation.schedule([5, 9], [2, 2], 2) == [[4, 8], [5, 9]]
    assert generation.schedule([5, 9, 3], [1, 3, 2], 2) == [[4, 8], [9, 2], [10, 3]]
    assert generation.schedule([7], [3], 1) == [[6], [7], [8]]


def test_the_floor_takes_the_larger_of_computing_and_reading():
    rates = {"prefill": 2e9, "decode": 1e9, "head": 3e9}
    steps = [[4, 8], [5, 9]]
    slow_memory, fast_memory = (
        generation.floor_seconds(CONFIG, [5, 9], steps, rates, bandwidth) for bandwidth in (1e3, 1e15)
    )
    prefill = sum(flops.prefill_flops(CONFIG, [5, 9]).values()) / 2e9
    assert slow_memory == pytest.approx(prefill + sum(flops.decode_bytes(CONFIG, step) for step in steps) / 1e3)
    work = [flops.decode_flops(CONFIG, step) for step in steps]
    expected = prefill + sum((part["trunk"] + part["attention"]) / 1e9 + part["head"] / 3e9 for part in work)
    assert fast_memory == pytest.approx(expected)
    total = generation.decoding(CONFIG, steps, {"trunk": 7, "attention": 0})
    assert total["head"] == 2 * 4 * CONFIG.vocab_size * CONFIG.hidden_size
    assert total["trunk"] == 7 + sum(part["trunk"] for part in work)


def test_answers_of_a_mixed_batch_are_spread_as_real_ones():
    tokens = completion_tokens(64, 96)
    assert (len(tokens), max(tokens)) == (64, 96)
    assert 30 < min(tokens) < np.median(tokens) < 70
    assert completion_tokens(130, 10)[:64] == completion_tokens(130, 10)[64:128]


def test_sides_that_disagree_have_no_speed():
    same = [[1] * 100, [2] * 100]
    tokens, sequences = generation.compare_tokens(same, [[1] * 100, [2] * 98 + [3] * 2], "peer")
    assert (tokens.value, sequences.value) == (pytest.approx(0.01), 0.5)
    with pytest.raises(AgentArkError, match=r"5\.0% of the greedy tokens of peer"):
        generation.compare_tokens(same, [[1] * 100, [2] * 90 + [3] * 10], "peer")
    with pytest.raises(AgentArkError, match="sequences of"):
        generation.compare_tokens(same, [[1] * 100, [2] * 99], "peer")
    good = {"machine": [{}, {}], "ours": [{"counts": [2, 1]}] * 2}
    generation.check_counts([good], [2, 1])
    with pytest.raises(AgentArkError, match="peer gave 3 tokens in repetition 1"):
        generation.check_counts([{**good, "peer": [{"counts": [2, 1]}, {"counts": [1, 2]}]}], [2, 1])


def test_debates_of_other_work_have_no_speed():
    rounds = [[[1, 2], [1, 2]], [[1, 2, 3, 4], [1, 2, 3, 5]]]
    good = {"calls": 4, "prompt_tokens": 12, "new_tokens": 24}
    debate.check_work([{"machine": [{}], "ours": [good]}], rounds, 6)
    for key in good:
        with pytest.raises(AgentArkError, match="peer did other work in repetition 1"):
            debate.check_work([{"ours": [good], "peer": [good, {**good, key: 11}]}], rounds, 6)


def test_every_beginning_of_a_prompt_is_read_once():
    bodies = [[7, 8, 9], [7, 8], [5], [7, 8, 3, 9], [5]]
    assert sorted(debate.beginnings(bodies)) == [0, 0, 1, 2, 2, 3]  # 5; 7; 8; 9 and 3 after it; 9 after 3
    assert debate.beginnings([[]]) == []
    alone = debate.reading(CONFIG, debate.beginnings([[1] * 9]))
    assert alone == flops.prefill_flops(CONFIG, [10])


def test_shares_of_the_time_are_those_of_timed_repetitions():
    reply = {"seconds": 4.0, "parts": {"prefill": 1.0, "decode": 2.0, "host": 1.0}}
    group = {debate.OURS: [{"seconds": 9.0, "parts": {"prefill": 9.0}}, reply, {**reply, "seconds": 5.0}]}
    assert debate.shares([group], "decode").values == [50.0, 40.0]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Gemma 3 of random weights, so large that no two tokens score nearly the same."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("models") / "tiny"
    texts = [question.prompt for question in WordProblems(TaskConfig()).questions("warm_start", 40)]
    train_tokenizer(texts, 320, source)
    tokenizer = Tokenizer(source)
    # The window is longer than any prompt, as the real model's is.
    raw = {**GEMMA, "vocab_size": tokenizer.vocabulary_size, "max_position_embeddings": 512, "sliding_window": 256}
    raw |= {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": 0}
    # Tunix knows no other order than five such layers before one of the other kind.
    raw |= {"num_hidden_layers": 2, "layer_types": ["sliding_attention"] * 2}
    (source / "config.json").write_text(json.dumps(raw))
    config = ModelConfig.from_hf(raw, "test")
    random = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: random.normal(0, 0.4, leaf.shape).astype(np.float32), param_shapes(config))
    return save_pretrained(target, config, params, source)


def work(tiny: Path, **changes) -> dict:
    setup = {"model": str(tiny), "side": "generation", "prompts": prompts(tiny, 3), "new_tokens": [5, 2, 4]}
    return {**setup, "samples": 1, "slots": 2, **changes}


def test_our_side_generates_what_it_is_asked_for(tiny: Path):
    repeat, _ = jax_sides.build(work(tiny))
    replies = [repeat(index) for index in range(2)]
    generation.check_counts([{"ours": replies}], [5, 2, 4])
    assert [len(ids) for ids in replies[0]["greedy"]] == [5, 2, 4]
    assert "greedy" not in replies[1]


@pytest.mark.slow
def test_samples_come_with_a_greedy_answer_to_compare(tiny: Path):
    sampling = {"prompts": prompts(tiny, 1), "new_tokens": [6] * 4, "samples": 4, "slots": 4}
    repeat, _ = jax_sides.build(work(tiny, **sampling))
    reply = repeat(0)
    assert reply["counts"] == [6] * 4
    greedy, _ = jax_sides.build(work(tiny, prompts=prompts(tiny, 1), new_tokens=[6], slots=1))
    assert reply["greedy"] == greedy(0)["greedy"]


def debating(tiny: Path, layout: str) -> dict:
    return {
        "model": str(tiny),
        "questions": 2,
        "agents": 2,
        "rounds": 2,
        "new_tokens": 3,
        "temperature": 0.8,
        "layout": layout,
        "seed": 0,
    }


@pytest.mark.parametrize("layout", [pytest.param("own_first", marks=pytest.mark.slow), "shared_first"])
def test_our_debates_repeat_themselves_and_say_what_they_read(tiny: Path, layout: str, monkeypatch):
    for name in (*debate_ours.PREFILL, "decoder"):
        monkeypatch.setattr(debate_ours.local, name, getattr(debate_ours.local, name))  # undone afterwards
    repeat, _ = debate_ours.build(debating(tiny, layout))
    first, second = repeat(0), repeat(0)
    assert first["rounds"] == second["rounds"]
    debate.check_work([{"ours": [first, second]}], first["rounds"], 3)
    assert [len(asked) for asked in first["rounds"]] == [4, 4]
    one, other = first["rounds"][1][:2]
    # Agents of a question: in the shared layout their prompts part only where it is said whose answer is whose.
    further = len(debate.beginnings([one, other])) - min(len(one), len(other))
    assert (further < 25) == (layout == "shared_first")
    assert first["greedy"][0] != []
    assert set(first["parts"]) == set(debate.PARTS)
    assert all(seconds > 0 for seconds in first["parts"].values())
    assert sum(first["parts"].values()) == pytest.approx(first["seconds"])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # those of torch and transformers
def test_transformers_does_the_same_work(tiny: Path, monkeypatch):
    pytest.importorskip("transformers", reason="transformers is not installed (extra `test`)")
    from benchmarks import transformers_generation

    ours, theirs = (module.build(work(tiny))[0](0) for module in (jax_sides, transformers_generation))
    generation.check_counts([{"ours": [ours], "theirs": [theirs]}], [5, 2, 4])
    assert generation.compare_tokens(ours["greedy"], theirs["greedy"], "transformers")[0].value == 0
    sampling = work(tiny, prompts=prompts(tiny, 1), new_tokens=[6] * 4, samples=4, slots=4)
    ours, theirs = (module.build(sampling)[0](0) for module in (jax_sides, transformers_generation))
    generation.check_counts([{"ours": [ours], "theirs": [theirs]}], [6] * 4)
    assert generation.compare_tokens(ours["greedy"], theirs["greedy"], "transformers")[0].value == 0
    for name in (*debate_ours.PREFILL, "decoder"):
        monkeypatch.setattr(debate_ours.local, name, getattr(debate_ours.local, name))  # undone afterwards
    setup = debating(tiny, "shared_first")
    debated = debate_ours.build(setup)[0](0)
    asked = {**setup, "side": "debate", "rounds": debated["rounds"]}
    again = transformers_generation.build(asked)[0](0)
    debate.check_work([{"ours": [debated], "theirs": [again]}], debated["rounds"], 3)
    assert again["greedy"] == debated["greedy"]


@pytest.mark.slow
def test_tunix_generates_the_same(tiny: Path):
    try:
        python = peers.python("tunix")
    except UsageError as missing:
        pytest.skip(str(missing))
    ours = jax_sides.build(work(tiny))[0](0)
    sampling = work(tiny, prompts=prompts(tiny, 1), new_tokens=[6] * 4, samples=4, slots=4)
    with Worker(Side("tunix", "benchmarks.tunix_generation", work(tiny), python)) as worker:
        theirs = worker.repeat(0)
    generation.check_counts([{"ours": [ours], "theirs": [theirs]}], [5, 2, 4])
    assert generation.compare_tokens(ours["greedy"], theirs["greedy"], "tunix")[0].value == 0
    with Worker(Side("tunix", "benchmarks.tunix_generation", sampling, python)) as worker:
        assert worker.repeat(0)["counts"] == [6] * 4


@pytest.mark.slow
def test_both_benchmarks_yield_a_result_per_case(tiny: Path, tmp_path: Path, monkeypatch):
    """Of generation the two cases that differ most, lest this take minutes."""
    monkeypatch.setattr(generation, "CASES", {key: generation.CASES[key] for key in ("samples", "mixed")})
    for module in (generation, debate):
        said: list[str] = []
        found = list(module.run(tiny, "tiny", quick=True, peers=False, say=said.append))
        for result in found:
            assert results.read(results.write(result, tmp_path)) == result
            assert result.title in results.table(result)
        cases = generation.CASES if module is generation else [*debate.GOALS, *(f"{key}_time" for key in debate.GOALS)]
        assert sorted(result.benchmark for result in found) == sorted(f"{module.NAME}.{case}" for case in cases)
