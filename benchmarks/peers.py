"""The environments of those that we are compared with, each with packages of its own, in `.peers/` of this checkout.

python -m benchmarks.peers            # make them all: minutes, some gigabytes
python -m benchmarks.peers trl        # one of them

Versions are exact, for a comparison says with what it was made. What runs there imports nothing of ours but
`benchmarks.workers`: whatever a side needs is in its setup.
"""

import argparse
import json
import subprocess
import sys
import venv
from collections.abc import Mapping, Sequence
from pathlib import Path

from agentark_jax.errors import AgentArkError, UsageError
from benchmarks.workers import ROOT

PLACE = ROOT / ".peers"
REQUIREMENTS: Mapping[str, tuple[str, ...]] = {
    "trl": ("torch==2.13.0", "transformers==5.24.0", "trl==1.16.0", "peft==0.21.2", "accelerate==1.15.0"),
    "tunix": ("google-tunix==0.1.7", "jax==0.10.2", "flax==0.12.8", "transformers==5.12.1"),
}


def python(peer: str) -> str:
    """The interpreter of a peer's environment. Raises UsageError where that is missing or has other versions."""
    marker = _marker(peer)
    if not marker.exists() or marker.read_text() != _wanted(peer):
        raise UsageError(
            f"--peers: there is no environment of {peer} yet; make it by: python -m benchmarks.peers {peer}"
        )
    return str(_interpreter(peer))


def versions(peer: str) -> dict[str, str]:
    """What is installed in a peer's environment, by package."""
    command = [python(peer), "-m", "pip", "list", "--format", "json"]
    listed = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return {package["name"]: package["version"] for package in json.loads(listed.stdout)}


def install(peer: str) -> None:
    """Makes a peer's environment anew. Raises AgentArkError when that fails."""
    venv.create(PLACE / peer, with_pip=True, clear=True)
    command = [str(_interpreter(peer)), "-m", "pip", "install", "-q", *REQUIREMENTS[peer]]
    if subprocess.run(command, check=False).returncode:
        raise AgentArkError(f"the environment of {peer} was not made; pip says above why: {' '.join(command)}")
    _marker(peer).write_text(_wanted(peer))


def _interpreter(peer: str) -> Path:
    return PLACE / peer / "bin" / "python"


def _marker(peer: str) -> Path:
    """Written last: an environment without it is half made."""
    return PLACE / peer / "requirements.txt"


def _wanted(peer: str) -> str:
    return "\n".join(REQUIREMENTS[peer]) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0 when all is there, 1 when something could not be installed."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("peer", nargs="*", help=f"which of {', '.join(REQUIREMENTS)} (default: all)")
    options = parser.parse_args(arguments)
    try:
        if unknown := set(options.peer) - set(REQUIREMENTS):
            raise UsageError(f"there is no peer {min(unknown)!r}; choose among {', '.join(REQUIREMENTS)}")
        for peer in options.peer or REQUIREMENTS:
            install(peer)
            print(f"{peer}: {python(peer)}")
    except AgentArkError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
