"""Whether a model finds and corrects errors: its own, the same ones as another's, planted ones; and what it gives up.

Everything starts from the greedy answers of the suite `accuracy`, and every further call is greedy, too. What does not
fit the model with its answer is left out and counted as `too_long`. Words of prompts: `protocols.checking`; errors that
are planted: `data.planting`; figures: `evaluation.self_correction`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from random import Random
from typing import Any

import numpy as np
from rich.table import Table

from agentark_jax.asking import flatten, keep_keys
from agentark_jax.data.planting import plant, plantable, recoverable, right_solution, split, wrong_solution
from agentark_jax.evaluation import self_correction as metrics
from agentark_jax.evaluation.config import SelfCorrectionConfig
from agentark_jax.evaluation.steps import first_errors
from agentark_jax.protocols import checking
from agentark_jax.protocols.calls import Draw
from agentark_jax.protocols.checking import CONDITIONS, NEUTRAL, USERS, WAIT, Inquiry
from agentark_jax.protocols.table import Pool
from agentark_jax.records import Label, Question, Turn, stable_hash
from agentark_jax.report import words
from agentark_jax.stages import Manifest, Work
from agentark_jax.suites import accuracy, tabled
from agentark_jax.suites.bench import Bench
from agentark_jax.suites.greedy import load_rows, save_rows

_PROTOCOL = "self_correction"
_REPLY_TOKENS = 16


@dataclass(frozen=True)
class Row:
    """One call and what it came to: `step` is the index of a planted error, `told` that of the one found (−1: none is
    read), `source` whose solution it was.
    """

    question_id: str
    key: str
    right: bool
    unparseable: bool
    role: str
    step: int | None = None
    told: int | None = None
    source: str = ""


@dataclass(frozen=True)
class First:
    """The greedy answer to a question."""

    question: Question
    turn: Turn
    right: bool
    text: str
    ids: list[int]


def measure(bench: Bench, settings: SelfCorrectionConfig) -> dict[str, Any]:
    """Figures of answers that are checked, of the blind spot, of planted errors, of peers, and of words that verify."""
    firsts = first_answers(bench)
    checks = {condition: check(bench, settings, firsts, condition) for condition in CONDITIONS}
    planted = recover(bench, settings, firsts)
    peers = hear_peers(bench, settings, firsts)
    found = locate(bench, firsts) if settings.localisation else None
    spots = {"review": NEUTRAL, WAIT: WAIT}
    return {
        "checks": {condition: _transitions(firsts, checks[condition], bench.level) for condition in CONDITIONS},
        "blind_spot": {name: _blind_spot(firsts, checks[own], checks[USERS], bench) for name, own in spots.items()},
        "recovery": _recovery(planted, bench.level),
        "localisation": None if found is None else _localisation(found, bench.level),
        "peers": _peers(firsts, peers, bench.level),
        "verification": metrics.verification(
            [first.text for first in firsts],
            [len(first.ids) for first in firsts],
            [first.right for first in firsts],
            level=bench.level,
        ),
    }


def first_answers(bench: Bench) -> list[First]:
    """The greedy answers, in the order of the questions."""
    predictions = accuracy.greedy(bench)
    turns = {turn.key: turn for turn in bench.store.turns(keys=[each.turn_keys[0] for each in predictions])}
    questions = {question.id: question for question in bench.questions}
    firsts = []
    for each in predictions:
        turn = turns[each.turn_keys[0]]
        assert turn.completion is not None, "an answer that is predicted from was given"
        said = turn.completion
        firsts.append(First(questions[each.question_id], turn, each.verdict == "right", said.text, said.ids.tolist()))
    return firsts


def check(bench: Bench, settings: SelfCorrectionConfig, firsts: Sequence[First], condition: str) -> Manifest:
    """Second answers under one of the check prompts. Under `wait`, an answer that is not given anew stands."""
    draw = _draw(bench, settings)
    asked = {
        first.question.id: [
            Inquiry(checking.checked(bench.form, first.question, first.ids, condition), condition, 0, (first.turn.key,))
        ]
        for first in firsts
    }
    before = {first.question.id: first.right for first in firsts}

    def row(turn: Turn, label: Label) -> Row:
        stands = condition == WAIT and label.verdict == "unparseable" and _ended(turn)
        right = before[turn.call.question_id] if stands else label.verdict == "right"
        return Row(turn.call.question_id, turn.key, right, label.verdict == "unparseable" and not stands, condition)

    return _stage(bench, condition, asked, draw, row)


def recover(bench: Bench, settings: SelfCorrectionConfig, firsts: Sequence[First]) -> Manifest:
    """Solutions begun for the model with an error in their last step, and the same without it; it goes on.

    They are its own right answers, or else the gold rationales.
    """
    asked, about = {}, {}
    for first in firsts:
        source, text = (
            ("own", first.text) if first.right and recoverable(first.text) else ("gold", first.question.rationale)
        )
        inquiries = []
        for step in recoverable(text)[: settings.steps]:
            error = plant(text, step, bench.seed)
            clean = "".join(split(text)[: step + 1])
            for role, begun in (("planted", error.beginning), ("clean", clean)):
                prompt = checking.continued(bench.form, first.question, checking.begun(bench.form, begun))
                inquiries.append(Inquiry(prompt, role, step))
        asked[first.question.id], about[first.question.id] = inquiries, source

    def row(turn: Turn, label: Label) -> Row:
        call = turn.call
        right, unread = label.verdict == "right", label.verdict == "unparseable"
        return Row(call.question_id, turn.key, right, unread, call.role, call.sample, None, about[call.question_id])

    return _stage(bench, "recovery", asked, _draw(bench, settings), row, {"steps": settings.steps})


def locate(bench: Bench, firsts: Sequence[First]) -> Manifest:
    """Asked which step is wrong: of each gold rationale as it is, and with an error in one step."""
    asked, true = {}, {}
    for first in firsts:
        text = first.question.rationale
        where = plantable(text)
        if not where:
            continue
        error = plant(text, Random(stable_hash([bench.seed, first.question.id])).choice(where), bench.seed)
        true[first.question.id] = error.step
        asked[first.question.id] = [
            Inquiry(prompt, role, regex=regex)
            for role, steps in (("planted", error.steps), ("clean", split(text)))
            for prompt, regex in [checking.locate(bench.form, first.question, steps)]
        ]

    def row(turn: Turn, label: Label) -> Row:
        call, completion = turn.call, turn.completion
        assert completion is not None, "a failed call is an error"
        told, step = checking.located(completion.text), true[call.question_id] if call.role == "planted" else None
        return Row(call.question_id, turn.key, told == step, told == -1, call.role, step, told)

    return _stage(bench, "localisation", asked, Draw(0.0, _REPLY_TOKENS), row)


def hear_peers(bench: Bench, settings: SelfCorrectionConfig, firsts: Sequence[First]) -> Manifest:
    """Right answers beside a peer's wrong one, wrong ones beside a peer's right one, which are made of the rationale.

    Questions whose grader does not tell the two peers apart are left out.
    """
    asked = {}
    for first in firsts:
        right, wrong = right_solution(first.question), wrong_solution(first.question, bench.seed)
        verdicts = [bench.task.grade(first.question, text).verdict for text in (right, wrong or "")]
        if wrong is None or verdicts != ["right", "wrong"]:
            continue
        role, text = ("false_peer", wrong) if first.right else ("true_peer", right)
        prompt = bench.form.revision(first.question, first.ids, [bench.form.response(text)])
        asked[first.question.id] = [Inquiry(prompt, role, 0, (first.turn.key,))]

    def row(turn: Turn, label: Label) -> Row:
        verdict = label.verdict
        return Row(turn.call.question_id, turn.key, verdict == "right", verdict == "unparseable", turn.call.role)

    return _stage(bench, "peers", asked, _draw(bench, settings), row)


def _draw(bench: Bench, settings: SelfCorrectionConfig) -> Draw:
    return Draw(0.0, settings.max_tokens or bench.config.max_tokens)


def _ended(turn: Turn) -> bool:
    return turn.completion is not None and turn.completion.finish == "stop"


def _stage(
    bench: Bench,
    name: str,
    asked: Mapping[str, Sequence[Inquiry]],
    draw: Draw,
    row: Callable[[Turn, Label], Row],
    config: Mapping[str, Any] | None = None,
) -> Manifest:
    """A stage that makes these calls (by question) and keeps a row of each."""
    fitting = {
        question: [each for each in inquiries if sum(map(len, each.prompt)) + draw.max_tokens <= bench.limit]
        for question, inquiries in asked.items()
    }
    questions = [question for question in bench.questions if fitting.get(question.id)]
    too_long = sum(map(len, asked.values())) - sum(map(len, fitting.values()))

    def build(work: Work) -> None:
        async def ask(question: Question, pool: Pool) -> list[Turn]:
            return await checking.inquire(question, pool, fitting[question.id], draw, protocol=_PROTOCOL)

        calls = max(map(len, fitting.values()), default=1)
        context = bench.room((each.prompt for inquiries in fitting.values() for each in inquiries), draw.max_tokens)
        turns = bench.ask(work, name, ask, calls=calls, questions=questions, context=context) if questions else {}
        labels = bench.label(flatten(turns))
        save_rows(work, [row(turn, labels[turn.key]) for turn in flatten(turns)])
        keep_keys(work, turns)
        work.counts["too_long"] = too_long

    # The prompts say what of the first answers and of what was planted the calls depend on.
    content = stable_hash([[question, [each.prompt for each in inquiries]] for question, inquiries in asked.items()])
    return bench.measure(
        f"self_correction_{name}",
        build,
        version=1,
        config={**asdict(draw), **(config or {})},
        inputs={"prompts": content},
    )


def _rows(stage: Manifest) -> list[Row]:
    return [Row(**row) for row in load_rows(stage)]


def _told(stage: Manifest, rows: Sequence[Row]) -> dict[str, Any]:
    """What is known of every stage."""
    calls, tokens = stage.counts.get("calls", 0), stage.counts.get("completion_tokens", 0)
    return {
        "unparseable": sum(row.unparseable for row in rows),
        "too_long": stage.counts["too_long"],
        "calls": calls,
        "completion_tokens": tokens,
    }


def _transitions(firsts: Sequence[First], stage: Manifest, level: float) -> dict[str, Any]:
    rows, before = _rows(stage), {first.question.id: first.right for first in firsts}
    arrays = _columns([(before[row.question_id], row.right, row.question_id) for row in rows], 3)
    return {**metrics.transitions(*arrays, level=level), **_told(stage, rows)}


def _blind_spot(firsts: Sequence[First], own: Manifest, others: Manifest, bench: Bench) -> dict[str, Any]:
    """Of wrong answers that both conditions have."""
    mine, theirs = ({row.question_id: row.right for row in _rows(stage)} for stage in (own, others))
    wrong = [
        first.question.id for first in firsts if not first.right and first.question.id in mine.keys() & theirs.keys()
    ]
    arrays = _columns([(mine[question], theirs[question], question) for question in wrong], 3)
    return metrics.blind_spot(*arrays, level=bench.level, seed=bench.seed)


def _recovery(stage: Manifest, level: float) -> dict[str, Any]:
    rows = _rows(stage)
    found = {(row.question_id, row.step, row.role): row.right for row in rows}
    pairs = [
        (right, found[question, step, "clean"], step, question)
        for (question, step, role), right in found.items()
        if role == "planted" and (question, step, "clean") in found
    ]
    right, clean, steps, questions = _columns(pairs, 4)
    sources = {source: len({row.question_id for row in rows if row.source == source}) for source in ("own", "gold")}
    figures = metrics.recovery(right, clean, steps, questions, level=level)
    return {**figures, "solutions": sources, **_told(stage, rows)}


def _localisation(stage: Manifest, level: float) -> dict[str, Any]:
    rows = _rows(stage)
    told, true = [row.told for row in rows], [row.step for row in rows]
    found = first_errors(told, true, [row.question_id for row in rows], level=level) if rows else None
    right, planted, questions = _columns([(row.right, row.step is not None, row.question_id) for row in rows], 3)
    low, high = (found and found.f1_interval) or (None, None)
    return {
        "accuracy": metrics.share(right, questions, level),
        "planted": metrics.share(right[planted], questions[planted], level),
        "clean": metrics.share(right[~planted], questions[~planted], level),
        "f1": {"f1": found and found.f1, "low": low, "high": high, "n": len(rows)},
        **_told(stage, rows),
    }


def _peers(firsts: Sequence[First], stage: Manifest, level: float) -> dict[str, Any]:
    rows = _rows(stage)
    given_up = _columns([(not row.right, row.question_id) for row in rows if row.role == "false_peer"], 2)
    corrected = _columns([(row.right, row.question_id) for row in rows if row.role == "true_peer"], 2)
    return {
        "given_up_to_false": metrics.share(given_up[0], given_up[1], level),
        "corrected_by_true": metrics.share(corrected[0], corrected[1], level),
        "left_out": len(firsts) - len(rows) - stage.counts["too_long"],
        **_told(stage, rows),
    }


def _columns(rows: Sequence[tuple[Any, ...]], width: int) -> list[np.ndarray]:
    """Rows as a column for each of their places; booleans stay such, also where there is no row."""
    return [np.asarray([row[place] for row in rows]) if rows else np.zeros(0, bool) for place in range(width)]


def tables(figures: Mapping[str, Any]) -> list[Table]:
    """Second answers by condition, then all other shares."""
    keys = ("accuracy_1", "accuracy_2", "corrected", "given_up")
    checks = [(condition, *(_share(each[key]) for key in keys)) for condition, each in figures["checks"].items()]
    shares: list[tuple[str, Mapping[str, Any]]] = []
    for name, spot in figures["blind_spot"].items():
        unsure = spot["rate"] is not None and spot["low"] is None
        told = f"blind spot, {name}{' (too few corrected for an interval)' if unsure else ''}"
        shares.append((told, {**spot, "share": spot["rate"]}))
    shares.append(("planted error, ends right", figures["recovery"]["planted"]))
    shares.append(("the same without the error", figures["recovery"]["clean"]))
    shares += [(f"planted in step {step['step']}", step["planted"]) for step in figures["recovery"]["by_step"]]
    if figures["localisation"] is not None:
        shares.append(("error located", figures["localisation"]["planted"]))
        shares.append(("no error told where none is", figures["localisation"]["clean"]))
    shares.append(("right answer given up to a false peer", figures["peers"]["given_up_to_false"]))
    shares.append(("wrong answer corrected by a true peer", figures["peers"]["corrected_by_true"]))
    shares.append(("steps that verify", figures["verification"]["steps"]))
    columns = ("check", "first %", "second %", "wrong→right %", "right→wrong %")
    others = [(name, _share(found), words.number(found["n"])) for name, found in shares]
    return [tabled.table("self-correction", columns, checks), tabled.table("", ("", "%", "n"), others)]


def _share(figures: Mapping[str, Any]) -> str:
    return f"{words.percent(figures['share'])} {words.interval(figures['low'], figures['high'])}"
