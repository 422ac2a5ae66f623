"""Choosing among answers by their steps, and whether scores go with outcomes."""

import numpy as np
import pytest
from scipy import stats

from agentark_jax.evaluation.best_of_n import AGGREGATES, Candidates, best_of_n, outcome_correlation


def candidates(*questions):
    """Of each question its answers as (answer, steps); the right answer is "r"."""
    return [
        Candidates(
            f"q{number}",
            tuple(answer == "r" for answer, _ in answers),
            tuple(answer for answer, _ in answers),
            tuple(np.asarray(steps, np.float32) for _, steps in answers),
        )
        for number, answers in enumerate(questions)
    ]


def test_aggregates():
    steps = np.asarray([0.5, 0.25, 0.8], np.float32)
    found = {name: aggregate(steps) for name, aggregate in AGGREGATES.items()}
    assert found == pytest.approx({"min": 0.25, "mean": 1.55 / 3, "last": 0.8, "product": 0.1})


def test_the_best_against_the_vote_and_a_random_pick():
    given = candidates(
        [("r", [0.9, 0.8]), ("w", [0.9, 0.1]), ("w", [0.2, 0.9])],  # the vote is wrong
        [("w", [0.9]), ("r", [0.6]), ("r", [0.7])],  # the score is
        [("", [0.1]), ("", [0.2]), ("", [0.3])],  # nothing can be read: nobody is right
        [("r", [0.5]), ("w", [0.5]), ("x", [0.5])],  # ties: the first
    )
    found = best_of_n(given, "min")
    assert (found.n, found.best.mean, found.majority.mean) == (3, 0.5, 0.5)
    assert found.random.mean == pytest.approx(4 / 12)
    assert (found.best.n, found.majority.n, found.random.n) == (4, 4, 12)
    assert found.over_majority.difference == 0
    assert found.over_random.difference == pytest.approx(0.5 - 4 / 12)
    assert (found.over_random.n, found.over_random.clusters) == (12, 4)
    assert found.best.low < 0.5 < found.best.high
    one = best_of_n(given, "last", 1)
    assert one.best == one.majority != one.random or one.best.mean == one.random.mean
    # By the last step the second question's first answer is still the best, the first one's third.
    assert best_of_n(given, "last").best.mean == 0.25


def test_best_of_nothing_is_refused():
    given = candidates([("r", [0.9])], [("w", [0.1]), ("r", [0.4])])
    assert best_of_n(given, "mean").n == 1
    for n in (0, 2):
        with pytest.raises(ValueError, match="the fewest are 1"):
            best_of_n(given, "mean", n)
    with pytest.raises(ValueError, match="the fewest are 0"):
        best_of_n([], "mean")
    with pytest.raises(ValueError, match="needs answers"):
        outcome_correlation([], "mean")


def simulated(seed, questions=60, n=8, effect=1.0, spread=1.0):
    """Scores that a question's difficulty moves together, and that are higher for right answers by `effect`."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(questions):
        level, chance = rng.normal() * spread, rng.random()
        right = rng.random(n) < chance
        scores = 1 / (1 + np.exp(-(level + effect * right + rng.normal(size=n))))
        found.append([("r" if good else "w", [float(score)]) for good, score in zip(right, scores, strict=True)])
    return candidates(*found)


def test_the_auc_is_that_of_the_rank_test_and_the_correlation_pearsons():
    given = simulated(3)
    found = outcome_correlation(given, "last")
    right = np.concatenate([each.right for each in given])
    scores = np.concatenate([np.concatenate(each.steps) for each in given])
    u = stats.mannwhitneyu(scores[right], scores[~right]).statistic
    assert found.auc.mean == pytest.approx(u / (right.sum() * (~right).sum()))
    assert found.point_biserial == pytest.approx(stats.pointbiserialr(right, scores).statistic, rel=1e-5)
    assert (found.n, found.questions, found.auc.n) == (480, 60, 480)
    assert found.auc.low < found.auc.mean < found.auc.high


def test_without_clusters_the_interval_is_delongs():
    """One answer a question: Obuchowski's variance is then DeLong's, here computed pair by pair."""
    given = simulated(5, questions=40, n=1)
    found = outcome_correlation(given, "mean").auc
    scores = np.asarray([float(each.steps[0][0]) for each in given])
    right = np.asarray([each.right[0] for each in given])
    pairs = (scores[right][:, None] > scores[~right]) + 0.5 * (scores[right][:, None] == scores[~right])
    variance = pairs.mean(axis=1).var(ddof=1) / right.sum() + pairs.mean(axis=0).var(ddof=1) / (~right).sum()
    auc = pairs.mean()
    half = stats.norm.ppf(0.975) * np.sqrt(variance) / (auc * (1 - auc))
    logit = np.log(auc / (1 - auc))
    assert found.low == pytest.approx(1 / (1 + np.exp(half - logit)), rel=1e-6)
    assert found.high == pytest.approx(1 / (1 + np.exp(-half - logit)), rel=1e-6)


def test_the_interval_covers_where_answers_to_a_question_are_alike():
    """And one that took answers for independent would not, by far."""
    large = np.mean([outcome_correlation(simulated(seed, 400), "last").auc.mean for seed in range(900, 920)])
    intervals = [outcome_correlation(simulated(seed), "last").auc for seed in range(200)]
    assert np.mean([each.low <= large <= each.high for each in intervals]) > 0.9


def test_what_cannot_be_told_is_not():
    alike = outcome_correlation(candidates([("r", [0.9]), ("r", [0.8])]), "mean")
    assert (alike.auc, alike.point_biserial, alike.n) == (None, None, 2)
    apart = outcome_correlation(candidates([("r", [0.9]), ("w", [0.8])], [("r", [0.9]), ("w", [0.1])]), "mean")
    assert (apart.auc.mean, apart.auc.low, apart.auc.high) == (1.0, 0.0, 1.0)
    constant = outcome_correlation(candidates([("r", [0.5]), ("w", [0.5])]), "mean")
    assert (constant.auc.mean, constant.point_biserial) == (0.5, None)


def test_within_questions_a_score_of_difficulty_alone_tells_nothing():
    """Every answer to a hard question scores low, right or wrong."""
    easy, hard = [("r", [0.9]), ("r", [0.9]), ("w", [0.9])], [("w", [0.2]), ("w", [0.2]), ("r", [0.2])]
    found = outcome_correlation(candidates(*[easy, hard] * 20), "min")
    assert found.auc.mean == pytest.approx(2 / 3)
    assert (found.within.mean, found.within.low, found.within.high, found.within.n) == (0.5, 0.0, 1.0, 40)
    given = candidates(
        [("r", [0.9]), ("w", [0.1]), ("w", [0.9])],  # above one of two, beside the other
        [("r", [0.3]), ("r", [0.5]), ("w", [0.4])],
        [("r", [0.8]), ("r", [0.1])],
        [("w", [0.8])],
        [("r", [0.6]), ("w", [0.2])],
    )
    shares = [0.75, 0.5, 1.0]
    within = outcome_correlation(given, "last").within
    assert (within.mean, within.n) == (np.mean(shares), 3)
    half = stats.t.ppf(0.975, 2) * np.std(shares, ddof=1) / np.sqrt(3)
    assert (within.low, within.high) == (pytest.approx(np.mean(shares) - half), 1.0)
    assert outcome_correlation(given[2:4], "last").within is None
