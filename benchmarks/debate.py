"""A whole debate: the protocol, the embedded engine and the trace store against the same calls in `transformers`.

Some word problems, every one debated by a few agents in a few rounds. Answers are sampled and none stops early, so that
all have the same length. The cases are the layouts of a later round's prompt: `own_first` begins with what the agent
itself said, `shared_first` with what all said, which agents who see the same answers share.

The peer gets the prompts that our side made: what is said in a round stands in the prompts of the next, so both sides
read the same tokens and generate as many. The floor counts every different beginning of a prompt once, in whatever call
it stands, then the decode steps as in `generation`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from agentark_jax.errors import AgentArkError
from agentark_jax.models.config import ModelConfig, load_config
from agentark_jax.models.flops import Flops, attention_flops, matmul_params
from benchmarks import peers as environments
from benchmarks.generation import OURS, TRANSFORMERS, compare_tokens, decoding, machine, schedule, step_seconds
from benchmarks.results import (
    MACHINE,
    Check,
    Comparison,
    Group,
    Measured,
    Result,
    Spread,
    environment,
    rates_of,
    ratios_of,
    rows_of,
)
from benchmarks.workers import Reply, Side, Worker, interleaved

NAME = "debate"
DESCRIPTIONS = {
    OURS: "agentark_jax: protocol, embedded engine, trace store",
    TRANSFORMERS: "transformers.generate, one batch per round, and its texts",
}
GOALS: Mapping[str, Mapping[str, float | None]] = {
    "own_first": {TRANSFORMERS: None},
    "shared_first": {TRANSFORMERS: 3.0},
}
PARTS = {"prefill": "prefill of prompts", "decode": "decode steps", "host": "all else"}
TEMPERATURE, SEED = 0.8, 0

Rounds = Sequence[Sequence[Sequence[int]]]
"""The prompts of every round's calls, by question and agent."""


@dataclass(frozen=True)
class Sizes:
    """`new_tokens` are those of every call."""

    questions: int = 8
    agents: int = 3
    rounds: int = 2
    new_tokens: int = 48
    repetitions: int = 3

    @property
    def calls(self) -> int:
        """Of one round; all of them are in flight at once."""
        return self.questions * self.agents


def run(
    model: Path, name: str, *, quick: bool, peers: bool, say: Callable[[str], None]
) -> Iterator[Result | Comparison]:
    """For each layout the speeds, then where our time goes. Raises AgentArkError when the sides do other work."""
    sizes = Sizes(questions=2, new_tokens=6, repetitions=1) if quick else Sizes()
    for layout in GOALS:
        yield from measure(layout, sizes, model, name, quick=quick, peers=peers, say=say)


def measure(
    layout: str, sizes: Sizes, model: Path, name: str, *, quick: bool, peers: bool, say: Callable[[str], None]
) -> Iterator[Result | Comparison]:
    """One layout. Raises AgentArkError when the sides do other work."""
    config = load_config(model)
    before = environment({"trl": environments.versions("trl")} if peers else {})
    common = {"model": str(model), "new_tokens": sizes.new_tokens, "temperature": TEMPERATURE}
    debating = {**common, **asdict(sizes), "layout": layout, "seed": SEED}
    ours = Side(OURS, "benchmarks.debate_ours", debating)
    say(f"{layout}: a first debate, for its prompts")
    with Worker(ours) as worker:
        rounds: Rounds = worker.repeat(0)["rounds"]
    sides = [Side(MACHINE, "benchmarks.jax_sides", machine(config, sizes.calls)), ours]
    if peers:
        asked = {**common, "side": "debate", "rounds": rounds}
        sides.append(Side(TRANSFORMERS, "benchmarks.transformers_generation", asked, environments.python("trl")))
    checks: list[Check] = []

    def check(replies: dict[str, Reply]) -> None:
        if replies[OURS]["rounds"] != rounds:
            raise AgentArkError(f"{NAME}: our side's prompts are not those of its first debate")
        if peers:
            checks.extend(compare_tokens(replies[OURS]["greedy"], replies[TRANSFORMERS]["greedy"], TRANSFORMERS))

    measured = [interleaved(sides, sizes.repetitions, check, say)]
    check_work(measured, rounds, sizes.new_tokens)
    begun = beginnings([prompt[:-1] for prompts in rounds for prompt in prompts])
    steps = [step for prompts in rounds for step in decode_steps(prompts, sizes.new_tokens)]
    identity: dict[str, Any] = {"quick": quick, "model": {"name": name, "model_type": config.model_type}}
    counted = {"prompt_tokens": sum(len(prompt) for prompts in rounds for prompt in prompts)}
    counted["different_prompt_tokens"] = len(begun)

    def floor_seconds(side: str, able: Reply) -> float:
        prefill = sum(reading(config, begun).values()) / able["rates"]["prefill"]
        return prefill + sum(step_seconds(config, step, able["rates"], able["bandwidth"]) for step in steps)

    yield Result(
        benchmark=f"{NAME}.{layout}",
        title=f"A whole debate, {layout}",
        unit="questions/min",
        sizes={**asdict(sizes), **counted},
        rows=rows_of(
            measured,
            DESCRIPTIONS,
            lambda side: decoding(config, steps, reading(config, begun)),
            floor_seconds,
            60 * sizes.questions,
        ),
        ratios=ratios_of(measured, OURS, GOALS[layout]),
        checks=checks,
        rates=rates_of(measured),
        environment=before,
        **identity,
    )
    yield Comparison(
        benchmark=f"{NAME}.{layout}_time",
        title=f"A whole debate, {layout}: where our time goes",
        sizes={**asdict(sizes), **counted},
        measured=[Measured(part, what, "% of the time", shares(measured, part)) for part, what in PARTS.items()],
        ratios=[],
        checks=[],
        environment=before,
        **identity,
    )


def decode_steps(prompts: Sequence[Sequence[int]], new_tokens: int) -> list[list[int]]:
    """The positions that the steps of one round read."""
    return schedule([len(prompt) for prompt in prompts], [new_tokens] * len(prompts), len(prompts))


def beginnings(bodies: Sequence[Sequence[int]]) -> list[int]:
    """The positions of all tokens that have to be read, each different beginning of a body once."""
    positions: list[int] = []
    for before, body in pairwise([[], *sorted(map(list, bodies))]):
        differs = [one != other for one, other in zip(before, body, strict=False)]
        shared = differs.index(True) if True in differs else len(differs)
        positions += range(shared, len(body))
    return positions


def reading(config: ModelConfig, positions: Sequence[int]) -> Flops:
    """Keys and values of prompt tokens at these positions."""
    return {"trunk": 2 * matmul_params(config) * len(positions), "attention": attention_flops(config, positions)}


def check_work(measured: Sequence[Group], rounds: Rounds, new_tokens: int) -> None:
    """Raises AgentArkError when a side made other calls in some repetition, or read or said more or less in them."""
    calls = sum(map(len, rounds))
    prompts = sum(len(prompt) for prompts in rounds for prompt in prompts)
    wanted = {"calls": calls, "prompt_tokens": prompts, "new_tokens": calls * new_tokens}
    for group in measured:
        for side, replies in group.items():
            for index, reply in enumerate(replies):
                found = {key: reply.get(key) for key in wanted}
                if side != MACHINE and found != wanted:
                    raise AgentArkError(f"{NAME}: {side} did other work in repetition {index}: {found}, not {wanted}")


def shares(measured: Sequence[Group], part: str) -> Spread:
    """Of our side's time, in per cent."""
    return Spread.of([100 * reply["parts"][part] / reply["seconds"] for group in measured for reply in group[OURS][1:]])
