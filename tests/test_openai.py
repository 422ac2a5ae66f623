"""The engine for OpenAI-compatible endpoints against a loopback one that fails as they do, and against SGLang's own."""

import asyncio
import logging
from contextlib import AsyncExitStack, asynccontextmanager

import numpy as np
import pytest
import real_server
from aiohttp import web

from agentark_jax.data.render import PlainFormat, turn_example
from agentark_jax.data.tokenizer import Tokenizer
from agentark_jax.engines import http
from agentark_jax.engines.base import Request
from agentark_jax.engines.config import EngineConfig
from agentark_jax.engines.openai import TOKEN_VARIABLE, OpenAIEngine
from agentark_jax.engines.sglang import SGLangEngine
from agentark_jax.errors import AgentArkError, UsageError
from agentark_jax.protocols.calls import Caller, CallFailed, Draw
from agentark_jax.protocols.single import answer
from agentark_jax.protocols.table import Agent, Pool
from agentark_jax.records import Label, Question, Sampling
from agentark_jax.traces.config import SelectionConfig
from agentark_jax.traces.labels import labelled_turns
from agentark_jax.traces.store import TraceStore
from agentark_jax.traces.variants import select

QUESTION = Question.make("task", "debate", "How many?", "7")
SAID = "\nThree and four. The answer is 7."
TOKEN = "sk-very-secret"


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(http, "_PAUSE", 0.01)


class Endpoint:
    """Answers every prompt with the same text. Takes note of what it was asked, the call of the start left out."""

    def __init__(self, form, *, models=(("tiny", None),), says=SAID, finish="stop", adds_bos=False, miscounts=0):
        self.form, self.models, self.says, self.finish = form, models, says, finish
        self.more = adds_bos + miscounts
        self.asked, self.heads = [], []

    async def list(self, request):
        data = [{"id": name, "object": "model", "max_model_len": limit} for name, limit in self.models]
        return web.json_response({"object": "list", "data": data})

    async def complete(self, request):
        body = await request.json()
        self.asked.append(body)
        self.heads.append(request.headers.get("Authorization"))
        prompt, spoken = (len(self.form.tokenizer.encode(text)) for text in (body["prompt"], self.says))
        usage = {"prompt_tokens": prompt + self.more, "completion_tokens": min(spoken, body["max_tokens"])}
        usage["prompt_tokens_details"] = {"cached_tokens": 2}
        choice = {"index": 0, "text": self.says, "logprobs": None, "finish_reason": self.finish}
        return web.json_response({"id": "x", "object": "text_completion", "choices": [choice], "usage": usage})

    @asynccontextmanager
    async def serving(self):
        application = web.Application()
        application.add_routes([web.get("/v1/models", self.list), web.post("/v1/completions", self.complete)])
        runner = web.AppRunner(application, shutdown_timeout=0.1)
        await runner.setup()
        port = real_server.free_port()
        await web.TCPSite(runner, "127.0.0.1", port).start()
        try:
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            await runner.cleanup()


def make_engine(urls, tokenizer, *, served=None, context=512, **settings):
    config = EngineConfig(**{"servers": urls, "timeout": 30.0, "attempts": 8, **settings})
    return OpenAIEngine(config, tokenizer, context=context, model="teacher", served=served)


def request_of(form, **sampling):
    prompt = [token for segment in form.question(QUESTION) for token in segment]
    values = {"temperature": 0.7, "max_tokens": 40, "stop_ids": form.stop_ids, "seed": 2**63 + 5, "top_p": 0.9}
    return Request(np.asarray(prompt, np.int32), Sampling(**{**values, **sampling}))


def ask(endpoints, form, *asked, faults=None, **settings):
    """What an engine on these endpoints answers; `faults` as in `real_server.faulty`."""

    async def everyone():
        async with AsyncExitStack() as stack:
            urls = [await stack.enter_async_context(each.serving()) for each in endpoints]
            if faults is not None:
                urls = [
                    await stack.enter_async_context(real_server.faulty(url.removesuffix("/v1"), faults)) + "/v1"
                    for url in urls
                ]
            engine = await stack.enter_async_context(make_engine(urls, form.tokenizer, **settings))
            return await asyncio.gather(*(engine.generate(request) for request in asked)), engine

    return asyncio.run(everyone())


