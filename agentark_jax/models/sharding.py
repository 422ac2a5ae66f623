"""Where arrays live on a mesh: one table from logical axes to mesh axes, for parameters and for activations.

Math names what an array is (`activation`), never where it is. Without a mesh in the tracing context nothing happens;
`on_mesh` puts one there.
"""

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from agentark_jax.errors import AgentArkError, UsageError

AnyMesh = Mesh | AbstractMesh
Axes = tuple[str, ...]

# Rows of a batch go to different devices of `data` and `fsdp`, whose difference is what they do with parameters:
# `data` repeats them, `fsdp` divides them along their hidden axis and gathers each layer when it is needed.
MESH_AXES = ("data", "fsdp", "tensor")

RULES: Mapping[str, Axes] = {
    "rows": ("data", "fsdp"),
    "positions": (),
    "hidden": (),  # of activations, norms and biases: too small to be worth gathering
    "embed": ("fsdp",),  # the hidden axis of matrices
    "vocabulary": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head_size": (),
    "inner": ("tensor",),
    "rank": (),
    "layers": (),
    "micro_batches": (),
}

# A model may have fewer key/value heads than a mesh has tensor devices: then each device keeps all of them.
REPLICATED_IF_UNEVEN = frozenset({"kv_heads"})

# By the last name of a parameter's path. Stacked layers have an axis `layers` in front.
PARAMETERS: Mapping[str, Axes] = {
    "embedding": ("vocabulary", "embed"),
    "unembedding": ("vocabulary", "embed"),
    "query": ("heads", "head_size", "embed"),
    "key": ("kv_heads", "head_size", "embed"),
    "value": ("kv_heads", "head_size", "embed"),
    "output": ("embed", "heads", "head_size"),
    "query_bias": ("heads", "head_size"),
    "key_bias": ("kv_heads", "head_size"),
    "value_bias": ("kv_heads", "head_size"),
    "output_bias": ("hidden",),
    "gate": ("inner", "embed"),
    "up": ("inner", "embed"),
    "down": ("embed", "inner"),
    "gate_bias": ("inner",),
    "up_bias": ("inner",),
    "down_bias": ("hidden",),
    "a": ("rank", "hidden"),  # of an adapter
    "b": ("hidden", "rank"),
    "weight": ("hidden",),
    "bias": ("hidden",),  # of a head
}

ACTIVATIONS: Mapping[str, Axes] = {
    "residual": ("rows", "positions", "hidden"),
    "query": ("rows", "positions", "heads", "head_size"),
    "key": ("rows", "kv_heads", "positions", "head_size"),
    "value": ("rows", "kv_heads", "positions", "head_size"),
    "attention": ("rows", "positions", "hidden"),
    "inner": ("rows", "positions", "inner"),
    "mlp": ("rows", "positions", "hidden"),
}


def mesh_axes(axis: str, mesh: AnyMesh) -> Axes:
    """The mesh axes that really divide a logical axis: those with more than one device."""
    return tuple(mesh_axis for mesh_axis in RULES[axis] if mesh.shape[mesh_axis] > 1)


def partition_spec(axes: Axes, shape: tuple[int, ...], mesh: AnyMesh, name: str) -> PartitionSpec:
    """The mesh axes of each axis of an array called `name`.

    Raises UsageError for a size that does not divide over its mesh axes.
    """
    entries: list[Axes | None] = []
    for axis, size in zip(axes, shape, strict=True):
        over = mesh_axes(axis, mesh)
        parts = math.prod(mesh.shape[mesh_axis] for mesh_axis in over)
        if size % parts == 0:
            entries.append(over or None)
        elif axis in REPLICATED_IF_UNEVEN:
            entries.append(None)
        else:
            keys = " × ".join(f"mesh.{mesh_axis} ({mesh.shape[mesh_axis]})" for mesh_axis in over)
            raise UsageError(
                f"{keys}: {name} {list(shape)} has {size} {axis}, which do not divide over {parts} devices; "
                f"choose a divisor of {size}"
            )
    return PartitionSpec(*entries)


def parameter_sharding(path: str, shape: tuple[int, ...], mesh: AnyMesh) -> NamedSharding:
    """Where the parameter at a dotted path lives. Raises as `partition_spec`, AgentArkError for an unknown name."""
    axes = PARAMETERS.get(path.rsplit(".", 1)[-1])
    if axes is None or len(shape) - len(axes) not in (0, 1):
        raise AgentArkError(f"{path} {list(shape)}: no sharding is known; add its axes to PARAMETERS in {__name__}")
    stacked = ("layers",) * (len(shape) - len(axes))
    return NamedSharding(mesh, partition_spec(stacked + axes, shape, mesh, path))


def row_sharding(mesh: AnyMesh) -> NamedSharding:
    """Where the rows [rows, …] of a batch live."""
    return NamedSharding(mesh, PartitionSpec(mesh_axes("rows", mesh)))


def replicated(mesh: AnyMesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def on_mesh(mesh: Mesh) -> AbstractContextManager[object]:
    """While a function is traced within it, `activation` and `constrain` refer to this mesh."""
    return jax.sharding.use_abstract_mesh(mesh.abstract_mesh)


def traced_mesh() -> AbstractMesh | None:
    """The mesh of the enclosing `on_mesh`."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty else mesh


def traced_platform() -> str | None:
    """That of the devices of the enclosing `on_mesh`; None without one."""
    mesh = traced_mesh()
    return None if mesh is None or mesh.abstract_device is None else mesh.abstract_device.platform


def constrain(x: Array, axes: Axes, name: str) -> Array:
    """`x`, placed by its logical axes."""
    mesh = traced_mesh()
    return x if mesh is None else jax.lax.with_sharding_constraint(x, partition_spec(axes, x.shape, mesh, name))


def activation(x: Array, name: str) -> Array:
    """`x`, placed as `ACTIVATIONS` says and known by this name to the choice of what the backward pass recomputes."""
    return checkpoint_name(constrain(x, ACTIVATIONS[name], name), name)


def lookup(table: Float[Array, "V D"], ids: Int[Array, "*B"]) -> Float[Array, "*B D"]:
    """`table[ids]`. On a mesh, ids [rows, T] and results travel, never the table, nor a gradient of its size."""
    mesh = traced_mesh()
    hidden, vocabulary = (() if mesh is None else mesh_axes(axis, mesh) for axis in ("embed", "vocabulary"))
    if mesh is None or not hidden + vocabulary:
        return table[ids]

    def local(table: Array, ids: Array) -> Array:
        everyone = jax.lax.all_gather(ids, hidden, tiled=True) if hidden else ids
        if vocabulary:
            place = everyone - jax.lax.axis_index(vocabulary) * table.shape[0]
            here = (place >= 0) & (place < table.shape[0])
            found = jnp.where(here[..., None], table[jnp.where(here, place, 0)], 0)
            found = jax.lax.psum(found, vocabulary)
        else:
            found = table[everyone]
        return jax.lax.all_to_all(found, hidden, split_axis=0, concat_axis=2, tiled=True) if hidden else found

    rows = PartitionSpec(mesh_axes("rows", mesh))
    table_spec = partition_spec(PARAMETERS["embedding"], table.shape, mesh, "embedding")
    return jax.shard_map(local, mesh=mesh, in_specs=(table_spec, rows), out_specs=rows)(table, ids)
