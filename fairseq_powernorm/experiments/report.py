"""``python -m fairseq_powernorm.experiments.report``: writes the tables of README.md from the records."""

import sys
from typing import List

from .commands import Parser, called_as, main
from .errors import UserError


def parser() -> Parser:
    """The options of the command."""
    made = Parser(
        """
        Writes the tables of README.md: between <!-- records: PATTERN... --> and <!-- end of records --> stands the
        table of the records that the patterns name, or what a record of scripts/benchmark.py says in short.
        """
    )
    made.add("--readme", flag=True, help="write README.md; has to be given")
    made.add("--check", flag=True, help="change nothing, and fail if a table is not that of its records")
    return made


def command(arguments: List[str]) -> int:
    """Writes or checks the tables."""
    options = parser().parse(arguments)
    if not options.readme:
        raise UserError("--readme is missing: README.md is what can be written")
    from .reports import readme

    if not options.check:
        print("README.md written" if readme.write() else "README.md is that of its records")
        return 0
    text = readme.README.read_text(encoding="utf-8")
    if readme.up_to_date(text) != text:
        print(f"README.md is not that of its records; {called_as()} --readme writes it", file=sys.stderr)
        return 1
    print("README.md is that of its records")
    return 0


if __name__ == "__main__":
    main(command)
