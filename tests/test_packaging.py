"""What is installed: the wheel has all of the package, runs outside the repository, and its licences are told."""

import os
import subprocess
import sys
import tomllib
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from agentark_jax.cli import main

ROOT = Path(__file__).parent.parent
LOWEST = ROOT / "tests" / "lowest.txt"
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def run(*command: object, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# Recipes


def test_recipes_are_written_where_they_can_be_run_and_changed(tmp_path, capsys):
    for _ in range(2):
        assert main(["recipes", str(tmp_path / "configs")]) == 0
    assert f"{len(CONFIGS)} recipes" in capsys.readouterr().out
    written = {path.name: path.read_text() for path in (tmp_path / "configs").iterdir()}
    assert written == {path.name: path.read_text() for path in CONFIGS}


def test_recipes_never_replace_what_was_changed(tmp_path, capsys):
    (tmp_path / "lab.yaml").write_text("name: mine\n")
    assert main(["recipes", str(tmp_path)]) == 2
    assert f"{tmp_path / 'lab.yaml'} differs" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["lab.yaml"]


# Licences and versions


def test_every_dependency_has_its_licence_told():
    rows = [line.split("|") for line in (ROOT / "LICENCES.md").read_text().splitlines() if line.startswith("|")]
    told = {canonicalize_name(row[1].strip()) for row in rows if row[3].strip()}
    wanted = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["quickstart"]]
    assert {canonicalize_name(Requirement(each).name) for each in wanted} <= told


def test_the_lower_bounds_are_the_versions_to_test():
    """A bound below what `tests/lowest.txt` has could never be installed."""
    pins = [Requirement(line) for line in LOWEST.read_text().splitlines() if not line.startswith("#")]
    lowest = {canonicalize_name(pin.name): pin.specifier for pin in pins}
    for each in map(Requirement, PROJECT["dependencies"]):
        (bound,), (tested,) = each.specifier, lowest[canonicalize_name(each.name)]
        assert (bound.operator, tested.operator) == (">=", "==")
        assert Version(bound.version) == Version(tested.version), f"{each}: lowest.txt has {tested.version}"


# The wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from the sdist, as an installer would where there is no wheel."""
    directory = tmp_path_factory.mktemp("dist")
    script = f"from setuptools import build_meta; build_meta.build_sdist({str(directory)!r})"
    run(sys.executable, "-c", script, cwd=ROOT)
    (sdist,) = directory.iterdir()
    settings = ("--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", directory)
    run(sys.executable, "-m", "pip", "wheel", sdist, *settings, cwd=directory)
    (built,) = directory.glob("*.whl")
    return built


@pytest.mark.slow
def test_the_wheel_has_all_of_the_package_and_nothing_else(wheel):
    files = {
        path.relative_to(ROOT).as_posix()
        for pattern in ("agentark_jax/**/*", "agentark_jax/configs/*")  # a link, which ** does not follow
        for path in ROOT.glob(pattern)
        if path.is_file() and "__pycache__" not in path.parts
    }
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (about,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        metadata = message_from_bytes(archive.read(about))
    assert {name for name in names if ".dist-info/" not in name} == files
    assert {f"agentark_jax/configs/{path.name}" for path in CONFIGS} <= files
    assert metadata["License-Expression"] == "Apache-2.0"
    assert f"{about.removesuffix('METADATA')}licenses/LICENSE" in names
    needed = [each for each in metadata.get_all("Requires-Dist") if "extra ==" not in each]
    assert set(map(Requirement, needed)) == set(map(Requirement, PROJECT["dependencies"]))
