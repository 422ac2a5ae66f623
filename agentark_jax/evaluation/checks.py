"""Whether comparisons say what is known beforehand: of arms that differ by chance alone (A/A), and of a planted effect.

A run's `twin` is trained on the student's data once more, from another seed: a difference between the two is noise.
`planted` is the twin, of whose wrong answers a known number was replaced by right ones: the difference between those
two is known exactly. Both go the way of every other arm, through grader, store, predictions and statistics.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from agentark_jax.arms import PLANTED, TWIN
from agentark_jax.data.render import Format
from agentark_jax.errors import UsageError
from agentark_jax.evaluation.config import planted_count
from agentark_jax.evaluation.predictions import Prediction
from agentark_jax.evaluation.statistics import PairedDifference, signed_points
from agentark_jax.evaluation.summary import difference
from agentark_jax.records import Completion, Question, Turn, stable_hash
from agentark_jax.tasks.items import answered

NOBODY = "nobody: written to check the evaluation"  # the model of planted turns


@dataclass(frozen=True)
class Check:
    """One comparison whose outcome is known beforehand, and whether it came out so."""

    name: str
    passed: bool
    expected: float | None
    found: PairedDifference
    sentence: str


def check_twin(found: PairedDifference) -> Check:
    """A/A: `found` is the twin less the student, between which no effect must be shown.

    Chance alone shows one at a rate of 1 − level. More often means that intervals are too narrow, such as where they
    are conditional on one training seed while trainings differ.
    """
    passed = not found.excludes_zero
    verdict = "no effect shown, as must be" if passed else f"WRONG: an effect where there is none, {_odds(found)}"
    return Check("A/A", passed, 0.0, found, f"check A/A, twin over student: {_told(found)}: {verdict}")


def check_planted(found: PairedDifference, amount: float) -> Check:
    """`found` is the planted arm less the twin, of which a share `amount` of all answers was made right."""
    inside = found.low <= amount <= found.high
    passed = inside and found.low > 0
    wrong = "WRONG: no effect shown" if inside else "WRONG: the interval does not hold it"
    verdict = "found, as must be" if passed else wrong
    planted = f"planted {100 * amount:+.1f} points"
    return Check("planted", passed, amount, found, f"check {planted}, planted over twin: {_told(found)}: {verdict}")


def check_all(
    seeds: Sequence[Mapping[str, Sequence[Prediction]]], student: str, share: float, *, level: float
) -> list[dict[str, Any]]:
    """The checks of a run that has such arms, as JSON values.

    Args:
        seeds: predictions by arm, of each seed.
        student: the arm whose twin there is.
        share: of all answers that were made right (`evaluate.planted`).
    """
    checks = []
    if TWIN in seeds[0]:
        checks.append(check_twin(difference(seeds, TWIN, student, level=level)[0]))
    if PLANTED in seeds[0]:
        counts = [len(seed[PLANTED]) for seed in seeds]
        amount = sum(planted_count(share, count) for count in counts) / sum(counts)
        checks.append(check_planted(difference(seeds, PLANTED, TWIN, level=level)[0], amount))
    return [asdict(check) for check in checks]


def plant(
    turns: Mapping[str, Turn],
    predictions: Sequence[Prediction],
    questions: Mapping[str, Question],
    *,
    share: float,
    seed: int,
    form: Format,
    reads: Callable[[Question, str], bool],
) -> dict[str, Turn]:
    """The turns of an arm by question, as many wrong ones as `share` says replaced by right ones, drawn by the seed.

    Args:
        turns, predictions: those of the twin; each question has one turn.
        reads: whether the grader reads a text as right.

    Raises: UsageError where too few of them are wrong.
    """
    right_texts = {
        each.question_id: text
        for each in predictions
        if each.verdict != "right" and (text := _right_text(questions[each.question_id], reads)) is not None
    }
    wanted = planted_count(share, len(predictions))
    if len(right_texts) < wanted:
        raise UsageError(
            f"evaluate.planted is {share}: that makes {wanted} of {len(predictions)} answers right, but the twin has "
            f"only {len(right_texts)} wrong ones that could be. Lower it, or ask harder questions."
        )
    drawn = sorted(right_texts, key=lambda question: (stable_hash([seed, PLANTED, question]), question))[:wanted]
    return {**turns, **{each: _planted(turns[each], right_texts[each], form) for each in drawn}}


def _right_text(question: Question, reads: Callable[[Question, str], bool]) -> str | None:
    texts = (answered("", question.answer), question.rationale)
    return next((text for text in texts if reads(question, text)), None)


def _planted(turn: Turn, text: str, form: Format) -> Turn:
    """A turn in the place of another, marked as what nobody said."""
    assert turn.completion is not None, "predictions are of turns that succeeded"
    call = replace(turn.call, protocol=PLANTED, parents=(turn.key,), model=NOBODY)
    completion = Completion(
        ids=np.asarray(form.response(text), np.int32),
        logprobs=None,
        text=text,
        finish="stop",
        prompt_tokens=turn.completion.prompt_tokens,
        cached_tokens=0,
        seconds=0.0,
    )
    return Turn(call, 0, completion)


def _told(found: PairedDifference) -> str:
    points = [signed_points(value) for value in (found.difference, found.low, found.high)]
    return f"{points[0]} points, {100 * found.level:g} % interval {points[1]} to {points[2]}, n = {found.n}"


def _odds(found: PairedDifference) -> str:
    return f"which chance alone shows once in {round(1 / (1 - found.level))} times"
