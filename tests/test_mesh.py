"""The fit on many devices and in several processes equals the fit on one; state moves between meshes."""

import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import mesh_worker as worker
import numpy as np
import pytest
import test_training as t
from jax.sharding import AbstractMesh
from safetensors.numpy import load_file

from agentark_jax.errors import AgentArkError, UsageError
from agentark_jax.models.sharding import parameter_sharding
from agentark_jax.training.config import MeshConfig
from agentark_jax.training.distributed import cluster
from agentark_jax.training.job import train
from agentark_jax.training.loop import fit
from agentark_jax.training.mesh import check_mesh, make_mesh
from agentark_jax.training.state import partition


def start(devices, cache, *arguments, script=worker, **variables):
    here = Path(__file__).resolve()
    environment = {
        **os.environ,
        **variables,
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0",
        "PYTHONPATH": os.pathsep.join([str(here.parent), str(here.parent.parent)]),
    }
    command = [sys.executable, "-W", "error::UserWarning", script.__file__, *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


# Of parameters after some steps: Adam divides gradients by their own size, so where one is next to nothing its last
# digits become part of a step.
STEPPED = 1e-4


def finish(*children, code=0):
    outputs = [child.communicate(timeout=300)[0] for child in children]
    for child, output in zip(children, outputs, strict=True):
        assert child.returncode == code, output


@pytest.fixture(scope="module")
def eight(tmp_path_factory) -> Path:
    """What eight virtual devices of one process computed."""
    directory = tmp_path_factory.mktemp("eight")
    finish(start(8, directory / "compiled", "eight", directory))
    return directory


@pytest.fixture(scope="module")
def two(eight) -> Path:
    """What two processes with two virtual devices each computed, some of it from checkpoints of the eight."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    several = {"JAX_COORDINATOR_ADDRESS": f"localhost:{port}", "JAX_NUM_PROCESSES": "2"}
    children = [
        start(2, eight / "compiled", "two", eight, **several, JAX_PROCESS_ID=str(process)) for process in range(2)
    ]
    finish(*children, code=143)  # the last fit is one that is terminated
    return eight


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """The fit on this process's only device."""
    return worker.run(tmp_path_factory.mktemp("one"), (1, 1, 1))


def assert_equal_up_to(actual, expected, tolerance):
    assert set(expected) <= set(actual)
    for name, value in expected.items():
        error = np.abs(np.asarray(actual[name], np.float64) - value).max()
        assert error <= tolerance * max(np.abs(value).max(), 1e-8), (name, error)


def assert_same_steps(actual, expected):
    """Losses and gradients, and parameters after three steps, but for those whose gradient is nothing but rounding."""
    stepped = {path: value for path, value in expected.items() if path.startswith("param")}
    computed = {path: value for path, value in expected.items() if path not in stepped}
    assert_equal_up_to(actual, computed, 1e-5)
    moved = {}
    for path, value in stepped.items():
        if path.endswith("key_bias"):  # a bias of all keys, which softmax hardly notices
            continue
        moments = np.abs(computed[path.replace("param", "moment", 1)])
        clear = moments > 1e-5 * moments.max()
        assert clear.mean() > 0.9, path
        moved[path] = np.where(clear, value, np.asarray(actual[path]))
    assert_equal_up_to(actual, moved, STEPPED)


def assert_same_fit(actual, expected):
    figures = {name: expected[name] for name in ("history", "tokens")}
    assert_equal_up_to(actual, figures, 1e-5)
    assert_equal_up_to(actual, {name: value for name, value in expected.items() if name not in figures}, STEPPED)


@pytest.mark.parametrize("name", ["tied_data", "tied_data_fsdp", "tied_all", "untied_all"])
def test_losses_gradients_and_steps_of_eight_devices_equal_those_of_one(eight, name):
    assert_same_steps(np.load(eight / f"{name}.npz"), dict(np.load(eight / f"{name.split('_')[0]}_one.npz")))


@pytest.mark.parametrize("name", worker.MESHES)
def test_logprobs_entropies_and_their_gradients_on_eight_devices_equal_those_of_one(eight, name):
    assert_equal_up_to(np.load(eight / f"scores_{name}.npz"), dict(np.load(eight / "scores_one.npz")), 1e-5)


def test_a_process_reward_model_on_eight_devices_equals_that_on_one(eight):
    """Its losses, gradients and scores."""
    assert_equal_up_to(np.load(eight / "judged_all.npz"), dict(np.load(eight / "judged_one.npz")), 1e-5)


def test_fsdp_divides_the_state(eight):
    found = json.loads((eight / "bytes.json").read_text())
    assert len(found["held"]) == 8
    assert max(found["held"]) <= 1.05 * found["total"] / 8


def test_adapters_trained_on_eight_devices_equal_those_of_one(eight, tmp_path):
    assert_same_fit(np.load(eight / "adapted.npz"), worker.run(tmp_path, (1, 1, 1), lora=worker.LORA))


def test_two_processes_equal_one_and_read_half_of_the_rows_each(two, one):
    found = dict(np.load(two / "two.npz"))
    assert found.pop("rows_read") == len(one["history"]) * worker.CONFIG.rows / 2
    assert_same_fit(found, one)
    lines = [json.loads(line) for line in (two / "two" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == one["history"][:, 0].tolist()


def test_models_that_two_processes_train_and_export_are_those_of_one(two, tmp_path):
    for job in worker.jobs(two, tmp_path, (1, 1, 1)):
        train(job)
        theirs = two / "jobs" / job.directory.name
        for file in job.directory.glob("*/*.safetensors"):
            found = load_file(theirs / file.relative_to(job.directory))
            assert_equal_up_to(found, load_file(file), STEPPED)
        assert {path.name for path in (theirs / "model").iterdir()} == {
            path.name for path in (job.directory / "model").iterdir()
        }
    assert (two / "jobs" / "adapted" / "adapter" / "adapter_model.safetensors").is_file()
    written = {path.name for path in (two / "jobs" / "judging" / "model").iterdir()}
    assert {"head.safetensors", "projector.safetensors"} <= written


def test_processes_hear_of_what_stops_another(two):
    leader, follower = (json.loads((two / f"said_{number}.json").read_text()) for number in range(2))
    assert leader == ["process 1 cannot take part; its output says why", "no paper"]
    assert follower == ["no disk", "the first process failed; its output says why"]


def test_resumed_on_the_same_mesh_bit_by_bit(eight):
    whole, resumed = (np.load(eight / f"{name}.npz") for name in ("whole", "same"))
    for name in whole:
        np.testing.assert_array_equal(resumed[name], whole[name], err_msg=name)


def test_resumed_on_another_mesh_and_on_another_number_of_processes(two, one):
    assert (two / "to_one" / "checkpoints" / "4").is_dir()  # where eight devices were interrupted
    assert_same_fit(worker.run(two / "to_one", (1, 1, 1)), one)
    assert_same_fit(np.load(two / "to_two.npz"), one)


def test_sigterm_to_one_of_two_processes_stops_both_after_the_same_step(two):
    steps = [json.loads(line)["step"] for line in (two / "terminated" / "metrics.jsonl").read_text().splitlines()]
    assert 2 <= steps[-1] < len(np.load(two / "two.npz")["history"])
    assert (two / "terminated" / "checkpoints" / str(steps[-1])).is_dir()


def test_what_the_environment_says_about_other_processes():
    assert cluster({}) is None
    explicit = {"JAX_COORDINATOR_ADDRESS": "host:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"}
    assert cluster(explicit) == "explicit"
    with pytest.raises(UsageError, match="sets JAX_COORDINATOR_ADDRESS but not JAX_NUM_PROCESSES, JAX_PROCESS_ID"):
        cluster({"JAX_COORDINATOR_ADDRESS": "host:1"})
    assert cluster({"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0"}) == "slurm"
    assert cluster({"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0", "SLURM_NTASKS": "4"}) is None
    assert cluster({"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "1"}) == "tpu"
    assert cluster({"TPU_WORKER_HOSTNAMES": "localhost"}) is None
    assert cluster({"MEGASCALE_COORDINATOR_ADDRESS": "a"}) == "tpu"


def sizes(data, fsdp, tensor):
    return AbstractMesh((data, fsdp, tensor), ("data", "fsdp", "tensor"))


def test_a_mesh_that_does_not_fit_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"mesh: data 2 × fsdp 2 × tensor 1 does not make up the 8 devices .* is 8"):
        MeshConfig(2, 2).sizes(8)
    with pytest.raises(UsageError, match="mesh: only one of data, fsdp and tensor can be -1"):
        MeshConfig(-1, -1)
    with pytest.raises(UsageError, match=r"mesh\.tensor: 0 is not possible"):
        MeshConfig(tensor=0)
    assert MeshConfig(2, -1, 2).sizes(8) == {"data": 2, "fsdp": 2, "tensor": 2}
    with pytest.raises(UsageError, match="does not make up the 1 devices"):
        fit(
            replace(t.CONFIG, mesh=MeshConfig(data=2)), t.MODEL, t.make_params(), t.EXAMPLES,
            directory=tmp_path, seed=0, fingerprint={},
        )  # fmt: skip
    assert not list(tmp_path.iterdir())


def test_sizes_that_do_not_divide_are_refused_and_key_value_heads_replicated(caplog):
    params, _ = partition(t.make_params(), [])
    with pytest.raises(UsageError, match=r"mesh\.tensor \(2\): embedding \[61, 16\] has 61 vocabulary"):
        check_mesh(sizes(1, 1, 2), t.MODEL, params, 4, 1)
    with pytest.raises(UsageError, match=r"mesh\.fsdp \(3\): embedding \[61, 16\] has 16 embed.* a divisor of 16"):
        check_mesh(sizes(1, 3, 1), t.MODEL, params, 3, 1)
    with pytest.raises(UsageError, match=r"rows: 4 rows in 2 micro-batches .* set rows to a multiple of 8"):
        check_mesh(sizes(2, 2, 1), t.MODEL, params, 4, 2)
    tied, _ = partition(t.make_params(worker.TIED), [])
    with caplog.at_level("INFO"):
        check_mesh(sizes(1, 1, 2), worker.TIED, tied, 4, 1)
    assert "1 key/value heads do not divide over mesh.tensor (2): each device keeps all of them" in caplog.text
    with pytest.raises(AgentArkError, match=r"scanned\.00\.novelty \[2, 3\]: no sharding is known"):
        parameter_sharding("scanned.00.novelty", (2, 3), make_mesh(MeshConfig()))
