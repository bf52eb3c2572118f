#!/usr/bin/env bash
# Trains and evaluates LN, BN, PN-V and PN on Penn Treebank in the tensorized and in the plain Transformer, with the
# same settings (configs/ptb.yaml) and the same number of updates for all, and prints the table.
#
#   scripts/compare_ptb.sh [options] [overrides]
#
#   --updates N         updates of each run; default: optimization.max_update of configs/ptb.yaml. The warm-up (of the
#                       learning rate and of PN) is a tenth of N, the cosine ends at N
#   --seed S            default: 1
#   --norms LIST        default: layer,batch,power-v,power
#   --archs LIST        default: tensorized_lm_pn_ptb,transformer_lm_pn_ptb
#   --records DIR       where the records go; default: results/ptb
#   overrides           hydra overrides for every run, such as common.cpu=true
#
# The runs lie in runs/ptb/ ($PN_RUNS_ROOT/ptb), the number of updates in their names. Run again, it goes on where it
# was interrupted, run by run. Once the data is prepared it can be started twice, say with one of the archs each.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib/common.sh"
pn_help "${BASH_SOURCE[0]}" "$@"
. "$PN_ROOT/scripts/lib/environment.sh"
scripts=$PN_ROOT/scripts
updates=$(PYTHONPATH=$scripts/lib "$PYTHON" -c 'import settings; print(settings.load("ptb").optimization.max_update)')
seed=1 norms=layer,batch,power-v,power archs=tensorized_lm_pn_ptb,transformer_lm_pn_ptb results=$PN_ROOT/results/ptb
overrides=()
while [ $# -gt 0 ]; do
    case $1 in
        --updates | --seed | --norms | --archs | --records)
            [ $# -gt 1 ] || pn_die "$1 needs a value; see --help"
            case $1 in
                --updates) updates=$2 ;;
                --seed) seed=$2 ;;
                --norms) norms=$2 ;;
                --archs) archs=$2 ;;
                --records) results=$2 ;;
            esac
            shift 2
            ;;
        -*) pn_die "option $1 is unknown; valid: --updates, --seed, --norms, --archs, --records, --help" ;;
        *)
            overrides+=("$1")
            shift
            ;;
    esac
done
[[ $updates =~ ^[1-9][0-9]*$ ]] && [ "$updates" -ge 10 ] || pn_die "--updates '$updates': must be a number, 10 or more"
[[ $seed =~ ^[0-9]+$ ]] || pn_die "--seed '$seed': must be a number"
# Both lists are checked before the first run, as train.sh would check them.
"$PYTHON" - "$scripts/lib" "$norms" "$archs" <<'PYTHON'
import sys
sys.path.insert(0, sys.argv[1])
from settings import NORMS, architectures, choose, main
def check():
    for option, values, valid in (("--norms", sys.argv[2], NORMS), ("--archs", sys.argv[3], architectures("ptb"))):
        for value in values.split(","):
            choose(option, value, valid)
main(check)
PYTHON

echo "== data"
[ -f "${PN_DATA_ROOT:-$PN_ROOT/data}/ptb/prepared.json" ] || bash "$scripts/prepare.sh" ptb
records=()
for arch in ${archs//,/ }; do
    for norm in ${norms//,/ }; do
        run=${PN_RUNS_ROOT:-$PN_ROOT/runs}/ptb/$norm-$arch-$updates-seed$seed
        record=$results/$norm-$arch-$updates-seed$seed.json
        echo "== $arch, $norm"
        bash "$scripts/train.sh" ptb "$norm" --arch "$arch" --run-dir "$run" --resume "common.seed=$seed" \
            "optimization.max_update=$updates" "lr_scheduler.warmup_updates=$((updates / 10))" \
            ${overrides[@]+"${overrides[@]}"}
        bash "$scripts/evaluate.sh" ptb "$run" --record "$record"
        records+=("$record")
    done
done
echo "== result"
"$PYTHON" "$scripts/lib/table.py" "${records[@]}"
