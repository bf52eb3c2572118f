#!/usr/bin/env bash
# Evaluates a trained model and writes its record; --help says more.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # called with sh
set -euo pipefail
. "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/lib/common.sh"
pn_python evaluate "$@"
