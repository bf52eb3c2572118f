#!/usr/bin/env bash
# Kills training, evaluation and a reproduction at random moments, and resumes them until they finish. No process of theirs may
# survive, status.sh must show what the checkpoints hold, and every result must equal that of an undisturbed run.
#
#   tests/checks/kills.sh [--kills N] [--seed S] [--record FILE]
#
#   --kills N           number of kills; default: 20
#   --seed S            seed of the random moments; default: 1
#   --record FILE       write what was done and seen to FILE
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/help.sh"
check_help "${BASH_SOURCE[0]}" "$@"
. "$PN_ROOT/scripts/lib/environment.sh"
exec "$PYTHON" "$PN_ROOT/tests/checks/kills.py" "$@"
