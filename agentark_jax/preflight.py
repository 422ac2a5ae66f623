"""What a fit will need, before a device is paid for: parameters, work and memory on a named topology.

State bytes are counted from shapes and shardings. What a step needs beyond them comes from the compiler of the platform
where that runs without the device (TPU: libtpu; CPU), in a process of its own, since its settings must be there before
JAX starts; on GPUs it comes from a model of the activations. Nothing here allocates an array.
"""

import importlib.util
import json
import math
import os
import pickle
import re
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict
from jax.experimental import topologies
from jax.sharding import AbstractMesh

from agentark_jax.errors import AgentArkError, UsageError
from agentark_jax.models import lora
from agentark_jax.models.attention import AttentionPlan
from agentark_jax.models.blocked import block_size
from agentark_jax.models.config import ModelConfig, Remat
from agentark_jax.models.flops import Flops, head_params, matmul_params, sft_flops
from agentark_jax.models.sharding import MESH_AXES, row_sharding
from agentark_jax.models.transformer import param_shapes
from agentark_jax.objectives.base import Objective
from agentark_jax.objectives.chunked import portions
from agentark_jax.objectives.grpo import GRPO
from agentark_jax.objectives.sft import SFT
from agentark_jax.training.config import FitConfig
from agentark_jax.training.mesh import check_mesh, fit_attention, make_mesh, param_shardings
from agentark_jax.training.rl_config import RLConfig
from agentark_jax.training.state import FlatParams, abstract_state, make_optimizer, partition, state_shardings
from agentark_jax.training.step import make_step

GIB = 2**30
_STEPS = 1000  # of the learning-rate schedule; no size depends on it
_TERM = "completion"

