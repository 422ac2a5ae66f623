"""The parts of the decoder: norm, attention, gated MLP, block, rotary positions, masks.

`Block` is the same code in training, prefill and decoding. Norms and softmax are computed in float32, everything else
in the parameters' dtype. Matrices are stored as [out, in], as in Hugging Face files: with the contracted axis last,
XLA's CPU backend runs them nearly twice as fast in a decode step.
"""

from collections.abc import Mapping
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from agentark_jax.models.config import LayerType, ModelConfig
from agentark_jax.models.sharding import activation, lookup

Rotation = tuple[jax.Array, jax.Array]

# Finite, so that a row without any allowed key gives a uniform distribution and not NaN.
_MASKED = -0.7 * float(jnp.finfo(jnp.float32).max)


def normal_param(rngs: nnx.Rngs, shape: tuple[int, ...], scale: float) -> nnx.Param:
    return nnx.Param(scale * jax.random.normal(rngs.params(), shape, jnp.float32))


class RMSNorm(nnx.Module):
    """x / rms(x) · (weight + offset), in float32 (arXiv 1910.07467)."""

    def __init__(self, config: ModelConfig, size: int, stack: tuple[int, ...] = ()) -> None:
        self.eps, self.offset = config.norm_eps, config.norm_weight_offset
        self.weight = nnx.Param(jnp.full((*stack, size), 1.0 - self.offset, jnp.float32))

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        return (wide * (self.weight[...].astype(jnp.float32) + self.offset)).astype(x.dtype)


class Attention(nnx.Module):
    """Grouped-query attention with rotary positions; keys and values are never repeated for the query groups."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs, stack: tuple[int, ...]) -> None:
        size, heads, kv_heads, head_dim = config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim
        std = config.initializer_range
        self.scale, self.softcap = config.query_scale, config.attention_softcap
        self.qk_norm, self.bias = config.qk_norm, config.attention_bias
        self.query = normal_param(rngs, (*stack, heads, head_dim, size), std)
        self.key = normal_param(rngs, (*stack, kv_heads, head_dim, size), std)
        self.value = normal_param(rngs, (*stack, kv_heads, head_dim, size), std)
        self.output = normal_param(rngs, (*stack, size, heads, head_dim), std)
        if self.qk_norm:
            self.query_norm = RMSNorm(config, head_dim, stack)
            self.key_norm = RMSNorm(config, head_dim, stack)
        if self.bias:
            self.query_bias = nnx.Param(jnp.zeros((*stack, heads, head_dim)))
            self.key_bias = nnx.Param(jnp.zeros((*stack, kv_heads, head_dim)))
            self.value_bias = nnx.Param(jnp.zeros((*stack, kv_heads, head_dim)))
            self.output_bias = nnx.Param(jnp.zeros((*stack, size)))

    def project(
        self, x: Float[Array, "B T D"], rotation: Rotation
    ) -> tuple[Float[Array, "B T N H"], Float[Array, "B K T H"], Float[Array, "B K T H"]]:
        """Queries, keys and values, normalised and rotated."""
        query = _into_heads(x, self.query[...])
        key = _into_heads(x, self.key[...])
        value = _into_heads(x, self.value[...])
        if self.bias:
            query, key = query + self.query_bias[...], key + self.key_bias[...]
            value = value + self.value_bias[...]
        if self.qk_norm:
            query, key = self.query_norm(query), self.key_norm(key)
        query, key, value = rotate(query, rotation), rotate(key, rotation).swapaxes(1, 2), value.swapaxes(1, 2)
        return activation(query, "query"), activation(key, "key"), activation(value, "value")

    def attend(
        self,
        query: Float[Array, "B T N H"],
        key: Float[Array, "B K S H"],
        value: Float[Array, "B K S H"],
        mask: Bool[Array, "#B T S"],
    ) -> Float[Array, "B T D"]:
        batch, length, _, head_dim = query.shape
        kv_heads, span = key.shape[1], key.shape[2]
        # The queries of a group share their keys, so they are rows of one matrix product. The products keep their
        # natural axis order: fused with a transposition, XLA's CPU backend runs them several times slower.
        rows = query.reshape(batch, length, kv_heads, -1, head_dim).transpose(0, 2, 3, 1, 4)
        rows = rows.reshape(batch, kv_heads, -1, head_dim)
        scores = jnp.einsum("bkmh,bksh->bkms", rows, key, preferred_element_type=jnp.float32) * self.scale
        if self.softcap is not None:
            scores = self.softcap * jnp.tanh(scores / self.softcap)
        scores = scores.reshape(batch, kv_heads, -1, length, span)
        weights = jax.nn.softmax(jnp.where(mask[:, None, None], scores, _MASKED), axis=-1).astype(value.dtype)
        mixed = jnp.einsum("bkms,bksh->bkmh", weights.reshape(batch, kv_heads, -1, span), value)
        mixed = mixed.reshape(batch, kv_heads, -1, length, head_dim).transpose(0, 3, 1, 2, 4).reshape(batch, length, -1)
        out = jnp.einsum("btf,df->btd", mixed, self.output[...].reshape(-1, mixed.shape[-1]))
        return activation(out + self.output_bias[...] if self.bias else out, "attention")


def _into_heads(x: Float[Array, "B T D"], weight: Float[Array, "N H D"]) -> Float[Array, "B T N H"]:
    """x · weightᵀ as one plain matrix product: given three axes, XLA's CPU backend first transposes the weight."""
    heads, head_dim, size = weight.shape
    flat = jnp.einsum("btd,fd->btf", x, weight.reshape(-1, size))
    return flat.reshape(*x.shape[:-1], heads, head_dim)


