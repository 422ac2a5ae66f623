"""The parts of the decoder: norm, attention, gated MLP, block, rotary positions.

`Block` is the same code in training, prefill and decoding. Norms and softmax are computed in float32, everything else
in the parameters' dtype. Matrices are stored as [out, in], as in Hugging Face files: with the contracted axis last,
XLA's CPU backend runs them nearly twice as fast in a decode step.
"""

import math
from collections.abc import Mapping
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from agentark_jax.models.attention import Attend
from agentark_jax.models.config import LayerType, Lora, ModelConfig, Rope
from agentark_jax.models.sharding import activation, lookup

Rotation = tuple[jax.Array, jax.Array]


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


class Adapter(nnx.Module):
    """scale · (x · Aᵀ) · Bᵀ beside one projection (arXiv 2106.09685); zero here, `lora.init_adapter` makes A random."""

    def __init__(self, lora: Lora, stack: tuple[int, ...], inputs: int, outputs: int) -> None:
        self.scale = lora.scale
        self.a = nnx.Param(jnp.zeros((*stack, lora.rank, inputs)))
        self.b = nnx.Param(jnp.zeros((*stack, outputs, lora.rank)))

    def __call__(self, x: Float[Array, "B T I"]) -> Float[Array, "B T O"]:
        low = _linear(x, self.a[...].astype(x.dtype))
        return self.scale * _linear(low, self.b[...].astype(x.dtype))


def _adapters(config: ModelConfig, stack: tuple[int, ...], sizes: Mapping[str, tuple[int, int]]) -> nnx.Dict:
    """The adapters of those projections, of these (input, output) sizes, that the config targets."""
    if config.lora is None:
        return nnx.Dict()
    targeted = [name for name in sizes if name in config.lora.projections]
    return nnx.Dict({name: Adapter(config.lora, stack, *sizes[name]) for name in targeted})


def _project(module: "Attention | MLP", name: str, x: Float[Array, "B T I"]) -> Float[Array, "B T O"]:
    """x · weightᵀ of the module's projection, its heads folded, and what its adapter adds."""
    out = _linear(x, getattr(module, name)[...].reshape(-1, x.shape[-1]))
    return out + module.adapters[name](x) if name in module.adapters else out


def _linear(x: Float[Array, "B T I"], weight: Float[Array, "O I"]) -> Float[Array, "B T O"]:
    """x · weightᵀ as a product of two matrices.

    With more axes XLA's CPU backend copies operands into another order first, most of all for the weight's gradient: a
    training step of a small model takes 1.7 times as long.
    """
    flat = x.reshape(-1, x.shape[-1])
    # One token for each row: a decode step.
    flat = few_times(flat, weight) if x.shape[1] == 1 else jnp.einsum("ni,oi->no", flat, weight)
    return flat.reshape(*x.shape[:-1], weight.shape[0])


def few_times(
    x: Float[Array, "N I"], weight: Float[Array, "O I"], dtype: jax.typing.DTypeLike | None = None
) -> Float[Array, "N O"]:
    """x · weightᵀ for much fewer rows than the weight has; `dtype` of the result, None for theirs.

    On CPU the weight comes first: XLA's backend would put all of it into another order to multiply a few rows by it.
    Decode steps of 4 to 16 sequences then take 0.5 to 0.6 of the time.
    """

    def weight_first(x: jax.Array, weight: jax.Array) -> jax.Array:
        product = jnp.einsum("oi,ni->on", weight, x, preferred_element_type=dtype)
        # Otherwise XLA would exchange the operands rather than transpose their product.
        return jax.lax.optimization_barrier(product).T

    def rows_first(x: jax.Array, weight: jax.Array) -> jax.Array:
        return jnp.einsum("ni,oi->no", x, weight, preferred_element_type=dtype)

    result: jax.Array = jax.lax.platform_dependent(x, weight, cpu=weight_first, default=rows_first)
    return result


