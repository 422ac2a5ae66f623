"""Tunix's Gemma 3 in fp32 from a directory in Hugging Face format, for its sides; runs in its environment."""

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from tunix.models.gemma3.model import Gemma3, ModelConfig
from tunix.models.gemma3.params_safetensors import create_model_from_safe_tensors


def load(directory: Path, mesh: Any = None, **settings: Any) -> tuple[ModelConfig, Gemma3]:
    """`settings`: more of Tunix's configuration. Raises ValueError for a model that is not Gemma 3."""
    raw = json.loads((directory / "config.json").read_text())
    if raw["model_type"] != "gemma3_text":
        raise ValueError(f"{directory}: this side knows gemma3_text only, not {raw['model_type']}")
    rope = raw.get("rope_parameters", {})
    config = ModelConfig(
        num_layers=raw["num_hidden_layers"],
        num_embed=raw["vocab_size"],
        embed_dim=raw["hidden_size"],
        hidden_dim=raw["intermediate_size"],
        num_heads=raw["num_attention_heads"],
        head_dim=raw["head_dim"],
        num_kv_heads=raw["num_key_value_heads"],
        sliding_window_size=raw["sliding_window"],
        local_base_frequency=int(rope["sliding_attention"]["rope_theta"] if rope else raw["rope_local_base_freq"]),
        global_base_frequency=int(rope["full_attention"]["rope_theta"] if rope else raw["rope_theta"]),
        param_dtype=jnp.float32,
        **settings,
    )
    return config, create_model_from_safe_tensors(str(directory), config, mesh, dtype=jnp.float32)
