"""From turns to verdicts, and what follows from them: who changed their mind, how often a round is right, majorities.

A label is a pure function of a turn and a grader, so it can be recomputed at any time. Everything derived here is a
pure function of labelled turns and does not depend on their order. An unparseable answer counts as a wrong one.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from sys import intern
from typing import Any, get_args

from agentark_jax.errors import AgentArkError
from agentark_jax.records import FlipClass, Grade, Label, Question, Turn, Verdict
from agentark_jax.traces.store import TraceStore

Grader = Callable[[Question, str], Grade]

_FLIP_CLASSES: dict[tuple[bool, bool], FlipClass] = {
    (True, True): "right→right",
    (False, True): "wrong→right",
    (True, False): "right→wrong",
    (False, False): "wrong→wrong",
}


@dataclass(frozen=True, slots=True)
class LabelledTurn:
    """One successful turn with a grader's verdict: what selection and statistics read. `tokens`: of its completion.

    A million of them take some 250 MB; what was said is in the store (`TraceStore.completions`, `TraceStore.texts`).
    """

    key: str
    question_id: str
    protocol: str
    role: str
    agent: int
    round: int
    sample: int
    verdict: Verdict
    answer: str
    finish: str
    tokens: int

    @property
    def right(self) -> bool:
        return self.verdict == "right"

    @property
    def place(self) -> tuple[str, str, int, int, int]:
        """Question, protocol, round, agent, sample: where the turn stands; rows are sorted by it."""
        return self.question_id, self.protocol, self.round, self.agent, self.sample

    @property
    def speaker(self) -> tuple[str, str, int, int]:
        """Question, protocol, agent, sample: whose turns over the rounds belong together."""
        return self.question_id, self.protocol, self.agent, self.sample


def grade_turns(turns: Iterable[Turn], questions: Mapping[str, Question], grade: Grader, grader: str) -> list[Label]:
    """Labels of the successful turns, in their order; `grader` is the grader's id and version.

    A completion cut off at its token limit is unparseable: "The answer is 1" may have been on its way to 14.

    Raises:
        AgentArkError: a turn's question is not among `questions` (by id).
    """
    labels = []
    for turn in turns:
        if turn.completion is None:
            continue
        if turn.call.question_id not in questions:
            raise AgentArkError(f"Turn {turn.key}: its question {turn.call.question_id} is not in the trace store.")
        if turn.completion.finish == "length":
            verdict = Grade("unparseable", detail="cut off at max_tokens")
        else:
            verdict = grade(questions[turn.call.question_id], turn.completion.text)
        labels.append(Label(turn.key, grader, verdict.verdict, verdict.answer))
    return labels


def label_turns(store: TraceStore, turns: Iterable[Turn], grade: Grader, grader: str) -> dict[str, Label]:
    """Grade turns of a store's questions, keep the labels, and give them by key. Raises as `grade_turns`."""
    labels = grade_turns(turns, {question.id: question for question in store.questions()}, grade, grader)
    store.put_labels(labels)
    return {label.key: label for label in labels}


def label_store(store: TraceStore, grade: Grader, grader: str, *, protocol: str | None = None) -> dict[Verdict, int]:
    """Grade a store's successful turns (of one protocol, or all), keep the labels, and count them by verdict."""
    questions = {question.id: question for question in store.questions()}
    labels = grade_turns(store.turns(protocol=protocol, errors=False), questions, grade, grader)
    store.put_labels(labels)
    counts = Counter(label.verdict for label in labels)
    return {verdict: counts[verdict] for verdict in get_args(Verdict)}


def labelled_turns(
    store: TraceStore,
    grader: str,
    *,
    keys: Iterable[str] | None = None,
    protocol: str | None = None,
    role: str | None = None,
    weights: str | None = None,
) -> list[LabelledTurn]:
    """A store's successful turns with their labels, sorted by place.

    Args:
        keys: only these turns, say those of one debate's settings; every one of them must have succeeded.
        protocol, role, weights: only turns of this protocol, role and weights version.

    Raises:
        AgentArkError: a turn has no label of this grader, or a key has no successful turn.
    """
    keys = None if keys is None else set(keys)
    rows = []
    found = store.labelled(grader, protocol=protocol, role=role, weights=weights)
    for key, question_id, protocol_, role_, agent, round, sample, verdict, answer, finish, tokens in found:
        if keys is not None and key not in keys:
            continue
        if verdict is None:
            raise AgentArkError(f"{store.path}: turn {key} has no label of grader {grader}; run the label stage first.")
        # The same few texts stand in many rows.
        shared: Any = intern(verdict)
        place = intern(question_id), intern(protocol_), intern(role_), agent, round, sample
        rows.append(LabelledTurn(key, *place, shared, intern(answer), intern(finish), tokens))
    if keys is not None and (unanswered := store.unanswered(keys.difference(row.key for row in rows))):
        raise AgentArkError(f"{store.path}: call {min(unanswered)} has no answer; run the debate again.")
    rows.sort(key=lambda row: row.place)
    return rows


