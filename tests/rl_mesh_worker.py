"""What test_rl_mesh.py runs elsewhere: `python rl_mesh_worker.py eight|two directory`. Nothing is asserted here."""

import sys
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import test_training as t
from jax.experimental import multihost_utils
from mesh_worker import TIED

from agentark_jax.models.heads import init_head
from agentark_jax.records import Grade, Question, stable_hash
from agentark_jax.training import distributed
from agentark_jax.training.config import FitConfig, MeshConfig
from agentark_jax.training.reward_config import RewardConfig
from agentark_jax.training.rewards import Rollout
from agentark_jax.training.rl import Judge, learn
from agentark_jax.training.rl_config import RLConfig
from agentark_jax.training.rollouts import Groups, Sample
from agentark_jax.training.state import partition

QUESTIONS = [Question.make("toy", "debate", f"question {number}", "1") for number in range(5)]
CONFIG = RLConfig(
    iterations=3,
    questions=4,
    group_size=4,
    updates=2,
    kl_loss=0.1,
    rollout_cap=None,
    rewards=RewardConfig({"verifiable": 1.0, "process": 0.5}, aggregate="mean"),
    fit=FitConfig(learning_rate=1e-3, schedule="constant", rows=8, row_length=24, checkpoint_every=10),
)


def scripted(questions, visits, policy):
    """Rollouts that follow from question and visit alone, whatever the policy."""

    def one(question, visit, number):
        random = np.random.default_rng(int(stable_hash([question.id, visit, number])[:8], 16))
        prompt, ids = random.integers(0, 64, 3), random.integers(0, 64, random.integers(4, 12))
        verdict = "right" if random.random() < 0.5 else "wrong"
        ends = np.asarray([2, len(ids)], np.int32)
        rollout = Rollout(question, ids.astype(np.int32), "text", "stop", Grade(verdict, "1"), ends, ["a", "b"])
        return Sample(prompt.astype(np.int32), rollout, np.full(len(ids), -4.0, np.float32))

    pairs = zip(questions, visits, strict=True)
    return Groups(list(questions), [[one(question, visit, number) for number in range(4)] for question, visit in pairs])


def run(directory: Path, mesh: tuple[int, int, int]) -> dict[str, np.ndarray]:
    """{name: array}: the policy after three iterations, and the figures of each."""
    config = RLConfig(**{**vars(CONFIG), "fit": FitConfig(**{**vars(CONFIG.fit), "mesh": MeshConfig(*mesh)})})
    judge = Judge(TIED, t.make_params(TIED), init_head(TIED, "prm", 3))
    sampler = None if distributed.follows() else scripted
    arguments = {"max_tokens": 12, "directory": directory, "seed": 5, "fingerprint": {}, "judge": judge}
    result = learn(config, TIED, t.make_params(TIED), QUESTIONS, sampler, **arguments)
    params = {
        path: np.asarray(leaf if leaf.is_fully_addressable else multihost_utils.process_allgather(leaf, tiled=True))
        for path, leaf in partition(result.params, [])[0].items()
    }
    figures = ("accuracy", "process", "loss", "kl/reference", "entropy", "gradient_norm", "logprob_gap")
    history = {f"figure {name}": np.asarray([each[name] for each in result.history]) for name in figures}
    return {**params, **history}


def eight(directory: Path) -> None:
    for name, mesh in {"data": (8, 1, 1), "all": (2, 2, 2)}.items():
        np.savez(directory / f"{name}.npz", **run(directory / name, mesh))


def two(directory: Path) -> None:
    distributed.initialize()
    with distributed.leading() if not distributed.follows() else nullcontext():
        found = run(directory / "two", (2, 2, 1))
    if not distributed.follows():
        np.savez(directory / "two.npz", **found)


if __name__ == "__main__":
    {"eight": eight, "two": two}[sys.argv[1]](Path(sys.argv[2]))
