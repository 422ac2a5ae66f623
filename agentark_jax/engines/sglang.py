"""Generation by SGLang servers over HTTP: token ids in, token ids and their log-probabilities out.

What a server answers is checked before it is believed, and what would kill one (an id outside the vocabulary, weights
of another shape) is refused before it is sent. A server that kept failing gets no calls until it is healthy again *and*
has the right weights, for a restart brings back the old ones.

Written against SGLang 0.5.23 and sglang-router 0.3.2; log-probabilities of sampled tokens are at the sampling
temperature, before top_p.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from agentark_jax.data.tokenizer import Tokenizer
from agentark_jax.engines.base import Request, check_ids, check_request
from agentark_jax.engines.config import EngineConfig
from agentark_jax.engines.http import PROBE, Server, ServerFault, Servers, must_have
from agentark_jax.errors import AgentArkError, UsageError
from agentark_jax.models.config import ModelConfig, load_config
from agentark_jax.models.weights import check_files
from agentark_jax.records import Completion

TOKEN_VARIABLE = "AGENTARK_SGLANG_TOKEN"

_LEAST = float(np.finfo(np.float32).min)  # of log-probabilities, which are kept in float32
_SCORING: Mapping[str, Any] = {"max_new_tokens": 0, "temperature": 0}


@dataclass(frozen=True)
class _Answer:
    """What a server answered, checked. `prompt_logprobs`, where they were asked for, begin with None."""

    ids: list[int]
    logprobs: list[float]
    finish: Literal["stop", "length"]
    prompt_tokens: int
    cached_tokens: int
    prompt_logprobs: list[Any]
    server: str


class SGLangEngine:
    """Implements `Engine` on one or several servers (or routers) that all have the weights of one model directory.

    Use it as an async context manager: entering checks the servers and gives them the weights.

    Args:
        directory: the model whose weights the servers shall have, on a path that they see as well.
        model: revision of the model, recorded with every turn.
        weights: version of the weights, known to the servers by this name. With the dtype that they compute in, where
            that is not float32, it is recorded with every turn.
        tokenizer: of the model; texts are decoded with it, and the servers' own must agree with it.
    """

    text_only = False

    def __init__(
        self, config: EngineConfig, directory: Path, tokenizer: Tokenizer, *, model: str, weights: str
    ) -> None:
        self.model, self.weights, self._version = model, weights, weights
        self._servers = Servers(config, self._admit, TOKEN_VARIABLE)
        self._directory, self._tokenizer = directory, tokenizer
        self._model_config: ModelConfig = load_config(directory)
        self._context = self._model_config.max_positions
        self._dtype: str | None = None  # that the servers compute in, once one has told

    async def __aenter__(self) -> "SGLangEngine":
        """Raises UsageError for a server that is absent, has another model or tokenizer, or refuses the token."""
        check_files(self._directory, self._model_config)
        await self._servers.__aenter__()
        return self

    async def __aexit__(self, *error: Any) -> None:
        await self._servers.__aexit__(*error)

    @property
    def retries(self) -> int:
        return self._servers.retries

    async def generate(self, request: Request) -> Completion:
        """Sample one completion.

        Raises AgentArkError when the request cannot be served (too long, an id outside the vocabulary), or when the
        servers went on failing.
        """
        check_request(request, **self._limits())
        sampling = request.sampling
        settings = {
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_new_tokens": sampling.max_tokens,
            "stop_token_ids": list(sampling.stop_ids),
            "sampling_seed": sampling.seed % 2**63,
            "skip_special_tokens": False,
        }
        if sampling.regex is not None:
            settings["regex"] = sampling.regex
        started = time.monotonic()
        answer = await self._call(request.prompt_ids, settings)
        return Completion(
            ids=np.asarray(answer.ids, np.int32),
            logprobs=np.asarray(answer.logprobs, np.float32),
            text=self._tokenizer.decode(answer.ids).strip(),
            finish=answer.finish,
            prompt_tokens=answer.prompt_tokens,
            cached_tokens=answer.cached_tokens,
            seconds=time.monotonic() - started,
            server=answer.server,
        )

    async def score(self, ids: np.ndarray) -> np.ndarray:
        """Log-probabilities [T - 1] of each token of `ids` [T] after those before it, at temperature 1.

        Raises as `generate`.
        """
        check_ids(ids, 0, **self._limits())
        answer = await self._call(ids, _SCORING, logprob_start_len=0)
        return np.asarray(answer.prompt_logprobs[1:], np.float32)

    # Weights that change

    async def update_weights(self, directory: Path, version: str) -> None:
        """Gives all servers the weights of another directory with a model of the same shape; no call may be in flight.

        What was answered with other weights is not believed from here on, and a server that restarts gets these.

        Raises UsageError for a model of another shape and for damaged files, before any server is asked; AgentArkError
        naming the servers that did not load it.
        """
        config = load_config(directory)
        if config != self._model_config:
            raise UsageError(f"{directory}: a model of another shape than {self._directory}; start servers for it")
        check_files(directory, config)
        self._directory, self._version = directory, version
        try:
            await self._servers.admit_again()
        except AgentArkError as error:
            raise AgentArkError(f"{error}; {self._remedy()}") from error

    async def verify_weights(
        self, probes: Sequence[np.ndarray], expected: Sequence[np.ndarray], tolerance: float
    ) -> dict[str, float]:
        """Makes sure that every server computes with these weights, and not only says so.

        Each server is asked for the version of its weights and for the log-probs of the probes: of the last token alone
        first, for which it takes from its cache what it has of the others, and then of all. So a server that kept the
        cache of older weights is found as well, if these probes were asked of those, and are longer than its pages. Of
        a router only the server behind it that it chooses is asked.

        Args:
            probes: a few sequences of ids [T], always the same.
            expected: the trainer's log-probs [T - 1] of each token after those before it, at temperature 1.
            tolerance: the largest difference allowed, in nats.

        Returns:
            The largest difference of each server, by address.

        Raises:
            AgentArkError: servers that do not answer, that have another version, or that compute other log-probs; all
                are named.
        """
        for ids, logprobs in zip(probes, expected, strict=True):
            check_ids(ids, 0, **self._limits())
            if len(ids) < 2 or logprobs.shape != (len(ids) - 1,):
                raise ValueError(f"a probe of {len(ids)} tokens has expected log-probs of shape {logprobs.shape}")

        async def difference(server: Server) -> float:
            largest = 0.0
            for ids, logprobs in zip(probes, expected, strict=True):
                for start in (len(ids) - 2, 0):
                    body = _body(ids, _SCORING, logprob_start_len=start)
                    answer = self._believed(server, await self._servers.post(server, "/generate", body), body)
                    found = np.asarray(answer.prompt_logprobs[1:]) - logprobs[start:]
                    largest = max(largest, float(np.max(np.abs(found))))
            return largest

        try:
            found = await self._servers.each(difference)
        except AgentArkError as error:
            raise AgentArkError(f"{error}; {self._remedy()}") from error
        wrong = [url for url, largest in found.items() if not largest <= tolerance]
        if wrong:
            differ = ", ".join(f"{url} by up to {found[url]:.3g} nats" for url in wrong)
            raise AgentArkError(
                f"these servers say that they have weights {self._version}, but their log-probs differ from the "
                f"trainer's: {differ} (allowed: {tolerance:g}), as if they had other weights, a part of them or a "
                f"cache from before; {self._remedy()}"
            )
        return found

    def _remedy(self) -> str:
        return (
            f"restart it with --model-path {self._directory}, or take it out of engine.servers, and run the same "
            "command again"
        )

    def _limits(self) -> dict[str, Any]:
        """What `check_ids` compares with."""
        limit = (
            f"the servers' context of {self._context}: lower max_tokens, or start the servers with a larger "
            "--context-length"
        )
        return {"vocabulary": self._model_config.vocab_size, "context": self._context, "limit": limit}

    # A call

    async def _call(self, ids: np.ndarray, settings: Mapping[str, Any], **options: Any) -> _Answer:
        """The checked answer of some server."""
        return await self._servers.call("/generate", _body(ids, settings, **options), self._believed)

    def _believed(self, server: Server, answer: Mapping[str, Any], body: Mapping[str, Any]) -> _Answer:
        """Raises ServerFault for an answer that cannot be one to this request, by these weights."""
        with must_have(server):
            meta, ids = answer["meta_info"], list(answer["output_ids"])
            finish, version = meta["finish_reason"]["type"], meta["weight_version"]
            logprobs, sampled = _split(meta["output_token_logprobs"])
            scores, scored = _split(meta.get("input_token_logprobs") or [])
            prompt, cached = int(meta["prompt_tokens"]), int(meta["cached_tokens"])
        wanted = body["sampling_params"]["max_new_tokens"]
        if finish not in ("stop", "length"):
            raise ServerFault(f"{server.url}: ended the request by {finish} ({meta['finish_reason'].get('message')})")
        if version != self._version:
            raise ServerFault(f"{server.url}: answered with weights {version}, not {self._version}")
        if sampled != ids or len(ids) > wanted or (wanted and not ids) or not all(isinstance(i, int) for i in ids):
            raise ServerFault(f"{server.url}: {len(ids)} ids and {len(sampled)} log-probabilities of {wanted} tokens")
        if ids and not 0 <= min(ids) <= max(ids) < self._model_config.vocab_size:
            raise ServerFault(f"{server.url}: sampled an id outside the vocabulary")
        if "logprob_start_len" in body and scored != body["input_ids"][body["logprob_start_len"] :]:
            raise ServerFault(f"{server.url}: scored other tokens than it was sent")
        for value in (*logprobs, *scores[1:]):
            if not isinstance(value, int | float) or not _LEAST <= value <= 1e-3:
                raise ServerFault(f"{server.url}: a log-probability is {value!r}")
        if prompt != len(body["input_ids"]) or not 0 <= cached <= prompt:
            raise ServerFault(f"{server.url}: counted {prompt} prompt tokens of {len(body['input_ids'])}")
        return _Answer(ids, logprobs, finish, prompt, cached, scores, server.url)

    async def _admit(self, address: Server) -> None:
        """Checks a server, or those behind a router, and brings their weights up to date.

        Raises UsageError for a server that will not do, ServerFault for one that fails meanwhile.
        """
        info = await self._servers.get(address, "/model_info", missing={})
        for server, told in [(address, info)] if info else await self._behind(address):
            await self._check_model(server, told)
            if told.get("weight_version") != self._version:
                path, version = str(self._directory.resolve()), self._version
                body = {"model_path": path, "weight_version": version, "flush_cache": True}
                answer = await self._servers.post(server, "/update_weights_from_disk", body)
                if not answer.get("success"):
                    raise UsageError(f"{server.url}: cannot load {self._directory}: {answer.get('message')}")

    async def _behind(self, router: Server) -> list[tuple[Server, dict[str, Any]]]:
        """The healthy servers of a router, which forwards calls but no weights, and what they say of their models."""
        answer = await self._servers.get(router, "/workers")
        with must_have(router):
            healthy = [Server(str(worker["url"]).rstrip("/")) for worker in answer["workers"] if worker["is_healthy"]]
        if not healthy:
            raise ServerFault(f"{router.url}: none of the servers behind this router is healthy")
        return [(server, await self._servers.get(server, "/model_info")) for server in healthy]

    async def _check_model(self, server: Server, info: Mapping[str, Any]) -> None:
        served = str(info.get("model_path"))
        if Path(served, "config.json").is_file():  # weights of another shape would kill the server
            theirs = load_config(Path(served))
            if theirs != self._model_config:
                raise UsageError(
                    f"{server.url} serves {served}, which has another shape than {self._directory}; start it with "
                    f"--model-path {self._directory}"
                )
        details = await self._servers.get(server, "/server_info")
        dtype = str(details.get("dtype", "auto"))
        if dtype != (self._dtype or dtype):
            raise UsageError(f"{server.url} computes in {dtype}, another server in {self._dtype}; give all one --dtype")
        self._dtype = dtype
        self.weights = self._version if dtype == "float32" else f"{self._version}+{dtype}"
        with must_have(server):
            limits = [details.get("context_length"), details.get("max_total_num_tokens")]
            self._context = min([self._context, *(int(limit) for limit in limits if limit)])
        answer = await self._servers.post(server, "/tokenize", {"model": served, "prompt": PROBE})
        ours = list(self._tokenizer.encode(PROBE))
        with must_have(server):
            theirs_ids = list(answer["tokens"])
        if theirs_ids[len(theirs_ids) - len(ours) :] != ours:  # theirs may begin with a special token
            raise UsageError(f"{server.url} has another tokenizer than {self._directory}; start it with this model's")


def _body(ids: np.ndarray, settings: Mapping[str, Any], **options: Any) -> dict[str, Any]:
    return {"input_ids": ids.tolist(), "return_logprob": True, "sampling_params": settings, **options}


def _split(entries: Sequence[Sequence[Any]]) -> tuple[list[Any], list[Any]]:
    """SGLang's (log-probability, id, text) triples as log-probabilities and ids."""
    return [entry[0] for entry in entries], [entry[1] for entry in entries]
