"""LoRA (arXiv 2106.09685): adapters of a model as a parameter tree of their own, merged, and in PEFT's files.

A config with `lora` set describes a model with adapters: beside each targeted projection of the (stacked) parameters
stands {a: [rank, in], b: [out, rank]} below `adapters`, and the one decoder uses it. `split` and `join` take the
adapter, which alone is trained, from the base and put it back.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array
from safetensors.numpy import save_file

from agentark_jax.errors import UsageError
from agentark_jax.models import transformer
from agentark_jax.models.config import LORA_TARGETS, Lora, ModelConfig, read_json
from agentark_jax.models.transformer import Params
from agentark_jax.models.weights import Entry, Tensors, named_tensors, replaced_directory, tensor_table

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# Keys of PEFT that change the math, and the only values with which these adapters agree (beside none at all).
_MUST_BE: Mapping[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "init_lora_weights": (True, "gaussian", "eva", "orthogonal"),  # others (PiSSA, OLoRA, …) change the base too
    "peft_type": ("LORA",),
    "task_type": ("CAUSAL_LM",),
}
# Keys of PEFT that do not change what a trained adapter does.
_NEUTRAL = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "inference_mode",
        "lora_dropout",
        "megatron_core",
        "peft_version",
        "qalora_group_size",
        "revision",
        "runtime_config",
    }
)


def is_adapter(path: tuple[str, ...]) -> bool:
    """Whether a path in the parameter tree is an adapter's."""
    return "adapters" in path


def split(params: Params) -> tuple[Params, Params]:
    """(base, adapter): the parameters without the adapter's, and the adapter's alone; `join` undoes it."""
    flat = flatten_dict(params)
    base = {path: leaf for path, leaf in flat.items() if not is_adapter(path)}
    return unflatten_dict(base), unflatten_dict({path: leaf for path, leaf in flat.items() if is_adapter(path)})


def join(base: Params, adapter: Params) -> Params:
    """The parameters of the model with adapters."""
    return unflatten_dict({**flatten_dict(base), **flatten_dict(adapter)})


def init_adapter(config: ModelConfig, seed: int) -> Params:
    """A fresh float32 adapter for a config with `lora`: A normal with variance 1/in, B zero, so nothing changes yet."""
    _lora(config)
    adapter = {}
    for number, (path, shape) in enumerate(sorted(flatten_dict(transformer.param_shapes(config)).items())):
        if is_adapter(path):
            noise = np.random.default_rng([seed, number]).normal(size=shape.shape) * shape.shape[-1] ** -0.5
            adapter[path] = jnp.asarray(noise if path[-1] == "a" else 0 * noise, jnp.float32)
    return unflatten_dict(adapter)


def merge(config: ModelConfig, params: Params) -> tuple[ModelConfig, Params]:
    """Config and stacked parameters of the model without adapters that computes the same: W + scale · B · A.

    The sum is taken in float32 and rounded to the weight's dtype.
    """
    scale = _lora(config).scale
    base, adapter = split(params)
    merged, flat = flatten_dict(base), flatten_dict(adapter)

    def added(weight: Array, a: Array, b: Array) -> Array:
        change = scale * jnp.einsum("...or,...ri->...oi", b, a, preferred_element_type=jnp.float32)
        return (weight.astype(jnp.float32) + change.reshape(weight.shape)).astype(weight.dtype)

    for path, a in flat.items():
        if path[-1] == "a":
            *place, _, name, _ = path
            weight = merged[(*place, name)]
            # Where the weight is divided over devices, so is the sum: none of them ever holds the whole of it.
            summed = jax.jit(added, out_shardings=weight.sharding)(weight, a, flat[(*path[:-1], "b")])
            merged[(*place, name)] = summed
    return dataclasses.replace(config, lora=None), unflatten_dict(merged)


def _lora(config: ModelConfig) -> Lora:
    if config.lora is None:
        raise UsageError("the config has no lora; set it to the adapter's rank, alpha and targets")
    return config.lora


def adapter_table(config: ModelConfig) -> list[Entry]:
    """Every tensor of the adapter in PEFT's names, from the table of the model's own tensors."""
    lora, table = _lora(config), []
    places = {LORA_TARGETS[target] for target in lora.targets}
    for entry in tensor_table(config):
        if entry.path[-2:] in places:
            *place, name = entry.path
            stem = f"base_model.model.{entry.name.removesuffix('.weight')}"
            for letter in ("a", "b"):
                path = (*place, "adapters", name, letter)
                table.append(Entry(f"{stem}.lora_{letter.upper()}.weight", path, entry.repeat))
    return table


def save_adapter(directory: Path, config: ModelConfig, params: Params, base_model: str) -> Path:
    """Write the adapter among `params`, alone or with its base, as a directory in PEFT's format, in float32.

    `base_model` is the hub id or path by which PEFT finds the base. The directory appears only when it is complete;
    an existing one is replaced. With several processes all must call this; the first one writes. Raises AgentArkError
    when it cannot be written.
    """
    lora = _lora(config)
    description = {
        "alpha_pattern": {},
        "base_model_name_or_path": base_model,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": lora.rank,
        "rank_pattern": {},
        "revision": None,
        "target_modules": list(lora.targets),
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    }
    tensors = named_tensors(params, adapter_table(config), np.dtype(np.float32))
    if jax.process_index() > 0:
        return Path(directory)
    with replaced_directory(Path(directory)) as fresh:
        save_file(tensors, fresh / _WEIGHTS, metadata={"format": "pt"})
        (fresh / _CONFIG).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
    return Path(directory)


def load_adapter(directory: Path, config: ModelConfig) -> tuple[ModelConfig, Params]:
    """The config of the model with the adapter of a directory in PEFT's format, and the adapter, float32.

    Raises UsageError for what PEFT can express and these adapters cannot (DoRA, ranks by layer, biases, saved
    modules, …), and listing every missing, unexpected and misshaped tensor; AgentArkError for a damaged file.
    """
    path = Path(directory) / _CONFIG
    raw = read_json(path)
    for key, value in raw.items():
        known = {"r", "lora_alpha", "target_modules"} | _NEUTRAL
        if key not in known and value and value not in _MUST_BE.get(key, ()):
            raise UsageError(f"{path}: key {key}: {value!r} is not supported; train the adapter without it")
    rank, alpha, targets = (raw.get(key) for key in ("r", "lora_alpha", "target_modules"))
    if not isinstance(rank, int) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise UsageError(f"{path}: r is {rank!r} and lora_alpha {alpha!r}; a whole number and a number are needed")
    if not isinstance(targets, list) or not set(targets) <= set(LORA_TARGETS):
        raise UsageError(f"{path}: key target_modules: {targets!r}; a list of some of {list(LORA_TARGETS)} is needed")
    if not (path.parent / _WEIGHTS).is_file():
        raise UsageError(f"{path.parent / _WEIGHTS}: not found; an adapter needs it beside {_CONFIG}")
    try:
        lora = Lora(rank, float(alpha), tuple(target for target in LORA_TARGETS if target in targets))
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from error
    adapted = dataclasses.replace(config, lora=lora)
    table, shapes = adapter_table(adapted), transformer.param_shapes(adapted)
    with Tensors([path.parent / _WEIGHTS]) as tensors:
        tensors.check(path, table, shapes)
        return adapted, tensors.tree(table, shapes, "float32")
