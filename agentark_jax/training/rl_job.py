"""One reinforcement from files to files: the model of a directory learns and is written to another directory.

See `training.job`: with several processes the first one, which alone samples, calls `reinforce`, the others are in
`training.job.follow`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from agentark_jax.models.config import load_config
from agentark_jax.models.heads import save_heads
from agentark_jax.models.lora import save_adapter
from agentark_jax.models.transformer import param_shapes
from agentark_jax.models.weights import load_params, save_pretrained
from agentark_jax.objectives.ppo import VALUE_HEAD
from agentark_jax.records import Question
from agentark_jax.training import distributed
from agentark_jax.training.mesh import make_mesh, param_shardings
from agentark_jax.training.prm import load_prm
from agentark_jax.training.rl import Judge, Progress, RLResult, Sampler, learn
from agentark_jax.training.rl_config import RLConfig


@dataclass(frozen=True)
class RLJob:
    """Who learns what from, and where the result goes: below `directory`, see `reinforce`.

    `model` is a model directory and `revision` the hash of its content; `tokenizer` that of its tokenizer. `prm` is the
    directory of a process reward model, if one is needed, and `prm_revision` its hash. With `publishes` every policy
    that samples is written to files and scores the `probes`.
    """

    config: RLConfig
    model: Path
    revision: str
    tokenizer: str
    questions: Sequence[Question]
    max_tokens: int
    prm: Path | None
    prm_revision: str | None
    publishes: bool
    probes: Sequence[np.ndarray]
    directory: Path
    seed: int

    def carry_out(self, sample: Sampler | None = None, progress: Progress | None = None) -> RLResult:
        places = [place for place in (self.model, self.prm) if place is not None]
        here = all((place / "config.json").is_file() for place in places) and self.directory.is_dir()
        shared = f"{', '.join(map(str, places))} and {self.directory} must be on a disk that all processes share"
        distributed.agree(None if here else shared)
        config, mesh = load_config(self.model), make_mesh(self.config.fit.mesh)
        shapes = flatten_dict(param_shapes(config), sep=".")
        shardings = unflatten_dict(param_shardings(mesh, shapes), sep=".")
        judge = None
        if self.prm is not None:
            found = load_prm(self.prm, mesh, self.config.fit.compute_dtype)
            found.card.check_tokenizer(self.tokenizer, "the policy's rollouts")
            judge = Judge(found.config, found.params, found.head)
        result = learn(
            self.config,
            config,
            load_params(self.model, config, shardings=shardings),
            self.questions,
            sample,
            max_tokens=self.max_tokens,
            directory=self.directory,
            seed=self.seed,
            fingerprint={"model": self.revision, "prm": self.prm_revision},
            judge=judge,
            source=self.model if self.publishes else None,
            probes=self.probes,
            progress=progress,
        )
        save_pretrained(self.directory / "model", config, result.params, self.model)
        if VALUE_HEAD in result.extra and not distributed.follows():
            save_heads(self.directory / "model", {"value": result.extra[VALUE_HEAD]})
        if result.adapter is not None:
            adapted = replace(config, lora=self.config.fit.lora)
            save_adapter(self.directory / "adapter", adapted, result.adapter, str(self.model))
        return result


def reinforce(job: RLJob, sample: Sampler, progress: Progress | None = None) -> RLResult:
    """Does a job, together with the processes that are in `follow`; resumes it where it was interrupted.

    Writes what `learn` writes, `model/` in Hugging Face format (with the value head of PPO) and, where adapters were
    trained, `adapter/` in PEFT's. Raises as `learn`, `load_params`, `load_prm` and `save_pretrained`, and UsageError
    where a process does not see the models, or where the process reward model has another tokenizer than the policy.
    """
    distributed.hand_out(job)
    return job.carry_out(sample, progress)
