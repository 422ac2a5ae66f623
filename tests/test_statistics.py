"""Statistics against scipy and statsmodels, and against what they promise: error rates and coverage by simulation."""

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint

from agentark_jax.evaluation.statistics import (
    PairedDifference,
    holm,
    paired_difference,
    seed_level_interval,
    sentence,
    wilson_interval,
)

REPEATS = 1_000


@pytest.mark.parametrize(("successes", "n"), [(0, 10), (10, 10), (1, 1), (48, 96), (431, 1000)])
@pytest.mark.parametrize("level", [0.8, 0.95])
def test_wilson(successes, n, level):
    expected = proportion_confint(successes, n, alpha=1 - level, method="wilson")
    np.testing.assert_allclose(wilson_interval(successes, n, level), expected, atol=1e-12)


def test_mcnemar_and_difference():
    random = np.random.default_rng(0)
    a, b = random.random(80) < 0.6, random.random(80) < 0.4
    result = paired_difference(a, b)
    table = [[np.sum(a & b), np.sum(a & ~b)], [np.sum(~a & b), np.sum(~a & ~b)]]
    assert result.p_value == pytest.approx(mcnemar(table, exact=True).pvalue, abs=1e-12)
    assert result.difference == pytest.approx(a.mean() - b.mean())
    assert (result.n, result.clusters) == (80, 80)
    swapped = paired_difference(b, a)
    assert swapped.difference == -result.difference
    assert swapped.low == pytest.approx(-result.high, abs=0.02)
    assert swapped.p_value == result.p_value


def test_bootstrap_interval_is_scipys_for_many_rows():
    random = np.random.default_rng(1)
    a, b = random.normal(0.3, 1, 2000), random.normal(0, 1, 2000)
    expected = stats.bootstrap((a - b,), np.mean, n_resamples=4000, method="percentile", rng=2).confidence_interval
    result = paired_difference(a, b, resamples=4000)
    np.testing.assert_allclose((result.low, result.high), (expected.low, expected.high), atol=0.006)
    # For means that are nearly normal the paired t interval is the limit, and with it the detectable difference.
    t_interval = stats.ttest_rel(a, b).confidence_interval()
    np.testing.assert_allclose((result.low, result.high), t_interval, atol=0.006)
    error = stats.sem(a - b)
    assert result.minimum_detectable == pytest.approx((1.959964 + 0.841621) * error, rel=1e-5)


def test_few_rows_get_a_students_interval():
    random = np.random.default_rng(3)
    a, b = random.normal(size=8), random.normal(size=8)
    result = paired_difference(a, b)
    plain = stats.bootstrap((a - b,), np.mean, method="percentile", rng=2).confidence_interval
    exact = stats.ttest_rel(a, b).confidence_interval()
    assert result.high - result.low > 1.1 * (plain.high - plain.low)
    assert result.high - result.low == pytest.approx(exact.high - exact.low, rel=0.15)


def test_swap_test_is_the_exact_randomisation_test():
    differences = np.array([0.5, -0.25, 1.0, 0.75, 0.5, -0.5, 0.25, 1.0])
    zeros = np.zeros_like(differences)
    exact = stats.permutation_test(
        (differences, zeros), lambda x, y: np.mean(x - y), permutation_type="samples", n_resamples=np.inf
    )
    assert paired_difference(differences, zeros, resamples=40_000).p_value == pytest.approx(exact.pvalue, abs=0.005)


def test_repeated_rows_of_one_question_add_no_certainty():
    random = np.random.default_rng(4)
    a, b = random.random(100) < 0.6, random.random(100) < 0.5
    once = paired_difference(a, b)
    clusters = np.repeat([f"q{i}" for i in range(100)], 5)
    five = paired_difference(np.repeat(a, 5), np.repeat(b, 5), clusters)
    naive = paired_difference(np.repeat(a, 5), np.repeat(b, 5))
    assert (five.n, five.clusters) == (500, 100)
    assert five.difference == pytest.approx(once.difference)
    assert five.high - five.low == pytest.approx(once.high - once.low, rel=0.05)
    assert five.minimum_detectable == pytest.approx(once.minimum_detectable)
    assert five.p_value == pytest.approx(once.p_value, abs=0.03)
    assert naive.high - naive.low < 0.5 * (five.high - five.low)


def test_order_of_the_rows_changes_nothing_but_resampling_noise_and_the_seed_fixes_it():
    random = np.random.default_rng(5)
    a, b, clusters = random.random(60) < 0.6, random.random(60) < 0.5, np.arange(60) // 3
    order = random.permutation(60)
    result = paired_difference(a, b, clusters, seed=1)
    assert paired_difference(a, b, clusters, seed=1) == result
    assert paired_difference(a[order], b[order], clusters[order], seed=1) == result
    assert paired_difference(a, b, clusters, seed=2) != result


