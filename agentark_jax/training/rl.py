"""Reinforcement learning on a policy's own rollouts: plain Python around one jitted step, resumable at any moment.

An iteration samples groups of rollouts from the policy as it is, scores them (by the verifier, a process reward model,
the starting policy), turns what they earn into advantages of tokens, and takes one or several optimizer steps.
Checkpoints are made between iterations: what is sampled after one is in the trace store of whoever samples, under the
version of the weights, so a killed run samples nothing twice.
"""

import logging
import math
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh
from jaxtyping import Array, Float

from agentark_jax.data.loader import pack_row
from agentark_jax.data.packing import shuffled
from agentark_jax.errors import AgentArkError, UsageError, memory_for
from agentark_jax.models import lora
from agentark_jax.models.attention import AttentionPlan, kernel_platform
from agentark_jax.models.config import ModelConfig
from agentark_jax.models.heads import Head, init_head
from agentark_jax.models.heads import values as head_values
from agentark_jax.models.sharding import on_mesh, replicated
from agentark_jax.models.transformer import Params, hidden_states, unembedding
from agentark_jax.objectives.base import Objective
from agentark_jax.objectives.chunked import chunked_logprobs
from agentark_jax.objectives.grpo import GRPO, sampled_tokens
from agentark_jax.objectives.ppo import PPO, VALUE_HEAD
from agentark_jax.records import Example, Question, stable_hash
from agentark_jax.training import distributed
from agentark_jax.training.alarms import Alarms
from agentark_jax.training.checkpoint import Checkpointer, Retention
from agentark_jax.training.loop import terminating
from agentark_jax.training.mesh import check_mesh, fit_attention, local_rows, make_mesh, place_batch, place_params
from agentark_jax.training.metrics import MetricsLog
from agentark_jax.training.publish import publish, version_name
from agentark_jax.training.rl_config import RLConfig
from agentark_jax.training.rollouts import SAMPLED, Earned, Groups, Packed, Sample, bucket, earned, learns
from agentark_jax.training.scoring import score_steps
from agentark_jax.training.state import (
    FlatParams,
    TrainState,
    abstract_state,
    initial_state,
    make_optimizer,
    merge,
    partition,
    state_shardings,
)
from agentark_jax.training.step import make_step

logger = logging.getLogger(__name__)

# Where policies are published, below the directory of the training.
POLICIES = "policies"

Progress = Callable[[int, int, int], None]
Ending = Literal["completed", "stopped", "rolled_back"]


@dataclass(frozen=True)
class Policy:
    """The policy that samples: `version` names its weights, `params` are those of the model without adapters.

    Where they are published for servers, `directory` has them as files, and `probes` are sequences of ids [T] with the
    log-probabilities [T - 1], at temperature 1, by which a server shows that it computes with them.
    """

    version: str
    config: ModelConfig
    params: Params
    directory: Path | None = None
    probes: Sequence[tuple[np.ndarray, np.ndarray]] = ()


class Sampler(Protocol):
    """Samples a policy's rollouts; the first process alone has one."""

    def __call__(self, questions: Sequence[Question], visits: Sequence[int], policy: Policy) -> Groups:
        """A group for each question, with empty places for calls that failed.

        `visits` says how often each question was sampled before: its rollouts must be others each time.
        """
        ...


@dataclass(frozen=True)
class Judge:
    """A process reward model: `params` and its head, of the policy's tokenizer."""

    config: ModelConfig
    params: Params
    head: Head


@dataclass(frozen=True)
class RLResult:
    """What became of the policy. `params` is the full tree, frozen parameters included and adapters merged.

    `history` has the metrics of every iteration, `consumed` the questions of every iteration by id, and `ending` says
    why it ended: `completed`, or an alarm that `stopped` it, or `rolled_back` to the last checkpoint before. `spent`
    are seconds by what they were spent on, over all resumed runs.
    """

    params: dict[str, Any]
    adapter: dict[str, Any] | None
    extra: dict[str, Any]
    iterations: int
    steps: int
    tokens: int
    loss_tokens: int
    seconds: float
    spent: dict[str, float]
    history: list[dict[str, Any]]
    consumed: list[list[str]]
    counts: dict[str, int]
    alarms: list[str]
    ending: Ending


