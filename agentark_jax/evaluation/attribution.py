"""To what a gain is owed: arms that differ in one thing, the contrasts between them, and when distilling has paid off.

What the debate's student has over the base may come from more data, from more correct data, from another style, or
from the debate. Each contrast here isolates one of these. They are one family, which follows from the arms of a run and
from nothing that was seen in it:

- the student over the base, and over every arm that learned once, from other data, and not from rollouts;
- arms with several answers a question (DA, `diverse_k…`) over the student, in the place of the student over them;
- what was corrected (`corrective_only`) over what was right all along (`non_corrective_matched`);
- an arm that goes on from another one's student over that student;
- `pad` over the base, over `vr`, over PAD with other judges, over the student of as many debates as its rollouts would
  pay for, and over the student; `vr` over the base.

Arms that are checks of the harness itself (A/A, a planted effect) are in no contrast.

Costs are in forward-token equivalents: of a model with N parameters, reading or writing a token takes 2N operations,
and learning from one 6N, forward and backward (Kaplan et al. 2020, §2.1), so the first costs 1 and the second 3.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any, Literal

from agentark_jax.arms import ARMS, CHECKS, LEARNED, STUDENT, Arm, Judged, data_of, label_of, start_of
from agentark_jax.evaluation import summary
from agentark_jax.evaluation.statistics import seed_level_interval, signed_points
from agentark_jax.evaluation.summary import Predictions
from agentark_jax.traces.config import Variant
from agentark_jax.training.rl_config import RLConfig, verifiable_only

BASE = "base"
TRAINING = 3  # of one token, in forward passes of one

Kind = Literal["base", "no debate", "debate", "rewards", "check"]
Verdict = Literal["better than", "worse than", "mixed", "level with"]

_WORDS: Mapping[Verdict, str] = {
    "better than": "better than",
    "worse than": "worse than",
    "mixed": "a difference that depends on the seed from",
    "level with": "no difference shown from",
}

_NO_DEBATE = ("samples", "self_refine", "other_peers", "hinted", "rationales", "answers")
_DATA_AUGMENTATION = "diverse_k"
_BESIDE_PAD = ("vr", "pad_samples", "pad_outcome", "pad_random", "student_budget", STUDENT)

_ASKS = {
    (STUDENT, BASE): "Does the whole procedure help?",
    (STUDENT, "answer_only"): "Does the debate teach more than which answers are right?",
    (STUDENT, "gold"): "Does the debate teach more than the task's own rationales?",
    (STUDENT, "samples"): "Does debate beat as many independent samples?",
    (STUDENT, "samples_budget"): "Does debate beat all the samples that its tokens would have paid for?",
    (STUDENT, "vote_filtered"): "Does debate beat samples that their own vote filtered, without a right answer?",
    (STUDENT, "control"): "Do the rounds after the first add anything?",
    (STUDENT, "self_refine"): "Are peers needed, or is a second look at the own answer enough?",
    (STUDENT, "other_peers"): "Must peers speak of the question, or do any peers do?",
    (STUDENT, "hinted"): "Does debate beat explanations by agents that knew the right answer?",
    (STUDENT, "student_budget"): "Do more debates of the same questions add anything?",
    (STUDENT, "majority"): "Does the right answer choose better than the debate's vote?",
    (STUDENT, "random"): "Does it matter which last-round answers are learned?",
    (STUDENT, "verifier"): "Does the right answer choose better than the base as its own verifier?",
    ("corrective_only", "non_corrective_matched"): "Are corrected answers worth more than those right all along?",
    ("pad", BASE): "Does process-aware distillation help?",
    ("pad", "vr"): "Do rewards for steps add to those for right answers?",
    ("pad", "pad_samples"): "Must the judge of steps have learned from a debate?",
    ("pad", "pad_outcome"): "Must the judge know of steps, or are whole answers enough?",
    ("pad", "pad_random"): "Do labels of steps say anything, or does any judge do?",
    ("pad", "student_budget"): "Do rollouts beat debates that cost as much?",
    ("pad", STUDENT): "Do rollouts beat the debate's own answers?",
    ("vr", BASE): "Do rewards for right answers alone help?",
}


@dataclass(frozen=True)
class SeedRun:
    """One seed: predictions of every arm, and counts of every stage (`tokens` of its manifest among them) by name."""

    predictions: Predictions
    counts: Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Contrast:
    """Arm `a` less arm `b`: what it is called, what it asks, and whether both have equal questions and tokens."""

    a: str
    b: str
    name: str
    asks: str
    matched: bool


def attribution(
    seeds: Sequence[SeedRun],
    students: Sequence[str],
    several: Sequence[str],
    *,
    variant: Variant,
    rl: RLConfig,
    level: float,
) -> dict[str, Any]:
    """What `results.json` says under `attribution`.

    Args:
        students: the student and the arms beside it, which all seeds have.
        several: what answers with several calls, such as `debate` and `vote`: what a student would be used instead of.
        variant: what the student learns of the debate.
        rl: how arms learn from rollouts.
        level: of every interval.
    """
    contrasts = compared(seeds, students, level=level)
    bought = break_even(seeds, students, several, rl=rl, level=level)
    matching = [seed.counts["select"]["matched"] for seed in seeds]
    kept = ("questions", "dropped", "tokens", "lengths")
    return {
        "arms": [arm_row(seeds, name, variant=variant, level=level) for name in (BASE, *students)],
        "contrasts": contrasts,
        "matching": [{key: each[key] for key in kept} for each in matching] if all(matching) else None,
        "break_even": bought,
        "conclusion": conclusion(contrasts, bought),
    }


def kind_of(name: str) -> Kind:
    """What an arm's data come from."""
    data = data_of(name)
    if name == BASE:
        return "base"
    if data == STUDENT:
        return "debate"
    if data in CHECKS:
        return "check"
    arm = ARMS[data]
    if arm.reinforced:
        return "rewards"
    return "no debate" if arm.source in _NO_DEBATE or arm.variant == "round1_only" else "debate"


