#!/usr/bin/env bash
# tests/checks/unchanged.sh REVISION [UPDATES]: does this checkout train as that revision of the repository did?
#
# REVISION prepares the demo and trains LN and PN for UPDATES (60) with its own scripts; the same commands are then repeated
# with the package of this checkout in its place. Every tensor of the models (parameters and running statistics), of the
# optimizers, and every logged loss must be the same to the last bit. The words in which the two revisions' own command
# lines differ are printed.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
case ${1:-} in
    '' | -h | --help)
        sed -n '2,/^[^#]/ { /^#/ s/^# \{0,1\}//p; }' "${BASH_SOURCE[0]}"
        exit
        ;;
esac
. "$root/scripts/lib/common.sh"
. "$root/scripts/lib/environment.sh"
exec "$PYTHON" "$root/tests/checks/unchanged.py" "$@"
