"""Losses of a process reward model at the ends of steps (PAD: process-aware distillation, arXiv 2602.03955 §3, B.1).

A step's score is the head's at its last token (`models.heads.step_logits`), its label the probability, in [0, 1], that
it is right. Three terms can be summed. The paper's loss is {"contrastive": 1}; that of its released code is RELEASE,
whose projector is trained here as any other parameter is (there, no optimizer has it).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from agentark_jax.models.attention import XLA, AttentionPlan
from agentark_jax.models.config import ModelConfig, Remat
from agentark_jax.models.heads import Head, step_logits
from agentark_jax.models.transformer import hidden_states
from agentark_jax.objectives.config import Term
from agentark_jax.objectives.sft import share

Projector = dict[str, dict[str, Array]]


# What stands beside a model's parameters while its process reward model is trained.
HEAD, PROJECTOR = "prm_head", "projector"


@dataclass(frozen=True)
class PRM:
    """The `Objective` of process reward models: `prm_loss` of the parameters' HEAD and, where there is one, PROJECTOR.

    Batches have `steps`, a dict of the arrays of `Steps`. Its `loss_tokens` are the steps.
    """

    coefficients: Mapping[Term, float]
    temperature: float = 0.1
    wrong_weight: float = 1.0

    def totals(self, batch: Mapping[str, Any]) -> dict[Term, Float[Array, ""]]:
        totals = term_totals(Steps(**batch["steps"]), self.wrong_weight)
        return {term: totals[term] for term in (*self.coefficients, "cross_entropy")}

    def loss(
        self, config: ModelConfig, params: Any, batch: Mapping[str, Any], totals: Mapping[Term, Any], **settings: Any
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        trunk = {name: tree for name, tree in params.items() if name not in (HEAD, PROJECTOR)}
        batch = {**batch, "steps": Steps(**batch["steps"])}
        loss, metrics = prm_loss(
            config,
            trunk,
            params[HEAD],
            params.get(PROJECTOR),
            batch,
            totals,
            self.coefficients,
            temperature=self.temperature,
            wrong_weight=self.wrong_weight,
            **settings,
        )
        return loss, {**metrics, "tokens": (batch["segment_ids"] > 0).sum(), "loss_tokens": metrics["steps"]}

    def sums(self, metrics: Mapping[str, Any]) -> dict[str, Any]:
        return {term: metrics[term] for term in self.coefficients}


class Steps(NamedTuple):
    """The steps of a batch, [B, S] each, whichever of a row's segments they are in; padding has `mask` False.

    Numbers of questions and trajectories mean nothing but that equal ones are the same; a trajectory is one answer of
    one agent. Trajectories of a question must be in one micro-batch, or they are not contrasted with each other.
    """

    ends: Int[Array, "B S"]
    """Positions in the row of the steps' last tokens; in padding, any."""
    labels: Float[Array, "B S"]
    mask: Bool[Array, "B S"]
    questions: Int[Array, "B S"]
    trajectories: Int[Array, "B S"]


def init_projector(size: int, seed: int) -> Projector:
    """Fresh float32 parameters of `project`, from `size` to `size`: weights of variance 1 / size, biases 0."""
    first, second = jax.random.split(jax.random.key(seed))
    return {
        name: {"weight": jax.random.normal(key, (size, size)) / jnp.sqrt(size), "bias": jnp.zeros(size)}
        for name, key in (("first", first), ("second", second))
    }


def project(projector: Projector, h: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
    """Linear, ReLU, linear; then of length 1 (or 0). Float32."""
    first, second = projector["first"], projector["second"]
    inner = jax.nn.relu(h.astype(jnp.float32) @ first["weight"].T + first["bias"])
    outer = inner @ second["weight"].T + second["bias"]
    return outer * jax.lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(outer), axis=-1, keepdims=True), 1e-12))


