"""``python -m fairseq_powernorm.experiments.status``, or ``scripts/status.sh``: shows how runs are doing."""

from .commands import main
from .runs.status import status

if __name__ == "__main__":
    main(status)
