"""How well steps are judged: ProcessBench's F1, calibration, labels against the truth."""

import numpy as np
import pytest
from scipy import stats

from agentark_jax.evaluation.statistics import MeanInterval, wilson_interval
from agentark_jax.evaluation.steps import calibration, f1_difference, first_error, first_errors, label_quality
from agentark_jax.tasks.config import TaskConfig
from agentark_jax.tasks.grading import grader
from agentark_jax.tasks.word_problems import WordProblems, exact_step_truth
from agentark_jax.traces.labels import LabelledTurn
from agentark_jax.traces.step_labels import StepLabels, by_consensus, by_debate, step_texts
from agentark_jax.traces.store import Said


def test_f1_is_the_harmonic_mean_of_wrong_solutions_located_and_right_ones_cleared():
    #       located, other step, missed | cleared, accused, cleared, cleared, cleared
    told = [1, 0, None, None, 2, None, None, None]
    true = [1, 2, 0, None, None, None, None, None]
    found = first_errors(told, true)
    assert found.located == MeanInterval(1 / 3, *wilson_interval(np.array([1, 0, 0])), n=3)
    assert found.cleared == MeanInterval(0.8, *wilson_interval(np.array([1, 1, 1, 1, 0])), n=5)
    assert found.f1 == pytest.approx(2 * (1 / 3) * 0.8 / (1 / 3 + 0.8))


def test_first_step_errors_are_errors():
    found = first_errors([0, None], [None, 0])
    assert (found.located.mean, found.cleared.mean, found.f1) == (0, 0, 0)


def test_without_wrong_or_without_right_solutions_there_is_no_f1():
    wrong, right = first_errors([1, 0], [1, 1]), first_errors([None], [None])
    assert (wrong.located.mean, wrong.cleared, wrong.f1) == (0.5, None, None)
    assert (right.located, right.cleared.mean, right.f1) == (None, 1, None)
    assert first_errors([], []).f1 is None
    with pytest.raises(ValueError, match="shorter"):
        first_errors([1, 2], [1])


def solutions(random, count=120):
    """Per question two solutions of like difficulty: what is true of each, and what a better and a worse judge tell."""
    true, better, worse = [], [], []
    for _ in range(count):
        hard = random.normal()
        for _ in range(2):
            error = int(random.integers(0, 4)) if random.random() < 0.5 else None
            true.append(error)
            for told, skill in ((better, 0.8), (worse, 0.0)):
                told.append(error if hard + random.normal() < skill else 4)
    return true, better, worse, [f"q{index // 2}" for index in range(2 * count)]


def test_the_f1_has_an_interval_and_so_has_a_difference_of_two():
    true, better, worse, questions = solutions(np.random.default_rng(0))
    one, other = (first_errors(told, true, questions) for told in (better, worse))
    for found in (one, other):
        assert found.f1_interval[0] < found.f1 < found.f1_interval[1]
    found = f1_difference(better, worse, true, questions)
    assert found.difference == pytest.approx(one.f1 - other.f1)
    assert 0 < found.low < found.difference < found.high
    # What both find hard moves both: the difference is surer than two F1s by themselves.
    assert found.high - found.low < 0.9 * sum(high - low for low, high in (one.f1_interval, other.f1_interval))
    swapped = f1_difference(worse, better, true, questions)
    assert (swapped.low, swapped.high) == (pytest.approx(-found.high), pytest.approx(-found.low))
    narrow = first_errors(better, true, questions, level=0.5).f1_interval
    assert one.f1_interval[0] < narrow[0] < narrow[1] < one.f1_interval[1]
    same = f1_difference(better, better, true, questions)
    assert (same.difference, same.low, same.high) == (0, None, None)


def test_an_f1_of_too_little_has_no_interval():
    # Of one solution with an error, a third of all resamples have none.
    found = first_errors([1, *[None] * 20, 2], [1, *[None] * 21])
    assert found.f1 == pytest.approx(2 * (20 / 21) / (1 + 20 / 21))
    assert found.f1_interval is None
    assert first_errors([1, None], [1, None]).f1_interval is None
    assert f1_difference([1, 0], [None, 1], [1, 1]) is None
    with pytest.raises(ValueError, match="longer"):
        f1_difference([1, 2], [1], [1, 2])


@pytest.mark.slow
def test_intervals_of_f1s_and_their_differences_cover():
    random = np.random.default_rng(1)
    true, better, worse, _ = solutions(random, 200_000)
    one, other = (_means(told, true) for told in (better, worse))
    hits = []
    for _ in range(1_000):
        true, better, worse, questions = solutions(random, 80)
        low, high = first_errors(better, true, questions).f1_interval
        found = f1_difference(better, worse, true, questions)
        hits.append((low <= one <= high, found.low <= one - other <= found.high))
    for count in np.sum(hits, axis=0):
        interval = stats.binomtest(int(count), len(hits)).proportion_ci(0.99)
        assert interval.low <= 0.95 <= interval.high


def _means(told, true):
    """The F1 without an interval, of so many that it is the truth."""
    same = np.asarray([a == b for a, b in zip(told, true, strict=True)])
    wrong = np.asarray([each is not None for each in true])
    return stats.hmean([same[wrong].mean(), same[~wrong].mean()])


