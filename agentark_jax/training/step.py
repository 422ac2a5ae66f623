"""One optimizer step and one evaluation, each a single jitted function of fixed shapes."""

from collections.abc import Callable, Mapping
from functools import partial, wraps
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jax.stages import Wrapped
from jaxtyping import Array

from agentark_jax.models.attention import XLA, AttentionPlan
from agentark_jax.models.config import ModelConfig
from agentark_jax.models.sharding import constrain, on_mesh, replicated, row_sharding
from agentark_jax.objectives.base import Metrics, Objective, combined
from agentark_jax.training.config import FitConfig
from agentark_jax.training.state import FlatParams, Shardings, TrainState, learning_rates, make_optimizer, merge

Evaluation = Callable[[FlatParams, FlatParams, Mapping[str, Any]], tuple[Metrics, Metrics]]


def make_step(
    config: FitConfig,
    model: ModelConfig,
    objective: Objective,
    steps: int,
    shardings: Shardings,
    attention: AttentionPlan = XLA,
) -> Wrapped:
    """(state, frozen, batch [rows, T]) → (state, metrics); the state is donated, compiled once for all batches.

    `shardings` (of `state_shardings`) say where the state is before and after a step, and which mesh to compute on.

    Metrics: those of the objective over the whole batch, `gradient_norm` (before clipping) and `learning_rate`.
    Gradients are taken of the trainable parameters only.
    """
    optimizer = make_optimizer(config, steps)
    rates = learning_rates(config, steps)
    mesh = shardings.step.mesh

    def loss(trainable: FlatParams, frozen: FlatParams, batch: Any, totals: Any) -> tuple[Array, Metrics]:
        settings: dict[str, Any] = {"remat": config.remat, "dtype": config.compute_dtype, "attention": attention}
        return objective.loss(model, merge(trainable, frozen), batch, totals, **settings)

    def step(state: TrainState, frozen: FlatParams, batch: Mapping[str, Any]) -> tuple[TrainState, Metrics]:
        gradient = partial(jax.grad(loss, has_aux=True), state.params, frozen, totals=objective.totals(batch))
        gradients, metrics = _summed(gradient, batch, config.accumulation)
        metrics["gradient_norm"] = optax.tree.norm(gradients)
        metrics["learning_rate"] = jnp.asarray(rates(state.step), jnp.float32)
        updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        return TrainState(state.step + 1, params, optimizer_state), metrics

    # XLA's default order on CPU starts whatever can be started: it recomputes all layers at once and keeps the results.
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    return jax.jit(
        _on(mesh, step),
        donate_argnums=0,
        in_shardings=(shardings, None, row_sharding(mesh)),
        out_shardings=(shardings, replicated(mesh)),
        compiler_options={"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"} if on_cpu else None,
    )


def make_evaluation(
    config: FitConfig, model: ModelConfig, objective: Objective, mesh: Mesh, attention: AttentionPlan = XLA
) -> Evaluation:
    """(trainable, frozen, batch) → (the sum of each term, its total), to be summed over batches."""

    def evaluate(trainable: FlatParams, frozen: FlatParams, batch: Mapping[str, Any]) -> tuple[Metrics, Metrics]:
        totals = objective.totals(batch)
        ones = jax.tree.map(jnp.ones_like, totals)

        def sums(micro: Mapping[str, Any]) -> tuple[Metrics, Metrics]:
            settings: dict[str, Any] = {"dtype": config.compute_dtype, "attention": attention}
            _, metrics = objective.loss(model, merge(trainable, frozen), micro, ones, **settings)
            return {}, objective.sums(metrics)

        return _summed(sums, batch, config.accumulation)[1], totals

    return jax.jit(_on(mesh, evaluate), in_shardings=(None, None, row_sharding(mesh)), out_shardings=replicated(mesh))


def _on(mesh: Mesh, function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def traced(*arguments: Any) -> Any:
        with on_mesh(mesh):
            return function(*arguments)

    return traced


def _summed(function: Callable[[Any], tuple[Any, Metrics]], batch: Mapping[str, Any], parts: int) -> Any:
    """Σ function(micro-batch) over `parts` equal slices of the rows, one after the other: a tree, and metrics."""
    if parts == 1:
        return function(batch)

    def slices(array: Array) -> Array:  # every micro-batch has rows on every device, like the batch
        sliced = array.reshape(parts, -1, *array.shape[1:])
        return constrain(sliced, ("micro_batches", "rows") + ("positions",) * (array.ndim - 1), "micro-batches")

    sliced = jax.tree.map(slices, batch)
    shapes = jax.eval_shape(function, jax.tree.map(lambda array: array[0], sliced))
    zeros = jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes)

    def add(total: Any, micro: Any) -> tuple[Any, None]:
        (tree, metrics), (more, its_metrics) = total, function(micro)
        return (jax.tree.map(jnp.add, tree, more), combined(metrics, its_metrics)), None

    return jax.lax.scan(add, zeros, sliced)[0]
