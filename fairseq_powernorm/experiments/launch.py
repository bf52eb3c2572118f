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
        Trains one model on several ranks (processes): on the GPUs of this machine, on its processors, or on several
        machines.
        """,
        """
        All machines need the prepared data, the same checkout, and a shared file system for the run directory. To
        continue an interrupted run, give --resume on all of them. The output of rank 0 goes to train.log, that of the
        others to logs/.
        """,
        BATCH)
    made.add("--ranks", metavar="R", read=number_from(1, MOST), group="ranks",
             help="number of ranks on this machine; default: one for each visible GPU. For ranks without a GPU add "
             "common.cpu=true")
    made.add("--nodes", group="ranks", help="start the same command on each of them, with the next two options")
    made.add("--node-rank", metavar="I", read=number_from(0, MOST), group="ranks",
             help="the number of this machine, from 0; machine 0 writes the run's records")
    made.add("--master", metavar="HOST:PORT", group="ranks",
             help=f"the address of machine 0, and a free port on it (default port: {PORT})")
    made.add("--submission", metavar="NAME", group="ranks",
             help="for scripts/slurm/train.sbatch: be one rank, a task in a job of that submission")
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
