"""Policy gradients on sampled completions: GRPO (arXiv 2402.03300) and its kin, with one loss for all of them.

A batch is that of `sft_loss` (a token with any weight is one that the policy sampled) and further arrays [B, T], which
as the weights do belong to the prediction of `ids[t]`: `advantages`; `old_logprobs`, of the policy at the beginning of
this rollout's updates (not read if `on_policy`); `rollout_logprobs`, what the engine said when it sampled (read with a
`rollout_cap`); `reference_logprobs` (read with a `kl_coefficient`). All log-probabilities are at the sampling
temperature. What stands outside of the sampled tokens is never looked at.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from agentark_jax.errors import UsageError
from agentark_jax.models.attention import XLA, AttentionPlan
from agentark_jax.models.config import ModelConfig, Remat
from agentark_jax.models.transformer import hidden_states, unembedding
from agentark_jax.objectives.chunked import chunked_logprobs
from agentark_jax.objectives.config import PolicyLossConfig
from agentark_jax.objectives.sft import Batch, share, term_weights

Metrics = dict[str, Float[Array, ""]]

LARGEST_LOG_RATIO = 20.0


@dataclass(frozen=True)
class GRPO:
    """The `Objective` of policy gradients on sampled completions: `grpo_loss`, as one term."""

    policy: PolicyLossConfig

    @property
    def coefficients(self) -> Mapping[str, float]:
        return {"loss": 1.0}

    def totals(self, batch: Batch) -> dict[str, Float[Array, ""]]:
        return policy_totals(batch, self.policy)

    def loss(
        self, config: ModelConfig, params: Any, batch: Batch, totals: Mapping[str, Any], **settings: Any
    ) -> tuple[Float[Array, ""], Metrics]:
        return grpo_loss(config, params, batch, totals, self.policy, **settings)

    def sums(self, metrics: Mapping[str, Any]) -> dict[str, Any]:
        return {"loss": metrics["loss"]}


def sampled_tokens(batch: Batch) -> Bool[Array, "B T-1"]:
    """Which of the predictions made at positions 0 … T-2 are of tokens that the policy sampled."""
    return jnp.any(jnp.stack([weights != 0 for weights in term_weights(batch).values()]), axis=0)


def policy_totals(batch: Batch, config: PolicyLossConfig) -> dict[str, Float[Array, ""]]:
    """The denominators of `loss` and of means over `tokens`. Sum them over micro-batches and devices before the loss.

    With `token` that of the loss is the number of sampled tokens, else the number of completions that have any.
    """
    sampled = sampled_tokens(batch).astype(jnp.float32)
    tokens = sampled.sum()
    if config.aggregation == "token":
        return {"loss": tokens, "tokens": tokens}
    return {"loss": _sequence_mean_weights(sampled, batch["segment_ids"][:, 1:]).sum(), "tokens": tokens}


def grpo_loss(
    config: ModelConfig,
    params: Any,
    batch: Batch,
    totals: Mapping[str, Float[Array, ""]],
    loss: PolicyLossConfig,
    *,
    remat: Remat = "products",
    dtype: jax.typing.DTypeLike | None = None,
    attention: AttentionPlan = XLA,
    chunk_bytes: int | None = None,
) -> tuple[Float[Array, ""], Metrics]:
    """`policy_loss` of the network, differentiable in `params`; entropies are reported and carry no gradient.

    The network computes in `dtype` (None: that of the parameters); log-probabilities and what follows are fp32.
    """
    ids, positions, segment_ids = batch["ids"], batch["positions"], batch["segment_ids"]
    hidden = hidden_states(config, params, ids, positions, segment_ids, remat, dtype, attention)
    head = unembedding(config, params)
    return grpo_loss_from_hidden(
        hidden, head, batch, totals, loss, soft_cap=config.final_softcap, chunk_bytes=chunk_bytes
    )


def grpo_loss_from_hidden(
    hidden: Float[Array, "B T D"],
    head: Float[Array, "V D"],
    batch: Batch,
    totals: Mapping[str, Float[Array, ""]],
    loss: PolicyLossConfig,
    *,
    soft_cap: float | None = None,
    chunk_bytes: int | None = None,
) -> tuple[Float[Array, ""], Metrics]:
    """`grpo_loss` after the trunk: from final hidden states and the [V, D] head."""
    sampled = sampled_tokens(batch)
    scores = chunked_logprobs(
        hidden[:, :-1].reshape(-1, hidden.shape[-1]),
        head,
        batch["ids"][:, 1:].reshape(-1),
        sampled.reshape(-1),
        temperature=loss.temperature,
        soft_cap=soft_cap,
        entropy=True,
        chunk_bytes=chunk_bytes,
    )
    value, metrics = policy_loss(scores.logprobs.reshape(sampled.shape), batch, totals, loss)
    assert scores.entropy is not None
    metrics["entropy"] = share(jax.lax.stop_gradient(scores.entropy).sum(), totals["tokens"])
    metrics["tokens"] = (batch["segment_ids"] > 0).sum()
    return value, metrics


def policy_loss(
    logprobs: Float[Array, "B T-1"],
    batch: Batch,
    totals: Mapping[str, Float[Array, ""]],
    config: PolicyLossConfig,
) -> tuple[Float[Array, ""], Metrics]:
    """The mean over tokens, as `aggregation` says, of w·-min(ρA, clip(ρ)A) + kl_coefficient·KL, and its metrics.

    ρ = π/π_old; A the token's advantage; w the weight of truncated importance sampling, without gradient. `logprobs`
    are those of the policy for the predictions made at positions 0 … T-2. Log-ratios stop, with their gradients, at
    ±20: everything stays finite. `totals` are those of the whole optimizer step (`policy_totals`), so loss and metrics
    of micro-batches add up to those of one big batch, except `ratio/max`, of which the largest is meant (`combined`).

    Metrics: `loss`, its parts `loss/policy` and `loss/kl` (times its coefficient), `loss_tokens`, and as means over
    sampled tokens `ratio/mean`; `clipped/low` and `clipped/high`, where the clip takes the gradient; `kl/old`,
    KL(π_old ‖ π); with a `rollout_cap` `kl/rollout`, KL(π_rollout ‖ π_old), `rollout/weight` and `rollout/truncated`;
    with a `kl_coefficient` `kl/reference`, KL(π ‖ π_ref). All KLs are k3 estimates (never negative).

    Raises UsageError naming an array that the config reads and the batch does not have.
    """
    sampled, segments = sampled_tokens(batch), batch["segment_ids"][:, 1:]
    mask = sampled.astype(jnp.float32)

    def known(key: str, otherwise: str) -> Array:
        if key not in batch:
            raise UsageError(f"{key}: the batch has none; add them to it, or set {otherwise}")
        return jnp.where(sampled, batch[key][:, 1:], 0.0).astype(jnp.float32)

    logprobs = jnp.where(sampled, logprobs, 0.0).astype(jnp.float32)
    current = jax.lax.stop_gradient(logprobs)
    old = current if config.on_policy else known("old_logprobs", "on_policy to true")
    advantages = jnp.where(sampled, batch["advantages"][:, 1:], 0.0).astype(jnp.float32)

    log_ratio = jnp.clip(logprobs - old, -LARGEST_LOG_RATIO, LARGEST_LOG_RATIO)
    used = log_ratio
    if config.ratio == "sequence":
        of_sequence = _sequence_sums(_sequence_mean_weights(mask, segments) * log_ratio, segments)
        used = logprobs - current + jax.lax.stop_gradient(of_sequence)
    ratio = jnp.exp(used)
    low = sampled & (ratio < 1 - config.clip_low) & (advantages < 0)
    high = sampled & (ratio > 1 + config.clip_high) & (advantages > 0)
    bounded = jnp.where(low, 1 - config.clip_low, jnp.where(high, 1 + config.clip_high, ratio))
    objective = bounded * advantages

    of_tokens = {"ratio/mean": ratio, "clipped/low": low, "clipped/high": high, "kl/old": _k3(log_ratio)}
    if config.rollout_cap is not None:
        gap = old - known("rollout_logprobs", "rollout_cap to null")
        weight = jax.lax.stop_gradient(jnp.minimum(jnp.exp(gap), config.rollout_cap))
        objective = weight * objective
        truncated = jnp.exp(gap) > config.rollout_cap
        of_tokens |= {"kl/rollout": _k3(gap), "rollout/weight": weight, "rollout/truncated": truncated}

    weights = _sequence_mean_weights(mask, segments) if config.aggregation == "sequence" else mask
    weights = weights / (config.max_tokens or 1)
    parts = {"loss/policy": share(-jnp.sum(weights * objective), totals["loss"])}
    if config.kl_coefficient:
        kl = _k3(known("reference_logprobs", "kl_coefficient to 0") - logprobs)
        of_tokens["kl/reference"] = kl
        parts["loss/kl"] = config.kl_coefficient * share(jnp.sum(weights * kl), totals["loss"])

    value = sum(parts.values(), jnp.zeros(()))
    metrics = {name: share(jnp.sum(mask * values), totals["tokens"]) for name, values in of_tokens.items()}
    metrics |= {**parts, "loss": value, "ratio/max": jnp.max(mask * ratio), "loss_tokens": sampled.sum()}
    return value, jax.lax.stop_gradient(metrics)


def _k3(log_ratio: Array) -> Array:
    """exp(x) - x - 1: where x = log(q/p) of what p sampled, it has the mean KL(p ‖ q) and is never negative."""
    bounded = jnp.clip(log_ratio, -LARGEST_LOG_RATIO, LARGEST_LOG_RATIO)
    return jnp.expm1(bounded) - bounded


def _sequence_sums(values: Float[Array, "B T"], segments: Int[Array, "B T"]) -> Float[Array, "B T"]:
    """At each token the sum of the values of its segment."""

    def of_row(values: Array, segments: Array) -> Array:
        return jax.ops.segment_sum(values, segments, num_segments=len(values) + 2)[segments]

    return jax.vmap(of_row)(values, segments)


def _sequence_mean_weights(mask: Float[Array, "B T"], segments: Int[Array, "B T"]) -> Float[Array, "B T"]:
    """1 / number of the segment's masked tokens at each of them: the weights of a mean over each sequence."""
    return mask / jnp.maximum(_sequence_sums(mask, segments), 1.0)