def test_no_spread_is_not_certainty():
    same = np.array([1, 0] * 48)
    result = paired_difference(same, same)
    # The Clopper-Pearson bound of a share that was never seen.
    bound = proportion_confint(0, 96, alpha=0.05, method="beta")[1]
    assert (result.low, result.high) == (pytest.approx(-bound), pytest.approx(bound))
    assert result.p_value == 1
    assert result.minimum_detectable > 0.02
    ahead = paired_difference(np.ones(20), np.zeros(20))
    assert 0.6 < ahead.low < 0.7
    assert ahead.high == 1
    assert paired_difference(np.ones(1), np.zeros(1)).low < -0.9
    tokens = paired_difference(np.array([12.0, 13.0]), np.array([10.0, 11.0]))
    assert (tokens.low, tokens.high) == (2, 2)


def rate_is(share, rate):
    """Whether a share of REPEATS trials lies within the 99 % binomial interval around a rate."""
    return abs(round(share * REPEATS) - rate * REPEATS) <= stats.norm.ppf(0.995) * np.sqrt(REPEATS * rate * (1 - rate))


def simulate(clusters, rows_per_cluster, effect, seed, repeats=REPEATS):
    """Right/wrong of two systems over questions of varying difficulty; a is better by `effect` everywhere."""
    random = np.random.default_rng(seed)
    results = []
    for repeat in range(repeats):
        base = random.uniform(0.2, 0.7, (clusters, 1))
        # A question can suit one of the systems: this is what makes its rows alike.
        lean = random.uniform(-0.1, 0.1, (clusters, 1))
        a = random.random((clusters, rows_per_cluster)) < base + effect + lean
        b = random.random((clusters, rows_per_cluster)) < base - lean
        groups = np.repeat(np.arange(clusters), rows_per_cluster) if rows_per_cluster > 1 else None
        results.append(paired_difference(a.ravel(), b.ravel(), groups, resamples=600, seed=repeat))
    return results


@pytest.mark.parametrize(("clusters", "rows"), [(200, 1), (60, 4)])
def test_false_alarms_and_coverage(clusters, rows):
    alarms = simulate(clusters, rows, 0.0, seed=clusters)
    assert rate_is(np.mean([result.excludes_zero for result in alarms]), 0.05)
    # The exact tests on whole numbers cannot reach 5 % and must not exceed it.
    p_rate = np.mean([result.p_value < 0.05 for result in alarms])
    assert p_rate < 0.05 or rate_is(p_rate, 0.05)
    planted = simulate(clusters, rows, 0.1, seed=clusters + 1)
    assert rate_is(np.mean([result.low <= 0.1 <= result.high for result in planted]), 0.95)
    # An effect of the stated detectable size is found four times in five.
    size = float(np.mean([result.minimum_detectable for result in planted]))
    found = simulate(clusters, rows, size, seed=clusters + 2, repeats=400)
    assert 0.73 < np.mean([result.excludes_zero for result in found]) < 0.87


def test_seed_level_interval():
    values = [0.41, 0.44, 0.39, 0.47]
    result = seed_level_interval(values, 0.9)
    low, high = stats.t.interval(0.9, 3, np.mean(values), stats.sem(values))
    assert (result.mean, result.low, result.high, result.n) == (
        pytest.approx(np.mean(values)),
        pytest.approx(low),
        pytest.approx(high),
        4,
    )


def test_holm():
    random = np.random.default_rng(6)
    for size in (1, 2, 7):
        p_values = random.random(size) ** 3
        np.testing.assert_allclose(holm(p_values), multipletests(p_values, method="holm")[1], atol=1e-12)
    assert holm([]) == []


def test_sentence():
    result = PairedDifference(0.004, -0.011, 0.019, 500, 500, 0.95, 0.61, 0.0214)
    assert sentence("debate over single-agent data", result) == (
        "debate over single-agent data: +0.4 points, 95 % interval −1.1 to +1.9, n = 500: "
        "no effect shown at this size; detectable from 2.1"
    )
    better = PairedDifference(0.12, 0.04, 0.2, 480, 96, 0.95, 0.0004, 0.1)
    assert sentence("student over base", better) == (
        "student over base: +12.0 points, 95 % interval +4.0 to +20.0, n = 480 on 96 questions: higher (p < 0.001)"
    )
    worse = PairedDifference(-3.0, -5.0, -1.0, 96, 96, 0.9, 0.021, 2.0)
    assert sentence("length", worse, "tokens", 1) == (
        "length: −3.0 tokens, 90 % interval −5.0 to −1.0, n = 96: lower (p = 0.021)"
    )


@pytest.mark.parametrize(
    "call",
    [
        lambda: wilson_interval(0, 0),
        lambda: wilson_interval(1, 2, 95),
        lambda: seed_level_interval([0.4]),
        lambda: paired_difference(np.ones(3), np.ones(4)),
        lambda: paired_difference(np.ones(0), np.ones(0)),
        lambda: paired_difference(np.ones(3), np.array([1, np.nan, 0])),
        lambda: paired_difference(np.ones(3), np.zeros(3), np.arange(2)),
        lambda: paired_difference(np.array([5.0]), np.array([3.0])),
    ],
)
def test_senseless_input_is_refused(call):
    with pytest.raises(ValueError):  # noqa: PT011
        call()
