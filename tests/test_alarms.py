"""Alarms: each is tripped by the kind of trajectory that it is there for, and none by a healthy one."""

import json
import math
import re

import numpy as np
import pytest

from agentark_jax.errors import UsageError
from agentark_jax.training.alarms import AlarmConfig, Alarms
from agentark_jax.training.rl_config import RLConfig

ITERATIONS = 40
LIMITS = ("length_ratio", "step_ratio", "process_gap", "kl", "logprob_gap", "entropy_fall", "truncated")


def healthy(iteration, rng):
    """A policy that learns: right more often, a little longer, a little surer; as noisy as 64 rollouts are."""
    learned = 1 - math.exp(-iteration / 15)
    return {
        "completion_tokens": (120 + 60 * learned) * (1 + 0.05 * rng.normal()),
        "steps": 6 + 2 * learned + 0.3 * rng.normal(),
        "process": 0.5 + 0.25 * learned + 0.03 * rng.normal(),
        "accuracy": 0.4 + 0.3 * learned + 0.05 * rng.normal(),
        "kl/reference": 0.08 * learned,
        "logprob_gap": 0.004 + 0.001 * rng.random(),
        "entropy": 0.6 - 0.25 * learned + 0.02 * rng.normal(),
        "truncated": 0.05 + 0.02 * rng.random(),
        "reward": 0.5 + 0.3 * learned,
    }


def hacked(iteration):
    """How far a policy has gone that finds out from iteration 10 on what else its reward pays."""
    return min(1.0, max(0, iteration - 10) / 15)


# What becomes of a healthy iteration; the mean reward never falls.
HACKS = {
    "longer": (lambda m, h: {"completion_tokens": m["completion_tokens"] * (1 + 4 * h)}, "length_ratio"),
    "shorter": (lambda m, h: {"completion_tokens": m["completion_tokens"] * (1 - 0.9 * h)}, "length_ratio"),
    "one step for all": (lambda m, h: {"steps": m["steps"] * (1 - h) + h}, "step_ratio"),
    "a step a word": (lambda m, h: {"steps": m["steps"] * (1 + 5 * h)}, "step_ratio"),
    "junk that scores": (lambda m, h: {"process": 0.5 + 0.5 * h, "accuracy": 0.45 * (1 - h)}, "process_gap"),
    "score without gain": (lambda m, h: {"process": 0.55 + 0.4 * h, "accuracy": 0.42}, "process_gap"),
    "far away": (lambda m, h: {"kl/reference": 0.05 + 2 * h}, "kl"),
    "stale weights": (lambda m, h: {"logprob_gap": 0.005 + 0.5 * h}, "logprob_gap"),
    "one answer for all": (lambda m, h: {"entropy": m["entropy"] * (1 - h) + 0.01 * h}, "entropy_fall"),
    "never ends": (lambda m, h: {"truncated": 0.05 + 0.9 * h}, "truncated"),
}


def run(change=None, config=None, seed=0, iterations=ITERATIONS):
    """The alarms that tripped, by iteration."""
    alarms, rng = Alarms(config or AlarmConfig()), np.random.default_rng(seed)
    tripped = {}
    for iteration in range(iterations):
        metrics = healthy(iteration, rng)
        if change is not None:
            metrics |= change(metrics, hacked(iteration))
        found = alarms.update(iteration, metrics)
        if found:
            tripped[iteration] = found
    return tripped


@pytest.mark.parametrize("seed", range(20))
def test_a_healthy_run_trips_none(seed):
    assert not run(seed=seed, iterations=200)


@pytest.mark.parametrize(("change", "name"), HACKS.values(), ids=HACKS)
def test_a_hack_trips_its_alarm_and_no_other(change, name):
    tripped = run(change)
    assert tripped
    assert {alarm.name for found in tripped.values() for alarm in found} == {name}
    assert 12 < min(tripped) < 26
    first = tripped[min(tripped)][0]
    assert first.value > first.limit == getattr(AlarmConfig(), name)
    assert first.iteration == min(tripped)
    assert str(first).startswith(f"alarms.{name}, iteration {first.iteration}: ")
    assert f"more than {first.limit:g} for 3 iterations. " in first.words
    assert first.words.endswith(f"; or raise alarms.{name}.")


@pytest.mark.parametrize(("change", "name"), HACKS.values(), ids=HACKS)
def test_a_limit_of_null_turns_its_alarm_off(change, name):
    assert not run(change, AlarmConfig(**{name: None}))


def test_words_tell_what_happened():
    tripped = run(HACKS["junk that scores"][0])
    words = tripped[min(tripped)][0].words
    assert words.startswith("the process reward went from 0.500 to 0.")
    assert "the accuracy from 0.4" in words
    assert "give verifiable a larger coefficient" in words


