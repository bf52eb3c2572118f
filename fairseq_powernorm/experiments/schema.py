"""``python -m fairseq_powernorm.experiments.schema``: checks that files are valid records."""

from typing import List

from .commands import Parser, main
from .files import read_json


def parser() -> Parser:
    """The options of the command."""
    made = Parser(
        """
        Checks that JSON files have the form that results/README.md describes (records, data of figures, significance
        tests, measurements of speed), and says what is wrong with the first one that has not.
        """
    )
    made.add("files", metavar="FILE", nargs="+", help="a file in results/, or one written by a command")
    return made


def command(arguments: List[str]) -> None:
    """Checks the files that a command line names."""
    options = parser().parse(arguments)
    from .reports.schema import check

    for path in options.files:
        check(read_json(path), path)
    print(f"{len(options.files)} valid")


if __name__ == "__main__":
    main(command)
