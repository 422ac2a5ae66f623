"""What rollouts earn: a verifier, a process reward model, format, length, and functions of the user's own.

A reward is one number per completion or one per token [T] of it. Rules for what is no whole answer:

- A completion that was cut off (finish `length`) has no answer, however it reads: "The answer is 1" may have been on
  its way to 14, and babbling on after the answer must not pay. It earns 0 by `verifiable`, `process` and `format`.
- So does one that is empty, whose text is nothing but blanks.
- One that is unparseable earns 0 by `verifiable` and `format`, and by `process` what its steps are worth.
- By `length` all earn what their length earns; functions of the user's own are asked about all and see for themselves.
  They are waited for, however long they take; the arrays that they are shown cannot be written to.

None is dropped, for a group whose failures are missing has another mean; their shares are among the metrics. Nothing
earns less than 0 by `verifiable`, `process` and `format`, so that saying nothing is never better than trying.
"""

import difflib
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from scipy.special import softmax

from agentark_jax.errors import AgentArkError, UsageError
from agentark_jax.objectives.advantages import overlong_penalty
from agentark_jax.records import Grade, Question
from agentark_jax.training.reward_config import LARGEST, Aggregate, RewardConfig

logger = logging.getLogger(__name__)

Reward = float | np.ndarray

# A function of the user's own that takes so many seconds for the rollouts of an iteration is named.
SLOW_SECONDS = 30.0

# The softmax of PURE (arXiv 2504.15275) has 0.1 on scores 2·p(right) - 1, which is the same.
MINIMUM_TEMPERATURE = 0.05


@dataclass(frozen=True)
class Rollout:
    """One completion that the policy sampled, and what is known of it.

    `ids` [T] are its tokens, stop id included; `step_ends` [S], ascending, the places after the last tokens of its
    steps, whose texts are `steps`; `step_scores` [S] how probably each is right by a process reward model, where there
    is one.
    """

    question: Question
    ids: np.ndarray
    text: str
    finish: Literal["stop", "length"]
    grade: Grade
    step_ends: np.ndarray
    steps: Sequence[str]
    step_scores: np.ndarray | None = None

    def __post_init__(self) -> None:
        count, ends = len(self.steps), np.asarray(self.step_ends)
        scored = count if self.step_scores is None else len(self.step_scores)
        if not len(ends) == count == scored:
            raise ValueError(f"{count} steps, but {len(ends)} ends and {scored} scores")
        if count and not (np.all(np.diff(ends, prepend=0) > 0) and ends[-1] <= len(self.ids)):
            raise ValueError(f"step_ends {ends.tolist()} do not ascend within the {len(self.ids)} tokens")

    @property
    def whole(self) -> bool:
        """It ended by itself and says something."""
        return self.finish == "stop" and bool(self.text.strip())

    @property
    def right(self) -> bool:
        return self.whole and self.grade.verdict == "right"


@dataclass(frozen=True)
class RewardTable:
    """What N rollouts earned.

    `by_name` [N] has each reward before its coefficient, one per token summed over them. `scalar` [N] and `tokens`
    (N arrays [T], float32) are the weighted sums of those that are one number and of those that are one per token.

    `metrics`: means over rollouts of all rewards together (`reward`), of each (`reward/<name>`, before its
    coefficient), of its part in what is earned or lost (`reward_share/<name>`, of the sums of |coefficient · reward|),
    of right answers (`accuracy`), of `completion_tokens` and `steps`; shares of those that are `truncated`, or else
    `empty`, or else `unparseable`; the number of `rollouts`; and with scores of steps `process`, the `aggregate` of
    each (of `steps` their mean).
    """

    by_name: Mapping[str, np.ndarray]
    scalar: np.ndarray
    tokens: Sequence[np.ndarray]
    metrics: Mapping[str, float]


