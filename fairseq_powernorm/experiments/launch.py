"""``python -m fairseq_powernorm.experiments.launch``, or ``scripts/launch.sh``: trains one model on several ranks."""

from argparse import Namespace
from typing import Any, Sequence, Tuple

from ..command_options import MOST
from .commands import Parser, main, number_from
from .runs.launchers import PORT, Launcher, launcher_of
from .train import BATCH, add_run


def parser() -> Parser:
    """The options of the command."""
    made = Parser(
        """
        Trains one model on several ranks, a process each: the GPUs of this machine, its processors, or those of many
        machines.
        """,
        """
        All machines need the prepared data, the same checkout and a common file system for the run directory.
        Interrupted, a run goes on with --resume on all machines. rank 0's output is train.log, that of the others logs/.
        """,
        BATCH)
    made.add("--ranks", metavar="R", read=number_from(1, MOST), group="ranks",
             help="ranks on this machine; default: its visible GPUs. Ranks without a GPU: common.cpu=true")
    made.add("--nodes", group="ranks", help="the same command is started on each of them, with the next two options")
    made.add("--node-rank", metavar="I", read=number_from(0, MOST), group="ranks",
             help="the number of the machine, from 0; the first one writes the run's records")
    made.add("--master", metavar="HOST:PORT", group="ranks",
             help=f"the first machine, and a free port there (default port: {PORT})")
    made.add("--submission", metavar="NAME", group="ranks",
             help="be one rank, a task of that submission's job: scripts/slurm/train.sbatch says so")
    add_run(made, "--ranks, --nodes, --node-rank and --master")
    return made


def parse(arguments: Sequence[str]) -> Tuple[Launcher, Namespace, Any]:
    """(what starts the ranks, the options of a command line, the benchmark's configuration)"""
    options = parser().parse(arguments)
    from .runs.train import checked

    return launcher_of(options), options, checked(options)


def command(arguments: Sequence[str]) -> int:
    """Trains what a command line asks for."""
    launcher, options, config = parse(arguments)
    from .runs.train import train

    return train(options, config, launcher)


if __name__ == "__main__":
    main(command)
