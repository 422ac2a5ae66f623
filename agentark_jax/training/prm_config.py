"""How a process reward model is made: where the labels of steps come from, and the two fits that learn them."""

import math
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from agentark_jax.errors import require
from agentark_jax.objectives.config import PAPER, RELEASE, Term
from agentark_jax.training.config import FitConfig

LabelSource = Literal["consensus", "debate", "outcome", "continuations", "judge", "agreed"]
Source = Literal["paper", "release"]

# Those whose labels take further calls of a model.
PAID: tuple[LabelSource, ...] = ("continuations", "judge", "agreed")


@dataclass(frozen=True)
class PRMConfig:
    """A process reward model: the student with a head that says of each step how probably it is right.

    It is trained in two stages (arXiv 2602.03955, §3): its last layer and the head first, then everything. Invalid
    values raise UsageError.

    Args:
        model: what it starts from, a directory in Hugging Face format or a hub id: a larger or smaller model with the
            student's tokenizer and prompts. Null: the student.
        faithful_to: whose loss: that of the paper (steps are contrasted with wrong ones of other agents on the same
            question), or of its released code (cross-entropy, and half the supervised contrast of projected steps).
        coefficients: factor of each of the terms cross_entropy, contrastive and supervised_contrastive, instead; null
            for what faithful_to says.
        temperature: of the contrasting terms. The paper tells none; 0.1 is the release's.
        wrong_weight: how much a wrong step counts in the cross-entropy, where a right one counts 1. Of few wrong steps
            a model learns to call hardly any improbable. With a weight w it calls one so as soon as that is more likely
            than 1/(1 + w), and what it says is no longer a probability.
        labels: who says which steps are right. consensus: the debate's final answer, for whole answers; debate: where
            the debaters say that the error is; outcome: the verifier, for whole answers; continuations: how many
            continuations of a step end with the right answer; judge: a model that is asked step by step; agreed:
            answers of which continuations and judge tell the same. The first three cost nothing but the debate.
        continuations: how many of each step.
        hard: take a step for right, fully, if it may be (Math-Shepherd's hard estimation: any continuation ends right),
            instead of the share of continuations as it is. The other sources are hard by themselves.
        questions: label the answers to at most this many questions; null for all.
        turns: label at most this many answers to a question; null for all.
        frozen: training of the last layers and the head.
        whole: training of everything after it; null for none.
    """

    model: str | None = None
    faithful_to: Source = "paper"
    coefficients: dict[Term, float] | None = None
    temperature: float = 0.1
    wrong_weight: float = 1.0
    labels: LabelSource = "consensus"
    continuations: int = 4
    hard: bool = False
    questions: int | None = None
    turns: int | None = None
    # Rates and epochs of the frozen stage are the release's, of the whole stage PURE's, on whose code that is built.
    frozen: FitConfig = field(default_factory=lambda: FitConfig(learning_rate=1e-4, epochs=3, last_layers=1))
    whole: FitConfig | None = field(default_factory=lambda: FitConfig(learning_rate=1e-6))

    def __post_init__(self) -> None:
        for key, choices in (("faithful_to", Source), ("labels", LabelSource)):
            value, allowed = getattr(self, key), get_args(choices)
            require(value in allowed, key, value, f"one of {', '.join(allowed)}")
        require(self.model != "", "model", self.model, "a directory or a hub id, or null")
        terms, given = get_args(Term), self.coefficients
        if given is not None:
            for term, value in given.items():
                require(term in terms, "coefficients", term, f"a factor of one of {', '.join(terms)}")
                require(math.isfinite(value) and value >= 0, f"coefficients.{term}", value, "zero or a positive number")
            require(any(given.values()), "coefficients", given, "null, or have a factor above zero")
        for key in ("temperature", "wrong_weight"):
            value = getattr(self, key)
            require(value > 0 and math.isfinite(value), key, value, "a positive number")
        require(
            self.wrong_weight == 1 or "cross_entropy" in self.terms(),
            "wrong_weight",
            self.wrong_weight,
            "1 without the term cross_entropy, which alone it weighs: see coefficients",
        )
        require(self.continuations >= 1, "continuations", self.continuations, "at least 1")
        for key in ("questions", "turns"):
            value = getattr(self, key)
            require(value is None or value >= 1, key, value, "at least 1, or null")
        require(
            self.turns is None or self.turns >= 2 or "contrastive" not in self.terms(),
            "turns",
            self.turns,
            "at least 2 for the contrastive term, which compares the answers to a question, or null",
        )
        for key in ("frozen", "whole"):
            fit = getattr(self, key)
            require(
                fit is None or not fit.coefficients,
                f"{key}.coefficients",
                fit and fit.coefficients,
                "empty; prm.coefficients has those of a process reward model",
            )

    def terms(self) -> dict[Term, float]:
        """The terms of what both stages minimise, with their factors; those with the factor zero are left out."""
        coefficients = {"paper": PAPER, "release": RELEASE}[self.faithful_to]
        if self.coefficients is not None:
            coefficients = self.coefficients
        return {term: float(value) for term, value in coefficients.items() if value}

    def labels_fingerprint(self) -> dict[str, Any]:
        """What of this config the labels depend on."""
        paid = {"continuations": self.continuations} if self.labels in ("continuations", "agreed") else {}
        soft = {"hard": self.hard} if self.labels == "continuations" else {}
        return {"labels": self.labels, "questions": self.questions, "turns": self.turns, **paid, **soft}

    def fingerprint(self) -> dict[str, Any]:
        """What of this config the trained model depends on, beyond its labels and what it starts from."""
        fits = {"frozen": self.frozen.fingerprint(), "whole": self.whole and self.whole.fingerprint()}
        weights = {} if self.wrong_weight == 1 else {"wrong_weight": self.wrong_weight}
        return {"objective": {"coefficients": self.terms(), "temperature": self.temperature, **weights}, **fits}