def rewards(
    rollouts: Sequence[Rollout], config: RewardConfig, max_tokens: int, apart: Sequence[str] = ()
) -> RewardTable:
    """What rollouts of at most `max_tokens` tokens earn; those named in `apart` are measured but not in the sums.

    Raises UsageError naming function and question where a function of the user's own cannot be called or returns what
    is no reward, and for `process` without scores; AgentArkError for scores that are no probabilities.
    """
    if not rollouts:
        raise ValueError("there are no rollouts")
    scalar = np.zeros(len(rollouts))
    tokens = [np.zeros(len(rollout.ids)) for rollout in rollouts]
    by_name = {}
    for name, earned in _earned(rollouts, config, max_tokens).items():
        by_name[name] = np.asarray([np.sum(reward) for reward in earned], np.float64)
        for place, reward in enumerate(earned if name not in apart else ()):
            if np.ndim(reward) == 0:
                scalar[place] += config.coefficients[name] * reward
            else:
                tokens[place] += config.coefficients[name] * reward
    metrics = _reward_metrics(by_name, config.coefficients) | _rollout_metrics(rollouts)
    if all(rollout.step_scores is not None for rollout in rollouts):
        aggregate: Aggregate = "mean" if config.aggregate == "steps" else config.aggregate
        metrics["process"] = float(np.mean([np.sum(process_reward(rollout, aggregate)) for rollout in rollouts]))
    return RewardTable(by_name, scalar.astype(np.float32), [each.astype(np.float32) for each in tokens], metrics)


def reward_function(name: str) -> Callable[[Rollout], Any]:
    """The user's function that `package.module:function` names. Raises UsageError where there is none."""
    module_name, _, attribute = name.partition(":")
    try:
        module = import_module(module_name)
    except Exception as error:  # whatever a user's module raises
        raise UsageError(
            f"coefficients.{name}: {module_name} cannot be imported ({type(error).__name__}: {error}); install it, put "
            "its directory on PYTHONPATH, or correct the name"
        ) from error
    function = getattr(module, attribute, None)
    if not callable(function):
        near = difflib.get_close_matches(attribute, [key for key in vars(module) if callable(vars(module)[key])])
        meant = f"did you mean {' or '.join(near)}?" if near else "define it there, or correct the name"
        raise UsageError(f"coefficients.{name}: {module_name} has no function {attribute}; {meant}")
    return function


def _earned(rollouts: Sequence[Rollout], config: RewardConfig, max_tokens: int) -> dict[str, list[Reward]]:
    functions: dict[str, Callable[[Rollout], Reward]] = {
        "verifiable": lambda rollout: float(rollout.right),
        "process": lambda rollout: process_reward(rollout, config.aggregate),
        "format": lambda rollout: float(rollout.whole and rollout.grade.verdict != "unparseable"),
    }
    earned: dict[str, list[Reward]] = {}
    for name in config.coefficients:
        if name == "length":
            assert config.overlong_buffer is not None
            lengths = jnp.asarray([len(rollout.ids) for rollout in rollouts])
            earned[name] = np.asarray(overlong_penalty(lengths, max_tokens, config.overlong_buffer)).tolist()
            continue
        function = functions.get(name) or partial(_by_user, name, reward_function(name))
        began = time.monotonic()
        earned[name] = [function(rollout) for rollout in rollouts]
        seconds = time.monotonic() - began
        if ":" in name and seconds > SLOW_SECONDS:
            logger.warning(
                "coefficients.%s: the function took %.0f s for %d rollouts, and training waited; make it faster, or "
                "give it less to do",
                *(name, seconds, len(rollouts)),
            )
    return earned


