"""What all result files say together: README's table of goals, a plot, and a page with every figure.

python -m benchmarks.summary     # writes benchmarks/results/README.md, its plot, and README's part between two marks

Nothing is measured here. A goal is met when the median meets it.
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from agentark_jax.errors import AgentArkError
from agentark_jax.files import write_text
from benchmarks import dry_runs, results
from benchmarks.results import Comparison, Result, Spread
from benchmarks.workers import ROOT

README, DIRECTORY = ROOT / "README.md", ROOT / "benchmarks" / "results"
PAGE, PLOT = DIRECTORY / "README.md", DIRECTORY / "ratios.svg"
BEGIN, END = "<!-- by python -m benchmarks.summary -->\n", "<!-- end -->\n"
HEAD = """# What was measured

Every figure of the result files beside this page, written by `python -m benchmarks.summary`. Medians with ranges over
the repetitions of one run, in which the sides took turns; floors are counted operations and bytes at rates measured in
the same rounds.

![Our speed over that of each peer, by benchmark](ratios.svg)
"""


@dataclass(frozen=True)
class Judgement:
    """A figure that is compared with something, and what was wanted of it: at least, or at most, the goal."""

    work: str
    against: str
    value: Spread
    goal: float | None
    at_least: bool
    percent: bool = False

    @property
    def met(self) -> bool | None:
        """None where nothing was wanted."""
        if self.goal is None:
            return None
        return self.value.median >= self.goal if self.at_least else self.value.median <= self.goal

    def row(self) -> str:
        """A line of Markdown."""
        figure = f"{self._shown(self.value.median)} ({self._shown(self.value.low)} – {self._shown(self.value.high)})"
        wanted = "" if self.goal is None else f"{'≥' if self.at_least else '≤'} {self._shown(self.goal)}"
        verdict = {True: "met", False: "**missed**", None: ""}[self.met]
        return f"| {self.work} | {self.against} | {figure} | {wanted} | {verdict} |"

    def _shown(self, value: float) -> str:
        return f"{value:.0%}" if self.percent else f"{value:.2f}×"


def load(directory: Path) -> list[Result | Comparison]:
    """All full results of a directory, by file name; those of quick runs are left out."""
    paths = sorted(path for path in directory.glob("*.json") if path.name != dry_runs.RESULTS.name)
    return [results.read(path) for path in paths if not path.name.endswith(".quick.json")]


def judgements(found: Sequence[Result | Comparison]) -> Iterator[Judgement]:
    """Every ratio, and every share of a floor with a goal."""
    for result in found:
        if isinstance(result, Comparison):
            what = {entry.name: entry.what for entry in result.measured}
            for ratio in result.ratios:
                work = f"{result.title}: {what.get(ratio.of, ratio.of)}"
                yield Judgement(work, what.get(ratio.over, ratio.over), ratio.value, ratio.goal, at_least=False)
            continue
        said = {row.name: row.what for row in result.rows}
        for ratio in result.ratios:
            yield Judgement(result.title, said.get(ratio.over, ratio.over), ratio.value, ratio.goal, at_least=True)
        for row in result.rows:
            if row.floor_goal is not None and row.floor_fraction is not None:
                yield Judgement(result.title, "the floor", row.floor_fraction, row.floor_goal, True, percent=True)


def table(judged: Sequence[Judgement]) -> str:
    """Markdown: what had a goal."""
    rows = [judgement.row() for judgement in judged if judgement.goal is not None]
    return "\n".join(["| work | against | figure, median (range) | goal | |", "|---|---|---|---|---|", *rows]) + "\n"


def plot(judged: Sequence[Judgement]) -> Figure:
    """Speeds over those of peers as bars with their ranges, on a logarithmic axis; goals as marks."""
    speeds = [each for each in judged if each.at_least and not each.percent]
    figure = Figure(figsize=(9, 0.6 + 0.36 * len(speeds)), layout="constrained")
    axes = figure.subplots()
    for place, each in enumerate(reversed(speeds)):
        axes.barh(place, each.value.median, color="#4477aa" if each.met is not False else "#cc6677", height=0.6)
        axes.plot([each.value.low, each.value.high], [place, place], color="#222222", linewidth=1.2)
        axes.annotate(f" {each.value.median:.2f}×", (each.value.high, place), va="center", fontsize=8)
        if each.goal is not None:
            axes.plot([each.goal, each.goal], [place - 0.4, place + 0.4], color="#222222", linewidth=2)
    axes.set_yticks(range(len(speeds)), [f"{each.work} – {each.against}" for each in reversed(speeds)], fontsize=8)
    axes.axvline(1.0, color="#888888", linewidth=0.8)
    axes.set_xscale("log")
    highest = max([each.value.high for each in speeds], default=1.0)
    axes.set_xlim(0.5, 1.6 * highest)
    axes.set_xticks([tick for tick in (0.5, 1, 2, 4, 8, 16) if tick <= 1.6 * highest], minor=False)
    axes.xaxis.set_major_formatter("{x:g}×")
    axes.xaxis.set_minor_formatter("")
    axes.set_xlabel("our speed over the peer's, median and range; thick marks: goals", fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def page(found: Sequence[Result | Comparison]) -> str:
    """Markdown with every result's own table."""
    return "\n".join([HEAD, *(results.table(result) for result in found)])


def inserted(readme: str, text: str) -> str:
    """README with another text between the marks. Raises AgentArkError where there are none."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise AgentArkError(f"{README}: the marks {BEGIN.strip()} and {END.strip()} are missing; put them back")
    return f"{before}{BEGIN}{text}{END}{after}"


def main() -> int:
    """Exit code 0, or 1 when a file does not read or write."""
    try:
        found = load(DIRECTORY)
        judged = list(judgements(found))
        write_text(README, inserted(README.read_text(encoding="utf-8"), table(judged)))
        write_text(PAGE, page(found))
        with matplotlib.rc_context({"svg.hashsalt": "agentark", "svg.fonttype": "none"}):
            plot(judged).savefig(PLOT, format="svg", metadata={"Date": None})
    except AgentArkError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
