"""Statistics against scipy and statsmodels, and against what they promise: error rates and coverage by simulation."""

import math

import numpy as np
import pytest
from scipy import optimize, stats
from statsmodels.stats.contingency_tables import mcnemar

from agentark_jax.evaluation import statistics
from agentark_jax.evaluation.predictions import Prediction
from agentark_jax.evaluation.statistics import (
    PairedDifference,
    bootstrap_interval,
    holm,
    paired_difference,
    seed_level_interval,
    sentence,
    wilson_interval,
)
from agentark_jax.evaluation.summary import differences

REPEATS = 1_000
Z = 1.959963984540054


def pairs(better, worse, n):
    """Two systems over n questions, one answer each: a alone is right on `better` of them, b alone on `worse`."""
    a, b = np.zeros(n, bool), np.zeros(n, bool)
    a[:better], b[better : better + worse] = True, True
    return a, b


def simulate(repeats, questions, samples, share, effect, seed):
    """Right/wrong of a and b by repeat, question and sample; b is right with probability `share`, a by `effect` more.

    Of the variance of the normal score that decides an answer, the question's difficulty makes 40 % for both systems
    and how far it suits a system another 20 %; with several samples of each this makes a question's rows alike.
    """
    random = np.random.default_rng(seed)
    difficulty = random.standard_normal((repeats, questions, 1), dtype=np.float32)
    for probability in (share + effect, share):
        suits = random.standard_normal((repeats, questions, 1), dtype=np.float32)
        chance = random.standard_normal((repeats, questions, samples), dtype=np.float32)
        score = math.sqrt(0.4) * difficulty + math.sqrt(0.2) * suits + math.sqrt(0.4) * chance
        yield score < stats.norm.ppf(probability)


def compare(questions, samples, share, effect, seed, repeats=REPEATS):
    a, b = simulate(repeats, questions, samples, share, effect, seed)
    groups = np.repeat(np.arange(questions), samples) if samples > 1 else None
    return [paired_difference(one.ravel(), other.ravel(), groups) for one, other in zip(a, b, strict=True)]


def rate(hits, level=0.99):
    """The binomial interval of the probability behind a list of outcomes."""
    interval = stats.binomtest(int(np.sum(hits)), len(hits)).proportion_ci(level)
    return interval.low, interval.high


def alarm(result):
    assert result.excludes_zero == (result.p_value < 1 - result.level)
    return result.excludes_zero


@pytest.mark.parametrize(("successes", "n"), [(0, 10), (10, 10), (1, 1), (48, 96), (431, 1000)])
@pytest.mark.parametrize("level", [0.8, 0.95])
def test_wilson(successes, n, level):
    expected = stats.binomtest(successes, n).proportion_ci(level, method="wilson")
    right = np.arange(n) < successes
    np.testing.assert_allclose(wilson_interval(right, level=level), expected, atol=1e-12)
    np.testing.assert_allclose(wilson_interval(right, np.arange(n), level=level), expected, atol=1e-12)
    # Four copies of an answer say as much as one.
    copies = wilson_interval(np.repeat(right, 4), np.repeat(np.arange(n), 4), level=level)
    np.testing.assert_allclose(copies, expected, atol=1e-12)


@pytest.mark.parametrize(("share", "questions"), [(0.05, 300), (0.5, 100), (0.95, 1000)])
def test_wilson_of_clustered_answers_covers(share, questions):
    groups = np.repeat(np.arange(questions), 4)
    _, answers = simulate(REPEATS, questions, 4, share, 0.0, seed=questions)
    intervals = [wilson_interval(right.ravel(), groups) for right in answers]
    low, high = rate([low <= share <= high for low, high in intervals])
    assert low <= 0.95 <= high
    naive = [wilson_interval(right.ravel()) for right in answers]
    assert rate([low <= share <= high for low, high in naive])[1] < 0.95


