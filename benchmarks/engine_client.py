"""What the client of SGLang servers costs: beside SGLang's own benchmark client, and beside aiohttp alone.

Against a real server on CPU, ours and `sglang.bench_serving` send the same prompts (its `random-ids`, from the same
seed), as many at once, to an empty prefix cache, and get as many tokens with their log-probabilities, sampled greedily.
The small model never says its end token, so nothing ends early, whether or not that is ignored. The peer's time ends
with a look at the server's state; so does ours. Answers are compared: what was done was the same.

Against a server that answers at once, what remains is the client's own work. The floor there is aiohttp itself, which
posts the same bodies, encoded before, and reads what comes without a look at it.
"""

import asyncio
import json
import os
import statistics
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
from jaxtyping import Int

from agentark_jax.data.render import PlainFormat
from agentark_jax.data.tokenizer import Tokenizer, train_tokenizer
from agentark_jax.engines.base import Request
from agentark_jax.engines.config import EngineConfig
from agentark_jax.engines.sglang import SGLangEngine
from agentark_jax.errors import AgentArkError, UsageError
from agentark_jax.models import transformer
from agentark_jax.models.config import load_config
from agentark_jax.models.source import ScratchConfig
from agentark_jax.models.weights import save_pretrained
from agentark_jax.protocols.calls import Caller, Draw
from agentark_jax.records import Completion, Question, Sampling
from agentark_jax.traces.store import TraceStore
from benchmarks.results import Check, Comparison, Measured, Ratio, Spread, environment
from benchmarks.servers import LAUNCHER, PYTHON, serving
from benchmarks.workers import Repeat, Reply, Side, Worker, interleaved, serve

NAME = "engine_client"
ENGINE, STORED, PEER, STREAM, BARE = "engine", "engine and store", "bench_serving", "bench_serving, streams", "aiohttp"
DESCRIPTIONS = {
    ENGINE: "agentark_jax",
    STORED: "agentark_jax, every turn committed",
    PEER: "sglang.bench_serving, whole answers",
    STREAM: "sglang.bench_serving, streams (its default)",
    BARE: "aiohttp alone",
}
SERVER, LOOPBACK = "real server", "answers at once"
GOAL = 1.05  # 95 % of the peer's throughput
CALLS_PER_SECOND = 1500.0
DIFFERING = 0.05  # a batch of another size rounds otherwise, and what was nearly a tie ends otherwise
VOCABULARY = 4096
WEIGHTS = "v0"


@dataclass(frozen=True)
class Sizes:
    calls: int = 768
    in_flight: int = 64
    loopback_calls: int = 5000
    loopback_in_flight: int = 256
    prompt_tokens: int = 100
    new_tokens: int = 32
    repetitions: int = 7


