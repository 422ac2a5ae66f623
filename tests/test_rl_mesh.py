"""Reinforcement on many devices, and in several processes, equals that on one."""

import socket

import numpy as np
import pytest
import rl_mesh_worker as worker
from test_mesh import STEPPED, assert_equal_up_to, finish, start

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return worker.run(tmp_path_factory.mktemp("one"), (1, 1, 1))


def check(found, one):
    figures = {name: value for name, value in one.items() if name.startswith("figure")}
    assert_equal_up_to(found, figures, STEPPED)
    assert_equal_up_to(found, {name: value for name, value in one.items() if name not in figures}, STEPPED)


def test_eight_devices_equal_one(one, tmp_path):
    finish(start(8, tmp_path / "compiled", "eight", tmp_path, script=worker))
    for name in ("data", "all"):
        check(np.load(tmp_path / f"{name}.npz"), one)


def test_two_processes_of_which_one_samples_equal_one(one, tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    several = {"JAX_COORDINATOR_ADDRESS": f"localhost:{port}", "JAX_NUM_PROCESSES": "2"}
    cache = tmp_path / "compiled"
    children = [
        start(2, cache, "two", tmp_path, script=worker, **several, JAX_PROCESS_ID=str(process)) for process in range(2)
    ]
    finish(*children)
    check(np.load(tmp_path / "two.npz"), one)