def test_text_goes_and_text_comes(form, monkeypatch):
    monkeypatch.setenv(TOKEN_VARIABLE, TOKEN)
    endpoint = Endpoint(form)
    request = request_of(form)
    (completion,), engine = ask([endpoint], form, request)
    _, body = endpoint.asked
    assert body == {
        "model": "tiny",
        "prompt": "<bos>Question: How many?\nAnswer:",
        "temperature": 0.7,
        "top_p": 0.9,
        "max_tokens": 40,
        "seed": 5,
        "stop": ["<eos>"],
    }
    assert endpoint.heads == [f"Bearer {TOKEN}"] * 2
    assert (engine.model, engine.weights, engine.text_only) == ("teacher", "openai:tiny", True)
    assert completion.ids.tolist() == [*form.tokenizer.encode(SAID), form.tokenizer.eos_id]
    assert completion.ids.dtype == np.int32
    assert completion.logprobs is None
    assert completion.text_only
    assert (completion.text, completion.finish) == (SAID.strip(), "stop")
    assert (completion.prompt_tokens, completion.cached_tokens) == (len(request.prompt_ids), 2)
    assert completion.server is not None


def test_an_answer_that_was_cut_off_has_no_end(form):
    (completion,), _ = ask([Endpoint(form, finish="length")], form, request_of(form))
    assert completion.ids.tolist() == list(form.tokenizer.encode(SAID))
    assert completion.finish == "length"
    ids = form.tokenizer.encode(SAID)
    (longer, exact), _ = ask(
        [Endpoint(form)], form, request_of(form, max_tokens=4), request_of(form, max_tokens=len(ids) + 1)
    )
    assert (longer.ids.tolist(), longer.finish) == (list(ids[:4]), "length")
    assert (exact.ids.tolist(), exact.finish) == ([*ids, form.tokenizer.eos_id], "stop")


def test_who_says_nothing_has_answered_only_if_it_ended_itself(form):
    (completion,), _ = ask([Endpoint(form, says="")], form, request_of(form))
    assert (completion.ids.tolist(), completion.text) == ([form.tokenizer.eos_id], "")
    with pytest.raises(AgentArkError, match="cut off before it said anything"):
        ask([Endpoint(form, says="", finish="length")], form, request_of(form))


def test_a_prompt_has_one_beginning_wherever_it_comes_from(form, caplog):
    """A server that adds one gets prompts without; the count is that of the ids all the same."""
    endpoint = Endpoint(form, adds_bos=True)
    request = request_of(form)
    (completion,), _ = ask([endpoint], form, request)
    assert endpoint.asked[0]["prompt"].startswith("<bos>")
    assert endpoint.asked[1]["prompt"] == "Question: How many?\nAnswer:"
    assert completion.prompt_tokens == len(request.prompt_ids)
    assert not caplog.records
    with pytest.raises(UsageError, match="another server differ in whether they add"):
        ask([endpoint, Endpoint(form)], form, request)


def test_another_count_is_said_once(form, caplog):
    endpoint = Endpoint(form, miscounts=3)
    with caplog.at_level(logging.WARNING):
        ask([endpoint], form, *[request_of(form)] * 3)
    (record,) = caplog.records
    assert "its tokenizer is another one" in record.getMessage()
    assert endpoint.asked[1]["prompt"].startswith("<bos>")


def change(**changes):
    """A fault: an answer with other values in its only choice, or beside it."""

    def fault(answer):
        for key, value in changes.items():
            (answer if key in answer else answer["choices"][0])[key] = value
        return answer

    return fault


def forget(key):
    return lambda answer: {name: value for name, value in answer.items() if name != key}


