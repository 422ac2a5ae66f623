# shellcheck shell=bash disable=SC2034 # what is set here is read by the scripts that source this file
# What every script of this folder does with its arguments and settings.

fail() {
  echo "$0: $1" >&2
  exit 2
}

# Sets dry_run, subject and options from a script's arguments: [--dry-run] SUBJECT [options …].
read_arguments() {
  dry_run=no
  if [[ "${1:-}" == --dry-run ]]; then
    dry_run=yes
    shift
  fi
  subject="${1:-}"
  options=("${@:2}")
}

# Refuses settings that are not there; in a dry run their names stand for them.
require() {
  local variable
  for variable in "$@"; do
    if [[ "$dry_run" == yes ]]; then
      printf -v "$variable" %s "${!variable:-$variable}"
    fi
    [[ -n "${!variable:-}" ]] ||
      fail "$variable is not set; the head of this file says what it is. --dry-run needs none."
  done
}

# Sets config from the subject; a dry run may leave it to DEFAULT_CONFIG.
require_config() { # DEFAULT_CONFIG
  config="$subject"
  if [[ "$dry_run" == yes ]]; then
    config="${subject:-$1}"
  fi
  [[ -f "$config" ]] || fail "'$config' is no file; the first argument is a config, such as configs/qwen3_8b.yaml."
}

require_program() { # VENV PROGRAM
  [[ "$dry_run" == yes || -x "$1/bin/$2" ]] || fail "VENV is '$1', which has no bin/$2; install the package there first."
}

require_positive() { # NAME VALUE
  [[ "$2" =~ ^[1-9][0-9]*$ ]] || fail "$1 is '$2'; give a positive number."
}

# Sets accelerator, arrangement, chips and hosts (chips: of a host) from the name that `agentark fit --dry-run` has for
# a TPU slice, and type, as Cloud TPU calls it; v5p is counted by cores, two to a chip.
read_topology() { # NAME
  local generation="${1%%-*}" number="${1##*-}"
  require_positive "TOPOLOGY's number" "$number"
  case "$generation" in
    v5e | v6e)
      accelerator=tpu-v6e-slice
      type="v6e-$number"
      if [[ "$generation" == v5e ]]; then
        accelerator=tpu-v5-lite-podslice
        type="v5litepod-$number"
      fi
      case "$number" in
        4) arrangement=2x2 ;; 8) arrangement=2x4 ;; 16) arrangement=4x4 ;; 32) arrangement=4x8 ;; 64) arrangement=8x8 ;;
        128) arrangement=8x16 ;; 256) arrangement=16x16 ;; *) arrangement="" ;;
      esac
      chips=$((number == 8 ? 8 : 4))
      hosts=$((number / chips))
      ;;
    v5p)
      accelerator=tpu-v5p-slice
      type="$1"
      case "$number" in
        8) arrangement=2x2x1 ;; 16) arrangement=2x2x2 ;; 32) arrangement=2x2x4 ;; 64) arrangement=2x4x4 ;;
        128) arrangement=4x4x4 ;; 256) arrangement=4x4x8 ;; *) arrangement="" ;;
      esac
      chips=4
      hosts=$((number / 8))
      ;;
    *) arrangement="" ;;
  esac
  [[ -n "$arrangement" ]] ||
    fail "TOPOLOGY is '$1'; give a slice that the dry run knows, such as v5e-8, v6e-16 or v5p-32."
}

# Runs a step of a pipeline, unless NAME.steps in the folder where the script was called says that it was done.
once() { # STEP COMMAND …
  if [[ "$dry_run" == yes ]]; then
    echo "# $1"
  elif grep -qxF "$1" "$NAME.steps" 2>/dev/null; then
    echo "$1: done before, as $NAME.steps says"
    return
  else
    echo "$1 …"
  fi
  "${@:2}"
  if [[ "$dry_run" == no ]]; then
    echo "$1" >>"$NAME.steps"
  fi
}

# Runs a command, or prints it in a dry run.
run() {
  if [[ "$dry_run" == yes ]]; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}
