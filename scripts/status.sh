#!/usr/bin/env bash
# Shows how runs are doing; --help says more.
set -euo pipefail
. "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/lib/common.sh"
pn_python status "$@"
