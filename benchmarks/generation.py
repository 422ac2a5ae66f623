"""Generation of a fixed number of tokens: the embedded engine against `transformers.generate` and Tunix's sampler.

Same weights, prompts and fp32; no sequence stops early, so the work is equal. The cases:

- `batch1`, `batch16`, `batch64`: so many different prompts of 48 to 80 tokens, greedy;
- `samples`: 16 samples of one prompt at temperature 1. Only the embedded engine prefills it once;
- `mixed`: 64 prompts that want different numbers of tokens, spread as real answers are (`inputs.completion_tokens`).
  The embedded engine has 16 slots and refills one that falls free; the peers run one batch until the longest ends,
  which is how they work when nobody knows who ends when. Tokens beyond what was wanted count for nobody.

The floor: prefill FLOPs over the measured rate, then for every step the larger of FLOPs over rate and bytes over
bandwidth. It takes a prompt once however many samples it has, and as many sequences at once as our side has slots.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from agentark_jax.errors import AgentArkError
from agentark_jax.models.config import ModelConfig, load_config
from agentark_jax.models.flops import FP32_BYTES, Flops, decode_bytes, decode_flops, prefill_flops
from benchmarks import peers as environments
from benchmarks.inputs import completion_tokens
from benchmarks.inputs import prompts as make_prompts
from benchmarks.results import MACHINE, Check, Group, Result, environment, rates_of, ratios_of, rows_of
from benchmarks.workers import Reply, Side, interleaved

NAME = "generation"
OURS, TRANSFORMERS, TUNIX = "agentark_jax", "transformers.generate", "tunix"
DESCRIPTIONS = {
    OURS: "agentark_jax, embedded engine",
    TRANSFORMERS: "transformers.generate, left-padded batch",
    TUNIX: "Tunix's sampler, left-padded batch",
}
DISAGREEMENT_LIMIT = 0.01


@dataclass(frozen=True)
class Sizes:
    """How much a case generates.

    Attributes:
        prompts: different prompts.
        samples: of each prompt; more than one are drawn at temperature 1, a single one is greedy.
        new_tokens: of every sequence, or of the longest where they are `mixed`.
        slots: sequences that our side has in flight at once.
    """

    prompts: int
    slots: int
    samples: int = 1
    new_tokens: int = 48
    mixed: bool = False
    repetitions: int = 3

    @property
    def wanted(self) -> list[int]:
        """New tokens by sequence, those of a prompt's samples one after the other."""
        count = self.prompts * self.samples
        return completion_tokens(count, self.new_tokens) if self.mixed else [self.new_tokens] * count


@dataclass(frozen=True)
class Case:
    title: str
    sizes: Sizes
    quick: Sizes
    goals: Mapping[str, float | None] = field(default_factory=lambda: {TRANSFORMERS: None, TUNIX: None})
    floor_goal: Mapping[str, float] = field(default_factory=dict)


CASES = {
    "batch1": Case("Generation, one prompt", Sizes(1, 1), Sizes(1, 1, new_tokens=8, repetitions=1)),
    "batch16": Case("Generation, 16 prompts", Sizes(16, 16), Sizes(4, 4, new_tokens=6, repetitions=1)),
    "batch64": Case(
        "Generation, 64 prompts",
        Sizes(64, 64, repetitions=2),
        Sizes(8, 8, new_tokens=4, repetitions=1),
        goals={TRANSFORMERS: 2.5, TUNIX: 2.0},
        floor_goal={OURS: 0.6},
    ),
    "samples": Case(
        "Generation, 16 samples of a prompt", Sizes(1, 16, samples=16), Sizes(1, 4, 4, new_tokens=6, repetitions=1)
    ),
    "mixed": Case(
        "Generation, 64 prompts, answers of different lengths",
        Sizes(64, 16, new_tokens=96, mixed=True, repetitions=2),
        Sizes(6, 3, new_tokens=8, mixed=True, repetitions=1),
    ),
}


def run(model: Path, name: str, *, quick: bool, peers: bool, say: Callable[[str], None]) -> Iterator[Result]:
    """One result per case. Raises AgentArkError when more than 1 % of the greedy tokens differ."""
    for key, case in CASES.items():
        yield measure(key, case, case.quick if quick else case.sizes, model, name, quick=quick, peers=peers, say=say)


