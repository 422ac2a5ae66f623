"""Whether answers change with what should not matter: distractions, the order of choices, GSM-Plus's perturbations."""

from collections.abc import Mapping
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from rich.table import Table

from agentark_jax.evaluation.perturbations import (
    arrangements,
    can_be_rearranged,
    distracted,
    distractors,
    rearranged,
)
from agentark_jax.evaluation.robustness import (
    NOTHING,
    Chosen,
    Distracted,
    Perturbed,
    distraction_figures,
    perturbation_figures,
    shuffle_figures,
)
from agentark_jax.evaluation.suite_config import HUB, RobustnessConfig
from agentark_jax.records import Question, stable_hash
from agentark_jax.report import words
from agentark_jax.stages import Work
from agentark_jax.suites import tabled
from agentark_jax.suites.bench import Bench
from agentark_jax.suites.greedy import drawn, fitting, greedy_turns, load_rows, save_rows
from agentark_jax.tasks.datasets import DATASETS, load
from agentark_jax.tasks.grading import grader
from agentark_jax.tasks.items import Item, answered, make_question
from agentark_jax.traces.labels import label_turns

GSM_PLUS = "gsm_plus"


def measure(bench: Bench, settings: RobustnessConfig) -> dict[str, Any]:
    """Figures of each part that is set and that the task's questions allow; `left_out` are questions it could not take.

    All answers are greedy, graded as those of the task.
    """
    figures: dict[str, Any] = {}
    if settings.distractors:
        figures["distractors"] = _distractors(bench)
    if settings.orders and any(map(can_be_rearranged, bench.questions)):
        figures["orders"] = _orders(bench, settings.orders)
    if settings.gsm_plus is not None:
        figures[GSM_PLUS] = _gsm_plus(bench, settings.gsm_plus, settings.gsm_plus_seeds)
    return figures


def _distractors(bench: Bench) -> dict[str, Any]:
    def build(work: Work) -> None:
        sentences = distractors(bench.questions, bench.seed)
        pairs = {
            question.id: distracted(question, sentences[question.id])
            for question in bench.questions
            if question.id in sentences
        }
        fit = {question.id for question in fitting(bench, pairs.values())}
        asked = [question for question in bench.questions if question.id in pairs and pairs[question.id].id in fit]
        turns = greedy_turns(bench, work, "distractors", [*asked, *(pairs[question.id] for question in asked)])
        labels = bench.label(turns.values())
        right = {name: labels[turn.key].verdict == "right" for name, turn in turns.items()}
        save_rows(work, [Distracted(each.id, right[each.id], right[pairs[each.id].id]) for each in asked])
        work.counts["left_out"] = len(bench.questions) - len(asked)

    manifest = bench.measure("robustness_distractors", build, version=1, config={})
    rows = [Distracted(**row) for row in load_rows(manifest)]
    return {**distraction_figures(rows, level=bench.level), "left_out": manifest.counts["left_out"]}


def _orders(bench: Bench, count: int) -> dict[str, Any]:
    def build(work: Work) -> None:
        moved = {
            question.id: [(order, rearranged(question, order)) for order in arrangements(question, bench.seed, count)]
            for question in bench.questions
            if can_be_rearranged(question)
        }
        fit = {each.id for each in fitting(bench, (each for several in moved.values() for _, each in several))}
        asked = [
            question
            for question in bench.questions
            if question.id in moved and all(each.id in fit for _, each in moved[question.id])
        ]
        others = [each for question in asked for _, each in moved[question.id]]
        turns = greedy_turns(bench, work, "orders of choices", [*asked, *others])
        labels = bench.label(turns.values())
        letters = {name: labels[turn.key].answer for name, turn in turns.items()}
        rows = []
        for question in asked:
            straight = tuple(range(len(question.meta["choices"])))
            right = ascii_uppercase.index(question.answer)
            before = _place(letters[question.id], straight)
            rows += [
                Chosen(question.id, order, right, before, _place(letters[each.id], order))
                for order, each in moved[question.id]
            ]
        save_rows(work, rows)
        work.counts["left_out"] = len(bench.questions) - len(asked)

    manifest = bench.measure("robustness_orders", build, version=1, config={"orders": count})
    rows = [Chosen(**{**row, "order": tuple(row["order"])}) for row in load_rows(manifest)]
    found = shuffle_figures(rows, level=bench.level, seed=bench.seed)
    return {**found, "orders": count, "left_out": manifest.counts["left_out"]}


def _place(letter: str, order: tuple[int, ...]) -> int:
    """Which choice, as they stand in the question, a letter names in an order."""
    return order[ascii_uppercase.index(letter)] if letter else NOTHING


