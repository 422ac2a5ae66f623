"""Policies for those who generate: a model directory for every version, of which the newest stay on disk."""

import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from agentark_jax.errors import AgentArkError
from agentark_jax.models.config import ModelConfig
from agentark_jax.models.weights import Params, save_pretrained
from agentark_jax.records import stable_hash

KEEP = 2

_VERSION = re.compile(r"step-(\d{8,})-[0-9a-f]{12}")


def version_name(fingerprint: Mapping[str, Any], step: int) -> str:
    """The name of the weights after `step` optimizer steps of the run that the JSON-serialisable `fingerprint` tells.

    Other runs, and other steps of this one, have other names: `step-00000120-` and a hash of both.
    """
    return f"step-{step:08d}-{stable_hash([dict(fingerprint), step])[:12]}"


def publish(
    directory: Path, version: str, config: ModelConfig, params: Params, source: Path, dtype: str = "float32"
) -> Path:
    """Writes a policy as the model directory `directory/version`, and removes all versions but the newest two.

    It appears only when it is complete, replacing one of that name; see `save_pretrained`, also for `source` and
    several processes. The one before stays, for servers that restart meanwhile. Only the run that publishes writes to
    `directory`: what a killed one left there half-written, or half-removed, goes as well.

    Raises AgentArkError when the disk is full or not writable.
    """
    if not _VERSION.fullmatch(version):
        raise ValueError(f"{version!r} is no name of a version; take that of `version_name`")
    written = save_pretrained(Path(directory) / version, config, params, source, dtype)
    if jax.process_index() == 0:
        _remove_old(Path(directory), version)
    return written


def published(directory: Path) -> list[Path]:
    """The versions in a directory, the oldest first."""
    if not Path(directory).is_dir():
        return []
    return sorted(path for path in Path(directory).iterdir() if _VERSION.fullmatch(path.name))


def _remove_old(directory: Path, newest: str) -> None:
    """Of other versions as many stay as are wanted besides `newest`: those of the steps before it, if any."""
    try:
        for leftover in directory.glob(".step-*"):
            shutil.rmtree(leftover)
        others = [path for path in published(directory) if path.name != newest]
        before = [path for path in others if path.name < newest]
        for old in set(others) - set(before[-(KEEP - 1) :]):
            # Renamed first: a version is there as a whole or not at all.
            removed = Path(tempfile.mkdtemp(prefix=f".{old.name}.old.", dir=directory))
            os.replace(old, removed / "it")
            shutil.rmtree(removed)
    except OSError as error:
        raise AgentArkError(
            f"{directory}: old versions cannot be removed ({error}); make the directory writable, and run again"
        ) from error
