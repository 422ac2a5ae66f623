"""A grid of configurations: every cell of it is an ordinary run, and a table says what all of them came to.

A sweep is a YAML file: `base`, a list of configuration files (beside it); `common`, what else all cells have; `axes`,
which give to each name a mapping of labels to dotted keys with their values; and what of their product is meant, `only`
and `leave_out`. A cell is named after its labels, and its run directory is `<root>/<name>/<cell>`.
"""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, Literal

import yaml

from agentark_jax import config as configuration
from agentark_jax.arms import STUDENT
from agentark_jax.config import WORD, RunConfig, check_name
from agentark_jax.directory import CONFIG, check_same_config
from agentark_jax.errors import AgentArkError, UsageError
from agentark_jax.files import write_text
from agentark_jax.report import words
from agentark_jax.report.markdown import table as markdown_table
from agentark_jax.report.sheets import csv_text

ARM, BASE = "arm", "base"
Measure = Literal["accuracy", "difference"]
Filter = Mapping[str, Sequence[str]]


@dataclass(frozen=True)
class Grid:
    """What a sweep runs.

    Attributes:
        name: the sweep's folder under `root`.
        root: where sweeps are kept.
        common: dotted keys with their values that all cells have, before those of the axes.
        base: configuration files that all cells begin with, later ones win; relative to the file of the sweep.
        axes: by name and label, which keys of the configuration get which values.
        only: filters, of which a cell must pass at least one; without any all cells are meant. A filter has labels by
            axis, and a cell passes it that has one of them on each of these axes.
        leave_out: filters of which a cell passes none.
    """

    name: str
    base: list[str]
    axes: Mapping[str, Mapping[str, Mapping[str, Any]]]
    root: str = "runs"
    common: Mapping[str, Any] = field(default_factory=dict)
    only: list[Filter] = field(default_factory=list)
    leave_out: list[Filter] = field(default_factory=list)

    def __post_init__(self) -> None:
        check_name(self.name, "sweep")
        if not self.base:
            raise UsageError("base is empty: name the configuration files that all cells begin with.")
        if not self.axes or not all(self.axes.values()):
            raise UsageError("axes: give at least one axis, and to each at least one label.")
        for axis, labels in self.axes.items():
            for label in (axis, *labels):
                if not isinstance(label, str):
                    raise UsageError(f"axes.{axis}: {label!r} is no name: put it in quotes, or a letter before it.")
                if not WORD.fullmatch(label) or axis == ARM:
                    raise UsageError(f"axes.{axis}: {label!r} is no name: use letters, digits, '.', '_' and '-'.")
        places = {f"axes.{axis}.{label}": keys for axis, labels in self.axes.items() for label, keys in labels.items()}
        for place, keys in {"common": self.common, **places}.items():
            if not isinstance(keys, Mapping) or {"name", "root"} & keys.keys():
                raise UsageError(f"{place}: give keys and their values, and not name or root.")
        for key in ("only", "leave_out"):
            for each in getattr(self, key):
                self.check_filter(each, key)
        if len({cell.name for cell in self.cells()}) < len(list(self.cells())):
            raise UsageError("axes: two cells have one name; choose labels without '-'.")

    def check_filter(self, labels: Filter, key: str) -> None:
        """Raises UsageError for axes and labels that there are not."""
        for axis, wanted in labels.items():
            if axis not in self.axes:
                raise UsageError(f"{key}: there is no axis {axis!r}; there are {', '.join(self.axes)}.")
            for label in wanted:
                if label not in self.axes[axis]:
                    raise UsageError(f"{key}: axis {axis} has no {label!r}; it has {', '.join(self.axes[axis])}.")

    def cells(self) -> Iterator["Cell"]:
        """The cells that are meant, in the order of the axes."""
        for labels in product(*self.axes.values()):
            cell = Cell(dict(zip(self.axes, labels, strict=True)))
            wanted = not self.only or any(cell.passes(each) for each in self.only)
            if wanted and not any(cell.passes(each) for each in self.leave_out):
                yield cell

    @property
    def directory(self) -> Path:
        return Path(self.root) / self.name


@dataclass(frozen=True)
class Cell:
    """One run of a sweep, by its label on each axis."""

    labels: Mapping[str, str]

    @property
    def name(self) -> str:
        return "-".join(self.labels.values())

    def passes(self, labels: Filter) -> bool:
        return all(self.labels[axis] in wanted for axis, wanted in labels.items())


