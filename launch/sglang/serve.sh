#!/usr/bin/env bash
# Starts SGLang servers for a model on this machine, waits until all answer, and keeps them until it is interrupted, or
# as long as a command runs that asks them.
#
#   launch/sglang/serve.sh [--dry-run] MODEL [options of sglang.launch_server …] [-- COMMAND …]
#   launch/sglang/serve.sh Qwen/Qwen3-8B -- agentark run --config configs/qwen3_8b.yaml
#
# MODEL    directory or hub id; runs give the servers other weights of the same shape, so its base model will do
# COMMAND  is run once the servers answer, with `--engine.servers […]` after it; its exit code is this script's
# VENV     virtual environment with SGLang: on GPUs pip install 'sglang==0.5.23', else install_cpu.sh; .venv-sglang by
#          default
# DEVICE   gpu (default) or cpu
# GPUS     of this machine, 1 by default. GPUS / TENSOR servers are started, on successive ports: data parallel, each
#          server with a copy of the model, and calls go to the one that has the fewest
# TENSOR   GPUs that share a copy (tensor parallel). By default the fewest of which bf16 weights take at most 55 %:
#              GPU memory      24 GB   40 GB   80 GB   141 GB
#              up to 4B            1       1       1        1
#              up to 8B            2       1       1        1
#              up to 14B           4       2       1        1
#              up to 32B           8       4       2        1
#              up to 70B           -       8       4        2
# SIZE     billions of parameters, for that; by default what MODEL's name says, as 8B, or its files (8 in a dry run of
#          which neither says)
# MEMORY   GB of each GPU, for that; by default what nvidia-smi says (80 in a dry run without one)
# FRACTION of a GPU's memory for weights and cache: 0.85 by default, 0.80 below 40 GB
# MODE     debate (default), or rl where policies change all the time: 0.05 less of FRACTION, as room for the weights
#          that come in, which are read from a shared disk by several readers and not kept in the page cache
# PORT     of the first server, 30000 by default
# HOST     127.0.0.1 by default; 0.0.0.0 lets other machines in, for which AGENTARK_SGLANG_TOKEN should be set
# ROUTER   yes: an sglang-router on PORT - 1 before them (pip install sglang-router), for clients that know one address.
#          A run needs none, and gives weights to servers only: name the servers to it.
# WAIT     seconds for all of them to answer, 1800 by default: large models are long in loading
# AGENTARK_SGLANG_TOKEN   their --api-key; clients read it from the same variable
#
# Cost: the machine's GPUs, busy or idle, until this ends. Prints the addresses as a run's option. Weights come from the
# run directory: servers on other machines must see it under the same path. Verified: on CPU with real servers; the wait,
# the command and the end with stand-ins (`pytest -m sglang` has a real one); on GPUs the dry run only, so the table and
# FRACTION are counted, not measured.
set -euo pipefail

here="$(dirname "$0")"
# shellcheck source=launch/common.sh
source "$here/../common.sh"

