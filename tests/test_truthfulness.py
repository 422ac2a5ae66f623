"""TruthfulQA's scores, by hand."""

import math
from dataclasses import replace

import pytest
from test_datasets import DATA

from agentark_jax.errors import UsageError
from agentark_jax.evaluation.truthfulness import (
    Choices,
    answer_figures,
    choice_figures,
    nearness,
    read_choices,
    weighed,
)
from agentark_jax.tasks.rows import Row, read_file

CHOICES = Choices("q", "yes", ("no", "never"), ("yes", "surely"), ("no", "never"))


def test_probabilities_of_true_and_false_answers_are_weighed():
    logprobs = {"yes": math.log(0.2), "surely": math.log(0.1), "no": math.log(0.1), "never": math.log(0.1)}
    found = weighed(CHOICES, logprobs)
    assert found.mc1 == 1
    assert found.mc2 == pytest.approx(0.3 / 0.5)
    # As likely as a false one is not likelier.
    assert weighed(CHOICES, {**logprobs, "no": math.log(0.2)}).mc1 == 0
    # Of the true ones the best alone counts for MC1.
    assert weighed(CHOICES, {**logprobs, "yes": -9.0, "surely": 0.0}).mc1 == 0


def test_long_answers_do_not_underflow():
    found = weighed(CHOICES, {"yes": -2000.0, "surely": -2001.0, "no": -2000.5, "never": -5000.0})
    assert found.mc2 == pytest.approx((1 + math.exp(-1)) / (1 + math.exp(-1) + math.exp(-0.5)))


def test_rows_of_the_authors_and_of_the_hub():
    authors = {"question": "q", "mc1_targets": {"yes": 1, "no": 0, "never": 0}}
    authors["mc2_targets"] = {"yes": 1, "surely": 1, "no": 0, "never": 0}
    hub = {
        key: value if key == "question" else {"choices": list(value), "labels": list(value.values())}
        for key, value in authors.items()
    }
    assert read_choices(Row("here", 1, authors)) == read_choices(Row("here", 1, hub)) == CHOICES
    assert CHOICES.answers == ["yes", "no", "never", "surely"]


@pytest.mark.parametrize(
    "values",
    [
        {"question": "q"},
        {"question": "q", "mc1_targets": {"yes": 1, "no": 1}, "mc2_targets": {"yes": 1, "no": 0}},
        {"question": "q", "mc1_targets": {"yes": 1, "no": 0}, "mc2_targets": {"yes": 1}},
        {"question": "q", "mc1_targets": ["yes"], "mc2_targets": ["yes"]},
    ],
)
def test_other_rows_are_named(values):
    with pytest.raises(UsageError, match=r"file, line 3.*truthfulqa\.path"):
        read_choices(Row("file, line 3", 3, values))


def test_answers_are_held_against_the_nearest_references():
    true, false = ["nothing happens at all", "they pass through"], ["melons grow in your stomach"]
    right = nearness("nothing happens at all", true, false)
    assert right["BLEU"] == {"true": pytest.approx(1), "false": pytest.approx(0, abs=0.05)}
    assert right["ROUGE-L"] == {"true": 1, "false": 0}
    wrong = nearness("melons grow in your stomach", true, false)
    assert wrong["ROUGE-2"] == {"true": 0, "false": 1}
    assert nearness("I have no comment.", true, false)["ROUGE-1"]["true"] == 1
    assert nearness(" ", true, false)["BLEU"] == {"true": 0, "false": 0}
    told = answer_figures([right, wrong, nearness("", true, false)], ["a", "b", "c"], level=0.95)
    assert told["ROUGE-1"]["true"]["value"] == pytest.approx(1 / 3)
    assert told["ROUGE-1"]["difference"]["value"] == pytest.approx(0)
    assert told["ROUGE-1"]["nearer"]["value"] == pytest.approx(1 / 3)
    assert told["ROUGE-1"]["nearer"]["n"] == 3


def test_figures_have_intervals():
    found = [
        weighed(replace(CHOICES, question=f"q{n}"), {"yes": float(n), "surely": 0.0, "no": 1.5, "never": 0.0})
        for n in range(4)
    ]
    told = choice_figures(found, level=0.95)
    assert told["mc1"]["value"] == 0.5
    assert told["mc1"]["low"] < 0.5 < told["mc1"]["high"]
    assert told["mc2"]["low"] <= told["mc2"]["value"] <= told["mc2"]["high"]


def test_real_rows_are_read():
    path = DATA / "truthfulqa" / "mc_task.jsonl"
    if not path.is_file():
        pytest.skip("the real data in ../shared/data is not there")
    found = [read_choices(row) for row in read_file(path)]
    assert len(found) == 790
    assert found[0].best == "The watermelon seeds pass through your digestive system"
