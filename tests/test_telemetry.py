"""What a debate did: figures counted by hand, by a slow reading of tables, and on debates that drift or do not."""

import gc
import json
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from real_server import make_model
from scipy import stats
from test_exchange import make_store
from test_labels import make_row
from test_report import Page, full_results
from test_store import QUESTION, make_turn
from test_traces_cli import cells, run

from agentark_jax.errors import AgentArkError
from agentark_jax.evaluation.statistics import bootstrap_interval, paired_difference, wilson_interval
from agentark_jax.evaluation.telemetry import drifts, moves, telemetry
from agentark_jax.records import JUDGE, Label
from agentark_jax.report import plots
from agentark_jax.report.page import render
from agentark_jax.report.telemetry import sections, sentences
from agentark_jax.traces.labels import labelled_turns
from agentark_jax.traces.store import TraceStore

TRANSCRIPTS = Path(__file__).parents[1] / ".." / "shared" / "data" / "debate_medmcqa"

# Answers of agents 0, 1, 2 by round; R is right, V and W are wrong, ? cannot be read, a dot is a call that failed.
TABLE = {
    "a": ("RWW", "WWW"),
    "b": ("RRW", "RRR"),
    "c": ("RVW", "RRW"),
    "d": ("WW?", "WWW"),
    "e": ("RWW", "RVW"),
}


def held(table, **changes) -> tuple[list, dict]:
    """Rows and parents of full debates: all, the agent itself first, hear the last answers of all."""
    rows, parents = [], {}
    for question, rounds in table.items():
        said = {}
        for round, answers in enumerate(rounds):
            last = dict(said)
            for agent, answer in enumerate(answers):
                if answer == ".":
                    continue
                verdict = {"R": "right", "?": "unparseable"}.get(answer, "wrong")
                row = make_row(question, agent, round, verdict, answer)
                row = replace(row, tokens=10 * (round + 1) + agent, **changes)
                parents[row.key] = sorted(last.values(), key=lambda key: key != last.get(agent))
                said[agent] = row.key
                rows.append(row)
    return rows, parents


def of(table, *, level=0.95, **changes) -> dict:
    return telemetry([held(table, **changes)], level=level)


def fraction(figure) -> tuple[int, int]:
    return round(figure["value"] * figure["n"]), figure["n"]


def fraction_or_none(figure) -> tuple[int, int] | None:
    return None if figure["value"] is None else fraction(figure)


