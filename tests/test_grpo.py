"""The policy loss: against an independent NumPy reference, finite differences, the plain policy gradient and TRL."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import trl_losses
from hypothesis import given, settings
from hypothesis import strategies as st

from agentark_jax.errors import UsageError
from agentark_jax.models.config import load_config
from agentark_jax.models.source import ScratchConfig
from agentark_jax.models.transformer import init_params
from agentark_jax.objectives.base import combined
from agentark_jax.objectives.config import PolicyLossConfig
from agentark_jax.objectives.grpo import (
    grpo_loss,
    grpo_loss_from_hidden,
    policy_loss,
    policy_totals,
)

CONFIGS = [
    PolicyLossConfig(rollout_cap=None),
    PolicyLossConfig(clip_high=0.28, rollout_cap=1.1, kl_coefficient=0.3),
    PolicyLossConfig(aggregation="sequence", clip_low=0.1, kl_coefficient=0.2, rollout_cap=None),
    PolicyLossConfig(aggregation="sequence", ratio="sequence", clip_low=0.05, clip_high=0.1, rollout_cap=1.2),
    PolicyLossConfig(aggregation="constant", max_tokens=12, rollout_cap=None),
    PolicyLossConfig(aggregation="constant", max_tokens=12, ratio="sequence", kl_coefficient=0.1),
    PolicyLossConfig(on_policy=True, rollout_cap=1.1, kl_coefficient=0.2),
]
SEGMENTS = np.int32([[1, 1, 1, 1, 2, 2, 2, 2, 2, 0], [1] * 10, [1, 1, 2, 2, 2, 3, 3, 3, 0, 0]])
POSITIONS = np.int32([[0, 1, 2, 3, 0, 1, 2, 3, 4, 0], [*range(10)], [0, 1, 0, 1, 2, 0, 1, 2, 0, 0]])
ARRAYS = ("advantages", "old_logprobs", "rollout_logprobs", "reference_logprobs")


def assert_close(actual, expected, rtol=1e-5):
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    np.testing.assert_allclose(actual, expected, rtol=rtol, atol=1e-5 * max(1e-2, np.abs(expected).max(initial=0.0)))


def problem(seed, share=0.6, vocabulary=13):
    """Packed rows, NaN in what does not belong to sampled tokens; and log-probabilities of the policy, [B, T-1]."""
    rng = np.random.default_rng(seed)
    shape = SEGMENTS.shape
    sampled = (rng.random(shape) < share) & (SEGMENTS > 0)
    logprobs = -rng.exponential(size=shape)
    old = logprobs + 0.4 * rng.normal(size=shape)
    arrays = {
        "advantages": rng.normal(size=shape),
        "old_logprobs": old,
        "rollout_logprobs": old + 0.15 * rng.normal(size=shape),
        "reference_logprobs": logprobs + 0.4 * rng.normal(size=shape),
    }
    predicted = sampled.copy()
    predicted[:, 0] = False
    predicted[:, 1:] &= SEGMENTS[:, 1:] == SEGMENTS[:, :-1]
    batch = {
        "ids": rng.integers(0, vocabulary, shape).astype(np.int32),
        "positions": POSITIONS,
        "segment_ids": SEGMENTS,
        "weights": {"completion": sampled.astype(np.float32)},
    }
    batch |= {name: np.where(predicted, values, np.nan).astype(np.float32) for name, values in arrays.items()}
    return batch, np.where(predicted, logprobs, np.nan).astype(np.float32)[:, 1:], predicted


def sequences(batch, predicted):
    """The places [(row, t), …] of each sequence's sampled tokens, where it has any."""
    for row, segments in enumerate(batch["segment_ids"]):
        for segment in sorted(set(segments.tolist()) - {0}):
            places = [(row, t) for t in np.flatnonzero((segments == segment) & predicted[row])]
            if places:
                yield places


