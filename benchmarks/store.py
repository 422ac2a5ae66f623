"""The trace store: turns written a second, what a run that finds a million turns pays before it begins, and what it
costs to select among them.

The turns are those of debates of 5 agents over 3 rounds with 256 tokens a completion, so prompts repeat the completions
of the round before. The floor: the bytes of the finished store at the rate at which this disk takes one large file.
Starting, selecting and reading are measured in a process each, at first with the store's file out of the page cache
where the system allows that.
"""

import asyncio
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from agentark_jax.records import Call, Completion, Label, Question, Sampling, Turn, Verdict
from agentark_jax.traces.config import SelectionConfig
from agentark_jax.traces.labels import labelled_turns
from agentark_jax.traces.matching import match
from agentark_jax.traces.selection import load_selection, save_selection
from agentark_jax.traces.store import TraceStore
from agentark_jax.traces.variants import select
from agentark_jax.traces.writer import TurnWriter
from benchmarks.results import MACHINE, Check, Result, environment, rates_of, rows_of
from benchmarks.workers import Repeat, Reply, Side, Worker, interleaved, serve

NAME = "store"
BATCHES, CALLERS, GROW, START, SELECT, READ = "batches", "callers", "grow", "start", "select", "read"
BATCH = 512
DESCRIPTIONS = {
    BATCHES: f"written in batches of {BATCH}",
    CALLERS: f"written by {BATCH} concurrent callers, one turn at a time each",
}
START_SECONDS, START_GB, SELECT_SECONDS, SELECT_GB, PROMPT_SHARE = 15.0, 1.0, 300.0, 4.0, 0.3

AGENTS, ROUNDS, QUESTION_TOKENS, COMPLETION_TOKENS, VOCABULARY = 5, 3, 150, 256, 150_000
OWN, PEER, REVISE = (11, 12, 13), (21, 22, 23, 24), (31, 32, 33)
GRADER = "benchmark:1"
WORDS = np.asarray([f"w{number:03d}" for number in range(200)])


@dataclass(frozen=True)
class Sizes:
    turns: int = 15_000
    repetitions: int = 5
    stored: int = 1_000_000
    looked_up: int = 100_000


def run(model: Path, name: str, *, quick: bool, peers: bool, say: Callable[[str], None]) -> Iterator[Result]:
    """No model and no peer has a part in it. Takes 7 GB of disk, at the place of temporary files, for ten minutes."""
    sizes = Sizes(turns=1500, repetitions=2, stored=30_000, looked_up=3000) if quick else Sizes()
    before = environment()
    with tempfile.TemporaryDirectory() as place:
        common = {"place": place, "turns": sizes.turns}
        sides = [Side(side, "benchmarks.store", {**common, "side": side}) for side in (MACHINE, BATCHES, CALLERS)]
        measured = [interleaved(sides, sizes.repetitions, lambda replies: None, say)]
        written = measured[0][BATCHES][0]
        say(f"storing {sizes.stored:,} turns")
        replies = {}
        for side in (GROW, START, SELECT, READ):
            with Worker(Side(side, "benchmarks.store", {**asdict(sizes), "side": side, "place": place})) as worker:
                replies[side] = worker.repeat(0)
            say(f"{side}: {replies[side]['seconds']:.1f} s")
    grown, started, selected, read = (replies[side] for side in (GROW, START, SELECT, READ))
    stored = f"{sizes.stored:,} turns"

    def per_cpu_second(side: str) -> float:
        return statistics.median(sizes.turns / reply["cpu_seconds"] for reply in measured[0][side][1:])

    yield Result(
        benchmark=NAME,
        title="Trace store",
        unit="turns/s",
        quick=quick,
        model={"name": f"debates of {AGENTS} agents over {ROUNDS} rounds"},
        sizes={**asdict(sizes), "question_tokens": QUESTION_TOKENS, "completion_tokens": COMPLETION_TOKENS},
        rows=rows_of(
            measured,
            DESCRIPTIONS,
            lambda side: {},
            lambda side, able: written["bytes"] / able["bandwidth"],
            sizes.turns,
        ),
        ratios=[],
        checks=[
            *(
                Check(
                    f"turns in a second of CPU time, {DESCRIPTIONS[side]}, thousands", per_cpu_second(side) / 1e3, None
                )
                for side in DESCRIPTIONS
            ),
            Check("prompts as stored over their token ids (int32)", written["prompt_share"], PROMPT_SHARE),
            Check(f"{stored}: seconds to open and load their labels", started["seconds"], START_SECONDS),
            Check(f"{stored}: peak memory of that, GB", started["peak_rss_gb"], START_GB),
            Check(
                f"{stored}: seconds of that and of selecting two arms of {selected['trajectories']:,} "
                "trajectories, matching, writing and loading them",
                selected["seconds"],
                SELECT_SECONDS,
            ),
            Check(f"{stored}: peak memory of that, GB", selected["peak_rss_gb"], SELECT_GB),
            *(
                Check(f"{stored}: seconds to {what}", read[key], None)
                for key, what in {
                    "open": "open",
                    "ledger": "count by protocol, role and round",
                    "unanswered": f"find which of {sizes.looked_up:,} calls are done",
                    "completions": f"read what {sizes.looked_up:,} answers sampled, 1,000 at a time",
                    "texts": f"read the texts of {sizes.looked_up:,} answers, all at once",
                    "asked": f"read {sizes.looked_up:,} answers with their prompts, 1,000 at a time",
                    "pages": f"read {sizes.looked_up:,} turns in key order",
                }.items()
            ),
            *(
                Check(
                    f"{stored}: written in a second{of} while it grew, thousands", sizes.stored / grown[key] / 1e3, None
                )
                for of, key in {"": "seconds", " of CPU time": "cpu_seconds"}.items()
            ),
        ],
        rates=rates_of(measured),
        environment=before,
    )


