"""What the SGLang engine believes and whom it asks, shown on servers that only answer as SGLang does."""

import asyncio
import math
from contextlib import AsyncExitStack

import numpy as np
import pytest
import real_server
from aiohttp import web
from real_server import requests

from agentark_jax.data.tokenizer import Tokenizer
from agentark_jax.engines import http
from agentark_jax.engines.config import EngineConfig
from agentark_jax.engines.sglang import SGLangEngine
from agentark_jax.errors import AgentArkError, UsageError
from benchmarks.loopback import Loopback, listening


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(http, "_PAUSE", 0.001)


def use(model, do, *faults, **settings):
    """What `do(engine)` returns with a server for each of `faults` (as of `real_server.faulty`)."""

    async def run():
        async with AsyncExitStack() as stack:
            urls = []
            for these in faults:
                upstream = await stack.enter_async_context(listening(Loopback(model)))
                urls.append(await stack.enter_async_context(real_server.faulty(upstream, these)))
            config = EngineConfig(servers=urls, timeout=10.0, **settings)
            engine = SGLangEngine(config, model, Tokenizer(model), model="tiny", weights="v0")
            return await do(await stack.enter_async_context(engine))

    return asyncio.run(run())


def ask(engine):
    return engine.generate(requests(1)[0])


def on(route, fault):
    """That fault for every call of a route."""
    return lambda path, number: fault if path == route else None


def changed(*keys, to):
    """What becomes of an answer in which `to(old value)` stands at the place that the keys lead to."""

    def fault(answer):
        place = answer
        for key in keys[:-1]:
            place = place[key]
        place[keys[-1]] = to(place[keys[-1]])
        return answer

    return fault


def first_id(value):
    """Another first id, in both places that have it."""
    put = changed("output_ids", 0, to=lambda old: value)
    return lambda answer: changed("meta_info", "output_token_logprobs", 0, 1, to=lambda old: value)(put(answer))


def first_logprob(value):
    return changed("meta_info", "output_token_logprobs", 0, 0, to=lambda old: value)


def twice(answer):
    answer["output_ids"] *= 2
    answer["meta_info"]["output_token_logprobs"] *= 2
    return answer


LIES = {
    "an id beyond the vocabulary": (first_id(100_000), "outside the vocabulary"),
    "an id below it": (first_id(-1), "outside the vocabulary"),
    "no id": (first_id("5"), "ids and"),
    "one id less": (changed("output_ids", to=lambda ids: ids[:-1]), "15 ids and 16 log-probabilities"),
    "another id": (changed("output_ids", 0, to=lambda old: old + 1), "16 ids and 16 log-probabilities"),
    "more ids than wanted": (twice, "32 ids and 32 log-probabilities of 16"),
    "NaN": (first_logprob(math.nan), "a log-probability is nan"),
    "minus infinity": (first_logprob(-math.inf), "a log-probability is -inf"),
    "a probability above one": (first_logprob(0.5), "a log-probability is 0.5"),
    "no log-probability": (first_logprob(None), "a log-probability is None"),
    "another prompt": (changed("meta_info", "prompt_tokens", to=lambda old: old + 1), "prompt tokens of"),
    "more cached than sent": (changed("meta_info", "cached_tokens", to=lambda old: 1000), "prompt tokens of"),
    "other weights": (changed("meta_info", "weight_version", to=lambda old: "v1"), "answered with weights v1, not v0"),
    "aborted": (changed("meta_info", "finish_reason", "type", to=lambda old: "abort"), "ended the request by abort"),
}


@pytest.mark.parametrize(("lie", "complaint"), LIES.values(), ids=LIES)
def test_an_answer_that_cannot_be_true_is_not_believed(models, lie, complaint):
    with pytest.raises(AgentArkError, match=complaint):
        use(models[0], ask, on("/generate", lie), attempts=1)


