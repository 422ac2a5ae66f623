"""The embedded engine: generation in JAX, in this process, on whatever device there is.

A fixed number of slots decode together; a slot whose sequence ends is refilled from the queue. Prompts are padded to a
bucket and prefilled several at a time, ahead of the slots that will take them; a prompt asked for several times is
prefilled once, and so is a beginning that requests say they share: what follows it is then prefilled by itself, after
the beginning's keys and values. That is done whether or not anyone shares it, at hand or not. Every program has a fixed
shape, that of a prefill follows from the lengths of the request's own parts, and every random number comes from (seed,
step), so what a request yields does not depend on its slot, its neighbours, the order of arrival or what is remembered:
a run that was killed and resumed draws the same tokens.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import chain
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.stages import Wrapped
from jaxtyping import Array, Bool, Float, Int, UInt32

from agentark_jax.data.tokenizer import Tokenizer
from agentark_jax.engines.base import Request, check_ids, check_request
from agentark_jax.engines.config import EngineConfig
from agentark_jax.engines.constraint import Constrainer, Constraint
from agentark_jax.engines.sampling import sample, uniform_at
from agentark_jax.errors import AgentArkError
from agentark_jax.models import transformer
from agentark_jax.models.attention import AttentionPlan, choose_attention, kernel_platform
from agentark_jax.models.config import ModelConfig
from agentark_jax.objectives.chunked import chunked_logprobs
from agentark_jax.records import Completion, ids_hash

logger = logging.getLogger(__name__)

_STOP_IDS = 4
# Positions of one prefill: as many prompts of a bucket as fit, so that its matrix products are large, though a single
# prompt takes as long as all of them.
_PREFILL_TOKENS = 192
# Rows of one prefill that goes on after a shared beginning: about as many as a debate has agents.
_REST_ROWS = 4
_REMEMBERED_PREFILLS = 6


class Slots(NamedTuple):
    """Device state of the S slots. `token` is the last known token, which the next step reads at `position`."""

    token: Int[Array, " S"]
    position: Int[Array, " S"]
    step: Int[Array, " S"]
    active: Bool[Array, " S"]
    seed: UInt32[Array, "S 2"]
    temperature: Float[Array, " S"]
    top_p: Float[Array, " S"]
    max_tokens: Int[Array, " S"]
    stop_ids: Int[Array, "S K"]


@dataclass(frozen=True)
class _Prefill:
    """Keys and values of several parts of prompts, each in a row of its own; `used`: those that a slot has taken.

    The parts go by the content hashes of all that is before them in their prompt and of themselves.
    """

    kv: transformer.Cache
    rows: dict[str, int]
    used: set[str] = field(default_factory=set)

    def take(self, key: str) -> bool:
        """Whether a slot had taken this part before."""
        again = key in self.used
        self.used.add(key)
        return again


@dataclass
class _Running:
    """Host side of one request in a slot."""

    request: Request
    answer: "asyncio.Future[Completion]"
    started: float
    cached_tokens: int
    constraint: Constraint | None
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)


class LocalEngine:
    """Implements `Engine` with the weights it was given.

    Args:
        context: longest prompt plus completion, in tokens.
        params: the model's parameters as `models.transformer` defines them.
        model: revision of the model, recorded with every turn.
        weights: version of the weights, recorded with every turn.
    """

    text_only = False

    def __init__(
        self,
        config: EngineConfig,
        model_config: ModelConfig,
        params: transformer.Params,
        tokenizer: Tokenizer,
        *,
        context: int,
        model: str,
        weights: str,
    ):
        self.model = model
        self.weights = weights
        self._config = config
        self._context = context
        self._model_config = model_config
        self._tokenizer = tokenizer
        self._params = transformer.unstack(model_config, params)
        self._platform = next(iter(jnp.asarray(self._params["embedding"]).devices())).platform
        self._cache = transformer.init_cache(model_config, config.slots, context, jnp.dtype(config.cache_dtype))
        self._slots = _empty_slots(config.slots)
        self._running: dict[int, _Running] = {}
        self._waiting: deque[tuple[Request, Constraint | None, asyncio.Future[Completion]]] = deque()
        self._prefills: deque[_Prefill] = deque(maxlen=_REMEMBERED_PREFILLS)
        self._rests: deque[_Prefill] = deque(maxlen=_REMEMBERED_PREFILLS)
        self._attention: dict[int, AttentionPlan] = {}
        self._driver: asyncio.Task[None] | None = None
        self._constrainer: Constrainer | None = None
        self.sampled_tokens = 0
        self.prefilled_tokens = 0

    async def __aenter__(self) -> "LocalEngine":
        return self

    async def __aexit__(self, *error: object) -> None:
        """There is nothing to close: what it holds is freed with it."""

    def update_weights(self, params: transformer.Params, weights: str) -> None:
        """Goes on with other parameters of the same model, under the name `weights`.

        Raises AgentArkError while requests are in flight: their tokens would come from both.
        """
        if self._running or self._waiting:
            raise AgentArkError(f"{len(self._running) + len(self._waiting)} requests are in flight; await them first.")
        self._params = transformer.unstack(self._model_config, params)
        self.weights = weights
        self._prefills.clear()
        self._rests.clear()

    async def score(self, ids: np.ndarray) -> np.ndarray:
        """Log-probabilities [T - 1] of each token of `ids` [T] after those before it, at temperature 1.

        Raises AgentArkError for ids outside the vocabulary or more than fit the context.
        """
        check_ids(ids, 0, **self._limits())
        bucket = self._bucket(len(ids))
        padded = np.zeros(bucket, np.int32)
        padded[: len(ids)] = ids
        found = _score(self._model_config, self._attends(bucket), self._params, padded, np.int32(len(ids)))
        return self._finite(np.asarray(found)[: len(ids) - 1])

    def _finite(self, logprobs: np.ndarray) -> np.ndarray:
        """Raises AgentArkError for log-probabilities that are none."""
        if not np.isfinite(logprobs).all():
            raise AgentArkError(
                f"{self.model}: a log-probability is {logprobs[~np.isfinite(logprobs)][0]}: weights {self.weights} are "
                "damaged, or what they compute overflows. Look for NaN in the model, or take its other checkpoint."
            )
        return logprobs

    async def generate(self, request: Request) -> Completion:
        """Sample one completion.

        Raises:
            AgentArkError: prompt and completion do not fit the context, or a token id is outside the vocabulary.
        """
        self._check(request)
        constraint = self._constrained(request)
        answer: asyncio.Future[Completion] = asyncio.get_running_loop().create_future()
        self._waiting.append((request, constraint, answer))
        if self._driver is None or self._driver.done():
            self._driver = asyncio.create_task(self._drive())
        return await answer

    def _check(self, request: Request) -> None:
        if len(request.sampling.stop_ids) > _STOP_IDS:
            raise AgentArkError(f"{len(request.sampling.stop_ids)} stop ids; the engine takes at most {_STOP_IDS}.")
        check_request(request, **self._limits())

    def _limits(self) -> dict[str, Any]:
        """What `check_ids` compares with."""
        limit = (
            f"a context of {self._context}: lower max_tokens, or raise engine.context (methods.context for a method)"
        )
        return {"vocabulary": self._model_config.vocab_size, "context": self._context, "limit": limit}

    def _constrained(self, request: Request) -> Constraint | None:
        if request.sampling.regex is None:
            return None
        if self._constrainer is None:
            self._constrainer = Constrainer(self._tokenizer, self._model_config.vocab_size)
        return self._constrainer.constrain(request.sampling.regex, request.sampling.stop_ids)

    async def _drive(self) -> None:
        """Decode until nobody waits. A failure reaches every request in flight."""
        try:
            await asyncio.sleep(0)  # let everyone who asks in this turn of the event loop get into the queue
            while self._waiting or self._running:
                self._admit()
                self._decode()
                await asyncio.sleep(0)
            self._driver = None  # the finished task would keep this engine, and its cache, alive
        except Exception as error:
            asking = [running.answer for running in self._running.values()] + [answer for *_, answer in self._waiting]
            self._running.clear()
            self._waiting.clear()
            self._slots = _empty_slots(self._config.slots)
            for answer in asking:
                if not answer.done():
                    answer.set_exception(error)

    def _admit(self) -> None:
        """Move requests from the queue into free slots."""
        free = deque(slot for slot in range(self._config.slots) if slot not in self._running)
        while free and self._waiting:
            request, constraint, answer = self._waiting[0]
            if not answer.cancelled():
                started = time.monotonic()
                cached = self._insert(request, free[0])
                self._slots = _occupy(self._slots, free[0], *_slot_values(request))
                self._running[free.popleft()] = _Running(request, answer, started, cached, constraint)
            self._waiting.popleft()

    def _insert(self, request: Request, slot: int) -> int:
        """Put keys and values of a prompt's body into a slot; how many of its tokens another request had prefilled."""
        first, rest = _parts(request)
        if len(first) == 0:
            return 0
        key = ids_hash(first)
        begun = self._held(key)
        if begun is None:
            begun = self._prefill(first)
            self._prefills.append(begun)
        cached = len(first) if begun.take(key) else 0
        parts = [(begun.kv, np.int32(begun.rows[key]), np.int32(len(first)))]
        if len(rest):
            longer = key + ids_hash(rest)
            extended = self._held(longer)
            if extended is None:
                extended = self._extend(begun, key, first, rest)
                self._rests.append(extended)
            cached += len(rest) if extended.take(longer) else 0
            parts.append((extended.kv, np.int32(extended.rows[longer]), np.int32(len(rest))))
        self._cache = _copy(self._model_config, self._context, self._cache, np.int32(slot), parts)
        return cached

    def _prefill(self, first: np.ndarray) -> _Prefill:
        """Prefill the first part of a body, and with it those of its bucket that wait behind it.

        The number of rows depends on the bucket alone: what a prompt yields must not depend on who else is there.
        """
        bucket = self._bucket(len(first))
        waiting = (part for part, _ in self._bodies() if self._bucket(len(part)) == bucket)
        ids, rows = self._batch(max(1, _PREFILL_TOKENS // bucket), bucket, "", chain([first], waiting))
        return _Prefill(_prefill(self._model_config, self._attends(bucket), self._params, ids), rows)

    def _extend(self, begun: _Prefill, key: str, first: np.ndarray, rest: np.ndarray) -> _Prefill:
        """Prefill what follows the prefilled `first` in a body, and with it what follows it in those that wait.

        As in `_prefill` the number of rows depends on the bucket alone. All rows follow the same beginning, whose keys
        and values are kept once.
        """
        bucket = self._bucket(len(rest))
        waiting = (
            other
            for shared, other in self._bodies()
            if len(other) and self._bucket(len(other)) == bucket and np.array_equal(shared, first)
        )
        ids, rows = self._batch(max(1, min(_REST_ROWS, _PREFILL_TOKENS // bucket)), bucket, key, chain([rest], waiting))
        where = np.int32(begun.rows[key]), np.int32(len(first))
        return _Prefill(_extend(self._model_config, self._params, ids, begun.kv, *where), rows)

    def _bodies(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The bodies of those that wait, in their parts."""
        return (_parts(request) for request, _, answer in self._waiting if not answer.cancelled())

    def _batch(
        self, rows: int, bucket: int, before: str, parts: Iterable[np.ndarray]
    ) -> tuple[np.ndarray, dict[str, int]]:
        """The first different parts that are not prefilled yet, padded [rows, bucket], and the row of each.

        `before` is the key of what they follow.
        """
        ids, places = np.zeros((rows, bucket), np.int32), dict[str, int]()
        for part in parts:
            key = before + ids_hash(part)
            if key not in places and self._held(key) is None:
                ids[len(places), : len(part)] = part
                places[key] = len(places)
                self.prefilled_tokens += len(part)
            if len(places) == rows:
                break
        return ids, places

    def _attends(self, bucket: int) -> AttentionPlan:
        """What computes attention in prefills of this bucket; logged when it is decided."""
        if bucket not in self._attention:
            embedding = jnp.asarray(self._params["embedding"])
            devices = list(embedding.devices())
            platform = kernel_platform(devices[0]) if len(devices) == 1 else f"{len(devices)} devices without a mesh"
            self._attention[bucket], why = choose_attention(
                platform, self._model_config, packed=False, length=bucket, dtype=embedding.dtype
            )
            logger.info("attention of prefills: %s", why)
        return self._attention[bucket]

    def _held(self, key: str) -> _Prefill | None:
        return next((prefill for prefill in (*self._prefills, *self._rests) if key in prefill.rows), None)

    def _bucket(self, length: int) -> int:
        """Positions that a part of this length is padded to."""
        return min(-(-length // self._config.prompt_bucket) * self._config.prompt_bucket, self._context)

    def _decode(self) -> None:
        """Run decode steps until a slot can be refilled, all are done, or the chunk is full; deliver what ended.

        While a completion is constrained it is one step, since the host has to say what may come next.
        """
        allowed = self._allowed()
        self._slots, self._cache, drawn = decoder(self._platform)(
            self._model_config,
            self._config.chunk if allowed is None else 1,
            self._params,
            self._slots,
            self._cache,
            bool(self._waiting),
            any(running.request.sampling.top_p < 1 for running in self._running.values()),
            allowed,
        )
        ids, logprobs, counts, active = jax.device_get((drawn.ids, drawn.logprobs, drawn.counts, self._slots.active))
        for slot, running in list(self._running.items()):
            count = int(counts[slot])
            self.sampled_tokens += count
            running.ids += ids[slot, :count].tolist()
            running.logprobs += logprobs[slot, :count].tolist()
            if running.constraint is not None:
                running.constraint.advance(running.ids[-1])
            if not active[slot]:
                del self._running[slot]
                if running.answer.cancelled():
                    continue
                try:
                    running.answer.set_result(self._completion(running))
                except AgentArkError as error:
                    running.answer.set_exception(error)

    def _allowed(self) -> np.ndarray | None:
        """A bit for each slot and token that may come next [S, W] int32; None where nothing is constrained."""
        constraints = {slot: running.constraint for slot, running in self._running.items() if running.constraint}
        if not constraints:
            return None
        assert self._constrainer is not None
        allowed = np.full((self._config.slots, self._constrainer.words), -1, np.int32)
        for slot, constraint in constraints.items():
            allowed[slot] = constraint.allowed
        return allowed

    def _completion(self, running: _Running) -> Completion:
        return Completion(
            ids=np.asarray(running.ids, np.int32),
            logprobs=self._finite(np.asarray(running.logprobs, np.float32)),
            text=self._tokenizer.decode(running.ids).strip(),
            finish="stop" if running.ids[-1] in running.request.sampling.stop_ids else "length",
            prompt_tokens=len(running.request.prompt_ids),
            cached_tokens=running.cached_tokens,
            seconds=time.monotonic() - running.started,
        )


class _Drawn(NamedTuple):
    ids: Int[Array, "S C"]
    logprobs: Float[Array, "S C"]
    counts: Int[Array, " S"]


def _empty_slots(slots: int) -> Slots:
    return Slots(
        token=jnp.zeros(slots, jnp.int32),
        position=jnp.zeros(slots, jnp.int32),
        step=jnp.zeros(slots, jnp.int32),
        active=jnp.zeros(slots, bool),
        seed=jnp.zeros((slots, 2), jnp.uint32),
        temperature=jnp.ones(slots, jnp.float32),
        top_p=jnp.ones(slots, jnp.float32),
        max_tokens=jnp.ones(slots, jnp.int32),
        stop_ids=jnp.full((slots, _STOP_IDS), -1, jnp.int32),
    )


def _parts(request: Request) -> tuple[np.ndarray, np.ndarray]:
    """A prompt's body in two parts that are prefilled one after the other: what others share, and the rest.

    The body is all but the last token, which is left to the first decode step, so that samples of one prompt share the
    whole prefill and no prefill needs the output head. Where nothing is shared, or all of it, the second part is empty.
    """
    body = request.prompt_ids[:-1]
    end = request.shared or len(body)
    return body[:end], body[end:]


def _slot_values(request: Request) -> tuple[Any, ...]:
    """One row for each field of `Slots`."""
    sampling = request.sampling
    stop_ids = np.full(_STOP_IDS, -1, np.int32)
    stop_ids[: len(sampling.stop_ids)] = sampling.stop_ids
    return (
        np.int32(request.prompt_ids[-1]),
        np.int32(len(request.prompt_ids) - 1),
        np.int32(0),
        np.bool_(True),
        np.asarray([sampling.seed >> 32 & 0xFFFFFFFF, sampling.seed & 0xFFFFFFFF], np.uint32),
        np.float32(sampling.temperature),
        np.float32(sampling.top_p),
        np.int32(sampling.max_tokens),
        stop_ids,
    )


@partial(jax.jit, donate_argnums=0)
def _occupy(slots: Slots, slot: Int[Array, ""], *values: Any) -> Slots:
    return Slots(*(field.at[slot].set(value) for field, value in zip(slots, values, strict=True)))


@partial(jax.jit, static_argnums=(0, 1))
def _prefill(
    config: ModelConfig, attention: AttentionPlan, params: transformer.Params, ids: Int[Array, "R T"]
) -> transformer.Cache:
    return transformer.prefill(config, params, ids, attention)[1]


@partial(jax.jit, static_argnums=(0, 1))
def _score(
    config: ModelConfig,
    attention: AttentionPlan,
    params: transformer.Params,
    ids: Int[Array, " T"],
    length: Int[Array, ""],
) -> Float[Array, " T-1"]:
    """Log-probability of each token after the first, given those before it; zero from `length` on."""
    hidden = transformer.prefill(config, params, ids[None], attention)[0][0, :-1]
    head, real = transformer.unembedding(config, params), jnp.arange(1, len(ids)) < length
    return chunked_logprobs(hidden, head, ids[1:], real, soft_cap=config.final_softcap).logprobs


@partial(jax.jit, static_argnums=0)
def _extend(
    config: ModelConfig,
    params: transformer.Params,
    ids: Int[Array, "R T"],
    kv: transformer.Cache,
    row: Int[Array, ""],
    length: Int[Array, ""],
) -> transformer.Cache:
    """What follows the first `length` tokens of a row of `kv`."""
    return transformer.extend(config, params, ids, _row(kv, row), length)[1]


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=2)
def _copy(
    config: ModelConfig,
    context: int,
    cache: transformer.Cache,
    slot: Int[Array, ""],
    parts: list[tuple[transformer.Cache, Int[Array, ""], Int[Array, ""]]],
) -> transformer.Cache:
    """Put a body into a slot: the parts it consists of, one or two, each a row of a prefill and its length."""
    (kv, row, length), *rest = parts
    for after, place, more in rest:
        joined = partial(transformer.append, length=length)
        kv = jax.tree.map(joined, _row(kv, row), _row(after, place))
        kv = jax.tree.map(lambda leaf: leaf[:, :, :context], kv)  # beyond it there is only padding
        row, length = jnp.int32(0), length + more
    return transformer.insert(config, cache, kv, length[None], slot[None], row[None])


def _row(kv: transformer.Cache, row: Int[Array, ""]) -> transformer.Cache:
    return jax.tree.map(lambda leaf: leaf[row][None], kv)


@lru_cache
def decoder(platform: str) -> Wrapped:
    """`_decode_chunk`, compiled for the devices of a platform."""
    # XLA makes one product of several with the same operand, and for that copies the weights of a layer's projections
    # together in every step: on GPUs as many bytes again as the step reads of them.
    options = {"xla_gpu_dot_merger_threshold_mb": 0} if platform == "gpu" else None
    return jax.jit(_decode_chunk, static_argnums=(0, 1, 6), donate_argnums=(3, 4), compiler_options=options)


def _decode_chunk(
    config: ModelConfig,
    chunk: int,
    params: transformer.Params,
    slots: Slots,
    cache: transformer.Cache,
    queue_waits: Bool[Array, ""],
    truncates: bool,
    allowed: Int[Array, "S W"] | None,
) -> tuple[Slots, transformer.Cache, _Drawn]:
    """At most `chunk` decode steps for all slots; ends early when a slot falls free while the queue waits.

    `allowed` has a bit for each token that a slot may sample; the others have probability zero.
    """
    count = slots.active.sum()

    def go_on(carry: tuple[Any, ...]) -> Bool[Array, ""]:
        index, slots, _, _ = carry
        active = slots.active.sum()
        return (index < chunk) & (active > 0) & ~(queue_waits & (active < count))

    def step(carry: tuple[Any, ...]) -> tuple[Any, ...]:
        index, slots, cache, drawn = carry
        hidden, cache = transformer.decode_step(config, params, slots.token, slots.position, cache)
        logits = transformer.logits(config, params, hidden)
        if allowed is not None:
            ids = jnp.arange(logits.shape[1])
            logits = jnp.where(allowed[:, ids // 32] >> (ids % 32) & 1, logits, -jnp.inf)
        token, logprob = sample(
            logits,
            uniform_at(slots.seed, slots.step),
            slots.temperature,
            slots.top_p if truncates else None,
        )
        done = slots.step + 1 >= slots.max_tokens
        stopped = jnp.any(token[:, None] == slots.stop_ids, axis=-1)
        drawn = _Drawn(
            drawn.ids.at[:, index].set(token),
            drawn.logprobs.at[:, index].set(logprob),
            drawn.counts + slots.active,
        )
        moved = slots.active.astype(jnp.int32)
        slots = slots._replace(
            token=jnp.where(slots.active, token, slots.token),
            position=slots.position + moved,
            step=slots.step + moved,
            active=slots.active & ~done & ~stopped,
        )
        return index + 1, slots, cache, drawn

    shape = (slots.token.shape[0], chunk)
    drawn = _Drawn(jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.float32), jnp.zeros(shape[0], jnp.int32))
    _, slots, cache, drawn = jax.lax.while_loop(go_on, step, (jnp.int32(0), slots, cache, drawn))
    return slots, cache, drawn
