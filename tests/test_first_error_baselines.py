"""Baselines of finding first errors: what they may know, and that they are beaten by who reads."""

import numpy as np
import pytest

from agentark_jax.evaluation.first_error_baselines import LENGTH_ONLY, MAJORITY, Judged, compare


def judged(question, error, count=5, lengths=None, right=None):
    """A solution whose steps are its lines."""
    truth = np.arange(count) < (count if error is None else error)
    return Judged(
        question,
        np.full(count, 0.9) if right is None else np.asarray(right, float),
        np.full(count, 10) if lengths is None else np.asarray(lengths),
        truth,
        np.ones(count, bool),
        np.arange(count),
        error,
    )


def test_the_majority_is_the_most_frequent_first_error_of_the_other_half():
    solutions = [judged(f"q{i}", 2 if i % 3 else None) for i in range(90)]
    found = compare(solutions, 0.5, name="model")
    assert found[MAJORITY].errors.located.mean == 1
    assert found[MAJORITY].errors.cleared.mean == 0
    assert found[MAJORITY].errors.f1 == 0
    # 5/5 right in a third of them, 2/5 in the others: said of every step.
    assert found[MAJORITY].calibration.brier == pytest.approx(0.6 * 0.4, abs=0.01)
    assert found["model"].errors.cleared.mean == 1
    assert found[MAJORITY].model_over.difference == pytest.approx(30 / 90 - 60 / 90)
    assert found["model"].model_over is found["model"].f1_over is None
    short = [judged(f"q{i}", 4) for i in range(40)] + [judged(f"s{i}", None, count=2) for i in range(10)]
    assert compare(short, 0.5, name="model")[MAJORITY].errors.cleared.mean == 1, "a fifth step that is not there"


def test_length_alone_finds_what_lengths_give_away():
    rng = np.random.default_rng(0)
    solutions = []
    for number in range(200):
        error = [None, 1, 3][number % 3]
        lengths = rng.integers(8, 12, 5)
        if error is not None:
            lengths[error:] += 40  # whoever errs, rambles
        solutions.append(judged(f"q{number}", error, lengths=lengths))
    found = compare(solutions, 0.5, name="model")
    assert found[LENGTH_ONLY].errors.f1 > 0.9
    assert found[LENGTH_ONLY].calibration.brier < 0.1
    blind = compare([judged(each.question, each.error) for each in solutions], 0.5, name="model")
    assert blind[LENGTH_ONLY].errors.f1 < 0.6


def test_neither_sees_the_half_that_it_is_judged_on():
    """Errors at random places: what was fitted to them would find them, what was fitted to others cannot."""
    rng = np.random.default_rng(1)
    solutions = [judged(f"q{i}", int(rng.integers(0, 12)), count=12) for i in range(60)]
    found = compare(solutions, 0.5, name="model")
    assert found[MAJORITY].errors.located.mean < 0.2
    # All solutions to a question are on one side.
    same = [judged("q", int(rng.integers(0, 12)), count=12) for _ in range(60)]
    assert compare(same, 0.5, name="model").keys() == {"model"}


def test_who_reads_beats_both_and_the_interval_says_so():
    rng = np.random.default_rng(2)
    solutions = []
    for number in range(160):
        error = None if number % 4 == 0 else int(rng.integers(0, 6))
        truth = np.arange(6) < (6 if error is None else error)
        right = np.clip(np.where(truth, 0.85, 0.1) + rng.normal(size=6) * 0.15, 0, 1)
        solutions.append(judged(f"q{number}", error, count=6, right=right))
    found = compare(solutions, 0.5, name="model")
    assert found["model"].errors.f1 > 0.9
    for baseline in (MAJORITY, LENGTH_ONLY):
        assert found[baseline].model_over.low > 0.2
        assert found[baseline].f1_over.low > 0.2
        difference = found["model"].errors.f1 - found[baseline].errors.f1
        assert found[baseline].f1_over.difference == pytest.approx(difference)
        assert found["model"].calibration.brier < found[baseline].calibration.brier


def test_steps_of_unknown_truth_are_not_counted():
    one = judged("a", 1)
    known = np.array([True, False, True, True, True])
    found = compare([Judged(**{**vars(one), "known": known}), judged("b", None)], 0.5, name="model")
    assert found["model"].calibration.n == 9
    with pytest.raises(ValueError, match="need"):
        compare([], 0.5, name="model")


def test_without_a_threshold_the_models_is_fitted_on_the_other_half_too():
    """A model that orders steps perfectly, all of them above a half, is found out by its order alone."""
    solutions = []
    for number in range(80):
        error = [None, 1, 3][number % 3]
        right = np.where(np.arange(5) < (5 if error is None else error), 0.95, 0.8)
        solutions.append(judged(f"q{number}", error, right=right))
    assert compare(solutions, 0.5, name="model")["model"].errors.f1 == 0
    found = compare(solutions, None, name="model")
    assert found["model"].errors.f1 == 1
    assert found[MAJORITY].model_over.difference > 0.3
    assert found[LENGTH_ONLY].model_over.low > 0
    alone = [judged("q0", 1, right=[0.9, 0.8, 0.8, 0.8, 0.8])]  # nobody to learn a threshold from
    assert compare(alone, None, name="model")["model"].errors.located.mean == 0
