"""Numbers of a result as JSON values, each with its n and its interval: shares, means and paired differences."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from jaxtyping import Shaped

from agentark_jax.evaluation.statistics import bootstrap_interval, paired_difference, sentence, wilson_interval

Column = Shaped[np.ndarray, " rows"] | Sequence[float] | Sequence[bool]


def share(right: Column, questions: Sequence[str], *, level: float) -> dict[str, Any] | None:
    """The share of rows that are right, with Wilson's interval, clustered by question; None without rows."""
    if not len(right):
        return None
    values, clusters = np.asarray(right), np.asarray(questions)
    low, high = wilson_interval(values, clusters, level=level)
    return {"value": float(values.mean()), "low": low, "high": high, **_counts(clusters)}


def mean(values: Column, questions: Sequence[str], *, level: float) -> dict[str, Any] | None:
    """The mean over rows with its bootstrap interval, clustered by question; None without rows."""
    return statistic(lambda drawn, column: drawn @ column / drawn.sum(1), [values], questions, level=level)


def statistic(
    function: Callable[..., Any], columns: Sequence[Column], questions: Sequence[str], *, level: float
) -> dict[str, Any] | None:
    """Any statistic of rows, as `bootstrap_interval` takes it; None without rows, or where it is not defined."""
    if not len(questions):
        return None
    arrays, clusters = list(map(np.asarray, columns)), np.asarray(questions)
    (value,) = function(np.ones((1, len(clusters))), *arrays)
    if np.isnan(value):
        return None
    low, high = bootstrap_interval(function, *arrays, clusters=clusters, level=level) or (None, None)
    return {"value": float(value), "low": low, "high": high, **_counts(clusters)}


def difference(name: str, a: Column, b: Column, questions: Sequence[str], *, level: float) -> dict[str, Any] | None:
    """Share of rows right in `a` less that in `b`, paired and clustered by question; None without rows."""
    if not len(a):
        return None
    result = paired_difference(np.asarray(a), np.asarray(b), np.asarray(questions), level=level)
    known = {key: value for key, value in asdict(result).items() if key not in ("clusters", "difference")}
    return {"value": result.difference, **known, "questions": result.clusters, "sentence": sentence(name, result)}


def _counts(clusters: np.ndarray) -> dict[str, int]:
    return {"n": len(clusters), "questions": int(np.unique(clusters).size)}
