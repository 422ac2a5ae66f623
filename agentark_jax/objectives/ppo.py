"""PPO (arXiv 1707.06347): policy gradients with a learned value function, AgentArk's ablation of GRPO (§3).

The value of a token is what the completion still earns, seen from before the token: the value head's at the position
that predicts it (`models.heads.values`). The head stands on the policy's own trunk, which learns from both losses.

A batch is that of `objectives.grpo` and further arrays [B, T] which, as all others do, belong to the prediction of
`ids[t]`: `returns`, what the values learn, and `old_values`, at the beginning of this rollout's updates.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from agentark_jax.errors import UsageError, require
from agentark_jax.models.attention import XLA, AttentionPlan
from agentark_jax.models.config import ModelConfig, Remat
from agentark_jax.models.heads import values
from agentark_jax.models.transformer import hidden_states, unembedding
from agentark_jax.objectives.base import Metrics
from agentark_jax.objectives.config import PolicyLossConfig, ValueLossConfig
from agentark_jax.objectives.grpo import grpo_loss_from_hidden, policy_totals, sampled_tokens
from agentark_jax.objectives.sft import Batch, share

# What stands beside a model's parameters while its policy is trained by PPO.
VALUE_HEAD = "value_head"


@dataclass(frozen=True)
class PPO:
    """The `Objective` of PPO: `ppo_loss`, of the term `loss`, the policy's, and the term `value`."""

    policy: PolicyLossConfig
    value: ValueLossConfig

    @property
    def coefficients(self) -> Mapping[str, float]:
        return {"loss": 1.0, "value": self.value.coefficient}

    def totals(self, batch: Batch) -> dict[str, Float[Array, ""]]:
        totals = policy_totals(batch, self.policy)
        return {**totals, "value": totals["tokens"]}

    def loss(
        self, config: ModelConfig, params: Any, batch: Batch, totals: Mapping[str, Any], **settings: Any
    ) -> tuple[Float[Array, ""], Metrics]:
        return ppo_loss(config, params, batch, totals, self.policy, self.value, **settings)

    def sums(self, metrics: Mapping[str, Any]) -> dict[str, Any]:
        return {"loss": metrics["loss"] - metrics["loss/value"], "value": metrics["value/loss"]}


def generalized_advantages(
    rewards: Float[Array, "*b T"],
    values: Float[Array, "*b T"],
    mask: Bool[Array, "*b T"],
    gamma: float = 1.0,
    gae_lambda: float = 0.95,
) -> tuple[Float[Array, "*b T"], Float[Array, "*b T"]]:
    """(advantages, returns) of the tokens of the mask, 0 elsewhere: GAE(λ) (arXiv 1506.02438, eq. 16) and A + V.

    A_t = δ_t + γλ·A_t' with δ_t = r_t + γ·V_t' - V_t, t' being the next token of the mask and λ `gae_lambda`. After the
    last one there is nothing, even if the completion was cut off there. With γ = λ = 1 the advantages are the `returns`
    of the rewards less the values; with λ = 0 each looks one token ahead. What is outside of the mask is never looked
    at.

    Raises UsageError for a γ or λ that is not from 0 to 1.
    """
    for key, value in (("gamma", gamma), ("gae_lambda", gae_lambda)):
        require(0 <= value <= 1, key, value, "from 0 to 1")
    rewards, values = (jnp.where(mask, array, 0.0).astype(jnp.float32) for array in (rewards, values))

    def before(later: tuple[Array, Array], token: tuple[Array, ...]) -> tuple[tuple[Array, Array], Array]:
        value_after, advantage_after = later
        reward, value, here = token
        advantage = reward + gamma * value_after - value + gamma * gae_lambda * advantage_after
        kept = jnp.where(here, value, value_after), jnp.where(here, advantage, advantage_after)
        return kept, jnp.where(here, advantage, 0.0)

    nothing = jnp.zeros(rewards.shape[:-1], jnp.float32)
    tokens = tuple(jnp.moveaxis(array, -1, 0) for array in (rewards, values, mask))
    advantages = jnp.moveaxis(jax.lax.scan(before, (nothing, nothing), tokens, reverse=True)[1], 0, -1)
    return advantages, advantages + values


