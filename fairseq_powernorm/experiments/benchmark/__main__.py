"""``python -m fairseq_powernorm.experiments.benchmark``, or ``python scripts/benchmark.py``: measures the norms."""

from ..commands import main
from .measure import benchmark as command
from .options import parser

__all__ = ["command", "parser"]

if __name__ == "__main__":
    main(command)
