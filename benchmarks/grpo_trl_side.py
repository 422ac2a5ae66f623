"""TRL's side of the GRPO step: its trainer as it is, with what it documents as its fastest settings without a GPU.

What was chosen, and why:

- all rollouts of a step are generated at once, by `transformers.generate` with its cache: vLLM needs a GPU, and
  continuous batching is made for one. A static cache is only faster with compilation, which the trainer turns off;
- no gradient checkpointing (its default recomputes every layer), fused AdamW, float32;
- `micro_batch` completions a forward pass, all of them in one optimizer step;
- `torch_compile` as the sizes say: off, as is its default. transformers itself warns that it mostly helps on GPUs;
- no reference model (beta 0, its default), one pass over the rollouts, so it computes no old log-probabilities either.

An end token would cut rollouts short. The tokenizer gets a new one, for which the model has no output: nothing ends
early, and nothing is paid for that, where forbidding a token costs a pass over the logits at every step.
"""

import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from benchmarks.stepwise import After, Stepwise, cheap_reward
from benchmarks.workers import Repeat, Reply, serve

Setup = Mapping[str, Any]


class Timed(GRPOTrainer):
    """The trainer, which also notes the seconds of the parts of a step and the tokens that it is trained on."""

    def __init__(self, *arguments: Any, **more: Any) -> None:
        self.parts: dict[str, float] = {"rollout": 0.0, "scoring": 0.0}
        self.tokens = {"sampled": 0, "trained": 0}
        super().__init__(*arguments, **more)

    @contextmanager
    def _clock(self, part: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.parts[part] += time.perf_counter() - started

    def _generate_single_turn(self, *arguments: Any, **more: Any) -> Any:
        with self._clock("rollout"):
            found = super()._generate_single_turn(*arguments, **more)
        self.tokens["sampled"] += sum(map(len, found[0]))
        return found

    def _generate_and_score_completions(self, *arguments: Any, **more: Any) -> Any:
        before = self.parts["rollout"]
        with self._clock("scoring"):
            found = super()._generate_and_score_completions(*arguments, **more)
        self.parts["scoring"] -= self.parts["rollout"] - before
        self.tokens["trained"] += int(found["completion_mask"].sum())
        return found


class Told(TrainerCallback):
    """Tells after each optimizer step what the trainer noted."""

    def __init__(self, after: After) -> None:
        self._after = after
        self.trainer: Timed | None = None

    def on_step_begin(self, *arguments: Any, **more: Any) -> None:
        assert self.trainer is not None
        for noted in (self.trainer.parts, self.trainer.tokens):
            noted.update(dict.fromkeys(noted, 0))

    def on_step_end(self, *arguments: Any, **more: Any) -> None:
        assert self.trainer is not None
        self._after({**self.trainer.tokens, "parts": dict(self.trainer.parts)})


def build(setup: Setup) -> tuple[Repeat, Reply]:
    """One repetition is one step of the trainer, with the rollouts that it samples for it."""
    model = AutoModelForCausalLM.from_pretrained(setup["model"], dtype=torch.float32, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(setup["model"], local_files_only=True)
    texts = prompts(tokenizer, setup)
    logprobs = scored(model, setup["scored"])
    tokenizer.add_special_tokens({"eos_token": "<never said>"})
    model.generation_config.eos_token_id = None

    def train(after: After) -> None:
        with tempfile.TemporaryDirectory() as output:
            told = Told(after)
            told.trainer = Timed(
                model,
                [reward],
                settings(setup, output),
                train_dataset=Dataset.from_dict({"prompt": texts}),
                processing_class=tokenizer,
                callbacks=[told],
            )
            told.trainer.train()

    return Stepwise(train).repeat, {"threads": torch.get_num_threads(), "logprobs": logprobs}


def prompts(tokenizer: Any, setup: Setup) -> list[str]:
    """The texts, with the beginning-of-sequence token spelled out where the tokenizer does not add it by itself.

    Raises ValueError where that does not make prompts of the length that they are to have.
    """
    for start in ("", tokenizer.bos_token or ""):
        texts = [start + text for text in setup["texts"]]
        if {len(ids) for ids in tokenizer(texts)["input_ids"]} == {setup["prompt_tokens"]}:
            return texts
    raise ValueError(f"these texts are not {setup['prompt_tokens']} tokens each to this tokenizer")


def settings(setup: Setup, output: str) -> GRPOConfig:
    """See above; the loss is ours: group z-scores, token ratios and a mean over tokens, which is what `dapo` names."""
    rollouts = setup["prompts"] * setup["group_size"]
    return GRPOConfig(
        output_dir=output,
        max_steps=setup["steps"],
        per_device_train_batch_size=setup["micro_batch"],
        gradient_accumulation_steps=rollouts // setup["micro_batch"],
        generation_batch_size=rollouts,
        num_generations=setup["group_size"],
        max_completion_length=setup["new_tokens"],
        temperature=1.0,
        beta=0.0,
        num_iterations=1,
        loss_type="dapo",
        importance_sampling_level="token",
        scale_rewards="group",
        learning_rate=setup["learning_rate"],
        lr_scheduler_type="constant",
        weight_decay=setup["weight_decay"],
        max_grad_norm=setup["clip_norm"],
        optim="adamw_torch_fused",
        gradient_checkpointing=False,
        use_cpu=True,
        bf16=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        torch_compile=setup["torch_compile"],
    )


def reward(completion_ids: list[list[int]], **more: Any) -> list[float]:
    return [cheap_reward(ids) for ids in completion_ids]


def scored(model: Any, ids: list[int]) -> list[float]:
    """The log-probability of each token of a sequence but the first."""
    row = torch.tensor([ids])
    with torch.no_grad():
        logits = model(input_ids=row, use_cache=False).logits[0, :-1]
    found: list[float] = logits.log_softmax(-1).gather(1, row[0, 1:, None])[:, 0].tolist()
    return found


if __name__ == "__main__":
    serve(build)
