"""How well the model's own answers reason, by the marks of one or two judges, and how far these agree."""

import asyncio
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from rich.table import Table

from agentark_jax.cast import find_model
from agentark_jax.data.render import Prompt
from agentark_jax.engines.base import Engine, Request, TooLong
from agentark_jax.errors import UsageError
from agentark_jax.evaluation.rubric import (
    AXES,
    MAX_TOKENS,
    RUBRIC,
    agreement_figures,
    mark_figures,
    marking,
    read_mark,
    rubric_prompt,
)
from agentark_jax.evaluation.suite_config import JudgeConfig, QualityConfig
from agentark_jax.generation import Seat
from agentark_jax.process import Journal, journal
from agentark_jax.records import Question, stable_hash
from agentark_jax.stages import Manifest, Work
from agentark_jax.suites import tabled
from agentark_jax.suites.bench import Bench
from agentark_jax.suites.greedy import greedy_turns, load_rows, said, save_rows

_MARKS = "marks.jsonl"


@dataclass(frozen=True)
class _Answer:
    question: Question
    text: str


def measure(bench: Bench, settings: QualityConfig) -> dict[str, Any]:
    """Of each judge the marks of each axis, and of two their agreement; answers are greedy."""
    asked = bench.questions[: settings.questions or len(bench.questions)]
    seats = [_seat(bench, judge) for judge in settings.judges]

    def build(work: Work) -> None:
        turns = greedy_turns(bench, work, "answers to judge", asked)
        save_rows(work, [{"question": each.id, "text": said(turns[each.id])} for each in asked])

    manifest = bench.measure("quality_answers", build, version=1, config={"answers": len(asked)})
    texts = {row["question"]: row["text"] for row in load_rows(manifest)}
    answers = [_Answer(question, texts[question.id]) for question in asked]
    marks = [_judged(bench, f"quality_judge_{place}", seat, answers, manifest) for place, seat in enumerate(seats, 1)]
    names, questions = [judge.model for judge in settings.judges], [question.id for question in asked]

    def columns(axis: str) -> list[list[int | None]]:
        return [[given.get(f"{question} {axis}") for question in questions] for given in marks]

    def agreement(axis: str) -> dict[str, Any] | None:
        if len(marks) < 2:
            return None
        first, second = columns(axis)
        return agreement_figures(first, second, questions, level=bench.level)

    return {
        "judges": names,
        "axes": {
            axis: [mark_figures(column, questions, level=bench.level) for column in columns(axis)] for axis in AXES
        },
        "agreement": {axis: agreement(axis) for axis in AXES},
    }


def _seat(bench: Bench, judge: JudgeConfig) -> Seat:
    try:
        model, _ = find_model(judge.model, bench.config.prompt)
    except UsageError as error:
        raise UsageError(f"quality.judges: {error}") from error
    return Seat(model, tuple(judge.servers))


def _judged(
    bench: Bench, stage: str, seat: Seat, answers: Sequence[_Answer], judged: Manifest
) -> dict[str, int | None]:
    """The marks of one judge, by question id and axis; None where it gave none. What it gave is kept as it comes."""
    judge, form = seat.model, seat.model.form
    prompts = {
        f"{answer.question.id} {axis}": rubric_prompt(answer.question, answer.text, axis, form)
        for answer in answers
        for axis in AXES
    }

    def build(work: Work) -> None:
        longest = max(sum(map(len, prompt)) for prompt in prompts.values()) + MAX_TOKENS
        bench.generation.release()

        async def everyone(marks: Journal) -> list[tuple[int | None, int]]:
            async with bench.generation.engine(seat, min(longest, judge.config.max_positions)) as engine:
                marks.expect(len(prompts))
                asked = (marks.answer(name, partial(_mark, engine, seat, prompt)) for name, prompt in prompts.items())
                return await asyncio.gather(*asked)

        with journal(work.directory / _MARKS, bench.display, f"marks of {judge.name}") as marks:
            work.tokens = sum(tokens for _, tokens in asyncio.run(everyone(marks)))

    slice = {"rubric": RUBRIC, "judge": judge.name, "format": form.hash}
    inputs: dict[str, Manifest | str] = {"answers": judged, "judge": stable_hash(judge.revision)}
    manifest = bench.measure(stage, build, version=2, config={"judging": slice}, inputs=inputs)
    lines = (manifest.directory / _MARKS).read_text().splitlines()
    return {name: mark for name, (mark, _) in map(json.loads, lines)}


async def _mark(engine: Engine, seat: Seat, prompt: Prompt) -> tuple[int | None, int]:
    """The mark, and how many tokens were read and written; no mark where the judge cannot take so much text."""
    ids = np.asarray([token for segment in prompt for token in segment], np.int32)
    try:
        completion = await engine.generate(Request(ids, marking(seat.model.form)))
    except TooLong:
        return None, 0
    return read_mark(completion.text), completion.prompt_tokens + len(completion.ids)


def tables(figures: Mapping[str, Any]) -> list[Table]:
    """The mean mark of each axis and judge, and the agreement of two."""
    columns = ("axis", *(f"mean mark of {judge}" for judge in figures["judges"]), "n")
    rows = [
        (axis, *(tabled.number(each["mean"], 2) for each in found), tabled.count(found[0]["mean"]))
        for axis, found in figures["axes"].items()
    ]
    made = [tabled.table("reasoning, marks from 1 to 5", columns, rows)]
    if any(figures["agreement"].values()):
        columns = ("axis", "equal marks %", "weighted kappa", "Spearman", "first − second", "n")
        rows = [
            (
                axis,
                tabled.percent(found["exact"]),
                *(tabled.number(found[name], 2) for name in ("kappa", "spearman", "bias")),
                tabled.count(found["exact"]),
            )
            for axis, found in figures["agreement"].items()
        ]
        made.append(tabled.table("agreement of the judges", columns, rows))
    return made
