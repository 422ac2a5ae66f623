#!/usr/bin/env bash
# One command of agentark on one Cloud TPU slice through queued resources: asks for the slice, waits for it, runs, and
# after a preemption asks again; the run goes on where its newest checkpoint and its trace store are.
#
#   launch/tpu_slice.sh --dry-run [CONFIG]                            prints every command, runs nothing
#   PROJECT=… ZONE=… DISK=… launch/tpu_slice.sh CONFIG [options of agentark …]
#
# PROJECT, ZONE   of Google Cloud; the zone must offer the type
# DISK            a disk in that zone that keeps the runs; it outlives the slices and is formatted if it is empty. Make
#                 it once: gcloud compute disks create DISK --size 500GB --type pd-balanced (v6e: hyperdisk-balanced) Or
#                 gs://BUCKET/FOLDER: the runs are on the host's own disk and a copy of them is kept there (`agentark
#                 mirror`). Several hosts can share neither: give an NFS share (Filestore) as ADDRESS:/NAME
# PART            the command of agentark: run (default), warm-start, debate, select, fit, attribute
# TOPOLOGY        v5e-8 by default, as `agentark fit --dry-run` calls it; v5e-4, v6e-8 and v5p-8 have one host, larger
#                 ones several
# RUNTIME         software version; that of the generation by default
# NAME            of the queued resource and its node, agentark by default
# SPOT            yes (default): cheaper, can be preempted; no: on demand
# ATTEMPTS        how many slices to ask for in a row, 20 by default
#
# Cost: chips × hours from ACTIVE until the slice is deleted, idle or not, and the disk, share or bucket until you
# delete it. The slice is deleted when the run ends or fails and when this script is interrupted; after `kill -9` or a
# lost machine delete it by hand. Quota: chips of this generation in the region, preemptible ones where SPOT=yes. Needs
# gcloud, signed in, with the TPU API enabled and ssh to the hosts allowed; for a bucket the hosts' service account must
# be allowed to write to it. Files that the config names (task.path) must be on the disk; a second config, as in
# `--config configs/lora.yaml`, is one of this repository. Verified: the dry run and the messages, and what a host does
# with stand-ins for the cloud's commands; no slice was ever created with this script.
set -euo pipefail

# shellcheck source=launch/common.sh
source "$(dirname "$0")/common.sh"

read_arguments "$@"
require PROJECT ZONE DISK
require_config configs/qwen3_1.7b.yaml
topology="${TOPOLOGY:-v5e-8}"
read_topology "$topology"
case "$topology" in
  v5e-*) runtime=v2-alpha-tpuv5-lite ;;
  v6e-*) runtime=v2-alpha-tpuv6e ;;
  *) runtime=v2-alpha-tpuv5 ;;
esac
runtime="${RUNTIME:-$runtime}"
if ((hosts > 1)); then
  [[ "$dry_run" == yes && "$DISK" == DISK || "$DISK" == *:/[!/]* ]] ||
    fail "$topology has $hosts hosts, which cannot share DISK ($DISK); give an NFS share as ADDRESS:/NAME."
fi
name="${NAME:-agentark}"
attempts="${ATTEMPTS:-20}"
require_positive ATTEMPTS "$attempts"
pricing=()
if [[ "${SPOT:-yes}" == yes ]]; then
  pricing=(--spot)
fi
attached=()
if [[ "$DISK" != *:* ]]; then
  attached=(--data-disk "source=projects/$PROJECT/zones/$ZONE/disks/$DISK,mode=read-write")
fi
where=(--project "$PROJECT" --zone "$ZONE")
repository="$(cd "$(dirname "$0")/.." && pwd)"
printf -v on_host ' %q' "$DISK" "${PART:-run}" "${options[@]}"
on_host="mkdir agentark && tar -xzf agentark.tar.gz -C agentark && bash agentark/launch/tpu_host.sh$on_host"

create() {
  run gcloud compute tpus queued-resources create "$name" "${where[@]}" --node-id "$name" --accelerator-type "$type" \
    --runtime-version "$runtime" "${pricing[@]}" "${attached[@]}"
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
  run tar -czf "$package" -C "$repository" agentark_jax configs launch pyproject.toml README.md || return
  run gcloud compute tpus tpu-vm scp "$package" "$name:agentark.tar.gz" "${where[@]}" --worker all || return
  run gcloud compute tpus tpu-vm scp "$config" "$name:run.yaml" "${where[@]}" --worker all || return
  run gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" --worker all --command "$on_host"
}

if [[ "$dry_run" == yes ]]; then
  package=agentark.tar.gz
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
