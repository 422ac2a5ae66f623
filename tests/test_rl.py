"""Reinforcement learning: what an iteration does, what it refuses, what a resumed run repeats."""

import json
from collections import Counter
from dataclasses import replace

import jax
import numpy as np
import pytest
from rl_policies import MAX_TOKENS, EngineSampler, make_config, questions

from agentark_jax.errors import AgentArkError, UsageError
from agentark_jax.models.config import Lora
from agentark_jax.models.heads import init_head
from agentark_jax.models.transformer import init_params
from agentark_jax.objectives.ppo import VALUE_HEAD
from agentark_jax.training.alarms import AlarmConfig
from agentark_jax.training.config import FitConfig
from agentark_jax.training.reward_config import RewardConfig
from agentark_jax.training.rl import Judge, learn
from agentark_jax.training.rl_config import RLConfig, verifiable_only

FIT = FitConfig(learning_rate=3e-3, schedule="constant", rows=2, row_length=128, checkpoint_every=2)
VERIFIED = RewardConfig({"verifiable": 1.0})
CONFIG = RLConfig(iterations=4, questions=4, group_size=4, rewards=VERIFIED, fit=FIT)


def run(form, directory, config=CONFIG, sampler=None, seed=0, **more):
    model = make_config(form)
    judge = Judge(model, init_params(model, 1), init_head(model, "prm", 0)) if config.needs_prm else None
    arguments = {
        "max_tokens": MAX_TOKENS,
        "directory": directory,
        "seed": seed,
        "fingerprint": {"model": "toy"},
        "judge": judge,
        **more,
    }
    sampler = sampler or EngineSampler(form, config.group_size)
    return learn(config, model, init_params(model, 0), questions(6), sampler, **arguments)


def leaves(tree) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


def same(one, other) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(leaves(one), leaves(other), strict=True))


@pytest.fixture(scope="module")
def finished(form, tmp_path_factory):
    directory = tmp_path_factory.mktemp("rl")
    sampler = EngineSampler(form, CONFIG.group_size)
    return run(form, directory, sampler=sampler), sampler, directory


def test_an_iteration_uses_the_policy_as_it_is(finished):
    result, sampler, directory = finished
    assert result.iterations == result.steps == 4
    assert result.ending == "completed"
    versions = [version for _, _, version in sampler.asked]
    assert [len(set(versions[start : start + 4])) for start in range(0, 16, 4)] == [1] * 4
    assert len(set(versions)) == 4
    # With the weights that sampled, the trainer says what the engine said, and the ratio is 1.
    for record in result.history:
        assert record["logprob_gap/max"] < 1e-4
        assert record["ratio/max"] == pytest.approx(1, abs=1e-4)
        assert 0 < record["entropy"] < np.log(400)
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert lines[0]["timing"].keys() >= {
        "rollout_seconds",
        "scoring_seconds",
        "rewards_seconds",
        "training_seconds",
        "sync_seconds",
    }


def test_every_question_comes_once_in_each_epoch_and_is_sampled_anew(finished):
    result, sampler, _ = finished
    consumed = [question for drawn in result.consumed for question in drawn]
    assert [question for question, _, _ in sampler.asked] == consumed
    assert set(Counter(consumed[:6]).values()) == set(Counter(consumed[6:12]).values()) == {1}
    places = [(question, visit) for question, visit, _ in sampler.asked]
    assert len(set(places)) == len(places)


def test_the_policy_learns_what_pays(form, tmp_path):
    config = replace(CONFIG, iterations=12, questions=6, group_size=8, fit=replace(FIT, learning_rate=1e-2))
    paid, fined = (
        run(form, tmp_path / str(pay), replace(config, rewards=RewardConfig({"verifiable": pay})))
        for pay in (1.0, -1.0)
    )
    rises, falls = ([record["accuracy"] for record in result.history] for result in (paid, fined))
    assert rises[0] == falls[0]
    assert np.mean(rises[-3:]) > np.mean(rises[:3]) + 0.15
    assert np.mean(rises[-3:]) > np.mean(falls[-3:]) + 0.25


class Killed(Exception):
    """What ends a run, as far as the loop can tell."""