def _gsm_plus(bench: Bench, source: str, count: int) -> dict[str, Any]:
    part = DATASETS[GSM_PLUS].test
    assert part is not None, "a test set"
    with bench.display.bar("read GSM-Plus", total=1):
        place = None if source == HUB else Path(source).expanduser()
        loaded = load(GSM_PLUS, part, place, 0, "robustness.gsm_plus")
    seeds = sorted({item.group for item in loaded.items})
    chosen = drawn(bench, seeds, seeds, count)
    judge = grader(DATASETS[GSM_PLUS].grader)

    def question(item: Item) -> Question:
        return make_question(GSM_PLUS, "held_out", item, instruction=judge.instruction)

    items = [item for item in loaded.items if item.group in set(chosen)]
    golds = {item.group: item.meta["seed_answer"] for item in items}
    first = {group: question(Item(group.strip(), golds[group], answered("", golds[group]))) for group in chosen}
    perturbed = [(item.group, question(item)) for item in items]

    def build(work: Work) -> None:
        fit = {each.id for each in fitting(bench, [*first.values(), *(each for _, each in perturbed)])}
        asked = [(group, each) for group, each in perturbed if each.id in fit and first[group].id in fit]
        questions = [*(first[group] for group, _ in asked), *(each for _, each in asked)]
        turns = greedy_turns(bench, work, "GSM-Plus", questions)
        labels = label_turns(bench.store, turns.values(), judge, judge.id)
        right = {name: labels[turn.key].verdict == "right" for name, turn in turns.items()}
        rows = [
            Perturbed(first[group].id, each.meta["perturbation"], right[each.id], right[first[group].id])
            for group, each in asked
        ]
        save_rows(work, rows)
        work.counts["left_out"] = len(perturbed) - len(asked)

    told = stable_hash([[each.id, each.answer] for each in [*first.values(), *(each for _, each in perturbed)]])
    config = {"grader": judge.id}
    manifest = bench.measure("robustness_gsm_plus", build, version=1, config=config, inputs={"gsm_plus": told})
    rows = [Perturbed(**row) for row in load_rows(manifest)]
    return {
        "kinds": perturbation_figures(rows, level=bench.level),
        "left_out": manifest.counts["left_out"],
        "read": dict(loaded.counts),
    }


def tables(figures: Mapping[str, Any]) -> list[Table]:
    """A table for each part."""
    made = []
    if "distractors" in figures:
        found = figures["distractors"]
        cells = [tabled.percent(found[key]) for key in ("clean", "distracted")]
        row = [*cells, tabled.points(found["difference"]), tabled.percent(found["kept"]), tabled.count(found["clean"])]
        columns = ["accuracy %", "with a distractor %", "difference", "right stays right %", "n"]
        made.append(tabled.table("a sentence that does not belong there", columns, [row]))
    if "orders" in figures:
        made += _order_tables(figures["orders"])
    if GSM_PLUS in figures:
        columns = ["perturbation", "accuracy %", "of the seeds %", "difference", "drop rate %", "n"]
        rows = [
            (
                each["kind"],
                tabled.percent(each["accuracy"]),
                tabled.percent(each["seed_accuracy"]),
                tabled.points(each["difference"]),
                tabled.percent(each["drop_rate"]),
                tabled.count(each["accuracy"]),
            )
            for each in figures[GSM_PLUS]["kinds"]
        ]
        made.append(tabled.table("GSM-Plus", columns, rows))
    return made


def _order_tables(found: Mapping[str, Any]) -> list[Table]:
    rows = [
        ("accuracy, original order", tabled.percent(found["original"]), tabled.count(found["original"])),
        ("accuracy, other orders", tabled.percent(found["shuffled"]), tabled.count(found["shuffled"])),
        ("same choice in another order", tabled.percent(found["same"]), tabled.count(found["same"])),
        ("same choice in all orders", tabled.percent(found["always"]), tabled.count(found["always"])),
    ]
    for key, name in (("spread", "largest − smallest accuracy of positions"), ("bias", "bias towards positions")):
        figure = found[key]
        chance = "" if figure is None else f", by chance {words.percent(figure['chance'])}"
        test = "" if figure is None else f", p {words.p_value(figure['p_value'])}"
        rows.append((name + chance + test, tabled.percent(figure), tabled.count(figure)))
    positions = [
        (str(each["position"]), tabled.percent(each["accuracy"]), tabled.points(each["chosen"]))
        for each in found["positions"]
    ]
    return [
        tabled.table("order of choices", ("", "%", "n"), rows),
        tabled.table("", ("position", "accuracy where the right one stands there %", "chosen over chance"), positions),
    ]
