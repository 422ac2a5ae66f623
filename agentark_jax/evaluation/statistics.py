"""How sure a number is: intervals, paired comparisons, and what they mean in plain words.

The unit of resampling is the question: answers to one question are alike, so they move together (a cluster).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Shaped
from scipy import stats

POWER = 0.8
# Bounds the memory of one block of resamples, in array entries.
_BLOCK = 4_000_000


@dataclass(frozen=True)
class PairedDifference:
    """The mean of a − b over paired rows, and how sure it is.

    Attributes:
        difference: mean of a − mean of b.
        low, high: bootstrap interval of the difference at `level`, resampling whole clusters.
        n: paired rows.
        clusters: independent units among them; equal to `n` when each row is its own.
        level: of the interval.
        p_value: two-sided, of "a and b are interchangeable".
        minimum_detectable: the true difference that a comparison of this size and spread finds at `level` with a
            probability of 80 %.
    """

    difference: float
    low: float
    high: float
    n: int
    clusters: int
    level: float
    p_value: float
    minimum_detectable: float

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


def wilson_interval(successes: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a proportion. Raises ValueError without an observation."""
    _check_level(level)
    if n <= 0:
        raise ValueError("a proportion of no observations has no interval")
    interval = stats.binomtest(successes, n).proportion_ci(level, method="wilson")
    return float(interval.low), float(interval.high)


