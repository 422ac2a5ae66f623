"""Cross-entropy over a large vocabulary that never builds logits for tokens without loss.

The head of a small model with a large vocabulary costs more than its trunk: Gemma 3 270M spends 0.34 GFLOP per token
on 262,144 × 640 logits and 0.2 GFLOP on everything else, and [N, V] logits in fp32 take a megabyte per token. So the
tokens with loss are brought to the front, the rest is never multiplied with the head, and the logits live for one
chunk of tokens at a time. When a gradient is wanted, each chunk's gradient is taken by autodiff while its logits exist
and only scaled in the backward pass: nothing is recomputed (two matrix products for the hidden states, a third when
the head is trained).

On a mesh every device does this with its own tokens, and no hidden state ever leaves its device: the head is gathered
(over `fsdp`; with `tensor` each device scores its part of the vocabulary) and its gradient summed once, at the end.
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from agentark_jax.models.sharding import PARAMETERS, Axes, mesh_axes, partition_spec, traced_mesh

CHUNK_BYTES = 2**28


def chunk_rows(tokens: int, vocabulary: int, chunk_bytes: int) -> int:
    """Tokens per chunk so that its fp32 logits fit in `chunk_bytes`: at least 1, at most all `tokens`."""
    return max(1, min(tokens, chunk_bytes // (4 * vocabulary)))


def token_nll(
    hidden: Float[Array, "N D"],
    unembedding: Float[Array, "V D"],
    targets: Int[Array, " N"],
    soft_cap: float | None = None,
    vocabulary_axes: Axes = (),
) -> Float[Array, " N"]:
    """Negative log-likelihood (nats, fp32) of each target under softmax(cap(hidden @ unembedding.T)); dense.

    `soft_cap` c replaces logits x by c·tanh(x / c), as Gemma 2 does; `None` leaves them as they are. Where each device
    of the mesh axes `vocabulary_axes` has its part of the rows of `unembedding`, the result is that of all rows.
    """
    logits = jnp.einsum("nd,vd->nv", hidden, unembedding, preferred_element_type=jnp.float32)
    if soft_cap is not None:
        logits = soft_cap * jnp.tanh(logits / soft_cap)
    # A comparison instead of a gather: its gradient is a select that fuses, where a gather's is a scatter.
    local = targets - jax.lax.axis_index(vocabulary_axes) * logits.shape[1] if vocabulary_axes else targets
    is_target = jax.lax.broadcasted_iota(targets.dtype, logits.shape, 1) == local[:, None]
    log_total = jax.nn.logsumexp(logits, axis=-1)
    of_target = jnp.where(is_target, logits, 0.0).sum(axis=-1)
    if vocabulary_axes:
        peak = jax.lax.pmax(jax.lax.stop_gradient(log_total), vocabulary_axes)
        log_total = peak + jnp.log(jax.lax.psum(jnp.exp(log_total - peak), vocabulary_axes))
        of_target = jax.lax.psum(of_target, vocabulary_axes)
    return log_total - of_target


def chunked_nll(
    hidden: Float[Array, "N D"],
    unembedding: Float[Array, "V D"],
    targets: Int[Array, " N"],
    coefficients: Float[Array, " N"],
    mask: Bool[Array, " N"],
    *,
    soft_cap: float | None = None,
    chunk_bytes: int = CHUNK_BYTES,
) -> tuple[Float[Array, ""], Float[Array, " N"]]:
    """Σ coefficients[n]·nll[n] over the tokens of `mask`, and their nll (nats; 0 outside of `mask`).

    The sum is differentiable with respect to `hidden` and `unembedding` (whose gradient is computed only if it is
    asked for, and has its own dtype: an fp32 head beside bf16 hidden states is multiplied in bf16) and to nothing else;
    the per-token nll carries no gradient. Equals the dense computation up to the order of floating-point sums.
    `chunk_bytes` bounds the fp32 logits that exist at once, on each device of a mesh.
    """
    mesh = traced_mesh()
    tokens, vocabulary = (
        size // (1 if mesh is None else math.prod(mesh.shape[axis] for axis in mesh_axes(name, mesh)))
        for name, size in (("rows", hidden.shape[0]), ("vocabulary", unembedding.shape[0]))
    )
    rows = chunk_rows(tokens, vocabulary, chunk_bytes)
    coefficients = jax.lax.stop_gradient(jnp.where(mask, coefficients, 0.0).astype(jnp.float32))
    total, nll = _chunked(soft_cap, rows, hidden, unembedding, targets, coefficients, mask)
    return total, jax.lax.stop_gradient(nll)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _chunked(
    soft_cap: float | None,
    rows: int,
    hidden: Array,
    unembedding: Array,
    targets: Array,
    coefficients: Array,
    mask: Array,
) -> tuple[Array, Array]:
    total, nll, _, _ = _scan_chunks(soft_cap, rows, hidden, unembedding, targets, coefficients, mask, (False, False))
    return total, nll


def _forward(
    soft_cap: float | None, rows: int, hidden: Any, unembedding: Any, targets: Any, coefficients: Any, mask: Any
) -> tuple[tuple[Array, Array], tuple[Array | None, Array | None]]:
    # With symbolic zeros each argument says whether it is being differentiated: a frozen head costs nothing.
    wanted = (hidden.perturbed, unembedding.perturbed)
    total, nll, *gradients = _scan_chunks(
        soft_cap, rows, hidden.value, unembedding.value, targets.value, coefficients.value, mask.value, wanted
    )
    return (total, nll), (gradients[0], gradients[1])


def _backward(
    soft_cap: float | None, rows: int, gradients: tuple[Array | None, Array | None], cotangents: tuple[Any, Any]
) -> tuple[Array | None, ...]:
    scale = cotangents[0]
    if isinstance(scale, jax.custom_derivatives.SymbolicZero):
        return (None,) * 5
    scaled = tuple(None if g is None else (scale * g).astype(g.dtype) for g in gradients)
    return (*scaled, None, None, None)


_chunked.defvjp(_forward, _backward, symbolic_zeros=True)


def _scan_chunks(
    soft_cap: float | None,
    rows: int,
    hidden: Array,
    unembedding: Array,
    targets: Array,
    coefficients: Array,
    mask: Array,
    wanted: tuple[bool, bool],
) -> tuple[Array, Array, Array | None, Array | None]:
    """(Σ c·nll, nll [N], d/d hidden or None, d/d unembedding or None), each device of the mesh with its own tokens."""
    head = unembedding.astype(hidden.dtype)
    inputs = (soft_cap, rows, hidden, head, targets, coefficients, mask, wanted)
    total, nll, hidden_gradient, head_gradient = _scan_sharded(*inputs)
    if head_gradient is not None:
        head_gradient = head_gradient.astype(unembedding.dtype)
    return total, nll, hidden_gradient, head_gradient


def _scan_sharded(
    soft_cap: float | None,
    rows: int,
    hidden: Array,
    unembedding: Array,
    targets: Array,
    coefficients: Array,
    mask: Array,
    wanted: tuple[bool, bool],
) -> tuple[Array, Array, Array | None, Array | None]:
    mesh = traced_mesh()
    if mesh is None:
        return _scan_local(soft_cap, rows, hidden, unembedding, targets, coefficients, mask, wanted)
    token_axes, vocabulary_axes = mesh_axes("rows", mesh), mesh_axes("vocabulary", mesh)
    head_spec = partition_spec(PARAMETERS["unembedding"], unembedding.shape, mesh, "unembedding")
    # Of the axes that tokens are divided over, those that also divide the head: there its gradient is summed in parts.
    scattered = tuple(axis for axis in token_axes if axis in mesh_axes("embed", mesh))
    summed = tuple(axis for axis in token_axes if axis not in scattered)

    def local(
        hidden: Array, unembedding: Array, targets: Array, coefficients: Array, mask: Array
    ) -> tuple[Array, Array, Array | None, Array | None]:
        total, nll, hidden_gradient, head_gradient = _scan_local(
            soft_cap, rows, hidden, unembedding, targets, coefficients, mask, wanted, token_axes, vocabulary_axes
        )
        if head_gradient is not None and scattered:
            head_gradient = jax.lax.psum_scatter(head_gradient, scattered, scatter_dimension=1, tiled=True)
        if head_gradient is not None and summed:
            head_gradient = jax.lax.psum(head_gradient, summed)
        return jax.lax.psum(total, token_axes), nll, hidden_gradient, head_gradient

    by_token = PartitionSpec(token_axes)
    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(by_token, PartitionSpec(vocabulary_axes), by_token, by_token, by_token),
        out_specs=(PartitionSpec(), by_token, by_token, head_spec),
    )(hidden, unembedding, targets, coefficients, mask)


def _scan_local(
    soft_cap: float | None,
    rows: int,
    hidden: Array,
    unembedding: Array,
    targets: Array,
    coefficients: Array,
    mask: Array,
    wanted: tuple[bool, bool],
    token_axes: Axes = (),
    vocabulary_axes: Axes = (),
) -> tuple[Array, Array, Array | None, Array | None]:
    """`_scan_chunks` of one device, chunk after chunk of its masked tokens; sums are over its tokens alone.

    The number of chunks is known on the device only, hence a loop with a dynamic bound. Its carry is updated in place;
    a `cond` around each chunk would copy the [V, D] gradient through its branches.
    """
    tokens = hidden.shape[0]
    padded = -(-tokens // rows) * rows
    order = jnp.argsort(~mask, stable=True)
    order = jnp.pad(order, (0, padded - tokens), constant_values=tokens)  # out of range: read as zero, never written
    chunks = (mask.sum() + rows - 1) // rows
    arguments = tuple(index for index, is_wanted in enumerate(wanted) if is_wanted)
    # Marked as different on each device, or autodiff would sum the head's gradient over all of them in every chunk.
    head = _varying(unembedding, token_axes)

    def chunk_total(chunk_hidden: Array, head: Array, chunk_targets: Array, weights: Array) -> tuple[Array, Array]:
        nll = token_nll(chunk_hidden, head, chunk_targets, soft_cap, vocabulary_axes)
        return jnp.sum(weights * nll), nll

    def body(chunk: Array, carry: tuple[Array, Array, Array | None, Array | None]) -> tuple:
        total, nll, hidden_gradient, head_gradient = carry
        at = jax.lax.dynamic_slice_in_dim(order, chunk * rows, rows)
        take = partial(jnp.take, indices=at, axis=0, mode="fill", fill_value=0)
        inputs = (take(hidden), head, take(targets), take(coefficients))
        if arguments:
            (value, chunk_nll), found = jax.value_and_grad(chunk_total, arguments, has_aux=True)(*inputs)
            gradients = dict(zip(arguments, found, strict=True))
            if hidden_gradient is not None:
                hidden_gradient = hidden_gradient.at[at].set(gradients[0], mode="drop")
            if head_gradient is not None:
                head_gradient = head_gradient + gradients[1].astype(jnp.float32)
        else:
            value, chunk_nll = chunk_total(*inputs)
        nll = nll.at[at].set(jnp.where(take(mask), chunk_nll, 0.0), mode="drop")
        return total + value, nll, hidden_gradient, head_gradient

    start = (
        _varying(jnp.zeros((), jnp.float32), token_axes),
        _varying(jnp.zeros(tokens, jnp.float32), token_axes),
        _varying(jnp.zeros(hidden.shape, hidden.dtype), token_axes) if wanted[0] else None,
        _varying(jnp.zeros(head.shape, jnp.float32), token_axes + vocabulary_axes) if wanted[1] else None,
    )
    return jax.lax.fori_loop(0, chunks, body, start)


def _varying(x: Array, axes: Axes) -> Array:
    return jax.lax.pcast(x, axes, to="varying") if axes else x
