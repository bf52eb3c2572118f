#!/usr/bin/env bash
# Checks that this checkout trains exactly as an earlier revision of the repository did.
#
#   tests/checks/unchanged.sh REVISION [UPDATES]      UPDATES: updates of each run; default: 60
#
# REVISION prepares the demo and trains LN and PN with its own scripts; the same commands are then repeated with the package
# of this checkout in its place. Every tensor of the models (parameters and running statistics) and of the optimizers, and
# every logged loss, must be the same to the last bit. Differences between the two revisions' own command lines are printed.
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
