#!/usr/bin/env bash
# Draws the paper's figures: 1, the distance of batch and running statistics along training; 2, the gradient through
# the statistics; 3, the singular values of the embedding matrix; 4, the learning curves. It trains and evaluates the
# runs they need, LN, BN, PN-V and PN, which are those of the tables.
#
#   scripts/reproduce_figures.sh [options] [overrides]
#
#   --benchmark LIST    default: iwslt14; also wmt14, multi30k, demo, ptb, wikitext103
#   --rows LIST         default: layer,batch-reference,batch,power-v,power
#   --seeds LIST        default: 1
#   --archs, --norms, --updates, --jobs, --gpus, --slurm and its options, --results, --dry-run, --report-only, overrides
#                       as scripts/reproduce_table1.sh and scripts/reproduce_table2.sh have them
#
# The pictures are results/figures-BENCH[-UPDATES].BENCH-ARCH.figure[1-4].png, their data beside them in
# results/figures-BENCH[-UPDATES].figures.json, so that --report-only draws them again without the runs.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib/common.sh"
pn_help "${BASH_SOURCE[0]}" "$@"
pn_python reproduce figures "$@"
