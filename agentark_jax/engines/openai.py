"""Generation by endpoints that speak OpenAI's API (vLLM, llama.cpp, Ollama, hosted ones): text in, text out.

The prompt goes to `/completions` as the text that its ids spell, special tokens included, so that the agent's own
prompt format holds; endpoints that offer chat alone cannot be used. The answer is text: its ids are that text encoded
once, were never sampled, and have no log-probabilities (`Completion.text_only`). What the API has no field for, such as
top_k, is as the server was started.

Many servers put a beginning-of-text token before every prompt, even one that has its own. Each server is asked for one
token at the start, and its count of the prompt shows it; prompts are then sent without theirs.
"""

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from agentark_jax.data.tokenizer import Tokenizer
from agentark_jax.engines.base import Request, check_request
from agentark_jax.engines.config import EngineConfig
from agentark_jax.engines.http import PROBE, Server, ServerFault, Servers, must_have
from agentark_jax.errors import AgentArkError, UsageError
from agentark_jax.records import Completion

TOKEN_VARIABLE = "AGENTARK_OPENAI_TOKEN"
_SEEDS = 2**31  # what every server takes for a seed

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Answer:
    """What a server answered, checked."""

    text: str
    finish: Literal["stop", "length"]
    prompt_tokens: int
    cached_tokens: int
    server: str


