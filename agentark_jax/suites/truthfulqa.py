"""TruthfulQA: how likely a model finds true and false answers, and to which its own come nearer."""

import asyncio
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from agentark_jax.engines.base import Engine
from agentark_jax.evaluation.suite_config import TruthfulQAConfig
from agentark_jax.evaluation.truthfulness import (
    NEARNESS,
    Choices,
    Weighed,
    answer_figures,
    choice_figures,
    nearness,
    read_choices,
    weighed,
)
from agentark_jax.progress import Bar
from agentark_jax.records import Question, stable_hash
from agentark_jax.stages import Work
from agentark_jax.suites import tabled
from agentark_jax.suites.bench import Bench
from agentark_jax.suites.greedy import drawn, fitting, greedy_turns, load_rows, said, save_rows
from agentark_jax.tasks.datasets import DATASETS, load, read_rows
from agentark_jax.tasks.grading.short import gold_answers, read_free
from agentark_jax.tasks.items import make_question

_CHOICES, _ANSWERS = "truthfulqa_mc", "truthfulqa"
_PATH = "truthfulqa.path"
_INSTRUCTION = "Answer in one sentence."


def measure(bench: Bench, settings: TruthfulQAConfig) -> dict[str, Any]:
    """Figures of `choices` (MC1, MC2) and of free `answers`, where they are set; `left_out` did not fit the model."""
    path = None if settings.path is None else Path(settings.path).expanduser()
    inside = None if path is None else path / "truthfulqa"
    place = inside if inside is not None and inside.is_dir() else path
    figures: dict[str, Any] = {}
    if settings.choices:
        figures["choices"] = _choices(bench, place, settings.questions)
    if settings.answers:
        figures["answers"] = _answers(bench, place, settings.questions)
    return figures


def _choices(bench: Bench, place: Path | None, count: int) -> dict[str, Any]:
    part = DATASETS[_CHOICES].test
    assert part is not None, "a test set"
    found = [read_choices(row) for row in read_rows(_CHOICES, part, place, _PATH)]
    asked = drawn(bench, found, [each.question for each in found], count)

    def build(work: Work) -> None:
        sequences = {each.question: _sequences(bench, each) for each in asked}
        longest = {name: max(map(len, several.values())) for name, (_, several) in sequences.items()}
        fit = [each for each in asked if longest[each.question] <= bench.limit]
        context = max((longest[each.question] for each in fit), default=1)

        async def everyone(bar: Bar) -> list[Weighed]:
            async with bench.generation.engine(bench.seat, context) as engine:
                return [await _weigh(engine, each, *sequences[each.question], bar) for each in fit]

        with bench.display.bar("TruthfulQA, choices", total=len(fit)) as bar:
            save_rows(work, asyncio.run(everyone(bar)))
        work.tokens = sum(len(ids) for each in fit for ids in sequences[each.question][1].values())
        work.counts["left_out"] = len(asked) - len(fit)

    told = stable_hash([asdict(each) for each in asked])
    manifest = bench.measure("truthfulqa_choices", build, version=1, config={}, inputs={"choices": told})
    rows = [Weighed(**row) for row in load_rows(manifest)]
    return {**choice_figures(rows, level=bench.level), "left_out": manifest.counts["left_out"]}


def _sequences(bench: Bench, choices: Choices) -> tuple[int, dict[str, np.ndarray]]:
    """Tokens of the question's prompt, and the ids of it and each answer: without the end token, as in the paper."""
    prompt = [token for segment in bench.form.question(_bare(choices.question)) for token in segment]
    responses = {answer: bench.form.response(answer) for answer in choices.answers}
    return len(prompt), {
        answer: np.asarray([*prompt, *(ids[:-1] if ids[-1] in bench.form.stop_ids else ids)], np.int32)
        for answer, ids in responses.items()
    }


async def _weigh(
    engine: Engine, choices: Choices, prompt: int, sequences: Mapping[str, np.ndarray], bar: Bar
) -> Weighed:
    scored = await asyncio.gather(*map(engine.score, sequences.values()))
    totals = (float(np.sum(each[prompt - 1 :], dtype=np.float64)) for each in scored)
    bar.advance(sum(map(len, sequences.values())))
    return weighed(choices, dict(zip(sequences, totals, strict=True)))


def _bare(question: str) -> Question:
    return Question.make(_CHOICES, "held_out", question, "")


def _answers(bench: Bench, place: Path | None, count: int) -> dict[str, Any]:
    part = DATASETS[_ANSWERS].test
    assert part is not None, "a test set"
    items = load(_ANSWERS, part, place, 0, _PATH).items
    asked = [
        make_question(_ANSWERS, "held_out", item, instruction=_INSTRUCTION)
        for item in drawn(bench, items, [item.question for item in items], count)
    ]

    def build(work: Work) -> None:
        fit = fitting(bench, asked)
        turns = greedy_turns(bench, work, "TruthfulQA, answers", fit)
        rows = []
        for question in fit:
            text = read_free(question, said(turns[question.id]))
            near = nearness(text, gold_answers(question), question.meta["incorrect"])
            rows.append({"question": question.id, "near": near})
        save_rows(work, rows)
        work.counts["left_out"] = len(asked) - len(fit)

    told = stable_hash([[each.id, gold_answers(each), each.meta["incorrect"]] for each in asked])
    manifest = bench.measure("truthfulqa_answers", build, version=1, config={}, inputs={"answers": told})
    rows = load_rows(manifest)
    found = answer_figures([row["near"] for row in rows], [row["question"] for row in rows], level=bench.level)
    return {"scores": found, "left_out": manifest.counts["left_out"]}


def tables(figures: Mapping[str, Any]) -> list[Table]:
    """MC1 and MC2, and each score of free answers."""
    made = []
    if "choices" in figures:
        found = figures["choices"]
        row = [tabled.percent(found["mc1"]), tabled.percent(found["mc2"]), tabled.count(found["mc1"])]
        made.append(tabled.table("TruthfulQA, choices", ("MC1 %", "MC2 %", "n"), [row]))
    if "answers" in figures:
        scores = figures["answers"]["scores"]
        columns = ("score", "nearest true, %", "true − false", "nearer to a true one %", "n")
        rows = [
            (
                name,
                tabled.percent(scores[name]["true"]),
                tabled.points(scores[name]["difference"]),
                tabled.percent(scores[name]["nearer"]),
                tabled.count(scores[name]["true"]),
            )
            for name in NEARNESS
        ]
        made.append(tabled.table("TruthfulQA, answers", columns, rows))
    return made
