"""Checks of the evaluation itself: arms that differ by chance (A/A) and planted effects come out as they were made."""

from types import SimpleNamespace

import numpy as np
import pytest
from rich.text import Text

from agentark_jax.config import QuestionCounts, RunConfig
from agentark_jax.errors import UsageError
from agentark_jax.evaluation.checks import NOBODY, check_all, plant
from agentark_jax.evaluation.config import EvaluationConfig
from agentark_jax.evaluation.predictions import Prediction, predict
from agentark_jax.evaluation.summary import difference
from agentark_jax.records import Call, Completion, Label, Question, Sampling, Turn
from agentark_jax.report.terminal import _check
from agentark_jax.tasks.grading import grader
from agentark_jax.traces.labels import grade_turns

RULE = grader("final_answer")


def prediction(question: str, right: bool) -> Prediction:
    return Prediction(question, "1", "right" if right else "wrong", 1.0, 1, 1, (question,))


def arm(right: np.ndarray) -> list[Prediction]:
    return [prediction(f"q{index}", bool(each)) for index, each in enumerate(right)]


def replaced(right: np.ndarray, count: int, random: np.random.Generator) -> np.ndarray:
    """As many wrong answers made right."""
    made = right.copy()
    made[random.choice(np.flatnonzero(~right), count, replace=False)] = True
    return made


@pytest.mark.parametrize("seeds", [1, 3])
def test_over_many_runs_chance_is_called_an_effect_as_rarely_as_stated_and_a_planted_effect_is_covered(seeds):
    """Questions differ in difficulty, arms answer independently. 200 repeats: 5 % is 10, give or take 3.1 each."""
    random, questions, share, repeats = np.random.default_rng(seeds), 200, 0.1, 200
    alarms = covered = exact = 0
    for _ in range(repeats):
        difficulty = random.beta(2, 2, questions)
        runs = []
        for _ in range(seeds):
            student, twin, other = (random.random(questions) < difficulty for _ in range(3))
            planted = replaced(twin, round(share * questions), random)
            runs.append({"student": arm(student), "twin": arm(twin), "planted": arm(planted), "other": arm(other)})
        aa, told = check_all(runs, "student", share, level=0.95)
        alarms += not aa["passed"]
        exact += told["passed"]
        # The planted arm beside one that is no twin of it: the amount, and chance on top of it.
        found, _ = difference(runs, "planted", "other", level=0.95)
        covered += found.low <= share <= found.high
    assert exact == repeats
    assert 1 <= alarms <= 20
    assert 180 <= covered <= 199


def sentences(seed: dict[str, list[Prediction]], share: float) -> list[tuple[bool, str]]:
    return [(check["passed"], check["sentence"]) for check in check_all([seed], "student", share, level=0.95)]


def test_an_effect_that_nobody_planted_and_one_that_is_not_found_are_called_wrong():
    none, half = np.zeros(40, bool), np.arange(40) < 20
    aa, planted = sentences({"student": arm(none), "twin": arm(half), "planted": arm(half)}, 0.1)
    assert not aa[0]
    assert "+50.0 points" in aa[1]
    assert "WRONG: an effect where there is none, which chance alone shows once in 20 times" in aa[1]
    assert not planted[0]
    assert "planted +10.0 points" in planted[1]
    assert "WRONG: the interval does not hold it" in planted[1]
    assert not sentences({"twin": arm(none), "student": arm(none), "planted": arm(half)}, 0.1)[1][0], "far too much"
    right = arm(np.arange(40) < 4)
    (passed, told), (found, amount) = sentences({"student": arm(none), "twin": arm(none), "planted": right}, 0.1)
    assert passed
    assert found
    assert "no effect shown, as must be" in told
    assert "twin over student: 0.0 points" in told
    assert amount.endswith("n = 40: found, as must be")


def test_a_run_without_such_arms_has_no_checks():
    assert check_all([{"student": arm(np.ones(3, bool))}], "student", 0.1, level=0.95) == []


