"""The benchmark of a GRPO step: its counts by hand, what it refuses, and both sides on a tiny model."""

import json
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny_models import QWEN3

from agentark_jax.data.tokenizer import Tokenizer, train_tokenizer
from agentark_jax.errors import AgentArkError, UsageError
from agentark_jax.models.config import ModelConfig
from agentark_jax.models.transformer import param_shapes
from agentark_jax.models.weights import save_pretrained
from agentark_jax.tasks.config import TaskConfig
from agentark_jax.tasks.word_problems import WordProblems
from benchmarks import grpo, grpo_side, peers
from benchmarks.grpo import Sizes
from benchmarks.stepwise import Stepwise
from benchmarks.workers import Side, Worker

RAW = QWEN3
SIZES = Sizes(prompts=2, group_size=4, prompt_tokens=24, new_tokens=5, rows=4, micro_batch=4, repetitions=1)
STEPS = 3


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("models") / "tiny"
    texts = [question.prompt for question in WordProblems(TaskConfig()).questions("warm_start", 40)]
    train_tokenizer(texts, 320, source)
    raw = {**RAW, "vocab_size": Tokenizer(source).vocabulary_size}
    (source / "config.json").write_text(json.dumps(raw))
    config = ModelConfig.from_hf(raw, "test")
    random = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: random.normal(0, 0.2, leaf.shape).astype(np.float32), param_shapes(config))
    return save_pretrained(target, config, params, source)


@pytest.fixture(scope="module")
def setup(model: Path) -> dict:
    return grpo.setup_of(model, SIZES)


def test_a_loop_runs_a_step_when_it_is_asked_for_one():
    begun = []

    def train(after):
        for step in range(3):
            begun.append(step)
            time.sleep(0.02)
            after({"step": step})

    steps = Stepwise(train)
    assert begun == []
    first = steps.repeat(0)
    time.sleep(0.05)  # the loop waits
    assert begun == [0]
    assert first["step"] == 0
    second = steps.repeat(1)
    assert second["step"] == 1
    assert second["seconds"] >= 0.02
    steps.repeat(2)
    with pytest.raises(RuntimeError, match="more steps than there are repetitions"):
        steps.repeat(3)


def test_what_a_loop_raises_reaches_whoever_waits():
    def train(after):
        after({})
        raise UsageError("no room")

    steps = Stepwise(train)
    steps.repeat(0)
    with pytest.raises(UsageError, match="no room"):
        steps.repeat(1)


def test_the_work_of_a_step_is_counted_by_hand():
    config = ModelConfig.from_hf(RAW, "test")
    sizes = Sizes(prompts=1, group_size=2, prompt_tokens=3, new_tokens=2, micro_batch=2)
    per_token = 2 * (16 * (2 * 16 + 2 * 8) + 3 * 16 * 24)  # two layers' projections and MLPs
    head, pair = 320 * 16, 4 * 2 * 8 * 2  # FLOPs of a pair of positions over both layers
    assert grpo.flops(config, sizes) == {
        "prefill": 2 * per_token * 2 + pair * 3,  # the prompt once, but for its last token
        "decode": 2 * per_token * 4 + pair * 2 * (3 + 4),
        "decode head": 2 * head * 4,
        "trunk": 6 * per_token * 10 + 3 * pair * 2 * 15,
        "head": 6 * head * 4,
    }


def test_the_floor_takes_the_larger_of_computing_and_reading_in_each_step():
    config = ModelConfig.from_hf(RAW, "test")
    sizes = Sizes(prompts=1, group_size=2, prompt_tokens=3, new_tokens=2, micro_batch=2)
    rates = {"trunk": 1e9, "decode": 2e9, "decode head": 3e9, "head": 4e9}
    work = grpo.flops(config, sizes)
    outside = (work["prefill"] + work["trunk"]) / 1e9 + work["head"] / 4e9
    computing = work["decode"] / 2e9 + work["decode head"] / 3e9
    assert grpo.floor_seconds(config, sizes, rates, 1e18) == pytest.approx(outside + computing)
    weights = 2 * (16 * (2 * 16 + 2 * 8) + 3 * 16 * 24) + 320 * 16
    cached = 2 * 2 * 8 * 2 * (3 + 4)  # keys and values of both layers for two rollouts
    expected = outside + 4 * (2 * weights + cached) / 1e3
    assert grpo.floor_seconds(config, sizes, rates, 1e3) == pytest.approx(expected)


