"""Stores that meet: Parquet exports at any fsspec URL, and the merging of many workers' stores into one.

An export is a directory of four Parquet files, one per table and with its columns; nothing of a store is left out, and
id-segments stand in it once. All files of an export carry its id, so files of two exports, one of them interrupted, are
never taken for one.
"""

import hashlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any
from uuid import uuid4

import pyarrow as pa
import pyarrow.parquet as pq

from agentark_jax.errors import AgentArkError
from agentark_jax.files import filesystem_at
from agentark_jax.traces import rows as codec
from agentark_jax.traces.store import OnTurns, Source, TraceStore, unwatched

_FORMAT = "agentark traces 2"  # the version of the store since which the columns are these
_ROW_GROUP = 4096  # turns: some 16 MB
_TYPES = {
    **dict.fromkeys(("ids", "completion_ids", "logprobs"), pa.binary()),
    **dict.fromkeys(("attempt", "agent", "round", "sample"), pa.int64()),
    **dict.fromkeys(("prompt_tokens", "cached_tokens", "completion_tokens"), pa.int64()),
    "seconds": pa.float64(),
}
_SCHEMAS = {
    table: pa.schema([(column, _TYPES.get(column, pa.string())) for column in columns])
    for table, columns in codec.TABLES.items()
}


def shard_of(question_id: str, shards: int) -> int:
    """Which of `shards` workers (0 to shards - 1) takes a question; the same on every machine and in every run."""
    return int.from_bytes(hashlib.sha256(question_id.encode()).digest()[:8], "big") % shards


def export_parquet(store: TraceStore, url: str, on_turns: OnTurns = unwatched) -> int:
    """Write all of a store as an export at an fsspec URL (a local path is one); how many turns there were.

    Raises:
        UsageError: the URL names no file system that is installed here.
        AgentArkError: it cannot be written to.
    """
    with _opened(url) as (filesystem, path), store.snapshot():
        filesystem.makedirs(path, exist_ok=True)
        metadata = {"format": _FORMAT, "export": uuid4().hex}
        for table, schema in _SCHEMAS.items():
            with filesystem.open(_file(path, table), "wb") as file:
                _write(
                    file,
                    schema.with_metadata(metadata),
                    store.pages(table),
                    on_turns if table == "turns" else unwatched,
                )
        total = store.ledger()[0]
    return total.calls + total.failed


def _write(file: IO[bytes], schema: pa.Schema, pages: Iterator[list[codec.Row]], on_rows: OnTurns) -> None:
    with pq.ParquetWriter(file, schema, compression="zstd") as writer:
        rows: list[codec.Row] = []
        for page in pages:
            rows += page
            on_rows(len(page))
            if len(rows) >= _ROW_GROUP:
                writer.write_table(_table(rows, schema))
                rows = []
        writer.write_table(_table(rows, schema))


def _table(rows: list[codec.Row], schema: pa.Schema) -> pa.Table:
    columns = zip(*rows, strict=True) if rows else [()] * len(schema)
    return pa.Table.from_arrays(
        [pa.array(column, field.type) for column, field in zip(columns, schema, strict=True)], schema=schema
    )


class _Export:
    """An export as a source of rows."""

    def __init__(self, name: str, files: dict[str, IO[bytes]]):
        self.name = name
        self._files = {table: pq.ParquetFile(file) for table, file in files.items()}
        exports = set()
        for table, file in self._files.items():
            schema = file.schema_arrow
            metadata = {key.decode(): value.decode() for key, value in (schema.metadata or {}).items()}
            if metadata.get("format") != _FORMAT or not schema.equals(_SCHEMAS[table]):
                raise AgentArkError(
                    f"{_file(name, table)}: its format is {metadata.get('format')}, wanted is {_FORMAT}. Export again."
                )
            exports.add(metadata.get("export"))
        if len(exports) > 1:
            raise AgentArkError(f"{name}: its files are of different exports, one was interrupted. Export again.")

    def pages(self, table: str) -> Iterator[list[codec.Row]]:
        for batch in self._files[table].iter_batches(batch_size=512):
            yield list(zip(*(column.to_pylist() for column in batch.columns), strict=True))


def merge(store: TraceStore, source: str, on_turns: OnTurns = unwatched) -> int:
    """Add all that another store, or a Parquet export, holds to a store; how many turns that made.

    `source` is the path of a store, or the URL or directory of an export. See `TraceStore.merge`.

    Raises:
        UsageError: the URL names no file system that is installed here.
        AgentArkError: see `TraceStore.merge`; or the source cannot be read.
    """
    with ExitStack() as stack:
        return store.merge(_open_source(source, stack), on_turns)


def _open_source(source: str, stack: ExitStack) -> Source:
    if "://" not in source and not Path(source).is_dir():
        other = stack.enter_context(TraceStore(source, read_only=True))
        stack.enter_context(other.snapshot())
        return other
    filesystem, path = stack.enter_context(_opened(source))
    files = {table: stack.enter_context(filesystem.open(_file(path, table), "rb")) for table in codec.TABLES}
    return _Export(source, files)


def _file(directory: str, table: str) -> str:
    return f"{directory.rstrip('/')}/{table}.parquet"


@contextmanager
def _opened(url: str) -> Iterator[tuple[Any, str]]:
    """The file system of a URL and the path in it; what goes wrong with them in the block names the URL."""
    filesystem, path = filesystem_at(url)
    try:
        yield filesystem, path
    except (OSError, UnicodeDecodeError, pa.ArrowException) as error:
        raise AgentArkError(
            f"{url}: {error}. Check the address and your rights; a damaged export must be made again."
        ) from error
