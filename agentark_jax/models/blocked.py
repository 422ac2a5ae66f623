"""Exact attention in blocks of queries, for XLA: never all scores at once, and none of blocks that a query cannot see.

The backward pass computes the scores of a block anew from the sums that the forward pass kept, as flash attention does
(arXiv 2205.14135). On CPU this is two to four times as fast as all scores at once, which leave the caches from a few
hundred positions on.
"""

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

KEPT = "attention kernel"  # the name of what the backward pass reads
# Finite, so that a row without any allowed key gives a uniform distribution and not NaN.
MASKED = -0.7 * float(jnp.finfo(jnp.float32).max)
_BLOCK, _MOST_BLOCKS = 128, 8  # the blocks of long rows are larger: each is compiled by itself


class _Seen(NamedTuple):
    """What the backward pass needs: the arguments, and for each block the largest score and Σ exp(score − largest)."""

    query: Float[Array, "B T N H"]
    key: Float[Array, "B K T H"]
    value: Float[Array, "B K T H"]
    segment_ids: Int[Array, "B T"] | None
    sums: tuple[tuple[Float[Array, "B K M 1"], Float[Array, "B K M 1"]], ...]


@partial(jax.custom_vjp, nondiff_argnums=(1, 5, 6))
def blocked(
    segment_ids: Int[Array, "B T"] | None,
    window: int | None,
    query: Float[Array, "B T N H"],
    key: Float[Array, "B K T H"],
    value: Float[Array, "B K T H"],
    scale: float,
    softcap: float | None,
) -> Float[Array, "B T N H"]:
    """What `attention.dense` computes of whole rows with the mask `causal_mask`; scores and sums in float32."""
    return _forward(segment_ids, window, query, key, value, scale, softcap)[0]


def _forward(
    segment_ids: Array | None,
    window: int | None,
    query: Array,
    key: Array,
    value: Array,
    scale: float,
    softcap: float | None,
) -> tuple[Array, _Seen]:
    mixed, sums = [], []
    for block, seen in _blocks(query.shape[1], window):
        rows = grouped(query[:, block], key.shape[1]).astype(key.dtype)
        scores = _scores(rows, key, scale, softcap, block, seen, segment_ids, window)
        peak = scores.max(axis=-1, keepdims=True)
        weights = jnp.exp(scores - peak)
        total = weights.sum(axis=-1, keepdims=True)
        part = _product("bkms,bksh->bkmh", (weights / total).astype(value.dtype), value[:, :, seen])
        mixed.append(ungrouped(part.astype(query.dtype), query.shape[2]))
        sums.append((checkpoint_name(peak, KEPT), checkpoint_name(total, KEPT)))
    whole = checkpoint_name(jnp.concatenate(mixed, axis=1), KEPT)
    return whole, _Seen(query, key, value, segment_ids, tuple(sums))


def _backward(
    window: int | None, scale: float, softcap: float | None, saved: _Seen, cotangent: Array
) -> tuple[None, Array, Array, Array]:
    query, key, value, segment_ids, sums = saved
    of_query = []
    of_key, of_value = jnp.zeros(key.shape, jnp.float32), jnp.zeros(value.shape, jnp.float32)
    for (block, seen), (peak, total) in zip(_blocks(query.shape[1], window), sums, strict=True):
        rows, of_rows = (grouped(array[:, block], key.shape[1]) for array in (query, cotangent))
        scores = _scores(rows.astype(key.dtype), key, scale, softcap, block, seen, segment_ids, window)
        weights = jnp.exp(scores - peak) / total
        of_value = of_value.at[:, :, seen].add(_product("bkms,bkmh->bksh", weights.astype(of_rows.dtype), of_rows))
        of_weights = _product("bkmh,bksh->bkms", of_rows, value[:, :, seen])
        # Flash attention takes this sum from the result. Like this a query that sees one key has exactly no gradient.
        shared = jnp.sum(weights * of_weights, axis=-1, keepdims=True)
        of_scores = weights * (of_weights - shared) * scale
        if softcap is not None:  # where a score is masked its weight is 0
            of_scores *= 1 - jnp.square(jnp.where(scores == MASKED, 0.0, scores) / softcap)
        of_scores = of_scores.astype(query.dtype)
        of_query.append(ungrouped(_product("bkms,bksh->bkmh", of_scores, key[:, :, seen]), query.shape[2]))
        of_key = of_key.at[:, :, seen].add(_product("bkms,bkmh->bksh", of_scores, rows))
    whole = jnp.concatenate(of_query, axis=1).astype(query.dtype)
    return None, whole, of_key.astype(key.dtype), of_value.astype(value.dtype)


blocked.defvjp(_forward, _backward)


def block_size(length: int) -> int:
    """How many queries of a row of this length are one block."""
    return max(_BLOCK, -(-length // _MOST_BLOCKS))


def _blocks(length: int, window: int | None) -> Iterator[tuple[slice, slice]]:
    """The queries of each block, and all keys that one of them may attend to."""
    size = block_size(length)
    for start in range(0, length, size):
        end = min(start + size, length)
        yield slice(start, end), slice(0 if window is None else max(0, start - window + 1), end)


def _scores(
    rows: Float[Array, "B K M H"],
    key: Float[Array, "B K T H"],
    scale: float,
    softcap: float | None,
    block: slice,
    seen: slice,
    segment_ids: Int[Array, "B T"] | None,
    window: int | None,
) -> Float[Array, "B K M S"]:
    """Of a block's queries with the keys that they may see, masked."""
    scores = _product("bkmh,bksh->bkms", rows, key[:, :, seen]) * scale
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    mask = causal_mask(block, seen, segment_ids, window)[:, None, None]
    by_head = scores.reshape(*scores.shape[:2], -1, *mask.shape[-2:])
    return jnp.where(mask, by_head, MASKED).reshape(scores.shape)


def causal_mask(
    queries: slice, keys: slice, segment_ids: Int[Array, "B T"] | None, window: int | None
) -> Bool[Array, "#B Q S"]:
    """What these positions of a row may attend to among those: not after it, in its window, in its segment."""
    distance = jnp.arange(queries.start, queries.stop)[:, None] - jnp.arange(keys.start, keys.stop)
    mask = distance >= 0
    if window is not None:
        mask &= distance < window
    mask = mask[None]
    if segment_ids is None:
        return mask
    segments = jnp.asarray(segment_ids)
    return mask & (segments[:, queries, None] == segments[:, None, keys])


def grouped(query: Float[Array, "B T N H"], kv_heads: int) -> Float[Array, "B K M H"]:
    """The queries that share keys as rows of one matrix.

    Products keep their natural axis order: fused with a transposition, XLA's CPU back end runs them several times
    slower.
    """
    batch, length, _, head_dim = query.shape
    by_group = query.reshape(batch, length, kv_heads, -1, head_dim).transpose(0, 2, 3, 1, 4)
    return by_group.reshape(batch, kv_heads, -1, head_dim)


def ungrouped(rows: Float[Array, "B K M H"], heads: int) -> Float[Array, "B T N H"]:
    """The inverse of `grouped`."""
    batch, kv_heads, _, head_dim = rows.shape
    by_group = rows.reshape(batch, kv_heads, heads // kv_heads, -1, head_dim).transpose(0, 3, 1, 2, 4)
    return by_group.reshape(batch, -1, heads, head_dim)


def _product(formula: str, left: Array, right: Array) -> Array:
    return jnp.einsum(formula, left, right, preferred_element_type=jnp.float32)