def run(model: Path, name: str, *, quick: bool, peers: bool, say: Callable[[str], None]) -> Iterator[Comparison]:
    """`model` plays no part: a small made-up one leaves the client the most to do.

    Without `peers` there is no real server, only one that answers at once. Raises UsageError where a real one is wanted
    and no environment for it named, AgentArkError when the clients did not do the same work.
    """
    python = peer_python() if peers else None
    sizes = Sizes(calls=32, in_flight=16, loopback_calls=300, repetitions=2) if quick else Sizes()
    before = environment()
    found: dict[str, dict[str, list[Reply]]] = {}
    checks = []
    with tempfile.TemporaryDirectory() as place:
        made = make_model(Path(place) / "model")

        def measure(
            url: str, names: list[str], calls: int, in_flight: int, check: Callable[[dict[str, Reply]], None]
        ) -> dict[str, list[Reply]]:
            setup = {**asdict(sizes), "calls": calls, "in_flight": in_flight, "model": str(made), "url": url}
            sides = [
                Side(side, "benchmarks.engine_client", {**setup, "side": side, "python": python}) for side in names
            ]
            return interleaved(sides, sizes.repetitions, check, say)

        with Worker(Side("loopback", "benchmarks.loopback", {"model": str(made)})) as loopback:
            asked = sizes.loopback_calls, sizes.loopback_in_flight
            found[LOOPBACK] = measure(loopback.ready["url"], [ENGINE, STORED, BARE], *asked, lambda replies: None)
        if python:
            options = ("--max-running-requests", str(sizes.in_flight), "--max-total-tokens", "32768")
            say("starting the server")
            with serving(python, made, Path(place) / "log", None, *options) as url:
                found[SERVER] = measure(
                    url,
                    [ENGINE, PEER, STORED, STREAM],
                    sizes.calls,
                    sizes.in_flight,
                    lambda replies: checks.append(compare_answers(replies)),
                )
    yield Comparison(
        benchmark=NAME,
        title="Client of SGLang servers",
        quick=quick,
        model={"name": "a small made-up model"},
        sizes=asdict(sizes),
        measured=[
            Measured(
                f"{side}, {where}", f"{where}: {DESCRIPTIONS[side]}", "ms a call", Spread.of(milliseconds(replies))
            )
            for where, sides in found.items()
            for side, replies in sides.items()
        ],
        ratios=[
            ratio(found[where], where, side, peer, goal)
            for where, peer, goal in ((LOOPBACK, BARE, None), (SERVER, PEER, GOAL))
            if where in found
            for side in (ENGINE, STORED)
        ],
        checks=[*checks, *rates(found, sizes)],
        environment=before,
    )


def peer_python() -> str:
    """The python of the SGLang environment. Raises UsageError where none is named, or it cannot run bench_serving."""
    python = os.environ.get(PYTHON)
    if not python:
        raise UsageError(
            f"--peers: {PYTHON} is not set; launch/sglang/install_cpu.sh makes an environment, name its bin/python"
        )
    for package in ("sglang", "datasets"):
        search = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({package!r}) is None)"
        if subprocess.run([python, "-c", search], check=False).returncode != 0:
            raise UsageError(f"--peers: {PYTHON} is {python}, which has no {package}; install it there")
    return python


def milliseconds(replies: list[Reply]) -> list[float]:
    """Per call, of every repetition after the warm-up."""
    return [1e3 * reply["seconds"] / reply["calls"] for reply in replies[1:]]


def ratio(sides: Mapping[str, list[Reply]], where: str, ours: str, theirs: str, goal: float | None) -> Ratio:
    """Our time over theirs, round by round."""
    pairs = zip(milliseconds(sides[ours]), milliseconds(sides[theirs]), strict=True)
    return Ratio(f"{ours}, {where}", f"{theirs}, {where}", Spread.of([own / other for own, other in pairs]), goal)


def rates(found: Mapping[str, Mapping[str, list[Reply]]], sizes: Sizes) -> list[Check]:
    """The same figures as rates, medians, and the goal for the client alone."""
    took = {side: statistics.median(milliseconds(replies)) for side, replies in found[LOOPBACK].items()}
    checks = [Check(f"{LOOPBACK}: agentark_jax, ms a call", took[ENGINE], 1e3 / CALLS_PER_SECOND)]
    checks += [
        Check(f"{LOOPBACK}: calls/s, {DESCRIPTIONS[side]}, thousands", 1 / milliseconds_, None)
        for side, milliseconds_ in took.items()
    ]
    for side, replies in found[LOOPBACK].items():
        per_second = statistics.median(reply["calls"] / reply["cpu_seconds"] for reply in replies[1:])
        checks.append(
            Check(f"{LOOPBACK}: calls in a second of CPU time, {DESCRIPTIONS[side]}, thousands", per_second / 1e3, None)
        )
    for side, replies in found.get(SERVER, {}).items():
        tokens = sizes.new_tokens / statistics.median(milliseconds(replies))
        checks.append(Check(f"{SERVER}: output tokens/s, {DESCRIPTIONS[side]}, thousands", tokens, None))
    return checks


