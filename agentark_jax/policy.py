"""A policy's rollouts in a run: sampled by the run's engine, kept in its trace store, graded by its task."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from agentark_jax.data.steps import steps
from agentark_jax.engines.sglang import SGLangEngine
from agentark_jax.errors import AgentArkError
from agentark_jax.generation import Asked, Generation, Model, Seat
from agentark_jax.progress import Bar
from agentark_jax.protocols.calls import CallFailed, Draw
from agentark_jax.protocols.table import Pool
from agentark_jax.records import Grade, Question, Turn
from agentark_jax.stages import Work
from agentark_jax.tasks.task import Task
from agentark_jax.traces import labels as labelling
from agentark_jax.traces.store import TraceStore
from agentark_jax.training.rewards import Rollout
from agentark_jax.training.rl import Policy
from agentark_jax.training.rollouts import Groups, Sample

ROLLOUT, POLICY = "rollout", "policy"
# By how much a server's log-probabilities of probes may differ from the trainer's, in nats: of one that computes in
# float32, or in anything else. A policy of other weights, a few updates later, differs by more than the first.
EXACT, ROUNDED = 1e-3, 0.5


@dataclass
class PolicySampler:
    """Samples groups of rollouts (`training.rl.Sampler`), each of them stored like any other call.

    Attributes:
        model: what the policy started from; its tokenizer and prompt format are the policy's.
        servers: SGLang servers that get each policy's weights; none: the embedded engine has them.
        draw: how rollouts are sampled, never truncated.
        size: rollouts of a question.
        context: longest prompt plus completion, in tokens.
    """

    generation: Generation
    store: TraceStore
    task: Task
    model: Model
    servers: tuple[str, ...]
    draw: Draw
    size: int
    context: int
    bar: Bar

    def __call__(self, questions: Sequence[Question], visits: Sequence[int], policy: Policy) -> Groups:
        """See `Sampler`."""
        model = replace(self.model, revision=policy.version)
        if self.servers:
            assert policy.directory is not None, "for servers policies are published"
            model = replace(model, directory=policy.directory)
        else:
            self.generation.hold(policy.version, policy.params)
        seat = Seat(model, self.servers)
        if self.servers:
            asyncio.run(self._verify(seat, policy))
        asked: dict[tuple[str, int], list[Turn]] = {}
        # Where an epoch ends within an iteration, a question may come twice, with different visits.
        for visit in sorted(set(visits)):
            once = [question for question, number in zip(questions, visits, strict=True) if number == visit]
            asked |= {(name, visit): turns for name, turns in self._asked(seat, once, visit).items()}
        self.generation.release()  # training needs the room
        return self._groups(questions, [asked[each.id, visit] for each, visit in zip(questions, visits, strict=True)])

    def _asked(self, seat: Seat, questions: list[Question], visit: int) -> Asked:
        async def ask(question: Question, pool: Pool) -> list[Turn]:
            return await asyncio.gather(*(self._one(question, visit, pool, number) for number in range(self.size)))

        work = Work(self.model.directory)  # its counts are of one iteration: the loop has those of all
        return self.generation.ask(
            work, "", [seat], questions, ask, calls=self.size, context=self.context, bar=self.bar
        )

    async def _verify(self, seat: Seat, policy: Policy) -> None:
        """Gives the servers the policy's weights and makes sure that they compute with them."""
        async with self.generation.engine(seat, self.context) as engine:
            assert isinstance(engine, SGLangEngine), "policies are sampled by servers that take weights"
            tolerance = EXACT if engine.weights.endswith(policy.version) else ROUNDED
            probes, expected = zip(*policy.probes, strict=True)
            await engine.verify_weights(probes, expected, tolerance)

    async def _one(self, question: Question, visit: int, pool: Pool, number: int) -> Turn:
        caller = pool[0].caller
        prompt = caller.form.question(question)
        try:
            return await caller.ask(
                question, prompt, self.draw, protocol=ROLLOUT, role=POLICY, round=visit, sample=number
            )
        except CallFailed as failed:
            return failed.turn

    def _groups(self, questions: Sequence[Question], asked: Sequence[list[Turn]]) -> Groups:
        answered = [turn for turns in asked for turn in turns if turn.completion is not None]
        by_id = {question.id: question for question in questions}
        labels = labelling.grade_turns(answered, by_id, self.task.grade, self.task.grader_id)
        self.store.put_labels(labels)
        grades = {label.key: Grade(label.verdict, label.answer) for label in labels}
        return Groups(
            list(questions),
            [
                [self._sample(question, turn, grades) for turn in turns]
                for question, turns in zip(questions, asked, strict=True)
            ],
        )

    def _sample(self, question: Question, turn: Turn, grades: dict[str, Grade]) -> Sample | None:
        completion = turn.completion
        if completion is None:
            return None
        if completion.logprobs is None or turn.call.sampling.top_p != 1:
            raise AgentArkError(
                f"turn {turn.key} cannot be learned from as a rollout: it has no log-probabilities, or was sampled "
                f"with top_p {turn.call.sampling.top_p}, which cuts off what the policy could have said."
            )
        found = steps(completion.ids.tolist(), self.model.form.tokenizer)
        rollout = Rollout(
            question=question,
            ids=completion.ids,
            text=completion.text,
            finish=completion.finish,
            grade=grades[turn.key],
            step_ends=np.asarray([step.end for step in found], np.int32),
            steps=[step.text for step in found],
        )
        return Sample(turn.call.prompt_ids, rollout, completion.logprobs)
