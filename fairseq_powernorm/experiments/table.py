"""``python -m fairseq_powernorm.experiments.table``: prints the table of records."""

import os
import sys
from typing import List

from .commands import Parser, main, refuse_own_input
from .files import write_text


def parser() -> Parser:
    """The options of the command."""
    made = Parser(
        """
        Prints Markdown tables of records, one for translation and one for language models. Runs that differ only in their
        seed share a line, with the mean and, after ±, the standard deviation over the seeds.
        """
    )
    made.add("records", metavar="RECORD", nargs="+", help="records that scripts/evaluate.sh has written")
    made.add("--output", help="it gets the tables, which are printed as well")
    made.add("--available", help="leaves out records that do not exist, names them, and ends with exit status 1")
    return made


def command(arguments: List[str]) -> int:
    """Prints the tables that a command line asks for."""
    options = parser().parse(arguments)
    from .reports import schema
    from .reports.table import tables

    refuse_own_input(options.output, options.records)
    missing = [path for path in options.records if options.available and not os.path.exists(path)]
    text = tables({path: schema.read_record(path) for path in options.records if path not in missing})
    print(text, end="")
    if options.output:
        write_text(options.output, text)
    for path in missing:
        print(f"error: no record {path}", file=sys.stderr)
    return 1 if missing else 0


if __name__ == "__main__":
    main(command)
