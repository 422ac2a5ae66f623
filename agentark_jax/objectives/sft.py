"""Supervised fine-tuning on named, weighted loss terms (R-SFT: reasoning-enhanced SFT, arXiv 2602.03955 §3).

A batch is a dict of arrays [B, T]: `ids`, `positions` (restarting with every segment), `segment_ids` (0 is padding) and
`weights` {term: [B, T]}. The weight at t is that of predicting `ids[t]` from the tokens of the same segment before it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from agentark_jax.models.attention import XLA, AttentionPlan
from agentark_jax.models.config import ModelConfig, Remat
from agentark_jax.models.transformer import hidden_states, unembedding
from agentark_jax.objectives.chunked import chunked_nll

Batch = Mapping[str, Any]


@dataclass(frozen=True)
class SFT:
    """The `Objective` of supervised fine-tuning: `sft_loss` with a coefficient for each of the batch's terms."""

    coefficients: Mapping[str, float]

    def totals(self, batch: Batch) -> dict[str, Float[Array, ""]]:
        return term_totals(batch)

    def loss(
        self, config: ModelConfig, params: Any, batch: Batch, totals: Mapping[str, Any], **settings: Any
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        return sft_loss(config, params, batch, totals, self.coefficients, **settings)

    def sums(self, metrics: Mapping[str, Any]) -> dict[str, Any]:
        """Of the metrics with totals of 1: Σ weight·nll of each term."""
        return {term: metrics[f"nll/{term}"] for term in self.coefficients}


def predictable(segment_ids: Int[Array, "B T"]) -> Bool[Array, "B T-1"]:
    """Whether token t+1 continues the segment of token t: only such tokens are ever predicted."""
    return (segment_ids[:, 1:] == segment_ids[:, :-1]) & (segment_ids[:, 1:] > 0)


def term_weights(batch: Batch) -> dict[str, Float[Array, "B T-1"]]:
    """Each term's weights of the predictions made at positions 0 … T-2, zero where nothing can be predicted."""
    continues = predictable(batch["segment_ids"])
    return {term: jnp.where(continues, weights[:, 1:], 0.0) for term, weights in batch["weights"].items()}


def term_totals(batch: Batch) -> dict[str, Float[Array, ""]]:
    """The denominator of every term: its summed weights. Sum it over micro-batches and devices before `sft_loss`."""
    return {term: weights.sum() for term, weights in term_weights(batch).items()}


def sft_loss(
    config: ModelConfig,
    params: Any,
    batch: Batch,
    totals: Mapping[str, Float[Array, ""]],
    coefficients: Mapping[str, float],
    *,
    remat: Remat = "products",
    dtype: jax.typing.DTypeLike | None = None,
    attention: AttentionPlan = XLA,
    chunk_bytes: int | None = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """loss = Σ_term coefficient · Σ_t weight·nll / total, and its metrics; differentiable in `params`.

    `totals` are those of the whole optimizer step and `coefficients` has one number per term. Loss and metrics of the
    micro-batches of a step therefore *add up* to those of one big batch: `loss`, `nll/<term>` (nats per unit of
    weight), `accuracy/<term>` (the share of the weight whose token no other is likelier than), `tokens` (not padding)
    and `loss_tokens` (with a non-zero weight in some term).
    The network computes in `dtype` (None: that of the parameters); log-likelihoods and their sums are fp32.
    """
    ids, positions, segment_ids = batch["ids"], batch["positions"], batch["segment_ids"]
    hidden = hidden_states(config, params, ids, positions, segment_ids, remat, dtype, attention)
    return sft_loss_from_hidden(
        hidden,
        unembedding(config, params),
        batch,
        totals,
        coefficients,
        soft_cap=config.final_softcap,
        chunk_bytes=chunk_bytes,
    )


def sft_loss_from_hidden(
    hidden: Float[Array, "B T D"],
    head: Float[Array, "V D"],
    batch: Batch,
    totals: Mapping[str, Float[Array, ""]],
    coefficients: Mapping[str, float],
    *,
    soft_cap: float | None = None,
    chunk_bytes: int | None = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """`sft_loss` after the trunk: from final hidden states and the [V, D] head."""
    weights = term_weights(batch)
    shares = {term: share(value, totals[term]) for term, value in weights.items()}
    folded = jnp.sum(jnp.stack([coefficients[term] * part for term, part in shares.items()]), axis=0)
    has_loss = jnp.any(jnp.stack([value != 0 for value in weights.values()]), axis=0)
    loss, scores = chunked_nll(
        hidden[:, :-1].reshape(-1, hidden.shape[-1]),
        head,
        batch["ids"][:, 1:].reshape(-1),
        folded.reshape(-1),
        has_loss.reshape(-1),
        soft_cap=soft_cap,
        chunk_bytes=chunk_bytes,
    )
    nll, correct = (array.reshape(has_loss.shape) for array in (-scores.logprobs, scores.correct))
    metrics = {f"nll/{term}": jnp.sum(part * nll) for term, part in shares.items()}
    metrics |= {f"accuracy/{term}": jnp.sum(part * correct) for term, part in shares.items()}
    metrics["loss"] = jax.lax.stop_gradient(loss)
    metrics["tokens"] = (batch["segment_ids"] > 0).sum()
    metrics["loss_tokens"] = has_loss.sum()
    return loss, metrics


def share(part: Array, total: Array) -> Array:
    """part / total, and zero where there is nothing of it in the whole step."""
    return jnp.where(total == 0, 0.0, part / jnp.where(total == 0, 1.0, total))
