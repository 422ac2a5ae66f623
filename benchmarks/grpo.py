"""A whole step of GRPO, from the policy's rollouts to the updated policy: ours against TRL's `GRPOTrainer`.

Equal weights, prompts of equal length, groups, temperature, loss and optimizer, fp32; no reference model. No rollout
stops early, so both train on the same number of tokens; a reward that costs nothing is given for each. Before any
timing both say what probability the same text has.

The floor is what a step cannot do without: prefill of every prompt once, the decode steps of all rollouts together
(the larger of FLOPs over rate and bytes over bandwidth), and one forward and backward pass over prompts and rollouts
with the head where rollouts are. Not in it: the optimizer's memory traffic, and scoring rollouts before the update,
which our loop does (it checks that engine and trainer agree) and TRL skips.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from agentark_jax.data.render import PlainFormat
from agentark_jax.data.tokenizer import Tokenizer
from agentark_jax.errors import AgentArkError, require
from agentark_jax.models.config import ModelConfig, load_config
from agentark_jax.models.flops import Flops, decode_bytes, decode_flops, prefill_flops, sft_flops
from agentark_jax.tasks.config import TaskConfig
from agentark_jax.tasks.word_problems import WordProblems
from benchmarks import peers as environments
from benchmarks.results import MACHINE, Check, Result, environment, rates_of, ratios_of, rows_of
from benchmarks.workers import Reply, Side, interleaved

NAME = "grpo"
OURS, PEER = "agentark_jax", "TRL"
DESCRIPTIONS = {OURS: "agentark_jax, embedded engine", PEER: "TRL, GRPOTrainer with transformers.generate"}
GOALS = {PEER: 2.0}
LOGPROB_LIMIT = 1e-4
SHOTS = 4


@dataclass(frozen=True)
class Sizes:
    """`rows` and `micro_batch`: completions of a forward pass on our side and on TRL's, `torch_compile` is TRL's.

    All 32 at once would save each side one sum of gradients, but the two together would not fit into 24 GB.
    """

    prompts: int = 4
    group_size: int = 8
    prompt_tokens: int = 64
    new_tokens: int = 32
    rows: int = 16
    micro_batch: int = 16
    torch_compile: bool = False
    repetitions: int = 3

    def __post_init__(self) -> None:
        rest = self.rollouts % self.micro_batch
        require(rest == 0, "micro_batch", self.micro_batch, f"a divisor of the {self.rollouts} rollouts")

    @property
    def rollouts(self) -> int:
        return self.prompts * self.group_size

    @property
    def tokens(self) -> int:
        """Sampled in a step, and trained on."""
        return self.rollouts * self.new_tokens


QUICK = Sizes(prompts=2, group_size=4, new_tokens=8, rows=8, micro_batch=8, repetitions=1)


def run(model: Path, name: str, *, quick: bool, peers: bool, say: Callable[[str], None]) -> Iterator[Result]:
    """Raises AgentArkError when the sides score a text differently, or train on other numbers of tokens."""
    sizes = QUICK if quick else Sizes()
    config = load_config(model)
    setup = setup_of(model, sizes)
    before = environment(peers={"trl": environments.versions("trl")} if peers else {})
    shapes = {
        "trunk": (1024, config.hidden_size, config.intermediate_size),
        "decode": (sizes.rollouts, config.hidden_size, config.intermediate_size),
        "decode head": (sizes.rollouts, config.hidden_size, config.vocab_size),
        "head": (256, config.hidden_size, config.vocab_size),
    }
    machine = {"side": MACHINE, "shapes": shapes, "seconds": 0.5, "bandwidth_bytes": 2**29}
    sides = [Side(MACHINE, "benchmarks.jax_sides", machine), Side(OURS, "benchmarks.grpo_side", setup)]
    if peers:
        sides.append(Side(PEER, "benchmarks.grpo_trl_side", setup, python=environments.python("trl")))
    checks: list[Check] = []

    def check(replies: dict[str, Reply]) -> None:
        checks.extend(compare({side: reply for side, reply in replies.items() if side != MACHINE}, sizes))

    measured = [interleaved(sides, sizes.repetitions, check, say)]
    for replies in zip(*(measured[0][side.name] for side in sides[1:]), strict=True):
        compare_tokens({side.name: reply for side, reply in zip(sides[1:], replies, strict=True)}, sizes)
    gap = max(reply["logprob_gap"] for reply in measured[0][OURS])
    checks.append(Check("our rollouts' log-probabilities, engine against trainer, largest difference", gap, None))
    yield Result(
        benchmark=NAME,
        title="A GRPO step",
        unit="rollout tokens/s",
        quick=quick,
        model={"name": name, "model_type": config.model_type},
        sizes={**asdict(sizes), "tokens": sizes.tokens},
        rows=rows_of(
            measured,
            DESCRIPTIONS,
            lambda side: flops(config, sizes),
            lambda side, able: floor_seconds(config, sizes, able["rates"], able["bandwidth"]),
            sizes.tokens,
        ),
        ratios=ratios_of(measured, OURS, GOALS),
        checks=[*checks, *shares(measured[0])],
        rates=rates_of(measured),
        environment=before,
    )


def setup_of(model: Path, sizes: Sizes) -> dict[str, Any]:
    """What both sides are told."""
    tokenizer = Tokenizer(model)
    steps = sizes.repetitions + 2  # one is the warm-up, and the last is never begun: it would end the loop
    texts = texts_of(tokenizer, sizes.prompts * steps, sizes.prompt_tokens)
    return {
        **asdict(sizes),
        "model": str(model),
        "steps": steps,
        "texts": texts,
        "scored": [*beginning(tokenizer), *tokenizer.encode("".join(texts[:2]))],
        "learning_rate": 1e-6,
        "weight_decay": 0.01,
        "clip_norm": 1.0,
    }


def beginning(tokenizer: Tokenizer) -> list[int]:
    return [] if tokenizer.bos_id is None else [tokenizer.bos_id]


def texts_of(tokenizer: Tokenizer, count: int, length: int) -> list[str]:
    """So many few-shot word problems of `length` tokens, a beginning-of-sequence token included where there is one.

    They are cut on the left. Texts whose tokens change when they are read again are left out, so that a side that is
    given texts has the same ids as one that is given ids.
    """
    questions = WordProblems(TaskConfig()).questions("held_out", 3 * count + SHOTS)
    own = length - len(beginning(tokenizer))
    found: list[str] = []
    for place in range(3 * count):
        solved = [
            f"{PlainFormat.QUESTION.format(question=each.prompt)}{PlainFormat.ANSWER} {each.rationale}\n"
            for each in questions[place + 1 : place + 1 + SHOTS]
        ]
        text = "".join(solved) + PlainFormat.QUESTION.format(question=questions[place].prompt) + PlainFormat.ANSWER
        cut = tokenizer.decode(tokenizer.encode(text)[-own:])
        if len(tokenizer.encode(cut)) == own:
            found.append(cut)
        if len(found) == count:
            return found
    raise AgentArkError(f"{NAME}: only {len(found)} of {count} prompts of {length} tokens could be made")


def decode_positions(sizes: Sizes) -> Iterator[list[int]]:
    """What each decode step reads: at first the last token of every prompt, never the last new one."""
    for step in range(sizes.new_tokens):
        yield [sizes.prompt_tokens - 1 + step] * sizes.rollouts


def flops(config: ModelConfig, sizes: Sizes) -> Flops:
    """The work of a step by its parts."""
    length = sizes.prompt_tokens + sizes.new_tokens
    training = sft_flops(config, lengths=[length] * sizes.rollouts, loss_tokens=sizes.tokens, train_head=True)
    decoding = [decode_flops(config, positions) for positions in decode_positions(sizes)]
    return {
        "prefill": sum(prefill_flops(config, [sizes.prompt_tokens] * sizes.prompts).values()),
        "decode": sum(step["trunk"] + step["attention"] for step in decoding),
        "decode head": sum(step["head"] for step in decoding),
        "trunk": training["trunk"] + training["attention"],
        "head": training["head"],
    }


def floor_seconds(config: ModelConfig, sizes: Sizes, rates: Mapping[str, float], bandwidth: float) -> float:
    """`rates` in FLOP/s of the products named trunk, decode, decode head and head; `bandwidth` in bytes/s."""
    work = flops(config, sizes)
    seconds = (work["prefill"] + work["trunk"]) / rates["trunk"] + work["head"] / rates["head"]
    for positions in decode_positions(sizes):
        step = decode_flops(config, positions)
        computing = (step["trunk"] + step["attention"]) / rates["decode"] + step["head"] / rates["decode head"]
        seconds += max(computing, decode_bytes(config, positions) / bandwidth)
    return seconds


def compare(replies: Mapping[str, Reply], sizes: Sizes) -> list[Check]:
    """Raises AgentArkError where weights or tokens are not the same on all sides."""
    compare_tokens(replies, sizes)
    if len(replies) < 2:
        return []
    said = np.asarray([reply["logprobs"] for reply in replies.values()])
    difference = float(np.ptp(said, axis=0).max())
    if not difference <= LOGPROB_LIMIT:
        raise AgentArkError(
            f"{NAME}: {', '.join(replies)} give the tokens of one text log-probabilities that differ by up to "
            f"{difference:.2g} (at most {LOGPROB_LIMIT:g} may be); speed says nothing before the sides agree"
        )
    return [Check("log-probabilities of the same text, largest difference of a token", difference, LOGPROB_LIMIT)]


def compare_tokens(replies: Mapping[str, Reply], sizes: Sizes) -> None:
    """Raises AgentArkError where a side did not sample, or did not train on, the tokens that it was to."""
    for side, reply in replies.items():
        if not reply["sampled"] == reply["trained"] == sizes.tokens:
            raise AgentArkError(
                f"{NAME}: {side} sampled {reply['sampled']} tokens and trained on {reply['trained']}; wanted "
                f"{sizes.tokens}: rollouts that stop early, or groups that earn the same, make less work"
            )


def shares(group: Mapping[str, Sequence[Reply]]) -> list[Check]:
    """Where the time of each side goes, as shares of its steps; what it does not name is `training and the rest`."""
    checks = []
    for side, replies in group.items():
        if side == MACHINE:
            continue
        seconds = sum(reply["seconds"] for reply in replies[1:])
        parts = {name: sum(reply["parts"][name] for reply in replies[1:]) for name in replies[0]["parts"]}
        parts["training and the rest"] = seconds - sum(parts.values()) + parts.pop("training", 0.0)
        checks += [Check(f"{side}: share of a step in {name}", value / seconds, None) for name, value in parts.items()]
    return checks