def reference_loss(logprobs, start, batch, predicted, config):
    """(loss, metrics), sequence by sequence in float64; `logprobs` [B, T]. What carries no gradient is at `start`."""
    total, denominator, tokens, metrics = 0.0, 0.0, 0, dict.fromkeys(("low", "high", "ratio", "truncated", "kl"), 0.0)
    largest = 0.0
    known = {name: np.asarray(batch[name], np.float64) for name in ARRAYS}
    old = start if config.on_policy else known["old_logprobs"]
    for places in sequences(batch, predicted):
        mean_log_ratio = np.mean([start[place] - old[place] for place in places])
        summed = 0.0
        for place in places:
            ratio = np.exp(logprobs[place] - old[place])
            if config.ratio == "sequence":
                ratio = np.exp(mean_log_ratio) * np.exp(logprobs[place] - start[place])
            advantage = known["advantages"][place]
            clipped = np.clip(ratio, 1 - config.clip_low, 1 + config.clip_high)
            objective = min(ratio * advantage, clipped * advantage)
            if config.rollout_cap is not None:
                weight = np.exp(old[place] - known["rollout_logprobs"][place])
                objective *= min(weight, config.rollout_cap)
                metrics["truncated"] += weight > config.rollout_cap
            gap = known["reference_logprobs"][place] - logprobs[place]
            kl = np.exp(gap) - gap - 1
            summed += -objective + config.kl_coefficient * kl
            tokens += 1
            metrics["low"] += ratio < 1 - config.clip_low and advantage < 0
            metrics["high"] += ratio > 1 + config.clip_high and advantage > 0
            metrics["ratio"] += ratio
            metrics["kl"] += kl
            largest = max(largest, ratio)
        divisor = {"token": 1, "sequence": len(places), "constant": config.max_tokens}[config.aggregation]
        total += summed / divisor
        denominator += len(places) if config.aggregation == "token" else 1
    if not tokens:
        return 0.0, metrics | {"largest": 0.0}
    return total / denominator, {name: value / tokens for name, value in metrics.items()} | {"largest": largest}


@partial(jax.jit, static_argnames="config")
def ours(logprobs, batch, config):
    loss = partial(policy_loss, batch=batch, totals=policy_totals(batch, config), config=config)
    return jax.value_and_grad(loss, has_aux=True)(logprobs)


@pytest.mark.parametrize("config", CONFIGS)
@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 2**16), share=st.sampled_from([0.1, 0.6, 1.0]))
def test_loss_equals_a_numpy_reference_and_finite_differences(config, seed, share):
    batch, logprobs, predicted = problem(seed, share)
    (value, metrics), gradient = ours(logprobs, batch, config)
    start = np.pad(np.asarray(logprobs, np.float64), ((0, 0), (1, 0)))
    expected, known = reference_loss(start, start, batch, predicted, config)
    assert_close(value, expected)
    assert_close(metrics["loss"], expected)
    names = {"ratio/mean": "ratio", "clipped/low": "low", "clipped/high": "high", "ratio/max": "largest"}
    names |= {"rollout/truncated": "truncated"} if config.rollout_cap is not None else {}
    names |= {"kl/reference": "kl"} if config.kl_coefficient else {}
    for name, key in names.items():
        assert_close(metrics[name], known[key])

    slopes, step = np.zeros(predicted.shape), 1e-6
    for place in np.argwhere(predicted):
        sides = []
        for sign in (1, -1):
            moved = start.copy()
            moved[tuple(place)] += sign * step
            sides.append(reference_loss(moved, start, batch, predicted, config)[0])
        slopes[tuple(place)] = (sides[0] - sides[1]) / (2 * step)
    assert_close(gradient, slopes[:, 1:], rtol=1e-4)


def test_the_problems_have_everything_that_is_tested():
    batch, logprobs, _ = problem(1, share=1.0)
    _, metrics = ours(logprobs, batch, CONFIGS[1])[0]
    for name in ("clipped/low", "clipped/high", "rollout/truncated", "kl/reference", "kl/old", "kl/rollout"):
        assert 0 < metrics[name] < 1
    assert metrics["rollout/weight"] != 1


