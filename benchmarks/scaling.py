"""Bytes that a device sends in a training step, on 8 to 256 TPUs, counted in the compiled program, against theory.

The step is the one that trains, with a row per device of `data` and `fsdp`, compiled by the TPU compiler for devices
that are not there. Theory is the least that the mesh asks for:

- weights: `fsdp` divides them, so the layers are gathered for the forward and for the backward pass, the head once
  (its scores and its gradients are computed together), all in the compute dtype;
- gradients: reduced over `fsdp` to the device that keeps them, those of layers in the compute dtype, the head's in
  float32 (it is a sum over chunks); then all-reduced over `data`;
- activations: over `fsdp` the embeddings of all tokens change places, there and back; over `tensor` each layer sums its
  two results forward, two gradients backward and, where remat recomputes it, the first result again; so are the
  embeddings and the gradient of the head's input (this one in float32).

Norms and scalars are left out. What the program sends beyond that is named in the checks.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from agentark_jax.errors import UsageError
from agentark_jax.models.config import ModelConfig
from agentark_jax.models.flops import head_params, matmul_params
from agentark_jax.models.published import describe
from agentark_jax.models.source import ModelSourceConfig
from agentark_jax.preflight import compiler_environment, topology
from agentark_jax.training.config import FitConfig, MeshConfig
from benchmarks.collectives import Collective
from benchmarks.results import Check, Comparison, Measured, Ratio, Spread, environment
from benchmarks.workers import Reply, Side, Worker

NAME = "scaling"
WEIGHTS, GRADIENTS, ACTIVATIONS, TOTAL = "weights", "gradients", "activations", "total"
THEORY = "theory, "
FP32 = 4
_PADDED = 1.01  # the head's gradient may have so many times the rows of the vocabulary

Bytes = dict[str, float]


@dataclass(frozen=True)
class Case:
    """A model on a topology; a row of `row_length` tokens per device of data and fsdp."""

    source: str
    topology: str
    data: int = 1
    tensor: int = 1
    row_length: int = 2560
    remat: str = "full"

    @property
    def name(self) -> str:
        """Of its result file: model, topology and mesh."""
        sizes = self.mesh.sizes(topology(self.topology).devices)
        mesh = "_".join(f"{axis}{size}" for axis, size in sizes.items() if size > 1)
        return f"{NAME}.{self.source.rsplit('-', 1)[-1].lower().replace('.', '_')}_{self.topology}_{mesh}"

    @property
    def mesh(self) -> MeshConfig:
        return MeshConfig(self.data, -1, self.tensor)

    @property
    def model(self) -> ModelConfig:
        """Raises UsageError where a row is as long as a parameter or a part of it: the two could not be told apart."""
        model = describe(ModelSourceConfig(self.source))
        widths = (model.hidden_size, model.intermediate_size, model.num_heads * model.head_dim, model.vocab_size)
        parts = {1, *self.mesh.sizes(topology(self.topology).devices).values()}
        if self.row_length in {width / part for width in widths for part in parts}:
            raise UsageError(
                f"{NAME}: rows of {self.row_length} are as long as parameters of {self.source} are wide; choose another"
                " length"
            )
        return model

    @property
    def fit(self) -> FitConfig:
        sizes = self.mesh.sizes(topology(self.topology).devices)
        return FitConfig(
            rows=sizes["data"] * sizes["fsdp"],
            row_length=self.row_length,
            compute_dtype="bfloat16",
            remat=self.remat,
            mesh=self.mesh,
        )


SMALL, MIDDLE, LARGE = (f"Qwen/Qwen3-{size}" for size in ("0.6B", "1.7B", "8B"))
QUICK = (Case(SMALL, "v5e-8"),)
CASES = (
    *QUICK,
    Case(SMALL, "v5e-8", tensor=2),
    Case(SMALL, "v5e-64"),
    Case(SMALL, "v5e-64", data=8),
    Case(SMALL, "v5e-256", data=32),
    Case(MIDDLE, "v5e-8"),
    Case(MIDDLE, "v5e-32"),
    Case(LARGE, "v5p-64"),
    Case(LARGE, "v5e-64", tensor=4),
    Case(LARGE, "v5e-256", data=8),
)
AT_ONCE = 2
_REDUCED = "gradients all-reduced where each device keeps a part"


def run(model: Path, name: str, *, quick: bool, peers: bool, say: Callable[[str], None]) -> Iterator[Comparison]:
    """`model` and `peers` play no part: the shapes are published ones, and nobody is compared with.

    Raises UsageError when libtpu is missing, AgentArkError when a step does not compile or its text cannot be read.
    """
    before = environment()
    cases = QUICK if quick else CASES
    compiler_environment(topology(cases[0].topology))  # says what is missing before anything is started
    with ThreadPoolExecutor(AT_ONCE) as threads:
        for case, reply in zip(cases, threads.map(compiled, cases), strict=True):
            say(f"{case.name}: compiled in {reply['seconds']:.0f} s")
            yield result(case, reply, quick, before)


def compiled(case: Case) -> Reply:
    """What `tpu_side` finds, from a process of its own."""
    setup = {"source": case.source, "topology": case.topology, "fit": asdict(case.fit)}
    with Worker(Side(case.name, "benchmarks.tpu_side", setup)) as worker:
        return worker.repeat(0)


def result(case: Case, reply: Reply, quick: bool, before: Mapping[str, Any]) -> Comparison:
    """A result file's content from what was compiled."""
    model, fit, where = case.model, case.fit, topology(case.topology)
    sizes = case.mesh.sizes(where.devices)
    collectives = [Collective(**one) for one in reply["collectives"]]
    found = by_purpose(collectives, model, fit, sizes["tensor"])
    least = theory(model, fit, sizes)
    words = f"{sizes['data']} data × {sizes['fsdp']} fsdp × {sizes['tensor']} tensor"
    measured, ratios = [], []
    for purpose, count in found.items():
        measured.append(Measured(purpose, f"{purpose}, sent by a device in a step", "GB", _one(count / 1e9)))
        wanted = least.get(purpose, 0.0)
        measured.append(Measured(THEORY + purpose, f"{purpose}, by theory", "GB", _one(wanted / 1e9)))
        if wanted:
            ratios.append(Ratio(purpose, THEORY + purpose, _one(count / wanted), None))
    measured.append(Measured("compilation", "compilation", "s", _one(reply["seconds"])))
    measured.append(Measured("memory", "temporary memory of a device", "GB", _one(reply["temporary_bytes"] / 1e9)))
    return Comparison(
        benchmark=case.name,
        title=f"Scaling: {case.source} on {where.words}, {words}",
        quick=quick,
        model={"name": case.source, "topology": case.topology, "dtype": fit.compute_dtype},
        sizes={"devices": where.devices, **sizes, "rows": fit.rows, "row_length": fit.row_length, "at_once": AT_ONCE},
        measured=measured,
        ratios=ratios,
        checks=[Check(what, count / 1e9, None) for what, count in surplus(collectives, model, fit, sizes)],
        environment=dict(before),
    )