def debate(number: int) -> tuple[Question, list[Turn]]:
    """The turns of one debate, in order; the same number gives the same debate."""
    random = np.random.default_rng(number)
    question = Question.make("benchmark", "debate", f"question {number}", "1")
    head = tuple(random.integers(0, VOCABULARY, QUESTION_TOKENS).tolist())
    turns: list[Turn] = []
    last: list[Turn] = []
    for round in range(ROUNDS):
        now = []
        # All prompts of a round share what was said in the one before, as they do in a real debate.
        said = {turn.key: tuple(turn.completion.ids.tolist()) for turn in last if turn.completion is not None}
        for agent in range(AGENTS):
            seen = [last[agent], *last[:agent], *last[agent + 1 :]] if last else []
            prompt = [head]
            for label, turn in zip((OWN, *[PEER] * AGENTS), seen, strict=False):
                prompt += [label, said[turn.key]]
            call = Call(
                question_id=question.id,
                protocol="debate",
                agent=agent,
                role="debater",
                round=round,
                sample=0,
                parents=tuple(turn.key for turn in seen),
                model="benchmark",
                weights="w" * 24,
                tokenizer="t" * 24,
                template="p" * 24,
                sampling=Sampling(0.8, 512, (1,), int(random.integers(2**62))),
                prompt=(*prompt, REVISE),
            )
            completion = Completion(
                ids=random.integers(0, VOCABULARY, COMPLETION_TOKENS, dtype=np.int32),
                logprobs=-random.random(COMPLETION_TOKENS, dtype=np.float32),
                text=" ".join(WORDS[random.integers(0, len(WORDS), COMPLETION_TOKENS)]),
                finish="stop",
                prompt_tokens=sum(map(len, call.prompt)),
                cached_tokens=0,
                seconds=1.5,
            )
            now.append(Turn(call, 0, completion))
        turns += now
        last = now
    return question, turns


