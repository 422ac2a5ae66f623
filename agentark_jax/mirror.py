"""`agentark mirror`: a copy of a run directory in object storage, from which a run goes on after its machine is gone.

At the copy's URL (any that fsspec knows: gs://, s3://, file://, ...) `index.json` says which files there are, and
`files/` has them. No object that the index names is ever changed, and the index is replaced last and at once, so a copy
that was interrupted leaves the one before it. Trace stores are copied as of one moment, while they are written to.
"""

import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from agentark_jax.errors import AgentArkError, UsageError
from agentark_jax.files import filesystem_at
from agentark_jax.tools import Parser

INDEX, FILES = "index.json", "files"
_FORMAT = "agentark mirror 1"
_UNFINISHED = ".orbax-checkpoint-tmp"  # in the name of a checkpoint that is being written
_LOCKS = ("lock", "lock.owner")
_LEFT_OUT = (".lock", "-wal", "-shm", ".partial")  # ends of what belongs to an open trace store, or is half-written
_SMALL = 64 * 2**20  # bytes of files that may grow while they are sent
_LOOKS = 5

_MIRROR = """\
Keep a copy of a run directory in object storage: at gs://, s3:// (pip install 'agentark-jax[gs]' or '[s3]'), or any
other URL that fsspec knows. It has everything that a run goes on from: stages, complete checkpoints, trace stores.

  agentark mirror keep runs/lab gs://bucket/lab -- agentark run --config configs/lab.yaml
  agentark mirror save runs/lab gs://bucket/lab
  agentark mirror load gs://bucket/lab runs/lab

A run's directory itself must be on a disk: its store is an SQLite file, and the hosts of one training read from the
same directory. So this is for machines that share no disk, each with a directory of its own.
"""
_SAVE = """\
Bring the copy at URL up to date. Files that did not change are not sent again; a run may be at work in DIR meanwhile.
Only one machine may save to a URL.
"""
_LOAD = """\
Make DIR from the copy at URL. DIR appears when it is complete, and must not be there before.
"""
_KEEP = """\
Run COMMAND, whose directory is DIR, and save that to URL again and again and when the command has ended. Where DIR is
missing, it is loaded from URL first, if there is something: that is how a run goes on on another machine. SIGTERM and
SIGINT are passed on; the exit code is the command's, or 1 when the last save failed.

  agentark mirror keep runs/lab gs://bucket/lab --every 120 -- agentark run --config configs/lab.yaml
"""


@dataclass(frozen=True)
class _File:
    """A file of a copy: the object below `files/` that has it, its size there, and when it was last changed (ns)."""

    key: str
    bytes: int
    modified: int


def save(directory: Path, url: str) -> int:
    """Brings the copy of a directory at an fsspec URL up to date; how many files were sent.

    Raises:
        UsageError: there is no such directory, or the URL names no file system that is installed here.
        AgentArkError: the copy cannot be read or written, or a trace store cannot be read.
    """
    if not directory.is_dir():
        raise UsageError(f"{directory}: no such directory. Give the directory of a run, <root>/<name>.")
    filesystem, root = _opened(url)
    kept = _index(filesystem, root, url)
    for _ in range(_LOOKS):
        modified = _listed(directory)
        try:
            return _send(directory, modified, kept, filesystem, root, url)
        except (FileNotFoundError, AgentArkError):
            if all((directory / name).exists() for name in modified):
                raise
    raise AgentArkError(f"{directory}: files went away {_LOOKS} times while they were copied to {url}. Save it again.")


def _listed(directory: Path) -> dict[str, int]:
    """When each file that belongs to a copy was last changed (ns), by its name in the directory."""
    found = {}
    for place, folders, names in os.walk(directory):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and _UNFINISHED not in name)
        for name in sorted(names):
            if name in _LOCKS or name.endswith(_LEFT_OUT):
                continue
            path = Path(place, name)
            parts = [path, path.with_name(f"{name}-wal")]  # of a trace store what is new may be in the second only
            changed = []
            for part in parts:
                with suppress(FileNotFoundError):
                    changed.append(part.stat().st_mtime_ns)
            if changed:
                found[path.relative_to(directory).as_posix()] = max(changed)
    return found


