#!/usr/bin/env bash
# Proves on a real SLURM, started on this machine for the purpose, that runs submitted by scripts/slurm/submit.sh
# survive preemption, time limits and the loss of a node: each ends with the parameters, bit for bit, of a run that
# nobody disturbed.
#
#   tests/checks/slurm.sh [options]
#
#   --lean              the array with its disturbances only, without the other checks: ranks on two nodes, jobs that
#                       fail, the rows of a table, hydra's launcher
#   --install           install Debian's packages slurmctld, slurmd and slurm-client first, if they are missing (as root)
#   --record FILE       write what was done and seen to FILE
#   --keep              leave the temporary directory, with all logs
#
# Needs two processors, no GPU: SLURM counts two that nobody computes with. Minutes. Everything is made in a temporary
# directory and ended and removed in the end.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/help.sh"
check_help "${BASH_SOURCE[0]}" "$@"
packages="slurmctld slurmd slurm-client"
if [[ " $* " == *" --install "* ]] && ! PATH=$PATH:/usr/sbin command -v slurmctld >/dev/null; then
    [ "$(id -u)" -eq 0 ] || pn_die "--install needs root; or: sudo apt-get install --no-install-recommends $packages"
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -q
    # shellcheck disable=SC2086 # words
    apt-get install -q -y --no-install-recommends $packages
fi
. "$PN_ROOT/scripts/lib/environment.sh"
exec "$PYTHON" "$PN_ROOT/tests/checks/slurm.py" "$@"
