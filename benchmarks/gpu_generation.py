"""Decoding on one GPU in bfloat16 through the embedded engine, against what reading weights and cache takes at least.

Qwen3-0.6B's shape with random weights, 256 different prompts of 128 tokens at once, 256 greedy tokens for each. The
floor: prefill FLOPs over the measured rate, then for every step the larger of its FLOPs over the rate and its bytes
(every weight once, the attended part of the cache) over the measured bandwidth.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from agentark_jax.errors import AgentArkError
from agentark_jax.models.config import ModelConfig
from agentark_jax.models.flops import prefill_flops
from benchmarks.generation import decoding, floor_seconds, schedule
from benchmarks.gpu_inputs import alone, device_memory, is_tiny, shape_of
from benchmarks.results import MACHINE, Check, Result, Spread, environment, rates_of, rows_of
from benchmarks.workers import Reply, Side

NAME = "gpu_generation"
SHAPE = "Qwen/Qwen3-0.6B"
OURS = "agentark_jax"
FLOOR_GOAL = 0.5
WIDTH = 2  # bytes of a weight and of a number in the cache
SCORE_LIMIT = 0.1  # nats; bf16 rounds logits of size 4 to 0.03


@dataclass(frozen=True)
class Sizes:
    prompts: int = 256
    prompt_tokens: int = 128
    new_tokens: int = 256
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
    """`model` plays no part: the weights are random; nor do `peers`, there being none.

    Raises AgentArkError when the engine did other work than it was asked for, UsageError where there is no GPU.
    """
    sizes = sizes or (Sizes(repetitions=2) if quick else Sizes())
    config = ModelConfig.from_hf(shape_of(shape), shape)
    before = environment()
    shapes = {
        "prefill": (4 * sizes.prompt_tokens, config.hidden_size, config.intermediate_size),
        "decode": (sizes.prompts, config.hidden_size, config.intermediate_size),
        "head": (sizes.prompts, config.hidden_size, config.vocab_size),
    }
    machine = {"side": "machine", "shapes": shapes, "bandwidth_bytes": 2**20 if is_tiny(shape) else 2**32}
    asked = {key: value for key, value in asdict(sizes).items() if key != "repetitions"}
    sides = [
        Side(MACHINE, "benchmarks.gpu_jax", machine),
        Side(OURS, "benchmarks.gpu_jax", {"side": "generation", "shape": shape_of(shape), **asked}),
    ]
    checks: list[Check] = []

    def check(replies: dict[str, Reply]) -> None:
        if OURS in replies:
            checks.append(compare(replies[OURS], sizes))

    measured = alone(sides, sizes.repetitions, check, say, anywhere=is_tiny(shape))
    lengths = [sizes.prompt_tokens] * sizes.prompts
    steps = schedule(lengths, [sizes.new_tokens] * sizes.prompts, sizes.prompts)
    checks.append(
        Check("thousands of new tokens/s after the first ones", after_the_first(measured[OURS], sizes) / 1e3, None)
    )
    checks.append(Check("peak memory of the GPU in GB", device_memory(measured[OURS]), None))
    yield Result(
        benchmark=NAME,
        title="Generation on a GPU",
        unit="new tokens/s",
        quick=quick,
        model={"name": f"shape of {shape}", "precision": "bf16"},
        sizes=asdict(sizes),
        rows=rows_of(
            [measured],
            {OURS: "agentark_jax, embedded engine"},
            lambda side: decoding(config, steps, prefill_flops(config, lengths)),
            lambda side, able: floor_seconds(config, lengths, steps, able["rates"], able["bandwidth"], WIDTH),
            sizes.prompts * sizes.new_tokens,
            {OURS: FLOOR_GOAL},
        ),
        ratios=[],
        checks=checks,
        rates=rates_of([measured]),
        environment={**before, "accelerator": measured[MACHINE][0]["device"]},
    )


def compare(reply: Reply, sizes: Sizes) -> Check:
    """Whether every prompt has all its tokens, and their log-probabilities are those of one pass over them.

    Raises AgentArkError where not: the speed of other work says nothing.
    """
    if set(reply["new_tokens"]) != {sizes.new_tokens} or len(reply["new_tokens"]) != sizes.prompts:
        raise AgentArkError(f"{NAME}: completions of {set(reply['new_tokens'])} tokens; wanted {sizes.new_tokens} each")
    if not reply["score_difference"] <= SCORE_LIMIT:
        raise AgentArkError(
            f"{NAME}: log-probabilities of decoded tokens lie {reply['score_difference']:.3f} nats from those of one "
            f"pass over them (at most {SCORE_LIMIT}); speed says nothing before they agree"
        )
    return Check("log-probabilities, decoded and in one pass, nats", reply["score_difference"], SCORE_LIMIT)


def after_the_first(replies: list[Reply], sizes: Sizes) -> float:
    """Tokens per second of decoding alone, median; what comes before, prefill mostly, was timed by itself."""
    tokens = sizes.prompts * (sizes.new_tokens - 1)
    return Spread.of([tokens / (reply["seconds"] - reply["first_token_seconds"]) for reply in replies[1:]]).median
