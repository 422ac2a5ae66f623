"""How sure a number is: intervals, paired comparisons, and what they mean in plain words.

Answers to one question are alike, so the question is the independent unit. Rows of the same question count for less by
their design effect (Kish 1965), and the methods for independent rows run on what is left (Rao and Scott 1992).

Which to use: of a share, `wilson_interval`; of the difference of two shares over the same questions,
`paired_difference`; of a mean over training seeds, `seed_level_interval`. They hold with few rows, and where all are
right. For what is no share, such as an F1, a difference of F1s, a median or an area under a curve, there is
`bootstrap_interval`. It needs some tens of questions, of each kind that the statistic compares, and knows nothing where
every resample says the same. It is not for what is biased in small samples, such as the expected calibration error: a
resample is biased once more, and of 300 probabilities three 95 % intervals in eight miss it.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Shaped
from scipy import optimize, stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint

POWER = 0.8
_BATCH = 2**22  # numbers of how often rows were drawn, at a time


@dataclass(frozen=True)
class PairedDifference:
    """The share of right answers of a less that of b over paired rows, and how sure it is.

    Attributes:
        difference: share of a − share of b.
        low, high: interval of the difference at `level`; it excludes zero exactly when `p_value` < 1 − `level`.
        n: paired rows.
        clusters: questions among them; equal to `n` when each row is its own.
        level: of the interval.
        p_value: two-sided, of "a and b are right equally often".
        minimum_detectable: the true difference that a comparison of this size finds at `level` with a probability of at
            least 80 %; None when it would find none, however large.
    """

    difference: float
    low: float
    high: float
    n: int
    clusters: int
    level: float
    p_value: float
    minimum_detectable: float | None

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0


@dataclass(frozen=True)
class MeanInterval:
    """A mean of `n` values with its interval."""

    mean: float
    low: float
    high: float
    n: int


def wilson_interval(
    right: Shaped[np.ndarray, " rows"],
    clusters: Shaped[np.ndarray, " rows"] | None = None,
    *,
    level: float = 0.95,
) -> tuple[float, float]:
    """Wilson's score interval of a share of right answers.

    Args:
        right: bool or 0/1.
        clusters: the question of each row, when a question has several rows; they count by their design effect, as
            Dean and Pagano (2015) recommend. With fewer than some 30 questions of many rows it covers less than stated.

    Raises: ValueError without an observation, or for anything but right and wrong.
    """
    _check_level(level)
    (values,) = _right_or_wrong(clusters, right)
    n = values.size / _design_effect(values, clusters)
    low, high = proportion_confint(values.mean() * n, n, alpha=1 - level, method="wilson")
    return max(0.0, float(low)), min(1.0, float(high))


def paired_difference(
    a: Shaped[np.ndarray, " rows"],
    b: Shaped[np.ndarray, " rows"],
    clusters: Shaped[np.ndarray, " rows"] | None = None,
    *,
    level: float = 0.95,
) -> PairedDifference:
    """Compares two systems on the same questions: a − b.

    Args:
        a, b: right or wrong by row, bool or 0/1; row i of both is the same trial.
        clusters: the question of each row, when a question has several rows.
        level: of the interval.

    Interval and p value come from one test, Tango's score test of "the true difference is δ" (Statistics in Medicine
    17, 1998): the interval holds every δ that is not rejected, and at δ = 0 the test is McNemar's without continuity
    correction, which Fagerland, Lydersen and Laake (2013) prefer to the exact one, whose rate of false alarms with few
    discordant pairs is far below the stated one. It needs no resampling and no special case: without a discordant pair
    the interval is ±z²/(n + z²). At level 0.95 with one row a question, false alarms stay below 5.5 % whatever the
    share of discordant pairs, coverage of +3 points above 93.5 %; where fewer than three discordant pairs are expected,
    hardly any test can tell and false alarms fall below 3.3 %.

    The minimum detectable difference assumes that a gains where both were wrong and loses nowhere, which is the gain
    that is hardest to see: the discordant pairs are then those seen here plus the gain.

    Raises: ValueError for vectors that are empty, of unequal length, or hold anything but right and wrong.
    """
    _check_level(level)
    a, b = _right_or_wrong(clusters, a, b)
    effect = _design_effect(a - b, clusters)
    better, worse, n = float((a > b).sum()) / effect, float((a < b).sum()) / effect, a.size / effect
    low, high = _tango_interval(better, worse, n, level)
    p_value = float(2 * stats.norm.sf(abs(_tango_score(0.0, better, worse, n))))
    # n δ² = (z₁ + z₂)² (discordant share + δ), solved for δ.
    unit = float(stats.norm.ppf((1 + level) / 2) + stats.norm.ppf(POWER)) ** 2 / n
    detectable = (unit + math.sqrt(unit * unit + 4 * unit * (better + worse) / n)) / 2
    return PairedDifference(
        difference=float((a - b).sum() / a.size),
        low=low,
        high=high,
        n=a.size,
        clusters=a.size if clusters is None else np.unique(clusters).size,
        level=level,
        p_value=p_value,
        minimum_detectable=detectable if detectable <= 1 else None,
    )


def bootstrap_interval(
    statistic: Callable[..., Sequence[float] | Float[np.ndarray, " resamples"]],
    *columns: Shaped[np.ndarray, " rows"],
    clusters: Shaped[np.ndarray, " rows"] | None = None,
    level: float = 0.95,
    resamples: int = 2_000,
    seed: int = 0,
) -> tuple[float, float] | None:
    """The percentile bootstrap interval of a statistic for which there is no formula (Efron and Tibshirani 1993, §13).

    Whole questions are drawn with replacement, as many as there are, each with all of its rows (Davison and Hinkley
    1997, §3.8). The interval lies between the (1 ∓ `level`)/2 quantiles of the statistic over the resamples.

    Args:
        statistic: called with a matrix [resamples, rows] of how often each row was drawn, as floats, and the columns;
            gives a number for each resample, NaN where it is not defined. A share of `yes` among `n` is
            `drawn @ yes / drawn.sum(1)`; any function f of rows is
            `[f(np.repeat(column, times)) for times in drawn.astype(int)]`.
        columns: such that row i of all of them is the same trial. Statistics of two systems are compared by one call
            that has the columns of both.
        clusters: the question of each row, when a question has several rows.
        resamples: how many are drawn; 2,000 find the ends of a 95 % interval to within a twentieth of its width.
        seed: of the draws. The same seed, columns and questions give the same interval; rows in another order do, too,
            where `clusters` are given.

    Returns None where the spread is not known: there is one question, all resamples give the same value, or more than
    1 − `level` of them give none. Fewer that give none are left out. So where the statistic compares two kinds of rows,
    either needs at least three or four questions.

    Raises: ValueError without columns or rows, for unequal lengths, a level that is none or no resamples.
    """
    _check_level(level)
    if resamples < 1:
        raise ValueError(f"a bootstrap needs resamples; got {resamples}")
    rows = _rows(clusters, *columns)
    names = np.arange(rows) if clusters is None else np.asarray(clusters)
    questions, of_row = np.unique(names, return_inverse=True)
    if questions.size == 1:
        return None

    arrays = [np.asarray(column) for column in columns]
    random, size, found = np.random.default_rng(seed), max(1, _BATCH // rows), []
    for start in range(0, resamples, size):
        drawn = random.integers(0, questions.size, (min(size, resamples - start), questions.size))
        times = np.stack([np.bincount(each, minlength=questions.size) for each in drawn])
        found.append(np.asarray(statistic(times[:, of_row].astype(np.float64), *arrays), np.float64))
    values = np.concatenate(found)
    known = values[~np.isnan(values)]
    if known.size < level * resamples or np.ptp(known) < 1e-12:
        return None
    low, high = np.quantile(known, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def seed_level_interval(values: Sequence[float], level: float = 0.95) -> MeanInterval | None:
    """Student's t interval of the mean over seeds; None when all are equal, so that their spread is unknown.

    Raises: ValueError for fewer than two seeds.
    """
    _check_level(level)
    array = np.asarray(values, np.float64)
    if array.ndim != 1 or array.size < 2 or not np.isfinite(array).all():
        raise ValueError("an interval over seeds needs at least two finite values")
    if np.ptp(array) < 1e-12:
        return None
    low, high = stats.ttest_1samp(array, 0.0).confidence_interval(level)
    return MeanInterval(float(array.mean()), float(low), float(high), array.size)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjusted p values, in the given order: comparing one of them with α keeps the family at α."""
    array = np.asarray(p_values, np.float64)
    if not ((array >= 0) & (array <= 1)).all():
        raise ValueError(f"p values lie between 0 and 1; got {list(p_values)}")
    return [float(value) for value in multipletests(array, method="holm")[1]] if array.size else []


