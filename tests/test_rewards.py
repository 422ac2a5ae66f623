"""What rollouts earn, by name; and what is said of functions of the user's own that do not do what they must."""

import math
import sys
import textwrap
from typing import get_args

import numpy as np
import pytest

from agentark_jax.errors import AgentArkError, UsageError
from agentark_jax.objectives.advantages import minimum_form
from agentark_jax.records import Grade, Question
from agentark_jax.training.reward_config import Aggregate, RewardConfig
from agentark_jax.training.rewards import Rollout, reward_function, rewards

QUESTION = Question("q7", "sums", "debate", "3 + 4?", "7")
MAX_TOKENS = 20


def rollout(verdict="right", finish="stop", text="So. It is 7.", tokens=9, scores=(0.9, 0.4, 0.8), ends=(3, 5, 9)):
    """Of three steps by default."""
    steps = [f"step {index}" for index in range(len(ends))]
    scored = None if scores is None else np.float32(scores)
    ids = np.arange(tokens, dtype=np.int32)
    return Rollout(QUESTION, ids, text, finish, Grade(verdict), np.asarray(ends), steps, scored)


RIGHT, WRONG = rollout(), rollout("wrong", scores=(0.2, 0.7, 0.1))
UNPARSEABLE = rollout("unparseable", scores=(0.6, 0.5, 0.3))
CUT_OFF = rollout("right", "length")
EMPTY = rollout("unparseable", text=" \n", tokens=1, scores=(), ends=())
# A reader that finds an answer in nothing must not make it one.
EMPTY_AND_RIGHT = rollout("right", text="", tokens=1, scores=(0.9,), ends=(1,))
ALL = [RIGHT, WRONG, UNPARSEABLE, CUT_OFF, EMPTY, EMPTY_AND_RIGHT]


def earned(name, rollouts=ALL, **settings):
    return rewards(rollouts, RewardConfig({name: 1.0}, **settings), MAX_TOKENS)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("verifiable", [1, 0, 0, 0, 0, 0]),
        ("format", [1, 1, 0, 0, 0, 0]),
    ],
)
def test_an_answer_must_be_whole_and_readable(name, expected):
    table = earned(name)
    np.testing.assert_array_equal(table.by_name[name], expected)
    np.testing.assert_array_equal(table.scalar, np.float32(expected))
    assert [tokens.tolist() for tokens in table.tokens] == [[0] * len(each.ids) for each in ALL]


@pytest.mark.parametrize(
    ("aggregate", "expected"),
    [
        ("min", [0.4, 0.1, 0.3]),
        ("mean", [0.7, 1 / 3, 1.4 / 3]),
        ("last", [0.8, 0.1, 0.3]),
        ("product", [0.9 * 0.4 * 0.8, 0.2 * 0.7 * 0.1, 0.6 * 0.5 * 0.3]),
    ],
)
def test_a_process_is_worth_one_number(aggregate, expected):
    table = earned("process", aggregate=aggregate)
    np.testing.assert_allclose(table.by_name["process"], [*expected, 0, 0, 0], rtol=1e-6)
    np.testing.assert_allclose(table.scalar, [*expected, 0, 0, 0], rtol=1e-6)
    assert not any(np.any(tokens) for tokens in table.tokens)
    assert table.metrics["process"] == pytest.approx(sum(expected) / 6)


def test_a_process_is_paid_at_the_ends_of_its_steps():
    table = earned("process", aggregate="steps")
    np.testing.assert_allclose(table.tokens[0], [0, 0, 0.9, 0, 0.4, 0, 0, 0, 0.8])
    np.testing.assert_allclose(table.by_name["process"], [2.1, 1.0, 1.4, 0, 0, 0], rtol=1e-6)
    assert not table.scalar.any()
    assert table.metrics["process"] == pytest.approx((0.7 + 1 / 3 + 1.4 / 3) / 6)  # more steps do not look better


def test_the_minimum_form_is_that_of_pure():
    """There scores are 2·p - 1 and the temperature is 0.1; the weights are the same."""
    table = earned("process", aggregate="minimum_form")
    scores = np.float32([[0.9, 0.4, 0.8]])
    signed = 2 * scores - 1
    weights = np.asarray(minimum_form(signed, np.ones((1, 3), bool), 0.1)) / signed
    np.testing.assert_allclose(table.tokens[0][[2, 4, 8]], (weights * scores)[0], rtol=1e-5)
    assert np.count_nonzero(table.tokens[0]) == 3
    assert table.by_name["process"][0] == pytest.approx(0.4, abs=0.01)
    assert [tokens.any() for tokens in table.tokens] == [True] * 3 + [False] * 3


