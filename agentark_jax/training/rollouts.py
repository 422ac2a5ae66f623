"""An iteration's rollouts as arrays: packed into rows for the network, [G, n, T] for rewards and advantages."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from agentark_jax.data.loader import pack_row
from agentark_jax.data.packing import packing_plan
from agentark_jax.objectives import advantages as adv
from agentark_jax.objectives.ppo import generalized_advantages
from agentark_jax.records import Example, Question
from agentark_jax.training.rewards import Rollout, process_reward, rewards
from agentark_jax.training.rl_config import RLConfig

SAMPLED = "completion"
_RIGHT = 0.5


@dataclass(frozen=True)
class Sample:
    """A rollout and what is needed to train on it: the prompt's ids, and the log-probability [T] of each token when it
    was sampled, at the sampling temperature.
    """

    prompt: np.ndarray
    rollout: Rollout
    logprobs: np.ndarray

    @property
    def ids(self) -> np.ndarray:
        return np.concatenate([self.prompt, self.rollout.ids]).astype(np.int32)


@dataclass(frozen=True)
class Groups:
    """G questions with n places for rollouts each, of which some may be empty: calls that failed."""

    questions: Sequence[Question]
    samples: Sequence[Sequence[Sample | None]]

    def __iter__(self) -> Iterator[Sample]:
        return (sample for group in self.samples for sample in group if sample is not None)

    @property
    def places(self) -> list[tuple[int, int]]:
        """Where each of the rollouts stands, in the order in which they are iterated."""
        return [
            (row, column)
            for row, group in enumerate(self.samples)
            for column, sample in enumerate(group)
            if sample is not None
        ]

    def filled(self, values: Iterable[Any], shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        """[G, n, *shape] with the value of each rollout (an array of at most that shape) at its place, else 0."""
        result = np.zeros((len(self.samples), len(self.samples[0]), *shape), dtype)
        for place, value in zip(self.places, values, strict=True):
            value = np.asarray(value)
            filled: tuple[Any, ...] = (*place, *map(slice, value.shape))
            result[filled] = value
        return result

    def of(self, values: np.ndarray) -> list[np.ndarray]:
        """What stands at each rollout's place in an array [G, n, T, …], without what lies beyond its tokens."""
        return [values[place][: len(each.rollout.ids)] for place, each in zip(self.places, self, strict=True)]


class Packed:
    """Rollouts in rows of `row_length` tokens: which row each is in and where it begins there."""

    def __init__(self, samples: Sequence[Sample], row_length: int, seed: int, epoch: int) -> None:
        self._samples, self._length = samples, row_length
        lengths = [len(sample.ids) for sample in samples]
        self.rows = packing_plan(lengths, seed=seed, epoch=epoch, row_length=row_length)
        self._starts = {
            index: (row, sum(lengths[before] for before in indices[:place]))
            for row, indices in enumerate(self.rows)
            for place, index in enumerate(indices)
        }

    def batch(self, arrays: Mapping[str, Sequence[np.ndarray]], rows: int) -> dict[str, Any]:
        """A batch [rows, row_length] of all rollouts, the last rows empty, with further arrays of their tokens.

        Args:
            arrays: by name, of each rollout a value for every token of its completion.
            rows: at least as many as `self.rows`.
        """
        terms = (SAMPLED, *arrays)
        packed = [
            pack_row([self._example(index, arrays) for index in row], row_length=self._length, terms=terms)
            for row in (*self.rows, *([()] * (rows - len(self.rows))))
        ]
        batch: dict[str, Any] = {
            name: np.stack([row[name] for row in packed]) for name in ("ids", "positions", "segment_ids")
        }
        weights = {term: np.stack([row["weights"][term] for row in packed]) for term in terms}
        return {**batch, "weights": {SAMPLED: weights.pop(SAMPLED)}, **weights}

    def of_tokens(self, values: np.ndarray) -> list[np.ndarray]:
        """Of values [rows, row_length] of all tokens those of each rollout's completion [T]."""
        found = []
        for index, sample in enumerate(self._samples):
            row, start = self._starts[index]
            begin = start + len(sample.prompt)
            found.append(values[row, begin : begin + len(sample.rollout.ids)])
        return found

    def _example(self, index: int, arrays: Mapping[str, Sequence[np.ndarray]]) -> Example:
        sample = self._samples[index]
        ids, before = sample.ids, np.zeros(len(sample.prompt), np.float32)
        values = {SAMPLED: np.ones(len(sample.rollout.ids), np.float32)}
        values |= {name: np.asarray(each[index], np.float32) for name, each in arrays.items()}
        weights = {name: np.concatenate([before, value]) for name, value in values.items()}
        return Example(ids, weights, sample.rollout.question.id, "rollout")


def bucket(count: int) -> int:
    """The next of 1, 2, 3, 4, 6, 8, 12, 16 …: few different shapes, of which none is much too large."""
    size = 1
    while size < count:
        power_of_two = size & (size - 1) == 0
        size = 2 if size == 1 else size * 3 // 2 if power_of_two else size * 4 // 3
    return size


@dataclass(frozen=True)
class Earned:
    """What an iteration's rollouts are worth.

    Attributes:
        advantages: [G, n, T] of tokens.
        returns: [G, n, T] what the values of tokens should be; None unless values are learned.
        informative: [G] groups whose rollouts do not all earn the same.
        metrics: see `rewards.RewardTable`.
    """

    advantages: Float[np.ndarray, "G n T"]
    returns: Float[np.ndarray, "G n T"] | None
    informative: Bool[np.ndarray, " G"]
    metrics: Mapping[str, float]