def sentence(comparison: str, result: PairedDifference, p_holm: float | None = None, family: int = 1) -> str:
    """A paired difference in plain words; `comparison` is such as "debate over single-agent data".

    `p_holm` is its p value after Holm's correction, where it is one of a `family` of so many: an effect is stated only
    where that is below 1 − `result.level` too.
    """
    low, high = signed_points(result.low), signed_points(result.high)
    questions = f"n = {result.n}" + ("" if result.clusters == result.n else f" on {result.clusters} questions")
    if result.excludes_zero:
        verdict = f"{'higher' if result.difference > 0 else 'lower'} (p {_p_text(result.p_value)})"
        if p_holm is not None and p_holm < 1 - result.level:
            verdict += f", after Holm's correction too (p {_p_text(p_holm)})"
        elif p_holm is not None:
            verdict += (
                f" by itself; after Holm's correction for {family} comparisons (p {_p_text(p_holm)}) no effect shown"
            )
    elif result.minimum_detectable is None:
        verdict = "no effect shown, and none of any size could be with so few"
    else:
        verdict = f"no effect shown at this size; detectable from {100 * result.minimum_detectable:.1f}"
    return (
        f"{comparison}: {signed_points(result.difference)} points, "
        f"{100 * result.level:g} % interval {low} to {high}, {questions}: {verdict}"
    )


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"level is {level}; give a share between 0 and 1, such as 0.95")


