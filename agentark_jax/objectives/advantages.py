"""Rewards and advantages of groups: G questions with n completions each, of at most T tokens and S steps.

Outcome rewards [G, n] are one number per completion, process rewards [G, n, S] one per step, and token rewards
[G, n, T] are what both become (`at_last_token`, `at_step_ends`) and what a KL to a reference is taken from (`less_kl`).
Advantages of tokens are `returns` of token rewards, or those of completions on every token (`on_tokens`).

`present` [G, n] says which completions were sampled and judged. Those that are missing count in no mean, whatever
stands in their places, and have advantage 0; so has all of a group with fewer than two completions, or with equal
outcome rewards. `ends` [G, n, S] is the place after the last token of each step of a completion, which together have
all of its tokens, in order; `steps` [G, n, S] masks the steps.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from agentark_jax.errors import UsageError

Baseline = Literal["zscore", "mean", "leave_one_out"]

STD_EPSILON = 1e-4


def outcome_advantages(
    rewards: Float[Array, "G n"], present: Bool[Array, "G n"], baseline: Baseline
) -> Float[Array, "G n"]:
    """Each reward against those of its group.

    `zscore`: (r - mean) / (std + 1e-4) with the std of a sample, n - 1 (GRPO, AgentArk §3); `mean`: r - mean (Dr. GRPO,
    arXiv 2503.20783); `leave_one_out`: r - mean of the others (RLOO, arXiv 2402.14740). Raises UsageError for n = 1.
    """
    _require_group(rewards)
    members = present.sum(axis=1, keepdims=True)
    rewards = jnp.where(present, rewards, 0.0).astype(jnp.float32)
    centred = jnp.where(present, rewards - rewards.sum(axis=1, keepdims=True) / jnp.maximum(members, 1), 0.0)
    centred = jnp.where(informative_groups(rewards, present)[:, None], centred, 0.0)
    others = jnp.maximum(members - 1, 1)
    if baseline == "mean":
        return centred
    if baseline == "leave_one_out":
        return centred * members / others
    std = jnp.sqrt(jnp.sum(centred**2, axis=1, keepdims=True) / others)
    return centred / (std + STD_EPSILON)


def informative_groups(rewards: Float[Array, "G n"], present: Bool[Array, "G n"]) -> Bool[Array, " G"]:
    """Whether the rewards of a group differ: the others teach nothing, and DAPO's dynamic sampling replaces them."""
    return jnp.max(rewards, axis=1, where=present, initial=-jnp.inf) > jnp.min(
        rewards, axis=1, where=present, initial=jnp.inf
    )


def papo_advantages(
    rewards: Float[Array, "G n"], process: Float[Array, "G n"], right: Bool[Array, "G n"], present: Bool[Array, "G n"]
) -> Float[Array, "G n"]:
    """The z-score of the outcome reward plus, for right answers, that of the process reward among them.

    Wrong answers gain nothing from a process that scores high (PAPO, arXiv 2603.26535). Raises UsageError for n = 1.
    """
    of_outcome = outcome_advantages(rewards, present, "zscore")
    return of_outcome + outcome_advantages(process, present & right, "zscore")


def overlong_penalty(lengths: Int[Array, "*b"], max_tokens: int, buffer: int) -> Float[Array, "*b"]:
    """What is added to the rewards of long completions: from 0 at `max_tokens` - `buffer` tokens down to -1 at the end.

    DAPO's soft overlong punishment (arXiv 2503.14476, eq. 13). Raises UsageError for a buffer that is not within.
    """
    if not 1 <= buffer <= max_tokens:
        raise UsageError(f"overlong_buffer: {buffer} is not possible; it must be from 1 to max_tokens ({max_tokens})")
    return jnp.clip((max_tokens - buffer - lengths) / buffer, -1.0, 0.0).astype(jnp.float32)


def minimum_form(
    scores: Float[Array, "*b S"], steps: Bool[Array, "*b S"], temperature: float = 0.1
) -> Float[Array, "*b S"]:
    """Step rewards w·score with w = softmax over the steps of -score / temperature; their sum is close to the minimum.

    A completion is as good as its worst step (PURE, arXiv 2504.15275); scores are in [-1, 1].
    """
    logits = jnp.where(steps, -scores / temperature, -1e30).astype(jnp.float32)
    return jnp.where(steps, jax.nn.softmax(logits, axis=-1) * scores, 0.0)


def less_token_baseline(rewards: Float[Array, "G n S"], tokens: Int[Array, "G n S"]) -> Float[Array, "G n S"]:
    """Rewards of steps less what the group's others earn per token, times the tokens of the step (PURE).

    With a mask in place of the numbers of tokens it is the same for rewards of tokens. A completion without any token
    is missing. Raises UsageError for n = 1.
    """
    _require_group(rewards)
    rewards = jnp.where(tokens > 0, rewards, 0.0).astype(jnp.float32)
    earned, spent = _of_others(rewards.sum(axis=-1)), _of_others(tokens.sum(axis=-1))
    rate = (earned / jnp.maximum(spent, 1))[..., None]
    return jnp.where((spent > 0)[..., None], rewards - rate * tokens, 0.0)


