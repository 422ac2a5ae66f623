"""Whether a process reward model finds errors better than two that read nothing.

`majority` always tells the most frequent first error (a place, or none). `length-only` sees where a step stands and how
long it and its solution are: a logistic regression whose threshold is the best one for the F1. Both are fitted on one
half of the questions and judged on the other, and the other way round, so they know how frequent errors are, which the
model is not told: what beats them has read the steps.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import optimize
from scipy.special import expit

from agentark_jax.evaluation.statistics import PairedDifference, paired_difference
from agentark_jax.evaluation.steps import (
    Calibration,
    F1Difference,
    FirstErrors,
    calibration,
    f1_difference,
    first_error,
    first_errors,
)
from agentark_jax.records import stable_hash

MAJORITY, LENGTH_ONLY = "majority", "length-only"
_PENALTY = 1e-2  # of squared coefficients, for a fit of few solutions
_THRESHOLDS = np.linspace(0.01, 0.99, 99)


@dataclass(frozen=True)
class Judged:
    """One solution with what is true of it.

    Attributes:
        question: of the solution; solutions to the same one are never on both sides of a fit.
        right: how probably each of S steps is right, by the model that is judged.
        lengths: tokens of each step.
        truth: whether each step is right.
        known: of which steps that is known.
        lines: in which line each step is.
        error: the line with the first error, None for none.
    """

    question: str
    right: Float[np.ndarray, " S"]
    lengths: Int[np.ndarray, " S"]
    truth: Bool[np.ndarray, " S"]
    known: Bool[np.ndarray, " S"]
    lines: Int[np.ndarray, " S"]
    error: int | None


@dataclass(frozen=True)
class Found:
    """How well somebody finds first errors.

    Attributes:
        errors: shares of solutions with an error that is located, and without one that are cleared.
        calibration: of the probabilities of steps whose label is known.
        model_over: the judged model less this one, paired: the first error, or that there is none, is told exactly.
            None for the model itself.
        f1_over: the F1 of the judged model less that of this one. None for the model itself, and without an F1.
    """

    errors: FirstErrors
    calibration: Calibration
    model_over: PairedDifference | None
    f1_over: F1Difference | None


def compare(judged: Sequence[Judged], threshold: float | None, *, name: str, level: float = 0.95) -> dict[str, Found]:
    """The model (called `name`) and, where each half has questions, the baselines.

    Without a threshold, that of the model is fitted as those of the baselines are, on the other half of the questions
    (0.5 where there is none): a model that learned from few wrong steps calls hardly any of them improbable.

    Raises: ValueError for no solutions.
    """
    fixed = 0.5 if threshold is None else threshold
    told = {name: ([_line(each, each.right, fixed) for each in judged], [each.right for each in judged])}
    second = np.asarray([int(stable_hash(["half", each.question])[:8], 16) % 2 for each in judged], bool)
    if second.any() and not second.all():
        for baseline, fit in {**({name: _as_judged} if threshold is None else {}), **_BASELINES}.items():
            said: list[tuple[int | None, Float[np.ndarray, " S"]]] = [(None, each.right) for each in judged]
            for side in (second, ~second):
                predict = fit([each for each, here in zip(judged, side, strict=True) if not here])
                for index in np.flatnonzero(side).tolist():
                    said[index] = predict(judged[index])
            told[baseline] = [line for line, _ in said], [right for _, right in said]
    questions = [each.question for each in judged]
    true = [each.error for each in judged]
    known = np.concatenate([each.known for each in judged])
    truth = np.concatenate([each.truth for each in judged])[known]
    exact = {who: np.asarray([a == b for a, b in zip(lines, true, strict=True)]) for who, (lines, _) in told.items()}
    return {
        who: Found(
            first_errors(lines, true, questions, level=level),
            calibration(np.concatenate(right)[known], truth),
            None if who == name else paired_difference(exact[name], exact[who], np.asarray(questions), level=level),
            None if who == name else f1_difference(told[name][0], lines, true, questions, level=level),
        )
        for who, (lines, right) in told.items()
    }


_Predict = Callable[[Judged], tuple[int | None, Float[np.ndarray, " S"]]]


def _line(judged: Judged, right: Float[np.ndarray, " S"], threshold: float) -> int | None:
    """The line of the first step below the threshold."""
    step = first_error(right.tolist(), threshold)
    return None if step is None else int(judged.lines[step])


def _majority(fitted: Sequence[Judged]) -> _Predict:
    ((place, _),) = Counter(each.error for each in fitted).most_common(1)
    known = np.concatenate([each.truth[each.known] for each in fitted])
    share = float(known.mean()) if known.size else 0.5

    def predict(judged: Judged) -> tuple[int | None, Float[np.ndarray, " S"]]:
        there = place is not None and place <= judged.lines.max()
        return place if there else None, np.full(len(judged.right), share)

    return predict


def _length_only(fitted: Sequence[Judged]) -> _Predict:
    features = np.concatenate([_features(each)[each.known] for each in fitted])
    truth = np.concatenate([each.truth[each.known] for each in fitted]).astype(np.float64)
    mean, scale = features.mean(axis=0), features.std(axis=0) + 1e-6

    def scaled(features: Float[np.ndarray, "S F"]) -> Float[np.ndarray, "S G"]:
        return np.concatenate([np.ones((len(features), 1)), (features - mean) / scale], axis=1)

    inputs = scaled(features)

    def loss(weights: Float[np.ndarray, " G"]) -> tuple[float, Float[np.ndarray, " G"]]:
        logits = inputs @ weights
        total = np.mean(np.logaddexp(0, logits) - truth * logits) + _PENALTY * np.sum(weights[1:] ** 2)
        gradient = inputs.T @ (expit(logits) - truth) / len(truth)
        gradient[1:] += 2 * _PENALTY * weights[1:]
        return float(total), gradient

    weights = optimize.minimize(loss, np.zeros(inputs.shape[1]), jac=True, method="L-BFGS-B").x

    def probabilities(judged: Judged) -> Float[np.ndarray, " S"]:
        return expit(scaled(_features(judged)) @ weights)

    best = _best_threshold([(each, probabilities(each)) for each in fitted])

    def predict(judged: Judged) -> tuple[int | None, Float[np.ndarray, " S"]]:
        right = probabilities(judged)
        return _line(judged, right, best), right

    return predict


def _as_judged(fitted: Sequence[Judged]) -> _Predict:
    """The judged model itself, with the best threshold for the F1."""
    best = _best_threshold([(each, each.right) for each in fitted])
    return lambda judged: (_line(judged, judged.right, best), judged.right)


def _best_threshold(known: Sequence[tuple[Judged, Float[np.ndarray, " S"]]]) -> float:
    """That with the best F1 of first errors, of probabilities that steps are right."""
    true = [each.error for each, _ in known]

    def f1(threshold: float) -> float:
        found = [_line(each, right, threshold) for each, right in known]
        wrong = [a == b for a, b in zip(found, true, strict=True) if b is not None]
        clear = [a == b for a, b in zip(found, true, strict=True) if b is None]
        shares = [sum(each) / len(each) for each in (wrong, clear) if each]
        return len(shares) / sum(1 / share for share in shares) if all(shares) else 0.0

    return float(max(_THRESHOLDS, key=f1))


def _features(judged: Judged) -> Float[np.ndarray, "S F"]:
    """What is seen of each step: its number, its place among all, their number, whether it is the last; its length, and
    the solution's.
    """
    count, number = len(judged.lengths), np.arange(len(judged.lengths))
    whole = np.full(count, np.log1p(judged.lengths.sum()))
    columns = [np.log1p(number), (number + 1) / count, np.full(count, np.log1p(count)), number == count - 1]
    return np.stack([*columns, np.log1p(judged.lengths), whole], axis=1).astype(np.float64)


_BASELINES: Mapping[str, Callable[[Sequence[Judged]], _Predict]] = {MAJORITY: _majority, LENGTH_ONLY: _length_only}
