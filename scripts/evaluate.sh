#!/usr/bin/env bash
# Evaluates a trained model and writes its record; --help says more.
set -euo pipefail
. "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/lib/common.sh"
pn_python evaluate "$@"
