"""What becomes of answers when they are looked at again: pure figures of who was right before and after.

Acc@t1, Acc@t2 and the changes between them: SCoRe (Kumar et al. 2024, arXiv 2409.12917). The blind spot:
Self-Correction Bench (Tsui 2025, arXiv 2507.02778). All intervals are clustered by question where one has several rows.
"""

import re
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Shaped

from agentark_jax.data.planting import split
from agentark_jax.evaluation.statistics import bootstrap_interval, paired_difference, wilson_interval

_AGAIN = "check|read|view|visit|do|try|trace|think|count|calculate|compute|consider|evaluate|examine|assess|verify|work"
# Words by which a step shows that it verifies: English, at word boundaries, whatever the case. A step counts once.
VERIFYING = (
    r"(?:double[- ]?|re-?)?check(?:s|ed|ing)?",
    r"verif(?:y|ies|ied|ying|ication)",
    r"wait(?=\s*[,.!…])",
    r"hold on",
    # To do something again, which "rewrite" and "represent" are not.
    rf"let(?: me| us|'s) (?:re-?(?:{_AGAIN})|see if)",
    r"make sure",
    r"confirm(?:s|ed|ing)?",
    r"(?:substitut|plugg)ing (?:this |it |that )?back",
    r"on second thought",
)
_VERIFIES = re.compile(rf"\b(?:{'|'.join(VERIFYING)})\b", re.I)


def share(happened: Shaped[np.ndarray, " rows"], clusters: Shaped[np.ndarray, " rows"], level: float) -> dict[str, Any]:
    """A share of rows with Wilson's interval; without a row there is none."""
    n = len(happened)
    if not n:
        return {"share": None, "low": None, "high": None, "n": 0}
    low, high = wilson_interval(happened, clusters, level=level)
    return {"share": float(np.mean(happened)), "low": low, "high": high, "n": n}


def difference(
    a: Shaped[np.ndarray, " rows"], b: Shaped[np.ndarray, " rows"], clusters: Shaped[np.ndarray, " rows"], level: float
) -> dict[str, Any] | None:
    """The share in a less that in b over the same rows, paired; None without a row."""
    return asdict(paired_difference(a, b, clusters, level=level)) if len(a) else None


def transitions(
    before: Bool[np.ndarray, " questions"],
    after: Bool[np.ndarray, " questions"],
    questions: Shaped[np.ndarray, " questions"],
    *,
    level: float = 0.95,
) -> dict[str, Any]:
    """From the first answers to the second.

    `accuracy_1` and `accuracy_2` are Acc@t1 and Acc@t2, `difference` is Δ. `corrected` is the share of wrong answers
    that become right, `given_up` that of right ones that become wrong; `wrong_to_right` and `right_to_wrong` are the
    same events as shares of all answers (SCoRe's Δ i→c and Δ c→i).
    """
    return {
        "accuracy_1": share(before, questions, level),
        "accuracy_2": share(after, questions, level),
        "difference": difference(after, before, questions, level),
        "corrected": share(after[~before], questions[~before], level),
        "given_up": share(~after[before], questions[before], level),
        "wrong_to_right": share(~before & after, questions, level),
        "right_to_wrong": share(before & ~after, questions, level),
    }


def blind_spot(
    own: Bool[np.ndarray, " wrong"],
    others: Bool[np.ndarray, " wrong"],
    questions: Shaped[np.ndarray, " wrong"],
    *,
    level: float = 0.95,
    seed: int = 0,
) -> dict[str, Any]:
    """How much less often an error is corrected as one's own than as another's: 1 − share own / share others.

    Rows are wrong answers; `own` says which were corrected where the model took them for its own, `others` which where
    the user brought them. Negative where its own are corrected more often. The rate is None where no other's is
    corrected, its interval (bootstrap over questions) where its spread is not known.
    """

    def rate(
        drawn: Float[np.ndarray, "resamples wrong"], own: Bool[np.ndarray, " wrong"], others: Bool[np.ndarray, " wrong"]
    ) -> Float[np.ndarray, " resamples"]:
        corrected = drawn @ others.astype(float)
        return np.where(corrected > 0, 1 - (drawn @ own.astype(float)) / np.where(corrected > 0, corrected, 1), np.nan)

    known = bool(others.any())
    ends = bootstrap_interval(rate, own, others, clusters=questions, level=level, seed=seed) if known else None
    low, high = ends or (None, None)
    return {
        "rate": float(1 - own.sum() / others.sum()) if known else None,
        "low": low,
        "high": high,
        "n": len(own),
        "own": share(own, questions, level),
        "others": share(others, questions, level),
        "difference": difference(own, others, questions, level),
    }


def recovery(
    planted: Bool[np.ndarray, " rows"],
    clean: Bool[np.ndarray, " rows"],
    steps: Shaped[np.ndarray, " rows"],
    questions: Shaped[np.ndarray, " rows"],
    *,
    level: float = 0.95,
) -> dict[str, Any]:
    """How often a solution with an error in one step still ends right, in all and by step (from 1).

    `clean` is whether the same solution, begun up to the same step without the error, ends right: what could be
    recovered at all; the difference is paired.
    """

    def figures(rows: Bool[np.ndarray, " rows"]) -> dict[str, Any]:
        of = questions[rows]
        return {
            "planted": share(planted[rows], of, level),
            "clean": share(clean[rows], of, level),
            "difference": difference(planted[rows], clean[rows], of, level),
        }

    return {
        **figures(np.ones(len(planted), bool)),
        "by_step": [{"step": int(step) + 1, **figures(steps == step)} for step in np.unique(steps)],
    }


def verifies(step: str) -> bool:
    """Whether a step has one of the words of `VERIFYING`."""
    return _VERIFIES.search(step) is not None


def verification(
    texts: Sequence[str], tokens: Sequence[int], right: Sequence[bool], *, level: float = 0.95
) -> dict[str, Any]:
    """How often answers verify: the share of all steps, of answers, and steps that do so per 100 tokens.

    Args:
        texts: one answer to each question.
        tokens: of each, at least 1.
        right: whether each is right; the accuracy of those with and without a step that verifies stands beside them,
            which says nothing about causes.
    """
    found = [[verifies(step) for step in split(text) if step.strip()] for text in texts]
    of_step = np.asarray([number for number, steps in enumerate(found) for _ in steps], int)
    any_step = np.asarray([any(steps) for steps in found], bool)
    questions, correct = np.arange(len(texts)), np.asarray(right, bool)
    counts, lengths = np.asarray([sum(steps) for steps in found], float), np.asarray(tokens, float)
    ends = bootstrap_interval(
        lambda drawn, counts, lengths: 100 * (drawn @ counts) / np.maximum(drawn @ lengths, 1),
        counts,
        lengths,
        level=level,
    )
    low, high = ends or (None, None)
    return {
        "steps": share(np.asarray([one for steps in found for one in steps], bool), of_step, level),
        "answers": share(any_step, questions, level),
        "per_100_tokens": {
            "mean": float(100 * counts.sum() / lengths.sum()),
            "low": low,
            "high": high,
            "n": len(texts),
        },
        "accuracy_with": share(correct[any_step], questions[any_step], level),
        "accuracy_without": share(correct[~any_step], questions[~any_step], level),
    }
