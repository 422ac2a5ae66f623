"""How well steps are judged: first errors found, labels against what is true, probabilities against what happens."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Shaped

from agentark_jax.evaluation.statistics import MeanInterval, bootstrap_interval, wilson_interval
from agentark_jax.traces.step_labels import StepLabels


@dataclass(frozen=True)
class FirstErrors:
    """How often first errors are told as they are. A share is None where there is no such solution.

    Attributes:
        located: of solutions with an error, the share whose first one is told exactly: MR-GSM8K's first-error accuracy.
        cleared: of solutions without an error, the share in which none is told.
        f1_interval: of `f1`, by the bootstrap; None where that is not known, or its spread is not.
    """

    located: MeanInterval | None
    cleared: MeanInterval | None
    f1_interval: tuple[float, float] | None

    @property
    def f1(self) -> float | None:
        """ProcessBench's: the harmonic mean of both shares, 0 if one is 0, None if one is unknown."""
        if self.located is None or self.cleared is None:
            return None
        return float(_harmonic(np.asarray(self.located.mean), np.asarray(self.cleared.mean)))


@dataclass(frozen=True)
class F1Difference:
    """The F1 of a less that of b on the same solutions, with its interval by the bootstrap (None: not known)."""

    difference: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Calibration:
    """Brier score (mean squared error) and expected calibration error of `n` probabilities; 0 is best."""

    brier: float
    expected_error: float
    n: int


@dataclass(frozen=True)
class LabelQuality:
    """How the labels of a source compare with the truth.

    Attributes:
        precision: of the steps called wrong, the share that is wrong; None if none is called so.
        recall: of the wrong steps of labelled turns, the share that is called wrong; None if there is none.
        first_errors: of the labelled turns.
        labelled, turns: how many turns with a known truth have labels, of how many. A source that labels only what is
            easy has precision for it.
        tokens: what the labels of these turns cost.
    """

    precision: MeanInterval | None
    recall: MeanInterval | None
    first_errors: FirstErrors
    labelled: int
    turns: int
    tokens: int


def first_error(right: Sequence[float], threshold: float = 0.5) -> int | None:
    """The first step whose probability of being right is below the threshold."""
    return next((index for index, probability in enumerate(right) if probability < threshold), None)


def first_errors(
    told: Sequence[int | None],
    true: Sequence[int | None],
    clusters: Sequence[str] | None = None,
    *,
    level: float = 0.95,
) -> FirstErrors:
    """Compares first errors (from 0, None for none) of the same solutions, with Wilson's intervals of both shares.

    Args:
        told, true: what is told of each solution, and what is true.
        clusters: the question of each, where questions have several solutions.

    Raises: ValueError for lists of unequal length.
    """
    same, wrong = _told(told, true), _wrong(true)
    names = None if clusters is None else np.asarray(clusters)
    located, cleared = (_share(same, kept, names, level) for kept in (wrong, ~wrong))
    known = located is not None and cleared is not None
    return FirstErrors(
        located, cleared, bootstrap_interval(_f1, same, wrong, clusters=names, level=level) if known else None
    )


def f1_difference(
    a: Sequence[int | None],
    b: Sequence[int | None],
    true: Sequence[int | None],
    clusters: Sequence[str] | None = None,
    *,
    level: float = 0.95,
) -> F1Difference | None:
    """The F1 of what a tells less that of b, as `first_errors` has them; both are judged on every resample.

    None where no solution has an error, or all have. Raises: ValueError for lists of unequal length.
    """
    columns = _told(a, true), _told(b, true), _wrong(true)

    def less(drawn: Float[np.ndarray, "resamples n"], a: Any, b: Any, wrong: Any) -> Float[np.ndarray, " resamples"]:
        return _f1(drawn, a, wrong) - _f1(drawn, b, wrong)

    if not columns[-1].any() or columns[-1].all():
        return None
    names = None if clusters is None else np.asarray(clusters)
    low, high = bootstrap_interval(less, *columns, clusters=names, level=level) or (None, None)
    return F1Difference(float(less(np.ones((1, len(true))), *columns)[0]), low, high)


