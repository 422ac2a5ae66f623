"""Questions, peers' answers and gold rationales as token ids: the one place where text becomes a prompt.

A prompt is a sequence of *segments*. Text is encoded once per segment; an earlier completion enters as the ids that
were sampled, never decoded and encoded again. What others wrote may spell a control token, such as the end of a turn:
it is text all the same. Models with a chat template have `data.chat`; the plain format is meant for base models without
one:

    Question: ...
    Answer:
    <completion><eos>

and in later rounds, the agent's own answers first, then its peers' (AgentArk, appendix: own history, then peers'
last round):

    Question: ...
    My answer:
    ...
    Another answer:
    ...
    Better answer:
    <completion><eos>
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from agentark_jax.data.steps import cuts, steps
from agentark_jax.data.tokenizer import Tokenizer
from agentark_jax.errors import AgentArkError
from agentark_jax.records import Example, Question, Turn, stable_hash

Segment = tuple[int, ...]
Prompt = tuple[Segment, ...]
Part = str | Sequence[int]


@dataclass(frozen=True)
class Layout:
    """How the prompt of a later round shows what was said.

    Attributes:
        agents: numbers (from 1) of the agent itself and of its peers, in the order in which their answers are given;
            empty numbers them as they come.
        named: answers stand under the numbers of their agents, and the agent is told its own.
        shared_first: the last answers of all, the agent's own among them, stand in the order of their numbers before
            anything that concerns this agent alone, so that agents who see the same answers share the prompt so far.
            Otherwise the agent's own answers come first, as in the paper.
    """

    agents: tuple[int, ...] = ()
    named: bool = False
    shared_first: bool = False

    def numbers(self, count: int) -> tuple[int, ...]:
        return self.agents or tuple(range(1, count + 1))

    def listed(self, answers: Sequence[Sequence[int]]) -> tuple[list[tuple[int, Sequence[int]]], int]:
        """All answers in the order of their agents under the numbers that are shown, and the own one's number."""
        numbers = self.numbers(len(answers))
        order = sorted(range(len(answers)), key=numbers.__getitem__)
        shown = [numbers[index] if self.named else place for place, index in enumerate(order, 1)]
        return [(number, answers[index]) for number, index in zip(shown, order, strict=True)], shown[order.index(0)]

    def shared(self, prompt: Prompt, peers: int, earlier: int) -> int:
        """Tokens at the beginning of a revision with this layout that all agents who see the same answers have.

        It ends with the last of the listed answers. What follows is words, and for each of `earlier` own answers the
        answer and words again. The layout itself can be read off a prompt's segments: its words stand before the first
        answer. So this number follows from the prompt, though none of its tokens need be compared.
        """
        return sum(map(len, prompt[: -1 - 2 * earlier])) if self.shared_first and peers else 0


OWN_FIRST = Layout()


class Format(Protocol):
    """How a model is asked and how it answers, in token ids.

    `stop_ids` end a completion and belong to it. `hash` identifies everything that questions, answers and revisions in
    the ordinary layout depend on; the words of other layouts are in their prompts, which a call's key covers. `telling`
    are our words where one answer tells a whole dialogue (no prompt does): before a further answer of one's own, before
    another's, before the better one.
    """

    tokenizer: Tokenizer
    stop_ids: tuple[int, ...]
    hash: str
    telling: tuple[str, str, str]

    def question(self, question: Question) -> Prompt:
        """The prompt of an agent that sees the question alone."""
        ...

    def revision(
        self,
        question: Question,
        own: Sequence[int],
        peers: Sequence[Sequence[int]],
        *,
        earlier: Sequence[Sequence[int]] = (),
        layout: Layout = OWN_FIRST,
    ) -> Prompt:
        """The prompt of a later round: the agent's own last completion and its peers', as sampled ids.

        `earlier` are the agent's own completions before the last, oldest first.
        """
        ...

    def reply(self, question: Question, own: Sequence[int], text: str) -> Prompt:
        """The question, the agent's own completion as sampled ids, and what it is told then, in free words."""
        ...

    def instruction(self, parts: Sequence[Part]) -> Prompt:
        """A prompt in free words: our own text (first of all) and, as sampled ids, what agents said."""
        ...

    def shown(self, completion: Sequence[int]) -> Segment:
        """What of a completion others get to see: all but its end token and whatever the model keeps to itself."""
        ...

    def response(self, text: str) -> Segment:
        """A written answer (a gold rationale) as the ids of a completion, its end token included."""
        ...


