"""To what a gain is owed: the family of contrasts, what they say, what arms cost, and when that is paid off."""

import json
import random
import re

import pytest

from agentark_jax.arms import ARMS, Judged
from agentark_jax.evaluation import attribution
from agentark_jax.evaluation.attribution import SeedRun, contrasts, distillation, kind_of
from agentark_jax.evaluation.predictions import Prediction
from agentark_jax.evaluation.statistics import holm
from agentark_jax.training.rl_config import RLConfig

ARM_NAMES = ["control", "gold", "diverse_k2", "gold_after_student", "vr", "pad"]
RL = RLConfig(group_size=4)


def predictions(right: list[bool], *, prompt: int = 40, completion: int = 10, calls: int = 1) -> list[Prediction]:
    return [
        Prediction(f"q{i}", "", "right" if each else "wrong", 1.0, prompt, completion, tuple(map(str, range(calls))))
        for i, each in enumerate(right)
    ]


def answers(share: float, seed: int, n: int = 200) -> list[bool]:
    return [random.Random(f"{seed} {i}").random() < share for i in range(n)]


def fitted(tokens: int, **more) -> dict:
    return {"tokens": tokens, "examples": 50, "loss_tokens": tokens // 2, "steps": 7, **more}


COUNTS = {
    "debate": {"calls": 12, "prompt_tokens": 900, "completion_tokens": 300, "tokens": 300},
    "turns_samples": {"prompt_tokens": 400, "completion_tokens": 600, "tokens": 600},
    "verdicts": {"tokens": 77},
    "select": {
        "matched": {"questions": 9, "dropped": {}, "tokens": {"student": 5}, "lengths": {}, "arms": ["student"]},
    },
    "student": fitted(1_000),
    "control": fitted(1_000),
    "gold": fitted(500),
    "samples_budget": fitted(200),
    "verifier": fitted(100),
    "diverse_k2": fitted(1_000),
    "gold_after_student": fitted(400),
    "diverse_k2_after_student": fitted(600),
    "pad_after_student": fitted(160, rollouts={"rollouts": 16}, loss_tokens=160),
    "vr": fitted(160, rollouts={"rollouts": 16}, loss_tokens=80),
    "pad": fitted(160, rollouts={"rollouts": 16, "groups_replaced": 2}, loss_tokens=320),
    "pad_random": fitted(160, rollouts={"rollouts": 16}, loss_tokens=160),
    "step_labels": {"tokens": 30},
    "prm": {"tokens": 1_000},
    "prm_random": {"tokens": 2_000},
}


def seed_run(seed: int, **shares: float) -> SeedRun:
    names = ["base", "student", *ARM_NAMES]
    said = {name: predictions(answers(shares.get(name, 0.5), seed)) for name in names}
    said["debate"] = predictions(answers(0.6, seed), prompt=400, completion=100, calls=6)
    said["vote"] = predictions(answers(0.6, seed), prompt=20, completion=10, calls=1)
    return SeedRun(said, COUNTS)


def attributed(seeds: list[SeedRun]) -> dict:
    students = ["student", *ARM_NAMES]
    found = attribution.attribution(seeds, students, ["debate", "vote"], variant="corrective_first", rl=RL, level=0.95)
    return json.loads(json.dumps(found, allow_nan=False))


def test_the_family_follows_from_the_arms():
    assert [(each.a, each.b) for each in contrasts(["student", *ARM_NAMES])] == [
        ("student", "base"),
        ("student", "control"),
        ("student", "gold"),
        ("diverse_k2", "student"),
        ("gold_after_student", "student"),
        ("pad", "base"),
        ("pad", "vr"),
        ("pad", "student"),
        ("vr", "base"),
    ]
    assert [each.b for each in contrasts(["student", *ARM_NAMES]) if each.matched] == ["control"]


def test_every_arm_has_a_kind_and_every_contrast_a_question_of_its_own():
    everyone = ["student", *ARMS]
    kinds = {name: kind_of(name) for name in everyone}
    assert {name for name, kind in kinds.items() if kind == "rewards"} == {
        name for name, arm in ARMS.items() if arm.reinforced
    }
    assert kinds["control"] == kinds["samples"] == kinds["gold"] == kinds["other_peers"] == "no debate"
    assert kinds["student"] == kinds["dialogue"] == kinds["verifier"] == kinds["majority"] == "debate"
    assert kind_of("student_after_gold") == "debate"
    found = contrasts(everyone)
    assert len({frozenset((each.a, each.b)) for each in found}) == len(found)
    assert len({each.name for each in found}) == len(found)
    assert all(each.asks.endswith("?") for each in found)
    learned = {name for name in everyone if kinds[name] not in ("rewards", "check") and name != "student"}
    assert learned <= {name for each in found for name in (each.a, each.b) if "student" in (each.a, each.b)}


def test_a_check_of_the_harness_is_in_no_contrast(monkeypatch):
    monkeypatch.setitem(ARMS, "twin", ARMS["control"].__class__("debate", None, False, "check: twin", "the same"))
    assert kind_of("twin") == "check"
    assert [(each.a, each.b) for each in contrasts(["student", "twin", "twin_after_student"])] == [("student", "base")]


def test_contrasts_are_one_family_and_show_what_there_is():
    seeds = [seed_run(seed, base=0.2, student=0.7, control=0.7, gold=0.4, diverse_k2=0.1) for seed in range(3)]
    found = attributed(seeds)
    by_pair = {(each["a"], each["b"]): each for each in found["contrasts"]}
    assert [each["p_holm"] for each in found["contrasts"]] == holm([each["p_value"] for each in found["contrasts"]])
    # Arms with one share of right answers are the same here, question by question.
    assert by_pair["student", "control"]["difference"] == 0
    gain = by_pair["student", "base"]
    assert (gain["n"], gain["questions"], len(gain["per_seed"])) == (600, 200, 3)
    assert sum(gain["per_seed"]) / 3 == pytest.approx(gain["difference"])
    assert gain["seed_low"] <= gain["difference"] <= gain["seed_high"]
    assert gain["low"] > 0.4
    told = " ".join(found["conclusion"])
    assert "debate student at equal questions and tokens: no difference shown from single-agent student (0.0" in told
    assert "debate student: better than gold student (+29" in told
    assert "diverse_k2 student: worse than debate student (−59" in told
    assert "what the debate itself adds is not known" not in told
    shown = sum(each["p_holm"] < 0.05 for each in found["contrasts"])
    assert found["conclusion"][0].startswith(f"{shown} of {len(found['contrasts'])} contrasts show")


def test_nothing_is_concluded_from_a_difference_that_another_seed_turns_round():
    shares = [0.9, 0.9, 0.4]
    found = attributed([seed_run(seed, base=0.2, student=share, gold=0.5) for seed, share in enumerate(shares)])
    over_gold = next(each for each in found["contrasts"] if each["b"] == "gold")
    assert over_gold["p_holm"] < 0.01
    assert over_gold["per_seed"][0] > 0.3
    assert over_gold["per_seed"][2] < 0
    told = " ".join(found["conclusion"])
    assert re.search(
        r"a difference that depends on the seed from .*gold student \(\+[\d.]+ points; by seed \+[\d., +]+ −", told
    )
    assert "better than gold" not in told
    assert "contrasts show a difference after Holm's correction for all of them and in every seed." in told


def test_arms_are_told_with_what_they_learned():
    found = attributed([seed_run(0, student=0.7)])
    rows = {row["arm"]: row for row in found["arms"]}
    assert list(rows) == ["base", "student", *ARM_NAMES]
    assert rows["base"]["difference"] is None
    assert rows["student"]["difference"] == pytest.approx(rows["student"]["accuracy"] - rows["base"]["accuracy"])
    assert (rows["control"]["trajectories"], rows["vr"]["trajectories"], rows["vr"]["rollouts"]) == (50, None, 50)
    assert [name for name, row in rows.items() if row["matched"]] == ["student", "control"]
    assert rows["gold_after_student"]["learns"].endswith("after those of the debate student")
    assert found["matching"] == [{"questions": 9, "dropped": {}, "tokens": {"student": 5}, "lengths": {}}]


def test_without_matched_arms_it_says_what_is_not_known():
    seed = seed_run(0)
    unmatched = SeedRun(seed.predictions, {**COUNTS, "select": {"matched": None}})
    found = attribution.attribution(
        [unmatched], ["student", "gold"], ["debate"], variant="corrective_first", rl=RL, level=0.95
    )
    assert found["matching"] is None
    assert any("what the debate itself adds is not known" in each for each in found["conclusion"])


@pytest.mark.parametrize(
    ("name", "cost"),
    [
        ("student", 900 + 300 + 3 * 1_000),
        ("gold", 3 * 500),
        ("gold_after_student", 900 + 300 + 3 * 1_000 + 3 * 400),
        # The debate that both learn from, or that the judge does, was held once.
        ("diverse_k2_after_student", 900 + 300 + 3 * 1_000 + 3 * 600),
        ("pad_after_student", 1_200 + 3 * 1_000 + 800 + 3 * 800 + 3 * 800 + 30 + 3 * 1_000),
        ("samples_budget", (400 + 600) * 300 / 600 + 3 * 200),
        ("verifier", 900 + 300 + 77 + 3 * 100),
        # 16 rollouts of 40 + 10 tokens: written, read by policy and reference, and half of the completions learned.
        ("vr", 800 + 2 * 800 + 3 * 800 / 2),
        # 8 more that were replaced; read by a judge, too; learned twice; debate, labels and judge.
        ("pad", 800 * 1.5 + 3 * 800 + 3 * 800 * 2 + 1_200 + 30 + 3 * 1_000),
        # Its labels are those of the debate's judge, dealt out.
        ("pad_random", 800 + 3 * 800 + 3 * 800 + 1_200 + 30 + 3 * 2_000),
    ],
)
def test_what_an_arm_cost(name, cost):
    assert ARMS["pad_random"].judged == Judged(labels="random")
    assert RL.needs_reference
    assert distillation(name, COUNTS, prompt=40, rl=RL) == pytest.approx(cost)


def test_break_even_is_cost_over_saving():
    found = {(row["arm"], row["against"]): row for row in attributed([seed_run(0)])["break_even"]}
    row = found["student", "debate"]
    assert (row["per_question"], row["against_per_question"], row["saved_per_question"]) == (50, 500, 450)
    assert row["queries"] == pytest.approx(4_200 / 450)
    assert (row["queries_low"], row["queries_high"], row["n"]) == (row["queries"], row["queries"], 200)
    assert "pays for its making after 9 questions" in row["sentence"]
    # A vote that reads and writes less than the student does.
    dear = found["student", "vote"]
    assert dear["saved_per_question"] == -20
    assert (dear["queries"], dear["queries_low"], dear["queries_high"]) == (None, None, None)
    assert "never pays" in dear["sentence"]


def test_a_saving_that_is_not_sure_has_no_end():
    seed = seed_run(0)
    uneven = [
        Prediction(f"q{i}", "", "right", 1.0, tokens, 0, ("a",)) for i, tokens in enumerate([10, 30, 200, 5, 20, 90])
    ]
    said = {**seed.predictions, "vote": uneven}
    found = attribution.break_even([SeedRun(said, COUNTS)], ["student"], ["vote"], rl=RL, level=0.95)[0]
    assert found["n"] == 6
    assert found["saved_low"] < 0 < found["saved_per_question"] < found["saved_high"]
    assert found["queries_low"] < found["queries"]
    assert found["queries_high"] is None
    assert "to no end" in found["sentence"]
