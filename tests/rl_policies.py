"""A small random policy, questions for it, and samplers of its rollouts, for tests of reinforcement learning."""

import asyncio
from collections.abc import Callable

import numpy as np

from agentark_jax.data.steps import steps
from agentark_jax.engines.base import Request
from agentark_jax.engines.config import EngineConfig
from agentark_jax.engines.local import LocalEngine
from agentark_jax.models.config import ModelConfig
from agentark_jax.models.source import ScratchConfig
from agentark_jax.records import Grade, Question, Sampling, stable_hash
from agentark_jax.training.rewards import Rollout
from agentark_jax.training.rl import Policy
from agentark_jax.training.rollouts import Groups, Sample

MAX_TOKENS = 12


def make_config(form) -> ModelConfig:
    shape = ScratchConfig(hidden_size=32, layers=2, heads=2, kv_heads=1, head_dim=16, intermediate_size=64)
    ids = {"bos_id": form.tokenizer.bos_id, "eos_id": form.tokenizer.eos_id}
    return ModelConfig.from_hf(shape.to_hf(vocabulary=400, **ids), "config.json")


def questions(count: int) -> list[Question]:
    return [Question.make("toy", "debate", f"{number} + 1?", str(number + 1)) for number in range(count)]


def even(rollout_ids: np.ndarray) -> str:
    """Right are completions most of whose ids are even: something that a policy can learn."""
    return "right" if np.mean(rollout_ids % 2 == 0) > 0.5 else "wrong"


class EngineSampler:
    """Rollouts by the embedded engine, graded by their ids; keeps what it was asked."""

    def __init__(
        self, form, size: int, verdict: Callable[[np.ndarray], str] = even, lose=lambda question, number: False
    ):
        self.form, self.size, self.verdict, self.lose = form, size, verdict, lose
        self.asked: list[tuple[str, int, str]] = []
        self.temperature = 1.0

    def __call__(self, questions, visits, policy: Policy) -> Groups:
        self.asked += [(question.id, visit, policy.version) for question, visit in zip(questions, visits, strict=True)]
        engine = LocalEngine(
            EngineConfig(slots=16),
            policy.config,
            policy.params,
            self.form.tokenizer,
            context=64,
            model="toy",
            weights=policy.version,
        )

        async def one(question: Question, visit: int, number: int) -> Sample | None:
            if self.lose(question, number):
                return None
            prompt = np.asarray([token for segment in self.form.question(question) for token in segment], np.int32)
            seed = int(stable_hash([question.id, visit, number])[:12], 16)
            sampling = Sampling(self.temperature, MAX_TOKENS, self.form.stop_ids, seed)
            said = await engine.generate(Request(prompt, sampling))
            return Sample(prompt, self.rollout(question, said), said.logprobs)

        async def everyone() -> list[list[Sample | None]]:
            groups = (
                asyncio.gather(*(one(question, visit, number) for number in range(self.size)))
                for question, visit in zip(questions, visits, strict=True)
            )
            return [list(group) for group in await asyncio.gather(*groups)]

        return Groups(list(questions), asyncio.run(everyone()))

    def rollout(self, question: Question, said) -> Rollout:
        found = steps(said.ids.tolist(), self.form.tokenizer)
        return Rollout(
            question=question,
            ids=said.ids,
            text=said.text or "-",
            finish="stop",
            grade=Grade(self.verdict(said.ids), "1"),
            step_ends=np.asarray([step.end for step in found], np.int32),
            steps=[step.text for step in found],
        )
