"""The plots of the report; each takes its part of results.json and gives a `Plot`, or None when there is no data."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

from agentark_jax.report import labels, words
from agentark_jax.report.svg import MUTED, SERIES, Canvas, Plot, draw, label
from agentark_jax.report.telemetry import point_name

_MARKERS = {"single": "o", "vote": "s", "debate": "D"}
_SHARES = ("accuracy", "share", "agreement", "rate", "%")
_DRAWN_POINTS = 400  # of a long loss history; the table keeps all of them
Spot = tuple[float, float, float | None, float | None]  # x, y, low, high


def accuracy_tokens(arms: Mapping[str, Mapping[str, Any]]) -> Plot | None:
    """Accuracy with its interval against tokens per question on a logarithmic axis, one labelled point per arm.

    Arms that check the harness are no results, so they have none.
    """
    spots = [
        (label(arm.get("label") or name), arm["protocol"], arm["tokens_per_question"]["total"],
         *(arm[key] for key in ("accuracy", "low", "high", "n"))) for name, arm in arms.items() if not arm.get("check")
    ]  # fmt: skip
    return _against_tokens("accuracy-tokens", "Accuracy against tokens", "prompt + answer", "arm", spots)


def debate_tokens(telemetry: Mapping[str, Any]) -> Plot | None:
    """What accuracy costs in generated tokens: one agent, votes of the first k, and all after each later round."""
    spots = [
        (point_name(point), *(point[key] for key in ("kind", "tokens", "value", "low", "high", "n")))
        for point in telemetry.get("points") or []
    ]
    return _against_tokens("debate-tokens", "What a round buys", "generated", "who answers", spots)


def _against_tokens(
    identity: str,
    title: str,
    counted: str,
    who: str,
    points: Sequence[tuple[str, str, float, float, float, float, int]],
) -> Plot | None:
    """`points`: name, protocol, tokens, accuracy, low, high, n; `counted` says which tokens these are."""
    shown = [point for point in points if point[2] > 0]
    if not shown:
        return None
    names = [name for name, *_ in shown]
    front = pareto_front([(point[2], point[3]) for point in shown])
    kinds = [_MARKERS.get(kind, "o") for _, kind, *_ in shown]
    spots = [point[2:6] for point in shown]

    def paint(canvas: Canvas) -> None:
        axes = canvas.axes
        axes.set_xscale("log")
        if len(front) > 1:
            line = [spots[index][:2] for index in front]
            axes.plot(*_columns(line), color=MUTED, linewidth=1.2, linestyle=":", drawstyle="steps-post")
        for index, ((x, y, low, high), kind) in enumerate(zip(spots, kinds, strict=True)):
            _point(canvas, x, y, low, high, SERIES[index % len(SERIES)], kind)
        tokens = [spot[0] for spot in spots]
        axes.set_xlim(min(tokens) / 1.6, max(tokens) * 1.6)
        _share_axis(canvas, [value for spot in spots for value in spot[2:]])
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if max(tokens) / min(tokens) < 300 else (1,)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel(
            "tokens per question, log scale" if canvas.narrow else f"tokens per question, {counted} (log scale)"
        )
        axes.set_ylabel("accuracy (%)")
        fits.append(labels.place(canvas, names, spots) is not None)

    # Crowded points get a taller plot until every label has a place of its own.
    for height in (400, 520, 680, 900, 1200):
        fits: list[bool] = []
        wide, narrow = draw(identity, paint, 900, height)
        if all(fits):
            break
    rows = tuple(
        (name, *point[2:], "yes" if index in front else "no")
        for index, (name, point) in enumerate(zip(names, shown, strict=True))
    )
    best = ", ".join(f"“{names[index]}”" for index in front)
    described = "; ".join(f"{row[0]}: {words.percent(row[2])} % at {words.number(row[1])} tokens" for row in rows)
    return Plot(
        identity,
        title,
        f"{title}. {described}.",
        "Up and to the left is better. Circle: one answer; square: vote; diamond: debate. Bars: 95 % Wilson intervals. "
        f"Dotted: the Pareto front, those that nothing as cheap is more accurate than; by the dots alone: {best}.",
        wide,
        narrow,
        (who, "tokens per question", "accuracy", "low", "high", "n", "on the Pareto front"),
        rows,
    )


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Which of `points` (cost, gain) are on the Pareto front, cheap ones first: all that cost no more gain less."""
    front: list[int] = []
    for index in sorted(range(len(points)), key=lambda index: (points[index][0], -points[index][1], index)):
        if not front or points[index][1] > points[front[-1]][1]:
            front.append(index)
    return front