def _rows(clusters: Shaped[np.ndarray, " rows"] | None, *columns: Shaped[np.ndarray, " rows"]) -> int:
    """How many rows the columns have."""
    shapes = [np.shape(column) for column in (*columns, *([] if clusters is None else [clusters]))]
    if not columns or len(set(shapes)) > 1 or len(shapes[0]) != 1 or shapes[0] == (0,):
        raise ValueError(f"answers need equally long, non-empty vectors; got {', '.join(map(str, shapes)) or 'none'}")
    return int(shapes[0][0])


def _right_or_wrong(
    clusters: Shaped[np.ndarray, " rows"] | None, *columns: Shaped[np.ndarray, " rows"]
) -> list[Float[np.ndarray, " rows"]]:
    """The columns as 0.0 and 1.0."""
    _rows(clusters, *columns)
    arrays = [np.asarray(column) for column in columns]
    if not all(((array == 0) | (array == 1)).all() for array in arrays):
        raise ValueError("answers are right or wrong: True and False, or 1 and 0")
    return [array.astype(np.float64) for array in arrays]


def _design_effect(values: Float[np.ndarray, " rows"], clusters: Shaped[np.ndarray, " rows"] | None) -> float:
    """How many clustered rows tell as much about the mean as one independent row.

    Between 1, as answers to one question are alike and look opposed only by chance, and the rows of a question, which
    tell at least as much as one of them; the latter also where too little differs to estimate it. The estimate from few
    questions is raised by the variance of Student's t, (count − 1)/(count − 3).
    """
    if clusters is None:
        return 1.0
    _, index, sizes = np.unique(np.asarray(clusters), return_inverse=True, return_counts=True)
    n, count = values.size, sizes.size
    most = float(sizes @ sizes) / n
    if count <= 3 or np.ptp(values) == 0:
        return most
    residuals = values - values.mean()
    sums = np.bincount(index, residuals)
    clustered, independent = sums @ sums * count / (count - 3), residuals @ residuals * n / (n - 1)
    return float(np.clip(clustered / independent, 1.0, most))


def _tango_score(difference: float, better: float, worse: float, n: float) -> float:
    """Standard normal if the true difference is the given one; `better` and `worse` are discordant among `n` pairs."""
    slope = (2 * n - better + worse) * difference - better - worse
    rest = difference * (1 - difference)
    # The likeliest share of pairs that favour b, given the difference.
    against = (math.sqrt(max(0.0, slope * slope + 8 * n * worse * rest)) - slope) / (4 * n)
    return (better - worse - n * difference) / math.sqrt(max(n * (2 * against + rest), 1e-12))


def _tango_interval(better: float, worse: float, n: float, level: float) -> tuple[float, float]:
    z, seen = float(stats.norm.ppf((1 + level) / 2)), (better - worse) / n
    rejects_zero = abs(_tango_score(0.0, better, worse, n)) > z

    def limit(end: float) -> float:
        if seen == end:
            return end
        inside, outside = seen, end
        if min(seen, end) < 0 < max(seen, end):
            # On the side of zero where the p value puts it, whatever the rounding.
            inside, outside = (seen, 0.0) if rejects_zero else (0.0, end)
        return float(optimize.brentq(lambda at: abs(_tango_score(at, better, worse, n)) - z, inside, outside))

    return limit(-1.0), limit(1.0)


def signed_points(share: float) -> str:
    text = f"{100 * share:+.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else text.replace("-", "−")


def _p_text(p_value: float) -> str:
    return "< 0.001" if p_value < 0.001 else f"= {p_value:.3f}"
