"""PPO: advantages and value loss against NumPy references, finite differences; what each term's gradient reaches."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_grpo import ARRAYS, POSITIONS, SEGMENTS, assert_close, problem

from agentark_jax.errors import UsageError
from agentark_jax.models.config import load_config
from agentark_jax.models.heads import init_head, values
from agentark_jax.models.source import ScratchConfig
from agentark_jax.models.transformer import hidden_states, init_params
from agentark_jax.objectives.advantages import returns
from agentark_jax.objectives.base import combined
from agentark_jax.objectives.config import PolicyLossConfig, ValueLossConfig
from agentark_jax.objectives.grpo import GRPO, grpo_loss
from agentark_jax.objectives.ppo import (
    PPO,
    VALUE_HEAD,
    explained_variance,
    generalized_advantages,
    value_loss,
)

GROUPS, MEMBERS, LENGTH = 2, 3, 8
POLICY = PolicyLossConfig(aggregation="sequence", kl_coefficient=0.2)
PARTS = ("old_values", "returns")


def token_rewards(seed):
    """(rewards, values, mask) [G, n, T]: NaN outside of the mask, which has holes and may be empty."""
    rng = np.random.default_rng(seed)
    shape = (GROUPS, MEMBERS, LENGTH)
    mask = rng.random(shape) < rng.choice([0.5, 0.9, 1.0])
    mask[0, 0] = seed % 3 == 0
    arrays = [np.where(mask, rng.normal(size=shape), np.nan).astype(np.float32) for _ in range(2)]
    return *arrays, mask


def reference_advantages(rewards, values, mask, gamma, decay):
    """Σ_l (γλ)^l δ_{t+l}, token by token, in float64."""
    found = np.zeros(mask.shape)
    for place in np.ndindex(*mask.shape[:2]):
        tokens = np.flatnonzero(mask[place])
        earned, seen = (np.float64(array[place][tokens]) for array in (rewards, values))
        deltas = earned + gamma * np.append(seen[1:], 0.0) - seen if len(tokens) else earned
        for index, token in enumerate(tokens):
            found[(*place, token)] = sum((gamma * decay) ** ahead * d for ahead, d in enumerate(deltas[index:]))
    return found


compiled_advantages = jax.jit(generalized_advantages, static_argnums=(3, 4))


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**16), gamma=st.sampled_from([0.0, 0.9, 1.0]), decay=st.sampled_from([0.0, 0.95, 1.0]))
def test_advantages_equal_a_numpy_reference(seed, gamma, decay):
    rewards, seen, mask = token_rewards(seed)
    advantages, goals = compiled_advantages(rewards, seen, mask, gamma, decay)
    expected = reference_advantages(rewards, seen, mask, gamma, decay)
    assert_close(advantages, expected)
    assert_close(goals, expected + np.where(mask, seen, 0))
    if gamma == decay == 1.0:
        assert_close(goals, returns(rewards, mask))


def test_advantages_by_hand():
    rewards, seen = np.float32([[[0, 0, 1, 9]]]), np.float32([[[0.2, 0.4, 0.8, 9]]])
    mask = np.bool_([[[1, 1, 1, 0]]])
    advantages, goals = generalized_advantages(rewards, seen, mask, 1.0, 0.5)
    assert_close(advantages, [[[0.2 + 0.5 * 0.5, 0.4 + 0.5 * 0.2, 0.2, 0]]])
    assert_close(goals, [[[0.65, 0.9, 1, 0]]])


@pytest.mark.parametrize(("key", "values"), [("gamma", (1.1, 0.9)), ("gae_lambda", (1.0, -0.1))])
def test_impossible_discounts_are_refused(key, values):
    with pytest.raises(UsageError, match=f"^{key}: "):
        generalized_advantages(*token_rewards(0), *values)


def test_explained_variance():
    _, goals, mask = token_rewards(1)
    inside = np.float64(goals[mask])
    close = goals + 0.3 * np.random.default_rng(0).normal(size=goals.shape).astype(np.float32)
    expected = 1 - np.var(inside - np.float64(close[mask])) / np.var(inside)
    assert 0 < expected < 1
    assert_close(explained_variance(close, goals, mask), expected)
    assert_close(explained_variance(goals, goals, mask), 1)
    assert abs(explained_variance(np.ones_like(goals), goals, mask)) < 1e-6
    assert explained_variance(goals, np.ones_like(goals), mask) == 0
    assert explained_variance(goals, goals, np.zeros_like(mask)) == 0


def batch_of(seed, share=0.6):
    """A batch of `test_grpo.problem` with values (NaN outside of what was sampled), those of now [B, T], the mask."""
    batch, _, predicted = problem(seed, share)
    rng = np.random.default_rng(seed + 1)
    goals = rng.normal(size=predicted.shape)
    old = goals + 0.5 * rng.normal(size=predicted.shape)
    now = old + 0.4 * rng.normal(size=predicted.shape)
    for name, array in (("returns", goals), ("old_values", old)):
        batch[name] = np.where(predicted, array, np.nan).astype(np.float32)
    return batch, np.where(predicted, now, np.nan).astype(np.float32), predicted


def reference_value_loss(now, batch, predicted, clip):
    """(loss, share of clipped tokens) in float64."""
    total, clipped = 0.0, 0
    for place in zip(*np.nonzero(predicted), strict=True):
        goal, old = float(batch["returns"][place]), float(batch["old_values"][place])
        squares = [(now[place] - goal) ** 2]
        if clip is not None:
            squares.append((min(max(now[place], old - clip), old + clip) - goal) ** 2)
        total += max(squares) / 2
        clipped += squares[-1] > squares[0]
    return total / max(predicted.sum(), 1), clipped / max(predicted.sum(), 1)


@partial(jax.jit, static_argnames="clip")
def ours(now, batch, clip):
    totals = PPO(POLICY, ValueLossConfig(clip=clip)).totals(batch)
    return jax.value_and_grad(lambda now: value_loss(now, batch, totals, clip), has_aux=True)(now[:, 1:])


@pytest.mark.parametrize("clip", [0.2, None])
@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 2**16), share=st.sampled_from([0.0, 0.6, 1.0]))
def test_value_loss_equals_a_numpy_reference_and_finite_differences(clip, seed, share):
    batch, now, predicted = batch_of(seed, share)
    (loss, metrics), gradient = ours(now, batch, clip)
    now = now.astype(np.float64)
    expected, clipped = reference_value_loss(now, batch, predicted, clip)
    assert_close(loss, expected)
    assert_close(metrics["value/loss"], expected)
    if clip is not None:
        assert_close(metrics["value/clipped"], clipped)
    if share:
        assert_close(metrics["value/error"], (now - batch["returns"])[predicted].mean())
    slopes = np.zeros(predicted.shape)
    for place in np.argwhere(predicted):
        sides = []
        for step in (1e-6, -1e-6):
            moved = now.copy()
            moved[tuple(place)] += step
            sides.append(reference_value_loss(moved, batch, predicted, clip)[0])
        slopes[tuple(place)] = (sides[0] - sides[1]) / 2e-6
    assert_close(gradient, slopes[:, 1:], rtol=1e-4)


def test_some_values_are_clipped():
    batch, now, _ = batch_of(4, share=1.0)
    (_, metrics), gradient = ours(now, batch, 0.2)
    assert 0 < metrics["value/clipped"] < 1
    assert np.sum(np.asarray(gradient) == 0) > np.sum(np.asarray(ours(now, batch, None)[1]) == 0)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """(config, parameters with a value head)"""
    directory = tmp_path_factory.mktemp("model")
    shape = ScratchConfig(hidden_size=16, layers=1, heads=2, kv_heads=1, head_dim=8, intermediate_size=16)
    (directory / "config.json").write_text(json.dumps(shape.to_hf(vocabulary=13, bos_id=2, eos_id=1)))
    config = load_config(directory)
    return config, {**init_params(config, 0), VALUE_HEAD: init_head(config, "value", 1)}


@partial(jax.jit, static_argnames=("config", "objective"))
def stepped(config, params, batch, totals, objective):
    """((loss, metrics), gradients)"""
    return jax.value_and_grad(lambda p: objective.loss(config, p, batch, totals, remat="none"), has_aux=True)(params)


def whole(model, batch, objective):
    return stepped(*model, batch, objective.totals(batch), objective)


def test_ppo_is_the_policy_loss_and_the_value_loss_of_one_network(model):
    config, params = model
    batch, _, _ = batch_of(7)
    objective = PPO(POLICY, ValueLossConfig(0.7, 0.1))
    (loss, metrics), gradients = whole(model, batch, objective)
    totals = objective.totals(batch)

    @jax.jit
    def separately(params):
        trunk = {name: tree for name, tree in params.items() if name != VALUE_HEAD}
        policy = grpo_loss(config, trunk, batch, totals, POLICY)[0]
        hidden = hidden_states(config, trunk, batch["ids"], POSITIONS, SEGMENTS)
        value = value_loss(values(params[VALUE_HEAD], hidden)[:, :-1], batch, totals, 0.1)[0]
        return policy + 0.7 * value, (policy, value)

    (expected, (policy, value)), wanted = jax.value_and_grad(separately, has_aux=True)(params)
    assert_close(loss, expected)
    assert_close(metrics["loss"], expected)
    jax.tree.map(partial(assert_close, rtol=1e-4), gradients, wanted)
    sums = objective.sums(metrics)
    assert_close([sums["loss"], sums["value"]], [policy, value])
    assert sums.keys() == objective.coefficients.keys() <= totals.keys()
    assert {"tokens", "loss_tokens", "entropy", "kl/reference"} <= metrics.keys()


def test_grpo_is_its_loss(model):
    config, params = model
    trunk = {name: tree for name, tree in params.items() if name != VALUE_HEAD}
    batch, _, _ = batch_of(7)
    objective = GRPO(POLICY)
    (loss, metrics), gradients = stepped(config, trunk, batch, objective.totals(batch), objective)
    assert_close(loss, jax.jit(partial(grpo_loss, config, loss=POLICY))(trunk, batch, objective.totals(batch))[0])
    assert objective.sums(metrics) == {"loss": metrics["loss"]}
    assert objective.coefficients.keys() <= objective.totals(batch).keys()
    assert all(np.any(np.asarray(leaf)) for leaf in jax.tree.leaves(gradients))


def test_gradients_reach_what_a_term_trains(model):
    batch, _, _ = batch_of(8)
    both, policy_alone = (whole(model, batch, PPO(POLICY, ValueLossConfig(factor)))[1] for factor in (0.5, 0.0))
    assert all(np.any(np.asarray(leaf)) for leaf in jax.tree.leaves(both))
    assert not any(np.any(np.asarray(leaf)) for leaf in jax.tree.leaves(policy_alone[VALUE_HEAD]))
    batch["advantages"] = np.zeros_like(batch["advantages"])
    value_alone = whole(model, batch, PPO(PolicyLossConfig(), ValueLossConfig()))[1]
    reached = jax.tree.map(lambda leaf: bool(np.any(np.asarray(leaf))), value_alone)
    assert all(jax.tree.leaves(reached["scanned"]))
    assert all(jax.tree.leaves(reached[VALUE_HEAD]))


def test_micro_batches_add_up_to_the_batch(model):
    config, params = model
    batch, _, _ = batch_of(3)
    objective = PPO(POLICY, ValueLossConfig())
    totals = objective.totals(batch)
    parts = []
    for row in range(len(SEGMENTS)):
        micro = jax.tree.map(lambda array, row=row: array[row : row + 1], batch)
        parts.append(stepped(config, params, micro, totals, objective))
    (_, metrics), gradients = whole(model, batch, objective)
    jax.tree.map(assert_close, combined(combined(*(part[0][1] for part in parts[:2])), parts[2][0][1]), metrics)
    summed = jax.tree.map(lambda *leaves: sum(leaves), *(part[1] for part in parts))
    jax.tree.map(partial(assert_close, rtol=1e-4), summed, gradients)


def test_packed_rows_give_the_loss_and_gradient_of_separate_ones(model):
    batch, _, _ = batch_of(13, share=0.8)
    objective = PPO(POLICY, ValueLossConfig())
    flat = batch | {"weights": batch["weights"]["completion"]}
    separate = {name: [] for name in ("ids", "positions", "segment_ids", "weights", *ARRAYS, *PARTS)}
    for row, segments in enumerate(SEGMENTS):
        for segment in sorted(set(segments.tolist()) - {0}):
            places = np.flatnonzero(segments == segment)
            for name, rows in separate.items():
                one = np.zeros(SEGMENTS.shape[1], flat[name].dtype)
                one[: len(places)] = 1 if name == "segment_ids" else flat[name][row, places]
                rows.append(one)
    apart = {name: np.stack(rows) for name, rows in separate.items()}
    apart["weights"] = {"completion": apart["weights"]}
    (loss, metrics), gradients = whole(model, batch, objective)
    (expected, known), wanted = whole(model, apart, objective)
    assert_close(loss, expected)
    jax.tree.map(assert_close, metrics, known)
    jax.tree.map(partial(assert_close, rtol=1e-4), gradients, wanted)


@pytest.mark.parametrize(("key", "fix"), [("returns", "generalized_advantages"), ("old_values", "clip to null")])
def test_an_array_that_is_missing_is_named(key, fix):
    batch, now, _ = batch_of(0)
    del batch[key]
    with pytest.raises(UsageError, match=f"{key}: .*{fix}"):
        value_loss(jnp.asarray(now[:, 1:]), batch, PPO(POLICY, ValueLossConfig()).totals(batch), 0.2)


@pytest.mark.parametrize(("key", "value"), [("coefficient", -1.0), ("coefficient", np.inf), ("clip", 0.0)])
def test_impossible_values_are_refused(key, value):
    with pytest.raises(UsageError, match=f"^{key}: "):
        ValueLossConfig(**{key: value})
