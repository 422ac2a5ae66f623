"""TRL's sides of the fine-tuning benchmarks: its SFTTrainer as it is, on traces that are tokenised already.

Settings, those documented to be fast and sound on a CPU: the `nll` loss (the head sees only tokens with loss, in
tiles), fused AdamW, no gradient checkpointing unless memory is what is compared, no progress bar, no reports. How a
batch is divided is in the setup: `per_device` traces at a time, padded to the longest or, with `padding_free`, behind
one another in one row (transformers keeps them apart by their positions, which equal losses confirm).
"""

import queue
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer

from benchmarks.workers import Repeat, Reply, peak_rss_gb, reset_peak_rss, serve

Setup = Mapping[str, Any]


def make_trainer(setup: Setup, output: str, callback: TrainerCallback, **more: Any) -> SFTTrainer:
    """A trainer that takes step after step in their order unless `more` says otherwise.

    Within a step neighbours are of similar length, so that little is padded where the step is divided.
    """
    model = AutoModelForCausalLM.from_pretrained(setup["model"], dtype=torch.float32, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(setup["tokenizer"], local_files_only=True)
    traces = [trace for step in setup["steps"] for trace in sorted(step, key=lambda trace: len(trace[1]))]
    rows = [{"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]} for prompt, ids in traces]
    settings = {
        "output_dir": output,
        "per_device_train_batch_size": setup["per_device"],
        "gradient_accumulation_steps": setup["batch"] // setup["per_device"],
        "padding_free": setup["padding_free"],
        "max_length": None,
        "learning_rate": setup["learning_rate"],
        "lr_scheduler_type": "constant",
        "weight_decay": setup["weight_decay"],
        "max_grad_norm": setup["clip_norm"],
        "optim": "adamw_torch_fused",
        "loss_type": "nll",
        "gradient_checkpointing": setup.get("remat") == "full",
        "train_sampling_strategy": "sequential",
        "torch_compile": setup.get("compile", False),
        "use_cpu": True,
        "bf16": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    lora = setup.get("lora")
    adapter = None
    if lora is not None:
        adapter = LoraConfig(
            r=lora["rank"], lora_alpha=lora["alpha"], target_modules=lora["targets"], task_type="CAUSAL_LM"
        )
    return SFTTrainer(
        model,
        SFTConfig(**{**settings, **more}),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=adapter,
        callbacks=[callback],
    )


def loss_tokens(traces: Sequence[Any]) -> int:
    return sum(len(ids) - prompt for prompt, ids in traces)


class Turns(TrainerCallback):
    """Lets the trainer, which runs in a thread, make one optimizer step whenever it is told to go."""

    def __init__(self) -> None:
        self.go: queue.Queue[None] = queue.Queue()
        self.done: queue.Queue[Reply | BaseException] = queue.Queue()
        self.started = self.seconds = 0.0

    def on_train_begin(self, *arguments: Any, **more: Any) -> None:
        self.done.put({})

    def on_step_begin(self, *arguments: Any, **more: Any) -> None:
        self.go.get()
        self.started = time.perf_counter()

    def on_step_end(self, *arguments: Any, **more: Any) -> None:
        self.seconds = time.perf_counter() - self.started

    def on_log(self, *arguments: Any, logs: Mapping[str, Any], **more: Any) -> None:
        if "loss" in logs:
            self.done.put({"seconds": self.seconds, "loss": float(logs["loss"])})

    def answer(self) -> Reply:
        """What the trainer says next. Raises what it raised."""
        reply = self.done.get()
        if isinstance(reply, BaseException):
            raise reply
        return reply


def training(setup: Setup) -> Repeat:
    """One optimizer step per repetition, from `on_step_begin` to `on_step_end`; its data is there already."""
    steps = setup["steps"]
    turns = Turns()

    def train() -> None:
        try:
            with tempfile.TemporaryDirectory() as output:
                make_trainer(setup, output, turns, max_steps=len(steps)).train()
        except BaseException as error:  # it is raised where the step is waited for
            turns.done.put(error)

    threading.Thread(target=train, daemon=True).start()
    turns.answer()  # it is ready to begin

    def repeat(index: int) -> Reply:
        turns.go.put(None)
        return {**turns.answer(), "loss_tokens": loss_tokens(steps[index])}

    return repeat


class Epochs(TrainerCallback):
    """When each epoch began and ended, data loading included, and the losses of all steps."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.losses: list[float] = []
        self.started = 0.0

    def on_epoch_begin(self, *arguments: Any, **more: Any) -> None:
        self.started = time.perf_counter()

    def on_epoch_end(self, *arguments: Any, **more: Any) -> None:
        self.seconds.append(time.perf_counter() - self.started)

    def on_log(self, *arguments: Any, logs: Mapping[str, Any], **more: Any) -> None:
        if "loss" in logs:
            self.losses.append(float(logs["loss"]))


def epoch(setup: Setup) -> Repeat:
    """One repetition is a whole training of two epochs: the first warms up and has the loss, the second the seconds."""
    (traces,) = setup["steps"]

    def repeat(index: int) -> Reply:
        epochs = Epochs()
        with tempfile.TemporaryDirectory() as output:
            more = {"num_train_epochs": 2, "train_sampling_strategy": "group_by_length", "seed": index}
            make_trainer(setup, output, epochs, **more).train()
        half = len(epochs.losses) // 2
        return {
            "seconds": epochs.seconds[1],
            "loss": sum(epochs.losses[:half]) / half,
            "loss_tokens": loss_tokens(traces),
        }

    return repeat


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


def memory(setup: Setup) -> Repeat:
    """One repetition is a whole training of a few steps; the peak of each counts from its beginning."""
    steps = setup["steps"]

    def repeat(index: int) -> Reply:
        started = time.perf_counter()
        peaks = Peaks()
        with tempfile.TemporaryDirectory() as output:
            make_trainer(setup, output, peaks, max_steps=len(steps)).train()
        return {
            "seconds": time.perf_counter() - started,
            "losses": peaks.losses,
            "peak_rss_gb_of_steps": peaks.peaks,
            "loss_tokens": loss_tokens(steps[0]),
        }

    return repeat


def build(setup: Setup) -> tuple[Repeat, Reply]:
    sides = {"training": training, "epoch": epoch, "memory": memory}
    return sides[setup["side"]](setup), {"threads": torch.get_num_threads()}


if __name__ == "__main__":
    serve(build)
