#!/usr/bin/env bash
# Shows how runs are doing: state, updates, validation loss, time left, last whole checkpoint, restarts.
#
#   scripts/status.sh [DIR...]
#
#   DIR                 run directories, or directories with runs anywhere below; default: runs/ ($PN_RUNS_ROOT)
#
# States: queued (a job waits), running, finished, failed (training ended by an error), interrupted (it was stopped or
# killed, and nobody goes on with it), unreadable (its files are not those of a run). "restarts" are the sessions after
# the first. It reads only.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib/common.sh"
pn_help "${BASH_SOURCE[0]}" "$@"
pn_python status "$@"