class Attention(nnx.Module):
    """Grouped-query attention with rotary positions."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs, stack: tuple[int, ...]) -> None:
        size, heads, kv_heads, head_dim = config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim
        std = config.initializer_range
        self.head_dim, self.scale, self.softcap = head_dim, config.query_scale, config.attention_softcap
        self.qk_norm, self.bias, self.out_bias = config.qk_norm, config.attention_bias, config.attention_output_bias
        self.query = normal_param(rngs, (*stack, heads, head_dim, size), std)
        self.key = normal_param(rngs, (*stack, kv_heads, head_dim, size), std)
        self.value = normal_param(rngs, (*stack, kv_heads, head_dim, size), std)
        self.output = normal_param(rngs, (*stack, size, heads, head_dim), std)
        inner, kv_inner = heads * head_dim, kv_heads * head_dim
        sizes = {"query": (size, inner), "key": (size, kv_inner), "value": (size, kv_inner), "output": (inner, size)}
        self.adapters = _adapters(config, stack, sizes)
        if self.qk_norm:
            self.query_norm = RMSNorm(config, head_dim, stack)
            self.key_norm = RMSNorm(config, head_dim, stack)
        if self.bias:
            self.query_bias = nnx.Param(jnp.zeros((*stack, heads, head_dim)))
            self.key_bias = nnx.Param(jnp.zeros((*stack, kv_heads, head_dim)))
            self.value_bias = nnx.Param(jnp.zeros((*stack, kv_heads, head_dim)))
        if self.out_bias:
            self.output_bias = nnx.Param(jnp.zeros((*stack, size)))

    def project(
        self, x: Float[Array, "B T D"], rotation: Rotation
    ) -> tuple[Float[Array, "B T N H"], Float[Array, "B K T H"], Float[Array, "B K T H"]]:
        """Queries, keys and values, normalised and rotated."""
        query, key, value = (
            _project(self, name, x).reshape(*x.shape[:-1], -1, self.head_dim) for name in ("query", "key", "value")
        )
        if self.bias:
            query, key = query + self.query_bias[...], key + self.key_bias[...]
            value = value + self.value_bias[...]
        if self.qk_norm:
            query, key = self.query_norm(query), self.key_norm(key)
        query, key, value = rotate(query, rotation), rotate(key, rotation).swapaxes(1, 2), value.swapaxes(1, 2)
        return activation(query, "query"), activation(key, "key"), activation(value, "value")

    def mix(
        self,
        attend: Attend,
        query: Float[Array, "B T N H"],
        key: Float[Array, "B K S H"],
        value: Float[Array, "B K S H"],
    ) -> Float[Array, "B T D"]:
        """What `attend` makes of queries, keys and values, projected."""
        mixed = attend(query, key, value, self.scale, self.softcap)
        mixed = mixed.reshape(*mixed.shape[:2], -1)
        out = _project(self, "output", mixed)
        return activation(out + self.output_bias[...] if self.out_bias else out, "attention")


class MLP(nnx.Module):
    """down(activation(gate(x)) · up(x)) (arXiv 2002.05202)."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs, stack: tuple[int, ...]) -> None:
        size, inner, std = config.hidden_size, config.intermediate_size, config.initializer_range
        self.activation, self.bias = config.activation, config.mlp_bias
        self.gate = normal_param(rngs, (*stack, inner, size), std)
        self.up = normal_param(rngs, (*stack, inner, size), std)
        self.down = normal_param(rngs, (*stack, size, inner), std)
        sizes = {"gate": (size, inner), "up": (size, inner), "down": (inner, size)}
        self.adapters = _adapters(config, stack, sizes)
        if self.bias:
            self.gate_bias = nnx.Param(jnp.zeros((*stack, inner)))
            self.up_bias = nnx.Param(jnp.zeros((*stack, inner)))
            self.down_bias = nnx.Param(jnp.zeros((*stack, size)))

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        gate, up = _project(self, "gate", x), _project(self, "up", x)
        if self.bias:
            gate, up = gate + self.gate_bias[...], up + self.up_bias[...]
        gate = jax.nn.silu(gate) if self.activation == "silu" else jax.nn.gelu(gate, approximate=True)
        down = _project(self, "down", activation(gate * up, "inner"))
        return activation(down + self.down_bias[...] if self.bias else down, "mlp")


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
        attends: Mapping[LayerType, Attend],
        cache: dict[str, jax.Array] | None = None,
        positions: Int[Array, " B"] | None = None,
    ) -> tuple[Float[Array, "B T D"], dict[str, jax.Array]]:
        """The layer's output, and the keys and values [B, K, S, H] that it attended to.

        With `cache` {k, v: [B, K, S, H]}, T is 1 and row b's key and value are written at `positions[b]` modulo S.
        """
        query, key, value = self.attention.project(self.attention_norm(x), rotations[self.layer_type])
        if cache is not None:
            assert positions is not None, "a cache is written at a position"
            rows, places = jnp.arange(x.shape[0]), positions % cache["k"].shape[2]
            key = cache["k"].at[rows, :, places].set(key[:, :, 0].astype(cache["k"].dtype))
            value = cache["v"].at[rows, :, places].set(value[:, :, 0].astype(cache["v"].dtype))
        mixed = self.attention.mix(attends[self.layer_type], query, key, value)
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
    """cos and sin [B, T, H/2] for each layer type that the model has, computed in float32."""
    table: dict[LayerType, Rotation] = {}
    for layer_type in sorted(set(config.layer_types)):
        angle = positions[..., None].astype(jnp.float32) * rope_frequencies(config.rope(layer_type), config.head_dim)
        table[layer_type] = (jnp.cos(angle).astype(dtype), jnp.sin(angle).astype(dtype))
    return table


def rope_frequencies(rope: Rope, head_dim: int) -> np.ndarray:
    """Radians per position of each rotated pair: float32 [H/2].

    Constants whose last digit follows the reference implementation (each step rounded to float32): at position 1,000
    a last digit is 1e-4 of an angle.
    """
    exponent = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    frequency = np.float32(1) / (rope.theta ** exponent.astype(np.float64)).astype(np.float32)
    scaled = frequency / np.float32(rope.factor)
    if rope.bands is None:
        return scaled
    low, high, length = rope.bands.low, rope.bands.high, rope.bands.original_positions
    wavelength = 2 * math.pi / frequency
    kept = (length / wavelength - low) / (high - low)
    between = (1 - kept) * frequency / np.float32(rope.factor) + kept * frequency
    long_or_between = np.where(wavelength > length / low, scaled, between)
    return np.where(wavelength < length / high, frequency, long_or_between)


def embed(config: ModelConfig, embedding: Float[Array, "V D"], ids: Int[Array, "*B"]) -> Float[Array, "*B D"]:
    """Rows of the embedding times the model's embedding scale."""
    x = lookup(embedding, ids)
    return x if config.embedding_scale == 1.0 else x * jnp.asarray(config.embedding_scale, x.dtype)


@lru_cache(maxsize=64)
def block_graph(config: ModelConfig, layer_type: LayerType) -> nnx.GraphDef:
    """The static half of one unstacked `Block`, to be merged with its parameters."""
    return nnx.split(nnx.eval_shape(lambda: Block(config, layer_type, nnx.Rngs(0))))[0]
