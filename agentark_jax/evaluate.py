"""`agentark evaluate`: what one model can do on one task, whoever made it; suite by suite, each stage done once."""

import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console

from agentark_jax.cast import find_model
from agentark_jax.config import EvaluateRun, as_dict
from agentark_jax.directory import CONFIG, announcer, keep_config, tell_work
from agentark_jax.errors import UsageError
from agentark_jax.files import write_json
from agentark_jax.generation import Generation, Model, Seat
from agentark_jax.outcome import STORE
from agentark_jax.progress import Display
from agentark_jax.records import Question, questions_hash, stable_hash
from agentark_jax.stages import Manifest, Run, Work, git_revision, locked, package_versions
from agentark_jax.suites.bench import Bench
from agentark_jax.suites.registry import SUITES
from agentark_jax.tasks.task import Task, make_task
from agentark_jax.traces.store import TraceStore

SCHEMA = 1
RESULTS = "results.json"


def evaluate(config: EvaluateRun, *, update: bool) -> dict[str, Any]:
    """Bring an evaluation up to date, write `results.json` and print it.

    Args:
        update: go on in a directory that was made with another configuration.

    Raises:
        UsageError: the model, the task or the directory cannot be used as they are.
        AgentArkError: a stage failed; what is done stays done.
    """
    started, display = time.monotonic(), Display(Console())
    with locked(config.directory):
        keep_config(config, update=update)
        run = Run(config.directory, on_stage=announcer(display))
        with TraceStore(config.directory / STORE) as store:
            bench = prepare(config, run, store, display)
            figures = {name: SUITES[name].measure(bench, getattr(config, name)) for name in config.suites}
        results = _results(config, bench, figures)
        write_json(config.directory / RESULTS, results)
    for name in config.suites:
        for table in SUITES[name].tables(figures[name]):
            display.console.print(table)
    tell_work(display, run.manifests, started, "generated")
    display.say(f"Results: {config.directory / RESULTS}")
    return results


def prepare(config: EvaluateRun, run: Run, store: TraceStore, display: Display) -> Bench:
    """Find the model and draw the questions.

    Raises UsageError where the model takes too few tokens for a question and its answer.
    """
    model = _find_model(config, run, display)
    task = make_task(config.task, {"held_out": config.questions})
    questions = _draw_questions(config, run, store, task)
    seat = Seat(model, tuple(config.engine.servers), config.api, config.served)
    generation = Generation(config.engine, store, display, seed=config.seed)
    bench = Bench(config, run, store, display, generation, task, questions, model, seat)
    longest = max(sum(map(len, model.form.question(question))) for question in questions)
    if longest + config.max_tokens > bench.limit:
        raise UsageError(
            f"max_tokens is {config.max_tokens}, and the longest question takes {longest} tokens, but the model or "
            f"engine.context takes {bench.limit} together: lower max_tokens, or raise engine.context if that is set."
        )
    return bench


def _find_model(config: EvaluateRun, run: Run, display: Display) -> Model:
    ours = config.api == "sglang"  # whose weights are read
    with display.bar("find the model", total=1):
        model, found = find_model(config.model, config.prompt, weights=ours)

    def build(work: Work) -> None:
        work.counts = found

    run.produce("model", build, version=1, config={"source": config.model}, inputs={"files": stable_hash(found)})
    return model


def _draw_questions(config: EvaluateRun, run: Run, store: TraceStore, task: Task) -> list[Question]:
    questions = task.questions("held_out", config.questions)

    def build(work: Work) -> None:
        store.put_questions(questions)
        work.counts = {"held_out": len(questions), "read": dict(task.counts)}

    run.produce(
        "questions",
        build,
        version=1,
        config={"task": as_dict(config.task)},
        inputs={"questions": questions_hash(questions)},
    )
    return questions


def _results(config: EvaluateRun, bench: Bench, figures: Mapping[str, Any]) -> dict[str, Any]:
    """The content of `results.json`; wall-clock figures stand under `timing` only."""
    manifests = {manifest.stage: manifest for manifest in bench.run.manifests}
    return {
        "schema": SCHEMA,
        "run": {
            "name": config.name,
            "seed": config.seed,
            "git": git_revision(),
            "fingerprint": stable_hash(sorted(manifest.fingerprint for manifest in manifests.values())),
            "versions": package_versions(),
            "command": f"agentark evaluate --config {config.directory / CONFIG}",
        },
        "model": {"source": config.model, **_without_location(manifests["model"])},
        "task": {"name": config.task.title, "path": config.task.path, "questions": len(bench.questions)},
        "suites": dict(figures),
        "timing": {
            "stages": [
                {"stage": each.stage, "seconds": each.seconds, "tokens": each.tokens} for each in manifests.values()
            ]
        },
    }


def _without_location(found: Manifest) -> dict[str, Any]:
    return {key: value for key, value in found.counts.items() if key != "location"}
