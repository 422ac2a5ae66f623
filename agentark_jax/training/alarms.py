"""Alarms of reinforcement learning: what the metrics of an iteration look like once a policy games its reward.

A policy that learns to please a process reward model, and not to be right, grows or shrinks its completions, cuts them
into more or fewer steps, scores ever higher while the verifier sees no gain, and strays from the reference. A mean
reward that rises shows none of it. (With a process reward alone PURE, arXiv 2504.15275, saw this within 200 steps.)

Metrics are read by name: those of `rewards.RewardTable` and of `objectives.grpo`, and `logprob_gap`, the mean over
sampled tokens of |log π_rollout - log π_old| in nats.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Literal, NamedTuple, get_args

from agentark_jax.errors import require

Action = Literal["stop", "rollback", "warn"]
Values = Mapping[str, float]


@dataclass(frozen=True)
class AlarmConfig:
    """When iterations look wrong, and what then happens. Every limit may be null, which turns its alarm off.

    Args:
        action: stop, end training with the policy as it is; rollback, with that of the last checkpoint at which nothing
            was beyond its limit; warn, go on.
        patience: so many iterations in a row must be beyond a limit.
        baseline_iterations: the first so many are what later ones are compared with.
        length_ratio: largest factor by which the mean length of completions may grow or shrink.
        step_ratio: largest factor by which their mean number of steps may grow or shrink.
        process_gap: by how much more the process reward (0 to 1) may rise than the accuracy does.
        kl: largest mean KL divergence to the reference, nats per token.
        logprob_gap: largest mean |difference| of the rollouts' log-probs from the trainer's, nats per token. In float32
            it is below 1e-4, with servers in bfloat16 some 0.01; one of 0.1 is of other weights.
        entropy_fall: largest factor by which the entropy of the next token may fall.
        truncated: largest share of completions that are cut off.
    """

    action: Action = "stop"
    patience: int = 3
    baseline_iterations: int = 5
    length_ratio: float | None = 2.0
    step_ratio: float | None = 2.5
    process_gap: float | None = 0.2
    kl: float | None = 0.5
    logprob_gap: float | None = 0.1
    entropy_fall: float | None = 5.0
    truncated: float | None = 0.5

    def __post_init__(self) -> None:
        require(self.action in get_args(Action), "action", self.action, f"one of {', '.join(get_args(Action))}")
        for key in ("patience", "baseline_iterations"):
            require(getattr(self, key) >= 1, key, getattr(self, key), "at least 1")
        for key in _RULES:
            limit = getattr(self, key)
            lowest = 1.0 if key in ("length_ratio", "step_ratio", "entropy_fall") else 0.0
            require(limit is None or lowest < limit < math.inf, key, limit, f"above {lowest:g}, or null")
        share = self.truncated
        require(share is None or share < 1, "truncated", share, "a share below 1, or null")


@dataclass(frozen=True)
class Alarm:
    """An alarm that tripped: by the name of its limit, what is beyond it, and what to do about it."""

    name: str
    iteration: int
    value: float
    limit: float
    words: str

    def __str__(self) -> str:
        return f"alarms.{self.name}, iteration {self.iteration}: {self.words}"


class Alarms:
    """What the iterations so far looked like. Equal metrics after an equal `state` trip equal alarms.

    `state` is JSON-serialisable: stored with a checkpoint, it lets a resumed or rolled back run go on as it would have.
    """

    def __init__(self, config: AlarmConfig, state: Mapping[str, Any] | None = None) -> None:
        self._config = config
        stored = state or {"iteration": 0, "first": {}, "beyond": {}}
        self._iteration: int = stored["iteration"]
        self._first: dict[str, list[float]] = {name: list(values) for name, values in stored["first"].items()}
        self._beyond: dict[str, int] = dict(stored["beyond"])

    @property
    def state(self) -> dict[str, Any]:
        first = {name: list(values) for name, values in self._first.items()}
        return {
            "iteration": self._iteration,
            "first": first,
            "beyond": dict(self._beyond),
        }

    @property
    def quiet(self) -> bool:
        """Whether nothing is beyond its limit now."""
        return not any(self._beyond.values())

    def unwatched(self, metrics: Values) -> dict[str, list[str]]:
        """The alarms that are on and cannot trip, and the metrics that each of them lacks: to be said at the start."""
        missing = {name: [read for read in rule.reads if read not in metrics] for name, rule in _RULES.items()}
        return {name: lacks for name, lacks in missing.items() if lacks and getattr(self._config, name) is not None}

    def update(self, iteration: int, metrics: Values) -> list[Alarm]:
        """The alarms that the metrics of the next iteration (they count from 0) trip.

        An alarm trips at the `patience`-th iteration in a row beyond its limit, and again after as many more. A number
        that is not finite is beyond every limit. Alarms that compare with the first iterations begin after them. An
        iteration that lacks a metric (one without an update has none of the loss) says nothing about alarms that read
        it.

        Raises ValueError for an iteration that is not the next one.
        """
        if iteration != self._iteration:
            raise ValueError(f"iteration {iteration} is not the next one, {self._iteration}")
        self._iteration = iteration + 1
        beginning = iteration < self._config.baseline_iterations
        if beginning:
            for name in sorted({name for rule in _RULES.values() for name in rule.reads} & metrics.keys()):
                if math.isfinite(metrics[name]):
                    self._first.setdefault(name, []).append(float(metrics[name]))
        found = (self._checked(name, rule, metrics, beginning) for name, rule in _RULES.items())
        return [alarm for alarm in found if alarm is not None]

    def _checked(self, name: str, rule: "_Rule", metrics: Values, beginning: bool) -> Alarm | None:
        limit = getattr(self._config, name)
        if limit is None or any(read not in metrics for read in rule.reads):
            return None
        now = {read: float(metrics[read]) for read in rule.reads}
        first = {read: fmean(self._first.get(read) or [math.nan]) for read in rule.reads}
        finite = all(math.isfinite(value) for value in now.values())
        unknown = not all(self._first.get(read) for read in rule.reads)
        if rule.relative and finite and (beginning or unknown):
            self._beyond[name] = 0
            return None
        value = rule.value(now, first) if finite else math.nan
        self._beyond[name] = 0 if value <= limit else self._beyond.get(name, 0) + 1
        if not self._beyond[name] or self._beyond[name] % self._config.patience:
            return None
        told = {f"{read}_now": number for read, number in now.items()}
        told |= {f"{read}_first": number for read, number in first.items()}
        said = rule.says.format(value=value, **told)
        lasted = f"for {self._beyond[name]} iterations" if self._beyond[name] > 1 else "now"
        words = f"{said}; more than {limit:g} {lasted}. {rule.advice}; or raise alarms.{name}."
        return Alarm(name, self._iteration - 1, value, limit, words)


class _Rule(NamedTuple):
    """A rule's `value`, of the metrics that it reads now and their means over the first iterations, has a limit."""

    reads: tuple[str, ...]
    relative: bool
    value: Callable[[Values, Values], float]
    says: str
    advice: str


