"""`summary.md`: a run's results on a page of Markdown, from `results.json` alone."""

from collections.abc import Mapping, Sequence
from typing import Any

from agentark_jax.report import words
from agentark_jax.report.markdown import provenance, table, text


def run_summary(results: Mapping[str, Any]) -> str:
    """Headline, arms, contrasts, cost and where it comes from; every figure with its interval and its n.

    `results` is the content of results.json. The same results give the same text. Raises AgentArkError when `results`
    has another schema or lacks a required key.
    """
    words.check(results)
    given = results.get("attribution")
    lines = [f"# {text(results['run']['name'])}", "", text(words.work_done(results)), "", "## What came out", ""]
    lines += [f"- {text(each)}" for each in (given["conclusion"] if given else words.findings(results))]
    lines += ["", *_arms(results)]
    if given:
        lines += ["", "## What the arms learned from", "", *_learned(given["arms"])]
    lines += ["", *_comparisons(results)]
    if given:
        lines += ["", *_cost(results, given["break_even"])]
    lines += ["", "## Where it comes from", "", *provenance(results["run"]), ""]
    return "\n".join(lines)


def _arms(results: Mapping[str, Any]) -> list[str]:
    rows = [
        (
            words.arm_label(results, name),
            f"{words.percent(arm['accuracy'])} {words.interval(arm['low'], arm['high'])}",
            f"{arm['n']:,}" + (" (a subset)" if arm.get("questions") == "subset" else ""),
            words.number(arm["tokens_per_question"]["total"]),
            f"{words.number(arm['cost_ratio'], 2)}×",
        )
        for name, arm in results["arms"].items()
    ]
    columns = ["arm", ">accuracy %", ">n", ">tokens per question", ">cost, base = 1"]
    return ["## Accuracy and cost of an answer", "", *table(columns, rows)]


def _learned(arms: Sequence[Mapping[str, Any]]) -> list[str]:
    rows = [
        (
            arm["label"],
            arm["learns"] or "nothing more",
            arm["kind"],
            words.NONE if arm["kind"] == "base" else "yes" if arm["matched"] else "no",
            words.number(arm["trajectories"]) if arm["rollouts"] is None else f"{arm['rollouts']:,} rollouts",
            words.number(arm["loss_tokens"]),
            words.number(arm["steps"]),
            f"{words.points(arm['difference'])} "
            + words.interval(arm.get("difference_low"), arm.get("difference_high"), signed=True),
        )
        for arm in arms
    ]
    columns = ["arm", "learns", "kind", "matched", ">trajectories", ">loss tokens", ">steps", ">over base, points"]
    note = "Matched arms have the student's questions, and as many and as long trajectories of each."
    return [*table(columns, rows), "", note]


def _comparisons(results: Mapping[str, Any]) -> list[str]:
    given = results.get("attribution")
    if given is None:
        lines = [f"- {text(item.get('sentence') or '')}" for item in results.get("differences") or []]
        return ["## Comparisons", "", *lines]
    lines = []
    for item in given["contrasts"]:
        seeds = words.interval(item["seed_low"], item["seed_high"], signed=True)
        across = f"Across {len(item['per_seed'])} seeds: {seeds}." if seeds else ""
        lines.append(f"- *{text(item['asks'])}* {text(item['sentence'])}. {text(across)}".rstrip())
    checks = [f"- {text(check['sentence'])}" for check in results.get("checks") or []]
    return ["## Contrasts", "", *lines, *(["", "## Checks of the harness", "", *checks] if checks else [])]


def _cost(results: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> list[str]:
    made = {row["arm"]: row["distillation"] for row in rows}
    told = [f"- {text(row['sentence'])}." for row in rows]
    note = (
        "Tokens count once where they are read or written and three times where they are learned from; the warm start "
        "is left out."
    )
    amounts = ", ".join(
        f"{text(words.arm_label(results, name))} {words.size(round(cost))}" for name, cost in made.items()
    )
    return ["## Break-even", "", note, f"Tokens to make: {amounts}.", "", *told]
