"""One training from files to files: the model of a directory is fitted to examples and written to another directory.

With several processes the first one calls `train` and the others, which are in `follow`, take part. All of them see
the same files: directories are on a disk that they share.
"""

import ctypes
import gc
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from flax.traverse_util import flatten_dict, unflatten_dict

from agentark_jax.models.config import load_config
from agentark_jax.models.lora import save_adapter
from agentark_jax.models.transformer import param_shapes
from agentark_jax.models.weights import load_params, save_pretrained
from agentark_jax.records import Example
from agentark_jax.training import distributed
from agentark_jax.training.config import FitConfig
from agentark_jax.training.loop import FitResult, Progress, fit
from agentark_jax.training.mesh import make_mesh, param_shardings


@dataclass(frozen=True)
class Job:
    """What is fitted to what, and where the result goes: below `directory`, see `train`.

    `model` is a model directory and `revision` the hash of its content.
    """

    config: FitConfig
    model: Path
    revision: str
    examples: Sequence[Example]
    validation: Sequence[Example]
    directory: Path
    seed: int


def for_steps(config: FitConfig, examples: Sequence[Example], steps: int) -> FitConfig:
    """The config with which a fit takes so many steps, in as many epochs as that needs."""
    tokens = sum(len(example.ids) for example in examples)  # of an epoch: it fills at least so many rows
    return replace(config, steps=steps, epochs=max(1, math.ceil(steps * config.rows * config.row_length / tokens)))


def train(job: Job, progress: Progress | None = None) -> FitResult:
    """Does a job, together with the processes that are in `follow`; resumes it where it was interrupted.

    Each process reads only those parts of the weights that its devices hold. Writes what `fit` writes, `model/` in
    Hugging Face format and, where adapters were trained, `adapter/` in PEFT's.

    Raises as `fit`, `load_params` and `save_pretrained`, and UsageError where a process does not see the model.
    """
    distributed.hand_out(job)
    return _carry_out(job, progress)


def follow() -> None:
    """Takes part in every job of the first process until that is done. Raises as `train`, and when the other failed."""
    for job in distributed.handed_out():
        _carry_out(job, None)


def _carry_out(job: Job, progress: Progress | None) -> FitResult:
    here = (job.model / "config.json").is_file() and job.directory.is_dir()
    distributed.agree(None if here else f"{job.model} and {job.directory} must be on a disk that all processes share")
    config = load_config(job.model)
    shapes = flatten_dict(param_shapes(config), sep=".")
    shardings = unflatten_dict(param_shardings(make_mesh(job.config.mesh), shapes), sep=".")
    result = fit(
        job.config,
        config,
        load_params(job.model, config, shardings=shardings),
        job.examples,
        directory=job.directory,
        seed=job.seed,
        fingerprint={"model": job.revision},
        validation=job.validation,
        progress=progress,
    )
    release_memory()  # of the optimizer, before the export makes copies
    save_pretrained(job.directory / "model", config, result.params, job.model)
    if result.adapter is not None:
        adapted = replace(config, lora=job.config.lora)
        save_adapter(job.directory / "adapter", adapted, result.adapter, str(job.model))
    return result


def release_memory() -> None:
    """Frees what is unreachable and hands it back to the system.

    The C library keeps freed pieces of up to 32 MB for itself; after a fit of a small model that is most of its state,
    gigabytes that the next stage would come on top of.
    """
    gc.collect()
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # glibc has it, others return memory by themselves
        trim(0)
