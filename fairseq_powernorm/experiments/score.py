"""``python -m fairseq_powernorm.experiments.score``: scores translations against a reference."""

from .commands import main
from .evaluation.score import score

if __name__ == "__main__":
    main(score)