def debates(turns: int, first: int = 0) -> tuple[list[Question], list[Turn]]:
    """So many turns of debates from number `first` on, whose keys have yet to be computed, and their questions."""
    each = AGENTS * ROUNDS
    made = [debate(first + number) for number in range(-(-turns // each))]
    fresh = [replace(turn, call=replace(turn.call)) for _, turns_ in made for turn in turns_]
    return [question for question, _ in made], fresh[:turns]


def grow(place: Path, turns: int) -> Reply:
    """Fill a store with so many labelled turns, and a file with their keys; the seconds are those of storing turns."""
    keys: list[str] = []
    seconds = computing = 0.0
    part = 200 * AGENTS * ROUNDS
    with TraceStore(place / "grown.sqlite") as store:
        for done in range(0, turns, part):
            questions, fresh = debates(min(turns - done, part), done // (AGENTS * ROUNDS))
            started, computing_before = time.perf_counter(), time.process_time()
            store.put_questions(questions)
            write_batches(store, fresh)
            seconds += time.perf_counter() - started
            computing += time.process_time() - computing_before
            store.put_labels(Label(turn.key, GRADER, verdict(turn.key), "1") for turn in fresh)
            keys += [turn.key for turn in fresh]
    (place / "keys.json").write_text(json.dumps(keys))
    return {"seconds": seconds, "cpu_seconds": computing}


def verdict(key: str) -> Verdict:
    """Half of all answers are right."""
    return ("right", "wrong")[int(key[-1], 16) % 2]


def write_batches(store: TraceStore, turns: list[Turn]) -> None:
    for start in range(0, len(turns), BATCH):
        store.record_many(turns[start : start + BATCH])


async def write_concurrently(store: TraceStore, turns: list[Turn]) -> None:
    writer = TurnWriter(store)
    waiting = iter(turns)

    async def caller() -> None:
        for turn in waiting:
            await asyncio.sleep(0)  # here an engine would answer
            await writer.record(turn)

    await asyncio.gather(*(caller() for _ in range(BATCH)))


def build(setup: Mapping[str, Any]) -> tuple[Repeat, Reply]:
    """What a side repeats, in a process of its own."""
    place = Path(setup["place"])
    if setup["side"] == GROW:
        return lambda repetition: grow(place, setup["stored"]), {"threads": 1}
    if setup["side"] in (START, SELECT):
        return lambda repetition: start(place, selecting=setup["side"] == SELECT), {"threads": 1}
    if setup["side"] == READ:
        return lambda repetition: read_back(place, setup["looked_up"]), {"threads": 1}
    if setup["side"] == MACHINE:
        return lambda repetition: disk(place), {"threads": 1}
    write = write_batches if setup["side"] == BATCHES else lambda *given: asyncio.run(write_concurrently(*given))

    def repeat(repetition: int) -> Reply:
        path = place / f"{setup['side']}-{repetition}.sqlite"
        questions, turns = debates(setup["turns"], repetition * setup["turns"])
        with TraceStore(path) as store:
            store.put_questions(questions)
            started, computing = time.perf_counter(), time.process_time()
            write(store, turns)
            seconds, computing = time.perf_counter() - started, time.process_time() - computing
            share = prompt_share(store)
        size = path.stat().st_size
        path.unlink()
        return {"seconds": seconds, "cpu_seconds": computing, "bytes": size, "prompt_share": share}

    return repeat, {"threads": 1}


def prompt_share(store: TraceStore) -> float:
    """Bytes in which a store keeps prompts (segments, their names, and the names in turns) over those of int32 ids."""
    segments = [row for page in store.pages("segments") for row in page]
    raw = stored = 0
    for page in store.pages("turns"):
        for row in page:
            stored += len(row[14])
            raw += 4 * row[19]
    # The names of segments stand in the table and in its index.
    return (stored + sum(len(ids) + 2 * len(name) for name, ids in segments)) / raw


def disk(place: Path) -> Reply:
    """How fast this disk takes one large file, in bytes a second."""
    block = os.urandom(2**24)
    path = place / "large"
    started = time.perf_counter()
    with path.open("wb") as file:
        for _ in range(16):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    seconds = time.perf_counter() - started
    path.unlink()
    return {"seconds": seconds, "rates": {}, "bandwidth": 16 * len(block) / seconds}


def forget(path: Path) -> None:
    """Take a file out of the page cache, where the system allows that."""
    if hasattr(os, "posix_fadvise"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def start(place: Path, *, selecting: bool) -> Reply:
    """What a run does that finds its debate done, and what it does then to select from it."""
    forget(place / "grown.sqlite")
    started = time.perf_counter()
    with TraceStore(place / "grown.sqlite") as store:
        keys = json.loads((place / "keys.json").read_text())
        rows = labelled_turns(store, GRADER, keys=keys, role="debater")
        assert len(rows) == len(keys)
        if not selecting:
            return {"seconds": time.perf_counter() - started}
        student = select(rows, SelectionConfig(), store.completions)
        control = select(rows, SelectionConfig(variant="round1_only"), store.completions)
        matched = match({"student": student, "control": control}, 0).selections
        for name, selection in matched.items():
            save_selection(selection, place / f"{name}.parquet")
        loaded = [load_selection(place / f"{name}.parquet") for name in matched]
    return {"seconds": time.perf_counter() - started, "trajectories": len(loaded[0].trajectories)}


def read_back(place: Path, looked_up: int) -> Reply:
    """The seconds of each thing that is asked of a large store, for so many of its calls."""
    path = place / "grown.sqlite"
    keys = json.loads((place / "keys.json").read_text())
    keys = keys[:: len(keys) // looked_up]
    parts = [keys[first : first + 1000] for first in range(0, len(keys), 1000)]
    forget(path)
    times: dict[str, float] = {}

    def timed(name: str, action: Callable[[], Any]) -> Any:
        started = time.perf_counter()
        result = action()
        times[name] = time.perf_counter() - started
        return result

    def exhaust(rows: Iterator[Any]) -> int:
        return sum(1 for _ in rows)

    with timed("open", lambda: TraceStore(path)) as store:
        timed("ledger", lambda: store.ledger("protocol", "role", "round"))
        assert not timed("unanswered", lambda: store.unanswered(keys))
        assert timed("completions", lambda: sum(len(store.completions(part)) for part in parts)) == len(keys)
        assert timed("pages", lambda: exhaust(islice(store.turns(), len(keys)))) == len(keys)
        assert len(timed("texts", lambda: store.texts(keys))) == len(keys)
        assert timed("asked", lambda: sum(exhaust(store.turns(keys=part)) for part in parts)) == len(keys)
    return {**times, "seconds": sum(times.values())}


if __name__ == "__main__":
    serve(build)
