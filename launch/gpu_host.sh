#!/usr/bin/env bash
# What a GPU machine does that shares no disk with others: one command of agentark on a run whose copy is in object
# storage, asking SGLang servers on the machine's GPUs. Call it again after the machine was lost: it goes on.
#
#   launch/gpu_host.sh --dry-run [CONFIG]                                       prints the commands, runs nothing
#   URL=… NAME=… PART=debate SHARD=0/8 launch/gpu_host.sh CONFIG [options of agentark …]
#
# URL      of the copy of the folder of runs, such as gs://bucket/runs or s3://bucket/runs
# NAME     of the run
# PART     the command of agentark: run (default), warm-start, debate, select, fit
# SHARD    I/N with PART=debate: this is worker I (from 0) of N, which share the questions. The run must have its base
#          (`agentark warm-start`). What the worker says is kept at URL/shards/I-of-N and, when it is done, exported to
#          URL/traces/I-of-N
# MODEL    what the servers are started with; by default the run's base. none: no servers, the GPUs are for agentark
#          itself
# VENV     virtual environment with agentark-jax and its extra gs or s3 (and cuda where it trains); .venv by default
# SGLANG_VENV   with SGLang; .venv-sglang by default. More for the servers: launch/sglang/serve.sh says what (GPUS,
#               TENSOR …)
# ROOT     folder of runs on this machine, runs by default
#
# Cost: the machine, as long as it is there: this ends when its work is done, whoever started the machine must end that.
# Quota: GPUs; object storage is charged by size, and traffic between regions by volume. One machine at a time may write
# to a URL: only workers with a SHARD may run side by side. Verified: with tiny models on CPU, the embedded engine and
# file:// in the place of a bucket; on GPUs the dry run only.
set -euo pipefail

here="$(dirname "$0")"
# shellcheck source=launch/common.sh
source "$here/common.sh"

read_arguments "$@"
require URL NAME
require_config configs/qwen3_8b.yaml
part="${PART:-run}"
root="${ROOT:-runs}"
venv="${VENV:-.venv}"
agentark="$venv/bin/agentark"
model="${MODEL:-$root/$NAME/base/model}"
require_program "$venv" agentark

command=("$agentark" "$part" --config "$config" --root "$root" --name "$NAME")
kept=("$root" "$URL")
shard=""
if [[ -n "${SHARD:-}" ]]; then
  [[ "$part" == debate ]] || fail "SHARD is for PART=debate, and PART is '$part'."
  [[ "$SHARD" =~ ^[0-9]+/[1-9][0-9]*$ ]] ||
    fail "SHARD is '$SHARD'; give I/N, a worker from 0 to N - 1 and how many there are."
  shard="${SHARD/\//-of-}"
  command+=(--shard "$SHARD")
  kept=("$root/$NAME/shards/$shard" "$URL/shards/$shard")
fi
if [[ "$dry_run" == yes || ! -d "$root" ]]; then
  if [[ "$dry_run" == yes ]]; then
    echo "# where $root is missing:"
  fi
  # What the first command of a run goes on from is nothing yet.
  if [[ -n "$shard" || "$model" != none && -z "${MODEL:-}" ]]; then
    run "$agentark" mirror load "$URL" "$root"
  fi
fi
command=("$agentark" mirror keep "${kept[@]}" -- "${command[@]}" "${options[@]}")
if [[ "$model" != none ]]; then
  export VENV="${SGLANG_VENV:-.venv-sglang}"
  command=("$here/sglang/serve.sh" "$model" -- "${command[@]}")
  if [[ "$dry_run" == yes ]]; then
    command=("$here/sglang/serve.sh" --dry-run "${command[@]:1}")
  fi
fi
if [[ "$dry_run" == yes && "$model" != none ]]; then
  "${command[@]}"
else
  run "${command[@]}"
fi
if [[ -n "$shard" ]]; then
  run "$agentark" traces export "$root/$NAME/shards/$shard" --parquet "$URL/traces/$shard"
fi
