"""The one decoder: embedding, blocks of attention and gated MLP, final norm, unembedding; training and generation.

The modules are Flax NNX, but callers never see one: parameters are plain nested dictionaries of arrays (`Params`), and
the functions of this module are pure, so they go straight into `jax.jit` and `jax.grad`. Two layouts of the same
parameters exist:

- **stacked** (training, files): `scanned` holds one tree for each position in the repeated pattern of layer types,
  with a leading axis over the repetitions, run by `jax.lax.scan`; `rest`, where there is one, holds the layers of an
  incomplete repetition.
- **unstacked** (generation, from `unstack`): `layers` is a tuple with one tree per layer, because a decode loop that
  slices stacked parameters and caches would copy them at every step.

Caches are one pair of arrays per layer, in which position p has the place p modulo their length. Layers with a sliding
window keep no more positions than that: each takes the place of the one that it pushes out. Donate the cache (or carry
it in a `while_loop`): writes are then in place.
"""

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from agentark_jax.models.attention import XLA, AttentionPlan, dense, keep_kernel_results, whole_sequences
from agentark_jax.models.config import LayerType, ModelConfig, Remat
from agentark_jax.models.layers import (
    Block,
    RMSNorm,
    block_graph,
    embed,
    few_times,
    normal_param,
    rotation_table,
)
from agentark_jax.models.sharding import activation, traced_platform

# Of more hidden states than these all scores take longer to be transposed than to be computed in the other order.
_FEW_ROWS = 48
Params = dict[str, Any]
Cache = tuple[dict[str, jax.Array], ...]


