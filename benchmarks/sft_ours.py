"""Our sides of the fine-tuning benchmarks: one optimizer step, an epoch of the whole loop, the memory of steps."""

import dataclasses
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from agentark_jax.data.loader import pack_row
from agentark_jax.models.config import Lora, load_config
from agentark_jax.models.lora import init_adapter
from agentark_jax.models.transformer import param_shapes
from agentark_jax.models.weights import load_params
from agentark_jax.objectives.sft import SFT
from agentark_jax.records import Example
from agentark_jax.training.config import FitConfig
from agentark_jax.training.loop import fit
from agentark_jax.training.mesh import make_mesh, place_params
from agentark_jax.training.state import initial_state, make_optimizer, partition, state_shardings
from agentark_jax.training.step import make_step
from benchmarks.workers import Repeat, Reply, peaks_of_steps, serve

Setup = Mapping[str, Any]
TERM = "completion"


def examples(traces: Sequence[Any]) -> list[Example]:
    """Traces (prompt tokens, ids) with loss on all tokens after the prompt."""
    return [
        Example(
            np.asarray(ids, np.int32),
            {TERM: (np.arange(len(ids)) >= prompt).astype(np.float32)},
            f"question {number}",
            "benchmark",
        )
        for number, (prompt, ids) in enumerate(traces)
    ]


def fit_config(setup: Setup, **more: Any) -> FitConfig:
    lora = setup.get("lora")
    return FitConfig(
        learning_rate=setup["learning_rate"],
        schedule="constant",
        warmup_fraction=0.0,
        weight_decay=setup["weight_decay"],
        clip_norm=setup["clip_norm"],
        rows=setup["rows"],
        row_length=setup["row_length"],
        freeze=setup.get("freeze", []),
        lora=None if lora is None else Lora(lora["rank"], lora["alpha"], tuple(lora["targets"])),
        remat=setup.get("remat", FitConfig.remat),
        **more,
    )


def training(setup: Setup) -> Repeat:
    """One optimizer step per repetition, as the training loop calls it. `plan` has the traces of every row."""
    config = fit_config(setup)
    model = load_config(Path(setup["model"]))
    params = load_params(Path(setup["model"]), model)
    if config.lora is None:
        trainable, frozen = partition(params, config.freeze)
    else:
        model = dataclasses.replace(model, lora=config.lora)
        trainable, frozen = flatten_dict(init_adapter(model, 0), sep="."), flatten_dict(params, sep=".")
    steps = setup["steps"]
    mesh, optimizer = make_mesh(config.mesh), make_optimizer(config, len(steps))
    shardings = state_shardings(mesh, optimizer, trainable)
    frozen = place_params(mesh, frozen, donate=True)
    state = initial_state(mesh, optimizer, trainable)
    step = make_step(config, model, SFT({TERM: 1.0}), len(steps), shardings)

    def repeat(index: int) -> Reply:
        nonlocal state
        traces = examples(steps[index])
        rows = [pack_row([traces[i] for i in row], row_length=config.row_length, terms=[TERM]) for row in setup["plan"]]
        batch = jax.tree.map(lambda *arrays: np.stack(arrays), *rows)
        started = time.perf_counter()
        state, metrics = jax.block_until_ready(step(state, frozen, batch))
        seconds = time.perf_counter() - started
        return {"seconds": seconds, "loss": float(metrics["loss"]), "loss_tokens": int(metrics["loss_tokens"])}

    return repeat


def epoch(setup: Setup) -> Repeat:
    """One repetition is a whole fit of two epochs: the first compiles and has the loss, the second has the seconds.

    `fit` tells of a step when its metrics are fetched, which is when it is done. Its only checkpoint comes after.
    """
    (traces,) = setup["steps"]
    config = fit_config(setup, epochs=2, checkpoint_every=10**6)
    data = examples(traces)
    tokens = sum(len(example.ids) for example in data)
    model = load_config(Path(setup["model"]))

    def repeat(index: int) -> Reply:
        told: list[tuple[float, int, int]] = []

        def progress(done: int, planned: int, trained: int) -> None:
            told.append((time.perf_counter(), done, trained))

        with tempfile.TemporaryDirectory() as directory:
            params = load_params(Path(setup["model"]), model)
            result = fit(
                config, model, params, data, directory=Path(directory), seed=0, fingerprint={}, progress=progress
            )
        half = result.steps // 2
        (begun, _, before), (ended, _, after) = told[half - 1], told[-1]
        # The rows of both epochs follow one another: the second half may have a few traces more or less than one.
        return {
            "seconds": (ended - begun) * tokens / (after - before),
            "loss": float(np.mean([loss for _, loss in result.history[:half]])),
            "loss_tokens": result.loss_tokens // 2,
        }

    return repeat


def memory(setup: Setup) -> Repeat:
    """One repetition is a few optimizer steps; the peak of each counts from its beginning."""
    step = training(setup)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(param_shapes(load_config(Path(setup["model"])))))

    return lambda index: {**peaks_of_steps(step, len(setup["steps"])), "parameters": parameters}


def build(setup: Setup) -> tuple[Repeat, Reply]:
    sides = {"training": training, "epoch": epoch, "memory": memory}
    return sides[setup["side"]](setup), {"threads": os.cpu_count()}


if __name__ == "__main__":
    serve(build)
