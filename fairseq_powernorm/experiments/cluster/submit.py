"""Queues an array of runs on a cluster with SLURM: see scripts/slurm/submit.sh."""

import argparse
import os
from pathlib import Path

from ..errors import UserError, seeds
from ..runs import compose, train
from ..settings import norm_name
from . import submission


def parse(arguments):
    parser = argparse.ArgumentParser(prog="scripts/slurm/submit.sh", add_help=False, allow_abbrev=False)
    parser.add_argument("benchmark")
    for name in ("arch", "placement", "array-seeds", "records", *submission.OPTIONS):
        parser.add_argument(f"--{name}")
    for name in ("tensorboard", "resume", "dry-run"):
        parser.add_argument(f"--{name}", action="store_true")
    parser.add_argument("words", nargs="*")
    options = parser.parse_intermixed_args(arguments)
    options.norms = [word for word in options.words if "=" not in norm_name(word) and not word.startswith("~")]
    options.overrides = [word for word in options.words if word not in options.norms]
    if not options.norms:
        raise UserError(f"which norms? submit.sh {options.benchmark} NORM...; valid: {', '.join(train.NORMS)}")
    submission.check_options(options)
    options.seeds = []
    if options.array_seeds is not None:
        if "common.seed" in compose.by_key(options.overrides):
            raise UserError("--array-seeds and the override common.seed both choose the seed; give one of them")
        options.seeds = seeds("--array-seeds", options.array_seeds)
    return options


def submit(arguments):
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


def table(directory, records):
    """The command that writes the table of the records that there are."""
    script = '. scripts/lib/common.sh; pn_python table "$@"'
    return ["bash", "-c", script, "table", "--available", "--output", str(directory / "table.md"), *records]
