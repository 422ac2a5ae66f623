"""The HTML report: one file without any outside resource.

Model output is untrusted. Text reaches the page through Jinja's escaping or, for transcripts, as JSON that the page's
one script shows with `textContent`; a content security policy allows that script (by its hash) and nothing else.
"""

import base64
import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from agentark_jax.files import write_text
from agentark_jax.report import plots, telemetry, transcripts, words
from agentark_jax.report.attribution import attribution, scale
from agentark_jax.report.sheets import link, of_records, sheet
from agentark_jax.report.svg import Plot

_HERE = Path(__file__).parent
_TABLE_ROWS = 200  # of a plot's numbers shown as a table; the download has all of them
_OPTIONAL: dict[str, Any] = {
    "differences": [],
    "debate": {},
    "telemetry": {},
    "training": {},
    "judges": {},
    "timing": {},
    "checks": [],
}


def write_report(path: Path, results: Mapping[str, Any], debates: Sequence[Mapping[str, Any]]) -> None:
    """Writes the report of `results` (the content of results.json) and of transcripts of `debates`, atomically.

    The same input gives the same bytes. Debates for which there is no room (`transcripts.pack`) are left out from the
    end, and the page says how many. Raises AgentArkError when `results` has another schema or lacks a required key, or
    `path` cannot be written.
    """
    write_text(path, render(results, debates))


def render(results: Mapping[str, Any], debates: Sequence[Mapping[str, Any]]) -> str:
    """The report as HTML text; see `write_report`."""
    words.check(results)
    script = (_HERE / "script.html.j2").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    packed, shown = transcripts.pack(results, debates)
    config = results["run"].get("config")
    text = yaml.safe_dump(config, sort_keys=False, allow_unicode=True) if config else ""
    return (
        _templates()
        .get_template("report.html.j2")
        .render(
            results=_OPTIONAL | dict(results),
            style=Markup((_HERE / "style.html.j2").read_text(encoding="utf-8")),
            script=Markup(script),
            script_hash=digest,
            transcripts=Markup(packed),
            shown=shown,
            total=len(debates),
            results_link=link("application/json", json.dumps(results, indent=1, ensure_ascii=False, sort_keys=True)),
            config=text,
            config_link=link("application/yaml", text),
            headline=words.headline(results),
            found=attribution(results),
            scale=scale(results.get("differences") or []),
            funnels=[_funnel(results, name, filters) for name, filters in (results.get("counts") or {}).items()],
            flips=[_flip_matrix(entry) for entry in (results.get("debate") or {}).get("flips") or []],
            told=_telemetry(results),
            seeds=_per_seed(results),
            sheets=_sheets(results),
            **_plots(results),
        )
    )


@functools.cache
def _templates() -> Environment:
    """Templates that escape what they show."""
    environment = Environment(
        loader=FileSystemLoader(_HERE, encoding="utf-8"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: value if isinstance(value, Markup) or not isinstance(value, str) else words.clean(value),
    )
    environment.globals |= {"w": words}
    return environment


def _sheets(results: Mapping[str, Any]) -> dict[str, Any]:
    """The downloads of the tables; None of those without rows."""
    records = {
        "arms": _named("arm", results["arms"]),
        "differences": results.get("differences") or [],
        "checks": results.get("checks") or [],
        "seeds": results.get("per_seed") or [],
        "flips": (results.get("debate") or {}).get("flips") or [],
        "telemetry": (results.get("telemetry") or {}).get("transitions") or [],
        "funnel": _named("arm", results.get("counts") or {}),
        "training": _named("run", results.get("training") or {}),
        "judges": _named("judge", results.get("judges") or {}),
        "ledger": (results.get("timing") or {}).get("stages") or [],
    }
    return {name: of_records(name, rows) for name, rows in records.items()}


def _named(key: str, groups: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The record, or the records, of each group with the group's name under `key`."""
    return [
        {key: name, **record}
        for name, records in groups.items()
        for record in (records if isinstance(records, list) else [records])
    ]


def _plots(results: Mapping[str, Any]) -> dict[str, Any]:
    def shown(plot: Plot | None) -> dict[str, Any] | None:
        if plot is None:
            return None
        return {
            "plot": plot,
            "wide": Markup(plot.wide),
            "narrow": Markup(plot.narrow),
            "rows": plot.rows[:_TABLE_ROWS],
            "link": sheet(plot.name, plot.columns, plot.rows).link,
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
