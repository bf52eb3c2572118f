#!/usr/bin/env bash
# Trains one model on several ranks, a process each: the GPUs of this machine, its processors, or those of many machines.
#
#   scripts/launch.sh BENCH NORM [options] [options and overrides of scripts/train.sh]
#
#   --ranks R           ranks on this machine; default: its visible GPUs. Ranks without a GPU: common.cpu=true
#   --nodes N           machines; the same command is started on each of them, with
#   --node-rank I       the number of the machine, from 0; the first one writes the run's records
#   --master HOST:PORT  the first machine, and a free port there (default port: 29400)
#
# All machines need the prepared data, the same checkout and a common file system for the run directory.
# An update takes as much as on one GPU: the ranks share out optimization.update_freq, which their number must divide. What
# an update takes is printed.
# Interrupted, a run goes on with --resume on all machines. rank 0's output is train.log, that of the others logs/.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib/common.sh"
pn_help "${BASH_SOURCE[0]}" "$@"
pn_python launch "$@"
