"""The benchmarks of what users wait for beside training and generation."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny_models import QWEN3

from agentark_jax.errors import AgentArkError
from agentark_jax.models.config import ModelConfig
from agentark_jax.models.transformer import param_shapes
from agentark_jax.models.weights import save_pretrained
from benchmarks import overhead_sides, overheads, run
from benchmarks.overheads import Sizes

RAW = {**QWEN3, "vocab_size": 97, "tie_word_embeddings": True}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = tmp_path_factory.mktemp("source")
    (source / "config.json").write_text(json.dumps(RAW))
    config = ModelConfig.from_hf(RAW, "test")
    random = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: random.normal(0, 0.2, leaf.shape).astype(np.float32), param_shapes(config))
    return save_pretrained(tmp_path_factory.mktemp("models") / "tiny", config, params, source)


def replies(monkeypatch: pytest.MonkeyPatch, reply: dict) -> None:
    """Every worker gives this reply."""

    class Same:
        def __init__(self, side):
            pass

        def repeat(self, index):
            return reply

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

    monkeypatch.setattr(overheads, "Worker", Same)


def test_made_answers_are_different_and_right_and_wrong_in_turn():
    assert tuple(overhead_sides.KINDS) == overheads.KINDS
    for kind in overheads.KINDS:
        made = overhead_sides.answers(kind, 50, seed=1)
        assert len({text for _, text in made}) == 50
        others = overhead_sides.answers(kind, 50, seed=2)
        assert {text for _, text in made} != {text for _, text in others}
    stated = [text.splitlines()[-1].removeprefix("The answer is ").rstrip(".") for _, text in made_numbers()]
    golds = [question.answer for question, _ in made_numbers()]
    right = [gold == said.replace(",", "") for gold, said in zip(golds, stated, strict=True)]
    assert right == [True, False] * 10


def made_numbers() -> list:
    return overhead_sides.answers("numeric", 20, seed=0)


@pytest.mark.parametrize("kind", overheads.KINDS)
def test_the_graders_see_the_made_answers_as_they_are_meant(kind):
    found = overhead_sides.grading({"kind": kind, "answers": 6})(0)
    assert found["as_meant"] == len(found["times"]) == 6
    assert found["seconds"] == pytest.approx(sum(found["times"]))


def test_answers_that_are_not_graded_as_they_are_meant_are_refused(monkeypatch):
    sizes = Sizes(answers=4, repetitions=1)
    replies(monkeypatch, {"seconds": 1.0, "times": [0.1, 0.1, 0.1, 0.7], "as_meant": 3})
    with pytest.raises(AgentArkError, match="3 of 4 numeric answers"):
        overheads.grading(sizes, True, print)


def test_grading_tells_the_middle_the_tail_and_the_speed(monkeypatch):
    replies(monkeypatch, {"seconds": 2.0, "times": [0.1, 0.1, 0.1, 1.7], "as_meant": 4})
    found = overheads.grading(Sizes(answers=4, repetitions=2), True, print)
    by_name = {entry.name: entry.value for entry in found.measured}
    assert by_name["choice, median"].median == pytest.approx(1e5)
    assert by_name["choice, 99th percentile"].median == pytest.approx(np.percentile([1e5, 1e5, 1e5, 17e5], 99))
    assert {check.value for check in found.checks} == {2.0}


def test_the_work_of_scoring_is_counted_by_hand():
    config = ModelConfig.from_hf(RAW, "test")
    weights = 2 * (16 * (2 * 16 + 2 * 8) + 3 * 16 * 24)
    work = overheads.scoring_flops(config, [3, 5])
    assert work == {"trunk": 2 * weights * 8, "attention": 4 * 2 * 8 * 2 * (6 + 15)}
    assert overheads.lengths(Sizes(sequences=3, shortest=10, longest=20)) == [10, 15, 20]


def test_steps_end_every_so_often_and_with_the_sequence():
    (ids, ends), (_, short) = overhead_sides.sequences(97, [10, 3], 4)
    assert len(ids) == 10
    assert ends.tolist() == [1, 5, 9]
    assert short.tolist() == [2]


def test_a_step_scored_alone_is_what_it_is_among_others(model):
    setup = {"model": str(model), "lengths": [8, 20, 40], "step_tokens": 6}
    repeat = overhead_sides.prm_scoring(setup)
    assert repeat(0)["gap"] < overheads.SCORE_LIMIT
    assert "gap" not in repeat(1)


def test_scores_that_depend_on_what_else_is_scored_are_refused(model, monkeypatch):
    def interleaved(sides, repetitions, check, say):
        check({overheads.OURS: {"gap": 2 * overheads.SCORE_LIMIT}})

    monkeypatch.setattr(overheads, "interleaved", interleaved)
    with pytest.raises(AgentArkError, match="scored alone"):
        overheads.prm_scoring(model, "tiny", Sizes(), True, print)


def test_compilation_pairs_each_warm_cache_with_the_cold_one_before(monkeypatch, model):
    caches = []

    class Timed:
        def __init__(self, side):
            cache = side.setup["cache"]
            self.seconds = 1.0 if cache in caches else 4.0
            caches.append(cache)

        def repeat(self, index):
            return {"seconds": self.seconds}

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

    monkeypatch.setattr(overheads, "Worker", Timed)
    found = overheads.compilation(model, "tiny", Sizes(repetitions=2), True, print)
    assert len(caches) == 8
    assert len(set(caches)) == 4
    assert [ratio.value.values for ratio in found.ratios] == [[0.25, 0.25], [0.25, 0.25]]
    assert [ratio.of for ratio in found.ratios] == ["training step, warm", "embedded engine, warm"]


def test_start_up_is_that_of_fresh_processes():
    found = overheads.startup(Sizes(starts=1), True, print)
    seconds = {entry.name: entry.value.median for entry in found.measured}
    assert set(seconds) == {"python", "import", "help", "run help"}
    assert min(seconds.values()) > 0
    (check,) = found.checks
    assert check.limit == 0.5
    assert check.value == seconds["help"]


@pytest.mark.slow
def test_a_compiled_training_step_is_timed(model):
    assert overhead_sides.compile_step({"model": str(model), "batch": 2, "length": 16})(0)["seconds"] > 0


def test_the_suites_have_them():
    assert run.SUITES["cpu"]["overheads"] is overheads.run
    assert run.PEERS["grpo"] == ("trl",)