@dataclass
class Memory:
    """What the loop must remember besides the train state; it is stored in every checkpoint as JSON.

    `position` is the place in the endless sequence of questions, in which every question comes once in each epoch.
    """

    iteration: int = 0
    position: int = 0
    tokens: int = 0
    loss_tokens: int = 0
    seconds: float = 0.0
    spent: dict[str, float] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    consumed: list[list[int]] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    alarms: dict[str, Any] = field(default_factory=dict)
    tripped: list[str] = field(default_factory=list)
    ending: Ending = "completed"
    clean: int = 0
    """The last iteration after which no alarm was near."""
    good: int = 0
    """The last checkpoint at such a moment."""


@memory_for(
    "reinforcement",
    "Lower rl.fit.rows, rl.fit.row_length or engine.slots, set rl.fit.remat: full or rl.fit.compute_dtype: bfloat16, "
    "or train less (rl.fit.lora, rl.fit.freeze, rl.fit.last_layers). What was saved is kept: the same command goes on",
)
def learn(
    config: RLConfig,
    model_config: ModelConfig,
    params: Mapping[str, Any],
    questions: Sequence[Question],
    sample: Sampler | None,
    *,
    max_tokens: int,
    directory: Path,
    seed: int,
    fingerprint: Mapping[str, Any],
    judge: Judge | None = None,
    source: Path | None = None,
    probes: Sequence[np.ndarray] = (),
    progress: Progress | None = None,
) -> RLResult:
    """Trains the policy `params` (a nested tree, used up) on what its rollouts earn.

    The same arguments give the same result where the sampler's tokens follow from the weights (the embedded engine).
    Resumes from the newest checkpoint below `directory`, on CPU bit by bit. `progress(iterations done, in all, tokens
    sampled)` is called after each. `fingerprint` names what the caller knows about the origin of parameters, judge and
    sampler. With several processes each calls this with the same arguments, but for the sampler, which only the first
    one has. With a `source`, the model directory that the policy comes from, every policy that samples is published
    below `directory` (`training.publish`), and scores the `probes`.

    Raises UsageError for rewards without the model that they need, questions whose prompts leave no room in a row;
    AgentArkError where no rollout came, for a loss that is not finite, and as `fit`.
    """
    if config.needs_prm and judge is None:
        raise UsageError("rewards: process rewards need a process reward model; train one, or leave process out")
    started = time.monotonic()
    return _Loop(
        config,
        model_config,
        params,
        questions,
        sample,
        max_tokens,
        directory,
        seed,
        fingerprint,
        judge,
        source,
        probes,
        progress,
    ).run(started)


