"""Numbers and findings in words: the formats and sentences that page, terminal and model card share."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

from scipy import stats

from agentark_jax.errors import AgentArkError

SCHEMA = 1
NONE = "–"
_TOLD = 6  # students that are named in a sentence
# Control characters (all but tab and newline) and lone surrogates: XML, UTF-8 and terminals choke on them or obey them.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


def clean(text: Any) -> str:
    """`text` with control characters and lone surrogates replaced by U+FFFD; CR LF becomes a newline."""
    return _UNPRINTABLE.sub("\ufffd", str(text).replace("\r\n", "\n"))


def check(results: Mapping[str, Any]) -> None:
    """Raises AgentArkError when `results` is not a results mapping of the schema that this version reads."""
    if results.get("schema") != SCHEMA:
        raise AgentArkError(
            f"results.json: schema is {results.get('schema')!r}, this version reads {SCHEMA}; "
            "delete the evaluation stage of the run and run it again"
        )
    missing = [key for key in ("run", "model", "task", "arms") if key not in results]
    if missing:
        raise AgentArkError(
            f"results.json: {', '.join(missing)} missing, the file is incomplete; "
            "delete it and run the evaluation stage again"
        )


def known(value: Any) -> TypeGuard[float]:
    """Whether `value` is a finite number."""
    return isinstance(value, int | float) and math.isfinite(value)


def number(value: Any, digits: int = 0) -> str:
    """With thousands separators: 12,345.6; a dash for None and NaN."""
    return f"{value:,.{digits}f}".replace("-", "−") if known(value) else NONE


def percent(value: Any, digits: int = 1) -> str:
    """A share in [0, 1] as per cent without the sign: 0.431 → 43.1."""
    return number(100 * value, digits) if known(value) else NONE


def points(value: Any) -> str:
    """A difference of shares in percentage points with its sign, but of zero: 0.042 → +4.2."""
    if not known(value):
        return NONE
    text = number(100 * value, 1)
    if text in ("0.0", "−0.0"):
        return "0.0"
    return text if text.startswith("−") else f"+{text}"


def interval(low: Any, high: Any, signed: bool = False) -> str:
    """[33.2, 53.1], or signed in percentage points [−3.1, +11.5]; empty when there is none."""
    if not (known(low) and known(high)):
        return ""
    form = points if signed else percent
    return f"[{form(low)}, {form(high)}]"


def p_value(value: Any) -> str:
    return NONE if not known(value) else "< 0.001" if value < 0.001 else f"{value:.3f}"


def size(count: Any) -> str:
    """A count of parameters or tokens in short: 268 M."""
    if not known(count):
        return NONE
    for unit, scale in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}"
    return f"{count:,}"


def duration(seconds: Any) -> str:
    """3.2 s, 42 s, 12 min 5 s, 3 h 20 min."""
    if not known(seconds):
        return NONE
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def wilson(successes: int, total: int) -> tuple[float, float]:
    """95 % Wilson score interval of a share (Wilson 1927); (0, 1) without observations."""
    if total == 0:
        return 0.0, 1.0
    interval = stats.binomtest(successes, total).proportion_ci(0.95, method="wilson")
    return float(interval.low), float(interval.high)


def arm_label(results: Mapping[str, Any], arm: str) -> str:
    return clean(results["arms"].get(arm, {}).get("label") or arm)


def outcome(difference: Mapping[str, Any]) -> str:
    """`better`, `worse` or `null`: what is shown of a difference as one of the report's, after Holm's correction."""
    return "null" if difference["p_holm"] >= 1 - difference["level"] else by_itself(difference)


def by_itself(difference: Mapping[str, Any]) -> str:
    """`better`, `worse` or `null`: on which side of zero the whole interval lies, if on any."""
    low, high = difference.get("low"), difference.get("high")
    if known(low) and low > 0:
        return "better"
    return "worse" if known(high) and high < 0 else "null"


def finding(results: Mapping[str, Any], difference: Mapping[str, Any]) -> str:
    """One sentence for one paired difference; says plainly when none is shown."""
    first, second = (arm_label(results, difference[side]) for side in ("a", "b"))
    value = difference["difference"]
    lead = "level with" if value == 0 else f"{number(abs(100 * value), 1)} points {'above' if value > 0 else 'below'}"
    limits = interval(difference["low"], difference["high"], signed=True)
    text = f"“{first}” came out {lead} “{second}” {limits}, n = {difference['n']:,}"
    if outcome(difference) != "null":
        return text + "."
    if by_itself(difference) != "null":
        adjusted, family = p_value(difference["p_holm"]), plural(len(results["differences"]), "comparison")
        return f"{text}; after Holm's correction for {family} (p = {adjusted}) no difference is shown."
    smallest = difference.get("minimum_detectable")
    reach = f" (smallest detectable: {number(100 * smallest, 1)} points)" if known(smallest) else ""
    return f"{text}: an interval that includes zero, so no difference is shown{reach}."


def work_done(results: Mapping[str, Any]) -> str:
    """What was done, in a few sentences."""
    model, task, debate = results["model"], results["task"], results.get("debate") or {}
    asked, seeds, arms = task.get("questions") or {}, results["run"]["seeds"], results["arms"]
    trained = ""
    if known(model.get("trainable")) and model["trainable"] != model.get("parameters"):
        trained = f", {size(model['trainable'])} of them trained"
    article = "a " if model.get("source") == "scratch" else ""  # what a user names needs none
    text = f"The model is {article}{clean(model['name'])} ({size(model.get('parameters'))} parameters{trained}), "
    if asked.get("warm_start"):
        text += f"warm-started on {plural(asked['warm_start'], 'question')} of the task {clean(task['name'])}. "
    else:
        text += f"the task {clean(task['name'])}. "
    if debate:
        subject = f"{asked['debate']:,} further questions" if asked.get("debate") else "further questions"
        said = plural(debate["turns"], "answer") + (" in all" if len(seeds) > 1 else "")
        text += f"{debate['agents']} copies debated {subject} over {plural(debate['rounds'], 'round')} ({said}). "
    students = [
        f"“{arm_label(results, arm)}”"
        for arm in results.get("training") or {}
        if arm in arms and arm != "base" and not arms[arm].get("check")
    ]
    if students:
        told = ", ".join(students[:_TOLD]) + (f" and {len(students) - _TOLD} more" if len(students) > _TOLD else "")
        text += f"From it, and to compare with, {plural(len(students), 'student')} learned: {told}. "
    if asked.get("held_out"):
        subset = any(arm.get("questions") == "subset" for arm in arms.values())
        text += f"Every arm was measured on {asked['held_out']:,} questions kept apart"
        text += ", or on a stated subset of them. " if subset else ". "
    if len(seeds) > 1:
        text += f"All of this was done {len(seeds)} times, with other random numbers."
    return text.strip()


def headline(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The figures that a reader looks for first: a student, the base, their paired difference, and the debate.

    Each with `name`, `value`, `interval`, `n`, and of a difference the `outcome`.
    """
    arms, base = results["arms"], base_arm(results["arms"])
    over_base = [
        item
        for item in results.get("differences") or []
        if item["b"] == base and item["a"] in arms and arms[item["a"]]["model"] != "base"
    ]
    first = over_base[0]["a"] if over_base else None
    debate = next((name for name, arm in arms.items() if arm["protocol"] == "debate"), None)
    shown = [
        {
            "name": arm_label(results, name),
            "value": f"{percent(arms[name]['accuracy'])} %",
            "interval": interval(arms[name]["low"], arms[name]["high"]),
            "n": arms[name]["n"],
            "outcome": None,
        }
        for name in dict.fromkeys((first, base, debate))
        if name is not None
    ]
    for item in over_base[:1]:
        difference = {
            "name": f"{arm_label(results, item['a'])} − {arm_label(results, item['b'])}",
            "value": f"{points(item['difference'])} points",
            "interval": interval(item["low"], item["high"], signed=True),
            "n": item["n"],
            "outcome": outcome(item),
        }
        shown.insert(2, difference)
    return shown


