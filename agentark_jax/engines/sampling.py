"""Drawing tokens on the device: one uniform number per token, inverted through the cumulative distribution.

The vocabulary is looked at in blocks: a maximum and a sum per block are all that is kept of a pass over it, and only
the block that holds the drawn token is looked at again. With vocabularies of hundreds of thousands this is several
times faster than whole cumulative sums, and more exact.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt32

_BLOCK = 512


def uniform_at(seeds: UInt32[Array, "S 2"], steps: Int[Array, " S"]) -> Float[Array, " S"]:
    """The uniform number in [0, 1) of every slot's current step; a function of (seed, step) alone."""

    def draw(seed: UInt32[Array, "2"], step: Int[Array, ""]) -> Float[Array, ""]:
        return jax.random.uniform(jax.random.fold_in(jax.random.wrap_key_data(seed), step))

    return jax.vmap(draw)(seeds, steps)


def sample(
    logits: Float[Array, "S V"],
    uniforms: Float[Array, " S"],
    temperature: Float[Array, " S"],
    top_p: Float[Array, " S"] | None = None,
) -> tuple[Int[Array, " S"], Float[Array, " S"]]:
    """Draw a token per slot and give its log-probability.

    Temperature 0 takes the most likely token. Log-probabilities are at the sampling temperature (at 1 for greedy)
    over the whole vocabulary, before `top_p` truncates it: the number that a trainer recomputes from the logits.
    `top_p` None draws from the whole vocabulary and saves a sort of it.
    """
    greedy = temperature == 0
    rate = jnp.where(greedy, 1.0, 1.0 / jnp.where(greedy, 1.0, temperature))
    slots, vocabulary = logits.shape
    padded = jnp.pad(logits.astype(jnp.float32), ((0, 0), (0, -vocabulary % _BLOCK)), constant_values=-jnp.inf)
    blocks = padded.reshape(slots, -1, _BLOCK)
    rows = jnp.arange(slots)

    block_highest = jnp.max(blocks, axis=-1)
    best_block = jnp.argmax(block_highest, axis=-1)
    highest = block_highest[rows, best_block]
    most_likely = best_block * _BLOCK + jnp.argmax(blocks[rows, best_block], axis=-1)

    def weights(of: Float[Array, "S N *B"]) -> Float[Array, "S N *B"]:
        shape = (slots,) + (1,) * (of.ndim - 1)
        return jnp.exp((of - highest.reshape(shape)) * rate.reshape(shape))

    block_sums = jnp.sum(weights(blocks), axis=-1)
    total = jnp.sum(block_sums, axis=-1)
    if top_p is not None:
        blocks = _truncate(padded, weights(padded), top_p).reshape(blocks.shape)
        block_sums = jnp.sum(weights(blocks), axis=-1)
    block_ends = jnp.cumsum(block_sums, axis=-1)
    target = uniforms * block_ends[:, -1]
    block = _first_above(block_ends, target)
    start = jnp.where(block > 0, block_ends[rows, jnp.maximum(block - 1, 0)], 0)
    inside = jnp.cumsum(weights(blocks[rows, block]), axis=-1)
    drawn = jnp.where(greedy, most_likely, block * _BLOCK + _first_above(inside, target - start))
    chosen = padded[rows, drawn]
    return drawn, (chosen - highest) * rate - jnp.log(total)


def _truncate(
    logits: Float[Array, "S V"], weights: Float[Array, "S V"], top_p: Float[Array, " S"]
) -> Float[Array, "S V"]:
    """Logits of -inf for all but the fewest most likely tokens whose probability reaches `top_p`."""
    descending = jnp.sort(weights, axis=-1, descending=True)
    before = jnp.cumsum(descending, axis=-1) - descending
    inside = before < top_p[:, None] * jnp.sum(weights, axis=-1, keepdims=True)
    smallest = jnp.min(jnp.where(inside, descending, jnp.inf), axis=-1)
    return jnp.where((weights >= smallest[:, None]) | (top_p >= 1)[:, None], logits, -jnp.inf)


def _first_above(ends: Float[Array, "S N"], target: Float[Array, " S"]) -> Int[Array, " S"]:
    """Index of the first entry above the target; where rounding leaves none, of the first that reaches the total."""
    above = ends > jnp.minimum(target, jnp.nextafter(ends[:, -1], 0))[:, None]
    return jnp.argmax(above, axis=-1)
