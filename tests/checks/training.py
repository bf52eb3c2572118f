"""Checks that a training run was healthy: no update skipped, every logged loss finite, lower at the end than before.

python tests/checks/training.py RUN_DIR
"""

import math
import sys
from pathlib import Path

from fairseq_powernorm.experiments.commands import main
from fairseq_powernorm.experiments.errors import UserError
from fairseq_powernorm.experiments.runs import trainlog


def check(arguments):
    if len(arguments) != 1:
        raise UserError(__doc__.strip().splitlines()[-1])
    log = Path(arguments[0]) / "train.log"
    if not log.is_file():
        raise UserError(f"{arguments[0]} holds no train.log; it must be the directory of a run of scripts/train.sh")
    with open(log, encoding="utf-8", errors="replace") as lines:
        found = [entry for entry in map(trainlog.parse_line, lines) if entry]
    losses = [float(entry["loss"]) for entry in found if "loss" in entry and "num_updates" in entry]
    skipped = sum(any(key.endswith("norm_nonfinite") and float(entry[key]) > 0 for key in entry) for entry in found)
    curve = trainlog.curve(log)["train"]
    if skipped or not losses or not all(map(math.isfinite, losses)):
        raise UserError(f"{log}: {skipped} entries with statistics or gradients that were not finite, losses {losses[-5:]}")
    if len(curve) < 2 or not curve[-1]["loss"] < 0.75 * curve[0]["loss"]:
        raise UserError(f"{log}: the loss does not fall: {[entry['loss'] for entry in curve]}")
    print(f"healthy: {trainlog.updates({'train': curve}):,} updates, every loss finite, "
          f"{curve[0]['loss']:.3f} in the first epoch, {curve[-1]['loss']:.3f} in the last")
    return 0


if __name__ == "__main__":
    main(check, sys.argv[1:])
