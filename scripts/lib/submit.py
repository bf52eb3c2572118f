"""Queues an array of runs on a cluster with SLURM: see scripts/slurm/submit.sh."""

import argparse
import contextlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import launch
import slurm
import train
from settings import ROOT, UserError, in_use, main, prepared, read_json, runs_root

HERE = ROOT / "scripts" / "slurm"
SITE = ("PN_ACCOUNT", "PN_PARTITION", "PN_TIME", "PN_CPUS_PER_TASK", "PN_GRES", "PN_WARNING")


def parse(arguments):
    parser = argparse.ArgumentParser(prog="scripts/slurm/submit.sh", add_help=False, allow_abbrev=False)
    parser.add_argument("benchmark")
    for name in ("arch", "placement", "array-seeds", "time", "partition", "site", "log-dir", "records"):
        parser.add_argument(f"--{name}")
    parser.add_argument("--nodes", default="1")
    parser.add_argument("--gpus")
    for name in ("tensorboard", "resume", "dry-run"):
        parser.add_argument(f"--{name}", action="store_true")
    parser.add_argument("words", nargs="*")
    options = parser.parse_intermixed_args(arguments)
    options.norms = [word for word in options.words if "=" not in word and not word.startswith("~")]
    options.overrides = [word for word in options.words if word not in options.norms]
    if not options.norms:
        raise UserError(f"which norms? submit.sh {options.benchmark} NORM...; valid: {', '.join(train.NORMS)}")
    options.nodes, options.gpus = number("--nodes", options.nodes), number("--gpus", options.gpus or options.nodes)
    if options.gpus % options.nodes:
        raise UserError(f"--gpus {options.gpus} cannot be divided among --nodes {options.nodes}: it is the number of GPUs "
                        f"of all nodes together, and each node has as many as the others")
    options.seeds = []
    if options.array_seeds is not None:
        if not re.fullmatch(r"\d+(,\d+)*", options.array_seeds):
            raise UserError(f"--array-seeds {options.array_seeds!r}: must be numbers with commas, such as 1,2,3")
        if any(word.startswith("common.seed=") for word in options.overrides):
            raise UserError("--array-seeds and the override common.seed both choose the seed; give one of them")
        options.seeds = options.array_seeds.split(",")
    return options


def number(option, text):
    if not re.fullmatch(r"[1-9]\d*", str(text)):
        raise UserError(f"{option} {text!r}: must be a number, 1 or more")
    return int(text)


def seconds(option, text):
    """The length of a time as sbatch takes it: M, M:S, H:M:S, D-H, D-H:M or D-H:M:S."""
    found = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text)
    if not found:
        raise UserError(f"{option} {text!r} is no time limit; valid: MINUTES, HOURS:MINUTES:SECONDS, DAYS-HOURS")
    days, first, second, third = (int(group or 0) for group in found.groups())
    if found[1] is not None or found[4] is not None:
        return days * 86400 + first * 3600 + second * 60 + third
    return first * 60 + second


