"""``python -m fairseq_powernorm.experiments.train``, or ``scripts/train.sh``: trains one model."""

from .commands import main
from .runs.train import train

if __name__ == "__main__":
    main(train)