def measure(
    key: str, case: Case, sizes: Sizes, model: Path, name: str, *, quick: bool, peers: bool, say: Callable[[str], None]
) -> Result:
    """One case. Raises AgentArkError when the sides do not generate the same."""
    config = load_config(model)
    prompts = make_prompts(model, sizes.prompts)
    lengths = [len(prompt) for prompt in prompts for _ in range(sizes.samples)]
    # By peer, the module of its side and the environment in which that runs; Tunix's side knows one family.
    others = {TRANSFORMERS: ("benchmarks.transformers_generation", "trl")} if peers else {}
    if peers and config.model_type == "gemma3_text":
        others[TUNIX] = ("benchmarks.tunix_generation", "tunix")
    before = environment({peer: environments.versions(peer) for _, peer in others.values()})
    work = {"model": str(model), "side": "generation", "prompts": prompts, "new_tokens": sizes.wanted}
    work |= {"samples": sizes.samples, "slots": sizes.slots}
    checks: list[Check] = []

    def check(replies: dict[str, Reply]) -> None:
        for peer in others:
            checks.extend(compare_tokens(replies[OURS]["greedy"], replies[peer]["greedy"], peer))

    sides = [
        Side(MACHINE, "benchmarks.jax_sides", machine(config, sizes.slots)),
        Side(OURS, "benchmarks.jax_sides", work),
        *(Side(peer, module, work, environments.python(where)) for peer, (module, where) in others.items()),
    ]
    say(f"{key}: {case.title}")
    measured = [interleaved(sides, sizes.repetitions, check, say)]
    check_counts(measured, sizes.wanted)
    prefilled = lengths[:: sizes.samples]  # once for all samples
    steps = schedule(lengths, sizes.wanted, sizes.slots)
    return Result(
        benchmark=f"{NAME}.{key}",
        title=case.title,
        unit="new tokens/s",
        quick=quick,
        model={"name": name, "model_type": config.model_type},
        sizes={**asdict(sizes), "prompt_tokens": sum(prefilled), "all_new_tokens": sum(sizes.wanted)},
        rows=rows_of(
            measured,
            DESCRIPTIONS,
            lambda side: decoding(config, steps, prefill_flops(config, prefilled)),
            lambda side, able: floor_seconds(config, prefilled, steps, able["rates"], able["bandwidth"]),
            sum(sizes.wanted),
            case.floor_goal,
        ),
        ratios=ratios_of(measured, OURS, case.goals),
        checks=checks,
        rates=rates_of(measured),
        environment=before,
    )


def machine(config: ModelConfig, rows: int) -> Reply:
    """The setup of the side that measures what the machine can do, for steps of so many sequences."""
    shapes = {
        "prefill": (1024, config.hidden_size, config.intermediate_size),
        "decode": (rows, config.hidden_size, config.intermediate_size),
        "head": (rows, config.hidden_size, config.vocab_size),
    }
    return {"side": "machine", "shapes": shapes, "seconds": 0.5, "bandwidth_bytes": 2**29}


def schedule(lengths: Sequence[int], wanted: Sequence[int], slots: int) -> list[list[int]]:
    """The positions that each decode step reads when a sequence takes the place of one that ends, in their order.

    A sequence's first step reads its last prompt token; its last new token is never read.
    """
    waiting = [list(range(length - 1, length - 1 + new)) for length, new in zip(lengths, wanted, strict=True)]
    running, steps = [], []
    while waiting or running:
        while waiting and len(running) < slots:
            running.append(waiting.pop(0))
        steps.append([positions.pop(0) for positions in running])
        running = [positions for positions in running if positions]
    return steps


def decoding(config: ModelConfig, steps: Sequence[Sequence[int]], prefill: Flops) -> Flops:
    """The work of all steps and of the prefill together."""
    total = {**prefill, "head": 0}
    for positions in steps:
        for part, count in decode_flops(config, positions).items():
            total[part] += count
    return total


def floor_seconds(
    config: ModelConfig,
    prefilled: Sequence[int],
    steps: Sequence[Sequence[int]],
    rates: Mapping[str, float],
    bandwidth: float,
    width: int = FP32_BYTES,
) -> float:
    """`rates` in FLOP/s of the products named prefill, decode and head; `bandwidth` in bytes/s; `width` of a number."""
    prefill = sum(prefill_flops(config, prefilled).values()) / rates["prefill"]
    return prefill + sum(step_seconds(config, positions, rates, bandwidth, width) for positions in steps)


def step_seconds(
    config: ModelConfig,
    positions: Sequence[int],
    rates: Mapping[str, float],
    bandwidth: float,
    width: int = FP32_BYTES,
) -> float:
    """The least time of one decode step, as in `floor_seconds`."""
    flops = decode_flops(config, positions)
    computing = (flops["trunk"] + flops["attention"]) / rates["decode"] + flops["head"] / rates["head"]
    return max(computing, decode_bytes(config, positions, width) / bandwidth)


def check_counts(measured: Sequence[Group], wanted: Sequence[int]) -> None:
    """Raises AgentArkError when a side gave other numbers of tokens than it was asked for in some repetition."""
    for group in measured:
        for side, replies in group.items():
            for index, reply in enumerate(replies):
                if side != MACHINE and reply["counts"] != list(wanted):
                    raise AgentArkError(
                        f"{NAME}: {side} gave {sum(reply['counts'])} tokens in repetition {index}, not the "
                        f"{sum(wanted)} that it was asked for, or in other portions"
                    )


def compare_tokens(ours: Sequence[Sequence[int]], theirs: Sequence[Sequence[int]], peer: str) -> list[Check]:
    """Shares of greedy tokens and of whole sequences that differ. Raises AgentArkError when too many tokens do.

    Where two tokens score the same up to rounding the sides may part, and the rest of that sequence with them.
    """
    lengths = [[len(ids) for ids in side] for side in (ours, theirs)]
    if lengths[0] != lengths[1]:
        raise AgentArkError(f"{NAME}: {peer} gave sequences of {lengths[1]} tokens, not of {lengths[0]}")
    differs = [np.not_equal(ids, others) for ids, others in zip(ours, theirs, strict=True)]
    tokens = float(np.concatenate(differs).mean())
    if tokens > DISAGREEMENT_LIMIT:
        raise AgentArkError(
            f"{NAME}: {tokens:.1%} of the greedy tokens of {peer} differ from ours (at most {DISAGREEMENT_LIMIT:.0%} "
            "may); speed says nothing before the sides agree"
        )
    sequences = float(np.mean([found.any() for found in differs]))
    return [
        Check(f"share of greedy tokens that differ, {peer}", tokens, DISAGREEMENT_LIMIT),
        Check(f"share of sequences that differ somewhere, {peer}", sequences, None),
    ]
