"""What a debate does to its agents, read off the trace store: whom they follow, what is lost, what accuracy costs.

Everything is a pure function of labelled turns and of which turns each was shown. After a round an agent says what it
said last: where its call failed, or its debate had ended, its earlier answer stands, as it does in a debate's vote. A
peer is another agent of the same debate whose turn the prompt held; an agent's own earlier answer is none, nor is a
placebo's turn on another question. What cannot be read is no answer: nobody can follow it, and it agrees with nothing.

Intervals are clustered by question. A figure that nothing was seen for has n = 0 and None in the place of its value.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
from scipy import stats

from agentark_jax.evaluation.statistics import POWER, bootstrap_interval, holm, paired_difference, wilson_interval
from agentark_jax.records import DEBATER, FlipClass
from agentark_jax.traces.labels import LabelledTurn, by_speaker, flips, majority_vote

Parents = Mapping[str, Sequence[str]]  # the keys of the turns that a turn was shown, by its own key

_LEVELS: dict[str, Callable[[float], bool]] = {
    "none": lambda share: share == 0,
    "some": lambda share: 0 < share < 1,
    "all": lambda share: share == 1,
}


@dataclass(frozen=True)
class Debate:
    """One debate of one question.

    Attributes:
        turns: all that was said, by agent and round.
        standing: after each round the last answer of every agent that has given one, by agent.
    """

    question_id: str
    turns: list[LabelledTurn]
    standing: list[list[LabelledTurn]]


@dataclass(frozen=True)
class Move:
    """An agent's answers in two successive rounds.

    Attributes:
        peers: the turns of peers that it was shown in between.
        level: the share of its debate's agents that were right before.
    """

    before: LabelledTurn
    after: LabelledTurn
    kind: FlipClass
    peers: list[LabelledTurn]
    level: float

    @property
    def leading(self) -> list[LabelledTurn]:
        """A peer for each of the answers that most peers gave: several where they tie, none where none can be read."""
        votes = Counter(answer for peer in self.peers if (answer := _said(peer)))
        most = max(votes.values(), default=0)
        return [
            next(peer for peer in self.peers if _said(peer) == answer)
            for answer, count in votes.items()
            if count == most
        ]

    @property
    def opposed(self) -> LabelledTurn | None:
        """A peer of the peers' majority, where that gave another answer than the agent, which had one."""
        leading = self.leading
        if len(leading) != 1 or not _said(self.before) or _said(leading[0]) == _said(self.before):
            return None
        return leading[0]


def debates(rows: Iterable[LabelledTurn]) -> list[Debate]:
    """The debates that debaters' turns belong to: one for each question and sample, sorted.

    Raises:
        AgentArkError: two turns claim the same place, so the rows mix debates with different settings.
    """
    histories = by_speaker(row for row in rows if row.role == DEBATER)
    last = max((history[-1].round for history in histories), default=-1)
    groups: dict[tuple[str, str, int], list[list[LabelledTurn]]] = defaultdict(list)
    for history in histories:
        question, protocol, _, sample = history[0].speaker
        groups[question, protocol, sample].append(history)
    found = []
    for (question, *_), spoken in sorted(groups.items()):
        standing = [
            [said[-1] for history in spoken if (said := [turn for turn in history if turn.round <= index])]
            for index in range(last + 1)
        ]
        found.append(Debate(question, [turn for history in spoken for turn in history], standing))
    return found


def moves(rows: Iterable[LabelledTurn], parents: Parents) -> list[Move]:
    """What every agent was shown between two successive rounds; without one of both turns there is no move."""
    turns = {row.key: row for row in rows if row.role == DEBATER}
    levels = {
        (voter.key, index): sum(each.right for each in voters) / len(voters)
        for debate in debates(turns.values())
        for index, voters in enumerate(debate.standing)
        for voter in voters
    }
    found = []
    for change in flips(turns.values()):
        after = turns[change.after]
        shown = [turns[key] for key in parents.get(change.after, ()) if key in turns]
        debate = after.question_id, after.protocol, after.sample
        same = [turn for turn in shown if (turn.question_id, turn.protocol, turn.sample) == debate]
        peers = [turn for turn in same if turn.agent != after.agent]
        level = levels[change.before, change.round - 1]
        found.append(Move(turns[change.before], after, change.kind, peers, level))
    return found


