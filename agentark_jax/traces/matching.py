"""Arms that differ in one thing only: selections of the same questions, as many and as long trajectories of each."""

import warnings
from bisect import bisect_left, insort
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from agentark_jax.errors import AgentArkError
from agentark_jax.records import stable_hash
from agentark_jax.traces.config import GOLDLESS
from agentark_jax.traces.labels import LabelledTurn
from agentark_jax.traces.selection import Selection, Trajectory, keep_only

MATCH_TOLERANCE = 0.01
# Lengths are alike where a Kolmogorov-Smirnov test at this level does not tell them apart, or where it does, of many
# trajectories, but their distribution functions are no farther apart than this distance.
LENGTHS_LEVEL, LENGTHS_DISTANCE = 0.05, 0.05


@dataclass(frozen=True)
class Likeness:
    """How alike lengths are: the distance of their distribution functions, and the p-value of its being chance."""

    distance: float
    p: float

    @property
    def alike(self) -> bool:
        return self.p >= LENGTHS_LEVEL or self.distance <= LENGTHS_DISTANCE


@dataclass(frozen=True, eq=False)
class Match:
    """Matched selections by name, and how they are alike.

    Attributes:
        questions: how many questions all of them have.
        dropped: questions that were given up by reason: not every arm had one, or lengths that did not match.
        lengths: of each but the first, how alike its trajectories' lengths are to those of the first.
    """

    selections: dict[str, Selection]
    questions: int
    dropped: dict[str, int]
    lengths: dict[str, Likeness]

    @property
    def figures(self) -> dict[str, Any]:
        """What a manifest says of it, as JSON values."""
        return {
            "arms": list(self.selections),
            "questions": self.questions,
            "dropped": self.dropped,
            "tokens": {name: selection.tokens for name, selection in self.selections.items()},
            "lengths": {name: asdict(likeness) for name, likeness in self.lengths.items()},
        }


def match(arms: Mapping[str, Selection], seed: int, blind: Set[str] = frozenset()) -> Match:
    """Make arms alike in volume, whatever else they differ in.

    All keep the same questions, of each question the same number of trajectories, the same number of completion tokens
    within 1 % (of the fewest), and lengths alike (`Likeness`) to those of the first arm. Of a question of which
    it has more than another arm, the first arm keeps what it prefers, and the others what is nearest in length to that.
    Only those that ask no gold answer keep what they prefer, too: they may choose among the turns of which the first
    arm took the right ones, and the nearest in length to those are themselves. `blind` names further ones: what is
    right was not told to them by a gold answer. Questions that an arm lacks, and then
    those whose lengths are in the way, are given up by all arms; `seed` decides between equal ones.

    Raises:
        AgentArkError: no question is common, or of those that are fewer than half can be kept.
    """
    counts = [Counter(trajectory.question_id for trajectory in arm.trajectories) for arm in arms.values()]
    everyone = set(counts[0]).intersection(*counts[1:])
    shared = sorted(everyone, key=lambda question: (stable_hash([seed, question]), question))
    if not shared:
        raise _unmatched(arms, "no question has a trajectory in all of them")
    number = {question: min(count[question] for count in counts) for question in shared}
    first, *others = arms
    chosen = {first: _preferred(arms[first], number)}
    for name in others:
        prefers = name in blind or arms[name].variant in GOLDLESS
        chosen[name] = _preferred(arms[name], number) if prefers else _nearest(arms[name], chosen[first])
    kept = _alike([[[_length(t) for t in of_arm[question]] for question in shared] for of_arm in chosen.values()])
    if not kept:
        raise _unmatched(arms, f"of their {len(shared)} common questions fewer than half have lengths that go together")
    left = {shared[index] for index in kept}
    selections = {name: _restricted(arm, chosen[name], left) for name, arm in arms.items()}
    lengths = [_lengths(selection.trajectories) for selection in selections.values()]
    return Match(
        selections,
        len(left),
        {
            "not in all arms": len(set().union(*counts)) - len(shared),
            "length not matched": len(shared) - len(left),
        },
        {name: _likeness(lengths[0], of_arm) for name, of_arm in zip(others, lengths[1:], strict=True)},
    )


