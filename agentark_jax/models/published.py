"""Shapes of published models, so that a plan for one needs neither its weights nor a network.

The entries hold what the models' `config.json` say and have passed through `ModelConfig.from_hf`, like any other.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from agentark_jax.errors import AgentArkError, UsageError
from agentark_jax.models.config import ModelConfig, load_config
from agentark_jax.models.source import SCRATCH, ModelSourceConfig

_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "max_position_embeddings",
)


def _qwen3(*sizes: int, tied: bool) -> dict[str, Any]:
    return {
        **dict(zip(_SIZES, (*sizes, 128, 151936, 40960), strict=True)),
        "model_type": "qwen3",
        "attention_bias": False,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "tie_word_embeddings": tied,
    }


def _qwen2(*sizes: int, vocabulary: int, positions: int, tied: bool) -> dict[str, Any]:
    return {
        **dict(zip(_SIZES, (*sizes, 128, vocabulary, positions), strict=True)),
        "model_type": "qwen2",
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "tie_word_embeddings": tied,
    }


def _llama3(*sizes: int, factor: float, tied: bool) -> dict[str, Any]:
    bands = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    return {
        **dict(zip(_SIZES, (*sizes, 128256, 131072), strict=True)),
        "model_type": "llama",
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 5e5,
        "rope_scaling": {"rope_type": "llama3", "factor": factor, **bands},
        "tie_word_embeddings": tied,
    }


def _gemma(*sizes: int) -> dict[str, Any]:
    return {
        **dict(zip(_SIZES, (*sizes, 256000, 8192), strict=True)),
        "model_type": "gemma",
        "hidden_act": "gelu_pytorch_tanh",
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e4,
    }


def _gemma3(*sizes: int, query_scalar: int = 256) -> dict[str, Any]:
    return {
        **dict(zip(_SIZES, (*sizes, 262144, 32768), strict=True)),
        "model_type": "gemma3_text",
        "attention_bias": False,
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": query_scalar,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "rope_local_base_freq": 1e4,
        "sliding_window": 512,
        "sliding_window_pattern": 6,
    }


def _gemma3_of_multimodal(*sizes: int, query_scalar: int = 256) -> dict[str, Any]:
    """The text model within a multimodal checkpoint, which has a few more tokens and a longer context."""
    return {
        **_gemma3(*sizes, query_scalar=query_scalar),
        "vocab_size": 262208,
        "max_position_embeddings": 131072,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        "sliding_window": 1024,
    }


PUBLISHED: Mapping[str, Mapping[str, Any]] = {
    "Qwen/Qwen3-0.6B": _qwen3(1024, 3072, 28, 16, 8, tied=True),
    "Qwen/Qwen3-1.7B": _qwen3(2048, 6144, 28, 16, 8, tied=True),
    "Qwen/Qwen3-4B": _qwen3(2560, 9728, 36, 32, 8, tied=True),
    "Qwen/Qwen3-8B": _qwen3(4096, 12288, 36, 32, 8, tied=False),
    "Qwen/Qwen3-14B": _qwen3(5120, 17408, 40, 40, 8, tied=False),
    "Qwen/Qwen3-32B": _qwen3(5120, 25600, 64, 64, 8, tied=False),
    "Qwen/Qwen2.5-1.5B": _qwen2(1536, 8960, 28, 12, 2, vocabulary=151936, positions=131072, tied=True),
    "Qwen/Qwen2.5-7B": _qwen2(3584, 18944, 28, 28, 4, vocabulary=152064, positions=131072, tied=False),
    "meta-llama/Llama-3.2-1B": _llama3(2048, 8192, 16, 32, 8, 64, factor=32.0, tied=True),
    "meta-llama/Llama-3.2-3B": _llama3(3072, 8192, 28, 24, 8, 128, factor=32.0, tied=True),
    "meta-llama/Llama-3.1-8B": _llama3(4096, 14336, 32, 32, 8, 128, factor=8.0, tied=False),
    "meta-llama/Llama-3.1-70B": _llama3(8192, 28672, 80, 64, 8, 128, factor=8.0, tied=False),
    "google/gemma-7b": _gemma(3072, 24576, 28, 16, 16, 256),
    "google/gemma-3-270m": _gemma3(640, 2048, 18, 4, 1, 256),
    "google/gemma-3-1b": _gemma3(1152, 6912, 26, 4, 1, 256),
    "google/gemma-3-4b": _gemma3_of_multimodal(2560, 10240, 34, 8, 4, 256),
    "google/gemma-3-12b": _gemma3_of_multimodal(3840, 15360, 48, 16, 8, 256),
    "google/gemma-3-27b": _gemma3_of_multimodal(5376, 21504, 62, 32, 16, 128, query_scalar=168),
}
_SAME_SHAPE = {"gguf:gemma3-270m": "google/gemma-3-270m"}
_VARIANT = re.compile(r"-(Base|Instruct|it|pt)$")  # tuned or not, the shape is the same


def describe(model: ModelSourceConfig) -> ModelConfig:
    """The shape of a run's model, without its weights: from a directory, the table above, `scratch` or the hub.

    A directory that does not exist yet may have the name of a published model: `./models/gemma-3-4b-it`.

    Raises UsageError for a source that is none of these, AgentArkError where the hub does not provide a config.
    """
    source = model.source
    if source == SCRATCH:
        raw = model.scratch.to_hf(vocabulary=model.scratch.vocabulary, bos_id=None, eos_id=0)
        return ModelConfig.from_hf(raw, "model.scratch")
    path = Path(source).expanduser()
    if path.is_dir():
        return load_config(path)
    name = _VARIANT.sub("", _SAME_SHAPE.get(source, source))
    if source.startswith((".", "/", "~")):  # a directory that is not there yet can still be planned for
        names = [known for known in PUBLISHED if known.split("/")[1] == _VARIANT.sub("", path.name)]
        if not names:
            raise UsageError(f"model.source: {source}: no such directory; give one in Hugging Face format, or a hub id")
        name = names[0]
    if name in PUBLISHED:
        return ModelConfig.from_hf(PUBLISHED[name], source)
    return load_config(_download_config(source))


def _download_config(source: str) -> Path:
    """A directory with the `config.json` of a hub id."""
    # Imported here: only hub ids need it, and it takes a while.
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        return Path(hf_hub_download(source, "config.json")).parent
    except HFValidationError as error:
        raise UsageError(
            f"model.source: {source!r} is neither a directory nor a hub id like org/name; correct it"
        ) from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        raise AgentArkError(
            f"model.source: the hub did not provide the config.json of {source!r} ({error}); give a directory that "
            f"holds it, or one of {', '.join(PUBLISHED)}"
        ) from error