def telemetry(seeds: Sequence[tuple[Sequence[LabelledTurn], Parents]], *, level: float = 0.95) -> dict[str, Any]:
    """The figures of the debates of one or several seeds: labelled turns (debaters' count) with what each was shown.

    `rounds`, after each: shares of agents that are right (`accuracy`) and of debates whose vote is right (`majority`)
    or in which anybody is (`oracle`), the latter less the former (`gap`), how many answers there are (`distinct`) and
    their entropy in nats (`entropy`, of debates in which something can be read), shares of debates of two agents or
    more that are `unanimous`, and that are so but wrong.

    `transitions`, between rounds: the flip matrix; of the wrong those `gained`, of the right those `lost`; peers heard
    by an agent; and, of agents with an answer of their own, how many

    - moved to the majority of their peers, given that they disagreed with it (`conformity`), where it was right
      (`to_right`) or wrong (`to_wrong`); 2605.00914 calls it modal adoption;
    - moved from the right answer to the wrong one of the majority (`vulnerability`), or stayed right against it
      (`resistance`); 1 − resistance is 2605.00914's vulnerability, which asks not where they went;
    - kept their answer where their peers tied (`independence`);
    - went where a peer had been, given that they changed (`adoption`): conformity in DTE (2505.15734).

    `drift`, per agent: accuracy in a round less that in the round before, a mean over questions. By 2508.17536 it is
    zero: a debate is a martingale, and what it gains is its vote's. Where the interval, after Holm's correction for all
    transitions, excludes zero it is not. Beside it the drift of debates of which before none, some or all of the agents
    were right. These are no tests: agents that merely answer anew return to their mean, so that low levels rise and
    high ones fall.

    Overall: the last round's vote less that of the first (`over_vote`), the share of debates in which anybody was right
    in any round less that of a right last vote (`oracle_gap`, as in 2605.00914), and of the debates with different
    answers in the first round those that end unanimous and wrong (`collapse`, as in 2509.23055).

    `points`, what accuracy costs: the vote of the first k agents' first answers, and of all after each later round,
    with calls and generated tokens a question; what was read is not counted.

    Raises:
        AgentArkError: as `debates`.
    """
    held = [debate for rows, _ in seeds for debate in debates(rows)]
    changes = [move for rows, parents in seeds for move in moves(rows, parents)]
    count = max((len(debate.standing) for debate in held), default=0)
    steps = sorted({move.after.round for move in changes})
    return {
        "level": level,
        "questions": len({debate.question_id for debate in held}),
        "debates": len(held),
        "agents": len({turn.agent for debate in held for turn in debate.turns}),
        "turns": sum(len(debate.turns) for debate in held),
        "rounds": [{"round": index + 1, **_after_round(held, index, level)} for index in range(count)],
        "transitions": [
            {
                "from_round": step,
                "to_round": step + 1,
                **_between([move for move in changes if move.after.round == step], level),
            }
            for step in steps
        ],
        "drift": drifts(changes, level=level),
        "over_vote": _difference(
            [(each.question_id, _voted_right(each.standing[-1]), _voted_right(each.standing[0])) for each in held],
            level,
        )
        if count > 1
        else None,
        "oracle_gap": _difference(
            [
                (each.question_id, any(turn.right for turn in each.turns), _voted_right(each.standing[-1]))
                for each in held
            ],
            level,
        ),
        "collapse": _share(
            [
                (each.question_id, _unanimous(each.standing[-1]) and not each.standing[-1][0].right)
                for each in held
                if len(_answers(each.standing[0])) > 1
            ],
            level,
        ),
        "points": _points(held, count, level),
    }