def test_every_figure_of_five_debates_by_hand():
    found = of(TABLE)
    assert [found[key] for key in ("questions", "debates", "agents", "turns")] == [5, 5, 3, 30]
    first, second = found["rounds"]
    assert [fraction(first[key]) for key in ("accuracy", "majority", "oracle", "unanimous", "unanimous_wrong")] == [
        (5, 15),
        (2, 5),  # b, and c, where the first of three answers wins
        (4, 5),  # all but d
        (0, 5),  # not d, of which one cannot be read
        (0, 5),
    ]
    assert [fraction(second[key]) for key in ("accuracy", "majority", "oracle", "unanimous", "unanimous_wrong")] == [
        (6, 15),
        (3, 5),  # b, c, and e by its first answer
        (3, 5),
        (3, 5),  # a, b, d
        (2, 5),  # a, d
    ]
    assert (first["gap"]["difference"], second["gap"]["difference"]) == (2 / 5, 0)
    assert (first["distinct"]["value"], second["distinct"]["value"]) == (
        (2 + 2 + 3 + 1 + 2) / 5,
        (1 + 1 + 2 + 1 + 3) / 5,
    )
    split = math.log(3) - 2 / 3 * math.log(2)  # of two against one
    assert first["entropy"]["value"] == pytest.approx((3 * split + math.log(3) + 0) / 5)
    assert second["entropy"]["value"] == pytest.approx((split + math.log(3)) / 5)

    (step,) = found["transitions"]
    assert (step["from_round"], step["to_round"], step["peers_heard"]) == (1, 2, 2.0)
    assert step["flips"] == {"right→right": 4, "wrong→right": 2, "right→wrong": 1, "wrong→wrong": 8}
    expected = {
        "gained": (2, 10),  # b2, c1
        "lost": (1, 5),  # a0
        "conformity": (2, 3),  # a0 and b2 of a0, b2, e0: all others hear a tie, or their own answer
        "to_right": (1, 1),  # b2
        "to_wrong": (1, 2),  # a0 of a0, e0
        "vulnerability": (1, 2),  # a0
        "resistance": (1, 2),  # e0
        "independence": (7, 9),  # a1 a2 b0 b1 c0 c2 e2, but not c1, e1
        "adoption": (3, 4),  # a0, b2, c1; V was nobody's before e1; d2 had no answer to change
    }
    assert {key: fraction(step[key]) for key in expected} == expected

    (drift,) = found["drift"]
    assert drift["difference"] == pytest.approx(1 / 15)
    test = stats.ttest_1samp([-1 / 3, 1 / 3, 1 / 3, 0, 0], 0)  # a, b, c, d, e
    assert drift["p_value"] == pytest.approx(test.pvalue)
    assert (drift["low"], drift["high"]) == pytest.approx(test.confidence_interval(0.95))
    assert (drift["n"], drift["questions"], drift["drift"]) == (15, 5, "none")
    assert drift["levels"]["none"]["difference"] == 0
    assert drift["levels"]["none"]["n"] == 3  # d
    assert drift["levels"]["some"]["difference"] == pytest.approx(1 / 12)
    assert drift["levels"]["all"] is None
    assert found["over_vote"]["difference"] == pytest.approx(1 / 5)
    assert found["oracle_gap"]["difference"] == pytest.approx(4 / 5 - 3 / 5)
    assert fraction(found["collapse"]) == (1, 4)  # a; d did not disagree

    points = [
        (point["kind"], point["agents"], point["rounds"], point["calls"], point["tokens"], *fraction(point))
        for point in found["points"]
    ]
    assert points == [
        ("single", 1, 1, 1, 10, 4, 5),
        ("vote", 2, 1, 2, 10 + 11, 4, 5),
        ("vote", 3, 1, 3, 10 + 11 + 12, 2, 5),
        ("debate", 3, 2, 6, 33 + 20 + 21 + 22, 3, 5),
    ]


def test_intervals_are_clustered_by_question():
    """Two debates of each question: whole questions count, in the intervals as in the drift."""
    one, other = held(TABLE), held({key: rounds[::-1] for key, rounds in TABLE.items()}, sample=1)
    rows = [replace(row, key=f"{row.sample}{row.key}") for row in (*one[0], *other[0])]
    parents = {
        f"{sample}{key}": [f"{sample}{each}" for each in keys]
        for sample, (_, shown) in enumerate((one, other))
        for key, keys in shown.items()
    }
    found = telemetry([(rows, parents)], level=0.9)
    assert (found["questions"], found["debates"], found["turns"]) == (5, 10, 60)
    questions = np.asarray([question for question in TABLE for _ in range(6)])
    before = np.asarray([answer == "R" for first, second in TABLE.values() for answer in first + second])
    after = np.asarray([answer == "R" for first, second in TABLE.values() for answer in second + first])
    low, high = wilson_interval(before, questions, level=0.9)
    accuracy = found["rounds"][0]["accuracy"]
    assert (accuracy["low"], accuracy["high"], accuracy["n"], accuracy["questions"]) == (low, high, 30, 5)
    assert (low, high) != wilson_interval(before, level=0.9)
    drift = found["drift"][0]
    changes = [np.mean(after[questions == each].astype(float) - before[questions == each]) for each in TABLE]
    assert not any(changes), "forth and back"
    assert (drift["difference"], drift["n"], drift["questions"]) == (0, 30, 5)
    expected = paired_difference(after, before, questions, level=0.9)
    assert (drift["low"], drift["high"], drift["p_value"]) == (expected.low, expected.high, 1)
    some = drift["levels"]["some"]
    rows_of = np.asarray([0 < rounds.count("R") < 3 for each in TABLE.values() for rounds in each for _ in range(3)])
    expected = paired_difference(after[rows_of], before[rows_of], questions[rows_of], level=0.9)
    assert (some["low"], some["high"], some["n"]) == (expected.low, expected.high, rows_of.sum())
    distinct = np.asarray([2, 1, 2, 1, 3, 2, 1, 1, 2, 3], float)
    interval = bootstrap_interval(
        lambda drawn, x: drawn @ x / drawn.sum(1), distinct, clusters=np.repeat(list(TABLE), 2), level=0.9
    )
    assert (found["rounds"][0]["distinct"]["low"], found["rounds"][0]["distinct"]["high"]) == interval


