"""``python -m fairseq_powernorm.experiments.prepare``, or ``scripts/prepare.sh``:
makes a benchmark's data ready for training.
"""

from .commands import main
from .data.prepare import prepare_or_refuse

if __name__ == "__main__":
    main(prepare_or_refuse)