class PlainFormat:
    """The prompt format for models without a chat template."""

    QUESTION = "Question: {question}\n"
    ANSWER = "Answer:"
    OWN = "My answer:"
    PEER = "\nAnother answer:"
    REVISE = "\nBetter answer:"
    RESPONSE = "\n{text}"
    NAMED = "\nAgent {number}'s answer:"
    LISTED = "\nAnswer {number}:"
    EARLIER = "\nMy earlier answer:"
    I_AM = "\nI am agent {number}."
    MINE = "\nAnswer {number} is mine."
    telling = ("\n" + OWN, PEER, REVISE)

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.stop_ids: tuple[int, ...] = (tokenizer.eos_id,)
        self._beginning: Segment = () if tokenizer.bos_id is None else (tokenizer.bos_id,)
        texts = [self.QUESTION, self.ANSWER, self.OWN, self.PEER, self.REVISE, self.RESPONSE]
        self.hash = stable_hash(["plain", texts, tokenizer.hash])

    def question(self, question: Question) -> Prompt:
        return (self._head(question), self.tokenizer.encode(self.ANSWER))

    def revision(
        self,
        question: Question,
        own: Sequence[int],
        peers: Sequence[Sequence[int]],
        *,
        earlier: Sequence[Sequence[int]] = (),
        layout: Layout = OWN_FIRST,
    ) -> Prompt:
        numbers = layout.numbers(1 + len(peers))
        if layout.shared_first and peers:
            listed, mine = layout.listed([own, *peers])
            title, whose = (self.NAMED, self.I_AM) if layout.named else (self.LISTED, self.MINE)
            told = [(title.format(number=number), ids) for number, ids in listed]
            told += [(self.EARLIER, ids) for ids in earlier]
            last = whose.format(number=mine) + self.REVISE
        else:
            told = [("\n" + self.OWN, ids) for ids in (*earlier, own)]
            title = self.NAMED if layout.named else self.PEER
            told += [(title.format(number=number), ids) for number, ids in zip(numbers[1:], peers, strict=True)]
            last = (self.I_AM.format(number=numbers[0]) if layout.named else "") + self.REVISE
        segments = [self._head(question)]
        for place, (title, ids) in enumerate(told):
            segments += [self.tokenizer.encode(title if place else title.removeprefix("\n")), self.shown(ids)]
        return (*segments, self.tokenizer.encode(last))

    def reply(self, question: Question, own: Sequence[int], text: str) -> Prompt:
        told = self.tokenizer.encode_text(f"\n{text}{self.REVISE}")
        return (self._head(question), self.tokenizer.encode(self.OWN), self.shown(own), told)

    def instruction(self, parts: Sequence[Part]) -> Prompt:
        first, *rest = [
            self.tokenizer.encode_text(part) if isinstance(part, str) else self.shown(part) for part in parts
        ]
        return (self._beginning + first, *rest, self.tokenizer.encode("\n" + self.ANSWER))

    def shown(self, completion: Sequence[int]) -> Segment:
        return without(completion, self.stop_ids)

    def response(self, text: str) -> Segment:
        return (*self.tokenizer.encode_text(self.RESPONSE.format(text=text)), self.tokenizer.eos_id)

    def _head(self, question: Question) -> Segment:
        return self._beginning + self.tokenizer.encode_text(self.QUESTION.format(question=question.prompt))


def without(ids: Sequence[int], dropped: Sequence[int]) -> Segment:
    """The ids but for the `dropped` ones; a tuple without any is returned itself, so that prompts can share it."""
    if isinstance(ids, tuple) and not any(token in ids for token in dropped):
        return ids
    return tuple(int(token) for token in ids if token not in dropped)


def completion_example(
    prompt: Prompt,
    completion: Sequence[int],
    *,
    question_id: str,
    variant: str,
    trace_keys: Sequence[str] = (),
    retokenised: bool = False,
) -> Example:
    """An example whose only loss term, `completion`, weighs every completion token 1 (its end token included)."""
    if len(completion) == 0:
        raise AgentArkError(f"question {question_id}: an empty completion leaves no token to learn from.")
    prompt_ids = [token for segment in prompt for token in segment]
    weights = np.zeros(len(prompt_ids) + len(completion), np.float32)
    weights[len(prompt_ids) :] = 1.0
    ids = np.asarray([*prompt_ids, *completion], np.int32)
    return Example(ids, {"completion": weights}, question_id, variant, tuple(trace_keys), retokenised)


def revision_example(
    form: Format, question: Question, answers: Mapping[str, Sequence[int]], index: int, layout: Layout, *, alone: bool
) -> Example:
    """What teaches to revise: the gold rationale after the model's own answers, which are given by the turn's key.

    Which of them plays the agent's own part takes turns with `index`. `alone`: it is the only one that is shown.
    """
    ids = list(answers.values())
    own = index % len(ids)
    others = [] if alone else [peer for peer in range(len(ids)) if peer != own]
    layout = replace(layout, agents=(own + 1, *(peer + 1 for peer in others)))
    return completion_example(
        form.revision(question, ids[own], [ids[peer] for peer in others], layout=layout),
        form.response(question.rationale),
        question_id=question.id,
        variant="gold_revision",
        trace_keys=list(answers),
    )