def arm_row(seeds: Sequence[SeedRun], name: str, *, variant: Variant, level: float) -> dict[str, Any]:
    """An arm: what it learned from and how much of it, on average over seeds; how often it is right, and over the base.

    `trajectories` counts texts that were learned; None for arms that learn from `rollouts`, of which there are so many.
    """
    figures = summary.arm_figures([seed.predictions for seed in seeds], name, level=level)
    right = {key: figures[key] for key in ("accuracy", "low", "high", "n")}
    if name == BASE:
        nothing = dict.fromkeys(("trajectories", "rollouts", "loss_tokens", "steps", "difference"))
        return {"arm": BASE, "label": BASE, "learns": "", "kind": BASE, "matched": False, **nothing, **right}
    over, _ = summary.difference([seed.predictions for seed in seeds], name, BASE, level=level)
    fitted = [seed.counts[name] for seed in seeds]
    rolled = kind_of(name) == "rewards"
    examples = round(fmean(each["examples"] for each in fitted))
    data, start = data_of(name), start_of(name)
    learns = LEARNED[variant] if data == STUDENT else ARMS[data].learns
    return {
        "arm": name,
        "label": label_of(name),
        "learns": learns if start is None else f"{learns}, after those of the {label_of(start)}",
        "kind": kind_of(name),
        "matched": name == STUDENT or _matched(name),
        "trajectories": None if rolled else examples,
        "rollouts": examples if rolled else None,
        "loss_tokens": round(fmean(each["loss_tokens"] for each in fitted)),
        "steps": round(fmean(each["steps"] for each in fitted)),
        "difference": over.difference,
        "difference_low": over.low,
        "difference_high": over.high,
        **right,
    }


