#!/usr/bin/env bash
# Draws the paper's figures, and trains and evaluates the runs that they need; --help says more.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # called with sh
set -euo pipefail
. "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/lib/common.sh"
pn_python reproduce figures "$@"
