#!/usr/bin/env bash
# One command of agentark as one Slurm job on the GPUs of one node or several, one process on each; Slurm puts it back
# into the queue when it is preempted, loses a node or is out of time, and the run goes on from its newest checkpoint.
#
#   launch/slurm_gpu.sh --dry-run [CONFIG]                            prints the job and its command, submits nothing
#   PARTITION=… VENV=… RUNS=… launch/slurm_gpu.sh CONFIG [options of agentark …]
#
# PARTITION   of the cluster, with GPUs
# VENV        virtual environment on a disk that the nodes see, made with: pip install 'agentark-jax[cuda]'
# RUNS        folder on such a disk for runs; checkpoints there are what a requeued job resumes from
# PART        the command of agentark: run (default), warm-start, debate, select, fit, attribute
# NODES       1 by default; `agentark fit --dry-run --topology 16xH100-80GB` says whether a config fits two nodes of
#             eight
# GPUS        of each node, 8 by default
# CPUS        of each node, 64 by default
# HOURS       time limit, 24 by default; five minutes before it the run saves and is requeued
# ACCOUNT     whom the job is charged to; left to the cluster by default
#
# Cost: GPUs × hours as the cluster charges them, until the run ends; `scancel` stops it. Quota: GPUs and hours of the
# account. On several nodes those that train wait while the first one debates or evaluates: debate elsewhere, see
# launch/pipeline_debate.sh. Models from a hub are downloaded to the job's HF_HOME: give it one on a shared disk if
# nodes are offline. Verified: the dry run and the messages, and the job's script with stand-ins for Slurm's commands;
# no job was ever submitted.
set -euo pipefail

# shellcheck source=launch/common.sh
source "$(dirname "$0")/common.sh"

read_arguments "$@"
require PARTITION VENV RUNS
require_config configs/qwen3_8b.yaml
config="$(cd "$(dirname "$config")" && pwd)/$(basename "$config")"
if [[ "$dry_run" == no ]]; then
  require_program "$VENV" agentark
  mkdir -p "$RUNS"
fi
nodes="${NODES:-1}"
gpus="${GPUS:-8}"
cpus="${CPUS:-64}"
hours="${HOURS:-24}"
require_positive NODES "$nodes"
require_positive GPUS "$gpus"
require_positive CPUS "$cpus"
require_positive HOURS "$hours"
account=()
if [[ -n "${ACCOUNT:-}" ]]; then
  account=(--account "$ACCOUNT")
fi

printf -v run '%q ' "$VENV/bin/agentark" "${PART:-run}" --config "$config" --root "$RUNS" "${options[@]}"
join=""
if ((nodes > 1)); then
  # Said explicitly, as JAX by itself would give each of Slurm's tasks one GPU.
  join="read -r first < <(scontrol show hostnames \"\$SLURM_JOB_NODELIST\")
export JAX_COORDINATOR_ADDRESS=\"\$first:\$((20000 + SLURM_JOB_ID % 10000))\" JAX_NUM_PROCESSES=$nodes
export JAX_LOCAL_DEVICE_IDS=$(seq -s, 0 $((gpus - 1)))
"
  numbered="bash -c 'JAX_PROCESS_ID=\$SLURM_PROCID exec \"\$@\"' agentark"
  run="srun --nodes $nodes --ntasks-per-node 1 --cpus-per-task $cpus --kill-on-bad-exit $numbered $run"
fi
# Slurm signals the batch shell before the time is up; the run saves on SIGTERM (all processes, whichever gets it; srun
# passes it on), and the job goes back into the queue. When it is preempted Slurm signals the processes and requeues
# itself.
job="#!/usr/bin/env bash
set -uo pipefail
export XLA_PYTHON_CLIENT_MEM_FRACTION=0.92
$join$run&
requeue=no
trap 'requeue=yes; kill -TERM \$!' USR1
wait \$!
code=\$?
if [[ \$requeue == yes ]]; then # the signal ended the wait, not yet the run
  wait \$!
  scontrol requeue \"\$SLURM_JOB_ID\"
fi
exit \$code"

submit=(sbatch --job-name agentark --partition "$PARTITION" "${account[@]}" --nodes "$nodes" --ntasks-per-node 1
  --gpus-per-node "$gpus" --cpus-per-task "$cpus" --time "$hours:00:00" --signal B:USR1@300 --requeue --open-mode append
  --output "$RUNS/slurm-%j.log")
if [[ "$dry_run" == yes ]]; then
  printf '%q ' "${submit[@]}"
  printf '<<JOB\n%s\nJOB\n' "$job"
else
  "${submit[@]}" <<<"$job"
fi