def contrasts(students: Sequence[str]) -> list[Contrast]:
    """The family of contrasts of these arms; the module says which."""
    arms = [name for name in students if kind_of(name) != "check"]
    once = [name for name in arms if start_of(name) is None and name != STUDENT]
    learned = [name for name in once if kind_of(name) != "rewards"]
    several = [name for name in learned if name.startswith(_DATA_AUGMENTATION)]
    pairs = [
        (STUDENT, BASE),
        *((STUDENT, name) for name in learned if name not in several),
        *((name, STUDENT) for name in several),
        ("corrective_only", "non_corrective_matched"),
        *((name, start) for name in arms if (start := start_of(name))),
        *(("pad", other) for other in (BASE, *_BESIDE_PAD)),
        ("vr", BASE),
    ]
    return [_contrast(a, b) for a, b in pairs if {a, b} <= {BASE, *arms}]


def _contrast(a: str, b: str) -> Contrast:
    matched = a == STUDENT and _matched(b)
    if start_of(a) == b:
        return Contrast(a, b, f"{label_of(a)} over where it started", "Does learning on add anything?", False)
    asks = _ASKS.get((a, b))
    if asks is None and a.startswith(_DATA_AUGMENTATION):
        asks = "Do several different answers to a question (data augmentation) beat the student's choice?"
    elif asks is None:
        asks = f"Is the student's choice of turns better than {ARMS[b].learns}?"
    equal = " at equal questions and tokens" if matched else ""
    return Contrast(a, b, f"{label_of(a)} over {_label(b)}{equal}", asks, matched)


def _label(name: str) -> str:
    return BASE if name == BASE else label_of(name)


def _matched(name: str) -> bool:
    """Whether an arm has as many and as long trajectories of the same questions as the student, and learned once."""
    return name not in (BASE, STUDENT) and start_of(name) is None and ARMS[name].matched


def compared(seeds: Sequence[SeedRun], students: Sequence[str], *, level: float) -> list[dict[str, Any]]:
    """Every contrast with its paired difference (`summary.differences`), what it asks, and the difference by seed."""
    asked = contrasts(students)
    predictions = [seed.predictions for seed in seeds]
    found = summary.differences(predictions, [(each.a, each.b, each.name) for each in asked], level=level)
    return [
        {
            **result,
            "asks": contrast.asks,
            "matched": contrast.matched,
            "per_seed": [summary.seed_difference(seed, contrast.a, contrast.b) for seed in predictions],
        }
        for contrast, result in zip(asked, found, strict=True)
    ]


def distillation(name: str, counts: Mapping[str, Mapping[str, Any]], *, prompt: float, rl: RLConfig) -> float:
    """What it took to make an arm, in forward-token equivalents.

    That is: prompts and completions of all that was said for its data, those of who was asked what is right of it, and
    three times the tokens it was trained on; with what went before, where it goes on from another arm. What both learn
    from was said once and counts once. Of a debate all rounds count, also where the first alone is learned. The warm
    start, which all share, is left out, and so are failed calls.

    Where it learns from rollouts: writing them, one pass of the policy over them, one of the judge and of the starting
    policy where there is one, and what the judge took: what was said for its data, the labels and its own training. Of
    rollouts the prompts are not counted anywhere; they are taken to be of `prompt` tokens each.

    Args:
        counts: those of every stage by name.
        prompt: tokens of a prompt of a single question.
    """
    start = start_of(name)
    names = [name] if start is None else [start, name]
    before: dict[str, float] = {}
    for each in names:
        for stage, cost in _made_from(_arm(each), counts).items():
            before[stage] = max(cost, before.get(stage, 0.0))
    return sum(before.values()) + sum(_learning(each, counts, prompt, rl) for each in names)


def _arm(name: str) -> Arm | None:
    """What an arm learns from; None: what the student does."""
    return None if data_of(name) == STUDENT else ARMS[data_of(name)]