def cross_entropy(logits: Float[Array, "B S 2"], steps: Steps, wrong_weight: float = 1.0) -> Float[Array, ""]:
    """-Σ y·log p(right) + w·(1 - y)·log p(wrong), in nats, over the steps with labels y; w is `wrong_weight`."""
    logprobs = jax.nn.log_softmax(logits.astype(jnp.float32))
    nll = -(steps.labels * logprobs[..., 1] + wrong_weight * (1 - steps.labels) * logprobs[..., 0])
    return jnp.sum(jnp.where(steps.mask, nll, 0.0))


def contrastive(logits: Float[Array, "B S 2"], steps: Steps, temperature: float) -> Float[Array, ""]:
    """-Σ_t y_t·log [e(t) / (e(t) + Σ_n (1 - y_n)·e(n))] with e = exp(p(right) / temperature), the paper's L_PRM.

    n goes through the steps of other trajectories of the question. With hard labels, so, right steps are anchors and
    wrong steps of others their negatives; anchors without one are left out. (The paper does not say whether right steps
    of others are negatives. They are not: contrasting them would teach that of two right steps one is wrong.)
    """
    anchors, negatives = _contrasts(steps)
    scores = jax.nn.softmax(logits.astype(jnp.float32))[..., 1].ravel() / temperature
    # Without a negative this is log 0, and the term of no anchor log 1.
    against = jax.nn.logsumexp(jnp.broadcast_to(scores, negatives.shape), axis=1, b=negatives)
    return jnp.sum(anchors * jax.nn.softplus(against - scores))


def supervised_contrastive(projected: Float[Array, "B S D"], steps: Steps, temperature: float) -> Float[Array, ""]:
    """Supervised contrastive loss (Khosla et al. 2020, L_out) of unit vectors, summed over anchors.

    Steps are alike where both labels are at least a half or both below, of whatever questions, as in the released code:
    all steps of the micro-batch are contrasted, so that this term, alone of all, depends on how a batch is divided.
    Steps that nothing is like are no anchors.
    """
    vectors = projected.reshape(-1, projected.shape[-1])
    alike, others = _likeness(steps)
    similarity = vectors @ vectors.T / temperature
    logprobs = similarity - jax.nn.logsumexp(similarity, axis=1, keepdims=True, where=others)
    counts = alike.sum(axis=1)
    return -jnp.sum(jnp.sum(jnp.where(alike, logprobs, 0.0), axis=1) / jnp.maximum(counts, 1))


def term_totals(steps: Steps, wrong_weight: float = 1.0) -> dict[Term, Float[Array, ""]]:
    """The denominators: labelled steps, each by its weight, the labels of anchors with negatives, anchors with
    something alike.

    Sum them over micro-batches and devices before `prm_loss`.
    """
    return {
        "cross_entropy": _weights(steps, wrong_weight).sum(),
        "contrastive": _contrasts(steps)[0].sum(),
        "supervised_contrastive": _likeness(steps)[0].any(axis=1).sum(dtype=jnp.float32),
    }