# What a TPU slice is called, how many chips it has, the GiB of HBM of one chip that a program can use, and the chips'
# arrangement by their number. Google counts v5p by cores, two to a chip, and the others by chips.
_FLAT = {4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
_CUBE = {4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8"}
_TPUS: Mapping[str, tuple[str, int, float, Mapping[int, str]]] = {
    "v5e": ("v5litepod", 1, 15.75, _FLAT),
    "v5p": ("v5p", 2, 95.0, _CUBE),
    "v6e": ("v6e", 1, 31.25, _FLAT),
}
_GPU_MODEL = (
    "a model of the activations, no compiler: gradients, what remat keeps, one layer (with all scores where xla "
    "computes attention), the gathered weights of one repetition of the layers, the gathered head, chunks of logits"
)
_GPU_SHARE = 0.9  # the rest is left to the driver, collectives and fragmentation


@dataclass(frozen=True)
class Topology:
    """Devices by name. `memory` is what a program can use of each, in bytes; the last two are libtpu's names."""

    name: str
    platform: Literal["tpu", "gpu", "cpu"]
    devices: int
    memory: int
    words: str
    arrangement: str = ""
    accelerator: str = ""


def topology(name: str) -> Topology:
    """The topology called `v5e-16`, `v5p-8`, `v6e-8`, `8xH100-80GB` or `cpu-8`. Raises UsageError for another name."""
    if match := re.fullmatch(r"(v5e|v5p|v6e)-(\d+)", name):
        generation, number = match[1], int(match[2])
        accelerator, cores, memory, arrangements = _TPUS[generation]
        chips = number // cores
        if number % cores or chips not in arrangements:
            names = ", ".join(f"{generation}-{known * cores}" for known in arrangements)
            raise UsageError(f"--topology {name}: there is no such slice; choose one of {names}")
        words = f"{chips} TPU {generation} chips ({arrangements[chips]})"
        if cores > 1:
            words += f", counted as {number} cores in the name"
        slice_name = f"{generation}:{arrangements[chips]}"
        return Topology(name, "tpu", chips, int(memory * GIB), words, slice_name, f"{accelerator}-{number}")
    if match := re.fullmatch(r"([1-9]\d*)x(\w+)-([1-9]\d*)GB", name):
        number, kind, gigabytes = int(match[1]), match[2], int(match[3])
        words = f"{number} {kind} GPUs of {gigabytes} GiB, a tenth left to driver and collectives"
        return Topology(name, "gpu", number, int(_GPU_SHARE * gigabytes * GIB), words)
    if match := re.fullmatch(r"cpu-([1-9]\d*)", name):
        number = int(match[1])
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return Topology(name, "cpu", number, memory // number, f"{number} CPU devices that share this machine's memory")
    raise UsageError(
        f"--topology {name!r} is unknown; give a TPU slice (v5e-16, v5p-8, v6e-8), GPUs by number, kind and memory "
        "(8xH100-80GB), or CPU devices (cpu-8)"
    )


@dataclass(frozen=True)
class StepMemory:
    """Bytes on one device during a step: `total`, the state included, according to `source`.

    `over` says that a compiler refused the program for its memory; `total` is then the least that it asked for.
    """

    total: int
    source: str
    over: bool = False


@dataclass(frozen=True)
class Report:
    """Everything a dry run finds. Bytes are those of one device; `flops` those of one full row without padding."""

    model_name: str
    model: ModelConfig
    fit: FitConfig
    topology: Topology
    sizes: Mapping[str, int]
    parameters: int
    trainable: int
    parameter_bytes: int
    optimizer_bytes: int
    flops: Flops
    attention: str
    step: StepMemory

    @property
    def state_bytes(self) -> int:
        return self.parameter_bytes + self.optimizer_bytes

    @property
    def fits(self) -> bool:
        return not self.step.over and self.step.total <= self.topology.memory


def preflight(
    name: str,
    model: ModelConfig,
    fit: FitConfig,
    where: Topology,
    rl: RLConfig | None = None,
    key: str = "fit",
    judge: ModelConfig | None = None,
) -> Report:
    """The report on one fit of a model on a topology; `key` is what messages call the fit.

    With `rl` it is the fit of a policy: two micro-batches of its rows, beside the starting policy and a process reward
    model of the shape of `judge` (None: of the same), where these are needed, in the dtype that is computed in.

    Raises UsageError for a mesh, rows or a row length that do not go with model and topology, or for a missing
    compiler; AgentArkError when compiling fails for another reason than memory.
    """
    if rl is not None:
        fit = replace(fit, rows=2 * fit.rows, accumulation=2)
    if fit.row_length > model.max_positions:
        raise UsageError(
            f"{key}.row_length: {fit.row_length} tokens, but {name} has {model.max_positions} positions; shorten the "
            "rows"
        )
    try:
        sizes = fit.mesh.sizes(where.devices)
        mesh = AbstractMesh(tuple(sizes.values()), MESH_AXES)
        model, trainable, frozen = _divided(model, fit)
        check_mesh(mesh, model, {**trainable, **frozen}, fit.rows, fit.accumulation)
    except UsageError as error:
        raise UsageError(f"{key}.{error}") from error
    optimizer = make_optimizer(fit, _STEPS)
    state = abstract_state(trainable, optimizer, state_shardings(mesh, optimizer, trainable))
    parameter_bytes = _device_bytes(state.params) + _device_bytes(_placed(frozen, param_shardings(mesh, frozen)))
    optimizer_bytes = _device_bytes((state.step, state.optimizer))
    beside = 0
    if rl is not None:
        others = [model] if rl.needs_reference and fit.lora is None else []
        others += [judge or model] if rl.needs_prm else []
        for other in others:
            shapes = _cast(flatten_dict(param_shapes(replace(other, lora=None)), sep="."), fit.compute_dtype)
            beside += _device_bytes(_placed(shapes, param_shardings(mesh, shapes)))
    head = "embedding" if model.tie_embeddings else "unembedding"
    if where.platform == "gpu":
        beyond = modelled_bytes(model, fit, sizes, _device_bytes(state.params))
        step = StepMemory(parameter_bytes + optimizer_bytes + beyond, _GPU_MODEL)
    else:
        step = compiled_memory(model, fit, where, rl)
    step = replace(step, total=step.total + beside)
    return Report(
        model_name=name,
        model=model,
        fit=fit,
        topology=where,
        sizes=sizes,
        parameters=_count({**trainable, **frozen}),
        trainable=_count(trainable),
        parameter_bytes=parameter_bytes + beside,
        optimizer_bytes=optimizer_bytes,
        flops=sft_flops(
            model,
            lengths=[fit.row_length],
            loss_tokens=fit.row_length,
            train_head=head in trainable,
            train_layers=fit.lora is None,
        ),
        attention=fit_attention(fit, model, where.platform)[1],
        step=step,
    )


def _divided(model: ModelConfig, fit: FitConfig) -> tuple[ModelConfig, FlatParams, FlatParams]:
    """(the model that is trained, its trainable parameters, its frozen ones), as shapes."""
    if fit.lora is None:
        return model, *partition(param_shapes(model), fit.freeze, last_layers=fit.last_layers)
    model = replace(model, lora=fit.lora)
    base, adapter = lora.split(param_shapes(model))
    return model, flatten_dict(adapter, sep="."), flatten_dict(base, sep=".")


def modelled_bytes(model: ModelConfig, fit: FitConfig, sizes: Mapping[str, int], trainable_bytes: int) -> int:
    """Bytes on one device beyond the state, where no compiler tells; `trainable_bytes` are its trained parameters.

    What remat keeps of every layer; with accumulation the sum of gradients; and then the larger of two phases. In that
    of the head: the head gathered with its fp32 gradient, two chunks of logits. In that of the layers: all gradients,
    the weights of one repetition of the layer pattern gathered in the compute dtype with their fp32 gradients, all
    activations of one layer (with the result of attention, two numbers per query, and keys and values repeated for the
    query groups; where no kernel computes it with a block's fp32 scores and their gradients besides).
    Without remat the backward pass keeps three fp32 arrays of every norm and two more of the inner MLP besides.
    """
    width = jnp.dtype(fit.compute_dtype).itemsize
    tensor = sizes["tensor"]
    tokens = fit.rows // fit.accumulation // (sizes["data"] * sizes["fsdp"]) * fit.row_length
    kv_heads = model.num_kv_heads / tensor if model.num_kv_heads % tensor == 0 else model.num_kv_heads
    heads, inner, hidden = model.num_heads / tensor, model.intermediate_size / tensor, model.hidden_size
    queries, keys = heads * model.head_dim, kv_heads * model.head_dim
    products = width * (queries + 2 * keys + 2 * inner + 2 * hidden)  # per token, as all below
    result = width * queries + 2 * 4 * heads
    plan, _ = fit_attention(fit, model, "gpu")
    in_blocks = any(plan.backend(kind) == "xla" for kind in model.layer_types)
    mixing = result + width * queries
    scores = heads * min(block_size(fit.row_length), fit.row_length) * (4 + 4 + width) if in_blocks else 0
    whole = products + width * (2 * queries + keys + inner + 4 * hidden) + mixing
    normed = hidden * (4 if model.sandwich_norms else 2) + (queries + keys if model.qk_norm else 0)
    by_remat: dict[Remat, float] = {
        "none": model.num_layers * (whole + 3 * 4 * normed + 2 * width * inner),
        "products": model.num_layers * (products + result),
        "outputs": model.num_layers * 2 * width * hidden,
        "full": 0,
    }
    saved = tokens * (by_remat[fit.remat] + model.num_layers * width * hidden)
    working = tokens * ((0 if fit.remat == "none" else whole) + mixing + scores)
    summed = trainable_bytes if fit.accumulation > 1 else 0
    weights = matmul_params(model) / model.num_layers * model.period / tensor * (width + 4)
    chunks = 2 * min(portions("gpu").chunk_bytes, 4 * tokens * model.vocab_size / tensor)
    head = head_params(model) / tensor * (width + 4) + chunks + 2 * tokens * hidden * width
    return math.ceil(summed + saved + max(trainable_bytes + weights + working, head))


def _cast(shapes: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    return {path: jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(dtype)) for path, leaf in shapes.items()}


def compiler_environment(where: Topology) -> dict[str, str]:
    """What the environment of a process must say, before JAX starts there, for it to compile for devices it lacks.

    Raises UsageError when libtpu is missing.
    """
    if where.platform == "tpu":
        if importlib.util.find_spec("libtpu") is None and not os.environ.get("TPU_LIBRARY_PATH"):
            raise UsageError(
                f"--topology {where.name} needs the TPU compiler, which runs without a TPU: pip install "
                "'agentark-jax[tpu]', or set TPU_LIBRARY_PATH to a libtpu.so"
            )
        return {
            "JAX_PLATFORMS": "cpu",
            "TPU_SKIP_MDS_QUERY": "1",
            "TPU_ACCELERATOR_TYPE": where.accelerator,
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # no device is used, so there is none to guard
        }
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={where.devices}"
    return {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags.strip()}


def compiled_memory(model: ModelConfig, fit: FitConfig, where: Topology, rl: RLConfig | None = None) -> StepMemory:
    """What the platform's own compiler needs for the step, from a process without devices.

    Raises UsageError when libtpu is missing, AgentArkError when the step does not compile.
    """
    environment = {**os.environ, **compiler_environment(where)}
    root = str(Path(__file__).parents[1])
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", __name__],
        input=pickle.dumps((model, fit, where, rl)),
        env=environment,
        capture_output=True,
    )
    if done.returncode:
        lines = [f"exit code {done.returncode}", *done.stderr.decode(errors="replace").splitlines()]
        reason = next((line for line in reversed(lines) if "Error: " in line), lines[-1])
        raise AgentArkError(f"the step does not compile for {where.name}: {reason}")
    answer = json.loads(done.stdout.splitlines()[-1])
    source = f"{answer['compiler']}, compiled in {time.monotonic() - started:.0f} s"
    return StepMemory(answer["total"], source, answer["over"])


def compile_step(model: ModelConfig, fit: FitConfig, where: Topology, rl: RLConfig | None = None) -> dict[str, Any]:
    """`compiled_memory` within its process: {total, over, compiler}."""
    compiler = f"the {where.platform.upper()} compiler"
    lowered = lower_step(model, fit, where, fit_attention(fit, model, where.platform)[0], rl)
    try:
        found = lowered.compile().memory_analysis()
    except jax.errors.JaxRuntimeError as error:
        figures = re.findall(r"\b(\d+(?:\.\d+)?)([KMGT])\b", str(error))
        if "RESOURCE_EXHAUSTED" not in str(error) or not figures:
            raise
        # Whatever else the message lists, what the program asks for is the largest.
        total = max(float(number) * 1024 ** ("KMGT".index(unit) + 1) for number, unit in figures)
        return {"total": int(total), "over": True, "compiler": compiler}
    assert found is not None, "compilers of all platforms tell"
    total = (
        found.argument_size_in_bytes
        + found.output_size_in_bytes
        - found.alias_size_in_bytes
        + found.temp_size_in_bytes
        + found.generated_code_size_in_bytes
    )
    return {"total": total, "over": False, "compiler": compiler}


def lower_step(
    model: ModelConfig, fit: FitConfig, where: Topology, attention: AttentionPlan, rl: RLConfig | None = None
) -> jax.stages.Lowered:
    """The step of a fit for the devices of a topology, of which none need be there."""
    if where.platform == "tpu":
        devices = topologies.get_topology_desc(where.arrangement, platform="tpu").devices
    else:
        devices = jax.devices()
    mesh = make_mesh(fit.mesh, devices)
    model, trainable, frozen = _divided(model, fit)
    optimizer = make_optimizer(fit, _STEPS)
    shardings = state_shardings(mesh, optimizer, trainable)
    rows = (fit.rows, fit.row_length)
    ids = jax.ShapeDtypeStruct(rows, jnp.int32, sharding=row_sharding(mesh))
    weights = jax.ShapeDtypeStruct(rows, jnp.float32, sharding=row_sharding(mesh))
    batch = {"ids": ids, "positions": ids, "segment_ids": ids, "weights": {_TERM: weights}}
    objective: Objective = SFT({_TERM: 1.0})
    if rl is not None:
        objective = GRPO(rl.loss(fit.row_length))
        batch |= dict.fromkeys(("advantages", "old_logprobs", "rollout_logprobs", "reference_logprobs"), weights)
    step = make_step(fit, model, objective, _STEPS, shardings, attention)
    return step.lower(
        abstract_state(trainable, optimizer, shardings), _placed(frozen, param_shardings(mesh, frozen)), batch
    )


def table(report: Report) -> str:
    """The report in words, ending with the verdict."""
    fit, step, devices = report.fit, report.step, report.topology.devices
    frozen = report.parameters - report.trainable
    trained = "all trained" if not frozen else f"{report.trainable:,} trained"
    per_token = {part: work / fit.row_length for part, work in report.flops.items()}
    parts = ", ".join(f"{part} {_giga(work)}" for part, work in per_token.items())
    micro = f" in {fit.accumulation} micro-batches" if fit.accumulation > 1 else ""
    lines = {
        "model": f"{report.model_name} ({report.model.model_type})",
        "topology": f"{report.topology.name}: {report.topology.words}",
        "mesh": " × ".join(f"{axis} {size}" for axis, size in report.sizes.items()),
        "step": f"{fit.rows} rows × {fit.row_length} tokens{micro}, {fit.compute_dtype}, remat {fit.remat}",
        "parameters": f"{report.parameters:,}, {trained}",
        "work per token": f"{_giga(sum(per_token.values()))} ({parts}; a full row, every token with loss)",
        "attention": report.attention,
        "state per device": f"{_gib(report.state_bytes)} (parameters {_gib(report.parameter_bytes)}, optimizer "
        f"{_gib(report.optimizer_bytes)}), {_gib(report.state_bytes * devices)} on all",
        "step per device": f"{_gib(step.total)}, of which {_gib(step.total - report.state_bytes)} beyond the state; "
        f"from {step.source}",
        "memory per device": _gib(report.topology.memory),
    }
    if step.over:
        lines["step per device"] = f"at least {_gib(step.total)}, which {step.source.split(',')[0]} refused"
    rows = [f"{name:<18}{words}" for name, words in lines.items()]
    if report.fits:
        share = step.total / report.topology.memory
        return "\n".join([*rows, f"{'verdict':<18}fits, with {share:.0%} of the memory"])
    limit = f"does not fit in {_gib(report.topology.memory)}: try {'; '.join(advice(report))}"
    return "\n".join([*rows, f"{'verdict':<18}{limit}"])


def advice(report: Report) -> list[str]:
    """What would need less memory, as keys to set, what costs least first."""
    fit, sizes = report.fit, report.sizes
    parts = sizes["data"] * sizes["fsdp"]
    found = []
    if sizes["data"] > 1:
        found.append("mesh.data: 1 with mesh.fsdp: -1, which divides the state over more devices")
    if fit.compute_dtype == "float32":
        found.append("fit.compute_dtype: bfloat16")
    if fit.remat != "full":
        found.append("fit.remat: full")
    if fit.rows // fit.accumulation > parts:
        found.append(f"fit.accumulation: {fit.rows // parts}, one row per device at a time")
    if fit.row_length > 512:
        found.append(f"shorter rows than fit.row_length: {fit.row_length}")
    if report.trainable == report.parameters:
        found.append("training less: LoRA, or fit.freeze: [embedding], whose parameters need no optimizer state")
    return [*found, f"more devices than the {report.topology.devices} of {report.topology.name}"]


def _placed(leaves: Mapping[str, Any], shardings: Mapping[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
    return {
        path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=shardings[path]) for path, leaf in leaves.items()
    }


def _device_bytes(tree: Any) -> int:
    """Bytes of the placed shapes of a tree on the device with most of them."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _count(leaves: Mapping[str, Any]) -> int:
    return sum(math.prod(leaf.shape) for leaf in leaves.values())


def _gib(number: float) -> str:
    return f"{number / GIB:.2f} GiB"


def _giga(number: float) -> str:
    return f"{number / 1e9:.2f} GFLOP"


if __name__ == "__main__":
    print(json.dumps(compile_step(*pickle.load(sys.stdin.buffer))))
