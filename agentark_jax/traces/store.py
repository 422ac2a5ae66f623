"""The trace store: every model call of a run, in one SQLite file that survives being killed at any moment.

One process writes (a lock file beside the store names it), any number read. Commits are transactions in write-ahead
mode: what was recorded outlives the process; a power cut may cost the last turns but never half of one.
"""

import json
import os
import socket
import sqlite3
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import chain, groupby, islice
from operator import itemgetter
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, NamedTuple, Protocol
from urllib.parse import quote

import numpy as np
from filelock import FileLock, Timeout

from agentark_jax.errors import AgentArkError
from agentark_jax.files import atomic_path
from agentark_jax.records import Label, Question, Turn
from agentark_jax.traces import rows as codec

# What turns can be counted by.
LEDGER = ("protocol", "role", "round", "agent", "question_id")

_PAGE = 512
_TURNS = ", ".join(codec.TURN_COLUMNS)
# Random keys touch most pages of their indexes: room for those of a million turns, and fewer rewrites of the same page.
_SETTINGS = ("foreign_keys = ON", "synchronous = NORMAL", "cache_size = -131072", "wal_autocheckpoint = 16384")


class Said(NamedTuple):
    """What a turn said: token ids [T] int32, log-probabilities [T] float32 (None as in `Completion`).

    `parents` are the keys of the turns that it was shown.
    """

    ids: np.ndarray
    logprobs: np.ndarray | None
    parents: tuple[str, ...]


# Told, by what takes long, how many more turns are done.
OnTurns = Callable[[int], None]


def unwatched(turns: int) -> None:
    """An `OnTurns` that does nothing."""


@dataclass(frozen=True)
class Usage:
    """What some turns took: calls that succeeded, attempts that failed, tokens, and seconds of the calls.

    `group` says which turns, by the columns that were asked for. Cached tokens are some of the prompt tokens.
    """

    group: tuple[str | int, ...]
    calls: int
    failed: int
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    seconds: float

    def price(self, prompt: float, cached: float, completion: float) -> float:
        """What it cost, given prices of a million prompt tokens, cached prompt tokens and completion tokens."""
        paid = (self.prompt_tokens - self.cached_tokens) * prompt + self.cached_tokens * cached
        return (paid + self.completion_tokens * completion) / 1e6


class Source(Protocol):
    """What can be merged into a store: rows of the tables of `rows.TABLES`, sorted by their keys."""

    @property
    def name(self) -> str: ...

    def pages(self, table: str) -> Iterator[list[codec.Row]]:
        """All rows of a table, some at a time. Raises `AgentArkError` where they cannot be read."""
        ...


