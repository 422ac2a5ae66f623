"""Pieces of Markdown in which nothing that was written by others is markup."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
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


def provenance(run: Mapping[str, Any]) -> list[str]:
    """A list of what results come from, of their `run`."""
    return [
        f"- command: {code(run['command'])}",
        f"- fingerprint: {code(run['fingerprint'])}",
        f"- git revision: {code(run['git']) if run.get('git') else 'not recorded'}",
        f"- seeds: {', '.join(str(seed) for seed in run['seeds'])}",
        f"- versions: {text(', '.join(f'{name} {version}' for name, version in sorted(run['versions'].items())))}",
    ]


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    """Lines of a table; columns whose names begin with `>` are aligned to the right."""
    heads = [column.removeprefix(">") for column in columns]
    marks = ["---:" if column.startswith(">") else "---" for column in columns]
    lines = ["| " + " | ".join(map(text, heads)) + " |", "|" + "|".join(marks) + "|"]
    return lines + ["| " + " | ".join(map(text, row)) + " |" for row in rows]
