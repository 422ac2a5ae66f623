"""One optimizer step of fine-tuning on traces with the lengths of real debates, against TRL and Tunix.

Same weights, traces, batch, loss tokens (all completions, no prompt) and fp32; each side recomputes what is fastest
for it. Tokens per second count real tokens, padding is none. Ours packs traces into rows. TRL divides the batch as
`Case.trl` says: short traces in one row, which was fastest here; long ones one at a time, which pads nothing and was
not compared (`sft_ways` does that). Tunix pads. The floor is the counted FLOPs of the traces (see `flops`) at the
rates of matrix products of the two main shapes, and what AdamW reads and writes at the bandwidth, measured in the
same round.

Sides that do not fit into memory together run one after the other: their ratios are then of rounds minutes apart.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict

from agentark_jax.data.packing import packing_plan
from agentark_jax.errors import AgentArkError, require
from agentark_jax.models.config import Lora, ModelConfig, load_config
from agentark_jax.models.flops import Flops, sft_flops
from agentark_jax.models.lora import is_adapter
from agentark_jax.models.transformer import param_shapes
from agentark_jax.training.state import partition
from benchmarks import peers as environments
from benchmarks.models import random_model
from benchmarks.results import MACHINE, Check, Group, Result, environment, rates_of, ratios_of, rows_of
from benchmarks.sft_inputs import TRAINING, draw, loss_tokens, packed_length, random_traces, round_up, totals
from benchmarks.trace_lengths import Pair
from benchmarks.workers import Reply, Side, interleaved

NAME = "sft"
OURS, PADDED, FROZEN, TRL, TUNIX = "agentark_jax", "padded", "embedding frozen", "TRL", "Tunix"
PEERS = {TRL: "trl", TUNIX: "tunix"}
LOSS_LIMIT = 1e-4
ADAM_BYTES = 28
"""Per trained parameter in fp32: parameter, gradient and two moments are read, all but the gradient written."""


@dataclass(frozen=True)
class Case:
    """What is trained on what, and which sides are alive together.

    Args:
        model: a published shape, with random weights; None for the run's own model.
        lengths: `short` or `long` traces.
        traces: how many a step has; `rows`: into how many rows ours packs them.
        groups: sides that take turns, next to the machine's rates; only the first has to have ours.
        trl: traces at a time, and whether these lie behind one another in one row (`padding_free`).
        tunix: traces at a time, padded.
    """

    name: str
    title: str
    lengths: str
    traces: int
    rows: int
    groups: tuple[tuple[str, ...], ...]
    trl: tuple[int, bool]
    tunix: int = 1
    model: str | None = None
    lora: Lora | None = None
    goals: Mapping[str, float | None] = field(default_factory=lambda: {TRL: None, TUNIX: None})
    floor_goal: Mapping[str, float] = field(default_factory=dict)
    repetitions: int = 3

    def __post_init__(self) -> None:
        for key, size in (("trl", self.trl[0]), ("tunix", self.tunix)):
            require(size >= 1 and self.traces % size == 0, key, size, f"a divisor of traces ({self.traces})")
        require(1 <= self.rows <= self.traces, "rows", self.rows, f"1 to {self.traces}, one for each trace at most")
        require(OURS in self.groups[0], "groups", self.groups[0], f"a first group with {OURS}")

    def quick(self) -> "Case":
        """Fewer traces and one repetition."""
        fewer = max(2, self.traces // 4)
        return dataclasses.replace(self, traces=fewer, rows=1, trl=(1, False), tunix=1, repetitions=1)


ADAPTERS = Lora(16, 32.0)
CASES = (
    Case(
        name="full_long",
        title="Fine-tuning step, all parameters, long traces",
        lengths="long",
        traces=8,
        rows=3,
        groups=((OURS, TRL), (OURS, TUNIX)),
        trl=(1, False),
        goals={TRL: 1.4, TUNIX: 2.0},
        floor_goal={OURS: 0.7},
        repetitions=2,
    ),
    Case(
        name="ours_long",
        title="Fine-tuning step, all parameters, long traces: ways of ours",
        lengths="long",
        traces=8,
        rows=3,
        groups=((OURS, PADDED, FROZEN),),
        trl=(1, False),
        repetitions=2,
    ),
    Case(
        name="full_short",
        title="Fine-tuning step, all parameters, short traces",
        lengths="short",
        traces=16,
        rows=4,
        groups=((OURS, TRL, TUNIX), (PADDED,)),
        trl=(16, True),
        tunix=8,
    ),
    Case(
        name="lora_long",
        title="Fine-tuning step, LoRA of rank 16, long traces",
        lengths="long",
        traces=8,
        rows=3,
        groups=((OURS, TRL),),
        trl=(1, False),
        lora=ADAPTERS,
    ),
    Case(
        name="qwen3_full_short",
        title="Fine-tuning step, all parameters, short traces, random Qwen3-0.6B",
        lengths="short",
        traces=16,
        rows=4,
        groups=((OURS,), (TRL,)),
        trl=(16, True),
        model="Qwen/Qwen3-0.6B",
    ),
    Case(
        name="llama_lora_short",
        title="Fine-tuning step, LoRA of rank 16, short traces, random Llama-3.2-1B",
        lengths="short",
        traces=16,
        rows=4,
        groups=((OURS, TRL),),
        trl=(16, True),
        model="meta-llama/Llama-3.2-1B",
        lora=ADAPTERS,
    ),
)


def run(model: Path, name: str, *, quick: bool, peers: bool, say: Callable[[str], None]) -> Iterator[Result]:
    """All cases; quick ones only with the run's model. Raises AgentArkError when losses of the first step disagree."""
    for case in CASES:
        if quick and case.model is not None:
            continue
        at_work = model if case.model is None else random_model(case.model)
        shown = name if case.model is None else f"{case.model} (random weights)"
        yield measure(
            case.quick() if quick else case, at_work, shown, tokenizer=model, quick=quick, peers=peers, say=say
        )


