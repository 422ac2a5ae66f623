"""`results.json`: everything a run's report states, with stable keys, assembled from the stages' artefacts.

Wall-clock figures stand under `timing` only; the rest is the same however often the run was killed and resumed.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from agentark_jax import config as configuration
from agentark_jax.arms import ARMS, CHECKS, CONTROL, LEARNED, PLANTED, STUDENT, TWIN, data_of, label_of, start_of
from agentark_jax.config import RunConfig
from agentark_jax.evaluation import attribution, summary
from agentark_jax.evaluation.attribution import SeedRun
from agentark_jax.evaluation.checks import check_all
from agentark_jax.evaluation.predictions import Prediction
from agentark_jax.outcome import Outcome
from agentark_jax.pipeline import share_name
from agentark_jax.protocols.config import DebateConfig
from agentark_jax.records import Question, stable_hash
from agentark_jax.stages import Manifest
from agentark_jax.traces.labels import LabelledTurn, Majority, majorities

SCHEMA = 1
_DECIDES = {
    "majority": "majority of the last round",
    "weighted": "weighted vote of the last round",
    "judge": "one answer of the last round picked by the base as a judge",
    "summariser": "the last round summarised by the base",
}
_DEBATE_OPTIONS = ("topology", "peers", "named", "layout", "history", "early_stop")
_TRAINED = {"warm_start_answers": "warm start: answers", "base": "warm start: revision"}


def build_results(config: RunConfig, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """The content of `results.json` for one or several seeds."""
    level = config.evaluate.level
    seeds = [{name: arm.predictions for name, arm in outcome.evaluated.items()} for outcome in outcomes]
    first = outcomes[0]
    arms = {
        name: {**_description(config, name, first), **summary.arm_figures(seeds, name, level=level)}
        for name in seeds[0]
    }
    arms["vote"]["oracle"] = summary.oracle_figures([outcome.evaluated_vote for outcome in outcomes], level=level)
    arms["debate"]["oracle"] = summary.oracle_figures([outcome.evaluated_debate for outcome in outcomes], level=level)
    reference = arms["base"]["tokens_per_question"]["total"]
    made = first.manifests[-1]  # by what made the last of it, not by what writes it down again
    for name in arms.keys() & CHECKS.keys():
        arms[name]["check"] = True  # no result
    for each in arms.values():
        each["cost_ratio"] = each["tokens_per_question"]["total"] / reference
    return {
        "schema": SCHEMA,
        "run": {
            "name": config.name,
            "seeds": list(config.seeds),
            "git": made.git,
            "fingerprint": stable_hash(_identity(config)),
            "versions": dict(made.versions),
            "command": f"python -m agentark_jax.train --config {config.directory / 'config.yaml'}",
            "config": _identity(config),
        },
        "model": {
            "source": config.model.source,
            "name": _model_name(config),
            "parameters": _manifest(first, "raw_model").counts["parameters"],
            "trainable": _manifest(first, STUDENT).counts["trainable"],
        },
        "task": {
            "name": config.task.title,
            "path": config.task.path,
            "questions": {split: len(questions) for split, questions in first.questions.items() if questions},
        },
        "arms": arms,
        "differences": summary.differences(
            seeds, [contrast for contrast in _contrasts(config) if arms.keys() >= {*contrast[:2]}], level=level
        ),
        **({"attribution": _attribution(config, outcomes)} if config.arms else {}),
        "checks": check_all(seeds, STUDENT, config.evaluate.planted, level=level),
        "counts": _counts(first),
        "debate": summary.debate_figures([outcome.debated for outcome in outcomes], level=level),
        "training": _training(first),
        "judges": {
            name: [{"seed": outcome.seed, **outcome.judged[name].counts} for outcome in outcomes]
            for name in first.judged
        },
        "curves": _curves(config, outcomes),
        "per_seed": _per_seed(outcomes) if len(outcomes) > 1 else [],
        "timing": _timing(outcomes),
    }


class Transcripts(Sequence[dict[str, Any]]):
    """The debates of the held-out questions beside every arm's own answer, then those of the training split.

    Each is made when it is asked for: of a large run the report has room for a few.

    Args:
        texts: what was said in turns, by key (`TraceStore.texts` of the run's store).
    """

    def __init__(self, outcome: Outcome, texts: Callable[[Iterable[str]], Mapping[str, str]]):
        self._texts = texts
        self._questions = {question.id: question for questions in outcome.questions.values() for question in questions}
        self._predictions = {
            name: {prediction.question_id: prediction for prediction in arm.predictions}
            for name, arm in outcome.evaluated.items()
        }
        self._debates: list[tuple[Majority, list[LabelledTurn]]] = []
        for rows in (outcome.evaluated_debate, outcome.debated):
            by_question: dict[str, list[LabelledTurn]] = {}
            for row in rows:
                by_question.setdefault(row.question_id, []).append(row)
            finals = {majority.question_id: majority for majority in sorted(majorities(rows), key=lambda m: m.round)}
            self._debates += [(finals[question_id], turns) for question_id, turns in by_question.items()]

    def __len__(self) -> int:
        return len(self._debates)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[each] for each in range(len(self))[index]]
        final, turns = self._debates[index]
        given = {
            name: predictions[final.question_id]
            for name, predictions in self._predictions.items()
            if final.question_id in predictions
        }
        # The text of an arm's answer is shown where one turn is all there is.
        alone = [prediction.turn_keys[0] for prediction in given.values() if prediction.calls == 1]
        texts = self._texts([*(turn.key for turn in turns), *alone])
        answers = {name: _answer(prediction, texts) for name, prediction in given.items()}
        return _transcript(self._questions[final.question_id], turns, final, answers, texts)


def _transcript(
    question: Question,
    turns: Sequence[LabelledTurn],
    final: Majority,
    answers: Mapping[str, Any],
    texts: Mapping[str, str],
) -> dict[str, Any]:
    before: dict[int, LabelledTurn] = {}
    rounds: list[list[dict[str, Any]]] = []
    for turn in sorted(turns, key=lambda turn: (turn.round, turn.agent)):
        if turn.round == len(rounds):
            rounds.append([])
        last = before.get(turn.agent)
        names = {True: "right", False: "wrong"}
        rounds[turn.round].append(
            {
                "agent": turn.agent + 1,
                "text": texts[turn.key],
                "answer": turn.answer,
                "verdict": turn.verdict,
                "flip": None if last is None else f"{names[last.right]}→{names[turn.right]}",
                "tokens": turn.tokens,
            }
        )
        before[turn.agent] = turn
    return {
        "id": question.id,
        "split": question.split,
        "question": question.prompt,
        "gold": question.answer,
        "rationale": question.rationale,
        "steps": question.meta.get("steps"),
        "final_answer": final.answer,
        "final_verdict": final.verdict,
        "rounds": rounds,
        "answers": answers,
    }


def _answer(prediction: Prediction, texts: Mapping[str, str]) -> dict[str, Any]:
    text = texts[prediction.turn_keys[0]] if prediction.calls == 1 else ""
    return {"text": text, "answer": prediction.answer, "verdict": prediction.verdict}


def _description(config: RunConfig, name: str, outcome: Outcome) -> dict[str, str]:
    """Label, description, protocol and model of an arm."""
    settings, debate = config.evaluate, config.debate
    whole = len(outcome.questions["held_out"])
    share = "all" if len(outcome.evaluated[name].predictions) == whole else "subset"
    if name == "base":
        label, text = "base", f"the warm-started model, {_one(config)}"
        return {"label": label, "description": text, "protocol": "single", "model": "base", "questions": share}
    if name == "vote":
        text = f"majority of {settings.vote_samples} independent samples of the base"
        return {"label": "vote of base", "description": text, "protocol": "vote", "model": "base", "questions": share}
    if name == "debate":
        options = {key: value for key, value in asdict(debate).items() if value != getattr(DebateConfig(), key)}
        unusual = [f"; {key} {options[key]}" for key in _DEBATE_OPTIONS if key in options]
        text = f"{debate.agents} agents ({_who(config)}), {settings.rounds} rounds, {_DECIDES[debate.aggregation]}"
        text += "".join(unusual)
        return {
            "label": "debate of base",
            "description": text,
            "protocol": "debate",
            "model": "base",
            "questions": share,
        }
    methods = config.methods.chosen()
    if name in methods:
        draw = methods[name].draw
        options = {key: value for key, value in asdict(methods[name]).items() if key != "draw"}
        text = f"agents: {_who(config)}; {', '.join(f'{key} {value}' for key, value in options.items())}"
        text += f"; temperature {draw.temperature}, at most {draw.max_tokens} tokens a call"
        return {"label": name, "description": text, "protocol": name, "model": "base", "questions": share}
    if name == PLANTED:
        whole = len(outcome.evaluated[name].predictions)
        changed = outcome.evaluated[name].manifest.counts["planted"]
        text = f"no result: the twin's answers, of whose wrong ones {changed} of {whole} were replaced by right ones"
        described = {"label": label_of(name), "description": text}
        return {**described, "protocol": PLANTED, "model": TWIN, "questions": share}
    return {**_student(config, name, outcome), "protocol": "single", "model": name, "questions": share}


def _student(config: RunConfig, name: str, outcome: Outcome) -> dict[str, str]:
    """Label and description of a student."""
    selected, fitted = _manifest(outcome, "select").counts, _manifest(outcome, name).counts
    what = "rollouts" if "rollouts" in fitted else "examples"
    amount = f"{fitted['examples']} {what}, {fitted['loss_tokens']:,} tokens with loss in {fitted['steps']} steps"
    shares = {share_name(share): share for share in config.curve}
    if name in shares:
        label, learned = f"debate student, {shares[name]:.0%} of questions", "that share of the debate student's data"
    else:
        data, start = data_of(name), start_of(name)
        label, learned = label_of(name), LEARNED[config.select.variant] if data == STUDENT else ARMS[data].learns
        if start is not None:
            learned += f", after those of the {label_of(start)}"
        if data != STUDENT and ARMS[data].matched:
            found = selected["matched"]
            amount += (
                f"; {found['questions']} questions matched, lengths alike at p = {found['lengths'][data]['p']:.2f}"
            )
        elif data != STUDENT and data not in CHECKS:
            amount += "; not matched in volume"
    return {"label": label, "description": f"{_one(config)}; trained on {learned} ({amount})"}


def _one(config: RunConfig) -> str:
    """How base and students answer."""
    temperature = config.evaluate.temperature
    return "one greedy answer" if temperature == 0 else f"one answer at temperature {temperature:g}"


def _who(config: RunConfig) -> str:
    """Who the agents are."""
    if not config.team:
        return "the base"
    return "a team of " + ", ".join(member.model or "the base" for member in config.team)


def _contrasts(config: RunConfig) -> list[tuple[str, str, str]]:
    """Arms that are compared, the first with the second, and how that is called."""
    arms = _compared(config)
    asked = [(each.a, each.b, each.name) for each in attribution.contrasts([STUDENT, *arms])]
    pairs = {frozenset((a, b)) for a, b, _ in asked}
    further = [
        *((STUDENT, name, f"debate student over {label_of(name)}") for name in arms),
        *((name, "base", f"{label_of(name)} over base") for name in arms),
    ]
    return [
        *((method, "base", f"{method} of the base over its one answer") for method in config.methods.chosen()),
        *asked,
        *(contrast for contrast in further if frozenset(contrast[:2]) not in pairs),
        ("debate", "base", "debate of the base over its one answer"),
        ("vote", "base", "vote of the base over its one answer"),
        ("debate", "vote", "debate over vote"),
        (STUDENT, "debate", "debate student over the debate of the base"),
    ]


def _compared(config: RunConfig) -> list[str]:
    """The arms beside the student that are compared: what checks say stands by itself."""
    return [name for name in config.arms if name not in CHECKS]


def _attribution(config: RunConfig, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    return attribution.attribution(
        [
            SeedRun(
                {name: arm.predictions for name, arm in outcome.evaluated.items()},
                {manifest.stage: {"tokens": manifest.tokens, **manifest.counts} for manifest in outcome.manifests},
            )
            for outcome in outcomes
        ],
        [STUDENT, *_compared(config)],
        ["debate", "vote", *config.methods.chosen()],
        variant=config.select.variant,
        rl=config.rl,
        level=config.evaluate.level,
    )


def _counts(outcome: Outcome) -> dict[str, list[dict[str, Any]]]:
    return {name: each["funnel"] for name, each in _manifest(outcome, "select").counts["selections"].items()}


def _training(outcome: Outcome) -> dict[str, dict[str, Any]]:
    """The record of every training stage of one seed."""
    result = {}
    for manifest in outcome.manifests:
        record = manifest.directory / "training.json"
        if record.exists():
            kept = {key: manifest.counts[key] for key in ("examples", "steps", "tokens", "loss_tokens", "final_loss")}
            kept |= {key: manifest.counts[key] for key in ("stopped", "alarms", "rollouts") if key in manifest.counts}
            told = {key: value for key, value in json.loads(record.read_text()).items() if key != "consumed"}
            result[_TRAINED.get(manifest.stage, manifest.stage)] = {**kept, **told}
    return result


def _curves(config: RunConfig, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Accuracy by debate round and question length, by arm and question length, and by amount of training data."""
    level = config.evaluate.level
    questions = {question.id: question for outcome in outcomes for question in outcome.questions["held_out"]}
    steps = sorted({question.meta["steps"] for question in questions.values() if "steps" in question.meta})
    curves: dict[str, Any] = {}

    def graded(arm: str, wanted: int | None = None) -> list[tuple[str, bool]]:
        return [
            (prediction.question_id, prediction.verdict == "right")
            for outcome in outcomes
            for prediction in outcome.evaluated[arm].predictions
            if wanted is None or questions[prediction.question_id].meta["steps"] == wanted
        ]

    def gain(a: str, b: str, wanted: int) -> dict[str, Any]:
        seeds = [
            {
                arm: [p for p in outcome.evaluated[arm].predictions if questions[p.question_id].meta["steps"] == wanted]
                for arm in (a, b)
            }
            for outcome in outcomes
        ]
        found, _ = summary.difference(seeds, a, b, level=level)
        in_points = {"y": 100 * found.difference, "low": 100 * found.low, "high": 100 * found.high}
        return {"x": wanted, **in_points, "n": found.n}

    votes = [majority for outcome in outcomes for majority in majorities(outcome.evaluated_debate)]
    rounds = sorted({majority.round for majority in votes})
    groups = [(f"{count} steps" if count > 1 else "1 step", count) for count in steps] if len(steps) > 1 else []
    if len(rounds) > 1:
        series = []
        for name, wanted in [("all questions", None), *groups]:
            of_group = [
                majority
                for majority in votes
                if wanted is None or questions[majority.question_id].meta["steps"] == wanted
            ]
            points = [
                summary.accuracy_point(
                    index + 1,
                    [(m.question_id, m.verdict == "right") for m in of_group if m.round == index],
                    level=level,
                )
                for index in rounds
            ]
            series.append({"name": name, "points": points})
        title = "Debate of the base on held-out questions: majority by round"
        curves["rounds"] = {"title": title, "x": "round", "y": "accuracy", "series": series}
    if groups:
        curves["steps"] = {
            "title": "Accuracy by number of arithmetic steps",
            "x": "steps in the question",
            "y": "accuracy",
            "series": [
                {
                    "name": name,
                    "points": [summary.accuracy_point(count, graded(name, count), level=level) for count in steps],
                }
                for name in ("base", STUDENT, CONTROL, "vote", "debate")
                if name in outcomes[0].evaluated
            ],
        }
        curves["gains"] = {
            "title": "Where debate helps: paired differences by number of arithmetic steps",
            "x": "steps in the question",
            "y": "difference in points",
            "series": [
                {"name": f"{a} − {b}", "points": [gain(a, b, count) for count in steps]}
                for a, b in (("debate", "vote"), (STUDENT, CONTROL), (STUDENT, "base"))
                if b in outcomes[0].evaluated
            ],
        }
    if config.curve:
        counts = _manifest(outcomes[0], "select").counts["selections"]
        students = [share_name(share) for share in config.curve]
        points = [summary.accuracy_point(0, graded("base"), level=level)]
        for name in sorted([*students, STUDENT], key=lambda name: counts[name]["trajectories"]):
            points.append(summary.accuracy_point(counts[name]["trajectories"], graded(name), level=level))
        series = [{"name": "debate student", "points": points}]
        title = "Accuracy by number of debate trajectories (0 is the base)"
        curves["trajectories"] = {"title": title, "x": "trajectories", "y": "accuracy", "series": series}
    return curves


def _per_seed(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    return [
        {
            "seed": outcome.seed,
            "directory": outcome.directory.name,
            "arms": {
                name: sum(prediction.verdict == "right" for prediction in arm.predictions) / len(arm.predictions)
                for name, arm in outcome.evaluated.items()
            },
        }
        for outcome in outcomes
    ]


def _timing(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    several = len(outcomes) > 1
    stages = [
        {
            "stage": f"seed {outcome.seed}: {manifest.stage}" if several else manifest.stage,
            "seconds": manifest.seconds,
            "tokens": manifest.tokens,
            "tokens_per_second": manifest.tokens / manifest.seconds if manifest.tokens and manifest.seconds else None,
            "reused": manifest.reused,
        }
        for outcome in outcomes
        for manifest in outcome.manifests
    ]
    return {"total_seconds": sum(manifest.seconds for o in outcomes for manifest in o.manifests), "stages": stages}


def _manifest(outcome: Outcome, stage: str) -> Manifest:
    return next(manifest for manifest in outcome.manifests if manifest.stage == stage)


def _model_name(config: RunConfig) -> str:
    names = {"gguf:gemma3-270m": "Gemma 3 270M", "scratch": "small Qwen3-shaped model"}
    return names.get(config.model.source, config.model.source.rstrip("/").rsplit("/", 1)[-1])


def _identity(config: RunConfig) -> dict[str, Any]:
    """What of a configuration the results depend on: everything but the run's place."""
    return {key: value for key, value in configuration.as_dict(config).items() if key not in ("name", "root")}
