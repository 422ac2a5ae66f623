"""Our sides: compilation, the embedded engine, and what this machine can do at all."""

import asyncio
import os
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from agentark_jax.data.tokenizer import Tokenizer
from agentark_jax.engines.base import Request
from agentark_jax.engines.config import EngineConfig
from agentark_jax.engines.local import LocalEngine
from agentark_jax.models.config import ModelConfig, load_config
from agentark_jax.models.transformer import param_shapes
from agentark_jax.models.weights import load_params
from agentark_jax.objectives.sft import SFT
from agentark_jax.records import Completion, Sampling
from agentark_jax.training.config import FitConfig
from agentark_jax.training.mesh import make_mesh
from agentark_jax.training.state import abstract_state, make_optimizer, partition, state_shardings
from agentark_jax.training.step import make_step
from benchmarks.workers import Repeat, Reply, serve

Setup = Mapping[str, Any]


def compilation(setup: Setup) -> Repeat:
    """The training step of a made-up model."""
    return compiling(ModelConfig.from_hf(setup["config"], "benchmark"), setup["batch"], setup["length"])


def compiling(model: ModelConfig, batch: int, length: int) -> Repeat:
    """Tracing, lowering and compiling the training step of a model."""
    fit = FitConfig(rows=batch, row_length=length)
    trainable, _ = partition(param_shapes(model), fit.freeze)
    mesh, optimizer = make_mesh(fit.mesh), make_optimizer(fit, 10)
    shardings = state_shardings(mesh, optimizer, trainable)
    whole = [jax.ShapeDtypeStruct((batch, length), dtype) for dtype in (np.int32, np.float32)]
    inputs = {"ids": whole[0], "positions": whole[0], "segment_ids": whole[0], "weights": {"completion": whole[1]}}
    state = abstract_state(trainable, optimizer, shardings)

    def repeat(index: int) -> Reply:
        started = time.perf_counter()
        make_step(fit, model, SFT({"completion": 1.0}), 10, shardings).lower(state, {}, inputs).compile()
        return {"seconds": time.perf_counter() - started}

    return repeat


def generation(setup: Setup) -> Repeat:
    """All sequences at once through the embedded engine, never stopping early.

    Greedy; several samples of each prompt are drawn at temperature 1. The engine forgets what it has prefilled before
    every repetition, which has the same prompts as the one before.
    """
    directory, prompts, wanted = Path(setup["model"]), setup["prompts"], setup["new_tokens"]
    model = load_config(directory)
    params = load_params(directory, model)
    engine = LocalEngine(
        EngineConfig(slots=setup["slots"]),
        model,
        params,
        Tokenizer(directory),
        context=max(map(len, prompts)) + max(wanted),
        model="benchmark",
        weights="benchmark",
    )

    def requests(samples: int, temperature: float) -> list[Request]:
        """All of the prompts' samples, each with as many tokens as it is to have."""
        sequences = [np.asarray(ids, np.int32) for ids in prompts for _ in range(samples)]
        return [
            Request(ids, Sampling(temperature=temperature, max_tokens=tokens, stop_ids=(), seed=seed))
            for seed, (ids, tokens) in enumerate(zip(sequences, wanted[:: setup["samples"] // samples], strict=True))
        ]

    async def everyone(requests: Sequence[Request]) -> list[Completion]:
        return await asyncio.gather(*(engine.generate(request) for request in requests))

    greedy = requests(1, 0.0)
    timed = greedy if setup["samples"] == 1 else requests(setup["samples"], 1.0)

    def repeat(index: int) -> Reply:
        engine.update_weights(params, "benchmark")
        started = time.perf_counter()
        completions = asyncio.run(everyone(timed))
        seconds = time.perf_counter() - started
        reply: Reply = {"seconds": seconds, "counts": [len(completion.ids) for completion in completions]}
        if index == 0:
            certain = completions if timed is greedy else asyncio.run(everyone(greedy))
            reply["greedy"] = [completion.ids.tolist() for completion in certain]
        return reply

    return repeat


def machine(setup: Setup) -> Repeat:
    """XLA's rates of fp32 matrix products [M, K] × [K, N] (FLOP/s) and of reading and writing memory (bytes/s).

    Each is the best of a few calls within a repetition, since a floor asks what the machine can do. Another library may
    multiply faster, and a neighbour may leave while a side works: shares of the floor above 100 % are possible.
    """

    def repeat(index: int) -> Reply:
        started = time.perf_counter()
        rates = {name: _matmul_rate(shape, setup["seconds"]) for name, shape in setup["shapes"].items()}
        bandwidth = _bandwidth(setup["bandwidth_bytes"], setup["seconds"])
        return {"seconds": time.perf_counter() - started, "rates": rates, "bandwidth": bandwidth}

    return repeat


def _matmul_rate(shape: Sequence[int], seconds: float) -> float:
    """The better of two layouts of the right operand: one can be twice as fast as the other."""
    rows, inner, columns = shape
    left = jnp.ones((rows, inner), jnp.float32)
    shortest = []
    for formula, right_shape in (("mk,kn->mn", (inner, columns)), ("mk,nk->mn", (columns, inner))):
        right = jnp.ones(right_shape, jnp.float32)
        multiply = jax.jit(partial(jnp.einsum, formula))
        shortest.append(_shortest(partial(multiply, left, right), seconds))
        del right  # before the next is made: the head's is large
    return 2 * rows * inner * columns / min(shortest)


def _bandwidth(size: int, seconds: float) -> float:
    """Bytes read and written per second by an update in place; the array is much larger than any cache."""
    update = partial(jax.jit, donate_argnums=0)(lambda x: x * 1.5)
    array = jnp.ones(size // 4, jnp.float32)

    def run() -> jax.Array:
        nonlocal array
        array = update(array)
        return array

    return 2 * size / _shortest(run, seconds)


def _shortest(call: Any, seconds: float) -> float:
    """The shortest of at least two calls, repeated for `seconds`, after one that compiles."""
    jax.block_until_ready(call())
    taken: list[float] = []
    while len(taken) < 2 or sum(taken) < seconds:
        started = time.perf_counter()
        jax.block_until_ready(call())
        taken.append(time.perf_counter() - started)
    return min(taken)


def build(setup: Setup) -> tuple[Repeat, Reply]:
    sides = {
        "compilation": compilation,
        "generation": generation,
        "machine": machine,
    }
    return sides[setup["side"]](setup), {"threads": os.cpu_count()}


if __name__ == "__main__":
    serve(build)
