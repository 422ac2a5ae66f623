"""What a benchmark found: the schema of a result file, the environment, and tables for people."""

import dataclasses
import datetime
import json
import os
import platform
import statistics
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

from agentark_jax.errors import AgentArkError
from benchmarks.workers import ROOT, Reply

PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "tokenizers", "safetensors")
PEER_PACKAGES = ("torch", "transformers", "trl", "peft", "google-tunix", "jax", "flax")
MACHINE = "machine"
T = TypeVar("T")

Group = dict[str, list[Reply]]


@dataclasses.dataclass(frozen=True)
class Spread:
    """Repeated measurements of one quantity."""

    median: float
    low: float
    high: float
    values: list[float]

    @staticmethod
    def of(values: Sequence[float]) -> "Spread":
        return Spread(statistics.median(values), min(values), max(values), list(values))


@dataclasses.dataclass(frozen=True)
class Row:
    """One side. `floor_fraction` is the counted minimum at the rates of the same round over the time.

    `flops`: what it counts, by part, and `bytes` moved besides. `floor_goal`: the least fraction that is wanted.
    """

    name: str
    what: str
    tokens_per_second: Spread
    floor_fraction: Spread | None
    flops: dict[str, int]
    peak_rss_gb: float
    warmup_seconds: float
    threads: int
    floor_goal: float | None = None


@dataclasses.dataclass(frozen=True)
class Ratio:
    """`of` over `over`, in a `Result` of speeds, from pairs of neighbouring repetitions. `goal`: what is wanted."""

    of: str
    over: str
    value: Spread
    goal: float | None


@dataclasses.dataclass(frozen=True)
class Check:
    """A difference between the sides; where `limit` is not null the benchmark ends when `value` exceeds it."""

    what: str
    value: float
    limit: float | None


@dataclasses.dataclass(frozen=True)
class Result:
    """A result file. `rates`: GFLOP/s of matrix products by name, and `bandwidth` in GB/s (read plus written)."""

    benchmark: str
    title: str
    unit: str
    quick: bool
    model: dict[str, Any]
    sizes: dict[str, int]
    rows: list[Row]
    ratios: list[Ratio]
    checks: list[Check]
    rates: dict[str, Spread]
    environment: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @staticmethod
    def from_json(value: Mapping[str, Any], where: str) -> "Result":
        """Raises AgentArkError when the value does not have exactly the fields of this schema."""
        with _reading(where):
            spreads = [
                ["tokens_per_second", *["floor_fraction"] * (row["floor_fraction"] is not None)]
                for row in value["rows"]
            ]
            rows = [_read(Row, row, *names) for row, names in zip(value["rows"], spreads, strict=True)]
            rates = {name: Spread(**spread) for name, spread in value["rates"].items()}
            return Result(**{**value, **_judgements(value), "rows": rows, "rates": rates})