@pytest.mark.parametrize("level", [0.9, 0.95])
def test_the_interval_is_all_differences_that_the_score_test_keeps(level):
    def score(difference, better, worse, n):
        """Against the multinomial likelihood, maximised numerically for the given difference."""

        def likelihood(against):
            cells = np.array([against + difference, against, 1 - 2 * against - difference])
            return -float(stats.multinomial.logpmf([better, worse, n - better - worse], n, np.clip(cells, 1e-15, 1)))

        ends = (max(0.0, -difference), (1 - difference) / 2)
        against = optimize.minimize_scalar(likelihood, bounds=ends, method="bounded", options={"xatol": 1e-12}).x
        return (better - worse - n * difference) / math.sqrt(n * (2 * against + difference - difference**2))

    for better, worse, n in [(12, 2, 50), (7, 1, 100), (4, 0, 100), (30, 45, 300), (3, 9, 12)]:
        result = paired_difference(*pairs(better, worse, n), level=level)
        z = stats.norm.ppf((1 + level) / 2)
        assert score(result.low, better, worse, n) == pytest.approx(z, abs=1e-3)
        assert score(result.high, better, worse, n) == pytest.approx(-z, abs=1e-3)


def test_mcnemar_and_difference():
    random = np.random.default_rng(0)
    a, b = random.random(80) < 0.6, random.random(80) < 0.4
    result = paired_difference(a, b)
    table = [[np.sum(a & b), np.sum(a & ~b)], [np.sum(~a & b), np.sum(~a & ~b)]]
    assert result.p_value == pytest.approx(mcnemar(table, exact=False, correction=False).pvalue, abs=1e-12)
    assert result.difference == pytest.approx(a.mean() - b.mean())
    assert (result.n, result.clusters) == (80, 80)
    swapped = paired_difference(b, a)
    assert (swapped.difference, swapped.p_value) == (-result.difference, result.p_value)
    assert (swapped.low, swapped.high) == (pytest.approx(-result.high), pytest.approx(-result.low))
    # Many rows: the paired t interval is the limit.
    a, b = random.random(20_000) < 0.6, random.random(20_000) < 0.5
    result = paired_difference(a, b)
    expected = stats.ttest_rel(a.astype(float), b.astype(float)).confidence_interval()
    np.testing.assert_allclose((result.low, result.high), expected, atol=2e-5)


def test_interval_and_p_value_agree_on_every_table():
    for n in [*range(1, 25), 60]:
        for better in range(n + 1):
            for worse in range(n + 1 - better):
                result = paired_difference(*pairs(better, worse, n))
                assert result.excludes_zero == (result.p_value < 0.05), (better, worse, n)
                assert -1 <= result.low <= result.difference <= result.high <= 1, (better, worse, n)
                assert result.high - result.low > 0.05


def test_repeated_rows_of_one_question_add_no_certainty():
    random = np.random.default_rng(4)
    a, b = random.random(100) < 0.6, random.random(100) < 0.5
    once = paired_difference(a, b)
    clusters = np.repeat([f"q{i}" for i in range(100)], 5)
    five = paired_difference(np.repeat(a, 5), np.repeat(b, 5), clusters)
    naive = paired_difference(np.repeat(a, 5), np.repeat(b, 5))
    assert vars(five) == pytest.approx(vars(once) | {"n": 500})
    assert naive.high - naive.low < 0.5 * (five.high - five.low)
    # Opposed rows of a question are chance: they count as independent, not as more than that.
    a, b = np.tile([True, False], 50), np.tile([False, True], 50)
    assert paired_difference(a, b, np.arange(100) // 2) == PairedDifference(
        **{**vars(paired_difference(a, b)), "clusters": 50}
    )
    # One question is one trial, however many answers it has.
    alone = paired_difference(np.ones(40), np.zeros(40), np.zeros(40))
    assert (alone.low, alone.high) == (pytest.approx((1 - Z**2) / (1 + Z**2)), 1)


def test_the_order_of_rows_and_the_names_of_questions_change_nothing():
    random = np.random.default_rng(5)
    a, b, clusters = random.random(60) < 0.6, random.random(60) < 0.5, np.arange(60) // 3
    order = random.permutation(60)
    result = paired_difference(a, b, clusters)
    names = np.array([f"q{30 - cluster}" for cluster in clusters])
    assert vars(paired_difference(a[order], b[order], names[order])) == pytest.approx(vars(result))
    assert paired_difference(a, b, np.arange(60)) == paired_difference(a, b)


