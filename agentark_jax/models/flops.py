"""How much work a step needs at least, counted from the model's shape: FLOPs of matrix products, bytes of weights.

A multiplication with an addition is 2 FLOPs. Counted is what the result requires, not what an implementation happens
to do: attention over the pairs of positions that the mask allows, the head only for tokens with loss, the backward
pass as two products per forward product. Not counted: norms, activations, softmax, the optimizer.
"""

from collections.abc import Iterable, Sequence

from agentark_jax.models.config import LayerType, ModelConfig

Flops = dict[str, int]
FP32_BYTES = 4


def matmul_params(config: ModelConfig) -> int:
    """Parameters of all layers that multiply every token: projections and MLPs, not the embedding, not norms."""
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    attention = config.hidden_size * (2 * queries + 2 * keys)
    return config.num_layers * (attention + 3 * config.hidden_size * config.intermediate_size)


def head_params(config: ModelConfig) -> int:
    """Entries of the [V, D] matrix that scores the tokens."""
    return config.vocab_size * config.hidden_size


def attended(config: ModelConfig, layer_type: LayerType, position: int) -> int:
    """How many positions a token at `position` (from 0) attends to, itself included."""
    window = config.window(layer_type)
    return position + 1 if window is None else min(position + 1, window)


def attention_flops(config: ModelConfig, positions: Iterable[int]) -> int:
    """Forward scores and mixing of tokens at these positions, over all layers."""
    pairs = sum(attended(config, kind, position) for position in positions for kind in config.layer_types)
    return 4 * config.num_heads * config.head_dim * pairs


def sequence_attention_flops(config: ModelConfig, length: int) -> int:
    """`attention_flops` of all positions of a sequence."""
    pairs = 0
    for kind in config.layer_types:
        window = config.window(kind)
        growing = length if window is None else min(length, window)
        pairs += growing * (growing + 1) // 2 + (length - growing) * growing
    return 4 * config.num_heads * config.head_dim * pairs


def sft_flops(
    config: ModelConfig, *, lengths: Sequence[int], loss_tokens: int, train_head: bool, train_layers: bool = True
) -> Flops:
    """One training step on sequences of these lengths, `loss_tokens` of all their tokens with loss.

    Packed or not makes no difference, and padding is no work. A head that is not trained needs two products per loss
    token (scores, gradient of the hidden state), not three; so do layers of which only adapters are trained (their own
    products are not counted). Other layers count as trained, frozen or not.
    """
    return {
        "trunk": (6 if train_layers else 4) * matmul_params(config) * sum(lengths),
        "attention": 3 * sum(sequence_attention_flops(config, length) for length in lengths),
        "head": (6 if train_head else 4) * head_params(config) * loss_tokens,
    }


def prefill_flops(config: ModelConfig, lengths: Sequence[int]) -> Flops:
    """Keys and values of all tokens of prompts with these lengths but the last one, which the first step reads."""
    return {
        "trunk": 2 * matmul_params(config) * sum(length - 1 for length in lengths),
        "attention": sum(sequence_attention_flops(config, length - 1) for length in lengths),
    }


def decode_flops(config: ModelConfig, positions: Sequence[int]) -> Flops:
    """One decode step for tokens at these positions, one per sequence."""
    return {
        "trunk": 2 * matmul_params(config) * len(positions),
        "attention": attention_flops(config, positions),
        "head": 2 * head_params(config) * len(positions),
    }


def decode_bytes(config: ModelConfig, positions: Sequence[int], width: int = FP32_BYTES) -> int:
    """What one decode step reads: every weight once, and the keys and values that are attended to, of `width` bytes."""
    pairs = sum(attended(config, kind, position) for position in positions for kind in config.layer_types)
    cache = 2 * config.num_kv_heads * config.head_dim * pairs
    return width * (matmul_params(config) + head_params(config) + cache)