class MLP(nnx.Module):
    """down(activation(gate(x)) · up(x)) (arXiv 2002.05202)."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs, stack: tuple[int, ...]) -> None:
        size, inner, std = config.hidden_size, config.intermediate_size, config.initializer_range
        self.activation = config.activation
        self.gate = normal_param(rngs, (*stack, inner, size), std)
        self.up = normal_param(rngs, (*stack, inner, size), std)
        self.down = normal_param(rngs, (*stack, size, inner), std)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        gate, up = jnp.einsum("btd,fd->btf", x, self.gate[...]), jnp.einsum("btd,fd->btf", x, self.up[...])
        gate = jax.nn.silu(gate) if self.activation == "silu" else jax.nn.gelu(gate, approximate=True)
        return activation(jnp.einsum("btf,df->btd", activation(gate * up, "inner"), self.down[...]), "mlp")


class Block(nnx.Module):
    """One layer. With a cache it writes this step's keys and values into it and attends to the whole cache."""

    def __init__(self, config: ModelConfig, layer_type: LayerType, rngs: nnx.Rngs, stack: tuple[int, ...] = ()) -> None:
        self.layer_type, self.sandwich = layer_type, config.sandwich_norms
        self.attention_norm = RMSNorm(config, config.hidden_size, stack)
        self.attention = Attention(config, rngs, stack)
        self.mlp_norm = RMSNorm(config, config.hidden_size, stack)
        self.mlp = MLP(config, rngs, stack)
        if self.sandwich:
            self.post_attention_norm = RMSNorm(config, config.hidden_size, stack)
            self.post_mlp_norm = RMSNorm(config, config.hidden_size, stack)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        rotations: Mapping[LayerType, Rotation],
        masks: Mapping[LayerType, jax.Array],
        cache: dict[str, jax.Array] | None = None,
        positions: Int[Array, " B"] | None = None,
    ) -> tuple[Float[Array, "B T D"], dict[str, jax.Array]]:
        """The layer's output, and the keys and values [B, K, S, H] that it attended to.

        With `cache` {k, v: [B, K, S, H]}, T is 1 and row b's key and value are written at `positions[b]`.
        """
        query, key, value = self.attention.project(self.attention_norm(x), rotations[self.layer_type])
        if cache is not None:
            rows = jnp.arange(x.shape[0])
            key = cache["k"].at[rows, :, positions].set(key[:, :, 0].astype(cache["k"].dtype))
            value = cache["v"].at[rows, :, positions].set(value[:, :, 0].astype(cache["v"].dtype))
        mixed = self.attention.attend(query, key, value, masks[self.layer_type])
        x = x + (self.post_attention_norm(mixed) if self.sandwich else mixed)
        fed = self.mlp(self.mlp_norm(x))
        x = x + (self.post_mlp_norm(fed) if self.sandwich else fed)
        return activation(x, "residual"), {"k": key, "v": value}


def rotate(x: Float[Array, "B T N H"], rotation: Rotation) -> Float[Array, "B T N H"]:
    """Rotate the pairs (x[i], x[i + H/2]) (arXiv 2104.09864, in the half-split arrangement of Hugging Face)."""
    cos, sin = rotation[0][:, :, None], rotation[1][:, :, None]
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def rotation_table(
    config: ModelConfig, positions: Int[Array, "B T"], dtype: jax.typing.DTypeLike
) -> dict[LayerType, Rotation]:
    """cos and sin [B, T, H/2] for each layer type that the model has, computed in float32.

    The frequencies are constants whose last digit follows the reference implementation (each step of
    1 / theta ** exponent rounded to float32): at position 1,000 a last digit is 1e-4 of an angle.
    """
    exponent = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    table: dict[LayerType, Rotation] = {}
    for layer_type in sorted(set(config.layer_types)):
        rope = config.rope(layer_type)
        power = (rope.theta ** exponent.astype(np.float64)).astype(np.float32)
        frequency = np.float32(1) / power / np.float32(rope.factor)
        angle = positions[..., None].astype(jnp.float32) * frequency
        table[layer_type] = (jnp.cos(angle).astype(dtype), jnp.sin(angle).astype(dtype))
    return table


def causal_masks(
    config: ModelConfig, length: int, segment_ids: Int[Array, "B T"] | None
) -> dict[LayerType, Bool[Array, "#B T T"]]:
    """What each position may attend to, per layer type: not after it, in its window, in its segment.

    Distances are counted in row indices, which within a segment equal differences of positions.
    """
    index = jnp.arange(length)
    distance = index[:, None] - index[None, :]
    masks: dict[LayerType, jax.Array] = {}
    for layer_type in sorted(set(config.layer_types)):
        mask = distance >= 0
        window = config.window(layer_type)
        if window is not None:
            mask &= distance < window
        mask = mask[None]
        if segment_ids is not None:
            mask = mask & (segment_ids[:, :, None] == segment_ids[:, None, :])
        masks[layer_type] = mask
    return masks


def embed(config: ModelConfig, embedding: Float[Array, "V D"], ids: Int[Array, "*B"]) -> Float[Array, "*B D"]:
    """Rows of the embedding times the model's embedding scale."""
    x = lookup(embedding, ids)
    return x if config.embedding_scale == 1.0 else x * jnp.asarray(config.embedding_scale, x.dtype)


@lru_cache(maxsize=64)
def block_graph(config: ModelConfig, layer_type: LayerType) -> nnx.GraphDef:
    """The static half of one unstacked `Block`, to be merged with its parameters."""
    return nnx.split(nnx.eval_shape(lambda: Block(config, layer_type, nnx.Rngs(0))))[0]
