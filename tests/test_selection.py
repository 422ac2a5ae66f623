"""Which turns become trajectories: variants, funnels, matched arms, nested subsets, and the file they are kept in."""

import dataclasses
import itertools
import random
from collections import Counter
from typing import get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import ks_2samp
from test_grading import seconds

from agentark_jax.errors import AgentArkError, UsageError
from agentark_jax.records import JUDGE, SUMMARISER, stable_hash
from agentark_jax.traces.config import GOLDLESS, SelectionConfig, Variant
from agentark_jax.traces.labels import LabelledTurn
from agentark_jax.traces.matching import Likeness, _nearest, match, within_budget
from agentark_jax.traces.selection import (
    FunnelStep,
    Selection,
    Trajectory,
    check_filled,
    load_selection,
    save_selection,
    subset,
)
from agentark_jax.traces.store import Said
from agentark_jax.traces.variants import Completions, possible, select

VERDICTS = ["right", "right", "wrong", "unparseable"]


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Row(LabelledTurn):
    """A turn that knows what it said and what it was shown."""

    completion_ids: np.ndarray
    logprobs: np.ndarray | None
    parents: tuple[str, ...] = ()


def said(rows: list[Row]) -> Completions:
    """What a store would answer."""
    answers = {row.key: Said(row.completion_ids, row.logprobs, row.parents) for row in rows}
    return lambda keys: {key: answers[key] for key in keys}


def choose(variant: str, rows: list[Row], *, per_question=2, limit=None) -> Selection:
    return select(rows, SelectionConfig(variant, per_question=per_question, limit=limit), said(rows))


def make_row(
    question="q",
    agent=0,
    round=0,
    verdict="right",
    ids=None,
    finish="stop",
    sample=0,
    text_only=False,
    answer="2",
    role="debater",
) -> Row:
    ids = np.asarray([agent, round, sample] if ids is None else ids, np.int32)
    return Row(
        key=f"{question}.{round}.{agent}.{sample}",
        question_id=question,
        protocol="debate",
        role=role,
        agent=agent,
        round=round,
        sample=sample,
        verdict=verdict,
        answer="" if verdict == "unparseable" else answer,
        finish=finish,
        tokens=len(ids),
        completion_ids=ids,
        logprobs=None if text_only else -ids.astype(np.float32),
    )


def random_rows(seed: int, questions=20, agents=3, rounds=2) -> list[Row]:
    rng = random.Random(seed)
    return [
        make_row(
            f"q{q}",
            agent,
            round,
            rng.choice(VERDICTS),
            ids=[rng.randrange(3)] * rng.randint(1, 4),
            finish=rng.choice(["stop"] * 5 + ["length"]),
        )
        for q in range(questions)
        for agent in range(agents)
        for round in range(rounds)
        if rng.random() > 0.05
    ]


def make_selection(lengths, corrective=(), variant="corrective_first", name="t") -> Selection:
    trajectories = tuple(
        Trajectory(
            question_id=f"q{index // 2}",
            turn_key=f"{name}{index}",
            trace_keys=(f"{name}{index}.first", f"{name}{index}"),
            completion_ids=np.full(length, index, np.int32),
            logprobs=np.full(length, -0.1 * index, np.float32),
            corrective=index in corrective,
            agent=index % 2,
            round=1,
        )
        for index, length in enumerate(lengths)
    )
    return Selection(variant, trajectories, ())


def keys(selection: Selection) -> list[str]:
    return [trajectory.turn_key for trajectory in selection.trajectories]


def values(selection: Selection) -> tuple:
    plain = [
        (
            t.question_id,
            t.turn_key,
            t.trace_keys,
            t.completion_ids.tolist(),
            None if t.logprobs is None else t.logprobs.tolist(),
            t.corrective,
            t.agent,
            t.round,
        )
        for t in selection.trajectories
    ]
    return selection.variant, plain, selection.funnel


# Variants


