"""Where a run's model comes from."""

from dataclasses import dataclass, field
from typing import Any

from agentark_jax.errors import UsageError

SCRATCH = "scratch"


@dataclass(frozen=True)
class ScratchConfig:
    """A small Qwen3-shaped model that starts from random weights, with a tokenizer trained on the task's texts.

    Attributes:
        hidden_size: width of the residual stream.
        layers: number of transformer blocks.
        heads: query heads.
        kv_heads: key-value heads; divides `heads`.
        head_dim: width of one head.
        intermediate_size: width of the MLP.
        vocabulary: size of the trained tokenizer, at least 300 (256 bytes and the special tokens come first).
        max_positions: longest sequence the model is meant for.
    """

    hidden_size: int = 192
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 48
    intermediate_size: int = 512
    vocabulary: int = 512
    max_positions: int = 1024

    def __post_init__(self) -> None:
        for key in self.__dataclass_fields__:
            if getattr(self, key) < 1:
                raise UsageError(f"model.scratch.{key} is {getattr(self, key)}: give a positive number.")
        if self.heads % self.kv_heads:
            raise UsageError(f"model.scratch.kv_heads is {self.kv_heads}: it must divide heads ({self.heads}).")
        if self.head_dim % 2:
            raise UsageError(f"model.scratch.head_dim is {self.head_dim}: rotary embeddings need an even width.")
        if self.vocabulary < 300:
            raise UsageError(f"model.scratch.vocabulary is {self.vocabulary}: give at least 300.")

    def to_hf(self, *, vocabulary: int, bos_id: int | None, eos_id: int) -> dict[str, Any]:
        """The `config.json` of this model in Hugging Face's Qwen3 format."""
        return {
            "architectures": ["Qwen3ForCausalLM"],
            "model_type": "qwen3",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": bos_id,
            "eos_token_id": eos_id,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "hidden_size": self.hidden_size,
            "initializer_range": 0.02,
            "intermediate_size": self.intermediate_size,
            "max_position_embeddings": self.max_positions,
            "num_attention_heads": self.heads,
            "num_hidden_layers": self.layers,
            "num_key_value_heads": self.kv_heads,
            "rms_norm_eps": 1e-6,
            "rope_theta": 10_000.0,
            "tie_word_embeddings": True,
            "use_cache": True,
            "use_sliding_window": False,
            "vocab_size": vocabulary,
        }


@dataclass(frozen=True)
class ModelSourceConfig:
    """The model to distil into.

    Attributes:
        source: `gguf:gemma3-270m` (real weights from the package of the extra `quickstart`), a directory in Hugging
            Face format, a hub id such as `Qwen/Qwen3-0.6B`, or `scratch`.
        scratch: the model's shape where `source` is `scratch`.
    """

    source: str = "gguf:gemma3-270m"
    scratch: ScratchConfig = field(default_factory=ScratchConfig)

    def __post_init__(self) -> None:
        if not self.source:
            raise UsageError("model.source is empty: give a directory, a hub id, gguf:gemma3-270m, or scratch.")