@pytest.mark.parametrize("change", ["far away", "one answer for all"])
def test_words_name_keys_that_there_are(change):
    tripped = run(HACKS[change][0])
    words = tripped[min(tripped)][0].words
    named = {"kl_loss", "kl_reward", "fit"}
    assert named <= {word.split(".")[0] for word in re.findall(r"[\w.]+", words)}
    assert named <= RLConfig.__dataclass_fields__.keys()
    assert "kl_coefficient" not in words


def test_an_alarm_needs_patience_and_repeats_itself_as_patiently():
    def spikes(places):
        alarms, found = Alarms(AlarmConfig(patience=3)), []
        for iteration in range(14):
            metrics = {"truncated": 0.9 if iteration in places else 0.1}
            found += [alarm.iteration for alarm in alarms.update(iteration, metrics)]
        return found

    assert spikes({1, 2, 4, 5, 7, 8}) == []
    assert spikes({1, 2, 3}) == [3]
    assert spikes(set(range(2, 14))) == [4, 7, 10, 13]
    assert spikes({0, 1, 2}) == [2]  # it needs no baseline


def test_the_gap_of_log_probs_is_watched_from_the_first_iteration():
    assert [a.name for a in Alarms(AlarmConfig(patience=1)).update(0, {"logprob_gap": 0.2})] == ["logprob_gap"]


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(("name", "metric"), [("kl", "kl/reference"), ("length_ratio", "completion_tokens")])
def test_what_is_not_finite_is_beyond_every_limit(value, name, metric):
    for start in (0, 6):
        alarms = Alarms(AlarmConfig(patience=1))
        found = [alarms.update(i, {metric: value if i >= start else 0.1}) for i in range(start + 1)]
        assert [alarm.name for alarm in found[-1]] == [name]
        assert not any(found[:-1])


def test_a_resumed_run_alarms_identically():
    change = HACKS["longer"][0]
    config = AlarmConfig(patience=2)
    expected = run(change, config)
    assert expected
    for stop in (0, 3, 12, min(expected) - 1, min(expected) + 1):
        alarms, rng, tripped = Alarms(config), np.random.default_rng(0), {}
        for iteration in range(ITERATIONS):
            if iteration == stop:
                alarms = Alarms(config, json.loads(json.dumps(alarms.state)))
            metrics = healthy(iteration, rng)
            found = alarms.update(iteration, metrics | change(metrics, hacked(iteration)))
            if found:
                tripped[iteration] = found
        assert tripped == expected


def test_a_state_stays_as_it_was():
    alarms = Alarms(AlarmConfig())
    alarms.update(0, {"truncated": 0.9, "steps": 3.0})
    state = alarms.state
    copy = json.loads(json.dumps(state))
    alarms.update(1, {"truncated": 0.9, "steps": 4.0})
    Alarms(AlarmConfig(), state).update(1, {"truncated": 0.9, "steps": 4.0})
    assert state == copy


def test_alarms_without_their_metrics_are_told():
    alarms = Alarms(AlarmConfig(kl=None))
    metrics = {"completion_tokens": 5.0, "steps": 2.0, "accuracy": 0.5, "logprob_gap": 0.0, "truncated": 0.0}
    assert alarms.unwatched(metrics) == {"process_gap": ["process"], "entropy_fall": ["entropy"]}
    assert alarms.update(0, metrics) == []


def test_an_iteration_without_a_metric_says_nothing_about_its_alarm():
    alarms = Alarms(AlarmConfig(patience=2, baseline_iterations=1))
    assert alarms.update(0, {"truncated": 0.9}) == []
    assert not alarms.quiet
    assert alarms.update(1, {}) == []
    assert not alarms.quiet
    assert [each.name for each in alarms.update(2, {"truncated": 0.9, "entropy": 1.0})] == ["truncated"]
    assert alarms.update(3, {"truncated": 0.1, "entropy": 0.01}) == []  # nothing is known of the first entropy
    assert alarms.quiet


def test_iterations_come_one_after_the_other():
    alarms = Alarms(AlarmConfig())
    alarms.update(0, {})
    for iteration in (0, 2):
        with pytest.raises(ValueError, match=f"iteration {iteration} is not the next one, 1"):
            alarms.update(iteration, {})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("action", "pray"),
        ("patience", 0),
        ("baseline_iterations", 0),
        ("truncated", 1.0),
        *((name, 0.0) for name in LIMITS),
        *((name, math.nan) for name in LIMITS),
        *((name, 1.0) for name in ("length_ratio", "step_ratio", "entropy_fall")),
    ],
)
def test_impossible_values_are_refused(key, value):
    with pytest.raises(UsageError, match=f"^{key}: "):
        AlarmConfig(**{key: value})
