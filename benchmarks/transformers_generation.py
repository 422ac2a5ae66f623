"""The sides of generation and of debates in transformers and torch, as their users write them."""

import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.workers import Repeat, Reply, serve

Setup = Mapping[str, Any]


def generation(setup: Setup) -> Repeat:
    """`transformers.generate` on one left-padded batch, with a cache; several samples of a prompt by its own option.

    No end-of-sequence id: every sequence gets all its tokens and none is suppressed, which a minimum length would do.
    Where sequences want different numbers of tokens the batch runs until the longest has its own. Samples are drawn
    from the whole distribution at temperature 1, as on our side.
    """
    model = load(setup)
    prompts, wanted, samples = setup["prompts"], setup["new_tokens"], setup["samples"]
    ids, mask = left_padded(prompts)

    def generate(**drawing: Any) -> list[list[int]]:
        output = model.generate(
            input_ids=ids, attention_mask=mask, use_cache=True, max_new_tokens=max(wanted), **drawing
        )
        return [row.tolist() for row in output[:, ids.shape[1] :]]

    def cut(rows: list[list[int]], lengths: list[int]) -> list[list[int]]:
        return [row[:length] for row, length in zip(rows, lengths, strict=True)]

    greedy = partial(generate, do_sample=False)
    timed = greedy
    if samples > 1:
        timed = partial(generate, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, num_return_sequences=samples)

    def repeat(index: int) -> Reply:
        torch.manual_seed(0)
        started = time.perf_counter()
        rows = cut(timed(), wanted)
        seconds = time.perf_counter() - started
        reply: Reply = {"seconds": seconds, "counts": [len(row) for row in rows]}
        if index == 0:
            reply["greedy"] = rows if samples == 1 else cut(greedy(), wanted[::samples])
        return reply

    return repeat


def left_padded(prompts: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and attention mask of one batch."""
    longest = max(map(len, prompts))
    rows = [[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(rows), torch.tensor(mask)


def load(setup: Setup) -> Any:
    """The model in fp32; its sequences end at their number of tokens alone."""
    model = AutoModelForCausalLM.from_pretrained(setup["model"], dtype=torch.float32, local_files_only=True).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def debate(setup: Setup) -> Repeat:
    """Every round of all debates as one left-padded batch, then its texts; the prompts are those of our side.

    A batch over all questions and agents is how this side is fastest: it has no cache of prompts, and agents who see
    the same answers still have prompts of their own.
    """
    model, tokenizer = load(setup), AutoTokenizer.from_pretrained(setup["model"], local_files_only=True)
    rounds = [left_padded(prompts) for prompts in setup["rounds"]]
    sampled = {"do_sample": True, "temperature": setup["temperature"], "top_k": 0, "top_p": 1.0}

    def generate(ids: torch.Tensor, mask: torch.Tensor, drawing: Mapping[str, Any]) -> torch.Tensor:
        output = model.generate(
            input_ids=ids, attention_mask=mask, use_cache=True, max_new_tokens=setup["new_tokens"], **drawing
        )
        return output[:, ids.shape[1] :]

    def repeat(index: int) -> Reply:
        torch.manual_seed(0)
        started = time.perf_counter()
        texts, tokens = [], 0
        for ids, mask in rounds:
            found = generate(ids, mask, sampled)
            texts += tokenizer.batch_decode(found, skip_special_tokens=True)
            tokens += found.numel()
        seconds = time.perf_counter() - started
        reply: Reply = {"seconds": seconds, "calls": len(texts), "new_tokens": tokens}
        reply["prompt_tokens"] = int(sum(mask.sum() for _, mask in rounds))
        if index == 0:
            first = left_padded(setup["rounds"][0][:1])
            reply["greedy"] = generate(*first, {"do_sample": False}).tolist()
        return reply

    return repeat


def build(setup: Setup) -> tuple[Repeat, Reply]:
    sides = {"generation": generation, "debate": debate}
    return sides[setup["side"]](setup), {"threads": torch.get_num_threads()}


if __name__ == "__main__":
    serve(build)
