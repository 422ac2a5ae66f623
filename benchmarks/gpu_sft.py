"""Full fine-tuning on one GPU in bfloat16 with fp32 masters: ours against transformers + torch and TRL.

The same random weights of Qwen3-1.7B's shape and the same rows of 4,096 tokens, each one segment, every token but the
first predicted; AdamW with the same settings. Losses and gradient norms of a few steps must agree before anything is
timed. The floor is the counted FLOPs of the step (see `flops`; what is recomputed is no work) at the measured rates of
its two main products. The sides run one after the other: the states of two do not fit together.

Peers have two ways to fit into the memory: to recompute every layer, as our side `remat full` does, or to take one row
at a time and recompute nothing; each by hand and in TRL's trainer, by hand also compiled. Our ways are remat `products`
and `full`; ratios are those of the faster one. Parameters and optimizer state in bf16 make a step cheaper, but lose
most updates of this learning rate: that side is shown, and no goal is set for it.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jax
import numpy as np

from agentark_jax.models.config import ModelConfig
from agentark_jax.models.flops import sft_flops
from agentark_jax.models.transformer import param_shapes
from agentark_jax.preflight import preflight, topology
from agentark_jax.training.config import FitConfig
from benchmarks import peers as environments
from benchmarks.gpu_inputs import agree, alone, device_memory, is_tiny, shape_of
from benchmarks.inputs import sft_ids
from benchmarks.results import MACHINE, Check, Group, Ratio, Result, Spread, environment, rates_of, rows_of
from benchmarks.sft import ADAM_BYTES, floor_seconds
from benchmarks.workers import Reply, Side, Worker

NAME = "gpu_sft"
SHAPE = "Qwen/Qwen3-1.7B"
OURS, FULL = "agentark_jax", "agentark_jax, remat full"
REMAT = {OURS: "products", FULL: "full"}
GOAL, MFU_GOAL = 1.2, 0.5
LOSS_LIMIT, GRADIENT_LIMIT = 2e-3, 0.05  # relative; bf16 rounds to 4e-3


@dataclass(frozen=True)
class Peer:
    """How a peer's side is made: by what module, how many rows at a time (None: all), and whether it is sound."""

    what: str
    module: str = "benchmarks.gpu_torch"
    micro_rows: int | None = None
    compiled: bool = False
    precision: str = "autocast"
    goal: float | None = GOAL

    @property
    def checkpointing(self) -> bool:
        """Layers are recomputed where all rows are there at once, which would not fit otherwise."""
        return self.micro_rows is None


PEERS = {
    "torch": Peer("transformers + torch, every layer recomputed"),
    "torch, compiled": Peer("transformers + torch, compiled, every layer recomputed", compiled=True),
    "torch, row by row": Peer("transformers + torch, one row at a time, nothing recomputed", micro_rows=1),
    "torch, row by row, compiled": Peer(
        "transformers + torch, compiled, one row at a time, nothing recomputed", micro_rows=1, compiled=True
    ),
    "TRL": Peer("TRL, every layer recomputed", "benchmarks.gpu_trl"),
    "TRL, row by row": Peer("TRL, one row at a time, nothing recomputed", "benchmarks.gpu_trl", micro_rows=1),
    "torch, all in bf16": Peer(
        "transformers + torch, every layer recomputed, parameters and Adam in bf16 too",
        precision="bfloat16",
        goal=None,
    ),
}
DESCRIPTIONS = {OURS: "agentark_jax, remat products", FULL: "agentark_jax, remat full"}
DESCRIPTIONS |= {name: peer.what for name, peer in PEERS.items()}


@dataclass(frozen=True)
class Sizes:
    """`steps` are those that are timed in each repetition."""

    rows: int = 4
    row_length: int = 4096
    steps: int = 5
    repetitions: int = 5


