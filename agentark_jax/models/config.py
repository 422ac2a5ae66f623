"""`ModelConfig`: what a decoder is, read from a Hugging Face `config.json` of transformers 4 or 5.

Everything that changes the math is a field of `ModelConfig`; the table `_FAMILIES` at the end is the only place that
knows model families. Nothing that changes the math comes from a default: a missing key is an error, and so is a key
that is neither read nor on the list of neutral ones.
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from agentark_jax.errors import UsageError

LayerType = Literal["full_attention", "sliding_attention"]
# What the backward pass recomputes: nothing; all but the products with weights and the results of kernels; all but the
# outputs of attention and MLPs; all but the inputs of layers. Each keeps less than the one before.
Remat = Literal["none", "products", "outputs", "full"]
Activation = Literal["silu", "gelu_tanh"]

_ACTIVATIONS: Mapping[str, Activation] = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
_LAYER_TYPES: tuple[LayerType, ...] = ("full_attention", "sliding_attention")
_FALSE = (None, False, 0)
# What a rope dictionary must hold beside its base, by its type.
_ROPE_NUMBERS: Mapping[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}

# Keys that do not change the logits of a text-only decoder.
_NEUTRAL = frozenset(
    {
        "_attn_implementation_autoset",
        "_name_or_path",
        "_num_labels",
        "architectures",
        "attn_implementation",
        "auto_map",
        "cache_implementation",
        "chunk_size_feed_forward",
        "dtype",
        "finetuning_task",
        "id2label",
        "label2id",
        "output_attentions",
        "output_hidden_states",
        "prefix",
        "problem_type",
        "quantization_config",  # refused before, where it says anything
        "return_dict",
        "task_specific_params",
        "tokenizer_class",
        "torch_dtype",
        "torchscript",
        "transformers_version",
        "unsloth_fixed",
        "unsloth_version",
        "use_cache",
    }
)
# Keys that would change the math, and the only values with which this decoder agrees where no family reads them.
_MUST_BE: Mapping[str, tuple[Any, ...]] = {
    "add_cross_attention": _FALSE,
    "attention_dropout": _FALSE,
    "attn_logit_softcapping": _FALSE,  # transformers reads but does not apply it in the families supported here
    "is_decoder": (None, False, True),
    "is_encoder_decoder": _FALSE,
    "mlp_bias": _FALSE,
    "pretraining_tp": (None, 1),
    "pruned_heads": (None, {}),
    "tie_encoder_decoder": _FALSE,
    "use_bidirectional_attention": _FALSE,
}


@dataclass(frozen=True)
class RopeBands:
    """Which wavelengths Llama 3.1 scales (arXiv 2407.21783): those above `original_positions / low` positions wholly,
    those below `original_positions / high` not at all, those between by interpolation."""

    low: float
    high: float
    original_positions: float

    def __post_init__(self) -> None:
        if not 0 < self.low < self.high < math.inf:
            raise UsageError(
                f"low_freq_factor is {self.low} and high_freq_factor {self.high}; 0 < low < high is needed"
            )
        if not 0 < self.original_positions < math.inf:
            raise UsageError(f"original_max_position_embeddings is {self.original_positions}; it must be positive")


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding of one layer type: base `theta`, frequencies divided by `factor`.

    Without `bands` all of them are (linear scaling).
    """

    theta: float
    factor: float = 1.0
    bands: RopeBands | None = None

    def __post_init__(self) -> None:
        if not (self.theta > 1 and math.isfinite(self.theta)):
            raise UsageError(f"rope theta is {self.theta}; it must be a finite number above 1")
        if not (self.factor > 0 and math.isfinite(self.factor)):
            raise UsageError(f"rope scaling factor is {self.factor}; it must be a finite number above 0")


