"""``python -m fairseq_powernorm.experiments.launch``, or ``scripts/launch.sh``: trains one model on several ranks."""

from .commands import main
from .runs.launch import launch

if __name__ == "__main__":
    main(launch)