def test_what_fails_is_tried_again(models):
    async def ask_and_count(engine):
        return await ask(engine), engine.retries

    found, retries = use(
        models[0], ask_and_count, lambda path, number: 503 if number < 2 and path == "/generate" else None
    )
    assert retries == 2
    assert len(found.ids) == 16


def test_scores_of_other_tokens_are_not_believed(models):
    """These servers score nothing."""
    ids = requests(1)[0].prompt_ids
    with pytest.raises(AgentArkError, match="scored other tokens than it was sent"):
        use(models[0], lambda engine: engine.score(ids), on("/generate", None), attempts=1)


def test_servers_compute_in_one_dtype(models):
    async def weights(engine):
        return engine.weights

    half = on("/server_info", changed("dtype", to=lambda old: "bfloat16"))
    whole = on("/server_info", None)
    assert use(models[0], weights, whole, whole) == "v0"
    assert use(models[0], weights, half, half) == "v0+bfloat16"
    with pytest.raises(UsageError, match="another server in"):
        use(models[0], weights, whole, half)


def test_a_server_that_keeps_failing_gets_no_calls(models):
    """The first would be asked first every time."""
    counts = [0, 0]

    def failing(path, number):
        counts[0] += path == "/generate"
        return 503 if path == "/generate" or number > 0 else None  # once admitted, it stays away

    def good(path, number):
        counts[1] += path == "/generate"

    async def one_by_one(engine):
        return [await ask(engine) for _ in range(10)]

    assert len(use(models[0], one_by_one, failing, good)) == 10
    assert counts == [3, 10]


def test_a_server_that_is_back_gets_its_weights_first(models):
    async def run():
        server = Loopback(models[0])
        versions = []

        def restarts(path, number):
            if path != "/generate":
                return None
            if number == 3:
                server.version = "default"
            versions.append(server.version)
            return 503 if 1 <= number <= 3 else None

        async with listening(server) as upstream, real_server.faulty(upstream, restarts) as url:
            config = EngineConfig(servers=[url], timeout=10.0)
            async with SGLangEngine(config, models[0], Tokenizer(models[0]), model="tiny", weights="v0") as engine:
                found = [await ask(engine) for _ in range(2)]
        return found, versions

    found, versions = asyncio.run(run())
    assert len(found) == 2
    assert versions == ["v0", "v0", "v0", "default", "v0"]


def test_servers_behind_a_router_get_their_weights_themselves(models):
    """A router forwards calls and says who is behind it; one of them is away at first, and comes with other weights."""

    async def run():
        near, far = (Loopback(models[0]) for _ in range(2))
        away = True

        class Router(Loopback):
            async def handle(self, request):
                if request.path == "/workers":
                    found = [{"url": urls[0], "is_healthy": True}, {"url": urls[1] + "/", "is_healthy": not away}]
                    return web.json_response({"workers": found})
                if request.path == "/generate":
                    return await (near if away else far).handle(request)
                return web.Response(status=404)

        async with (
            listening(near) as first,
            listening(far) as second,
            listening(Router(models[0])) as url,
        ):
            urls = [first, second]
            config = EngineConfig(servers=[url], timeout=10.0)
            async with SGLangEngine(config, models[0], Tokenizer(models[0]), model="tiny", weights="v0") as engine:
                await ask(engine)
                versions = [near.version, far.version]
                away = False
                await ask(engine)
                return versions, [near.version, far.version], engine.retries

    at_first, at_last, retries = asyncio.run(run())
    assert at_first == ["v0", "default"]
    assert at_last == ["v0", "v0"]
    assert retries == 3  # answers of other weights, until the router is asked again what is behind it


def test_texts_are_those_of_the_ids(models):
    found = use(models[0], ask, on("/generate", None))
    assert found.text == Tokenizer(models[0]).decode(found.ids).strip()
    assert found.finish == "length"
    np.testing.assert_array_less(found.logprobs, 1e-6)
