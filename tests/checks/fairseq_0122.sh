#!/usr/bin/env bash
# Checks the package on the official fairseq 0.12.2: does evaluation really go through Power Normalization there?
#
#   tests/checks/fairseq_0122.sh [TEST ...]
#
#   TEST                tests for pytest; default: those of the norms and the models, in DEFAULT_TESTS
#
# fairseq 0.12.2 needs Python 3.8, 3.9 or 3.10, and can evaluate an encoder layer by a fused function that computes LayerNorm
# whatever norm the layer has. There are three checks, each ending with a line; the exit status is 0 if all of them pass:
#   evaluation          each power norm is called, and the outputs are those of the formula; with the fused path on, they
#                       are not
#   training            fairseq-train for 20 updates on a toy corpus, averaging, fairseq-generate, and the first check again
#   tests               pytest
#
# Environment variables:
#   ENVIRONMENT_DIR     virtual environment, made on first use; default: .venv-fairseq-0.12.2 in the repository
#   PYTHON              the Python to make it with; default: the first of python3.10, python3.9, python3.8 in PATH
#   TORCH_SPEC          torch and torchaudio, as arguments of pip; default: torch==2.4.1 torchaudio==2.4.1, the oldest torch that
#                       the package takes. PyPI's builds bring CUDA: a download of 2.5 GB, 5 GB on disk. Without CUDA:
#                       TORCH_SPEC="torch==2.4.1 torchaudio==2.4.1 --index-url https://download.pytorch.org/whl/cpu"
#
# Run again, it uses the same environment. Remove that directory to free the space.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/help.sh"
# -h is pytest's own among pytest's arguments; this script's is the first argument only.
check_help "${BASH_SOURCE[0]}" "${1:-}"

ENVIRONMENT_DIR=${ENVIRONMENT_DIR:-$PN_ROOT/.venv-fairseq-0.12.2}
TORCH_SPEC=${TORCH_SPEC:-torch==2.4.1 torchaudio==2.4.1}
PACKAGES=("fairseq==0.12.2" "numpy<2" "packaging" "sacrebleu>=2.0" "pytest>=7")
DEFAULT_TESTS=(tests/norms tests/test_statistics.py tests/kernels/test_kernels.py tests/models/test_{model,lm,tensorized}.py)
UPDATES=20

# find_python: the interpreter to make the environment with.
find_python() {
    local name
    for name in ${PYTHON:+"$PYTHON"} python3.10 python3.9 python3.8 python3 python; do
        if "$name" -c 'import sys, venv, ensurepip; sys.exit(not (3, 8) <= sys.version_info < (3, 11))' 2>/dev/null; then
            printf '%s\n' "$name"
            return
        fi
        [ "$name" != "${PYTHON:-}" ] || pn_die "PYTHON=$PYTHON is no Python 3.8, 3.9 or 3.10 with the modules venv and ensurepip"
    done
    pn_die "no usable Python: 3.8, 3.9 or 3.10 with the modules venv and ensurepip must be in PATH, or give one with PYTHON=..."
}

make_environment() {
    local python=$ENVIRONMENT_DIR/bin/python base words wanted="$TORCH_SPEC ${PACKAGES[*]}"
    if [ "$(cat "$ENVIRONMENT_DIR/installed" 2>/dev/null)" = "$wanted" ]; then
        return
    fi
    if [ ! -e "$ENVIRONMENT_DIR/pyvenv.cfg" ] && [ -n "$(ls -A "$ENVIRONMENT_DIR" 2>/dev/null)" ]; then
        pn_die "ENVIRONMENT_DIR=$ENVIRONMENT_DIR exists and is no virtual environment"
    fi
    if ! "$python" -m pip --version >/dev/null 2>&1; then
        base=$(find_python)
        echo "making $ENVIRONMENT_DIR with $base"
        "$base" -m venv --clear "$ENVIRONMENT_DIR"
    fi
    echo "installing into $ENVIRONMENT_DIR (some minutes)"
    rm -f "$ENVIRONMENT_DIR/installed"
    read -r -a words <<<"$TORCH_SPEC"
    # newer ones refuse the omegaconf 2.0 that fairseq 0.12.2 requires
    "$python" -m pip install --quiet "pip<24.1"
    "$python" -m pip install --quiet "${words[@]}"
    "$python" -m pip install --quiet "${PACKAGES[@]}"
    printf '%s\n' "$wanted" >"$ENVIRONMENT_DIR/installed"
}

