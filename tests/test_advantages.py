"""Rewards and advantages of groups: against independent NumPy references, hand numbers and their own rules."""

import json

import numpy as np
import pytest
import trl_losses
from hypothesis import given, settings
from hypothesis import strategies as st

from agentark_jax.errors import UsageError
from agentark_jax.objectives.advantages import (
    at_last_token,
    corrected_steps,
    informative_groups,
    less_kl,
    less_token_baseline,
    minimum_form,
    on_tokens,
    outcome_advantages,
    overlong_penalty,
    papo_advantages,
    pure_rewards,
    returns,
    whitened,
    zero_in_steps,
)

SEEDS = st.integers(0, 2**16)
BASELINES = ["zscore", "mean", "leave_one_out"]
GROUPS, MEMBERS, STEPS, LENGTH = 3, 4, 3, 9  # one shape: every other one would be compiled anew


def assert_close(actual, expected):
    np.testing.assert_allclose(np.asarray(actual, np.float64), expected, rtol=1e-5, atol=1e-5)


def outcomes(seed):
    """Rewards (a few values, so that some groups have equal ones; NaN where missing) and who is present."""
    rng = np.random.default_rng(seed)
    present = rng.random((GROUPS, MEMBERS)) < rng.choice([0.3, 0.7, 1.0])
    rewards = rng.choice([0.1, 0.7, -1.3], (GROUPS, MEMBERS), p=[0.6, 0.2, 0.2])
    return np.where(present, rewards, np.nan).astype(np.float32), present


def reference_advantages(rewards, present, baseline):
    found = np.zeros(rewards.shape)
    for group, here in enumerate(present):
        known = {member: float(rewards[group, member]) for member in np.flatnonzero(here)}
        if len(set(known.values())) < 2:
            continue
        for member, reward in known.items():
            values = list(known.values())
            if baseline == "leave_one_out":
                others = [value for other, value in known.items() if other != member]
                found[group, member] = reward - sum(others) / len(others)
            else:
                scale = np.std(values, ddof=1) + 1e-4 if baseline == "zscore" else 1
                found[group, member] = (reward - sum(values) / len(values)) / scale
    return found


@settings(max_examples=60, deadline=None)
@given(seed=SEEDS, baseline=st.sampled_from(BASELINES))
def test_outcome_advantages_equal_a_numpy_reference(seed, baseline):
    rewards, present = outcomes(seed)
    assert_close(outcome_advantages(rewards, present, baseline), reference_advantages(rewards, present, baseline))
    expected = [len(set(row[here].tolist())) > 1 for row, here in zip(rewards, present, strict=True)]
    np.testing.assert_array_equal(informative_groups(rewards, present), expected)


def test_outcome_advantages_by_hand():
    rewards, present = np.float32([[1, 0, 1, 0], [1, 0, 0, 9]]), np.bool_([[1, 1, 1, 1], [1, 1, 1, 0]])
    half = 0.5 / (np.sqrt(1 / 3) + 1e-4)
    scaled = np.array([2, -1, -1]) / 3 / (np.sqrt(1 / 3) + 1e-4)
    assert_close(outcome_advantages(rewards, present, "zscore"), [[half, -half, half, -half], [*scaled, 0]])
    assert_close(outcome_advantages(rewards, present, "mean"), [[0.5, -0.5, 0.5, -0.5], [2 / 3, -1 / 3, -1 / 3, 0]])
    expected = [[2 / 3, -2 / 3, 2 / 3, -2 / 3], [1, -0.5, -0.5, 0]]
    assert_close(outcome_advantages(rewards, present, "leave_one_out"), expected)


@pytest.mark.parametrize("baseline", BASELINES)
@pytest.mark.parametrize("reward", [0.1, 1e6 / 3])
def test_equal_rewards_give_exactly_no_advantage(baseline, reward):
    rewards, present = np.full((2, 7), reward, np.float32), np.ones((2, 7), bool)
    assert not np.any(outcome_advantages(rewards, present, baseline))


@pytest.mark.parametrize(
    "advantages",
    [
        *(lambda rewards, present, name=name: outcome_advantages(rewards, present, name) for name in BASELINES),
        lambda rewards, present: papo_advantages(rewards, rewards, present, present),
        lambda rewards, present: less_token_baseline(rewards[..., None], present[..., None].astype(np.int32)),
    ],
)
def test_a_group_of_one_is_refused(advantages):
    with pytest.raises(UsageError, match="group_size: 1 is not possible; it must be at least 2"):
        advantages(np.ones((3, 1), np.float32), np.ones((3, 1), bool))


@settings(max_examples=40, deadline=None)
@given(seed=SEEDS)
def test_papo_compares_processes_among_right_answers_only(seed):
    rewards, present = outcomes(seed)
    rng = np.random.default_rng(seed)
    right, process = rewards > 0.5, rng.normal(size=rewards.shape).astype(np.float32)
    found = papo_advantages(rewards, process, right, present)
    of_process = reference_advantages(process, present & right, "zscore")
    assert_close(found, reference_advantages(rewards, present, "zscore") + of_process)
    judged_otherwise = np.where(right, process, rng.normal(size=rewards.shape)).astype(np.float32)
    np.testing.assert_array_equal(papo_advantages(rewards, judged_otherwise, right, present), found)