def paired_difference(
    a: Shaped[np.ndarray, " rows"],
    b: Shaped[np.ndarray, " rows"],
    clusters: Shaped[np.ndarray, " rows"] | None = None,
    *,
    level: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> PairedDifference:
    """Compares two systems on the same questions: a − b.

    Args:
        a, b: one score per row, right/wrong as bool or 0/1, or any finite number; row i of both is the same trial.
        clusters: the question of each row, when a question has several rows.
        level: of the interval.
        resamples: bootstrap resamples, and sign flips where the p value needs them.
        seed: of the resampling.

    The interval is the expanded percentile bootstrap (Hesterberg 2015, section 5.3): percentiles moved out as Student's
    t asks, because the plain ones are too narrow for few clusters. Scores within 0…1 that differ by the same amount
    everywhere have no spread to resample; their interval allows for the share q of unlike clusters that would still go
    unseen with probability (1 − level)/2, so that no pair that differs among 96 does not read as certainty.
    The p value is McNemar's exact test for 0/1 scores without clusters, otherwise a randomisation test that swaps a and
    b in whole clusters.

    Raises: ValueError for arrays that are empty, of unequal length or not finite.
    """
    _check_level(level)
    a, b = np.asarray(a), np.asarray(b)
    if a.ndim != 1 or a.shape != b.shape or a.size == 0 or (clusters is not None and np.shape(clusters) != a.shape):
        raise ValueError(f"paired scores need two equally long, non-empty vectors; got {a.shape} and {b.shape}")
    a, b = a.astype(np.float64), b.astype(np.float64)
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise ValueError("paired scores must be finite")
    sums, sizes = _by_cluster(a - b, clusters)
    count, rows = len(sums), a.size
    difference = float(sums.sum() / rows)
    bounded = bool(min(a.min(), b.min()) >= 0 and max(a.max(), b.max()) <= 1)
    # A difference of two exact means can leave a rounding error where there is no spread at all.
    alike = bool(np.ptp(sums / sizes) < 1e-12)
    random = np.random.default_rng(seed)
    if alike and bounded:
        unseen = 1 - ((1 - level) / 2) ** (1 / count)
        low, high = (max(-1.0, difference * (1 - unseen) - unseen), min(1.0, difference * (1 - unseen) + unseen))
        # Bonett and Price (2012): as if one cluster had favoured each side.
        standard_error = math.sqrt(2) / (count + 2)
    elif count == 1:
        raise ValueError("one question with scores outside 0…1 has no interval")
    else:
        low, high = _bootstrap_interval(sums, sizes, level, resamples, random)
        residuals = sums - difference * sizes
        standard_error = math.sqrt(count / (count - 1) * float(residuals @ residuals)) / rows
    if count == rows and np.isin(a, (0, 1)).all() and np.isin(b, (0, 1)).all():
        p_value = _mcnemar(int((sums > 0).sum()), int((sums < 0).sum()))
    else:
        p_value = _swap_test(sums, resamples, random)
    detectable = float(stats.norm.ppf((1 + level) / 2) + stats.norm.ppf(POWER)) * standard_error
    return PairedDifference(difference, low, high, rows, count, level, p_value, detectable)


def seed_level_interval(values: Sequence[float], level: float = 0.95) -> MeanInterval:
    """Student's t interval of the mean over seeds. Raises ValueError for fewer than two seeds."""
    _check_level(level)
    array = np.asarray(values, np.float64)
    if array.ndim != 1 or array.size < 2 or not np.isfinite(array).all():
        raise ValueError("an interval over seeds needs at least two finite values")
    mean = float(array.mean())
    half = float(stats.t.ppf((1 + level) / 2, array.size - 1)) * float(array.std(ddof=1)) / math.sqrt(array.size)
    return MeanInterval(mean, mean - half, mean + half, array.size)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjusted p values, in the given order: comparing one of them with α keeps the family at α."""
    array = np.asarray(p_values, np.float64)
    order = np.argsort(array, kind="stable")
    adjusted = np.empty_like(array)
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(array[order] * np.arange(len(array), 0, -1)))
    return [float(value) for value in adjusted]


def sentence(comparison: str, result: PairedDifference, unit: str = "points", scale: float = 100.0) -> str:
    """A paired difference in plain words.

    Args:
        comparison: such as "debate over single-agent data".
        unit, scale: what one unit of `result` times `scale` is; the default turns accuracies into percentage points.
    """
    low, high = _signed(scale * result.low), _signed(scale * result.high)
    questions = f"n = {result.n}" + ("" if result.clusters == result.n else f" on {result.clusters} questions")
    if result.excludes_zero:
        verdict = f"{'higher' if result.difference > 0 else 'lower'} (p {_p_text(result.p_value)})"
    else:
        verdict = f"no effect shown at this size; detectable from {scale * result.minimum_detectable:.1f}"
    return (
        f"{comparison}: {_signed(scale * result.difference)} {unit}, "
        f"{100 * result.level:g} % interval {low} to {high}, {questions}: {verdict}"
    )


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"level is {level}; give a share between 0 and 1, such as 0.95")


def _by_cluster(
    differences: Float[np.ndarray, " rows"], clusters: Shaped[np.ndarray, " rows"] | None
) -> tuple[Float[np.ndarray, " clusters"], Float[np.ndarray, " clusters"]]:
    """Sum and number of rows of each cluster."""
    if clusters is None:
        return differences, np.ones_like(differences)
    _, index = np.unique(np.asarray(clusters), return_inverse=True)
    return np.bincount(index, differences), np.bincount(index).astype(np.float64)


def _bootstrap_interval(
    sums: Float[np.ndarray, " clusters"],
    sizes: Float[np.ndarray, " clusters"],
    level: float,
    resamples: int,
    random: np.random.Generator,
) -> tuple[float, float]:
    count = len(sums)
    means = []
    for size in _blocks(resamples, count):
        drawn = random.integers(count, size=(size, count))
        means.append(sums[drawn].sum(axis=1) / sizes[drawn].sum(axis=1))
    quantile = stats.norm.cdf(math.sqrt(count / (count - 1)) * stats.t.ppf((1 - level) / 2, count - 1))
    low, high = np.quantile(np.concatenate(means), [quantile, 1 - quantile])
    return float(low), float(high)


def _mcnemar(better: int, worse: int) -> float:
    if better + worse == 0:
        return 1.0
    return float(stats.binomtest(better, better + worse, 0.5).pvalue)


def _swap_test(sums: Float[np.ndarray, " clusters"], resamples: int, random: np.random.Generator) -> float:
    """The share of random swaps of a and b, cluster by cluster, with a difference at least as large as the seen one."""
    total = float(sums.sum())
    # Equal sums must count as equal although they were added in another order.
    threshold = abs(total) - 1e-9 * float(np.abs(sums).sum())
    extreme = 0
    for size in _blocks(resamples, len(sums)):
        swapped = total - 2 * (random.integers(2, size=(size, len(sums)), dtype=np.int8) @ sums)
        extreme += int((np.abs(swapped) >= threshold).sum())
    return (extreme + 1) / (resamples + 1)


def _blocks(resamples: int, width: int) -> list[int]:
    size = max(1, min(resamples, _BLOCK // width))
    return [min(size, resamples - start) for start in range(0, resamples, size)]


def _signed(value: float) -> str:
    text = f"{value:+.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else text.replace("-", "−")


def _p_text(p_value: float) -> str:
    return "< 0.001" if p_value < 0.001 else f"= {p_value:.3f}"