def compare_answers(replies: Mapping[str, Reply]) -> Check:
    """Raises AgentArkError when more of the answers differ between the clients than rounding explains."""
    ours, theirs = replies[ENGINE]["texts"], replies[PEER]["texts"]
    share = sum(own != other for own, other in zip(ours, theirs, strict=True)) / len(ours)
    check = Check(f"share of answers that differ ({DESCRIPTIONS[ENGINE]}, {DESCRIPTIONS[PEER]})", share, DIFFERING)
    if share > DIFFERING:
        raise AgentArkError(f"{share:.0%} of the answers differ between the clients: they did not do the same work")
    return check


def make_model(directory: Path) -> Path:
    """A small random model of which greedy sampling never gets an end token, nor half a character."""
    directory.mkdir()
    random = np.random.default_rng(0)
    letters = random.choice(list("abcdefghijklmnopqrstuvwxyz "), 200_000)
    train_tokenizer(["".join(letters)], VOCABULARY, directory)
    tokenizer = Tokenizer(directory)
    shape = ScratchConfig(hidden_size=64, layers=2, heads=4, head_dim=16, intermediate_size=96, max_positions=512)
    raw = shape.to_hf(vocabulary=tokenizer.vocabulary_size, bos_id=tokenizer.bos_id, eos_id=tokenizer.eos_id)
    (directory / "config.json").write_text(json.dumps(raw))
    config = load_config(directory)
    params = transformer.init_params(config, 0)
    said = [
        not tokenizer.is_special(token) and "\ufffd" not in tokenizer.decode([token]) for token in range(VOCABULARY)
    ]
    # Of thousands of random scores some are above zero, which is what such a token always has.
    params["embedding"] = params["embedding"] * np.asarray(said, np.float32)[:, None]
    return save_pretrained(directory, config, params, directory)


def random_ids(vocabulary: int, calls: int, length: int, seed: int) -> Int[np.ndarray, "N T"]:
    """The prompts of bench_serving's dataset `random-ids`: runs of consecutive ids from random ones on."""
    random = np.random.RandomState(seed)
    first = random.randint(0, vocabulary, calls) + np.arange(calls)
    return ((first[:, None] + np.arange(length)) % vocabulary).astype(np.int32)


def build(setup: Mapping[str, Any]) -> tuple[Repeat, Reply]:
    """What a side repeats, in a process of its own."""
    if setup["side"] in (PEER, STREAM):
        return lambda repetition: bench_serving(setup, repetition), {}
    ask = bare if setup["side"] == BARE else ours
    return lambda repetition: asyncio.run(ask(setup, prompts(setup, repetition), repetition)), {}


def prompts(setup: Mapping[str, Any], repetition: int) -> Int[np.ndarray, "N T"]:
    return random_ids(VOCABULARY, setup["calls"], setup["prompt_tokens"], repetition)


async def ours(setup: Mapping[str, Any], asked: Int[np.ndarray, "N T"], repetition: int) -> Reply:
    """All calls at once through the engine, or through whoever keeps their turns in a store as well."""
    model, url, new_tokens = Path(setup["model"]), setup["url"], setup["new_tokens"]
    tokenizer = Tokenizer(model)
    config = EngineConfig(servers=[url], in_flight=setup["in_flight"])
    question = Question.make("benchmark", "calls", "none", "none")
    with tempfile.TemporaryDirectory() as place, TraceStore(Path(place) / "traces.sqlite") as store:
        store.put_question(question)
        async with SGLangEngine(config, model, tokenizer, model=NAME, weights=WEIGHTS) as engine:
            caller = Caller(engine, store, PlainFormat(tokenizer), seed=repetition)

            async def generate(number: int) -> Completion:
                sampling = Sampling(0.0, new_tokens, (tokenizer.eos_id,), number)
                return await engine.generate(Request(asked[number], sampling))

            async def call(number: int) -> Completion | None:
                prompt, draw = (tuple(asked[number].tolist()),), Draw(0.0, new_tokens)
                turn = await caller.ask(question, prompt, draw, protocol=NAME, role="caller", sample=number)
                return turn.completion

            answer = call if setup["side"] == STORED else generate
            await generate(0)  # the peer, too, warms up, empties the cache and rests
            fetch(f"{url}/flush_cache", b"")
            await asyncio.sleep(1)
            started, computing = time.perf_counter(), time.process_time()
            answers = await asyncio.gather(*(answer(number) for number in range(len(asked))))
            fetch(f"{url}/server_info")
            seconds, computing = time.perf_counter() - started, time.process_time() - computing
        stored = sum(1 for _ in store.turns())
    if any(answer is None or len(answer.ids) != new_tokens for answer in answers):
        raise AgentArkError("an answer has another length than was asked for")
    texts = [] if repetition else [answer.text for answer in answers if answer is not None]
    return {"seconds": seconds, "cpu_seconds": computing, "calls": len(answers), "stored": stored, "texts": texts}