@dataclass(frozen=True)
class Sweep:
    """A grid with the file that it is from, and further options of all its runs."""

    grid: Grid
    file: Path
    options: tuple[str, ...] = ()

    def arguments(self, cell: Cell) -> list[str]:
        """The options with which `agentark run` runs a cell. Of two axes that set a key the later one wins."""
        found = [part for each in self.grid.base for part in ("--config", str(self.file.parent / each))]
        for keys in (self.grid.common, *(self.grid.axes[axis][label] for axis, label in cell.labels.items())):
            for key, value in keys.items():
                found += [f"--{key}", value if isinstance(value, str) else json.dumps(value)]
        return [*found, *self.options, "--root", str(self.grid.directory), "--name", cell.name]

    def config(self, cell: Cell) -> RunConfig:
        """The configuration of a cell. Raises UsageError that names it where it is none."""
        try:
            return configuration.parse(self.arguments(cell), "agentark sweep", "")[0]
        except UsageError as error:
            raise UsageError(f"{self.file}: cell {cell.name}: {error}") from error

    def state(self, cell: Cell) -> str:
        """`done`, `begun` or `to do`."""
        directory = self.grid.directory / cell.name
        if (directory / "results.json").exists():
            return "done"
        return "begun" if (directory / CONFIG).exists() else "to do"


