"""The plain types that pass between rooms: `Question`, `Turn`, `Label`, `Example`.

They hold data and know no files, models or losses. Arrays of token ids are one-dimensional `int32`, log-probabilities
`float32`, natural logarithm.
"""

import hashlib
import json
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any, Literal

import numpy as np

Verdict = Literal["right", "wrong", "unparseable"]
FlipClass = Literal["right→right", "wrong→right", "right→wrong", "wrong→wrong"]

# The protocol of debates, the role of those who take part in one, and those of who has the last word.
DEBATE, DEBATER = "debate", "debater"
JUDGE, SUMMARISER = "judge", "summariser"


_canonical_json = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode


def questions_hash(questions: Iterable["Question"]) -> str:
    """Of what questions are: they themselves and what is known to answer them."""
    return stable_hash([[each.id, each.answer, each.rationale, each.meta.get("answers")] for each in questions])


def stable_hash(value: Any) -> str:
    """SHA-256 (hex, first 24 digits) of a JSON-serialisable value; equal values give equal hashes on every machine."""
    return _hash(_canonical_json(value).encode())


def ids_hash(ids: np.ndarray) -> str:
    """Content hash of a sequence of token ids."""
    return _hash(np.ascontiguousarray(ids, dtype="<i4").tobytes())


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:24]


@lru_cache(maxsize=1024)
def _encode_segment(segment: tuple[int, ...]) -> tuple[str, bytes]:
    # The same segments stand in many prompts: what one agent said, in those of all its peers.
    ids = struct.pack(f"<{len(segment)}i", *segment)
    return _hash(ids), ids


@dataclass(frozen=True)
class Question:
    """One question of a task with its gold answer."""

    id: str
    task: str
    split: str
    prompt: str
    answer: str
    rationale: str = ""
    meta: Mapping[str, Any] = field(default_factory=dict)

    @staticmethod
    def make(task: str, split: str, prompt: str, answer: str, rationale: str = "", **meta: Any) -> "Question":
        """A question whose id is the hash of task and content, so that equal questions share it across splits."""
        return Question(stable_hash([task, prompt]), task, split, prompt, answer, rationale, meta)

    @property
    def asked(self) -> str:
        """The question by itself: `prompt` without the context or the examples that stand before it, if any do."""
        return str(self.meta.get("asked", self.prompt))


@dataclass(frozen=True)
class Grade:
    """What a grader says of one text. `answer` is what it read as the final answer, empty when unparseable."""

    verdict: Verdict
    answer: str = ""
    detail: str = ""


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. `temperature` 0 is greedy; `stop_ids` end a completion and belong to it.

    `regex`, where given, is a pattern that the whole text must match; the engine allows no token that breaks it.
    """

    temperature: float
    max_tokens: int
    stop_ids: tuple[int, ...]
    seed: int
    top_p: float = 1.0
    regex: str | None = None

    def to_json(self) -> dict[str, Any]:
        """The fields, `regex` only where there is one: calls without it keep the keys they had before it existed."""
        return {name: value for name, value in vars(self).items() if name != "regex" or value is not None}


@dataclass(frozen=True)
class Call:
    """Everything that determines one model call; its hash is the key under which the answer is stored for good.

    `prompt` is the sequence of id-segments that make up the prompt (peers' texts repeat across prompts, so the store
    keeps each segment once). `parents` are the keys of the turns whose text the prompt contains.
    """

    question_id: str
    protocol: str
    agent: int
    role: str
    round: int
    sample: int
    parents: tuple[str, ...]
    model: str
    weights: str
    tokenizer: str
    template: str
    sampling: Sampling
    prompt: tuple[tuple[int, ...], ...]

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON values."""
        # Not `asdict`: it would copy every token of the prompt one by one.
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        values["sampling"] = self.sampling.to_json()
        return values

    @cached_property
    def segments(self) -> tuple[tuple[str, bytes], ...]:
        """The prompt's segments as content hash and little-endian int32."""
        return tuple(map(_encode_segment, self.prompt))

    @cached_property
    def key(self) -> str:
        return stable_hash({**self.to_json(), "prompt": [name for name, _ in self.segments]})

    @property
    def prompt_ids(self) -> np.ndarray:
        return np.asarray([token for segment in self.prompt for token in segment], np.int32)


@dataclass(frozen=True)
class Completion:
    """What an engine answers: the sampled ids (stop id included) and their log-probabilities.

    `logprobs` [T] are at the sampling temperature (temperature 1 for greedy), before truncation by top_p. They are None
    where the server told nothing but text: then `ids` (never empty) are that text encoded once, and were not sampled.
    `server` says which of several servers answered.
    """

    ids: np.ndarray
    logprobs: np.ndarray | None
    text: str
    finish: Literal["stop", "length"]
    prompt_tokens: int
    cached_tokens: int
    seconds: float
    server: str | None = None

    @property
    def text_only(self) -> bool:
        return self.logprobs is None


@dataclass(frozen=True)
class Turn:
    """One row of the trace store: one attempt of one call. Exactly one of `completion` and `error` is set."""

    call: Call
    attempt: int
    completion: Completion | None
    error: str | None = None

    @property
    def key(self) -> str:
        return self.call.key


@dataclass(frozen=True)
class Label:
    """A grader's verdict on a turn; kept apart from turns so that it can be recomputed."""

    key: str
    grader: str
    verdict: Verdict
    answer: str


@dataclass(frozen=True)
class Example:
    """One training sequence. `weights` gives, per named loss term, a weight for every token of `ids` [T].

    The weight at position t is that of *predicting* `ids[t]` from what stands before it, so position 0 never has one.
    `step_ends` [S], ascending, are the positions of the last tokens of the steps that a process reward model learns to
    judge, `step_labels` [S] how probably each is right, from 0 to 1; both None where there is nothing to judge.
    `retokenised`: the completion, or a part of it, was text before it was ids (another tokenizer's model said it, or a
    server that tells text only, or it is the words of ours between the answers of a dialogue), so it was not sampled as
    it stands and has no log-probabilities.
    """

    ids: np.ndarray
    weights: Mapping[str, np.ndarray]
    question_id: str
    variant: str
    trace_keys: Sequence[str] = ()
    retokenised: bool = False
    step_ends: np.ndarray | None = None
    step_labels: np.ndarray | None = None
