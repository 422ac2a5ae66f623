"""Tunix's sides of the fine-tuning benchmarks: its PeftTrainer with all parameters of its Gemma 3, in fp32.

Traces are padded to the longest of the step (Tunix packs none in SFT) and go through its jitted step `per_device` at a
time, its own accumulation putting the step together: it makes logits of every token, which of a whole batch can be more
than a machine has room for. Its default loss averages over a micro-batch; the one here has the same arithmetic over the
number of tokens of the whole step, through `with_loss_fn`.
"""

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tunix.models.gemma3.model import Gemma3, RematConfig
from tunix.sft.peft_trainer import PeftTrainer, TrainingConfig
from tunix.sft.utils import build_positions_from_mask, make_causal_attn_mask

from benchmarks.tunix_model import load
from benchmarks.workers import Repeat, Reply, peaks_of_steps, serve

Setup = Mapping[str, Any]
MESH = jax.make_mesh((1, 1), ("fsdp", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)


@flax.struct.dataclass(frozen=True)
class MicroBatch:
    """Ids and masks [B, T] (not padding; with loss); `norm` is the step's tokens with loss over its micro-batches."""

    input_tokens: np.ndarray
    valid: np.ndarray
    with_loss: np.ndarray
    norm: np.ndarray


class Trainer(PeftTrainer):
    """Keeps the losses of all micro-batches."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.losses: list[jax.Array] = []
        self.is_managed_externally = True  # `train` may be called again and again

    def _post_process_train_step(self, aux: jax.Array) -> None:
        self.losses.append(aux)


def model_input(batch: MicroBatch) -> dict[str, jax.Array]:
    return {
        "input_tokens": batch.input_tokens,
        "with_loss": batch.with_loss,
        "positions": build_positions_from_mask(batch.valid),
        "attention_mask": make_causal_attn_mask(batch.valid),
        "norm": batch.norm,
    }


def loss(
    model: Gemma3,
    input_tokens: jax.Array,
    with_loss: jax.Array,
    positions: jax.Array,
    attention_mask: jax.Array,
    norm: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """That of PeftTrainer, over `norm` instead of the tokens with loss of this micro-batch."""
    logits, _ = model(input_tokens, positions, None, attention_mask)
    one_hot = jax.nn.one_hot(input_tokens[:, 1:], logits.shape[-1])
    one_hot = one_hot * with_loss[:, 1:].astype(one_hot.dtype)[..., None]
    value = -jnp.sum(jax.nn.log_softmax(logits[:, :-1]) * one_hot) / norm
    return value, value


def make_trainer(setup: Setup) -> Trainer:
    optimizer = optax.chain(
        optax.clip_by_global_norm(setup["clip_norm"]),
        optax.adamw(setup["learning_rate"], weight_decay=setup["weight_decay"]),
    )
    parts = setup["batch"] // setup["per_device"]
    config = TrainingConfig(eval_every_n_steps=10**6, gradient_accumulation_steps=None if parts == 1 else parts)
    with MESH:
        remat = RematConfig.DECODER if setup.get("remat") == "full" else RematConfig.NONE
        _, model = load(Path(setup["model"]), MESH, remat_config=remat)
        trainer = Trainer(model, optimizer, config)
    return trainer.with_loss_fn(loss, has_aux=True).with_gen_model_input_fn(model_input)


def micro_batches(setup: Setup, traces: Sequence[Any], length: int) -> Iterator[MicroBatch]:
    """Those of one step, padded on the right to `length`."""
    size = setup["per_device"]
    ids, valid, with_loss = (np.zeros((len(traces), length), dtype) for dtype in (np.int32, bool, bool))
    for row, (prompt, tokens) in enumerate(traces):
        ids[row, : len(tokens)] = tokens
        valid[row, : len(tokens)] = True
        with_loss[row, prompt : len(tokens)] = True
    norm = np.float32(with_loss.sum() / (len(traces) // size))
    for start in range(0, len(traces), size):
        part = slice(start, start + size)
        yield MicroBatch(ids[part], valid[part], with_loss[part], norm)


def longest(traces: Sequence[Any]) -> int:
    return max(len(ids) for _, ids in traces)


def train(trainer: Trainer, batches: Iterator[MicroBatch], traces: Sequence[Any]) -> Reply:
    """Trains on the traces' micro-batches: seconds until the parameters are there, the mean loss, tokens with loss."""
    trainer.losses.clear()
    started = time.perf_counter()
    with MESH:
        trainer.train(batches)
    jax.block_until_ready(nnx.state(trainer.model))
    seconds = time.perf_counter() - started
    return {
        "seconds": seconds,
        "loss": float(np.mean([float(value) for value in trainer.losses])),
        "loss_tokens": sum(len(ids) - prompt for prompt, ids in traces),
    }


def training(setup: Setup) -> Repeat:
    """One optimizer step per repetition."""
    trainer = make_trainer(setup)

    def repeat(index: int) -> Reply:
        traces = setup["steps"][index]
        return train(trainer, iter(list(micro_batches(setup, traces, longest(traces)))), traces)

    return repeat


def epoch(setup: Setup) -> Repeat:
    """One repetition is one epoch, in an order of its own; the one before the first compiles and warms up."""
    trainer = make_trainer(setup)
    (traces,) = setup["steps"]
    batch = setup["batch"]

    def batches(seed: int) -> Iterator[MicroBatch]:
        order = np.random.default_rng(seed).permutation(len(traces))
        for start in range(0, len(traces), batch):
            chosen = [traces[index] for index in order[start : start + batch]]
            yield from micro_batches(setup, chosen, longest(traces))

    return lambda index: train(trainer, batches(index), traces)


def memory(setup: Setup) -> Repeat:
    """One repetition is a few optimizer steps; the peak of each counts from its beginning."""
    step = training(setup)

    return lambda index: peaks_of_steps(step, len(setup["steps"]))


def build(setup: Setup) -> tuple[Repeat, Reply]:
    sides = {"training": training, "epoch": epoch, "memory": memory}
    return sides[setup["side"]](setup), {"threads": os.cpu_count()}


if __name__ == "__main__":
    serve(build)
