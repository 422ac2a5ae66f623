"""The trace store: every model call of a run, in one SQLite file that survives being killed at any moment.

One process writes (a lock file beside the store names it), any number read. Commits are transactions in write-ahead
mode: what was recorded outlives the process; a power cut may cost the last turns but never half of one.
"""

import json
import os
import socket
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from urllib.parse import quote

from filelock import FileLock, Timeout

from agentark_jax.errors import AgentArkError
from agentark_jax.files import atomic_path
from agentark_jax.records import Label, Question, Turn, ids_hash
from agentark_jax.traces import rows as codec

_TURN_COLUMNS = ", ".join(codec.TURN_COLUMNS)
_PAGE = 512


@dataclass(frozen=True)
class TurnCounts:
    """Usage of one (protocol, role, round): attempts, how many of them failed, and tokens of those that succeeded."""

    protocol: str
    role: str
    round: int
    turns: int
    errors: int
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int


class TraceStore:
    """Turns, labels and questions in the SQLite file `path`, which is made when missing.

    Use it as a context manager, in one thread. Read-only stores can be opened while another process writes.

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
                    connection.execute(f"INSERT INTO questions VALUES ({_marks(row)})", row)
                elif known != row:
                    raise AgentArkError(
                        f"{self.path}: question {row[0]} is already stored and differs: {known[1:]} is not {row[1:]}. "
                        "Remove the repeated question, or use a new run directory for changed questions."
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
        segment_hashes: dict[codec.Segment, str] = {}
        new = [codec.encode_turn(turn, segment_hashes) for turn in turns]
        with self._transaction("record turns") as connection:
            attempts = {(row[0], row[1]): row for row in self._rows_of({row[0] for row in new})}
            successes = {row[0] for row in attempts.values() if _succeeded(row)}
            added = []
            for row in new:
                known = attempts.get((row[0], row[1]))
                if known == row:
                    continue
                if known is not None:
                    raise AgentArkError(
                        f"{self.path}: attempt {row[1]} of call {row[0]} is already recorded and differs."
                    )
                if _succeeded(row) and row[0] in successes:
                    raise AgentArkError(f"{self.path}: call {row[0]} already has an answer; it must not be paid twice.")
                attempts[row[0], row[1]] = row
                if _succeeded(row):
                    successes.add(row[0])
                added.append(row)
            connection.executemany(
                "INSERT OR IGNORE INTO segments VALUES (?, ?)",
                ((name, codec.encode_ids(segment)) for segment, name in segment_hashes.items()),
            )
            connection.executemany(f"INSERT INTO turns ({_TURN_COLUMNS}) VALUES ({_marks(codec.TURN_COLUMNS)})", added)

    def lookup(self, key: str) -> Turn | None:
        """The successful turn of a call, if there is one."""
        return self.completed([key]).get(key)

    def completed(self, keys: Iterable[str]) -> dict[str, Turn]:
        """The successful turns among these calls, by key."""
        with self._guarded("read turns"):
            found = [row for row in self._rows_of(set(keys)) if _succeeded(row)]
            return {row[0]: turn for row, turn in zip(found, self._decode(found), strict=True)}

    def attempts(self, key: str) -> int:
        """How many attempts of a call are recorded, failed ones included; the next attempt's number."""
        with self._guarded("read turns"):
            count: int = self._connection.execute("SELECT count(*) FROM turns WHERE call_key = ?", (key,)).fetchone()[0]
        return count

    def turns(
        self,
        *,
        protocol: str | None = None,
        question_id: str | None = None,
        role: str | None = None,
        round: int | None = None,
        weights: str | None = None,
        errors: bool = True,
    ) -> Iterator[Turn]:
        """The turns that match every given value, sorted by (key, attempt); without failed attempts if not `errors`."""
        filters = {"protocol": protocol, "question_id": question_id, "role": role, "round": round, "weights": weights}
        for page in self._pages({name: value for name, value in filters.items() if value is not None}, errors):
            yield from self._decode(page)

    def counts(self) -> list[TurnCounts]:
        """Attempts, failures and tokens by (protocol, role, round), sorted."""
        with self._guarded("count turns"):
            rows = self._connection.execute(
                "SELECT protocol, role, round, count(*), count(error), coalesce(sum(prompt_tokens), 0), "
                "coalesce(sum(cached_tokens), 0), coalesce(sum(completion_tokens), 0) "
                "FROM turns GROUP BY protocol, role, round ORDER BY protocol, role, round"
            ).fetchall()
        return [TurnCounts(*row) for row in rows]

    # Labels

    def put_labels(self, labels: Iterable[Label]) -> None:
        """Keep labels, all or none; a label of the same turn and grader is replaced.

        Raises:
            AgentArkError: a label's turn is not here, or failed.
        """
        rows = [(label.key, label.grader, label.verdict, label.answer) for label in labels]
        with self._transaction("write labels") as connection:
            keys = {row[0] for row in rows}
            unknown = keys - {
                key
                for (key,) in connection.execute(
                    "SELECT call_key FROM turns WHERE error IS NULL AND call_key IN (SELECT value FROM json_each(?))",
                    (json.dumps(sorted(keys)),),
                )
            }
            if unknown:
                raise AgentArkError(f"{self.path}: no successful turn {min(unknown)} to label; record it first.")
            connection.executemany("INSERT OR REPLACE INTO labels VALUES (?, ?, ?, ?)", rows)

    def labels(self, grader: str) -> dict[str, Label]:
        """The labels that a grader gave, by turn key, in key order."""
        with self._guarded("read labels"):
            rows = self._connection.execute(
                "SELECT call_key, grader, verdict, answer FROM labels WHERE grader = ? ORDER BY call_key", (grader,)
            ).fetchall()
        return {row[0]: Label(*row) for row in rows}

    # The store as a whole

    def export_canonical(self, path: str | Path) -> int:
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
        return count

    def verify(self) -> list[str]:
        """Check every byte that has a hash; what was found wrong, in words (empty: the store is as it was written)."""
        with self._guarded("verify"):
            problems = [row[0] for row in self._connection.execute("PRAGMA integrity_check") if row[0] != "ok"]
            for name, blob in self._connection.execute("SELECT hash, ids FROM segments ORDER BY hash"):
                if len(blob) % 4 or ids_hash(codec.decode_ids(blob)) != name:
                    problems.append(f"segment {name}: its ids are not those that were recorded")
            for row in self._connection.execute("PRAGMA foreign_key_check"):
                problems.append(f"table {row[0]}, row {row[1]}: its question is missing")
            for (key,) in self._connection.execute(
                "SELECT DISTINCT call_key FROM labels EXCEPT SELECT call_key FROM turns WHERE error IS NULL"
            ):
                problems.append(f"label of turn {key}: there is no such successful turn")
        for page in self._pages({}, errors=True):
            segments = self._segments(page)
            for row in page:
                problem = codec.row_problem(row, segments)
                if problem is not None:
                    problems.append(f"turn {row[0]}, attempt {row[1]}: {problem}")
        return problems

    # Reading rows

    def _rows_of(self, keys: set[str]) -> list[codec.Row]:
        return self._connection.execute(
            f"SELECT {_TURN_COLUMNS} FROM turns WHERE call_key IN (SELECT value FROM json_each(?)) "
            "ORDER BY call_key, attempt",
            (json.dumps(sorted(keys)),),
        ).fetchall()

    def _pages(self, filters: dict[str, str | int], errors: bool) -> Iterator[list[codec.Row]]:
        # Each page is its own query: a cursor held open across the caller's own writes would see some of them.
        conditions = ["(call_key, attempt) > (?, ?)", *(f"{name} = ?" for name in filters)]
        if not errors:
            conditions.append("error IS NULL")
        where = " AND ".join(conditions)
        query = f"SELECT {_TURN_COLUMNS} FROM turns WHERE {where} ORDER BY call_key, attempt LIMIT {_PAGE}"
        last: codec.Row = ("", -1)
        while True:
            with self._guarded("read turns"):
                page = self._connection.execute(query, (*last, *filters.values())).fetchall()
            if not page:
                return
            yield page
            last = page[-1][:2]

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
            try:
                yield codec.decode_turn(row, segments)
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
            self._connection.execute("PRAGMA foreign_keys = ON")
            self._connection.execute("PRAGMA synchronous = NORMAL")
            found = self._connection.execute("SELECT value FROM meta WHERE name = 'schema_version'").fetchone()
        if found is None or found[0] != str(codec.SCHEMA_VERSION):
            raise AgentArkError(
                f"{self.path}: meta.schema_version is {found and found[0]}, this program knows "
                f"{codec.SCHEMA_VERSION}. Use the version of agentark_jax that wrote it, or a new run directory."
            )

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
            connection.execute("INSERT INTO meta VALUES ('schema_version', ?)", (str(codec.SCHEMA_VERSION),))

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
        except sqlite3.OperationalError as error:
            raise AgentArkError(
                f"{self.path}: cannot {action}: {error}. Free disk space and check that the file and its directory are "
                "writable, then run again: nothing recorded before is lost."
            ) from error
        except sqlite3.DatabaseError as error:
            raise AgentArkError(
                f"{self.path}: cannot {action}: {error}. The file is damaged or no trace store; restore it from a "
                "copy, or move it and its -wal and -shm files away and run again."
            ) from error


def _succeeded(row: codec.Row) -> bool:
    return row[codec.TURN_COLUMNS.index("error")] is None


def _marks(row: Sequence[object]) -> str:
    return ", ".join("?" * len(row))
