"""The suites on an engine with a script, so that every figure is known beforehand."""

import io
import itertools
import json
import re
from dataclasses import replace

import pytest
from rich.console import Console
from scripted import ScriptedEngine, ScriptedGeneration

from agentark_jax.config import EvaluateRun
from agentark_jax.data.planting import plant, right_solution, wrong_solution
from agentark_jax.evaluation.config import AccuracyConfig, SelfCorrectionConfig
from agentark_jax.generation import Model, Seat
from agentark_jax.models.config import ModelConfig
from agentark_jax.models.source import ScratchConfig
from agentark_jax.progress import Display
from agentark_jax.protocols.checking import CHECKS
from agentark_jax.protocols.config import DebateConfig
from agentark_jax.stages import Run
from agentark_jax.suites import accuracy, self_correction
from agentark_jax.suites.bench import Bench
from agentark_jax.tasks.config import TaskConfig
from agentark_jax.tasks.task import make_task
from agentark_jax.traces.store import TraceStore

COUNT, SERVERS = 8, ("http://scripted",)


@pytest.fixture
def bench_of(form, tmp_path):
    """A bench whose model says what `script(question, gold place, prompt, sampling)` says."""
    task = make_task(TaskConfig(steps=(2, 3)), {"held_out": COUNT})
    questions = task.questions("held_out", COUNT)
    size = ScratchConfig(max_positions=1024)
    shape = ModelConfig.from_hf(size.to_hf(vocabulary=form.tokenizer.vocabulary_size, bos_id=None, eos_id=1), "c.json")
    stores = []

    def make(script, **settings):
        def say(prompt, sampling):
            place = next(place for place, question in enumerate(questions) if question.prompt in prompt)
            return script(place, questions[place], prompt, sampling)

        config = EvaluateRun(model="scripted", root=str(tmp_path), questions=COUNT, max_tokens=100, **settings)
        if not stores:
            stores.append(TraceStore(tmp_path / "traces.sqlite"))
            stores[0].put_questions(questions)
        display = Display(Console(quiet=True))
        engine = ScriptedEngine(form, say)
        model = Model("scripted", tmp_path, "r0", shape, form)
        generation = ScriptedGeneration(engine, config.engine, stores[0], display, seed=0)
        run = Run(tmp_path)
        return Bench(config, run, stores[0], display, generation, task, questions, model, Seat(model, SERVERS)), engine

    yield make
    for store in stores:
        store.close()


def printed(tables) -> str:
    console = Console(width=120, record=True, file=io.StringIO())
    for table in tables:
        console.print(table)
    return console.export_text()


def test_accuracy_counts_answers_votes_and_tokens(bench_of):
    def script(place, question, prompt, sampling):
        if sampling.temperature == 0:
            return question.rationale if place < 6 else "The answer is 1000."
        # Half of all samples of the first question are right, none of the last, all of the others.
        turn = next(first) if place == 0 else 0
        return question.rationale if place != COUNT - 1 and turn % 2 == 0 else "I do not know."

    first = itertools.count()
    bench, engine = bench_of(script, debate=DebateConfig(agents=2, rounds=1, max_tokens=100))
    figures = accuracy.measure(bench, AccuracyConfig(samples=4, debate=False))
    assert json.loads(json.dumps(figures)) == figures
    arms = figures["arms"]
    assert (arms["greedy"]["accuracy"], arms["greedy"]["n"], arms["greedy"]["unparseable"]) == (6 / 8, 8, 0)
    assert (arms["samples"]["correct"], arms["samples"]["n"], arms["samples"]["unparseable"]) == (26, 32, 6)
    assert (arms["vote"]["accuracy"], arms["vote"]["calls"]) == (7 / 8, 32)
    # pass@1 is the mean, pass@2 of two right ones in four 1 − 1/6, pass@4 the share with any right one.
    passes = {one["k"]: one["accuracy"] for one in figures["pass"]}
    assert passes == pytest.approx({1: 26 / 32, 2: (6 + 5 / 6) / 8, 4: 7 / 8})
    assert [one["n"] for one in figures["majority"]] == [32, 16, 8]
    assert [one["a"] for one in figures["differences"]] == ["vote"]
    assert len(engine.prompts) == 8 + 32
    assert "maj@k" in printed(accuracy.tables(figures))

    again, engine = bench_of(script, debate=DebateConfig(agents=2, rounds=1, max_tokens=100))
    wider = accuracy.measure(again, AccuracyConfig(samples=4, multi_call_questions=3))
    assert len(engine.prompts) == 3 * 2  # the debate alone
    assert (wider["arms"]["debate"]["n"], wider["arms"]["debate"]["calls"]) == (3, 6)
    assert wider["arms"]["greedy"] == arms["greedy"]


