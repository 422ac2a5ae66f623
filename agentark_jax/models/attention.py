"""Attention over whole sequences: in blocks for XLA (`blocked`), or by kernels of the platform.

All of them compute the same: position i of a row attends to the positions j ≤ i of its segment with i − j below the
window. Segment 0 is padding, which is a segment like the others: what comes of it is never read, but never NaN either.
Which of them computes a layer is decided beforehand by `choose_attention` and passed down as a static argument.
Decoding, one query per row against a cache, is always dense. Kernels are imported where they are called, since not
every platform has what they are written in.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from agentark_jax.models.blocked import KEPT, MASKED, blocked, grouped, ungrouped
from agentark_jax.models.config import LayerType, ModelConfig
from agentark_jax.models.sharding import ACTIVATIONS, mesh_axes, partition_spec, traced_mesh

Backend = Literal["xla", "cudnn", "pallas", "splash"]
# (query [B, T, N, H], key [B, K, S, H], value [B, K, S, H], scale, soft cap) → [B, T, N, H]
Attend = Callable[[jax.Array, jax.Array, jax.Array, float, float | None], jax.Array]

_LANES = 128  # splash divides rows into blocks of a multiple of this
_LEAST_BLOCK = 16  # the smallest matrix that the tensor cores of a GPU multiply


@dataclass(frozen=True)
class AttentionPlan:
    """What computes whole sequences in the layers of each type. `interpret` runs the Pallas kernels on any platform."""

    full_attention: Backend = "xla"
    sliding_attention: Backend = "xla"
    interpret: bool = False

    def backend(self, layer_type: LayerType) -> Backend:
        return self.full_attention if layer_type == "full_attention" else self.sliding_attention


XLA = AttentionPlan()


def kernel_platform(device: jax.Device) -> str:
    """`tpu`, `gpu` (NVIDIA from Ampere on, which the kernels are for), or what else the device is called."""
    if device.platform != "gpu":
        return device.platform
    major = str(getattr(device, "compute_capability", "")).split(".")[0]
    return "gpu" if major.isdigit() and int(major) >= 8 else device.device_kind


def choose_attention(
    platform: str, config: ModelConfig, *, packed: bool, length: int, dtype: jax.typing.DTypeLike
) -> tuple[AttentionPlan, str]:
    """What computes rows of `length` tokens on a platform (of `kernel_platform`), and why, in a line's words.

    `packed` says that rows hold several segments. A kernel that lacks something is passed over for one that has it, in
    the end for XLA, and only in the layers that need it: all of them give the same result up to rounding.
    """
    candidates: tuple[Backend, ...] = ()
    if platform == "gpu":
        candidates = ("pallas",) if packed else ("cudnn", "pallas")
    elif platform == "tpu":
        candidates = ("splash",)
    if not candidates:
        return XLA, f"xla; there are no kernels for {platform}"
    found: dict[LayerType, Backend] = {}
    words = []
    for layer_type in sorted(set(config.layer_types)):
        passed = []
        for backend in candidates:
            lack = _lack(backend, config, _window(config, layer_type, length), length, jnp.dtype(dtype))
            if lack is None:
                found[layer_type] = backend
                break
            passed.append(f"{backend} {lack}")
        because = "; ".join(passed)
        words.append(found.setdefault(layer_type, "xla") + (f" ({because})" if because else ""))
    if len(set(words)) > 1:
        words = [f"{each} in {layer_type} layers" for layer_type, each in zip(found, words, strict=True)]
    rows = f"{'packed ' if packed else ''}rows of {length} in {jnp.dtype(dtype).name}"
    plan = AttentionPlan(found.get("full_attention", "xla"), found.get("sliding_attention", "xla"))
    return plan, f"{', '.join(dict.fromkeys(words))}; on {platform}, {rows}"


def _window(config: ModelConfig, layer_type: LayerType, length: int) -> int | None:
    """The layer's sliding window, where it is shorter than rows of this length."""
    window = config.window(layer_type)
    return None if window is None or window >= length else window