def test_nothing_pays_less_than_saying_nothing():
    for aggregate in get_args(Aggregate):
        config = RewardConfig({"verifiable": 1.0, "process": 1.0, "format": 1.0}, aggregate)
        table = rewards(ALL, config, MAX_TOKENS)
        for earned_by_each in table.by_name.values():
            assert earned_by_each[4] == earned_by_each.min() == 0


def test_length_is_the_soft_overlong_punishment():
    rollouts = [rollout(tokens=tokens, finish=finish, scores=None, ends=()) for tokens, finish in
                ((10, "stop"), (16, "stop"), (18, "stop"), (20, "stop"), (20, "length"))]  # fmt: skip
    table = earned("length", rollouts, overlong_buffer=4)
    np.testing.assert_allclose(table.scalar, [0, 0, -0.5, -1, -1])
    assert "process" not in table.metrics
    with pytest.raises(UsageError, match=r"overlong_buffer: 21 is not possible; .* max_tokens \(20\)"):
        earned("length", rollouts, overlong_buffer=21)


def test_sums_are_weighted_and_each_reward_is_kept():
    config = RewardConfig({"verifiable": 2.0, "process": 0.5, "format": 0.0}, aggregate="steps")
    table = rewards([RIGHT, WRONG], config, MAX_TOKENS)
    np.testing.assert_allclose(table.scalar, [2, 0])
    np.testing.assert_allclose(table.tokens[1], 0.5 * np.float32([0, 0, 0.2, 0, 0.7, 0, 0, 0, 0.1]))
    assert table.scalar.dtype == table.tokens[0].dtype == np.float32
    expected = {
        "reward": (2 + 1.05 + 0.5) / 2,
        "reward/verifiable": 0.5,
        "reward/process": 1.55,
        "reward/format": 1.0,
        "reward_share/verifiable": 2 / 3.55,
        "reward_share/process": 1.55 / 3.55,
        "reward_share/format": 0.0,
    }
    for name, value in expected.items():
        assert table.metrics[name] == pytest.approx(value), name


def test_what_is_no_whole_answer_is_counted_once():
    metrics = earned("verifiable").metrics
    assert metrics["rollouts"] == 6
    assert [metrics[name] for name in ("accuracy", "truncated", "unparseable")] == [pytest.approx(1 / 6)] * 3
    assert metrics["empty"] == pytest.approx(2 / 6)
    assert metrics["completion_tokens"] == pytest.approx((4 * 9 + 2) / 6)
    assert metrics["steps"] == pytest.approx((4 * 3 + 1) / 6)


def test_scores_must_be_there_and_be_probabilities():
    with pytest.raises(UsageError, match=r"question q7 has no scores of its steps; .* coefficients\.process"):
        earned("process", [rollout(scores=None)])
    for bad in (math.nan, 1.5):
        with pytest.raises(AgentArkError, match="of question q7 are no probabilities"):
            earned("process", [rollout(scores=(0.5, bad, 0.5))])


@pytest.mark.parametrize(
    "changes", [{"ends": (3, 3, 9)}, {"ends": (3, 5, 10)}, {"scores": (0.5,)}, {"ends": (0, 5, 9)}]
)
def test_steps_that_do_not_fit_are_refused(changes):
    with pytest.raises(ValueError, match="step"):
        rollout(**changes)


@pytest.mark.parametrize(
    ("key", "values", "hint"),
    [
        ("coefficients.verifable", {"coefficients": {"verifable": 1.0}}, "did you mean verifiable?"),
        ("coefficients.charm", {"coefficients": {"charm": 1.0}}, "there are verifiable, process, format, length"),
        ("coefficients.mine:", {"coefficients": {"mine:": 1.0}}, "package.module:function"),
        ("coefficients.format", {"coefficients": {"format": math.nan}}, "a finite number"),
        ("coefficients.length", {"coefficients": {"length": 1e7}, "overlong_buffer": 5}, "at most 1e+06 in size"),
        ("coefficients", {"coefficients": {}}, "at least one"),
        ("coefficients", {"coefficients": {"verifiable": 0.0}}, "at least one reward that counts"),
        ("aggregate", {"aggregate": "max"}, "minimum_form"),
        ("overlong_buffer", {"coefficients": {"length": 1.0}}, "at least 1 beside coefficients.length"),
        ("overlong_buffer", {"overlong_buffer": 5}, "null without coefficients.length"),
    ],
)
def test_impossible_values_are_refused(key, values, hint):
    with pytest.raises(UsageError) as caught:
        RewardConfig(**values)
    assert str(caught.value).startswith(f"{key}: ")
    assert hint in str(caught.value)


