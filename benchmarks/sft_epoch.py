"""One epoch of fine-tuning through the whole loop of each framework, data and metrics included, checkpoints not.

64 short traces, 16 to a step: ours in packed rows that hold as many on average, TRL's Trainer with batches of similar
length, Tunix's PeftTrainer with padded batches. An epoch before the timed one compiles and warms up; its mean losses
are compared, loosely: every framework has its own order, so batches and the weights in between differ.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from agentark_jax.errors import AgentArkError
from agentark_jax.models.config import load_config
from agentark_jax.models.flops import Flops, sft_flops
from benchmarks import peers as environments
from benchmarks.results import Check, Result, environment, rates_of, ratios_of, rows_of
from benchmarks.sft import OURS, PEERS, TRL, TUNIX, relative
from benchmarks.sft_inputs import TRAINING, draw, loss_tokens, packed_length, random_traces, totals
from benchmarks.workers import Reply, Side, interleaved

NAME = "sft_epoch"
DESCRIPTIONS = {
    OURS: "agentark_jax, `fit` on packed rows",
    TRL: "TRL SFTTrainer, batches of similar length",
    TUNIX: "Tunix PeftTrainer, padded batches",
}
LOSS_LIMIT = 0.02


@dataclass(frozen=True)
class Sizes:
    """`batch` traces to a step; `rows` of ours hold as many. `trl` and `tunix`: traces at a time."""

    traces: int = 64
    batch: int = 16
    rows: int = 4
    trl: int = 16
    tunix: int = 8
    repetitions: int = 3


def run(model: Path, name: str, *, quick: bool, peers: bool, say: Callable[[str], None]) -> Iterator[Result]:
    """Raises AgentArkError when the mean losses of the first epoch differ by more than 2 %."""
    sizes = Sizes(traces=8, batch=4, rows=1, trl=4, tunix=4, repetitions=1) if quick else Sizes()
    yield measure(sizes, model, name, quick=quick, peers=peers, say=say)


def measure(sizes: Sizes, model: Path, name: str, *, quick: bool, peers: bool, say: Callable[[str], None]) -> Result:
    config = load_config(model)
    pairs = draw("short", sizes.traces)
    tokens = totals(pairs)
    before = environment({peer: environments.versions(peer) for peer in PEERS.values()} if peers else {})
    row_length = packed_length(tokens, sizes.traces // sizes.batch * sizes.rows, epochs=2)
    common: dict[str, Any] = {
        **TRAINING,
        "side": "epoch",
        "model": str(model),
        "tokenizer": str(model),
        "batch": sizes.batch,
        "steps": [random_traces(pairs, config.vocab_size, 0)],
    }
    sides = [Side(OURS, "benchmarks.sft_ours", {**common, "rows": sizes.rows, "row_length": row_length})]
    if peers:
        padded = {**common, "per_device": sizes.trl, "padding_free": False}
        sides += [
            Side(TRL, "benchmarks.sft_trl", padded, environments.python(PEERS[TRL])),
            Side(TUNIX, "benchmarks.sft_tunix", {**common, "per_device": sizes.tunix}, environments.python("tunix")),
        ]
    checks: list[Check] = []
    measured = [interleaved(sides, sizes.repetitions, lambda replies: checks.append(compare_epochs(replies)), say)]

    def flops(side: str) -> Flops:
        return sft_flops(config, lengths=tokens, loss_tokens=loss_tokens(pairs), train_head=True)

    return Result(
        benchmark=NAME,
        title="Fine-tuning, an epoch of the whole loop, all parameters, short traces",
        unit="tokens/s",
        quick=quick,
        model={"name": name, "model_type": config.model_type},
        sizes={**asdict(sizes), "tokens": sum(tokens), "loss_tokens": loss_tokens(pairs), "row_length": row_length},
        rows=rows_of(measured, DESCRIPTIONS, flops, None, sum(tokens)),
        ratios=ratios_of(measured, OURS, {TRL: None, TUNIX: None}),
        checks=checks,
        rates=rates_of(measured),
        environment=before,
    )


def compare_epochs(replies: dict[str, Reply]) -> Check:
    """How far the mean losses of the first epoch are apart. Raises AgentArkError for more than 2 %."""
    losses = {side: reply["loss"] for side, reply in replies.items()}
    difference = relative(list(losses.values()))
    if not difference <= LOSS_LIMIT or len({reply["loss_tokens"] for reply in replies.values()}) > 1:
        raise AgentArkError(
            f"{NAME}: the sides do not train on the same: mean losses of the first epoch {losses}, tokens with loss "
            f"{ {side: reply['loss_tokens'] for side, reply in replies.items()} }"
        )
    return Check("mean loss of the first epoch, relative difference (orders differ)", difference, LOSS_LIMIT)