class Site:
    """A cluster's settings: those of site.example.sh where the file does not give its own."""

    def __init__(self, options):
        chosen = options.site or os.environ.get("PN_SLURM_SITE")
        usual = HERE / "site.sh"
        self.path = Path(os.path.abspath(chosen or (usual if usual.exists() else HERE / "site.example.sh")))
        if not self.path.is_file():
            raise UserError(f"site file {self.path} does not exist; copy scripts/slurm/site.example.sh there")
        script = "set -eu; . \"$1\"; . \"$2\"; printf '%s\\0' " + " ".join(f'"${name}"' for name in SITE) + \
            ' "${#PN_CONTAINER[@]}" ${PN_SBATCH[@]+"${PN_SBATCH[@]}"}'
        done = subprocess.run(["bash", "-c", script, "site", str(HERE / "site.example.sh"), str(self.path)],
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, stdin=subprocess.DEVNULL)
        if done.returncode:
            raise UserError(f"site file {self.path} does not work: {done.stderr.strip()}")
        values = done.stdout.split("\0")[:-1]
        (self.account, self.partition, self.time, cpus, self.gres, warning, container), self.sbatch = values[:7], values[7:]
        self.cpus, self.warning = number("PN_CPUS_PER_TASK", cpus), number("PN_WARNING", warning)
        self.container = container != "0"
        self.partition = options.partition or self.partition
        limit = options.time or self.time
        # SLURM looks every half minute and warns as much earlier
        if limit and seconds("--time" if options.time else f"PN_TIME of {self.path}", limit) <= self.warning + 30:
            raise UserError(f"--time {limit}: must be more than {self.warning + 30} s, for a job stops and requeues itself "
                            f"{self.warning} s before its limit (PN_WARNING of {self.path}), and up to 30 s earlier")
        self.time = limit

    def options(self, per_node):
        """The options of sbatch that every job has."""
        chosen = [("account", self.account), ("partition", self.partition), ("time", self.time),
                  ("cpus-per-task", self.cpus), ("gres", f"{self.gres}:{per_node}" if self.gres else "")]
        return [*(f"--{name}={value}" for name, value in chosen if value), *self.sbatch]


class Run:
    """One run of a submission: its directory, and its arguments for launch.sh."""

    def __init__(self, options, norm, seed):
        words = [options.benchmark, norm, *options.overrides, *([f"common.seed={seed}"] if seed else [])]
        for name in ("arch", "placement"):
            words += [f"--{name}", getattr(options, name)] if getattr(options, name) else []
        words += ["--tensorboard"] if options.tensorboard else []
        self.options, self.config = train.parse(words)
        self.directory = train.run_directory(self.options, self.config)
        # --resume: a job that is requeued goes on
        self.arguments = [*words, "--run-dir", str(self.directory), "--resume"]
        self.launcher = launch.Launcher()
        self.launcher.check_overrides(self.options.overrides)


def submit(arguments):
    options = parse(arguments)
    runs = [Run(options, norm, seed) for norm in options.norms for seed in options.seeds or [None]]
    names = [str(run.directory) for run in runs]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(f"two runs of this submission have the directory {twice[0]}; each norm and each seed only once")
    site = Site(options)
    data, _ = prepared(options.benchmark)
    submission = runs_root() / "slurm" / f"{options.benchmark}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    logs = Path(os.path.abspath(options.log_dir)) if options.log_dir else submission / "logs"
    check_writable("--log-dir" if options.log_dir else "the log directory", logs)
    for place in {run.directory.parent for run in runs}:
        check_writable("the runs' directory", place)
    records = os.path.abspath(options.records) if options.records else ""
    for run in runs:
        if records and (Path(records) / f"{run.directory.name}.json").exists():
            raise UserError(f"--records {options.records}: {run.directory.name}.json is there already")
    if records:
        check_writable("--records", Path(records))
    if not options.dry_run:
        slurm.check_installed()
    check_runs(options, runs)
    check_settings(options, runs, data)

    ranks = options.gpus // options.nodes
    files = {
        "tasks": "".join(shlex.join(run.arguments) + "\n" for run in runs),
        "runs": "".join(f"{run.directory}\n" for run in runs),
        "submission.sh": "".join(f"export {name}={shlex.quote(str(value))}\n" for name, value in (
            ("PN_SITE", site.path), ("PN_BENCHMARK", options.benchmark), ("PN_RECORDS", records),
            ("PN_DATA_ROOT", data.parent), *([] if site.container else [("PYTHON", sys.executable)]))),
    }
    common = ["sbatch", "--parsable", f"--job-name={submission.name}", "--export=ALL"]
    array = [*common, "--hold", f"--array=0-{len(runs) - 1}", f"--nodes={options.nodes}", f"--ntasks-per-node={ranks}",
             f"--signal=B:USR1@{site.warning}", f"--output={logs}/%A_%a.log", *site.options(ranks),
             str(HERE / "train.sbatch"), str(ROOT), str(submission)]

    def evaluation(after):
        return [*common, f"--dependency=afterok:{after}", "--kill-on-invalid-dep=yes", "--nodes=1", "--ntasks=1",
                f"--output={logs}/evaluation.log", *site.options(1), str(HERE / "evaluate.sbatch"), str(ROOT),
                str(submission)]

    if options.dry_run:
        show(files, submission, array, evaluation("ARRAY"))
        return
    for command in (array, evaluation(None)):
        slurm.check_options(command)
    queue(submission, logs, runs, files, array, evaluation)


