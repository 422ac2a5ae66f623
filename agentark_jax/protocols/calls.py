"""Asking the model, once and for good: a call is looked up in the trace store before it is paid for."""

from collections.abc import Callable
from dataclasses import dataclass

from agentark_jax.data.render import Format, Prompt
from agentark_jax.engines.base import Engine, Request
from agentark_jax.errors import AgentArkError, UsageError
from agentark_jax.records import Call, Question, Sampling, Turn, stable_hash
from agentark_jax.traces.store import TraceStore
from agentark_jax.traces.writer import TurnWriter


@dataclass(frozen=True)
class Draw:
    """How one call samples; its seed follows from the run's seed and the call's place in the protocol."""

    temperature: float
    max_tokens: int

    def __post_init__(self) -> None:
        if self.temperature < 0 or self.max_tokens < 1:
            raise UsageError(
                f"draw: temperature {self.temperature} and max_tokens {self.max_tokens}: give a temperature of 0 "
                "(greedy) or more, and at least one token."
            )


GREEDY, SAMPLED = Draw(0.0, 512), Draw(0.7, 512)


class CallFailed(AgentArkError):
    """The engine could not answer a call; `turn` is the failed attempt as it is recorded."""

    def __init__(self, turn: Turn):
        super().__init__(turn.error)
        self.turn = turn


class Caller:
    """Puts calls to one engine and keeps every turn in the store.

    Args:
        seed: the run's seed; with the call's place in its protocol it determines the call's own seed.
        on_turn: told of every turn as it is at hand, and whether it was generated now (else: found in the store).
    """

    def __init__(
        self,
        engine: Engine,
        store: TraceStore,
        form: Format,
        *,
        seed: int,
        on_turn: Callable[[Turn, bool], None] | None = None,
    ):
        self.form = form
        self.model, self.text_only = engine.model, engine.text_only
        self._engine = engine
        self._store = store
        self._writer = TurnWriter(store)
        self._seed = seed
        self._on_turn = on_turn

    async def ask(
        self,
        question: Question,
        prompt: Prompt,
        draw: Draw,
        *,
        protocol: str,
        role: str,
        agent: int = 0,
        round: int = 0,
        sample: int = 0,
        parents: tuple[str, ...] = (),
        shared: int = 0,
        regex: str | None = None,
    ) -> Turn:
        """The answer to one call, from the store or from the engine.

        `shared`, as in `Request`, is no part of the call's key: it has to follow from what is, such as the prompt's
        segments, and never from who else asks, or a resumed run could draw other log-probabilities in the last digits.
        `regex`, where given, is what the whole answer must match.

        Raises:
            CallFailed: the engine failed; the failure is recorded as an attempt, and a later run tries again.
        """
        place = [self._seed, question.id, protocol, role, agent, round, sample]
        call = Call(
            question_id=question.id,
            protocol=protocol,
            agent=agent,
            role=role,
            round=round,
            sample=sample,
            parents=parents,
            model=self._engine.model,
            weights=self._engine.weights,
            tokenizer=self.form.tokenizer.hash,
            template=self.form.hash,
            sampling=Sampling(
                temperature=draw.temperature,
                max_tokens=draw.max_tokens,
                stop_ids=self.form.stop_ids,
                seed=int(stable_hash(place)[:16], 16),
                regex=regex,
            ),
            prompt=prompt,
        )
        key = call.key
        known = self._store.lookup(key)
        if known is not None:
            self._tell(known, generated=False)
            return known
        attempt = self._store.attempts(key)
        try:
            completion = await self._engine.generate(Request(call.prompt_ids, call.sampling, shared))
        except AgentArkError as error:
            failed = Turn(call, attempt, None, str(error))
            await self._writer.record(failed)
            raise CallFailed(failed) from error
        turn = Turn(call, attempt, completion)
        await self._writer.record(turn)
        self._tell(turn, generated=True)
        return turn

    def _tell(self, turn: Turn, *, generated: bool) -> None:
        if self._on_turn is not None:
            self._on_turn(turn, generated)