def drifts(changes: Sequence[Move], *, level: float = 0.95) -> list[dict[str, Any]]:
    """`drift` of `telemetry`: a martingale test of every transition, and in which direction it found one."""

    def drift(of: Iterable[Move]) -> dict[str, Any] | None:
        return _difference([_changed(move) for move in of], level)

    steps = sorted({move.after.round for move in changes})
    taken = [[move for move in changes if move.after.round == step] for step in steps]
    found = [_mean_change([_changed(move) for move in of_step], level) for of_step in taken]
    adjusted = holm([each["p_value"] for each in found])
    return [
        {
            "from_round": step,
            "to_round": step + 1,
            **each,
            "p_holm": p_holm,
            "drift": "none" if p_holm >= 1 - level else "up" if each["difference"] > 0 else "down",
            "levels": {name: drift(move for move in of_step if within(move.level)) for name, within in _LEVELS.items()},
        }
        for step, of_step, each, p_holm in zip(steps, taken, found, adjusted, strict=True)
    ]


def _said(turn: LabelledTurn) -> str:
    """The answer of a turn, empty where none can be read."""
    return "" if turn.verdict == "unparseable" else turn.answer


def _voted_right(voters: Sequence[LabelledTurn]) -> bool:
    """Whether the majority of these answers, as `traces.labels.majority_vote` has it, is right."""
    answer, votes = majority_vote([_said(voter) for voter in voters])
    return votes > 0 and next(voter.right for voter in voters if _said(voter) == answer)


def _unanimous(voters: Sequence[LabelledTurn]) -> bool:
    return bool(_said(voters[0])) and len({_said(voter) for voter in voters}) == 1


def _answers(voters: Sequence[LabelledTurn]) -> Counter[str]:
    return Counter(answer for voter in voters if (answer := _said(voter)))


def _entropy(votes: Counter[str]) -> float:
    """−Σ p ln p of the shares of the answers."""
    return -sum(count / votes.total() * math.log(count / votes.total()) for count in votes.values()) + 0.0


def _after_round(held: Sequence[Debate], index: int, level: float) -> dict[str, Any]:
    after = [(debate.question_id, debate.standing[index]) for debate in held]
    several = [(question, voters) for question, voters in after if len(voters) > 1]
    votes = [(question, _answers(voters)) for question, voters in after]
    judged = [(question, any(voter.right for voter in voters), _voted_right(voters)) for question, voters in after]
    return {
        "accuracy": _share([(question, voter.right) for question, voters in after for voter in voters], level),
        "majority": _share([(question, majority) for question, _, majority in judged], level),
        "oracle": _share([(question, oracle) for question, oracle, _ in judged], level),
        "gap": _difference(judged, level),
        "distinct": _mean([(question, len(answers)) for question, answers in votes], level),
        "entropy": _mean([(question, _entropy(answers)) for question, answers in votes if answers], level),
        "unanimous": _share([(question, _unanimous(voters)) for question, voters in several], level),
        "unanimous_wrong": _share(
            [(question, _unanimous(voters) and not voters[0].right) for question, voters in several], level
        ),
    }


def _between(changes: Sequence[Move], level: float) -> dict[str, Any]:
    opposed = [(move, peer) for move in changes if (peer := move.opposed) is not None]
    tied = [move for move in changes if len(move.leading) > 1 and _said(move.before)]
    changed = [
        move for move in changes if _said(move.before) and _said(move.after) and _said(move.after) != _said(move.before)
    ]

    def share(cases: Iterable[tuple[Move, bool]]) -> dict[str, Any]:
        return _share([(move.after.question_id, yes) for move, yes in cases], level)

    def followed(move: Move, peer: LabelledTurn) -> tuple[Move, bool]:
        return move, _said(move.after) == _said(peer)

    resisting = [(move, peer) for move, peer in opposed if move.before.right and not peer.right]
    return {
        "flips": {kind: sum(move.kind == kind for move in changes) for kind in get_args(FlipClass)},
        "gained": share((move, move.after.right) for move in changes if not move.before.right),
        "lost": share((move, not move.after.right) for move in changes if move.before.right),
        "peers_heard": sum(len(move.peers) for move in changes) / len(changes),
        "conformity": share(followed(move, peer) for move, peer in opposed),
        "to_right": share(followed(move, peer) for move, peer in opposed if peer.right),
        "to_wrong": share(followed(move, peer) for move, peer in opposed if not peer.right),
        "vulnerability": share(followed(move, peer) for move, peer in resisting),
        "resistance": share((move, move.after.right) for move, _ in resisting),
        "independence": share((move, _said(move.after) == _said(move.before)) for move in tied),
        "adoption": share((move, _said(move.after) in map(_said, move.peers)) for move in changed),
    }


