"""The scripts of `launch/`: what they would run, and what they say when something is missing."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
import yaml

from agentark_jax import preflight
from benchmarks.servers import PYTHON, free_port

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "launch"
# Every script that asks for machines, or is run on one by hand, and the settings that it cannot do without.
SCRIPTS = {
    "tpu_slice.sh": ("PROJECT", "ZONE", "DISK"),
    "slurm_gpu.sh": ("PARTITION", "VENV", "RUNS"),
    "gke_tpu.sh": ("IMAGE", "CLAIM"),
    "gpu_host.sh": ("URL", "NAME"),
    "pipeline_debate.sh": ("PROJECT", "ZONE", "URL", "NAME"),
    "pipeline_rl.sh": ("PROJECT", "ZONE", "SHARE", "MODEL"),
}
JOBSET_SCHEMA = yaml.safe_load((ROOT / "tests" / "jobset_v1alpha2.yaml").read_text())


def tool(name: str) -> str:
    """A program that the extra `test` installs beside this Python."""
    found = shutil.which(name, path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    assert found, f"{name} is not installed; pip install -e '.[test]' brings it"
    return found


def launch(script: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """The script in an environment of nothing but a PATH, where none of the programs that it would start is found."""
    environment = {"PATH": os.defpath, **variables}
    command = ["bash", str(ROOT / "launch" / script), *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_a_dry_run_prints_the_commands_of_a_tpu_slice() -> None:
    done = launch(
        "tpu_slice.sh", "--dry-run", "configs/qwen3_0.6b.yaml", "--seeds", "[0, 1]", PROJECT="mine", SPOT="no"
    )
    assert (done.returncode, done.stderr) == (0, "")
    create, *_, delete = done.stdout.splitlines()
    assert create.startswith("gcloud compute tpus queued-resources create agentark --project mine --zone ZONE ")
    assert "--accelerator-type v5litepod-8" in create
    assert "--spot" not in create
    assert "scp configs/qwen3_0.6b.yaml agentark:run.yaml" in done.stdout
    assert "bash\\ agentark/launch/tpu_host.sh\\ DISK\\ run\\ --seeds" in done.stdout
    assert "--data-disk source=projects/mine/zones/ZONE/disks/DISK" in create
    assert "--data-disk" not in launch("tpu_slice.sh", "--dry-run", DISK="10.0.0.2:/runs").stdout
    assert delete.startswith("gcloud compute tpus queued-resources delete agentark ")
    assert "--spot" in launch("tpu_slice.sh", "--dry-run").stdout


def test_a_dry_run_prints_the_job_of_slurm() -> None:
    done = launch("slurm_gpu.sh", "--dry-run", "configs/qwen3_8b.yaml", "--name", "a b", ACCOUNT="me", GPUS="4")
    assert (done.returncode, done.stderr) == (0, "")
    submit, *job = done.stdout.splitlines()
    assert submit.startswith("sbatch --job-name agentark --partition PARTITION --account me --nodes 1")
    assert "--gpus-per-node 4" in submit
    command = f"VENV/bin/agentark run --config {ROOT}/configs/qwen3_8b.yaml --root RUNS --name a\\ b &"
    assert command in job
    assert checked("\n".join(job[:-1])) == ""


SLURM = {
    "scontrol": """if [[ "$1" == show ]]; then printf 'one\\ntwo\\n'; else echo "scontrol $*" >>log; fi""",
    "srun": """while [[ "$1" != bash ]]; do shift; done
for SLURM_PROCID in 0 1; do
  SLURM_PROCID=$SLURM_PROCID "$@" & processes+=" $!"
done
trap 'kill -TERM $processes' TERM
wait $processes || wait $processes""",
    "agentark": """echo "$JAX_COORDINATOR_ADDRESS $JAX_NUM_PROCESSES $JAX_PROCESS_ID $JAX_LOCAL_DEVICE_IDS $*" >>log
