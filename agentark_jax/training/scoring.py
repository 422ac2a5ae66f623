"""What a process reward model says of steps: many sequences at once, in programs of few shapes."""

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from agentark_jax.errors import AgentArkError, memory_for
from agentark_jax.models.attention import choose_attention, kernel_platform
from agentark_jax.models.config import ModelConfig
from agentark_jax.models.heads import Head, position_logits
from agentark_jax.models.sharding import RULES, on_mesh, replicated, row_sharding
from agentark_jax.models.transformer import Params, hidden_states
from agentark_jax.training.mesh import local_rows, place_batch

_SHORTEST = 32  # tokens of a row; shorter ones save nothing


@memory_for(
    "scoring steps",
    "Score fewer tokens at once: --batch_tokens of `agentark prm score`, rl.fit.rows in a run; or take --dtype "
    "bfloat16",
)
def score_steps(
    config: ModelConfig,
    params: Params,
    head: Head,
    sequences: Sequence[tuple[Sequence[int] | np.ndarray, Sequence[int] | np.ndarray]],
    mesh: Mesh,
    *,
    tokens: int = 8192,
    dtype: jax.typing.DTypeLike = "float32",
    progress: Callable[[int], None] | None = None,
) -> list[Float[np.ndarray, " S"]]:
    """How probably each step is right, by the head, float32; in the order of the sequences.

    Rows have a power of two of tokens (or all that the model takes), batches always as many rows as `tokens` allow, so
    that one program a length serves all calls, compiled once. Sequences go from long to short and fill each other's
    batches. With several processes each calls this with the same arguments and gets all of it.

    Args:
        params: on the mesh, where it has several devices.
        sequences: of each the ids [T] (a prompt and a completion) and the positions [S] of the last tokens of its
            steps. There may be none: then nothing is said.
        tokens: of a batch, padding included, at most; a single row may be longer.
        dtype: in what layers compute; the head is float32.
        progress: told how many sequences were done since it was last told.

    Raises:
        AgentArkError: a sequence is longer than the model takes, empty, or has a step that ends outside of it.
    """
    found: list[Float[np.ndarray, " S"]] = [np.zeros(0, np.float32) for _ in sequences]
    arrays = [(np.asarray(ids, np.int32), np.asarray(ends, np.int64)) for ids, ends in sequences]
    for index, (ids, ends) in enumerate(arrays):
        if not 0 < len(ids) <= config.max_positions:
            raise AgentArkError(
                f"sequence {index} has {len(ids)} tokens; this model scores 1 to {config.max_positions}. Leave it out"
            )
        if len(ends) and not 0 <= ends.min() <= ends.max() < len(ids):
            raise AgentArkError(f"sequence {index} has {len(ids)} tokens and steps that end at {ends.tolist()}")
    waiting = sorted(range(len(arrays)), key=lambda index: len(arrays[index][0]), reverse=True)
    while waiting:
        length = min(max(_SHORTEST, _power(len(arrays[waiting[0]][0]))), config.max_positions)
        rows = batch_rows(length, tokens, mesh)
        now, waiting = waiting[:rows], waiting[rows:]
        here = local_rows(mesh, rows)
        batch = np.zeros((len(here), length), np.int32)
        for place, row in enumerate(here):
            if row < len(now):
                ids = arrays[now[row]][0]
                batch[place, : len(ids)] = ids
        scorer = _scorer(config, mesh, length, str(jax.numpy.dtype(dtype)))
        right = np.asarray(scorer(params, head, place_batch(mesh, {"ids": batch}, rows)["ids"]))
        for row, index in enumerate(now):
            found[index] = right[row, arrays[index][1]]
        if progress is not None:
            progress(len(now))
    return found


def batch_rows(length: int, tokens: int, mesh: Mesh) -> int:
    """Rows of so many tokens in a batch: as many as fit, a power of two of them on every device."""
    parts = math.prod(mesh.shape[axis] for axis in RULES["rows"])
    each = max(1, tokens // (length * parts))
    return parts * 2 ** int(math.log2(each))


@cache
def _scorer(config: ModelConfig, mesh: Mesh, length: int, dtype: str) -> Callable[..., Any]:
    """(params, head, ids [rows, length] int32) → the probability [rows, length] of a step that ends there."""
    platform = kernel_platform(mesh.devices.flat[0])
    attention, _ = choose_attention(platform, config, packed=False, length=length, dtype=dtype)

    def score(params: Params, head: Head, ids: Int[Array, "B T"]) -> Float[Array, "B T"]:
        with on_mesh(mesh):
            positions = jax.numpy.broadcast_to(jax.numpy.arange(length, dtype=jax.numpy.int32), ids.shape)
            # Padding stands to the right: no token before it sees it.
            h = hidden_states(config, params, ids, positions, dtype=dtype, attention=attention)
            return jax.nn.softmax(position_logits(head, h), axis=-1)[..., 1]

    return jax.jit(score, in_shardings=(None, None, row_sharding(mesh)), out_shardings=replicated(mesh))


def _power(length: int) -> int:
    """The next power of two."""
    return 1 << (length - 1).bit_length()
