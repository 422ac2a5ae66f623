"""A training step compiled for TPUs that are not there, and what its devices exchange."""

import os
import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import jax

from agentark_jax.models.config import ModelConfig
from agentark_jax.models.published import describe
from agentark_jax.models.source import ModelSourceConfig
from agentark_jax.objectives.chunked import chunk_rows, portions
from agentark_jax.preflight import compiler_environment, lower_step, topology
from agentark_jax.training.config import FitConfig, MeshConfig
from agentark_jax.training.mesh import fit_attention
from benchmarks.collectives import Program
from benchmarks.workers import Repeat, Reply, serve


def compilation(setup: Mapping[str, Any]) -> Repeat:
    """One repetition compiles `fit` (its settings) of the model `source` for `topology`."""
    where = topology(setup["topology"])
    os.environ.update(compiler_environment(where))  # libtpu is loaded by the first use of a topology, later
    jax.config.update("jax_platforms", "cpu")
    model = describe(ModelSourceConfig(setup["source"]))
    fit = FitConfig(**{**setup["fit"], "mesh": MeshConfig(**setup["fit"]["mesh"])})

    def repeat(index: int) -> Reply:
        started = time.perf_counter()
        compiled = lower_step(model, fit, where, fit_attention(fit, model, where.platform)[0]).compile()
        seconds = time.perf_counter() - started
        memory = compiled.memory_analysis()
        assert memory is not None, "compilers of all platforms tell"
        program = Program(compiled.as_text(), dynamic=loss_chunks(model, fit, where.devices))
        return {
            "seconds": seconds,
            "devices": program.devices,
            "temporary_bytes": memory.temp_size_in_bytes,
            "collectives": [asdict(one) for one in program.collectives],
        }

    return repeat


def loss_chunks(model: ModelConfig, fit: FitConfig, devices: int) -> int:
    """How many chunks of tokens a device computes the loss of when every token has one."""
    sizes = fit.mesh.sizes(devices)
    tokens = fit.rows // fit.accumulation // (sizes["data"] * sizes["fsdp"]) * (fit.row_length - 1)
    return -(-tokens // chunk_rows(tokens, model.vocab_size // sizes["tensor"], portions("tpu").chunk_bytes))


def build(setup: Mapping[str, Any]) -> tuple[Repeat, Reply]:
    return compilation(setup), {"threads": os.cpu_count()}


if __name__ == "__main__":
    serve(build)
