"""Robustness in figures, against counts made by hand and answers whose habits are known."""

import numpy as np
import pytest

from agentark_jax.evaluation.robustness import (
    ALL,
    NOTHING,
    Chosen,
    Distracted,
    Perturbed,
    distraction_figures,
    perturbation_figures,
    shuffle_figures,
)

ROTATIONS = [(0, 1, 2, 3), (1, 2, 3, 0), (2, 3, 0, 1), (3, 0, 1, 2)]


def test_each_perturbation_is_paired_with_its_seed():
    rows = [Perturbed(f"s{n}", "digits", n < 4, n < 8) for n in range(10)]
    rows += [Perturbed(f"s{n}", "words", n < 8, n < 8) for n in range(10)]
    whole, digits, words = perturbation_figures(rows, level=0.95)
    assert [each["kind"] for each in (whole, digits, words)] == [ALL, "digits", "words"]
    assert (digits["accuracy"]["value"], digits["seed_accuracy"]["value"]) == (0.4, 0.8)
    assert digits["difference"]["value"] == pytest.approx(-0.4)
    assert digits["difference"]["high"] < 0.1
    assert digits["drop_rate"]["value"] == pytest.approx(0.5)
    assert digits["kept"]["value"] == 0.5
    assert digits["kept"]["n"] == 8
    assert words["drop_rate"]["value"] == 0
    assert whole["accuracy"]["value"] == pytest.approx(0.6)
    assert (whole["accuracy"]["n"], whole["accuracy"]["questions"]) == (20, 10)
    assert whole["drop_rate"]["value"] == pytest.approx(0.25)
    assert whole["drop_rate"]["low"] < 0.25 < whole["drop_rate"]["high"]


def test_without_a_right_seed_there_is_no_drop_rate():
    (whole, _) = perturbation_figures([Perturbed("s", "x", True, False), Perturbed("t", "x", False, False)], level=0.95)
    assert whole["drop_rate"] is None
    assert whole["kept"] is None


def test_rows_of_one_seed_count_for_less_than_so_many_seeds():
    together = [Perturbed(f"s{n // 8}", "x", n // 8 % 2 == 0, True) for n in range(160)]
    apart = [Perturbed(f"s{n}", "x", n // 8 % 2 == 0, True) for n in range(160)]
    widths = []
    for rows in (together, apart):
        accuracy = perturbation_figures(rows, level=0.95)[0]["accuracy"]
        widths.append(accuracy["high"] - accuracy["low"])
    assert widths[0] > 2 * widths[1]


def test_distraction_is_paired():
    rows = [Distracted(f"q{n}", n < 6, n in (0, 1, 2, 9)) for n in range(10)]
    found = distraction_figures(rows, level=0.95)
    assert (found["clean"]["value"], found["distracted"]["value"]) == (0.6, 0.4)
    assert found["difference"]["value"] == pytest.approx(-0.2)
    assert (found["kept"]["value"], found["kept"]["n"]) == (0.5, 6)


def shuffled(choose, questions: int = 40, right=lambda number: number % 4) -> list[Chosen]:
    """`choose` gives what is chosen of a question in an order; the first order is the question's own."""
    rows = []
    for number in range(questions):
        before = choose(number, (0, 1, 2, 3))
        rows += [Chosen(f"q{number}", order, right(number), before, choose(number, order)) for order in ROTATIONS]
    return rows


def test_who_reads_the_choices_has_no_preferred_position():
    found = shuffle_figures(shuffled(lambda number, order: number % 4 if number < 30 else (number + 1) % 4), level=0.95)
    assert found["same"]["value"] == found["always"]["value"] == 1
    # In three of the four orders the choices stand elsewhere than in the question.
    assert (found["same"]["n"], found["shuffled"]["n"], found["always"]["n"]) == (120, 120, 40)
    assert (found["positions"][0]["accuracy"]["n"], found["bias"]["n"]) == (40, 160)
    assert found["original"]["value"] == found["shuffled"]["value"] == 0.75
    assert [each["accuracy"]["value"] for each in found["positions"]] == [0.75] * 4
    assert [each["chosen"]["value"] for each in found["positions"]] == pytest.approx([0] * 4)
    assert found["spread"]["value"] == found["bias"]["value"] == 0
    # Answers are dealt out within a question, where they are all the same.
    assert (found["bias"]["chance"], found["bias"]["p_value"]) == (0, 1)


def test_who_always_takes_the_first_is_found_out():
    found = shuffle_figures(shuffled(lambda number, order: order[0]), level=0.95)
    assert found["same"]["value"] == 0
    assert found["always"]["value"] == 0
    # The first is the right one of every fourth question, and of two choices it is never the same one.
    assert found["shuffled"]["value"] == found["original"]["value"] == 0.25
    two = shuffle_figures([Chosen("q", order, 0, 0, order[0]) for order in [(0, 1), (1, 0)]], level=0.95)
    assert (two["same"]["value"], two["same"]["n"], two["difference"]["value"]) == (0, 1, -1)
    assert [each["accuracy"]["value"] for each in found["positions"]] == [1, 0, 0, 0]
    assert [each["chosen"]["value"] for each in found["positions"]] == pytest.approx([0.75, -0.25, -0.25, -0.25])
    assert found["spread"]["value"] == 1
    assert found["bias"]["value"] == pytest.approx(0.75)
    assert found["spread"]["p_value"] == found["bias"]["p_value"] == pytest.approx(1 / 1001)
    assert found["bias"]["chance"] < 0.2


def test_guessing_is_no_habit():
    draws, p_values = np.random.default_rng(0), []
    for seed in range(4):
        rows = shuffled(lambda number, order: int(draws.integers(4)))
        p_values.append(shuffle_figures(rows, level=0.95, seed=seed)["bias"]["p_value"])
    assert min(p_values) > 0.005
    assert max(p_values) > 0.3


def test_answers_that_cannot_be_read_choose_nothing():
    rows = shuffled(lambda number, order: NOTHING if number == 0 else number % 4, questions=8)
    found = shuffle_figures(rows, level=0.95)
    assert (found["same"]["n"], found["always"]["n"]) == (21, 7)
    assert found["shuffled"]["value"] == pytest.approx(7 / 8)
    none = shuffle_figures(shuffled(lambda number, order: NOTHING, questions=4), level=0.95)
    assert none["same"] is None
    assert none["bias"] is None
    assert none["shuffled"]["value"] == 0


def test_answers_are_dealt_out_within_their_question():
    # Who reads the choices says the same in all orders of a question, of four choices or of three.
    four = [Chosen("b", order, 3, 3, 3) for order in ROTATIONS]
    three = [Chosen("a", order, 1, 0, 0) for order in [(0, 1, 2), (1, 2, 0), (2, 0, 1)]]
    found = shuffle_figures([*four, *three], level=0.95)
    assert found["bias"]["value"] == found["bias"]["chance"] == pytest.approx(0)
