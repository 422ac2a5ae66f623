"""What a process reward model is good for: choosing among answers, and telling right answers from wrong ones."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, Shaped
from scipy import stats

from agentark_jax.evaluation.statistics import (
    MeanInterval,
    PairedDifference,
    paired_difference,
    seed_level_interval,
    wilson_interval,
)
from agentark_jax.traces.labels import majority_vote

Aggregate = Literal["min", "mean", "last", "product"]

AGGREGATES: Mapping[Aggregate, Callable[[Float[np.ndarray, " S"]], float]] = {
    "min": lambda right: float(np.min(right)),
    "mean": lambda right: float(np.mean(right)),
    "last": lambda right: float(right[-1]),
    "product": lambda right: float(np.prod(np.asarray(right, np.float64))),
}


@dataclass(frozen=True)
class Candidates:
    """Answers to one question, in the order in which they were sampled.

    Attributes:
        right: whether each is the right answer.
        answers: each as a grader reads it, empty where it cannot.
        steps: how probably the steps of each are right; at least one of each.
    """

    question: str
    right: tuple[bool, ...]
    answers: tuple[str, ...]
    steps: tuple[Float[np.ndarray, " S"], ...]


@dataclass(frozen=True)
class BestOfN:
    """The best of the first `n` answers by a process reward model, against other ways to one answer of the same n.

    Attributes:
        best, majority, random: shares of right answers; the first of equal ones is chosen, a vote is for what is read,
            and random is the expectation of any of the n.
        over_majority, over_random: paired by question.
    """

    aggregate: Aggregate
    n: int
    best: MeanInterval
    majority: MeanInterval
    random: MeanInterval
    over_majority: PairedDifference
    over_random: PairedDifference


@dataclass(frozen=True)
class OutcomeCorrelation:
    """How an answer's score goes with its being right.

    Attributes:
        auc: the probability that a right answer has the higher score than a wrong one, ties counting half (of all
            pairs, also of different questions); its interval is that of Obuchowski (Biometrics 53, 1997), which counts
            answers to a question as a cluster, on the logit scale. None without right or without wrong answers. Where
            its variance is not known (fewer than two questions with either, or no overlap) the interval is 0 to 1.
        within: the same of pairs of answers to one question, the mean over the questions that have right and wrong
            ones, with Student's interval; `n` are those questions. Hard questions have wrong answers and low scores: a
            model that has only learned which are hard has a high AUC, and a half here. None without such a question.
        point_biserial: Pearson's correlation of score and outcome; None where one of them is constant. It has no
            interval: of clustered answers none is known to hold what it promises. Read the AUC's.
        n, questions: how many answers, to how many questions.
    """

    auc: MeanInterval | None
    within: MeanInterval | None
    point_biserial: float | None
    n: int
    questions: int


def best_of_n(
    candidates: Sequence[Candidates], aggregate: Aggregate, n: int | None = None, *, level: float = 0.95
) -> BestOfN:
    """Chooses one of the first `n` answers to each question (None: of as many as all questions have).

    Raises: ValueError without a question, or for one with fewer than n answers.
    """
    fewest = min((len(each.right) for each in candidates), default=0)
    n = fewest if n is None else n
    if not 1 <= n <= fewest:
        raise ValueError(f"the best of {n} needs as many answers to each of some questions; the fewest are {fewest}")
    score = AGGREGATES[aggregate]
    right = np.asarray([each.right[:n] for each in candidates], bool)
    best = right[np.arange(len(right)), [int(np.argmax([score(s) for s in each.steps[:n]])) for each in candidates]]
    voted = np.asarray([_voted(each.right[:n], each.answers[:n]) for each in candidates], bool)
    questions = np.repeat(np.arange(len(right)), n)
    return BestOfN(
        aggregate,
        n,
        best=_share(best, None, level),
        majority=_share(voted, None, level),
        random=_share(right.ravel(), questions, level),
        over_majority=paired_difference(best, voted, level=level),
        # The choice stands against each of the n, which on average are the random pick.
        over_random=paired_difference(np.repeat(best, n), right.ravel(), questions, level=level),
    )


def outcome_correlation(
    candidates: Sequence[Candidates], aggregate: Aggregate, *, level: float = 0.95
) -> OutcomeCorrelation:
    """How aggregate scores go with outcomes, over all answers to all questions. Raises ValueError without any."""
    scores = np.asarray([AGGREGATES[aggregate](s) for each in candidates for s in each.steps], np.float64)
    right = np.asarray([verdict for each in candidates for verdict in each.right], bool)
    clusters = np.repeat(np.arange(len(candidates)), [len(each.right) for each in candidates])
    if not scores.size:
        raise ValueError("a correlation needs answers; there are none")
    constant = np.ptp(scores) == 0 or right.all() or not right.any()
    return OutcomeCorrelation(
        auc=_auc(scores, right, clusters, level),
        within=_within(candidates, aggregate, level),
        point_biserial=None if constant else float(np.corrcoef(scores, right)[0, 1]),
        n=scores.size,
        questions=len(candidates),
    )


def _within(candidates: Sequence[Candidates], aggregate: Aggregate, level: float) -> MeanInterval | None:
    shares = []
    for each in candidates:
        scores, right = np.asarray([AGGREGATES[aggregate](s) for s in each.steps]), np.asarray(each.right, bool)
        if right.any() and not right.all():
            apart = scores[right][:, None] - scores[~right]
            shares.append(float(np.mean((np.sign(apart) + 1) / 2)))
    if not shares:
        return None
    known = seed_level_interval(shares, level) if len(shares) > 1 else None
    low, high = (0.0, 1.0) if known is None else (max(0.0, known.low), min(1.0, known.high))
    return MeanInterval(float(np.mean(shares)), low, high, len(shares))


def _voted(right: Sequence[bool], answers: Sequence[str]) -> bool:
    """Whether the most frequent answer is right; without a readable one, it is not."""
    winner, votes = majority_vote(answers)
    return votes > 0 and right[answers.index(winner)]


def _share(right: Bool[np.ndarray, " n"], clusters: Shaped[np.ndarray, " n"] | None, level: float) -> MeanInterval:
    return MeanInterval(float(right.mean()), *wilson_interval(right, clusters, level=level), n=right.size)


def _auc(
    scores: Float[np.ndarray, " n"], right: Bool[np.ndarray, " n"], clusters: Shaped[np.ndarray, " n"], level: float
) -> MeanInterval | None:
    good, bad = scores[right], scores[~right]
    if not good.size or not bad.size:
        return None
    # Of each right answer the share of wrong ones below it, and of each wrong one the share of right ones above it.
    ranks = stats.rankdata(scores)
    above = (ranks[right] - stats.rankdata(good)) / bad.size
    below = 1 - (ranks[~right] - stats.rankdata(bad)) / good.size
    auc = float(above.mean())
    count = int(clusters.max()) + 1
    of_good, of_bad = (np.bincount(clusters[kept], minlength=count) for kept in (right, ~right))
    a = np.bincount(clusters[right], above, minlength=count) - of_good * auc
    b = np.bincount(clusters[~right], below, minlength=count) - of_bad * auc
    with_good, with_bad = int((of_good > 0).sum()), int((of_bad > 0).sum())
    if min(with_good, with_bad) < 2 or not 0 < auc < 1:
        return MeanInterval(auc, 0.0, 1.0, scores.size)
    variance = with_good / (with_good - 1) * float(a @ a) / good.size**2
    variance += with_bad / (with_bad - 1) * float(b @ b) / bad.size**2
    variance += 2 * count / (count - 1) * float(a @ b) / (good.size * bad.size)
    # On the logit scale the interval stays between 0 and 1.
    error = float(stats.norm.ppf((1 + level) / 2)) * np.sqrt(max(variance, 0.0)) / (auc * (1 - auc))
    middle = np.log(auc / (1 - auc))
    low, high = (float(1 / (1 + np.exp(-(middle + side * error)))) for side in (-1, 1))
    return MeanInterval(auc, low, high, scores.size)
