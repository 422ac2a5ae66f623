"""How cost grows: a training step with its context and its vocabulary, a debate with its agents, rounds and questions,
and what a second process costs.

Each curve is fitted by a straight line through the logarithms, whose slope is the exponent: 1 is linear growth, 2 is
quadratic. Beside the exponent of measured seconds stands that of the counted FLOPs, which is what the work asks for.
Debates are counted, not timed: calls, prompt tokens, and those of them that no prefix cache could already have.
"""

import asyncio
import os
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from agentark_jax.data.chat import make_format
from agentark_jax.data.config import PromptConfig
from agentark_jax.data.render import Format
from agentark_jax.engines.base import Request
from agentark_jax.errors import AgentArkError, UsageError
from agentark_jax.models.config import ModelConfig
from agentark_jax.models.flops import sft_flops
from agentark_jax.protocols.calls import Caller
from agentark_jax.protocols.config import DebateConfig
from agentark_jax.protocols.debate import debate
from agentark_jax.protocols.table import Agent, Pool
from agentark_jax.records import Completion
from agentark_jax.tasks.config import TaskConfig
from agentark_jax.tasks.word_problems import WordProblems
from agentark_jax.traces.store import TraceStore
from benchmarks.compile_time import qwen3
from benchmarks.inputs import first_loss_position
from benchmarks.results import Check, Comparison, Measured, Ratio, Spread, environment
from benchmarks.workers import Reply, Side, Worker, interleaved

NAME = "growth"
SIDE = "benchmarks.growth_side"
PROCESS_VOCABULARY = 32768
LOSS_TOLERANCE = 1e-5  # of the loss, between one process and two

CALLS, PROMPTS, NEW = "calls", "prompt tokens", "new prompt tokens"

Say = Callable[[str], None]


@dataclass(frozen=True)
class Sizes:
    """`contexts`: tokens of the one row of a step. Vocabularies are measured on `rows` rows of `length` tokens."""

    contexts: tuple[int, ...] = (256, 512, 1024, 2048, 4096)
    vocabularies: tuple[int, ...] = (32768, 65536, 131072, 262144)
    agents: tuple[int, ...] = (2, 3, 4, 8)
    rounds: tuple[int, ...] = (1, 2, 3, 4)
    questions: tuple[int, ...] = (4, 8, 16)
    layers: int = 4
    hidden: int = 256
    rows: int = 4
    length: int = 256
    completion_tokens: int = 64
    repetitions: int = 3


QUICK = Sizes(
    contexts=(256, 512),
    vocabularies=(8192, 32768),
    agents=(2, 3),
    rounds=(1, 3),
    questions=(2, 4),
    layers=2,
    completion_tokens=16,
    repetitions=1,
)


def run(model: Path, name: str, *, quick: bool, peers: bool, say: Say) -> Iterator[Comparison]:
    """Of `model` only the tokenizer is read, for the debates; there are no peers.

    Raises AgentArkError when one process and two do not have the same loss.
    """
    sizes = QUICK if quick else Sizes()
    yield from (of_context(sizes, quick, say), of_vocabulary(sizes, quick, say))
    yield from (of_debates(model, name, sizes, quick, say), of_processes(sizes, quick, say))


