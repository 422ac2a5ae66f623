"""Settings of the evaluation."""

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal, get_args

from agentark_jax.errors import UsageError

Overlap = Literal["refuse", "drop"]

# What `agentark evaluate` can measure; each has its settings in `EvaluateRun` under its name.
SUITES = ("accuracy", "self_correction", "robustness", "truthfulqa", "generalisation", "retention", "quality")


@dataclass(frozen=True)
class EvaluationConfig:
    """What is measured on the held-out questions.

    Attributes:
        vote_samples: independent samples of the base model under the majority vote.
        multi_call_questions: how many held-out questions the vote and the debate answer; 0 means all of them.
        rounds: rounds of the evaluated debate.
        temperature: at which base and students give their one answer; 0 is greedy.
        overlap: what becomes of a question to learn from that has the same words as a held-out one, or half of its runs
            of 13 words: `refuse` ends the run, `drop` leaves it out.
        level: confidence level of every interval.
        planted: of the arm `planted`, the share of all answers that are made right.
    """

    vote_samples: int = 6
    multi_call_questions: int = 0
    rounds: int = 2
    temperature: float = 0.0
    overlap: Overlap = "refuse"
    level: float = 0.95
    planted: float = 0.05

    def __post_init__(self) -> None:
        if self.vote_samples < 1:
            raise UsageError(f"evaluate.vote_samples is {self.vote_samples}: a vote needs at least one sample.")
        if self.multi_call_questions < 0:
            raise UsageError(
                f"evaluate.multi_call_questions is {self.multi_call_questions}: give 0 for all, or a count."
            )
        if self.rounds < 1:
            raise UsageError(f"evaluate.rounds is {self.rounds}: a debate has at least one round.")
        if not 0 <= self.temperature < math.inf:
            raise UsageError(f"evaluate.temperature is {self.temperature}: give 0 for greedy answers, or more.")
        if self.overlap not in get_args(Overlap):
            raise UsageError(f"evaluate.overlap is {self.overlap!r}: choose {' or '.join(get_args(Overlap))}.")
        if not 0 < self.planted < 1:
            raise UsageError(f"evaluate.planted is {self.planted}: give a share of the answers between 0 and 1.")
        if not 0 < self.level < 1:
            raise UsageError(f"evaluate.level is {self.level}: give a confidence level between 0 and 1, such as 0.95.")


def planted_count(share: float, questions: int) -> int:
    """How many answers to so many questions are made right."""
    return round(share * questions)


def check_size(share: float, questions: int, seeds: int, level: float) -> None:
    """Raises UsageError where no comparison could find so small a planted effect."""
    planted = planted_count(share, questions) * seeds
    # McNemar's test of k answers that are all better has the score √k.
    needed = int(NormalDist().inv_cdf((1 + level) / 2) ** 2) + 1
    if planted < needed:
        raise UsageError(
            f"evaluate.planted is {share}: that makes {planted} of {questions * seeds} answers right, and fewer than "
            f"{needed} cannot be found by any comparison at level {level}. Raise it, or questions.held_out."
        )


@dataclass(frozen=True)
class AccuracyConfig:
    """How often answers are right: of one greedy call, of samples and their vote, of a debate and other methods.

    Attributes:
        samples: independent answers to each question; 0 leaves out samples and vote.
        temperature: of these samples.
        debate: whether the model also debates with itself, as `debate` says.
        multi_call_questions: how many of the questions the debate and the methods answer; 0 means all of them.
    """

    samples: int = 8
    temperature: float = 0.7
    debate: bool = True
    multi_call_questions: int = 0

    def __post_init__(self) -> None:
        if self.samples < 0:
            raise UsageError(f"accuracy.samples is {self.samples}: give a number of samples, or 0 for none.")
        if not 0 < self.temperature < math.inf:
            raise UsageError(
                f"accuracy.temperature is {self.temperature}: give a positive one; the greedy answer is always asked."
            )
        if self.multi_call_questions < 0:
            raise UsageError(
                f"accuracy.multi_call_questions is {self.multi_call_questions}: give 0 for all, or a count."
            )


@dataclass(frozen=True)
class SelfCorrectionConfig:
    """What a model makes of its own errors, of those of others, and of doubt without reason.

    Attributes:
        max_tokens: longest answer after a check prompt; null: as the first answer.
        steps: in how many steps of a right solution an error is planted at most, each by itself.
        localisation: whether the model is asked which step is wrong, which needs an engine that takes a regex.
    """

    max_tokens: int | None = None
    steps: int = 4
    localisation: bool = True

    def __post_init__(self) -> None:
        if self.max_tokens is not None and self.max_tokens < 1:
            raise UsageError(f"self_correction.max_tokens is {self.max_tokens}: give a positive number, or null.")
        if self.steps < 1:
            raise UsageError(f"self_correction.steps is {self.steps}: give at least one step.")