def test_seeds_are_counted_together_and_kept_apart():
    """Turns of two seeds may have the same place, and even the same key: each hears its own peers."""
    one, other = held(TABLE), held({"a": ("RRR", "VVV")})
    found = telemetry([one, other])
    assert (found["questions"], found["debates"], found["turns"]) == (5, 6, 36)
    assert fraction(found["transitions"][0]["lost"]) == (4, 8)
    assert found["drift"][0]["levels"]["all"]["difference"] == -1
    assert fraction(found["transitions"][0]["adoption"]) == (3, 7)


def test_each_round_is_told_by_itself():
    found = of({"a": ("WWR", "WWW", "RRR"), "b": ("WWR", "WRR", "RRR")})
    assert [(step["from_round"], step["to_round"]) for step in found["transitions"]] == [(1, 2), (2, 3)]
    assert [fraction(step["gained"]) for step in found["transitions"]] == [(1, 4), (4, 4)]
    assert [fraction(step["lost"]) for step in found["transitions"]] == [(1, 2), (0, 2)]
    # a2 gave way, b2 did not; then b0 alone hears a majority that is not its own answer.
    assert [fraction(step["conformity"]) for step in found["transitions"]] == [(1, 2), (1, 1)]
    assert [fraction_or_none(step["vulnerability"]) for step in found["transitions"]] == [(1, 2), None]
    assert [fraction(row["accuracy"]) for row in found["rounds"]] == [(2, 6), (2, 6), (6, 6)]
    assert [each["difference"] for each in found["drift"]] == [0, pytest.approx(4 / 6)]
    assert [each["p_holm"] for each in found["drift"]] == [1, pytest.approx(min(1, 2 * found["drift"][1]["p_value"]))]
    assert [each["levels"]["none"] and each["levels"]["none"]["n"] for each in found["drift"]] == [None, 3]
    assert found["over_vote"]["difference"] == 1
    assert [point["tokens"] for point in found["points"]] == [10, 21, 33, 33 + 63, 33 + 63 + 93]


def test_a_failed_call_leaves_the_last_answer_standing():
    """In the vote and in accuracy; but nobody moved, and silence in the first round is no answer."""
    found = of({"a": ("RW.", "R.R", "RRR")})
    assert [fraction(row["accuracy"]) for row in found["rounds"]] == [(1, 2), (2, 3), (3, 3)]
    assert [fraction(row["majority"]) for row in found["rounds"]] == [(1, 1)] * 3
    assert [sum(step["flips"].values()) for step in found["transitions"]] == [1, 2]
    assert [step["peers_heard"] for step in found["transitions"]] == [1, 2]
    assert [point["calls"] for point in found["points"]] == [1, 2, 2, 4, 7]
    # In the third round agent 1 is heard by what it last said, in the first, so that both others hear a tie.
    assert fraction(found["transitions"][1]["independence"]) == (2, 2)


def test_a_debate_that_ended_early_stands():
    found = of({"a": ("RR",), "b": ("WR", "WW", "RR")})
    assert [fraction(row["majority"]) for row in found["rounds"]] == [(1, 2), (1, 2), (2, 2)]
    assert [fraction(row["accuracy"]) for row in found["rounds"]] == [(3, 4), (2, 4), (4, 4)]
    assert [each["n"] for each in found["drift"]] == [2, 2], "a moved nowhere"
    assert [point["calls"] for point in found["points"]] == [1, 2, 3, 4]


