#!/usr/bin/env bash
# Makes a virtual environment with SGLang for machines without a GPU: launch/sglang/install_cpu.sh [--dry-run] DIRECTORY
#
# 2 minutes and 2.7 GB with a fast connection. Needs Python 3.11 as PYTHON (python3.11 by default) and a CPU build of
# torch where pip looks for packages. `cpu_server.py` says what of SGLang is stood in for on such a machine.
set -euo pipefail

here="$(dirname "$0")"
# shellcheck source=launch/common.sh
source "$here/../common.sh"

read_arguments "$@"
[[ -n "$subject" ]] || fail "name the directory to make, such as $0 .venv-sglang"
python="${PYTHON:-python3.11}"
[[ "$dry_run" == yes ]] || command -v "$python" >/dev/null || fail "there is no $python; set PYTHON to a Python 3.11."

run "$python" -m venv "$subject"
run "$subject/bin/pip" install -q -r "$here/requirements-cpu.txt"
run "$subject/bin/pip" install -q --no-deps sglang==0.5.23 torchvision==0.28.0 # with their dependencies comes the CUDA stack