def test_a_killed_run_ends_as_one_that_was_not(form, finished, tmp_path):
    whole, _, _ = finished

    class Fragile(EngineSampler):
        def __call__(self, *arguments):
            if len(self.asked) == 3 * CONFIG.questions:
                raise Killed
            return super().__call__(*arguments)

    with pytest.raises(Killed):
        run(form, tmp_path, sampler=Fragile(form, CONFIG.group_size))
    again = EngineSampler(form, CONFIG.group_size)
    resumed = run(form, tmp_path, sampler=again)
    assert len(again.asked) == 2 * CONFIG.questions  # from the checkpoint of iteration 2 on
    assert resumed.consumed == whole.consumed
    assert resumed.history == whole.history
    assert resumed.counts == whole.counts
    assert same(resumed.params, whole.params)


def test_another_config_is_refused_by_the_checkpoint(form, finished, tmp_path):
    _, _, directory = finished
    with pytest.raises(AgentArkError, match=r"rl\.temperature"):
        run(form, directory, replace(CONFIG, temperature=0.5))


def test_adapters_alone_learn(form, tmp_path):
    config = replace(CONFIG, iterations=2, kl_loss=0.1, fit=replace(FIT, lora=Lora(4, 8.0)))
    result = run(form, tmp_path, config)
    assert result.adapter is not None
    assert result.history[0]["kl/reference"] == pytest.approx(0, abs=1e-6)
    assert result.history[1]["kl/reference"] > 1e-8  # the reference is the model without adapters
    assert not same(result.params, init_params(make_config(form), 0))


def test_several_updates_correct_for_the_policy_that_sampled(form, tmp_path):
    config = replace(CONFIG, iterations=2, updates=2, fit=replace(FIT, epochs=2))
    result = run(form, tmp_path, config)
    assert result.steps == 2 * 2 * 2
    assert result.history[0]["ratio/max"] > 1 + 1e-4


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"faithful_to": "release"},
        {"advantage": "papo", "rewards": RewardConfig({"verifiable": 1.0, "process": 1.0}, aggregate="mean")},
        {"advantage": "pure", "correction_credit": True, "kl_reward": 0.1},
        {"advantage": "mean", "aggregation": "constant", "ratio": "token"},
        {"advantage": "leave_one_out", "dynamic_sampling": 1, "aggregation": "token", "ratio": "token"},
    ],
)
def test_every_reading_learns_something(form, tmp_path, changes):
    config = RLConfig(iterations=2, questions=3, group_size=4, fit=FIT)
    result = run(form, tmp_path, replace(config, **changes))
    assert result.steps == 2
    assert all(record["gradient_norm"] > 0 for record in result.history)
    assert not same(result.params, init_params(make_config(form), 0))


def test_ppo_trains_its_value_head(form, tmp_path):
    config = replace(CONFIG, advantage="gae", group_size=1, iterations=3)
    result = run(form, tmp_path, config)
    head = result.extra[VALUE_HEAD]
    fresh = init_head(make_config(form), "value", 0)
    assert not np.array_equal(head["weight"], fresh["weight"])
    assert result.history[-1]["value/loss"] < result.history[0]["value/loss"]


def test_failed_calls_leave_places_empty_and_are_counted(form, tmp_path):
    ids = [question.id for question in questions(6)]

    def lose(question, number):
        return question.id == ids[0] or (question.id == ids[1] and number > 0) or (question.id == ids[2] and number > 1)

    config = replace(CONFIG, iterations=2, questions=6)
    result = run(form, tmp_path, config, EngineSampler(form, 4, lose=lose))
    assert result.counts["rollouts"] == 2 * (24 - 4 - 3 - 2)
    assert result.counts["rollouts_missing"] == 2 * 9
    assert result.counts["groups_incomplete"] == 2 * 3
    assert result.counts["groups_dropped"] == 2 * 2
    with pytest.raises(AgentArkError, match="every call failed"):
        run(form, tmp_path / "none", config, EngineSampler(form, 4, lose=lambda question, number: True))


def test_groups_that_earn_the_same_teach_nothing(form, tmp_path):
    result = run(form, tmp_path, replace(CONFIG, iterations=2), EngineSampler(form, 4, verdict=lambda ids: "right"))
    assert result.steps == 0
    assert result.counts["iterations_without_signal"] == 2
    assert result.counts["groups_without_signal"] == 8
    assert same(result.params, init_params(make_config(form), 0))


