"""The packing plan and the batches built from it."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentark_jax.data.loader import pack_row, packed_batches
from agentark_jax.data.packing import check_examples, packing_plan
from agentark_jax.errors import AgentArkError, UsageError
from agentark_jax.records import Example


def example(length, question="q", first_loss=1, term="completion"):
    weights = np.zeros(length, np.float32)
    weights[first_loss:] = 1.0
    return Example(np.arange(10, 10 + length, dtype=np.int32), {term: weights}, question, "test")


lengths_strategy = st.lists(st.integers(1, 12), min_size=0, max_size=40)


@settings(max_examples=60, deadline=None)
@given(lengths=lengths_strategy, seed=st.integers(0, 99), epoch=st.integers(0, 5), open_rows=st.integers(1, 8))
def test_every_example_once_and_no_row_too_long(lengths, seed, epoch, open_rows):
    plan = packing_plan(lengths, seed=seed, epoch=epoch, row_length=12, open_rows=open_rows)
    assert sorted(index for row in plan for index in row) == list(range(len(lengths)))
    assert all(row and sum(lengths[index] for index in row) <= 12 for row in plan)
    assert plan == packing_plan(list(lengths), seed=seed, epoch=epoch, row_length=12, open_rows=open_rows)


def test_the_plan_depends_on_seed_and_epoch_and_is_pinned():
    lengths = [3, 5, 7, 2, 6, 4, 1, 8]
    plans = [packing_plan(lengths, seed=s, epoch=e, row_length=12) for s, e in [(0, 0), (0, 1), (1, 0)]]
    assert len({str(plan) for plan in plans}) == 3
    # Pinned: a checkpoint of yesterday must find the same rows with the libraries of tomorrow.
    assert plans[0] == [[7, 0, 6], [1, 5, 3], [4], [2]]


def test_first_fit_fills_rows():
    rng = np.random.default_rng(0)
    lengths = rng.integers(10, 100, 400).tolist()
    plan = packing_plan(lengths, seed=0, epoch=0, row_length=256)
    assert sum(lengths) / (256 * len(plan)) > 0.93


def test_a_plan_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="13 tokens"):
        packing_plan([13], seed=0, epoch=0, row_length=12)


def test_rows_restart_positions_and_clear_the_first_weight():
    first, second = example(3, first_loss=0), example(2, first_loss=0, term="other")
    row = pack_row([first, second], row_length=7, terms=["completion", "other"])
    np.testing.assert_array_equal(row["ids"], [10, 11, 12, 10, 11, 0, 0])
    np.testing.assert_array_equal(row["positions"], [0, 1, 2, 0, 1, 0, 0])
    np.testing.assert_array_equal(row["segment_ids"], [1, 1, 1, 2, 2, 0, 0])
    np.testing.assert_array_equal(row["weights"]["completion"], [0, 1, 1, 0, 0, 0, 0])
    np.testing.assert_array_equal(row["weights"]["other"], [0, 0, 0, 0, 1, 0, 0])


def test_batches_have_one_shape_and_the_last_is_filled_with_empty_rows():
    examples = [example(5, f"q{index}") for index in range(7)]
    data = packed_batches(examples, seed=3, epochs=1, rows=2, row_length=10)
    batches = list(data.iterate(0, len(data)))
    assert len(data) == len(batches) == 2
    assert all(batch[name].shape == (2, 10) for batch in batches for name in ("ids", "positions", "segment_ids"))
    assert all(batch["weights"]["completion"].dtype == np.float32 for batch in batches)
    assert sum(int((batch["segment_ids"] > 0).sum()) for batch in batches) == 35
    odd = packed_batches(examples[:5], seed=3, epochs=1, rows=2, row_length=10)
    assert odd.plan[-1][-1] == ()
    assert not next(odd.iterate(len(odd) - 1, len(odd)))["segment_ids"][-1].any()


def test_the_position_is_a_global_index_over_epochs():
    examples = [example(3 + index % 4, f"q{index}") for index in range(9)]
    data = packed_batches(examples, seed=1, epochs=3, rows=2, row_length=10)
    everything = list(data.iterate(0, len(data)))
    for start in (1, len(data) - 1, len(data)):
        tail = list(data.iterate(start, len(data)))
        assert len(tail) == len(data) - start
        for ours, theirs in zip(tail, everything[start:], strict=True):
            np.testing.assert_array_equal(ours["ids"], theirs["ids"])
            np.testing.assert_array_equal(ours["segment_ids"], theirs["segment_ids"])
    used = sorted(index for batch in data.plan for row in batch for index in row)
    assert used == sorted(list(range(9)) * 3)


def test_question_ids_of_a_step():
    examples = [example(5, f"q{index}") for index in range(4)]
    data = packed_batches(examples, seed=0, epochs=1, rows=1, row_length=10)
    assert sorted(data.question_ids(0) + data.question_ids(1)) == ["q0", "q1", "q2", "q3"]
    assert data.question_ids(0) == sorted(f"q{index}" for index in data.plan[0][0])


def test_bad_examples_are_named():
    with pytest.raises(UsageError, match=r"fit\.row_length: the example of question long .* 11 tokens .* at least 11"):
        check_examples([example(4), example(11, "long")], row_length=10, key="fit.row_length")
    with pytest.raises(AgentArkError, match=r"question mute .*no token with loss"):
        check_examples([example(4, "mute", first_loss=4)], row_length=10)
    only_first = Example(
        np.arange(3, dtype=np.int32), {"completion": np.array([1.0, 0, 0], np.float32)}, "edge", "test"
    )
    with pytest.raises(AgentArkError, match=r"question edge .*no token with loss"):
        check_examples([only_first], row_length=10)
    short = Example(np.arange(3, dtype=np.int32), {"completion": np.ones(2, np.float32)}, "odd", "test")
    with pytest.raises(AgentArkError, match=r"question odd .*shape"):
        check_examples([short], row_length=10)
    bad = Example(np.arange(2, dtype=np.int32), {"completion": np.array([0, np.nan], np.float32)}, "nan", "test")
    with pytest.raises(AgentArkError, match=r"question nan .*not finite"):
        check_examples([bad], row_length=10)
    with pytest.raises(AgentArkError, match="no example"):
        check_examples([], row_length=10)