def test_solutions_to_one_question_count_for_less():
    told, true = [0, 0, 0, 0, 1, 1, 1, 1] * 4, [0] * 32
    alone = first_errors(told, true).located
    together = first_errors(told, true, [f"q{row // 4}" for row in range(32)]).located
    assert alone.mean == together.mean == 0.5
    assert together.high - together.low > 1.5 * (alone.high - alone.low)


def test_the_first_error_is_the_first_step_below_the_threshold():
    assert first_error([0.9, 0.5, 0.4, 0.1]) == 2
    assert first_error([0.9, 0.5, 0.4, 0.1], 0.6) == 1
    assert first_error([0.5]) is None
    assert first_error([]) is None


def test_calibration_by_hand():
    # Bins of a tenth: [.05, .05] of which one happened; [.2] did not; [1, .95] did.
    found = calibration(np.array([0.05, 0.05, 0.2, 1.0, 0.95]), np.array([1, 0, 0, 1, 1]))
    assert found.n == 5
    assert found.brier == pytest.approx((0.95**2 + 0.05**2 + 0.2**2 + 0 + 0.05**2) / 5)
    assert found.expected_error == pytest.approx((2 * abs(0.05 - 0.5) + 0.2 + 2 * abs(0.975 - 1)) / 5)
    assert calibration(np.array([0.05, 0.95]), np.array([1, 0]), bins=1).expected_error == pytest.approx(0)


def test_honest_probabilities_are_calibrated_and_boastful_ones_are_not():
    rng = np.random.default_rng(0)
    p = rng.random(20_000)
    happened = rng.random(20_000) < p
    assert calibration(p, happened).expected_error < 0.015
    assert calibration(np.sqrt(p), happened).expected_error > 0.1
    assert calibration(p, happened).brier < calibration(np.sqrt(p), happened).brier


@pytest.mark.parametrize(("p", "y"), [([], []), ([0.5], [1, 0]), ([1.2], [1]), ([float("nan")], [1])])
def test_calibration_of_nothing_is_refused(p, y):
    with pytest.raises(ValueError, match="probabilities and outcomes"):
        calibration(np.array(p), np.array(y))


def test_quality_of_labels_against_the_truth():
    truth = {"a": (True, False, False), "b": (True, True), "c": (False,), "d": (True, False)}
    labels = [
        StepLabels("a", "s", (0.9, 0.6, 0.2), 5),
        StepLabels("b", "s", (1.0, 0.0), 7),
        StepLabels("c", "s", (0.0,), 1),
        StepLabels("unknown", "s", (0.0,), 100),
    ]
    found = label_quality(labels, truth, {"a": "q", "b": "q", "c": "r", "d": "s"})
    # Called wrong: a's third, b's second, c's first. Wrong: a's second and third, c's first.
    assert (found.precision.mean, found.precision.n) == (pytest.approx(2 / 3), 3)
    assert (found.recall.mean, found.recall.n) == (pytest.approx(2 / 3), 3)
    assert found.precision.low < 2 / 3 < found.precision.high
    assert (found.first_errors.located.mean, found.first_errors.cleared.mean) == (0.5, 0.0)
    assert (found.labelled, found.turns, found.tokens) == (3, 4, 13)
    lenient = label_quality(labels, truth, {"a": "q", "b": "q", "c": "r", "d": "s"}, threshold=0.7)
    assert lenient.recall.mean == 1
    nothing = label_quality([], truth, {})
    assert (nothing.precision, nothing.recall, nothing.first_errors.f1, nothing.labelled) == (None, None, None, 0)
    with pytest.raises(ValueError, match="turn b has 2 steps but 1 labels"):
        label_quality([StepLabels("b", "s", (1.0,))], truth, {"b": "q"})


def test_what_the_debate_locates_is_nearer_to_the_truth_than_its_consensus(form):
    rows, said, questions = [], {}, {}
    asked = {question.id: question for question in WordProblems(TaskConfig(steps=(3,))).questions("debate", 20)}
    for question in asked.values():
        right = question.rationale
        lines = right.splitlines(keepends=True)
        wrong = "".join([*lines[:2], lines[2].replace("=", "=9"), f"The answer is 9{question.answer}."])
        # Two agents are right at once, the third one after it was shown them.
        for round, agent, text in [(r, a, wrong if (r, a) == (0, 2) else right) for r in range(2) for a in range(3)]:
            key, ids = f"{question.id}.{round}.{agent}", np.asarray(form.response(text), np.int32)
            grade = grader("final_answer")(question, text)
            place = (question.id, "debate", "debater", agent, round, 0)
            rows.append(LabelledTurn(key, *place, grade.verdict, grade.answer, "stop", len(ids)))
            said[key], questions[key] = Said(ids, None, ()), question.id
    texts = step_texts(said, form.tokenizer)
    truth = {key: exact_step_truth(asked[questions[key]], steps) for key, steps in texts.items()}
    sources = by_consensus(rows, texts), by_debate(rows, texts, {key: turn.parents for key, turn in said.items()})
    consensus, debate = (label_quality(labels, truth, questions) for labels in sources)
    assert (consensus.precision.mean, consensus.recall.mean) == (0.5, 1)
    assert (consensus.first_errors.located.mean, consensus.first_errors.cleared.mean) == (0, 1)
    assert (debate.precision.mean, debate.recall.mean, debate.first_errors.f1) == (1, 1, 1)
    assert debate.precision.n == 40
    assert debate.labelled == debate.turns == 120
