"""Who answers for the agents of a run: the base and the models of a team, each on its engine, asked all at once."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

from agentark_jax.data.render import Format
from agentark_jax.engines.base import Engine
from agentark_jax.engines.config import EngineConfig
from agentark_jax.engines.local import LocalEngine
from agentark_jax.engines.openai import OpenAIEngine
from agentark_jax.engines.sglang import SGLangEngine
from agentark_jax.errors import memory_for
from agentark_jax.models import transformer, weights
from agentark_jax.models.config import ModelConfig
from agentark_jax.progress import Bar, Display
from agentark_jax.protocols.calls import Caller
from agentark_jax.protocols.config import Api
from agentark_jax.protocols.table import Agent, Pool, read_answer
from agentark_jax.records import Question, Turn
from agentark_jax.stages import Work
from agentark_jax.traces.store import TraceStore
from agentark_jax.training.job import release_memory

Asked = dict[str, list[Turn]]
Place = tuple[Path, tuple[str, ...], Api, str | None]


@dataclass(frozen=True)
class Model:
    """A model that a stage made or found. `revision` identifies its files, `name` is what turns call it."""

    name: str
    directory: Path
    revision: str
    config: ModelConfig
    form: Format


@dataclass(frozen=True)
class Seat:
    """Who answers for an agent: a model, the servers that have it (none: this process), and how it is asked.

    Behind the `openai` API the model's weights are those of the servers, which call it `served`.
    """

    model: Model
    servers: tuple[str, ...]
    api: Api = "sglang"
    served: str | None = None
    temperature: float | None = None


class Generation:
    """Asks models questions; holds the parameters that the embedded engine last used.

    Args:
        seed: the run's.
    """

    def __init__(self, config: EngineConfig, store: TraceStore, display: Display, *, seed: int):
        self._config = config
        self._store = store
        self._display = display
        self._seed = seed
        self._held: dict[str, transformer.Params] = {}  # by revision

    def hold(self, revision: str, params: transformer.Params) -> None:
        """The embedded engine takes these parameters for those of models of this revision; others are let go of."""
        self._held = {revision: params}

    def release(self) -> None:
        """Lets go of all parameters."""
        self._held.clear()
        release_memory()

    @memory_for(
        "generation",
        "Lower engine.slots or engine.context, set engine.cache_dtype: bfloat16, or name engine.servers. What was "
        "said is kept: the same command goes on",
    )
    def ask(
        self,
        work: Work,
        title: str,
        seats: Sequence[Seat],
        questions: Sequence[Question],
        ask: Callable[[Question, Pool], Awaitable[Sequence[Turn]]],
        *,
        calls: int | None,
        context: int,
        read: Callable[[Question, str], str] = read_answer,
        bar: Bar | None = None,
    ) -> Asked:
        """Put questions to agents, all at once; the turns by question, in the order `ask` gives them.

        Args:
            work: gets the counts of calls and tokens.
            calls: how many each question takes at most; None where nobody knows.
            context: longest prompt plus completion of a call, in tokens, where the model takes that many; what agents
                quote beyond it is left out (see `protocols.table`).
            read: how the answer of a text is read.
            bar: what is advanced by every call, in the place of a bar of its own.
        """
        shown = nullcontext(bar) if bar else self._display.bar(title, total=calls and len(questions) * calls)
        with shown as bar:

            def on_turn(turn: Turn, generated: bool) -> None:
                assert turn.completion is not None, "callers tell of turns that succeeded"
                bar.advance(len(turn.completion.ids) if generated else 0)

            async def everyone() -> list[Sequence[Turn]]:
                async with AsyncExitStack() as stack:
                    engines = await self._engines(seats, context, stack)
                    agents = []
                    for seat in seats:
                        caller = Caller(
                            engines[_place(seat)], self._store, seat.model.form, seed=self._seed, on_turn=on_turn
                        )
                        # Not what engine.context says: that is about memory and must change no result.
                        room = min(context, seat.model.config.max_positions)
                        agents.append(Agent(caller, seat.temperature, room))
                    pool = Pool(tuple(agents), read)
                    return await asyncio.gather(*(ask(question, pool) for question in questions))

            asked = asyncio.run(everyone())
        completions = [turn.completion for turns in asked for turn in turns if turn.completion]
        work.tokens = sum(len(completion.ids) for completion in completions)
        work.counts = {
            "calls": len(completions),
            "prompt_tokens": sum(completion.prompt_tokens for completion in completions),
            "completion_tokens": work.tokens,
        }
        return {question.id: list(turns) for question, turns in zip(questions, asked, strict=True)}

    async def _engines(self, seats: Sequence[Seat], context: int, stack: AsyncExitStack) -> Mapping[Place, Engine]:
        """An entered engine for each model and its servers."""
        embedded = {seat.model.revision for seat in seats if not seat.servers}
        if not embedded <= self._held.keys():
            # Let go of the old parameters before the new ones come.
            self._held = {revision: params for revision, params in self._held.items() if revision in embedded}
            release_memory()
        engines: dict[Place, Engine] = {}
        for seat in seats:
            if _place(seat) not in engines:
                engines[_place(seat)] = await stack.enter_async_context(self.engine(seat, context))
        return engines

    def engine(self, seat: Seat, context: int) -> LocalEngine | SGLangEngine | OpenAIEngine:
        """The engine of a seat, to be entered; `context` as for `ask`."""
        model, tokenizer = seat.model, seat.model.form.tokenizer
        settings = replace(self._config, servers=list(seat.servers))
        if seat.api == "openai":
            limit = model.config.max_positions
            return OpenAIEngine(settings, tokenizer, context=limit, model=model.name, served=seat.served)
        # What the engine's settings change in the samples, the keys of the calls must say.
        version = "+".join([model.revision, *self._config.fingerprint().values()])
        names = {"model": model.name, "weights": version}
        if seat.servers:
            return SGLangEngine(settings, model.directory, tokenizer, **names)
        if model.revision not in self._held:
            self._held[model.revision] = weights.load_params(model.directory, model.config)
        room = min(self._config.context or context, model.config.max_positions)
        return LocalEngine(self._config, model.config, self._held[model.revision], tokenizer, context=room, **names)


def _place(seat: Seat) -> Place:
    """What seats of one engine have in common."""
    return seat.model.directory, seat.servers, seat.api, seat.served
