"""Our sides on a GPU: the training step, the embedded engine, random weights for all sides, and what the GPU can do."""

import asyncio
import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from agentark_jax.data.tokenizer import train_tokenizer
from agentark_jax.engines.base import Request
from agentark_jax.engines.config import EngineConfig
from agentark_jax.engines.local import LocalEngine
from agentark_jax.files import write_json
from agentark_jax.models.attention import kernel_platform
from agentark_jax.models.config import ModelConfig, load_config
from agentark_jax.models.transformer import init_params
from agentark_jax.models.weights import load_params, save_pretrained
from agentark_jax.objectives.sft import SFT
from agentark_jax.records import Completion, Sampling
from agentark_jax.training.config import FitConfig
from agentark_jax.training.mesh import fit_attention, make_mesh, place_batch
from agentark_jax.training.peaks import peak_flops
from agentark_jax.training.state import initial_state, make_optimizer, partition, state_shardings
from agentark_jax.training.step import make_step
from benchmarks.workers import Repeat, Reply, serve

Setup = Mapping[str, Any]
TERM = "completion"
FIGURES = {"losses": "loss", "gradient_norms": "gradient_norm"}  # of a step, as sides call them and as its metrics do
STEPS = 1000  # of the learning rate's schedule, which is constant


def weights(setup: Setup) -> Repeat:
    """Writes a model of a shape with random weights in fp32, as transformers loads it, and a tokenizer beside it."""

    def repeat(index: int) -> Reply:
        started = time.perf_counter()
        model = ModelConfig.from_hf(setup["shape"], "benchmark")
        with TemporaryDirectory() as place:
            train_tokenizer(["What the tokens say is of no consequence."], 300, Path(place))
            write_json(Path(place) / "config.json", setup["shape"])
            params = jax.jit(init_params, static_argnums=(0, 1))(model, 0)
            save_pretrained(Path(setup["model"]), model, params, Path(place))
        return {"seconds": time.perf_counter() - started}

    return repeat


def training(setup: Setup) -> Repeat:
    """A repetition is a first step that is not timed, and `steps` that are, dispatched as the training loop does it:
    the host never waits in between.

    Every row is one segment, all of whose tokens but the first are predicted. The program is that of packed rows.
    """
    ids = np.load(setup["ids"])
    _, steps, rows, length = ids.shape
    fit = FitConfig(
        learning_rate=setup["learning_rate"],
        schedule="constant",
        warmup_fraction=0.0,
        weight_decay=setup["weight_decay"],
        clip_norm=setup["clip_norm"],
        rows=rows,
        row_length=length,
        remat=setup["remat"],
        compute_dtype="bfloat16",
    )
    model = load_config(Path(setup["model"]))
    mesh, optimizer = make_mesh(fit.mesh), make_optimizer(fit, STEPS)
    trainable, _ = partition(load_params(Path(setup["model"]), model), fit.freeze)
    shardings = state_shardings(mesh, optimizer, trainable)
    state = initial_state(mesh, optimizer, trainable)
    attention, why = fit_attention(fit, model, kernel_platform(mesh.devices.flat[0]))
    step = make_step(fit, model, SFT({TERM: 1.0}), STEPS, shardings, attention)
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length))
    same = {"positions": positions, "segment_ids": np.ones((rows, length), np.int32)}
    same["weights"] = {TERM: np.ones((rows, length), np.float32)}

    def repeat(index: int) -> Reply:
        nonlocal state
        batches = [jax.block_until_ready(place_batch(mesh, {"ids": each, **same}, rows)) for each in ids[index]]
        found = []
        for number, batch in enumerate(batches):
            state, metrics = step(state, {}, batch)
            found.append(metrics)
            if number == 0:
                jax.block_until_ready(state)
                started = time.perf_counter()
        jax.block_until_ready(state)
        seconds = (time.perf_counter() - started) / (steps - 1)
        figures = {key: [float(metrics[name]) for metrics in found] for key, name in FIGURES.items()}
        return {"seconds": seconds, "attention": why, **figures, **device_memory()}

    return repeat


