"""What a debate did, from the `telemetry` of results.json, as tables and sentences that page and terminal share."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rich.table import Table
from rich.text import Text

from agentark_jax.report import words

_ROUNDS = (
    ("accuracy", "agents that are right"),
    ("majority", "debates whose vote is right"),
    ("oracle", "debates in which anybody is right"),
    ("gap", "the latter less the former"),
    ("distinct", "different answers"),
    ("entropy", "their entropy, nats"),
    ("unanimous", "unanimous debates"),
    ("unanimous_wrong", "unanimous and wrong"),
)
_DRIFTS = (
    ("none", "drift where nobody was right"),
    ("some", "drift where some were"),
    ("all", "drift where all were"),
)
_TRANSITIONS = (
    ("gained", "of the wrong: then right"),
    ("lost", "of the right: then wrong"),
    ("conformity", "against the peers' majority: moved to it"),
    ("to_right", "where it was right"),
    ("to_wrong", "where it was wrong"),
    ("vulnerability", "right, majority wrong: moved to it"),
    ("resistance", "right, majority wrong: still right"),
    ("independence", "peers tied: kept their answer"),
    ("adoption", "changed: to what a peer had said"),
)
_POINTS = {"single": "one agent", "vote": "vote of {agents}", "debate": "debate of {agents}, {rounds} rounds"}


@dataclass(frozen=True)
class Cell:
    """A figure, its interval and how many cases it is of; the latter two empty where there are none."""

    value: str
    interval: str = ""
    n: str = ""


@dataclass(frozen=True)
class Section:
    """A table: a name and a cell for each of `heads`, by row."""

    title: str
    heads: list[str]
    rows: list[tuple[str, list[Cell]]]


def sections(figures: Mapping[str, Any]) -> list[Section]:
    """The tables of a telemetry (`evaluation.telemetry`); shares in per cent, differences in points."""
    drifts = {each["from_round"]: each for each in figures["drift"]}
    steps = [step["from_round"] for step in figures["transitions"]]
    between = [
        ("drift: agents right after − before", [_cell(drifts.get(step)) for step in steps]),
        *((name, [_cell((drifts.get(step) or {"levels": {}})["levels"].get(key)) for step in steps])
          for key, name in _DRIFTS),
        *((name, [_cell(step[key]) for step in figures["transitions"]]) for key, name in _TRANSITIONS),
        ("peers heard", [Cell(words.number(step["peers_heard"], 2)) for step in figures["transitions"]]),
    ]  # fmt: skip
    points = [
        (
            point_name(point),
            [_cell(point), Cell(words.number(point["calls"], 1)), Cell(words.number(point["tokens"], 1))],
        )
        for point in figures["points"]
    ]
    by_round = [
        (name, [_cell(row[key], plain=key in ("distinct", "entropy")) for row in figures["rounds"]])
        for key, name in _ROUNDS
    ]
    return [
        Section("After each round", [f"round {row['round']}" for row in figures["rounds"]], by_round),
        Section("From round to round", [f"{step} to {step + 1}" for step in steps], between),
        Section("What accuracy costs", ["accuracy", "calls a question", "generated tokens"], points),
    ]


def point_name(point: Mapping[str, Any]) -> str:
    """Such as "vote of 3"."""
    return _POINTS[point["kind"]].format(agents=point["agents"], rounds=point["rounds"])


def sentences(figures: Mapping[str, Any]) -> list[str]:
    """The drift between rounds, the last vote over the first, what is lost, and who ends in the same error."""
    told = [
        _sentence(
            f"Round {each['to_round']} over round {each['from_round']}, per agent",
            each,
            {"none": "no drift shown", "up": "a drift up", "down": "a drift down"}[each["drift"]],
        )
        for each in figures["drift"]
    ]
    vote, gap, collapse = figures["over_vote"], figures["oracle_gap"], figures["collapse"]
    if vote is not None:
        verdict = {"null": "no gain or loss shown", "better": "a gain", "worse": "a loss"}[words.by_itself(vote)]
        told.append(_sentence("The last round's vote over the first round's", vote, verdict))
    if gap is not None:
        told.append(_sentence("Somebody was right in some round, over the last vote", gap))
    if collapse["n"]:
        ends = words.interval(collapse["low"], collapse["high"])
        told.append(
            f"Of {words.plural(collapse['n'], 'debate')} that disagreed after the first round "
            f"{words.percent(collapse['value'])} % {ends} ended unanimous and wrong."
        )
    return told


def tables(figures: Mapping[str, Any]) -> list[Table]:
    """The sections for a terminal."""
    shown = []
    for section in sections(figures):
        table = Table(title=section.title, title_justify="left")
        table.add_column("")
        for head in section.heads:
            table.add_column(head, justify="right")
        for name, cells in section.rows:
            texts = (f"{cell.value} {cell.interval} {cell.n and f'n {cell.n}'}" for cell in cells)
            table.add_row(name, *(Text(" ".join(text.split())) for text in texts))
        shown.append(table)
    return shown


def _cell(figure: Mapping[str, Any] | None, plain: bool = False) -> Cell:
    if figure is None or not figure["n"]:
        return Cell(words.NONE)
    count = words.number(figure["n"])
    if "difference" in figure:
        return Cell(words.points(figure["difference"]), words.interval(figure["low"], figure["high"], True), count)
    if plain:
        ends = [words.number(figure[end], 2) for end in ("low", "high")]
        return Cell(words.number(figure["value"], 2), f"[{', '.join(ends)}]" if words.NONE not in ends else "", count)
    return Cell(words.percent(figure["value"]), words.interval(figure["low"], figure["high"]), count)


def _sentence(name: str, figure: Mapping[str, Any], verdict: str = "") -> str:
    ends = words.interval(figure["low"], figure["high"], signed=True)
    text = f"{name}: {words.points(figure['difference'])} points {ends}, n = {words.number(figure['n'])}"
    smallest = figure["minimum_detectable"]
    if verdict.startswith("no ") and words.known(smallest):
        verdict += f" (smallest detectable: {words.percent(smallest)} points)"
    return f"{text}: {verdict}." if verdict else f"{text}."