class Transformer(nnx.Module):
    """The whole network without its unembedding, in the stacked layout."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs) -> None:
        period, repeats = config.period, config.num_periods
        types = config.layer_types
        self.config = config
        self.embedding = normal_param(rngs, (config.vocab_size, config.hidden_size), config.initializer_range)
        # Keys are strings of equal width: an order that survives every tree library, sorted or not.
        self.scanned = nnx.Dict({f"{i:02d}": Block(config, types[i], rngs, (repeats,)) for i in range(period)})
        rest = range(period * repeats, config.num_layers)
        self.rest = nnx.Dict({f"{i - rest[0]:02d}": Block(config, types[i], rngs) for i in rest})
        self.final_norm = RMSNorm(config, config.hidden_size)
        if not config.tie_embeddings:
            self.unembedding = normal_param(rngs, (config.vocab_size, config.hidden_size), config.initializer_range)

    def __call__(
        self,
        ids: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"] | None,
        remat: Remat,
        dtype: jax.typing.DTypeLike,
        attention: AttentionPlan,
    ) -> Float[Array, "B T D"]:
        shared = rotation_table(self.config, positions, dtype), segment_ids

        def one(graph: nnx.GraphDef, x: jax.Array, state: Any, shared: Any) -> jax.Array:
            rotations, segment_ids = shared
            attends = whole_sequences(self.config, ids.shape[1], segment_ids, attention)
            return nnx.merge(graph, _cast_matrices(state, dtype))(x, rotations, attends)[0]

        one = _recomputed(one, remat)

        def through(graph: nnx.GraphDef, x: jax.Array, state: Any) -> jax.Array:
            for block in nnx.merge(graph, state).values():
                graph, state = nnx.split(block)
                x = one(graph, x, state, shared)
            return x

        x = activation(embed(self.config, self.embedding[...], ids).astype(dtype), "residual")
        graph, stacked = nnx.split(self.scanned)
        x, _ = jax.lax.scan(lambda x, state: (through(graph, x, state), None), x, stacked)
        graph, unstacked = nnx.split(self.rest)
        x = through(graph, x, unstacked)
        return self.final_norm(x)


def _cast_matrices(state: Any, dtype: jax.typing.DTypeLike) -> Any:
    """The parameters of a layer in `dtype`, except for those of norms, which compute in float32 anyway."""

    def cast(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        return leaf if "norm" in jax.tree_util.keystr(path) else leaf.astype(dtype)

    return jax.tree_util.tree_map_with_path(cast, state)


def _recomputed(layer: Callable[..., jax.Array], remat: Remat) -> Callable[..., jax.Array]:
    """`layer(static graph, x, state, shared)`, of whose activations the backward pass recomputes what `remat` says."""
    if remat == "full" and traced_platform() == "cpu":
        return _recomputed_in_turn(layer)
    policies = jax.checkpoint_policies
    kept = {
        "none": policies.everything_saveable,
        "products": policies.save_from_both_policies(policies.dots_with_no_batch_dims_saveable, keep_kernel_results),
        "outputs": policies.save_only_these_names("attention", "mlp"),
        "full": policies.nothing_saveable,
    }[remat]
    return jax.checkpoint(layer, policy=kept, static_argnums=0)


def _recomputed_in_turn(layer: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """The whole layer recomputed from its input, and not before its cotangent is there.

    `jax.checkpoint` asks for this with a barrier, which XLA's CPU backend drops before it orders the work: it starts to
    recompute all layers of a scan's body at once. What waits here is an input that a product of the cotangent is added
    to, which is zero where the gradient is finite at all.
    """

    @partial(jax.custom_vjp, nondiff_argnums=(0,))
    def recomputed(graph: nnx.GraphDef, x: jax.Array, state: Any, shared: Any) -> jax.Array:
        return layer(graph, x, state, shared)

    def forward(graph: nnx.GraphDef, x: jax.Array, state: Any, shared: Any) -> tuple[jax.Array, Any]:
        return layer(graph, x, state, shared), (x, state, shared)

    def backward(graph: nnx.GraphDef, saved: Any, cotangent: jax.Array) -> tuple[jax.Array, Any, None]:
        x, state, shared = saved
        _, pullback = jax.vjp(lambda x, state: layer(graph, x, state, shared), x + 0 * cotangent, state)
        return (*pullback(cotangent), None)

    recomputed.defvjp(forward, backward)
    return recomputed


@lru_cache(maxsize=32)
def _structure(config: ModelConfig) -> tuple[nnx.GraphDef, Params]:
    graph, state = nnx.split(nnx.eval_shape(lambda: Transformer(config, nnx.Rngs(0))))
    return graph, nnx.to_pure_dict(state)


def param_shapes(config: ModelConfig) -> Params:
    """The stacked parameter tree with a `jax.ShapeDtypeStruct` at every leaf."""
    return jax.tree.map(lambda leaf: leaf, _structure(config)[1])


def init_params(config: ModelConfig, seed: int) -> Params:
    """Fresh stacked parameters in float32: normal with the config's `initializer_range`, norms at identity.

    Adapters, where the config has any, are zero: `lora.init_adapter` makes those to be trained.
    """
    return nnx.to_pure_dict(nnx.state(Transformer(config, nnx.Rngs(seed))))


def hidden_states(
    config: ModelConfig,
    params: Params,
    ids: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"] | None = None,
    remat: Remat = "products",
    dtype: jax.typing.DTypeLike | None = None,
    attention: AttentionPlan = XLA,
) -> Float[Array, "B T D"]:
    """Hidden states after the final norm, from stacked parameters.

    `positions` start at 0 in every segment. `segment_ids` separate packed sequences, 0 marking padding; None means
    one sequence per row (padding to the right is harmless: nothing before it sees it). `remat` says what of each layer
    the backward pass recomputes instead of keeping it. Layers compute in `dtype` (None:
    that of the parameters) on matrices that are cast where they are used, so gradients have the parameters' dtype.
    `attention` (of `choose_attention`) changes no result beyond rounding.
    """
    computed = params["embedding"].dtype if dtype is None else dtype
    return nnx.merge(_structure(config)[0], params)(ids, positions, segment_ids, remat, computed, attention)


def unembedding(config: ModelConfig, params: Params) -> Float[Array, "V D"]:
    """The matrix whose rows score the tokens: the embedding itself where the two are tied."""
    return params["embedding"] if config.tie_embeddings else params["unembedding"]


def logits(config: ModelConfig, params: Params, h: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
    """Scores of every token, float32, after the model's soft cap. `params` may be of either layout."""
    head = unembedding(config, params)
    if h.ndim == 2 and len(h) <= _FEW_ROWS:
        scores = few_times(h, head, jnp.float32)
    else:
        scores = jnp.einsum("...d,vd->...v", h, head, preferred_element_type=jnp.float32)
    if config.final_softcap is not None:
        scores = config.final_softcap * jnp.tanh(scores / config.final_softcap)
    return scores


