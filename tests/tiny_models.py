"""What several tests need of tiny models: a directory of one, and the logits of any."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np

from agentark_jax.models import transformer
from agentark_jax.models.config import ModelConfig, load_config
from agentark_jax.models.source import ScratchConfig
from agentark_jax.models.weights import save_pretrained

_hidden = jax.jit(transformer.hidden_states, static_argnums=0)


QWEN3: dict[str, Any] = {
    "model_type": "qwen3",
    "vocab_size": 320,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "max_position_embeddings": 128,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    "attention_bias": False,
    "attention_dropout": 0.0,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
}
"""The `config.json` of a tiny Qwen3 with a head of its own."""


def write_model(directory: Path, vocabulary: int, **changes: Any) -> Path:
    """A model with large random weights, so that what it says depends on what it was told; `changes` of its shape."""
    shape = {"hidden_size": 32, "layers": 2, "head_dim": 8, "intermediate_size": 48, **changes}
    raw = ScratchConfig(**shape).to_hf(vocabulary=vocabulary, bos_id=2, eos_id=1)
    (directory / "config.json").write_text(json.dumps(raw))
    config = load_config(directory)
    params = jax.tree.map(lambda leaf: leaf * 5, transformer.init_params(config, 0))
    return save_pretrained(directory, config, params, directory)


def positions_of(ids: np.ndarray) -> np.ndarray:
    """0, 1, … in every row."""
    return np.broadcast_to(np.arange(ids.shape[1], dtype=np.int32), ids.shape)


def our_logits(
    config: ModelConfig,
    params: transformer.Params,
    ids: np.ndarray,
    positions: np.ndarray | None = None,
    segments: np.ndarray | None = None,
) -> np.ndarray:
    """Logits [B, T, V] of whole rows of ids."""
    h = _hidden(config, params, ids, positions_of(ids) if positions is None else positions, segments)
    return np.asarray(transformer.logits(config, params, h))