def _send(
    directory: Path, modified: Mapping[str, int], kept: Mapping[str, _File], filesystem: Any, root: str, url: str
) -> int:
    """Sends what changed, then the index of everything, then removes what that does not name; how much was sent."""
    index = {name: file for name, file in kept.items() if modified.get(name) == file.modified}
    changed = [name for name in modified if name not in index]
    taken = {file.key for file in kept.values()}
    with tempfile.TemporaryDirectory() as scratch:
        sources = []
        for number, name in enumerate(changed):
            sources.append(_still(directory, name, Path(scratch, str(number))))
            key = f"{name}.{modified[name]}" if name in taken else name
            index[name] = _File(key, sources[-1].stat().st_size, modified[name])
        with _at(url):
            if changed:
                targets = [f"{root}/{FILES}/{index[name].key}" for name in changed]
                filesystem.put([str(source) for source in sources], targets)
    stored = {"format": _FORMAT, "files": {name: list(vars(file).values()) for name, file in sorted(index.items())}}
    with _at(url):
        filesystem.pipe_file(f"{root}/{INDEX}", (json.dumps(stored, indent=1) + "\n").encode())
        filesystem.invalidate_cache()
        wanted = {f"{root}/{FILES}/{file.key}" for file in index.values()}
        if left := [path for path in filesystem.find(f"{root}/{FILES}") if path not in wanted]:
            filesystem.rm(left)
    return len(changed)


def _still(directory: Path, name: str, copy: Path) -> Path:
    """A file with the contents of that in `directory` that does not change while it is sent: `copy`, or itself."""
    path = directory / name
    if path.suffix == ".sqlite":
        try:
            with (
                closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as source,
                closing(sqlite3.connect(copy)) as target,
            ):
                source.backup(target)
        except sqlite3.Error as error:
            raise AgentArkError(f"{path}: cannot be copied ({error}); `agentark traces verify` looks at it") from error
        return copy
    if (
        "checkpoints" in Path(name).parts or path.stat().st_size > _SMALL
    ):  # these appear whole, and are not touched again
        return path
    return Path(shutil.copyfile(path, copy))


def load(url: str, directory: Path) -> int:
    """Makes a directory from the copy at an fsspec URL; of how many files.

    Raises:
        UsageError: there is something in the directory, no copy at the URL, or no such file system is installed here.
        AgentArkError: the copy cannot be read or is damaged, or the directory cannot be written.
    """
    if _filled(directory):
        raise UsageError(f"{directory}: there already. Take it as it is, or move it away to load the copy.")
    filesystem, root = _opened(url)
    index = _index(filesystem, root, url)
    if not index:
        raise UsageError(f"{url}: there is no copy of a run here. `agentark mirror save DIR URL` makes one.")
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{directory.name}.", dir=directory.parent) as scratch:
            fresh = Path(scratch, directory.name)
            places = [fresh / name for name in index]
            for place in places:
                if not place.resolve().is_relative_to(fresh.resolve()):
                    raise AgentArkError(f"{url}: damaged ({place} is not in the copy). Save it again.")
                place.parent.mkdir(parents=True, exist_ok=True)
            with _at(url):
                filesystem.get([f"{root}/{FILES}/{file.key}" for file in index.values()], list(map(str, places)))
            for place, file in zip(places, index.values(), strict=True):
                if place.stat().st_size != file.bytes:
                    raise AgentArkError(f"{url}: damaged ({file.key} has not {file.bytes} bytes). Save it again.")
                os.utime(place, ns=(file.modified, file.modified))  # so that it counts as unchanged
            os.rename(fresh, directory)
    except OSError as error:
        raise AgentArkError(f"{directory}: cannot be written ({error}). Free space or choose another one.") from error
    return len(index)


