"""``python -m fairseq_powernorm.experiments.reproduce``, or ``scripts/reproduce_*.sh``:
trains, evaluates and reports the rows of the paper's tables.
"""

from .commands import main
from .reports.reproduce import reproduce

if __name__ == "__main__":
    main(reproduce)
