"""Our side of a debate: the protocol as a run carries it out, with the embedded engine and a new trace store."""

import asyncio
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jax
import numpy as np

from agentark_jax.data.render import PlainFormat
from agentark_jax.data.tokenizer import Tokenizer
from agentark_jax.engines import local
from agentark_jax.engines.base import Request
from agentark_jax.engines.config import EngineConfig
from agentark_jax.engines.local import LocalEngine
from agentark_jax.models.config import load_config
from agentark_jax.models.weights import load_params
from agentark_jax.protocols.calls import Caller
from agentark_jax.protocols.config import DebateConfig
from agentark_jax.protocols.debate import debate, longest_prompt
from agentark_jax.protocols.table import Agent, Pool
from agentark_jax.records import Question, Sampling, Turn
from agentark_jax.tasks.config import TaskConfig
from agentark_jax.tasks.word_problems import WordProblems
from agentark_jax.traces.store import TraceStore
from benchmarks.workers import Repeat, Reply, serve

Setup = Mapping[str, Any]
# The engine's programs whose time is that of prefill.
PREFILL = ("_prefill", "_extend", "_copy")


def watch(seconds: dict[str, float]) -> None:
    """From now on adds to `seconds` what the engine's programs take; their results are waited for."""

    def timed(part: str, program: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            started = time.perf_counter()
            result = jax.block_until_ready(program(*arguments))
            seconds[part] += time.perf_counter() - started
            return result

        return call

    decoder = local.decoder
    for name in PREFILL:
        setattr(local, name, timed("prefill", getattr(local, name)))
    local.decoder = lambda platform: timed("decode", decoder(platform))  # it returns the program


def build(setup: Setup) -> tuple[Repeat, Reply]:
    """Debates of held-out word problems in the plain format, which no stop id ends here.

    Every repetition has an engine that has forgotten all prompts, and a store of its own in a temporary directory.
    """
    directory, new_tokens = Path(setup["model"]), setup["new_tokens"]
    model = load_config(directory)
    params, form = load_params(directory, model), PlainFormat(Tokenizer(directory))
    form.stop_ids = ()
    config = DebateConfig(
        agents=setup["agents"],
        rounds=setup["rounds"],
        temperature=setup["temperature"],
        max_tokens=new_tokens,
        layout=setup["layout"],
    )
    questions = WordProblems(TaskConfig()).questions("held_out", setup["questions"])
    engine = LocalEngine(
        EngineConfig(slots=len(questions) * config.agents),
        model,
        params,
        form.tokenizer,
        context=max(longest_prompt(question, form, config) for question in questions) + new_tokens,
        model="benchmark",
        weights="benchmark",
    )
    seconds = {"prefill": 0.0, "decode": 0.0}
    watch(seconds)

    async def everyone(store: TraceStore) -> list[Turn]:
        pool = Pool((Agent(Caller(engine, store, form, seed=setup["seed"])),))
        results = await asyncio.gather(*(debate(question, pool, config) for question in questions))
        return [turn for result in results for turn in result.turns]

    def repeat(index: int) -> Reply:
        engine.update_weights(params, "benchmark")
        seconds.update(dict.fromkeys(seconds, 0.0))
        with TemporaryDirectory() as place:
            started = time.perf_counter()
            turns = debated(Path(place) / "traces.sqlite", questions, everyone)
            whole = time.perf_counter() - started
        reply: Reply = {"seconds": whole, "parts": {**seconds, "host": whole - sum(seconds.values())}, **counts(turns)}
        if index == 0:
            reply["rounds"] = prompts(turns, config.rounds)
            sampling = Sampling(temperature=0.0, max_tokens=new_tokens, stop_ids=(), seed=0)
            first = Request(np.asarray(reply["rounds"][0][0], np.int32), sampling)
            reply["greedy"] = [asyncio.run(engine.generate(first)).ids.tolist()]
        return reply

    return repeat, {"threads": os.cpu_count()}


def debated(path: Path, questions: Sequence[Question], everyone: Callable[[TraceStore], Any]) -> list[Turn]:
    """All turns of the debates, by question, as they are kept in a new store."""
    with TraceStore(path) as store:
        store.put_questions(questions)
        turns: list[Turn] = asyncio.run(everyone(store))
    return turns


def counts(turns: Sequence[Turn]) -> Reply:
    """Calls, and the tokens that were read and said in them."""
    completions = [turn.completion for turn in turns if turn.completion]
    return {
        "calls": len(completions),
        "prompt_tokens": sum(completion.prompt_tokens for completion in completions),
        "new_tokens": sum(len(completion.ids) for completion in completions),
    }


def prompts(turns: Sequence[Turn], rounds: int) -> list[list[list[int]]]:
    """The prompts of each round."""
    return [[turn.call.prompt_ids.tolist() for turn in turns if turn.call.round == round] for round in range(rounds)]


if __name__ == "__main__":
    serve(build)
