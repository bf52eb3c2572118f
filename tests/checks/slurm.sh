#!/usr/bin/env bash
# Proves on a real SLURM, which it starts on this machine, that runs submitted by scripts/slurm/submit.sh survive
# preemption, time limits and the loss of a node: each ends with the parameters of an undisturbed run, bit for bit.
#
#   tests/checks/slurm.sh [options]
#
#   --lean              check only the disturbed array, and leave out ranks on two nodes, jobs that fail, the rows of
#                       a table, and hydra's launcher
#   --install           install Debian's packages slurmctld, slurmd and slurm-client first, if they are missing (as root)
#   --record FILE       write what was done and seen to FILE
#   --keep              keep the temporary directory, with all logs
#
# It needs two processors and no GPU (SLURM is told of two GPUs, which nothing computes with), and takes minutes. Everything
# is made in a temporary directory; at the end, all processes are stopped and the directory is removed.
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
