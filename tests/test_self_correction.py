"""Figures of self-correction on answers written down by hand, and what a model is asked about its answers."""

import asyncio
from functools import cache

import numpy as np
import pytest
from chat_families import FAMILIES, write_family
from scripted import ScriptedEngine
from statsmodels.stats.proportion import proportion_confint

from agentark_jax.data.chat import make_format
from agentark_jax.data.config import PromptConfig
from agentark_jax.evaluation.self_correction import blind_spot, recovery, transitions, verification, verifies
from agentark_jax.protocols.calls import GREEDY, Caller
from agentark_jax.protocols.checking import (
    CHECKS,
    CONDITIONS,
    Inquiry,
    begun,
    checked,
    continued,
    inquire,
    locate,
    located,
)
from agentark_jax.protocols.table import Agent, Pool
from agentark_jax.records import Question
from agentark_jax.traces.store import TraceStore

QUESTION = Question.make("task", "held_out", "How many?", "7")


def right(marks: str) -> np.ndarray:
    return np.asarray([mark == "R" for mark in marks], bool)


def test_transitions_of_ten_answers():
    # Four wrong ones, of which one is corrected; six right ones, of which two are given up.
    before, after = right("WWWWRRRRRR"), right("RWWWRRRRWW")
    found = transitions(before, after, np.arange(10))
    assert found["accuracy_1"]["share"] == 0.6
    assert found["accuracy_2"]["share"] == 0.5
    assert found["difference"]["difference"] == pytest.approx(-0.1)
    assert (found["corrected"]["share"], found["corrected"]["n"]) == (0.25, 4)
    assert (found["given_up"]["share"], found["given_up"]["n"]) == (pytest.approx(1 / 3), 6)
    assert (found["wrong_to_right"]["share"], found["right_to_wrong"]["share"]) == (0.1, 0.2)
    gained = found["wrong_to_right"]["share"] - found["right_to_wrong"]["share"]
    assert found["difference"]["difference"] == pytest.approx(gained)
    low, high = proportion_confint(2, 6, method="wilson")
    assert (found["given_up"]["low"], found["given_up"]["high"]) == (pytest.approx(low), pytest.approx(high))


def test_a_rate_of_nothing_is_none_and_no_number():
    found = transitions(right("RRR"), right("RRW"), np.arange(3))
    assert found["corrected"] == {"share": None, "low": None, "high": None, "n": 0}
    nothing = transitions(right(""), right(""), np.arange(0))
    assert nothing["difference"] is None
    assert nothing["accuracy_1"]["n"] == 0


def test_the_blind_spot_is_what_is_corrected_for_others_alone():
    # Of eight errors two are corrected as one's own, six as the user's: 1 − 2/6.
    own, others = right("RRWWWWWW"), right("RRRRRRWW")
    found = blind_spot(own, others, np.arange(8))
    assert found["rate"] == pytest.approx(2 / 3)
    assert found["low"] < found["rate"] < found["high"] <= 1
    assert (found["own"]["share"], found["others"]["share"], found["n"]) == (0.25, 0.75, 8)
    assert found["difference"]["difference"] == pytest.approx(-0.5)
    turned = blind_spot(others, own, np.arange(8))
    assert turned["rate"] == pytest.approx(-2)
    never = blind_spot(right("RW"), right("WW"), np.arange(2))
    assert (never["rate"], never["low"], never["n"]) == (None, None, 2)
    assert blind_spot(right(""), right(""), np.arange(0))["rate"] is None


def test_recovery_by_the_step_that_is_wrong():
    # Question 0 has errors in steps 0 and 1, questions 1 and 2 in step 0.
    planted, clean = right("RWWR"), right("RRWR")
    steps, questions = np.asarray([0, 1, 0, 0]), np.asarray([0, 0, 1, 2])
    found = recovery(planted, clean, steps, questions)
    assert (found["planted"]["share"], found["clean"]["share"]) == (0.5, 0.75)
    assert (found["difference"]["difference"], found["difference"]["clusters"]) == (-0.25, 3)
    first, second = found["by_step"]
    assert (first["step"], first["planted"]["n"], first["planted"]["share"]) == (1, 3, pytest.approx(2 / 3))
    assert (second["step"], second["planted"]["share"], second["clean"]["share"]) == (2, 0.0, 1.0)


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        ("Let me re-read the question.", True),
        ("Wait, that is wrong.", True),
        ("Double-check: 3+4=7.", True),
        ("We verify that 14 is even.", True),
        ("They wait for the bus at 7.", False),
        ("The unchecked box counts 3.", False),
        ("3+4=7", False),
        ("Let us recalculate.", True),
        ("Let me redo the sum.", True),
        ("Let's see if 14 is even.", True),
        ("Let us rewrite the equation as x = 4.", False),
        ("Let me represent the apples by a.", False),
        ("Let's read the table.", False),
    ],
)
def test_a_step_verifies_by_its_words(step, expected):
    assert verifies(step) is expected


