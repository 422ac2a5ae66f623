"""`agentark run` and its parts: every seed's pipeline, then the report on them; and one worker's share of a debate.

What workers made of the arms (`workers`) is gathered first. `report` writes that report again, from what is in the
run's directory.
"""

import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from agentark_jax import config as configuration
from agentark_jax.config import RunConfig
from agentark_jax.directory import CONFIG, announcer, check_same_config, keep_config, tell_work
from agentark_jax.errors import AgentArkError, UsageError
from agentark_jax.evaluation.telemetry import telemetry
from agentark_jax.files import write_json, write_text
from agentark_jax.models.weights import replaced_directory
from agentark_jax.outcome import STORE, Outcome, load_outcome, save_stages
from agentark_jax.pipeline import EVERYTHING, SHARDS, STUDENT, Pipeline
from agentark_jax.progress import Display
from agentark_jax.report.card import model_card
from agentark_jax.report.page import write_report
from agentark_jax.report.summary import run_summary
from agentark_jax.report.terminal import summary_table
from agentark_jax.results import Transcripts, build_results
from agentark_jax.stages import Manifest, Run, locked
from agentark_jax.traces import exchange
from agentark_jax.traces.store import TraceStore

ARMS = "arms-"  # what the names of directories of workers that share the arms begin with


def run(config: RunConfig, *, update: bool, until: str = EVERYTHING) -> None:
    """Bring a run up to date, as far as the part `until`, and print its summary.

    Args:
        update: go on in a directory that was made with another configuration.

    Raises:
        UsageError: the run directory belongs to another configuration or another process.
        AgentArkError: a stage failed; what is done stays done.
    """
    started = time.monotonic()
    display = Display(Console())
    with locked(config.directory), idle_workers(config.directory):
        keep_config(config, update=update)
        runs = [_run_seed(config, seed, display, until) for seed in config.seeds]
        outcomes = [outcome for _, outcome in runs if outcome is not None]
        results = _report(config, outcomes, config.directory) if outcomes else None
        if outcomes:
            _clear_away(config)
    if results is not None:
        display.console.print(summary_table(results))
    made = [manifest for manifests, _ in runs for manifest in manifests]
    tell_work(display, made, started, "generated or trained")
    if outcomes:
        models = ", ".join(str(outcome.directory / "model") for outcome in outcomes)
        display.say(f"Report: {config.directory / 'report.html'}   Model: {models}")


def report(directory: Path) -> None:
    """Write a finished run's results, report and summary again, from its configuration, manifests and store alone.

    No model, no task and no device is needed. Raises as `load_outcome`, and UsageError where no run is there.
    """
    path = directory / CONFIG
    if not path.exists():
        raise UsageError(f"{path}: missing. Give the directory of a finished run, <root>/<name>.")
    config, _ = configuration.parse(["--config", str(path)], "agentark report", "")
    with locked(directory, ("RUN_DIR", "RUN_DIR")):
        outcomes = [load_outcome(seed, seed_directory(config, seed, directory)) for seed in config.seeds]
        results = _report(config, outcomes, directory)
    display = Display(Console())
    display.console.print(summary_table(results))
    display.say(f"Report: {directory / 'report.html'}")


def debate_shard(config: RunConfig, shard: int, shards: int) -> None:
    """Debate the questions of worker `shard` (from 0) of `shards`, into a store of its own in the run directory.

    Any number of workers do this at once, on any machines that see the directory.

    Raises as `run`, and UsageError where the directory has no base to debate.
    """
    if config.debate.peers == "other":
        raise UsageError(
            "debate.peers is 'other': agents hear what was said on another question, which another worker may have. "
            "Debate without --shard."
        )
    display = Display(Console())
    check_same_config(config, update=False)
    for seed in config.seeds:
        whole = seed_directory(config, seed)
        directory = whole / SHARDS / f"{shard}-of-{shards}"
        with locked(directory), TraceStore(directory / STORE) as store:
            pipeline = Pipeline(config, seed, Run(directory, on_stage=announcer(display)), store, display)
            pipeline.debate_shard(whole, shard, shards)


@contextmanager
def idle_workers(directory: Path) -> Iterator[None]:
    """Keep the workers that share the arms of a run from working.

    Raises: UsageError where one of them is at work.
    """
    with ExitStack() as stack:
        for worker in sorted((directory / SHARDS).glob(f"{ARMS}*")):
            stack.enter_context(locked(worker))
        yield