def test_no_spread_is_not_certainty():
    same = np.array([1, 0] * 48)
    result = paired_difference(same, same)
    assert (result.low, result.high) == (pytest.approx(-(Z**2) / (96 + Z**2)), pytest.approx(Z**2 / (96 + Z**2)))
    assert (result.difference, result.p_value) == (0, 1)
    assert 0.05 < result.minimum_detectable < 0.1
    assert vars(paired_difference(np.repeat(same, 3), np.repeat(same, 3), np.repeat(np.arange(96), 3))) == (
        pytest.approx(vars(result) | {"n": 288})
    )
    ahead = paired_difference(np.ones(20), np.zeros(20))
    assert (ahead.low, ahead.high) == (pytest.approx((20 - Z**2) / (20 + Z**2)), 1)
    # Ties: as many for a as for b.
    tied = paired_difference(*pairs(5, 5, 40))
    assert (tied.difference, tied.p_value, tied.low) == (0, 1, pytest.approx(-tied.high))
    single = paired_difference(np.ones(1), np.zeros(1))
    assert (single.low < 0, single.high, single.excludes_zero, single.minimum_detectable) == (True, 1, False, None)


@pytest.mark.parametrize("questions", [10, 30, 100, pytest.param(300, marks=pytest.mark.slow)])
def test_exact_rates_over_every_table(questions):
    """No simulation: the probability of every table of one answer each, for any share of discordant pairs."""
    tables = [(b, c) for b in range(questions + 1) for c in range(questions + 1 - b)]
    results = {table: paired_difference(*pairs(*table, questions)) for table in tables if table[0] >= table[1]}
    low = np.array([results[b, c].low if b >= c else -results[c, b].high for b, c in tables])
    high = np.array([results[b, c].high if b >= c else -results[c, b].low for b, c in tables])
    counts = np.array([(b, c, questions - b - c) for b, c in tables])
    for effect, most in [(0.0, 0.055), (0.03, 0.065)]:
        for discordant in np.linspace(0.04, 0.9, 44):
            cells = [(discordant + effect) / 2, (discordant - effect) / 2, 1 - discordant]
            missed = stats.multinomial.pmf(counts, questions, cells)[(low > effect) | (high < effect)].sum()
            assert missed < most, (effect, discordant, missed)
            if questions * discordant > 10 and effect == 0:
                assert missed > 0.04, (discordant, missed)


@pytest.mark.parametrize("samples", [1, 4])
@pytest.mark.parametrize("share", [0.05, 0.95])
@pytest.mark.parametrize("questions", [100, 300, 1000])
def test_false_alarms_and_coverage(questions, share, samples):
    low, high = rate([alarm(result) for result in compare(questions, samples, share, 0.0, questions + samples)])
    assert low <= 0.05 <= high
    planted = compare(questions, samples, share, 0.03, questions + samples + 10)
    low, high = rate([result.low <= 0.03 <= result.high for result in planted])
    assert low <= 0.95 <= high
    assert sum(alarm(result) for result in planted) > 0.1 * REPEATS


@pytest.mark.parametrize(("questions", "share", "samples"), [(100, 0.05, 4), (300, 0.95, 1), (300, 0.5, 4)])
def test_an_effect_of_the_stated_detectable_size_is_found_four_times_in_five(questions, share, samples):
    stated = np.mean([result.minimum_detectable for result in compare(questions, samples, share, 0.0, 1, 200)])
    effect = stated if share < 0.9 else -stated
    assert rate([alarm(result) for result in compare(questions, samples, share, effect, 2)])[1] >= 0.8
    # It is no gross overstatement either: half of it is missed more often than found.
    assert rate([alarm(result) for result in compare(questions, samples, share, effect / 2, 3)])[0] < 0.5


