"""``python -m fairseq_powernorm.experiments.report``: writes the tables of the READMEs from the records."""

import sys
from typing import List

from ..command_line import called_as
from .commands import Parser, main
from .errors import UserError
from .files import write_text
from .paths import ROOT


def parser() -> Parser:
    """The options of the command."""
    made = Parser(
        """
        Writes the tables in README.md and results/README.md from the records. What stands between
        <!-- records: PATTERN... --> and <!-- end of records --> becomes the table of the records that match the patterns
        or, for a record of scripts/benchmark.py, its summary.
        """
    )
    made.add("--readme", flag=True, help="write the READMEs; required")
    made.add("--check", help="that is, if a table differs from its records; changes nothing")
    return made


def command(arguments: List[str]) -> int:
    """Writes or checks the tables."""
    options = parser().parse(arguments)
    if not options.readme:
        raise UserError("--readme is missing: the READMEs are what can be written")
    from .reports.readme import outdated

    status = 0
    for name, text in outdated().items():
        if text is None:
            print(f"{name} is that of its records")
        elif options.check:
            print(f"{name} is not that of its records; {called_as()} --readme writes it", file=sys.stderr)
            status = 1
        else:
            write_text(ROOT / name, text)
            print(f"{name} written")
    return status


if __name__ == "__main__":
    main(command)
