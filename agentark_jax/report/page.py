"""The HTML report: one file without any outside resource.

Model output is untrusted. Text reaches the page through Jinja's escaping or, for transcripts, as JSON that the page's
one script shows with `textContent`; a content security policy allows that script (by its hash) and nothing else.
"""

import base64
import csv
import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from agentark_jax.files import write_text
from agentark_jax.report import plots, telemetry, words
from agentark_jax.report.svg import Plot

_HERE = Path(__file__).parent
TRANSCRIPT_BYTES = 8_000_000  # of transcripts in the page, so that it stays below 10 MB and opens at once
_TABLE_ROWS = 200  # of a plot's numbers shown as a table; the download has all of them
_OPTIONAL: dict[str, Any] = {
    "differences": [],
    "debate": {},
    "telemetry": {},
    "training": {},
    "judges": {},
    "timing": {},
}
_TURN_KEYS = ("agent", "text", "answer", "verdict", "flip", "tokens")


def write_report(path: Path, results: Mapping[str, Any], transcripts: Sequence[Mapping[str, Any]]) -> None:
    """Writes the report of `results` (the content of results.json) and debate `transcripts` to `path`, atomically.

    The same input gives the same bytes. Transcripts beyond 8 MB are left out from the end, and the page says how many.
    Raises AgentArkError when `results` has another schema or lacks a required key, or `path` cannot be written.
    """
    write_text(path, render(results, transcripts))