@dataclasses.dataclass(frozen=True)
class Measured:
    """One quantity of one side."""

    name: str
    what: str
    unit: str
    value: Spread


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A result file of quantities that are not speeds: the less, the better. Goals are upper limits."""

    benchmark: str
    title: str
    quick: bool
    model: dict[str, Any]
    sizes: dict[str, int]
    measured: list[Measured]
    ratios: list[Ratio]
    checks: list[Check]
    environment: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @staticmethod
    def from_json(value: Mapping[str, Any], where: str) -> "Comparison":
        """Raises AgentArkError when the value does not have exactly the fields of this schema."""
        with _reading(where):
            measured = [_read(Measured, entry, "value") for entry in value["measured"]]
            return Comparison(**{**value, **_judgements(value), "measured": measured})


@contextmanager
def _reading(where: str) -> Iterator[None]:
    try:
        yield
    except (AttributeError, KeyError, TypeError) as error:
        raise AgentArkError(f"{where}: not a result of this version ({error}); run the benchmark again") from error


def _read(schema: type[T], entry: Mapping[str, Any], *spreads: str) -> T:
    """An entry of a result file, with these of its fields as `Spread`s."""
    return schema(**{**entry, **{name: Spread(**entry[name]) for name in spreads}})


def _judgements(value: Mapping[str, Any]) -> dict[str, Any]:
    """What both schemas have."""
    ratios = [_read(Ratio, ratio, "value") for ratio in value["ratios"]]
    return {"ratios": ratios, "checks": [Check(**check) for check in value["checks"]]}


def rows_of(
    groups: Sequence[Group],
    descriptions: Mapping[str, str],
    flops: Callable[[str], dict[str, int]],
    floor_seconds: Callable[[str, Reply], float] | None,
    tokens: int,
    floor_goal: Mapping[str, float] = MappingProxyType({}),
) -> list[Row]:
    """One row per described side, over all groups in which it took part; the warm-up (repetition 0) is left out.

    Args:
        flops: the counted work of a side.
        floor_seconds: the counted minimum of a side's repetition, given what the machine could do in that round; None
            where nothing is counted.
        tokens: what a repetition is credited with.
        floor_goal: by side, the share of that minimum in its time that is wanted at least.
    """
    rows = []
    for name, what in descriptions.items():
        mine = [(group[name], group.get(MACHINE, group[name])) for group in groups if name in group]
        if not mine:
            continue
        firsts = [replies[0] for replies, _ in mine]
        timed = [pair for replies, able in mine for pair in zip(replies[1:], able[1:], strict=True)]
        rows.append(
            Row(
                name=name,
                what=what,
                tokens_per_second=Spread.of([tokens / reply["seconds"] for reply, _ in timed]),
                floor_fraction=None
                if floor_seconds is None
                else Spread.of([floor_seconds(name, able) / reply["seconds"] for reply, able in timed]),
                flops=flops(name),
                peak_rss_gb=max(replies[-1]["peak_rss_gb"] for replies, _ in mine),
                warmup_seconds=statistics.median(first["seconds"] for first in firsts),
                threads=firsts[0]["threads"],
                floor_goal=floor_goal.get(name),
            )
        )
    return rows


def ratios_of(groups: Sequence[Group], ours: str, goals: Mapping[str, float | None]) -> list[Ratio]:
    """Our speed over that of each peer named in `goals`, round by round."""
    ratios = []
    for peer, goal in goals.items():
        pairs = [
            theirs["seconds"] / own["seconds"]
            for group in groups
            if peer in group
            for own, theirs in zip(group[ours][1:], group[peer][1:], strict=True)
        ]
        if pairs:
            ratios.append(Ratio(ours, peer, Spread.of(pairs), goal))
    return ratios


def rates_of(groups: Sequence[Group]) -> dict[str, Spread]:
    """What the machine could do, over all rounds: GFLOP/s by product, GB/s as `bandwidth`."""
    replies = [reply for group in groups for reply in group.get(MACHINE, [])[1:]]
    if not replies:
        return {}
    rates = {name: Spread.of([reply["rates"][name] / 1e9 for reply in replies]) for name in replies[0]["rates"]}
    return {**rates, "bandwidth": Spread.of([reply["bandwidth"] / 1e9 for reply in replies])}


def environment(peers: Mapping[str, Mapping[str, str]] = MappingProxyType({})) -> dict[str, Any]:
    """What the figures depend on besides the code. `peers`: by peer, the packages of its environment."""
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "load_average_before": round(os.getloadavg()[0], 2),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "peers": {
            peer: {name: found[name] for name in PEER_PACKAGES if name in found} for peer, found in peers.items()
        },
        "git_revision": _git("rev-parse", "HEAD"),
        "git_modified": bool(_git("status", "--porcelain", "--", "agentark_jax", "benchmarks/*.py")),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def _cpu_model() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    """What git says about this checkout; None where this is no checkout or git is not installed."""
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def path_of(directory: Path, benchmark: str, quick: bool) -> Path:
    """Quick results have files of their own, so that they never replace real ones."""
    return directory / (f"{benchmark}.quick.json" if quick else f"{benchmark}.json")


def paths_of(directory: Path, benchmark: str, quick: bool) -> list[Path]:
    """The files of a benchmark that are there: its own, or those of its cases, NAME.CASE, by name."""
    return sorted(
        path
        for path in directory.glob(f"{benchmark}*.json")
        if path.name.split(".")[0] == benchmark and path.name.endswith(".quick.json") == quick
    )


def write(result: Result | Comparison, directory: Path) -> Path:
    """Writes the result file atomically and returns its path. Raises AgentArkError when that fails."""
    path = path_of(directory, result.benchmark, result.quick)
    temporary = path.with_name(path.name + ".tmp")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(result.to_json(), indent=2, allow_nan=False) + "\n", encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        raise AgentArkError(f"{path}: cannot be written ({error}); choose another --results directory") from error
    return path


def read(path: Path) -> Result | Comparison:
    """Raises AgentArkError for a file that is not a result."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AgentArkError(f"{path}: not a readable result file ({error}); run the benchmark again") from error
    if not isinstance(value, dict):
        raise AgentArkError(f"{path}: not a result file; run the benchmark again")
    schema = Comparison if "measured" in value else Result
    return schema.from_json(value, str(path))