def test_corrective_first_takes_last_rounds_and_changed_minds_first():
    rows = [
        *(make_row("a", 0, 0, "right"), make_row("a", 0, 1, "right")),
        *(make_row("a", 1, 0, "wrong"), make_row("a", 1, 1, "right")),
        *(make_row("a", 2, 0, "unparseable"), make_row("a", 2, 1, "right")),
        *(make_row("b", 0, 0, "right"), make_row("b", 0, 1, "wrong")),
        *(make_row("b", 1, 0, "right"), make_row("b", 1, 1, "right")),
    ]
    one = choose("corrective_first", rows, per_question=1)
    assert keys(one) == ["a.1.1.0", "b.1.1.0"]
    assert [t.corrective for t in one.trajectories] == [True, False]
    assert one.trajectories[0].trace_keys == ("a.0.1.0", "a.1.1.0")
    assert keys(choose("corrective_first", rows, per_question=2)) == ["a.1.1.0", "a.1.2.0", "b.1.1.0"]
    three = choose("corrective_first", rows, per_question=3)
    assert keys(three) == ["a.1.1.0", "a.1.2.0", "a.1.0.0", "b.1.1.0"]
    assert [(step.filter, step.kept, step.dropped) for step in three.funnel] == [
        ("last round", 5, 5),
        ("unparseable", 5, 0),
        ("wrong", 4, 1),
        ("truncated", 4, 0),
        ("duplicate", 4, 0),
        ("over per_question", 4, 0),
    ]
    assert keys(choose("round1_only", rows, per_question=3)) == ["a.0.0.0", "b.0.0.0", "b.0.1.0"]
    assert not any(t.corrective for t in choose("round1_only", rows, per_question=3).trajectories)


def test_an_agent_that_was_wrong_in_any_earlier_round_is_corrective():
    history = [("wrong", True), ("right", True), ("right", True)]
    rows = [make_row("a", 0, round, verdict) for round, (verdict, _) in enumerate(history)]
    (trajectory,) = choose("corrective_first", rows, per_question=1).trajectories
    assert trajectory.corrective
    assert trajectory.trace_keys == ("a.0.0.0", "a.1.0.0", "a.2.0.0")


def test_the_last_round_is_that_of_each_debate():
    rows = [make_row("a", 0, 0), make_row("b", 0, 0), make_row("b", 0, 1), make_row("b", 1, 0)]
    assert keys(choose("corrective_first", rows, per_question=3)) == ["a.0.0.0", "b.1.0.0"]


def test_the_limit_prefers_corrective_then_more_questions():
    rows = [make_row(q, agent, 0, "right") for q in "abc" for agent in range(2)]
    rows += [make_row(q, agent, 1, "right", ids=[agent]) for q in "abc" for agent in range(2)]
    rows = [dataclasses.replace(r, verdict="wrong") if (r.key == "c.0.1.0") else r for r in rows]
    assert keys(choose("corrective_first", rows, per_question=2, limit=1)) == ["c.1.1.0"]
    # the corrective one of c is its first, so a's and b's first come before the second of any question
    assert keys(choose("corrective_first", rows, per_question=2, limit=3)) == ["a.1.0.0", "b.1.0.0", "c.1.1.0"]
    four = choose("corrective_first", rows, per_question=2, limit=4)
    assert keys(four) == ["a.1.0.0", "a.1.1.0", "b.1.0.0", "c.1.1.0"]
    assert four.funnel[-1].dropped == 2


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 3), st.one_of(st.none(), st.integers(1, 30)))
def test_variants_equal_brute_force(seed, per_question, limit):
    rows = random_rows(seed)
    by_key = {row.key: row for row in rows}
    last = {q: max(r.round for r in rows if r.question_id == q) for q in {r.question_id for r in rows}}
    for variant in ("corrective_first", "round1_only"):
        selection = select(rows, SelectionConfig(variant, per_question, limit), said(rows))
        shuffled = random.Random(seed + 1).sample(rows, len(rows))
        assert values(select(shuffled, SelectionConfig(variant, per_question, limit), said(rows))) == values(selection)

        remaining = len(rows)
        for step in selection.funnel:
            assert step.kept + step.dropped == remaining
            remaining = step.kept
        assert remaining == len(selection.trajectories)

        wanted = [r for r in rows if r.round == (last[r.question_id] if variant == "corrective_first" else 0)]
        good = [r for r in wanted if r.verdict == "right" and r.finish == "stop"]
        dropped = {step.filter: step.dropped for step in selection.funnel}
        assert dropped["unparseable"] == sum(r.verdict == "unparseable" for r in wanted)
        assert dropped["wrong"] == sum(r.verdict == "wrong" for r in wanted)
        assert dropped["truncated"] == sum(r.verdict == "right" and r.finish == "length" for r in wanted)
        texts = {(r.question_id, tuple(r.completion_ids)) for r in good}
        assert dropped["duplicate"] == len(good) - len(texts)
        room = sum(min(n, per_question) for n in Counter(q for q, _ in texts).values())
        assert dropped["over per_question"] == len(texts) - room
        assert len(selection.trajectories) == min(room, limit or room)

        corrective = set()
        for row in good:
            earlier = [
                r for r in rows if (r.question_id, r.agent) == (row.question_id, row.agent) and r.round < row.round
            ]
            if any(r.verdict != "right" for r in earlier):
                corrective.add(row.key)
        for t in selection.trajectories:
            assert by_key[t.turn_key] in good
            assert t.corrective == (t.turn_key in corrective)
            assert t.completion_ids.tolist() == by_key[t.turn_key].completion_ids.tolist()
            assert t.logprobs.tolist() == by_key[t.turn_key].logprobs.tolist()
        if limit is None:
            for question in last:
                chosen = [t for t in selection.trajectories if t.question_id == question]
                distinct = {tuple(by_key[k].completion_ids) for k in corrective if by_key[k].question_id == question}
                assert sum(t.corrective for t in chosen) == min(len(distinct), per_question)
        elif sum(t.corrective for t in selection.trajectories) < len(selection.trajectories):
            unlimited = select(rows, SelectionConfig(variant, per_question), said(rows))
            assert {t.turn_key for t in unlimited.trajectories if t.corrective} <= set(keys(selection))


