"""Several answers to each question: how often one is right, the majority of so many, any of so many."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from agentark_jax.evaluation.predictions import Prediction
from agentark_jax.evaluation.statistics import bootstrap_interval, wilson_interval
from agentark_jax.traces.labels import majority_vote

Grouped = Mapping[str, Sequence[Prediction]]


def by_question(predictions: Sequence[Prediction]) -> dict[str, list[Prediction]]:
    """The answers to each question, in their order."""
    grouped: dict[str, list[Prediction]] = {}
    for prediction in predictions:
        grouped.setdefault(prediction.question_id, []).append(prediction)
    return grouped


def counts_of(samples: int) -> list[int]:
    """1, 2, 4, … up to so many, and so many."""
    return sorted({samples, *(2**power for power in range(samples.bit_length()) if 2**power <= samples)})


def pass_at(n: int, right: int, k: int) -> float:
    """The probability that k of n answers, drawn without replacement, have a right one among them.

    1 − C(n − right, k)/C(n, k): unbiased for k independent answers (Chen et al. 2021, arXiv 2107.03374, eq. 1).
    """
    return 1.0 - math.comb(n - right, k) / math.comb(n, k)


def pass_figures(grouped: Grouped, k: int, *, level: float) -> dict[str, Any]:
    """pass@k over questions with its interval (`mean_figures`)."""
    values = [pass_at(len(each), sum(one.verdict == "right" for one in each), k) for each in grouped.values()]
    return {"k": k, "n": len(values), **mean_figures(np.asarray(values), level=level)}


def majority_figures(grouped: Grouped, k: int, *, level: float) -> dict[str, Any]:
    """How often the majority of k answers is right (maj@k), clustered by question.

    The n answers to a question are ⌊n/k⌋ votes of k each, so that votes are as independent as answers; of a tie the
    answer that was given first wins.
    """
    votes = [
        (question, vote(answers[start : start + k]))
        for question, answers in grouped.items()
        for start in range(0, len(answers) - k + 1, k)
    ]
    questions, right = zip(*votes, strict=True)
    low, high = wilson_interval(np.asarray(right), np.asarray(questions), level=level)
    return {
        "k": k,
        "accuracy": sum(right) / len(right),
        "low": low,
        "high": high,
        "n": len(right),
        "questions": len(grouped),
    }


def vote(answers: Sequence[Prediction]) -> bool:
    """Whether the majority of answers is right; one without a readable answer is not."""
    answer, votes = majority_vote([each.answer for each in answers])
    return votes > 0 and next(each for each in answers if each.answer == answer).verdict == "right"


def voted(grouped: Grouped) -> Iterator[Prediction]:
    """What all answers to each question come to together, at the cost of all."""
    for question, answers in grouped.items():
        answer, votes = majority_vote([each.answer for each in answers])
        deciding = next((each for each in answers if each.answer == answer), answers[0])
        yield Prediction(
            question,
            answer,
            deciding.verdict,
            votes / len(answers),
            sum(each.prompt_tokens for each in answers),
            sum(each.completion_tokens for each in answers),
            tuple(key for each in answers for key in each.turn_keys),
            sum(each.truncated for each in answers),
        )


def mean_figures(values: Float[np.ndarray, " questions"], *, level: float) -> dict[str, float | None]:
    """The mean of a value of each question, and its interval: Wilson's where all are 0 or 1, else the bootstrap's.

    The ends are None where the spread is not known (`bootstrap_interval`).
    """
    if np.isin(values, (0.0, 1.0)).all():
        ends: tuple[float, float] | None = wilson_interval(values, level=level)
    else:
        ends = bootstrap_interval(lambda drawn, column: drawn @ column / drawn.sum(1), values, level=level)
    low, high = ends or (None, None)
    return {"accuracy": float(values.mean()), "low": low, "high": high}