def unstack(config: ModelConfig, params: Params) -> Params:
    """The same parameters with `layers` as a tuple of one tree per layer (copies the layers, shares the rest)."""
    scanned, rest, period = params["scanned"], params.get("rest", {}), config.period
    layers = []
    for index in range(config.num_layers):
        repeat, offset = divmod(index, period)
        if repeat < config.num_periods:
            layers.append(jax.tree.map(lambda leaf, repeat=repeat: leaf[repeat], scanned[f"{offset:02d}"]))
        else:
            layers.append(rest[f"{offset:02d}"])
    shared = {key: value for key, value in params.items() if key not in ("scanned", "rest")}
    return {**shared, "layers": tuple(layers)}


def _final_norm(config: ModelConfig, params: Params, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
    graph = nnx.split(nnx.eval_shape(lambda: RMSNorm(config, config.hidden_size)))[0]
    return nnx.merge(graph, params["final_norm"])(x)


def prefill(
    config: ModelConfig, decode_params: Params, ids: Int[Array, "B T"], attention: AttentionPlan = XLA
) -> tuple[Float[Array, "B T D"], Cache]:
    """Run prompts padded to the right; `attention` as in `hidden_states`.

    Returns the final-normed hidden states, and per layer the keys and values [B, K, T, H]. Those of padding are
    harmless: nothing before it sees it, and decoding overwrites keys and values before it reads them.
    """
    positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
    rotations = rotation_table(config, positions, decode_params["embedding"].dtype)
    attends = whole_sequences(config, ids.shape[1], None, attention)
    x = embed(config, decode_params["embedding"], ids)
    cache = []
    for layer_type, layer in zip(config.layer_types, decode_params["layers"], strict=True):
        x, kv = nnx.merge(block_graph(config, layer_type), layer)(x, rotations, attends)
        cache.append(kv)
    return _final_norm(config, decode_params, x), tuple(cache)


def extend(
    config: ModelConfig,
    decode_params: Params,
    ids: Int[Array, "B T"],
    before: Cache,
    length: Int[Array, ""],
) -> tuple[Float[Array, "B T D"], Cache]:
    """Go on where a prefill ended: rows padded to the right, each after the first `length` tokens of `before`.

    `before` has the keys and values [#B, K, S, H] of `prefill`, those of padding from `length` on. Attention is dense;
    its scores take B × T × (S + T) numbers for each head. Returns hidden states, keys and values as `prefill` does, of
    `ids` alone.
    """
    start, steps = jnp.asarray(length), jnp.arange(ids.shape[1])
    rotations = rotation_table(config, jnp.broadcast_to(start + steps, ids.shape), decode_params["embedding"].dtype)
    span = before[0]["k"].shape[2] + ids.shape[1]
    distance = start + steps[:, None] - jnp.arange(span)
    x = embed(config, decode_params["embedding"], ids)
    cache = []
    for layer_type, layer, earlier in zip(config.layer_types, decode_params["layers"], before, strict=True):
        mask = (distance >= 0) & (distance < (config.window(layer_type) or span))

        def attend(
            query: jax.Array,
            key: jax.Array,
            value: jax.Array,
            scale: float,
            softcap: float | None,
            earlier: dict[str, jax.Array] = earlier,
            mask: jax.Array = mask,
        ) -> jax.Array:
            key, value = append(earlier["k"], key, start), append(earlier["v"], value, start)
            return dense(query, key, value, scale, softcap, mask=mask[None])

        x, kv = nnx.merge(block_graph(config, layer_type), layer)(x, rotations, {layer_type: attend})
        cache.append(kv)
    return _final_norm(config, decode_params, x), tuple(cache)


def append(
    before: Float[Array, "#B K S H"], after: Float[Array, "B K T H"], length: Int[Array, ""]
) -> Float[Array, "B K S+T H"]:
    """Keys or values of sequences that begin with `length` tokens of one array and go on with the other."""
    room = jnp.zeros((*after.shape[:2], before.shape[2] + after.shape[2], after.shape[3]), after.dtype)
    return jax.lax.dynamic_update_slice(room.at[:, :, : before.shape[2]].set(before), after, (0, 0, length, 0))


def init_cache(config: ModelConfig, slots: int, length: int, dtype: jax.typing.DTypeLike = jnp.float32) -> Cache:
    """Empty caches for `slots` sequences of at most `length` tokens: per layer {k, v: [slots, K, room, H]}.

    `room` is `length`, or the layer's sliding window where that is shorter.
    """

    def empty(layer_type: LayerType) -> dict[str, jax.Array]:
        room = min(length, config.window(layer_type) or length)
        shape = (slots, config.num_kv_heads, room, config.head_dim)
        return {"k": jnp.zeros(shape, dtype), "v": jnp.zeros(shape, dtype)}

    return tuple(empty(layer_type) for layer_type in config.layer_types)


def insert(
    config: ModelConfig,
    cache: Cache,
    kv: Cache,
    lengths: Int[Array, " N"],
    slots: Int[Array, " N"],
    rows: Int[Array, " N"],
) -> Cache:
    """Copy rows of a prefill into slots of a cache: slot `slots[i]` begins with the `lengths[i]` tokens of `rows[i]`.

    One prefilled row may fill many slots. A slot number past the end is skipped, so N can be padded to a fixed size.
    The prefill may be shorter than the cache; longer only in layers with a sliding window (ValueError).
    """

    def copy(layer_type: LayerType, target: jax.Array, source: jax.Array) -> jax.Array:
        length, room = source.shape[2], target.shape[2]
        if length > room and room != config.window(layer_type):
            raise ValueError(f"a prefill of {length} tokens does not fit a cache of {room}")
        copied = source[rows]
        if length > room:
            last = lengths[:, None] - 1
            newest = last - (last - jnp.arange(room)) % room  # the last position whose place this is; < 0 for none
            copied = jnp.take_along_axis(copied, jnp.maximum(newest, 0)[:, None, :, None], axis=2)
        return target.at[slots, :, : copied.shape[2]].set(copied.astype(target.dtype), mode="drop")

    layers = zip(config.layer_types, cache, kv, strict=True)
    return tuple(jax.tree.map(partial(copy, layer_type), target, source) for layer_type, target, source in layers)


def decode_step(
    config: ModelConfig, decode_params: Params, ids: Int[Array, " S"], positions: Int[Array, " S"], cache: Cache
) -> tuple[Float[Array, "S D"], Cache]:
    """One token for every slot: row s is written as `positions[s]` and attends to 0..positions[s] in its window.

    Returns the final-normed hidden states and the cache with this step in it.
    """
    rotations = rotation_table(config, positions[:, None], decode_params["embedding"].dtype)
    attends = {}
    for layer_type, kv in dict(zip(config.layer_types, cache, strict=True)).items():
        room = kv["k"].shape[2]
        distance = (positions[:, None] - jnp.arange(room)) % room  # to the last position that has each place
        attends[layer_type] = partial(dense, mask=(distance <= positions[:, None])[:, None])
    x = embed(config, decode_params["embedding"], ids)[:, None]
    written = []
    for layer_type, layer, kv in zip(config.layer_types, decode_params["layers"], cache, strict=True):
        x, kv = nnx.merge(block_graph(config, layer_type), layer)(x, rotations, attends, kv, positions)
        written.append(kv)
    return _final_norm(config, decode_params, x[:, 0]), tuple(written)
