"""Which devices do what: the mesh of a fit, and how parameters and batches get onto it."""

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jaxtyping import Array

from agentark_jax.errors import UsageError
from agentark_jax.models.attention import AttentionPlan, choose_attention
from agentark_jax.models.config import ModelConfig
from agentark_jax.models.sharding import (
    MESH_AXES,
    REPLICATED_IF_UNEVEN,
    RULES,
    AnyMesh,
    parameter_sharding,
    row_sharding,
)
from agentark_jax.training.config import FitConfig, MeshConfig

logger = logging.getLogger(__name__)


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of all devices of all processes, or of `devices`. Raises as `MeshConfig.sizes`."""
    chosen = jax.devices() if devices is None else list(devices)
    sizes = config.sizes(len(chosen))
    kinds = (AxisType.Auto,) * len(MESH_AXES)
    return jax.make_mesh(tuple(sizes.values()), MESH_AXES, axis_types=kinds, devices=chosen)


def check_mesh(mesh: AnyMesh, model: ModelConfig, params: Mapping[str, Any], rows: int, accumulation: int) -> None:
    """Refuses a mesh over which the flat `params` (arrays or shapes) or a micro-batch do not divide, with a UsageError.

    Key and value heads that do not divide over `tensor` are kept whole on each device, which is logged.
    """
    for path, leaf in params.items():
        parameter_sharding(path, leaf.shape, mesh)
    parts = math.prod(mesh.shape[axis] for axis in RULES["rows"])
    if (rows // accumulation) % parts:
        sizes = " × ".join(f"mesh.{axis} ({mesh.shape[axis]})" for axis in RULES["rows"])
        raise UsageError(
            f"rows: {rows} rows in {accumulation} micro-batches are {rows // accumulation} at a time, which do not "
            f"divide over the {parts} devices of {sizes}; set rows to a multiple of {accumulation * parts}"
        )
    tensor = math.prod(mesh.shape[axis] for name in REPLICATED_IF_UNEVEN for axis in RULES[name])
    if model.num_kv_heads % tensor:
        logger.info(
            "%d key/value heads do not divide over mesh.tensor (%d): each device keeps all of them",
            model.num_kv_heads,
            tensor,
        )


def fit_attention(config: FitConfig, model: ModelConfig, platform: str) -> tuple[AttentionPlan, str]:
    """What computes attention in a fit, whose rows are always packed, and why; see `choose_attention`."""
    return choose_attention(platform, model, packed=True, length=config.row_length, dtype=config.compute_dtype)


def param_shardings(mesh: AnyMesh, params: Mapping[str, Any]) -> dict[str, NamedSharding]:
    """Where each of the flat `params` (arrays or shapes) lives."""
    return {path: parameter_sharding(path, leaf.shape, mesh) for path, leaf in params.items()}


def place_params(mesh: Mesh, params: Mapping[str, Array], *, donate: bool) -> dict[str, Array]:
    """The flat `params` on the mesh. Each process must have the values that its devices need.

    What is there already is not copied. With `donate`, the given arrays are used up.
    """

    def put(leaf: Array, sharding: NamedSharding) -> Array:
        if isinstance(leaf, jax.Array) and leaf.sharding == sharding:
            return leaf
        if sharding.is_fully_addressable:
            return jax.device_put(leaf, sharding, donate=donate)
        host = np.asarray(leaf)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    return {path: put(params[path], sharding) for path, sharding in param_shardings(mesh, params).items()}


def local_rows(mesh: Mesh, rows: int) -> list[int]:
    """Which of the `rows` of a global batch this process's devices hold, in order: all that it has to read."""
    held = row_sharding(mesh).addressable_devices_indices_map((rows,)).values()
    return sorted({row for index in held if index is not None for row in range(*index[0].indices(rows))})


def place_batch(mesh: Mesh, batch: Mapping[str, Any], rows: int) -> Any:
    """The global batch of `rows` rows, from the `local_rows` of each process: arrays [rows, T] on the mesh."""
    sharding = row_sharding(mesh)
    return jax.tree.map(
        lambda array: jax.make_array_from_process_local_data(sharding, array, (rows, *array.shape[1:])), dict(batch)
    )
