"""``python -m fairseq_powernorm.experiments.submit``, or ``scripts/slurm/submit.sh``: queues runs on a cluster."""

from argparse import Namespace
from typing import Sequence

from .commands import Parser, add_benchmark, add_norm, add_slurm, main
from .errors import UserError
from .overrides import by_key
from .train import add_training


def parser() -> Parser:
    """The options of the command."""
    made = Parser(
        """
        Queues the training of one or more norms, with one or more seeds, on a cluster with SLURM: an array with one job
        for each run, a job that evaluates each run after it has finished, and a last job that writes the table.
        """,
        """
        Everything is checked before anything is queued. A submission has its own directory,
        runs/slurm/BENCH-DATE-TIME ($PN_RUNS_ROOT). It holds tasks and evaluations (the arguments of each job), logs/ and,
        in the end, table.md, without the runs that failed. The runs themselves go where scripts/train.sh puts them.
        Use scripts/status.sh to see how they are doing, and scancel to end them.
        """)
    add_benchmark(made, "what is trained, prepared by scripts/prepare.sh")
    add_norm(made, "+")
    made.add("--seeds", help="default: common.seed of configs/BENCH.yaml")
    made.add("--resume")
    add_training(made, "--nodes and --gpus")
    made.add("--records", metavar="DIR", help="copy the record of each run, which evaluate.sh writes, to DIR/RUN.json")
    made.add("--dry-run", help="shows the batch scripts and the commands that queue them; needs no SLURM")
    add_slurm(made)
    return made


def parse(arguments: Sequence[str]) -> Namespace:
    """The options of a command line."""
    options = parser().parse(arguments)
    from .cluster.submission import check_options
    from .runs import watch

    check_options(options)
    watch.check(options)
    if options.seeds is not None and "common.seed" in by_key(options.overrides):
        raise UserError("--seeds and the override common.seed both choose the seed; give one of them")
    return options


def command(arguments: Sequence[str]) -> None:
    """Queues what a command line asks for."""
    options = parse(arguments)
    from .cluster.submit import submit

    submit(options)


if __name__ == "__main__":
    main(command)