@pytest.fixture
def own(tmp_path, monkeypatch):
    """Writes a module of the user's and gives its name."""

    def write(text, name="my_rewards"):
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(text))
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, name, raising=False)
        return name

    yield write
    sys.modules.pop("my_rewards", None)


def test_functions_of_the_users_own_give_numbers_or_one_per_token(own):
    own(
        """
        import numpy as np

        def polite(rollout):
            return len(rollout.text) > 3

        def per_token(rollout):
            return np.arange(len(rollout.ids))

        def as_list(rollout):
            return [1] * len(rollout.ids)
        """
    )
    config = RewardConfig({"my_rewards:polite": 1.0, "my_rewards:per_token": -0.5, "my_rewards:as_list": 1.0})
    table = rewards([RIGHT, EMPTY], config, MAX_TOKENS)
    np.testing.assert_allclose(table.scalar, [1, 0])
    np.testing.assert_allclose(table.tokens[0], 1 - 0.5 * np.arange(9))
    np.testing.assert_allclose(table.tokens[1], [1])
    assert table.metrics["reward/my_rewards:per_token"] == pytest.approx(18)


BROKEN = {
    "raise KeyError('x')": "raised KeyError: 'x'; correct it",
    "return float('nan')": "returned nan; return a finite number",
    "return [float('inf')] * 9": "returned [inf, inf,",
    "return [1.0] * 8": "returned an array of shape (8,); return a finite number, or one for each of the 9 tokens",
    "return [[1.0] * 9]": "returned an array of shape (1, 9)",
    "return None": "returned None",
    "return 'good'": "returned 'good'",
    "return {}": "returned {}",
    "return '1.5'": "returned '1.5'; return a finite number",
    "return ['1'] * 9": "returned ['1', '1',",
    "return 10 ** 400": "returned 1000000",
    "return 1e20": "returned 1e+20; return a finite number, or one for each of the 9 tokens (rollout.ids), at most",
    "return [0.0] * 8 + [-1e300]": "returned [0.0, 0.0,",
    "rollout.ids[:] = 0": "raised ValueError: assignment destination is read-only",
    "rollout.step_scores[:] = 1": "raised ValueError: assignment destination is read-only",
}


@pytest.mark.parametrize(("body", "complaint"), BROKEN.items(), ids=BROKEN)
def test_a_function_that_breaks_is_named_with_the_question(own, body, complaint):
    own(f"def judge(rollout):\n    {body}\n")
    with pytest.raises(UsageError) as caught:
        rewards([RIGHT], RewardConfig({"my_rewards:judge": 1.0}), MAX_TOKENS)
    assert str(caught.value).startswith("coefficients.my_rewards:judge: of a rollout of question q7 the function ")
    assert complaint in str(caught.value)


def test_a_function_that_is_slow_is_named(own, monkeypatch, caplog):
    own("def judge(rollout):\n    return 1\n")
    rewards([RIGHT], RewardConfig({"my_rewards:judge": 1.0}), MAX_TOKENS)
    assert not caplog.messages
    monkeypatch.setattr("agentark_jax.training.rewards.SLOW_SECONDS", -1.0)
    rewards([RIGHT, WRONG], RewardConfig({"my_rewards:judge": 1.0, "verifiable": 1.0}), MAX_TOKENS)
    (named,) = caplog.messages
    assert named.startswith("coefficients.my_rewards:judge: the function took ")
    assert "for 2 rollouts" in named


@pytest.mark.parametrize(
    ("name", "text", "complaint"),
    [
        ("no_such_module:judge", "", "no_such_module cannot be imported (ModuleNotFoundError"),
        ("my_rewards:judge", "import no_such_thing", "my_rewards cannot be imported (ModuleNotFoundError"),
        ("my_rewards:judge", "1 / 0", "my_rewards cannot be imported (ZeroDivisionError"),
        ("my_rewards:jugde", "def judge(rollout): ...", "has no function jugde; did you mean judge?"),
        ("my_rewards:judge", "judge = 3", "has no function judge; define it there"),
    ],
)
def test_a_function_that_is_not_there_is_named(own, name, text, complaint):
    own(text)
    with pytest.raises(UsageError) as caught:
        reward_function(name)
    assert str(caught.value).startswith(f"coefficients.{name}: ")
    assert complaint in str(caught.value)


def test_rewards_apart_are_measured_and_not_summed():
    config = RewardConfig({"verifiable": 1.0, "process": 2.0}, aggregate="mean")
    whole, apart = (rewards([rollout()], config, 20, apart=names) for names in ((), ("process",)))
    assert whole.scalar[0] == pytest.approx(1 + 2 * 0.7)
    assert apart.scalar[0] == 1.0
    assert apart.metrics == whole.metrics