def check_matched(arms: Mapping[str, Selection], figures: Mapping[str, Any]) -> None:
    """Assert of selections that were stored what `match` promises, and that it was written of them.

    Args:
        arms: all that were matched, by name.
        figures: `Match.figures` as they were stored.

    Raises: AgentArkError that names the arms which differ.
    """
    first, *others = arms
    counts = {name: Counter(t.question_id for t in arm.trajectories) for name, arm in arms.items()}
    tokens = {name: arm.tokens for name, arm in arms.items()}
    fewest = min(tokens, key=lambda name: tokens[name])
    told = figures["tokens"]
    lengths = {name: _lengths(arm.trajectories) for name, arm in arms.items()}
    for name in arms:
        if told.get(name) != tokens[name]:
            how = f"{name} has {tokens[name]} tokens, and the stage says {told.get(name)}"
        elif tokens[name] > (1 + MATCH_TOLERANCE) * tokens[fewest]:
            how = f"{name} has {tokens[name]} tokens and {fewest} {tokens[fewest]}"
        elif counts[name] != counts[first]:
            how = f"{name} and {first} have other questions, or not as many trajectories of each"
        elif name in others and not _likeness(lengths[first], lengths[name]).alike:
            how = f"trajectories of {name} and {first} have other lengths"
        else:
            continue
        raise AgentArkError(
            f"The arms {', '.join(arms)} are not matched any more: {how}. Delete the stage select and run again."
        )


def _restricted(arm: Selection, chosen: Mapping[str, Sequence[Trajectory]], left: Set[str]) -> Selection:
    """What was chosen of the questions that are left; `chosen` has those that all arms have."""
    picked = {trajectory.turn_key for trajectories in chosen.values() for trajectory in trajectories}
    arm = keep_only(arm, "question not in all arms", lambda trajectory: trajectory.question_id in chosen)
    arm = keep_only(arm, "more than in another arm", lambda trajectory: trajectory.turn_key in picked)
    return keep_only(arm, "length not matched", lambda trajectory: trajectory.question_id in left)


def within_budget(rows: Iterable[LabelledTurn], others: Iterable[LabelledTurn]) -> list[LabelledTurn]:
    """The first samples of each question that together have no more completion tokens than `others` have on it."""
    budget: Counter[str] = Counter()
    for row in others:
        budget[row.question_id] += row.tokens
    kept = []
    for row in sorted(rows, key=lambda row: row.place):
        budget[row.question_id] -= row.tokens
        if budget[row.question_id] >= 0:
            kept.append(row)
    return kept


def _by_question(trajectories: Iterable[Trajectory]) -> dict[str, list[Trajectory]]:
    found: dict[str, list[Trajectory]] = defaultdict(list)
    for trajectory in trajectories:
        found[trajectory.question_id].append(trajectory)
    return found


def _preferred(arm: Selection, number: Mapping[str, int]) -> dict[str, list[Trajectory]]:
    """The first so many of each question: selections list what they prefer first."""
    found = _by_question(arm.trajectories)
    return {question: found[question][:count] for question, count in number.items()}


def _nearest(arm: Selection, model: Mapping[str, Sequence[Trajectory]]) -> dict[str, list[Trajectory]]:
    """As many of each question as `model` has, near to those in length; the arm has as many or more."""
    of_questions = [trajectory for trajectory in arm.trajectories if trajectory.question_id in model]
    near = nearest_in_length(of_questions, [t for trajectories in model.values() for t in trajectories])
    return _by_question(trajectory for trajectory in of_questions if trajectory.turn_key in near)


def nearest_in_length(candidates: Iterable[Trajectory], wanted: Iterable[Trajectory]) -> set[str]:
    """For every wanted trajectory the key of one that is near in length; of the same question where it has any.

    The longest choose first, those of other questions after all others; ties go to the shorter.
    """
    free: dict[str, list[tuple[int, str]]] = defaultdict(list)
    for trajectory in candidates:
        insort(free[trajectory.question_id], (_length(trajectory), trajectory.turn_key))
    taken, unmet = set(), []
    for each in sorted(wanted, key=lambda trajectory: -_length(trajectory)):
        if free[each.question_id]:
            taken.add(_take_nearest(free[each.question_id], _length(each)))
        else:
            unmet.append(_length(each))
    rest = sorted(each for of_question in free.values() for each in of_question)
    for length in unmet[: len(rest)]:
        taken.add(_take_nearest(rest, length))
    return taken