def exponent(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """The slope of log cost over log size by least squares: cost ∝ size^slope."""
    return float(np.polyfit(np.log(sizes), np.log(costs), 1)[0])


def shape(sizes: Sizes, vocabulary: int) -> dict[str, Any]:
    """A made-up Qwen3."""
    heads = max(1, sizes.hidden // 64)
    own = {
        "vocab_size": vocabulary,
        "hidden_size": sizes.hidden,
        "intermediate_size": 3 * sizes.hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": max(1, heads // 2),
        "max_position_embeddings": max(*sizes.contexts, sizes.length),
    }
    return {**qwen3(sizes.layers), **own}


def step_flops(config: Mapping[str, Any], rows: int, length: int) -> int:
    """What a step of a made-up model asks for at least."""
    loss_tokens = rows * (length - first_loss_position(length))
    model = ModelConfig.from_hf(dict(config), NAME)
    return sum(sft_flops(model, lengths=[length] * rows, loss_tokens=loss_tokens, train_head=True).values())


def of_context(sizes: Sizes, quick: bool, say: Say) -> Comparison:
    """Seconds of a step on one row of so many tokens."""
    setups = {length: {"config": shape(sizes, 4096), "rows": 1, "length": length} for length in sizes.contexts}
    return of_steps("context", "tokens of context, one row", setups, sizes, quick, say)


def of_vocabulary(sizes: Sizes, quick: bool, say: Say) -> Comparison:
    """Seconds of a step with so many tokens in the vocabulary."""
    setups = {
        vocabulary: {"config": shape(sizes, vocabulary), "rows": sizes.rows, "length": sizes.length}
        for vocabulary in sizes.vocabularies
    }
    return of_steps("vocabulary", "tokens of vocabulary", setups, sizes, quick, say)


def of_steps(
    case: str, what: str, setups: Mapping[int, Mapping[str, Any]], sizes: Sizes, quick: bool, say: Say
) -> Comparison:
    """A curve of seconds; the sizes take turns. Its exponent is that of the medians."""
    before = environment()
    sides = [Side(str(size), SIDE, setup) for size, setup in setups.items()]
    replies = interleaved(sides, sizes.repetitions, lambda firsts: None, say)
    spreads = {size: Spread.of([reply["seconds"] for reply in replies[str(size)][1:]]) for size in setups}
    work = [step_flops(setup["config"], setup["rows"], setup["length"]) for setup in setups.values()]
    return comparison(
        case,
        f"a training step and its {case}",
        {"name": f"made-up Qwen3 of {sizes.layers} layers"},
        [Measured(str(size), f"{size:,} {what}", "s", spread) for size, spread in spreads.items()],
        [
            Check("exponent of seconds", exponent(list(setups), [each.median for each in spreads.values()]), None),
            Check("exponent of counted FLOPs", exponent(list(setups), work), None),
        ],
        {"hidden_size": sizes.hidden, "rows": sizes.rows if case == "vocabulary" else 1},
        sizes,
        quick,
        before,
    )


def comparison(
    case: str,
    title: str,
    model: dict[str, Any],
    measured: list[Measured],
    checks: list[Check],
    shown: dict[str, int],
    sizes: Sizes,
    quick: bool,
    before: dict[str, Any],
    ratios: Sequence[Ratio] = (),
) -> Comparison:
    """A result file's content; `shown` are the sizes that are not in the rows."""
    return Comparison(
        benchmark=f"{NAME}.{case}",
        title=f"Growth: {title}",
        quick=quick,
        model=model,
        sizes={**shown, "repetitions": sizes.repetitions},
        measured=measured,
        ratios=list(ratios),
        checks=checks,
        environment=before,
    )


class CountingEngine:
    """Answers `tokens` random tokens and counts what a server would have to do.

    `new_tokens` are prompt tokens that come after the longest prefix that an earlier prompt, with its answer, begins
    with: what a prefix cache that never forgets still has to compute. A prompt's last token is always new.
    """

    model, weights, text_only = "counting", "w0", False

    def __init__(self, form: Format, tokens: int) -> None:
        self.calls = self.prompt_tokens = self.new_tokens = 0
        self._form, self._tokens = form, tokens
        self._seen: dict[int, Any] = {}

    async def generate(self, request: Request) -> Completion:
        random = np.random.default_rng(request.sampling.seed)
        ids = random.choice(self._form.tokenizer.ordinary_ids, self._tokens).astype(np.int32)
        prompt = request.prompt_ids.tolist()
        cached = min(self._remember([*prompt, *ids.tolist()]), len(prompt) - 1)
        self.calls += 1
        self.prompt_tokens += len(prompt)
        self.new_tokens += len(prompt) - cached
        text = self._form.tokenizer.decode(ids.tolist())
        return Completion(ids, np.full(len(ids), -1.0, np.float32), text, "length", len(prompt), cached, 0.0)

    def _remember(self, ids: Sequence[int]) -> int:
        """Keeps a sequence; returns how many tokens it begins with that an earlier one began with."""
        node, known = self._seen, 0
        for token in ids:
            known += token in node  # below a new token all are new
            node = node.setdefault(token, {})
        return known


def of_debates(model: Path, name: str, sizes: Sizes, quick: bool, say: Say) -> Comparison:
    """Calls and tokens of debates, one thing growing at a time from 3 agents, 2 rounds and the fewest questions."""
    before = environment()
    form = make_format(model, PromptConfig())
    fewest = sizes.questions[0]
    curves = {
        "agents": [(agents, DebateConfig(agents=agents), fewest) for agents in sizes.agents],
        "rounds": [(rounds, DebateConfig(rounds=rounds), fewest) for rounds in sizes.rounds],
        "questions": [(questions, DebateConfig(), questions) for questions in sizes.questions],
    }
    measured, checks = [], []
    for layout in ("own_first", "shared_first"):
        for what, points in curves.items():
            counts = []
            for size, config, questions in points:
                config = replace(config, layout=layout, max_tokens=sizes.completion_tokens)
                counts.append(count(form, config, questions))
                for counted in (PROMPTS, NEW):
                    number, label = counts[-1][counted], f"{layout}, {size} {what}: {counted}"
                    measured.append(Measured(label, label, "", Spread.of([float(number)])))
            say(f"{layout}, {what}: {counts[-1]}")
            for counted in counts[0]:
                slope = exponent([size for size, *_ in points], [each[counted] for each in counts])
                checks.append(Check(f"{layout}: exponent of {counted} over {what}", slope, None))
    shown = {"completion_tokens": sizes.completion_tokens, "agents": 3, "rounds": 2, "questions": fewest}
    return comparison(
        "debate",
        "a debate and its agents, rounds and questions",
        {"name": f"prompts of {name}, random answers"},
        measured,
        checks,
        shown,
        sizes,
        quick,
        before,
    )


def count(form: Format, config: DebateConfig, questions: int) -> dict[str, int]:
    """What debates on so many questions ask of a server."""
    engine = CountingEngine(form, config.max_tokens)
    asked = WordProblems(TaskConfig()).questions("debate", questions)

    async def everyone(pool: Pool) -> None:
        await asyncio.gather(*(debate(question, pool, config) for question in asked))

    with TemporaryDirectory() as directory, TraceStore(Path(directory) / "traces.sqlite") as store:
        store.put_questions(asked)
        asyncio.run(everyone(Pool((Agent(Caller(engine, store, form, seed=0)),))))
    return {CALLS: engine.calls, PROMPTS: engine.prompt_tokens, NEW: engine.new_tokens}


def of_processes(sizes: Sizes, quick: bool, say: Say) -> Comparison:
    """A step of the same global batch on one core, in one process on two, and in two processes with a core each.

    Each process is kept to its cores. `fsdp` divides the state of the two processes, `data` repeats it.
    """
    cores = sorted(os.sched_getaffinity(0))[:2]
    if len(cores) < 2:
        raise UsageError(f"{NAME}: two processes need two cores, and this process may use one")
    before = environment()
    common = {"config": shape(sizes, PROCESS_VOCABULARY), "rows": sizes.rows, "length": sizes.length}
    groups = {
        "one core": [{**common, "cores": cores[:1]}],
        "one process, two cores": [{**common, "cores": cores}],
        **{
            f"two processes, {axis}": together(common, cores, {"data": 1, "fsdp": 1, "tensor": 1, axis: 2})
            for axis in ("data", "fsdp")
        },
    }
    replies = in_turns(groups, sizes.repetitions, say)
    losses = {name: found[0]["loss"] for name, found in replies.items()}
    spread = (max(losses.values()) - min(losses.values())) / min(losses.values())
    if spread > LOSS_TOLERANCE:
        raise AgentArkError(f"{NAME}: the losses of one process and two differ by {spread:.1e} of their size: {losses}")
    alone = "one process, two cores"
    measured, ratios = [], []
    for name, found in replies.items():
        seconds = [reply["seconds"] for reply in found[1:]]
        measured.append(Measured(name, name, "s", Spread.of(seconds)))
        sent = Spread.of([found[0]["sent_bytes"] / 1e6])
        measured.append(Measured(f"{name}, sent", f"{name}: sent by a process in a step", "MB", sent))
        if name != alone:
            pairs = [one / two["seconds"] for one, two in zip(seconds, replies[alone][1:], strict=True)]
            ratios.append(Ratio(name, alone, Spread.of(pairs), None))
    return comparison(
        "processes",
        "a training step in one process and in two",
        {"name": f"made-up Qwen3 of {sizes.layers} layers"},
        measured,
        [Check("losses of the first step, largest difference relative to them", spread, LOSS_TOLERANCE)],
        {"hidden_size": sizes.hidden, "vocabulary": PROCESS_VOCABULARY, "rows": sizes.rows, "length": sizes.length},
        sizes,
        quick,
        before,
        ratios,
    )


def together(common: Mapping[str, Any], cores: Sequence[int], mesh: Mapping[str, int]) -> list[dict[str, Any]]:
    """The setups of two processes that join each other over loopback, a core each."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    joined = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}
    return [
        {**common, "mesh": mesh, "cores": [core], "environment": {**joined, "JAX_PROCESS_ID": str(number)}}
        for number, core in enumerate(cores)
    ]


def in_turns(groups: Mapping[str, Sequence[Mapping[str, Any]]], repetitions: int, say: Say) -> dict[str, list[Reply]]:
    """As `interleaved`, for sides of which some are several processes: they start and step at the same time.

    A reply is that of the slowest process.
    """
    with ExitStack() as stack:
        threads = stack.enter_context(ThreadPoolExecutor(2))
        workers: dict[str, list[Worker]] = {}
        for name, setups in groups.items():
            say(f"starting {name}")
            starting = [threads.submit(Worker, Side(name, SIDE, setup)) for setup in setups]
            for each in starting:
                if each.exception() is None:  # one that has started is stopped, also when its partner has not
                    stack.enter_context(each.result())
            workers[name] = [each.result() for each in starting]
        replies: dict[str, list[Reply]] = {name: [] for name in groups}
        for index in range(repetitions + 1):
            first = index % len(groups)
            for name in [*groups][first:] + [*groups][:first]:
                found = list(threads.map(lambda worker, index=index: worker.repeat(index), workers[name]))
                replies[name].append(max(found, key=lambda reply: reply["seconds"]))
                say(f"repetition {index} of {repetitions}: {name}: {replies[name][-1]['seconds']:.2f} s")
        return replies
