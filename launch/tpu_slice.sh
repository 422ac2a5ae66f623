#!/usr/bin/env bash
# One `agentark run` on one Cloud TPU slice through queued resources: asks for the slice, waits for it, runs, and after a
# preemption asks again; the run goes on where its newest checkpoint and its trace store are.
#
#   launch/tpu_slice.sh --dry-run [CONFIG]                            prints every command, runs nothing
#   PROJECT=… ZONE=… DISK=… launch/tpu_slice.sh CONFIG [options of agentark run …]
#
# PROJECT, ZONE   of Google Cloud; the zone must offer the type
# DISK            a disk in that zone that keeps the runs; it outlives the slices and is formatted if it is empty. Make it
#                 once: gcloud compute disks create DISK --size 500GB --type pd-balanced (v6e: hyperdisk-balanced)
# TYPE            of one host, since one process runs the whole pipeline: v5litepod-8 (default; `agentark fit --dry-run`
#                 calls it v5e-8), v6e-8, or v5p-8
# RUNTIME         the type's software version: v2-alpha-tpuv5-lite (default), v2-alpha-tpuv6e, v2-alpha-tpuv5
# NAME            of the queued resource and its node, agentark by default
# SPOT            yes (default): cheaper, can be preempted; no: on demand
# ATTEMPTS        how many slices to ask for in a row, 20 by default
#
# Cost: chips × hours from ACTIVE until the slice is deleted, idle or not, and the disk until you delete it. The slice is
# deleted when the run ends or fails and when this script is interrupted; after `kill -9` or a lost machine delete it by
# hand. Quota: chips of this generation in the region, preemptible ones where SPOT=yes.
# Needs gcloud, signed in, with the TPU API enabled and ssh to the host allowed. Files that the config names (task.path)
# must be on the disk. Verified: the dry run and the messages; no slice was ever created with this script.
set -euo pipefail

fail() {
  echo "$0: $1" >&2
  exit 2
}

dry_run=no
if [[ "${1:-}" == --dry-run ]]; then
  dry_run=yes
  shift
  set -- "${1:-configs/qwen3_1.7b.yaml}" "${@:2}"
  PROJECT="${PROJECT:-PROJECT}" ZONE="${ZONE:-ZONE}" DISK="${DISK:-DISK}"
fi
for variable in PROJECT ZONE DISK; do
  [[ -n "${!variable:-}" ]] || fail "$variable is not set; the head of this file says what it is. --dry-run needs none."
done
config="${1:-}"
[[ -f "$config" ]] || fail "'$config' is no file; the first argument is a config, such as configs/qwen3_1.7b.yaml."
type="${TYPE:-v5litepod-8}"
runtime="${RUNTIME:-v2-alpha-tpuv5-lite}"
name="${NAME:-agentark}"
attempts="${ATTEMPTS:-20}"
[[ "$attempts" =~ ^[1-9][0-9]*$ ]] || fail "ATTEMPTS is '$attempts'; give a positive number."
pricing=()
if [[ "${SPOT:-yes}" == yes ]]; then
  pricing=(--spot)
fi
where=(--project "$PROJECT" --zone "$ZONE")
repository="$(cd "$(dirname "$0")/.." && pwd)"
options=""
if (($# > 1)); then
  printf -v options ' %q' "${@:2}"
fi
on_host="set -euo pipefail
disk=/dev/disk/by-id/google-persistent-disk-1
sudo blkid \"\$disk\" >/dev/null || sudo mkfs.ext4 -q \"\$disk\"
sudo mkdir -p /runs && sudo mount \"\$disk\" /runs && sudo chown \"\$USER\" /runs
mkdir agentark && tar -xzf agentark.tar.gz -C agentark
python3 -m venv venv && venv/bin/pip install -q './agentark[tpu]'
venv/bin/agentark run --config run.yaml --root /runs$options"

run() {
  if [[ "$dry_run" == yes ]]; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}

create() {
  run gcloud compute tpus queued-resources create "$name" "${where[@]}" --node-id "$name" --accelerator-type "$type" \
    --runtime-version "$runtime" "${pricing[@]}" \
    --data-disk "source=projects/$PROJECT/zones/$ZONE/disks/$DISK,mode=read-write"
}

delete() {
  run gcloud compute tpus queued-resources delete "$name" "${where[@]}" --force --quiet
}

state() {
  gcloud compute tpus queued-resources describe "$name" "${where[@]}" --format 'value(state.state)'
}

wait_until_active() {
  if [[ "$dry_run" == yes ]]; then
    echo "# every 30 s, until it says ACTIVE:"
    run gcloud compute tpus queued-resources describe "$name" "${where[@]}" --format 'value(state.state)'
    return
  fi
  local now
  while now="$(state)" && [[ "$now" != ACTIVE ]]; do
    echo "$(date +%T) $name: $now"
    if [[ "$now" == FAILED || "$now" == SUSPENDED ]]; then
      return 1
    fi
    sleep 30
  done
}

copy_and_run() {
  run tar -czf "$package" -C "$repository" agentark_jax pyproject.toml README.md || return
  run gcloud compute tpus tpu-vm scp "$package" "$name:agentark.tar.gz" "${where[@]}" || return
  run gcloud compute tpus tpu-vm scp "$config" "$name:run.yaml" "${where[@]}" || return
  run gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" --command "$on_host"
}

if [[ "$dry_run" == yes ]]; then
  package=/tmp/agentark.tar.gz
  create
  wait_until_active
  copy_and_run
  echo "# when the run has ended, also by an error of its own; after a preemption, and then again from the top:"
  delete
  exit
fi

scratch="$(mktemp -d)"
package="$scratch/agentark.tar.gz"
trap 'rm -rf "$scratch"; delete || true' EXIT
trap 'exit 130' INT TERM
for ((attempt = 1; attempt <= attempts; attempt++)); do
  echo "slice $attempt of at most $attempts"
  create
  code=1
  if wait_until_active; then
    code=0
    copy_and_run || code=$?
    if [[ "$code" == 0 ]]; then
      exit 0
    fi
    if [[ "$code" != 255 && "$(state)" == ACTIVE ]]; then # 255: the connection broke
      echo "$0: the run failed on a healthy slice; its messages are above." >&2
      exit "$code"
    fi
  fi
  echo "$name was preempted or lost; asking for another"
  delete
done
echo "$0: no run was completed on $attempts slices; call it again to go on." >&2
exit 1
