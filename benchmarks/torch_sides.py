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
def training(setup: Setup) -> Repeat:
    """One optimizer step per repetition.

    `head` "dense" scores every token and ignores those without loss; "loss_tokens" scores the tokens with loss only.
    AdamW is torch's fused one (the fastest on CPU), norms without weight decay as on our side.
    """
    model = _load(setup).train()
    decayed = [weight for name, weight in model.named_parameters() if "norm" not in name]
    others = [weight for name, weight in model.named_parameters() if "norm" in name]
    groups = [
        {"params": decayed, "weight_decay": setup["weight_decay"]},
        {"params": others, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=setup["learning_rate"], fused=True)
    first = first_loss_position(setup["length"])

    def dense(ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        logits = model(input_ids=ids, use_cache=False).logits
        return torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100
        )

    def loss_tokens(ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
        targets = labels[:, 1:]
        logits = model.lm_head(hidden[:, :-1][targets != -100])
        return torch.nn.functional.cross_entropy(logits, targets[targets != -100])

    loss_of = {"dense": dense, "loss_tokens": loss_tokens}[setup["head"]]

    def repeat(index: int) -> Reply:
        array = sft_ids(model.config.vocab_size, setup["batch"], setup["length"], index)
        started = time.perf_counter()
        ids = torch.from_numpy(array).long()
        labels = ids.clone()
        labels[:, :first] = -100
        optimizer.zero_grad()
        loss = loss_of(ids, labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), setup["clip_norm"])
        optimizer.step()
        seconds = time.perf_counter() - started
        return {"seconds": seconds, "loss": loss.item(), "loss_tokens": int((labels[:, 1:] != -100).sum())}

    return repeat


def build(setup: Setup) -> tuple[Repeat, Reply]:
    return generation(setup), {"threads": torch.get_num_threads()}
    return {"training": training}[setup["side"]](setup), {"threads": torch.get_num_threads()}


if __name__ == "__main__":
    serve(build)
