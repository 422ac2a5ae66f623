"""Memory of a full fine-tuning step: beyond parameters, gradients and Adam against TRL, in total against Tunix.

Same weights, ids, batch, fp32, AdamW and recomputation (of every layer from its input, which all three have a setting
for); half of the tokens have no loss, no row has padding. TRL computes its `nll` loss with the head in tiles, which is
how it saves memory; Tunix makes all logits. Each side runs alone; what is measured is the peak of resident memory in
the steps after the first. Needs Linux, where a process can reset its own peak.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from agentark_jax.models.config import load_config
from agentark_jax.models.flops import head_params
from benchmarks import peers as environments
from benchmarks.results import Comparison, Measured, Ratio, Spread, environment
from benchmarks.sft import OURS, PEERS, TRL, TUNIX, compare_losses
from benchmarks.sft_inputs import TRAINING, random_traces
from benchmarks.workers import Reply, Side, Worker

NAME = "sft_memory"
MODULES = {OURS: "benchmarks.sft_ours", TRL: "benchmarks.sft_trl", TUNIX: "benchmarks.sft_tunix"}
DESCRIPTIONS = {
    OURS: "agentark_jax, remat full",
    TRL: "TRL, SFTTrainer with gradient checkpointing",
    TUNIX: "Tunix, PeftTrainer with remat of decoder layers",
}
GOAL, TOTAL_GOAL = 0.5, 0.6
STATE_BYTES = 16


@dataclass(frozen=True)
class Sizes:
    """`tunix`: whether it is measured too; its logits of 8 × 1024 tokens alone would be 9 GB, several times over."""

    batch: int
    length: int
    steps: int = 3
    tunix: bool = True

    @property
    def shape(self) -> str:
        return f"{self.batch} × {self.length}"


def run(model: Path, name: str, *, quick: bool, peers: bool, say: Callable[[str], None]) -> Iterator[Comparison]:
    """Raises AgentArkError when the losses of the first step differ by more than 1e-4 of their size."""
    sizes = [Sizes(2, 256, 2)] if quick else [Sizes(4, 512), Sizes(8, 1024, 2, tunix=False)]
    yield measure(sizes, model, name, quick=quick, peers=peers, say=say)


def measure(
    shapes: list[Sizes], model: Path, name: str, *, quick: bool, peers: bool, say: Callable[[str], None]
) -> Comparison:
    config = load_config(model)
    before = environment({peer: environments.versions(peer) for peer in PEERS.values()} if peers else {})
    measured, ratios, checks = [], [], []
    for sizes in shapes:
        names = [OURS, *(side for side in PEERS if peers and (side != TUNIX or sizes.tunix))]
        replies: dict[str, Reply] = {}
        for side in names:
            say(f"{sizes.shape}: {side}")
            with Worker(side_of(side, sizes, model, config.vocab_size)) as worker:
                replies[side] = worker.repeat(0)
            say(f"{sizes.shape}: {side}: {max(replies[side]['peak_rss_gb_of_steps'][1:]):.2f} GB")
        if peers:
            firsts = {
                side: {"loss": reply["losses"][0], "loss_tokens": reply["loss_tokens"]}
                for side, reply in replies.items()
            }
            checks.append(compare_losses(firsts, sizes.batch * (sizes.length - sizes.length // 2)))
        entries, compared = quantities(sizes, replies)
        measured += entries
        ratios += compared
    return Comparison(
        benchmark=NAME,
        title="Memory of a full fine-tuning step, beyond 16 bytes per parameter and in total",
        quick=quick,
        model={"name": name, "model_type": config.model_type},
        sizes={"head_parameters": head_params(config)},
        measured=measured,
        ratios=ratios,
        checks=checks,
        environment=before,
    )


def side_of(side: str, sizes: Sizes, model: Path, vocabulary: int) -> Side:
    prompt = sizes.length // 2
    pairs = [(prompt, sizes.length - prompt)] * sizes.batch
    setup = {
        **asdict(sizes),
        **TRAINING,
        "side": "memory",
        "model": str(model),
        "tokenizer": str(model),
        "steps": [random_traces(pairs, vocabulary, step) for step in range(sizes.steps)],
        "remat": "full",
        "plan": [[row] for row in range(sizes.batch)],
        "rows": sizes.batch,
        "row_length": sizes.length,
        "per_device": sizes.batch,
        "padding_free": False,
    }
    return (
        Side(side, MODULES[side], setup)
        if side == OURS
        else Side(side, MODULES[side], setup, environments.python(PEERS[side]))
    )


def quantities(sizes: Sizes, replies: dict[str, Reply]) -> tuple[list[Measured], list[Ratio]]:
    """Peaks in GB: ours and TRL's without the state, ours and Tunix's with it; and what ours is of theirs."""
    state = STATE_BYTES * replies[OURS]["parameters"] / 1e9
    total = {side: reply["peak_rss_gb_of_steps"][1:] for side, reply in replies.items()}
    entries, ratios = [], []
    for what, without, peer, goal in (("beyond the state", state, TRL, GOAL), ("in total", 0.0, TUNIX, TOTAL_GOAL)):
        peaks = {side: [peak - without for peak in total[side]] for side in (OURS, peer) if side in total}
        labels = {side: f"{side}, {what}, {sizes.shape}" for side in peaks}
        entries += [
            Measured(labels[side], f"{DESCRIPTIONS[side]}, {what}, {sizes.shape}", "GB", Spread.of(values))
            for side, values in peaks.items()
        ]
        if peer in peaks:
            value = Spread.of([max(peaks[OURS]) / max(peaks[peer])])
            ratios.append(Ratio(labels[OURS], labels[peer], value, goal))
    return entries, ratios
