"""What stands in the queue of a cluster: an array that trains runs, one that evaluates each, a report of all.

scripts/slurm/submit.sh queues norms x seeds, the scripts that reproduce the tables (--slurm) the rows of theirs.
"""

import contextlib
import os
import shlex
import shutil
import sys
import time
from argparse import Namespace
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, List, Optional, Sequence, Tuple

from ..directories import check_writable, in_use
from ..errors import UserError
from ..paths import ROOT, data_root, for_fairseq, runs_root
from ..recipes import LARGEST_COMPARED, check_outputs, prepared
from ..runs import batch, claims, launchers, train
from ..settings import recipe
from ..train import parse
from . import slurm
from .site import SCRIPTS, Site

OPTIONS = ("nodes", "gpus", "time", "partition", "site", "log-dir")


def check_options(options: Namespace) -> None:
    """Fills in --nodes and --gpus; refuses what cannot be."""
    options.nodes = options.nodes or 1
    options.gpus = options.gpus or options.nodes
    if options.gpus % options.nodes:
        raise UserError(f"--gpus {options.gpus} cannot be divided among --nodes {options.nodes}: it is the number of "
                        f"GPUs of all nodes together, and each node has as many as the others")


class Run:
    """One run of a submission.

    words: arguments of train.sh, --resume among them; evaluation: those of evaluate.sh, by default the run's directory;
    record: the file to which evaluate.sh copies the record, or None
    """

    def __init__(
        self, words: List[str], evaluation: Optional[List[str]] = None, record: Optional[Path] = None
    ):
        self.options, self.config = parse(words)
        self.benchmark = self.options.benchmark
        self.directory = train.run_directory(self.options, self.config)
        self.record = record
        self.arguments = [*words, *([] if self.options.run_dir else ["--run-dir", str(self.directory)])]
        self.evaluation = evaluation or [str(self.directory)]
        launchers.Launcher().check_overrides(self.options.overrides)