@pytest.mark.slow
@pytest.mark.parametrize("samples", [2, 4, 8])
@pytest.mark.parametrize("share", [0.05, 0.3, 0.5, 0.8, 0.95])
@pytest.mark.parametrize("questions", [100, 300, 1000])
def test_rates_thoroughly(questions, share, samples):
    level = 1 - 0.01 / 45  # 99 % for all 45 settings together
    low, high = rate([alarm(result) for result in compare(questions, samples, share, 0.0, 4, 2_000)], level)
    assert low <= 0.05 <= high
    planted = compare(questions, samples, share, 0.03, 5, 2_000)
    low, high = rate([result.low <= 0.03 <= result.high for result in planted], level)
    assert low <= 0.95 <= high
    stated = np.mean([result.minimum_detectable for result in compare(questions, samples, share, 0.0, 6, 200)])
    found = compare(questions, samples, share, stated if share < 0.7 else -stated, 7)
    assert rate([alarm(result) for result in found])[1] >= 0.8


@pytest.mark.parametrize(("questions", "samples"), [(3, 3), (8, 3), (5, 50), (15, 20)])
def test_few_questions_raise_no_more_false_alarms(questions, samples):
    assert rate([alarm(result) for result in compare(questions, samples, 0.5, 0.0, 8)])[0] <= 0.05


def mean(drawn, values):
    return drawn @ values / drawn.sum(1)


def rowwise(function):
    """A function of rows as a statistic of how often they were drawn."""
    return lambda drawn, *columns: [
        function(*(np.repeat(column, times) for column in columns)) for times in drawn.astype(int)
    ]


def area(drawn, scores, right):
    """Under the ROC curve, where no right and wrong row have equal scores."""
    order = np.argsort(scores)
    good, bad = drawn[:, order] * right[order], drawn[:, order] * ~right[order]
    return (good * bad.cumsum(1)).sum(1) / (good.sum(1) * bad.sum(1))


@pytest.mark.parametrize(("level", "seed"), [(0.95, 0), (0.8, 3)])
def test_the_bootstrap_is_scipys(level, seed):
    random = np.random.default_rng(11)
    x, y = random.lognormal(size=40), random.normal(size=40)
    settings = {"confidence_level": level, "n_resamples": 500, "method": "percentile", "rng": seed}
    for function, columns in [(np.mean, [x]), (np.median, [x]), (lambda a, b: np.corrcoef(a, b)[0, 1], [x, y])]:
        expected = stats.bootstrap(columns, function, paired=True, vectorized=False, **settings).confidence_interval
        found = bootstrap_interval(rowwise(function), *columns, level=level, resamples=500, seed=seed)
        np.testing.assert_allclose(found, expected, rtol=1e-9)
    np.testing.assert_allclose(
        bootstrap_interval(mean, x, level=level, resamples=500, seed=seed),
        bootstrap_interval(rowwise(np.mean), x, level=level, resamples=500, seed=seed),
    )


def test_the_bootstrap_draws_whole_questions():
    random = np.random.default_rng(12)
    values, questions = random.normal(size=90), np.sort(random.integers(0, 25, 90))
    sizes = np.bincount(questions)

    def of_questions(drawn, sums, counts):
        return drawn @ sums / (drawn @ counts)

    # A mean of rows is a ratio of the sums of their questions, of which each is drawn by itself.
    found = bootstrap_interval(mean, values, clusters=questions)
    kept = np.flatnonzero(sizes)
    expected = bootstrap_interval(of_questions, np.bincount(questions, values)[kept], sizes[kept])
    np.testing.assert_allclose(found, expected)
    # One row a question is no cluster; four copies of a row say as much as one.
    alone = bootstrap_interval(mean, values)
    assert bootstrap_interval(mean, values, clusters=np.arange(90)) == alone
    copies = bootstrap_interval(mean, np.repeat(values, 4), clusters=np.repeat(np.arange(90), 4))
    np.testing.assert_allclose(copies, alone)
    # Names and the order of rows change nothing.
    order = random.permutation(90)
    names = np.array([f"q{question:02}" for question in questions])
    np.testing.assert_allclose(bootstrap_interval(mean, values[order], clusters=names[order]), found)


