"""Errors planted in solutions: one number changes, in the step that was named, before the answer."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentark_jax.data.planting import (
    another_number,
    plant,
    plantable,
    recoverable,
    right_solution,
    split,
    wrong_solution,
)
from agentark_jax.records import Question

SOLUTION = "3+4=7\n7*2=14\nThe answer is 14."


def test_the_result_of_the_named_step_changes_and_nothing_else():
    assert split(SOLUTION) == ("3+4=7\n", "7*2=14\n", "The answer is 14.")
    assert plantable(SOLUTION) == [0, 1]
    error = plant(SOLUTION, 1, seed=0)
    assert error.before == "14"
    assert error.after != "14"
    assert error.steps == ("3+4=7\n", f"7*2={error.after}\n", "The answer is 14.")
    assert error.beginning == f"3+4=7\n7*2={error.after}\n"
    assert plant(SOLUTION, 1, seed=0) == error
    assert len({plant(SOLUTION, 1, seed).after for seed in range(20)}) > 3


@pytest.mark.parametrize(
    ("step", "before"),
    [
        ("Step 2: she buys 5 more eggs.\n", "5"),
        ("2. She has 12 apples and sells 5.\n", "5"),
        ("So 1,200 + 34 = 1,234 dollars in 3 days.\n", "1,234"),
        ("It costs 10 = 2 * 5 in all.\n", "2"),
        ("Half of 2.5 is x2, and 8 are left.\n", "8"),
    ],
)
def test_what_changes_is_a_result_and_no_number_of_a_step_or_part_of_another(step, before):
    text = f"{step}The answer is 9."
    assert plant(text, 0, seed=1).before == before


def test_what_has_no_number_before_the_answer_takes_no_error():
    assert plantable("We think.\nThe answer is 4.") == []
    assert plantable("") == []
    with pytest.raises(ValueError, match="step 0 has no number"):
        plant("We think.\nThe answer is 4.", 0, seed=0)


@given(st.integers(0, 10**9), st.text(max_size=5))
def test_another_number_is_near_never_the_same_and_never_negative(value, seed):
    for written in (str(value), f"{value:,}"):
        other = another_number(written, seed)
        assert 1 <= abs(int(other.replace(",", "")) - value) <= 9
        assert int(other.replace(",", "")) >= 0
        assert ("," in other) <= ("," in written)


def test_who_has_stated_an_answer_does_not_go_on():
    boxed = "We add.\n3+4=7\nThus $7 \\cdot 2 = \\boxed{14}$.\nThat is 14 apples.\nThe answer is $\\boxed{14}$."
    assert plantable(boxed) == [1, 2, 3]
    assert recoverable(boxed) == [1]
    assert recoverable(SOLUTION) == plantable(SOLUTION) == [0, 1]
    assert recoverable("Seven.\nThe answer is 7.") == []


def test_peers_are_right_and_wrong_solutions_of_one_question():
    question = Question.make("task", "held_out", "How many?", "14", SOLUTION)
    assert right_solution(question) == SOLUTION
    wrong = wrong_solution(question, 0).splitlines()
    assert wrong[0] == "3+4=7"
    assert wrong[1].startswith("7*2=")
    assert "14" not in wrong[1] + wrong[2]
    # Its last step and its answer are one number, as in a right solution.
    for seed in range(20):
        _, step, answer = wrong_solution(question, seed).splitlines()
        assert answer == f"The answer is {step.removeprefix('7*2=')}."
    letters = Question.make("task", "held_out", "Which?", "B", "", choices=["x", "y", "z"])
    assert {wrong_solution(letters, seed) for seed in range(20)} == {"The answer is A.", "The answer is C."}
    assert wrong_solution(Question.make("task", "held_out", "Who?", "Anna", ""), 0) is None