def prm_loss(
    config: ModelConfig,
    params: Any,
    head: Head,
    projector: Projector | None,
    batch: Mapping[str, Any],
    totals: Mapping[Term, Float[Array, ""]],
    coefficients: Mapping[Term, float],
    *,
    temperature: float = 0.1,
    wrong_weight: float = 1.0,
    remat: Remat = "products",
    dtype: jax.typing.DTypeLike | None = None,
    attention: AttentionPlan = XLA,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """loss = Σ_term coefficient · sum / total, and its metrics; differentiable in `params`, `head` and `projector`.

    `batch` has `ids`, `positions`, `segment_ids` as in `objectives.sft`, and `steps`. The rest, the metrics among it,
    is as in `prm_loss_from_hidden`.
    """
    ids, positions, segment_ids = batch["ids"], batch["positions"], batch["segment_ids"]
    hidden = hidden_states(config, params, ids, positions, segment_ids, remat, dtype, attention)
    settings: dict[str, float] = {"temperature": temperature, "wrong_weight": wrong_weight}
    return prm_loss_from_hidden(hidden, head, projector, batch["steps"], totals, coefficients, **settings)


def prm_loss_from_hidden(
    hidden: Float[Array, "B T D"],
    head: Head,
    projector: Projector | None,
    steps: Steps,
    totals: Mapping[Term, Float[Array, ""]],
    coefficients: Mapping[Term, float],
    *,
    temperature: float = 0.1,
    wrong_weight: float = 1.0,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """`prm_loss` after the trunk. Terms without a coefficient are not computed; an empty one is zero.

    Args:
        projector: only the term `supervised_contrastive` needs it. Where the hidden states are frozen, that term trains
            nothing else, and so changes no score.
        totals: `term_totals` of the whole optimizer step. Loss and metrics of its micro-batches then add up.
        temperature: of the contrasting terms. The paper tells none; 0.1 is the release's.
        wrong_weight: how much a wrong step counts in the cross-entropy and its total, where a right one counts 1.

    The metrics: `loss`; each term by its name, without its coefficient; `accuracy`, the share of steps, weighted as in
    the cross-entropy, whose likelier label is the given one (right from a half on); `steps`. All float32.

    Raises:
        ValueError: there is `supervised_contrastive` but no projector.
    """
    logits = step_logits(head, hidden, steps.ends)
    sums: dict[Term, Array] = {}
    for term in coefficients:
        if term == "cross_entropy":
            sums[term] = cross_entropy(logits, steps, wrong_weight)
        elif term == "contrastive":
            sums[term] = contrastive(logits, steps, temperature)
        else:
            if projector is None:
                raise ValueError("the term supervised_contrastive needs a projector: give that of `init_projector`")
            ends = jnp.take_along_axis(hidden, steps.ends[..., None], axis=1)
            sums[term] = supervised_contrastive(project(projector, ends), steps, temperature)
    means = {term: share(total, totals[term]) for term, total in sums.items()}
    loss = jnp.sum(jnp.stack([coefficients[term] * mean for term, mean in means.items()]))
    agrees = (logits[..., 1] >= logits[..., 0]) == (steps.labels >= 0.5)
    metrics = {
        **{str(term): mean for term, mean in means.items()},
        "loss": loss,
        "accuracy": share(jnp.sum(agrees * _weights(steps, wrong_weight)), totals["cross_entropy"]),
        "steps": steps.mask.sum(),
    }
    return loss, jax.lax.stop_gradient(metrics)


def _weights(steps: Steps, wrong_weight: float) -> Float[Array, "B S"]:
    """What each step counts in the cross-entropy."""
    return jnp.where(steps.mask, steps.labels + wrong_weight * (1 - steps.labels), 0.0).astype(jnp.float32)


def _contrasts(steps: Steps) -> tuple[Float[Array, " N"], Float[Array, "N N"]]:
    """The weights of all B·S steps as anchors, and those of each as a negative (second axis) of each anchor."""
    _, labels, mask, questions, trajectories = map(jnp.ravel, steps)
    rivals = (questions[:, None] == questions) & (trajectories[:, None] != trajectories) & mask
    negatives = jnp.where(rivals, 1 - labels, 0.0).astype(jnp.float32)
    return jnp.where(mask & (negatives.sum(axis=1) > 0), labels, 0.0).astype(jnp.float32), negatives


def _likeness(steps: Steps) -> tuple[Bool[Array, "N N"], Bool[Array, "N N"]]:
    """Of all B·S steps: which are two labelled steps of one label, and which are two labelled steps."""
    right, mask = steps.labels.ravel() >= 0.5, steps.mask.ravel()
    others = mask[:, None] & mask & ~jnp.eye(mask.size, dtype=bool)
    return others & (right[:, None] == right), others
