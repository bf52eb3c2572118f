"""``python -m fairseq_powernorm.experiments.status``, or ``scripts/status.sh``: shows how runs are doing."""

from typing import Sequence

from .commands import Parser, main


def parser() -> Parser:
    """The options of the command."""
    made = Parser(
        "Shows how runs are doing: state, updates, validation loss, time left, last whole checkpoint, restarts.",
        """
        States: queued (a job waits), running, finished, diverged (losses, or weights, are not finite), failed (training
        ended by an error), interrupted (it was stopped or killed, and nobody goes on with it), unreadable (its files are
        not those of a run). Updates are those of the log or, if they are more, of the checkpoints. "restarts" are the
        sessions after the first. It reads only.
        """)
    made.add("directories", metavar="DIR", nargs="*",
             help="run directories, or directories with runs anywhere below; default: runs/ ($PN_RUNS_ROOT)")
    return made


def command(arguments: Sequence[str]) -> None:
    """Shows the runs that a command line names."""
    options = parser().parse(arguments)
    from .runs.status import status

    status(options.directories)


if __name__ == "__main__":
    main(command)
