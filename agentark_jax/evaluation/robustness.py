"""How much a model's answers depend on what should not matter: wording, numbers, the order of choices, distractions.

GSM-Plus (Li et al. 2024) asks each seed question of GSM8K again in several ways. Orders of choices are rotations of one
another (`perturbations.arrangements`), so that the positions of the right one are balanced; what is measured follows
Zheng et al. 2024, "Large language models are not robust multiple choice selectors".
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from agentark_jax.evaluation import figures
from agentark_jax.evaluation.perturbations import Order

ALL = "all"
_PERMUTATIONS = 1000  # of answers within questions
NOTHING = -1  # chosen


@dataclass(frozen=True)
class Perturbed:
    """One perturbed question: its seed question, in what way it differs, and whether both are answered right."""

    seed: str
    kind: str
    right: bool
    seed_right: bool


@dataclass(frozen=True)
class Chosen:
    """What was chosen of a question's choices in one order.

    Choices are counted from 0 as they stand in the question: `right` is the right one, `before` what was chosen there
    and `now` what was chosen in `order`; `NOTHING` where that could not be read.
    """

    question: str
    order: Order
    right: int
    before: int
    now: int


@dataclass(frozen=True)
class Distracted:
    """Whether a question is answered right, by itself and with a sentence in it that does not belong there."""

    question: str
    clean: bool
    distracted: bool


def perturbation_figures(rows: Sequence[Perturbed], *, level: float) -> list[dict[str, Any]]:
    """Of each kind of perturbation, and of all together (`all`, first), clustered by seed question.

    `accuracy` is that of the perturbed questions, `seed_accuracy` that of their seeds (each as often as it is
    perturbed), `difference` the paired one. `drop_rate` is 1 − accuracy / seed accuracy, as GSM-Plus has it, None where
    no seed is right. `kept` is the share of right ones where the seed is right.
    """
    kinds = [ALL, *sorted({row.kind for row in rows})]
    return [{"kind": kind, **_of_kind(kind, [r for r in rows if kind in (ALL, r.kind)], level)} for kind in kinds]


def _of_kind(kind: str, rows: Sequence[Perturbed], level: float) -> dict[str, Any]:
    right, before, seeds = [r.right for r in rows], [r.seed_right for r in rows], [r.seed for r in rows]
    solved = [row for row in rows if row.seed_right]
    return {
        "accuracy": figures.share(right, seeds, level=level),
        "seed_accuracy": figures.share(before, seeds, level=level),
        "difference": figures.difference(f"{kind} over the seed questions", right, before, seeds, level=level),
        "drop_rate": figures.statistic(_drop_rate, [right, before], seeds, level=level),
        "kept": figures.share([row.right for row in solved], [row.seed for row in solved], level=level),
    }


def _drop_rate(drawn: np.ndarray, right: np.ndarray, before: np.ndarray) -> np.ndarray:
    return 1 - _ratio(drawn @ right, drawn @ before)


def distraction_figures(rows: Sequence[Distracted], *, level: float) -> dict[str, Any]:
    """Accuracy without and with the distractor, their paired difference, and the share of right ones that stay so."""
    clean, after, questions = [r.clean for r in rows], [r.distracted for r in rows], [r.question for r in rows]
    solved = [row for row in rows if row.clean]
    return {
        "clean": figures.share(clean, questions, level=level),
        "distracted": figures.share(after, questions, level=level),
        "difference": figures.difference("with a distractor over without", after, clean, questions, level=level),
        "kept": figures.share([row.distracted for row in solved], [row.question for row in solved], level=level),
    }


def shuffle_figures(rows: Sequence[Chosen], *, level: float, seed: int = 0) -> dict[str, Any]:
    """What the order of choices does to the answers, clustered by question.

    Where a row's order is the question's own, nothing was asked again: it counts for `positions` alone. `same`: of
    answers to a question in another order, the share that choose what was chosen before; `always`: of questions, the
    share for which all do. Both are of those where something was chosen before.

    `positions`: of each position, the accuracy where the right choice stands there, and how often it is `chosen` less
    how often chance would choose it (of answers that choose anything). `spread` is the largest less the smallest of
    these accuracies, `bias` half the sum of the absolute differences from chance: 0 for a model that does not look at
    the position, 1 − 1/choices for one that looks at nothing else. Few questions make both larger; so their `p_value`
    compares them with `chance`, their mean where the orders' answers to each question are dealt out at random.
    """
    moved = [row for row in rows if list(row.order) != sorted(row.order)]
    known = [row for row in moved if row.before != NOTHING]
    of: dict[str, list[bool]] = {}
    for row in known:
        of.setdefault(row.question, []).append(row.now == row.before)
    right, before = [row.now == row.right for row in moved], [row.before == row.right for row in moved]
    questions = [row.question for row in moved]
    first = {row.question: row.before == row.right for row in rows}
    return {
        "original": figures.share(list(first.values()), list(first), level=level),
        "shuffled": figures.share(right, questions, level=level),
        "difference": figures.difference(
            "in another order over the original one", right, before, questions, level=level
        ),
        "same": figures.share([row.now == row.before for row in known], [row.question for row in known], level=level),
        "always": figures.share([all(each) for each in of.values()], list(of), level=level),
        **(_position_figures(rows, level, seed) if rows else {"positions": [], "spread": None, "bias": None}),
    }


class _Positions:
    """Where the choices of R rows stand, and what follows for what was chosen."""

    def __init__(self, rows: Sequence[Chosen]):
        self.sizes = np.asarray([len(row.order) for row in rows])
        self.count = int(self.sizes.max())
        # Position, in the row's order, of each choice as it stands in the question.
        self.place = np.full((len(rows), self.count), NOTHING)
        for index, row in enumerate(rows):
            self.place[index, list(row.order)] = range(len(row.order))
        self.right = np.asarray([row.right for row in rows])
        self.right_at = self.place[np.arange(len(rows)), self.right]

    def chosen_at(self, now: Int[np.ndarray, " R"]) -> Int[np.ndarray, " R"]:
        return np.where(now == NOTHING, NOTHING, self.place[np.arange(len(now)), now])

    def accuracies(self, drawn: Float[np.ndarray, "S R"], now: Int[np.ndarray, " R"]) -> Float[np.ndarray, "S P"]:
        """Accuracy by position of the right choice, NaN where it never stands."""
        at = self.right_at[:, None] == np.arange(self.count)
        return _ratio(drawn @ (at & (now == self.right)[:, None]), drawn @ at)

    def surplus(self, drawn: Float[np.ndarray, "S R"], now: Int[np.ndarray, " R"]) -> Float[np.ndarray, "S P"]:
        """How often each position is chosen less how often chance would choose it; NaN where nothing is."""
        chose = now != NOTHING
        picked = (self.chosen_at(now)[:, None] == np.arange(self.count)) & chose[:, None]
        expected = (np.arange(self.count) < self.sizes[:, None]) * chose[:, None] / self.sizes[:, None]
        return _ratio(drawn @ (picked - expected), (drawn @ chose.astype(float))[:, None])

    def spread(self, drawn: Float[np.ndarray, "S R"], now: Int[np.ndarray, " R"]) -> Float[np.ndarray, " S"]:
        found = self.accuracies(drawn, now)
        return found.max(1) - found.min(1)

    def bias(self, drawn: Float[np.ndarray, "S R"], now: Int[np.ndarray, " R"]) -> Float[np.ndarray, " S"]:
        return np.abs(self.surplus(drawn, now)).sum(1) / 2


def _position_figures(rows: Sequence[Chosen], level: float, seed: int) -> dict[str, Any]:
    positions, questions = _Positions(rows), [row.question for row in rows]
    now = np.asarray([row.now for row in rows])
    _, group = np.unique(questions, return_inverse=True)
    once = np.ones((1, len(rows)))
    draws = np.random.default_rng(seed)
    # Within a question, answers are put in a random order.
    dealt = [now[np.lexsort((draws.random(len(rows)), group))] for _ in range(_PERMUTATIONS)]
    back = np.argsort(np.lexsort((np.arange(len(rows)), group)))

    def compared(function: Any) -> dict[str, Any] | None:
        seen = figures.statistic(function, [now], questions, level=level)
        if seen is None:
            return None
        chance = np.asarray([function(once, each[back])[0] for each in dealt])
        larger = int((chance >= seen["value"] - 1e-12).sum())
        return {**seen, "chance": float(chance.mean()), "p_value": (1 + larger) / (1 + len(chance))}

    def at(place: int) -> dict[str, Any]:
        here = [index for index, where in enumerate(positions.right_at) if where == place]
        surplus = figures.statistic(
            lambda drawn, now: positions.surplus(drawn, now)[:, place], [now], questions, level=level
        )
        right = [bool(now[index] == positions.right[index]) for index in here]
        accuracy = figures.share(right, [questions[index] for index in here], level=level)
        return {"position": place + 1, "accuracy": accuracy, "chosen": surplus}

    return {
        "positions": [at(place) for place in range(positions.count)],
        "spread": compared(positions.spread),
        "bias": compared(positions.bias),
    }


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.divide(part, whole, out=np.full(np.broadcast_shapes(part.shape, whole.shape), np.nan), where=whole > 0)
