"""Which steps of an answer to a word problem are right."""

import pytest

from agentark_jax.records import Question
from agentark_jax.tasks.config import TaskConfig
from agentark_jax.tasks.word_problems import WordProblems, exact_step_truth

# (3 + 4) * 2 - 5
QUESTION = Question.make(
    "word_problems", "debate", "?", "9", start=3, operations=["+", "*", "-"], operands=[4, 2, 5], values=[7, 14, 9]
)


def truth(text: str) -> str | None:
    """+ and - by line."""
    found = exact_step_truth(QUESTION, text.splitlines(keepends=True))
    return None if found is None else "".join("+" if right else "-" for right in found)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("3+4=7\n7*2=14\n14-5=9\nThe answer is 9.", "++++"),
        ("4 + 3 = 7\n2 × 7 = 14\nStep 3: So 14-5=9 apples.\n#### 9", "++++"),
        ("1. 3+4=7\n2) 7*2=14\nThe answer is 14-5=9", "+++"),  # that is no number, but right
        ("3+4=7, 7*2=14.\n14-5=9\nThe answer is 9.", "+++"),
        ("3+4=8\n8*2=16\n16-5=11\nThe answer is 11.", "----"),
        ("3+4=7\n7*2=15\n15-5=10\nThe answer is 10.", "+---"),
        ("3+4=7\n7*2=15\n14-5=9\nThe answer is 9.", "+---"),
        ("3+4=7\n7*2=14\n5-14=9\nThe answer is 9.", "++--"),
        ("3+4=7\n7*5=35\nThe answer is 35.", "+--"),
        ("3+4=7\n7*2=14\n14-5=9\nThe answer is 8.", "+++-"),
        ("3+4=7\n7*2=14", "++"),  # cut off
        ("3+4=7\nThe answer is", None),
        ("The answer is 9.", "+"),
        ("The answer is 8.", "-"),
        ("", ""),
        # Nobody knows: words, other numbers, formulas, other ways to the answer.
        ("First we add.\n3+4=7\nThe answer is 9.", None),
        ("3+4=7 of 8\nThe answer is 9.", None),
        ("3+4*2=7\nThe answer is 9.", None),
        ("1+3+4=7\nThe answer is 9.", None),
        ("(3+4=7\nThe answer is 9.", None),
        ("3+4=7.5\nThe answer is 9.", None),
        ("-3+4=7\nThe answer is 9.", None),
        ("7-5=2\n3+4=7\n7*2=14\n14-5=9\nThe answer is 9.", None),
        # It does not matter what is said after the first wrong step.
        ("3+4=6\nFirst we add 3.5\nThe answer is 1.", "---"),
        ("3+" + "9" * 5000 + "=7\nThe answer is 9.", None),
    ],
)
def test_truth_of_steps(text, expected):
    assert truth(text) == expected


def test_every_step_of_every_gold_rationale_is_right_and_of_a_spoiled_one_those_before_it():
    for question in WordProblems(TaskConfig()).questions("debate", 60):
        lines = question.rationale.splitlines(keepends=True)
        assert exact_step_truth(question, lines) == (True,) * len(lines)
        for spoiled in range(len(lines)):
            number = question.answer if spoiled == len(lines) - 1 else lines[spoiled].strip().split("=")[1]
            wrong = [*lines]
            wrong[spoiled] = f"{int(number) + 1}".join(wrong[spoiled].rsplit(number, 1))
            assert exact_step_truth(question, wrong) == tuple(index < spoiled for index in range(len(lines)))