# Projections that can have an adapter, by their Hugging Face names, and where they are in a layer's parameters.
LORA_TARGETS: Mapping[str, tuple[str, str]] = {
    "q_proj": ("attention", "query"),
    "k_proj": ("attention", "key"),
    "v_proj": ("attention", "value"),
    "o_proj": ("attention", "output"),
    "gate_proj": ("mlp", "gate"),
    "up_proj": ("mlp", "up"),
    "down_proj": ("mlp", "down"),
}


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters (arXiv 2106.09685): projections `targets` become W + alpha / rank · B · A.

    A [rank, in] and B [out, rank] are the adapter's parameters. Invalid values raise UsageError.

    Args:
        rank: how many directions of its input each adapter reads.
        alpha: the adapters' outputs are multiplied by alpha / rank.
        targets: Hugging Face names of the projections that have an adapter, in every layer.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...] = tuple(LORA_TARGETS)

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise UsageError(f"lora.rank is {self.rank}; it must be at least 1")
        if not 0 < self.alpha < math.inf:
            raise UsageError(f"lora.alpha is {self.alpha}; it must be a finite number above 0")
        if not self.targets or not set(self.targets) <= set(LORA_TARGETS):
            raise UsageError(f"lora.targets is {list(self.targets)}; choose some of {list(LORA_TARGETS)}")

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    @property
    def projections(self) -> frozenset[str]:
        """The adapted projections by their names in the parameter tree."""
        return frozenset(LORA_TARGETS[target][1] for target in self.targets)


@dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer with RMS norms, rotary positions, grouped queries and a gated MLP.

    `attention_bias` adds biases to queries, keys and values, `attention_output_bias` to the projection that follows
    attention, `mlp_bias` to the three of the MLP. `norm_weight_offset` is added to every norm weight (Gemma stores w
    for 1 + w). `query_scale` multiplies the attention scores. `sandwich_norms` adds a norm after attention and one
    after the MLP. `sliding_window` counts the attended positions, the current one included, of `sliding_attention`
    layers. With `lora` the parameters have an adapter beside each projection that it targets.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    layer_types: tuple[LayerType, ...]
    sliding_window: int | None
    rope_full: Rope
    rope_sliding: Rope
    activation: Activation
    norm_eps: float
    norm_weight_offset: float
    embedding_scale: float
    query_scale: float
    qk_norm: bool
    sandwich_norms: bool
    attention_bias: bool
    attention_softcap: float | None
    final_softcap: float | None
    tie_embeddings: bool
    max_positions: int
    attention_output_bias: bool = False
    mlp_bias: bool = False
    lora: Lora | None = None
    initializer_range: float = 0.02
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        for key in ("vocab_size", "hidden_size", "intermediate_size", "num_heads", "num_kv_heads", "head_dim"):
            if getattr(self, key) < 1:
                raise UsageError(f"{key} is {getattr(self, key)}; it must be at least 1")
        if not self.layer_types:
            raise UsageError("the model has no layers; give at least one")
        unknown = sorted(set(self.layer_types) - set(_LAYER_TYPES))
        if unknown:
            raise UsageError(f"layer_types has {unknown}; supported are {list(_LAYER_TYPES)}")
        if "sliding_attention" in self.layer_types and (self.sliding_window is None or self.sliding_window < 1):
            raise UsageError(f"sliding_window is {self.sliding_window}; sliding_attention layers need it positive")
        if self.num_heads % self.num_kv_heads:
            raise UsageError(f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}")
        if self.head_dim % 2:
            raise UsageError(f"head_dim is {self.head_dim}; rotary positions need it even")
        if self.norm_eps <= 0:
            raise UsageError(f"norm_eps is {self.norm_eps}; it must be positive")
        for key in ("attention_softcap", "final_softcap"):
            value = getattr(self, key)
            if value is not None and value <= 0:
                raise UsageError(f"{key} is {value}; it must be positive, or null for none")

    @property
    def num_layers(self) -> int:
        return len(self.layer_types)

    @property
    def period(self) -> int:
        """Length of the shortest pattern of layer types that the stack repeats; layers are scanned over it."""
        types = self.layer_types
        for period in range(1, len(types)):
            if all(types[i] == types[i % period] for i in range(len(types))):
                return period
        return len(types)

    @property
    def num_periods(self) -> int:
        return self.num_layers // self.period

    def rope(self, layer_type: LayerType) -> Rope:
        return self.rope_sliding if layer_type == "sliding_attention" else self.rope_full

    def window(self, layer_type: LayerType) -> int | None:
        return self.sliding_window if layer_type == "sliding_attention" else None

    @staticmethod
    def from_hf(raw: Mapping[str, Any], where: str) -> "ModelConfig":
        """The config that a `config.json` describes; `where` names the file in messages.

        Raises UsageError for an unsupported model type (mixtures of experts and multimodal models too), quantised
        weights, a missing key, a value of the wrong type, an unsupported kind of rope, or a key that might change the
        math and is not understood.
        """
        keys = _Keys(raw, where)
        model_type = raw.get("model_type")
        if model_type == "gemma3" or {"text_config", "vision_config", "audio_config"} & raw.keys():
            way_out = f"choose a text model (one of {sorted(_FAMILIES)})"
            if model_type == "gemma3":
                way_out = "save the text model in it, as README (Gemma 3 from 4B on) says, and give its directory"
            raise UsageError(
                f"{where}: key model_type: {model_type!r} is a multimodal model, which is not supported; {way_out}"
            )
        if any("expert" in key for key in raw):
            raise UsageError(
                f"{where}: key model_type: {model_type!r} is a mixture of experts, which is not supported; choose a "
                f"dense model (one of {sorted(_FAMILIES)})"
            )
        if raw.get("quantization_config"):
            raise UsageError(
                f"{where}: key quantization_config: quantised weights are not supported; take the model that they were "
                "made from"
            )
        if not isinstance(model_type, str) or model_type not in _FAMILIES:
            raise UsageError(
                f"{where}: key model_type: {model_type!r} is not supported; supported are {sorted(_FAMILIES)}"
            )
        keys.ignore("model_type")
        family = _FAMILIES[model_type](keys)
        try:
            config = ModelConfig(
                model_type=model_type,
                vocab_size=keys.integer("vocab_size"),
                hidden_size=keys.integer("hidden_size"),
                intermediate_size=keys.integer("intermediate_size"),
                num_heads=keys.integer("num_attention_heads"),
                norm_eps=keys.number("rms_norm_eps"),
                attention_softcap=None,
                max_positions=keys.integer("max_position_embeddings"),
                initializer_range=keys.number("initializer_range", 0.02),
                bos_token_id=keys.optional_integer("bos_token_id"),
                eos_token_ids=keys.integers("eos_token_id"),
                pad_token_id=keys.optional_integer("pad_token_id"),
                **family,
            )
        except UsageError as error:
            raise error if where in str(error) else UsageError(f"{where}: {error}") from error
        keys.finish()
        return config