class _Loop:
    def __init__(
        self,
        config: RLConfig,
        model_config: ModelConfig,
        params: Mapping[str, Any],
        questions: Sequence[Question],
        sample: Sampler | None,
        max_tokens: int,
        directory: Path,
        seed: int,
        fingerprint: Mapping[str, Any],
        judge: Judge | None,
        source: Path | None,
        probes: Sequence[np.ndarray],
        progress: Progress | None,
    ) -> None:
        fit = config.fit
        self.config, self.base, self.questions, self.sample = config, model_config, questions, sample
        self.max_tokens, self.directory, self.seed, self.progress = max_tokens, directory, seed, progress
        self.source, self.probes = source, probes
        self.mesh: Mesh = make_mesh(fit.mesh)
        values = config.value("advantage") == "gae"
        self.extra = {VALUE_HEAD: init_head(model_config, "value", seed)} if values else {}
        if fit.lora is None:
            self.model = model_config
            trainable, frozen = partition(params, fit.freeze, last_layers=fit.last_layers)
        else:
            self.model = replace(model_config, lora=fit.lora)
            trainable = flatten_dict(lora.init_adapter(self.model, seed), sep=".")
            frozen = flatten_dict(dict(params), sep=".")
        # What the policy starts from; without its adapters a model is that still.
        reference = trainable if config.needs_reference and fit.lora is None else {}
        copies = {path: _as_computed(path, leaf, fit.compute_dtype) for path, leaf in reference.items()}
        self.reference = place_params(self.mesh, copies, donate=True)
        trainable |= flatten_dict(self.extra, sep=".")
        check_mesh(self.mesh, self.model, {**trainable, **frozen}, fit.rows, 1)
        self.attention, why = fit_attention(fit, self.model, kernel_platform(self.mesh.devices.flat[0]))
        logger.info("attention: %s", why)
        self.frozen = place_params(self.mesh, frozen, donate=False)
        self.trainable = trainable
        self.optimizer = make_optimizer(fit, config.steps)
        self.shardings = state_shardings(self.mesh, self.optimizer, trainable)
        loss = config.loss(max_tokens)
        self.objective: Objective = PPO(loss, config.value_loss) if values else GRPO(loss)
        self.judge = judge and replace(
            judge,
            params=_placed(self.mesh, judge.params),
            head=_placed(self.mesh, judge.head),
        )
        self.steps: dict[int, Any] = {}
        self.identity = {
            **{f"rl.{key}": value for key, value in asdict(config).items() if key not in ("fit", "alarms")},
            **{f"fit.{key}": value for key, value in fit.fingerprint().items()},
            "max_tokens": max_tokens,
            "model_config": stable_hash(asdict(self.model)),
            "questions": stable_hash([question.id for question in questions]),
            "seed": seed,
            **fingerprint,
        }

    def run(self, started: float) -> RLResult:
        config, fit = self.config, self.config.fit
        retention = Retention(fit.keep, fit.keep_every)
        place = self.directory / "checkpoints"
        with Checkpointer(place, self.identity, retention, fit.checkpoint_async) as checkpointer:
            abstract = abstract_state(self.trainable, self.optimizer, self.shardings)
            restored = checkpointer.restore(abstract)
            if restored is None:
                state, memory = initial_state(self.mesh, self.optimizer, self.trainable), Memory()
                checkpointer.save(state, asdict(memory), number=0)  # what an alarm may go back to
            else:
                state, memory = restored[0], Memory(**restored[1])
                for leaf in self.trainable.values():
                    leaf.delete()
            alarms = Alarms(config.alarms, memory.alarms or None)
            before = memory.seconds
            with MetricsLog(self.directory, memory.iteration, self._wandb()) as log, terminating() as terminates:
                while memory.iteration < config.iterations and memory.ending == "completed":
                    state, record = self._iterate(state, memory)
                    if memory.iteration == 0:
                        for name, lacks in alarms.unwatched(record).items():
                            logger.info("alarms.%s is off: there is no %s", name, ", ".join(lacks))
                    found = [str(each) for each in alarms.update(memory.iteration, record)]
                    memory.iteration += 1
                    memory.alarms = alarms.state
                    memory.tripped += found
                    for each in found:
                        logger.warning("%s", each)
                    log.write({"step": memory.iteration, **record})
                    for part, seconds in record["timing"].items():
                        memory.spent[part] = memory.spent.get(part, 0.0) + seconds
                    memory.history.append({key: value for key, value in record.items() if key != "timing"})
                    if found and config.alarms.action == "rollback":
                        went_back = checkpointer.restore(abstract, memory.good)
                        assert went_back is not None, "a good checkpoint is kept"
                        state, memory.ending = went_back[0], "rolled_back"
                    elif found and config.alarms.action == "stop":
                        memory.ending = "stopped"
                    elif alarms.quiet:
                        memory.clean = memory.iteration
                    if self.progress is not None:
                        self.progress(memory.iteration, config.iterations, memory.tokens)
                    stops = terminates(memory.iteration)
                    ended = memory.iteration == config.iterations or memory.ending != "completed"
                    if ended or stops or memory.iteration % fit.checkpoint_every == 0:
                        memory.seconds = before + time.monotonic() - started
                        memory.good = memory.iteration if memory.clean == memory.iteration else memory.good
                        checkpointer.save(state, asdict(memory), memory.good, number=memory.iteration)
                    if stops:
                        raise SystemExit(143)
        return self._result(state, memory)

    def _result(self, state: TrainState, memory: Memory) -> RLResult:
        fitted = merge(state.params, self.frozen)
        beside = {name: fitted.pop(name) for name in self.extra}
        adapter: dict[str, Any] | None = None
        if self.config.fit.lora is not None:
            fitted = lora.merge(self.model, fitted)[1]
            adapter = {name: tree for name, tree in unflatten_dict(state.params, sep=".").items() if name not in beside}
        return RLResult(
            params=fitted,
            adapter=adapter,
            extra=beside,
            iterations=memory.iteration,
            steps=int(state.step),
            tokens=memory.tokens,
            loss_tokens=memory.loss_tokens,
            seconds=memory.seconds,
            spent=memory.spent,
            history=memory.history,
            consumed=[[self.questions[index].id for index in drawn] for drawn in memory.consumed],
            counts=memory.counts,
            alarms=memory.tripped,
            ending=memory.ending,
        )

    def _wandb(self) -> dict[str, Any] | None:
        if self.config.fit.wandb is None:
            return None
        name = "/".join(self.directory.parts[-3:])
        return {
            "project": self.config.fit.wandb,
            "id": stable_hash(self.identity),
            "name": name,
            "config": asdict(self.config),
        }

    # An iteration

    def _iterate(self, state: TrainState, memory: Memory) -> tuple[TrainState, dict[str, Any]]:
        """Sample, score and learn; the state after it and what is to be logged.

        `memory` is updated, but for the iteration's number. Groups in which all earn the same are left out; where
        nothing else is left, nothing is learned.
        """
        times = _Times()
        with times("sync"):
            policy = self._policy(state)
        groups = self._gathered(policy, memory, times)
        counts = Counter(memory.counts)
        counts.update(_counted(groups, self.config.group_size))
        scored: dict[str, list[np.ndarray]] = {"rollout_logprobs": [each.logprobs for each in groups]}
        with times("scoring"):
            scored |= self._scores(state, groups)
        with times("rewards"):
            found = self._earned(groups, scored)
        record = _measured(groups, scored, found)
        learned = self._kept(groups, found, scored)
        counts["groups_without_signal"] += len(groups.samples) - int(found.informative.sum())
        with times("training"):
            state, metrics = self._update(state, learned, memory)
        counts["iterations_without_signal"] += not metrics
        memory.counts = dict(counts)
        memory.tokens += sum(len(each.rollout.ids) for each in groups)
        memory.loss_tokens += int(metrics.pop("loss_tokens", 0))
        return state, {**dict(sorted({**record, **metrics}.items())), "timing": times.shares()}

    def _policy(self, state: TrainState) -> Policy:
        """The policy that samples, as a model without adapters and value head."""
        params = merge(state.params, self.frozen)
        params = {name: tree for name, tree in params.items() if name not in self.extra}
        if self.config.fit.lora is not None:
            params = lora.merge(self.model, params)[1]
        version = version_name(self.identity, int(state.step))
        if self.source is None:
            return Policy(version, self.base, params)
        directory = publish(self.directory / POLICIES, version, self.base, params, self.source)
        return Policy(version, self.base, params, directory, self._probed(state.params))

    def _probed(self, params: FlatParams) -> list[tuple[np.ndarray, np.ndarray]]:
        """The probes with what the trainer says of them."""
        length, fit = self.config.fit.row_length, self.config.fit
        examples = [Example(ids, {SAMPLED: np.ones(len(ids), np.float32)}, "", "probe") for ids in self.probes]
        rows = [pack_row([example], row_length=length, terms=(SAMPLED,)) for example in examples]
        rows += [pack_row([], row_length=length, terms=(SAMPLED,))] * (-len(rows) % fit.rows)
        batch: dict[str, Any] = {
            name: np.stack([row[name] for row in rows]) for name in ("ids", "positions", "segment_ids")
        }
        batch["weights"] = {SAMPLED: np.stack([row["weights"][SAMPLED] for row in rows])}
        found = self._over(batch, _logprobs, self.model, params, temperature=1.0)
        return [(ids, row[1 : len(ids)]) for ids, row in zip(self.probes, found, strict=False)]

    def _gathered(self, policy: Policy, memory: Memory, times: "_Times") -> Groups:
        """An iteration's groups, of the questions that are next; with dynamic sampling those that teach nothing are
        replaced as long as there are tries.
        """
        config = self.config
        chosen: list[tuple[Question, Sequence[Any]]] = []
        drawn: list[int] = []
        for attempt in range(1 + config.dynamic_sampling):
            wanted = config.questions - len(chosen)
            if wanted == 0:
                break
            indices, visits = self._next(memory, wanted)
            drawn += indices
            asked = [self.questions[index] for index in indices]
            with times("rollout"):
                groups = distributed.told(self.sample and self.sample(asked, visits, policy))
            self._check(groups)
            with times("scoring"):
                groups = self._judged(groups)
            useful = np.ones(len(asked), bool)
            if config.dynamic_sampling:
                nothing = [np.zeros(len(each.rollout.ids), np.float32) for each in groups]  # known yet, nor needed
                unknown = dict.fromkeys(("old_logprobs", "reference_logprobs", "old_values"), nothing)
                useful = self._earned(groups, unknown).informative
                if attempt == config.dynamic_sampling and not (useful.any() or chosen):
                    useful[:] = True  # what was sampled is measured all the same
            pairs = zip(groups.questions, groups.samples, strict=True)
            chosen += [pair for pair, keep in zip(pairs, useful, strict=True) if keep]
            memory.counts["groups_replaced"] = memory.counts.get("groups_replaced", 0) + int((~useful).sum())
        memory.consumed.append(drawn)
        return Groups([question for question, _ in chosen], [samples for _, samples in chosen])

    def _next(self, memory: Memory, count: int) -> tuple[list[int], list[int]]:
        """The next questions, by index, and how often each was drawn before."""
        places = range(memory.position, memory.position + count)
        memory.position += count
        epochs = {place // len(self.questions) for place in places}
        orders = {epoch: shuffled(len(self.questions), seed=self.seed, epoch=epoch) for epoch in epochs}
        visits = [place // len(self.questions) for place in places]
        return [orders[visit][place % len(self.questions)] for visit, place in zip(visits, places, strict=True)], visits

    def _check(self, groups: Groups) -> None:
        """Refuses rollouts that cannot be learned from, with the rule that they break."""
        samples = list(groups)
        if not samples:
            raise AgentArkError(
                f"none of the {len(groups.questions)} questions of this iteration got a rollout: every call failed; "
                "`agentark traces stats` shows why. Nothing is lost, run it again."
            )
        for each in samples:
            length, tokens = self.config.fit.row_length, len(each.prompt) + len(each.rollout.ids)
            if tokens > length:
                raise UsageError(
                    f"fit.row_length: a rollout of question {each.rollout.question.id} has {tokens} tokens with its "
                    f"prompt and a row holds {length}; raise it to {tokens} or more"
                )

    def _judged(self, groups: Groups) -> Groups:
        """The groups with what the process reward model says of each step."""
        if self.judge is None:
            return groups
        fit, ends = self.config.fit, [each.rollout.step_ends + len(each.prompt) - 1 for each in groups]
        scores = score_steps(
            self.judge.config,
            self.judge.params,
            self.judge.head,
            [(each.ids, places) for each, places in zip(groups, ends, strict=True)],
            self.mesh,
            tokens=fit.rows * fit.row_length,
            dtype=fit.compute_dtype,
        )
        by_place = dict(zip(groups.places, scores, strict=True))
        judged = [
            [
                None
                if each is None
                else replace(each, rollout=replace(each.rollout, step_scores=by_place[row, column]))
                for column, each in enumerate(group)
            ]
            for row, group in enumerate(groups.samples)
        ]
        return Groups(groups.questions, judged)

    def _scores(self, state: TrainState, groups: Groups) -> dict[str, list[np.ndarray]]:
        """What trainer and starting policy say of each rollout's tokens before the update."""
        packed = Packed(list(groups), self.config.fit.row_length, self.seed, 0)
        found: dict[str, list[np.ndarray]] = {}
        # Also where no loss reads it: whether the engine and the trainer agree is checked from the first step on.
        said = self._by_micro_batch(_logprobs, packed, self.model, state.params)
        found["old_logprobs"] = packed.of_tokens(said)
        if VALUE_HEAD in self.extra:
            said = self._by_micro_batch(_values, packed, self.model, state.params)
            found["old_values"] = packed.of_tokens(said)
        if self.config.needs_reference:
            said = self._by_micro_batch(_logprobs, packed, self.base, self.reference)
            found["reference_logprobs"] = packed.of_tokens(said)
        return found

    def _earned(self, groups: Groups, scored: Mapping[str, Sequence[np.ndarray]]) -> Earned:
        def spread(name: str) -> np.ndarray:
            return groups.filled(scored[name], (self.max_tokens,), np.float32)

        log_ratios = values = None
        if "reference_logprobs" in scored:
            log_ratios = spread("old_logprobs") - spread("reference_logprobs")
        if "old_values" in scored:
            values = spread("old_values")
        return earned(groups, self.config, self.max_tokens, log_ratios=log_ratios, values=values)

    def _kept(
        self, groups: Groups, found: Earned, scored: Mapping[str, Sequence[np.ndarray]]
    ) -> list[tuple[list[Sample], dict[str, list[np.ndarray]]]]:
        """The samples of each group that teaches anything, and the arrays of their tokens."""
        arrays = {**scored, "advantages": groups.of(found.advantages)}
        if found.returns is not None:
            arrays["returns"] = groups.of(found.returns)
        all_groups = found.returns is not None  # values are learned from groups that teach the policy nothing, too
        kept: dict[int, tuple[list[Sample], dict[str, list[np.ndarray]]]] = {}
        for number, ((row, _), sample) in enumerate(zip(groups.places, groups, strict=True)):
            if not (learns(sample, self.config) and (all_groups or found.informative[row])):
                continue
            samples, of_tokens = kept.setdefault(row, ([], {name: [] for name in arrays}))
            samples.append(sample)
            for name, values in arrays.items():
                of_tokens[name].append(values[number])
        return list(kept.values())

    def _update(
        self, state: TrainState, groups: Sequence[tuple[list[Sample], dict[str, list[np.ndarray]]]], memory: Memory
    ) -> tuple[TrainState, dict[str, float]]:
        """All optimizer steps of an iteration, and the mean of their metrics."""
        fit, found = self.config.fit, list[dict[str, float]]()
        for epoch in range(fit.epochs):
            order = shuffled(len(groups), seed=self.seed, epoch=memory.iteration * fit.epochs + epoch)
            for part in np.array_split(order, self.config.updates):
                if not len(part):
                    continue
                samples = [sample for index in part for sample in groups[index][0]]
                arrays = {
                    name: [values for index in part for values in groups[index][1][name]] for name in groups[0][1]
                }
                packed = Packed(samples, fit.row_length, self.seed, memory.iteration)
                parts = bucket(-(-len(packed.rows) // fit.rows))
                batch = packed.batch(arrays, parts * fit.rows)
                mine = local_rows(self.mesh, parts * fit.rows)
                placed = place_batch(
                    self.mesh, jax.tree.map(lambda leaf, mine=mine: leaf[mine], batch), parts * fit.rows
                )
                state, metrics = self._step(parts)(state, self.frozen, placed)
                found.append({name: float(value) for name, value in jax.device_get(metrics).items()})
                self._refuse_not_finite(found[-1], samples, memory)
        return state, _averaged(found)

    def _step(self, parts: int) -> Any:
        """The optimizer step of so many micro-batches."""
        if parts not in self.steps:
            fit = replace(self.config.fit, rows=parts * self.config.fit.rows, accumulation=parts)
            total = self.config.steps
            self.steps[parts] = make_step(fit, self.model, self.objective, total, self.shardings, self.attention)
        return self.steps[parts]

    def _refuse_not_finite(self, metrics: Mapping[str, float], samples: Sequence[Sample], memory: Memory) -> None:
        if math.isfinite(metrics["loss"]) and math.isfinite(metrics["gradient_norm"]):
            return
        asked = sorted({sample.rollout.question.id for sample in samples})
        raise AgentArkError(
            f"iteration {memory.iteration + 1}: the loss is {metrics['loss']} and the gradient norm "
            f"{metrics['gradient_norm']}; the batch has the questions {', '.join(asked)}. Nothing of this iteration "
            "was saved. Look at their rollouts, or lower rl.fit.learning_rate"
        )

    # Passes without gradient

    def _by_micro_batch(
        self, function: Callable[..., Array], packed: Packed, model: ModelConfig, params: FlatParams
    ) -> np.ndarray:
        """What a function of parameters, beside the frozen ones, and a batch says of all rows [rows, row_length]."""
        rows = self.config.fit.rows
        batch = packed.batch({}, -(-len(packed.rows) // rows) * rows)
        return self._over(batch, function, model, params, temperature=self.config.temperature)

    def _over(
        self,
        batch: Mapping[str, Any],
        function: Callable[..., Array],
        model: ModelConfig,
        params: FlatParams,
        temperature: float,
    ) -> np.ndarray:
        fit = self.config.fit
        settings = _Pass(model, self.mesh, fit.compute_dtype, temperature, self.attention)
        found = []
        for start in range(0, len(batch["ids"]), fit.rows):
            mine = [start + row for row in local_rows(self.mesh, fit.rows)]
            placed = place_batch(self.mesh, jax.tree.map(lambda leaf, mine=mine: leaf[mine], batch), fit.rows)
            found.append(np.asarray(function(settings, params, self.frozen, placed)))
        return np.concatenate(found)


@jax.tree_util.register_static
@dataclass(frozen=True)
class _Pass:
    """What is fixed of a forward pass."""

    model: ModelConfig
    mesh: Mesh
    dtype: str
    temperature: float
    attention: AttentionPlan

    def hidden(self, params: Params, batch: Mapping[str, Array]) -> Float[Array, "B T D"]:
        ids, positions, segments = batch["ids"], batch["positions"], batch["segment_ids"]
        return hidden_states(self.model, params, ids, positions, segments, "products", self.dtype, self.attention)

    def everywhere(self, values: Array) -> Array:
        return jax.lax.with_sharding_constraint(values, replicated(self.mesh))


@jax.jit
def _logprobs(
    settings: _Pass, trainable: FlatParams, frozen: FlatParams, batch: Mapping[str, Any]
) -> Float[Array, "B T"]:
    """The log-probability of each sampled token at the sampling temperature, and 0 elsewhere."""
    with on_mesh(settings.mesh):
        params = merge(trainable, frozen)
        params.pop(VALUE_HEAD, None)
        hidden = settings.hidden(params, batch)
        sampled = sampled_tokens(batch)
        scores = chunked_logprobs(
            hidden[:, :-1].reshape(-1, hidden.shape[-1]),
            unembedding(settings.model, params),
            batch["ids"][:, 1:].reshape(-1),
            sampled.reshape(-1),
            temperature=settings.temperature,
            soft_cap=settings.model.final_softcap,
        )
        return settings.everywhere(jnp.pad(scores.logprobs.reshape(sampled.shape), ((0, 0), (1, 0))))


@jax.jit
def _values(
    settings: _Pass, trainable: FlatParams, frozen: FlatParams, batch: Mapping[str, Any]
) -> Float[Array, "B T"]:
    """At each token what the value head said before it was sampled."""
    with on_mesh(settings.mesh):
        params = merge(trainable, frozen)
        head = params.pop(VALUE_HEAD)
        found = head_values(head, settings.hidden(params, batch))
        return settings.everywhere(jnp.pad(found[:, :-1], ((0, 0), (1, 0))))


def _as_computed(path: str, leaf: Array, dtype: str) -> Array:
    """A copy in the dtype in which the network would compute with it anyway."""
    return jnp.array(leaf, leaf.dtype if "norm" in path else dtype, copy=True)


def _placed(mesh: Mesh, tree: Any) -> Any:
    return unflatten_dict(place_params(mesh, flatten_dict(tree, sep="."), donate=False), sep=".")


class _Times:
    """Where the time of an iteration goes."""

    def __init__(self) -> None:
        self._began, self._spent = time.monotonic(), defaultdict[str, float](float)

    @contextmanager
    def __call__(self, what: str) -> Iterator[None]:
        began = time.monotonic()
        try:
            yield
        finally:
            self._spent[what] += time.monotonic() - began

    def shares(self) -> dict[str, float]:
        """Seconds of the iteration, and by what they were spent on."""
        return {"step_seconds": time.monotonic() - self._began, **{f"{k}_seconds": v for k, v in self._spent.items()}}


def _counted(groups: Groups, size: int) -> Counter[str]:
    """What was not as it should be, by name."""
    rollouts = [each.rollout for each in groups]
    there = [sum(sample is not None for sample in group) for group in groups.samples]
    return Counter(
        rollouts=len(rollouts),
        rollouts_missing=len(there) * size - len(rollouts),
        groups_incomplete=sum(count < size for count in there),
        groups_dropped=sum(count < min(2, size) for count in there),
        rollouts_truncated=sum(each.finish == "length" for each in rollouts),
        rollouts_unparseable=sum(each.grade.verdict == "unparseable" for each in rollouts),
        rollouts_empty=sum(not each.text.strip() for each in rollouts),
    )


def _measured(groups: Groups, scored: Mapping[str, Sequence[np.ndarray]], found: Earned) -> dict[str, float]:
    """An iteration's rollouts in figures."""
    sampled = np.concatenate(scored["rollout_logprobs"])
    gaps = np.abs(np.concatenate(scored["old_logprobs"]) - sampled)
    return {
        **found.metrics,
        "groups_informative": float(np.mean(found.informative)),
        "rollout_logprob": float(np.mean(sampled)),
        "logprob_gap": float(np.mean(gaps)),
        "logprob_gap/max": float(np.max(gaps)),
    }


def _averaged(records: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of each metric, the largest of those named `…/max`, and all loss tokens."""
    if not records:
        return {}
    result = {
        name: max(each[name] for each in records)
        if name.endswith("/max")
        else sum(each[name] for each in records) / len(records)
        for name in records[0]
    }
    return {**result, "loss_tokens": sum(each["loss_tokens"] for each in records)}