def measure(
    case: Case, model: Path, name: str, *, tokenizer: Path, quick: bool, peers: bool, say: Callable[[str], None]
) -> Result:
    """One case on a model directory; `tokenizer`: one that has a tokenizer, which TRL asks for."""
    config = load_config(model)
    pairs = draw(case.lengths, case.traces)
    before = environment({peer: environments.versions(peer) for peer in used(case)} if peers else {})
    sides = sides_of(case, config, pairs, model, tokenizer, peers)
    firsts: dict[str, Reply] = {}
    checks: dict[str, Check] = {}

    def check(replies: dict[str, Reply]) -> None:
        firsts.update({side: reply for side, reply in replies.items() if side != MACHINE})
        checks["first"] = compare_losses(firsts, loss_tokens(pairs))

    machine = Side(
        MACHINE,
        "benchmarks.jax_sides",
        {
            "side": "machine",
            "shapes": {
                "trunk": (sum(totals(pairs)), config.hidden_size, config.intermediate_size),
                "head": (min(loss_tokens(pairs), 512), config.hidden_size, config.vocab_size),
            },
            "seconds": 0.5,
            "bandwidth_bytes": 2**29,
        },
    )
    groups = [[machine, *(sides[side] for side in group if side in sides)] for group in case.groups]
    measured = [interleaved(group, case.repetitions, check, say) for group in groups if len(group) > 1]
    checks["later"] = Check(
        "loss of later steps, largest relative difference", later_difference(paired(measured)), None
    )

    def flops(side: str) -> Flops:
        return work(case, config, pairs, side)

    return Result(
        benchmark=f"{NAME}.{case.name}",
        title=case.title,
        unit="tokens/s",
        quick=quick,
        model={"name": name, "model_type": config.model_type},
        sizes={
            "traces": case.traces,
            "tokens": sum(totals(pairs)),
            "loss_tokens": loss_tokens(pairs),
            "longest": max(totals(pairs)),
            "rows": sides[OURS].setup["rows"],
            "row_length": sides[OURS].setup["row_length"],
            "repetitions": case.repetitions,
        },
        rows=rows_of(
            measured,
            {side: describe(case, side) for side in sides},
            flops,
            lambda side, able: floor_seconds(flops(side), able),
            sum(totals(pairs)),
            case.floor_goal,
        ),
        ratios=ratios_of(paired(measured), OURS, case.goals),
        checks=list(checks.values()),
        rates=rates_of(measured),
        environment=before,
    )


def used(case: Case) -> list[str]:
    """The environments of peers that a case needs."""
    return sorted({PEERS[side] for group in case.groups for side in group if side in PEERS})


def describe(case: Case, side: str) -> str:
    size, padding_free = case.trl
    how = "in one row, kept apart by positions" if padding_free else "at a time"
    return {
        OURS: "agentark_jax, packed",
        PADDED: "agentark_jax, padded",
        FROZEN: "agentark_jax, packed, embedding frozen",
        TRL: f"TRL SFTTrainer{'' if case.lora is None else ' with peft'}, {size} {how}",
        TUNIX: f"Tunix PeftTrainer, padded, {case.tunix} at a time",
    }[side]


