"""Pieces of Markdown in which nothing that was written by others is markup."""

import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

from agentark_jax.report import words


def text(value: Any) -> str:
    """One line of Markdown in which nothing is markup."""
    line = " ".join(words.clean(value).split())
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", line)


def code(value: Any) -> str:
    """Inline code; a value with a backtick becomes a JSON string without one."""
    line = " ".join(words.clean(value).split())
    return f"`{line}`" if "`" not in line else f"`{json.dumps(line).replace('`', chr(92) + 'u0060')}`"


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    """Lines of a table; columns whose names begin with `>` are aligned to the right."""
    heads = [column.removeprefix(">") for column in columns]
    marks = ["---:" if column.startswith(">") else "---" for column in columns]
    lines = ["| " + " | ".join(map(text, heads)) + " |", "|" + "|".join(marks) + "|"]
    return lines + ["| " + " | ".join(map(text, row)) + " |" for row in rows]