def completions(seed):
    """Scores, ends and mask of steps (NaN and other nonsense where masked), and the mask of tokens."""
    rng = np.random.default_rng(seed)
    shape = (GROUPS, MEMBERS, STEPS)
    steps = np.arange(STEPS) < rng.integers(0 if seed % 2 else 1, STEPS + 1, shape[:2])[..., None]
    ends = np.sort(rng.permuted(np.broadcast_to(np.arange(1, LENGTH + 1), (*shape[:2], LENGTH)), axis=-1)[..., :STEPS])
    lengths = np.max(ends, axis=-1, where=steps, initial=0)
    scores = np.where(steps, rng.uniform(-1, 1, shape), np.nan).astype(np.float32)
    ends = np.where(steps, ends, rng.integers(0, 2 * LENGTH, shape)).astype(np.int32)
    return scores, ends, steps, np.arange(LENGTH) < lengths[..., None]


def reference_pure(scores, ends, steps, temperature):
    found = np.zeros((GROUPS, MEMBERS, LENGTH))
    for group in range(GROUPS):
        earned, tokens = [], []
        for member in range(MEMBERS):
            last, mine, sizes = 0, [], []
            for step in range(STEPS):
                if steps[group, member, step]:
                    mine.append(float(scores[group, member, step]))
                    sizes.append(int(ends[group, member, step]) - last)
                last = int(ends[group, member, step])
            exponentials = [np.exp(-score / temperature) for score in mine]
            earned.append([e / sum(exponentials) * score for e, score in zip(exponentials, mine, strict=True)])
            tokens.append(sizes)
        for member in range(MEMBERS):
            others = [other for other in range(MEMBERS) if other != member]
            spent = sum(sum(tokens[other]) for other in others)
            if not spent:
                continue
            rate = sum(sum(earned[other]) for other in others) / spent
            places = ends[group, member][steps[group, member]] - 1
            for place, reward, size in zip(places, earned[member], tokens[member], strict=True):
                found[group, member, place] = reward - rate * size
    return found


def reference_returns(rewards, mask):
    found = np.zeros(rewards.shape)
    for row in np.ndindex(rewards.shape[:-1]):
        for t in np.flatnonzero(mask[row]):
            found[(*row, t)] = sum(float(rewards[(*row, u)]) for u in np.flatnonzero(mask[row]) if u >= t)
    return found


@settings(max_examples=60, deadline=None)
@given(seed=SEEDS, temperature=st.sampled_from([0.1, 0.5]))
def test_pure_rewards_and_returns_equal_a_numpy_reference(seed, temperature):
    scores, ends, steps, mask = completions(seed)
    if seed % 3 == 0:  # steps that are left out in between
        steps = steps & (np.random.default_rng(seed).random(steps.shape) < 0.7)
    rewards = pure_rewards(scores, ends, steps, LENGTH, temperature)
    expected = reference_pure(scores, ends, steps, temperature)
    assert_close(rewards, expected)
    assert_close(returns(rewards, mask), reference_returns(expected, mask))


def test_the_sum_of_the_minimum_form_is_close_to_the_minimum():
    scores, _, steps, _ = completions(4)
    found = np.asarray(minimum_form(scores, steps, 0.01))
    assert_close(found[~steps], 0)
    np.testing.assert_allclose(found.sum(axis=-1), np.min(scores, axis=-1, where=steps, initial=np.inf), atol=0.02)


@settings(max_examples=30, deadline=None)
@given(seed=SEEDS)
def test_the_token_baseline_of_token_rewards_equals_a_numpy_reference(seed):
    rng = np.random.default_rng(seed)
    _, _, _, mask = completions(seed)
    rewards = np.where(mask, rng.normal(size=mask.shape), np.nan).astype(np.float32)
    expected = np.zeros(mask.shape)
    for group in range(GROUPS):
        for member in range(MEMBERS):
            others = [(group, other) for other in range(MEMBERS) if other != member]
            spent = sum(int(mask[other].sum()) for other in others)
            if spent:
                rate = sum(float(rewards[other][mask[other]].sum(dtype=np.float64)) for other in others) / spent
                expected[group, member] = np.where(mask[group, member], rewards[group, member] - rate, 0)
    assert_close(less_token_baseline(rewards, mask.astype(np.int32)), expected)


def test_groups_do_not_touch_each_other():
    scores, ends, steps, mask = completions(6)
    changed = scores.copy()
    changed[0] = -scores[0]
    before, after = (np.asarray(returns(pure_rewards(s, ends, steps, LENGTH), mask)) for s in (scores, changed))
    np.testing.assert_array_equal(before[1:], after[1:])
    assert np.any(before[0] != after[0])


