#!/usr/bin/env bash
# Builds the WikiText-103 model of Baevski & Auli with PN (247M parameters, a vocabulary of the real size), takes one
# training step of one block on the CPU through the whole pipeline, and reports the time and the peak memory.
#
#   tests/checks/wiki103.sh [TOKENS]      TOKENS: length of the block; default 512
#
# The text is random words. Everything is written to a temporary directory, which is removed.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/help.sh"
check_help "${BASH_SOURCE[0]}" "$@"
[ $# -le 1 ] || pn_die "tests/checks/wiki103.sh takes at most one argument, got: $*"
tokens=${1:-512}
[[ $tokens =~ ^[1-9][0-9]*$ ]] || pn_die "TOKENS '$tokens': must be a positive number"
. "$PN_ROOT/scripts/lib/environment.sh"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export PN_DATA_ROOT=$work/data PN_RUNS_ROOT=$work/runs
"$PYTHON" - "$work/text" <<'PYTHON'
import pathlib, random, sys
folder = pathlib.Path(sys.argv[1])
folder.mkdir()
words = [f"w{i}" for i in range(267733)]    # with <unk> and the line end, the 267,735 types of WikiText-103
random.Random(1).shuffle(words)
lines = [" " + " ".join(words[i : i + 100]) + " <unk> \n" for i in range(0, len(words), 100)]
for split, number in (("train", len(lines)), ("valid", 20), ("test", 20)):
    (folder / f"{split}.txt").write_text("".join(lines[:number]))
PYTHON
bash "$PN_ROOT/scripts/prepare.sh" wikitext103 --text-dir "$work/text"
"$PYTHON" - bash "$PN_ROOT/scripts/train.sh" wikitext103 power --arch transformer_lm_pn_wiki103 common.cpu=true \
    optimization.max_update=1 'optimization.update_freq=[1]' "task.tokens_per_sample=$tokens" \
    "dataset.max_tokens=$tokens" eval_lm.context_window=0 dataset.disable_validation=true checkpoint.no_save=true \
    common.log_interval=1 <<'PYTHON'
import resource, subprocess, sys, time
begin = time.time()
status = subprocess.run(sys.argv[1:]).returncode
peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20    # of the largest process, in GiB
print(f"one update in all: {time.time() - begin:.0f} s, peak memory {peak:.1f} GiB")
sys.exit(status)
PYTHON