[[ "$*" != *--long* ]] || { trap 'echo saved >>log; exit 143' TERM; for _ in {1..600}; do sleep 0.1; done; }""",
}


def fakes(directory: Path, programs: dict[str, str]) -> Path:
    directory.mkdir(parents=True)
    for name, body in programs.items():
        (directory / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (directory / name).chmod(0o755)
    return directory


def test_a_job_of_slurm_runs_a_process_on_each_node_and_is_requeued_when_its_time_is_up(tmp_path: Path) -> None:
    venv = fakes(tmp_path / "bin", SLURM).parent

    def job(*options: str) -> subprocess.Popen[str]:
        variables = {"VENV": str(venv), "NODES": "2", "GPUS": "4"}
        done = launch("slurm_gpu.sh", "--dry-run", "configs/qwen3_8b.yaml", *options, **variables)
        assert (done.returncode, done.stderr) == (0, "")
        script = "\n".join(done.stdout.splitlines()[1:-1])
        assert checked(script) == ""
        slurm = {"PATH": f"{venv}/bin:{os.defpath}", "SLURM_JOB_ID": "71234", "SLURM_JOB_NODELIST": "[one-two]"}
        return subprocess.Popen(["bash", "-c", script], cwd=tmp_path, env=slurm, text=True)

    log = tmp_path / "log"
    assert job().wait(300) == 0
    run = f"run --config {ROOT}/configs/qwen3_8b.yaml --root RUNS"
    assert sorted(log.read_text().splitlines()) == [f"one:21234 2 {process} 0,1,2,3 {run}" for process in (0, 1)]
    log.write_text("")
    preempted = job("--long")
    until(lambda: log.read_text().count("--long") == 2)
    preempted.send_signal(signal.SIGUSR1)
    assert preempted.wait(300) != 0
    assert log.read_text().splitlines()[2:] == ["saved", "saved", "scontrol requeue 71234"]


def until(condition, seconds: float = 300.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.parametrize("script", SCRIPTS)
def test_what_is_missing_is_named(script: str) -> None:
    variables: dict[str, str] = {}
    for name in SCRIPTS[script]:
        done = launch(script, "configs/qwen3_8b.yaml", **variables)
        assert (done.returncode, done.stdout) == (2, "")
        assert f"{name} is not set" in done.stderr
        variables[name] = "x"
    done = launch(script, "nowhere.yaml", **variables)
    assert done.returncode == 2
    assert "'nowhere.yaml' is no file" in done.stderr


def test_numbers_are_checked() -> None:
    for script, name in (
        ("tpu_slice.sh", "ATTEMPTS"),
        ("slurm_gpu.sh", "HOURS"),
        ("slurm_gpu.sh", "NODES"),
        ("gke_tpu.sh", "RESTARTS"),
        ("pipeline_debate.sh", "SHARDS"),
        ("pipeline_rl.sh", "POOL"),
    ):
        done = launch(script, "--dry-run", **{name: "many"})
        assert done.returncode == 2
        assert f"{name} is 'many'; give a positive number" in done.stderr


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_says_what_it_costs_and_what_was_verified(script: str) -> None:
    head = (LAUNCH / script).read_text().split("set -euo pipefail")[0]
    for word in ("--dry-run", "Cost:", "Quota:", "Verified:", *SCRIPTS[script]):
        assert word in head


def test_a_dry_run_of_all_of_a_run_prints_every_step() -> None:
    done = launch("pipeline_debate.sh", "--dry-run", "configs/qwen3_1.7b.yaml", "--seeds", "[3]", SHARDS="2")
    assert (done.returncode, done.stderr) == (0, "")
    steps = re.split("^# [1-5] of 5: .*$", done.stdout, flags=re.M)[1:]
    slice_, pool, merged, trained, evaluated = steps
    for step, part in ((slice_, "warm-start"), (trained, "fit")):
        on_host = f"tpu_host.sh\\ gs://BUCKET/FOLDER\\ {part}\\ --name\\ NAME\\ --seeds\\ "
        assert on_host in step
        assert "queued-resources create NAME --project PROJECT --zone ZONE" in step
        assert step.count("--quiet") == 1
    for shard in (0, 1):
        assert f"--env SHARD={shard}/2" in pool
        kept = f"mirror keep runs/NAME/shards/{shard}-of-2 gs://BUCKET/FOLDER/shards/{shard}-of-2 -- "
        assert f"{kept}.venv/bin/agentark debate --config configs/qwen3_1.7b.yaml" in pool
        assert f"--parquet gs://BUCKET/FOLDER/traces/{shard}-of-2" in pool
    assert pool.count("sglang.launch_server") == 16
    assert "traces merge NAME.merging/NAME gs://BUCKET/FOLDER/traces/0-of-2 gs://BUCKET/FOLDER/traces/1-of-2" in merged
    assert "mirror keep runs gs://BUCKET/FOLDER -- .venv/bin/agentark run" in evaluated
    done = launch("pipeline_debate.sh", "--dry-run", "configs/qwen3_1.7b.yaml", "--name", "a b")
    assert done.returncode == 2
    assert "'a b' has a space" in done.stderr
    done = launch("pipeline_debate.sh", "--dry-run", URL="s3://mine")
    assert "give gs://BUCKET/FOLDER" in done.stderr


def test_a_step_of_a_pipeline_that_is_done_is_not_done_again(tmp_path: Path) -> None:
    script = f"""source {LAUNCH}/common.sh; dry_run=no NAME=mine
