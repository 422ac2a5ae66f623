"""A peer's side on a GPU: the training step with transformers + torch, as their users write it by hand."""

import time
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoModelForCausalLM

from benchmarks.workers import Repeat, Reply, serve

Setup = Mapping[str, Any]
CUDA = torch.cuda.is_available()


def training(setup: Setup) -> Repeat:
    """A repetition is a first step that is not timed, and others that are.

    `precision` "autocast": parameters, gradients and optimizer state in fp32, products in bf16 by autocast, which is
    what our side does; "bfloat16": all of them in bf16. `micro_rows`: how many rows go through the model at a time.
    `checkpointing` recomputes every layer in the backward pass. The logits are those of transformers' own loss. Rows
    are whole segments, so that attention needs no mask and its flash kernels apply; nothing but these is allowed.
    AdamW is torch's fused one, norms without weight decay as on our side.
    """
    device = torch.device("cuda" if CUDA else "cpu")
    autocast = setup["precision"] == "autocast"
    model = load(setup, torch.float32 if autocast else torch.bfloat16).to(device)
    if setup["checkpointing"]:
        model.activation_checkpointing_enable()
    decayed = [weight for name, weight in model.named_parameters() if "norm" not in name]
    others = [weight for name, weight in model.named_parameters() if "norm" in name]
    groups = [{"params": decayed, "weight_decay": setup["weight_decay"]}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=setup["learning_rate"], fused=True)
    if setup["compile"]:
        model.compile()
    ids = np.load(setup["ids"])

    def step(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=device)
        for micro in rows.split(setup["micro_rows"]):
            with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
                loss = model(input_ids=micro, labels=micro, use_cache=False).loss * (len(micro) / len(rows))
            loss.backward()
            total += loss.detach()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), setup["clip_norm"])
        optimizer.step()
        return total, norm

    def repeat(index: int) -> Reply:
        batches = [torch.from_numpy(each).long().to(device) for each in ids[index]]
        with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION]) if CUDA else nullcontext():
            found = [step(batches[0])]
            synchronize()
            started = time.perf_counter()
            found += [step(batch) for batch in batches[1:]]
            synchronize()
        seconds = (time.perf_counter() - started) / (len(batches) - 1)
        losses, norms = ([float(value) for value in values] for values in zip(*found, strict=True))
        return {"seconds": seconds, "losses": losses, "gradient_norms": norms, **device_memory()}

    return repeat


def load(setup: Setup, dtype: torch.dtype) -> Any:
    directory = setup["model"]
    return AutoModelForCausalLM.from_pretrained(
        directory, dtype=dtype, attn_implementation="sdpa", local_files_only=True
    ).train()


def synchronize() -> None:
    if CUDA:
        torch.cuda.synchronize()


def device_memory() -> Reply:
    """The most that tensors had in use on the device so far, in 10⁹ bytes."""
    return {"peak_device_gb": torch.cuda.max_memory_allocated() / 1e9 if CUDA else 0.0}


def facts() -> Reply:
    return {"threads": torch.get_num_threads(), "platform": "gpu" if CUDA else "cpu"}


def build(setup: Setup) -> tuple[Repeat, Reply]:
    return training(setup), facts()


if __name__ == "__main__":
    serve(build)