def test_equal_advantages_in_a_sequence_give_the_gradient_of_gspo():
    # There (arXiv 2507.18071, eq. 5) the ratio of a sequence is differentiated as a whole.
    config = CONFIGS[3]
    batch, logprobs, predicted = problem(6)
    batch["rollout_logprobs"] = batch["old_logprobs"]
    groups = list(sequences(batch, predicted))
    for index, places in enumerate(groups):
        for place in places:
            batch["advantages"][place] = (-1) ** index * (1 + index)

    def gspo(logprobs):
        ratios = [np.exp(np.mean([logprobs[p] - float(batch["old_logprobs"][p]) for p in places])) for places in groups]
        advantages = [float(batch["advantages"][places[0]]) for places in groups]
        clipped = np.clip(ratios, 1 - config.clip_low, 1 + config.clip_high)
        return -np.mean(np.minimum(ratios * np.asarray(advantages), clipped * advantages))

    start, step = np.pad(np.asarray(logprobs, np.float64), ((0, 0), (1, 0))), 1e-6
    (value, metrics), gradient = ours(logprobs, batch, config)
    assert_close(value, gspo(start))
    assert metrics["clipped/low"] > 0
    assert metrics["clipped/high"] > 0
    for place in np.argwhere(predicted):
        up, down = start.copy(), start.copy()
        up[tuple(place)] += step
        down[tuple(place)] -= step
        slope = (gspo(up) - gspo(down)) / (2 * step)
        np.testing.assert_allclose(gradient[place[0], place[1] - 1], slope, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("ratio", ["token", "sequence"])
@pytest.mark.parametrize("on_policy", [True, False])
def test_of_identical_policies_the_ratio_is_one_and_the_gradient_the_policy_gradient(ratio, on_policy):
    rng = np.random.default_rng(11)
    batch, _, predicted = problem(11)
    hidden, head = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((*SEGMENTS.shape, 5), (13, 5)))
    config = PolicyLossConfig(
        aggregation="sequence", ratio=ratio, rollout_cap=None, temperature=0.7, on_policy=on_policy
    )

    @jax.jit
    def scored(hidden, head):  # (log-probabilities of ids[t] at t, of everything)
        scores = jax.nn.log_softmax(jnp.einsum("btd,vd->btv", hidden, head) / 0.7)[:, :-1]
        chosen = jnp.take_along_axis(scores, batch["ids"][:, 1:, None], axis=-1)[..., 0]
        return jnp.pad(chosen, ((0, 0), (1, 0))), scores

    groups, factors = list(sequences(batch, predicted)), np.zeros(predicted.shape, np.float32)
    for places in groups:
        for place in places:
            factors[place] = -batch["advantages"][place] / len(places) / len(groups)
    expected = jax.jit(jax.grad(lambda *of: jnp.sum(factors * scored(*of)[0]), (0, 1)))(hidden, head)

    batch["old_logprobs"] = np.where(predicted, scored(hidden, head)[0], np.nan)
    if on_policy:
        del batch["old_logprobs"]

    def loss(hidden, head):
        return grpo_loss_from_hidden(hidden, head, batch, policy_totals(batch, config), config, chunk_bytes=4 * 13 * 4)

    (_, metrics), found = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(hidden, head)
    jax.tree.map(assert_close, found, expected)
    assert_close([metrics["ratio/mean"], metrics["ratio/max"]], [1, 1])
    assert_close([metrics[name] for name in ("clipped/low", "clipped/high", "kl/old")], [0, 0, 0])
    scores = np.asarray(scored(hidden, head)[1], np.float64)
    entropies = -np.sum(np.exp(scores) * scores, axis=-1)
    assert_close(metrics["entropy"], entropies[predicted[:, 1:]].mean())
    assert metrics["tokens"] == (SEGMENTS > 0).sum()
    assert metrics["loss_tokens"] == predicted.sum()


@pytest.mark.parametrize("config", CONFIGS)
def test_micro_batches_add_up_to_the_batch(config):
    batch, logprobs, _ = problem(3)
    totals = policy_totals(batch, config)
    parts, gradients = [], []
    for row in range(len(logprobs)):
        micro = jax.tree.map(lambda array, row=row: array[row : row + 1], batch)
        loss = partial(policy_loss, batch=micro, totals=totals, config=config)
        (_, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(logprobs[row : row + 1])
        parts.append(metrics)
        gradients.append(gradient)
    (_, whole), gradient = ours(logprobs, batch, config)
    jax.tree.map(assert_close, combined(combined(parts[0], parts[1]), parts[2]), whole)
    assert_close(np.concatenate(gradients), gradient)


@pytest.mark.parametrize("config", CONFIGS)
def test_a_batch_without_sampled_tokens_has_loss_and_gradient_zero(config):
    batch, logprobs, _ = problem(5, share=0.0)
    (value, metrics), gradient = ours(logprobs, batch, config)
    assert value == 0
    assert not np.any(gradient)
    assert all(np.isfinite(metric) for metric in metrics.values())


@pytest.mark.parametrize("gap", [300.0, -300.0])
def test_policies_that_are_far_apart_give_finite_numbers(gap):
    batch, logprobs, _ = problem(9)
    for name in ARRAYS[1:]:
        batch[name] = batch[name] + np.float32(gap)
    config = PolicyLossConfig(kl_coefficient=0.1)
    (_, metrics), gradient = ours(logprobs, batch, config)
    assert np.all(np.isfinite(gradient))
    assert all(np.isfinite(metric) for metric in metrics.values())


@pytest.mark.parametrize(
    ("key", "fix"),
    [
        ("old_logprobs", "on_policy to true"),
        ("rollout_logprobs", "rollout_cap to null"),
        ("reference_logprobs", "kl_coefficient to 0"),
    ],
)
def test_an_array_that_is_missing_is_named(key, fix):
    batch, logprobs, _ = problem(0)
    del batch[key]
    config = PolicyLossConfig(kl_coefficient=0.1)
    with pytest.raises(UsageError, match=f"{key}: .*{fix}"):
        policy_loss(logprobs, batch, policy_totals(batch, config), config)


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("aggregation", {"aggregation": "sum"}),
        ("ratio", {"ratio": "segment"}),
        ("max_tokens", {"aggregation": "constant"}),
        ("max_tokens", {"max_tokens": 5}),
        ("clip_low", {"clip_low": 1.5}),
        ("clip_high", {"clip_high": 0.0}),
        ("temperature", {"temperature": 0.0}),
        ("rollout_cap", {"rollout_cap": 0.0}),
        ("kl_coefficient", {"kl_coefficient": -0.1}),
    ],
)
def test_impossible_values_are_refused(key, values):
    with pytest.raises(UsageError, match=f"^{key}: "):
        PolicyLossConfig(**values)


