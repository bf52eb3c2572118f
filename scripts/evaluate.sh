#!/usr/bin/env bash
# Averages a run's last checkpoints, translates a subset, scores it, and writes one JSON record. Of a language model it
# takes the checkpoint with the best validation loss and gives the perplexity, word by word, of the whole subset: of each
# block by itself, and with eval_lm.context_window tokens before each. Line ends count as tokens.
#
#   scripts/evaluate.sh BENCH RUN_DIR [options]
#
#   BENCH               the benchmark of the run (demo, iwslt14, multi30k, ptb, wikitext103, wmt14)
#   RUN_DIR             a run directory made by scripts/train.sh
#   --subset NAME       test (default) or valid
#   --average N         checkpoints to average; default: as many as checkpoint.keep_last_epochs (or
#                       checkpoint.keep_interval_updates) keeps; of a language model, the best one by validation loss
#   --available         average fewer where a short run has fewer, checkpoint_last.pt if it has none of them
#   --unfinished        evaluate a run whose training is not complete
#   --record FILE       copy the record to FILE as well
#   --force             evaluate again although there is a record; overwrite FILE
#
# The result is RUN_DIR/evaluation/ (RUN_DIR/evaluation-valid/ for --subset valid): hyp.tok, ref.tok, hyp.detok, ref.detok,
# averaged.pt, generate.log and record.json, or eval-lm.log, eval-lm-contextN.log and record.json; results/README.md
# describes the record. Run again, it has nothing to do.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib/common.sh"
pn_help "${BASH_SOURCE[0]}" "$@"
pn_python evaluate "$@"
