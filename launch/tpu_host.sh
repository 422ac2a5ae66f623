#!/usr/bin/env bash
# What each host of a slice does, in the home directory where tpu_slice.sh has put `agentark/` and `run.yaml`: mounts
# the runs, or fetches their copy, installs the package, names the other hosts, runs.
#
#   agentark/launch/tpu_host.sh DISK PART [options of agentark …]      DISK and PART as in tpu_slice.sh
set -euo pipefail

sudo mkdir -p /runs
extra=tpu root=/runs
if [[ "$1" == gs://* ]]; then
  extra=tpu,gs
  root=/runs/kept # a folder that is not there yet, so that the copy can be loaded into its place
elif [[ "$1" == *:* ]]; then
  sudo apt-get install -qqy nfs-common
  sudo mount -t nfs "$1" /runs
else
  device=/dev/disk/by-id/google-persistent-disk-1
  sudo blkid "$device" >/dev/null || sudo mkfs.ext4 -q "$device"
  sudo mount "$device" /runs
fi
sudo chown "$USER" /runs
python3 -m venv venv
venv/bin/pip install -q "./agentark[$extra]"

attribute() {
  curl -sf -H 'Metadata-Flavor: Google' "http://metadata.google.internal/computeMetadata/v1/instance/attributes/$1"
}

# A run joins others only where its environment names them, and on queued resources only the metadata server does.
hosts="$(attribute worker-network-endpoints)" # of each host its name, or name:number:address
if [[ "$hosts" == *,* ]]; then
  first="${hosts%%,*}"
  commas="${hosts//[!,]/}"
  JAX_PROCESS_ID="$(attribute agent-worker-number)"
  export JAX_COORDINATOR_ADDRESS="${first##*:}:8476" JAX_NUM_PROCESSES="$((${#commas} + 1))" JAX_PROCESS_ID
fi
cd agentark
command=(../venv/bin/agentark "$2" --config ../run.yaml --root "$root" "${@:3}")
if [[ "$1" == gs://* ]]; then
  command=(../venv/bin/agentark mirror keep "$root" "$1" -- "${command[@]}")
fi
exec "${command[@]}"