def debate_of(question: str, *agents: str) -> list[Row]:
    """One row for each agent and round; a letter each: r(ight), w(rong: answers 3), v (wrong: 4), u(nparseable).

    Each was shown all of the round before it.
    """
    verdicts = {"r": ("right", "2"), "w": ("wrong", "3"), "v": ("wrong", "4"), "u": ("unparseable", "")}
    rows = [
        make_row(question, agent, round, verdicts[letter][0], answer=verdicts[letter][1])
        for agent, letters in enumerate(agents)
        for round, letter in enumerate(letters)
    ]
    return [
        dataclasses.replace(row, parents=tuple(each.key for each in rows if each.round == row.round - 1))
        for row in rows
    ]


def closing(question: str, verdict: str, role=SUMMARISER, round=2, **options) -> Row:
    """The last word on a debate of three agents."""
    return make_row(question, 3, round, verdict, role=role, **options)


def places(selection: Selection) -> list[str]:
    """Question, round and agent of each trajectory."""
    return [f"{t.question_id}{t.round}{t.agent}" for t in selection.trajectories]


VARIED = [
    *debate_of("a", "rr", "wr", "ww"),  # one corrected; two of three right
    *debate_of("b", "ww", "rw", "vr"),  # the majority is wrong
    *debate_of("c", "rr", "rr", "ur"),  # all agree
    *debate_of("d", "wr", "wv", "vw"),  # all differ
    *debate_of("e", "rw", "ru", "ww"),
    *(closing("a", "right"), closing("b", "wrong"), closing("c", "right")),
    *(closing("d", "right", finish="length"), closing("e", "right", role=JUDGE)),
]


@pytest.mark.parametrize(
    ("variant", "expected"),
    [
        ("corrective_first", ["a11", "a10", "b12", "c12", "c10", "d10"]),
        ("corrective_only", ["a11", "b12", "c12", "d10"]),
        ("non_corrective_matched", ["a10", "c10", "c11"]),
        ("final_only", ["a11", "c12", "d10"]),
        ("consensus_only", ["a10", "a11", "b10", "b11", "c10", "c11", "e10", "e12"]),
        ("all_correct", ["a11", "a10", "b12", "b01", "c12", "c10", "d10", "e00", "e01"]),
        ("diverse_k1", ["a11", "c12"]),
        ("diverse_k2", ["a11", "a10", "c12", "c10"]),
        ("diverse_k3", ["a11", "a10", "c12", "c10", "c11"]),
        ("round1_only", ["a00", "b01", "c00", "c01", "e00", "e01"]),
        ("dialogue", ["a11", "a10", "b12", "c12", "c10", "d10"]),
        ("summary", ["a23", "c23"]),
        ("majority", ["a10", "a11", "b10", "b11", "c10", "c11", "d10", "e10", "e12"]),
        ("random", ["a10", "a11", "b10", "b12", "c12", "c11", "d11", "d10", "e12", "e10"]),
    ],
)
def test_a_variant_takes(variant, expected):
    assert places(choose(variant, VARIED)) == expected
    shuffled = random.Random(0).sample(VARIED, len(VARIED))
    assert values(choose(variant, shuffled)) == values(choose(variant, VARIED))


def test_every_variant_is_tested():
    (mark,) = test_a_variant_takes.pytestmark
    assert [variant for variant, _ in mark.args[1]] == list(get_args(Variant))


def flipped(rows: list[Row]) -> list[Row]:
    """The same turns with other verdicts."""
    return [
        row if row.verdict == "unparseable" else dataclasses.replace(row, verdict=verdict)
        for row, verdict in zip(rows, itertools.cycle(["wrong", "right"]), strict=False)
    ]


@pytest.mark.parametrize("variant", get_args(Variant))
def test_some_variants_know_no_gold_answer(variant):
    """Whatever is right, the same turns are taken."""
    same = [
        places(choose(variant, flipped(VARIED), limit=limit)) == places(choose(variant, VARIED, limit=limit))
        for limit in (None, 3)
    ]
    assert same == [variant in GOLDLESS] * 2


