#!/usr/bin/env bash
# Reinforcement with a training slice and a rollout pool: a TPU slice trains the policy, SGLang servers on GPU machines
# of the same zone sample from it. After each update the slice writes the policy to a share that all mount at /runs, and
# gives the servers its name.
#
#   launch/pipeline_rl.sh --dry-run [CONFIG]                          prints every command, runs nothing
#   PROJECT=… ZONE=… SHARE=… MODEL=… launch/pipeline_rl.sh CONFIG [options of agentark run …]
#
# PROJECT, ZONE   of Google Cloud; the zone must offer the slice and the machines
# SHARE           NFS share (Filestore) as ADDRESS:/NAME in the network of both, for the runs. A bucket will not do:
#                 servers read policies where the slice writes them
# MODEL           what the servers are started with: the hub id of the config's model, say
# NAME            of the slice, and what the machines' names begin with; agentark by default
# POOL            GPU machines, 1 by default
# MACHINE         their type, a3-highgpu-8g by default
# GPUS            of each, 8 by default; with TENSOR, MEMORY and the like as in launch/sglang/serve.sh
# IMAGE_FAMILY    of deeplearning-platform-release, with NVIDIA's driver and Python 3.11 or newer as python3
# TOPOLOGY        of the slice, v5e-8 by default; more of launch/tpu_slice.sh: RUNTIME, SPOT, ATTEMPTS
#
# A preempted slice is asked for again and goes on from its newest checkpoint; turns are in the trace store and asked
# for once. The pool's machines are on demand; a server that is gone gets no calls, and the others do its work. The pool
# is deleted when this ends, also by an error; after `kill -9` delete it by hand. Call this again to go on.
#
# Cost: POOL machines from their creation, while the slice is waited for as well; chips × hours; the share. Quota: GPUs
# of the kind, TPU chips. Servers listen in the project's network without a password: its firewall must keep others out.
# Verified: the dry run and the messages; policies given to real servers, on one CPU machine; nothing was ever rented
# with this script.
set -euo pipefail

here="$(dirname "$0")"
# shellcheck source=launch/common.sh
source "$here/common.sh"

read_arguments "$@"
require PROJECT ZONE SHARE MODEL
require_config configs/pad_qwen3_1.7b_tpu.yaml
NAME="${NAME:-agentark}"
pool="${POOL:-1}"
gpus="${GPUS:-8}"
require_positive POOL "$pool"
require_positive GPUS "$gpus"
if [[ "$dry_run" == yes && "$SHARE" == SHARE ]]; then
  SHARE=ADDRESS:/NAME
fi
[[ "$SHARE" == *:/[!/]* ]] || fail "SHARE is '$SHARE'; give an NFS share as ADDRESS:/NAME."
where=(--project "$PROJECT" --zone "$ZONE")
scratch="$(mktemp -d)"
package="$scratch/servers.tar.gz"

machine() { # NUMBER
  echo "$NAME-pool-$1"
}

delete_pool() {
  local number machines=()
  for ((number = 0; number < pool; number++)); do
    machines+=("$(machine "$number")")
  done
  run gcloud compute instances delete "${machines[@]}" "${where[@]}" --quiet
}

# What each machine of the pool does, in a folder with the package: its servers go on when this ends.
serve() { # HOST
  local command
  printf -v command '%q ' env VENV=venv MODE=rl HOST="$1" GPUS="$gpus" ${TENSOR:+TENSOR="$TENSOR"} \
    ${MEMORY:+MEMORY="$MEMORY"} bash launch/sglang/serve.sh "$MODEL"
  echo "sudo apt-get install -qqy nfs-common python3-venv && sudo mkdir -p /runs && sudo mount -t nfs $SHARE /runs &&" \
    "tar -xzf servers.tar.gz && python3 -m venv venv && venv/bin/pip install -q sglang==0.5.23 &&" \
    "{ nohup $command>servers.log 2>&1 </dev/null & }"
}

# Prints the addresses of a machine's servers once they answer.
# shellcheck disable=SC2016 # it is a program for the machine
await='until grep -o "\[http[^]]*\]" servers.log; do
  pgrep -f launch/sglang/serve.sh >/dev/null || { tail -n 50 servers.log >&2; exit 1; }
  sleep 5
done'

start_pool() {
  local number name end
  run tar -czf "$package" -C "$here/.." launch
  for ((number = 0; number < pool; number++)); do
    name="$(machine "$number")"
    run gcloud compute instances create "$name" "${where[@]}" --machine-type "${MACHINE:-a3-highgpu-8g}" \
      --image-project deeplearning-platform-release \
      --image-family "${IMAGE_FAMILY:-common-cu128-ubuntu-2404-nvidia-570}" \
      --boot-disk-size 500GB --maintenance-policy TERMINATE
  done
  for ((number = 0; number < pool; number++)); do
    name="$(machine "$number")"
    end=$((SECONDS + 900))
    if [[ "$dry_run" == yes ]]; then
      echo "# every 10 s, until the machine takes it:"
    fi
    until run gcloud compute scp "$package" "$name:servers.tar.gz" "${where[@]}"; do
      ((SECONDS < end)) || fail "$name takes no ssh after a quarter of an hour."
      sleep 10
    done
    run gcloud compute ssh "$name" "${where[@]}" --command "$(serve "$name.$ZONE.c.$PROJECT.internal")"
  done
}

# Sets servers to the addresses of all, as a list.
find_servers() {
  local number found
  servers=""
  for ((number = 0; number < pool; number++)); do
    if [[ "$dry_run" == yes ]]; then
      echo "# the addresses are what this prints:"
      run gcloud compute ssh "$(machine "$number")" "${where[@]}" --command "$await"
      found="[http://$(machine "$number").$ZONE.c.$PROJECT.internal:30000]"
    else
      found="$(gcloud compute ssh "$(machine "$number")" "${where[@]}" --command "$await")" ||
        fail "the servers of $(machine "$number") did not start; their messages are above."
    fi
    found="${found#[}"
    servers+=",${found%]}"
  done
  servers="[${servers#,}]"
}

train() {
  local script=("$here/tpu_slice.sh")
  if [[ "$dry_run" == yes ]]; then
    script+=(--dry-run)
  fi
  env DISK="$SHARE" PROJECT="$PROJECT" ZONE="$ZONE" NAME="$NAME" \
    "${script[@]}" "$config" --engine.servers "$servers" "${options[@]}"
}

trap 'rm -rf "$scratch"' EXIT
if [[ "$dry_run" == no ]]; then
  trap 'rm -rf "$scratch"; delete_pool || true' EXIT
  trap 'exit 130' INT TERM
fi
start_pool
find_servers
train
if [[ "$dry_run" == yes ]]; then
  echo "# when that has ended, also by an error:"
  delete_pool
fi