class TraceStore:
    """Turns, labels and questions in the SQLite file `path`, which is made when missing.

    Use it as a context manager, in one thread. Read-only stores can be opened while another process writes. A store of
    an older version is brought up to date when it is opened, in one transaction; reading it, too, writes that once.

    Raises:
        AgentArkError: the file is no trace store, is damaged, was written by a newer version, is missing (read-only),
            or another process writes to it. Every method raises it for a full disk and a lost permission.
    """

    def __init__(self, path: str | Path, *, read_only: bool = False):
        self.path = Path(path)
        self.read_only = read_only
        self._lock = None if read_only else self._acquire_lock()
        try:
            self._connection = self._connect()
        except BaseException:  # an interrupt frees the lock as well
            self._release_lock()
            raise
        try:
            self._prepare()
        except BaseException:  # as above
            self.close()
            raise

    @property
    def name(self) -> str:
        return str(self.path)

    def __enter__(self) -> "TraceStore":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file and free the lock; the store cannot be used after."""
        self._connection.close()
        self._release_lock()

    # Questions

    def put_question(self, question: Question) -> None:
        """Keep one question; see `put_questions`."""
        self.put_questions([question])

    def put_questions(self, questions: Iterable[Question]) -> None:
        """Keep questions, whose meta must be JSON values; a question that is already here changes nothing.

        Raises:
            AgentArkError: another question with the same id is here, say the same question in another split.
        """
        with self._transaction("write questions") as connection:
            for row in map(codec.encode_question, questions):
                known = connection.execute("SELECT * FROM questions WHERE id = ?", row[:1]).fetchone()
                if known is None:
                    connection.execute(_insert("questions"), row)
                elif known != row:
                    raise AgentArkError(
                        f"{self.path}: question {row[0]} is already stored and differs: {known[1:-1]} is not "
                        f"{row[1:-1]}. Remove the repeated question, or use a new run directory for changed questions."
                    )

    def questions(self) -> list[Question]:
        """All questions, sorted by id."""
        with self._guarded("read questions"):
            rows = self._connection.execute("SELECT * FROM questions ORDER BY id").fetchall()
        try:
            return [codec.decode_question(row) for row in rows]
        except (ValueError, TypeError) as error:
            raise AgentArkError(f"{self.path}: a question was changed after it was stored ({error!r}).") from error

    # Turns

    def record(self, turn: Turn) -> None:
        """Keep one turn; it is committed when this returns. See `record_many`."""
        self.record_many([turn])

    def record_many(self, turns: Iterable[Turn]) -> None:
        """Keep turns, all of them or (on any error) none. A turn that is already here as given changes nothing.

        Raises:
            AgentArkError: a call already has another success, an attempt is already taken by another outcome, or a
                turn's question is not in the store.
        """
        turns = list(turns)
        new = [codec.encode_turn(turn) for turn in turns]
        segments = dict(segment for turn in turns for segment in turn.call.segments)
        with self._transaction("record turns") as connection:
            attempts = {(row[0], row[1]): row for row in self._rows(_TURNS, keys=(row[0] for row in new))}
            successes = {row[0] for row in attempts.values() if codec.succeeded(row)}
            added = []
            for row in new:
                known = attempts.get((row[0], row[1]))
                if known == row:
                    continue
                if known is not None:
                    raise AgentArkError(
                        f"{self.path}: attempt {row[1]} of call {row[0]} is already recorded and differs."
                    )
                if codec.succeeded(row):
                    if row[0] in successes:
                        raise AgentArkError(
                            f"{self.path}: call {row[0]} already has an answer; it must not be paid twice."
                        )
                    successes.add(row[0])
                attempts[row[0], row[1]] = row
                added.append(row)
            connection.executemany("INSERT OR IGNORE INTO segments VALUES (?, ?)", segments.items())
            connection.executemany(_insert("turns", codec.TURN_COLUMNS), added)

    def lookup(self, key: str) -> Turn | None:
        """The successful turn of a call, if there is one."""
        return next(self.turns(keys=[key], errors=False), None)

    def completions(self, keys: Iterable[str]) -> dict[str, Said]:
        """What the successful turns among these calls said, by key."""
        found: dict[str, Said] = {}
        for page in self._pages("call_key, attempt, completion_ids, logprobs, parents", keys=keys, errors=False):
            for key, _, ids, logprobs, parents in page:
                with self._reading((key,)):
                    sampled = codec.decode_ids(ids), codec.decode_logprobs(logprobs, ids)
                    found[key] = Said(*sampled, tuple(json.loads(parents)))
        return found

    def parents(self, keys: Iterable[str]) -> dict[str, tuple[str, ...]]:
        """The keys of the turns that the successful turns among these calls were shown, by key."""
        found: dict[str, tuple[str, ...]] = {}
        for page in self._pages("call_key, attempt, parents", keys=keys, errors=False):
            for key, _, parents in page:
                with self._reading((key,)):
                    found[key] = tuple(json.loads(parents))
        return found

    def texts(self, keys: Iterable[str]) -> dict[str, str]:
        """What was said in the successful turns among these calls, by key."""
        pages = self._pages("call_key, attempt, text", keys=keys, errors=False)
        return {key: text for page in pages for key, _, text in page}

    def unanswered(self, keys: Iterable[str]) -> set[str]:
        """Those of these calls that have no successful turn."""
        wanted = set(keys)
        pages = self._pages("call_key, attempt", keys=wanted, errors=False)
        return wanted.difference(key for page in pages for key, _ in page)

    def attempts(self, key: str) -> int:
        """How many attempts of a call are recorded, failed ones included; the next attempt's number."""
        with self._guarded("read turns"):
            count: int = self._connection.execute("SELECT count(*) FROM turns WHERE call_key = ?", (key,)).fetchone()[0]
        return count

    def turns(
        self,
        *,
        keys: Iterable[str] | None = None,
        protocol: str | None = None,
        role: str | None = None,
        round: int | None = None,
        weights: str | None = None,
        errors: bool = True,
    ) -> Iterator[Turn]:
        """The turns that match every given value, sorted by (key, attempt).

        Args:
            keys: only turns of these calls.
            errors: whether failed attempts are among them.
        """
        filters = {"protocol": protocol, "role": role, "round": round, "weights": weights}
        for page in self._pages(_TURNS, filters, keys=keys, errors=errors):
            yield from self._decode(page)

    def keys(self, prefix: str) -> list[str]:
        """The keys of all calls that begin with these hexadecimal digits, sorted."""
        with self._guarded("read turns"):
            rows = self._connection.execute(
                "SELECT DISTINCT call_key FROM turns WHERE call_key >= ? AND call_key < ? ORDER BY call_key",
                (prefix, prefix + "g"),
            ).fetchall()
        return [key for (key,) in rows]

    def ledger(self, *by: str) -> list[Usage]:
        """What all turns together took, by these columns (of `LEDGER`) and sorted by them; without any, one total.

        Sums are those over the turns themselves, so they equal what the engines counted while generating.
        """
        if not set(by) <= set(LEDGER):
            raise ValueError(f"{by} is not among {LEDGER}")
        group = f"GROUP BY {', '.join(by)} ORDER BY {', '.join(by)}" if by else ""
        with self._guarded("count turns"):
            rows = self._connection.execute(
                f"SELECT {''.join(f'{name}, ' for name in by)} count(prompt_tokens), count(*) - count(prompt_tokens), "
                "coalesce(sum(prompt_tokens), 0), coalesce(sum(cached_tokens), 0), "
                f"coalesce(sum(completion_tokens), 0), coalesce(sum(seconds), 0.0) "
                f"FROM turns INDEXED BY turns_ledger {group}"
            ).fetchall()
        return [Usage(row[: len(by)], *row[len(by) :]) for row in rows]

    # Labels

    def put_labels(self, labels: Iterable[Label]) -> None:
        """Keep labels, all or none; a label of the same turn and grader is replaced.

        Raises:
            AgentArkError: a label's turn is not here, or failed.
        """
        with self._transaction("write labels") as connection:
            rows = [codec.encode_label(label) for label in labels]
            unknown = self.unanswered(row[0] for row in rows)
            if unknown:
                raise AgentArkError(f"{self.path}: no successful turn {min(unknown)} to label; record it first.")
            connection.executemany(_insert("labels").replace("INSERT", "INSERT OR REPLACE"), rows)

    def labels(self, grader: str) -> dict[str, Label]:
        """The labels that a grader gave, by turn key, in key order."""
        with self._guarded("read labels"):
            rows = self._connection.execute(
                "SELECT call_key, grader, verdict, answer FROM labels WHERE grader = ? ORDER BY call_key", (grader,)
            ).fetchall()
        return {row[0]: Label(*row) for row in rows}

    def graders(self) -> list[str]:
        """The ids of the graders that gave labels, sorted."""
        with self._guarded("read labels"):
            return [row[0] for row in self._connection.execute("SELECT DISTINCT grader FROM labels ORDER BY grader")]

    def labelled(
        self,
        grader: str,
        *,
        protocol: str | None = None,
        role: str | None = None,
        weights: str | None = None,
    ) -> Iterator[tuple[Any, ...]]:
        """The successful turns that match every given value, in order of time, without what was asked and said.

        Each as key, question id, protocol, role, agent, round, sample, the grader's verdict and answer (None where it
        gave none), finish and number of completion tokens.
        """
        filters = {"protocol": protocol, "role": role, "weights": weights}
        given = {name: value for name, value in filters.items() if value is not None}
        query = (
            "SELECT turns.call_key, question_id, protocol, role, agent, round, sample, verdict, answer, finish, "
            "completion_tokens FROM turns INDEXED BY turns_ledger "
            "LEFT JOIN labels ON grader = ? AND labels.call_key = turns.call_key "
            f"WHERE finish IS NOT NULL {''.join(f'AND {name} = ? ' for name in given)}"
        )
        with self._guarded("read labels"):
            # Not `yield from`: who stops early may have closed the store before the cursor is let go.
            for row in self._connection.execute(query, (grader, *given.values())):  # noqa: UP028
                yield row

    # The store as a whole

    def export_canonical(self, path: str | Path, on_turns: OnTurns = unwatched) -> int:
        """Write all turns as JSON lines sorted by (key, attempt); how many there were.

        Stores of equal runs give equal bytes: seconds, cached usage and times of writing are left out. A non-finite
        log-probability stands as `-Infinity` or `NaN`.
        """
        count = 0
        with atomic_path(Path(path)) as temporary, temporary.open("w", encoding="utf-8", newline="\n") as file:
            for turn in self.turns():
                line = json.dumps(codec.canonical_record(turn), ensure_ascii=False, sort_keys=True)
                file.write(line + "\n")
                count += 1
                on_turns(1)
        return count

    def verify(self, on_turns: OnTurns = unwatched) -> list[str]:
        """Check every byte that has a hash; what was found wrong, in words (empty: the store is as it was written).

        Only the times of recording and the names of servers have no hash.
        """
        with self.snapshot(), self._guarded("verify"), self._any_text():
            problems = [row[0] for row in self._connection.execute("PRAGMA integrity_check") if row[0] != "ok"]
            for page in self.pages("segments"):
                problems += [
                    f"segment {name}: its ids are not those that were recorded"
                    for name, blob in page
                    if not codec.is_segment(name, blob)
                ]
            for table in ("questions", "labels"):
                for row in (row for page in self.pages(table) for row in page):
                    problem = codec.digest_problem(row)
                    if problem is not None:
                        problems.append(f"{table}, {row[0]}: {problem}")
            for row in self._connection.execute("PRAGMA foreign_key_check"):
                problems.append(f"table {row[0]}, row {row[1]}: its question is missing")
            for (key,) in self._connection.execute(
                "SELECT DISTINCT call_key FROM labels EXCEPT SELECT call_key FROM turns WHERE finish IS NOT NULL"
            ):
                problems.append(f"label of turn {key}: there is no such successful turn")
            answered = ""
            for page in self._pages(_TURNS):
                problems += [f"turn {row[0]}, attempt {row[1]}: {problem}" for row, problem in self._problems(page)]
                for key in (row[0] for row in page if codec.succeeded(row)):
                    if key == answered:
                        problems.append(f"call {key}: it has more than one answer")
                    answered = key
                on_turns(len(page))
        return problems

    @contextmanager
    def _any_text(self) -> Iterator[None]:
        # A text that is no longer UTF-8 should be found like any other change, not end the search.
        self._connection.text_factory = lambda content: content.decode(errors="surrogateescape")
        try:
            yield
        finally:
            self._connection.text_factory = str

    def _problems(self, page: Sequence[codec.Row]) -> Iterator[tuple[codec.Row, str]]:
        segments = self._segments(page)
        for row in page:
            problem = codec.row_problem(row, segments)
            if problem is not None:
                yield row, problem

    @contextmanager
    def snapshot(self) -> Iterator[None]:
        """All reads within the block see one state of the store, whoever writes meanwhile; the block itself cannot."""
        with self._guarded("read"):
            self._connection.execute("BEGIN")
        try:
            yield
        finally:
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")

    def pages(self, table: str) -> Iterator[list[codec.Row]]:
        """All rows of one of the tables of `rows.TABLES`, with its columns, sorted by its key, some at a time."""
        columns = ", ".join(codec.TABLES[table])
        if table == "turns":
            yield from self._pages(columns)
            return
        with self._guarded(f"read {table}"):
            cursor = self._connection.execute(f"SELECT {columns} FROM {table} ORDER BY 1, 2")
            while page := cursor.fetchmany(_PAGE):
                yield page

    def merge(self, source: Source, on_turns: OnTurns = unwatched) -> int:
        """Add all that another store or an export holds; how many turns that made. All of it is added or nothing.

        What both have is kept once, see `rows.unite_attempts`. Every row is checked as `verify` does.

        Raises:
            AgentArkError: a call has different answers, a question or a label differs, or the source is damaged.
        """
        with self._transaction(f"merge {source.name}") as connection:
            before = self.ledger()[0]
            for page in source.pages("questions"):
                self._add_whole("questions", 1, page, source.name)
            for page in source.pages("segments"):
                for name, blob in page:
                    if not codec.is_segment(name, blob):
                        raise AgentArkError(f"{source.name}: segment {name} was changed. Use an undamaged copy.")
                connection.executemany("INSERT OR IGNORE INTO segments VALUES (?, ?)", page)
            rows = (row for page in source.pages("turns") for row in page)
            calls = (list(attempts) for _, attempts in groupby(rows, key=itemgetter(0)))
            while batch := list(islice(calls, _PAGE)):
                self._add_calls(batch, source.name)
                on_turns(sum(map(len, batch)))
            for page in source.pages("labels"):
                unknown = self.unanswered(row[0] for row in page)
                if unknown:
                    raise AgentArkError(f"{source.name}: labels, {min(unknown)}: there is no such successful turn.")
                self._add_whole("labels", 2, page, source.name)
            after = self.ledger()[0]
        return after.calls + after.failed - before.calls - before.failed

    def _add_whole(self, table: str, keys: int, page: Sequence[codec.Row], source: str) -> None:
        """Insert rows whose first columns are their key and whose last is their digest."""
        where = " AND ".join(f"{name} = ?" for name in codec.TABLES[table][:keys])
        for row in page:
            problem = codec.digest_problem(row)
            if problem is not None:
                raise AgentArkError(f"{source}: {table}, {row[0]}: {problem}. Use an undamaged copy.")
            known = self._connection.execute(f"SELECT * FROM {table} WHERE {where}", row[:keys]).fetchone()
            if known is None:
                self._connection.execute(_insert(table), row)
            elif known != row:
                raise AgentArkError(
                    f"{self.path} and {source} differ in {table}: {known[:-1]} is not {row[:-1]}. Keep them apart, or "
                    "remake one of them."
                )

    def _add_calls(self, calls: Sequence[list[codec.Row]], source: str) -> None:
        for row, problem in self._problems([row[:-1] for attempts in calls for row in attempts]):
            raise AgentArkError(f"{source}: turn {row[0]}, attempt {row[1]}: {problem}. Use an undamaged copy.")
        ours: dict[str, list[codec.Row]] = defaultdict(list)
        for row in self._rows(", ".join(codec.TABLES["turns"]), keys=(attempts[0][0] for attempts in calls)):
            ours[row[0]].append(row)
        for attempts in calls:
            key = attempts[0][0]
            if key in ours:
                try:
                    attempts = codec.unite_attempts(ours[key], attempts)
                except ValueError as error:
                    raise AgentArkError(
                        f"{self.path} and {source} have different answers to call {key}: they are no parts of one run. "
                        "Leave one of them out."
                    ) from error
                if attempts == ours[key]:
                    continue
                self._connection.execute("DELETE FROM turns WHERE call_key = ?", (key,))
            self._connection.executemany(_insert("turns"), attempts)

    # Reading rows

    def _pages(
        self,
        columns: str,
        filters: Mapping[str, str | int | None] = MappingProxyType({}),
        *,
        keys: Iterable[str] | None = None,
        errors: bool = True,
    ) -> Iterator[list[codec.Row]]:
        """Turn rows in pages, sorted by (key, attempt), which must be the first `columns`.

        Each page is its own query: a cursor held open across the caller's own writes would see some of them.
        """
        given = {name: value for name, value in filters.items() if value is not None}
        # What says whether a call was answered is in the index, other than the error itself.
        where = "".join(f" AND {name} = ?" for name in given) + ("" if errors else " AND finish IS NOT NULL")
        select = f"SELECT {columns} FROM turns INDEXED BY turns_of_call WHERE {{}}{where} ORDER BY call_key, attempt"
        if keys is not None:
            query = select.format("call_key IN (SELECT value FROM json_each(?))")
            wanted = sorted(set(keys))
            for start in range(0, len(wanted), _PAGE):
                with self._guarded("read turns"):
                    chunk = json.dumps(wanted[start : start + _PAGE])
                    page = self._connection.execute(query, (chunk, *given.values())).fetchall()
                yield page
            return
        query = select.format("(call_key, attempt) > (?, ?)") + f" LIMIT {_PAGE}"
        last: codec.Row = ("", -1)
        while True:
            with self._guarded("read turns"):
                page = self._connection.execute(query, (*last, *given.values())).fetchall()
            if page:
                yield page
            if len(page) < _PAGE:
                return
            last = page[-1][:2]

    def _rows(self, columns: str, *, keys: Iterable[str]) -> Iterator[codec.Row]:
        return chain.from_iterable(self._pages(columns, keys=keys))

    def _segments(self, page: Sequence[codec.Row]) -> dict[str, codec.Segment]:
        names: set[str] = set()
        for row in page:
            # A prompt that is no list of hashes is reported where its row is decoded.
            with suppress(ValueError, TypeError):
                names.update(name for name in codec.prompt_hashes(row) if isinstance(name, str))
        with self._guarded("read prompts"):
            found = self._connection.execute(
                "SELECT hash, ids FROM segments WHERE hash IN (SELECT value FROM json_each(?))",
                (json.dumps(sorted(names)),),
            ).fetchall()
        return {name: tuple(codec.decode_ids(blob[: len(blob) // 4 * 4]).tolist()) for name, blob in found}

    def _decode(self, page: Sequence[codec.Row]) -> Iterator[Turn]:
        segments = self._segments(page)
        for row in page:
            with self._reading(row):
                turn = codec.decode_turn(row, segments)
            yield turn

    @contextmanager
    def _reading(self, row: codec.Row) -> Iterator[None]:
        try:
            yield
        except (ValueError, TypeError, KeyError) as error:
            raise AgentArkError(
                f"{self.path}: turn {row[0]} was changed after it was recorded ({error!r}). Restore the file from "
                "a copy, or delete it and run again."
            ) from error

    # Opening

    def _acquire_lock(self) -> FileLock:
        path = self.path.with_name(self.path.name + ".lock")
        owner = "another process"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # Read before the attempt: some versions of filelock empty the file when they try.
            with suppress(FileNotFoundError):
                owner = path.read_text(encoding="utf-8", errors="replace").strip() or owner
            lock = FileLock(path, timeout=0, thread_local=False)
            lock.acquire()
            path.write_text(f"process {os.getpid()} on {socket.gethostname()}\n", encoding="utf-8")
        except Timeout as error:
            raise AgentArkError(
                f"{self.path}: {owner} is writing to it. Wait for it or stop it, or open the store read-only."
            ) from error
        except OSError as error:
            raise AgentArkError(
                f"{path}: the lock file cannot be written ({error.strerror or error}). Free disk space or choose a "
                "writable run directory."
            ) from error
        return lock

    def _release_lock(self) -> None:
        if self._lock is not None:
            self._lock.release()

    def _connect(self) -> sqlite3.Connection:
        mode = "ro" if self.read_only else "rwc"
        if self.read_only:
            if not self.path.is_file():
                raise AgentArkError(f"{self.path}: there is no trace store; run the stage that writes it first.")
            # Readers of a write-ahead store need to make a small file beside it, unless nothing can change.
            if not os.access(self.path.parent, os.W_OK) and not Path(f"{self.path}-wal").exists():
                mode = "ro&immutable=1"
        with self._guarded("open"):
            return sqlite3.connect(
                f"file:{quote(str(self.path.absolute()))}?mode={mode}", uri=True, isolation_level=None
            )

    def _prepare(self) -> None:
        with self._guarded("open"):
            tables = {name for (name,) in self._connection.execute("SELECT name FROM sqlite_master")}
            if not tables and not self.read_only:
                self._create()
            elif "meta" not in tables or "turns" not in tables:
                raise AgentArkError(f"{self.path}: this file is no trace store. Give the path of one, or a new path.")
            for setting in _SETTINGS:
                self._connection.execute(f"PRAGMA {setting}")
        version = self._version()
        if version in codec.MIGRATIONS:
            self._bring_up_to_date(version)
            version = self._version()
        if version != codec.SCHEMA_VERSION:
            raise AgentArkError(
                f"{self.path}: meta.schema_version is {version}, this program knows {codec.SCHEMA_VERSION}. Use the "
                "version of agentark_jax that wrote it, or a new run directory."
            )

    def _version(self) -> str | None:
        with self._guarded("open"):
            found = self._connection.execute("SELECT value FROM meta WHERE name = 'schema_version'").fetchone()
        return found and found[0]

    def _bring_up_to_date(self, version: str) -> None:
        if self.read_only:
            try:
                TraceStore(self.path).close()
            except AgentArkError as error:
                raise AgentArkError(
                    f"{self.path}: meta.schema_version is {version}, and it cannot be brought to "
                    f"{codec.SCHEMA_VERSION} now: {error}"
                ) from error
            return
        with self._transaction(f"bring schema_version {version} to {codec.SCHEMA_VERSION}") as connection:
            connection.create_function("row_digest", -1, codec.row_digest, deterministic=True)
            while version in codec.MIGRATIONS:
                for statement in codec.MIGRATIONS[version].split(";\n"):
                    connection.execute(statement)
                version = str(int(version) + 1)
            connection.execute("UPDATE meta SET value = ? WHERE name = 'schema_version'", (version,))

    def _create(self) -> None:
        mode = self._connection.execute("PRAGMA journal_mode = WAL").fetchone()[0]
        if mode != "wal":
            raise AgentArkError(
                f"{self.path}: this file system cannot hold SQLite's write-ahead log (journal mode {mode}). "
                "Put the run directory on a local disk."
            )
        with self._transaction("create tables") as connection:
            for statement in codec.SCHEMA.split(";\n"):
                connection.execute(statement)
            connection.execute("INSERT INTO meta VALUES ('schema_version', ?)", (codec.SCHEMA_VERSION,))

    # Errors

    @contextmanager
    def _transaction(self, action: str) -> Iterator[sqlite3.Connection]:
        if self.read_only:
            raise AgentArkError(f"{self.path}: cannot {action}: the store was opened read-only.")
        with self._guarded(action):
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self._connection
                self._connection.execute("COMMIT")
            finally:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")

    @contextmanager
    def _guarded(self, action: str) -> Iterator[None]:
        try:
            yield
        except sqlite3.ProgrammingError:
            raise  # a mistake of the calling code, such as using a closed store
        except UnicodeEncodeError as error:
            raise AgentArkError(f"{self.path}: cannot {action}: a text is not valid Unicode ({error}).") from error
        except sqlite3.IntegrityError as error:
            fix = "Put the questions into the store before their turns." if "FOREIGN" in str(error) else ""
            raise AgentArkError(f"{self.path}: cannot {action}: {error}. {fix}".rstrip()) from error
        except sqlite3.DatabaseError as error:
            if isinstance(error, sqlite3.OperationalError) and "decode" not in str(error):
                raise AgentArkError(
                    f"{self.path}: cannot {action}: {error}. Free disk space and check that the file and its directory "
                    "are writable, then run again: nothing recorded before is lost."
                ) from error
            raise AgentArkError(
                f"{self.path}: cannot {action}: {error}. The file is damaged or no trace store; restore it from a "
                "copy, or move it and its -wal and -shm files away and run again."
            ) from error


def _insert(table: str, columns: Sequence[str] | None = None) -> str:
    columns = columns or codec.TABLES[table]
    return f"INSERT INTO {table} ({', '.join(columns)}) VALUES ({', '.join('?' * len(columns))})"
