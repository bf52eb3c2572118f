#!/usr/bin/env bash
# Makes a benchmark's data ready for training: fetches and verifies the text, tokenizes, learns and applies BPE, binarizes.
# The text of a language model (ptb, wikitext103) is used as it is, word by word; its tokens are counted and the counts
# compared with the published ones.
#
#   scripts/prepare.sh BENCH [options]
#
#   BENCH               name of a file in configs/ (demo, multi30k, ptb, wikitext103)
#   --bpe TYPE          subword_nmt or sentencepiece; default: PN_BPE in configs/BENCH.yaml
#   --archive-dir DIR   take the corpus files from DIR/BENCH/ or DIR/ instead of downloading them; default: $DATA_ARCHIVES
#   --archive FILE      ptb, wikitext103: take the text from FILE, laid out as the published archive
#                       (simple-examples.tgz, wikitext-103-v1.zip) but not held to its SHA-256
#   --text-dir DIR      use own text, train|valid|test.SOURCE and .TARGET (raw, one sentence a line), instead of the
#                       corpus; of a language model train|valid|test.txt, or the files of the published archive
#   --force             prepare again although the data is there
#
# The result is data/BENCH/ ($PN_DATA_ROOT/BENCH): raw/, tok/ and bpe/ (not of a language model), data-bin/, and
# prepared.json, which says from what and how it was made. It appears when it is whole; a run that was cut off leaves
# nothing in the way of the next one.
# Run again, it has nothing to do and says so.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib/common.sh"
pn_help "${BASH_SOURCE[0]}" "$@"
pn_python prepare "$@"
