#!/usr/bin/env bash
# Trains one model with fairseq-hydra-train and the settings of configs/BENCH.yaml.
#
#   scripts/train.sh BENCH NORM [options] [overrides]
#
#   BENCH               name of a file in configs/ (demo, iwslt14, multi30k, ptb, wikitext103, wmt14), prepared by
#                       scripts/prepare.sh
#   NORM                layer, rms, batch, power-v or power, with options as in batch:variant=reference, the authors' BN
#   --arch ARCH         another architecture than that of configs/BENCH.yaml, with the settings of
#                       configs/BENCH/ARCH.yaml: ptb has transformer_lm_pn_ptb, wikitext103 has transformer_lm_pn_wiki103
#   --placement WHERE   encoder (default: NORM in the encoder's layers, layer in the decoder's, as in the paper) or all;
#                       language models have NORM in all positions
#   --run-dir DIR       default: runs/BENCH/NORM[-all][-ARCH]-seedS ($PN_RUNS_ROOT/BENCH/...), ARCH if it is
#                       not the default
#   --resume            go on with the run in that directory, with the overrides it was started with and any new ones;
#                       start it if there is none; do nothing if it has finished
#   --tensorboard       also write the curves to tensorboard/ in the run directory
#   overrides           hydra overrides of configs/BENCH.yaml, such as optimization.max_update=4000 common.seed=2;
#                       distributed_training.distributed_world_size=N trains on N GPUs of this machine instead of one
#
# The run directory holds checkpoints/, train.log (all that fairseq says), config.yaml (every setting, resolved),
# command.txt, run.json and, once training is complete, finished.json. Progress is shown every common.log_interval updates
# and, should none come for PN_PROGRESS_SECONDS (default: 60), a line that says so. Several ranks: scripts/launch.sh.
# An update takes optimization.update_freq x dataset.max_tokens tokens (or x dataset.batch_size sentences or blocks) on any
# number of GPUs: they share out optimization.update_freq, which their number must divide. What an update takes is printed.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib/common.sh"
pn_help "${BASH_SOURCE[0]}" "$@"
pn_python train "$@"