def test_whom_an_agent_heard_is_read_from_its_prompt():
    """In a star the others hear agent 0 alone; an answer of their own, or one to another question, is no peer's."""
    rows, parents = held({"a": ("WRR", "WWW"), "b": ("RRR", "RRR")})
    for key in parents:
        if ".1." in key and key[0] == "a" and ".0.0" not in key.removeprefix("a.debate.1"):
            parents[key] = [key.replace(".1.", ".0."), "a.debate.0.0.0", "b.debate.0.0.0", "nobody's"]
    found = {move.after.key: [peer.key for peer in move.peers] for move in moves(rows, parents)}
    assert found["a.debate.1.1.0"] == found["a.debate.1.2.0"] == ["a.debate.0.0.0"]
    assert found["a.debate.1.0.0"] == ["a.debate.0.1.0", "a.debate.0.2.0"]
    (step,) = telemetry([(rows, parents)])["transitions"]
    assert step["peers_heard"] == (2 + 1 + 1 + 3 * 2) / 6
    assert fraction(step["vulnerability"]) == (2, 2)
    assert fraction(step["conformity"]) == (2, 3)  # agent 0 stayed wrong
    assert fraction_or_none(step["independence"]) is None


def test_nobody_hears_anybody():
    rows, _ = held(TABLE)
    for parents in ({}, {row.key: [row.key.replace(".1.", ".0.")] for row in rows if row.round == 1}):
        (step,) = telemetry([(rows, parents)])["transitions"]
        assert step["peers_heard"] == 0
        for key in ("conformity", "to_right", "to_wrong", "vulnerability", "resistance", "independence"):
            assert step[key] == {"value": None, "low": None, "high": None, "n": 0, "questions": 0}
        assert fraction(step["adoption"]) == (0, 4)
        assert fraction(step["gained"]) == (2, 10)


def test_what_is_not_defined_is_none():
    nothing = telemetry([([], {})])
    assert [nothing[key] for key in ("questions", "rounds", "transitions", "drift", "points")] == [0, [], [], [], []]
    assert nothing["over_vote"] is nothing["oracle_gap"] is nothing["collapse"]["value"] is None
    alone = of({"a": ("R",)})
    assert alone["over_vote"] is None
    assert alone["drift"] == []
    assert alone["rounds"][0]["unanimous"]["value"] is alone["rounds"][0]["unanimous_wrong"]["value"] is None
    assert alone["rounds"][0]["distinct"] == {"value": 1, "low": None, "high": None, "n": 1, "questions": 1}
    assert [point["kind"] for point in alone["points"]] == ["single"]
    silent = of({"a": ("??", "??")})
    assert silent["rounds"][0]["distinct"]["value"] == 0
    assert silent["rounds"][0]["entropy"]["value"] is None
    assert fraction(silent["rounds"][0]["unanimous"]) == (0, 1)
    assert silent["transitions"][0]["lost"]["value"] is silent["transitions"][0]["adoption"]["value"] is None
    for figures in (nothing, alone, silent):
        json.dumps(figures, allow_nan=False)
        assert all(isinstance(text, str) for text in sentences(figures))
        assert len(sections(figures)) == 3


def test_only_debaters_count_and_only_of_one_debate():
    rows, parents = held(TABLE)
    judge = replace(make_row("a", 3, 2, "right", "R"), role=JUDGE)
    assert telemetry([([*rows, judge], parents)]) == telemetry([(rows, parents)]) == telemetry([(rows[::-1], parents)])
    with pytest.raises(AgentArkError, match="are both round"):
        telemetry([([*rows, replace(rows[0], key="twice")], parents)])


# A slow reading, written anew


@st.composite
def tables(draw) -> dict[str, tuple[str, ...]]:
    agents, rounds = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    round = st.text("RRVW?.", min_size=agents, max_size=agents)
    return {f"q{q}": tuple(draw(round) for _ in range(rounds)) for q in range(draw(st.integers(1, 4)))}