def test_verification_counts_steps_answers_and_tokens():
    texts = ["3+4=7\nWait, let me check.\nThe answer is 7.", "3+4=7\nThe answer is 7."]
    found = verification(texts, [12, 8], [True, False])
    assert (found["steps"]["share"], found["steps"]["n"]) == (0.2, 5)
    assert (found["answers"]["share"], found["answers"]["n"]) == (0.5, 2)
    assert found["per_100_tokens"]["mean"] == pytest.approx(5.0)  # one step in 20 tokens
    assert (found["accuracy_with"]["share"], found["accuracy_without"]["share"]) == (1.0, 0.0)


# What is asked


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    root = tmp_path_factory.mktemp("families")
    return cache(lambda name: make_format(write_family(name, root / name), PromptConfig()))


def flat(prompt) -> list[int]:
    return [token for segment in prompt for token in segment]


def test_the_plain_format_shows_the_answer_and_then_the_check(form):
    said = form.response("3+4=8\nThe answer is 8.")
    for condition, words in CHECKS.items():
        shown = form.tokenizer.decode(flat(checked(form, QUESTION, said, condition)))
        assert shown.startswith("Question: How many?\nMy answer:\n3+4=8\nThe answer is 8.\n" + words)
        assert shown.endswith("\nBetter answer:")
    waits = form.tokenizer.decode(flat(checked(form, QUESTION, said, "wait")))
    assert waits == "Question: How many?\nAnswer:\n3+4=8\nThe answer is 8. Wait"


@pytest.mark.parametrize("name", FAMILIES)
def test_chat_models_see_the_same_error_as_their_own_or_as_the_users(name, family):
    form = family(name)
    said = (*form.tokenizer.encode("The answer is 8."), form.stop_ids[0])
    own = flat(checked(form, QUESTION, said, "neutral"))
    users = flat(checked(form, QUESTION, said, "users"))
    end = form.stop_ids[0]
    shown = form.tokenizer.encode("The answer is 8.")
    for ids in (own, users):
        text = form.tokenizer.decode(ids)
        assert text.count("The answer is 8.") == 1
        assert text.count(CHECKS["neutral"]) == 1
        places = [place for place in range(len(ids)) if tuple(ids[place : place + len(shown)]) == tuple(shown)]
        assert len(places) == 1
    # As the model's own, the answer ends a message; as the user's, the user goes on.
    assert own[_end(own, shown)] == end
    assert users[_end(users, shown)] != end
    assert end not in flat(checked(form, QUESTION, said, "wait"))[-len(shown) - 3 :]


def _end(ids: list[int], shown) -> int:
    return next(p for p in range(len(ids)) if tuple(ids[p : p + len(shown)]) == tuple(shown)) + len(shown)


def test_a_begun_answer_stands_where_the_models_own_would(form):
    prompt = continued(form, QUESTION, begun(form, "3+4=8\n"))
    assert form.tokenizer.decode(flat(prompt)) == "Question: How many?\nAnswer:\n3+4=8\n"


def test_the_wrong_step_is_asked_for_by_number(form):
    prompt, regex = locate(form, QUESTION, ["3+4=7\n", "7*2=15\n", "The answer is 15."])
    shown = form.tokenizer.decode(flat(prompt))
    assert "Step 1: 3+4=7\nStep 2: 7*2=15\nStep 3: The answer is 15." in shown
    assert regex == r"\s?(none|1|2|3)"
    assert [located(text) for text in (" 2", "none", "", "two")] == [1, None, -1, -1]


def test_every_condition_is_one_call_that_is_never_paid_for_twice(form, tmp_path):
    engine = ScriptedEngine(form, lambda prompt, sampling: "The answer is 7." if sampling.regex is None else "2")
    said = form.response("The answer is 8.")
    asked = [Inquiry(checked(form, QUESTION, said, condition), condition) for condition in CONDITIONS]
    prompt, regex = locate(form, QUESTION, ["3+4=8\n", "The answer is 8."])
    asked.append(Inquiry(prompt, "locate", regex=regex))
    with TraceStore(tmp_path / "traces.sqlite") as store:
        store.put_questions([QUESTION])
        pool = Pool((Agent(Caller(engine, store, form, seed=0)),))
        first = asyncio.run(inquire(QUESTION, pool, asked, GREEDY, protocol="self_correction"))
        second = asyncio.run(inquire(QUESTION, pool, asked, GREEDY, protocol="self_correction"))
    assert [turn.key for turn in first] == [turn.key for turn in second]
    assert len(engine.prompts) == len({turn.key for turn in first}) == len(CONDITIONS) + 1
    assert [turn.call.role for turn in first] == [*CONDITIONS, "locate"]
    assert [turn.completion.text for turn in first][-1] == "2"
    assert [turn.call.sampling.regex for turn in first][-2:] == [None, regex]
