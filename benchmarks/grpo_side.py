"""Our side of the GRPO step: the training loop as `agentark run` has it, on rollouts of the embedded engine.

Rollouts go the way that they go in a run: sampled by the engine, kept in a trace store, graded by the task.
"""

import asyncio
import io
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from agentark_jax.data.render import PlainFormat, Prompt
from agentark_jax.data.tokenizer import Tokenizer
from agentark_jax.engines.config import EngineConfig
from agentark_jax.engines.local import LocalEngine
from agentark_jax.generation import Generation, Model
from agentark_jax.models.config import ModelConfig, load_config
from agentark_jax.models.transformer import Params
from agentark_jax.models.weights import load_params
from agentark_jax.policy import PolicySampler
from agentark_jax.progress import Display
from agentark_jax.protocols.calls import Draw
from agentark_jax.records import Question
from agentark_jax.tasks.config import TaskConfig
from agentark_jax.tasks.word_problems import WordProblems
from agentark_jax.traces.store import TraceStore
from agentark_jax.training.alarms import AlarmConfig
from agentark_jax.training.config import FitConfig
from agentark_jax.training.reward_config import RewardConfig
from agentark_jax.training.rewards import Rollout
from agentark_jax.training.rl import learn
from agentark_jax.training.rl_config import RLConfig
from benchmarks.stepwise import After, Stepwise, cheap_reward
from benchmarks.workers import Repeat, Reply, serve

Setup = Mapping[str, Any]
PARTS = ("sync", "rollout", "scoring", "rewards", "training")


class Endless(PlainFormat):
    """Questions are their texts as they are, and nothing ends a completion before its limit."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__(tokenizer)
        self.stop_ids = ()

    def question(self, question: Question) -> Prompt:
        return (self._beginning + self.tokenizer.encode(question.prompt),)


def reward(rollout: Rollout) -> float:
    return cheap_reward(rollout.ids.tolist())


def settings(setup: Setup) -> RLConfig:
    """One update on all rollouts of an iteration: group z-scores, token ratios and token means, and no reference."""
    tokens = setup["prompt_tokens"] + setup["new_tokens"]
    return RLConfig(
        iterations=setup["steps"],
        questions=setup["prompts"],
        group_size=setup["group_size"],
        rewards=RewardConfig({"benchmarks.grpo_side:reward": 1.0}),
        advantage="zscore",
        aggregation="token",
        ratio="token",
        rollout_cap=None,
        kl_loss=0.0,
        alarms=AlarmConfig(action="warn", truncated=None),  # all are cut off, as is meant
        fit=FitConfig(
            learning_rate=setup["learning_rate"],
            schedule="constant",
            warmup_fraction=0.0,
            weight_decay=setup["weight_decay"],
            clip_norm=setup["clip_norm"],
            rows=setup["rows"],
            row_length=tokens,
            checkpoint_every=setup["steps"],
        ),
    )


def build(setup: Setup) -> tuple[Repeat, Reply]:
    """One repetition is one iteration: rollouts, scores, one optimizer step."""
    directory, new_tokens = Path(setup["model"]), setup["new_tokens"]
    config = settings(setup)
    model, form = load_config(directory), Endless(Tokenizer(directory))
    params = load_params(directory, model)
    logprobs = scored(model, params, form.tokenizer, setup["scored"])
    questions = [Question.make("benchmark", "debate", text, "1") for text in setup["texts"]]
    display = Display(Console(file=io.StringIO()))

    def train(after: After) -> None:
        with tempfile.TemporaryDirectory() as name, display.bar("rollouts", total=None) as bar:
            place = Path(name)
            with TraceStore(place / "traces.sqlite") as store:
                store.put_questions(questions)
                engine = EngineConfig(slots=config.questions * config.group_size)
                sampler = PolicySampler(
                    Generation(engine, store, display, seed=0),
                    store,
                    WordProblems(TaskConfig()),
                    Model("benchmark", directory, "", model, form),
                    (),
                    Draw(config.temperature, new_tokens),
                    config.group_size,
                    setup["prompt_tokens"] + new_tokens,
                    bar,
                )

                def told(done: int, total: int, tokens: int) -> None:
                    after(facts(place / "metrics.jsonl"))

                learn(
                    config,
                    model,
                    params,
                    questions,
                    sampler,
                    max_tokens=new_tokens,
                    directory=place,
                    seed=0,
                    fingerprint={},
                    progress=told,
                )

    return Stepwise(train).repeat, {"threads": os.cpu_count(), "logprobs": logprobs}


def scored(model: ModelConfig, params: Params, tokenizer: Tokenizer, ids: Sequence[int]) -> list[float]:
    """The log-probability of each token of a sequence but the first, by the engine."""
    engine = LocalEngine(EngineConfig(slots=1), model, params, tokenizer, context=len(ids), model="", weights="")
    return [float(value) for value in asyncio.run(engine.score(np.asarray(ids, np.int32)))]


def facts(path: Path) -> Reply:
    """What the loop says of its last iteration."""
    record = json.loads(path.read_text().splitlines()[-1])
    sampled = record["rollouts"] * record["completion_tokens"]
    return {
        "sampled": round(sampled),
        "trained": round(sampled * record["groups_informative"]),  # groups are of one size; others teach nothing
        "logprob_gap": record["logprob_gap/max"],
        "parts": {part: record["timing"][f"{part}_seconds"] for part in PARTS},
    }


if __name__ == "__main__":
    serve(build)