def corrector(place, question, prompt, sampling):
    """Right at first on even questions. Corrects what the user brings and what it is asked to review, never what it
    goes on with; believes doubts, praise and peers; sees an error in the first step of everything."""
    gold, wrong = right_solution(question), wrong_solution(question, 0)
    if sampling.regex is not None:
        return "1"
    if "Another answer:" in prompt:
        return gold if gold in prompt.rpartition("Another answer:")[2] else wrong
    if CHECKS["neutral"] in prompt:
        return gold
    if CHECKS["adversarial"] in prompt:
        return wrong
    if CHECKS["supportive"] in prompt:
        return gold if place % 2 == 0 else wrong
    if prompt.endswith(" Wait"):
        return ""
    begun = prompt.rpartition("Answer:")[2].strip()
    if not begun:
        return gold if place % 2 == 0 else wrong
    # An error in the first step is corrected, one in the second is not.
    second = plant(gold, 1, 0).beginning.strip()
    return wrong.splitlines()[-1] if begun == second else gold.splitlines()[-1]


def test_self_correction_tells_a_known_model_as_it_is(bench_of):
    bench, engine = bench_of(corrector)
    figures = self_correction.measure(bench, SelfCorrectionConfig(steps=2))
    assert json.loads(json.dumps(figures)) == figures
    shares = {
        condition: tuple(each[key]["share"] for key in ("accuracy_1", "accuracy_2", "corrected", "given_up"))
        for condition, each in figures["checks"].items()
    }
    assert shares == {
        "neutral": (0.5, 1.0, 1.0, 0.0),
        "adversarial": (0.5, 0.0, 0.0, 1.0),
        "supportive": (0.5, 0.5, 0.0, 0.0),
        "wait": (0.5, 0.5, 0.0, 0.0),  # nothing new is said: the answer stands
        "users": (0.5, 1.0, 1.0, 0.0),
    }
    assert all(each["corrected"]["n"] == each["given_up"]["n"] == 4 for each in figures["checks"].values())
    assert {name: spot["rate"] for name, spot in figures["blind_spot"].items()} == {"review": 0.0, "wait": 1.0}
    recovery = figures["recovery"]
    assert [(step["step"], step["planted"]["share"]) for step in recovery["by_step"]] == [(1, 1.0), (2, 0.0)]
    assert recovery["clean"] == {**recovery["clean"], "share": 1.0, "n": 2 * COUNT}
    assert recovery["solutions"] == {"own": 4, "gold": 4}
    localisation = figures["localisation"]
    assert localisation["clean"]["share"] == 0.0
    seeded = sum(row["step"] == 0 for row in rows(bench, "localisation") if row["role"] == "planted")
    assert localisation["planted"]["share"] == seeded / COUNT
    assert (localisation["f1"]["f1"], localisation["unparseable"]) == (0.0, 0)
    assert figures["peers"]["given_up_to_false"] == {**figures["peers"]["given_up_to_false"], "share": 1.0, "n": 4}
    assert figures["peers"]["corrected_by_true"] == {**figures["peers"]["corrected_by_true"], "share": 1.0, "n": 4}
    assert figures["peers"]["left_out"] == 0
    assert figures["verification"]["steps"]["share"] == 0.0
    assert len(engine.prompts) == COUNT * (1 + 5 + 2 * 2 + 2 + 1)
    text = printed(self_correction.tables(figures))
    # A ratio of four that are corrected to none, without an interval, says so.
    assert re.search(r"blind spot, wait \(too few corrected for an interval\) +100\.0", text)

    again, engine = bench_of(corrector)
    assert self_correction.measure(again, SelfCorrectionConfig(steps=2)) == figures
    assert engine.prompts == []


def test_no_solution_is_begun_that_has_come_to_its_answer(bench_of):
    def script(place, question, prompt, sampling):
        """What it boxes is an answer; the words after it are only said."""
        return (
            f"{question.rationale.splitlines()[0]}\nSo \\boxed{{{question.answer}}}.\nThe answer is {question.answer}."
        )

    bench, _ = bench_of(script)
    self_correction.measure(bench, SelfCorrectionConfig(localisation=False))
    recovered = rows(bench, "recovery")
    assert {row["source"] for row in recovered} == {"own"}
    assert {row["step"] for row in recovered} == {0}


def rows(bench, stage: str) -> list[dict]:
    path = bench.run.directory / f"self_correction_{stage}" / "rows.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_what_does_not_fit_the_model_is_left_out_and_counted(bench_of):
    bench, _ = bench_of(corrector)
    alone = max(sum(map(len, bench.form.question(question))) for question in bench.questions)
    narrow = replace(bench.model, config=replace(bench.model.config, max_positions=alone + 100))
    bench = replace(bench, model=narrow, seat=Seat(narrow, SERVERS))
    figures = self_correction.measure(bench, SelfCorrectionConfig(steps=1, localisation=False))
    assert figures["checks"]["neutral"]["too_long"] == COUNT
    assert figures["checks"]["neutral"]["accuracy_2"]["n"] == 0
    assert figures["localisation"] is None
    assert {row["step"] for row in rows(bench, "recovery")} <= {0}
    assert "neutral" in printed(self_correction.tables(figures))
