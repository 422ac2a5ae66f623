"""A training step of a made-up model, in one process or as one of several that talk over loopback."""

import os
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from agentark_jax.models.config import ModelConfig
from agentark_jax.models.transformer import init_params
from agentark_jax.objectives.sft import SFT
from agentark_jax.training import distributed
from agentark_jax.training.config import FitConfig, MeshConfig
from agentark_jax.training.mesh import local_rows, make_mesh, place_batch
from agentark_jax.training.state import initial_state, make_optimizer, partition, state_shardings
from agentark_jax.training.step import make_step
from benchmarks.collectives import Program
from benchmarks.inputs import first_loss_position, sft_ids
from benchmarks.workers import Repeat, Reply, serve

STEPS = 1000  # of the learning-rate schedule


def training(setup: Mapping[str, Any]) -> Repeat:
    """One optimizer step per repetition on `rows` rows of `length` tokens of a model of `config`, `mesh` its division.

    The first reply says how many bytes this process's device sends in a step, according to the compiled program.
    """
    os.environ.update(setup.get("environment", {}))  # read when JAX starts, which is now
    if cores := setup.get("cores"):
        os.sched_setaffinity(0, cores)
    distributed.initialize()
    rows, length = setup["rows"], setup["length"]
    fit = FitConfig(schedule="constant", warmup_fraction=0.0, rows=rows, row_length=length)
    model = ModelConfig.from_hf(setup["config"], "benchmark")
    mesh, optimizer = make_mesh(MeshConfig(**setup.get("mesh", {}))), make_optimizer(fit, STEPS)
    trainable, _ = partition(init_params(model, 0), fit.freeze)
    shardings = state_shardings(mesh, optimizer, trainable)
    state = initial_state(mesh, optimizer, trainable)
    step = make_step(fit, model, SFT({"completion": 1.0}), STEPS, shardings)
    mine = local_rows(mesh, rows)
    weights = np.zeros((len(mine), length), np.float32)
    weights[:, first_loss_position(length) :] = 1.0
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), weights.shape)
    compiled: Any = None

    def repeat(index: int) -> Reply:
        nonlocal state, compiled
        batch = {
            "ids": sft_ids(model.vocab_size, rows, length, index)[mine],
            "positions": positions,
            "segment_ids": np.ones_like(positions),
            "weights": {"completion": weights},
        }
        placed = place_batch(mesh, batch, rows)
        if compiled is None:
            compiled = step.lower(state, {}, placed).compile()
        started = time.perf_counter()
        state, metrics = jax.block_until_ready(compiled(state, {}, placed))
        seconds = time.perf_counter() - started
        sent = sum(one.total for one in Program(compiled.as_text()).collectives) if index == 0 else None
        return {"seconds": seconds, "loss": float(metrics["loss"]), "sent_bytes": sent}

    return repeat


def build(setup: Mapping[str, Any]) -> tuple[Repeat, Reply]:
    return training(setup), {"threads": len(os.sched_getaffinity(0))}


if __name__ == "__main__":
    serve(build)
