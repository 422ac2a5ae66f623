"""From predictions to the figures of a report: accuracies, paired differences, costs, curves.

With several seeds every arm has one prediction per question and seed. Figures are then means over both, and intervals
are clustered by question, so they are conditional on the seeds; the seed-level t interval stands beside them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, get_args

import numpy as np

from agentark_jax.evaluation.predictions import Prediction
from agentark_jax.evaluation.statistics import (
    MeanInterval,
    PairedDifference,
    holm,
    paired_difference,
    seed_level_interval,
    sentence,
    wilson_interval,
)
from agentark_jax.records import FlipClass
from agentark_jax.traces.labels import LabelledTurn, accuracy_by_round, flip_matrix, flips, majorities

Predictions = Mapping[str, Sequence[Prediction]]


def arm_figures(seeds: Sequence[Predictions], arm: str, *, level: float) -> dict[str, Any]:
    """Accuracy with its interval, and cost, of one arm over all seeds."""
    predictions = [prediction for seed in seeds for prediction in seed[arm]]
    right = np.asarray([prediction.verdict == "right" for prediction in predictions])
    questions = np.asarray([prediction.question_id for prediction in predictions])
    low, high = wilson_interval(right, questions, level=level)
    count = len(predictions)
    prompt = sum(prediction.prompt_tokens for prediction in predictions) / count
    completion = sum(prediction.completion_tokens for prediction in predictions) / count
    return {
        "accuracy": float(right.mean()),
        "low": low,
        "high": high,
        "correct": int(right.sum()),
        "n": count,
        "unparseable": sum(prediction.verdict == "unparseable" for prediction in predictions),
        "tokens_per_question": {"prompt": prompt, "completion": completion, "total": prompt + completion},
        "calls_per_question": sum(prediction.calls for prediction in predictions) / count,
    }


def oracle_figures(seeds: Sequence[Sequence[LabelledTurn]], *, level: float) -> dict[str, Any]:
    """How often any of a question's last answers is right: what the best pick among them would come to (oracle@N).

    `seeds` are turns of debaters, or samples. The last answers are those of the question's last round; `answers` is how
    many a question has on average. The interval is that of `arm_figures`.
    """
    graded: list[tuple[str, bool]] = []
    answers = 0
    for rows in seeds:
        last = {row.question_id: row.round for row in sorted(rows, key=lambda row: row.round)}
        deciding = [row for row in rows if row.round == last[row.question_id]]
        found = {row.question_id for row in deciding if row.right}
        graded += [(question, question in found) for question in sorted(last)]
        answers += len(deciding)
    low, high = _share_interval(graded, level)
    correct, n = sum(right for _, right in graded), len(graded)
    return {"accuracy": correct / n, "low": low, "high": high, "correct": correct, "n": n, "answers": answers / n}


def differences(
    seeds: Sequence[Predictions], contrasts: Sequence[tuple[str, str, str]], *, level: float
) -> list[dict[str, Any]]:
    """The paired difference of each contrast (arm a, arm b, name): a − b.

    `p_value` is of each by itself, `p_holm` adjusted for all of them: the contrasts are one family.
    """
    compared = [difference(seeds, a, b, level=level) for a, b, _ in contrasts]
    adjusted = holm([result.p_value for result, _ in compared])
    return [
        {
            "name": name,
            "a": a,
            "b": b,
            **{key: value for key, value in asdict(result).items() if key != "clusters"},
            "p_holm": p_holm,
            "questions": result.clusters,
            "sentence": sentence(name, result, p_holm, len(contrasts)),
            "seed_low": None if over_seeds is None else over_seeds.low,
            "seed_high": None if over_seeds is None else over_seeds.high,
        }
        for (a, b, name), (result, over_seeds), p_holm in zip(contrasts, compared, adjusted, strict=True)
    ]


def difference(
    seeds: Sequence[Predictions], a: str, b: str, *, level: float
) -> tuple[PairedDifference, MeanInterval | None]:
    """Accuracy of arm `a` less that of arm `b` on the questions both answered, paired, clustered by question.

    With it the interval over seeds, where there are several that differ.
    """
    pairs = [pair for seed in seeds for pair in _pairs(seed, a, b)]
    clusters, right_a, right_b = (np.asarray(column) for column in zip(*pairs, strict=True))
    result = paired_difference(right_a, right_b, clusters, level=level)
    per_seed = [seed_difference(seed, a, b) for seed in seeds]
    return result, seed_level_interval(per_seed, level) if len(seeds) > 1 else None


def seed_difference(seed: Predictions, a: str, b: str) -> float:
    """Accuracy of arm `a` less that of arm `b` in one seed, on the questions both answered."""
    return float(np.mean([float(right_a) - right_b for _, right_a, right_b in _pairs(seed, a, b)]))


def _pairs(seed: Predictions, a: str, b: str) -> list[tuple[str, bool, bool]]:
    """Each question that both arms answered, and whether either was right."""
    others = {prediction.question_id: prediction.verdict == "right" for prediction in seed[b]}
    return [
        (one.question_id, one.verdict == "right", others[one.question_id])
        for one in seed[a]
        if one.question_id in others
    ]


def debate_figures(seeds: Sequence[Sequence[LabelledTurn]], *, level: float) -> dict[str, Any]:
    """What happened between the rounds of a debate: accuracy, majorities, agreement, flips; counts of all seeds."""
    accuracies = [one for rows in seeds for one in accuracy_by_round(rows)]
    votes = [majority for rows in seeds for majority in majorities(rows)]
    turns = [row for rows in seeds for row in rows]
    rounds = []
    for index in sorted({one.round for one in accuracies}):
        right = sum(one.right for one in accuracies if one.round == index)
        count = sum(one.n for one in accuracies if one.round == index)
        graded = [(row.question_id, row.right) for row in turns if row.round == index]
        low, high = _share_interval(graded, level)
        of_round = [majority for majority in votes if majority.round == index]
        rounds.append(
            {
                "round": index + 1,
                "accuracy": right / count,
                "low": low,
                "high": high,
                "n": count,
                "majority": sum(majority.verdict == "right" for majority in of_round) / len(of_round),
                "agreement": sum(majority.agreement for majority in of_round) / len(of_round),
            }
        )
    matrices = [flip_matrix(flips(rows)) for rows in seeds]
    return {
        "agents": len({row.agent for row in turns}),
        "rounds": len(rounds),
        "turns": len(turns),
        "accuracy_by_round": rounds,
        "flips": [
            {
                "from_round": to,
                "to_round": to + 1,
                **{kind: sum(matrix.get(to, {}).get(kind, 0) for matrix in matrices) for kind in get_args(FlipClass)},
            }
            for to in sorted({to for matrix in matrices for to in matrix})
        ],
    }


def accuracy_point(x: float | str, graded: Sequence[tuple[str, bool]], *, level: float) -> dict[str, Any]:
    """One point of a curve: the share of right ones among (question id, right) with its interval."""
    low, high = _share_interval(graded, level)
    return {"x": x, "y": sum(right for _, right in graded) / len(graded), "low": low, "high": high, "n": len(graded)}


def _share_interval(graded: Sequence[tuple[str, bool]], level: float) -> tuple[float, float]:
    questions, right = zip(*graded, strict=True)
    return wilson_interval(np.asarray(right), np.asarray(questions), level=level)