def _made_from(arm: Arm | None, counts: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """What each stage took that an arm learns from, by its name."""
    if arm is not None and arm.reinforced:
        return {} if arm.judged is None else _judge(arm.judged, counts)
    source = "debate" if arm is None else arm.source
    if source in ("rationales", "answers"):
        return {}
    stage = "debate" if source in ("debate", "verified") else f"turns_{source}"
    said = _said(counts[stage])
    if arm is not None and arm.budget:
        said *= min(1.0, counts["debate"]["completion_tokens"] / counts[stage]["completion_tokens"])
    return {stage: said, **({"verdicts": counts["verdicts"]["tokens"]} if source == "verified" else {})}


def _judge(kind: Judged, counts: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """What was said for a process reward model, the labels of it, and its training."""
    said = "debate" if kind.turns == "debate" else f"turns_{kind.turns}"
    dealt = replace(kind, labels="configured") if kind.labels == "random" else kind
    labels, model = f"step_labels{dealt.suffix}", f"prm{kind.suffix}"
    return {said: _said(counts[said]), labels: counts[labels]["tokens"], model: TRAINING * counts[model]["tokens"]}


def _said(counts: Mapping[str, Any]) -> float:
    return float(counts["prompt_tokens"] + counts["completion_tokens"])


def _learning(name: str, counts: Mapping[str, Mapping[str, Any]], prompt: float, rl: RLConfig) -> float:
    """What the training of an arm took, its rollouts with it."""
    fitted, arm = counts[name], _arm(name)
    if arm is None or not arm.reinforced:
        return float(TRAINING * fitted["tokens"])
    settings = rl if arm.judged is not None else verifiable_only(rl)
    rollouts, completion = fitted["rollouts"]["rollouts"], fitted["tokens"]
    replaced = fitted["rollouts"].get("groups_replaced", 0) * settings.group_size
    whole = completion + prompt * rollouts
    written = whole * (1 + replaced / rollouts)
    passes = 1 + settings.needs_reference + (arm.judged is not None and settings.needs_prm)
    return float(written + passes * whole + TRAINING * whole * fitted["loss_tokens"] / completion)


def break_even(
    seeds: Sequence[SeedRun], students: Sequence[str], several: Sequence[str], *, rl: RLConfig, level: float
) -> list[dict[str, Any]]:
    """After how many questions a student's one answer has paid for its making, in the place of several calls.

    `queries` is what it took to make the student (`distillation`) over what an answer saves: tokens read and written,
    on the questions that both answered. Its interval is that of the mean saving over questions (Student's t); where
    nothing is saved it is None, as is the end that lies beyond. The accuracies may differ: so `difference`, of the
    student less the other, stands beside it.
    """
    rows = []
    for name in students:
        if kind_of(name) == "check":
            continue
        made = []
        for seed in seeds:
            prompt = fmean(each.prompt_tokens / each.calls for each in seed.predictions[BASE])
            made.append(distillation(name, seed.counts, prompt=prompt, rl=rl))
        rows += [_bought(seeds, name, other, fmean(made), level) for other in several]
    return rows


def _bought(seeds: Sequence[SeedRun], name: str, other: str, cost: float, level: float) -> dict[str, Any]:
    own, against = [], []
    saved: dict[str, list[int]] = {}
    for seed in seeds:
        others = {each.question_id: each for each in seed.predictions[other]}
        for one in seed.predictions[name]:
            if one.question_id in others:
                mine, theirs = one.tokens, others[one.question_id].tokens
                own.append(mine)
                against.append(theirs)
                saved.setdefault(one.question_id, []).append(theirs - mine)
    mean = fmean(against) - fmean(own)
    by_question = [fmean(values) for values in saved.values()]
    spread = seed_level_interval(by_question, level) if len(by_question) > 1 else None
    low, high = (mean, mean) if spread is None else (spread.low, spread.high)
    over, _ = summary.difference([seed.predictions for seed in seeds], name, other, level=level)
    row = {
        "arm": name,
        "against": other,
        "distillation": cost,
        "per_question": fmean(own),
        "against_per_question": fmean(against),
        "saved_per_question": mean,
        "saved_low": low,
        "saved_high": high,
        "queries": cost / mean if mean > 0 else None,
        "queries_low": cost / high if high > 0 else None,
        "queries_high": cost / low if low > 0 else None,
        "difference": over.difference,
        "low": over.low,
        "high": over.high,
        "n": over.n,
        "questions": over.clusters,
        "level": level,
    }
    return {**row, "sentence": _paid_off(row)}


def _paid_off(row: Mapping[str, Any]) -> str:
    if row["queries"] is None:
        text = "saves no tokens, so it never pays for its making"
    else:
        most = "no end" if row["queries_high"] is None else f"{row['queries_high']:,.0f}"
        text = f"pays for its making after {row['queries']:,.0f} questions"
        text += f" ({100 * row['level']:g} % interval {row['queries_low']:,.0f} to {most})"
    low, high = signed_points(row["low"]), signed_points(row["high"])
    right = f"accuracy {signed_points(row['difference'])} points, interval {low} to {high}"
    return f"{label_of(row['arm'])} in the place of the base's {row['against']}: {text}; {right}, n = {row['n']:,}"


def conclusion(contrasts: Sequence[Mapping[str, Any]], bought: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the contrasts show, after Holm's correction and in every seed, and what they don't, in sentences.

    Intervals are conditional on the seeds. A difference that has another sign in one of them may be owed to the seeds,
    so it is told apart, and nothing is concluded from it.
    """
    shown = [each for each in contrasts if _verdict(each) in ("better than", "worse than")]
    every = " and in every seed" if any(len(each["per_seed"]) > 1 for each in contrasts) else ""
    told = [
        f"{len(shown)} of {len(contrasts)} contrasts show a difference after Holm's correction for all of them{every}.",
        *(each["sentence"] + "." for each in contrasts if (each["a"], each["b"]) == (STUDENT, BASE)),
    ]
    rest = [each for each in contrasts if (each["a"], each["b"]) != (STUDENT, BASE)]
    for a, matched in dict.fromkeys((each["a"], each["matched"]) for each in rest):
        group = [each for each in rest if (each["a"], each["matched"]) == (a, matched)]
        parts = []
        for verdict, words in _WORDS.items():
            named = [_against(each, verdict) for each in group if _verdict(each) == verdict]
            if named:
                parts.append(f"{words} {', '.join(named)}")
        equal = " at equal questions and tokens" if matched else ""
        told.append(f"{label_of(a)}{equal}: {'; '.join(parts)}.")
    if not any(each["matched"] and kind_of(each["b"]) == "no debate" for each in contrasts):
        told.append(
            "No arm without a debate has equal questions and tokens, so what the debate itself adds is not known."
        )
    told += [each["sentence"] + "." for each in bought if (each["arm"], each["against"]) == (STUDENT, "debate")]
    return told


def _verdict(contrast: Mapping[str, Any]) -> Verdict:
    if contrast["p_holm"] >= 1 - contrast["level"] or contrast["low"] <= 0 <= contrast["high"]:
        return "level with"
    if any(difference * contrast["difference"] <= 0 for difference in contrast["per_seed"]):
        return "mixed"
    return "better than" if contrast["difference"] > 0 else "worse than"


def _against(contrast: Mapping[str, Any], verdict: Verdict) -> str:
    b, detectable = contrast["b"], contrast["minimum_detectable"]
    size = f"{signed_points(contrast['difference'])} points"
    if verdict == "mixed":
        size += f"; by seed {', '.join(map(signed_points, contrast['per_seed']))}"
    if verdict == "level with" and detectable is not None:
        size += f", detectable from {100 * detectable:.1f}"
    return f"{_label(b)} ({size})"
