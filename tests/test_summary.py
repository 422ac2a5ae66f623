"""Figures of arms that need more than one answer to a question."""

import numpy as np
import pytest
from test_selection import make_row

from agentark_jax.evaluation.statistics import wilson_interval
from agentark_jax.evaluation.summary import oracle_figures


def debated(question: str, *rounds: str) -> list:
    """Of each round, who is right: `rw` is an agent that is and one that is not."""
    return [
        make_row(question, agent, round, "right" if verdict == "r" else "wrong")
        for round, verdicts in enumerate(rounds)
        for agent, verdict in enumerate(verdicts)
    ]


def test_an_oracle_needs_one_right_answer_in_the_last_round():
    rows = [*debated("a", "rw", "ww"), *debated("b", "ww", "wr"), *debated("c", "rw"), *debated("d", "ww", "rr")]
    found = oracle_figures([rows[::-1]], level=0.9)
    low, high = wilson_interval(np.asarray([False, True, True, True]), level=0.9)
    assert found == {
        "accuracy": 0.75,
        "correct": 3,
        "n": 4,
        "answers": 2.0,
        "low": pytest.approx(low),
        "high": pytest.approx(high),
    }


def test_several_seeds_are_clustered_by_question():
    """The same again tells nothing new."""
    rows = [row for index in range(20) for row in debated(f"q{index}", "rw" if index % 4 else "ww")]
    once, thrice = (oracle_figures([rows] * seeds, level=0.95) for seeds in (1, 3))
    assert (thrice["n"], thrice["correct"], thrice["accuracy"]) == (60, 45, 0.75)
    assert thrice["high"] - thrice["low"] >= 0.95 * (once["high"] - once["low"])
