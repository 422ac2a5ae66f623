"""Which turns of a debate become trajectories (AgentArk §2): the variants, each a list of filters.

Every choice is a pure function of a set of rows, whatever their order, and counts what each filter kept and dropped.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from agentark_jax.errors import AgentArkError, UsageError
from agentark_jax.records import JUDGE, SUMMARISER, ids_hash, stable_hash
from agentark_jax.traces.config import GOLDLESS, SelectionConfig, Variant
from agentark_jax.traces.labels import LabelledTurn, by_speaker, majority_vote
from agentark_jax.traces.matching import nearest_in_length
from agentark_jax.traces.selection import FunnelStep, Selection, Trajectory, keep_only, subset
from agentark_jax.traces.store import Said

# What turns said, by key.
Completions = Callable[[Iterable[str]], Mapping[str, Said]]


@dataclass(frozen=True)
class _Debate:
    """What one protocol came to on one question: its last round, the majority there, and how many agents were right."""

    last: int
    answer: str
    consensus: bool
    right: int


# An agent's turns up to the one that may be learned from, in round order.
_Candidate = Sequence[LabelledTurn]
_Filter = tuple[str, Callable[[_Candidate, _Debate], bool]]


def _corrective(candidate: _Candidate) -> bool:
    return candidate[-1].right and not all(turn.right for turn in candidate)


_LAST: _Filter = "last round", lambda candidate, debate: candidate[-1].round == debate.last
_FIRST: _Filter = "first round", lambda candidate, debate: candidate[-1].round == 0
_EVERY: _Filter = "every round", lambda candidate, debate: True
_PARSEABLE: _Filter = "unparseable", lambda candidate, debate: candidate[-1].verdict != "unparseable"
_RIGHT: _Filter = "wrong", lambda candidate, debate: candidate[-1].right
_WHOLE: _Filter = "truncated", lambda candidate, debate: candidate[-1].finish != "length"
_MAJORITY: _Filter = "not the majority's answer", lambda candidate, debate: candidate[-1].answer == debate.answer
_CONSENSUS: _Filter = "no consensus", lambda candidate, debate: debate.consensus
_SEVERAL: _Filter = "only one agent is right", lambda candidate, debate: debate.right > 1
_CORRECTED: _Filter = "not corrective", lambda candidate, debate: _corrective(candidate)
_STEADY: _Filter = "corrective", lambda candidate, debate: not _corrective(candidate)
_CORRECT = (_PARSEABLE, _RIGHT, _WHOLE)

_FILTERS: dict[Variant, tuple[_Filter, ...]] = {
    "corrective_first": (_LAST, *_CORRECT),
    "corrective_only": (_LAST, *_CORRECT, _CORRECTED),
    "non_corrective_matched": (_LAST, *_CORRECT, _STEADY),
    "final_only": (_LAST, *_CORRECT, _MAJORITY),
    "consensus_only": (_LAST, _PARSEABLE, _WHOLE, _CONSENSUS, _MAJORITY),
    "all_correct": (_EVERY, *_CORRECT),
    "diverse_k1": (_LAST, *_CORRECT, _SEVERAL),
    "diverse_k2": (_LAST, *_CORRECT, _SEVERAL),
    "diverse_k3": (_LAST, *_CORRECT, _SEVERAL),
    "round1_only": (_FIRST, *_CORRECT),
    "dialogue": (_LAST, *_CORRECT),
    "summary": (_EVERY, *_CORRECT),
    "majority": (_LAST, _PARSEABLE, _WHOLE, _MAJORITY),
    "random": (_LAST, _PARSEABLE, _WHOLE),
}


def select(rows: Iterable[LabelledTurn], config: SelectionConfig, completions: Completions) -> Selection:
    """The trajectories that `config` asks for, among the turns of one debate (or of independent samples).

    Args:
        rows: turns of any role; what a judge said is never learned from, and what a summariser wrote only by `summary`.
        completions: `TraceStore.completions` of the store of the turns. It is asked a question at a time, and only what
            was chosen is kept, so no more has to fit in memory.

    Raises:
        UsageError: the variant is `summary`, and no row is a summariser's.
        AgentArkError: two rows claim the same place (see `labels.by_speaker`), or a dialogue tells a turn of no row.
    """
    summaries = config.variant == "summary"
    rows = [row for row in rows if (row.role == SUMMARISER if summaries else row.role not in (JUDGE, SUMMARISER))]
    if summaries and not rows:
        raise UsageError(
            "select.variant is summary, but no summariser has answered: set debate.aggregation to summariser, or "
            "choose another variant."
        )
    histories = by_speaker(rows)
    debates = _debates(histories)
    if config.variant == "non_corrective_matched":
        model = _choose("corrective_only", histories, debates, completions, config.seed, config.taken, config.limit)
        selection = _choose(config.variant, histories, debates, completions, config.seed, None, None)
        selection = _as_long_as(selection, model)
    else:
        selection = _choose(config.variant, histories, debates, completions, config.seed, config.taken, config.limit)
    return subset(selection, config.fraction, config.seed) if config.fraction < 1 else selection


def possible(rows: Iterable[LabelledTurn]) -> tuple[Variant, ...]:
    """The variants that `select` knows for these rows: without a summariser's, all but `summary`."""
    summarised = any(row.role == SUMMARISER for row in rows)
    return tuple(variant for variant in _FILTERS if summarised or variant != "summary")


