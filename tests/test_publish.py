"""New weights reach the servers: as directories that are whole, and proven by what the servers compute."""

import asyncio
import json
import shutil
from contextlib import AsyncExitStack
from functools import cache
from pathlib import Path

import aiohttp
import jax
import numpy as np
import pytest
import real_server
from aiohttp import web
from real_server import our_logprobs, requests

from agentark_jax.data.tokenizer import Tokenizer
from agentark_jax.engines import http
from agentark_jax.engines.config import EngineConfig
from agentark_jax.engines.sglang import SGLangEngine
from agentark_jax.errors import AgentArkError, UsageError
from agentark_jax.models.config import load_config
from agentark_jax.models.weights import load_params, weights_fingerprint
from agentark_jax.training.publish import publish, published, version_name
from benchmarks.loopback import Loopback, listening

RUN = {"seed": 3, "data": "abc"}
PROBES = [request.prompt_ids[:20] for request in requests(3)]


@cache
def known_logprobs(directory, ids):
    return our_logprobs(directory, np.asarray(ids))


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(http, "_PAUSE", 0.001)


@pytest.fixture(scope="module")
def policies(models, tmp_path_factory):
    """The directories of the versions of two steps of a run, and their log-probs of the probes."""
    directory = tmp_path_factory.mktemp("published")
    config, versions = load_config(models[0]), {}
    params = load_params(models[0], config)
    for step, factor in enumerate((1.0, 1.1)):
        version = version_name(RUN, step)
        changed = jax.tree.map(lambda leaf, factor=factor: leaf * factor, params)
        versions[version] = publish(directory, version, config, changed, models[0])
    return versions, {
        version: [known_logprobs(path, tuple(ids.tolist())) for ids in PROBES] for version, path in versions.items()
    }


@pytest.fixture(scope="module")
def half_updated(policies, tmp_path_factory):
    """The directory of the later policy with the final norm of the earlier one."""
    before, after = policies[0].values()
    config = load_config(before)
    params = load_params(after, config) | {"final_norm": load_params(before, config)["final_norm"]}
    directory = tmp_path_factory.mktemp("half")
    return publish(directory, version_name(RUN, 2), config, params, before)


class Scoring(Loopback):
    """Scores probes by the weights of the directory that it loaded last; `fault` is what it does at an update.

    ignore: it keeps weights and version; pretend: the weights, under the new version; a directory: it loads that one;
    cache: it computes the last token from what it kept of those before it; refuse: it says so; die: the connection
    breaks and it never answers again; busy: that, but once only.
    """

    def __init__(self, model, fault=None):
        super().__init__(model)
        self.loaded = self.cached = model
        self.fault, self.dead, self.updates = fault, False, 0

    async def handle(self, request):
        if self.dead:
            request.transport.abort()
            return web.Response()
        if request.path == "/generate":
            body = json.loads(await request.read())
            if "logprob_start_len" in body:
                return web.json_response(self.scored(body["input_ids"], body["logprob_start_len"]))
        if request.path == "/update_weights_from_disk":
            self.updates += 1
            if self.fault in ("die", "busy") and self.updates > 1:
                self.dead, self.fault = self.fault == "die", None
                request.transport.abort()
                return web.Response()
            if self.updates > 1 and self.fault == "refuse":
                return web.json_response({"success": False, "message": "no such tensor"})
            if self.updates > 1 and self.fault == "ignore":
                return web.json_response({"success": True, "message": ""})
            if self.updates == 1 or self.fault != "pretend":
                given = (await request.json())["model_path"]
                self.loaded = self.fault if self.updates > 1 and isinstance(self.fault, Path) else given
            if self.updates == 1 or self.fault != "cache":
                self.cached = self.loaded
        return await super().handle(request)

    def scored(self, ids, start):
        directory = self.cached if start else self.loaded
        logprobs = [None, *known_logprobs(Path(directory), tuple(ids))[start:].tolist()]
        meta = {
            "finish_reason": {"type": "length", "length": 0},
            "prompt_tokens": len(ids),
            "cached_tokens": 0,
            "weight_version": self.version,
            "input_token_logprobs": [[value, token, None] for value, token in zip(logprobs, ids[start:], strict=True)],
            "output_token_logprobs": [],
        }
        return {"text": "", "output_ids": [], "meta_info": meta}