def explained_variance(
    values: Float[Array, "*b T"], returns: Float[Array, "*b T"], mask: Bool[Array, "*b T"]
) -> Float[Array, ""]:
    """1 - Var(returns - values) / Var(returns) over all tokens of the mask; 0 where the returns are all the same.

    1 is a value function that knows the future, 0 one that knows the mean, less one that is worse than none.
    """
    tokens = jnp.maximum(mask.sum(), 1)

    def variance(numbers: Array) -> Array:
        mean = jnp.sum(numbers, where=mask) / tokens
        return jnp.sum(jnp.square(numbers - mean), where=mask) / tokens

    whole = variance(returns)
    return jnp.where(whole > 0, 1 - variance(returns - values) / jnp.where(whole > 0, whole, 1.0), 0.0)


def ppo_loss(
    config: ModelConfig,
    params: Any,
    batch: Batch,
    totals: Mapping[str, Float[Array, ""]],
    policy: PolicyLossConfig,
    value: ValueLossConfig,
    *,
    remat: Remat = "products",
    dtype: jax.typing.DTypeLike | None = None,
    attention: AttentionPlan = XLA,
    chunk_bytes: int | None = None,
) -> tuple[Float[Array, ""], Metrics]:
    """`policy_loss` plus coefficient · `value_loss` of the network, which is run once; differentiable in `params`.

    `params` has the value head as VALUE_HEAD. Metrics are those of both losses; `loss` is that of all, and among its
    parts is `loss/value` (times its coefficient). The network computes in `dtype` (None: that of the parameters).
    """
    trunk = {name: tree for name, tree in params.items() if name != VALUE_HEAD}
    ids, positions, segment_ids = batch["ids"], batch["positions"], batch["segment_ids"]
    hidden = hidden_states(config, trunk, ids, positions, segment_ids, remat, dtype, attention)
    head = unembedding(config, trunk)
    of_policy, metrics = grpo_loss_from_hidden(
        hidden, head, batch, totals, policy, soft_cap=config.final_softcap, chunk_bytes=chunk_bytes
    )
    of_values, more = value_loss(values(params[VALUE_HEAD], hidden)[:, :-1], batch, totals, value.clip)
    loss = of_policy + value.coefficient * of_values
    parts = {"loss": loss, "loss/value": value.coefficient * of_values}
    return loss, jax.lax.stop_gradient({**metrics, **more, **parts})


def value_loss(
    values: Float[Array, "B T-1"], batch: Batch, totals: Mapping[str, Float[Array, ""]], clip: float | None
) -> tuple[Float[Array, ""], Metrics]:
    """The mean over sampled tokens of ½·max((V - R)², (V_old + clip(V - V_old) - R)²), and its metrics.

    `values` are those of the predictions made at positions 0 … T-2. Without a `clip` it is ½·(V - R)². With totals of
    the whole optimizer step, loss and metrics of micro-batches add up.

    Metrics: `value/loss`, and as means over sampled tokens `value/mean`, `value/return`, `value/error` (V - R) and,
    with a `clip`, `value/clipped`, where it takes the gradient.

    Raises UsageError naming an array that is read and the batch does not have.
    """
    sampled = sampled_tokens(batch)

    def known(key: str, fix: str) -> Array:
        if key not in batch:
            raise UsageError(f"{key}: the batch has none; {fix}")
        return jnp.where(sampled, batch[key][:, 1:], 0.0).astype(jnp.float32)

    values = jnp.where(sampled, values, 0.0).astype(jnp.float32)
    goals = known("returns", "add those of generalized_advantages to it")
    error = values - goals
    squared = jnp.square(error)
    of_tokens = {"value/mean": values, "value/return": goals, "value/error": error}
    if clip is not None:
        old = known("old_values", "add them to it, or set clip to null")
        moved = values - old  # within the clip the bounded value is the value, not what rounding makes of it
        bounded = jnp.where(jnp.abs(moved) > clip, old + jnp.clip(moved, -clip, clip), values)
        near = jnp.square(bounded - goals)
        of_tokens["value/clipped"] = (near > squared).astype(jnp.float32)
        squared = jnp.maximum(squared, near)
    loss = share(jnp.sum(squared) / 2, totals["value"])
    metrics = {name: share(jnp.sum(numbers), totals["value"]) for name, numbers in of_tokens.items()}
    return loss, jax.lax.stop_gradient({**metrics, "value/loss": loss})
