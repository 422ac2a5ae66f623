"""The numbers behind a table or a plot as a CSV file inside the page."""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from agentark_jax.report.words import clean


@dataclass(frozen=True)
class Sheet:
    """A download: `name` without its ending, and the file as a link that holds it."""

    name: str
    link: str


def sheet(name: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> Sheet:
    """A download of `csv_text`."""
    return Sheet(name, link("text/csv", csv_text(columns, rows)))


def csv_text(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """`rows` under `columns`; what is None stays empty."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    return text.getvalue()


def of_records(name: str, records: Iterable[Mapping[str, Any]]) -> Sheet | None:
    """One row for each record, keys within keys with dots between; None without records.

    A list of plain values becomes one cell with spaces between; lists of anything else are left to `results.json`.
    """
    flat = [dict(_flat(record)) for record in records]
    columns = list(dict.fromkeys(key for row in flat for key in row))
    return sheet(name, columns, ([row.get(key) for key in columns] for row in flat)) if flat else None


def link(kind: str, text: str) -> str:
    """A `data:` address with `text` in it."""
    return f"data:{kind};charset=utf-8,{quote(clean(text))}"


def _flat(record: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in record.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        elif not isinstance(value, list | tuple):
            yield prefix + key, value
        elif not any(isinstance(item, Mapping | list | tuple) for item in value):
            yield prefix + key, " ".join(str(item) for item in value)