def test_a_consensus_is_more_than_half_of_all_who_spoke_and_a_majority_need_not_be():
    half = debate_of("h", "r", "r", "w", "u")
    assert places(choose("consensus_only", half)) == []
    assert places(choose("majority", half)) == ["h00", "h01"]
    samples = [make_row("s", sample=sample, answer=answer) for sample, answer in enumerate("23323")]
    assert keys(choose("majority", samples, per_question=3)) == ["s.0.0.1", "s.0.0.2", "s.0.0.4"]


def random_debates(seed: int) -> list[Row]:
    """Debates of up to three rounds, in which anybody may be silent and is shown whatever was said before."""
    rng = random.Random(seed)
    rows: list[Row] = []
    for question in (f"q{index}" for index in range(12)):
        spoken: list[Row] = []
        for round, agent in itertools.product(range(rng.randint(1, 3)), range(4)):
            if rng.random() < 0.1:
                continue
            row = make_row(
                question,
                agent,
                round,
                rng.choice(VERDICTS),
                ids=[rng.randrange(2), rng.randrange(2), 9],
                finish=rng.choice(["stop"] * 9 + ["length"]),
                answer=rng.choice("234"),
            )
            before = [each.key for each in spoken if each.round < round]
            spoken.append(dataclasses.replace(row, parents=tuple(rng.sample(before, rng.randint(0, len(before))))))
        rows += [*spoken, closing(question, rng.choice(VERDICTS), rng.choice([SUMMARISER, JUDGE]), round=3)]
    return rng.sample(rows, len(rows))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 3), st.integers(0, 3))
def test_variants_of_debates_equal_brute_force(seed, per_question, draw):
    rows = random_debates(seed)
    by_key = {row.key: row for row in rows}
    wanted: dict[str, list] = {"dialogue": [], "summary": [], "majority": [], "random": []}
    for question in sorted({row.question_id for row in rows}):
        spoken = sorted((r for r in rows if (r.question_id, r.role) == (question, "debater")), key=lambda r: r.agent)
        last = [row for row in spoken if row.round == max(row.round for row in spoken)]
        summaries = [r for r in rows if (r.question_id, r.role, r.verdict) == (question, SUMMARISER, "right")]
        votes = [row.answer for row in last if row.verdict != "unparseable"]
        most = max(votes, key=votes.count) if votes else None
        whole = [row for row in last if row.verdict != "unparseable" and row.finish == "stop"]

        def wrong_before(row, spoken=spoken):
            return any(r.verdict != "right" for r in spoken if r.agent == row.agent and r.round < row.round)

        telling = []
        for row in sorted((row for row in whole if row.verdict == "right"), key=lambda row: not wrong_before(row)):
            shown = [by_key[key] for key in row.parents]
            if row.round and shown and all(each.finish == "stop" for each in shown):
                own = [each for each in shown if each.agent == row.agent]
                told = [*own, *(each for each in shown if each.agent != row.agent)]
                ids = [token for each in told for token in each.completion_ids[:-1].tolist()]
                telling.append(([each.key for each in (*told, row)], [*ids, *row.completion_ids.tolist()]))
        drawn = sorted(whole, key=lambda row: stable_hash([draw, row.key]))
        found = {
            "dialogue": telling,
            "summary": [([row.key], row.completion_ids.tolist()) for row in summaries[:1]],
            "majority": [([row.key], row.completion_ids.tolist()) for row in whole if row.answer == most],
            "random": [([row.key], row.completion_ids.tolist()) for row in drawn],
        }
        for variant, each in found.items():
            distinct = [path for index, path in enumerate(each) if path[1] not in [ids for _, ids in each[:index]]]
            wanted[variant] += distinct[:per_question]
    for variant in possible(rows):
        selection = select(rows, SelectionConfig(variant, per_question, seed=draw), said(rows))
        remaining = sum((row.role == SUMMARISER) if variant == "summary" else row.role == "debater" for row in rows)
        for step in selection.funnel:
            assert step.kept + step.dropped == remaining
            remaining = step.kept
        assert remaining == len(selection.trajectories)
        summed = [t for t in selection.trajectories if by_key[t.turn_key].role != "debater"]
        assert summed == ([] if variant != "summary" else list(selection.trajectories))
        if variant in wanted:
            got = [
                (list(t.trace_keys) if variant == "dialogue" else [t.turn_key], t.completion_ids.tolist())
                for t in selection.trajectories
            ]
            assert got == wanted[variant]
            assert all((t.logprobs is None) == (variant == "dialogue") for t in selection.trajectories)


