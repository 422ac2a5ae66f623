"""The training loop: plain Python around one jitted step, resumable at any moment."""

import hashlib
import logging
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from agentark_jax.data.loader import PackedBatches, packed_batches, term_names
from agentark_jax.errors import AgentArkError, UsageError, memory_for
from agentark_jax.files import atomic_path
from agentark_jax.models import lora
from agentark_jax.models.attention import AttentionPlan, kernel_platform
from agentark_jax.models.config import ModelConfig
from agentark_jax.models.flops import sft_flops
from agentark_jax.objectives.base import Objective
from agentark_jax.objectives.sft import SFT
from agentark_jax.records import Example, ids_hash, stable_hash
from agentark_jax.training.checkpoint import Checkpointer, Retention
from agentark_jax.training.config import FitConfig
from agentark_jax.training.mesh import check_mesh, fit_attention, local_rows, make_mesh, place_batch, place_params
from agentark_jax.training.metrics import MetricsLog, StepClock
from agentark_jax.training.peaks import peak_flops
from agentark_jax.training.state import (
    FlatParams,
    Shardings,
    TrainState,
    abstract_state,
    initial_state,
    make_optimizer,
    merge,
    partition,
    state_shardings,
)
from agentark_jax.training.step import make_evaluation, make_step

logger = logging.getLogger(__name__)

Progress = Callable[[int, int, int], None]
Stopped = Literal["completed", "early"]


@dataclass(frozen=True)
class FitResult:
    """What a fit gave. `params` is the full nested tree, frozen parameters included and adapters merged.

    `adapter` is the tree of the adapters that were trained, or None where the weights themselves were; `extra` what was
    trained beside the model.
    `tokens` (without padding) and `loss_tokens` were trained on, `seconds` is wall time over all resumed runs.
    `history` has (step, loss) of every step, `validation_history` (step, loss) of every evaluation, steps from 1.
    """

    params: dict[str, Any]
    adapter: dict[str, Any] | None
    extra: dict[str, Any]
    steps: int
    tokens: int
    loss_tokens: int
    seconds: float
    history: list[tuple[int, float]]
    validation_history: list[tuple[int, float]]
    stopped: Stopped


@dataclass
class Memory:
    """What the loop must remember besides the train state; it is stored in every checkpoint as JSON."""

    tokens: int = 0
    loss_tokens: int = 0
    seconds: float = 0.0
    history: list[tuple[int, float]] = field(default_factory=list)
    validation_history: list[tuple[int, float]] = field(default_factory=list)
    best: float = math.inf
    evaluations_since_best: int = 0
    stopped_early: bool = False

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> "Memory":
        pairs = {key: [(int(a), float(b)) for a, b in value[key]] for key in ("history", "validation_history")}
        best = math.inf if value["best"] is None else value["best"]
        return Memory(**{**value, **pairs, "best": best})

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "best": None if math.isinf(self.best) else self.best}

    @property
    def best_step(self) -> int | None:
        """The step with the lowest validation loss, the first of several."""
        return min(self.validation_history, key=lambda entry: entry[1])[0] if self.validation_history else None

    def note_validation(self, step: int, loss: float, config: FitConfig) -> None:
        """Records an evaluation and decides whether the fit stops early."""
        self.validation_history.append((step, loss))
        if loss < self.best - config.min_improvement:
            self.best, self.evaluations_since_best = loss, 0
        else:
            self.evaluations_since_best += 1
        self.stopped_early = config.patience is not None and self.evaluations_since_best >= config.patience


def planned_steps(config: FitConfig, examples: Sequence[Example], seed: int) -> int:
    """How many steps `fit` takes where no validation ends it early. Raises what `packed_batches` raises."""
    batches = packed_batches(examples, seed=seed, epochs=config.epochs, rows=config.rows, row_length=config.row_length)
    return _steps(config, len(batches))


def _steps(config: FitConfig, batches: int) -> int:
    return batches if config.steps is None else min(batches, config.steps)