def table(result: Result | Comparison) -> str:
    """A Markdown section: one row per side, then how it was measured."""
    sizes = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in result.sizes.items())
    versions = result.environment["packages"]
    accelerator = f"{result.environment['accelerator']}; " if "accelerator" in result.environment else ""
    lines = [
        f"### {result.title}",
        "",
        *(_speeds(result, sizes) if isinstance(result, Result) else _quantities(result, sizes)),
        *(f"Check: {check.what}: {_number(check.value)}{_limit(check)}." for check in result.checks),
        f"{accelerator}{result.environment['cpu']}, {result.environment['cores']} cores; "
        + _named({name: version for name, version in versions.items() if version is not None})
        + "".join(f"; {peer}: {_named(found)}" for peer, found in result.environment.get("peers", {}).items())
        + f"; revision {(result.environment['git_revision'] or 'unknown')[:12]}"
        + ("" if not result.environment["git_modified"] else " with changes")
        + ".",
    ]
    return "\n".join(lines) + "\n"


def _speeds(result: Result, sizes: str) -> list[str]:
    ratio_to = {ratio.over: ratio for ratio in result.ratios}
    rates = "; ".join(
        f"{name} {spread.median:,.3g} GB/s" if name == "bandwidth" else f"{name} {spread.median:,.0f} GFLOP/s"
        for name, spread in result.rates.items()
    )
    computed = result.model.get("precision", "fp32" if "model_type" in result.model else "")
    precision = f", {computed}" if computed else ""
    memory = "peak memory of the host" if "accelerator" in result.environment else "peak memory"
    return [
        f"| | {result.unit}, median (range) | ours is … as fast | of the floor | {memory} |",
        "|---|---|---|---|---|",
        *(_table_row(row, ratio_to.get(row.name)) for row in result.rows),
        "",
        f"{result.model['name']}{precision}; {sizes}.{f' Measured in the same rounds: {rates}.' if rates else ''}",
    ]


def _quantities(result: Comparison, sizes: str) -> list[str]:
    ratio_of = {ratio.of: ratio for ratio in result.ratios}
    precision = result.model.get("dtype", "fp32")
    rows = []
    for entry in result.measured:
        of, shown = entry.value, ""
        if ratio := ratio_of.get(entry.name):
            spread = ratio.value
            goal = "" if ratio.goal is None else f", goal at most {ratio.goal:g}×"
            shown = f"**{spread.median:.2f}×** ({spread.low:.2f} – {spread.high:.2f}{goal}) of {ratio.over}"
        rows.append(f"| {entry.what} | {of.median:.2f} {entry.unit} ({of.low:.2f} – {of.high:.2f}) | {shown} |")
    return [
        "| | median (range) | ratio |",
        "|---|---|---|",
        *rows,
        "",
        f"{result.model['name']}, {precision}; {sizes}.",
    ]


def _table_row(row: Row, ratio: Ratio | None) -> str:
    speed, floor = row.tokens_per_second, row.floor_fraction
    factor, wanted = "", "" if row.floor_goal is None else f", goal {row.floor_goal:.0%}"
    if ratio is not None:
        goal = "" if ratio.goal is None else f", goal {ratio.goal:g}×"
        factor = f"**{ratio.value.median:.2f}×** ({ratio.value.low:.2f} – {ratio.value.high:.2f}{goal})"
    cells = [
        row.what,
        f"{speed.median:.1f} ({speed.low:.1f} – {speed.high:.1f})",
        factor,
        "" if floor is None else f"{floor.median:.0%} ({floor.low:.0%} – {floor.high:.0%}{wanted})",
        f"{row.peak_rss_gb:.1f} GB",
    ]
    return "| " + " | ".join(cells) + " |"


def _named(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def _limit(check: Check) -> str:
    return "" if check.limit is None else f" (at most {_number(check.limit)})"


def _number(value: float) -> str:
    return f"{value:.2g}"