def test_a_step_that_cannot_be_cut_into_micro_batches_is_refused():
    with pytest.raises(UsageError, match=r"micro_batch.*divisor of the 32 rollouts"):
        Sizes(micro_batch=5)


def reply(**changes) -> dict:
    return {"logprobs": [-1.0, -2.0], "sampled": SIZES.tokens, "trained": SIZES.tokens, **changes}


def test_sides_that_agree_are_compared():
    (check,) = grpo.compare({"ours": reply(), "theirs": reply(logprobs=[-1.0, -2.00005])}, SIZES)
    assert check.value == pytest.approx(5e-5)
    assert grpo.compare({"ours": reply()}, SIZES) == []


@pytest.mark.parametrize("logprobs", [[-1.0, -2.001], [-1.0, float("nan")]])
def test_sides_with_other_weights_are_refused(logprobs):
    with pytest.raises(AgentArkError, match="log-probabilities that differ"):
        grpo.compare({"ours": reply(), "theirs": reply(logprobs=logprobs)}, SIZES)


@pytest.mark.parametrize("change", [{"sampled": SIZES.tokens - 1}, {"trained": SIZES.tokens - 20}])
def test_a_side_with_less_work_is_refused(change):
    with pytest.raises(AgentArkError, match=f"theirs sampled .* wanted {SIZES.tokens}"):
        grpo.compare({"ours": reply(), "theirs": reply(**change)}, SIZES)


def test_shares_leave_the_warm_up_out_and_add_up_to_one():
    def step(seconds, **parts):
        return {"seconds": seconds, "parts": parts}

    group = {
        grpo.MACHINE: [{"seconds": 1.0}] * 2,
        "ours": [step(100.0, rollout=90.0, training=1.0), step(10.0, rollout=4.0, training=5.0)],
        "theirs": [step(100.0, rollout=90.0), step(8.0, rollout=6.0)],
    }
    found = {check.what: check.value for check in grpo.shares(group)}
    assert found == {
        "ours: share of a step in rollout": pytest.approx(0.4),
        "ours: share of a step in training and the rest": pytest.approx(0.6),
        "theirs: share of a step in rollout": pytest.approx(0.75),
        "theirs: share of a step in training and the rest": pytest.approx(0.25),
    }


def test_prompts_are_of_one_length_and_read_again_as_the_same_tokens(model, setup):
    tokenizer = Tokenizer(model)
    form = grpo_side.Endless(tokenizer)
    assert form.stop_ids == ()
    assert len(set(setup["texts"])) == SIZES.prompts * STEPS
    for text in setup["texts"]:
        question = grpo_side.Question.make("benchmark", "debate", text, "1")
        assert len(form.question(question)[0]) == SIZES.prompt_tokens


@pytest.mark.slow
def test_our_side_samples_and_trains_on_every_token_of_every_step(setup):
    repeat, facts = grpo_side.build(setup)
    assert len(facts["logprobs"]) == len(setup["scored"]) - 1
    for index in range(2):
        found = repeat(index)
        grpo.compare({"ours": {**facts, **found}}, SIZES)
        assert found["logprob_gap"] < 1e-4
        assert set(found["parts"]) == set(grpo_side.PARTS)
        assert 0 < sum(found["parts"].values()) <= found["seconds"]


@pytest.mark.slow
def test_trl_says_the_same_of_a_text_and_samples_as_many_tokens(setup):
    try:
        python = peers.python("trl")
    except UsageError as missing:
        pytest.skip(str(missing))
    _, facts = grpo_side.build(setup)
    replies = {"ours": {**reply(), **facts}}
    with Worker(Side(grpo.PEER, "benchmarks.grpo_trl_side", setup, python=python)) as worker:
        for index in range(2):
            found = worker.repeat(index)
            replies["theirs"] = {**worker.ready, **found}
            grpo.compare(replies, SIZES)
            assert found["parts"]["rollout"] > 0
            assert found["parts"]["scoring"] > 0
            assert sum(found["parts"].values()) < found["seconds"]
