"""The contract between whoever asks for text and whoever generates it."""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from agentark_jax.errors import AgentArkError
from agentark_jax.records import Completion, Sampling


@dataclass(frozen=True)
class Request:
    """One sample to draw.

    Attributes:
        prompt_ids: [T].
        sampling: how to draw it.
        shared: how many tokens at the beginning of the prompt other requests have in common with it. An engine that
            computes these by themselves, once for all, does so whoever else is there; what it yields may depend on this
            number as it does on the prompt, though no more than by rounding.
    """

    prompt_ids: np.ndarray
    sampling: Sampling
    shared: int = 0


class TooLong(AgentArkError):
    """A request whose prompt and completion do not fit the engine's context."""


class Engine(Protocol):
    """Generates completions; many requests are in flight at once and each is answered when it is done.

    An engine is an async context manager and serves while it is entered. `model` names the model's revision and
    `weights` the version of the weights in use; both are recorded with every turn. The tokens of a request depend on
    the request and the weights alone, not on what else is in flight, where the engine honours seeds (SGLang on CPU does
    not). With a regex, log-probabilities are those among the tokens that it allows. One that is `text_only` learns the
    text of a completion alone: it has no log-probabilities, and its ids are encoded from the text.
    """

    text_only: bool

    @property
    def model(self) -> str: ...

    @property
    def weights(self) -> str: ...

    async def generate(self, request: Request) -> Completion:
        """Sample one completion. Raises `AgentArkError` when the request cannot be served."""
        ...

    async def score(self, ids: np.ndarray) -> np.ndarray:
        """Log-probabilities [T - 1] of each token of `ids` [T] after those before it, at temperature 1."""
        ...


def check_ids(ids: np.ndarray, max_tokens: int, *, vocabulary: int, context: int, limit: str) -> None:
    """Raises AgentArkError for ids [T] that no engine can serve: none, outside the vocabulary, or too many.

    Together with `max_tokens` further ones they must fit in `context`, or it is TooLong; `limit` names that, and what
    to do about it.
    """
    if len(ids) == 0:
        raise AgentArkError("a request needs a prompt.")
    if len(ids) + max_tokens > context:
        raise TooLong(f"a prompt of {len(ids)} tokens and max_tokens {max_tokens} exceed {limit}.")
    if ids.min() < 0 or ids.max() >= vocabulary:
        raise AgentArkError(f"a prompt id lies outside the vocabulary of {vocabulary}.")


def check_request(request: Request, **limits: Any) -> None:
    """Raises AgentArkError for a request that no engine can serve; `limits` as in `check_ids`."""
    if request.sampling.max_tokens < 1:
        raise AgentArkError(f"a request needs max_tokens ≥ 1, not {request.sampling.max_tokens}.")
    if not 0 <= request.shared <= len(request.prompt_ids):
        raise AgentArkError(f"a request cannot share {request.shared} of its {len(request.prompt_ids)} prompt tokens.")
    check_ids(request.prompt_ids, request.sampling.max_tokens, **limits)