def rounds(debate: Mapping[str, Any]) -> Plot | None:
    """Accuracy of an agent's answer, of the majority, and agreement, by debate round."""
    by_round = debate.get("accuracy_by_round") or []
    if not by_round:
        return None
    series = [("one agent", [(row["round"], row["accuracy"], row.get("low"), row.get("high")) for row in by_round])]
    for key, name in (("majority", "majority of the agents"), ("agreement", "agreement among agents")):
        if all(words.known(row.get(key)) for row in by_round):
            series.append((name, [(row["round"], row[key], None, None) for row in by_round]))

    def paint(canvas: Canvas) -> None:
        _lines(canvas, series)
        canvas.axes.xaxis.set_major_locator(FixedLocator([row["round"] for row in by_round]))
        first, last = by_round[0]["round"], by_round[-1]["round"]
        canvas.axes.set_xlim(first - 0.35, last + 0.35)
        values = [value for _, points in series for point in points for value in point[1:] if value is not None]
        _share_axis(canvas, values)
        canvas.axes.set_xlabel("debate round")
        canvas.axes.set_ylabel("%")
        _legend(canvas, len(series))

    wide, narrow = draw("debate-rounds", paint, 540, 340)
    rows = tuple(
        (row["round"], row["accuracy"], row.get("low"), row.get("high"), row.get("majority"), row.get("agreement"),
         row.get("n")) for row in by_round
    )  # fmt: skip
    described = "; ".join(f"round {row[0]}: {words.percent(row[1])} %" for row in rows)
    return Plot(
        "debate-rounds",
        "Accuracy by round",
        f"Accuracy of one agent by debate round: {described}.",
        "One agent's answer with its 95 % interval, the majority's answer, and the share of agents that agree with it.",
        wide,
        narrow,
        ("round", "accuracy", "low", "high", "majority", "agreement", "n"),
        rows,
    )


def losses(training: Mapping[str, Mapping[str, Any]], arms: Mapping[str, Mapping[str, Any]]) -> Plot | None:
    """Training loss (line) and validation loss (dashed with points) by step, one colour per training run."""
    runs = {name: run for name, run in training.items() if run.get("history") or run.get("validation")}
    if not runs:
        return None
    names = {name: label(arms.get(name, {}).get("label") or name) for name in runs}

    def paint(canvas: Canvas) -> None:
        for index, (name, run) in enumerate(runs.items()):
            colour = SERIES[index % len(SERIES)]
            if run.get("history"):
                canvas.axes.plot(*_columns(_thin(run["history"])), color=colour, label=names[name], linewidth=1.5)
            if run.get("validation"):
                text = f"{names[name]}, validation" if run.get("history") else names[name]
                columns = _columns(_thin(run["validation"]))
                canvas.axes.plot(*columns, color=colour, label=text, linestyle="--", marker="o", markersize=4)
        canvas.axes.set_ylim(bottom=0)
        canvas.axes.margins(x=0.02)
        canvas.axes.set_xlabel("optimizer step")
        canvas.axes.set_ylabel("loss per token (nats)")
        _legend(canvas, len(canvas.axes.get_lines()))

    wide, narrow = draw("losses", paint, 900, 380)
    rows = tuple(
        (names[name], kind, step, value)
        for name, run in runs.items()
        for kind, key in (("training", "history"), ("validation", "validation"))
        for step, value in run.get(key) or []
    )
    ends = "; ".join(f"{names[name]} ends at {words.number(run.get('final_loss'), 3)}" for name, run in runs.items())
    return Plot(
        "losses",
        "Loss curves",
        f"Loss by optimizer step. {ends}.",
        "Solid: training batches; dashed: validation. Cross-entropy per token with loss.",
        wide,
        narrow,
        ("run", "split", "step", "loss"),
        rows,
    )


