"""A peer's side on a GPU: TRL's trainer as it is, on rows that are tokenised already."""

import tempfile
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer

from benchmarks.gpu_torch import CUDA, device_memory, facts, load, synchronize
from benchmarks.workers import Repeat, Reply, serve


class Steps(TrainerCallback):
    """Times all steps but the first, together; keeps what is logged."""

    def __init__(self) -> None:
        self.started = self.ended = 0.0
        self.losses: list[float] = []
        self.gradient_norms: list[float] = []

    def on_step_begin(self, arguments: Any, state: Any, control: Any, **more: Any) -> None:
        if state.global_step == 1:
            synchronize()
            self.started = time.perf_counter()

    def on_step_end(self, arguments: Any, state: Any, control: Any, **more: Any) -> None:
        if state.global_step == state.max_steps:
            synchronize()
            self.ended = time.perf_counter()

    def on_log(self, *arguments: Any, logs: Mapping[str, Any], **more: Any) -> None:
        if "loss" in logs:
            self.losses.append(float(logs["loss"]))
            self.gradient_norms.append(float(logs["grad_norm"]))


def build(setup: Mapping[str, Any]) -> tuple[Repeat, Reply]:
    """A repetition is a training: a first step that is not timed, for the optimizer's state is made in it, and others.

    What its documentation says is fast: bf16 by autocast over fp32 masters, the `nll` loss with the head in tiles,
    SDPA, fused AdamW. `micro_rows` and `checkpointing` as in `gpu_torch`. Only the warm-up logs every step, which waits
    for the GPU.
    """
    model = load(setup, torch.float32)
    ids = np.load(setup["ids"])
    _, steps, rows, length = ids.shape
    tokenizer = AutoTokenizer.from_pretrained(setup["model"], local_files_only=True)

    def repeat(index: int) -> Reply:
        each = ids[index].reshape(-1, length).tolist()
        # The first token of a row is predicted by nothing: so it is not counted among those with loss.
        data = Dataset.from_list([{"input_ids": row, "labels": [-100, *row[1:]]} for row in each])
        timer = Steps()
        with tempfile.TemporaryDirectory() as output:
            settings = SFTConfig(
                output_dir=output,
                per_device_train_batch_size=setup["micro_rows"],
                gradient_accumulation_steps=rows // setup["micro_rows"],
                max_steps=steps,
                max_length=length,
                learning_rate=setup["learning_rate"],
                lr_scheduler_type="constant",
                weight_decay=setup["weight_decay"],
                max_grad_norm=setup["clip_norm"],
                optim="adamw_torch_fused",
                loss_type="nll",
                gradient_checkpointing=setup["checkpointing"],
                gradient_checkpointing_kwargs={"use_reentrant": False},
                train_sampling_strategy="sequential",
                use_cpu=not CUDA,
                bf16=True,
                logging_steps=1 if index == 0 else 10 * steps,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
            )
            SFTTrainer(model, settings, train_dataset=data, processing_class=tokenizer, callbacks=[timer]).train()
        seconds = (timer.ended - timer.started) / (steps - 1)
        figures = {"losses": timer.losses, "gradient_norms": timer.gradient_norms}
        return {"seconds": seconds, **figures, **device_memory()}

    return repeat, facts()


if __name__ == "__main__":
    serve(build)