def pure_rewards(
    scores: Float[Array, "G n S"],
    ends: Int[Array, "G n S"],
    steps: Bool[Array, "G n S"],
    length: int,
    temperature: float = 0.1,
) -> Float[Array, "G n T"]:
    """Token rewards [G, n, length]: steps in minimum form less the token baseline, each at its last token.

    Their `returns` are the advantages of AgentArk's release, except that the last tokens of steps have theirs too; its
    verifier is `at_last_token` of the leave-one-out outcome advantages, added to these rewards. A step that is masked
    in between is left out of minimum and baseline, as if its tokens had not been said. Raises UsageError for n = 1.
    """
    tokens = jnp.where(steps, jnp.diff(ends, axis=-1, prepend=0), 0)
    rewards = less_token_baseline(minimum_form(scores, steps, temperature), tokens)
    return at_step_ends(rewards, ends, steps, length)


def corrected_steps(
    right_steps: Bool[Array, "*b S"], steps: Bool[Array, "*b S"], right: Bool[Array, "*b"]
) -> Bool[Array, "*b S"]:
    """The wrong steps that the same completion corrects: a right step comes later, and the answer is right.

    Correction credit: a reward that punishes the error before "wait, …" teaches not to correct oneself, and one that
    pays for it teaches errors. So the other tokens get the advantages of the completion without such steps
    (`pure_rewards` of `steps & ~corrected`), and the tokens of the steps themselves none (`zero_in_steps`).
    """
    later = jax.lax.cummax((right_steps & steps).astype(jnp.int32), axis=steps.ndim - 1, reverse=True) > 0
    return steps & ~right_steps & later & right[..., None]


def zero_in_steps(
    advantages: Float[Array, "*b T"], which: Bool[Array, "*b S"], ends: Int[Array, "*b S"], steps: Bool[Array, "*b S"]
) -> Float[Array, "*b T"]:
    """Advantages of tokens, 0 in the steps of `which`."""
    length = advantages.shape[-1]
    step = jnp.cumsum(_scattered(jnp.ones_like(ends), jnp.where(steps, ends, length), length), axis=-1)
    without_step = jnp.zeros((*which.shape[:-1], 1), bool)
    inside = jnp.take_along_axis(jnp.concatenate([which & steps, without_step], axis=-1), step, axis=-1)
    return jnp.where(inside, 0.0, advantages)


def at_step_ends(
    values: Float[Array, "*b S"], ends: Int[Array, "*b S"], steps: Bool[Array, "*b S"], length: int
) -> Float[Array, "*b T"]:
    """Token rewards [*b, length] with the value of each step at its last token."""
    return _scattered(values, jnp.where(steps, ends - 1, length), length)


def at_last_token(values: Float[Array, "*b"], mask: Bool[Array, "*b T"]) -> Float[Array, "*b T"]:
    """Token rewards with one value per completion, at the last token of its mask."""
    return jnp.where(mask & (_from_here_on(mask.astype(jnp.int32)) == 1), values[..., None], 0.0)


def on_tokens(values: Float[Array, "*b"], mask: Bool[Array, "*b T"]) -> Float[Array, "*b T"]:
    """One value per completion on all tokens of its mask."""
    return jnp.where(mask, values[..., None], 0.0)


def less_kl(
    rewards: Float[Array, "*b T"],
    logprobs: Float[Array, "*b T"],
    reference_logprobs: Float[Array, "*b T"],
    mask: Bool[Array, "*b T"],
    coefficient: float,
) -> Float[Array, "*b T"]:
    """Token rewards less coefficient · log(π/π_ref) of the tokens (k1), π being the policy that sampled them."""
    return jnp.where(mask, rewards - coefficient * (logprobs - reference_logprobs), 0.0)


def returns(rewards: Float[Array, "*b T"], mask: Bool[Array, "*b T"]) -> Float[Array, "*b T"]:
    """The sum of the token rewards from each token on, undiscounted; 0 outside of the mask."""
    return jnp.where(mask, _from_here_on(jnp.where(mask, rewards, 0.0).astype(jnp.float32)), 0.0)


def whitened(advantages: Float[Array, "*b T"], mask: Bool[Array, "*b T"]) -> Float[Array, "*b T"]:
    """Advantages shifted and scaled to mean 0 and variance 1 over all tokens of the mask.

    AgentArk's release does so too, but over tokens whose advantage is not 0.
    """
    tokens = jnp.maximum(mask.sum(), 1)
    centred = jnp.where(mask, advantages - jnp.sum(advantages, where=mask) / tokens, 0.0)
    return centred / jnp.sqrt(jnp.sum(centred**2) / tokens + 1e-8)


def _require_group(rewards: Array) -> None:
    if rewards.shape[1] < 2:
        raise UsageError("group_size: 1 is not possible; it must be at least 2, for advantages are against the group")


def _of_others(values: Array) -> Array:
    """[G, n]: the sum over the other members of the group."""
    return values.sum(axis=1, keepdims=True) - values


def _from_here_on(values: Array) -> Array:
    return jax.lax.cumsum(values, axis=values.ndim - 1, reverse=True)


def _scattered(values: Array, places: Array, length: int) -> Array:
    """[*b, length]: zeros with the values [*b, S] added at their places; places from `length` on are left out."""
    rows = values.reshape(-1, values.shape[-1])
    zeros = jnp.zeros((rows.shape[0], length), values.dtype)
    filled = zeros.at[jnp.arange(len(rows))[:, None], places.reshape(rows.shape)].add(rows, mode="drop")
    return filled.reshape(*values.shape[:-1], length)