@pytest.mark.parametrize(
    "fault",
    [429, 500, "reset", "cut", lambda answer: b'{"choices": [', lambda answer: [answer], change(choices=[]),
     lambda answer: {**answer, "choices": answer["choices"] * 2}, change(text=None), change(text="\ud83d"),
     change(finish_reason="content_filter"), change(finish_reason=None), forget("usage"),
     change(usage={"prompt_tokens": 9, "completion_tokens": 4000}),
     change(usage={"prompt_tokens": 9, "completion_tokens": 4, "prompt_tokens_details": {"cached_tokens": 10}})],
    ids=["429", "500", "reset", "cut", "half JSON", "list", "no choice", "two choices", "no text", "half a letter",
         "filtered", "no finish", "no usage", "too many", "too many cached"],
)  # fmt: skip
def test_what_passes_costs_time_and_nothing_else(form, fault):
    """Every third call fails; all are answered, as if none had."""

    def faults(path, number):
        return fault if path == "/v1/completions" and number % 3 == 1 else None

    found, engine = ask([Endpoint(form)], form, *[request_of(form)] * 6, faults=faults)
    assert engine.retries >= 2
    assert {completion.text for completion in found} == {SAID.strip()}


@pytest.mark.parametrize(
    ("fault", "settings", "error", "complaint"),
    [(500, {"attempts": 3}, AgentArkError, r"3 attempts failed, the last: .* answers 500: busy"),
     ("stall", {"attempts": 2, "timeout": 0.3}, AgentArkError, r"2 attempts failed, the last: .*Timeout"),
     (forget("usage"), {"attempts": 2}, AgentArkError, "2 attempts failed, the last: .* lacks .*usage"),
     (400, {}, AgentArkError, r"refuses the request \(400\)"), (401, {}, UsageError, TOKEN_VARIABLE)],
    ids=["500", "stall", "no usage", "400", "401"],
)  # fmt: skip
def test_what_does_not_pass_is_an_error(form, fault, settings, error, complaint):
    def faults(path, number):
        return fault if path == "/v1/completions" and number > 0 else None

    with pytest.raises(error, match=complaint):
        ask([Endpoint(form)], form, request_of(form), faults=faults, **settings)


def test_a_server_that_comes_back_is_asked_again(form):
    """It fails some calls in a row, then its list of models, then it is well."""
    seen = []

    def faults(path, number):
        seen.append(path)
        return 503 if 1 <= number <= (4 if path == "/v1/completions" else 2) else None

    found, _ = ask([Endpoint(form)], form, *[request_of(form)] * 4, faults=faults)
    assert len(found) == 4
    assert seen.count("/v1/models") >= 4


@pytest.mark.parametrize(
    ("models", "served", "complaint"),
    [([("a", None), ("b", None)], None, "serves a, b, so name the one to ask"),
     ([("a", None), ("b", None)], "c", "serves a, b, not c: name one of these"),
     ([], None, "serves nothing")],
)  # fmt: skip
def test_a_model_is_named_where_there_is_a_choice(form, models, served, complaint):
    with pytest.raises(UsageError, match=complaint):
        ask([Endpoint(form, models=models)], form, served=served)
    if len(models) > 1:
        endpoint = Endpoint(form, models=models)
        _, engine = ask([endpoint], form, request_of(form), served="b")
        assert engine.weights == "openai:b"
        assert {body["model"] for body in endpoint.asked} == {"b"}


def test_an_absent_server_is_named(form):
    url = f"http://127.0.0.1:{real_server.free_port()}/v1"

    async def enter():
        async with make_engine([url], form.tokenizer):
            raise AssertionError("nobody is there")

    with pytest.raises(UsageError, match=url):
        asyncio.run(enter())


def test_what_cannot_be_served_is_not_sent(form):
    """The limit is the least that a server tells, else the one given."""
    told = [Endpoint(form, models=[("tiny", limit)]) for limit in (80, 60)]
    long = request_of(form, max_tokens=61 - len(request_of(form).prompt_ids))
    for servers in (told, told[::-1]):
        with pytest.raises(AgentArkError, match="context of 60"):
            ask(servers, form, long)
    assert [len(endpoint.asked) for endpoint in told] == [2, 2]
    ask([told[0]], form, long)
    with pytest.raises(AgentArkError, match="context of 59"):
        ask([Endpoint(form)], form, long, context=59)
    with pytest.raises(AgentArkError, match="no field for a regex"):
        ask([Endpoint(form)], form, request_of(form, regex="(a|b)"))
    with pytest.raises(AgentArkError, match="no log-probabilities"):
        asyncio.run(make_engine(["http://host/v1"], form.tokenizer).score(np.asarray([1, 2])))


