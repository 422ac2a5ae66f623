"""Full fine-tuning, one optimizer step at a time: ours against transformers + torch.

Same weights, ids, batch and fp32; half of the tokens have no loss. The floor is the counted FLOPs of the step (see
`flops`) at the rates of matrix products of its two main shapes, measured in the same round; the optimizer's memory
traffic is not in it.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from agentark_jax.errors import AgentArkError
from agentark_jax.models.config import load_config
from agentark_jax.models.flops import Flops, sft_flops
from benchmarks.inputs import first_loss_position
from benchmarks.results import MACHINE, Check, Group, Result, environment, rates_of, ratios_of, rows_of
from benchmarks.workers import Reply, Side, interleaved

NAME = "sft_step"
OURS, FROZEN = "agentark_jax", "agentark_jax, embedding frozen"
DENSE, LOSS_TOKENS = "transformers + torch", "transformers + torch, head on loss tokens"
DESCRIPTIONS = {
    OURS: "agentark_jax",
    FROZEN: "agentark_jax, embedding frozen",
    DENSE: "transformers + torch, dense logits",
    LOSS_TOKENS: "transformers + torch, head on loss tokens only",
}
GOALS = {DENSE: 1.6, LOSS_TOKENS: None}
LOSS_LIMIT = 1e-4


@dataclass(frozen=True)
class Sizes:
    batch: int = 4
    length: int = 256
    repetitions: int = 5


def run(model: Path, name: str, *, quick: bool, peers: bool, say: Callable[[str], None]) -> Iterator[Result]:
    """Raises AgentArkError when the losses of the first step differ by more than 1e-4 of their size."""
    sizes = Sizes(length=128, repetitions=2) if quick else Sizes()
    config = load_config(model)
    loss_tokens = sizes.batch * (sizes.length - first_loss_position(sizes.length))
    before = environment()
    checks: list[Check] = []

    def check(replies: dict[str, Reply]) -> None:
        checks.append(compare_losses({side: reply for side, reply in replies.items() if side != MACHINE}, loss_tokens))

    common = {
        "model": str(model),
        "side": "training",
        "batch": sizes.batch,
        "length": sizes.length,
        "steps": sizes.repetitions + 1,
        "learning_rate": 3e-5,
        "weight_decay": 0.01,
        "clip_norm": 1.0,
    }

    def ours(side: str, freeze: list[str]) -> Side:
        return Side(side, "benchmarks.jax_sides", {**common, "freeze": freeze})

    def peer(side: str, head: str) -> Side:
        return Side(side, "benchmarks.torch_sides", {**common, "head": head})

    shapes = {
        "trunk": (sizes.batch * sizes.length, config.hidden_size, config.intermediate_size),
        "head": (loss_tokens, config.hidden_size, config.vocab_size),
    }
    machine = Side(
        MACHINE,
        "benchmarks.jax_sides",
        {"side": "machine", "shapes": shapes, "seconds": 0.5, "bandwidth_bytes": 2**29},
    )
    # Two groups with peers: all sides at once do not fit into 24 GB.
    groups = [[machine, ours(OURS, []), ours(FROZEN, ["embedding"])]]
    if peers:
        groups[0].append(peer(LOSS_TOKENS, "loss_tokens"))
        groups.append([machine, ours(OURS, []), peer(DENSE, "dense")])
    measured = [interleaved(group, sizes.repetitions, check, say) for group in groups]

    def flops(side: str) -> Flops:
        return sft_flops(
            config, lengths=[sizes.length] * sizes.batch, loss_tokens=loss_tokens, train_head=side != FROZEN
        )

    def floor_seconds(side: str, able: Reply) -> float:
        return sft_floor_seconds(flops(side), able["rates"])

    if peers:
        checks.append(Check("loss of later steps, largest relative difference", later_difference(measured), None))
    yield Result(
        benchmark=NAME,
        title="Full fine-tuning step",
        unit="tokens/s",
        quick=quick,
        model={"name": name, "model_type": config.model_type},
        sizes={**asdict(sizes), "loss_tokens": loss_tokens},
        rows=rows_of(measured, DESCRIPTIONS, flops, floor_seconds, sizes.batch * sizes.length),
        ratios=ratios_of(measured, OURS, GOALS),
        checks=checks,
        rates=rates_of(measured),
        environment=before,
    )


def sft_floor_seconds(flops: Flops, rates: dict[str, float]) -> float:
    """The counted products at the measured rates: attention at the rate of the trunk."""
    return (flops["trunk"] + flops["attention"]) / rates["trunk"] + flops["head"] / rates["head"]


def compare_losses(replies: dict[str, Reply], loss_tokens: int) -> Check:
    """The largest relative difference of the first step's losses. Raises AgentArkError when the sides disagree."""
    losses = {side: reply["loss"] for side, reply in replies.items()}
    counts = {side: reply["loss_tokens"] for side, reply in replies.items()}
    difference = _relative(list(losses.values()))
    if not difference <= LOSS_LIMIT or set(counts.values()) != {loss_tokens}:
        raise AgentArkError(
            f"{NAME}: the sides do not compute the same step: losses {losses}, tokens with loss {counts} "
            f"(wanted: {loss_tokens}); speed says nothing before they agree"
        )
    return Check(f"loss of the first step, relative difference ({', '.join(losses)})", difference, LOSS_LIMIT)


def later_difference(groups: list[Group]) -> float:
    """The largest relative difference of later losses between the sides that train every parameter.

    Raises AgentArkError when a loss is not a finite number.
    """
    differences = []
    for group in groups:
        full = [replies for side, replies in group.items() if side not in (MACHINE, FROZEN)]
        differences += [_relative([reply["loss"] for reply in step]) for step in list(zip(*full, strict=True))[1:]]
    if not np.all(np.isfinite(differences)):
        raise AgentArkError(f"{NAME}: a later step has a loss that is not finite; its speed means nothing")
    return max(differences)


def _relative(values: list[float]) -> float:
    """The range of some losses over the largest; NaN where one of them is NaN."""
    losses = np.asarray(values)
    return float(np.ptp(losses) / np.abs(losses).max())
