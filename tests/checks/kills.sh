#!/usr/bin/env bash
# Kills training, evaluation and a reproduction at random moments, and goes on with them until they end: nothing of them may be
# left at work, status.sh must say what the checkpoints hold, and every result must be that of a run that nothing disturbed.
#
#   tests/checks/kills.sh [--kills N] [--seed S] [--record FILE]      default: 20 kills, seed 1; FILE: what was done and seen
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/help.sh"
check_help "${BASH_SOURCE[0]}" "$@"
. "$PN_ROOT/scripts/lib/environment.sh"
exec "$PYTHON" "$PN_ROOT/tests/checks/kills.py" "$@"