def worker_directory(directory: Path, shard: int, shards: int) -> Path:
    """Where a worker that makes a share of the arms keeps what it made; of a seed's directory, or a run's."""
    return directory / SHARDS / f"{ARMS}{shard}-of-{shards}"


def _gathered(directory: Path, store: TraceStore, display: Display) -> list[Path]:
    """The directories of the workers of a seed; all that was said in them is in the store then."""
    workers = sorted((directory / SHARDS).glob(f"{ARMS}*"))
    for worker in workers:
        if (worker / STORE).exists():
            with display.bar(f"gather {worker.name}", total=None) as bar:
                added = exchange.merge(store, str(worker / STORE), bar.more)
            made = sum(1 for _ in worker.glob("*/manifest.json"))
            display.say(f"{worker.name}: {made} stages, {added:,} turns added")
    return workers


def _clear_away(config: RunConfig) -> None:
    """Remove what is left of workers: their turns and the stages that were wanted are the run's own now."""
    for directory in {config.directory, *(seed_directory(config, seed) for seed in config.seeds)}:
        for worker in (directory / SHARDS).glob(f"{ARMS}*"):
            shutil.rmtree(worker)


def seed_directory(config: RunConfig, seed: int, directory: Path | None = None) -> Path:
    """Where a seed's stages are; `directory`: where the run is, if not where its configuration says."""
    whole = directory or config.directory
    return whole if len(config.seeds) == 1 else whole / f"seed-{seed}"


def _run_seed(config: RunConfig, seed: int, display: Display, until: str) -> tuple[list[Manifest], Outcome | None]:
    directory = seed_directory(config, seed)
    directory.mkdir(exist_ok=True)
    if len(config.seeds) > 1:
        display.say(f"[bold]seed {seed}[/bold]")
    with TraceStore(directory / STORE) as store:
        run = Run(directory, on_stage=announcer(display), left=_gathered(directory, store, display))
        outcome = Pipeline(config, seed, run, store, display)(until)
    if outcome is not None:
        save_stages(directory, run.manifests)
        _publish_model(outcome, build_results(replace(config, seeds=[seed]), [outcome]))
    return run.manifests, outcome


def _report(config: RunConfig, outcomes: Sequence[Outcome], directory: Path) -> dict[str, Any]:
    """Write `results.json`, `report.html` and `summary.md`; the results that they state.

    While no stage is redone the times are those of the run that made them, so that a look at a finished run does not
    rewrite how long it took.
    """
    results = build_results(config, outcomes)
    results["telemetry"] = _telemetry(config, outcomes)
    path = directory / "results.json"
    if path.exists() and all(manifest.reused for outcome in outcomes for manifest in outcome.manifests):
        try:
            before = json.loads(path.read_text())["timing"]
            if _times(before) == _times(results["timing"]):  # and not of other stages that were there before
                results["timing"] = before
        except (ValueError, KeyError, TypeError) as error:
            raise AgentArkError(f"{path}: damaged ({error}). Delete it and run again.") from error
    write_json(path, results)
    write_text(directory / "summary.md", run_summary(results))
    with TraceStore(outcomes[0].directory / STORE, read_only=True) as store:
        write_report(directory / "report.html", results, Transcripts(outcomes[0], store.texts))
    return results


def _times(timing: Mapping[str, Any]) -> dict[str, Any]:
    """The times of a run without whether its stages were made or found."""
    return {**timing, "stages": [{**stage, "reused": None} for stage in timing["stages"]]}


def _telemetry(config: RunConfig, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    seeds = []
    for outcome in outcomes:
        with TraceStore(outcome.directory / STORE, read_only=True) as store:
            seeds.append((outcome.debated, store.parents(turn.key for turn in outcome.debated)))
    return telemetry(seeds, level=config.evaluate.level)


def _publish_model(outcome: Outcome, results: Mapping[str, Any]) -> None:
    """Put the debate student at `model/`, its files shared with the stage that made them, with a model card."""
    target = outcome.directory / "model"
    with replaced_directory(target) as fresh:
        for path in (outcome.directory / STUDENT / "model").iterdir():
            try:
                os.link(path, fresh / path.name)
            except OSError:  # a file system without hard links
                shutil.copy2(path, fresh / path.name)
        write_text(fresh / "README.md", model_card(results, STUDENT))
