"""Figures as cells of a table in a terminal."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from agentark_jax.report import words

Figure = Mapping[str, Any] | None


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """The first column to the left, which may be long, the others to the right."""
    made = Table(title=title, title_justify="left", box=box.SIMPLE, pad_edge=False)
    for place, column in enumerate(columns):
        made.add_column(column, justify="right" if place else "left", overflow="fold")
    for row in rows:
        made.add_row(*(Text(words.clean(cell)) for cell in row))
    return made


def percent(figure: Figure) -> str:
    """A share with its interval, in per cent."""
    if figure is None:
        return words.NONE
    return f"{words.percent(figure['value'])} {words.interval(figure['low'], figure['high'])}".strip()


def points(figure: Figure) -> str:
    """A difference of shares with its interval, in percentage points."""
    if figure is None:
        return words.NONE
    return f"{words.points(figure['value'])} {words.interval(figure['low'], figure['high'], signed=True)}".strip()


def number(figure: Figure, digits: int = 3) -> str:
    """Any other number with its interval."""
    if figure is None:
        return words.NONE
    shown = [words.number(figure[key], digits) for key in ("value", "low", "high")]
    return shown[0] if figure["low"] is None else f"{shown[0]} [{shown[1]}, {shown[2]}]"


def count(figure: Figure) -> str:
    """Of how many rows a figure is."""
    return words.NONE if figure is None else words.number(figure["n"])
