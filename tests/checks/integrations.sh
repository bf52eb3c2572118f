#!/usr/bin/env bash
# Runs the tests of the integrations with the lowest versions that setup.py allows of accelerate, lightning and transformers.
#
#   tests/checks/integrations.sh [pytest arguments]
#
# Environment variables:
#   ENVIRONMENT_DIR     virtual environment, made on first use; default: .venv-integrations in the repository
#   PYTHON              the Python to make it with, which must be 3.11; default: python3
#   TORCH_SPEC          torch, as arguments of pip; default: torch==2.13.0
#
# Run again, it uses the same environment. Remove that directory to free the space.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/help.sh"
check_help "${BASH_SOURCE[0]}" "$@"

ENVIRONMENT_DIR=${ENVIRONMENT_DIR:-$PN_ROOT/.venv-integrations}
TORCH_SPEC=${TORCH_SPEC:-torch==2.13.0}
floors=$(grep -oE '"(accelerate|lightning|transformers)>=[0-9.]+' "$PN_ROOT/setup.py" | tr -d '"' | sed 's/>=/==/' | tr '\n' ' ')
if [ "$(cat "$ENVIRONMENT_DIR/installed" 2>/dev/null)" != "$TORCH_SPEC $floors" ]; then
    echo "making $ENVIRONMENT_DIR with $floors(some minutes)"
    "${PYTHON:-python3}" -m venv "$ENVIRONMENT_DIR"
    rm -f "$ENVIRONMENT_DIR/installed"
    read -r -a words <<<"$TORCH_SPEC"
    "$ENVIRONMENT_DIR/bin/python" -m pip install --quiet "${words[@]}"
    read -r -a words <<<"$floors"
    "$ENVIRONMENT_DIR/bin/python" -m pip install --quiet "${words[@]}" -e "$PN_ROOT[data,plots,test]"
    printf '%s\n' "$TORCH_SPEC $floors" >"$ENVIRONMENT_DIR/installed"
fi
cd "$PN_ROOT"
exec "$ENVIRONMENT_DIR/bin/python" -m pytest -q tests/integrations "$@"
