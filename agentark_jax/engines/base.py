"""The contract between whoever asks for text and whoever generates it."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from agentark_jax.records import Completion, Sampling


@dataclass(frozen=True)
class Request:
    """One sample to draw: prompt ids [T] and how to draw it."""

    prompt_ids: np.ndarray
    sampling: Sampling


class Engine(Protocol):
    """Generates completions; many requests are in flight at once and each is answered when it is done.

    An engine is an async context manager and serves while it is entered. `model` names the model's revision and
    `weights` the version of the weights in use; both are recorded with every turn. The tokens of a request depend on
    the request and the weights alone, not on what else is in flight, where the engine honours seeds (SGLang on CPU does
    not). With a regex, log-probabilities are those among the tokens that it allows.
    """

    model: str
    weights: str

    async def generate(self, request: Request) -> Completion:
        """Sample one completion. Raises `AgentArkError` when the request cannot be served."""
        ...

    async def score(self, ids: np.ndarray) -> np.ndarray:
        """Log-probabilities [T - 1] of each token of `ids` [T] after those before it, at temperature 1."""
        ...
