#!/usr/bin/env bash
# From a fresh checkout to a comparison of PN with LN on the artificial corpus "demo": BLEU and learning curves.
#
#   scripts/quickstart.sh
#
# At most ten minutes on two cores once everything is downloaded. Run again, it goes on where it was interrupted.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib/common.sh"
pn_help "${BASH_SOURCE[0]}" "$@"
[ $# -eq 0 ] || pn_die "scripts/quickstart.sh takes no arguments, got: $*"
. "$PN_ROOT/scripts/lib/environment.sh"
scripts=$PN_ROOT/scripts
runs=${PN_RUNS_ROOT:-$PN_ROOT/runs}/quickstart
picture=$runs/valid_loss.png
norms=(power layer)

echo "== data"
bash "$scripts/prepare.sh" demo
records=()
for norm in "${norms[@]}"; do
    echo "== training: $norm"
    bash "$scripts/train.sh" demo "$norm" --run-dir "$runs/$norm" --resume
    echo "== evaluation: $norm"
    bash "$scripts/evaluate.sh" demo "$runs/$norm"
    records+=("$runs/$norm/evaluation/record.json")
done
echo "== result"
(pn_python table "${records[@]}")
(pn_python plot_curves "${records[@]}" --output "$picture")
cat <<EOF

The demo's corpus is artificial: it shows that everything works, not which norm is better.
  learning curves   $picture
  models and logs   $runs/{$(IFS=,; echo "${norms[*]}")}/
  translations      evaluation/hyp.detok beside evaluation/ref.detok in each of them
Next, a real benchmark: bash scripts/prepare.sh multi30k && bash scripts/train.sh multi30k power
EOF