_ROLLOUTS = {"accuracy": "right", "process": "process reward", "truncated": "cut off"}


def rollouts(training: Mapping[str, Mapping[str, Any]], arms: Mapping[str, Mapping[str, Any]]) -> Plot | None:
    """What policies' rollouts were by iteration: shares that are right and cut off, and the process reward."""
    runs = {name: run["iterations"] for name, run in training.items() if run.get("iterations")}
    if not runs:
        return None
    names = {name: label(arms.get(name, {}).get("label") or name) for name in runs}
    series = [
        (name, key, [(index + 1, record[key]) for index, record in enumerate(records)])
        for name, records in runs.items()
        for key in _ROLLOUTS
        if all(key in record for record in records)
    ]
    styles = dict(zip(_ROLLOUTS, ("-", "--", ":"), strict=True))

    def paint(canvas: Canvas) -> None:
        for name, key, points in series:
            colour = SERIES[list(runs).index(name) % len(SERIES)]
            text = f"{names[name]}: {_ROLLOUTS[key]}"
            canvas.axes.plot(*_columns(_thin(points)), color=colour, label=text, linestyle=styles[key], linewidth=1.5)
        canvas.axes.set_ylim(0, 1)
        canvas.axes.margins(x=0.02)
        canvas.axes.set_xlabel("iteration")
        canvas.axes.set_ylabel("mean over rollouts")
        _legend(canvas, len(canvas.axes.get_lines()))

    wide, narrow = draw("rollouts", paint, 900, 380)
    ends = "; ".join(
        f"{names[name]} went from {words.percent(first['accuracy'])} to {words.percent(last['accuracy'])} right"
        for name, (first, *_, last) in ((name, [records[0], *records]) for name, records in runs.items())
    )
    return Plot(
        "rollouts",
        "Rollouts by iteration",
        f"Rollouts of each policy while it learned. {ends}.",
        "Sampled on the questions that it learns from: not what it can do on held-out ones.",
        wide,
        narrow,
        ("run", "figure", "iteration", "value"),
        tuple((names[name], _ROLLOUTS[key], x, y) for name, key, points in series for x, y in points),
    )


def curve(data: Mapping[str, Any], index: int) -> Plot | None:
    """The `index`-th curve with intervals.

    Text on the x axis makes categories, a wide range of positive numbers a logarithmic axis. The y axis is in per
    cent when its name speaks of accuracy, a share, agreement, a rate or %.
    """
    series = [entry for entry in data["series"] if entry["points"]]
    if not series:
        return None
    raw = list(dict.fromkeys(point["x"] for entry in series for point in entry["points"]))
    numeric = all(words.known(x) for x in raw)
    position = {x: float(x) if numeric else float(place) for place, x in enumerate(raw)}
    shares = any(word in data["y"].lower() for word in _SHARES)
    lines = [
        (label(entry["name"]), [(position[p["x"]], p["y"], p.get("low"), p.get("high")) for p in entry["points"]])
        for entry in series
    ]

    def paint(canvas: Canvas) -> None:
        places = sorted(position.values())
        logarithmic = numeric and places[0] > 0 and places[-1] / places[0] >= 8
        if logarithmic:
            canvas.axes.set_xscale("log")
        _lines(canvas, lines, logarithmic, connected=numeric)
        if not numeric:
            room = 12 if canvas.narrow else 24
            canvas.axes.set_xticks(list(position.values()), [_short(x, room) for x in raw])
            canvas.axes.set_xlim(-0.5, len(raw) - 0.5)
        elif len(raw) <= (6 if canvas.narrow else 10):
            canvas.axes.set_xticks(places, [f"{x:g}" if abs(x) < 1e4 else words.size(x) for x in places])
            canvas.axes.xaxis.set_minor_locator(NullLocator())
        values = [value for _, points in lines for point in points for value in point[1:] if value is not None]
        if shares:
            _share_axis(canvas, values)
        canvas.axes.set_xlabel(_short(data["x"], 40))
        canvas.axes.set_ylabel(_short(data["y"], 36) + (" (%)" if shares and "%" not in data["y"] else ""))
        _legend(canvas, len(lines))

    identity = f"curve-{index}"
    wide, narrow = draw(identity, paint, 520, 340)
    rows = tuple(
        (label(entry["name"]), label(p["x"]) if isinstance(p["x"], str) else p["x"], p["y"], p.get("low"),
         p.get("high"), p.get("n")) for entry in series for p in entry["points"]
    )  # fmt: skip
    title = label(data["title"])
    return Plot(
        identity,
        title,
        f"{title}: {label(data['y'])} by {label(data['x'])}; series: {', '.join(text for text, _ in lines)}.",
        "Bars: 95 % intervals.",
        wide,
        narrow,
        ("series", label(data["x"]), label(data["y"]), "low", "high", "n"),
        rows,
    )


