#!/usr/bin/env bash
# Checks models of timm (vision transformers, Swin, ConvNeXt) with the norms of this package.
#
#   tests/checks/timm.sh [RECORD]
#
#   RECORD              a Markdown file to write the record to; it must not exist yet
#
# timm needs torchvision, whose build on PyPI does not load beside the CPU build of torch that the other tests use; so this
# check has an environment of its own. For each model: the report names all norms; replacing LayerNorm by this package's
# LayerNorm gives the same logits, to the bit where timm calls torch's; PN trains with the layouts that were found; and
# folding PN gives the same logits to 1e-5.
#
# Environment variables:
#   ENVIRONMENT_DIR     virtual environment, made on first use; default: .venv-timm in the repository
#   PYTHON              the Python to make it with; default: python3
#   TORCH_SPEC          torch and torchvision, as arguments of pip; default: torch==2.14.1 torchvision==0.29.1, a download of
#                       some 3 GB, 5.5 GB on disk
#
# Run again, it uses the same environment. Remove that directory to free the space.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/help.sh"
check_help "${BASH_SOURCE[0]}" "$@"

ENVIRONMENT_DIR=${ENVIRONMENT_DIR:-$PN_ROOT/.venv-timm}
TORCH_SPEC=${TORCH_SPEC:-torch==2.14.1 torchvision==0.29.1}
record=${1:-}
if [ -n "$record" ] && [ -e "$record" ]; then
    pn_die "$record exists"
fi
if [ "$(cat "$ENVIRONMENT_DIR/installed" 2>/dev/null)" != "$TORCH_SPEC" ]; then
    echo "making $ENVIRONMENT_DIR (some minutes)"
    "${PYTHON:-python3}" -m venv "$ENVIRONMENT_DIR"
    rm -f "$ENVIRONMENT_DIR/installed"
    read -r -a words <<<"$TORCH_SPEC"
    "$ENVIRONMENT_DIR/bin/python" -m pip install --quiet "${words[@]}" timm packaging numpy
    printf '%s\n' "$TORCH_SPEC" >"$ENVIRONMENT_DIR/installed"
fi
PYTHONPATH=$PN_ROOT exec "$ENVIRONMENT_DIR/bin/python" "$PN_ROOT/tests/checks/timm_models.py" ${record:+--record "$record"}