read_arguments "$@"
model="$subject"
[[ -n "$model" ]] || fail "name the model to serve: a directory or a hub id."
asking=()
for ((number = 0; number < ${#options[@]}; number++)); do
  if [[ "${options[number]}" == -- ]]; then
    asking=("${options[@]:number+1}")
    options=("${options[@]:0:number}")
  fi
done
venv="${VENV:-.venv-sglang}"
device="${DEVICE:-gpu}"
host="${HOST:-127.0.0.1}"
port="${PORT:-30000}"
gpus="${GPUS:-1}"
mode="${MODE:-debate}"
wait="${WAIT:-1800}"
[[ "$device" == gpu || "$device" == cpu ]] || fail "DEVICE is '$device'; it is gpu or cpu."
[[ "$mode" == debate || "$mode" == rl ]] || fail "MODE is '$mode'; it is debate or rl."
require_positive PORT "$port"
require_positive GPUS "$gpus"
require_positive WAIT "$wait"
require_program "$venv" python

gpu_memory() { # GB of the first GPU
  if command -v nvidia-smi >/dev/null; then
    echo "$(($(nvidia-smi --query-gpu=memory.total --format=csv,noheader,nounits | head -n 1) / 1000))"
  elif [[ "$dry_run" == yes ]]; then
    echo 80
  fi
}

model_size() { # hundredths of a billion of parameters, by the model's name or its files; nothing where neither says
  local name="${model##*/}" bytes files
  if [[ "$name" =~ ([0-9]+)(\.([0-9]))?[0-9]*([bBmM])(-|_|$) ]]; then
    if [[ "${BASH_REMATCH[4]}" == [mM] ]]; then
      echo "$((BASH_REMATCH[1] / 10))"
    else
      echo "$((BASH_REMATCH[1] * 100 + ${BASH_REMATCH[3]:-0} * 10))"
    fi
    return
  fi
  files=("$model"/*.safetensors)
  [[ -f "${files[0]}" ]] || return 0
  bytes=2
  if grep -Eq '"(torch_)?dtype": "float32"' "$model/config.json"; then
    bytes=4
  fi
  echo "$(($(du -cbL "${files[@]}" | tail -n 1 | cut -f 1) / bytes / 10000000))"
}

key=()
if [[ -n "${AGENTARK_SGLANG_TOKEN:-}" ]]; then
  key=(--api-key "$AGENTARK_SGLANG_TOKEN")
  if [[ "$dry_run" == yes ]]; then # a secret is not for the screen
    key=(--api-key AGENTARK_SGLANG_TOKEN)
  fi
fi
if [[ "$device" == cpu ]]; then
  # Without a limit the cache takes most of the memory; without float32 log-probabilities are off in the third digit.
  server=("$venv/bin/python" "$here/cpu_server.py" --device cpu --attention-backend torch_native --dtype float32
    --max-total-tokens 16384 --max-running-requests 64 --sleep-on-idle)
  gpus=1 tensor=1
else
  memory="${MEMORY:-$(gpu_memory)}"
  require_positive MEMORY "$memory"
  tensor="${TENSOR:-}"
  if [[ -z "$tensor" ]]; then
    size="$(model_size)"
    if [[ -n "${SIZE:-}" ]]; then
      [[ "$SIZE" =~ ^([0-9]+)(\.([0-9]))?$ ]] || fail "SIZE is '$SIZE'; give billions of parameters, such as 8 or 1.7."
      size="$((BASH_REMATCH[1] * 100 + ${BASH_REMATCH[3]:-0} * 10))"
    fi
    if [[ "$dry_run" == yes ]]; then
      size="${size:-800}"
    fi
    [[ -n "$size" ]] || fail "how large $model is, its name does not say; set SIZE, or TENSOR."
    # Two bytes a parameter: size / 50 GB, which may be 55 hundredths of tensor × memory.
    for ((tensor = 1; size * 2 > 55 * tensor * memory; tensor *= 2)); do :; done
    ((tensor <= gpus)) || fail "$model needs $tensor GPUs of $memory GB, and GPUS is $gpus; give more, or set TENSOR."
  fi
  require_positive TENSOR "$tensor"
  ((gpus % tensor == 0)) || fail "GPUS ($gpus) is no multiple of TENSOR ($tensor)."
  percent=$((memory < 40 ? 80 : 85))
  server=("$venv/bin/python" -m sglang.launch_server --dtype bfloat16 --tp-size "$tensor")
  if [[ "$mode" == rl ]]; then
    percent=$((percent - 5))
    server+=(--weight-loader-prefetch-checkpoints --weight-loader-drop-cache-after-load)
  fi
  server+=(--mem-fraction-static "${FRACTION:-0.$percent}")
fi

started=()
start() { # a command that goes on in the background, as the head of a group of processes of its own
  if [[ "$dry_run" == yes ]]; then
    run "$@"
  else
    setsid "$@" &
    started+=("$!")
  fi
}

# shellcheck disable=SC2329 # the trap calls it
stop() { # all that was started and is left
  local process end=$((SECONDS + 20))
  for process in "${started[@]}"; do
    kill -TERM -- "-$process" 2>/dev/null || continue
    while kill -0 -- "-$process" 2>/dev/null && ((SECONDS < end)); do sleep 0.2; done
    kill -KILL -- "-$process" 2>/dev/null || true
  done
}
trap stop EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

check_all_run() {
  local process
  for process in "${started[@]}"; do
    kill -0 "$process" 2>/dev/null || fail "a server ended, its messages are above; the others are stopped."
  done
}

wait_until_healthy() { # URL …
  local url end=$((SECONDS + wait))
  if [[ "$dry_run" == yes ]]; then
    echo "# every second, until all have answered, for at most $wait s:"
    for url in "$@"; do
      run curl -sf --max-time 30 -o /dev/null "$url"
    done
    return
  fi
  for url in "$@"; do
    until curl -sf --max-time 30 -o /dev/null "$url"; do
      check_all_run
      ((SECONDS < end)) || fail "$url did not answer within WAIT ($wait) seconds; the servers are stopped."
      sleep 1
    done
  done
}

urls=()
for ((number = 0; number < gpus / tensor; number++)); do
  this=$((port + number))
  urls+=("http://$host:$this")
  devices="$(seq -s, $((number * tensor)) $(((number + 1) * tensor - 1)))"
  command=("${server[@]}" --model-path "$model" --host "$host" --port "$this" "${key[@]}" "${options[@]}")
  if [[ "$device" == gpu ]]; then
    command=(env "CUDA_VISIBLE_DEVICES=$devices" "${command[@]}")
  fi
  start "${command[@]}"
done
wait_until_healthy "${urls[@]/%//health_generate}" # this generates a token; /health would answer before the model does
if [[ "${ROUTER:-no}" == yes ]]; then
  start "$venv/bin/python" -m sglang_router.launch_router --worker-urls "${urls[@]}" --host "$host" \
    --port "$((port - 1))" --policy cache_aware "${key[@]}"
  wait_until_healthy "http://$host:$((port - 1))/health"
fi
joined="$(IFS=,; echo "${urls[*]}")"
if ((${#asking[@]})); then
  asking+=(--engine.servers "[$joined]")
  if [[ "$dry_run" == yes ]]; then
    run "${asking[@]}"
  else
    "${asking[@]}" &
    asked="$!"
    trap 'kill -TERM "$asked" 2>/dev/null || true' TERM INT # it saves, and ends; then so does this
    code=0
    wait "$asked" || code=$?
    while kill -0 "$asked" 2>/dev/null; do # the signal ended the wait, not yet the command
      code=0
      wait "$asked" || code=$?
    done
    exit "$code"
  fi
else
  echo "agentark run --engine.servers [$joined] …"
fi
if [[ "$dry_run" == yes ]]; then
  exit
fi
wait -n
fail "a server ended; the others are stopped."
