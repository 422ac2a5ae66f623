"""Contamination: what is found, what is not, and that a run refuses it."""

import gzip
import json
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentark_jax.records import Question
from agentark_jax.tasks.grading import grader
from agentark_jax.tasks.overlap import WORDS, overlaps

DATA = Path(__file__).parents[1] / ".." / "shared" / "data"
LONG = "Mia buys nine red apples at the market on Monday and gives half of them to her two brothers. How many are left?"


def ask(*prompts: str) -> list[Question]:
    return [Question.make("t", "s", prompt, "1") for prompt in prompts]


def found(learned: str, measured: str) -> list[tuple[str, float]]:
    return [(each.kind, each.share) for each in overlaps(ask(learned), ask(measured))]


def test_the_same_question_in_other_clothes():
    assert found(LONG, LONG) == [("exact", 1.0)]
    assert found(LONG.upper() + "\n", "  " + LONG.replace(" ", "  ")) == [("normalised", 1.0)]
    assert found("What is ２ + 2?", "what is 2+2") == [("normalised", 1.0)]
    assert found("What is 2 + 2?", "What is 2 + 3?") == []


def test_a_question_within_a_longer_one_or_slightly_changed():
    wrapped = f"Solve this problem, please, and show your work. {LONG} Think first, then say what you think."
    assert found(wrapped, LONG) == [("words", 1.0)]
    assert found(LONG, wrapped) == []  # less than half of the longer one
    ((kind, share),) = found(LONG.replace("left", "still there"), LONG)
    assert kind == "words"
    assert 0.5 < share < 1
    assert found(LONG.replace("apples", "pears").replace("two", "three"), LONG) == []


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10**6))
def test_shares_are_those_of_brute_force(seed):
    rng = random.Random(seed)
    texts = [" ".join(rng.choice("ab") for _ in range(rng.randint(1, WORDS + 8))) for _ in range(8)]
    learned, measured = ask(*dict.fromkeys(texts[:4])), ask(*dict.fromkeys(texts[4:]))

    def runs(text):
        return {text[start : start + 2 * WORDS - 1] for start in range(0, len(text) - 2 * WORDS + 2, 2)}

    expected = []
    for one in learned:
        for other in measured:
            theirs = runs(other.prompt)
            share = 1.0 if one.prompt == other.prompt else len(runs(one.prompt) & theirs) / max(len(theirs), 1)
            if share >= 0.5:
                expected.append((one.id, other.id, share))
    assert [(each.learned.id, each.measured.id, each.share) for each in overlaps(learned, measured)] == expected


def test_how_an_answer_is_to_end_is_no_part_of_a_question():
    learned = Question.make("t", "debate", f"{LONG.upper()}\n{grader('numeric').instruction}", "1")
    short = Question.make("t", "debate", f"What is 2 + 2?\n{grader('choice').instruction}", "1")
    measured = [
        Question.make("u", "held_out", f"{text}\n{grader('symbolic').instruction}", "1")
        for text in (LONG.replace(",", ";"), "What is 2+2?", "What is 2+3?")
    ]
    pairs = [(each.learned, each.measured, each.kind) for each in overlaps([learned, short], measured)]
    assert pairs == [(learned, measured[0], "normalised"), (short, measured[1], "normalised")]


def load(name: str, key: str) -> list[Question]:
    path = DATA / name
    if not path.is_file():
        pytest.skip(f"{name} is not here")
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as lines:
        return ask(*(json.loads(line)[key] for line in lines))


def test_math500_leaks_from_maths_test_set_and_gsm8k_is_nearly_clean():
    measured = load("math500/test.jsonl", "problem")
    assert {each.measured.id for each in overlaps(load("math/test.jsonl.gz", "problem"), measured)} == {
        question.id for question in measured
    }
    gsm8k = list(overlaps(load("gsm8k/train.jsonl.gz", "question"), load("gsm8k/test.jsonl", "question")))
    assert [each.kind for each in gsm8k] == ["words"] * 2