class _Keys:
    """Typed reads from a raw config that remember what was read, so that nothing unread passes unnoticed."""

    def __init__(self, raw: Mapping[str, Any], where: str) -> None:
        self.raw, self.where = raw, where
        self.used: set[str] = set()

    def fail(self, key: str, problem: str) -> UsageError:
        return UsageError(f"{self.where}: key {key}: {problem}")

    def ignore(self, *names: str) -> None:
        self.used.update(names)

    def get(self, key: str) -> Any:
        self.used.add(key)
        return self.raw.get(key)

    def number(self, key: str, default: float | None = None) -> float:
        value = self.get(key)
        value = default if value is None else value
        if value is None:
            raise self.fail(key, "is missing; it changes the result, so it has no default: add it")
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise self.fail(key, f"is {value!r}; a finite number is needed")
        return float(value)

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.number(key, default)
        if value != int(value):
            raise self.fail(key, f"is {value!r}; a whole number is needed")
        return int(value)

    def optional_integer(self, key: str) -> int | None:
        return None if self.get(key) is None else self.integer(key)

    def optional_number(self, key: str) -> float | None:
        return None if self.get(key) is None else self.number(key)

    def integers(self, key: str) -> tuple[int, ...]:
        """An integer, a list of integers, or nothing, as a tuple."""
        value = self.get(key)
        values = [] if value is None else value if isinstance(value, list) else [value]
        if not all(isinstance(item, int) and not isinstance(item, bool) for item in values):
            raise self.fail(key, f"is {value!r}; a token id or a list of token ids is needed")
        return tuple(values)

    def boolean(self, key: str, default: bool | None = None) -> bool:
        value = self.get(key)
        value = default if value is None else value
        if not isinstance(value, bool):
            raise self.fail(key, f"is {value!r}; true or false is needed")
        return value

    def activation(self, key: str) -> Activation:
        value = self.get(key)
        if not isinstance(value, str) or value not in _ACTIVATIONS:
            raise self.fail(key, f"is {value!r}; supported are {sorted(_ACTIVATIONS)}")
        return _ACTIVATIONS[value]

    def layer_types(self, number: int, default: Callable[[], list[LayerType]]) -> tuple[LayerType, ...]:
        value = self.get("layer_types")
        value = default() if value is None else value
        if not isinstance(value, list) or len(value) != number or not set(value) <= set(_LAYER_TYPES):
            raise self.fail("layer_types", f"is {value!r}; {number} entries out of {list(_LAYER_TYPES)} are needed")
        return tuple(value)

    def head_dim(self, default: int | None = None) -> int:
        value = self.integer("head_dim", default)
        if value < 1:
            raise self.fail("head_dim", f"is {value}; it must be at least 1")
        return value

    def rope(self, key: str, value: Any, theta: float | None) -> Rope:
        """A rope dictionary of either version; `theta` is the base when it is spelled outside of it."""
        value = {} if value is None else value
        if not isinstance(value, Mapping):
            raise self.fail(key, f"is {value!r}; an object is needed")
        kind = value.get("rope_type", value.get("type", "default"))
        if kind not in _ROPE_NUMBERS:
            raise self.fail(key, f"has rope_type {kind!r}; supported are {sorted(_ROPE_NUMBERS)}")
        unknown = sorted(set(value) - {"rope_type", "type", "rope_theta", "factor", *_ROPE_NUMBERS[kind]})
        if unknown:
            raise self.fail(key, f"has {unknown}, which this decoder does not know; remove or port it")
        inside = value.get("rope_theta")
        if inside is not None and theta is not None and inside != theta:
            raise self.fail(key, f"has rope_theta {inside}, elsewhere the file says {theta}; keep one of them")
        found: dict[str, Any] = {"rope_theta": theta if inside is None else inside, "factor": 1.0}
        found |= {name: value.get(name) for name in _ROPE_NUMBERS[kind]}
        for name, number in found.items():
            if not isinstance(number, int | float) or isinstance(number, bool):
                raise self.fail(key, f"{name} is {number!r}; a number is needed, it has no default")
        base, factor, *bands = (float(number) for number in found.values())
        try:
            return Rope(base, factor, RopeBands(*bands) if bands else None)
        except UsageError as error:
            raise self.fail(key, str(error)) from error

    def finish(self) -> None:
        for key, allowed in _MUST_BE.items():
            if key in self.raw and key not in self.used and self.raw[key] not in allowed:
                raise self.fail(key, f"is {self.raw[key]!r}; this decoder only supports {allowed[0]!r}")
        unknown = sorted(set(self.raw) - self.used - _NEUTRAL - set(_MUST_BE))
        if unknown:
            raise UsageError(
                f"{self.where}: unknown keys {unknown}: they may change the result; remove them if they do not, "
                "or extend the config table"
            )


def _attention_biases(keys: _Keys, default: bool | None = None) -> dict[str, bool]:
    """One flag for all four projections of attention."""
    bias = keys.boolean("attention_bias", default)
    return {"attention_bias": bias, "attention_output_bias": bias}


