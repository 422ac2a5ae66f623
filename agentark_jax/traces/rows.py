"""The trace store's tables, and turns and questions as rows of them.

A prompt is a list of segment hashes: peers' texts repeat across prompts, so every segment of ids is kept once.
Token ids are little-endian int32 blobs, log-probabilities little-endian float32 blobs. A row of `turns` carries a
digest of what was answered; with the call key, which is a hash of what was asked, any later change of a row shows.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from agentark_jax.errors import AgentArkError
from agentark_jax.records import Call, Completion, Question, Sampling, Turn, ids_hash

SCHEMA_VERSION = 1

SCHEMA = """
CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE questions (
  id TEXT PRIMARY KEY, task TEXT NOT NULL, split TEXT NOT NULL, prompt TEXT NOT NULL, answer TEXT NOT NULL,
  rationale TEXT NOT NULL, meta TEXT NOT NULL);
CREATE TABLE segments (hash TEXT PRIMARY KEY, ids BLOB NOT NULL);
CREATE TABLE turns (
  call_key TEXT NOT NULL, attempt INTEGER NOT NULL CHECK (attempt >= 0),
  question_id TEXT NOT NULL REFERENCES questions (id), protocol TEXT NOT NULL, agent INTEGER NOT NULL,
  role TEXT NOT NULL, round INTEGER NOT NULL, sample INTEGER NOT NULL, parents TEXT NOT NULL, model TEXT NOT NULL,
  weights TEXT NOT NULL, tokenizer TEXT NOT NULL, template TEXT NOT NULL, sampling TEXT NOT NULL, prompt TEXT NOT NULL,
  completion_ids BLOB, logprobs BLOB, text TEXT, finish TEXT CHECK (finish IN ('stop', 'length')),
  prompt_tokens INTEGER, cached_tokens INTEGER, completion_tokens INTEGER, seconds REAL, error TEXT,
  digest TEXT NOT NULL, created TEXT NOT NULL DEFAULT (strftime('%Y-%m-%dT%H:%M:%fZ', 'now')),
  PRIMARY KEY (call_key, attempt),
  CHECK ((error IS NULL) = (completion_ids IS NOT NULL AND logprobs IS NOT NULL AND text IS NOT NULL
    AND finish IS NOT NULL AND prompt_tokens IS NOT NULL AND cached_tokens IS NOT NULL
    AND completion_tokens IS NOT NULL AND seconds IS NOT NULL)));
CREATE UNIQUE INDEX one_success_per_call ON turns (call_key) WHERE error IS NULL;
CREATE INDEX turns_of_question ON turns (question_id, call_key, attempt);
CREATE TABLE labels (
  call_key TEXT NOT NULL, grader TEXT NOT NULL, verdict TEXT NOT NULL
  CHECK (verdict IN ('right', 'wrong', 'unparseable')), answer TEXT NOT NULL,
  PRIMARY KEY (grader, call_key)) WITHOUT ROWID;
