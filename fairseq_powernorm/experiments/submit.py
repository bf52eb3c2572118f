"""``python -m fairseq_powernorm.experiments.submit``, or ``scripts/slurm/submit.sh``:
queues runs on a cluster with SLURM.
"""

from .cluster.submit import submit
from .commands import main

if __name__ == "__main__":
    main(submit)
