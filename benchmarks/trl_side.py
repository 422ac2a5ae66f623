"""TRL's side of the memory comparison: its trainer as it is, on rows that are tokenised already."""

import tempfile
import time
from collections.abc import Mapping
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer

from benchmarks.inputs import first_loss_position, sft_ids
from benchmarks.sft_memory import reset_peak_rss
from benchmarks.workers import Repeat, Reply, peak_rss_gb, serve


class Peaks(TrainerCallback):
    """Peak memory and loss of every step."""

    def __init__(self) -> None:
        self.peaks: list[float] = []
        self.losses: list[float] = []

    def on_step_begin(self, *arguments: Any, **more: Any) -> None:
        reset_peak_rss()

    def on_step_end(self, *arguments: Any, **more: Any) -> None:
        self.peaks.append(peak_rss_gb())

    def on_log(self, *arguments: Any, logs: Mapping[str, Any], **more: Any) -> None:
        if "loss" in logs:
            self.losses.append(float(logs["loss"]))


def build(setup: Mapping[str, Any]) -> tuple[Repeat, Reply]:
    """One repetition is a whole training of `steps` steps."""
    model = AutoModelForCausalLM.from_pretrained(setup["model"], dtype=torch.float32, local_files_only=True)
    batch, length, steps = setup["batch"], setup["length"], setup["steps"]
    ids = [row for step in range(steps) for row in sft_ids(model.config.vocab_size, batch, length, step).tolist()]
    first = first_loss_position(length)
    rows = [{"input_ids": row, "labels": [-100] * first + row[first:]} for row in ids]
    peaks = Peaks()

    def repeat(index: int) -> Reply:
        started = time.perf_counter()
        with tempfile.TemporaryDirectory() as output:
            settings = SFTConfig(
                output_dir=output,
                per_device_train_batch_size=batch,
                max_steps=steps,
                max_length=length,
                learning_rate=setup["learning_rate"],
                lr_scheduler_type="constant",
                weight_decay=setup["weight_decay"],
                max_grad_norm=setup["clip_norm"],
                optim="adamw_torch_fused",
                loss_type="nll",
                gradient_checkpointing=True,
                train_sampling_strategy="sequential",
                use_cpu=True,
                bf16=False,
                logging_steps=1,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
            )
            tokenizer = AutoTokenizer.from_pretrained(setup["model"], local_files_only=True)
            SFTTrainer(
                model, settings, train_dataset=Dataset.from_list(rows), processing_class=tokenizer, callbacks=[peaks]
            ).train()
        return {
            "seconds": time.perf_counter() - started,
            "losses": peaks.losses,
            "peak_rss_gb_of_steps": peaks.peaks,
            "loss_tokens": batch * (length - first),
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
        }

    return repeat, {"threads": torch.get_num_threads()}


if __name__ == "__main__":
    serve(build)