def process_reward(rollout: Rollout, aggregate: Aggregate) -> Reward:
    """By the rules of `aggregate`; 0 for what is not whole."""
    if rollout.step_scores is None:
        raise UsageError(
            f"process: the rollout of question {rollout.question.id} has no scores of its steps; give the run a "
            "process reward model, or remove coefficients.process"
        )
    scores = np.asarray(rollout.step_scores, np.float64)
    if not np.all((scores >= 0) & (scores <= 1)):
        raise AgentArkError(
            f"process: the scores {scores.tolist()} of question {rollout.question.id} are no probabilities; the "
            "process reward model is damaged, train it again"
        )
    at_steps = aggregate in ("steps", "minimum_form")
    if not rollout.whole or not len(scores):
        return np.zeros(len(rollout.ids)) if at_steps else 0.0
    if at_steps:
        tokens = np.zeros(len(rollout.ids))
        weights = softmax(-scores / MINIMUM_TEMPERATURE) if aggregate == "minimum_form" else 1.0
        tokens[np.asarray(rollout.step_ends) - 1] = weights * scores
        return tokens
    whole = {"min": scores.min(), "mean": scores.mean(), "last": scores[-1], "product": scores.prod()}
    return float(whole[aggregate])


def _by_user(name: str, function: Callable[[Rollout], Any], rollout: Rollout) -> Reward:
    """What the user's function says, checked."""
    where = f"coefficients.{name}: of a rollout of question {rollout.question.id} the function"
    tokens = len(rollout.ids)
    fix = f"return a finite number, or one for each of the {tokens} tokens (rollout.ids), at most {LARGEST:g} in size"
    try:
        said = function(_read_only(rollout))
    except Exception as error:  # whatever a user's function raises
        raise UsageError(
            f"{where} raised {type(error).__name__}: {error}; correct it, such that it copes with every completion"
        ) from error
    try:
        if np.asarray(said).dtype.kind in "SUmM":  # texts and times, which would pass for numbers
            raise TypeError("no number")
        reward = np.asarray(said, np.float64)
    except (TypeError, ValueError, OverflowError) as error:
        raise UsageError(f"{where} returned {said!r:.200}; {fix}") from error
    if reward.shape not in ((), (tokens,)):
        raise UsageError(f"{where} returned an array of shape {reward.shape}; {fix}")
    if said is None or not np.all(np.abs(reward) <= LARGEST):
        raise UsageError(f"{where} returned {said!r:.200}; {fix}")
    return float(reward) if reward.ndim == 0 else reward


def _read_only(rollout: Rollout) -> Rollout:
    """The same, but whoever writes to its arrays gets an error: what is learned from is what was sampled."""

    def view(array: Any) -> np.ndarray:
        seen = np.asarray(array).view()
        seen.flags.writeable = False
        return seen

    scores = rollout.step_scores
    return replace(
        rollout,
        ids=view(rollout.ids),
        step_ends=view(rollout.step_ends),
        step_scores=None if scores is None else view(scores),
    )


def _reward_metrics(by_name: Mapping[str, np.ndarray], coefficients: Mapping[str, float]) -> dict[str, float]:
    weighted = {name: coefficients[name] * earned for name, earned in by_name.items()}
    sizes = {name: float(np.abs(earned).sum()) for name, earned in weighted.items()}
    whole = sum(sizes.values()) or 1.0
    metrics = {"reward": float(np.mean(sum(weighted.values())))}
    metrics |= {f"reward/{name}": float(earned.mean()) for name, earned in by_name.items()}
    return metrics | {f"reward_share/{name}": size / whole for name, size in sizes.items()}


def _rollout_metrics(rollouts: Sequence[Rollout]) -> dict[str, float]:
    def mean(values: Sequence[float]) -> float:
        return float(np.mean(values))

    return {
        "rollouts": float(len(rollouts)),
        "accuracy": mean([rollout.right for rollout in rollouts]),
        "truncated": mean([rollout.finish == "length" for rollout in rollouts]),
        "empty": mean([rollout.finish == "stop" and not rollout.whole for rollout in rollouts]),
        "unparseable": mean([rollout.whole and rollout.grade.verdict == "unparseable" for rollout in rollouts]),
        "completion_tokens": mean([len(rollout.ids) for rollout in rollouts]),
        "steps": mean([len(rollout.steps) for rollout in rollouts]),
    }
