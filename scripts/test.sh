#!/usr/bin/env bash
# Runs the tests in the project's environment, which it makes first if there is none.
#
#   scripts/test.sh [--fast] [pytest arguments]
#
#   --fast              leave out the tests that are marked as slow, which train models through the scripts
#
# Without arguments: all tests, a process per core. Example: scripts/test.sh -k pipeline -x -n 0 (one process)
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib/common.sh"
# -h is pytest's own for pytest's options; this script's is the first argument only.
pn_help "${BASH_SOURCE[0]}" "${1:-}"
. "$PN_ROOT/scripts/lib/environment.sh"
cd "$PN_ROOT"
if [ "${1:-}" = --fast ]; then
    shift
    set -- -m "not slow" "$@"
fi
exec "$PYTHON" -m pytest -n auto --maxprocesses 8 --dist loadfile "$@"