@memory_for(
    "training",
    "Of this training's settings raise accumulation, lower rows or row_length, set remat: full or compute_dtype: "
    "bfloat16, or train less (lora, freeze, last_layers); `agentark fit --dry-run` says what fits where. What was "
    "saved is kept: the same command goes on",
)
def fit(
    config: FitConfig,
    model_config: ModelConfig,
    params: Mapping[str, Any],
    examples: Sequence[Example],
    *,
    directory: Path,
    seed: int,
    fingerprint: Mapping[str, Any],
    validation: Sequence[Example] | None = None,
    progress: Progress | None = None,
    objective: Objective | None = None,
    extra: Mapping[str, Any] | None = None,
    together: bool = False,
) -> FitResult:
    """Fits `params` (a nested tree) to `examples`; the same arguments give the same result.

    `objective` is what is minimised; by default the loss terms of the examples (`objectives.sft.SFT`). `extra` is what
    it trains beside the model: a nested tree that is always trainable, with names of its own. With `together` the
    examples of a question are in one micro-batch.

    `params` is used up, so that no second copy of it takes memory: its trainable arrays become the state that the
    steps update in place, and reading one of them afterwards is an error. With `config.lora` none of them is trained:
    fresh adapters, drawn from the seed, are.

    Writes `checkpoints/`, `metrics.jsonl` and `tensorboard/` below `directory` and resumes from the newest checkpoint
    there, on CPU bit by bit; with `config.wandb` the metrics also go to one run of Weights & Biases, whose id is a hash
    of what follows. `fingerprint` (JSON-serialisable) names what the caller knows about the origin of the
    parameters; config, examples and seed are added here. `progress(steps done, steps in all, tokens)` is called after
    every step. With several processes each calls this with the same arguments, `directory` on a disk that all share,
    and reads only its rows of each batch; the result is spread over their devices. SIGTERM saves and raises
    SystemExit(143).

    Raises UsageError for examples longer than a row, unknown names in `freeze` or `coefficients`, an `eval_every`
    without `validation`, and a mesh over which devices, parameters or rows do not divide; AgentArkError for a loss or
    gradient that is not finite, unusable examples, a damaged checkpoint or one of another fit, and a directory that
    cannot be written.
    """
    started = time.monotonic()
    mesh = make_mesh(config.mesh)
    if config.lora is None:
        trainable, frozen = partition(params, config.freeze, last_layers=config.last_layers)
    else:
        model_config = replace(model_config, lora=config.lora)
        trainable = flatten_dict(lora.init_adapter(model_config, seed), sep=".")
        frozen = flatten_dict(params, sep=".")
    trainable |= flatten_dict(dict(extra or {}), sep=".")
    check_mesh(mesh, model_config, {**trainable, **frozen}, config.rows, config.accumulation)
    attention, why = fit_attention(config, model_config, kernel_platform(mesh.devices.flat[0]))
    logger.info("attention: %s", why)
    terms = term_names([*examples, *(validation or ())])
    objective = objective or _supervised(config, terms)
    shape: dict[str, Any] = {"rows": config.rows, "row_length": config.row_length, "terms": terms}
    if together:
        shape["together"] = config.rows // config.accumulation
    data = packed_batches(examples, seed=seed, epochs=config.epochs, **shape)
    validation_data = None
    if config.eval_every is not None:
        if not validation:
            raise UsageError("eval_every: there are no validation examples; set eval_every to null or provide some")
        validation_data = packed_batches(validation, seed=seed, epochs=1, **shape)
    steps = _steps(config, len(data))

    frozen = place_params(mesh, frozen, donate=False)
    optimizer = make_optimizer(config, steps)
    shardings = state_shardings(mesh, optimizer, trainable)
    identity = {
        **{f"fit.{key}": value for key, value in config.fingerprint().items()},
        "model_config": stable_hash(asdict(model_config)),
        "examples": examples_hash(examples),
        "validation": examples_hash(validation or ()),
        "seed": seed,
        **({} if extra is None else {"objective": repr(objective)}),
        **fingerprint,
    }
    memory = Memory()
    retention = Retention(config.keep, config.keep_every)
    with Checkpointer(directory / "checkpoints", identity, retention, config.checkpoint_async) as checkpointer:
        restored = checkpointer.restore(abstract_state(trainable, optimizer, shardings))
        if restored is None:
            state = initial_state(mesh, optimizer, trainable)
        else:
            state, memory = restored[0], Memory.from_json(restored[1])
            for leaf in trainable.values():
                leaf.delete()
        if int(state.step) < steps and not memory.stopped_early:
            run = _Run(
                config,
                model_config,
                directory,
                stable_hash(identity),
                objective,
                steps,
                mesh,
                attention,
                shardings,
                data,
                validation_data,
                frozen,
                progress,
            )
            state = run.go(state, memory, checkpointer, started)
    fitted = merge(state.params, frozen)
    beside = {name: fitted.pop(name) for name in dict(extra or {})}
    adapter: dict[str, Any] | None = None
    if config.lora is not None:
        fitted = lora.merge(model_config, fitted)[1]
        adapter = {name: tree for name, tree in unflatten_dict(state.params, sep=".").items() if name not in beside}
    return FitResult(
        params=fitted,
        adapter=adapter,
        extra=beside,
        steps=int(state.step),
        tokens=memory.tokens,
        loss_tokens=memory.loss_tokens,
        seconds=memory.seconds,
        history=memory.history,
        validation_history=memory.validation_history,
        stopped="early" if memory.stopped_early else "completed",
    )