def _one(value: float) -> Spread:
    """A count has no spread."""
    return Spread.of([value])


def theory(model: ModelConfig, fit: FitConfig, sizes: Mapping[str, int]) -> Bytes:
    """Bytes that one device sends at least in a step of one micro-batch, by purpose and in all; see the module."""
    data, fsdp, tensor = sizes["data"], sizes["fsdp"], sizes["tensor"]
    width = jnp.dtype(fit.compute_dtype).itemsize
    layers, head = matmul_params(model) / tensor, head_params(model) / tensor
    tables = head if model.tie_embeddings else 2 * head
    tokens = fit.rows // (data * fsdp) * fit.row_length
    activations = tokens * model.hidden_size
    over_fsdp, over_tensor = (fsdp - 1) / fsdp, 2 * (tensor - 1) / tensor
    # Embeddings are looked up where they lie, so their gradient is summed there and nothing of its size travels.
    reduced = layers * width + head * FP32
    kept = (layers * width + tables * FP32) / fsdp
    sums = 4 + (fit.remat == "full")
    found = {
        WEIGHTS: (2 * layers + head) * width * over_fsdp,
        GRADIENTS: reduced * over_fsdp + 2 * kept * (data - 1) / data,
        ACTIVATIONS: activations * over_fsdp * 2 * width
        + activations * over_tensor * (width * (sums * model.num_layers + 1) + FP32),
    }
    return {**found, TOTAL: sum(found.values())}


def by_purpose(collectives: Sequence[Collective], model: ModelConfig, fit: FitConfig, tensor: int) -> Bytes:
    """What one device sends in a step, by purpose and in all."""
    found = dict.fromkeys((WEIGHTS, GRADIENTS, ACTIVATIONS), 0.0)
    for one in collectives:
        found[purpose(one, model, fit, tensor)] += one.total
    return {**found, TOTAL: sum(found.values())}


def purpose(one: Collective, model: ModelConfig, fit: FitConfig, tensor: int) -> str:
    """What an exchange is for, by its shape and kind: rows of tokens are as long as no parameter is wide.

    A short ring is not left in a loop. What it passes around are weights where the array has an axis of length 1, the
    place of the part among all, and sums of gradients where it has none.
    """
    sizes = [int(size) for group in re.findall(r"\[([\d,]+)\]", one.shape) for size in group.split(",")]
    kind = one.ring or one.kind
    rows = model.vocab_size // tensor
    if not any(rows <= size <= _PADDED * rows for size in sizes) and (
        kind == "all-to-all" or "shard_map" in one.where or {fit.row_length, fit.row_length - 1} & set(sizes)
    ):
        return ACTIVATIONS
    unrolled = kind == "collective-permute" and 1 in sizes
    return WEIGHTS if kind == "all-gather" or unrolled else GRADIENTS


def surplus(
    collectives: Sequence[Collective], model: ModelConfig, fit: FitConfig, sizes: Mapping[str, int]
) -> list[tuple[str, float]]:
    """(what, bytes) that a device sends without need, the most first; what makes up less than 1 % is left out."""
    found: Counter[str] = Counter()
    for one in collectives:
        what = purpose(one, model, fit, sizes["tensor"])
        array = re.sub(r"^\((.*)\)$", r"\1", one.shape)
        if what == WEIGHTS and fit.compute_dtype == "bfloat16" and array.startswith("f32"):
            found[f"weights gathered in float32, {array}"] += one.total / 2
        if what == GRADIENTS and one.kind == "all-reduce" and one.group > sizes["data"] and sizes["fsdp"] > 1:
            found[f"{_REDUCED}, {array}"] += one.total / 2
        if what == ACTIVATIONS and one.kind == "all-gather" and not array.startswith("s"):
            found[f"activations gathered, {array}"] += one.total
    sent, wanted = by_purpose(collectives, model, fit, sizes["tensor"]), theory(model, fit, sizes)
    named = sum(count for what, count in found.items() if what.startswith(_REDUCED))
    found["weights sent beyond one gathering forward and one backward"] = max(0.0, sent[WEIGHTS] - wanted[WEIGHTS])
    found["gradients sent beyond one reduction"] = max(0.0, sent[GRADIENTS] - wanted[GRADIENTS] - named)
    return [(f"GB without need: {what}", count) for what, count in found.most_common(6) if count > 0.01 * sent[TOTAL]]