def updated(policies, *faults, tolerance=1e-4):
    """(largest differences in the order of the servers, versions that generate says, servers) after an update."""
    versions, expected = policies
    (first, before), (second, after) = versions.items()

    async def run():
        async with AsyncExitStack() as stack:
            servers = [Scoring(before, fault) for fault in faults]
            urls = [await stack.enter_async_context(listening(server)) for server in servers]
            config = EngineConfig(servers=urls, timeout=10.0, attempts=3)
            engine = SGLangEngine(config, before, Tokenizer(before), model="tiny", weights=first)
            await stack.enter_async_context(engine)
            await engine.verify_weights(PROBES, expected[first], tolerance)
            try:
                await engine.update_weights(after, second)
                assert engine.weights == second
                found = await engine.verify_weights(PROBES, expected[second], tolerance)
                await asyncio.gather(*(engine.generate(request) for request in requests(4)))
            except AgentArkError as error:
                message = str(error)
                assert f"--model-path {after}" in message
                for url, fault in zip(urls, faults, strict=True):
                    assert (url in message) == (fault is not None)
                raise
            return [found[url] for url in urls], [server.version for server in servers], engine.retries

    return asyncio.run(run())


def test_the_probes_tell_the_policies_apart(policies):
    first, second = policies[1].values()
    assert max(np.abs(a - b).max() for a, b in zip(first, second, strict=True)) > 0.05


def test_servers_get_new_weights(policies):
    differences, versions, retries = updated(policies, None, None)
    assert max(differences) < 1e-5
    assert versions == [list(policies[0])[1]] * 2
    assert retries == 0


def test_an_update_that_fails_once_is_tried_again(policies):
    assert updated(policies, "busy")[2] == 1


@pytest.mark.parametrize(
    ("fault", "complaint"),
    [
        ("ignore", "answered with weights step-00000000-.*, not step-00000001-"),
        ("pretend", "say that they have weights step-00000001-.* by up to .* nats .*a part of them"),
        ("cache", "by up to .* nats .*a cache from before"),
        ("refuse", "cannot load .*: no such tensor"),
        ("die", "3 attempts failed, the last: .*/model_info does not answer"),
    ],
)
def test_a_server_that_does_not_follow_is_named(policies, fault, complaint):
    with pytest.raises(AgentArkError, match=complaint):
        updated(policies, None, fault, None)


def test_a_server_that_updates_only_partly_is_named(policies, half_updated):
    with pytest.raises(AgentArkError, match=r"by up to .* nats .*a part of them"):
        updated(policies, None, half_updated)


def test_all_servers_that_do_not_follow_are_named(policies):
    for faults in (("pretend", None, "pretend"), ("die", "die", None)):
        with pytest.raises(AgentArkError):  # `updated` looks for their addresses
            updated(policies, *faults)


def test_a_tolerance_allows_what_another_dtype_makes_of_it(policies):
    assert max(updated(policies, None, "pretend", tolerance=10.0)[0]) > 0.05


def test_another_model_or_damaged_files_are_refused_before_servers_are_asked(policies, tmp_path):
    before = next(iter(policies[0].values()))
    shutil.copytree(before, tmp_path / "damaged")
    weights = tmp_path / "damaged" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    shorter = real_server.make_model(tmp_path / "shorter", 0, positions=256)

    async def run(directory):
        server = Scoring(before)
        async with listening(server) as url:
            config = EngineConfig(servers=[url], timeout=10.0)
            async with SGLangEngine(config, before, Tokenizer(before), model="tiny", weights="v0") as engine:
                with pytest.raises(AgentArkError) as caught:
                    await engine.update_weights(directory, "v1")
                assert len((await engine.generate(requests(1)[0])).ids) == 16
        return str(caught.value), server.updates

    assert asyncio.run(run(tmp_path / "damaged"))[1] == 1
    message, updates = asyncio.run(run(shorter))
    assert "a model of another shape" in message
    assert updates == 1


def test_calls_in_flight_forbid_an_update(policies):
    before = next(iter(policies[0].values()))

    async def run():
        async with (
            listening(Scoring(before)) as upstream,
            real_server.faulty(upstream, lambda path, number: "stall" if path == "/generate" else None) as url,
        ):
            config = EngineConfig(servers=[url], timeout=1.0, attempts=1)
            async with SGLangEngine(config, before, Tokenizer(before), model="tiny", weights="v0") as engine:
                call = asyncio.create_task(engine.generate(requests(1)[0]))
                await asyncio.sleep(0.1)
                with pytest.raises(ValueError, match="calls are in flight"):
                    await engine.update_weights(before, "v1")
                with pytest.raises(AgentArkError, match="does not answer"):
                    await call

    asyncio.run(run())


