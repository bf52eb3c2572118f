"""``python -m fairseq_powernorm.experiments.evaluate``, or ``scripts/evaluate.sh``:
evaluates a trained model and writes its record.
"""

from .commands import main
from .evaluation.evaluate import evaluate

if __name__ == "__main__":
    main(evaluate)
