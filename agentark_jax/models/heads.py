"""Heads on the hidden states beside the language model's own: labels of steps (PRM) and values of positions.

A head is an affine map with parameters {weight: [outputs, D], bias: [outputs]}. A model's heads live in one file beside
its weights, `head.safetensors`, with tensors named `<kind>.weight` and `<kind>.bias`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from agentark_jax.errors import AgentArkError, UsageError
from agentark_jax.files import atomic_path
from agentark_jax.models.config import ModelConfig

HeadKind = Literal["prm", "value"]
Head = dict[str, Array]

HEAD_FILE = "head.safetensors"
_OUTPUTS: Mapping[HeadKind, int] = {"prm": 2, "value": 1}


def init_head(config: ModelConfig, kind: HeadKind, seed: int) -> Head:
    """Fresh float32 parameters: normal weights with the model's `initializer_range`, bias 0."""
    shape = (_OUTPUTS[kind], config.hidden_size)
    weight = config.initializer_range * jax.random.normal(jax.random.key(seed), shape, jnp.float32)
    return {"weight": weight, "bias": jnp.zeros(shape[0], jnp.float32)}


def step_logits(head: Head, h: Float[Array, "B T D"], positions: Int[Array, "B S"]) -> Float[Array, "B S 2"]:
    """Scores, float32, of the labels 0 (wrong) and 1 (right) of the steps that end at `positions`.

    Rows with fewer than S steps are padded with any valid position; what is said of those must be masked.
    """
    ends = jnp.take_along_axis(h, positions[..., None], axis=1)
    return _affine(head, ends)


def position_logits(head: Head, h: Float[Array, "B T D"]) -> Float[Array, "B T 2"]:
    """`step_logits` of every position."""
    return _affine(head, h)


def values(head: Head, h: Float[Array, "B T D"]) -> Float[Array, "B T"]:
    """The value of every position, float32."""
    return _affine(head, h)[..., 0]


def _affine(head: Head, h: Float[Array, "*B D"]) -> Float[Array, "*B O"]:
    return jnp.einsum("...d,od->...o", h, head["weight"], preferred_element_type=jnp.float32) + head["bias"]


def save_heads(directory: Path, heads: Mapping[HeadKind, Head]) -> Path:
    """Write `head.safetensors` into a model directory, replacing the one there; it is complete or not there.

    Raises AgentArkError when it cannot be written.
    """
    path = Path(directory) / HEAD_FILE
    tensors = {f"{kind}.{name}": np.asarray(leaf) for kind, head in heads.items() for name, leaf in head.items()}
    with atomic_path(path) as temporary:
        save_file(tensors, temporary)
        temporary.chmod(0o644)  # safetensors makes its files private
    return path


def load_heads(directory: Path, config: ModelConfig) -> dict[HeadKind, Head]:
    """The heads in `head.safetensors` of a model directory, by kind.

    Raises UsageError when the file is missing or its tensors (all are listed) are not those of heads of this model,
    AgentArkError when it cannot be read.
    """
    path = Path(directory) / HEAD_FILE
    if not path.is_file():
        raise UsageError(f"{path}: not found; this model has no head beside the language model's, train one first")
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise AgentArkError(f"{path}: not a readable safetensors file ({error}); restore it from its source") from error
    heads: dict[HeadKind, Head] = {}
    expected: dict[str, tuple[int, ...]] = {}
    for kind, outputs in _OUTPUTS.items():
        if any(name.startswith(f"{kind}.") for name in tensors):
            expected |= {f"{kind}.weight": (outputs, config.hidden_size), f"{kind}.bias": (outputs,)}
            heads[kind] = {part: jnp.asarray(tensors.get(f"{kind}.{part}", 0)) for part in ("weight", "bias")}
    problems = [f"unexpected {name}" for name in sorted(tensors.keys() - expected.keys())]
    for name, shape in expected.items():
        if name not in tensors:
            problems.append(f"missing {name}")
        elif tensors[name].shape != shape:
            problems.append(f"misshaped {name}: {tensors[name].shape}, expected {shape}")
    if problems or not heads:
        raise UsageError(f"{path}: {'; '.join(problems) or 'no heads'}; it does not belong to this model")
    return heads
