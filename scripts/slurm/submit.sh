#!/usr/bin/env bash
# Queues training of one or more norms, with one or more seeds, on a cluster with SLURM: an array with a job for each run,
# one that evaluates each run once it has ended well, and, behind all of these, a job that makes the table.
#
#   scripts/slurm/submit.sh BENCH NORM... [options] [overrides]
#
#   BENCH, NORM         as in scripts/train.sh, as are --arch, --placement, --tensorboard and overrides
#   --array-seeds LIST  seeds, such as 1,2,3; default: common.seed of configs/BENCH.yaml
#   --nodes N           nodes of each run; default: 1
#   --gpus G            GPUs of each run, all nodes together, with a rank (a task) each; default: one per node. An update
#                       takes as much as on one: they share out optimization.update_freq, which G must divide
#   --time T            time limit of a job, as sbatch takes it; default: the site's. A run may need longer: its job stops
#                       before the limit and requeues itself
#   --partition P       default: the site's
#   --resume            go on with runs that are there, and start those that are not
#   --site FILE         the cluster's settings; default: $PN_SLURM_SITE, scripts/slurm/site.sh or, where that is missing,
#                       scripts/slurm/site.example.sh
#   --log-dir DIR       a log for each job; default: logs/ in the submission's directory
#   --records DIR       evaluate.sh's record of each run, copied to DIR/RUN.json
#   --dry-run           print the batch scripts and the commands, queue nothing; needs no SLURM
#
# Everything is checked before anything is queued. A submission has a directory, runs/slurm/BENCH-DATE-TIME ($PN_RUNS_ROOT):
# tasks and evaluations (the arguments of each job), logs/ and, in the end, table.md, which lacks the runs that failed.
# Runs lie where scripts/train.sh puts them. scripts/status.sh shows how they are doing; scancel ends them.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/../lib/common.sh"
pn_help "${BASH_SOURCE[0]}" "$@"
pn_python submit "$@"