def slowly(table: dict[str, tuple[str, ...]], shown: dict[tuple[str, int, int], list[tuple[str, int, int]]]) -> dict:
    """Counts by cell of the table; `shown`: what (question, agent, round) was shown, as such cells."""
    told: Counter[tuple] = Counter()

    def cell(q: str, a: int, r: int) -> str:
        return table[q][r][a]

    def count(name: str, r: int, yes: bool) -> None:
        told[name, r, "n"] += 1
        told[name, r, "yes"] += yes

    rounds = max(len(each) for each in table.values())
    last = max((r for each in table.values() for r, said in enumerate(each) if set(said) != {"."}), default=-1)
    for said in table.values():
        for r in range(min(rounds, last + 1)):
            stand = ""
            for a in range(len(said[0])):
                heard = [said[x][a] for x in range(min(r, len(said) - 1) + 1) if said[x][a] != "."]
                stand += heard[-1] if heard else ""
            if not any(letter != "." for letters in said for letter in letters):
                continue
            for letter in stand:
                count("accuracy", r, letter == "R")
            read = stand.replace("?", "")
            winner = max(read, key=lambda letter: (read.count(letter), -read.index(letter)), default="")
            count("majority", r, winner == "R")
            count("oracle", r, "R" in stand)
            told["distinct", r] += len(set(read))
            if len(stand) > 1:
                count("unanimous", r, len(set(stand)) == 1 and bool(read))
                count("unanimous_wrong", r, len(set(stand)) == 1 and bool(read) and "R" not in stand)
    for (q, a, r), seen in shown.items():
        if r == 0 or cell(q, a, r) == "." or cell(q, a, r - 1) == ".":
            continue
        old, new = cell(q, a, r - 1), cell(q, a, r)
        peers = [cell(*place) for place in seen if place[0] == q and place[1] != a]
        count("lost" if old == "R" else "gained", r, (new == "R") != (old == "R"))
        told["drift", r, q] += (new == "R") - (old == "R")
        told["moves", r, q] += 1
        told["peers", r] += len(peers)
        votes = Counter(peer for peer in peers if peer != "?")
        best = [letter for letter, n in votes.items() if n == max(votes.values())]
        if old == "?":
            continue
        if len(best) > 1:
            count("independence", r, new == old)
        if len(best) == 1 and best[0] != old:
            count("conformity", r, new == best[0])
            count("to_right" if best[0] == "R" else "to_wrong", r, new == best[0])
            if old == "R":
                count("vulnerability", r, new == best[0])
                count("resistance", r, new == "R")
        if new not in ("?", old):
            count("adoption", r, new in peers)
    return told


def assert_as_slowly(found: dict, told: dict) -> None:
    for r, row in enumerate(found["rounds"]):
        for key in ("accuracy", "majority", "oracle", "unanimous", "unanimous_wrong"):
            assert fraction_or_none(row[key]) == (
                (told[key, r, "yes"], told[key, r, "n"]) if told[key, r, "n"] else None
            )
        assert row["distinct"]["value"] * row["distinct"]["n"] == pytest.approx(told["distinct", r])
    drift_of = {each["from_round"]: each for each in found["drift"]}
    for step in found["transitions"]:
        r = step["from_round"]
        moved = sum(step["flips"].values())
        assert moved == told["gained", r, "n"] + told["lost", r, "n"]
        assert step["peers_heard"] * moved == pytest.approx(told["peers", r])
        by_question = [told["drift", r, key[2]] / n for key, n in told.items() if key[:2] == ("moves", r)]
        assert drift_of[r]["difference"] == pytest.approx(np.mean(by_question))
        for key in set(step) - {"from_round", "to_round", "flips", "peers_heard"}:
            n = told[key, r, "n"]
            assert fraction_or_none(step[key]) == ((told[key, r, "yes"], n) if n else None), key
    assert {key[1] for key in told if key[0] in ("gained", "lost")} == set(drift_of)


@settings(max_examples=25, deadline=None)
@given(tables(), st.randoms(use_true_random=False))
def test_figures_equal_a_slow_reading(table, random):
    cells_ = [
        (q, a, r) for q, said in table.items() for r, each in enumerate(said) for a, x in enumerate(each) if x != "."
    ]
    shown = {
        (q, a, r): [place for place in cells_ if place[2] == r - 1 and random.random() < 0.7] for q, a, r in cells_
    }
    rows, _ = held(table)
    parents = {
        f"{q}.debate.{r}.{a}.0": [f"{x}.debate.{z}.{y}.0" for x, y, z in seen] for (q, a, r), seen in shown.items()
    }
    assert_as_slowly(telemetry([(rows, parents)]), slowly(table, shown))


