"""Files that appear whole or not at all, and file systems that are elsewhere."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from agentark_jax.errors import AgentArkError, UsageError


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path in the directory of `path`; when the block ends well, its file is moved to `path`.

    Missing directories are made. When the block fails, the temporary file is removed and `path` stays as it was.

    Raises:
        AgentArkError: the file cannot be written (full disk, read-only directory).
    """
    temporary = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            # Without this a power cut could leave the new name on a file whose contents never reached the disk.
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise AgentArkError(
            f"{path}: cannot be written ({error.strerror or error}). Free disk space or choose a writable directory, "
            "then run again."
        ) from error


def write_text(path: Path, text: str) -> None:
    """Replace a text file; it is the old or the new one, never half of it. Raises as `atomic_path` does.

    Lone surrogates, which JSON written by others can hold and UTF-8 cannot, become question marks.
    """
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="replace", newline="\n")


def write_json(path: Path, value: Any) -> None:
    """Replace a JSON file, as `write_text` does."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def filesystem_at(url: str, **options: Any) -> tuple[Any, str]:
    """The fsspec file system of a URL (a local path is one), made with these options, and the path in it.

    Raises:
        UsageError: the URL names no file system that is installed here.
    """
    import fsspec  # not needed to say what commands there are

    try:
        filesystem, path = fsspec.core.url_to_fs(url, **options)
    except (ImportError, ValueError) as error:
        raise UsageError(f"{url}: {error}. Give a URL that fsspec knows, or install what it names.") from error
    return filesystem, str(path)