def check_runs(options, runs):
    """Refuses runs that are there, in use or queued."""
    queued = {}
    with contextlib.suppress(*((UserError,) if options.dry_run else ())):
        queued = slurm.tasks()
    for run in runs:
        if train.begun(run.directory) and not options.resume:
            raise UserError(f"{run.directory} exists already; --resume goes on with it")
        if in_use(run.directory):
            raise UserError(f"another process is at work in {run.directory}")
        claim = launch.read_claim(run.directory)
        state = claim and queued.get((claim["submission"], claim["task"]))
        if state:
            raise UserError(f"{run.directory} belongs to job {state.job}, which is {state.state}; "
                            f"scancel {state.job} ends it")


def check_settings(options, runs, data):
    """Refuses settings that build no model, and runs that were started with others; says what an update takes."""
    built = set()
    for run in runs:
        facts = train.started(run.options, data, run.directory)
        if run.options.norm not in built:  # seeds make no difference
            built.add(run.options.norm)
            config = train.composed(run.options, run.config, facts, data, run.directory)[1]
    if config.checkpoint.save_interval_updates <= 0:
        print("note: this benchmark saves at the end of an epoch only; a job that is stopped repeats what it has done of "
              "one (checkpoint.save_interval_updates=N checkpoint.keep_interval_updates=K saves, and validates, within)")
    print(f"each run: {options.nodes} node(s) x {options.gpus // options.nodes} rank(s); "
          f"{train.batch(config, options.gpus)}")


def check_writable(what, directory):
    """Refuses a directory in which, once it is made, no file can be written; leaves nothing."""
    existing = directory
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir():
        raise UserError(f"{what} {directory}: {existing} is not a directory")
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise UserError(f"{what} {directory} cannot be written: {existing}: {error.strerror}") from None


def show(files, submission, array, evaluation):
    for name in ("train.sbatch", "evaluate.sbatch", "job.sh"):
        print(f"# ---- scripts/slurm/{name}\n{(HERE / name).read_text(encoding='utf-8')}")
    for name, text in files.items():
        print(f"# ---- {submission}/{name}\n{text}")
    print("# ---- commands; ARRAY is the number that the first one prints")
    for command in (array, evaluation, ["scontrol", "release", "ARRAY"]):
        print(shlex.join(command))


def queue(submission, logs, runs, files, array, evaluation):
    """Writes the submission and queues its jobs: both or, should one be refused, none."""
    submission.mkdir(parents=True)
    logs.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (submission / name).write_text(text, encoding="utf-8")
    for task, run in enumerate(runs):
        launch.write_claim(run.directory, submission.name, task)
    jobs = []
    try:
        jobs.append(slurm.sbatch(array))
        jobs.append(slurm.sbatch(evaluation(jobs[0])))
        slurm.client("scontrol", "release", jobs[0])
    except BaseException:
        for job in jobs:
            with contextlib.suppress(UserError):
                slurm.client("scancel", job)
        shutil.rmtree(submission, ignore_errors=True)
        raise
    for task, run in enumerate(runs):
        print(f"job {jobs[0]}_{task}: {run.directory}")
    print(f"job {jobs[1]}: evaluation and, in {submission / 'table.md'}, the table, after all of these\n"
          f"logs: {logs}\nhow they are doing: scripts/status.sh; end them: scancel {jobs[0]} {jobs[1]}")


if __name__ == "__main__":
    main(submit, sys.argv[1:])