once first echo one
once "second step" false"""
    for shown in ("first …\none\n", "first: done before, as mine.steps says\n"):
        done = subprocess.run(["bash", "-ec", script], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 1
        assert done.stdout == f"{shown}second step …\n"
        assert (tmp_path / "mine.steps").read_text() == "first\n"


def test_a_dry_run_of_reinforcement_prints_the_pool_and_the_slice() -> None:
    done = launch("pipeline_rl.sh", "--dry-run", "configs/pad_qwen3_8b_tpu.yaml", POOL="2", PROJECT="mine", ZONE="here")
    assert (done.returncode, done.stderr) == (0, "")
    servers = [f"http://agentark-pool-{number}.here.c.mine.internal:30000" for number in (0, 1)]
    for number in (0, 1):
        assert f"instances create agentark-pool-{number} --project mine --zone here --machine-type" in done.stdout
        assert f"HOST=agentark-pool-{number}.here.c.mine.internal" in done.stdout
    assert "MODE=rl" in done.stdout
    on_host = done.stdout.replace("\\", "")
    assert f"tpu_host.sh ADDRESS:/NAME run --engine.servers [{','.join(servers)}]" in on_host
    assert done.stdout.splitlines()[-1].startswith("gcloud compute instances delete agentark-pool-0 agentark-pool-1 ")
    done = launch("pipeline_rl.sh", "--dry-run", SHARE="gs://bucket")
    assert "give an NFS share as ADDRESS:/NAME" in done.stderr


# Kubernetes


def manifest(*arguments: str, **variables: str) -> tuple[dict, dict]:
    done = launch("gke_tpu.sh", "--dry-run", *arguments, **variables)
    assert (done.returncode, done.stderr) == (0, "")
    config, jobset = yaml.safe_load_all(done.stdout)
    return config, jobset


@pytest.mark.parametrize(
    ("topology", "hosts", "chips"), [("v5e-8", 1, 8), ("v5e-256", 64, 4), ("v6e-16", 4, 4), ("v5p-128", 16, 4)]
)
def test_the_manifests_are_valid(topology: str, hosts: int, chips: int) -> None:
    options = ("--name", 'a "quoted" \\ word', "--seeds", "[1, 2]")
    config, jobset = manifest("configs/lora.yaml", *options, TOPOLOGY=topology, IMAGE="i/agentark:tpu", PART="fit")
    kubernetes_validate.validate(config, "1.31", strict=True)
    assert config["data"]["run.yaml"] == (ROOT / "configs" / "lora.yaml").read_text()
    jsonschema.validate(jobset, JOBSET_SCHEMA)
    (replicated,) = jobset["spec"]["replicatedJobs"]
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "slice"}, **replicated["template"]}
    kubernetes_validate.validate(job, "1.31", strict=True)
    assert job["spec"]["parallelism"] == job["spec"]["completions"] == hosts
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    command = ["agentark", "fit", "--config", "/config/run.yaml", "--root", "/runs", *options]
    assert container["command"] == command
    assert container["resources"]["limits"] == container["resources"]["requests"] == {"google.com/tpu": chips}
    (rule,) = job["spec"]["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"]["containerName"] == container["name"]
    assert pod["nodeSelector"]["cloud.google.com/gke-spot"] == "true"


def test_a_manifest_can_be_wrong() -> None:
    jobset = manifest()[1]
    for broken in ({"maxRestart": 3}, {"rules": [{"name": "x", "action": "Restart"}]}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({**jobset, "spec": {**jobset["spec"], "failurePolicy": broken}}, JOBSET_SCHEMA)
    job = jobset["spec"]["replicatedJobs"][0]["template"]
    job["spec"]["template"]["spec"]["nodeselector"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(
            {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}, **job}, "1.31", strict=True
        )


def test_a_bucket_is_for_a_slice_of_one_host() -> None:
    spec = manifest(CLAIM="gs://b/x", SPOT="no")[1]["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    assert spec["containers"][0]["command"][:6] == ["agentark", "mirror", "keep", "/runs/kept", "gs://b/x", "--"]
    assert spec["volumes"][0] == {"name": "runs", "emptyDir": {}}
    assert "cloud.google.com/gke-spot" not in spec["nodeSelector"]
    for script, name in (("gke_tpu.sh", "CLAIM"), ("tpu_slice.sh", "DISK")):
        done = launch(script, "--dry-run", TOPOLOGY="v5e-16", **{name: "gs://b/x"})
        assert done.returncode == 2
        assert "v5e-16 has 4 hosts, which cannot share" in done.stderr


def test_slices_are_called_as_the_dry_run_calls_them() -> None:
    for generation, (_, cores, _, arrangements) in preflight._TPUS.items():
        for number in (chips * cores for chips in arrangements):
            known = preflight.topology(f"{generation}-{number}")
            script = (
                f'source {LAUNCH}/common.sh; read_topology {known.name}; echo "$arrangement $type $((chips * hosts))"'
            )
            said = subprocess.run(["bash", "-euc", script], capture_output=True, text=True, check=True).stdout
            assert said.split() == [known.arrangement.split(":")[1], known.accelerator, str(known.devices)]
    for wrong in ("v5e-9", "v4-8", "h100", "v5e-"):
        assert launch("gke_tpu.sh", "--dry-run", TOPOLOGY=wrong).returncode == 2


# SGLang


def test_servers_share_the_gpus_and_name_their_addresses() -> None:
    variables = {"GPUS": "4", "TENSOR": "2", "PORT": "4000", "ROUTER": "yes", "AGENTARK_SGLANG_TOKEN": "sesame"}
    done = launch("sglang/serve.sh", "--dry-run", "Qwen/Qwen3-8B", "--context-length", "9000", **variables)
    lines = [line for line in done.stdout.splitlines() if not line.startswith("#")]
    first, second, *healths, router, router_health, told = lines
    for line, devices, port in ((first, "0\\,1", 4000), (second, "2\\,3", 4001)):
        assert f"CUDA_VISIBLE_DEVICES={devices} " in line
        assert "--tp-size 2 --mem-fraction-static 0.85 --model-path Qwen/Qwen3-8B" in line
        assert line.strip().endswith(f"--port {port} --api-key AGENTARK_SGLANG_TOKEN --context-length 9000")
    assert [line.split("/")[-2:] for line in healths] == [
        [f"127.0.0.1:{port}", "health_generate "] for port in (4000, 4001)
    ]
    assert "sesame" not in done.stdout
    assert "--worker-urls http://127.0.0.1:4000 http://127.0.0.1:4001" in router
    assert router_health.endswith("http://127.0.0.1:3999/health ")
    assert told == "agentark run --engine.servers [http://127.0.0.1:4000,http://127.0.0.1:4001] …"
    on_cpu = launch("sglang/serve.sh", "--dry-run", "m", DEVICE="cpu", GPUS="4")
    assert "cpu_server.py --device cpu" in on_cpu.stdout
    assert on_cpu.stdout.count("--model-path") == 1
    for wrong, complaint in (
        ({"TENSOR": "3", "GPUS": "4"}, "no multiple"),
        ({"DEVICE": "tpu"}, "gpu or cpu"),
        ({"MODE": "fast"}, "debate or rl"),
        ({"SIZE": "large"}, "SIZE is 'large'"),
        ({"SIZE": "70", "GPUS": "2"}, "needs 4 GPUs of 80 GB, and GPUS is 2"),
        ({"WAIT": "0"}, "WAIT is '0'"),
    ):
        done = launch("sglang/serve.sh", "--dry-run", "m", **wrong)
        assert done.returncode == 2
        assert complaint in done.stderr
    assert "--no-deps sglang==" in launch("sglang/install_cpu.sh", "--dry-run", "venv").stdout


def test_the_table_of_sizes_is_what_servers_get() -> None:
    table = re.findall(r"^#\s+up to (\d+)B((?:\s+[\d-]+){4})$", (LAUNCH / "sglang" / "serve.sh").read_text(), re.M)
    assert len(table) == 5
    for size, cells in table:
        for memory, tensor in zip(("24", "40", "80", "141"), cells.split(), strict=True):
            for given in ({"SIZE": size}, {}):
                model = "m" if given else f"org/Model-{size}B-Instruct"
                variables = {"GPUS": "8", "MEMORY": memory, **given}
                done = launch("sglang/serve.sh", "--dry-run", model, **variables)
                if tensor == "-":
                    assert "needs 16 GPUs" in done.stderr
                else:
                    assert f"--tp-size {tensor} " in done.stdout


def test_the_size_of_a_model_is_read_from_its_files(tmp_path: Path) -> None:
    fakes(tmp_path / "bin", {"python": ""})
    model = tmp_path / "model"
    model.mkdir()
    for dtype, tensor in (("bfloat16", 2), ("float32", 1)):
        (model / "config.json").write_text(json.dumps({"dtype": dtype}))
        with (model / "model.safetensors").open("wb") as file:
            file.truncate(16 * 10**9)  # 8 billion parameters, or 4; a hole, which takes no disk
        done = launch("sglang/serve.sh", "--dry-run", str(model), GPUS="2", MEMORY="24")
        assert f"--tp-size {tensor} --mem-fraction-static 0.80" in done.stdout
    (model / "model.safetensors").unlink()
    done = launch("sglang/serve.sh", str(model), MEMORY="24", VENV=str(tmp_path))
    assert (done.returncode, done.stdout) == (2, "")
    assert "set SIZE, or TENSOR" in done.stderr


# A server that is healthy only after a while; MODEL says how it behaves.
SERVER = """
import http.server, os, sys, time
options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
port, kind, started = int(options["--port"]), options["--model-path"], time.monotonic()
if kind == "broken":
    sys.exit("no such model")
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        late = time.monotonic() < started + 0.5 or kind == "never"
        self.send_response(503 if late or self.path != "/health_generate" else 200)
        self.end_headers()
    def log_message(self, *arguments):
        pass