def _take_nearest(free: list[tuple[int, str]], length: int) -> str:
    """Takes the (length, key) nearest to a length out of a sorted list; its key."""
    above = bisect_left(free, (length, ""))
    nearest = min(free[max(0, above - 1) : above + 1], key=lambda each: abs(each[0] - length))
    del free[bisect_left(free, nearest)]
    return nearest[1]


def _alike(lengths: Sequence[Sequence[Sequence[int]]]) -> list[int]:
    """The questions to keep, of lengths by arm and question, so that all arms have equal tokens and alike lengths.

    None where that would take more than half of them away.

    While totals differ, one question at a time goes, or comes back, after which they differ least. While lengths do,
    those go for good of which a trajectory is farthest from its like in the first arm, a hundredth at a time.
    """
    tokens = np.asarray([[sum(of_question) for of_question in arm] for arm in lengths])  # [arms, questions]
    ordered = [[sorted(of_question) for of_question in arm] for arm in lengths]
    count = tokens.shape[1]
    apart = np.asarray(
        [
            max(abs(a - b) for arm in ordered for a, b in zip(arm[question], ordered[0][question], strict=True))
            for question in range(count)
        ]
    )
    kept, gone = np.ones(count, bool), np.zeros(count, bool)
    recent: deque[int] = deque(maxlen=min(10, count // 4))
    for _ in range(min(4 * count, 4000)):
        many = max(1, int(kept.sum()) // 1000)
        totals = tokens[:, kept].sum(1)
        if kept.sum() < count / 2:
            break
        if np.ptp(totals) > MATCH_TOLERANCE * totals.min():
            after = totals[:, None] + np.where(kept, -tokens, tokens)
            differ = np.where(gone, np.inf, np.ptp(after, axis=0) / np.maximum(after.min(0), 1))
            differ[recent] = np.inf
            best = np.argsort(differ, kind="stable")[:many]
            kept[best] = ~kept[best]
            recent.extend(best.tolist())
            continue
        flat = [np.asarray([size for each in np.flatnonzero(kept).tolist() for size in arm[each]]) for arm in lengths]
        if all(_likeness(flat[0], other).alike for other in flat[1:]):
            return [int(index) for index in np.flatnonzero(kept)]
        farthest = np.argsort(np.where(kept, -apart, 1), kind="stable")[: 10 * many]
        kept[farthest], gone[farthest] = False, True
    return []


def _likeness(a: np.ndarray, b: np.ndarray) -> Likeness:
    # Imported here: it takes a while.
    from scipy.stats import ks_2samp

    with warnings.catch_warnings():
        # Of a few sizes rounding makes the exact p-value more than 1; the asymptotic one then takes its place.
        warnings.filterwarnings("ignore", "ks_2samp: Exact calculation unsuccessful", RuntimeWarning)
        test = ks_2samp(a, b)
    return Likeness(float(test.statistic), float(test.pvalue))


def _unmatched(arms: Mapping[str, Selection], why: str) -> AgentArkError:
    shown = ", ".join(
        f"{name} ({arm.variant}): {len(arm.trajectories)} trajectories of {arm.figures['questions']} questions, "
        f"{arm.tokens} tokens"
        for name, arm in arms.items()
    )
    return AgentArkError(
        f"The arms cannot be matched: {why}. They are {shown}. Debate more questions, raise select.per_question, or "
        "leave out the arm that has the fewest."
    )


def _length(trajectory: Trajectory) -> int:
    return len(trajectory.completion_ids)


def _lengths(trajectories: Iterable[Trajectory]) -> np.ndarray:
    return np.asarray([_length(trajectory) for trajectory in trajectories])
