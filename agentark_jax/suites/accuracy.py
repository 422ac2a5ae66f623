"""How often a model is right, and at what cost: greedy, by vote, in a debate with itself, by other methods.

All figures follow from the predictions that the stages keep; tokens are those of prompts and completions.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

from rich.table import Table
from rich.text import Text

from agentark_jax.asking import GREEDY, SAMPLED, ask_debate, ask_method, flatten, keep_keys, keep_predictions
from agentark_jax.config import as_dict
from agentark_jax.evaluation import summary
from agentark_jax.evaluation.attempts import by_question, counts_of, majority_figures, pass_figures, voted
from agentark_jax.evaluation.config import AccuracyConfig
from agentark_jax.evaluation.predictions import Prediction, load_predictions, predict, save_predictions
from agentark_jax.generation import Asked
from agentark_jax.outcome import PREDICTIONS
from agentark_jax.protocols.calls import Draw
from agentark_jax.protocols.debate import longest_prompt
from agentark_jax.records import DEBATE
from agentark_jax.report import words
from agentark_jax.stages import Work
from agentark_jax.suites import tabled
from agentark_jax.suites.bench import Bench

ONE, SAMPLES, VOTE = "greedy", "samples", "vote"


def measure(bench: Bench, settings: AccuracyConfig) -> dict[str, Any]:
    """Figures of every arm (each way to answer), of majorities and pass rates by number of samples, and differences."""
    arms = {ONE: greedy(bench)}
    majorities, passes = [], []
    if settings.samples:
        arms[SAMPLES] = samples(bench, settings)
        grouped = by_question(arms[SAMPLES])
        arms[VOTE] = list(voted(grouped))
        counts = counts_of(settings.samples)
        majorities = [majority_figures(grouped, k, level=bench.level) for k in counts]
        passes = [pass_figures(grouped, k, level=bench.level) for k in counts]
    arms |= _together(bench, settings)
    contrasts = [(name, ONE, f"{name} over one greedy answer") for name in arms if name not in (ONE, SAMPLES)]
    return {
        "arms": {name: _arm(name, predictions, bench.level) for name, predictions in arms.items()},
        "majority": majorities,
        "pass": passes,
        "differences": summary.differences([arms], contrasts, level=bench.level),
        "settings": {"samples": settings.samples, "temperature": settings.temperature},
    }


def greedy(bench: Bench) -> list[Prediction]:
    """The one greedy answer to each question, in the order of `bench.questions`; other suites start from it, too."""

    def build(work: Work) -> None:
        turns = bench.ask_alone(work, "greedy answers", protocol=GREEDY)
        keep_predictions(work, bench.questions, turns, turns, bench.label(flatten(turns)))

    return _predictions(bench, ONE, build, {})


def samples(bench: Bench, settings: AccuracyConfig) -> list[Prediction]:
    """Independent answers to each question, each a prediction of its own, in the order of questions and samples."""
    draw = Draw(settings.temperature, bench.config.max_tokens)

    def build(work: Work) -> None:
        turns = bench.ask_alone(work, "samples", protocol=SAMPLED, draw=draw, samples=settings.samples)
        said = flatten(turns)
        labels = bench.label(said)
        save_predictions(work.directory / PREDICTIONS, [predict([turn], [turn], labels) for turn in said])
        keep_keys(work, turns)

    return _predictions(bench, SAMPLES, build, {"samples": settings.samples, "temperature": settings.temperature})


def _together(bench: Bench, settings: AccuracyConfig) -> dict[str, list[Prediction]]:
    """What takes many calls: the debate, and the methods that are configured."""
    few = bench.questions[: settings.multi_call_questions or len(bench.questions)]
    asked: dict[str, Any] = {"seats": [bench.seat], "questions": few, "read": bench.read}
    arms = {}

    def arm(name: str, config: Mapping[str, Any], ask: Callable[..., tuple[Asked, Asked]]) -> None:
        def build(work: Work) -> None:
            turns, voters = ask(work=work)
            keep_predictions(work, few, turns, voters, bench.label(flatten(turns)))

        arms[name] = _predictions(bench, name, build, {**config, "questions": len(few)})

    if settings.debate:
        debate = bench.config.debate
        longest = max(longest_prompt(question, bench.form, debate) for question in few) + debate.max_tokens
        asked["context"] = min(longest, bench.model.config.max_positions)
        ask = partial(ask_debate, bench.generation, title=DEBATE, settings=debate, seed=bench.seed, **asked)
        arm(DEBATE, {"debate": asdict(debate)}, ask)
    asked["context"] = bench.config.methods.context
    for name, method in bench.config.methods.chosen().items():
        ask = partial(ask_method, bench.generation, title=name, method=method, **asked)
        arm(name, {"method": as_dict(method), "context": asked["context"]}, ask)
    return arms


def _predictions(
    bench: Bench, stage: str, build: Callable[[Work], None], config: Mapping[str, Any]
) -> list[Prediction]:
    manifest = bench.measure(f"accuracy_{stage}", build, version=1, config=config)
    return load_predictions(manifest.directory / PREDICTIONS)


def _arm(name: str, predictions: Sequence[Prediction], level: float) -> dict[str, Any]:
    figures = summary.arm_figures([{name: predictions}], name, level=level)
    calls, cut = sum(each.calls for each in predictions), sum(each.truncated for each in predictions)
    return {**figures, "calls": calls, "truncated": cut}


def tables(figures: Mapping[str, Any]) -> list[Table]:
    """Arms with their cost, then majorities and pass rates by number of samples, then differences."""
    arms = [
        (
            name,
            _share(arm),
            words.number(arm["n"]),
            words.percent(arm["unparseable"] / arm["n"]),
            words.percent(arm["truncated"] / arm["calls"]),
            words.number(arm["calls_per_question"], 1),
            words.number(arm["tokens_per_question"]["total"]),
        )
        for name, arm in figures["arms"].items()
    ]
    columns = ("arm", "accuracy %", "n", "unparseable %", "cut off %", "calls/q", "tokens/q")
    found = [tabled.table("accuracy", columns, arms)]
    if figures["majority"]:
        several = [
            (str(majority["k"]), _share(majority), _share(passed))
            for majority, passed in zip(figures["majority"], figures["pass"], strict=True)
        ]
        found.append(tabled.table("", ("k", "maj@k %", "pass@k %"), several))
    if figures["differences"]:
        grid = Table.grid(padding=(0, 0, 1, 0))
        grid.add_column(overflow="fold")
        for difference in figures["differences"]:
            grid.add_row(Text(words.clean(difference["sentence"])))
        found.append(grid)
    return found


def _share(figures: Mapping[str, Any]) -> str:
    return f"{words.percent(figures['accuracy'])} {words.interval(figures['low'], figures['high'])}"
