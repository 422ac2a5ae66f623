"""What a suite works with: one model, one set of questions, and stages that are reused once they are done."""

from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from agentark_jax.asking import ask_alone
from agentark_jax.config import EvaluateRun
from agentark_jax.data.render import Format, Prompt
from agentark_jax.generation import Asked, Generation, Model, Seat
from agentark_jax.progress import Display
from agentark_jax.protocols.calls import Draw
from agentark_jax.protocols.table import Pool
from agentark_jax.records import Label, Question, Turn, questions_hash, stable_hash
from agentark_jax.stages import Manifest, Run, Work
from agentark_jax.tasks.task import Task
from agentark_jax.traces.labels import label_turns
from agentark_jax.traces.store import TraceStore


@dataclass(frozen=True)
class Bench:
    """One model and the questions that it is asked, in the directory of an evaluation.

    Attributes:
        questions: all of them, in the store.
        form: how the model is asked.
        seat: the model and who generates for it.
    """

    config: EvaluateRun
    run: Run
    store: TraceStore
    display: Display
    generation: Generation
    task: Task
    questions: list[Question]
    model: Model
    seat: Seat

    @property
    def form(self) -> Format:
        return self.model.form

    @property
    def seed(self) -> int:
        return self.config.seed

    @property
    def level(self) -> float:
        return self.config.level

    @property
    def greedy(self) -> Draw:
        """How the one answer is drawn."""
        return Draw(0.0, self.config.max_tokens)

    def measure(
        self,
        stage: str,
        build: Callable[[Work], None],
        *,
        version: int,
        config: Mapping[str, Any],
        inputs: Mapping[str, Manifest | str] | None = None,
    ) -> Manifest:
        """A stage of the evaluation, made by `build` where it is not up to date.

        Model, prompt format, questions, engine, longest answer, seed and grader are in its fingerprint already;
        `config` and `inputs` say what else it depends on.
        """
        known = {
            **self.config.engine.fingerprint(),
            "format": self.form.hash,
            "max_tokens": self.config.max_tokens,
            "seed": self.seed,
            "grader": self.task.grader_id,
        }
        served = [] if self.seat.api == "sglang" else [self.seat.api, self.seat.served]
        given: dict[str, Manifest | str] = {
            "model": stable_hash([self.model.name, self.model.revision, *served]),
            "questions": questions_hash(self.questions),
        }
        return self.run.produce(
            stage, build, version=version, config={**known, **config}, inputs={**given, **(inputs or {})}
        )

    def ask(
        self,
        work: Work,
        title: str,
        ask: Callable[[Question, Pool], Awaitable[Sequence[Turn]]],
        *,
        calls: int | None,
        questions: Sequence[Question] | None = None,
        context: int | None = None,
    ) -> Asked:
        """Put questions to the model, all at once: as `Generation.ask`.

        Args:
            questions: None: all.
            context: longest prompt plus completion of a call, in tokens; None: of a question and its answer.
        """
        asked = self.questions if questions is None else questions
        room = self.room(map(self.form.question, asked)) if context is None else context
        return self.generation.ask(work, title, [self.seat], asked, ask, calls=calls, context=room, read=self.read)

    def ask_alone(
        self,
        work: Work,
        title: str,
        *,
        protocol: str,
        draw: Draw | None = None,
        samples: int = 1,
        questions: Sequence[Question] | None = None,
    ) -> Asked:
        """Independent answers of the model to each question (None: all), drawn as `draw` says (None: greedily)."""
        asked = self.questions if questions is None else questions
        return ask_alone(
            self.generation,
            work,
            title,
            seats=[self.seat],
            questions=asked,
            draw=draw or self.greedy,
            samples=samples,
            protocol=protocol,
            context=self.room(map(self.form.question, asked)),
        )[0]

    def room(self, prompts: Iterable[Prompt], max_tokens: int | None = None) -> int:
        """Tokens of the longest of these prompts and of an answer to it, at most `limit`."""
        longest = max((sum(map(len, prompt)) for prompt in prompts), default=1)
        return min(longest + (max_tokens or self.config.max_tokens), self.limit)

    @property
    def limit(self) -> int:
        """Tokens that a prompt and its answer may take together, at most."""
        return min(self.model.config.max_positions, self.config.engine.context or self.model.config.max_positions)

    def read(self, question: Question, text: str) -> str:
        """The final answer of a text; no verdict enters here."""
        return self.task.grade(question, text).answer

    def label(self, turns: Iterable[Turn]) -> dict[str, Label]:
        """Verdicts of the task's grader, by turn key; they are kept in the store."""
        return label_turns(self.store, turns, self.task.grade, self.task.grader_id)