"""

TURN_COLUMNS = (
    *("call_key", "attempt", "question_id", "protocol", "agent", "role", "round", "sample", "parents", "model"),
    *("weights", "tokenizer", "template", "sampling", "prompt", "completion_ids", "logprobs", "text", "finish"),
    *("prompt_tokens", "cached_tokens", "completion_tokens", "seconds", "error", "digest"),
)
_ANSWER = slice(TURN_COLUMNS.index("completion_ids"), TURN_COLUMNS.index("digest"))

Segment = tuple[int, ...]
Row = tuple[Any, ...]


def encode_turn(turn: Turn, segment_hashes: dict[Segment, str]) -> Row:
    """A turn as values of `TURN_COLUMNS`. Hashes of its prompt's segments are taken from, or added to, the given dict.

    Raises:
        AgentArkError: the turn contradicts itself (say, both a completion and an error).
    """
    call, completion = turn.call, turn.completion
    key = turn.key
    if (completion is None) == (turn.error is None):
        raise AgentArkError(f"Turn {key}: exactly one of completion and error must be set.")
    for segment in call.prompt:
        if segment not in segment_hashes:
            segment_hashes[segment] = ids_hash(np.asarray(segment, np.int32))
    answer: Row = (*[None] * 8, turn.error)
    if completion is not None:
        answer = (*_encode_completion(completion, key), None)
    return (
        *(key, turn.attempt, call.question_id, call.protocol, call.agent, call.role, call.round, call.sample),
        *(json.dumps(call.parents), call.model, call.weights, call.tokenizer, call.template),
        *(json.dumps(vars(call.sampling)), json.dumps([segment_hashes[segment] for segment in call.prompt])),
        *(*answer, _digest((turn.attempt, *answer))),
    )


def _encode_completion(completion: Completion, key: str) -> Row:
    ids = np.ascontiguousarray(completion.ids, dtype="<i4")
    logprobs = np.ascontiguousarray(completion.logprobs, dtype="<f4")
    if ids.ndim != 1 or logprobs.shape != ids.shape:
        raise AgentArkError(f"Turn {key}: {ids.shape} token ids do not go with {logprobs.shape} log-probabilities.")
    if not math.isfinite(completion.seconds):
        raise AgentArkError(f"Turn {key}: took {completion.seconds} seconds; give a finite time.")
    # SQLite does not keep the sign of a zero.
    seconds = float(completion.seconds) + 0.0
    return (
        *(ids.tobytes(), logprobs.tobytes(), completion.text, completion.finish),
        *(completion.prompt_tokens, completion.cached_tokens, len(ids), seconds),
    )


def _digest(answer: Row) -> str:
    blobs = [value for value in answer if isinstance(value, bytes)]
    rest = [len(value) if isinstance(value, bytes) else value for value in answer]
    return hashlib.sha256(json.dumps(rest).encode() + b"".join(blobs)).hexdigest()[:24]


def prompt_hashes(row: Row) -> list[str]:
    """The segment hashes of a turn row's prompt.

    Raises:
        ValueError: the row was changed after it was written.
    """
    hashes = json.loads(row[TURN_COLUMNS.index("prompt")])
    if not isinstance(hashes, list):
        raise ValueError("the prompt is not a list of segments")
    return hashes


def decode_turn(row: Row, segments: Mapping[str, Segment]) -> Turn:
    """The turn of a row of `TURN_COLUMNS`; `segments` maps the hashes in its prompt to ids.

    Raises:
        ValueError, TypeError, KeyError: the row was changed after it was written.
    """
    value = dict(zip(TURN_COLUMNS, row, strict=True))
    sampling = json.loads(value["sampling"])
    sampling["stop_ids"] = tuple(sampling["stop_ids"])
    identity = ("question_id", "protocol", "agent", "role", "round", "sample", "model", "weights", "tokenizer")
    call = Call(
        **{name: value[name] for name in (*identity, "template")},
        parents=tuple(json.loads(value["parents"])),
        sampling=Sampling(**sampling),
        prompt=tuple(segments[segment] for segment in prompt_hashes(row)),
    )
    if value["error"] is not None:
        return Turn(call, value["attempt"], None, value["error"])
    completion = Completion(
        ids=decode_ids(value["completion_ids"]),
        logprobs=np.frombuffer(value["logprobs"], "<f4").astype(np.float32),
        **{name: value[name] for name in ("text", "finish", "prompt_tokens", "cached_tokens", "seconds")},
    )
    return Turn(call, value["attempt"], completion)


def row_problem(row: Row, segments: Mapping[str, Segment]) -> str | None:
    """What shows that a turn row is not as it was written; None when nothing does."""
    try:
        turn = decode_turn(row, segments)
        key = turn.key
    except (ValueError, TypeError, KeyError, OverflowError) as error:
        return f"it cannot be read ({error!r})"
    if key != row[0]:
        return "its call does not have the key under which it is stored"
    if _digest((row[1], *row[_ANSWER])) != row[-1]:
        return "its answer is not the one that was recorded"
    return None


def encode_ids(ids: Sequence[int] | np.ndarray) -> bytes:
    """The stored blob of token ids [T]."""
    return np.asarray(ids, dtype="<i4").tobytes()


def decode_ids(blob: bytes) -> np.ndarray:
    """Token ids [T] int32 of a stored blob."""
    return np.frombuffer(blob, "<i4").astype(np.int32)


def encode_question(question: Question) -> Row:
    """A question as a row of the table `questions`; equal questions give equal rows."""
    meta = json.dumps(dict(question.meta), sort_keys=True, ensure_ascii=False)
    return (question.id, question.task, question.split, question.prompt, question.answer, question.rationale, meta)


def decode_question(row: Row) -> Question:
    """The question of a row of the table `questions`."""
    identity, task, split, prompt, answer, rationale, meta = row
    return Question(identity, task, split, prompt, answer, rationale, json.loads(meta))


def canonical_record(turn: Turn) -> dict[str, Any]:
    """What of a turn is the same in every undisturbed run: all but its seconds, cached usage and time of writing."""
    record = {
        "key": turn.key,
        "attempt": turn.attempt,
        "call": {**vars(turn.call), "sampling": vars(turn.call.sampling)},
        "error": turn.error,
    }
    if turn.completion is not None:
        record["completion"] = {
            "ids": turn.completion.ids.tolist(),
            "logprobs": turn.completion.logprobs.tolist(),
            "text": turn.completion.text,
            "finish": turn.completion.finish,
            "prompt_tokens": turn.completion.prompt_tokens,
        }
    return record
