"""``python -m fairseq_powernorm.experiments.plot_curves``: draws the learning curves of records."""

from pathlib import Path
from typing import List

from .commands import Parser, main, refuse_own_input
from .errors import UserError


def parser() -> Parser:
    """The options of the command."""
    made = Parser("Draws the validation loss over the updates as a PNG, with one line for each record.")
    made.add("records", metavar="RECORD", nargs="+", help="records that scripts/evaluate.sh has written")
    made.add("--output", help="a picture that ends in .png; required")
    return made


def command(arguments: List[str]) -> None:
    """Draws the records that a command line names."""
    options = parser().parse(arguments)
    if options.output is None:
        raise UserError("--output FILE is missing: the picture, .png")
    if not options.output.endswith(".png"):
        raise UserError(f"--output {options.output!r}: is a picture, and must end in .png")
    refuse_own_input(options.output, options.records)
    from .reports.plot_curves import plot

    plot(options.records, Path(options.output))
    print(f"wrote {options.output}")


if __name__ == "__main__":
    main(command)