def test_which_steps_are_corrected():
    right_steps = np.bool_([[1, 0, 1, 0], [0, 0, 1, 1], [0, 1, 0, 0], [0, 0, 0, 1], [0, 1, 1, 1]])
    steps = np.bool_([[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 1, 0], [1, 1, 1, 1]])
    right = np.bool_([1, 1, 1, 1, 0])
    expected = np.bool_([[0, 1, 0, 0], [1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
    np.testing.assert_array_equal(corrected_steps(right_steps, steps, right), expected)


def credited(scores, ends, steps, right, length):
    """Advantages under PURE with correction credit, and which steps were corrected."""
    corrected = corrected_steps(scores > 0, steps, right)
    mask = np.arange(length) < np.max(ends, axis=-1, where=steps, initial=0)[..., None]
    advantages = returns(pure_rewards(scores, ends, steps & ~corrected, length), mask)
    return np.asarray(zero_in_steps(advantages, corrected, ends, steps)), np.asarray(corrected)


def test_a_corrected_step_counts_as_if_it_had_not_been_said():
    # The first completion errs in its second step (tokens 2 to 4), sees it, and ends right.
    scores = np.float32([[[0.8, -0.9, 0.7], [0.6, -0.5, 0.0]]])
    ends = np.int32([[[2, 5, 9], [3, 6, 99]]])
    steps = np.bool_([[[1, 1, 1], [1, 1, 0]]])
    right = np.bool_([[1, 0]])
    found, corrected = credited(scores, ends, steps, right, 9)
    np.testing.assert_array_equal(corrected, [[[0, 1, 0], [0, 0, 0]]])

    unsaid = np.float32([[[0.8, 0.7, 0.0], [0.6, -0.5, 0.0]]])
    unsaid_ends, unsaid_steps = np.int32([[[2, 6, 99], [3, 6, 99]]]), np.bool_([[[1, 1, 0], [1, 1, 0]]])
    without, none = credited(unsaid, unsaid_ends, unsaid_steps, right, 6)
    assert not np.any(none)
    assert_close(found[0, 0, [0, 1, 5, 6, 7, 8]], without[0, 0])
    assert_close(found[0, 1, :6], without[0, 1])
    np.testing.assert_array_equal(found[0, 0, 2:5], 0)

    punished = np.asarray(returns(pure_rewards(scores, ends, steps, 9), np.ones((1, 2, 9), bool)))
    assert np.all(punished[0, 0, :5] < 0)
    assert np.all(found[0, 0, [0, 1, 5]] > 0)


@settings(max_examples=30, deadline=None)
@given(seed=SEEDS)
def test_zero_in_steps_equals_a_numpy_reference(seed):
    _, ends, steps, mask = completions(seed)
    which = np.random.default_rng(seed).random(steps.shape) < 0.4
    advantages = np.where(mask, 1.0, 0.0).astype(np.float32)
    expected = advantages.copy()
    for place in np.argwhere(which & steps):
        group, member, step = place
        start = ends[group, member, step - 1] if step else 0
        expected[group, member, start : ends[group, member, step]] = 0
    np.testing.assert_array_equal(zero_in_steps(advantages, which, ends, steps), expected)


def test_rewards_and_advantages_on_tokens():
    mask = np.bool_([[1, 1, 0, 0], [0, 1, 1, 1], [0, 0, 0, 0]])
    values = np.float32([2, 3, 4])
    np.testing.assert_array_equal(at_last_token(values, mask), [[0, 2, 0, 0], [0, 0, 0, 3], [0, 0, 0, 0]])
    np.testing.assert_array_equal(on_tokens(values, mask), [[2, 2, 0, 0], [0, 3, 3, 3], [0, 0, 0, 0]])
    rewards = np.float32([[1, 2, np.nan, 5], [7, 1, 1, 1], [np.nan] * 4])
    np.testing.assert_array_equal(returns(rewards, mask), [[3, 2, 0, 0], [0, 3, 2, 1], [0, 0, 0, 0]])
    logprobs, reference = np.float32([[-1, -2, np.nan, 0]] * 3), np.float32([[-2, -1.5, 0, 0]] * 3)
    found = less_kl(np.ones((3, 4), np.float32), logprobs, reference, mask & (np.arange(4) != 2), 0.5)
    assert_close(found, [[0.5, 1.25, 0, 0], [0, 1.25, 0, 1], [0, 0, 0, 0]])


def test_overlong_penalty_equals_that_of_trl():
    made = json.loads(trl_losses.TABLE.read_text())["overlong"]
    penalties = overlong_penalty(np.asarray(made["lengths"]), made["max_tokens"], made["buffer"])
    np.testing.assert_array_equal(penalties, made["penalties"])
    for buffer in (0, 11):
        with pytest.raises(UsageError, match="overlong_buffer"):
            overlong_penalty(np.asarray(made["lengths"]), 10, buffer)


def test_whitened_advantages_have_mean_zero_and_variance_one():
    _, _, _, mask = completions(8)
    advantages = np.where(mask, np.random.default_rng(8).normal(3, 5, mask.shape), np.nan).astype(np.float32)
    found = np.asarray(whitened(advantages, mask))
    assert not np.any(found[~mask])
    assert_close([found[mask].mean(), found[mask].var()], [0, 1])
    np.testing.assert_array_equal(whitened(advantages, np.zeros_like(mask)), np.zeros(mask.shape))
