"""Dry-runs every recipe on the topologies that its header names: writes the results, and the tables of them in README
and docs/scaling.md.

python -m benchmarks.dry_runs                     # all: a second for GPUs, one to three minutes for a TPU (extra `tpu`)
python -m benchmarks.dry_runs --platform gpu      # the results of the others stay as they are
python -m benchmarks.dry_runs --only qwen3_8b
python -m benchmarks.dry_runs --table             # the table from the results that are there
"""

import argparse
import json
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from agentark_jax.config import RunConfig, parse
from agentark_jax.errors import AgentArkError, UsageError
from agentark_jax.files import write_json, write_text
from agentark_jax.models.published import describe
from agentark_jax.preflight import GIB, preflight, topology
from agentark_jax.stages import git_revision
from benchmarks.workers import ROOT

CONFIGS, RESULTS, README = ROOT / "configs", ROOT / "benchmarks" / "results" / "dry_runs.json", ROOT / "README.md"
SCALING = ROOT / "docs" / "scaling.md"
LORA = CONFIGS / "lora.yaml"
# What is trained, by the word with which a line of a recipe's header begins, and the files that come after the recipe.
TRAINED: Mapping[str, tuple[Path, ...]] = {"all parameters": (), "adapters": (LORA,)}

Result = dict[str, Any]


@dataclass(frozen=True)
class DryRun:
    """One fit of one recipe on one topology."""

    recipe: str
    trained: str
    topology: str

    def config(self) -> RunConfig:
        """The recipe's configuration with what comes after it."""
        files = (CONFIGS / f"{self.recipe}.yaml", *TRAINED[self.trained])
        return parse([word for path in files for word in ("--config", str(path))], "dry_runs", "")[0]

    def __call__(self) -> Result:
        """What it finds, in bytes of one device; raises as `preflight`."""
        config = self.config()
        found = preflight(config.model.source, describe(config.model), config.fit, topology(self.topology))
        return {
            **vars(self),
            "parameters": found.parameters,
            "trainable": found.trainable,
            "rows": config.fit.rows,
            "row_length": config.fit.row_length,
            "state": found.state_bytes,
            "step": found.step.total,
            "memory": found.topology.memory,
            "fits": found.fits,
            "source": found.step.source,
            "revision": git_revision(),
            "versions": {name: _version(name) for name in ("jax", "libtpu")},
        }


def dry_runs() -> Iterator[DryRun]:
    """All that the headers name, recipe by recipe. Configs whose header names no topology are no recipes."""
    for path in sorted(CONFIGS.glob("*.yaml")):
        for line in path.read_text(encoding="utf-8").splitlines():
            for trained in TRAINED:
                if line.startswith(f"#   {trained}"):
                    for name in re.findall(r"\S+-\d+(?:GB)?\b", line):
                        yield DryRun(path.stem, trained, name)


def read(path: Path) -> dict[DryRun, Result]:
    """The results of a file, none where there is no file. Raises AgentArkError for another kind of file."""
    try:
        stored = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
        return {DryRun(*(result[key] for key in DryRun.__dataclass_fields__)): result for result in stored}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise AgentArkError(f"{path}: not a file of dry runs ({error}); delete it and run them again") from error


def table(results: Mapping[DryRun, Result]) -> str:
    """Markdown: one row per recipe, in each cell what a device needs of its memory on each topology."""
    rows: dict[str, dict[str, list[Result]]] = {}
    for run, result in results.items():
        rows.setdefault(run.recipe, {trained: [] for trained in TRAINED})[run.trained].append(result)

    def size(recipe: str) -> int:
        return max(result["parameters"] for found in rows[recipe].values() for result in found)

    lines = [f"| recipe | {' | '.join(TRAINED)} |", "|---" * (1 + len(TRAINED)) + "|"]
    for recipe in sorted(rows, key=lambda recipe: (recipe.rsplit("_", 1)[0], size(recipe))):
        cells = (", ".join(map(_cell, found)) for found in rows[recipe].values())
        lines.append(f"| `{recipe}` | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def sizes(results: Mapping[DryRun, Result]) -> str:
    """Markdown: a row for each recipe, way of training and topology, with the batch of a step and what it takes."""
    lines = [
        "| recipe | parameters | trained | a step: rows × tokens | topology | state, a device | step, of a device |",
        "|---|---|---|---|---|---|---|",
    ]
    size = {run.recipe: result["parameters"] for run, result in results.items()}  # a recipe's runs stay together
    for run, result in sorted(results.items(), key=lambda item: (size[item[0].recipe], item[0].recipe)):
        batch = f"{result['rows']} × {result['row_length']:,}"
        lines.append(
            f"| `{run.recipe}` | {result['parameters'] / 1e9:.1f}B | {run.trained} | {batch} | {run.topology} "
            f"| {result['state'] / GIB:.1f} GiB | {_gib(result)} |"
        )
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0 when all fit, 1 when one does not or cannot be run, 2 when nothing can be run as asked."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.dry_runs", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--platform", choices=["gpu", "tpu"], help="only topologies of this kind")
    parser.add_argument("--only", metavar="RECIPE", help="only this recipe")
    parser.add_argument("--table", action="store_true", help="run nothing, print the table of the results")
    options = parser.parse_args(arguments)
    named = list(dry_runs())
    try:
        if options.table:
            print(table(read(RESULTS)), end="")
            return 0
        if options.only and options.only not in {run.recipe for run in named}:
            raise UsageError(f"--only: there is no recipe {options.only!r}; {CONFIGS} has them")
        chosen = [
            run
            for run in named
            if options.only in (None, run.recipe) and options.platform in (None, topology(run.topology).platform)
        ]
        return 0 if _run_all(chosen, named, lambda text: print(text, file=sys.stderr, flush=True)) else 1
    except AgentArkError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


def _run_all(chosen: Sequence[DryRun], named: Sequence[DryRun], say: Callable[[str], None]) -> bool:
    """Whether all chosen ones fit. Each result is written as soon as it is there; those of no recipe are dropped."""
    results, all_fit, started = read(RESULTS), True, time.monotonic()
    for number, run in enumerate(chosen, 1):
        try:
            results[run] = run()
            verdict = f"{'fits' if results[run]['fits'] else 'DOES NOT FIT'}, {_gib(results[run])}"
            all_fit &= results[run]["fits"]
        except AgentArkError as error:  # the others are worth knowing all the same
            results.pop(run, None)
            verdict, all_fit = f"FAILED: {error}", False
        place = f"{number} of {len(chosen)}: {run.recipe}, {run.trained}, {run.topology}"
        say(f"[{time.monotonic() - started:5.0f} s] {place}: {verdict}")
        results = {run: results[run] for run in named if run in results}
        write_json(RESULTS, list(results.values()))
    for page, written in ((README, table(results)), (SCALING, sizes(results))):
        text = page.read_text(encoding="utf-8")
        write_text(page, re.sub(r"^\| recipe \|.*?\n(?=\n)", lambda _, new=written: new, text, flags=re.S | re.M))
    return all_fit


def _cell(result: Result) -> str:
    return f"{result['topology']}: {_gib(result)}{'' if result['fits'] else ', **does not fit**'}"


def _gib(result: Result) -> str:
    return f"{result['step'] / GIB:.1f} of {result['memory'] / GIB:.1f} GiB"


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    sys.exit(main())