def test_rows_of_every_role_change_no_other_variant():
    debaters = [row for row in VARIED if row.role == "debater"]
    for variant in possible(debaters):
        assert values(choose(variant, debaters)) == values(choose(variant, VARIED))
    assert set(possible(VARIED)) - set(possible(debaters)) == {"summary"}
    assert possible(VARIED) == get_args(Variant)
    with pytest.raises(UsageError, match=r"no summariser has answered: set debate\.aggregation to summariser"):
        choose("summary", debaters)


def test_random_turns_follow_the_seed_alone():
    rows = [row for index in range(30) for row in debate_of(f"q{index:02}", "r", "w", "v", "u")]

    def drawn(seed: int, rows: list[Row] = rows, **options) -> list[str]:
        return keys(select(rows, SelectionConfig("random", seed=seed, **options), said(rows)))

    assert drawn(1) == drawn(1, random.Random(0).sample(rows, len(rows)))
    assert drawn(1) != drawn(2)
    assert {key[-3] for key in drawn(1, per_question=1)} == {"0", "1", "2"}, "no agent is preferred"
    few = drawn(1, per_question=2, limit=10)
    assert set(few) < set(drawn(1, per_question=1)), "more questions come before a second turn of one"
    asked = [{key.partition(".")[0] for key in drawn(seed, per_question=2, limit=10)} for seed in (1, 2)]
    assert asked[0] != asked[1], "nor any question"


def test_a_dialogue_tells_no_turn_that_is_not_given():
    rows = debate_of("a", "wr", "rr")
    with pytest.raises(AgentArkError, match=r"was shown a\.0\.0\.0, which is not among the turns given: select from"):
        choose("dialogue", rows[1:])


@pytest.mark.parametrize("variant", ["dialogue", "diverse_k2", "non_corrective_matched"])
def test_eight_times_the_debates_take_some_eight_times_as_long(variant):
    """Quadratic work on so many turns takes 64 times as long."""

    def taken(count):
        rows = []
        for question in range(count):
            shown = tuple(f"{question}.0.{agent}.0" for agent in range(3))
            rows += [make_row(str(question), agent) for agent in range(3)]
            rows += [
                dataclasses.replace(make_row(str(question), agent, 1, ids=range(agent, agent + 5)), parents=shown)
                for agent in range(3)
            ]
        return seconds(lambda: choose(variant, rows))

    assert taken(4000) <= 30 * max(taken(500), 0.005)


def test_a_dialogue_keeps_its_turns_in_a_file(tmp_path):
    rows = debate_of("a", "wrr", "rwr")
    selection = choose("dialogue", rows)
    assert [t.trace_keys for t in selection.trajectories] == [
        ("a.1.0.0", "a.1.1.0", "a.2.0.0"),
        ("a.1.1.0", "a.1.0.0", "a.2.1.0"),
    ]
    save_selection(selection, tmp_path / "s")
    assert values(load_selection(tmp_path / "s")) == values(selection)


def test_diverse_trajectories_are_far_apart():
    texts = [[1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 7], [9, 8, 7, 6], [1, 2, 3, 4, 5, 6]]
    rows = [make_row("q", agent, ids=ids) for agent, ids in enumerate(texts)]
    assert places(choose("diverse_k1", rows)) == ["q00"]
    assert places(choose("diverse_k2", rows)) == ["q00", "q02"]
    three = choose("diverse_k3", rows)
    assert places(three) == ["q00", "q02", "q01"]
    assert {step.filter: step.dropped for step in three.funnel}["duplicate"] == 1
    assert places(choose("diverse_k2", rows[:1])) == []


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6))
def test_the_twin_of_corrective_trajectories_is_as_large_and_as_long(seed):
    rng = random.Random(seed)
    rows = []
    for question in range(30):
        for agent in range(3):
            first = "right" if rng.random() < 0.6 else "wrong"
            ids = [rng.randrange(1000) for _ in range(rng.randint(1, 40))]
            rows += [make_row(f"q{question}", agent, 0, first), make_row(f"q{question}", agent, 1, "right", ids=ids)]
    corrective, twin = choose("corrective_only", rows), choose("non_corrective_matched", rows)
    steady = choose("non_corrective_matched", rows, per_question=99)
    assert not any(t.corrective for t in twin.trajectories)
    assert len(twin.trajectories) == min(len(corrective.trajectories), twin.funnel[-2].kept)
    assert set(keys(corrective)).isdisjoint(keys(twin))
    assert len(steady.trajectories) >= len(twin.trajectories)
    # Where a question has steady agents, its corrective trajectories have their twins there.
    free = Counter(row.question_id for row in rows if row.round == 0 and row.verdict == "right")
    wanted = Counter(t.question_id for t in corrective.trajectories)
    found = Counter(t.question_id for t in twin.trajectories)
    assert all(found[question] >= min(wanted[question], free[question]) for question in wanted)