def render(results: Mapping[str, Any], transcripts: Sequence[Mapping[str, Any]]) -> str:
    """The report as HTML text; see `write_report`."""
    words.check(results)
    environment = Environment(
        loader=FileSystemLoader(_HERE, encoding="utf-8"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: value if isinstance(value, Markup) or not isinstance(value, str) else words.clean(value),
    )
    environment.globals |= {"w": words}
    script = (_HERE / "script.html.j2").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    data, shown = transcript_json(results, transcripts)
    return environment.get_template("report.html.j2").render(
        results=_OPTIONAL | dict(results),
        style=Markup((_HERE / "style.html.j2").read_text(encoding="utf-8")),
        script=Markup(script),
        script_hash=digest,
        transcripts=Markup(data),
        shown=shown,
        total=len(transcripts),
        results_link=_link("application/json", json.dumps(results, indent=1, ensure_ascii=False, sort_keys=True)),
        scale=_difference_scale(results.get("differences") or []),
        funnels=[_funnel(results, name, filters) for name, filters in (results.get("counts") or {}).items()],
        flips=[_flip_matrix(entry) for entry in (results.get("debate") or {}).get("flips") or []],
        told=_telemetry(results),
        seeds=_per_seed(results),
        **_plots(results),
    )


def _plots(results: Mapping[str, Any]) -> dict[str, Any]:
    def shown(plot: Plot | None) -> dict[str, Any] | None:
        if plot is None:
            return None
        return {
            "plot": plot,
            "wide": Markup(plot.wide),
            "narrow": Markup(plot.narrow),
            "rows": plot.rows[:_TABLE_ROWS],
            "link": _link("text/csv", _csv(plot)),
        }

    curves = (plots.curve(data, index) for index, data in enumerate((results.get("curves") or {}).values()))
    return {
        "tokens_plot": shown(plots.accuracy_tokens(results["arms"])),
        "rounds_plot": shown(plots.rounds(results.get("debate") or {})),
        "cost_plot": shown(plots.debate_tokens(results.get("telemetry") or {})),
        "loss_plot": shown(plots.losses(results.get("training") or {}, results["arms"])),
        "rollout_plot": shown(plots.rollouts(results.get("training") or {}, results["arms"])),
        "curve_plots": [shown(plot) for plot in curves if plot is not None],
    }


def _csv(plot: Plot) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(plot.columns)
    writer.writerows(plot.rows)
    return text.getvalue()


def _link(kind: str, text: str) -> str:
    return f"data:{kind};charset=utf-8,{quote(words.clean(text))}"


def transcript_json(results: Mapping[str, Any], transcripts: Sequence[Mapping[str, Any]]) -> tuple[str, int]:
    """(JSON that is inert inside a script element, number of transcripts in it); at most `TRANSCRIPT_BYTES` long."""
    labels = {arm: words.arm_label(results, arm) for arm in results["arms"]}
    head, tail = f'{{"arms":{_inert(labels)},"items":[', "]}"
    used, items = len(head.encode()) + len(tail), []
    for transcript in transcripts:
        item = _inert(_compact(transcript))
        used += len(item.encode()) + 1
        if used > TRANSCRIPT_BYTES:
            break
        items.append(item)
    return head + ",".join(items) + tail, len(items)


def _compact(transcript: Mapping[str, Any]) -> dict[str, Any]:
    """A transcript with turns as lists in the order of `_TURN_KEYS`, which halves the overhead of short turns."""
    item = {key: value for key, value in transcript.items() if key != "rounds"}
    return item | {"rounds": [[[turn[key] for key in _TURN_KEYS] for turn in turns] for turns in transcript["rounds"]]}


def _inert(value: Any) -> str:
    """Compact JSON that no HTML parser can leave: <, > and & are written as JSON escapes."""
    text = words.clean(json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"), sort_keys=True))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _difference_scale(differences: Sequence[Mapping[str, Any]]) -> float:
    """Half the width of the differences' common axis, in tenths: the largest end of an interval, rounded up."""
    ends = [abs(item[key]) for item in differences for key in ("low", "high") if words.known(item.get(key))]
    return min(1.0, max(1, -(-max(ends, default=0.1) * 10 // 1)) / 10)


def _funnel(results: Mapping[str, Any], name: str, filters: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Filters with what came in, was kept and was dropped, and the kept share of the funnel's first input."""
    rows = [
        {
            **row,
            "input": row["kept"] + row["dropped"],
            "interval": words.wilson(row["kept"], row["kept"] + row["dropped"]),
        }
        for row in filters
    ]
    first = max((row["input"] for row in rows), default=0) or 1
    return {
        "name": words.arm_label(results, name).replace("_", " "),
        "rows": [{**row, "share": row["kept"] / first} for row in rows],
    }


def _flip_matrix(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Two rows (was right, was wrong), each with its transitions, their share and Wilson interval."""
    rows = []
    for before in ("right", "wrong"):
        counts = {after: entry.get(f"{before}→{after}", 0) for after in ("right", "wrong")}
        total = sum(counts.values())
        cells = [
            {
                "after": after,
                "count": count,
                "share": count / total if total else None,
                "interval": words.wilson(count, total) if total else None,
            }
            for after, count in counts.items()
        ]
        rows.append({"before": before, "total": total, "cells": cells})
    return {"from": entry["from_round"], "to": entry["to_round"], "rows": rows}


def _telemetry(results: Mapping[str, Any]) -> dict[str, Any]:
    figures = results.get("telemetry")
    if not figures:
        return {"sections": [], "sentences": []}
    # The plot has what accuracy costs.
    return {"sections": telemetry.sections(figures)[:2], "sentences": telemetry.sentences(figures)}


def _per_seed(results: Mapping[str, Any]) -> dict[str, Any] | None:
    seeds = results.get("per_seed") or []
    if len(seeds) < 2:
        return None
    rows = []
    for arm in results["arms"]:
        values = [entry["arms"].get(arm) for entry in seeds]
        present = [value for value in values if words.known(value)]
        if present:
            mean = sum(present) / len(present)
            rows.append({"label": words.arm_label(results, arm), "values": values, "mean": mean,
                         "low": min(present), "high": max(present), "n": len(present)})  # fmt: skip
    return {"seeds": [entry["seed"] for entry in seeds], "rows": rows}