async def bare(setup: Mapping[str, Any], asked: Int[np.ndarray, "N T"], repetition: int) -> Reply:
    """The same bodies posted by aiohttp, as many at once."""
    sampling = {"temperature": 0.0, "top_p": 1.0, "max_new_tokens": setup["new_tokens"], "stop_token_ids": [1]}
    sampling |= {"sampling_seed": 1, "skip_special_tokens": False}
    common = {"return_logprob": True, "sampling_params": sampling}
    bodies = [json.dumps({"input_ids": ids, **common}).encode() for ids in asked.tolist()]
    room = asyncio.Semaphore(setup["in_flight"])
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

        async def post(body: bytes) -> int:
            headers = {"Content-Type": "application/json"}
            async with room, session.post(f"{setup['url']}/generate", data=body, headers=headers) as response:
                await response.read()
                return response.status

        started, computing = time.perf_counter(), time.process_time()
        statuses = await asyncio.gather(*map(post, bodies))
        seconds, computing = time.perf_counter() - started, time.process_time() - computing
    assert set(statuses) == {200}
    return {"seconds": seconds, "cpu_seconds": computing, "calls": len(statuses)}


def bench_serving(setup: Mapping[str, Any], repetition: int) -> Reply:
    """One run of SGLang's client, by its own clock. On CPU it needs the same stand-ins as the server."""
    with tempfile.TemporaryDirectory() as place:
        output = Path(place) / "result.jsonl"
        options = {
            "backend": "sglang",
            "base-url": setup["url"],
            "model": setup["model"],
            "dataset-name": "random-ids",
            "random-input-len": setup["prompt_tokens"],
            "random-output-len": setup["new_tokens"],
            "random-range-ratio": 1,
            "num-prompts": setup["calls"],
            "max-concurrency": setup["in_flight"],
            "seed": repetition,
            "output-file": output,
        }
        start = "import cpu_server; from sglang.benchmark.serving import cli_main; cli_main()"
        command = [setup["python"], "-c", start, "--tokenize-prompt", "--return-logprob", "--flush-cache"]
        command += ["--disable-tqdm", "--output-details", *(["--disable-stream"] if setup["side"] == PEER else [])]
        command += [word for name, value in options.items() for word in (f"--{name}", str(value))]
        environment = {**os.environ, "PYTHONPATH": str(LAUNCHER.parent)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise AgentArkError(f"bench_serving ended with code {done.returncode}:\n{done.stderr[-3000:]}")
        found = json.loads(output.read_text())
    calls = setup["calls"]
    wanted = (calls, calls * setup["prompt_tokens"], calls * setup["new_tokens"])
    did = (found["completed"], found["total_input_tokens"], found["total_output_tokens"])
    if did != wanted:
        raise AgentArkError(f"bench_serving did {did} calls, prompt tokens and new tokens, not {wanted}")
    texts = [] if repetition else [text.strip() for text in found["generated_texts"]]
    return {"seconds": found["duration"], "calls": calls, "texts": texts}


def fetch(url: str, body: bytes | None = None) -> None:
    """Gets (or posts to) an address. Raises URLError where that fails."""
    with urllib.request.urlopen(urllib.request.Request(url, body), timeout=60) as answer:
        answer.read()


if __name__ == "__main__":
    serve(build)