def turn_example(
    form: Format, question: Question, turn: Turn, *, variant: str, trace_keys: Sequence[str] = ()
) -> Example:
    """What a student (`form`) learns from what was said in a turn: the question alone, and the completion.

    Ids are taken verbatim where the student has the speaker's tokenizer; the end token of another prompt format becomes
    the student's. Where the tokenizer is another, the text is encoded once, and the teacher's stop id becomes the
    student's end token; a completion that was cut off has none. The example is marked `retokenised` where its ids were
    never sampled, so that no log-probabilities belong to them.
    """
    assert turn.completion is not None, "only answers are learned from"
    return completion_example(
        form.question(question),
        _as_said_by(form, turn),
        question_id=question.id,
        variant=variant,
        trace_keys=trace_keys,
        retokenised=turn.call.tokenizer != form.tokenizer.hash or turn.completion.text_only,
    )


def dialogue_example(
    form: Format,
    question: Question,
    turn: Turn,
    parents: Mapping[str, Turn],
    *,
    variant: str,
    trace_keys: Sequence[str] = (),
) -> Example:
    """What a student learns from a turn and from all that it was shown: to tell the whole dialogue by itself.

    After the question alone, one answer: the agent's own earlier answers, oldest first, what its peers said, then its
    better answer; between them the words of `Format.telling`, encoded once. Each part is as `turn_example` has it, all
    but the last as others get to see it: without its end token and whatever the model keeps to itself. All tokens of
    the answer have loss, our words and what turned out wrong among them: alone, the student must say them too.

    The example is always marked `retokenised`: our words were never sampled, and what was said, though its ids are
    verbatim, was sampled after other prompts.

    Args:
        parents: the turns that the turn was shown (`call.parents`), and maybe others, by key.

    Raises:
        AgentArkError: the turn was shown none, or one that is not given.
    """
    shown = turn.call.parents
    if not shown or not parents.keys() >= set(shown):
        lacking = ", ".join(sorted(set(shown) - parents.keys()))
        what = f"the turns it was shown are not all at hand ({lacking})" if shown else "it was shown no other turn"
        raise AgentArkError(f"turn {turn.key} cannot be learned as a dialogue: {what}. Select from the whole debate.")
    again, another, better = map(form.tokenizer.encode, form.telling)
    own = [parents[key] for key in shown if parents[key].call.agent == turn.call.agent]
    peers = [parents[key] for key in shown if parents[key].call.agent != turn.call.agent]
    told = [(again, each) for each in own] + [(another, each) for each in peers]
    ids: list[int] = []
    for place, (words, each) in enumerate(told):
        ids += [*(words if place else ()), *form.shown(_as_said_by(form, each))]
    return completion_example(
        form.question(question),
        [*ids, *better, *_as_said_by(form, turn)],
        question_id=question.id,
        variant=variant,
        trace_keys=trace_keys,
        retokenised=True,
    )


def step_example(
    form: Format, question: Question, turn: Turn, right: Sequence[float], *, variant: str = "steps"
) -> Example | None:
    """What a process reward model learns from a turn: which of its steps are right, after the question alone.

    Ids are as in `turn_example`, verbatim where the student has the speaker's tokenizer; nothing is put between steps.
    Each is judged at its last token. No token has loss.

    `right` are the labels, from 0 to 1, of the turn's steps as the speaker's tokenizer divides it. With another one the
    text is encoded once, and its steps are the same as long as every cut in the text begins one of them for both; where
    a token goes across a step whole, which is rare, labels would move to other steps: then there is no example (None).

    Raises:
        AgentArkError: the labels are not those of the turn's steps.
    """
    completion = _as_said_by(form, turn)
    found = steps(completion, form.tokenizer)
    retokenised = turn.call.tokenizer != form.tokenizer.hash
    if retokenised:
        begun = 1 + len(cuts("".join(step.text for step in found)))
        if not len(found) == len(right) == begun:
            return None
    elif len(found) != len(right):
        raise AgentArkError(
            f"turn {turn.key} has {len(found)} steps but {len(right)} labels: they were made with other rules. Make "
            "them anew."
        )
    prompt = [token for segment in form.question(question) for token in segment]
    return Example(
        np.asarray([*prompt, *completion], np.int32),
        {},
        question.id,
        variant,
        (turn.key,),
        retokenised or (turn.completion is not None and turn.completion.text_only),
        step_ends=np.asarray([len(prompt) + step.end - 1 for step in found], np.int32),
        step_labels=np.asarray(right, np.float32),
    )


def _as_said_by(form: Format, turn: Turn) -> list[int]:
    """The completion of a turn as one in this format; see `turn_example`."""
    completion = turn.completion
    assert completion is not None, "only answers are learned from"
    if turn.call.tokenizer != form.tokenizer.hash:
        ids = list(form.response(completion.text.strip()))
        return ids if completion.finish == "stop" else ids[:-1]
    ids = completion.ids.tolist()
    if turn.call.template != form.hash and completion.finish == "stop":
        ids[-1] = form.stop_ids[0]
    return ids
