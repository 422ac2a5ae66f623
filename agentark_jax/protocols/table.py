"""What all methods share: who sits at the table, and what is said there about one question.

A method is an async function of a question, a `Pool` and its config that returns a `Result`. What goes wrong never ends
in silence:

- A call that fails is kept as a failed attempt, and a note says so; each method states how it goes on without. Where
  nobody answers the question at all, that is an error.
- A prompt that is too long for its model leaves something out, and a note says so. In a debate these are first the
  agent's own answers before its last, oldest first, then its peers', from the last to the first; in an instruction the
  quoted turns, in their order. `parents` of the call are what is left. If even that is too long, the call fails.
- An agent whose model has another tokenizer than the speaker's reads the speaker's text, encoded once; a note says so.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, TypeVar

from agentark_jax.data.render import Format, Layout, Prompt, Segment
from agentark_jax.errors import AgentArkError
from agentark_jax.protocols.calls import Caller, CallFailed, Draw
from agentark_jax.protocols.peers import Peer
from agentark_jax.records import Question, Turn
from agentark_jax.tasks.grading.final_answer import grade_final_answer
from agentark_jax.tasks.grading.reading import ANSWER_PHRASE
from agentark_jax.traces.labels import majority_vote

Part = str | Turn
NoteKind = Literal["failed", "left_out", "retokenised", "unreadable"]
T = TypeVar("T")

CLOSING = f'\n\nEnd with "{ANSWER_PHRASE} ..." and nothing after it.'
_ANSWERED = "Several agents have answered a question.\n\nQuestion:\n{question}"
_LEFT_OUT = "[...]"


def read_answer(question: Question, text: str) -> str:
    """The final answer of a text, in one spelling per value; empty where none can be read. No verdict enters here."""
    return grade_final_answer(text, question.answer, question.prompt).answer


@dataclass(frozen=True)
class Agent:
    """Who answers for an agent.

    Attributes:
        caller: its model, server and prompt format.
        temperature: how freely it samples; None: as the method says.
        context: longest prompt plus completion, in tokens; None where every call fits.
    """

    caller: Caller
    temperature: float | None = None
    context: int | None = None


@dataclass(frozen=True)
class Pool:
    """Who may be asked, and how answers are read: agent i is the i-th of `agents`, from the start where they run out.

    Judges and the like take the numbers after those of a method's agents.
    """

    agents: tuple[Agent, ...]
    read: Callable[[Question, str], str] = read_answer

    def __getitem__(self, number: int) -> Agent:
        return self.agents[number % len(self.agents)]

    def form_of(self, turn: Turn) -> Format:
        """The format that a turn was said in."""
        for agent in self.agents:
            if agent.caller.form.hash == turn.call.template:
                return agent.caller.form
        raise AgentArkError(f"turn {turn.key} was said in a prompt format that no agent has: ask with the same agents.")


@dataclass(frozen=True)
class Note:
    """Something about the call `key` that did not go as planned."""

    key: str
    kind: NoteKind
    detail: str


@dataclass(frozen=True)
class Result:
    """What a method came to on one question.

    Attributes:
        turns: all that was said, by round, agent, sample and role.
        answer: the final answer in one spelling per value; empty where none could be read.
        final: the turns that stand behind it: `answer` is the majority of what they say, ties to the first.
        stopped: why the method ended.
        notes: what did not go as planned, in the order of the turns.
        scores: how the method rates its agents or candidates, by number, where it does.
    """

    turns: tuple[Turn, ...]
    answer: str
    final: tuple[Turn, ...]
    stopped: str
    notes: tuple[Note, ...]
    scores: Mapping[int, float] = field(default_factory=dict)


@dataclass(frozen=True)
class _Draft:
    prompt: Prompt
    quoted: Sequence[Turn] = ()
    left_out: int = 0
    shared: int = 0


class Table:
    """One question's conversation: puts calls to agents and keeps what they say."""

    def __init__(self, question: Question, pool: Pool, protocol: str, draw: Draw):
        self.question = question
        self._pool = pool
        self._protocol = protocol
        self._draw = draw
        self._turns: list[Turn] = []
        self._shown: dict[tuple[str, str], Segment] = {}  # by turn and format: prompts share what they quote
        self._notes: list[tuple[tuple[int, int, int, str], Note]] = []

    def form(self, agent: int) -> Format:
        return self._pool[agent].caller.form

    async def pose(self, agent: int, *, role: str, round: int = 0, sample: int = 0) -> Turn:
        """Ask the question alone. As all turns that are asked for here, the answer may be a failed attempt."""
        return await self._ask(agent, [_Draft(self.form(agent).question(self.question))], role, round, sample)

    async def revise(
        self,
        agent: int,
        own: Sequence[Turn],
        peers: Sequence[Peer],
        *,
        role: str,
        round: int,
        sample: int = 0,
        named: bool = False,
        shared_first: bool = False,
    ) -> Turn:
        """Ask again, with the agent's own answers (oldest first) and its peers' in sight."""
        *earlier, last = own
        form = self.form(agent)

        def draft(earlier: Sequence[Turn], shown: Sequence[Peer]) -> _Draft:
            layout = Layout((agent + 1, *(peer.agent + 1 for peer in shown)), named, shared_first)
            prompt = form.revision(
                self.question,
                self._ids(last, form),
                [self._ids(peer.said, form) for peer in shown],
                earlier=[self._ids(turn, form) for turn in earlier],
                layout=layout,
            )
            quoted = [*earlier, last, *(peer.said for peer in shown if isinstance(peer.said, Turn))]
            left_out = len(own) - 1 - len(earlier) + len(peers) - len(shown)
            return _Draft(prompt, quoted, left_out, layout.shared(prompt, len(shown), len(earlier)))

        def drafts() -> Iterator[_Draft]:
            for start in range(len(earlier) + 1):
                yield draft(earlier[start:], peers)
            for end in reversed(range(len(peers))):
                yield draft([], peers[:end])

        return await self._ask(agent, drafts(), role, round, sample)

    async def tell(
        self,
        agent: int,
        parts: Sequence[Part],
        *,
        role: str,
        round: int = 0,
        sample: int = 0,
        temperature: float | None = None,
    ) -> Turn:
        """Give an instruction: our own text, the first part among it, and quoted turns."""
        form = self.form(agent)
        turns = [part for part in parts if isinstance(part, Turn)]

        def draft(left_out: int) -> _Draft:
            places = iter(range(len(turns)))
            rendered = [
                part if isinstance(part, str) else _LEFT_OUT if next(places) < left_out else self._ids(part, form)
                for part in parts
            ]
            return _Draft(form.instruction(rendered), turns[left_out:], left_out)

        drafts = map(draft, range(len(turns) + 1))
        return await self._ask(agent, drafts, role, round, sample, temperature)

    async def _ask(
        self,
        number: int,
        drafts: Iterable[_Draft],
        role: str,
        round: int,
        sample: int,
        temperature: float | None = None,
    ) -> Turn:
        agent = self._pool[number]
        wanted = (temperature, agent.temperature, self._draw.temperature)
        draw = replace(self._draw, temperature=next(each for each in wanted if each is not None))
        for draft in drafts:
            if agent.context is None or sum(map(len, draft.prompt)) + draw.max_tokens <= agent.context:
                break
        try:
            turn = await agent.caller.ask(
                self.question,
                draft.prompt,
                draw,
                protocol=self._protocol,
                role=role,
                agent=number,
                round=round,
                sample=sample,
                parents=tuple(turn.key for turn in draft.quoted),
                shared=draft.shared,
            )
            self._turns.append(turn)
        except CallFailed as failure:
            turn = failure.turn
            self._note(turn, "failed", str(failure))
        if draft.left_out:
            self._note(turn, "left_out", f"{draft.left_out} answers did not fit a context of {agent.context}")
        foreign = [quoted.key for quoted in draft.quoted if quoted.call.tokenizer != turn.call.tokenizer]
        if foreign:
            self._note(turn, "retokenised", f"reads the text of {', '.join(foreign)}, said with another tokenizer")
        return turn

    def _ids(self, said: Turn | Sequence[int], form: Format) -> Sequence[int]:
        """What was said, as `form` shows it: sampled ids verbatim where the tokenizer is the same."""
        if not isinstance(said, Turn):
            return said
        assert said.completion is not None, "only answers are shown"
        place = said.key, form.hash
        if place not in self._shown:
            speaker = self._pool.form_of(said)
            ids = speaker.shown(said.completion.ids.tolist())
            if speaker.tokenizer.hash != form.tokenizer.hash:
                ids = form.response(speaker.tokenizer.decode(ids).strip())
            self._shown[place] = ids
        return self._shown[place]

    def read(self, turn: Turn) -> str:
        """The answer that a turn gives; empty for none: a failed call, one cut off at its limit, no readable answer."""
        if turn.completion is None or turn.completion.finish == "length":
            return ""
        return self._pool.read(self.question, turn.completion.text)

    def said(self, turn: Turn, pattern: re.Pattern[str]) -> str | None:
        """The first group of the pattern's last match in a turn; None, with a note, where there is none.

        A turn that was cut off at its limit has said nothing: more of its last words may have been on the way.
        """
        if turn.completion is None:
            return None
        found = pattern.findall(turn.completion.text) if turn.completion.finish == "stop" else []
        if found:
            return str(found[-1])
        self._note(turn, "unreadable", f"does not say what the {turn.call.role} was asked to say")
        return None

    def answered(self, turns: Iterable[Turn]) -> list[Turn]:
        """The turns that succeeded.

        Raises:
            AgentArkError: none did.
        """
        turns = list(turns)
        good = [turn for turn in turns if turn.error is None]
        if not good:
            errors = "; ".join(sorted({turn.error or "" for turn in turns}))
            raise AgentArkError(
                f"question {self.question.id}: nobody could answer ({errors}). What was said is kept; run again."
            )
        return good

    def _note(self, turn: Turn, kind: NoteKind, detail: str) -> None:
        self._notes.append((_place(turn), Note(turn.key, kind, detail)))

    def result(self, final: Sequence[Turn], stopped: str, scores: Mapping[int, float] | None = None) -> Result:
        """Close the conversation; `final` as in `Result`."""
        return Result(
            turns=tuple(sorted(self._turns, key=_place)),
            answer=majority_vote([self.read(turn) for turn in final])[0],
            final=tuple(final),
            stopped=stopped,
            notes=tuple(note for _, note in sorted(self._notes, key=lambda placed: placed[0])),
            scores=scores or {},
        )


def answered_by_several(question: Question, answers: Iterable[T]) -> list[str | T]:
    """The beginning of an instruction about answers to a question: they are quoted under it, counted from 1."""
    quoted = [part for number, answer in enumerate(answers, 1) for part in (f"\n\nAnswer {number}:\n", answer)]
    return [_ANSWERED.format(question=question.prompt), *quoted]


def _place(turn: Turn) -> tuple[int, int, int, str]:
    return turn.call.round, turn.call.agent, turn.call.sample, turn.call.role