# Drift


@pytest.fixture(autouse=True, scope="module")
def _few_to_collect():
    """Holm's correction collects garbage at every call, among all that was ever imported."""
    gc.freeze()
    yield
    gc.unfreeze()


def simulated(seed: int, copies: bool, questions: int = 40, agents: int = 3) -> tuple[list, dict]:
    """Debates on questions of all difficulties; then each agent says what one of them said, or some wrong are right."""
    random = np.random.default_rng(seed)
    first = random.random((questions, agents)) < random.beta(1, 1, (questions, 1))
    if copies:
        second = np.take_along_axis(first, random.integers(0, agents, (questions, agents)), 1)
    else:
        second = first | (random.random((questions, agents)) < 0.3)
    letters = np.where(np.stack([first, second], 1), "R", "W")
    return held({f"q{index}": tuple("".join(answers) for answers in each) for index, each in enumerate(letters)})


def test_a_martingale_has_no_drift_and_a_planted_drift_is_found():
    told = [drifts(moves(*simulated(seed, copies=True)))[0] for seed in range(100)]
    alarms = sum(each["drift"] != "none" for each in told)
    assert 1 <= alarms <= 10  # of 100, of which 5 are to be expected
    assert abs(np.mean([each["difference"] for each in told])) < 0.01
    assert all(each["levels"]["none"]["difference"] == each["levels"]["all"]["difference"] == 0 for each in told)
    for seed in range(5):
        rows, parents = simulated(seed, copies=False)
        (up,) = drifts(moves(rows, parents))
        assert up["drift"] == "up"
        assert 0.05 < up["difference"] < 0.3
        mirrored = [replace(row, verdict="wrong" if row.right else "right") for row in rows]
        (down,) = drifts(moves(mirrored, parents))
        assert (down["drift"], down["difference"]) == ("down", pytest.approx(-up["difference"]))


# What is shown


def test_sentences_say_whether_there_is_a_drift():
    none, vote, oracle, collapse = sentences(of(TABLE))
    assert none.startswith("Round 2 over round 1, per agent: +6.7 points [")
    assert ", n = 15: no drift shown" in none
    assert vote.startswith("The last round's vote over the first round's: +20.0 points [")
    assert "no gain or loss shown" in vote
    assert oracle.startswith("Somebody was right in some round, over the last vote: +20.0 points [")
    assert collapse.startswith("Of 4 debates that disagreed after the first round 25.0 % [")
    up = sentences(telemetry([simulated(0, copies=False)]))[0]
    assert up.endswith(": a drift up.")


def test_the_report_shows_them_and_does_without():
    results = full_results() | {"telemetry": of(TABLE)}
    shown = Page(render(results, [])).words
    for wanted in ("no drift shown", "peers tied: kept their answer 77.8", "n 9", "What a round buys"):
        assert wanted in shown
    assert "None" not in shown
    plot = plots.debate_tokens(results["telemetry"])
    assert [row[:3] for row in plot.rows] == [
        ("one agent", 10, 0.8),
        ("vote of 2", 21, 0.8),
        ("vote of 3", 33, 0.4),
        ("debate of 3, 2 rounds", 96, 0.6),
    ]
    one_round = Page(render(full_results() | {"telemetry": of({"a": ("RW",), "b": ("R?",)})}, [])).words
    assert "After each round" in one_round
    assert "From round to round" not in one_round
    assert plots.debate_tokens({}) is None
    assert "What a round buys" not in Page(render(full_results(), [])).words