def test_a_seed_draws_the_same_and_batches_change_nothing(monkeypatch):
    values = np.random.default_rng(13).random(50)
    found = bootstrap_interval(mean, values, seed=5)
    assert found == bootstrap_interval(mean, values, seed=5)
    assert found != bootstrap_interval(mean, values, seed=6)
    monkeypatch.setattr(statistics, "_BATCH", 50 * 7)
    np.testing.assert_allclose(bootstrap_interval(mean, values, seed=5), found)


@pytest.mark.parametrize(("share", "questions"), [(0.7, 80), pytest.param(0.9, 300, marks=pytest.mark.slow)])
def test_the_bootstrap_of_clustered_answers_covers(share, questions):
    groups = np.repeat(np.arange(questions), 4)
    _, answers = simulate(REPEATS, questions, 4, share, 0.0, seed=questions)
    columns = answers.reshape(REPEATS, -1).astype(float)
    intervals = [bootstrap_interval(mean, right, clusters=groups, resamples=400) for right in columns]
    low, high = rate([low <= share <= high for low, high in intervals])
    assert low <= 0.95 <= high
    naive = [bootstrap_interval(mean, right, resamples=400) for right in columns[:300]]
    assert rate([low <= share <= high for low, high in naive])[1] < 0.95


@pytest.mark.slow
def test_the_bootstrap_of_an_area_under_a_curve_covers():
    random, questions = np.random.default_rng(14), np.repeat(np.arange(60), 3)
    hits = []
    for _ in range(REPEATS):
        right = random.random(180) < 0.5
        scores = random.normal(size=60)[questions] + random.normal(size=180) + right
        low, high = bootstrap_interval(area, scores, right, clusters=questions, resamples=1_000)
        hits.append(low <= stats.norm.cdf(1 / 2) <= high)
    assert rate(hits)[0] <= 0.95 <= rate(hits)[1]


def test_where_resamples_say_nothing_there_is_no_interval():
    # No spread is not certainty.
    assert bootstrap_interval(mean, np.ones(30)) is None
    assert bootstrap_interval(mean, np.arange(5.0), clusters=np.zeros(5)) is None
    # Means of some rows: two questions of thirty have any, and one resample of seven none of them.
    values, some = np.arange(30.0), np.arange(30)

    def of_some(drawn, values, kept):
        with np.errstate(invalid="ignore"):
            return drawn @ (values * kept) / (drawn @ kept)

    assert bootstrap_interval(of_some, values, some < 2) is None
    low, high = bootstrap_interval(of_some, values, some < 5)
    assert 0 <= low < 2 < high <= 4
    assert bootstrap_interval(of_some, values, some < 2, level=0.8) == (0, 1)


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
    assert seed_level_interval([0.4, 0.4]) is None
    assert seed_level_interval([0.1 + 0.2, 0.3, 0.3]) is None


@pytest.mark.parametrize("seeds", [2, 3, 5])
@pytest.mark.parametrize("effect", [0.0, 0.03])
def test_seed_level_interval_covers(seeds, effect):
    """Both systems are trained anew in every seed, each with luck of its own, and answer the same 300 questions."""
    random = np.random.default_rng(seeds)
    luck = random.normal(0, 0.02, (2, REPEATS, seeds))
    share = random.binomial(300, np.array([0.4 + effect, 0.4])[:, None, None] + luck) / 300
    intervals = [seed_level_interval(values) for values in share[0] - share[1]]
    low, high = rate([one is not None and one.low <= effect <= one.high for one in intervals])
    assert low <= 0.95 <= high


def test_holm():
    assert holm([0.04, 0.01, 0.04]) == pytest.approx([0.08, 0.03, 0.08])
    assert holm([0.01, 0.02, 0.03, 0.005]) == pytest.approx([0.03, 0.04, 0.04, 0.02])
    assert holm([0.7, 0.6]) == [1, 1]
    assert (holm([0.02]), holm([])) == ([0.02], [])