def _gemma3_text(keys: _Keys) -> dict[str, Any]:
    """Gemma 3, text only (arXiv 2503.19786): five local layers to one global, a rope for each."""
    number = keys.integer("num_hidden_layers")
    pattern = keys.optional_integer("sliding_window_pattern") or keys.optional_integer("_sliding_window_pattern")
    keys.ignore("_sliding_window_pattern")

    def by_pattern() -> list[LayerType]:
        if pattern is None:
            raise keys.fail("layer_types", "is missing, and so is sliding_window_pattern; add one of them")
        return ["full_attention" if (i + 1) % pattern == 0 else "sliding_attention" for i in range(number)]

    theta, local = keys.optional_number("rope_theta"), keys.optional_number("rope_local_base_freq")
    parameters, scaling = keys.get("rope_parameters"), keys.get("rope_scaling")
    if parameters is None:
        full, sliding = keys.rope("rope_scaling", scaling, theta), keys.rope("rope_local_base_freq", None, local)
    else:
        if not isinstance(parameters, Mapping) or set(parameters) - set(_LAYER_TYPES) or scaling is not None:
            raise keys.fail("rope_parameters", f"is {parameters!r}; one object for each layer type is needed, alone")
        full = keys.rope("rope_parameters.full_attention", parameters.get("full_attention"), theta)
        sliding = keys.rope("rope_parameters.sliding_attention", parameters.get("sliding_attention"), local)
    scalar = keys.number("query_pre_attn_scalar")
    if scalar <= 0:
        raise keys.fail("query_pre_attn_scalar", f"is {scalar}; it must be positive")
    return {
        "num_kv_heads": keys.integer("num_key_value_heads"),
        "head_dim": keys.head_dim(),
        "layer_types": keys.layer_types(number, by_pattern),
        "sliding_window": keys.optional_integer("sliding_window"),
        "rope_full": full,
        "rope_sliding": sliding,
        "activation": keys.activation("hidden_activation"),
        "norm_weight_offset": 1.0,
        "embedding_scale": keys.integer("hidden_size") ** 0.5,
        "query_scale": scalar**-0.5,
        "qk_norm": True,
        "sandwich_norms": True,
        **_attention_biases(keys),
        "final_softcap": keys.optional_number("final_logit_softcapping"),
        "tie_embeddings": keys.boolean("tie_word_embeddings", True),  # transformers leaves it out when it is true
    }


def _plain(keys: _Keys, head_dim: int) -> dict[str, Any]:
    """What Llama has and the others of its kind change: one rope, full attention, norms before each half of a layer."""
    parameters, scaling = keys.get("rope_parameters"), keys.get("rope_scaling")
    if parameters is not None and scaling is not None:
        raise keys.fail("rope_scaling", "stands beside rope_parameters; keep one of them")
    spelled = "rope_scaling" if parameters is None else "rope_parameters"
    rope = keys.rope(spelled, scaling if parameters is None else parameters, keys.optional_number("rope_theta"))
    return {
        "head_dim": head_dim,
        "layer_types": ("full_attention",) * keys.integer("num_hidden_layers"),
        "sliding_window": None,
        "rope_full": rope,
        "rope_sliding": rope,
        "norm_weight_offset": 0.0,
        "embedding_scale": 1.0,
        "query_scale": head_dim**-0.5,
        "qk_norm": False,
        "sandwich_norms": False,
        "final_softcap": None,
    }


