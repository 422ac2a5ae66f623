"""The packing plan and the batches built from it."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentark_jax.data.loader import pack_row, packed_batches
from agentark_jax.data.packing import check_examples, grouped_plan, packing_plan
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


# Groups and steps


group_strategy = st.lists(st.lists(st.integers(1, 12), min_size=1, max_size=4), min_size=0, max_size=15)


@settings(max_examples=80, deadline=None)
@given(groups=group_strategy, seed=st.integers(0, 99), epoch=st.integers(0, 3), rows=st.integers(4, 6))
def test_a_group_is_in_one_block_of_rows(groups, seed, epoch, rows):
    lengths = [length for group in groups for length in group]
    starts = np.cumsum([0, *map(len, groups)])
    indices = [list(range(start, start + len(group))) for start, group in zip(starts[:-1], groups, strict=True)]
    shape = {"row_length": 12, "rows": rows}
    plan = grouped_plan(indices, lengths, seed=seed, epoch=epoch, **shape)
    assert sorted(index for row in plan for index in row) == list(range(len(lengths)))
    assert all(sum(lengths[index] for index in row) <= 12 for row in plan)
    block = {index: place // rows for place, row in enumerate(plan) for index in row}
    for group in indices:
        assert len({block[index] for index in group}) == 1
    assert plan == grouped_plan(indices, lengths, seed=seed, epoch=epoch, **shape)


def test_the_order_of_groups_depends_on_seed_and_epoch_and_is_pinned():
    groups, lengths = [[0, 1], [2], [3, 4, 5], [6, 7]], [3, 5, 7, 2, 6, 4, 1, 8]
    plans = [grouped_plan(groups, lengths, seed=s, epoch=e, row_length=12, rows=2) for s, e in [(0, 0), (0, 1), (1, 0)]]
    assert len({str(plan) for plan in plans}) > 1
    assert plans[0] == [[0, 1], [2], [6, 7, 3], [4, 5]]


def test_blocks_are_filled_before_the_next_is_begun():
    """A group that does not fit opens a block, and leaves empty rows behind."""
    plan = grouped_plan([[0], [1, 2, 3]], [10, 10, 10, 10], seed=0, epoch=0, row_length=10, rows=3)
    assert sorted(map(len, plan[:3])) in ([0, 0, 1], [1, 1, 1])
    assert len(plan) in (4, 6)
    whole = grouped_plan([[0, 1], [2, 3]], [5, 5, 5, 5], seed=0, epoch=0, row_length=10, rows=2)
    assert sorted(map(sorted, whole)) == [[0, 1], [2, 3]]


def test_groups_that_fit_no_block_are_refused():
    with pytest.raises(ValueError, match=r"\[0, 1, 2\] do not fit in 2 rows of 12"):
        grouped_plan([[0, 1, 2]], [7, 7, 7], seed=0, epoch=0, row_length=12, rows=2)
    with pytest.raises(ValueError, match=r"\[0\] do not fit"):
        grouped_plan([[0]], [13], seed=0, epoch=0, row_length=12, rows=2)


def judged(length, ends, labels, question="q"):
    return Example(
        np.arange(10, 10 + length, dtype=np.int32),
        {},
        question,
        "steps",
        step_ends=np.asarray(ends, np.int32),
        step_labels=np.asarray(labels, np.float32),
    )


def test_steps_are_where_their_last_tokens_are():
    examples = [judged(4, [1, 3], [1, 0]), judged(3, [2], [0.5], "r"), judged(5, [0, 2, 4], [1, 1, 0])]
    data = packed_batches(examples, seed=0, epochs=2, rows=2, row_length=8)
    assert data.steps == max(sum(len(examples[i].step_ends) for i in row) for step in data.plan for row in step)
    seen = []
    for number, batch in enumerate(data.iterate(0, len(data))):
        assert batch["weights"] == {}
        found = batch["steps"]
        assert all(array.shape == (2, data.steps) for array in found.values())
        for row, indices in enumerate(data.plan[number]):
            mask = found["mask"][row]
            wanted = [
                (index, int(end), float(label))
                for index in indices
                for end, label in zip(examples[index].step_ends, examples[index].step_labels, strict=True)
            ]
            assert mask.tolist() == [True] * len(wanted) + [False] * (data.steps - len(wanted))
            for place, (index, end, label) in enumerate(wanted):
                position = found["ends"][row, place]
                assert batch["ids"][row, position] == examples[index].ids[end]
                assert batch["positions"][row, position] == end
                assert batch["segment_ids"][row, position] == 1 + list(indices).index(index)
                assert found["labels"][row, place] == label
                assert found["trajectories"][row, place] == index
                assert found["questions"][row, place] == (1 if index == 1 else 0)
                seen.append((index, end))
    assert len(seen) == 2 * 6


def test_questions_stay_together_in_every_micro_batch():
    rng = np.random.default_rng(0)
    examples = [judged(int(rng.integers(3, 9)), [2], [1], f"q{index % 7}") for index in range(28)]
    data = packed_batches(examples, seed=4, epochs=2, rows=8, row_length=16, together=4)
    blocks = {}
    for number, step in enumerate(data.plan):
        assert len(step) == 8
        for place, row in enumerate(step):
            for index in row:
                blocks.setdefault(examples[index].question_id, set()).add((number, place // 4))
    assert sorted(blocks) == [f"q{number}" for number in range(7)]
    assert all(len(places) == 2 for places in blocks.values()), "one block in each epoch"
    only = data.batch(0, [5, 6])
    whole = data.batch(0)
    for name, array in whole["steps"].items():
        np.testing.assert_array_equal(only["steps"][name], array[5:7])
    with pytest.raises(UsageError, match=r"prm\.row_length: .* must be in one micro-batch; raise prm\.row_length"):
        packed_batches(examples, seed=4, epochs=1, rows=8, row_length=9, together=2, key="prm.row_length")


@pytest.mark.parametrize(
    ("ends", "labels", "message"),
    [
        ([], [], "has no step"),
        ([1, 4], [1, 1], "has 4 ids, steps that end at"),
        ([-1, 2], [1, 1], "steps that end at"),
        ([2, 2], [1, 1], "steps that end at"),
        ([1, 2], [1], "steps that end at"),
        ([1, 2], [1, 1.5], "no probabilities"),
        ([1, 2], [1, np.nan], "no probabilities"),
    ],
)
def test_bad_steps_are_named(ends, labels, message):
    with pytest.raises(AgentArkError, match=rf"question q \(steps\) .*{message}"):
        check_examples([judged(4, ends, labels)], row_length=10)