def test_what_came_out_wrong_is_red():
    shown = [_check({"sentence": "x", "passed": passed}) for passed in (True, False)]
    assert [isinstance(each, Text) and "red" in str(each.style) for each in shown] == [False, True]


def turn(question: Question, text: str) -> Turn:
    sampling = Sampling(0.0, 8, (0,), 1)
    call = Call(question.id, "single_greedy", 0, "solver", 0, 0, (), "m", "w", "t", "f", sampling, ((1, 2),))
    return Turn(call, 0, Completion(np.asarray([5, 0], np.int32), np.zeros(2, np.float32), text, "stop", 2, 0, 0.1))


@pytest.fixture
def twin():
    """Ten questions, six answers wrong: the turns, their predictions, the questions, and how labels are made."""
    questions = {q.id: q for q in (Question.make("t", "held_out", f"{n}?", str(n), "") for n in range(10))}
    turns = {q.id: turn(q, f"The answer is {q.answer if int(q.answer) < 4 else '77'}.") for q in questions.values()}

    def labels(said: dict[str, Turn]) -> dict[str, Label]:
        return {each.key: each for each in grade_turns(said.values(), questions, RULE, RULE.id)}

    predictions = [predict([each], [each], labels(turns)) for each in turns.values()]
    assert sum(each.verdict == "wrong" for each in predictions) == 6
    return turns, predictions, questions, labels


def planted_of(twin, share: float, seed: int = 0, reads=lambda question, text: RULE(question, text).verdict == "right"):
    turns, predictions, questions, _ = twin
    form = SimpleNamespace(response=lambda text: (len(text), 0))
    return plant(turns, predictions, questions, share=share, seed=seed, form=form, reads=reads)


def test_exactly_so_many_wrong_answers_become_right_ones_that_the_grader_reads(twin):
    turns, predictions, _, labels = twin
    made = planted_of(twin, 0.3)
    changed = {question for question, each in made.items() if each is not turns[question]}
    before = {each.question_id: each.verdict for each in predictions}
    after = {question: predict([each], [each], labels(made)).verdict for question, each in made.items()}
    assert len(changed) == 3
    assert {before[question] for question in changed} == {"wrong"}
    assert {after[question] for question in changed} == {"right"}
    assert all(after[question] == before[question] for question in made.keys() - changed)
    for question in changed:
        call = made[question].call
        assert (call.protocol, call.model, call.parents) == ("planted", NOBODY, (turns[question].key,))
        assert made[question].completion.logprobs is None
    assert {planted_of(twin, 0.3)[q].key for q in made} == {each.key for each in made.values()}
    drawn = {
        frozenset(q for q, each in planted_of(twin, 0.3, seed).items() if each is not turns[q]) for seed in range(9)
    }
    assert len(drawn) > 1, "the seed draws"


def test_more_than_there_are_wrong_ones_or_readable_ones_is_refused(twin):
    assert sum(each is not twin[0][q] for q, each in planted_of(twin, 0.6).items()) == 6
    with pytest.raises(UsageError, match=r"evaluate\.planted is 0\.7: that makes 7 of 10 answers right.*only 6 wrong"):
        planted_of(twin, 0.7)
    with pytest.raises(UsageError, match="only 0 wrong ones"):
        planted_of(twin, 0.1, reads=lambda question, text: False)


def test_what_could_not_be_found_is_refused_before_a_run():
    arms, small = ["twin", "planted"], QuestionCounts(held_out=40)
    with pytest.raises(UsageError, match=r"makes 2 of 40 answers right, and fewer than 4 cannot be found"):
        RunConfig(arms=arms, questions=small)
    RunConfig(arms=arms, questions=small, seeds=[0, 1])
    RunConfig(arms=arms, questions=small, evaluate=EvaluationConfig(planted=0.1))
    RunConfig(arms=["twin"], questions=small)
    with pytest.raises(UsageError, match=r"evaluate\.planted is 1"):
        EvaluationConfig(planted=1.0)
