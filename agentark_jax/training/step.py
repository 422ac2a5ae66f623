"""One optimizer step and one evaluation, each a single jitted function of fixed shapes."""

from collections.abc import Callable, Mapping
from functools import partial, wraps
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jax.stages import Wrapped
from jaxtyping import Array, Float

from agentark_jax.models.attention import XLA, AttentionPlan
from agentark_jax.models.config import ModelConfig
from agentark_jax.models.sharding import constrain, on_mesh, replicated, row_sharding
from agentark_jax.objectives.sft import sft_loss, term_totals
from agentark_jax.training.config import FitConfig
from agentark_jax.training.state import FlatParams, Shardings, TrainState, learning_rates, make_optimizer, merge

Metrics = dict[str, Float[Array, ""]]
Evaluation = Callable[[FlatParams, FlatParams, Mapping[str, Any]], tuple[Metrics, Metrics]]


def make_step(
    config: FitConfig,
    model: ModelConfig,
    coefficients: Mapping[str, float],
    steps: int,
    shardings: Shardings,
    attention: AttentionPlan = XLA,
) -> Wrapped:
    """(state, frozen, batch [rows, T]) → (state, metrics); the state is donated, compiled once for all batches.

    `shardings` (of `state_shardings`) say where the state is before and after a step, and which mesh to compute on.

    Metrics: those of `sft_loss` over the whole batch, `gradient_norm` (before clipping) and `learning_rate`. Gradients
    are taken of the trainable parameters only.
    """
    optimizer = make_optimizer(config, steps)
    rates = learning_rates(config, steps)
    mesh = shardings.step.mesh

    def loss(trainable: FlatParams, frozen: FlatParams, batch: Any, totals: Any) -> tuple[Array, Metrics]:
        settings: dict[str, Any] = {"remat": config.remat, "dtype": config.compute_dtype, "attention": attention}
        return sft_loss(model, merge(trainable, frozen), batch, totals, coefficients, **settings)

    def step(state: TrainState, frozen: FlatParams, batch: Mapping[str, Any]) -> tuple[TrainState, Metrics]:
        totals = term_totals(batch)
        gradient = partial(jax.grad(loss, has_aux=True), state.params, frozen, totals=totals)
        gradients, metrics = _summed(gradient, batch, config.accumulation)
        metrics["gradient_norm"] = optax.tree.norm(gradients)
        metrics["learning_rate"] = jnp.asarray(rates(state.step), jnp.float32)
        updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        return TrainState(state.step + 1, params, optimizer_state), metrics

    return jax.jit(
        _on(mesh, step),
        donate_argnums=0,
        in_shardings=(shardings, None, row_sharding(mesh)),
        out_shardings=(shardings, replicated(mesh)),
    )


def make_evaluation(
    config: FitConfig, model: ModelConfig, coefficients: Mapping[str, float], mesh: Mesh, attention: AttentionPlan = XLA
) -> Evaluation:
    """(trainable, frozen, batch) → (Σ weight·nll per term, Σ weight per term), to be summed over batches."""

    def evaluate(trainable: FlatParams, frozen: FlatParams, batch: Mapping[str, Any]) -> tuple[Metrics, Metrics]:
        def summed_nll(micro: Mapping[str, Any]) -> Metrics:
            ones = {term: jnp.ones(()) for term in coefficients}
            settings: dict[str, Any] = {"dtype": config.compute_dtype, "attention": attention}
            _, metrics = sft_loss(model, merge(trainable, frozen), micro, ones, coefficients, **settings)
            return {term: metrics[f"nll/{term}"] for term in coefficients}

        return _summed(summed_nll, batch, config.accumulation), term_totals(batch)

    return jax.jit(_on(mesh, evaluate), in_shardings=(None, None, row_sharding(mesh)), out_shardings=replicated(mesh))


def _on(mesh: Mesh, function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def traced(*arguments: Any) -> Any:
        with on_mesh(mesh):
            return function(*arguments)

    return traced


def _summed(function: Callable[[Any], Any], batch: Mapping[str, Any], parts: int) -> Any:
    """Σ function(micro-batch) over `parts` equal slices of the rows, one after the other."""
    if parts == 1:
        return function(batch)

    def slices(array: Array) -> Array:  # every micro-batch has rows on every device, like the batch
        sliced = array.reshape(parts, -1, *array.shape[1:])
        return constrain(sliced, ("micro_batches", "rows") + ("positions",) * (array.ndim - 1), "micro-batches")

    sliced = jax.tree.map(slices, batch)
    shapes = jax.eval_shape(function, jax.tree.map(lambda array: array[0], sliced))
    zeros = jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes)

    def add(total: Any, micro: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, function(micro)), None

    return jax.lax.scan(add, zeros, sliced)[0]
