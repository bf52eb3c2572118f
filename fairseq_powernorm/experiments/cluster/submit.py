"""Queues an array of runs on a cluster with SLURM."""

import os
from argparse import Namespace
from pathlib import Path
from typing import List, Sequence

from ..errors import UserError
from ..runs import watch
from ..settings import recipe
from . import submission


def submit(options: Namespace) -> None:
    """Queues the runs, or prints what would be queued; options: of scripts/slurm/submit.sh"""
    runs = []
    for norm in options.norms:
        for seed in options.seeds or [None]:
            words = [options.benchmark, norm, *options.overrides, *([] if seed is None else [f"common.seed={seed}"])]
            for name in ("arch", "placement"):
                words += [f"--{name}", getattr(options, name)] if getattr(options, name) else []
            words += watch.words(options)
            # --resume: a job that is requeued goes on
            run = submission.Run([*words, "--resume"])
            if options.records:
                run.record = Path(os.path.abspath(options.records)) / f"{run.directory.name}.json"
                run.evaluation += ["--record", str(run.record)]
                if run.record.exists():
                    raise UserError(f"--records {options.records}: {run.record.name} is there already")
            runs.append(run)
    records = [str(run.directory / "evaluation" / "record.json") for run in runs]
    label = recipe(options.benchmark).name
    queued = submission.Submission(label, options, runs, lambda directory: table(directory, records), options.resume)
    queued.check(options.dry_run)
    if options.dry_run:
        queued.show()
    else:
        queued.queue(f"the table, {queued.directory / 'table.md'}")


def table(directory: Path, records: Sequence[str]) -> List[str]:
    """The command that writes the table of the records that there are."""
    script = '. scripts/lib/common.sh; pn_python table "$@"'
    words = ["--available", "--output", str(directory / "table.md"), *records]
    return ["bash", "-c", script, "scripts/slurm/report.sbatch", *words]
