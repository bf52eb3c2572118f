"""``python -m fairseq_powernorm.experiments.table``: prints the table of records."""

from .commands import main
from .reports.table import table

if __name__ == "__main__":
    main(table)
