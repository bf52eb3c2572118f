#!/usr/bin/env bash
# Trains and evaluates every row of the paper's Table 1 (machine translation) and writes the table.
#
#   scripts/reproduce_table1.sh [options] [overrides]
#
# The rows: LN; BN by the authors' code (batch-reference) and with true masked statistics (batch), PN-V and PN, each in
# the encoder, as the authors have them, and in all positions, all but batch-reference with and without layer scale; PN by
# the authors' code (reference) and by the paper (algorithm2).
#
#   --benchmark LIST    default: iwslt14,wmt14; the same rows at small size: multi30k, demo
#   --norms LIST        the rows of these norms only, of layer,batch:variant=reference,batch,power-v,power
#   --rows LIST         these rows only, NORM[-all][-algorithm2][-groups0]: in all positions, by the paper's algorithm,
#                       without layer scale (groups0), such as power-all-groups0
#   --seeds LIST        default: 1,2,3
#   --updates N         updates of each run instead of optimization.max_update of configs/BENCH.yaml; warm-ups and all
#                       that is counted in updates, and the number of epochs averaged, shrink in proportion: to 100,000
#                       (iwslt14) or 30,000 (wmt14) where only early stopping ends training
#   --jobs N            runs at a time, on the CPU, a thread each unless OMP_NUM_THREADS is set; default: 1
#   --gpus LIST         a run at a time on each of these GPUs, such as 0,1,2,3
#   --slurm             queue the runs on a cluster with SLURM, an evaluation of each and, behind all, the report
#   --nodes N, --time T, --partition P, --site FILE, --log-dir DIR, --gpus G
#                       with --slurm, as scripts/slurm/submit.sh has them
#   --results DIR       where records and report go; default: results
#   --dry-run           print what an update takes and every command that would run, with an estimate of its GPU hours,
#                       and the total
#   --report-only       write the report of the records that there are
#   overrides           hydra overrides for every run, such as common.cpu=true or common.fp16=true
#
# Without --slurm a run has one GPU at most; with it, its G GPUs share out the batches of one. UPDATES in names is early-stop
# where only early stopping ends training. The runs lie in runs/BENCH/ROW-UPDATES-seedS ($PN_RUNS_ROOT/BENCH/...),
# their records in results/BENCH/ROW-UPDATES-seedS.json, the report in results/table1-BENCH[-UPDATES].{html,md,csv} with
# pictures and their data beside it. Run again, it goes on where it was interrupted, run by run; started twice, the two
# share the runs; with --slurm, nothing is queued for a run that has a record, or a job. A run that fails does not stop the
# others: it is named at the end, and the exit status is 1.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib/common.sh"
pn_help "${BASH_SOURCE[0]}" "$@"
pn_python reproduce table1 "$@"
