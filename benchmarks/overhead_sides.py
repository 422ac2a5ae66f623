"""What is measured of overheads in processes of their own: grading, scoring by a process reward model, compiling."""

import asyncio
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from agentark_jax.cache import enable_compilation_cache
from agentark_jax.data.tokenizer import Tokenizer
from agentark_jax.engines.base import Request
from agentark_jax.engines.config import EngineConfig
from agentark_jax.engines.local import LocalEngine
from agentark_jax.models.config import load_config
from agentark_jax.models.heads import init_head
from agentark_jax.models.weights import load_params
from agentark_jax.records import Question, Sampling
from agentark_jax.tasks.grading import grader
from agentark_jax.training.config import MeshConfig
from agentark_jax.training.mesh import make_mesh
from agentark_jax.training.scoring import score_steps
from benchmarks.jax_sides import compiling
from benchmarks.workers import Repeat, Reply, serve

Setup = Mapping[str, Any]
REASONING = (
    "First we write down what is known. There are {a} boxes with {b} pens each, which makes {a} times {b} in all. "
    "Then {b} of them are given away, and the rest is divided among the {a} children of the class.\n"
)


def numeric(a: int, b: int) -> tuple[str, str]:
    return str(a * b), f"The answer is {a * b:,}."


def choice(a: int, b: int) -> tuple[str, str]:
    letter = "ABCD"[(a + b) % 4]
    return letter, f"The answer is ({letter})."


def symbolic(a: int, b: int) -> tuple[str, str]:
    """Fractions, roots and polynomials in turn, each spelled otherwise than the gold answer."""
    return [
        (rf"\frac{{{a}}}{{{a + b}}}", rf"The answer is $\boxed{{{2 * a}/{2 * (a + b)}}}$."),
        (rf"{a}\sqrt{{{b}}}", rf"The answer is $\boxed{{\sqrt{{{a * a * b}}}}}$."),
        (rf"(x+{a})(x-{b})", rf"The answer is $\boxed{{x^2+{a - b}x-{a * b}}}$."),
    ][a % 3]


KINDS: dict[str, Callable[[int, int], tuple[str, str]]] = {
    "numeric": numeric,
    "choice": choice,
    "symbolic": symbolic,
}


def answers(kind: str, count: int, seed: int) -> list[tuple[Question, str]]:
    """Questions and answers to them, right and wrong in turn; no value comes twice, for values are remembered."""
    random = np.random.default_rng(seed)
    pairs = random.permutation(200 * 200)[:count]
    found = []
    for place, number in enumerate(pairs.tolist()):
        b = 2 + number % 200
        a = b + 1 + number // 200  # the larger one, so that no coefficient is negative
        text = REASONING.format(a=a, b=b) * 4 + KINDS[kind](a, b)[1]
        gold = KINDS[kind](a + 3 * (place % 2), b)[0]
        found.append((Question.make("benchmark", "debate", f"question {number}", gold, choices=list("wxyz")), text))
    return found


def grading(setup: Setup) -> Repeat:
    """One repetition grades other answers, one after the other; `times` are the seconds of each."""
    judge = grader(setup["kind"])
    judge(*answers(setup["kind"], 1, 10**6)[0])  # what starts with the first answer

    def repeat(index: int) -> Reply:
        given = answers(setup["kind"], setup["answers"], index)
        times, as_meant = [], 0
        for place, (question, text) in enumerate(given):
            started = time.perf_counter()
            grade = judge(question, text)
            times.append(time.perf_counter() - started)
            as_meant += grade.verdict == ("right", "wrong")[place % 2]
        return {"seconds": sum(times), "times": times, "as_meant": as_meant}

    return repeat


def sequences(vocabulary: int, lengths: list[int], step_tokens: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Random ids, with a step that ends every so many tokens, and at the end."""
    random = np.random.default_rng(0)
    return [
        (
            random.integers(0, vocabulary, length, dtype=np.int32),
            np.arange(length - 1, 0, -step_tokens)[::-1],
        )
        for length in lengths
    ]


def prm_scoring(setup: Setup) -> Repeat:
    """All steps of all sequences, by a head of random weights: what they say does not change the work."""
    directory = Path(setup["model"])
    model, mesh = load_config(directory), make_mesh(MeshConfig())
    params, head = load_params(directory, model), init_head(model, "prm", 0)
    given = sequences(model.vocab_size, setup["lengths"], setup["step_tokens"])

    def repeat(index: int) -> Reply:
        started = time.perf_counter()
        found = score_steps(model, params, head, given, mesh)
        reply: Reply = {"seconds": time.perf_counter() - started}
        if index == 0:
            alone = [score_steps(model, params, head, [given[place]], mesh, tokens=1)[0] for place in (0, -1)]
            gaps = [np.abs(found[place] - other).max() for place, other in zip((0, -1), alone, strict=True)]
            reply["gap"] = float(max(gaps))
        return reply

    return repeat


def compile_step(setup: Setup) -> Repeat:
    """The training step of a model in a directory."""
    return compiling(load_config(Path(setup["model"])), setup["batch"], setup["length"])


def compile_engine(setup: Setup) -> Repeat:
    """The first completions of an engine, less what the same work takes when its programs are there."""
    directory, tokens = Path(setup["model"]), setup["length"]
    model = load_config(directory)
    engine = LocalEngine(
        EngineConfig(slots=setup["batch"]),
        model,
        load_params(directory, model),
        Tokenizer(directory),
        context=tokens + 8,
        model="benchmark",
        weights="benchmark",
    )

    def seconds(number: int) -> float:
        prompts = np.random.default_rng(number).integers(0, model.vocab_size, (setup["batch"], tokens), dtype=np.int32)
        requests = [Request(ids, Sampling(1.0, 8, (), seed=0)) for ids in prompts]

        async def everyone() -> None:
            await asyncio.gather(*(engine.generate(request) for request in requests))

        started = time.perf_counter()
        asyncio.run(everyone())
        return time.perf_counter() - started

    def repeat(index: int) -> Reply:
        first = seconds(0)
        return {"seconds": first - seconds(1)}

    return repeat


def build(setup: Setup) -> tuple[Repeat, Reply]:
    if "cache" in setup:
        os.environ["AGENTARK_CACHE"] = setup["cache"]
        enable_compilation_cache()
    sides = {
        "grading": grading,
        "prm_scoring": prm_scoring,
        "compile_step": compile_step,
        "compile_engine": compile_engine,
    }
    return sides[setup["side"]](setup), {"threads": os.cpu_count()}


if __name__ == "__main__":
    serve(build)
