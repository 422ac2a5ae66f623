"""The peers' sides: the same work written plainly with transformers and torch, as their users write it."""

import time
from collections.abc import Mapping
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from benchmarks.workers import Repeat, Reply, serve

Setup = Mapping[str, Any]


def _load(setup: Setup) -> Any:
    return AutoModelForCausalLM.from_pretrained(setup["model"], dtype=torch.float32, local_files_only=True)


def generation(setup: Setup) -> Repeat:
    """`transformers.generate` on one left-padded batch, greedy, with a cache.

    No end-of-sequence id: every sequence gets all its tokens and none is suppressed, which a minimum length would do.
    """
    model = _load(setup).eval()
    prompts, new_tokens = setup["prompts"], setup["new_tokens"]
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0

    def repeat(index: int) -> Reply:
        started = time.perf_counter()
        output = model.generate(
            input_ids=ids, attention_mask=mask, do_sample=False, use_cache=True, max_new_tokens=new_tokens
        )
        seconds = time.perf_counter() - started
        return {"seconds": seconds, "ids": output[:, longest:].tolist()}

    return repeat


def build(setup: Setup) -> tuple[Repeat, Reply]:
    return generation(setup), {"threads": torch.get_num_threads()}


if __name__ == "__main__":
    serve(build)
