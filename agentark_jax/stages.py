"""The stage graph's machinery: artefacts, manifests, what is up to date, one lock per run directory.

A stage is a folder of a run. Its manifest is written last and atomically, so a folder without one is unfinished: it is
continued when it was begun for the same fingerprint (a training stage resumes at its checkpoint) and redone otherwise.
A stage whose manifest carries the wanted fingerprint is reused.
"""

import hashlib
import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

import filelock

from agentark_jax.errors import AgentArkError, UsageError
from agentark_jax.files import write_json
from agentark_jax.records import stable_hash

MANIFEST = "manifest.json"
BEGUN = "begun.json"
_MODELS = frozenset(("model", "adapter"))  # folders that hold one
_HASHED_BYTES = 16 * 2**20
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "tokenizers", "safetensors")


@dataclass(frozen=True)
class Artefact:
    """A file of a finished stage.

    Files up to 16 MB are compared by content whenever the stage is looked at; larger ones by size, and by content when
    another stage is made from them. Those of older stages have no hash and are compared by size alone.
    """

    path: str
    bytes: int
    sha256: str | None


@dataclass(frozen=True)
class Manifest:
    """What a finished stage did and from what. `fingerprint` covers config slice, inputs and stage version."""

    stage: str
    version: int
    fingerprint: str
    config: Mapping[str, Any]
    inputs: Mapping[str, str]
    counts: Mapping[str, Any]
    tokens: int
    seconds: float
    artefacts: list[Artefact]
    git: str | None
    versions: Mapping[str, str]
    directory: Path = field(compare=False, default=Path())
    reused: bool = field(compare=False, default=False)


@dataclass
class Work:
    """What a stage's builder fills in while it works in `directory`."""

    directory: Path
    counts: dict[str, Any] = field(default_factory=dict)
    tokens: int = 0


class Run:
    """A run directory held under its lock; produces stages, or finds that they are done.

    Args:
        lent: other directories whose finished stages are used where they are.
        left: directories that nobody works in any more, whose stages, finished or begun, are moved here.
    """

    def __init__(
        self,
        directory: Path,
        *,
        on_stage: Callable[[Manifest], None] | None = None,
        lent: Sequence[Path] = (),
        left: Sequence[Path] = (),
    ):
        self.directory = directory
        self._on_stage = on_stage
        self._lent = tuple(lent)
        self._left = tuple(left)
        self.manifests: list[Manifest] = []
        self._whole: set[Path] = set()  # stages whose large files were found to be what they were

    def produce(
        self,
        stage: str,
        build: Callable[[Work], None],
        *,
        version: int,
        config: Mapping[str, Any],
        inputs: Mapping[str, "Manifest | str"],
    ) -> Manifest:
        """The manifest of a stage whose artefacts are up to date, building them first where they are not.

        Args:
            config: the slice of the configuration that the stage depends on, and no more.
            inputs: the stages it reads, or fingerprints of what lies outside the run.

        Raises:
            AgentArkError: the stage's manifest or one of its artefacts is damaged.
        """
        input_fingerprints = {
            name: given if isinstance(given, str) else given.fingerprint for name, given in inputs.items()
        }
        fingerprint = stable_hash([stage, version, config, input_fingerprints])
        directory = self.directory / stage
        self._take_over(stage, fingerprint)
        own = read_manifest(directory)
        for found in chain([own], (read_manifest(other / stage) for other in self._lent)):
            if found is not None and found.fingerprint == fingerprint:
                self._finish(found)
                return found
        self._check_whole([given for given in inputs.values() if isinstance(given, Manifest)])
        if directory.exists() and (own is not None or _begun_for(directory) != fingerprint):
            _remove(directory)
        directory.mkdir(parents=True, exist_ok=True)
        write_json(directory / BEGUN, {"fingerprint": fingerprint})
        started = time.monotonic()
        work = Work(directory)
        build(work)
        manifest = Manifest(
            stage=stage,
            version=version,
            fingerprint=fingerprint,
            config=config,
            inputs=input_fingerprints,
            counts=work.counts,
            tokens=work.tokens,
            seconds=round(time.monotonic() - started, 3),
            artefacts=_artefacts(directory),
            git=git_revision(),
            versions=package_versions(),
            directory=directory,
        )
        stored = {key: value for key, value in asdict(manifest).items() if key not in ("directory", "reused")}
        write_json(directory / MANIFEST, stored)
        (directory / BEGUN).unlink()
        self._finish(manifest)
        return manifest

    def _check_whole(self, stages: Sequence[Manifest]) -> None:
        """Raises AgentArkError for a large file that is not what it was when its stage was made, such as a model's."""
        for stage in stages:
            if not stage.reused or stage.directory in self._whole:
                continue
            large = [each for each in stage.artefacts if each.sha256 and each.bytes > _HASHED_BYTES]
            with ThreadPoolExecutor() as threads:
                found = threads.map(lambda each, at=stage.directory: _sha256(at / each.path), large)
                for artefact, sha256 in zip(large, found, strict=True):
                    if sha256 != artefact.sha256:
                        raise _changed(stage.directory / artefact.path, stage.directory)
            self._whole.add(stage.directory)

    def _take_over(self, stage: str, fingerprint: str) -> None:
        """Move a stage here that was finished, or else begun, in another directory for this fingerprint."""
        directory = self.directory / stage
        if _made_for(directory) == fingerprint:
            return
        places = [other / stage for other in self._left]
        finished = [place for place in places if _made_for(place) == fingerprint]
        begun = [place for place in places if _begun_for(place) == fingerprint]
        if finished or (begun and _begun_for(directory) != fingerprint):
            if directory.exists():
                _remove(directory)
            self.directory.mkdir(parents=True, exist_ok=True)
            (finished or begun)[0].rename(directory)

    def _finish(self, manifest: Manifest) -> None:
        self.manifests.append(manifest)
        if self._on_stage is not None:
            self._on_stage(manifest)


