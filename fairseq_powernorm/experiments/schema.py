"""``python -m fairseq_powernorm.experiments.schema``: checks that files are valid records."""

from .commands import main
from .reports.schema import check_files

if __name__ == "__main__":
    main(check_files)
