#!/usr/bin/env bash
# Trains PN without layer scale (--norm-groups 0) on Multi30k at the authors' learning rate, 1.5e-3, for 3,000 updates, the
# last 2,000 of which use running statistics, and checks that training stays healthy: no update is skipped, every loss is
# finite, and the loss falls until the end.
#
#   tests/checks/without_layer_scale.sh [--record FILE]    FILE: a file that gets a copy of the run's record
#
# It takes about an hour on one core. Run again, it continues where it was interrupted.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/help.sh"
check_help "${BASH_SOURCE[0]}" "$@"
. "$PN_ROOT/scripts/lib/environment.sh"
scripts=$PN_ROOT/scripts
run=${PN_RUNS_ROOT:-$PN_ROOT/runs}/multi30k/power-without-layer-scale

bash "$scripts/prepare.sh" multi30k
bash "$scripts/train.sh" multi30k power --run-dir "$run" --resume +model.norm_groups=0 'optimization.lr=[0.0015]' \
    lr_scheduler.warmup_updates=1000 optimization.max_update=3000
"$PYTHON" "$PN_ROOT/tests/checks/training.py" "$run"
bash "$scripts/evaluate.sh" "$run" "$@"
