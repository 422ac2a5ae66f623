#!/usr/bin/env bash
# A whole run on rented machines: the base is warm-started on a TPU slice, a pool of GPU machines debates, each a share
# of the questions, what they said is merged into one store, the students are trained on a TPU slice, and a GPU machine
# evaluates and reports. Between steps everything is in one bucket, and no machine is kept.
#
#   launch/pipeline_debate.sh --dry-run [CONFIG]                      prints every command of every step, runs nothing
#   PROJECT=… ZONE=… URL=… NAME=… launch/pipeline_debate.sh CONFIG [options of agentark run, without spaces …]
#
# PROJECT, ZONE   of Google Cloud, for the slices
# URL             folder in a bucket for the run, such as gs://bucket/mine; the slices, the GPU machines and this one
#                 write to it
# NAME            of the run and of what is rented: a-z, 0-9 and -. A run has one seed here; call this once for each of
#                 several
# SHARDS          machines of the pool, 8 by default; change it only before the debate
# TOPOLOGY        of the slice, v5e-8 by default; it must have one host, as its hosts share no disk
# ACCELERATORS    of each GPU machine, kind and number, H100:8 by default
# VENV            virtual environment here with agentark-jax and its extra gs, .venv by default
#
# Call it again after an interruption: NAME.steps, in the folder where it was called, has the steps that are done
# (delete a line to do one again), and a step that was begun goes on. Preempted machines are replaced by SkyPilot,
# slices by launch/tpu_slice.sh.
#
# Cost: a slice for the two trainings, SHARDS machines for the debate, one for the evaluation, all preemptible, each
# deleted when its step ends; SkyPilot's small machine that watches them; storage. Quota: TPU chips in the zone's
# region, SHARDS times the accelerators in any cloud of SkyPilot's. Needs gcloud and sky, both signed in. Merging reads
# all traces on this machine: call it in the bucket's region where there are many. Verified: the dry run, and the steps
# of agentark one after another with tiny models on CPU and a folder in the place of the bucket; nothing was ever rented
# with this script.
set -euo pipefail

here="$(dirname "$0")"
# shellcheck source=launch/common.sh
source "$here/common.sh"

read_arguments "$@"
require PROJECT ZONE URL NAME
require_config configs/qwen3_1.7b.yaml
shards="${SHARDS:-8}"
require_positive SHARDS "$shards"
if [[ "$dry_run" == yes && "$URL" == URL ]]; then
  URL=gs://BUCKET/FOLDER
fi
[[ "$URL" == gs://* ]] || fail "URL is '$URL'; slices write to Cloud Storage: give gs://BUCKET/FOLDER."
[[ "$dry_run" == yes || "$NAME" =~ ^[a-z][-a-z0-9]{0,38}$ ]] ||
  fail "NAME is '$NAME'; give at most 39 of a-z, 0-9 and -."
accelerators="${ACCELERATORS:-H100:8}"
require_positive "ACCELERATORS' number" "${accelerators##*:}"
for option in "${options[@]}"; do
  [[ "$option" != *[[:space:]]* ]] ||
    fail "'$option' has a space, which does not reach the GPU machines: put it into the config."
done
venv="${VENV:-.venv}"
agentark="$venv/bin/agentark"
require_program "$venv" agentark

on_slice() { # PART
  local script=("$here/tpu_slice.sh")
  if [[ "$dry_run" == yes ]]; then
    script+=(--dry-run)
  fi
  env PART="$1" DISK="$URL" PROJECT="$PROJECT" ZONE="$ZONE" NAME="$NAME" \
    "${script[@]}" "$config" --name "$NAME" "${options[@]}"
}

on_gpus() { # JOB PART [SHARD]
  local gpus="${accelerators##*:}"
  run sky jobs launch --yes --name "$1" "$here/skypilot.yaml" --gpus "$accelerators" --env "GPUS=$gpus" \
    --env "URL=$URL" --env "NAME=$NAME" --env "CONFIG=$config" --env "PART=$2" --env "SHARD=${3:-}" \
    --env "OPTIONS=${options[*]}"
  if [[ "$dry_run" == yes ]]; then
    echo "# which does this on its machine:"
    env GPUS="$gpus" URL="$URL" NAME="$NAME" PART="$2" SHARD="${3:-}" VENV= \
      "$here/gpu_host.sh" --dry-run "$config" "${options[@]}"
  fi
}

debate() {
  local shard started=() failed=no job
  for ((shard = 0; shard < shards; shard++)); do
    if [[ "$dry_run" == yes ]]; then
      on_gpus "$NAME-$shard" debate "$shard/$shards"
    else
      on_gpus "$NAME-$shard" debate "$shard/$shards" & # follows its job until that ends
      started+=("$!")
    fi
  done
  for job in "${started[@]}"; do
    wait "$job" || failed=yes
  done
  [[ "$failed" == no ]] || fail "a share of the debate failed, see above; call this again, what was said is kept."
}

merge() {
  local shard exports=() scratch
  for ((shard = 0; shard < shards; shard++)); do
    exports+=("$URL/traces/$shard-of-$shards")
  done
  scratch="$NAME.merging"
  run rm -rf "$scratch"
  run "$agentark" mirror load "$URL" "$scratch"
  run "$agentark" traces merge "$scratch/$NAME" "${exports[@]}" # fails where an export is missing
  run "$agentark" mirror save "$scratch" "$URL"
  run rm -rf "$scratch"
}

once "1 of 5: warm start on a slice" on_slice warm-start
once "2 of 5: debate on $shards GPU machines" debate
once "3 of 5: one store of what was said" merge
once "4 of 5: training on a slice" on_slice fit
once "5 of 5: evaluation and report on a GPU machine" on_gpus "$NAME-evaluate" run
echo "# the run, with report.html:"
echo "$agentark mirror load $URL runs"
