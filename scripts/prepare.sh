#!/usr/bin/env bash
# Makes a benchmark's data ready for training; --help says more.
set -euo pipefail
. "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/lib/common.sh"
pn_python prepare "$@"