def _point(canvas: Canvas, x: float, y: float, low: float | None, high: float | None, colour: str, mark: str) -> None:
    if low is not None and high is not None:
        canvas.axes.vlines(x, low, high, color=colour, linewidth=1.8, alpha=0.55)
    canvas.axes.plot([x], [y], marker=mark, markersize=8, color=colour, linestyle="none")


def _lines(
    canvas: Canvas,
    series: Sequence[tuple[str, Sequence[Spot]]],
    logarithmic: bool = False,
    connected: bool = True,
) -> None:
    """Lines with error bars; the series are set a few pixels apart so that bars at the same x stay readable."""
    places = [point[0] for _, points in series for point in points]
    low_x, high_x = min(places), max(places)
    for index, (name, points) in enumerate(series):
        shift = (index - (len(series) - 1) / 2) * (0.008 if connected else 0.03)
        moved = [
            x * (high_x / low_x) ** shift if logarithmic else x + shift * ((high_x - low_x) or 1) for x, *_ in points
        ]
        colour = SERIES[index % len(SERIES)]
        heights = [point[1] for point in points]
        style = "-" if connected else "none"
        canvas.axes.plot(moved, heights, color=colour, linestyle=style, marker="o", markersize=5, label=name)
        for x, (_, _, low, high) in zip(moved, points, strict=True):
            if low is not None and high is not None:
                canvas.axes.vlines(x, low, high, color=colour, linewidth=1.8, alpha=0.55)


def _share_axis(canvas: Canvas, values: Sequence[float]) -> None:
    """A y axis in per cent around `values`, kept within 0 and 100 where they are."""
    low, high = min(values), max(values)
    room = max(0.08 * (high - low), 0.02)
    bottom, top = low - room, high + room
    canvas.axes.set_ylim(max(bottom, -0.01) if low >= 0 else bottom, min(top, 1.01) if high <= 1 else top)
    canvas.axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.0f}".replace("-", "−")))


def _legend(canvas: Canvas, entries: int) -> None:
    """A legend above the plot, one line per entry on a phone; the axes shrink to make room for it."""
    if entries < 2:
        return
    columns = 1 if canvas.narrow else 2
    lines = math.ceil(entries / columns)
    handles, names = canvas.axes.get_legend_handles_labels()
    canvas.figure.legend(
        handles,
        [_short(name, 40 if canvas.narrow else 44) for name in names],
        loc="upper left",
        bbox_to_anchor=(46 / canvas.width, 1),
        ncols=columns,
        fontsize=12,
        borderaxespad=0,
        labelspacing=0.3,
    )
    box = canvas.axes.get_position()
    taken = max(0, 17 * lines - 4) / canvas.height
    canvas.axes.set_position((box.x0, box.y0, box.width, box.height - taken))


def _thin(points: Sequence[Sequence[float]]) -> Sequence[Sequence[float]]:
    """At most about 400 points: means over equal stretches, so that a spike moves the line instead of vanishing."""
    stretch = math.ceil(len(points) / _DRAWN_POINTS)
    if stretch <= 1:
        return points
    groups = [points[start : start + stretch] for start in range(0, len(points), stretch)]
    return [[sum(column) / len(group) for column in zip(*group, strict=True)] for group in groups]


def _columns(points: Sequence[Sequence[float]]) -> tuple[list[float], list[float]]:
    return [point[0] for point in points], [point[1] for point in points]


def _short(text: object, width: int) -> str:
    line = label(text)
    return line if len(line) <= width else line[: width - 1] + "…"