http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


def serving(directory: Path, kind: str, *arguments: str, **variables: str) -> tuple[subprocess.Popen[str], list[int]]:
    """`serve.sh` with a stand-in for SGLang, and the ports of two servers."""
    port = free_port()
    (directory / "server.py").write_text(SERVER)
    fakes(directory / "venv" / "bin", {"python": f'shift 2; exec {sys.executable} {directory}/server.py "$@"'})
    environment = {
        "PATH": os.environ["PATH"],
        "VENV": str(directory / "venv"),
        "GPUS": "2",
        "MEMORY": "80",
        "SIZE": "1",
    }
    return subprocess.Popen(
        ["bash", str(LAUNCH / "sglang" / "serve.sh"), kind, *arguments],
        env={**environment, "PORT": str(port), **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ), [port, port + 1]


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_a_command_runs_once_all_servers_answer_and_then_they_are_gone(tmp_path: Path) -> None:
    asking = tmp_path / "asking.py"
    asking.write_text(
        "import sys, urllib.request\n"
        "for url in sys.argv[2].strip('[]').split(','):\n"
        "    print(urllib.request.urlopen(url + '/health_generate').status, url)\n"
        "sys.exit(7)\n"
    )
    process, ports = serving(tmp_path, "m", "--", sys.executable, str(asking))
    said, complaints = process.communicate(timeout=300)
    assert process.returncode == 7, complaints
    assert said.splitlines() == [f"200 http://127.0.0.1:{port}" for port in ports]
    assert not any(map(listens, ports))


def test_servers_stay_until_they_are_told_to_end(tmp_path: Path) -> None:
    process, ports = serving(tmp_path, "m")
    assert process.stdout is not None
    assert f"127.0.0.1:{ports[1]}] …" in process.stdout.readline()
    assert urllib.request.urlopen(f"http://127.0.0.1:{ports[1]}/health_generate").status == 200
    process.terminate()
    process.communicate(timeout=300)
    assert process.returncode == 143
    assert not any(map(listens, ports))


def test_a_command_is_told_to_end_and_may_take_its_time(tmp_path: Path) -> None:
    command = "trap 'sleep 0.5; echo saved; exit 143' TERM; echo begun; for _ in {1..600}; do sleep 0.1; done"
    process, ports = serving(tmp_path, "m", "--", "bash", "-c", command, "asking")
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    process.terminate()
    assert process.communicate(timeout=300)[0] == "saved\n"
    assert process.returncode == 143
    assert not any(map(listens, ports))


@pytest.mark.parametrize(
    ("kind", "wait", "message"),
    [
        ("broken", "300", "a server ended, its messages are above"),
        ("never", "1", r"did not answer within WAIT \(1\) seconds"),
    ],
)
def test_servers_that_do_not_come_up_end_the_wait(tmp_path: Path, kind: str, wait: str, message: str) -> None:
    process, ports = serving(tmp_path, kind, "--", "echo", "asked", WAIT=wait)
    said, complaints = process.communicate(timeout=300)
    assert (process.returncode, said) == (2, "")
    assert re.search(message, complaints)
    assert not any(map(listens, ports))


@pytest.mark.sglang
def test_a_command_asks_a_real_server(models: list[Path], tmp_path: Path) -> None:
    python = os.environ.get(PYTHON)
    if not python:
        pytest.skip(f"{PYTHON} names no environment with SGLang")
    asking = tmp_path / "asking.py"
    asking.write_text(
        "import json, sys, urllib.request\n"
        "body = {'input_ids': [5, 6, 7], 'sampling_params': {'max_new_tokens': 4, 'ignore_eos': True}}\n"
        "request = urllib.request.Request(sys.argv[2].strip('[]') + '/generate', json.dumps(body).encode())\n"
        "request.add_header('Content-Type', 'application/json')\n"
        "request.add_header('Authorization', 'Bearer sesame')\n"
        "print('said', len(json.load(urllib.request.urlopen(request))['output_ids']))\n"
    )
    port = free_port()
    variables = {"VENV": str(Path(python).parents[1]), "DEVICE": "cpu", "PORT": str(port), "WAIT": "300"}
    command = [str(LAUNCH / "sglang" / "serve.sh"), str(models[0]), "--log-level", "warning"]
    environment = {**os.environ, **variables, "AGENTARK_SGLANG_TOKEN": "sesame"}
    command += ["--", sys.executable, str(asking)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "said 4"
    assert not listens(port)


# Hosts of a TPU slice


FAKES = {
    "sudo": 'echo "sudo $*" >>log',
    "python3": "mkdir -p venv/bin && cp fakes/agentark fakes/pip venv/bin",
    "pip": "",
    "curl": 'case "$4" in */agent-worker-number) echo 1 ;; */worker-network-endpoints) echo "$HOSTS" ;; esac',
    "agentark": 'echo "$JAX_COORDINATOR_ADDRESS $JAX_NUM_PROCESSES $JAX_PROCESS_ID $*" >>../log',
}


@pytest.mark.parametrize(
    ("hosts", "disk", "mount", "joined"),
    [
        ("t1v-w-0", "d", "mount /dev/disk/by-id/google-persistent-disk-1 /runs", "  "),
        ("t1v-w-0", "gs://bucket/x", "chown me /runs", "  "),
        ("t1v-w-0,t1v-w-1", "10.0.0.2:/r", "mount -t nfs 10.0.0.2:/r /runs", "t1v-w-0:8476 2 1"),
        ("a:0:10.1.0.1,b:1:10.1.0.2,c:2:10.1.0.3,d:3:10.1.0.4", "10.0.0.2:/r", "nfs", "10.1.0.1:8476 4 1"),
    ],
)
def test_a_host_of_a_slice_mounts_the_runs_and_names_the_others(
    tmp_path: Path, hosts: str, disk: str, mount: str, joined: str
) -> None:
    (tmp_path / "agentark").mkdir()
    fakes(tmp_path / "fakes", FAKES)
    variables = {"PATH": f"{tmp_path / 'fakes'}:{os.defpath}", "USER": "me", "HOSTS": hosts}
    variables |= dict.fromkeys(("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"), "")
    command = ["bash", str(ROOT / "launch" / "tpu_host.sh"), disk, "fit", "--name", "a b"]
    done = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    *prepared, ran = (tmp_path / "log").read_text().splitlines()
    assert any(mount in line for line in prepared)
    bucket = disk.startswith("gs:")
    keeps = f"mirror keep /runs/kept {disk} -- ../venv/bin/agentark " if bucket else ""
    root = "/runs/kept" if bucket else "/runs"
    assert ran == f"{joined} {keeps}fit --config ../run.yaml --root {root} --name a b"
    assert ("mount" in "".join(prepared)) == (not bucket)


# Files


def checked(script: str) -> str:
    """What shellcheck finds in a script that is made (SC2016: what is quoted is expanded elsewhere)."""
    done = subprocess.run(
        [tool("shellcheck"), "-s", "bash", "-e", "SC2016", "-"], input=script, capture_output=True, text=True
    )
    return done.stdout


def test_shellcheck_finds_nothing() -> None:
    scripts = sorted(map(str, LAUNCH.rglob("*.sh")))
    done = subprocess.run([tool("shellcheck"), "-x", *scripts], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def test_hadolint_finds_nothing_in_the_images() -> None:
    images = sorted((LAUNCH / "docker").iterdir())
    assert [path.name for path in images] == ["cpu.Dockerfile", "cuda.Dockerfile", "tpu.Dockerfile"]
    done = subprocess.run([tool("hadolint"), *map(str, images)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")
    for path in images:
        commands = path.read_text().splitlines()
        assert re.fullmatch(r"FROM python:3\.\d+\.\d+-slim-\w+", next(line for line in commands if line[0] == "F"))
        assert commands.index("USER 1000") > commands.index("COPY configs configs")


def test_the_task_of_skypilot_runs_the_script_of_a_gpu_machine() -> None:
    """CI lets SkyPilot itself read the file; here its shell is checked, and that the script reads what it sets."""
    task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    envs = "\n".join(f"export {name}=''" for name in task["envs"])
    for part in ("setup", "run"):
        assert checked(f"{envs}\n{task[part]}") == ""
    script = (LAUNCH / "gpu_host.sh").read_text() + (LAUNCH / "sglang" / "serve.sh").read_text()
    passed = {"CONFIG", "OPTIONS"}  # as arguments
    for name in task["envs"].keys() - passed:
        assert re.search(rf"\b{name}\b", script)
    assert 'launch/gpu_host.sh "$CONFIG" $OPTIONS' in task["run"]
    assert [name for name, value in task["envs"].items() if value is None] == ["URL", "NAME"]


# A run on machines that share nothing but a bucket


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get("AGENTARK_REHEARSAL"), reason="minutes of its own: set AGENTARK_REHEARSAL=1")
def test_machines_that_share_a_bucket_alone_make_a_whole_run(tmp_path: Path) -> None:
    """The steps of `pipeline_debate.sh`, each on a machine (a folder) of its own that is gone afterwards."""
    agentark = f'exec {sys.executable} -m agentark_jax.cli "$@"'
    venv, url = fakes(tmp_path / "venv" / "bin", {"agentark": agentark}).parent, f"file://{tmp_path}/bucket"
    environment = {**os.environ, "COLUMNS": "120", "JAX_PLATFORMS": "cpu", "VENV": str(venv), "MODEL": "none"}

    def machine(part: str, *options: str, shard: str = "") -> str:
        root = tmp_path / "machine"
        variables = {"URL": url, "NAME": "tiny", "PART": part, "SHARD": shard, "ROOT": str(root)}
        command = ["bash", str(LAUNCH / "gpu_host.sh"), "tests/tiny.yaml", *options]
        done = subprocess.run(command, cwd=ROOT, env={**environment, **variables}, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        shutil.rmtree(root)
        return done.stdout

    def here(*arguments: str) -> str:
        command = [str(venv / "bin" / "agentark"), *arguments]
        return subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True).stdout

    machine("warm-start")
    for shard in ("0/2", "1/2"):
        machine("debate", shard=shard)
    here("mirror", "load", url, str(tmp_path / "merging"))
    exports = [f"{url}/traces/{shard}-of-2" for shard in (0, 1)]
    merged = here("traces", "merge", str(tmp_path / "merging" / "tiny"), *exports)
    here("mirror", "save", str(tmp_path / "merging"), url)
    said = sum(map(int, re.findall(r"(\d+) turns added", merged)))
    assert said == 48 * 3 * 2
    machine("fit")
    machine("run")
    here("mirror", "load", url, str(tmp_path / "runs"))
    run = tmp_path / "runs" / "tiny"
    assert json.loads((run / "results.json").read_text())["arms"].keys() >= {"base", "student", "control"}
    assert (run / "report.html").stat().st_size > 0
    debate = json.loads((run / "debate" / "manifest.json").read_text())
    assert debate["counts"]["calls"] == said
