"""``python -m fairseq_powernorm.experiments.status``, or ``scripts/status.sh``: shows how runs are doing."""

from typing import Sequence

from .commands import Parser, main


def parser() -> Parser:
    """The options of the command."""
    made = Parser(
        "Shows how runs are doing: state, updates, validation loss, time left, last complete checkpoint, restarts.",
        """
        States: queued (waiting for a job to start), running, finished, diverged (losses or weights are not finite), failed
        (training ended with an error), interrupted (stopped or killed, and not resumed), unreadable (the files are not those
        of a run). Updates are counted from the log or, where they show more, from the checkpoints. Restarts are the
        times that the run was resumed. The command only reads.
        """)
    made.add("directories", metavar="DIR", nargs="*",
             help="run directories, or directories that contain runs at any depth; default: runs/ ($PN_RUNS_ROOT)")
    return made


def command(arguments: Sequence[str]) -> None:
    """Shows the runs that a command line names."""
    options = parser().parse(arguments)
    from .runs.status import status

    status(options.directories)


if __name__ == "__main__":
    main(command)