def run(
    model: Path,
    name: str,
    *,
    quick: bool,
    peers: bool,
    say: Callable[[str], None],
    shape: str = SHAPE,
    sizes: Sizes | None = None,
) -> Iterator[Result]:
    """`model` plays no part: the weights are random. Takes 7 GB of disk at the place of temporary files.

    Raises AgentArkError when the sides do not train in the same way, UsageError where there is no GPU.
    """
    sizes = sizes or (Sizes(steps=2, repetitions=2) if quick else Sizes())
    config = ModelConfig.from_hf(shape_of(shape), shape)
    before = environment({"trl": environments.versions("trl")} if peers else {})
    tokens = sizes.rows * sizes.row_length
    loss_tokens = sizes.rows * (sizes.row_length - 1)
    flops = sft_flops(config, lengths=[sizes.row_length] * sizes.rows, loss_tokens=loss_tokens, train_head=True)
    work = {**flops, "bytes": ADAM_BYTES * sum(leaf.size for leaf in jax.tree.leaves(param_shapes(config)))}
    shapes = {
        "trunk": (tokens, config.hidden_size, config.intermediate_size),
        "head": (tokens, config.hidden_size, config.vocab_size),
    }
    machine = {"side": "machine", "shapes": shapes, "bandwidth_bytes": 2**20 if is_tiny(shape) else 2**32}
    checks: list[Check] = []

    def check(replies: dict[str, Reply]) -> None:
        checks[:] = compare(replies)

    with TemporaryDirectory() as place:
        common = {
            "model": str(Path(place) / "model"),
            "ids": str(Path(place) / "ids.npy"),
            "learning_rate": 3e-5,
            "weight_decay": 0.01,
            "clip_norm": 1.0,
        }
        measured = alone(
            [Side(MACHINE, "benchmarks.gpu_jax", machine)],
            sizes.repetitions,
            lambda replies: None,
            say,
            anywhere=is_tiny(shape),
        )
        say("making random weights")
        with Worker(
            Side("weights", "benchmarks.gpu_jax", {**common, "side": "weights", "shape": shape_of(shape)})
        ) as worker:
            worker.repeat(0)
        np.save(common["ids"], step_ids(config.vocab_size, sizes))
        sides = [
            Side(side, "benchmarks.gpu_jax", {**common, "side": "training", "remat": remat})
            for side, remat in REMAT.items()
        ]
        if peers:
            # In a rehearsal nothing is compiled: for a CPU that is another compiler, and minutes of it.
            sides += [
                peer_side(side, peer, common, sizes)
                for side, peer in PEERS.items()
                if not (peer.compiled and is_tiny(shape))
            ]
        measured |= alone(sides, sizes.repetitions, check, say, anywhere=is_tiny(shape))
    first = measured[MACHINE][0]
    if first["peak_flops"] is not None:
        checks += utilisation(measured, sum(flops.values()), first["peak_flops"], first["device"])
        checks += memory_checks(measured, config, sizes, shape)
    yield Result(
        benchmark=NAME,
        title="Full fine-tuning on a GPU",
        unit="tokens/s",
        quick=quick,
        model={
            "name": f"shape of {shape}",
            "precision": "bf16, fp32 masters",
            "attention": measured[OURS][0]["attention"],
        },
        sizes={**asdict(sizes), "loss_tokens": loss_tokens},
        rows=rows_of(
            [measured],
            DESCRIPTIONS,
            lambda side: work,
            lambda side, able: floor_seconds(work, able),
            tokens,
        ),
        ratios=ratios(measured),
        checks=checks,
        rates=rates_of([measured]),
        environment={**before, "accelerator": first["device"]},
    )


def step_ids(vocabulary: int, sizes: Sizes) -> np.ndarray:
    """Random ids [repetitions + 1, steps + 1, rows, length]: the first step of each repetition is not timed."""
    repetitions, steps = sizes.repetitions + 1, sizes.steps + 1
    made = [sft_ids(vocabulary, sizes.rows, sizes.row_length, index) for index in range(repetitions * steps)]
    return np.reshape(made, (repetitions, steps, sizes.rows, sizes.row_length))


def peer_side(side: str, peer: Peer, common: dict[str, Any], sizes: Sizes) -> Side:
    setup = {"precision": peer.precision, "checkpointing": peer.checkpointing, "compile": peer.compiled}
    setup["micro_rows"] = peer.micro_rows or sizes.rows
    return Side(side, peer.module, {**common, **setup}, environments.python("trl"))


def compare(replies: dict[str, Reply]) -> list[Check]:
    """How far the warm-up steps of the sides lie apart: losses of them all, the gradient norm of the first.

    Random tokens cannot be foreseen, whatever the network does; it is the gradient that tells one network from another.
    Raises AgentArkError when it is too far for the same work.
    """
    first = {side: reply["gradient_norms"][0] for side, reply in replies.items()}
    steps = range(len(next(iter(replies.values()))["losses"]))
    losses = [
        agree("loss", {side: reply["losses"][step] for side, reply in replies.items()}, LOSS_LIMIT) for step in steps
    ]
    return [
        Check("losses of the first steps, relative difference", max(losses), LOSS_LIMIT),
        Check(
            "gradient norm of the first step, relative difference",
            agree("gradient norm", first, GRADIENT_LIMIT),
            GRADIENT_LIMIT,
        ),
    ]


def ratios(measured: Group) -> list[Ratio]:
    """The time of each peer over that of our faster way, for all pairs of repetitions: none are neighbours."""
    ours = min(REMAT, key=lambda side: Spread.of(seconds(measured[side])).median)
    return [
        Ratio(
            ours,
            side,
            Spread.of([theirs / own for own in seconds(measured[ours]) for theirs in seconds(measured[side])]),
            peer.goal,
        )
        for side, peer in PEERS.items()
        if side in measured
    ]


def seconds(replies: list[Reply]) -> list[float]:
    return [reply["seconds"] for reply in replies[1:]]


def utilisation(measured: Group, flops: int, peak: float, device: str) -> list[Check]:
    """Model FLOPs utilisation of our ways, medians."""
    of = f"{device}, {peak / 1e12:.0f} TFLOP/s by its data sheet; wanted: at least {MFU_GOAL:g}"
    return [
        Check(
            f"model FLOPs utilisation, {side} (of {of})",
            flops / Spread.of(seconds(measured[side])).median / peak,
            None,
        )
        for side in REMAT
    ]


def memory_checks(measured: Group, config: ModelConfig, sizes: Sizes, shape: str) -> list[Check]:
    """Peak memory of every side on the GPU, and for ours what a dry run says over it."""
    found = []
    for side, replies in measured.items():
        if side == MACHINE:
            continue
        peak = device_memory(replies)
        found.append(Check(f"peak memory of the GPU in GB, {side}", peak, None))
        if side in REMAT:
            fit = FitConfig(rows=sizes.rows, row_length=sizes.row_length, remat=REMAT[side], compute_dtype="bfloat16")
            said = preflight(shape, config, fit, topology("1xH100-80GB"))
            found.append(Check(f"memory of a dry run over that peak, {side}", said.step.total / 1e9 / peak, None))
    return found