def test_a_twin_is_near_in_length():
    rows = [*debate_of("a", "wr"), make_row("b", 0, 0), make_row("b", 0, 1, ids=[1] * 9)]
    rows += [make_row("c", 0, 0), make_row("c", 0, 1, ids=[1, 2, 3, 4])]
    assert places(choose("non_corrective_matched", rows)) == ["c10"]


def test_no_row_no_trajectory():
    selection = choose("corrective_first", [], per_question=1)
    assert selection.trajectories == ()
    assert all((step.kept, step.dropped) == (0, 0) for step in selection.funnel)
    assert subset(selection, 0.5, 0).trajectories == ()


@pytest.mark.parametrize(
    ("key", "value"),
    [("variant", "best"), ("per_question", 0), ("limit", 0), ("limit", -3), ("fraction", 0), ("fraction", 1.5)],
)
def test_config_names_key_and_value(key, value):
    with pytest.raises(UsageError, match=f"select.{key} is .*{value}"):
        SelectionConfig(**{key: value})


# Matching


def make_arm(name, lengths, variant="round1_only") -> Selection:
    """Trajectories of questions, their lengths by question."""
    trajectories = tuple(
        Trajectory(question, f"{name}.{question}.{index}", (), np.zeros(length, np.int32), None, False, index, 0)
        for question, of_question in sorted(lengths.items())
        for index, length in enumerate(of_question)
    )
    return Selection(variant, trajectories, ())


def random_lengths(seed) -> dict[str, list[int]]:
    """Lengths of up to four trajectories of each of most of some questions."""
    draw = random.Random(seed)
    questions = draw.sample([f"q{index:03}" for index in range(130)], 120)
    return {question: [draw.randint(20, 60) for _ in range(draw.randint(1, 4))] for question in questions}


@pytest.mark.parametrize("seed", range(60))
def test_matched_arms_are_alike_in_all_that_is_promised(seed):
    lengths = [random_lengths(f"{seed}.{index}") for index in range(2 + seed % 3)]
    arms = {f"arm{index}": make_arm(f"arm{index}", each) for index, each in enumerate(lengths)}
    matched = match(arms, seed)
    counts = [Counter(t.question_id for t in arm.trajectories) for arm in matched.selections.values()]
    assert all(count == counts[0] for count in counts), "as many of the same questions"
    assert len(counts[0]) == matched.questions > 0
    tokens = [arm.tokens for arm in matched.selections.values()]
    assert max(tokens) - min(tokens) <= 0.01 * min(tokens)
    assert matched.figures["tokens"] == dict(zip(arms, tokens, strict=True))
    sizes = [[len(t.completion_ids) for t in arm.trajectories] for arm in matched.selections.values()]
    for name, other in zip(list(arms)[1:], sizes[1:], strict=True):
        likeness = matched.lengths[name]
        assert (likeness.distance, likeness.p) == pytest.approx(ks_2samp(sizes[0], other))
        assert likeness.p >= 0.05
    shared = set.intersection(*(set(each) for each in lengths))
    dropped = matched.dropped
    assert dropped["not in all arms"] == len(set().union(*lengths)) - len(shared)
    assert dropped["length not matched"] == len(shared) - matched.questions
    for name, arm in matched.selections.items():
        before = [t.turn_key for t in arms[name].trajectories]
        assert keys(arm) == [key for key in before if key in set(keys(arm))], "order is kept"
        for earlier, later in itertools.pairwise(arm.funnel):
            assert later.kept + later.dropped == earlier.kept
        assert arm.funnel[-1].kept == len(arm.trajectories)
    first = {t.question_id: [] for t in matched.selections["arm0"].trajectories}
    for t in matched.selections["arm0"].trajectories:
        first[t.question_id].append(t.turn_key)
    for question, kept in first.items():
        assert kept == [f"arm0.{question}.{index}" for index in range(len(kept))], "what it prefers"
    again = match({name: shuffle_questions(arm, seed) for name, arm in arms.items()}, seed)
    assert [set(keys(arm)) for arm in again.selections.values()] == [
        set(keys(arm)) for arm in matched.selections.values()
    ]


def shuffle_questions(arm: Selection, seed: int) -> Selection:
    groups = [list(group) for _, group in itertools.groupby(arm.trajectories, key=lambda t: t.question_id)]
    random.Random(seed).shuffle(groups)
    return dataclasses.replace(arm, trajectories=tuple(itertools.chain(*groups)))


