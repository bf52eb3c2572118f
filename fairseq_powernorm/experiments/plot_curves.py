"""``python -m fairseq_powernorm.experiments.plot_curves``: draws the learning curves of records."""

from .commands import main
from .reports.plot_curves import plot

if __name__ == "__main__":
    main(plot)
