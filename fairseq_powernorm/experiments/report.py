"""``python -m fairseq_powernorm.experiments.report``: writes the tables of README.md from the records."""

from .commands import main
from .reports.report import readme

if __name__ == "__main__":
    main(readme)