class OpenAIEngine:
    """Implements `Engine` on one or several endpoints that all serve one model, whose weights are theirs.

    Use it as an async context manager: entering checks the endpoints.

    Args:
        config: `servers` are base addresses as OpenAI's clients take them, such as http://host:8000/v1. The environment
            variable AGENTARK_OPENAI_TOKEN has their API key, if they have one.
        tokenizer: of the model; it spells prompts and encodes what was said.
        context: longest prompt plus completion, in tokens, where an endpoint does not tell its own.
        model: name of the model, recorded with every turn.
        served: what the endpoints call the model; None: the only one they list. It is recorded as the `weights`.
    """

    text_only = True

    def __init__(
        self, config: EngineConfig, tokenizer: Tokenizer, *, context: int, model: str, served: str | None = None
    ) -> None:
        self.model = model
        self._servers = Servers(config, self._admit, TOKEN_VARIABLE)
        self._tokenizer, self._context, self._served = tokenizer, context, served
        self._told: int | None = None  # the least context that a server told
        self._adds_bos: bool | None = None  # whether the servers do, once one has shown it

    @property
    def weights(self) -> str:
        return f"openai:{self._served}"

    async def __aenter__(self) -> "OpenAIEngine":
        """Raises UsageError for an endpoint that is absent, does not serve the model, or refuses the token."""
        await self._servers.__aenter__()
        return self

    async def __aexit__(self, *error: Any) -> None:
        await self._servers.__aexit__(*error)

    @property
    def retries(self) -> int:
        return self._servers.retries

    async def generate(self, request: Request) -> Completion:
        """Sample one completion; its ids are the text's, and one stop id where the model ended by itself.

        A text that takes more than max_tokens of this tokenizer is cut off there like any other.

        Raises AgentArkError when the request cannot be served (too long, a regex), when nothing was said, or when the
        servers went on failing.
        """
        sampling = request.sampling
        context = self._told or self._context
        limit = f"the endpoint's context of {context}: lower max_tokens, or serve the model with a larger context"
        check_request(request, vocabulary=self._tokenizer.vocabulary_size, context=context, limit=limit)
        if sampling.regex is not None:
            raise AgentArkError("OpenAI's API has no field for a regex: ask an SGLang server or the embedded engine.")
        ids = request.prompt_ids.tolist()
        if self._adds_bos and ids[0] == self._tokenizer.bos_id:
            ids = ids[1:]
        prompt = self._tokenizer.spell(ids)
        if self._controls(self._tokenizer.encode(prompt)) != self._controls(ids):
            raise AgentArkError(
                "a text in the prompt spells a control token, which an endpoint that takes text would obey: leave the "
                "question out, or ask an SGLang server or the embedded engine."
            )
        body = {
            "model": self._served,
            "prompt": prompt,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_tokens": sampling.max_tokens,
            "seed": sampling.seed % _SEEDS,
            "stop": [self._tokenizer.spell([token]) for token in sampling.stop_ids],
        }
        started = time.monotonic()
        answer = await self._servers.call("/completions", body, self._believed)
        said, finish = self._tokenizer.encode_text(answer.text), answer.finish
        if finish == "stop":
            said += sampling.stop_ids[:1]
        if len(said) > sampling.max_tokens:
            said, finish = said[: sampling.max_tokens], "length"
        if not said:
            raise AgentArkError(f"{answer.server} was cut off before it said anything: raise max_tokens.")
        return Completion(
            ids=np.asarray(said, np.int32),
            logprobs=None,
            text=answer.text.strip(),
            finish=finish,
            prompt_tokens=answer.prompt_tokens,
            cached_tokens=answer.cached_tokens,
            seconds=time.monotonic() - started,
            server=answer.server,
        )

    def _controls(self, ids: Sequence[int]) -> list[int]:
        return [token for token in ids if self._tokenizer.is_special(token)]

    async def score(self, ids: np.ndarray) -> np.ndarray:
        """Raises AgentArkError: an endpoint that tells text only has no log-probabilities."""
        raise AgentArkError(
            f"{self.model} is behind an OpenAI endpoint, which tells text and no log-probabilities: score with an "
            "SGLang server or the embedded engine."
        )

    def _believed(self, server: Server, answer: Mapping[str, Any], body: Mapping[str, Any]) -> _Answer:
        """Raises ServerFault for an answer that cannot be one to this request."""
        with must_have(server):
            (choice,), usage = answer["choices"], answer["usage"]
            text, finish = choice["text"], choice["finish_reason"]
            text.encode()  # half a surrogate pair is no text
            prompt, spoken = int(usage["prompt_tokens"]), int(usage["completion_tokens"])
            cached = int((usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0)
        if finish not in ("stop", "length"):
            raise ServerFault(f"{server.url}: ended the request by {finish}")
        if not 0 <= spoken <= body["max_tokens"]:
            raise ServerFault(f"{server.url}: counted {spoken} tokens of {body['max_tokens']}")
        if not 0 <= cached <= prompt:
            raise ServerFault(f"{server.url}: counted {cached} cached of {prompt} prompt tokens")
        return _Answer(text, finish, prompt, cached, server.url)

    async def _admit(self, server: Server) -> None:
        """Checks a server, and learns its limit and what it puts before a prompt.

        Raises UsageError for a server that will not do, ServerFault for one that fails meanwhile.
        """
        answer = await self._servers.get(server, "/models")
        with must_have(server):
            models = {str(entry["id"]): int(entry.get("max_model_len") or 0) for entry in answer["data"]}
        if self._served is None and len(models) == 1:
            (self._served,) = models
        if self._served not in models:
            raise UsageError(
                f"{server.url} serves {', '.join(sorted(models)) or 'nothing'}, "
                + (f"not {self._served}: name one of these" if self._served else "so name the one to ask")
            )
        if limit := models[self._served]:
            self._told = min(limit, self._told or limit)
        await self._probe(server)

    async def _probe(self, server: Server) -> None:
        """Learns from a call of one token whether the server adds a beginning-of-text token to prompts."""
        bos = [] if self._tokenizer.bos_id is None else [self._tokenizer.bos_id]
        ids = [*bos, *self._tokenizer.encode(PROBE)]
        body = {"model": self._served, "prompt": self._tokenizer.spell(ids), "max_tokens": 1}
        answer = await self._servers.post(server, "/completions", body)
        with must_have(server):
            counted = int(answer["usage"]["prompt_tokens"])
        adds_bos = bool(bos) and counted == len(ids) + 1
        if self._adds_bos not in (None, adds_bos):
            raise UsageError(f"{server.url} and another server differ in whether they add {bos} to prompts; give one")
        self._adds_bos = adds_bos
        if counted != len(ids) + adds_bos:
            logger.warning(
                "%s counts %d tokens in a text that has %d here: its tokenizer is another one, or it adds some to a "
                "prompt",
                *(server.url, counted, len(ids)),
            )
