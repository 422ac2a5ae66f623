"""Greedy generation of a fixed number of tokens: the embedded engine against `transformers.generate`.

Same weights, prompts and fp32; no sequence stops early, so the work is equal. The floor: prefill FLOPs over the
measured rate, then for every step of all sequences the larger of FLOPs over rate and bytes over bandwidth.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from agentark_jax.errors import AgentArkError
from agentark_jax.models.config import ModelConfig, load_config
from agentark_jax.models.flops import FP32_BYTES, Flops, decode_bytes, decode_flops, prefill_flops
from benchmarks.inputs import prompts as make_prompts
from benchmarks.results import MACHINE, Check, Result, environment, rates_of, ratios_of, rows_of
from benchmarks.workers import Reply, Side, interleaved

NAME = "generation"
OURS, PEER = "agentark_jax", "transformers.generate"
DESCRIPTIONS = {OURS: "agentark_jax, embedded engine", PEER: "transformers.generate, left-padded batch"}
GOALS = {PEER: 2.0}
DISAGREEMENT_LIMIT = 0.01


@dataclass(frozen=True)
class Sizes:
    prompts: int = 48
    new_tokens: int = 48
    repetitions: int = 3


def run(model: Path, name: str, *, quick: bool, peers: bool, say: Callable[[str], None]) -> Iterator[Result]:
    """Raises AgentArkError when more than 1 % of the greedy tokens differ."""
    sizes = Sizes(new_tokens=16, repetitions=2) if quick else Sizes()
    config = load_config(model)
    prompts = make_prompts(model, sizes.prompts)
    lengths = [len(prompt) for prompt in prompts]
    before = environment()
    checks: list[Check] = []

    def check(replies: dict[str, Reply]) -> None:
        if peers:
            checks.extend(compare_tokens(replies[OURS]["ids"], replies[PEER]["ids"], sizes.new_tokens))

    common = {"model": str(model), "side": "generation", "prompts": prompts, "new_tokens": sizes.new_tokens}
    shapes = {
        "prefill": (1024, config.hidden_size, config.intermediate_size),
        "decode": (sizes.prompts, config.hidden_size, config.intermediate_size),
        "head": (sizes.prompts, config.hidden_size, config.vocab_size),
    }
    sides = [
        Side(
            MACHINE,
            "benchmarks.jax_sides",
            {"side": "machine", "shapes": shapes, "seconds": 0.5, "bandwidth_bytes": 2**29},
        ),
        Side(OURS, "benchmarks.jax_sides", common),
    ]
    if peers:
        sides.append(Side(PEER, "benchmarks.torch_sides", common))
    measured = [interleaved(sides, sizes.repetitions, check, say)]
    yield Result(
        benchmark=NAME,
        title="Generation",
        unit="new tokens/s",
        quick=quick,
        model={"name": name, "model_type": config.model_type},
        sizes={**asdict(sizes), "prompt_tokens": sum(lengths)},
        rows=rows_of(
            measured,
            DESCRIPTIONS,
            lambda side: total_flops(config, lengths, sizes.new_tokens),
            lambda side, able: floor_seconds(config, lengths, sizes.new_tokens, able["rates"], able["bandwidth"]),
            sizes.prompts * sizes.new_tokens,
        ),
        ratios=ratios_of(measured, OURS, GOALS),
        checks=checks,
        rates=rates_of(measured),
        environment=before,
    )


def step_positions(lengths: list[int], new_tokens: int) -> list[list[int]]:
    """The positions that each decode step reads: the last prompt token first, the last new token never."""
    return [[length - 1 + step for length in lengths] for step in range(new_tokens)]


def total_flops(config: ModelConfig, lengths: list[int], new_tokens: int) -> Flops:
    """Prefill and all steps together."""
    total = {**prefill_flops(config, lengths), "head": 0}
    for positions in step_positions(lengths, new_tokens):
        for part, count in decode_flops(config, positions).items():
            total[part] += count
    return total


def floor_seconds(
    config: ModelConfig,
    lengths: list[int],
    new_tokens: int,
    rates: dict[str, float],
    bandwidth: float,
    width: int = FP32_BYTES,
) -> float:
    """`rates` in FLOP/s of the products named prefill, decode and head; `bandwidth` in bytes/s; `width` of a number."""
    seconds = sum(prefill_flops(config, lengths).values()) / rates["prefill"]
    for positions in step_positions(lengths, new_tokens):
        flops = decode_flops(config, positions)
        computing = (flops["trunk"] + flops["attention"]) / rates["decode"] + flops["head"] / rates["head"]
        seconds += max(computing, decode_bytes(config, positions, width) / bandwidth)
    return seconds


def compare_tokens(ours: list[list[int]], theirs: list[list[int]], new_tokens: int) -> list[Check]:
    """Shares of tokens and of whole sequences that differ. Raises AgentArkError when too many tokens do.

    Where two tokens score the same up to rounding the sides may part, and the rest of that sequence with them.
    """
    first, second = np.asarray(ours), np.asarray(theirs)
    if first.shape != second.shape or first.shape[1] != new_tokens:
        raise AgentArkError(f"{NAME}: tokens of shapes {first.shape} and {second.shape}; wanted {new_tokens} new each")
    differs = first != second
    tokens, sequences = float(differs.mean()), float(differs.any(axis=1).mean())
    if tokens > DISAGREEMENT_LIMIT:
        raise AgentArkError(
            f"{NAME}: {tokens:.1%} of the greedy tokens differ (at most {DISAGREEMENT_LIMIT:.0%} may); "
            "speed says nothing before the sides agree"
        )
    return [
        Check("share of greedy tokens that differ", tokens, DISAGREEMENT_LIMIT),
        Check("share of sequences that differ somewhere", sequences, None),
    ]
