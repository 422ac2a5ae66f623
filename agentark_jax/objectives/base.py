"""What an optimizer step minimises: the contract between objectives and the step that trains on them."""

from collections.abc import Mapping
from typing import Any, Protocol

import jax.numpy as jnp
from jaxtyping import Array, Float

from agentark_jax.models.config import ModelConfig

Metrics = dict[str, Float[Array, ""]]


class Objective(Protocol):
    """A pure loss of parameters and a batch, as a sum of terms of which each is divided by a total.

    The totals of a step are summed over its micro-batches first, so that the losses, gradients and metrics of
    micro-batches add up to those of one big batch; of metrics named `…/max` the largest is meant (`combined`).
    """

    @property
    def coefficients(self) -> Mapping[Any, float]:
        """The factor of each term."""
        ...

    def totals(self, batch: Mapping[str, Any]) -> dict[Any, Float[Array, ""]]:
        """The denominator of each term."""
        ...

    def loss(
        self, config: ModelConfig, params: Any, batch: Mapping[str, Any], totals: Mapping[Any, Any], **settings: Any
    ) -> tuple[Float[Array, ""], Metrics]:
        """The loss and its metrics, among them `loss`, `tokens` and `loss_tokens`.

        `params` is the model's tree and beside it whatever the objective trains besides, by names of its own.
        `settings` are `remat`, `dtype` and `attention` of `models.transformer.hidden_states`.
        """
        ...

    def sums(self, metrics: Mapping[str, Any]) -> dict[str, Any]:
        """Of metrics for which every total was 1: the sum of each term, before its coefficient."""
        ...


def combined(first: Metrics, second: Metrics) -> Metrics:
    """The metrics of two micro-batches of a step as those of one."""
    return {
        name: jnp.maximum(value, second[name]) if name.endswith("/max") else value + second[name]
        for name, value in first.items()
    }