def _debates(histories: Sequence[_Candidate]) -> dict[tuple[str, str], _Debate]:
    speakers: dict[tuple[str, str], list[_Candidate]] = defaultdict(list)
    for history in histories:
        speakers[history[0].question_id, history[0].protocol].append(history)
    debates = {}
    for place, spoken in speakers.items():
        last = max(history[-1].round for history in spoken)
        voters = [history[-1] for history in spoken if history[-1].round == last]
        answer, votes = majority_vote([voter.answer if voter.verdict != "unparseable" else "" for voter in voters])
        debates[place] = _Debate(last, answer, 2 * votes > len(voters), sum(voter.right for voter in voters))
    return debates


def _choose(
    variant: Variant,
    histories: Sequence[_Candidate],
    debates: Mapping[tuple[str, str], _Debate],
    completions: Completions,
    seed: int,
    per_question: int | None,
    limit: int | None,
) -> Selection:
    candidates = [history[: index + 1] for history in histories for index in range(len(history))]
    funnel = []
    for name, test in _FILTERS[variant]:
        kept = [each for each in candidates if test(each, debates[each[-1].question_id, each[-1].protocol])]
        funnel.append(FunnelStep(name, len(kept), len(candidates) - len(kept)))
        candidates = kept
    dialogues: dict[str, _Candidate] = {}
    if variant == "dialogue":
        dialogues = _dialogues(candidates, histories, completions)
        kept = [each for each in candidates if each[-1].key in dialogues]
        funnel.append(FunnelStep("shown nothing, or what broke off", len(kept), len(candidates) - len(kept)))
        candidates = kept
    # What asks no gold answer prefers none either.
    prefers = variant not in GOLDLESS
    drawn: Callable[[str], str] = (lambda key: stable_hash([seed, key])) if variant == "random" else (lambda key: "")
    candidates.sort(
        key=lambda each: (each[-1].question_id, prefers and not _corrective(each), drawn(each[-1].key), *_place(each)),
    )
    distinct = 0
    chosen: list[tuple[int, Trajectory]] = []  # with its rank within its question
    for _, group in groupby(candidates, key=lambda candidate: candidate[-1].question_id):
        different = _different(list(group), dialogues, completions)
        distinct += len(different)
        if variant.startswith("diverse"):
            different = _diverse(different)
        chosen += enumerate(different[:per_question])
    funnel.append(FunnelStep("duplicate", distinct, len(candidates) - distinct))
    if per_question is not None:
        funnel.append(FunnelStep("over per_question", len(chosen), distinct - len(chosen)))
    if limit is not None:
        # `sorted` leaves equal ones in their order, that of the questions.
        preferred = sorted(
            range(len(chosen)),
            key=lambda index: (
                prefers and not chosen[index][1].corrective,
                chosen[index][0],
                drawn(chosen[index][1].turn_key),
            ),
        )
        within = sorted(preferred[:limit])
        funnel.append(FunnelStep("over limit", len(within), len(chosen) - len(within)))
        chosen = [chosen[index] for index in within]
    return Selection(variant, tuple(trajectory for _, trajectory in chosen), tuple(funnel))