def earned(
    groups: Groups,
    config: RLConfig,
    max_tokens: int,
    *,
    log_ratios: Float[np.ndarray, "G n T"] | None = None,
    values: Float[np.ndarray, "G n T"] | None = None,
) -> Earned:
    """Advantages of an iteration's rollouts, of at most T = `max_tokens` tokens each, from what they earn.

    Process rewards are shared out here, as the advantage says, and the others by `rewards`. With correction credit the
    steps that a rollout corrects itself count neither in what it earns nor in what is learned. A rollout that is not
    whole (cut off, empty) has no right step.

    Args:
        log_ratios: log(π/π_ref) of the tokens, for `kl_reward`.
        values: of each token before it is said, for the advantage `gae`.

    Raises as `rewards`.
    """
    samples = list(groups)
    rollouts = [each.rollout for each in samples]
    chosen, method = config.rewards_chosen, config.value("advantage")
    process = chosen.coefficients.get("process", 0.0)
    table = rewards(rollouts, chosen, max_tokens, apart=("process",))

    def spread(values: Iterable[Any], dtype: Any, *shape: int) -> Array:
        return jnp.asarray(groups.filled(values, shape, dtype))

    most = bucket(max(len(each.steps) for each in rollouts))
    present = spread([True] * len(samples), bool)
    mask = spread([np.ones(len(each.ids), bool) for each in rollouts], bool, max_tokens)
    right = spread([each.right for each in rollouts], bool)
    ends = spread([each.step_ends for each in rollouts], np.int32, most)
    steps = spread([np.ones(len(each.steps), bool) for each in rollouts], bool, most)
    scores = spread([_scores(each) for each in rollouts], np.float32, most)
    corrected = jnp.zeros_like(steps)
    if config.correction_credit:
        corrected = adv.corrected_steps(scores >= _RIGHT, steps, right)
    counted = steps & ~corrected
    outcome = spread(table.scalar, np.float32)
    of_tokens = spread(table.tokens, np.float32, max_tokens)

    at_steps = process * adv.minimum_form(2 * scores - 1, counted)
    whole = jnp.zeros_like(outcome)
    if process:
        dropped = np.asarray(corrected)
        kept = [_without(each, dropped[place]) for each, place in zip(rollouts, groups.places, strict=True)]
        whole = process * spread([np.sum(process_reward(each, chosen.aggregate)) for each in kept], np.float32)
    of_process = at_steps.sum(axis=-1) if method in ("pure", "gae") else whole
    informative = adv.informative_groups(outcome + of_tokens.sum(axis=-1) + of_process, present)
    if config.value("kl_reward"):
        assert log_ratios is not None, "whoever asks for a KL in the reward gives log-ratios"
        ratios = jnp.asarray(log_ratios)
        of_tokens = adv.less_kl(of_tokens, ratios, jnp.zeros_like(ratios), mask, config.value("kl_reward"))
    total = outcome + of_tokens.sum(axis=-1)

    targets = None
    if method == "gae":
        assert values is not None, "whoever asks for gae gives values"
        earnings = of_tokens + adv.at_last_token(outcome, mask) + adv.at_step_ends(at_steps, ends, counted, max_tokens)
        found, targets = generalized_advantages(earnings, jnp.asarray(values), mask, gae_lambda=config.gae_lambda)
    elif method == "pure":
        earnings = process * adv.pure_rewards(2 * scores - 1, ends, counted, max_tokens)
        earnings += adv.at_last_token(adv.outcome_advantages(outcome, present, "leave_one_out"), mask)
        earnings += adv.less_token_baseline(of_tokens, mask.astype(jnp.int32))
        found = adv.returns(earnings, mask)
    elif method == "papo":
        found = adv.on_tokens(adv.papo_advantages(total, whole, right, present), mask)
    else:
        found = adv.on_tokens(adv.outcome_advantages(total + whole, present, method), mask)
    if config.correction_credit:
        found = adv.zero_in_steps(found, corrected, ends, steps)
    taught = spread([learns(each, config) for each in samples], bool)[..., None] & mask
    if config.value("whiten"):
        found = adv.whitened(found, taught)
    found = jnp.where(taught, found, 0.0)
    return Earned(
        np.asarray(found), None if targets is None else np.asarray(targets), np.asarray(informative), table.metrics
    )


def learns(sample: Sample, config: RLConfig) -> bool:
    """Whether a rollout is learned from at all."""
    return not (config.mask_truncated and sample.rollout.finish == "length")


def _scores(rollout: Rollout) -> np.ndarray:
    """How probably each step is right, as far as that counts."""
    if rollout.step_scores is None or not rollout.whole:
        return np.zeros(len(rollout.steps), np.float32)
    return rollout.step_scores


def _without(rollout: Rollout, dropped: Bool[np.ndarray, " S"]) -> Rollout:
    """The rollout as if some of its steps had not been said."""
    kept = np.flatnonzero(~dropped[: len(rollout.steps)])
    scores = rollout.step_scores
    return replace(
        rollout,
        steps=[rollout.steps[int(step)] for step in kept],
        step_ends=np.asarray(rollout.step_ends)[kept],
        step_scores=None if scores is None else np.asarray(scores)[kept],
    )
