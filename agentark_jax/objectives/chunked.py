"""Log-probabilities over a large vocabulary that never build logits for tokens without loss.

The head of a small model with a large vocabulary costs more than its trunk: Gemma 3 270M spends 0.34 GFLOP per token
on 262,144 × 640 logits and 0.2 GFLOP on everything else, and [N, V] logits in fp32 take a megabyte per token. So the
tokens with loss are brought to the front, the rest is never multiplied with the head, and the logits live for one
chunk of tokens at a time.

Two kinds of objectives use this. Where the loss is a sum of negative log-likelihoods with known coefficients
(`chunked_nll`), each chunk's gradient is taken while its logits exist and only scaled in the backward pass: nothing is
recomputed (two matrix products for the hidden states, a third when the head is trained). Where it is any function of
log-probabilities and entropies (`chunked_logprobs`), the backward pass makes every chunk's logits again.

On a mesh every device does this with its own tokens, and no hidden state ever leaves its device: the head is gathered
(over `fsdp`; with `tensor` each device scores its part of the vocabulary) and its gradient summed once, at the end.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from agentark_jax.models.sharding import PARAMETERS, Axes, mesh_axes, partition_spec, traced_mesh, traced_platform

NOTHING = (False, False)


class Portions(NamedTuple):
    """How tokens are scored.

    Attributes:
        chunk_bytes: bounds the fp32 logits that exist at once.
        parts: of the vocabulary, at most, in their making.
        halves: whether the last chunk of a device has half of the rows where they are enough.
    """

    chunk_bytes: int = 2**28
    parts: int = 16
    halves: bool = False


def portions(platform: str | None) -> Portions:
    """In what portions tokens are scored on devices of this platform (None: not known).

    Every chunk reads and writes the whole gradient of the head: with chunks of a few hundred tokens a GPU does hardly
    anything else. There a product with the whole head, added to what is there, is a single kernel, and slices of its
    operands are copies. A CPU has so much to do for every row that it is worth another program to have fewer.
    """
    return {"gpu": Portions(2**30, 1), "cpu": Portions(halves=True)}.get(platform or "", Portions())


class Scores(NamedTuple):
    """What is known of each token, [N]; zero or False outside of the mask."""

    logprobs: Array
    """Of the target, in nats."""
    entropy: Array | None
    """Of the distribution that the target was drawn from, in nats; None unless it was asked for."""
    correct: Array
    """Whether no token is likelier than the target."""


class _Inputs(NamedTuple):
    """Arrays of N tokens, or of those of one device; and the same shape for cotangents of these, where None is zero."""

    hidden: Any
    unembedding: Any
    targets: Any = None
    mask: Any = None
    cotangents: Any = (None, None)
    """Of log-probabilities and, where these are computed, of entropies: [N] each."""


class _Gradients(NamedTuple):
    hidden: Array | None
    unembedding: Array | None


@jax.tree_util.register_static
@dataclass(frozen=True)
class _Settings:
    """What is known when the computation is traced; `wanted`: whether there are gradients of (hidden, unembedding)."""

    soft_cap: float | None
    temperature: float
    entropy: bool
    portions: Portions
    wanted: tuple[bool, bool] = NOTHING
    token_axes: Axes = ()
    vocabulary_axes: Axes = ()


def chunk_rows(tokens: int, vocabulary: int, chunk_bytes: int) -> int:
    """Tokens per chunk so that its fp32 logits fit in `chunk_bytes`: at least 1, at most all `tokens`.

    Where they are many but not all they are a multiple of 128: matrix products copy operands of other sizes on GPUs.
    """
    rows = max(1, min(tokens, chunk_bytes // (4 * vocabulary)))
    return rows if rows == tokens or rows < 128 else rows - rows % 128


def _portions(chunk_bytes: int | None) -> Portions:
    """Those of the devices that are traced for, but `chunk_bytes` where that is given."""
    usual = portions(traced_platform())
    return usual if chunk_bytes is None else usual._replace(chunk_bytes=chunk_bytes)


def chunked_logprobs(
    hidden: Float[Array, "N D"],
    unembedding: Float[Array, "V D"],
    targets: Int[Array, " N"],
    mask: Bool[Array, " N"],
    *,
    temperature: float = 1.0,
    soft_cap: float | None = None,
    entropy: bool = False,
    chunk_bytes: int | None = None,
) -> Scores:
    """Each target's log-probability (fp32) under softmax(cap(hidden @ unembedding.T) / temperature).

    Log-probabilities and, if asked for, entropies are differentiable with respect to `hidden` and `unembedding`, whose
    gradient is computed only if it is asked for and has its own dtype: an fp32 head beside bf16 hidden states is
    multiplied in bf16. `soft_cap` c replaces logits x by c·tanh(x / c), as Gemma 2 does. `chunk_bytes` bounds the fp32
    logits that exist at once, on each device of a mesh (None: as `portions` says of these devices). Equals the dense
    computation up to the order of sums.
    """
    settings = _Settings(soft_cap, temperature, entropy, _portions(chunk_bytes))
    return _recomputing(settings, _Inputs(hidden, unembedding, targets, mask))


def chunked_nll(
    hidden: Float[Array, "N D"],
    unembedding: Float[Array, "V D"],
    targets: Int[Array, " N"],
    coefficients: Float[Array, " N"],
    mask: Bool[Array, " N"],
    *,
    soft_cap: float | None = None,
    chunk_bytes: int | None = None,
) -> tuple[Float[Array, ""], Scores]:
    """-Σ coefficients[n]·logprobs[n] over the tokens of `mask`, and the `chunked_logprobs` at temperature 1.

    The sum is differentiable with respect to `hidden` and `unembedding` and to nothing else; the scores are not. It
    takes three products with the head where the same sum of `chunked_logprobs` and its gradients take four.
    """
    settings = _Settings(soft_cap, 1.0, False, _portions(chunk_bytes))
    cotangents = jax.lax.stop_gradient(-jnp.where(mask, coefficients, 0.0).astype(jnp.float32))
    total, scores = _fused(settings, _Inputs(hidden, unembedding, targets, mask, (cotangents, None)))
    return total, jax.lax.stop_gradient(scores)


@jax.custom_vjp
def _recomputing(settings: _Settings, inputs: _Inputs) -> Scores:
    return _scan(settings, inputs)[0]


def _recomputing_forward(settings: _Settings, marked: _Inputs) -> tuple[Scores, tuple[_Settings, _Inputs]]:
    settings, inputs = _differentiated(settings, marked)
    return _scan(replace(settings, wanted=NOTHING), inputs)[0], (settings, inputs)


def _recomputing_backward(residuals: tuple[_Settings, _Inputs], of: Scores) -> tuple[None, _Inputs | None]:
    settings, inputs = residuals
    if all(isinstance(each, SymbolicZero | None) for each in (of.logprobs, of.entropy)):
        return None, None
    known = jax.tree.map(
        lambda each: jnp.zeros(each.shape) if isinstance(each, SymbolicZero) else each,
        (of.logprobs, of.entropy),
        is_leaf=lambda each: isinstance(each, SymbolicZero),
    )
    _, gradients = _scan(settings, inputs._replace(cotangents=known))
    return None, _Inputs(*gradients)


_recomputing.defvjp(_recomputing_forward, _recomputing_backward, symbolic_zeros=True)


@jax.custom_vjp
def _fused(settings: _Settings, inputs: _Inputs) -> tuple[Array, Scores]:
    scores, _ = _scan(settings, inputs)
    return jnp.sum(inputs.cotangents[0] * scores.logprobs), scores


def _fused_forward(settings: _Settings, marked: _Inputs) -> tuple[tuple[Array, Scores], _Gradients]:
    settings, inputs = _differentiated(settings, marked)
    scores, gradients = _scan(settings, inputs)
    return (jnp.sum(inputs.cotangents[0] * scores.logprobs), scores), gradients


def _fused_backward(gradients: _Gradients, of: tuple[Array | SymbolicZero, Scores]) -> tuple[None, _Inputs | None]:
    scale = of[0]
    if isinstance(scale, SymbolicZero):
        return None, None
    scaled = jax.tree.map(lambda gradient: (scale * gradient).astype(gradient.dtype), gradients)
    return None, _Inputs(*scaled)


_fused.defvjp(_fused_forward, _fused_backward, symbolic_zeros=True)


def _differentiated(settings: _Settings, marked: _Inputs) -> tuple[_Settings, _Inputs]:
    """What a forward rule with symbolic zeros is given: the arrays, and which of them are being differentiated."""
    wanted = (marked.hidden.perturbed, marked.unembedding.perturbed)
    return replace(settings, wanted=wanted), jax.tree.map(lambda argument: argument.value, marked)


def _scan(settings: _Settings, inputs: _Inputs) -> tuple[Scores, _Gradients]:
    """Scores, and gradients of Σ cotangent·score, each device of the mesh with its own tokens."""
    head = inputs.unembedding
    scores, gradients = _on_devices(settings, inputs._replace(unembedding=head.astype(inputs.hidden.dtype)))
    if gradients.unembedding is not None:
        gradients = gradients._replace(unembedding=gradients.unembedding.astype(head.dtype))
    return scores, gradients


def _on_devices(settings: _Settings, inputs: _Inputs) -> tuple[Scores, _Gradients]:
    mesh = traced_mesh()
    if mesh is None:
        return _on_one_device(settings, inputs)
    token_axes, vocabulary_axes = mesh_axes("rows", mesh), mesh_axes("vocabulary", mesh)
    settings = replace(settings, token_axes=token_axes, vocabulary_axes=vocabulary_axes)
    # Of the axes that tokens are divided over, those that also divide the head: there its gradient is summed in parts.
    scattered = tuple(axis for axis in token_axes if axis in mesh_axes("embed", mesh))
    summed = tuple(axis for axis in token_axes if axis not in scattered)

    def local(inputs: _Inputs) -> tuple[Scores, tuple[Array | None, Array | None]]:
        scores, (hidden, head) = _on_one_device(settings, inputs)
        if head is not None and scattered:
            head = jax.lax.psum_scatter(head, scattered, scatter_dimension=1, tiled=True)
        if head is not None and summed:
            head = jax.lax.psum(head, summed)
        return scores, (hidden, None if head is None else head[: inputs.unembedding.shape[0]])

    by_token = PartitionSpec(token_axes)
    head_spec = partition_spec(PARAMETERS["unembedding"], inputs.unembedding.shape, mesh, "unembedding")
    given = _Inputs(by_token, PartitionSpec(vocabulary_axes), by_token, by_token, by_token)
    found = (by_token, (by_token, head_spec))
    scores, gradients = jax.shard_map(local, mesh=mesh, in_specs=(given,), out_specs=found)(inputs)
    return scores, _Gradients(*gradients)


def _on_one_device(settings: _Settings, inputs: _Inputs) -> tuple[Scores, _Gradients]:
    """`_scan`, chunk after chunk of the device's masked tokens; the head's gradient is that of its tokens alone.

    The number of chunks is known on the device only, hence loops with dynamic bounds. Their carry is updated in place;
    a `cond` around each chunk would copy the [V, D] gradient through its branches.
    """
    hidden, head = inputs.hidden, inputs.unembedding
    tokens = hidden.shape[0]
    everywhere = settings.token_axes + settings.vocabulary_axes
    rows = chunk_rows(tokens, head.shape[0], settings.portions.chunk_bytes)
    # Places that are left over are out of range: read as zero, never written.
    order = jnp.nonzero(inputs.mask, size=-(-tokens // rows) * rows, fill_value=tokens)[0]
    count = inputs.mask.sum()
    half = rows // 2 if settings.portions.halves and rows % 256 == 0 else rows
    chunks = (count + half - 1) // rows  # whole ones

    def body(
        begin: Array | int, size: int, chunk: Array, carry: tuple[Scores, _Gradients]
    ) -> tuple[Scores, _Gradients]:
        scores, gradients = carry
        at = jax.lax.dynamic_slice_in_dim(order, begin + chunk * size, size)
        take = partial(jnp.take, indices=at, axis=0, mode="fill", fill_value=0)
        mine = take(hidden)
        products = _products(settings, mine, head, _zeros((size, head.shape[0]), jnp.float32, everywhere))
        found, pullback, correct = jax.vjp(partial(_score, settings, take(inputs.targets)), products, has_aux=True)
        scores = jax.tree.map(lambda old, new: old.at[at].set(new, mode="drop"), scores, Scores(*found, correct))
        if settings.wanted == NOTHING:
            return scores, gradients
        (of_products,) = pullback(jax.tree.map(take, inputs.cotangents))
        return scores, _accumulated(settings, gradients, of_products.astype(hidden.dtype), at, mine, head)

    of_tokens = partial(_zeros, (tokens,), axes=settings.token_axes)
    start = (
        Scores(of_tokens(jnp.float32), of_tokens(jnp.float32) if settings.entropy else None, of_tokens(bool)),
        _Gradients(
            _zeros(hidden.shape, hidden.dtype, settings.token_axes) if settings.wanted[0] else None,
            _zeros((_gradient_rows(settings, head.shape[0]), head.shape[1]), jnp.float32, everywhere)
            if settings.wanted[1]
            else None,
        ),
    )
    done = jax.lax.fori_loop(0, chunks, partial(body, 0, rows), start)
    if half == rows:
        return done
    begin = chunks * rows
    return jax.lax.fori_loop(0, (jnp.maximum(count - begin, 0) + half - 1) // half, partial(body, begin, half), done)


def _gradient_rows(settings: _Settings, vocabulary: int) -> int:
    """Rows of the array in which the head's gradient is summed: a few more than the vocabulary on several devices.

    The TPU compiler makes an all-reduce (twice the bytes) of a reduce-scatter whose rows do not divide well, as those
    of Qwen3's 151,936 do not. Small vocabularies are left alone: for them the rows would be many more.
    """
    rows = -(-vocabulary // 512) * 512
    return rows if settings.token_axes and rows < 1.01 * vocabulary else vocabulary


def _zeros(shape: tuple[int, ...], dtype: jax.typing.DTypeLike, axes: Axes) -> Array:
    """Zeros that may become something else on each device of these axes."""
    zeros = jnp.zeros(shape, dtype)
    return jax.lax.pcast(zeros, axes, to="varying") if axes else zeros


def _block_size(settings: _Settings, vocabulary: int) -> int:
    """Products with the head, and those that make its gradient, are made in equal parts of the vocabulary.

    In one piece the first kind repacks the whole head on CPU, and the second needs the head's size beside the sum.
    """
    return vocabulary // next(parts for parts in range(settings.portions.parts, 0, -1) if vocabulary % parts == 0)


def _products(
    settings: _Settings, hidden: Float[Array, "R D"], head: Float[Array, "V D"], out: Float[Array, "R V"]
) -> Float[Array, "R V"]:
    """hidden @ head.T, written into `out`."""
    size = _block_size(settings, head.shape[0])

    def write(block: Array, out: Array) -> Array:
        part = jax.lax.dynamic_slice_in_dim(head, block * size, size)
        new = jnp.einsum("nd,vd->nv", hidden, part, preferred_element_type=jnp.float32)
        return jax.lax.dynamic_update_slice_in_dim(out, new, block * size, axis=1)

    return jax.lax.fori_loop(0, head.shape[0] // size, write, out)


def _score(
    settings: _Settings, targets: Int[Array, " R"], products: Float[Array, "R V"]
) -> tuple[tuple[Array, Array | None], Array]:
    """((log-probabilities, entropies), correct) of some tokens from what their hidden states and the head multiply to.

    Where each device of the vocabulary axes has its part of the vocabulary, the results are those of all of it.
    """
    axes = settings.vocabulary_axes
    # A comparison instead of a gather: its gradient is a select that fuses, where a gather's is a scatter.
    local = targets - jax.lax.axis_index(axes) * products.shape[1] if axes else targets
    is_target = jax.lax.broadcasted_iota(targets.dtype, products.shape, 1) == local[:, None]

    def summed(parts: Array) -> Array:
        total = parts.sum(axis=-1)
        return jax.lax.psum(total, axes) if axes else total

    def scaled(x: Array) -> Array:
        capped = x if settings.soft_cap is None else settings.soft_cap * jnp.tanh(x / settings.soft_cap)
        return capped / settings.temperature

    # Looked for among the products: they lie in memory, where logits are computed anew, to another last digit, by each
    # fused loop that uses them.
    known = jax.lax.stop_gradient(products)
    peak = known.max(axis=-1)
    peak = jax.lax.pmax(peak, axes) if axes else peak
    correct = summed(jnp.where(is_target, known, 0.0)) >= peak
    logits = scaled(products) - scaled(peak)[:, None]
    weights = jnp.exp(logits)
    total = summed(weights)
    of_target = summed(jnp.where(is_target, logits, 0.0))
    entropy = jnp.log(total) - summed(weights * logits) / total if settings.entropy else None
    return (of_target - jnp.log(total), entropy), correct


def _accumulated(
    settings: _Settings,
    gradients: _Gradients,
    of_products: Float[Array, "R V"],
    at: Int[Array, " R"],
    hidden: Float[Array, "R D"],
    head: Float[Array, "V D"],
) -> _Gradients:
    """The gradients with those of a chunk: its tokens are the rows `at` of all tokens."""
    of_hidden, of_head = gradients
    if of_hidden is not None:
        new = jnp.einsum("nv,vd->nd", of_products, head, preferred_element_type=jnp.float32)
        new = jax.lax.psum(new, settings.vocabulary_axes) if settings.vocabulary_axes else new
        of_hidden = of_hidden.at[at].set(new.astype(of_hidden.dtype), mode="drop")
    if of_head is not None:
        size = _block_size(settings, head.shape[0])

        def add(block: Array, total: Array) -> Array:
            part = jax.lax.dynamic_slice_in_dim(of_products, block * size, size, axis=1)
            old = jax.lax.dynamic_slice_in_dim(total, block * size, size)
            new = jnp.einsum("nv,nd->vd", part, hidden, preferred_element_type=jnp.float32)
            return jax.lax.dynamic_update_slice_in_dim(total, old + new, block * size, axis=0)

        of_head = jax.lax.fori_loop(0, head.shape[0] // size, add, of_head)
    return _Gradients(of_hidden, of_head)