@contextmanager
def locked(
    directory: Path,
    options: tuple[str, str] = ("--name", "--root"),
    *,
    patience: float = 0,
    on_wait: Callable[[str], None] | None = None,
) -> Iterator[None]:
    """Hold a run directory for this process alone.

    Args:
        options: they choose another one, where this is in use or cannot be written.
        patience: seconds to wait for another process to let go of it; negative: as long as that takes.
        on_wait: told who works in it, if that has to be waited for.

    Raises:
        AgentArkError: the directory cannot be written.
        UsageError: another process works in it.
    """
    owner = directory / "lock.owner"
    lock = filelock.FileLock(directory / "lock")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            if not patience:
                raise
            if on_wait is not None:
                on_wait(_owner(owner))
            lock.acquire(timeout=patience, poll_interval=0.5)
        owner.write_text(f"process {os.getpid()} on {os.uname().nodename}\n")
    except filelock.Timeout:
        raise UsageError(
            f"{directory}: in use by {_owner(owner)}. Wait for it, stop it, or choose another {options[0]}."
        ) from None
    except OSError as error:
        raise AgentArkError(
            f"{directory}: cannot be written ({error.strerror}). Choose another {options[1]}."
        ) from error
    try:
        yield
    finally:
        owner.unlink(missing_ok=True)
        lock.release()


def _owner(file: Path) -> str:
    try:
        return file.read_text().strip() or "another process"
    except FileNotFoundError:  # it is just coming or going
        return "another process"


def read_manifest(directory: Path, *, models: bool = True) -> Manifest | None:
    """The manifest of a finished stage, checked against its files; None where the stage is not finished.

    Without `models` those of its files that are a model's need not be there any more.
    """
    path = directory / MANIFEST
    if not path.exists():
        return None
    fix = _fix(directory)
    try:
        stored = json.loads(path.read_text())
        artefacts = [Artefact(**artefact) for artefact in stored.pop("artefacts")]
        manifest = Manifest(**stored, artefacts=artefacts, directory=directory, reused=True)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise AgentArkError(f"{path}: damaged ({error}). {fix}") from error
    for artefact in manifest.artefacts:
        file = directory / artefact.path
        if not file.resolve().is_relative_to(directory.resolve()):
            raise AgentArkError(f"{path}: damaged ({artefact.path} is not in {directory}). {fix}")
        if not file.exists():
            if not models and _MODELS.intersection(file.relative_to(directory).parts):
                continue
            raise AgentArkError(f"{file}: missing, though {path} lists it. {fix}")
        small = artefact.bytes <= _HASHED_BYTES
        if file.stat().st_size != artefact.bytes or (small and artefact.sha256 and _sha256(file) != artefact.sha256):
            raise _changed(file, directory)
    return manifest


def _changed(file: Path, directory: Path) -> AgentArkError:
    return AgentArkError(f"{file}: changed since {directory / MANIFEST} was written. {_fix(directory)}")


def _fix(directory: Path) -> str:
    return f"Delete {directory} and run again: it will be rebuilt from the stages before it."


def git_revision() -> str | None:
    """The commit of this source tree, `+` where it has uncommitted changes; None outside a checkout."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    try:
        revision = subprocess.run(
            ["git", "describe", "--always", "--abbrev=12", "--dirty=+"],
            cwd=root,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None  # no git at hand: the revision is a courtesy, nothing depends on it
    return revision.stdout.strip()


def package_versions() -> dict[str, str]:
    """Versions of the packages that determine the numbers."""
    return {package: version(package) for package in _PACKAGES}


def _remove(directory: Path) -> None:
    """Remove a stage. What says that it is finished or begun goes first, so that what a kill leaves is redone."""
    for name in (MANIFEST, BEGUN):
        (directory / name).unlink(missing_ok=True)
    shutil.rmtree(directory)


def _begun_for(directory: Path) -> str | None:
    """What an unfinished stage was begun for; None where that is not known: it is redone from the start."""
    return _fingerprint(directory / BEGUN)


def _made_for(directory: Path) -> str | None:
    """What a finished stage was made for, whether or not it is damaged; None where it is not finished."""
    return _fingerprint(directory / MANIFEST)


def _fingerprint(path: Path) -> str | None:
    try:
        fingerprint = json.loads(path.read_text())["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return str(fingerprint)


def _artefacts(directory: Path) -> list[Artefact]:
    files = sorted(path for path in directory.rglob("*") if path.is_file() and path.name != BEGUN)
    return [_artefact(path, directory) for path in files]


def _artefact(path: Path, directory: Path) -> Artefact:
    return Artefact(str(path.relative_to(directory)), path.stat().st_size, _sha256(path))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