# toy_corpus DIRECTORY: random sentences, and the same in other words and backwards.
toy_corpus() {
    local split sentences
    mkdir "$1"
    for split in train:400 valid:40 test:40; do
        sentences=${split#*:}
        awk -v n="$sentences" -v seed="$sentences" -v source="$1/${split%:*}.de" -v target="$1/${split%:*}.en" 'BEGIN {
            srand(seed)
            for (i = 0; i < n; i++) {
                there = back = ""
                for (length_left = 3 + int(8 * rand()); length_left > 0; length_left--) {
                    word = int(30 * rand())
                    there = there " d" word
                    back = "e" word " " back
                }
                print substr(there, 2) > source
                print substr(back, 1, length(back) - 1) > target
            }
        }'
    done
}

# logged NAME COMMAND...: run a command; its output goes to a file and is shown if the command fails.
logged() {
    local name=$1 status=0
    shift
    "$@" >"$WORK/$name.log" 2>&1 || status=$?
    if [ "$status" -ne 0 ]; then
        echo "$name: exit status $status; the end of what it printed:"
        tail -n 30 "$WORK/$name.log"
    fi
    return "$status"
}

evaluation() {
    python "$PN_ROOT/tests/checks/evaluation.py"
}

# With post-norm, the only models that fairseq by itself evaluates by its fused path, and PN in all places.
training() {
    local data=$WORK/data-bin plugin=$PN_ROOT/fairseq_powernorm averaged=$WORK/averaged.pt translated
    local sizes=() norms=() side
    for side in encoder decoder; do
        sizes+=("--$side-layers" 2 "--$side-embed-dim" 32 "--$side-ffn-embed-dim" 64)
        norms+=("--$side-norm-self" power "--$side-norm-ff" power)
    done
    toy_corpus "$WORK/text" &&
        logged fairseq-preprocess fairseq-preprocess --source-lang de --target-lang en --trainpref "$WORK/text/train" \
            --validpref "$WORK/text/valid" --testpref "$WORK/text/test" --destdir "$data" &&
        logged fairseq-train fairseq-train "$data" --user-dir "$plugin" --task translation_pn --arch transformer_pn_tiny \
            --post-norm "${sizes[@]}" "${norms[@]}" --norm-warmup-updates 10 --optimizer adam --lr 1e-3 \
            --lr-scheduler inverse_sqrt --warmup-updates 10 --criterion label_smoothed_cross_entropy --label-smoothing 0.1 \
            --max-tokens 512 --max-update "$UPDATES" --eval-bleu --best-checkpoint-metric bleu \
            --maximize-best-checkpoint-metric --save-dir "$WORK/checkpoints" --cpu --seed 1 --num-workers 0 \
            --data-buffer-size 0 --no-progress-bar &&
        logged average python -m fairseq_powernorm.checkpoint average --output "$averaged" \
            --inputs "$WORK/checkpoints/checkpoint_best.pt" "$WORK/checkpoints/checkpoint_last.pt" &&
        logged fairseq-generate fairseq-generate "$data" --user-dir "$plugin" --task translation_pn --path "$averaged" \
            --gen-subset test --beam 2 --max-len-b 20 --cpu --num-workers 0 --data-buffer-size 0 || return
    translated=$(grep -c '^H-' "$WORK/fairseq-generate.log") || true
    echo "fairseq-generate translated $translated of 40 sentences; $(tail -n 1 "$WORK/fairseq-generate.log")"
    [ "$translated" -eq 40 ] && python "$PN_ROOT/tests/checks/evaluation.py" "$averaged"
}

tests() {
    local chosen=("$@")
    [ "$#" -gt 0 ] || chosen=("${DEFAULT_TESTS[@]}")
    (cd "$PN_ROOT" && python -m pytest -q -rfEs --disable-warnings -p no:cacheprovider "${chosen[@]}")
}

make_environment
WORK=$(mktemp -d)
trap 'rm -rf "$WORK"' EXIT
PATH=$ENVIRONMENT_DIR/bin:$PATH
# the package is used from the checkout, not installed
export PATH PYTHONPATH="$PN_ROOT${PYTHONPATH:+:$PYTHONPATH}"

summary=()
failed=0
for check in evaluation training tests; do
    echo "== $check"
    status=0
    "$check" "$@" || status=$?
    if [ "$status" -eq 0 ]; then
        summary+=("PASS  $check")
    else
        summary+=("FAIL  $check (exit status $status)")
        failed=1
    fi
done
echo "== $(python -c 'import fairseq, torch, platform; print("fairseq", fairseq.__version__ + ", torch", torch.__version__ + ", Python", platform.python_version())' 2>/dev/null)"
printf '%s\n' "${summary[@]}"
exit "$failed"