def findings(results: Mapping[str, Any], limit: int = 3) -> list[str]:
    """What came out: the base model's accuracy, then the first `limit` paired differences."""
    sentences = []
    base = base_arm(results["arms"])
    if base is not None:
        arm = results["arms"][base]
        sentences.append(
            f"“{arm_label(results, base)}” answered {percent(arm['accuracy'])} % of {arm['n']:,} questions right "
            f"{interval(arm['low'], arm['high'])}; intervals are 95 %."
        )
    differences: Sequence[Mapping[str, Any]] = results.get("differences") or []
    sentences += [finding(results, difference) for difference in differences[:limit]]
    rest = len(differences) - limit
    if rest > 0:
        sentences.append(f"{plural(rest, 'more comparison')} below.")
    if not differences:
        sentences.append("No paired comparison was made.")
    return sentences


def base_arm(arms: Mapping[str, Any]) -> str | None:
    """The arm that every other is compared with: the base model answering once."""
    return next((name for name, arm in arms.items() if arm["model"] == "base" and arm["protocol"] == "single"), None)


def throughput(results: Mapping[str, Any]) -> tuple[float | None, int, float | None]:
    """(total seconds, tokens of all stages, tokens/s of the stages that process tokens) of a run."""
    timing = results.get("timing") or {}
    busy = [stage for stage in timing.get("stages") or [] if stage.get("tokens")]
    tokens = sum(stage["tokens"] for stage in busy)
    seconds = sum(stage["seconds"] for stage in busy if known(stage.get("seconds")))
    return timing.get("total_seconds"), tokens, tokens / seconds if seconds else None