def _lack(backend: Backend, config: ModelConfig, window: int | None, length: int, dtype: jnp.dtype) -> str | None:
    """What the backend lacks for such layers and rows, in words after its name."""
    head = config.head_dim
    if backend == "splash":
        return f"needs rows of a multiple of {_LANES}" if length % _LANES else None
    if config.attention_softcap is not None:
        return "has no soft cap"
    if backend == "cudnn":
        if dtype.itemsize != 2:
            return "computes in 16 bits only"
        return f"has no heads of {head}" if head > 128 or head % 8 else None
    if window is not None:
        return f"has no sliding windows, and {window} is less than a row"
    if length % _LEAST_BLOCK:
        return f"needs rows of a multiple of {_LEAST_BLOCK}"
    return f"has no heads of {head}" if head not in (16, 32, 64, 128, 256) else None


def keep_kernel_results(primitive: Primitive, *_: object, **params: object) -> bool:
    """A policy for `jax.checkpoint`: keep what kernels return, or the backward pass would run them once more.

    Those of splash go by their name; the others are the only functions in a layer with a backward pass of their own.
    """
    return primitive.name == "custom_vjp_call" or params.get("name") == KEPT


def whole_sequences(
    config: ModelConfig, length: int, segment_ids: Int[Array, "B T"] | None, plan: AttentionPlan
) -> dict[LayerType, Attend]:
    """How each type of layer attends within rows of `length` tokens. Without `segment_ids` a row is one segment.

    Distances are counted in row indices, which within a segment equal differences of positions.
    """
    attends: dict[LayerType, Attend] = {}
    for layer_type in sorted(set(config.layer_types)):
        backend, window = plan.backend(layer_type), _window(config, layer_type, length)
        if backend == "xla":
            attends[layer_type] = partial(blocked, segment_ids, window)
        else:
            kernel = partial(_KERNELS[backend], window=window, interpret=plan.interpret)
            attends[layer_type] = partial(_on_each_device, kernel, segment_ids)
    return attends


def dense(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B K S H"],
    value: Float[Array, "B K S H"],
    scale: float,
    softcap: float | None,
    *,
    mask: Bool[Array, "#B T S"],
) -> Float[Array, "B T N H"]:
    """All scores at once, in float32, for XLA. Keys and values are never repeated for the query groups."""
    rows = grouped(query, key.shape[1]).astype(key.dtype)  # a cache may be in another
    scores = jnp.einsum("bkmh,bksh->bkms", rows, key, preferred_element_type=jnp.float32) * scale
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    by_head = scores.reshape(*scores.shape[:2], -1, query.shape[1], key.shape[2])
    weights = jax.nn.softmax(jnp.where(mask[:, None, None], by_head, MASKED), axis=-1).astype(value.dtype)
    weights = weights.reshape(scores.shape)
    mixed = jnp.einsum("bkms,bksh->bkmh", weights, value, preferred_element_type=query.dtype)
    return ungrouped(mixed, query.shape[2])


