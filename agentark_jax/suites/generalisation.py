"""Questions of another kind than the model was made for, with free answers: HotpotQA, QASPER, QMSum and the like."""

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from agentark_jax.errors import UsageError
from agentark_jax.evaluation.closeness import closeness_figures
from agentark_jax.evaluation.suite_config import ElsewhereConfig, GeneralisationConfig
from agentark_jax.records import stable_hash
from agentark_jax.report import words
from agentark_jax.stages import Work
from agentark_jax.suites import tabled
from agentark_jax.suites.bench import Bench
from agentark_jax.suites.greedy import fitting, greedy_turns, load_rows, said, save_rows
from agentark_jax.tasks.config import TaskConfig
from agentark_jax.tasks.grading.bertscore import NAME, BERTScore
from agentark_jax.tasks.grading.short import SCORES, gold_answers, read_free, scores
from agentark_jax.tasks.task import Task, make_task


def measure(bench: Bench, settings: GeneralisationConfig) -> dict[str, Any]:
    """Of each task, how close the greedy answers come to the gold ones; `left_out` are questions too long to ask."""
    tasks = {each.name: (each, _task(each)) for each in settings.tasks}
    bertscore = None if settings.bertscore is None else BERTScore(settings.bertscore, settings.bertscore_layer)
    model = {} if bertscore is None else {"bertscore": settings.bertscore, "layer": bertscore.layer}
    return {name: _measure(bench, task, each.questions, bertscore, model) for name, (each, task) in tasks.items()} | (
        {"bertscore": model} if model else {}
    )


def _task(config: ElsewhereConfig) -> Task:
    try:
        return make_task(TaskConfig(name=config.name, path=config.path), {"held_out": config.questions})
    except UsageError as error:
        raise UsageError(f"generalisation.tasks, {config.name} (its path and questions): {error}") from error


def _measure(
    bench: Bench, task: Task, count: int, bertscore: BERTScore | None, model: Mapping[str, Any]
) -> dict[str, Any]:
    asked = task.questions("held_out", count)

    def build(work: Work) -> None:
        fit = fitting(bench, asked)
        turns = greedy_turns(bench, work, task.name, fit)
        texts = [said(turns[question.id]) for question in fit]
        found = [scores(question, text) for question, text in zip(fit, texts, strict=True)]
        if bertscore is not None:
            answers = [read_free(question, text) for question, text in zip(fit, texts, strict=True)]
            near = bertscore(answers, list(map(gold_answers, fit)))
            found = [{**row, NAME: score} for row, score in zip(found, near, strict=True)]
        save_rows(work, [{"question": each.id, "scores": row} for each, row in zip(fit, found, strict=True)])
        work.counts["left_out"] = len(asked) - len(fit)

    told = stable_hash([[each.id, gold_answers(each)] for each in asked])
    stage = f"generalisation_{task.name}"
    manifest = bench.measure(stage, build, version=1, config={"scores": SCORES, **model}, inputs={"asked": told})
    rows = load_rows(manifest)
    by_id = {question.id: question for question in asked}
    found = closeness_figures(
        [row["scores"] for row in rows], [by_id[row["question"]] for row in rows], level=bench.level
    )
    return {**found, "left_out": manifest.counts["left_out"]}


def tables(figures: Mapping[str, Any]) -> list[Table]:
    """A column for each task, a row for each score, in per cent."""
    tasks = {name: found for name, found in figures.items() if "scores" in found}
    scores = dict.fromkeys(score for found in tasks.values() for score in found["scores"])
    rows = [[score, *(tabled.percent(found["scores"].get(score)) for found in tasks.values())] for score in scores]
    for key, name in (("n", "n"), ("documents", "documents"), ("left_out", "too long")):
        rows.append([name, *(words.number(found[key]) for found in tasks.values())])
    return [tabled.table("other tasks, %", ["", *tasks], rows)]