class Submission:
    """Runs to be queued together, and what makes a report of them.

    options: those of OPTIONS, checked by check_options(); resume: may runs be there already?; report: words of the command,
    given the submission's directory; after: jobs of others that the report is to wait for
    """

    def __init__(
        self,
        label: str,
        options: Namespace,
        runs: Sequence[Run],
        report: Callable[[Path], List[str]],
        resume: bool,
        after: Iterable[str] = (),
    ):
        self.options, self.runs, self.resume = options, runs, resume
        self.site = Site(options)
        self.directory = runs_root() / "slurm" / f"{label}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
        self.name = self.directory.name
        self.logs = Path(os.path.abspath(options.log_dir)) if options.log_dir else self.directory / "logs"
        self.report, self.after = report(self.directory), list(after)

    def check(self, dry_run: bool = False) -> None:
        """Refuses whatever would fail. dry_run: without SLURM."""
        directories = [run.directory for run in self.runs]
        twice = sorted(str(name) for name in set(directories) if directories.count(name) > 1)
        if twice:
            raise UserError(f"two runs of this submission have the directory {twice[0]}; each norm and each seed only once")
        for word in (*(word for run in self.runs for word in (*run.arguments, *run.evaluation)), *self.report,
                     str(self.site.path)):
            if not word.isprintable():
                raise UserError(f"{word!r} has characters that cannot be printed; a job's arguments are a line of a file")
        data: Dict[str, Path] = {}
        for name in sorted({run.benchmark for run in self.runs}):
            data[name], stamp = prepared(recipe(name).data)
            check_outputs(data[name], stamp, "data-bin/", largest=LARGEST_COMPARED)
        for run in self.runs:
            for_fairseq("run directory", run.directory)
        for what, path in (("submission's directory (PN_RUNS_ROOT)", self.directory), ("log directory", self.logs)):
            if "%" in str(for_fairseq(what, path)):
                raise UserError(f"{what} {str(path)!r}: SLURM reads '%' as the beginning of a pattern")
        check_writable("--log-dir" if self.options.log_dir else "the log directory", self.logs)
        check_writable("the submissions' directory", self.directory.parent)
        for place in sorted({run.directory.parent for run in self.runs}):
            check_writable("the runs' directory", place)
        for place in sorted({run.record.parent for run in self.runs if run.record}):
            check_writable("the records' directory", place)
        if not dry_run:
            slurm.check_installed()
        self.check_runs(dry_run)
        self.check_settings(data)
        if not dry_run:
            for command in (self.training(), self.evaluation("1"), self.reporting("1")):
                slurm.check_options(command)

    def check_runs(self, dry_run: bool) -> None:
        """Refuses runs that are there, in use or queued."""
        queue: slurm.Queue = {}
        with contextlib.suppress(*((UserError,) if dry_run else ())):
            queue = slurm.tasks()
        for run in self.runs:
            if train.begun(run.directory) and not self.resume:
                raise UserError(f"{run.directory} exists already; --resume goes on with it")
            if in_use(run.directory):
                raise UserError(f"another process is at work in {run.directory}")
            for job in claims.jobs_of(run.directory, queue):
                raise UserError(f"{run.directory} belongs to job {job.job}, which is {job.state}; "
                                f"scancel {job.job} ends it")

    def check_settings(self, data: Dict[str, Path]) -> None:
        """Refuses settings that build no model, and runs that were started with others; says what an update takes."""
        built: Dict[Tuple[str, str, str], Any] = {}
        for run in self.runs:
            facts = train.started(run.options, data[run.benchmark], run.directory, launchers.Launcher())
            key = (run.benchmark, run.options.arch, run.options.norm)
            if key in built:  # seeds make no difference
                continue
            built[key] = config = train.composed(run.options, run.config, facts, data[run.benchmark], run.directory)[1]
            batch.update_freq(config, self.options.gpus)
        ranks = self.options.gpus // self.options.nodes
        told = set()
        for (benchmark, arch, _), config in built.items():
            if (benchmark, arch) in told:
                continue
            told.add((benchmark, arch))
            if config.checkpoint.save_interval_updates <= 0:
                name = recipe(benchmark).name
                print(f"note: {name} saves at the end of an epoch only; a job that is stopped repeats what it did of one "
                      "(checkpoint.save_interval_updates=N checkpoint.keep_interval_updates=K saves, and validates, within)")
            print(f"each run of {arch}: {self.options.nodes} node(s) x {ranks} rank(s); "
                  f"{batch.described(config, self.options.gpus)}")

    def files(self) -> Dict[str, str]:
        """What stands in the submission's directory: name -> text. Task i of an array takes line i + 1."""
        return {
            "tasks": "".join(shlex.join(run.arguments) + "\n" for run in self.runs),
            "evaluations": "".join(shlex.join(run.evaluation) + "\n" for run in self.runs),
            "report": shlex.join(self.report) + "\n",
            "submission.sh": "".join(f"export {name}={shlex.quote(str(value))}\n" for name, value in (
                ("PN_SITE", self.site.path), ("PN_DATA_ROOT", data_root()), ("PN_RUNS_ROOT", runs_root()),
                *([] if self.site.container else [("PYTHON", sys.executable)]))),
        }

    def job(self, script: str, *options: str, nodes: int = 1, ranks: int = 1, name: Optional[str] = None) -> List[str]:
        """The command that queues a batch script."""
        return ["sbatch", "--parsable", f"--job-name={name or self.name}", "--export=ALL", *options, f"--nodes={nodes}",
                f"--ntasks-per-node={ranks}", *self.site.options(ranks), str(SCRIPTS / script), str(ROOT),
                str(self.directory)]

    def training(self) -> List[str]:
        """The command that queues the training of all runs."""
        return self.job("train.sbatch", "--hold", f"--array=0-{len(self.runs) - 1}",
                        f"--signal=B:USR1@{self.site.warning}", f"--output={self.logs}/%A_%a.log",
                        nodes=self.options.nodes, ranks=self.options.gpus // self.options.nodes)

    def evaluation(self, array: str) -> List[str]:
        """The command that queues the evaluations: each task waits for that of the same number to end well."""
        return self.job("evaluate.sbatch", f"--array=0-{len(self.runs) - 1}", f"--dependency=aftercorr:{array}",
                        "--kill-on-invalid-dep=yes", f"--output={self.logs}/%A_%a-evaluation.log",
                        name=self.name + claims.EVALUATION)

    def reporting(self, evaluations: str) -> List[str]:
        """The command that queues the report, to begin when all evaluations have ended."""
        return self.job("report.sbatch", f"--dependency=afterany:{':'.join([evaluations, *self.after])}",
                        f"--output={self.logs}/%j-report.log", name=f"{self.name}-report")

    def show(self) -> None:
        """Prints the batch scripts, all files and the commands."""
        for name in ("train.sbatch", "evaluate.sbatch", "report.sbatch", "job.sh"):
            print(f"# ---- scripts/slurm/{name}\n{(SCRIPTS / name).read_text(encoding='utf-8')}")
        for name, text in self.files().items():
            print(f"# ---- {self.directory}/{name}\n{text}")
        print("# ---- commands; TRAINING and EVALUATION are the numbers that the first two print")
        for command in (self.training(), self.evaluation("TRAINING"), self.reporting("EVALUATION"),
                        ["scontrol", "release", "TRAINING"]):
            print(shlex.join(command))

    def queue(self, what: str) -> None:
        """Writes the submission and queues its jobs: all of them or, should one be refused, none. what: the report"""
        self.directory.mkdir(parents=True)
        jobs: List[str] = []
        claimed: List[Path] = []
        try:
            self.logs.mkdir(parents=True, exist_ok=True)
            for name, text in self.files().items():
                (self.directory / name).write_text(text, encoding="utf-8")
            for task, run in enumerate(self.runs):
                claimed.append(claims.write_claim(run.directory, self.name, task))
            jobs.append(slurm.sbatch(self.training()))
            jobs.append(slurm.sbatch(self.evaluation(jobs[0])))
            jobs.append(slurm.sbatch(self.reporting(jobs[1])))
            slurm.client("scontrol", "release", jobs[0])
        except BaseException:
            for job in jobs:
                with contextlib.suppress(UserError):
                    slurm.client("scancel", job)
            for claim in claimed:
                claim.unlink()
            shutil.rmtree(self.directory, ignore_errors=True)
            raise
        for task, run in enumerate(self.runs):
            print(f"job {jobs[0]}_{task}: {run.directory}")
        print(f"job {jobs[1]}_I: evaluation of job {jobs[0]}_I, once that has ended well\n"
              f"job {jobs[2]}: {what}, after all of them\n"
              f"logs: {self.logs}\nhow they are doing: scripts/status.sh; end them: scancel {' '.join(jobs)}")
