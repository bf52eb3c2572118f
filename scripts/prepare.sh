#!/usr/bin/env bash
# Makes a benchmark's data ready for training: fetches and verifies the text, tokenizes, learns and applies BPE, binarizes.
# The text of a language model (ptb, wikitext103) is used as it is, word by word; its tokens are counted and the counts
# compared with the published ones.
#
#   scripts/prepare.sh BENCH [options]
#
#   BENCH               name of a file in configs/ (demo, iwslt14, multi30k, ptb, wikitext103, wmt14)
#   --bpe TYPE          subword_nmt or sentencepiece; default: bpe in configs/data/BENCH.yaml
#   --bpe-size N        merges (subword_nmt) or pieces (sentencepiece); default: bpe_size in configs/data/BENCH.yaml
#   --news-commentary V wmt14: v12, or v9, that of WMT 2014; default: news_commentary in configs/data/wmt14.yaml
#   --cleaning NAME     wmt14: which training pairs stay, authors (1 to 80 words, at most 9 for one) or fairseq (1 to
#                       250 pieces, at most 1.5 for one); default: cleaning in configs/data/wmt14.yaml
#   --archive-dir DIR   take the corpus files from DIR/BENCH/ or DIR/ instead of downloading them; default: $DATA_ARCHIVES
#   --archive FILE      iwslt14, ptb, wikitext103: take the text from FILE, laid out as the published archive (de-en.tgz
#                       or 2014-01.tgz, simple-examples.tgz, wikitext-103-v1.zip) but not held to its SHA-256
#   --text-dir DIR      use own text, train|valid|test.SOURCE and .TARGET (raw, one sentence a line), instead of the
#                       corpus; of a language model train|valid|test.txt, or the files of the published archive
#   --allow-unverified  download over plain http, too, what has no published checksum
#   --force             prepare again although the data is there
#
#   DATA_MIRROR=URL     look for the files of the corpus at URL/ before their public addresses
#   MOSES=DIR           tokenize with the Perl scripts of DIR, a checkout of mosesdecoder; its tokens are the same
#
# The result is data/BENCH/ ($PN_DATA_ROOT/BENCH): raw/, tok/ and bpe/ (not of a language model), data-bin/, and
# prepared.json, which says from what and how it was made. It appears when it is whole. A run that was cut off leaves
# the stages that it had finished in data/.BENCH.partial/: the next one with the same options goes on after them, another
# one removes them. A download that was cut off is gone on with, too.
# Run again, it has nothing to do and says so.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib/common.sh"
pn_help "${BASH_SOURCE[0]}" "$@"
pn_python prepare "$@"