def test_the_differences_of_a_report_are_one_family():
    def arm(right: int) -> list[Prediction]:
        return [Prediction(str(n), "", "right" if n < right else "wrong", 1.0, 1, 1, ("key",)) for n in range(50)]

    seeds = [{"base": arm(20), "plus": arm(26), "most": arm(40), "same": arm(20)}]
    contrasts = [("plus", "base", "plus over base"), ("most", "base", "most over base"), ("same", "base", "none")]
    few, all_of_them = (differences(seeds, contrasts[:count], level=0.95) for count in (1, 3))
    (plus,) = few
    assert plus["p_value"] == plus["p_holm"] == pytest.approx(0.0143, abs=1e-4)  # McNemar: z = √6
    assert "higher (p = 0.014), after Holm's correction too (p = 0.014)" in plus["sentence"]
    assert [each["p_holm"] for each in all_of_them] == holm([each["p_value"] for each in all_of_them])
    assert [each["p_value"] for each in all_of_them[:1]] == [plus["p_value"]]
    assert all_of_them[0]["p_holm"] == pytest.approx(2 * plus["p_value"])  # of two left, after the smallest
    assert [each["name"] for each in all_of_them] == [name for *_, name in contrasts]
    many = differences(seeds, contrasts[:1] + contrasts[2:] * 3, level=0.95)
    assert many[0]["p_holm"] == pytest.approx(4 * plus["p_value"])
    assert "by itself; after Holm's correction for 4 comparisons (p = 0.057) no effect shown" in many[0]["sentence"]


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
    worse = PairedDifference(-0.03, -0.05, -0.01, 96, 96, 0.9, 0.021, 0.02)
    assert sentence("vote over base", worse) == (
        "vote over base: −3.0 points, 90 % interval −5.0 to −1.0, n = 96: lower (p = 0.021)"
    )
    assert sentence("student over base", better, 0.0032, 8).endswith(
        ": higher (p < 0.001), after Holm's correction too (p = 0.003)"
    )
    assert sentence("vote over base", worse, 0.1, 5).endswith(
        ": lower (p = 0.021) by itself; after Holm's correction for 5 comparisons (p = 0.100) no effect shown"
    )
    assert sentence("debate over single-agent data", result, 0.61, 3).endswith(
        "no effect shown at this size; detectable from 2.1"
    )
    assert sentence("student over base", paired_difference(*pairs(1, 0, 4))).endswith(
        "n = 4: no effect shown, and none of any size could be with so few"
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: wilson_interval(np.zeros(0)), "non-empty"),
        (lambda: wilson_interval(np.ones(2), level=95), "level is 95"),
        (lambda: wilson_interval(np.ones(2), np.ones(3)), "equally long"),
        (lambda: bootstrap_interval(mean), "non-empty.*got none"),
        (lambda: bootstrap_interval(mean, np.ones(0)), "non-empty"),
        (lambda: bootstrap_interval(mean, np.ones(3), np.ones(4)), "equally long"),
        (lambda: bootstrap_interval(mean, np.ones(3), clusters=np.ones(4)), "equally long"),
        (lambda: bootstrap_interval(mean, np.ones(3), level=1), "level is 1"),
        (lambda: bootstrap_interval(mean, np.ones(3), resamples=0), "needs resamples; got 0"),
        (lambda: seed_level_interval([0.4]), "at least two"),
        (lambda: seed_level_interval([0.4, np.nan]), "finite"),
        (lambda: holm([0.1, 1.2]), "between 0 and 1"),
        (lambda: paired_difference(np.ones(3), np.ones(4)), "equally long"),
        (lambda: paired_difference(np.ones(0), np.ones(0)), "non-empty"),
        (lambda: paired_difference(np.ones(3), np.array([1, np.nan, 0])), "right or wrong"),
        (lambda: paired_difference(np.ones(3), np.zeros(3), np.arange(2)), "equally long"),
        (lambda: paired_difference(np.array([5.0]), np.array([3.0])), "right or wrong"),
    ],
)
def test_senseless_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