def test_equal_arms_keep_everything():
    arm = make_arm("a", {f"q{index}": [30, 40] for index in range(20)})
    matched = match({"a": arm, "b": make_arm("b", {f"q{index}": [40, 30] for index in range(20)})}, 0)
    assert [len(each.trajectories) for each in matched.selections.values()] == [40, 40]
    assert matched.dropped == {"not in all arms": 0, "length not matched": 0}
    assert matched.lengths == {"b": Likeness(0.0, 1.0)}


def test_of_many_those_near_in_length_are_taken():
    one = {f"q{index}": [50 + 10 * index, 20 + 10 * index] for index in range(8)}
    other = {f"q{index}": [90, 21 + 10 * index, 160, 49 + 10 * index] for index in range(8)}
    matched = match({"one": make_arm("one", one), "other": make_arm("other", other)}, 0)
    assert matched.questions == 8
    of_first = {t.agent for t in matched.selections["other"].trajectories if t.question_id == "q0"}
    assert of_first == {1, 3}


def test_the_longest_choose_first():
    wanted = {"q": list(make_arm("one", {"q": [10, 20]}).trajectories)}
    chosen = _nearest(make_arm("other", {"q": [14, 36, 2]}), wanted)
    assert [len(trajectory.completion_ids) for trajectory in chosen["q"]] == [14, 2]


def test_what_asks_no_gold_answer_keeps_what_it_prefers():
    """Though others would be nearer in length to what a gold answer chose."""
    one = {f"q{index}": [30] for index in range(8)}
    other = {f"q{index}": [29, 30] if index % 2 else [31, 30] for index in range(8)}
    for variant in get_args(Variant):
        matched = match({"one": make_arm("one", one), "other": make_arm("other", other, variant)}, 0)
        preferred = variant in GOLDLESS
        assert {t.agent for t in matched.selections["other"].trajectories} == {0 if preferred else 1}


@pytest.mark.parametrize("count", [5, 7, 13, 60])
def test_few_lengths_are_compared_without_a_word_of_the_library(count):
    """Of some counts the exact p-value of lengths that hardly differ is rounded to more than 1."""
    lengths = {f"q{index:02}": [100 + index] for index in range(count)}
    for shorter in (1, 2):
        other = {**lengths, **{f"q{index:02}": [99 - index] for index in range(shorter)}}
        matched = match({"one": make_arm("one", lengths), "other": make_arm("other", other)}, 0)
        assert matched.lengths["other"].alike


def test_questions_with_the_wrong_lengths_go_from_all_arms():
    """Totals are ten per cent apart; two questions make the whole difference."""
    one = {f"q{index:02}": [40] for index in range(20)}
    other = {**one, "q03": [80], "q11": [80]}
    matched = match({"one": make_arm("one", one), "other": make_arm("other", other)}, 0)
    assert matched.questions == 18
    for arm in matched.selections.values():
        assert not {"q03", "q11"} & {t.question_id for t in arm.trajectories}
        assert arm.funnel[-1] == FunnelStep("length not matched", 18, 2)


def test_equal_totals_of_unlike_lengths_do_not_match():
    """One arm's lengths are all alike, half of the other's are much longer; the sums agree from the start."""
    one = {f"q{index:03}": [50] for index in range(200)}
    other = {f"q{index:03}": [20 if index % 2 else 80] for index in range(200)}
    with pytest.raises(AgentArkError, match="of their 200 common questions fewer than half"):
        match({"one": make_arm("one", one), "other": make_arm("other", other)}, 0)
    mixed = {**other, **{f"q{index:03}": [50] for index in range(100)}}
    matched = match({"one": make_arm("one", one), "other": make_arm("other", mixed)}, 0)
    assert 100 <= matched.questions < 200
    assert matched.lengths["other"].alike


def test_arms_without_a_common_question_are_an_error_with_totals():
    with pytest.raises(
        AgentArkError, match=r"no question.*a \(round1_only\): 1 trajectories of 1 questions, 90 tokens"
    ):
        match({"a": make_arm("a", {"q": [90]}), "b": make_arm("b", {"p": [50]})}, 0)
    with pytest.raises(AgentArkError, match="is empty, so nothing can be learned"):
        check_filled("a", make_arm("a", {}))


def test_a_generation_budget_is_kept_question_by_question():
    debated = [make_row("a", agent, round, ids=[1] * 5) for agent in range(2) for round in range(2)]
    samples = [make_row(question, 0, sample=sample, ids=[1] * 6) for question in "ab" for sample in range(5)]
    random.Random(0).shuffle(samples)
    kept = within_budget(samples, debated)
    assert [row.key for row in kept] == ["a.0.0.0", "a.0.0.1", "a.0.0.2"]  # 18 of 20 tokens; b was not debated
    samples = [make_row("a", sample=sample, ids=[1] * length) for sample, length in enumerate((15, 6, 5))]
    assert [row.key for row in within_budget(samples, debated)] == ["a.0.0.0"], "nothing after the one too many"


