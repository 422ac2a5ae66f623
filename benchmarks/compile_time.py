"""How the time to compile a training step grows with depth: 36 layers against 12 of the same width.

Layers are scanned over one repetition of their pattern, so it should hardly grow. Every compilation is one of a fresh
process without a compilation cache; the depths take turns.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.results import Comparison, Measured, Ratio, Spread, environment
from benchmarks.workers import Side, Worker

NAME = "compile_time"
DEEP, SHALLOW = 36, 12
GOAL = 1.5
COMMON: dict[str, Any] = {
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 4096,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "tie_word_embeddings": True,
}


def qwen3(layers: int) -> dict[str, Any]:
    """Every layer of the same type."""
    rope = {"rope_type": "default", "rope_theta": 1e6}
    own = {"model_type": "qwen3", "hidden_act": "silu", "rope_parameters": rope, "use_sliding_window": False}
    return {**COMMON, **own, "num_hidden_layers": layers}


def gemma3(layers: int) -> dict[str, Any]:
    """Five layers with a window, then one without, and so on."""
    kinds = ["full_attention" if layer % 6 == 5 else "sliding_attention" for layer in range(layers)]
    bases = {"full_attention": 1e6, "sliding_attention": 1e4}
    own = {
        "model_type": "gemma3_text",
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": 64,
        "sliding_window": 128,
        "rope_parameters": {kind: {"rope_type": "default", "rope_theta": base} for kind, base in bases.items()},
    }
    return {**COMMON, **own, "num_hidden_layers": layers, "layer_types": kinds}


FAMILIES = {"Qwen3": qwen3, "Gemma 3": gemma3}


def run(model: Path, name: str, *, quick: bool, peers: bool, say: Callable[[str], None]) -> Iterator[Comparison]:
    """`model` and `peers` play no part: the models are made up and there is nobody to compare with."""
    repetitions = 2 if quick else 5
    before = environment()
    measured, ratios = [], []
    for family, config in FAMILIES.items():
        seconds: dict[int, list[float]] = {SHALLOW: [], DEEP: []}
        for repetition in range(repetitions):
            for layers, taken in seconds.items():
                setup = {"side": "compilation", "config": config(layers), "batch": 4, "length": 256}
                with Worker(Side(f"{family}, {layers} layers", "benchmarks.jax_sides", setup)) as worker:
                    taken.append(worker.repeat(repetition)["seconds"])
                say(f"{family}, {layers} layers: {taken[-1]:.2f} s")
        for layers, taken in seconds.items():
            what = f"pattern of {family}, {layers} layers"
            measured.append(Measured(f"{family}, {layers}", what, "s", Spread.of(taken)))
        pairs = [deep / shallow for shallow, deep in zip(seconds[SHALLOW], seconds[DEEP], strict=True)]
        ratios.append(Ratio(f"{family}, {DEEP}", f"{family}, {SHALLOW}", Spread.of(pairs), GOAL))
    yield Comparison(
        benchmark=NAME,
        title="Compilation of a training step",
        quick=quick,
        model={"name": "two small made-up models"},
        sizes={"hidden_size": COMMON["hidden_size"], "vocabulary": COMMON["vocab_size"], "repetitions": repetitions},
        measured=measured,
        ratios=ratios,
        checks=[],
        environment=before,
    )
