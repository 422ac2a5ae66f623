"""Choices in another order and sentences that do not belong: what is changed, and that nothing else is."""

import pytest
from test_datasets import DATA

from agentark_jax.evaluation.perturbations import (
    arrangements,
    body,
    can_be_rearranged,
    distracted,
    distractors,
    rearranged,
)
from agentark_jax.tasks.config import TaskConfig
from agentark_jax.tasks.grading import grader
from agentark_jax.tasks.items import Item, make_question
from agentark_jax.tasks.task import make_task

CHOICE, NUMERIC = grader("choice"), grader("numeric")


def chosen(*choices: str, answer: str = "B", context: str = ""):
    item = Item("Which is red?\nLook well.", answer, "", choices, context=context)
    return make_question("own", "held_out", item, instruction=CHOICE.instruction)


def told(text: str, name: str = "own", instruction: str = NUMERIC.instruction):
    return make_question(name, "held_out", Item(text, "5", ""), instruction=instruction)


def test_the_right_answer_moves_with_its_choice():
    question = chosen("sky", "blood", "grass")
    moved = rearranged(question, (1, 2, 0))
    assert moved.prompt == f"Which is red?\nLook well.\nA) blood\nB) grass\nC) sky\n{CHOICE.instruction}"
    assert moved.answer == "A"
    assert list(moved.meta["choices"]) == ["blood", "grass", "sky"]
    assert moved.meta["original"] == question.id != moved.id
    assert CHOICE(moved, "The answer is (A).").verdict == "right"
    assert rearranged(question, (0, 1, 2)) is question


def test_what_stands_before_a_question_stays():
    question = chosen("sky", "blood", context="A) sky\nB) blood")
    moved = rearranged(question, (1, 0))
    assert moved.prompt == f"A) sky\nB) blood\n\n{moved.asked}"
    assert moved.asked == f"Which is red?\nLook well.\nA) blood\nB) sky\n{CHOICE.instruction}"


def test_as_many_orders_as_choices_have_each_choice_everywhere_once():
    question = chosen("w", "x", "y", "z")
    orders = arrangements(question, 0, 9)
    assert len(orders) == 4
    for place in range(4):
        assert sorted(order[place] for order in orders) == [0, 1, 2, 3]
    assert orders == arrangements(question, 0, 9)
    assert orders[:2] == arrangements(question, 0, 2)
    assert len({tuple(arrangements(question, seed, 1)[0]) for seed in range(20)}) > 3


@pytest.mark.parametrize("choice", ["None of the above", "both A and C", "Option B", "All above are right"])
def test_choices_that_name_others_stay_where_they_are(choice):
    assert not can_be_rearranged(chosen("sky", "blood", choice))


def test_other_choices_can_be_moved():
    assert can_be_rearranged(chosen("a hat and a dog", "Vitamin C", "blood"))
    assert not can_be_rearranged(told("How many?"))
    counted = Item("Which?", "B", "", meta={"choices": 4})
    assert not can_be_rearranged(make_question("own", "held_out", counted))


def test_a_distractor_stands_before_the_last_sentence():
    question = told("Tom has 4 hats. He buys one. How many hats has he?")
    changed = distracted(question, "Paris is large.")
    assert changed.prompt == (
        f"Tom has 4 hats. He buys one. Paris is large. How many hats has he?\n{NUMERIC.instruction}"
    )
    assert (changed.answer, changed.meta["original"]) == ("5", question.id)
    assert distracted(told("How many?"), "Paris is large.").asked.startswith("Paris is large. How many?\n")
    with_choices = distracted(chosen("sky", "blood"), "Paris is large.")
    assert with_choices.prompt.startswith("Which is red?\nParis is large. Look well.\nA) sky\nB) blood\n")
    assert with_choices.answer == "B"


def test_a_distractor_has_nothing_to_do_with_the_question():
    question = told("Tom has 4 tables. How many tables has he?")
    shares_a_name = told("Near the sea lives Tom. How long?")
    shares_a_word = told("Ann sells tables to men. How long?")
    points_back = told("She sells milk to men. How long?")
    only_asks = told("How long is the way to Rome and to Nice? Say so.")
    one_sentence = told("Ann sells milk to all men.")
    good = told("Ann sells milk to men. How long?")
    bad = [question, shares_a_name, shares_a_word, points_back, only_asks, one_sentence]
    assert question.id not in distractors(bad, 0)
    assert distractors([*bad, good], 0)[question.id] == "Ann sells milk to men."
    several = [question, *(told(f"Ann sells {count} cups to men. How long?") for count in range(30))]
    assert distractors(several, 0) == distractors(several[::-1], 0)
    assert len({distractors(several, seed)[question.id] for seed in range(20)}) > 3


def test_the_words_of_a_question_are_those_before_choices_and_instruction():
    assert body(chosen("sky", "blood")) == "Which is red?\nLook well."
    assert body(told("How many?")) == "How many?"
    assert body(told("How many?", instruction="")) == "How many?"


def test_real_questions_are_rearranged_and_distracted():
    if not (DATA / "mmlu_stem" / "test.jsonl").is_file():
        pytest.skip("the real data in ../shared/data is not there")
    config = TaskConfig(name="mmlu", path=str(DATA), held_out="mmlu_stem")
    task = make_task(config, {"held_out": 300})
    questions = [question for question in task.questions("held_out", 300) if can_be_rearranged(question)]
    assert len(questions) > 200
    for question in questions:
        for order in arrangements(question, 0, 4):
            moved = rearranged(question, order)
            letter = "ABCD".index(moved.answer)
            assert moved.meta["choices"][letter] == question.meta["choices"]["ABCD".index(question.answer)]
            assert sorted(moved.prompt.split()) == sorted(question.prompt.split())
            assert task.grade(moved, f"The answer is ({moved.answer}).").verdict == "right"


def test_most_real_questions_find_a_distractor():
    if not (DATA / "gsm8k" / "test.jsonl").is_file():
        pytest.skip("the real data in ../shared/data is not there")
    task = make_task(TaskConfig(name="gsm8k", path=str(DATA)), {"held_out": 200})
    questions = task.questions("held_out", 200)
    found = distractors(questions, 0)
    assert len(found) > 180
    for question in questions:
        if question.id in found:
            sentence = found[question.id]
            changed = distracted(question, sentence)
            assert changed.prompt.replace(f"{sentence} ", "", 1) == question.prompt
