"""What a fit changes: trainable parameters and optimizer. Frozen parameters stand beside it.

Parameters are flat dicts {dotted path: array} here; a frozen path has no optimizer state, no gradient, no checkpoint.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Int

from agentark_jax.errors import UsageError
from agentark_jax.models.sharding import AnyMesh, replicated
from agentark_jax.training.config import FitConfig
from agentark_jax.training.mesh import param_shardings, place_params

FlatParams = dict[str, Array]
Shardings = Any  # a TrainState with a NamedSharding at every leaf


class TrainState(NamedTuple):
    """`step` is the number of optimizer steps done, which is also the position in the data."""

    step: Int[Array, ""]
    params: FlatParams
    optimizer: Any


def partition(
    params: Mapping[str, Any], freeze: Sequence[str], key: str = "freeze", last_layers: int | None = None
) -> tuple[FlatParams, FlatParams]:
    """(trainable, frozen): paths that are, or lie below, one of the dotted prefixes `freeze` are frozen.

    With `last_layers` all but so many layers are frozen. Layers are stacked, so a path can then be in both: the first
    of its layers are frozen, the others trainable.

    Raises UsageError for a prefix that matches nothing and when nothing is left to train.
    """
    flat = flatten_dict(params, sep=".")

    def below(path: str, prefix: str) -> bool:
        return path == prefix or path.startswith(prefix + ".")

    for prefix in freeze:
        if not any(below(path, prefix) for path in flat):
            raise UsageError(f"{key}: no parameter is called {prefix!r}; choose among {', '.join(sorted(params))}")
    frozen = {path: leaf for path, leaf in flat.items() if any(below(path, prefix) for prefix in freeze)}
    trainable = {path: leaf for path, leaf in flat.items() if path not in frozen}
    if last_layers is not None:
        cut = {path: _layers_before(path, leaf, params, last_layers) for path, leaf in trainable.items()}
        frozen |= {path: _layers(trainable[path], 0, before) for path, before in cut.items() if before != 0}
        trainable = {
            path: _layers(trainable[path], before, None)
            for path, before in cut.items()
            if before is not None and before < trainable[path].shape[0]
        }
    if not trainable:
        raise UsageError(f"{key}: {list(freeze)} leaves no parameter to train; freeze less")
    return trainable, frozen


def _layers_before(path: str, leaf: Any, params: Mapping[str, Any], last: int) -> int | None:
    """How many of the layers of a (stacked) parameter come before the `last` of the model; None: it is no layer's."""
    top, *below = path.split(".")
    if top not in ("scanned", "rest"):
        return None
    rest, period = len(params.get("rest", {})), len(params["scanned"])
    if top == "rest":
        return None if int(below[0]) < rest - last else 0
    repeats = leaf.shape[0]
    first = period * repeats + rest - last  # the first of the last layers
    return min(repeats, max(0, -(-(first - int(below[0])) // period)))


def _layers(leaf: Any, start: int, stop: int | None) -> Any:
    """Some of the stacked layers of an array or a shape; all of it where there is nothing to cut."""
    if stop is None and start == 0:
        return leaf
    if isinstance(leaf, jax.ShapeDtypeStruct):
        kept = len(range(*slice(start, stop).indices(leaf.shape[0])))
        return jax.ShapeDtypeStruct((kept, *leaf.shape[1:]), leaf.dtype)
    return leaf[start:stop]


def merge(trainable: FlatParams, frozen: FlatParams) -> dict[str, Any]:
    """The nested tree that `partition` split."""
    whole = {path: jnp.concatenate([frozen[path], leaf]) for path, leaf in trainable.items() if path in frozen}
    return unflatten_dict({**frozen, **trainable, **whole}, sep=".")


def is_decayed(path: str) -> bool:
    """Whether weight decay applies: not to norms and biases, told by name since layers are stacked."""
    return not any("norm" in name or name.endswith("bias") for name in path.split("."))


def learning_rates(config: FitConfig, steps: int) -> optax.Schedule:
    """Learning rate of update 0 … `steps`-1: a linear warmup, then the configured schedule."""
    warmup = round(config.warmup_fraction * steps)
    rest = max(1, steps - warmup)
    peak = config.learning_rate
    after = {
        "constant": optax.constant_schedule(peak),
        "linear": optax.linear_schedule(peak, 0.0, rest),
        "cosine": optax.cosine_decay_schedule(peak, rest),
    }[config.schedule]
    if warmup == 0:
        return after
    # The first update already moves: a warmup of w updates has the rates peak·1/w … peak.
    rising = optax.linear_schedule(peak / warmup, peak, max(1, warmup - 1))
    return optax.join_schedules([rising, after], [warmup])


def make_optimizer(config: FitConfig, steps: int) -> optax.GradientTransformation:
    """Global-norm clipping, then AdamW (Loshchilov & Hutter 2019) under the schedule of `steps` updates."""

    def decayed(params: FlatParams) -> dict[str, bool]:
        return {path: is_decayed(path) for path in params}

    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(learning_rates(config, steps), weight_decay=config.weight_decay, mask=decayed),
    )


def state_shardings(mesh: AnyMesh, optimizer: optax.GradientTransformation, trainable: Mapping[str, Any]) -> Shardings:
    """Where the state of the flat `trainable` (arrays or shapes) lives: what belongs to a parameter, where that is."""
    by_path = param_shardings(mesh, trainable)
    everywhere = replicated(mesh)

    def of_leaf(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        return by_path.get(str(getattr(path[-1], "key", "")), everywhere) if leaf.ndim else everywhere

    shapes = jax.eval_shape(optimizer.init, dict(trainable))
    placed: tuple[Any, Any, Any] = (everywhere, by_path, jax.tree_util.tree_map_with_path(of_leaf, shapes))
    return TrainState(*placed)


def abstract_state(
    trainable: Mapping[str, Any], optimizer: optax.GradientTransformation, shardings: Shardings
) -> TrainState:
    """Shapes, dtypes and placement of the state of the flat `trainable` (arrays or shapes), without its memory."""
    shapes = jax.eval_shape(
        lambda params: TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params)), dict(trainable)
    )
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes, shardings
    )


def initial_state(mesh: Mesh, optimizer: optax.GradientTransformation, trainable: FlatParams) -> TrainState:
    """Step 0 on the mesh. The given arrays are used up: they, or what was moved to other devices, are the parameters
    that the first step (it donates its state) overwrites.
    """
    shardings = state_shardings(mesh, optimizer, trainable)

    def zero(params: FlatParams) -> tuple[Array, Any]:
        return jnp.zeros((), jnp.int32), optimizer.init(params)

    params = place_params(mesh, trainable, donate=True)
    step, optimizer_state = jax.jit(zero, out_shardings=(shardings.step, shardings.optimizer))(params)
    return TrainState(step, params, optimizer_state)
