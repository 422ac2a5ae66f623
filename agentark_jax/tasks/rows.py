"""Rows as others publish them, from a file or from the hub, each with the place it stands at."""

import gzip
import json
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

from agentark_jax.errors import AgentArkError, UsageError

_GZIP_MAGIC = b"\x1f\x8b"
_LARGEST_EXPONENT = 400  # of a number with a decimal point; those of float64 are smaller


@dataclass(frozen=True)
class Row:
    """One object of a file, or one row of a table. `line` counts from 1; `where` names file and line for messages."""

    where: str
    line: int
    values: dict[str, Any]


def read_file(path: Path, key: str = "task.path") -> Iterator[Row]:
    """The rows of a JSON Lines, JSON or Parquet file; the first two may be gzip-compressed.

    Lines end at "\\n" only: U+2028 and its like may stand inside a string. Empty lines are skipped. A JSON file holds a
    list of objects, one object, or objects by their `id`. Numbers with a decimal point come as `Decimal`. `key` is what
    named the file: messages tell it.

    Raises:
        UsageError: the file is missing, empty or not UTF-8, or a row is no object; names the line.
        AgentArkError: the file exists but cannot be read.
    """
    name = path.name.removesuffix(".gz")
    if name.endswith(".parquet"):
        rows = _parquet(path, key)
    else:
        rows = _json(f"{path} ({key})", _read_bytes(path, key), name.endswith(".json"))
    empty = True
    for row in rows:
        empty = False
        yield row
    if empty:
        raise UsageError(f'{path} ({key}) is empty; give one {{"question": …, "answer": …}} per line.')


def read_hub(dataset: str, config: str | None, split: str, revision: str | None = None) -> Iterator[Row]:
    """The rows of one split of a dataset on the hub, or in a directory laid out like one; code in it never runs.

    Raises UsageError where the hub cannot be reached or has no such dataset, config or split.
    """
    import datasets  # half a second

    name = f"{dataset}, {config or 'default'}, {split}"
    try:
        table = datasets.load_dataset(dataset, config, split=split, revision=revision)
    except (datasets.exceptions.DatasetsError, ValueError, OSError, RuntimeError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UsageError(
            f"{name}: cannot be loaded from the hub ({reason}). Correct the id, config or split, or download the "
            "files of the dataset and give their directory as task.path."
        ) from error
    for number, values in enumerate(table, 1):
        yield Row(f"{name}, row {number}", number, values)


def _read_bytes(path: Path, key: str) -> bytes:
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise UsageError(f"{key} names {path}, which does not exist; give an existing JSONL file.") from None
    except IsADirectoryError:
        raise UsageError(
            f"{key} names {path}, which is a directory; give a JSONL file, or name the dataset in task.name."
        ) from None
    except OSError as error:
        raise AgentArkError(f"{path} ({key}) cannot be read: {error.strerror}; check its permissions.") from error
    if not content.startswith(_GZIP_MAGIC):
        return content
    try:
        return gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise UsageError(f"{path} ({key}) is a damaged gzip file: {error}; write it again.") from error


def _json(file: str, content: bytes, whole: bool) -> Iterator[Row]:
    lines = content.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    # Some publish JSON Lines under the name .json; then a line is an object by itself.
    filled = [line for line in lines if line.strip()]
    if whole and not (len(filled) > 1 and filled[0].lstrip()[:1] == b"{" and filled[0].rstrip()[-1:] == b"}"):
        yield from _document(file, b"\n".join(lines))
        return
    for number, line in enumerate(lines, 1):
        if line.strip():
            where = f"{file}, line {number}"
            value = _parse(line, where)
            if not isinstance(value, dict):
                raise UsageError(f'{where}: not an object; write {{"question": …, "answer": …}}.')
            yield Row(where, number, value)


def _document(file: str, content: bytes) -> Iterator[Row]:
    if not content.strip():
        return
    value = _parse(content, file)
    if isinstance(value, dict):
        by_id = bool(value) and all(isinstance(each, dict) for each in value.values())
        value = [{"id": key, **each} for key, each in value.items()] if by_id else [value]
    if not isinstance(value, list) or not all(isinstance(each, dict) for each in value):
        raise UsageError(f"{file}: not a list of objects; write one object per line, or a list of them.")
    for number, each in enumerate(value, 1):
        yield Row(f"{file}, row {number}", number, each)


def _parse(content: bytes, where: str) -> Any:
    try:
        # The literal is kept: "0.10" must not pass through binary floating point.
        return json.loads(content.decode("utf-8"), parse_float=_decimal, object_pairs_hook=_object)
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{where}: not UTF-8 ({error.reason} at byte {error.start}); save the file as UTF-8."
        ) from error
    except json.JSONDecodeError as error:
        raise UsageError(
            f"{where}: not JSON ({error.msg} at column {error.colno}); write one object per line."
        ) from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{where}: not usable JSON ({error}); write one flat object per line.") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Raises ValueError for a key that stands twice: nobody knows which of its values is meant."""
    values = dict(pairs)
    if len(values) < len(pairs):
        (key, _), *_ = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the key {key[:40]!r} stands twice")
    return values


def _decimal(literal: str) -> Decimal:
    """Raises ValueError for a number that takes for ever to write out, such as 1e999999999."""
    try:
        value = Decimal(literal)
    except ArithmeticError:
        value = Decimal("Infinity")
    if not value.is_finite() or abs(value.adjusted()) > _LARGEST_EXPONENT:
        raise ValueError(f"the number {literal[:40]} is out of range")
    return value


def _parquet(path: Path, key: str) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches():
                for values in batch.to_pylist():
                    number += 1
                    yield Row(f"{path} ({key}), row {number}", number, values)
    except FileNotFoundError:
        raise UsageError(f"{key} names {path}, which does not exist; give an existing Parquet file.") from None
    except (pa.ArrowInvalid, OSError) as error:
        raise UsageError(f"{path} ({key}) is no readable Parquet file: {error}; write it again.") from error
