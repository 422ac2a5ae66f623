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
from agentark_jax.objectives.prm import PRM
from agentark_jax.records import Example
from agentark_jax.training import distributed
from agentark_jax.training.config import FitConfig
from agentark_jax.training.loop import FitResult, Progress, fit
from agentark_jax.training.mesh import make_mesh, param_shardings
from agentark_jax.training.prm import load_beside, save_beside


@dataclass(frozen=True)
class Job:
    """What is fitted to what, and where the result goes: below `directory`, see `train`.

    `model` is a model directory and `revision` the hash of its content. With an `objective` a process reward model is
    trained, whose examples have steps: `revision` then also covers what stands beside the model (`training.prm`).
    """

    config: FitConfig
    model: Path
    revision: str
    examples: Sequence[Example]
    validation: Sequence[Example]
    directory: Path
    seed: int
    objective: PRM | None = None

    def carry_out(self, progress: Progress | None = None) -> FitResult:
        here = (self.model / "config.json").is_file() and self.directory.is_dir()
        distributed.agree(
            None if here else f"{self.model} and {self.directory} must be on a disk that all processes share"
        )
        config = load_config(self.model)
        shapes = flatten_dict(param_shapes(config), sep=".")
        shardings = unflatten_dict(param_shardings(make_mesh(self.config.mesh), shapes), sep=".")
        objective = self.objective
        result = fit(
            self.config,
            config,
            load_params(self.model, config, shardings=shardings),
            self.examples,
            directory=self.directory,
            seed=self.seed,
            fingerprint={"model": self.revision},
            validation=self.validation,
            progress=progress,
            objective=objective,
            extra=None if objective is None else load_beside(self.model, config, objective, self.seed),
            together=objective is not None and "contrastive" in objective.coefficients,
        )
        release_memory()  # of the optimizer, before the export makes copies
        save_pretrained(self.directory / "model", config, result.params, self.model)
        if objective is not None:
            save_beside(self.directory / "model", result.extra)
        if result.adapter is not None:
            adapted = replace(config, lora=self.config.lora)
            save_adapter(self.directory / "adapter", adapted, result.adapter, str(self.model))
        return result


def for_steps(config: FitConfig, examples: Sequence[Example], steps: int) -> FitConfig:
    """The config with which a fit takes so many steps, in as many epochs as that needs."""
    tokens = sum(len(example.ids) for example in examples)  # of an epoch: it fills at least so many rows
    return replace(config, steps=steps, epochs=max(1, math.ceil(steps * config.rows * config.row_length / tokens)))


def train(job: Job, progress: Progress | None = None) -> FitResult:
    """Does a job, together with the processes that are in `follow`; resumes it where it was interrupted.

    Each process reads only those parts of the weights that its devices hold. Writes what `fit` writes, `model/` in
    Hugging Face format (of a process reward model with its head, and the projector where there is one) and, where
    adapters were trained, `adapter/` in PEFT's.

    Raises as `fit`, `load_params`, `load_beside` and `save_pretrained`, and UsageError where a process does not see the
    model.
    """
    distributed.hand_out(job)
    return job.carry_out(progress)


def follow() -> None:
    """Takes part in every job of the first process until that is done. Raises as `train`, and when the other failed."""
    for job in distributed.handed_out():
        job.carry_out()


def release_memory() -> None:
    """Frees what is unreachable and hands it back to the system.

    The C library keeps freed pieces of up to 32 MB for itself; after a fit of a small model that is most of its state,
    gigabytes that the next stage would come on top of.
    """
    gc.collect()
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # glibc has it, others return memory by themselves
        trim(0)