def _factor(now: float, first: float) -> float:
    """now / first of two numbers that are not negative."""
    return now / first if first else (math.inf if now else 1.0)


def _drift(name: str) -> Callable[[Values, Values], float]:
    """By which factor a metric grew or shrank, at least 1."""

    def value(now: Values, first: Values) -> float:
        factor = _factor(now[name], first[name])
        return max(factor, math.inf if factor == 0 else 1 / factor)

    return value


_RULES: Mapping[str, _Rule] = {
    "length_ratio": _Rule(
        ("completion_tokens",),
        True,
        _drift("completion_tokens"),
        "completions have {completion_tokens_now:.4g} tokens on average and had {completion_tokens_first:.4g} at "
        "first, a factor of {value:.3g}",
        "Read some of them; give length a coefficient, or process a smaller one",
    ),
    "step_ratio": _Rule(
        ("steps",),
        True,
        _drift("steps"),
        "completions have {steps_now:.3g} steps on average and had {steps_first:.3g} at first, a factor of {value:.3g}",
        "Read some of them; use an aggregate that does not pay by the step (min, minimum_form), or give process a "
        "smaller coefficient",
    ),
    "process_gap": _Rule(
        ("process", "accuracy"),
        True,
        lambda now, first: now["process"] - now["accuracy"] - (first["process"] - first["accuracy"]),
        "the process reward went from {process_first:.3f} to {process_now:.3f}, the accuracy from "
        "{accuracy_first:.3f} to {accuracy_now:.3f}, a gap that grew by {value:.3f}",
        "The policy pleases the process reward model without being right: give verifiable a larger coefficient or "
        "process a smaller one, or train the process reward model on completions of this policy",
    ),
    "kl": _Rule(
        ("kl/reference",),
        False,
        lambda now, first: now["kl/reference"],
        "the KL divergence to the reference is {value:.3g} nats per token",
        "Raise kl_loss or kl_reward, or lower fit.learning_rate",
    ),
    "logprob_gap": _Rule(
        ("logprob_gap",),
        False,
        lambda now, first: now["logprob_gap"],
        "the log-probs of the rollouts differ from the trainer's by {value:.3g} nats per token",
        "Whoever generates has other weights, another dtype or another temperature: restart the servers with the "
        "newest published model, and give them --dtype float32 to see whether that is it",
    ),
    "entropy_fall": _Rule(
        ("entropy",),
        True,
        lambda now, first: _factor(first["entropy"], now["entropy"]),
        "the entropy is {entropy_now:.3g} nats per token and was {entropy_first:.3g} at first, less by a factor of "
        "{value:.3g}",
        "The policy stops exploring: raise clip_high, kl_loss or kl_reward, or lower fit.learning_rate",
    ),
    "truncated": _Rule(
        ("truncated",),
        False,
        lambda now, first: now["truncated"],
        "{value:.0%} of the completions are cut off at max_tokens",
        "Raise max_tokens, or give length a coefficient",
    ),
}
