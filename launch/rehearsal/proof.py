"""What a rehearsal proves: no call lost, none repeated, the same students as if nothing had happened."""

import sqlite3
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from agentark_jax.errors import AgentArkError
from agentark_jax.traces.store import TraceStore
from launch.rehearsal.cluster import End
from launch.rehearsal.proxy import Asked, Identity

SENT = ("stored", "answered_to_the_dead", "broken_off", "refused", "of_other_weights")
_TICK = 0.002  # seconds: the store knows milliseconds


@dataclass(frozen=True)
class Stored:
    """A turn in the merged store: whose job it was, what was answered, and when that was committed."""

    identity: Identity
    job: str
    ids: tuple[int, ...]
    committed: float


def audit(turns: Sequence[Stored], asked: Sequence[Asked], ends: Sequence[End]) -> tuple[dict[str, int], list[str]]:
    """How many calls were `needed`, how many `sent` and what became of each (`SENT`); and what should not be.

    The answer that is stored must be the last one that the server gave to the call, and nothing may be sent after it
    was committed. What was sent before came to nothing for a reason: the process that asked was killed before it had
    committed the answer (`answered_to_the_dead`), the connection broke when the server or that process was killed
    (`broken_off`), or the server was new and not ready (`refused`) or without its weights (`of_other_weights`).
    """
    sent: dict[Identity, list[Asked]] = defaultdict(list)
    for one in sorted(asked, key=lambda one: one.began):
        sent[one.identity].append(one)
    deaths = defaultdict(list)
    for end in ends:
        deaths[end.job].append(end.at)
    found, problems = Counter[str](), []
    for turn in turns:
        mine = sent.pop(turn.identity, [])
        given = [one for one in mine if one.status == 200 and one.by == turn.identity[1]]
        told = f"{turn.job}, call of seed {turn.identity[0]}"
        if not given or given[-1].ids != turn.ids:
            problems.append(f"{told}: what is stored is not what the server answered last")
        if any(one.began > turn.committed + _TICK for one in mine):
            problems.append(f"{told}: asked again after its answer was committed")
        for one in mine:
            kind = "stored" if given and one is given[-1] else _came_to(one, turn)
            found[kind] += 1
            reasons = {
                "stored": True,
                "answered_to_the_dead": any(one.began <= at < turn.committed for at in deaths[turn.job]),
                "broken_off": any(
                    one.began <= at <= one.ended + 1 for job in ("server", turn.job) for at in deaths[job]
                ),
                "refused": any(at <= one.ended for at in deaths["server"]),
                "of_other_weights": any(at <= one.ended for at in deaths["server"]),
            }
            if not reasons[kind]:
                problems.append(f"{told}: {kind.replace('_', ' ')}, though nobody had been killed")
    if sent:
        problems.append(f"{len(sent)} calls were asked whose answers are not in the store")
    figures = {kind: found[kind] for kind in SENT}
    return {"needed": len(turns), "sent": sum(figures.values()), **figures}, problems


def _came_to(one: Asked, turn: Stored) -> str:
    if one.status is None:
        return "broken_off"
    if one.status != 200:
        return "refused"
    return "answered_to_the_dead" if one.by == turn.identity[1] else "of_other_weights"


def in_flight(turns: Sequence[Stored], asked: Sequence[Asked], end: End) -> int:
    """How many calls were asked and not yet committed when a job ended: its own, or of the server everybody's."""
    first: dict[Identity, float] = {}
    for one in asked:
        first[one.identity] = min(one.began, first.get(one.identity, one.began))
    whose = [turn for turn in turns if end.job in ("server", turn.job) and turn.identity in first]
    return sum(first[turn.identity] <= end.at < turn.committed for turn in whose)


def stored_turns(run: Path, job: Callable[[str, str], str | None]) -> list[Stored]:
    """The turns of a run; `job` says whose each was by its question's id and split, and None of those left out."""
    with closing(sqlite3.connect(f"file:{run / 'traces.sqlite'}?mode=ro", uri=True)) as store:
        committed = dict(store.execute("SELECT call_key, created FROM turns WHERE finish IS NOT NULL").fetchall())
    found = []
    with TraceStore(run / "traces.sqlite", read_only=True) as traces:
        splits = {question.id: question.split for question in traces.questions()}
        for turn in traces.turns(errors=False):
            call = turn.call
            whose = job(call.question_id, splits[call.question_id])
            if whose is not None and turn.completion is not None:
                identity = (call.sampling.seed % 2**63, call.weights, tuple(call.prompt_ids.tolist()))
                at = datetime.fromisoformat(committed[turn.key]).timestamp()
                found.append(Stored(identity, whose, tuple(turn.completion.ids.tolist()), at))
    return found


def debate_calls(run: Path) -> dict[tuple[Any, ...], list[str]]:
    """Of each place in the debate, with the seed of its sampling, the keys of the calls that were answered there."""
    found = defaultdict(list)
    with TraceStore(run / "traces.sqlite", read_only=True) as store:
        splits = {question.id: question.split for question in store.questions()}
        for turn in store.turns(protocol="debate", errors=False):
            call = turn.call
            if splits[call.question_id] == "debate":
                place = (call.question_id, call.role, call.agent, call.round, call.sample, call.sampling.seed)
                found[place].append(turn.key)
    return dict(found)


def compare_debates(ours: dict[tuple[Any, ...], list[str]], theirs: dict[tuple[Any, ...], list[str]]) -> list[str]:
    """How the calls of two debates, as of `debate_calls`, differ.

    Those of the first round must be the same calls. Later ones quote what was sampled, and have keys that say so.
    """
    firsts = [place for place in ours.keys() & theirs.keys() if place[3] == 0]
    counts = {
        "calls of the undisturbed debate are missing": len(theirs.keys() - ours.keys()),
        "calls are not of the undisturbed debate": len(ours.keys() - theirs.keys()),
        "calls have several answers": sum(len(keys) > 1 for keys in ours.values()),
        "calls of the first round have other keys": sum(ours[place] != theirs[place] for place in firsts),
    }
    return [f"{count} {what}" for what, count in counts.items() if count]


def difference(one: Path, other: Path) -> float | None:
    """The largest difference between the weights of two models; None where they are equal bit by bit."""
    ours, theirs = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    if {name: array.shape for name, array in ours.items()} != {name: array.shape for name, array in theirs.items()}:
        raise AgentArkError(f"{one} and {other} are models of different shapes.")
    differing = [name for name in ours if ours[name].tobytes() != theirs[name].tobytes()]
    return max((float(np.max(np.abs(ours[name].astype(float) - theirs[name]))) for name in differing), default=None)