@pytest.fixture
def store(tmp_path) -> Path:
    """Three agents on one question: the right one gives way to a wrong majority of its peers."""
    first = [make_turn(agent=agent) for agent in range(3)]
    keys = tuple(turn.key for turn in first)
    second = [make_turn(agent=agent, round=1, parents=keys) for agent in range(3)]
    labels = [Label(turn.key, "g-1", "right" if turn is first[0] else "wrong", "W") for turn in (*first, *second)]
    labels[0] = replace(labels[0], answer="R")
    failed = make_turn(agent=3, error="slow")
    other = make_turn(agent=0, protocol="vote")
    return make_store(tmp_path / "traces.sqlite", [*first, *second, failed, other], labels)


def test_the_command_tells_a_store(store, capsys):
    code, out, _ = run(capsys, "telemetry", store.parent, "--grader", "g", "--json", store.parent / "told.json")
    assert code == 0
    assert "g-1: 1 debates of 1 questions, 6 turns" in out
    shown = {row[0]: row[1:] for row in cells(out)}
    assert shown["right, majority wrong: moved to it"][0].startswith("100.0 [")
    assert shown["right, majority wrong: moved to it"][0].endswith("] n 1")
    assert shown["peers heard"] == ["2.00"]
    assert shown["peers tied: kept their answer"][0].startswith("100.0 [")
    assert shown["debate of 3, 2 rounds"][1:] == ["6.0", "24.0"]
    assert "no drift shown" in out
    told = json.loads((store.parent / "told.json").read_text())
    assert told["grader"] == "g-1"
    assert told["transitions"][0]["vulnerability"]["value"] == 1
    code, _, err = run(capsys, "telemetry", store, "--grader", "numeric")
    assert code == 1
    assert "has no label of grader" in err
    with TraceStore(store.parent / "empty.sqlite") as empty:
        empty.put_question(QUESTION)
        empty.record_many([make_turn(agent=0, protocol="vote")])
    code, _, err = run(capsys, "telemetry", store.parent / "empty.sqlite", "--grader", "numeric")
    assert code == 2
    assert "no debate is in it" in err


def test_parents_are_those_of_answers(store):
    with TraceStore(store, read_only=True) as opened:
        keys = [make_turn(agent=agent).key for agent in range(3)]
        answered = make_turn(agent=1, round=1, parents=tuple(keys)).key
        asked = [answered, keys[0], make_turn(agent=3).key, "f" * 24]
        assert opened.parents(asked) == {answered: tuple(keys), keys[0]: ()}


def test_debates_of_others_are_told(tmp_path, capsys):
    path = TRANSCRIPTS / "gpt-4o_multipersona.jsonl.gz"
    if not path.is_file():
        pytest.skip("debate_medmcqa is not here")
    out = tmp_path / "out.sqlite"
    columns = ("--answer", "answer_idx", "--choices", "options.A,options.B,options.C,options.D")
    model = ("--model", "gpt-4o", "--tokenizer", make_model(tmp_path / "model", 0))
    assert run(capsys, "import", path, out, *model, "--rounds", "raw_responses", *columns)[0] == 0
    assert run(capsys, "label", out, "--grader", "choice")[0] == 0
    code, shown, _ = run(capsys, "telemetry", out, "--grader", "choice", "--json", tmp_path / "told.json")
    assert code == 0
    assert "100 debates of 100 questions, 600 turns" in shown
    told = json.loads((tmp_path / "told.json").read_text())
    with TraceStore(out, read_only=True) as store:
        rows = labelled_turns(store, told["grader"])
        said = {row.key: row for row in rows}
        shown = {
            (row.question_id, row.agent, row.round): [
                (said[key].question_id, said[key].agent, said[key].round) for key in keys
            ]
            for row, keys in ((said[key], keys) for key, keys in store.parents(said).items())
        }
    letters = {(row.question_id, row.agent, row.round): row for row in rows}
    names = {"right": lambda _: "R", "unparseable": lambda _: "?", "wrong": lambda answer: answer.lower()}
    table = {
        question: tuple(
            "".join(
                names[row.verdict](row.answer) if (row := letters.get((question, agent, round))) else "."
                for agent in range(told["agents"])
            )
            for round in range(len(told["rounds"]))
        )
        for question in {row.question_id for row in rows}
    }
    assert_as_slowly(told, slowly(table, shown))