def _changed(move: Move) -> tuple[str, bool, bool]:
    return move.after.question_id, move.after.right, move.before.right


def _mean_change(cases: Sequence[tuple[str, bool, bool]], level: float) -> dict[str, Any]:
    """As `_difference`, but the mean over questions of each one's own: Student's t test that it is zero.

    Agents of a debate do not change alike. Where they copy each other, one becomes right as another becomes wrong, and
    the sum changes less than if they were independent, which is the least that `paired_difference` allows for.
    """
    by_question: dict[str, list[int]] = defaultdict(list)
    for question, after, before in cases:
        by_question[question].append(int(after) - int(before))
    means = np.asarray([np.mean(changes) for changes in by_question.values()])
    if np.ptp(means) < 1e-12:
        # The spread over questions is not known.
        return _difference(cases, level) or {}
    found = stats.ttest_1samp(means, 0.0)
    low, high = found.confidence_interval(level)
    reach = stats.t.ppf((1 + level) / 2, means.size - 1) + stats.t.ppf(POWER, means.size - 1)
    detectable = float(reach * means.std(ddof=1) / math.sqrt(means.size))
    return {
        "difference": float(means.mean()),
        "low": float(low),
        "high": float(high),
        "n": len(cases),
        "questions": means.size,
        "p_value": float(found.pvalue),
        "minimum_detectable": detectable if detectable <= 1 else None,
    }


def _points(held: Sequence[Debate], rounds: int, level: float) -> list[dict[str, Any]]:
    agents = sorted({turn.agent for debate in held for turn in debate.turns})

    def point(kind: str, who: Sequence[int], last: int) -> dict[str, Any]:
        votes, spent = [], []
        for debate in held:
            voters = [turn for turn in debate.standing[last] if turn.agent in who]
            votes.append((debate.question_id, _voted_right(voters)))
            spent += [turn.tokens for turn in debate.turns if turn.agent in who and turn.round <= last]
        return {
            "kind": kind,
            "agents": len(who),
            "rounds": last + 1,
            "calls": len(spent) / len(held),
            "tokens": sum(spent) / len(held),
            **_share(votes, level),
        }

    alone = [point("vote" if k > 1 else "single", agents[:k], 0) for k in range(1, len(agents) + 1)]
    return [*alone, *(point("debate", agents, last) for last in range(1, rounds))]


def _share(cases: Sequence[tuple[str, bool]], level: float) -> dict[str, Any]:
    """How many of the cases, each with its question, are true: a Wilson interval."""
    if not cases:
        return {"value": None, "low": None, "high": None, "n": 0, "questions": 0}
    questions, yes = map(np.asarray, zip(*cases, strict=True))
    low, high = wilson_interval(yes, questions, level=level)
    return {"value": float(yes.mean()), "low": low, "high": high, "n": yes.size, "questions": len(set(questions))}


def _mean(cases: Sequence[tuple[str, float]], level: float) -> dict[str, Any]:
    """The mean of a number, given with its question, and a bootstrap interval; None for the ends where none is."""
    if not cases:
        return {"value": None, "low": None, "high": None, "n": 0, "questions": 0}
    questions, values = map(np.asarray, zip(*cases, strict=True))
    low, high = bootstrap_interval(
        lambda drawn, column: drawn @ column / drawn.sum(1), values.astype(float), clusters=questions, level=level
    ) or (None, None)
    return {"value": float(values.mean()), "low": low, "high": high, "n": values.size, "questions": len(set(questions))}


def _difference(cases: Sequence[tuple[str, bool, bool]], level: float) -> dict[str, Any] | None:
    """Of cases, each with its question: the share of the first that are true less that of the second, paired."""
    if not cases:
        return None
    questions, first, second = map(np.asarray, zip(*cases, strict=True))
    found = paired_difference(first, second, questions, level=level)
    return {
        "difference": found.difference,
        "low": found.low,
        "high": found.high,
        "n": found.n,
        "questions": found.clusters,
        "p_value": found.p_value,
        "minimum_detectable": found.minimum_detectable,
    }
