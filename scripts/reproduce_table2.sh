#!/usr/bin/env bash
# Trains and evaluates every row of the paper's Table 2 (language modelling) and writes the table.
#
#   scripts/reproduce_table2.sh [options] [overrides]
#
# The rows: LN; BN by the authors' code (batch-reference) and with true masked statistics (batch), PN-V and PN in all
# positions, all but batch-reference with and without layer scale; PN by the authors' code (reference) and by the paper
# (algorithm2).
#
#   --benchmark LIST    default: ptb,wikitext103
#   --archs LIST        default: the paper's, the tensorized Transformers; also transformer_lm_pn_ptb of ptb and
#                       transformer_lm_pn_wiki103 of wikitext103
#   --norms LIST        the rows of these norms only, of layer,batch:variant=reference,batch,power-v,power
#   --rows LIST         these rows only, NORM[-algorithm2][-groups0]: by the paper's algorithm, without layer scale
#   --seeds, --updates, --jobs, --gpus, --slurm and its options, --results, --dry-run, --report-only, overrides
#                       as scripts/reproduce_table1.sh has them
#
# The runs lie in runs/BENCH/ROW-ARCH-UPDATES-seedS, their records in results/BENCH/ROW-ARCH-UPDATES-seedS.json, the
# report in results/table2-BENCH[-UPDATES].{html,md,csv}. Run again, it goes on where it was interrupted.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib/common.sh"
pn_help "${BASH_SOURCE[0]}" "$@"
pn_python reproduce table2 "$@"