def test_the_token_is_neither_said_nor_stored(form, tmp_path, monkeypatch, caplog):
    """Not even where a server repeats it."""
    monkeypatch.setenv(TOKEN_VARIABLE, TOKEN)
    endpoint = Endpoint(form)
    asked = []

    async def refuse(request):
        asked.append(request.headers["Authorization"])
        if len(asked) == 1:
            return await Endpoint.complete(endpoint, request)
        return web.Response(status=400, text=f"bad request by {asked[-1]}")

    endpoint.complete = refuse

    async def call():
        async with endpoint.serving() as url, make_engine([url], form.tokenizer) as engine:
            with pytest.raises(CallFailed, match=r"bad request by Bearer \[secret\]") as failure:
                await answer(
                    QUESTION, Pool((Agent(Caller(engine, store, form, seed=0)),)), Draw(0.0, 20), protocol="single"
                )
            return failure.value.turn

    with TraceStore(tmp_path / "traces.sqlite") as store:
        store.put_question(QUESTION)
        turn = asyncio.run(call())
    assert "[secret]" in turn.error
    assert asked[-1] == f"Bearer {TOKEN}"
    assert TOKEN not in caplog.text
    assert not any(TOKEN.encode() in file.read_bytes() for file in tmp_path.iterdir())


def test_what_was_said_is_learned_from_and_marked(form, tmp_path):
    """From the endpoint through the store and the selection to the example; found again, it is not asked for twice."""
    endpoint = Endpoint(form)

    async def call():
        async with endpoint.serving() as url, make_engine([url], form.tokenizer) as engine:
            caller = Caller(engine, store, form, seed=0)
            first = await answer(QUESTION, Pool((Agent(caller),)), Draw(0.5, 40), protocol="debate")
            again = await answer(QUESTION, Pool((Agent(caller),)), Draw(0.5, 40), protocol="debate")
            assert [turn.key for turn in again] == [turn.key for turn in first]
            return again

    with TraceStore(tmp_path / "traces.sqlite") as store:
        store.put_question(QUESTION)
        (turn,) = asyncio.run(call())
        store.put_labels([Label(turn.key, "grader", "right", "7")])
        assert store.verify() == []
        selection = select(labelled_turns(store, "grader"), SelectionConfig("round1_only"), store.completions)
    assert turn.call.weights == "openai:tiny"
    assert len(endpoint.asked) == 2
    assert [trajectory.turn_key for trajectory in selection.trajectories] == [turn.key]
    example = turn_example(form, QUESTION, turn, variant="v")
    assert example.retokenised
    assert example.ids.tolist() == [*turn.call.prompt_ids, *form.tokenizer.encode(SAID), form.tokenizer.eos_id]


@pytest.mark.sglang
def test_a_real_server_says_what_it_says_to_ids(server, models):
    """SGLang's own /v1: the prompt arrives as it was, so that the greedy text is that of the ids."""
    form = PlainFormat(Tokenizer(models[0]))
    questions = [Question.make("t", "s", f"is {a} seven? {a} and five are 12", "7") for a in range(12)]
    prompts = [[token for segment in form.question(question) for token in segment] for question in questions]
    asked = [Request(np.asarray(ids, np.int32), Sampling(0.0, 24, form.stop_ids, 1)) for ids in prompts]

    async def everyone(engine):
        async with engine:
            return await asyncio.gather(*(engine.generate(request) for request in asked)), engine.weights

    sampled, _ = asyncio.run(
        everyone(
            SGLangEngine(
                EngineConfig(servers=[server]), models[0], form.tokenizer, model="tiny", weights=models[0].name
            )
        )
    )
    said, weights = asyncio.run(everyone(make_engine([f"{server}/v1"], form.tokenizer)))
    assert weights.startswith("openai:")
    assert [one.text for one in said] == [one.text for one in sampled]
    assert any(one.text for one in said)
    for request, one, other in zip(asked, said, sampled, strict=True):
        assert (one.finish, one.prompt_tokens) == (other.finish, len(request.prompt_ids))
        assert (one.ids[-1] == form.tokenizer.eos_id) == (one.finish == "stop")
        assert one.text_only
    with pytest.raises(UsageError, match="not nobody"):
        asyncio.run(everyone(make_engine([f"{server}/v1"], form.tokenizer, served="nobody")))