def keep(directory: Path, url: str, command: Sequence[str], every: float) -> int:
    """Runs a command while its directory is saved every so many seconds; the command's exit code, see `_KEEP`.

    Raises as `save` and `load`, and UsageError where there is no such command.
    """
    filesystem, root = _opened(url)
    if not _filled(directory) and _index(filesystem, root, url):
        _say(f"{load(url, directory)} files loaded from {url}")
    try:
        child = subprocess.Popen(command, start_new_session=True)  # a terminal's interrupt comes through here, once
    except OSError as error:
        raise UsageError(f"{command[0]}: cannot be run ({error.strerror})") from error

    def pass_on(number: int, frame: FrameType | None) -> None:
        child.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        while True:
            try:
                code = child.wait(timeout=every)
                break
            except subprocess.TimeoutExpired:
                _save_and_say(directory, url)
        saved = _save_and_say(directory, url)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if code:
        return 128 - code if code < 0 else code
    return 0 if saved else AgentArkError.exit_code


def _save_and_say(directory: Path, url: str) -> bool:
    """Whether the directory, if it is there yet, could be saved; a command is not ended because that failed once."""
    if not directory.is_dir():
        return True
    try:
        sent = save(directory, url)
    except AgentArkError as error:
        _say(f"not saved: {error}")
        return False
    if sent:
        _say(f"{sent} files saved to {url}")
    return True


def _say(text: str) -> None:
    print(f"agentark mirror: {text}", file=sys.stderr, flush=True)


def _filled(directory: Path) -> bool:
    return directory.exists() and not (directory.is_dir() and not any(directory.iterdir()))


def _opened(url: str) -> tuple[Any, str]:
    """The file system of a URL, and the path in it."""
    local = "://" not in url or url.startswith("file://")
    filesystem, path = filesystem_at(url, **({"auto_mkdir": True} if local else {}))
    return filesystem, path.rstrip("/")


def _index(filesystem: Any, root: str, url: str) -> dict[str, _File]:
    """The files of the copy, by name; none where there is no copy."""
    with _at(url):
        try:
            stored = filesystem.cat_file(f"{root}/{INDEX}")
        except FileNotFoundError:
            return {}
    try:
        read = json.loads(stored)
        if read["format"] != _FORMAT:
            raise ValueError(f"its format is {read['format']!r}, wanted is {_FORMAT!r}")
        return {name: _File(*file) for name, file in read["files"].items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise AgentArkError(f"{url}/{INDEX}: not the index of a copy ({error}). Choose another URL.") from error


@contextmanager
def _at(url: str) -> Iterator[None]:
    """What goes wrong with the storage in the block names the URL."""
    try:
        yield
    except Exception as error:  # each kind of storage has exceptions of its own
        raise AgentArkError(
            f"{url}: {error or type(error).__name__}. Check the address, your rights and the network; the copy there "
            "is as it was."
        ) from error


def mirror(arguments: Sequence[str]) -> int:
    """`agentark mirror`; the exit code. Raises UsageError for arguments that cannot be used."""
    parser = Parser("agentark mirror", _MIRROR)
    commands = parser.add_subparsers(required=True, metavar="COMMAND", title="commands")
    for name, summary, description, run in (
        ("save", "a directory to object storage", _SAVE, _saved),
        ("load", "a directory from object storage", _LOAD, _loaded),
        ("keep", "run a command, and save its directory as it goes", _KEEP, _kept),
    ):
        command = commands.add_parser(name, help=summary, description=description)
        for argument in ("url", "dir") if name == "load" else ("dir", "url"):
            command.add_argument(argument, metavar=argument.upper(), type=Path if argument == "dir" else str)
        command.set_defaults(run=run)
    command.add_argument("command", metavar="COMMAND", nargs="+")
    command.add_argument("--every", type=_seconds, default=300.0, help="seconds between two saves (default: 300)")
    options = parser.parse_args(arguments)
    return int(options.run(options))


def _saved(options: Namespace) -> int:
    _say(f"{save(options.dir, options.url)} files saved to {options.url}")
    return 0


def _loaded(options: Namespace) -> int:
    _say(f"{load(options.url, options.dir)} files loaded from {options.url}")
    return 0


def _kept(options: Namespace) -> int:
    return keep(options.dir, options.url, options.command, options.every)


def _seconds(text: str) -> float:
    if not 0 < (seconds := float(text)) < float("inf"):
        raise ValueError(text)
    return seconds