def by_speaker(rows: Iterable[LabelledTurn]) -> list[list[LabelledTurn]]:
    """The turns of each speaker, in round order; speakers sorted.

    Raises:
        AgentArkError: two turns claim the same place, so the rows mix runs of a protocol with different settings.
    """
    speakers: dict[tuple[str, str, int, int], list[LabelledTurn]] = defaultdict(list)
    for row in sorted(rows, key=lambda row: row.place):
        history = speakers[row.speaker]
        if history and history[-1].round == row.round:
            raise AgentArkError(
                f"Turns {history[-1].key} and {row.key} are both round {row.round} of agent {row.agent} (sample "
                f"{row.sample}) in protocol {row.protocol} on question {row.question_id}. Give the keys or the weights "
                "version of one run of the protocol."
            )
        history.append(row)
    return [speakers[speaker] for speaker in sorted(speakers)]


@dataclass(frozen=True)
class Flip:
    """What became of one agent's answer from round `round` - 1 to `round`."""

    question_id: str
    protocol: str
    agent: int
    sample: int
    round: int
    kind: FlipClass
    before: str
    after: str


def flips(rows: Iterable[LabelledTurn]) -> list[Flip]:
    """One flip per agent and pair of successive rounds; a missing (failed) turn leaves out the pairs it belongs to."""
    return [
        Flip(
            *(after.question_id, after.protocol, after.agent, after.sample, after.round),
            kind=_FLIP_CLASSES[before.right, after.right],
            before=before.key,
            after=after.key,
        )
        for history in by_speaker(rows)
        for before, after in pairwise(history)
        if after.round == before.round + 1
    ]


def flip_matrix(changes: Iterable[Flip]) -> dict[int, dict[FlipClass, int]]:
    """How often each flip class occurs, by the round that it leads to; classes that do not occur count 0."""
    counts: dict[int, dict[FlipClass, int]] = {}
    for change in sorted(changes, key=lambda change: change.round):
        counts.setdefault(change.round, dict.fromkeys(get_args(FlipClass), 0))[change.kind] += 1
    return counts


@dataclass(frozen=True)
class RoundAccuracy:
    """Verdicts over all agents of one round; `accuracy` is a share of all `n` turns, unparseable ones included."""

    round: int
    right: int
    wrong: int
    unparseable: int

    @property
    def n(self) -> int:
        return self.right + self.wrong + self.unparseable

    @property
    def accuracy(self) -> float:
        return self.right / self.n


def accuracy_by_round(rows: Iterable[LabelledTurn]) -> list[RoundAccuracy]:
    """Verdicts by round, for rows of one protocol; rounds ascending."""
    counts: dict[int, Counter[Verdict]] = defaultdict(Counter)
    for row in rows:
        counts[row.round][row.verdict] += 1
    return [
        RoundAccuracy(round, count["right"], count["wrong"], count["unparseable"])
        for round, count in sorted(counts.items())
    ]


@dataclass(frozen=True)
class Majority:
    """The most frequent answer of one (question, protocol, round), behind which stand `votes` of `n` voters.

    `verdict` is the verdict of that answer; without a parseable answer it is `unparseable`, `answer` is empty and
    `votes` is 0.
    """

    question_id: str
    protocol: str
    round: int
    answer: str
    verdict: Verdict
    votes: int
    n: int

    @property
    def agreement(self) -> float:
        return self.votes / self.n


def majorities(rows: Iterable[LabelledTurn]) -> list[Majority]:
    """The majority of every (question, protocol, round), sorted; voters are its agents and samples.

    Unparseable answers have no vote but count as voters. A tie goes to the answer of the first voter in (agent, sample)
    order.
    """
    groups: dict[tuple[str, str, int], list[LabelledTurn]] = defaultdict(list)
    for row in sorted((row for history in by_speaker(rows) for row in history), key=lambda row: row.place):
        groups[row.question_id, row.protocol, row.round].append(row)
    return [_majority(place, voters) for place, voters in sorted(groups.items())]


def _majority(place: tuple[str, str, int], voters: Sequence[LabelledTurn]) -> Majority:
    answer, votes = majority_vote([voter.answer if voter.verdict != "unparseable" else "" for voter in voters])
    said: list[Verdict] = [voter.verdict for voter in voters if votes and voter.answer == answer]
    verdict: Verdict = said[0] if said else "unparseable"
    return Majority(*place, answer=answer, verdict=verdict, votes=votes, n=len(voters))


def majority_vote(answers: Sequence[str]) -> tuple[str, int]:
    """The most frequent answer and the number of votes for it.

    An empty answer (nothing readable was said) is no vote; a tie goes to the answer given first; `("", 0)` without any.
    """
    votes = Counter(answer for answer in answers if answer)
    return votes.most_common(1)[0] if votes else ("", 0)