def _supervised(config: FitConfig, terms: Sequence[str]) -> SFT:
    """The loss terms of the examples with the configured coefficients."""
    for term in config.coefficients:
        if term not in terms:
            raise UsageError(f"coefficients: no example has the loss term {term!r}; choose among {', '.join(terms)}")
    return SFT({term: float(config.coefficients.get(term, 1.0)) for term in terms})


def examples_hash(examples: Sequence[Example]) -> str:
    """Content hash of everything in the examples that training reads."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(f"{example.question_id} {ids_hash(example.ids)}\n".encode())
        for term, weights in sorted(example.weights.items()):
            digest.update(f"{term}\n".encode())
            digest.update(np.ascontiguousarray(weights, dtype="<f4").tobytes())
        if example.step_ends is not None:
            digest.update(np.ascontiguousarray(example.step_ends, dtype="<i4").tobytes())
            digest.update(np.ascontiguousarray(example.step_labels, dtype="<f4").tobytes())
    return digest.hexdigest()[:24]


@contextmanager
def terminating() -> Iterator[Callable[[int], bool]]:
    """Whether to stop after a step because SIGTERM came; every step has to ask.

    With several processes JAX itself handles the signal: the one that gets it makes all of them stop after the same
    step. Outside of the main thread Python cannot handle signals and nothing ever stops.
    """
    if jax.process_count() > 1:
        yield multihost_utils.reached_preemption_sync_point
        return
    received = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield lambda step: False
        return
    previous = signal.signal(signal.SIGTERM, lambda number, frame: received.set())
    try:
        yield lambda step: received.is_set()
    finally:
        signal.signal(signal.SIGTERM, previous)


@dataclass(frozen=True)
class _Run:
    """The steps from a state to the end."""

    config: FitConfig
    model: ModelConfig
    directory: Path
    identity: str
    objective: Objective
    steps: int
    mesh: Mesh
    attention: AttentionPlan
    shardings: Shardings
    data: PackedBatches
    validation: PackedBatches | None
    frozen: FlatParams
    progress: Progress | None

    def go(self, state: TrainState, memory: Memory, checkpointer: Checkpointer, started: float) -> TrainState:
        """Trains until the last step, an early stop or SIGTERM; `memory` is updated, the final state is on disk."""
        step = make_step(self.config, self.model, self.objective, self.steps, self.shardings, self.attention)
        evaluate = make_evaluation(self.config, self.model, self.objective, self.mesh, self.attention)
        first, before = int(state.step), memory.seconds
        clock = StepClock(peak_flops(self.mesh.devices.flatten().tolist()))
        late: tuple[int, dict[str, Any]] | None = None  # metrics are read while the device is at the next step
        profile_from, profile_to = self.config.profile_steps or (0, 0)
        profile_from = max(profile_from, first + 1) if profile_to > first else 0
        with (
            MetricsLog(self.directory, first, self._wandb()) as log,
            terminating() as terminates,
            ExitStack() as profile,
        ):
            for number, batch in enumerate(clock.waiting(self._batches(self.data, first, self.steps)), first + 1):
                if number == profile_from:
                    profile.enter_context(jax.profiler.trace(str(self.directory / "profile")))
                state, metrics = step(state, self.frozen, batch)
                if number == profile_to:
                    jax.block_until_ready(metrics)
                    profile.close()
                if late is not None:
                    log.write(self._account(*late, memory, checkpointer, clock))
                late = (number, metrics)
                last = number == self.steps
                stops = terminates(number)
                evaluates = self.validation is not None and (number % (self.config.eval_every or 1) == 0 or last)
                saves = last or any(
                    every is not None and number % every == 0
                    for every in (self.config.checkpoint_every, self.config.keep_every)
                )
                if not (evaluates or saves or stops):
                    continue
                record = self._account(*late, memory, checkpointer, clock)
                late = None
                if evaluates:
                    record["validation_loss"] = self._validate(evaluate, state.params, number)
                    memory.note_validation(number, record["validation_loss"], self.config)
                best = memory.best_step if self.config.keep_best else None
                log.write(record)
                memory.seconds = before + time.monotonic() - started
                if saves or best == number or memory.stopped_early or stops:
                    checkpointer.save(state, memory.to_json(), best)
                if stops:
                    raise SystemExit(143)
                if memory.stopped_early:
                    break
                clock.restart()
        return state

    def _wandb(self) -> dict[str, Any] | None:
        """The run of this fit at Weights & Biases: the same one however often it is resumed."""
        if self.config.wandb is None:
            return None
        name = "/".join(self.directory.parts[-3:])
        return {"project": self.config.wandb, "id": self.identity, "name": name, "config": asdict(self.config)}

    def _batches(self, data: PackedBatches, start: int, stop: int) -> Iterator[Any]:
        """Batches on the mesh, of each of which this process reads its own rows only."""
        rows = self.config.rows
        for batch in data.iterate(start, stop, local_rows(self.mesh, rows)):
            yield place_batch(self.mesh, batch, rows)

    def _account(
        self, number: int, metrics: Mapping[str, Any], memory: Memory, checkpointer: Checkpointer, clock: StepClock
    ) -> dict[str, Any]:
        """Fetches a step's metrics, refuses numbers that are not finite, and books the rest."""
        values = {name: float(value) for name, value in jax.device_get(dict(metrics)).items()}
        if not (math.isfinite(values["loss"]) and math.isfinite(values["gradient_norm"])):
            saved = checkpointer.latest
            kept = "there is no checkpoint yet" if saved is None else f"the last checkpoint is that of step {saved}"
            dump = self._dump(number)
            raise AgentArkError(
                f"step {number}: the loss is {values['loss']} and the gradient norm {values['gradient_norm']}; the "
                f"batch has the questions {', '.join(self.data.question_ids(number - 1))} and is in {dump}. Nothing of "
                f"this step was saved ({kept} in {checkpointer.directory}). Look at the batch, or lower learning_rate"
            )
        memory.tokens += int(values["tokens"])
        memory.loss_tokens += int(values["loss_tokens"])
        memory.history.append((number, values["loss"]))
        if self.progress is not None:
            self.progress(number, self.steps, memory.tokens)
        values["pad_fraction"] = 1 - values["tokens"] / (self.config.rows * self.config.row_length)
        work = sft_flops(
            self.model,
            lengths=self.data.lengths(number - 1),
            loss_tokens=int(values["loss_tokens"]),
            train_layers=self.config.lora is None,
            train_head=("embedding" if self.model.tie_embeddings else "unembedding") in self.shardings.params,
        )
        timing = clock.lap(int(values["tokens"]), sum(work.values()))
        return {"step": number, **dict(sorted(values.items())), "timing": timing}

    def _dump(self, number: int) -> Path:
        """Writes the whole batch of a step for inspection: `ids`, `positions`, `segment_ids` and `weights.<term>`."""
        path = self.directory / f"not_finite_step_{number}.npz"
        if jax.process_index() == 0:
            with atomic_path(path) as temporary, temporary.open("wb") as file:
                np.savez_compressed(file, **flatten_dict(self.data.batch(number - 1), sep="."))
        return path

    def _validate(self, evaluate: Callable[..., Any], params: FlatParams, number: int) -> float:
        """Σ coefficient · sum / total of each term over all validation examples."""
        assert self.validation is not None
        coefficients = self.objective.coefficients
        sums, totals = dict.fromkeys(coefficients, 0.0), dict.fromkeys(coefficients, 0.0)
        for batch in self._batches(self.validation, 0, len(self.validation)):
            batch_sums, batch_totals = jax.device_get(evaluate(params, self.frozen, batch))
            for term in coefficients:
                sums[term] += float(batch_sums[term])
                totals[term] += float(batch_totals[term])
        loss = sum(coefficients[term] * sums[term] / totals[term] for term in totals if totals[term])
        if not math.isfinite(loss):
            raise AgentArkError(f"step {number}: the validation loss is {loss}; lower learning_rate")
        return loss