def sides_of(
    case: Case, config: ModelConfig, pairs: Sequence[Pair], model: Path, tokenizer: Path, peers: bool
) -> dict[str, Side]:
    """The sides of a case by name, those of peers only where they are wanted."""
    lora = case.lora
    common: dict[str, Any] = {
        **TRAINING,
        "side": "training",
        "model": str(model),
        "batch": case.traces,
        "steps": [random_traces(pairs, config.vocab_size, step) for step in range(case.repetitions + 1)],
        "lora": None if lora is None else {**dataclasses.asdict(lora), "targets": list(lora.targets)},
    }
    tokens = totals(pairs)
    row_length = packed_length(tokens, case.rows)
    plan = packing_plan(tokens, seed=0, epoch=0, row_length=row_length)
    packed = {**common, "plan": plan, "rows": len(plan), "row_length": row_length}
    apart = {"plan": [[trace] for trace in range(len(pairs))], "rows": len(pairs), "row_length": round_up(max(tokens))}
    per_device, padding_free = case.trl
    setups: dict[str, tuple[str, dict[str, Any]]] = {
        OURS: ("sft_ours", packed),
        PADDED: ("sft_ours", {**packed, **apart}),
        FROZEN: ("sft_ours", {**packed, "freeze": ["embedding"]}),
        TRL: (
            "sft_trl",
            {**common, "tokenizer": str(tokenizer), "per_device": per_device, "padding_free": padding_free},
        ),
        TUNIX: ("sft_tunix", {**common, "per_device": case.tunix}),
    }
    wanted = [side for group in case.groups for side in group if peers or side not in PEERS]
    return {
        side: Side(side, f"benchmarks.{module}", setup)
        if side not in PEERS
        else Side(side, f"benchmarks.{module}", setup, environments.python(PEERS[side]))
        for side, (module, setup) in setups.items()
        if side in wanted
    }


def work(case: Case, config: ModelConfig, pairs: Sequence[Pair], side: str) -> Flops:
    """FLOPs by part, and the bytes that the optimizer moves."""
    full = case.lora is None
    flops = sft_flops(
        config,
        lengths=totals(pairs),
        loss_tokens=loss_tokens(pairs),
        train_layers=full,
        train_head=full and side != FROZEN,
    )
    return {**flops, "bytes": ADAM_BYTES * trained_parameters(case, config, side)}


def trained_parameters(case: Case, config: ModelConfig, side: str) -> int:
    shapes = param_shapes(dataclasses.replace(config, lora=case.lora))
    if case.lora is not None:
        return sum(leaf.size for path, leaf in flatten_dict(shapes).items() if is_adapter(path))
    trainable, _ = partition(shapes, ["embedding"] if side == FROZEN else [])
    return sum(leaf.size for leaf in trainable.values())


def floor_seconds(work: Flops, able: Reply) -> float:
    """The counted products at the measured rates, attention at that of the trunk, then the optimizer's bytes."""
    rates = able["rates"]
    products = (work["trunk"] + work["attention"]) / rates["trunk"] + work["head"] / rates["head"]
    return float(products + work["bytes"] / able["bandwidth"])


def paired(groups: Sequence[Group]) -> list[Group]:
    """Groups that all have our side; where one has not, a single group of what was measured apart."""
    peers = [group for group in groups if set(group) & set(PEERS)]
    if all(OURS in group for group in peers):
        return list(groups)
    return [{side: replies for group in groups for side, replies in group.items()}]


def compare_losses(replies: Mapping[str, Reply], tokens: int) -> Check:
    """The largest relative difference of the first step's losses. Raises AgentArkError when the sides disagree."""
    losses = {side: reply["loss"] for side, reply in replies.items()}
    counts = {side: reply["loss_tokens"] for side, reply in replies.items()}
    difference = relative(list(losses.values()))
    if not difference <= LOSS_LIMIT or set(counts.values()) != {tokens}:
        raise AgentArkError(
            f"{NAME}: the sides do not compute the same step: losses {losses}, tokens with loss {counts} "
            f"(wanted: {tokens}); speed says nothing before they agree"
        )
    return Check(f"loss of the first step, relative difference ({', '.join(losses)})", difference, LOSS_LIMIT)


def later_difference(groups: Sequence[Group]) -> float:
    """The largest relative difference of later losses between the sides that train the same parameters.

    Raises AgentArkError when a loss is not a finite number.
    """
    differences = [0.0]
    for group in groups:
        same = [replies for side, replies in group.items() if side not in (MACHINE, FROZEN)]
        differences += [relative([reply["loss"] for reply in step]) for step in list(zip(*same, strict=True))[1:]]
    if not np.all(np.isfinite(differences)):
        raise AgentArkError(f"{NAME}: a later step has a loss that is not finite; its speed means nothing")
    return max(differences)


def relative(values: Sequence[float]) -> float:
    """The range of some losses over the largest; NaN where one of them is NaN."""
    losses = np.asarray(values)
    return float(np.ptp(losses) / np.abs(losses).max())