def _f1(
    drawn: Float[np.ndarray, "resamples n"], same: Bool[np.ndarray, " n"], wrong: Bool[np.ndarray, " n"]
) -> Float[np.ndarray, " resamples"]:
    """The F1 of first errors in each resample; NaN in those that have no solution with an error, or none without.

    Args:
        drawn: how often each solution was drawn.
        same: whether its first error, or that it has none, is told as it is.
        wrong: whether it has one.
    """
    with np.errstate(invalid="ignore"):
        located, cleared = (drawn @ (same & kept) / (drawn @ kept) for kept in (wrong, ~wrong))
    return _harmonic(located, cleared)


def _harmonic(a: Float[np.ndarray, "*any"], b: Float[np.ndarray, "*any"]) -> Float[np.ndarray, "*any"]:
    """The harmonic mean; 0 if one is 0, NaN if one is."""
    return 2 * a * b / np.where(a + b == 0, 1.0, a + b)


def _told(told: Sequence[int | None], true: Sequence[int | None]) -> Bool[np.ndarray, " n"]:
    return np.asarray([mine == other for mine, other in zip(told, true, strict=True)], bool)


def _wrong(true: Sequence[int | None]) -> Bool[np.ndarray, " n"]:
    return np.asarray([each is not None for each in true], bool)


def calibration(
    probabilities: Float[np.ndarray, " n"], happened: Shaped[np.ndarray, " n"], bins: int = 10
) -> Calibration:
    """Of probabilities of what happened (1) or not (0); bins of equal width, a bin's upper end being of the next.

    The expected error is Σ bins' shares · |mean probability − share that happened| (Guo et al. 2017).

    Raises: ValueError for no or unequally many values, or such as are no probabilities.
    """
    p, y = np.asarray(probabilities, np.float64), np.asarray(happened, np.float64)
    if p.ndim != 1 or p.shape != y.shape or not p.size or not (0 <= p.min() <= p.max() <= 1):
        raise ValueError(f"calibration needs equally many probabilities and outcomes; got {p.shape} and {y.shape}")
    index = np.minimum((p * bins).astype(int), bins - 1)
    gaps = np.bincount(index, weights=p - y, minlength=bins)
    return Calibration(float(np.mean(np.square(p - y))), float(np.abs(gaps).sum() / p.size), p.size)


def label_quality(
    labels: Iterable[StepLabels],
    truth: Mapping[str, Sequence[bool]],
    questions: Mapping[str, str],
    *,
    threshold: float = 0.5,
    level: float = 0.95,
) -> LabelQuality:
    """Labels of one source against the truth, both by turn; labels of turns whose truth is not known are left out.

    Args:
        truth: which steps of a turn are right (`tasks.word_problems.exact_step_truth`).
        questions: the question of each turn of `truth`.
        threshold: a step is called wrong if its label is below.

    Raises: ValueError where a turn has more labels than steps, or fewer.
    """
    compared = [each for each in labels if each.key in truth]
    for each in compared:
        if len(each.right) != len(truth[each.key]):
            raise ValueError(f"turn {each.key} has {len(truth[each.key])} steps but {len(each.right)} labels")
    called = np.asarray([right < threshold for each in compared for right in each.right], bool)
    wrong = np.asarray([not right for each in compared for right in truth[each.key]], bool)
    clusters = np.asarray([questions[each.key] for each in compared for _ in each.right])
    return LabelQuality(
        precision=_share(wrong, called, clusters, level),
        recall=_share(called, wrong, clusters, level),
        first_errors=first_errors(
            [first_error(each.right, threshold) for each in compared],
            [first_error([float(right) for right in truth[each.key]]) for each in compared],
            [questions[each.key] for each in compared],
            level=level,
        ),
        labelled=len(compared),
        turns=len(truth),
        tokens=sum(each.tokens for each in compared),
    )


def _share(
    yes: Shaped[np.ndarray, " n"],
    among: Shaped[np.ndarray, " n"],
    clusters: Shaped[np.ndarray, " n"] | None,
    level: float,
) -> MeanInterval | None:
    """How many are `yes` of those `among` which they are counted."""
    if not among.any():
        return None
    kept = None if clusters is None else clusters[among]
    return MeanInterval(float(yes[among].mean()), *wilson_interval(yes[among], kept, level=level), n=int(among.sum()))
