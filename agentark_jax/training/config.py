"""How parameters are fitted to examples."""

import math
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from typing import Any, Literal, get_args

from agentark_jax.errors import UsageError, require
from agentark_jax.models.config import Lora, Remat

Schedule = Literal["cosine", "linear", "constant"]
ComputeDtype = Literal["float32", "bfloat16"]

# They decide what is kept and reported, and where it is computed, not what: a resumed run may change them.
BOOKKEEPING = (
    *("checkpoint_every", "keep", "keep_every", "keep_best", "checkpoint_async"),
    *("mesh", "profile_steps", "wandb"),
)


@dataclass(frozen=True)
class MeshConfig:
    """How the devices are divided; the product of the three is their number. One of them may be -1: the rest.

    Args:
        data: groups of devices, each with a copy of the parameters and with rows of its own.
        fsdp: devices of a group that divide its parameters, its optimizer state and its rows among them.
        tensor: devices that divide heads, inner MLP sizes and vocabulary, and work on the same rows.
    """

    data: int = 1
    fsdp: int = -1
    tensor: int = 1

    def __post_init__(self) -> None:
        for key, size in asdict(self).items():
            if size != -1 and size < 1:
                raise UsageError(f"mesh.{key}: {size} is not possible; it must be at least 1, or -1 for the rest")
        if list(asdict(self).values()).count(-1) > 1:
            raise UsageError("mesh: only one of data, fsdp and tensor can be -1, the rest of the devices")

    def sizes(self, devices: int) -> dict[str, int]:
        """The size of every mesh axis. Raises UsageError when they do not make up `devices`."""
        wanted = asdict(self)
        given = math.prod(size for size in wanted.values() if size != -1)
        sizes = {axis: devices // given if size == -1 else size for axis, size in wanted.items()}
        if math.prod(sizes.values()) != devices:
            asked = " × ".join(f"{axis} {size}" for axis, size in wanted.items())
            raise UsageError(
                f"mesh: {asked} does not make up the {devices} devices that are here; set data, fsdp and tensor so "
                f"that their product is {devices}, one of them -1 for the rest"
            )
        return sizes


@dataclass(frozen=True)
class FitConfig:
    """One fit: AdamW over packed rows. Invalid values raise UsageError.

    Args:
        learning_rate: peak learning rate.
        schedule: how the learning rate goes on after the warmup; cosine and linear end at zero.
        warmup_fraction: share of the steps over which the learning rate rises linearly from zero.
        weight_decay: decoupled weight decay of AdamW; never applied to norms and biases.
        clip_norm: the gradient of the trained parameters is scaled down to this global norm.
        epochs: passes over the examples.
        steps: stop after this many optimizer steps at the latest; null for whole epochs.
        rows: packed rows per optimizer step.
        row_length: tokens per row; longer examples are an error.
        accumulation: micro-batches that the rows of a step are split into, to save memory; changes no result.
        freeze: parameters that stay as they are: top-level names or dotted paths, such as [embedding].
        last_layers: train only so many of the last layers, and the heads where there are any; null for everything.
        lora: train adapters of this rank, alpha and targets, and nothing else; the result is the model with them merged
            into its weights. Null trains the weights themselves.
        coefficients: factor of each named loss term; a term that is not named has 1.
        checkpoint_every: steps between checkpoints; the last step is always saved.
        keep: how many of the newest checkpoints stay on disk.
        keep_every: also keep the checkpoints of all multiples of this number of steps; null for none.
        keep_best: also keep a checkpoint of the step with the lowest validation loss; needs eval_every.
        checkpoint_async: write checkpoints while training goes on; needs memory for a second copy of the state.
        eval_every: steps between evaluations on the validation set; null for none.
        patience: stop after this many evaluations in a row without improvement; null for never.
        min_improvement: by how much the validation loss must fall below its best to count as an improvement.
        remat: what the backward pass recomputes instead of keeping it: none; products, all but the products with
            weights and the results of attention kernels (on CPU faster than none); outputs, all but the outputs of
            attention and MLPs; or full, all but the inputs of the layers.
        compute_dtype: in what the network computes: float32 or bfloat16. Parameters, optimizer state, gradients, norms,
            softmax and loss are float32 either way.
        profile_steps: the first and the last step of which a profiler trace is written to `profile/` (TensorBoard,
            XProf or Perfetto show it); empty for none.
        mesh: how the devices are divided; changes no result beyond the order of floating-point sums.
        wandb: the Weights & Biases project that gets the metrics too (extra `wandb`); null for none.
    """

    learning_rate: float = 3e-5
    schedule: Schedule = "cosine"
    warmup_fraction: float = 0.05
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    epochs: int = 1
    steps: int | None = None
    rows: int = 4
    row_length: int = 256
    accumulation: int = 1
    freeze: list[str] = field(default_factory=list)
    last_layers: int | None = None
    lora: Lora | None = None
    coefficients: dict[str, float] = field(default_factory=dict)
    checkpoint_every: int = 50
    keep: int = 2
    keep_every: int | None = None
    keep_best: bool = False
    checkpoint_async: bool = False
    eval_every: int | None = None
    patience: int | None = None
    min_improvement: float = 0.0
    remat: Remat = "products"
    compute_dtype: ComputeDtype = "float32"
    profile_steps: list[int] = field(default_factory=list)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    wandb: str | None = None

    def __post_init__(self) -> None:
        for key in ("epochs", "rows", "row_length", "accumulation", "checkpoint_every", "keep"):
            require(getattr(self, key) >= 1, key, getattr(self, key), "at least 1")
        for key in ("steps", "eval_every", "patience", "keep_every", "last_layers"):
            value = getattr(self, key)
            require(value is None or value >= 1, key, value, "at least 1, or null")
        for key in ("learning_rate", "clip_norm"):
            value = getattr(self, key)
            require(value > 0 and math.isfinite(value), key, value, "a positive number")
        for key in ("weight_decay", "min_improvement"):
            value = getattr(self, key)
            require(value >= 0 and math.isfinite(value), key, value, "zero or a positive number")
        for term, value in self.coefficients.items():
            require(math.isfinite(value), f"coefficients.{term}", value, "a finite number")
        require(0 <= self.warmup_fraction < 1, "warmup_fraction", self.warmup_fraction, "at least 0 and below 1")
        for key, choices in (("schedule", Schedule), ("remat", Remat), ("compute_dtype", ComputeDtype)):
            value, allowed = getattr(self, key), get_args(choices)
            require(value in allowed, key, value, f"one of {', '.join(allowed)}")
        require(
            self.rows % self.accumulation == 0, "accumulation", self.accumulation, f"a divisor of rows ({self.rows})"
        )
        require(
            self.patience is None or self.eval_every is not None,
            "patience",
            self.patience,
            "null when eval_every is null; set eval_every to stop early",
        )
        require(
            self.lora is None or not self.freeze,
            "freeze",
            self.freeze,
            "empty beside lora, which freezes everything but its adapters",
        )
        require(
            self.lora is None or self.last_layers is None,
            "last_layers",
            self.last_layers,
            "null beside lora, which freezes everything but its adapters",
        )
        profiled = self.profile_steps
        require(
            not profiled or (len(profiled) == 2 and 1 <= profiled[0] <= profiled[1]),
            "profile_steps",
            profiled,
            "empty, or a first and a last step such as [10, 12]",
        )
        require(
            not self.keep_best or self.eval_every is not None,
            "keep_best",
            self.keep_best,
            "false when eval_every is null; set eval_every to know which is best",
        )
        require(
            self.wandb is None or find_spec("wandb") is not None,
            "wandb",
            self.wandb,
            "null where the package is not installed; get it with pip install 'agentark-jax[wandb]'",
        )

    def fingerprint(self) -> dict[str, Any]:
        """What of this config the fitted parameters depend on. Of keys that came later it says nothing while they are
        null, so that fits from before there were any stay up to date.
        """
        unset = [key for key in ("lora", "last_layers") if getattr(self, key) is None]
        return {key: value for key, value in asdict(self).items() if key not in (*BOOKKEEPING, *unset)}
