#!/usr/bin/env bash
# Compares PN with LN on the demo, from a fresh checkout; --help says more.
set -euo pipefail
. "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/lib/common.sh"
pn_python quickstart "$@"
