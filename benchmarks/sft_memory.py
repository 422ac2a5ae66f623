"""Memory of a full fine-tuning step beyond what parameters, gradients and Adam need: ours against TRL's trainer.

Same weights, ids, batch, fp32, AdamW and recomputation (of every layer from its input); half of the tokens have no
loss. TRL computes its `nll` loss with the head in tiles, which is how it saves memory. Each side runs alone; what is
measured is the peak of resident memory in the steps after the first, minus 16 bytes per parameter. Needs Linux, where
a process can reset its own peak.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from agentark_jax.errors import UsageError
from agentark_jax.models.config import load_config
from agentark_jax.models.flops import head_params
from benchmarks.inputs import first_loss_position
from benchmarks.results import Comparison, Measured, Ratio, Spread, environment
from benchmarks.sft_step import compare_losses
from benchmarks.workers import Reply, Side, Worker

NAME = "sft_memory"
OURS, PEER = "agentark_jax", "TRL"
DESCRIPTIONS = {OURS: "agentark_jax, remat full", PEER: "TRL, SFTTrainer with gradient checkpointing"}
GOAL = 0.5
STATE_BYTES = 16


@dataclass(frozen=True)
class Sizes:
    batch: int
    length: int
    steps: int = 3


def run(model: Path, name: str, *, quick: bool, peers: bool, say: Callable[[str], None]) -> Iterator[Comparison]:
    """Raises AgentArkError when the losses of the first step differ by more than 1e-4 of their size."""
    config = load_config(model)
    before = environment()
    measured, ratios, checks = [], [], []
    for sizes in [Sizes(2, 256, 2)] if quick else [Sizes(4, 512), Sizes(8, 1024, 2)]:
        shape = f"{sizes.batch} × {sizes.length}"
        setup = {
            **asdict(sizes),
            "model": str(model),
            "side": "memory",
            "learning_rate": 3e-5,
            "weight_decay": 0.01,
            "clip_norm": 1.0,
            "freeze": [],
            "remat": "full",
        }
        sides = [Side(OURS, "benchmarks.jax_sides", setup)]
        if peers:
            sides.append(Side(PEER, "benchmarks.trl_side", setup))
        beyond: dict[str, list[float]] = {}
        replies: dict[str, Reply] = {}
        for side in sides:
            say(f"{shape}: {side.name}")
            with Worker(side) as worker:
                reply = worker.repeat(0)
            replies[side.name] = {"loss": reply["losses"][0], "loss_tokens": reply["loss_tokens"]}
            state = STATE_BYTES * reply["parameters"] / 1e9
            beyond[side.name] = [peak - state for peak in reply["peak_rss_gb_of_steps"][1:]]
            say(f"{shape}: {side.name}: {max(beyond[side.name]):.2f} GB beyond {state:.2f} GB")
            what = f"{DESCRIPTIONS[side.name]}, {shape}"
            measured.append(Measured(f"{side.name}, {shape}", what, "GB", Spread.of(beyond[side.name])))
        if peers:
            loss_tokens = sizes.batch * (sizes.length - first_loss_position(sizes.length))
            checks.append(compare_losses(replies, loss_tokens))
            pairs = [max(beyond[OURS]) / max(beyond[PEER])]
            ratios.append(Ratio(f"{OURS}, {shape}", f"{PEER}, {shape}", Spread.of(pairs), GOAL))
    yield Comparison(
        benchmark=NAME,
        title="Memory of a full fine-tuning step beyond 16 bytes per parameter",
        quick=quick,
        model={"name": name, "model_type": config.model_type},
        sizes={"head_parameters": head_params(config)},
        measured=measured,
        ratios=ratios,
        checks=checks,
        environment=before,
    )


def reset_peak_rss() -> None:
    """From here on `peak_rss_gb` counts anew. Raises UsageError where the system cannot do that."""
    path = Path("/proc/self/clear_refs")
    if not path.exists():
        raise UsageError(f"{NAME}: {path} does not exist; measure on Linux")
    path.write_text("5")