class _Loader(yaml.SafeLoader):
    """YAML in which no key stands twice: of two cells with one label the first would be lost."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if key.value != "<<"]
        twice = next((key for place, key in enumerate(keys) if key in keys[:place]), None)
        if twice is not None:
            raise yaml.constructor.ConstructorError(None, None, f"{twice} stands twice", node.start_mark)
        return super().construct_mapping(node, deep)


def load_sweep(file: Path, options: Sequence[str] = (), **changes: str) -> Sweep:
    """A sweep from its file; `changes` are of its name and root. Raises UsageError naming the file and the key."""
    try:
        given = yaml.load(file.read_text(encoding="utf-8"), _Loader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"{file}: cannot be read as YAML ({error}).") from error
    keys = set(Grid.__dataclass_fields__)
    if not isinstance(given, dict) or not given.keys() <= keys or not {"name", "base", "axes"} <= given.keys():
        odd = sorted(set(given) - keys) if isinstance(given, dict) else []
        more = f"; there is no {', '.join(map(str, odd))}" if odd else ""
        raise UsageError(f"{file}: a sweep has name, base, axes, and maybe root, common, only, leave_out{more}.")
    try:
        for key in ("only", "leave_out"):
            given[key] = [{axis: _listed(labels) for axis, labels in each.items()} for each in given.get(key) or []]
        grid = Grid(**{**given, "base": _listed(given["base"]), **changes})
    except (UsageError, AttributeError, TypeError) as error:
        raise UsageError(f"{file}: {error}") from error
    return Sweep(grid, file, tuple(options))


def _listed(value: Any) -> list[str]:
    return list(value) if isinstance(value, list) else [value]


def run_cells(
    sweep: Sweep, shard: int, shards: int, say: Callable[[str], None], run: Callable[[list[str]], int]
) -> list[str]:
    """Run what is missing of worker `shard`'s share (from 0, of `shards`) of the cells; the names of those that failed.

    With `--update` among the options of the sweep, what is done is run again, too, which redoes what has changed.

    Args:
        say: told what happens.
        run: runs `agentark run` with these options, and gives its exit code.

    Raises: UsageError, before anything runs, where a cell of the share is not a configuration, or not the one with
        which it was made.
    """
    cells, update = list(sweep.grid.cells())[shard::shards], "--update" in sweep.options
    missing = [cell for cell in cells if update or sweep.state(cell) != "done"]
    for cell in cells:
        check_same_config(sweep.config(cell), update=update)
    say(f"{len(cells) - len(missing)} of {len(cells)} cells of this share are done.")
    failed = []
    for place, cell in enumerate(missing, 1):
        say(f"{cell.name}: running, {place} of {len(missing)}")
        code = run(sweep.arguments(cell))
        if code:
            failed.append(cell.name)
            say(f"{cell.name}: failed with exit code {code}")
    return failed


def run_process(arguments: list[str]) -> int:
    """`agentark run` in a process of its own, so that no run takes memory from the next."""
    return subprocess.run([sys.executable, "-m", "agentark_jax.train", *arguments], check=False).returncode


@dataclass(frozen=True)
class Entry:
    """An arm of a cell: its labels, `arm` among them, and its figure; None where there is none yet."""

    labels: Mapping[str, str]
    value: float | None = None
    low: float | None = None
    high: float | None = None
    n: int | None = None


def entries(sweep: Sweep, measure: Measure, where: Filter) -> list[Entry]:
    """The figures of the arms of the cells that pass `where`: accuracy, or its paired difference to the base.

    Arms are those that `where` names as labels of `arm`; or else the student, and what else is in the results of any of
    these cells. Raises UsageError where there is no such cell, AgentArkError for results that cannot be read.
    """
    axes = {axis: labels for axis, labels in where.items() if axis != ARM}
    cells = [cell for cell in sweep.grid.cells() if cell.passes(axes)]
    if not cells:
        raise UsageError("--where: no cell of the sweep has these labels together; --dry-run lists the cells.")
    figures = [_figures(sweep.grid.directory / cell.name / "results.json", measure) for cell in cells]
    arms = where.get(ARM) or list(dict.fromkeys([*(arm for each in figures for arm in each), STUDENT]))
    found = [
        Entry({**cell.labels, ARM: arm}, *each.get(arm, ()))
        for cell, each in zip(cells, figures, strict=True)
        for arm in arms
        if arm in each or not each  # a cell that is done has no further arms
    ]
    if not found:
        raise UsageError(f"--where: no cell has the arm {' or '.join(arms)}; look into its results.json.")
    return found


def _figures(path: Path, measure: Measure) -> dict[str, tuple[float, float, float, int]]:
    """Value, low, high and n by arm; nothing where there are no results."""
    if not path.exists():
        return {}
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        words.check(results)
        rows = results["arms"]
        if measure == "difference":
            rows = {each["a"]: each for each in results["differences"] if each["b"] == BASE}
        return {arm: (row[measure], row["low"], row["high"], row["n"]) for arm, row in rows.items()}
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
        raise AgentArkError(f"{path}: damaged ({error!r}). Delete it and run the sweep again.") from error


def axes_of(found: Sequence[Entry], rows: Sequence[str], columns: Sequence[str]) -> tuple[list[str], list[str]]:
    """Axes for rows and columns where none are named: those that vary, and in the columns the arms."""
    varying = [axis for axis in found[0].labels if len({each.labels[axis] for each in found}) > 1]
    if not rows and not columns:
        return [axis for axis in varying if axis != ARM], [ARM]
    rest = [axis for axis in varying if axis not in (*rows, *columns)]
    return list(rows) or rest, list(columns) or rest


def table(found: Sequence[Entry], rows: Sequence[str], columns: Sequence[str], measure: Measure) -> list[str]:
    """Lines of a Markdown table: a row and a column for every combination of labels of these axes that occurs.

    Raises: UsageError where two entries would stand in one place.
    """
    given = set(found[0].labels)
    unknown = [axis for axis in (*rows, *columns) if axis not in given]
    if unknown:
        raise UsageError(
            f"--rows and --columns: there is no axis {unknown[0]!r}; there are {', '.join(sorted(given))}."
        )
    for axis in sorted(given - {*rows, *columns}):
        labels = dict.fromkeys(entry.labels[axis] for entry in found)
        if len(labels) > 1:
            raise UsageError(
                f"axis {axis} is neither in --rows nor in --columns, and there are {', '.join(labels)}: choose one "
                f"with --where {axis}={next(iter(labels))}, or name the axis."
            )
    places = {(_labels(entry, rows), _labels(entry, columns)): entry for entry in found}
    heads = list(dict.fromkeys(column for _, column in places))
    lines = [
        [*row, *(_shown(places.get((row, head)), measure) for head in heads)]
        for row in dict.fromkeys(row for row, _ in places)
    ]
    return markdown_table([*rows, *(f">{' · '.join(head)}" for head in heads)], lines)


def _labels(entry: Entry, axes: Sequence[str]) -> tuple[str, ...]:
    return tuple(entry.labels[axis] for axis in axes)


def _shown(entry: Entry | None, measure: Measure) -> str:
    """43.1 [40.2, 46.0] (n = 960), `missing` where it is not there yet, and nothing where it is not meant."""
    if entry is None:
        return ""
    if entry.value is None:
        return "missing"
    value = words.percent(entry.value) if measure == "accuracy" else words.points(entry.value)
    return f"{value} {words.interval(entry.low, entry.high, signed=measure == 'difference')} (n = {entry.n:,})"


def as_csv(found: Sequence[Entry], measure: Measure) -> str:
    """A line for each entry, with its labels; figures are shares, empty where they are missing."""
    rows = ([*entry.labels.values(), entry.value, entry.low, entry.high, entry.n] for entry in found)
    return csv_text([*found[0].labels, measure, "low", "high", "n"], rows)


def write_table(
    sweep: Sweep, measure: Measure, rows: Sequence[str], columns: Sequence[str], where: Filter
) -> list[str]:
    """Make the table of a sweep, and keep it beside its runs as Markdown and CSV; its lines."""
    sweep.grid.check_filter({axis: labels for axis, labels in where.items() if axis != ARM}, "--where")
    found = entries(sweep, measure, where)
    lines = table(found, *axes_of(found, rows, columns), measure)
    write_text(sweep.grid.directory / f"{measure}.md", "\n".join(lines) + "\n")
    write_text(sweep.grid.directory / f"{measure}.csv", as_csv(found, measure))
    return lines