def test_dynamic_sampling_replaces_them(form, tmp_path):
    ids = [question.id for question in questions(6)]

    class Easy(EngineSampler):
        def rollout(self, question, said):
            found = super().rollout(question, said)
            return replace(found, grade=replace(found.grade, verdict="right")) if question.id in ids[:3] else found

    config = replace(CONFIG, iterations=3, questions=3, dynamic_sampling=3)
    result = run(form, tmp_path, config, Easy(form, 4))
    assert result.counts["groups_replaced"] >= 3
    assert all(record["groups_informative"] == 1 for record in result.history)
    assert sum(map(len, result.consumed)) == 9 + result.counts["groups_replaced"]


def test_an_alarm_stops_or_rolls_back(form, tmp_path):
    class Longer(EngineSampler):
        """From the third iteration on everything is cut off."""

        def rollout(self, question, said):
            found = super().rollout(question, said)
            return replace(found, finish="length") if len(self.asked) > 2 * CONFIG.questions else found

    alarms = AlarmConfig(patience=2, truncated=0.5)
    config = replace(CONFIG, iterations=8, alarms=alarms, fit=replace(FIT, checkpoint_every=1))
    rewards = replace(config, rewards=RewardConfig({"length": 1.0, "verifiable": 1.0}, overlong_buffer=6))
    stopped = run(form, tmp_path / "stop", rewards, Longer(form, 4))
    assert stopped.ending == "stopped"
    assert stopped.iterations == 4
    assert "cut off" in stopped.alarms[0]
    back = replace(rewards, alarms=replace(alarms, action="rollback"))
    rolled = run(form, tmp_path / "back", back, Longer(form, 4))
    assert rolled.ending == "rolled_back"
    good = run(form, tmp_path / "good", replace(rewards, iterations=2), Longer(form, 4))
    assert same(rolled.params, good.params)
    again = run(form, tmp_path / "back", back, Longer(form, 4))  # it does not go on where it was stopped
    assert again.ending == "rolled_back"
    assert same(again.params, rolled.params)


def test_what_cannot_be_learned_from_is_refused(form, tmp_path):
    with pytest.raises(UsageError, match="process reward model"):
        run(form, tmp_path / "a", replace(CONFIG, rewards=RewardConfig({"process": 1.0})), judge=None)
    with pytest.raises(UsageError, match=r"fit\.row_length"):
        run(form, tmp_path / "b", replace(CONFIG, fit=replace(FIT, row_length=8)))
    with pytest.raises(UsageError, match="group_size: 1"):
        RLConfig(group_size=1)
    with pytest.raises(UsageError, match="updates"):
        RLConfig(questions=2, updates=3)
    with pytest.raises(UsageError, match=r"fit\.steps"):
        RLConfig(fit=FitConfig(steps=3))
    with pytest.raises(UsageError, match="temperature"):
        RLConfig(temperature=0.0)


def test_the_verifier_alone_needs_no_process_reward_model():
    for faithful_to in ("paper", "release"):
        config = verifiable_only(RLConfig(faithful_to=faithful_to, correction_credit=True))
        assert not config.needs_prm
        assert config.rewards_chosen.coefficients == {"verifiable": 1.0}
        assert config.value("advantage") == "zscore"
    assert not RLConfig(rewards=VERIFIED).needs_prm
    assert RLConfig().needs_prm
    logged = RLConfig(rewards=RewardConfig({"verifiable": 0.0, "process": 1.0}))
    assert verifiable_only(logged).rewards_chosen.coefficients == {"verifiable": 1.0}


def test_a_process_without_a_factor_is_logged(form, tmp_path):
    config = replace(CONFIG, iterations=1, rewards=RewardConfig({"verifiable": 1.0, "process": 0.0}))
    (record,) = run(form, tmp_path, config).history
    assert 0 < record["reward/process"] < 1
    assert record["reward"] == record["reward/verifiable"]


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"advantage": "papo"}, "advantage: 'papo' is not possible; it must be zscore"),
        ({"correction_credit": True}, "correction_credit: True is not possible; it must be false"),
        (
            {"dynamic_sampling": 1, "advantage": "gae", "group_size": 1},
            "dynamic_sampling: 1 is not possible; .* 0 with",
        ),
    ],
)
def test_settings_that_would_do_nothing_are_refused(changes, complaint):
    with pytest.raises(UsageError, match=complaint):
        replace(CONFIG, **changes)
