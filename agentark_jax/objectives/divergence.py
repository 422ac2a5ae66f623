"""How far apart two models' next-token distributions are, over the whole vocabulary and a few tokens at a time.

[N, V] logits of two models would take megabytes per token (see `chunked`); here those of one chunk of tokens exist, and
of each token four numbers are left. Nothing here is differentiated: it measures, it trains nothing.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from agentark_jax.objectives.chunked import Portions, chunk_rows


class Readout(NamedTuple):
    """What makes logits of a model's hidden states: cap(hidden @ unembedding.T), as `transformer.logits`."""

    unembedding: Array
    """[V, D]."""
    soft_cap: float | None


class Divergences(NamedTuple):
    """Of N tokens, in nats, float32."""

    first: Array
    """Log-probability of the target by the first model [N]."""
    second: Array
    """And by the second [N]."""
    forward: Array
    """KL(first‖second): how much the second loses of what the first would say [N]."""
    reverse: Array
    """KL(second‖first) [N]."""


def divergences(
    hidden: tuple[Float[Array, "N D"], Float[Array, "N E"]],
    readouts: tuple[Readout, Readout],
    targets: Int[Array, " N"],
    *,
    chunk_bytes: int = Portions().chunk_bytes,
) -> Divergences:
    """Compares two models where each has read the same tokens.

    Args:
        hidden: of both models, after their final norms, at the position before each target.
        readouts: of both; their vocabularies are the same V tokens.
        targets: the tokens that stand there.
        chunk_bytes: bounds the fp32 logits of one model that exist at once; there are a few such arrays.

    Raises: ValueError for vocabularies of two sizes.
    """
    sizes = [readout.unembedding.shape[0] for readout in readouts]
    if sizes[0] != sizes[1]:
        raise ValueError(f"one model scores {sizes[0]} tokens, the other {sizes[1]}; there is no divergence of these")
    rows = chunk_rows(len(targets), sizes[0], chunk_bytes)
    heads = tuple(jnp.asarray(readout.unembedding) for readout in readouts)
    caps = tuple(readout.soft_cap for readout in readouts)
    return _divergences(rows, caps, hidden, heads, targets)


@partial(jax.jit, static_argnums=(0, 1))
def _divergences(
    rows: int,
    caps: tuple[float | None, float | None],
    hidden: tuple[Array, Array],
    heads: tuple[Array, Array],
    targets: Array,
) -> Divergences:
    def one(token: tuple[Array, Array, Array]) -> Divergences:
        *states, target = token
        first, second = (
            _log_probabilities(state, head, cap) for state, head, cap in zip(states, heads, caps, strict=True)
        )
        return Divergences(first[target], second[target], _kl(first, second), _kl(second, first))

    return jax.lax.map(one, (*hidden, targets), batch_size=rows)


def _log_probabilities(hidden: Float[Array, " D"], head: Float[Array, "V D"], cap: float | None) -> Float[Array, " V"]:
    logits = jnp.einsum("d,vd->v", hidden, head.astype(hidden.dtype), preferred_element_type=jnp.float32)
    return jax.nn.log_softmax(logits if cap is None else cap * jnp.tanh(logits / cap))


def _kl(p: Float[Array, " V"], q: Float[Array, " V"]) -> Float[Array, ""]:
    """KL(p‖q) of two distributions by their log-probabilities; of nearly equal ones rounding could make less than 0."""
    return jnp.maximum(0.0, jnp.sum(jnp.exp(p) * (p - q)))