def test_names_are_of_run_and_step():
    names = [version_name(run, step) for run in (RUN, {**RUN, "seed": 4}) for step in (5, 50, 1000)]
    assert len(set(names)) == 6
    assert names[:3] == sorted(names[:3])
    assert version_name(dict(reversed(RUN.items())), 5) == names[0]


def publishing(models, directory):
    config = load_config(models[0])
    params = load_params(models[0], config)

    def one(step):
        return publish(directory, version_name(RUN, step), config, params, models[0])

    return one


def test_the_newest_two_stay(models, tmp_path):
    one = publishing(models, tmp_path)
    written = [one(step) for step in (0, 1, 9, 10)]
    assert published(tmp_path) == written[2:]
    assert sorted(tmp_path.iterdir()) == written[2:]
    assert load_config(written[-1]) == load_config(models[0])
    for path in ("model.safetensors", "tokenizer.json"):
        assert (written[-1] / path).is_file()
    assert published(tmp_path / "absent") == []


def test_after_a_rollback_the_steps_after_it_go(models, tmp_path):
    one = publishing(models, tmp_path)
    written = [one(step) for step in (3, 4, 4)]
    assert published(tmp_path) == written[:2]
    assert one(3) == written[0]
    assert published(tmp_path) == written[:1]


def test_what_a_killed_run_left_goes_and_what_is_not_ours_stays(models, tmp_path):
    one = publishing(models, tmp_path)
    first = one(0)
    (tmp_path / f".{first.name}.abc").mkdir()
    (tmp_path / f".{first.name}.old.abc" / "it").mkdir(parents=True)
    (tmp_path / "step-by-step").mkdir()
    second = one(1)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([first.name, second.name, "step-by-step"])


def test_a_version_is_replaced_as_a_whole(models, tmp_path):
    one = publishing(models, tmp_path)
    config = load_config(models[1])
    before = weights_fingerprint(one(7))
    version = version_name(RUN, 7)
    path = publish(tmp_path, version, config, load_params(models[1], config), models[1])
    assert weights_fingerprint(path) != before
    with pytest.raises(UsageError, match="do not fit the config"):
        publish(tmp_path, version, config, {}, models[1])
    assert [path] == published(tmp_path)
    with pytest.raises(ValueError, match="no name of a version"):
        publish(tmp_path, "newest", config, {}, models[1])


@pytest.mark.sglang
def test_changed_weights_are_proven_by_changed_log_probs_of_a_real_server(server, policies):
    versions, expected = policies
    (first, before), (second, after) = versions.items()

    async def run():
        config = EngineConfig(servers=[server], timeout=60.0)
        engine = SGLangEngine(config, before, Tokenizer(before), model="tiny", weights=first)
        asked = requests(6, temperature=0.0)
        async with engine:
            found = [await engine.verify_weights(PROBES, expected[first], 1e-4)]
            said = [await asyncio.gather(*map(engine.generate, asked))]
            with pytest.raises(AgentArkError, match="as if they had other weights"):
                await engine.verify_weights(PROBES, expected[second], 1e-4)
            await engine.update_weights(after, second)
            found.append(await engine.verify_weights(PROBES, expected[second], 1e-4))
            said.append(await asyncio.gather(*map(engine.generate, asked)))
            with pytest.raises(AgentArkError, match="as if they had other weights"):
                await engine.verify_weights(PROBES, expected[first], 1e-4)
            # The weights of the first again, under the name of the second, with a cache that is the second's.
            body = {"model_path": str(before), "weight_version": second, "flush_cache": False}
            async with (
                aiohttp.ClientSession() as session,
                session.post(f"{server}/update_weights_from_disk", json=body),
            ):
                pass
            with pytest.raises(AgentArkError, match="a cache from before"):
                await engine.verify_weights(PROBES, expected[first], 1e-4)
            return found, said

    found, said = asyncio.run(run())
    assert all(largest < 1e-4 for each in found for largest in each.values())
    for directory, completions in zip((before, after), said, strict=True):
        for request, completion in zip(requests(6), completions, strict=True):
            text = np.concatenate([request.prompt_ids, completion.ids])
            ours = our_logprobs(directory, text)[len(request.prompt_ids) - 1 :]
            np.testing.assert_allclose(completion.logprobs, ours, atol=1e-4)
    assert any(not np.array_equal(a.ids, b.ids) for a, b in zip(*said, strict=True))
