"""Queues an array of runs on a cluster with SLURM."""

import os
from argparse import Namespace
from pathlib import Path
from typing import List, Sequence

from ..commands import Parser, add_benchmark, add_norm, add_seeds, add_slurm
from ..errors import UserError
from ..overrides import by_key
from ..runs import train
from . import submission


def parse(arguments: Sequence[str]) -> Namespace:
    """The options of the command line."""
    parser = Parser(
        """
        Queues training of one or more norms, with one or more seeds, on a cluster with SLURM: an array with a job for
        each run, one that evaluates each run once it has ended well, and, behind all of these, a job that makes the
        table.
        """,
        """
        Everything is checked before anything is queued. A submission has a directory, runs/slurm/BENCH-DATE-TIME
        ($PN_RUNS_ROOT): tasks and evaluations (the arguments of each job), logs/ and, in the end, table.md, which lacks
        the runs that failed. Runs lie where scripts/train.sh puts them. scripts/status.sh shows how they are doing;
        scancel ends them.
        """)
    add_benchmark(parser, "the benchmark, prepared by scripts/prepare.sh")
    add_norm(parser, "+")
    add_seeds(parser, "--array-seeds", help="a run of each norm for each of these seeds, such as 1,2,3; default: "
                                            "common.seed of configs/BENCH.yaml")
    parser.add("--resume", flag=True, help="go on with runs that are there, and start those that are not")
    train.add_training(parser)
    parser.add("--records", metavar="DIR", help="evaluate.sh's record of each run, copied to DIR/RUN.json")
    parser.add("--dry-run", flag=True,
               help="print the batch scripts and the commands, queue nothing; needs no SLURM")
    add_slurm(parser)
    options = parser.parse(arguments)
    submission.check_options(options)
    if options.seeds is not None and "common.seed" in by_key(options.overrides):
        raise UserError("--array-seeds and the override common.seed both choose the seed; give one of them")
    return options


def submit(arguments: Sequence[str]) -> None:
    """Queues the runs, or prints what would be queued."""
    options = parse(arguments)
    runs = []
    for norm in options.norms:
        for seed in options.seeds or [None]:
            words = [options.benchmark, norm, *options.overrides, *([] if seed is None else [f"common.seed={seed}"])]
            for name in ("arch", "placement"):
                words += [f"--{name}", getattr(options, name)] if getattr(options, name) else []
            words += ["--tensorboard"] if options.tensorboard else []
            # --resume: a job that is requeued goes on
            run = submission.Run([*words, "--resume"])
            if options.records:
                run.record = Path(os.path.abspath(options.records)) / f"{run.directory.name}.json"
                run.evaluation += ["--record", str(run.record)]
                if run.record.exists():
                    raise UserError(f"--records {options.records}: {run.record.name} is there already")
            runs.append(run)
    records = [str(run.directory / "evaluation" / "record.json") for run in runs]
    queued = submission.Submission(options.benchmark, options, runs, lambda directory: table(directory, records),
                                   options.resume)
    queued.check(options.dry_run)
    if options.dry_run:
        queued.show()
    else:
        queued.queue(f"the table, {queued.directory / 'table.md'}")


def table(directory: Path, records: Sequence[str]) -> List[str]:
    """The command that writes the table of the records that there are."""
    script = '. scripts/lib/common.sh; pn_python table "$@"'
    return ["bash", "-c", script, "table", "--available", "--output", str(directory / "table.md"), *records]
