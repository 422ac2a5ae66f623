"""Questions, peers' answers and gold rationales as token ids: the one place where text becomes a prompt.

A prompt is a sequence of *segments*. Text of our own is encoded once per segment; an earlier completion enters as the
ids that were sampled, never decoded and encoded again. Models with a chat template have `data.chat`; the plain format
is meant for base models without one:

    Question: ...
    Answer:
    <completion><eos>

and in later rounds, the agent's own answer first, then its peers' (AgentArk, appendix: own history, then peers'
last round):

    Question: ...
    My answer:
    ...
    Another answer:
    ...
    Better answer:
    <completion><eos>
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np

from agentark_jax.data.tokenizer import Tokenizer
from agentark_jax.errors import AgentArkError
from agentark_jax.records import Completion, Example, Question, stable_hash

Segment = tuple[int, ...]
Prompt = tuple[Segment, ...]


class Format(Protocol):
    """How a model is asked and how it answers, in token ids.

    `stop_ids` end a completion and belong to it; `hash` identifies everything that prompts and answers depend on.
    """

    tokenizer: Tokenizer
    stop_ids: tuple[int, ...]
    hash: str

    def question(self, question: Question) -> Prompt:
        """The prompt of an agent that sees the question alone."""
        ...

    def revision(self, question: Question, own: Sequence[int], peers: Sequence[Sequence[int]]) -> Prompt:
        """The prompt of a later round: the agent's own last completion and its peers', as sampled ids."""
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

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.stop_ids: tuple[int, ...] = (tokenizer.eos_id,)
        texts = [self.QUESTION, self.ANSWER, self.OWN, self.PEER, self.REVISE, self.RESPONSE]
        self.hash = stable_hash(["plain", texts, tokenizer.hash])

    def question(self, question: Question) -> Prompt:
        return (self._head(question), self.tokenizer.encode(self.ANSWER))

    def revision(self, question: Question, own: Sequence[int], peers: Sequence[Sequence[int]]) -> Prompt:
        encode = self.tokenizer.encode
        segments: list[Segment] = [self._head(question), encode(self.OWN), without(own, self.stop_ids)]
        for peer in peers:
            segments += [encode(self.PEER), without(peer, self.stop_ids)]
        return (*segments, encode(self.REVISE))

    def response(self, text: str) -> Segment:
        return (*self.tokenizer.encode(self.RESPONSE.format(text=text)), self.tokenizer.eos_id)

    def _head(self, question: Question) -> Segment:
        beginning = () if self.tokenizer.bos_id is None else (self.tokenizer.bos_id,)
        return beginning + self.tokenizer.encode(self.QUESTION.format(question=question.prompt))


def without(ids: Sequence[int], dropped: Sequence[int]) -> Segment:
    """The ids but for the `dropped` ones."""
    return tuple(int(token) for token in ids if token not in dropped)


def completion_example(
    prompt: Prompt,
    completion: Sequence[int],
    *,
    question_id: str,
    variant: str,
    trace_keys: Sequence[str] = (),
) -> Example:
    """An example whose only loss term, `completion`, weighs every completion token 1 (its end token included)."""
    if len(completion) == 0:
        raise AgentArkError(f"question {question_id}: an empty completion leaves no token to learn from.")
    prompt_ids = [token for segment in prompt for token in segment]
    weights = np.zeros(len(prompt_ids) + len(completion), np.float32)
    weights[len(prompt_ids) :] = 1.0
    ids = np.asarray([*prompt_ids, *completion], np.int32)
    return Example(ids, {"completion": weights}, question_id, variant, tuple(trace_keys))


def retokenised_example(
    form: Format,
    question: Question,
    completion: Completion,
    *,
    variant: str,
    trace_keys: Sequence[str] = (),
) -> Example:
    """What `completion_example` is, for a student (`form`) whose tokenizer is not the one that sampled the completion.

    The text is encoded once, and the teacher's stop id becomes the student's end token; a completion that was cut off
    has none. The example is marked `retokenised`: its ids were never sampled, so no log-probabilities belong to them.
    """
    ids = form.response(completion.text.strip())
    if completion.finish != "stop":
        ids = ids[:-1]
    example = completion_example(
        form.question(question), ids, question_id=question.id, variant=variant, trace_keys=trace_keys
    )
    return replace(example, retokenised=True)