# Subsets


def test_subsets_are_nested_by_question():
    whole = make_selection([5] * 41)
    questions = [{t.question_id for t in subset(whole, f, 3).trajectories} for f in (0.05, 0.25, 0.5, 0.75, 1)]
    assert [len(chosen) for chosen in questions] == [1, 5, 10, 16, 21]
    for small, large in itertools.pairwise(questions):
        assert small <= large
    quarter = subset(whole, 0.25, 3)
    assert keys(quarter) == [t.turn_key for t in whole.trajectories if t.question_id in questions[1]], "all or none"
    assert (quarter.funnel[-1].kept, quarter.funnel[-1].dropped) == (
        len(quarter.trajectories),
        41 - len(quarter.trajectories),
    )
    assert keys(subset(whole, 0.25, 4)) != keys(quarter)
    assert keys(subset(whole, 1, 3)) == keys(whole)
    with pytest.raises(UsageError, match="fraction"):
        subset(whole, 0, 3)
    rows = random_rows(1)
    config = SelectionConfig(fraction=0.5, seed=3)
    whole = select(rows, SelectionConfig(), said(rows))
    assert values(select(rows, config, said(rows))) == values(subset(whole, 0.5, 3))


# The file


@pytest.mark.parametrize("seed", [None, 5])
def test_selection_file_round_trip(tmp_path, seed):
    rows = [] if seed is None else random_rows(seed)
    selection = choose("corrective_first", rows, per_question=2, limit=9)
    path = tmp_path / "new" / "selection.parquet"
    save_selection(selection, path)
    loaded = load_selection(path)
    assert values(loaded) == values(selection)
    for t in loaded.trajectories:
        assert (t.completion_ids.dtype, t.logprobs.dtype) == (np.int32, np.float32)
    assert [file.name for file in path.parent.iterdir()] == ["selection.parquet"]
    first = path.read_bytes()
    save_selection(loaded, path)
    assert path.read_bytes() == first


def test_a_selection_file_keeps_apart_what_was_sampled_and_what_was_text(tmp_path):
    rows = [make_row("a", ids=[3, 4], text_only=True), make_row("b", ids=[3, 4]), make_row("c", ids=[])]
    save_selection(choose("round1_only", rows, per_question=1), tmp_path / "s")
    text, sampled, empty = load_selection(tmp_path / "s").trajectories
    assert text.logprobs is None
    assert (text.completion_ids.tolist(), sampled.logprobs.tolist(), empty.logprobs.tolist()) == ([3, 4], [-3, -4], [])
    bare = [dataclasses.replace(rows[1], logprobs=None)]
    save_selection(choose("round1_only", bare, per_question=1), tmp_path / "b")
    table = pq.read_table(tmp_path / "b")
    forged = table.set_column(4, "logprobs", pa.array([[]], pa.list_(pa.float32())))
    pq.write_table(forged.cast(table.schema), tmp_path / "b")
    with pytest.raises(AgentArkError, match="not those that were written"):
        load_selection(tmp_path / "b")


def test_a_damaged_selection_file_is_never_believed(tmp_path):
    path = tmp_path / "selection.parquet"
    rows = random_rows(5)
    selection = choose("corrective_first", rows, per_question=2)
    save_selection(selection, path)
    content = path.read_bytes()
    damaged = [b"", b"text", content[:-1], content[: len(content) // 2]]
    for position in range(0, len(content), 37):
        damaged.append(content[:position] + bytes([content[position] ^ 0x55]) + content[position + 1 :])
    messages = []
    for change in damaged:
        path.write_bytes(change)
        try:
            loaded = load_selection(path)
        except AgentArkError as error:
            messages.append(str(error))
        else:
            assert values(loaded) == values(selection), "only bytes without meaning may differ"
    assert len(messages) > 10
    assert all("selection.parquet: damaged or no selection" in message for message in messages)
    with pytest.raises(AgentArkError, match=r"absent\.parquet: there is no selection"):
        load_selection(tmp_path / "absent.parquet")


def test_a_failed_save_leaves_the_old_file(tmp_path):
    path = tmp_path / "selection.parquet"
    save_selection(make_selection([3, 4]), path)
    broken = make_selection([3])
    broken = dataclasses.replace(broken, trajectories=(dataclasses.replace(broken.trajectories[0], agent="x"),))
    with pytest.raises(Exception, match="x"):
        save_selection(broken, path)
    assert len(load_selection(path).trajectories) == 2
    (tmp_path / "file").write_text("")
    with pytest.raises(AgentArkError, match="writable"):
        save_selection(make_selection([3]), tmp_path / "file" / "selection.parquet")