def _on_each_device(
    kernel: Callable[..., jax.Array],
    segment_ids: Int[Array, "B T"] | None,
    query: Float[Array, "B T N H"],
    key: Float[Array, "B K T H"],
    value: Float[Array, "B K T H"],
    scale: float,
    softcap: float | None,
) -> Float[Array, "B T N H"]:
    """The kernel on the rows and heads of every device: compilers divide no kernel by themselves."""
    mesh = traced_mesh()
    if mesh is None:
        return kernel(query, key, value, segment_ids, scale=scale, softcap=softcap)
    arrays = {"query": query, "key": key, "value": value}
    specs = {name: partition_spec(ACTIVATIONS[name], array.shape, mesh, name) for name, array in arrays.items()}
    heads, kv_heads, over = query.shape[2], key.shape[1], mesh_axes("heads", mesh)
    whole = bool(over) and specs["key"][1] is None  # key/value heads that do not divide over the devices

    def local(query: Array, key: Array, value: Array, segment_ids: Array | None) -> Array:
        if whole:
            mine = jax.lax.axis_index(over) * query.shape[2] + jnp.arange(query.shape[2])
            key, value = (array[:, mine // (heads // kv_heads)] for array in (key, value))
        return kernel(query, key, value, segment_ids, scale=scale, softcap=softcap)

    rows = PartitionSpec(mesh_axes("rows", mesh))
    # Pallas does not say over which axes its results differ.
    divided = jax.shard_map(
        local, mesh=mesh, in_specs=(*specs.values(), rows), out_specs=specs["query"], check_vma=False
    )
    return divided(query, key, value, segment_ids)


def _cudnn(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B K T H"],
    value: Float[Array, "B K T H"],
    segment_ids: None,
    *,
    scale: float,
    softcap: None,
    window: int | None,
    interpret: bool,
) -> Float[Array, "B T N H"]:
    """cuDNN's flash attention. Padding to the right needs no lengths: no position before it sees it."""
    return jax.nn.dot_product_attention(
        query,
        key.swapaxes(1, 2),
        value.swapaxes(1, 2),
        scale=scale,
        is_causal=True,
        local_window_size=None if window is None else (window - 1, 0),
        implementation="cudnn",
    )


def _pallas(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B K T H"],
    value: Float[Array, "B K T H"],
    segment_ids: Int[Array, "B T"] | None,
    *,
    scale: float,
    softcap: None,
    window: None,
    interpret: bool,
) -> Float[Array, "B T N H"]:
    """JAX's Pallas-Triton flash attention (arXiv 2307.08691), which has no query groups: keys are repeated for them."""
    from jax.experimental.pallas.ops.gpu.attention import BlockSizes, mha

    length, heads, head_dim = query.shape[1:]
    key, value = (jnp.repeat(array.swapaxes(1, 2), heads // array.shape[1], axis=2) for array in (key, value))
    # A block of queries and two stages of keys and values have to fit into the 99 KiB of shared memory of the smaller
    # GPUs; a length of 2^n · odd has blocks of at most 2^n.
    forward = min(128, 16384 // (head_dim * query.dtype.itemsize), length & -length)
    backward = min(32, forward)
    blocks = BlockSizes(forward, forward, backward, backward, backward, backward)
    return mha(query, key, value, segment_ids, sm_scale=scale, causal=True, block_sizes=blocks, interpret=interpret)


def _splash(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B K T H"],
    value: Float[Array, "B K T H"],
    segment_ids: Int[Array, "B T"] | None,
    *,
    scale: float,
    softcap: float | None,
    window: int | None,
    interpret: bool,
) -> Float[Array, "B T N H"]:
    """JAX's splash attention, which skips blocks that no window reaches; it does not scale scores, but queries can."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    length, heads = query.shape[1:3]
    shape = (length, length)
    mask = masks.CausalMask(shape) if window is None else masks.LocalMask(shape, (window - 1, 0), 0)
    block = next(size for size in (512, 256, _LANES) if length % size == 0)
    kernel = splash.make_splash_mha(
        masks.MultiHeadMask([mask] * heads),
        block_sizes=splash.BlockSizes(*(block,) * 8),
        head_shards=1,
        q_seq_shards=1,
        attn_logits_soft_cap=softcap,
        residual_checkpoint_name=KEPT,
        interpret=interpret,
    )
    segments = None if segment_ids is None else splash.SegmentIds(segment_ids, segment_ids)
    # In the queries' own dtype the scale would be rounded first, and all scores be wrong by the same factor.
    scaled = (query.astype(jnp.float32) * scale).astype(query.dtype)
    return jax.vmap(kernel)(scaled.swapaxes(1, 2), key, value, segments).swapaxes(1, 2)


_KERNELS: dict[Backend, Callable[..., jax.Array]] = {"cudnn": _cudnn, "pallas": _pallas, "splash": _splash}