def generation(setup: Setup) -> Repeat:
    """All prompts at once through the embedded engine in bfloat16, greedy, never stopping early.

    The prompts are random, no two with a common beginning, and others in every repetition: the engine remembers what it
    has prefilled. The warm-up also says how far the log-probabilities of one completion lie from those of a single pass
    over it.
    """
    model, new_tokens = ModelConfig.from_hf(setup["shape"], "benchmark"), setup["new_tokens"]
    wide = jax.jit(init_params, static_argnums=(0, 1))(model, 0)
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), wide)
    del wide
    engine = LocalEngine(
        EngineConfig(slots=setup["prompts"], cache_dtype="bfloat16"),
        model,
        params,
        _Words(),  # type: ignore[arg-type]
        context=setup["prompt_tokens"] + new_tokens,
        model="benchmark",
        weights="benchmark",
    )
    sampling = Sampling(temperature=0.0, max_tokens=new_tokens, stop_ids=(), seed=0)

    async def everyone(requests: list[Request]) -> list[Completion]:
        return await asyncio.gather(*(engine.generate(request) for request in requests))

    def timed(tokens: int, seed: int) -> tuple[float, list[Request], list[Completion]]:
        shape = (setup["prompts"], setup["prompt_tokens"])
        prompts = np.random.default_rng(seed).integers(3, model.vocab_size, shape, dtype=np.int32)
        requests = [Request(ids, replace(sampling, max_tokens=tokens)) for ids in prompts]
        started = time.perf_counter()
        completions = asyncio.run(everyone(requests))
        return time.perf_counter() - started, requests, completions

    def repeat(index: int) -> Reply:
        first, _, _ = timed(1, 2 * index)
        seconds, requests, completions = timed(new_tokens, 2 * index + 1)
        reply = {"seconds": seconds, "first_token_seconds": first, **device_memory()}
        reply["new_tokens"] = [len(completion.ids) for completion in completions]
        if index == 0:
            whole = np.concatenate([requests[0].prompt_ids, completions[0].ids])
            scores = asyncio.run(engine.score(whole))[-new_tokens:]
            reply["score_difference"] = float(np.abs(scores - completions[0].logprobs).mean())
        return reply

    return repeat


class _Words:
    """Stands for a tokenizer: what the tokens say is of no consequence."""

    def decode(self, ids: list[int]) -> str:
        return ""


def machine(setup: Setup) -> Repeat:
    """Rates of bf16 matrix products [M, K] × [K, N] on random data (FLOP/s) and of copying memory (bytes/s)."""

    def repeat(index: int) -> Reply:
        started = time.perf_counter()
        rates = {name: _matmul_rate(*shape) for name, shape in setup["shapes"].items()}
        bandwidth = _bandwidth(setup["bandwidth_bytes"])
        return {"seconds": time.perf_counter() - started, "rates": rates, "bandwidth": bandwidth}

    return repeat


def _matmul_rate(rows: int, inner: int, columns: int) -> float:
    """The better of two layouts of the right operand."""
    taken = []
    for formula, right_shape in (("mk,kn->mn", (inner, columns)), ("mk,nk->mn", (columns, inner))):
        left, right = (
            jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16)
            for seed, shape in enumerate([(rows, inner), right_shape])
        )
        taken.append(_median_seconds(partial(jax.jit(partial(jnp.einsum, formula)), left, right)))
    return 2 * rows * inner * columns / min(taken)


def _bandwidth(size: int) -> float:
    """Bytes read and written per second."""
    array = jax.random.normal(jax.random.key(0), (size // 4,), jnp.float32)
    return 2 * size / _median_seconds(partial(jax.jit(lambda x: x * 1.5), array))


def _median_seconds(call: Callable[[], jax.Array], bursts: int = 5, calls: int = 20) -> float:
    """Of `calls` calls in a row, so that starting them does not count; the median of several such bursts."""
    jax.block_until_ready(call())
    taken = []
    for _ in range(bursts):
        started = time.perf_counter()
        for _ in range(calls):
            last = call()
        jax.block_until_ready(last)
        taken.append((time.perf_counter() - started) / calls)
    return statistics.median(taken)


def device_memory() -> Reply:
    """The most that was in use on the device so far, in 10⁹ bytes."""
    stats = jax.devices()[0].memory_stats() or {}
    return {"peak_device_gb": stats.get("peak_bytes_in_use", 0) / 1e9}


def build(setup: Setup) -> tuple[Repeat, Reply]:
    sides = {"weights": weights, "training": training, "generation": generation, "machine": machine}
    device = jax.devices()[0]
    facts = {"threads": os.cpu_count(), "device": device.device_kind, "platform": device.platform}
    return sides[setup["side"]](setup), {**facts, "peak_flops": peak_flops([device])}


if __name__ == "__main__":
    serve(build)
