#!/usr/bin/env bash
# Runs the tests; --help says more.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # called with sh
set -euo pipefail
. "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/lib/common.sh"
case ${1:-} in # among pytest's arguments these are pytest's own
    -h | --help)
        cat <<'TEXT'
usage: scripts/test.sh [--fast] [pytest arguments]

Runs the tests in the project's environment, which it makes first if there is none. Without arguments: all tests, a
process per core. Example: scripts/test.sh -k pipeline -x -n 0 (one process)

  --fast  leave out the tests that are marked as slow, which train models through the scripts
TEXT
        exit
        ;;
esac
. "$PN_ROOT/scripts/lib/environment.sh"
cd "$PN_ROOT"
if [ "${1:-}" = --fast ]; then
    shift
    set -- -m "not slow" "$@"
fi
exec "$PYTHON" -m pytest -n auto --maxprocesses 8 --dist loadfile "$@"