def _split_head_dim(keys: _Keys) -> int:
    """The size of a head where a file need not give it: the hidden size is then divided among the heads."""
    size, heads = keys.integer("hidden_size"), keys.integer("num_attention_heads")
    if keys.get("head_dim") is None and (heads < 1 or size % heads):
        raise keys.fail("head_dim", f"is missing, and {heads} heads do not divide hidden_size {size}; add it")
    return keys.head_dim(size // max(1, heads))


def _llama(keys: _Keys) -> dict[str, Any]:
    """Llama 2 to 3.2 (arXiv 2407.21783); older files leave out what their models do not have."""
    return _plain(keys, _split_head_dim(keys)) | {
        "num_kv_heads": keys.integer("num_key_value_heads", keys.integer("num_attention_heads")),
        "activation": keys.activation("hidden_act"),
        **_attention_biases(keys, False),
        "mlp_bias": keys.boolean("mlp_bias", False),
        "tie_embeddings": keys.boolean("tie_word_embeddings", False),
    }


def _windows_by_depth(keys: _Keys) -> dict[str, Any]:
    """Qwen's sliding windows: in the layers from `max_window_layers` on, where `use_sliding_window` is set."""
    number = keys.integer("num_hidden_layers")
    window = keys.optional_integer("sliding_window") if keys.boolean("use_sliding_window", False) else None
    first_sliding = keys.optional_integer("max_window_layers")
    keys.ignore("sliding_window")

    def by_depth() -> list[LayerType]:
        if window is None:
            return ["full_attention"] * number
        if first_sliding is None:
            raise keys.fail("max_window_layers", "is missing, and so is layer_types; add one of them")
        return ["sliding_attention" if i >= first_sliding else "full_attention" for i in range(number)]

    return {"layer_types": keys.layer_types(number, by_depth), "sliding_window": window}


def _qwen2(keys: _Keys) -> dict[str, Any]:
    """Qwen 2 and 2.5 (arXiv 2412.15115): always a bias on queries, keys and values, never on the output."""
    return (
        _plain(keys, _split_head_dim(keys))
        | _windows_by_depth(keys)
        | {
            "num_kv_heads": keys.integer("num_key_value_heads"),
            "activation": keys.activation("hidden_act"),
            "attention_bias": True,
            "tie_embeddings": keys.boolean("tie_word_embeddings", False),
        }
    )


def _qwen3(keys: _Keys) -> dict[str, Any]:
    """Qwen 3, dense (arXiv 2505.09388)."""
    return (
        _plain(keys, keys.head_dim())
        | _windows_by_depth(keys)
        | {
            "num_kv_heads": keys.integer("num_key_value_heads"),
            "activation": keys.activation("hidden_act"),
            "qk_norm": True,
            **_attention_biases(keys),
            "tie_embeddings": keys.boolean("tie_word_embeddings", False),  # left out by transformers when it is false
        }
    )


def _gemma(keys: _Keys) -> dict[str, Any]:
    """Gemma 1 (arXiv 2403.08295).

    Its first files say `hidden_act: gelu` and mean the tanh approximation, as `hidden_activation: null` does.
    """
    activation: Activation = "gelu_tanh"
    if keys.get("hidden_act") not in (None, "gelu"):
        activation = keys.activation("hidden_act")
    if keys.get("hidden_activation") is not None and keys.activation("hidden_activation") != activation:
        raise keys.fail("hidden_activation", "contradicts hidden_act; keep one of them")
    return _plain(keys, keys.head_dim()) | {
        "num_kv_heads": keys.integer("num_key_value_heads"),
        "activation": activation,
        "norm_weight_offset": 1.0,
        "embedding_scale": keys.integer("hidden_size") ** 0.5,
        **_attention_biases(keys, False),
        "tie_embeddings": keys.boolean("tie_word_embeddings", True),
    }


_FAMILIES: Mapping[str, Callable[[_Keys], dict[str, Any]]] = {
    "gemma": _gemma,
    "gemma3_text": _gemma3_text,
    "llama": _llama,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises UsageError when it is missing, unreadable or not an object."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UsageError(f"{path}: not found; a model directory in Hugging Face format has it") from error
    except (ValueError, OSError) as error:
        raise UsageError(f"{path}: not readable as JSON ({error}); restore it from its source") from error
    if not isinstance(raw, dict):
        raise UsageError(f"{path}: is not a JSON object; restore it from its source")
    return raw


def load_config(directory: Path) -> ModelConfig:
    """The `ModelConfig` of a model directory in Hugging Face format; errors as in `ModelConfig.from_hf`."""
    path = Path(directory) / "config.json"
    return ModelConfig.from_hf(read_json(path), str(path))