AGGREGATIONS = {"grpo": "sequence", "dapo": "token", "dr_grpo": "constant"}


TRL = json.loads(trl_losses.TABLE.read_text())


@pytest.mark.parametrize("entry", TRL["losses"], ids=range(len(TRL["losses"])))
def test_losses_and_gradients_equal_those_of_trl(entry):
    tensors = {name: np.asarray(rows) for name, rows in TRL["tensors"].items()}
    case, mask = entry["case"], tensors["mask"]
    aggregation = AGGREGATIONS[case["loss_type"]]
    config = PolicyLossConfig(
        aggregation=aggregation,
        max_tokens=TRL["max_tokens"] if aggregation == "constant" else None,
        ratio=case["importance_sampling_level"],
        clip_low=case["epsilon_low"],
        clip_high=case["epsilon_high"],
        rollout_cap=case["cap"],
        kl_coefficient=case["beta"],
    )

    def row(values):  # after one token of a prompt
        return np.pad(values, ((0, 0), (1, 0))).astype(np.float32)

    per_sequence = np.broadcast_to(tensors["advantages"][:, None], mask.shape)
    batch = {
        "segment_ids": np.pad(mask, ((0, 0), (1, 0)), constant_values=1).astype(np.int32),
        "weights": {"completion": row(mask)},
        "advantages": row(tensors["token_advantages"] if case.get("per_token_advantages") else per_sequence),
        "old_logprobs": row(tensors["old"]),
        "rollout_logprobs": row(tensors["rollout"]),
        "reference_logprobs": row(tensors["reference"]),
    }
    (value, metrics), gradient = ours(tensors["logprobs"].astype(np.float32), batch, config)
    assert_close(value, entry["loss"])
    assert_close(gradient, entry["gradient"])
    if case["beta"]:
        assert_close(metrics["kl/reference"], entry["metrics"]["kl"])
    if case["importance_sampling_level"] == "token":  # else TRL counts sequences
        assert_close(metrics["clipped/low"], entry["metrics"]["clip_ratio/low_mean"])
        assert_close(metrics["clipped/high"], entry["metrics"]["clip_ratio/high_mean"])


def test_packed_rows_give_the_loss_and_gradient_of_separate_ones(tmp_path):
    shape = ScratchConfig(hidden_size=16, layers=1, heads=2, kv_heads=1, head_dim=8, intermediate_size=16)
    (tmp_path / "config.json").write_text(json.dumps(shape.to_hf(vocabulary=13, bos_id=2, eos_id=1)))
    model = load_config(tmp_path)
    config = PolicyLossConfig(aggregation="sequence", ratio="sequence", clip_low=0.05, clip_high=0.05)
    batch, _, _ = problem(13, share=0.8)
    params = init_params(model, 0)
    separate = {name: [] for name in ("ids", "positions", "segment_ids", "weights", *ARRAYS)}
    flat = batch | {"weights": batch["weights"]["completion"]}
    for row, segments in enumerate(SEGMENTS):
        for segment in sorted(set(segments.tolist()) - {0}):
            places = np.flatnonzero(segments == segment)
            for name, rows in separate.items():
                values = np.zeros(SEGMENTS.shape[1], flat[name].dtype)
                values[: len(places)] = 1 if name == "segment_ids" else flat[name][row, places]
                rows.append(values)
    apart = {name: np.stack(rows) for name, rows in separate.items()}
    apart["weights"] = {"completion": apart["weights"]}

    @jax.jit
    def loss(params, batch):
        return jax.value_and_grad(
            lambda params: grpo_loss(model, params, batch, policy_totals(batch, config), config), has_aux=True
        )(params)

    padded = jax.tree.map(lambda rows: np.pad(rows, ((0, len(apart["ids"]) - len(rows)), (0, 0))), batch)
    (value, metrics), gradients = loss(params, padded)
    (expected, known), wanted = loss(params, apart)
    assert_close(value, expected)
    jax.tree.map(assert_close, metrics, known)
    jax.tree.map(partial(assert_close, rtol=1e-4), gradients, wanted)
    assert all(np.any(np.asarray(gradient)) for gradient in jax.tree.leaves(gradients))
