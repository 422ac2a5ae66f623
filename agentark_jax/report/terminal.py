"""The summary of a run as a terminal table, 80 columns wide."""

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from agentark_jax.report import words

_MARKS = {"better": ("▲", "green"), "worse": ("▼", "red"), "null": ("○", "dim")}


def summary_table(results: Mapping[str, Any]) -> Group:
    """Arms, then paired differences, then time and tokens.

    `results` is the content of results.json. Strings in it are shown as they are: rich markup has no effect. Raises
    AgentArkError when `results` has another schema or misses a required key.
    """
    words.check(results)
    parts: list[RenderableType] = [_arms(results)]
    for difference in results.get("differences") or []:
        parts.append(_difference(results, difference))
    parts += [_check(check) for check in results.get("checks") or []]
    parts.append(Text(_totals(results), style="dim"))
    return Group(*parts)


def _arms(results: Mapping[str, Any]) -> Table:
    model, task = results["model"], results["task"]
    title = f"{results['run']['name']}: {model['name']} ({words.size(model.get('parameters'))}) on {task['name']}"
    table = Table(title=Text(words.clean(title), style="bold"), title_justify="left", box=box.SIMPLE, pad_edge=False)
    table.add_column("arm", overflow="fold", ratio=1)
    table.add_column("accuracy %", justify="right", no_wrap=True)
    for name in ("n", "tokens/q", "cost"):
        table.add_column(name, justify="right", no_wrap=True)
    known = [arm["accuracy"] for arm in results["arms"].values() if not arm.get("check")]
    best = max(filter(words.known, known), default=None)
    subset = False
    for name, arm in results["arms"].items():
        part = arm.get("questions") == "subset"
        subset = subset or part
        table.add_row(
            Text(words.arm_label(results, name), style="bold" if arm["accuracy"] == best else ""),
            Text(f"{words.percent(arm['accuracy'])} {words.interval(arm['low'], arm['high'])}"),
            words.number(arm["n"]) + ("*" if part else " "),
            words.number((arm.get("tokens_per_question") or {}).get("total")),
            f"{words.number(arm.get('cost_ratio'), 2)}×",
        )
    if subset:
        table.caption = Text("* on a subset of the questions", style="dim")
        table.caption_justify = "left"
    return table


def _difference(results: Mapping[str, Any], difference: Mapping[str, Any]) -> Padding:
    mark, style = _MARKS[words.outcome(difference)]
    sentence = words.clean(difference.get("sentence") or words.finding(results, difference))
    seeds = words.interval(difference.get("seed_low"), difference.get("seed_high"), signed=True)
    if seeds:
        sentence += f" Across seeds: {seeds}."
    grid = Table.grid(padding=(0, 1))
    grid.add_column(width=1)
    grid.add_column(overflow="fold")
    grid.add_row(Text(mark, style=style), Text(sentence))
    return Padding(grid, (0, 0, 1, 0))


def _check(check: Mapping[str, Any]) -> Text:
    return Text(words.clean(check["sentence"]), style="dim" if check["passed"] else "bold red")


def _totals(results: Mapping[str, Any]) -> str:
    seconds, tokens, rate = words.throughput(results)
    stages = (results.get("timing") or {}).get("stages") or []
    reused = sum(bool(stage.get("reused")) for stage in stages)
    text = f"total {words.duration(seconds)} · {tokens:,} tokens · {words.number(rate)} tokens/s"
    return f"{text} · {reused} of {words.plural(len(stages), 'stage')} reused" if reused else text
