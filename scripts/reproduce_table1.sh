#!/usr/bin/env bash
# Trains, evaluates and reports every row of the paper's Table 1 (machine translation); --help says more.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # called with sh
set -euo pipefail
. "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/lib/common.sh"
pn_python reproduce table1 "$@"