def _place(candidate: _Candidate) -> tuple[int, int, int, str]:
    """Late rounds come first; agents and samples are alike."""
    turn = candidate[-1]
    return -turn.round, turn.agent, turn.sample, turn.key


def _dialogues(
    candidates: Sequence[_Candidate], histories: Sequence[_Candidate], completions: Completions
) -> dict[str, _Candidate]:
    """What each last turn was shown, its agent's own answers first, then the turn itself; by the turn's key.

    Only where it was shown something, and nothing that broke off: all of it will be learned.
    """
    rows = {row.key: row for history in histories for row in history}
    dialogues: dict[str, _Candidate] = {}
    for _, group in groupby(candidates, key=lambda candidate: candidate[-1].question_id):
        turns = [candidate[-1] for candidate in group]
        said = completions([turn.key for turn in turns])
        for turn in turns:
            lacking = sorted(key for key in said[turn.key].parents if key not in rows)
            if lacking:
                raise AgentArkError(
                    f"Turn {turn.key} was shown {lacking[0]}, which is not among the turns given: select from the "
                    "whole debate."
                )
            shown = sorted((rows[key] for key in said[turn.key].parents), key=lambda row: row.agent != turn.agent)
            if shown and all(row.finish != "length" for row in shown):
                dialogues[turn.key] = (*shown, turn)
    return dialogues


def _different(
    candidates: Sequence[_Candidate], dialogues: Mapping[str, _Candidate], completions: Completions
) -> list[Trajectory]:
    """The trajectories of one question's candidates, without those that say, token by token, what one before did."""
    told = {candidate[-1].key: dialogues.get(candidate[-1].key, candidate[-1:]) for candidate in candidates}
    said = completions({row.key for rows in told.values() for row in rows})
    found: dict[str, Trajectory] = {}
    for candidate in candidates:
        turn = candidate[-1]
        ids, logprobs, _ = said[turn.key]
        *before, _ = told[turn.key]
        if before:
            # Of what was shown, all but the end tokens; none of it was sampled after what stands before it here.
            ids, logprobs = np.concatenate([*(said[row.key].ids[:-1] for row in before), ids]), None
        if (name := ids_hash(ids)) not in found:
            found[name] = Trajectory(
                question_id=turn.question_id,
                turn_key=turn.key,
                trace_keys=tuple(row.key for row in dialogues.get(turn.key, candidate)),
                completion_ids=ids,
                logprobs=logprobs,
                corrective=_corrective(candidate),
                agent=turn.agent,
                round=turn.round,
            )
    return list(found.values())


def _diverse(trajectories: Sequence[Trajectory]) -> list[Trajectory]:
    """In the order of greedy max-min diversity: each is the one farthest from all before it, ties to the first.

    The distance of two is 1 less the Jaccard similarity of their sets of three successive tokens.
    """
    pieces = [_trigrams(trajectory.completion_ids) for trajectory in trajectories]
    order = [0]
    nearest = [1.0] * len(pieces)
    while len(order) < len(pieces):
        for index, piece in enumerate(pieces):
            nearest[index] = min(nearest[index], 1 - len(piece & pieces[order[-1]]) / len(piece | pieces[order[-1]]))
        order.append(max((index for index in range(len(pieces)) if index not in order), key=nearest.__getitem__))
    return [trajectories[index] for index in order]


def _trigrams(ids: np.ndarray) -> set[tuple[int, ...]]:
    """Of a text shorter than three tokens, all of it."""
    tokens = tuple(ids.tolist())
    return {tokens[start : start + 3] for start in range(max(1, len(tokens) - 2))}


def _as_long_as(selection: Selection, model: Selection) -> Selection:
    """As many trajectories as `model` has, near to those in length."""
    near = nearest_in_length(selection.trajectories, model.trajectories)
    return keep_only(selection, "not matched", lambda trajectory: trajectory.turn_key in near)
