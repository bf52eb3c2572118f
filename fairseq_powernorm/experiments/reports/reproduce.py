"""Runs the rows of a table and writes the report: see scripts/reproduce_table1.sh."""

import argparse
import collections
import contextlib
import fcntl
import math
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

from ..cluster import slurm, submission
from ..directories import in_use, lock_path, locked
from ..errors import UserError, choose, listed, number, seeds
from ..files import read_json
from ..paths import ROOT, data_root
from ..runs import batch, compose, launch
from ..settings import architectures, benchmarks, load
from ..tools import cpus
from . import matrix, report, schema

WAIT_S = 5


def parse(arguments):
    subject = arguments[0]
    paper, others, default_seeds = matrix.SUBJECTS[subject]
    parser = argparse.ArgumentParser(prog=f"scripts/reproduce_{subject}.sh", add_help=False, allow_abbrev=False)
    for option in ("benchmark", "norms", "rows", "archs", "seeds", "updates", "jobs", "results", *submission.OPTIONS):
        parser.add_argument(f"--{option}")
    for option in ("--slurm", "--dry-run", "--report-only"):
        parser.add_argument(option, action="store_true")
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_intermixed_args(arguments[1:])
    options.subject = subject
    options.benchmarks = listed("--benchmark", options.benchmark, (*paper, *others), paper)
    for benchmark in options.benchmarks:
        choose("--benchmark", benchmark, benchmarks())  # those that have a YAML file
    options.seeds = list(default_seeds) if options.seeds is None else seeds("--seeds", options.seeds)
    options.updates = None if options.updates is None else number("--updates", options.updates, 10)
    options.results = Path(os.path.abspath(options.results or ROOT / "results"))
    for several in (("jobs", "slurm"), ("report_only", "slurm"), *((("gpus", "jobs"),) if not options.slurm else ())):
        if all(getattr(options, name) for name in several):
            raise UserError(" and ".join("--" + name.replace("_", "-") for name in several) + " exclude each other")
    if options.slurm:
        submission.check_options(options)
    else:
        for name in submission.OPTIONS:
            if name != "gpus" and getattr(options, name.replace("-", "_")):
                raise UserError(f"--{name} goes with --slurm only")
        options.gpus = listed("--gpus", options.gpus, None, ())
    options.jobs = number("--jobs", options.jobs or "1", 1)
    for override in options.overrides:
        key = next(iter(compose.by_key([override])))
        if "=" not in override and not override.startswith("~"):
            raise UserError(f"{override!r} is no hydra override; an override reads KEY=VALUE, such as common.fp16=true")
        if key in matrix.OURS:
            instead = matrix.OURS[key]
            raise UserError(f"override {key} is this script's own" + (f"; use {instead}" if instead else ""))
    return options


def chosen(options):
    """The runs that are asked for."""
    valid = {arch: benchmark for benchmark in options.benchmarks for arch in architectures(benchmark)}
    archs = listed("--archs", options.archs, valid, [architectures(benchmark)[0] for benchmark in options.benchmarks])
    missing = [benchmark for benchmark in options.benchmarks if benchmark not in map(valid.get, archs)]
    if missing:
        raise UserError(f"--archs {options.archs!r} names no architecture of {missing[0]}; valid: "
                        f"{', '.join(architectures(missing[0]))}")
    found = [run for arch in archs
             for run in matrix.runs(valid[arch], arch, options.seeds, options.updates, options.overrides)]
    names = dict.fromkeys(run.row_name for run in found)
    default = matrix.FIGURE_ROWS if options.subject == "figures" else names
    rows = listed("--rows", options.rows, names, default)
    norms = listed("--norms", options.norms, matrix.NORMS, matrix.NORMS)
    found = [run for run in found if run.row_name in rows and run.row.norm in norms]
    if not found:
        raise UserError(f"no row is of --norms {','.join(norms)} and of --rows {','.join(rows)}")
    return found


def reproduce(arguments):
    options = parse(arguments)
    runs = chosen(options)
    os.chdir(ROOT)  # the commands' paths are relative to it
    stem = report.stem(options.subject, options.benchmarks, options.updates, options.results)
    if options.report_only:
        return finish(options, runs, stem, {})  # from the records that there are
    for run in first_of_each(runs):
        model = load(run.benchmark).model
        config = compose.compose(run.benchmark, [
            *compose.arch_overrides(run.benchmark, run.arch),
            *compose.norm_overrides(model, run.row.norm, run.row.placement or "all"), *run.overrides])
        try:
            told = batch.described(config, options.gpus if options.slurm else 1)
        except UserError as error:
            raise UserError(f"--gpus {options.gpus}: {run.benchmark}: {error}") from None
        print(f"# each run of {run.benchmark}, {run.arch}: {told}", flush=True)
    if options.slurm:
        return submit(options, runs, stem)
    if options.dry_run:
        return dry_run(options, runs)
    slots = environments(options)
    state = State(collections.deque(runs), len(runs), options.results)
    with interruptible(state):
        prepare(state, {run.benchmark for run in runs})
        workers = [threading.Thread(target=work, args=(state, slot, len(slots) > 1), daemon=True) for slot in slots]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    if state.stopped:
        print("interrupted; run again, it goes on where it was", file=sys.stderr)
        return 128 + state.stopped
    return finish(options, runs, stem, state.failed)


def first_of_each(runs):
    found = {}
    for run in runs:
        found.setdefault((run.benchmark, run.arch), run)
    return found.values()


def dry_run(options, runs):
    """Prints every command that would run, with the estimated cost of the training."""
    for benchmark in unprepared(options):
        print(f"bash scripts/prepare.sh {benchmark}")
    for run in runs:
        print(matrix.plan_line(run, options.results))
    print_cost(runs)


def unprepared(options):
    return [benchmark for benchmark in options.benchmarks if not (data_root() / benchmark / "prepared.json").is_file()]


def print_cost(runs):
    total, assumed = collections.Counter(), {}
    for run in runs:
        total[run.benchmark] += run.gpu_hours
        if run.updates is None:
            typical = matrix.TYPICAL_UPDATES[run.benchmark]
            assumed[run.benchmark] = f"{typical:,} updates of {run.benchmark} until it stops early, "
    print(f"# {len(runs)} runs, about {matrix.hours(sum(total.values()))} GPU hours for training ("
          + ", ".join(f"{benchmark} {matrix.hours(hours)}" for benchmark, hours in total.items())
          + f"), an estimate: {''.join(assumed.values())}{matrix.UPDATE_S} s an update, and 6 operations per parameter "
            f"and token at {matrix.OPERATIONS_PER_S / 1e12:.0f} * 10^12 a second")


def submit(options, runs, stem):
    """Queues the runs that are neither done nor queued already, an evaluation of each and, behind all, the report."""
    queue = {}
    with contextlib.suppress(*((UserError,) if options.dry_run else ())):
        slurm.check_installed()
        queue = slurm.tasks()
    new, after = [], []
    for run in runs:
        jobs, record = launch.jobs_of(run.directory, queue), matrix.relative(run.record(options.results))
        if jobs:
            print(f"{run.benchmark}/{run.name}: job {jobs[0].job} is {jobs[0].state}")
            after.append(jobs[-1].job)
        elif any(map(in_use, (run.directory, row_place(run)))):
            print(f"{run.benchmark}/{run.name}: another process is at work on it")
            after.append(None)
        elif done(run, run.record(options.results)):
            print(f"{record} is there already")
        elif run.record(options.results).is_file():
            raise UserError(f"{record} is there already, but {matrix.relative(run.directory)} holds no evaluation that "
                            f"it comes from; move one of them away")
        else:
            new.append(run)
    if not new:
        print("nothing to queue")
        return None if options.dry_run or after else finish(options, runs, stem, {})
    queued = submission.Submission(
        options.subject, options, [submission.Run(training(run)[2:], run.evaluate_command(options.results)[2:],
                                                  run.record(options.results)) for run in new],
        lambda _: report_command(options), resume=True, after=filter(None, after))
    missing = unprepared(options)
    if not options.dry_run:
        queued.check()
        queued.queue(f"the report, {matrix.relative(stem)}.html")
        return None
    for benchmark in missing:
        print(f"bash scripts/prepare.sh {benchmark}    # before --slurm can check and queue its runs")
    if not missing:
        queued.check(dry_run=True)
    queued.show()
    print_cost(new)
    return None


def report_command(options):
    """The command that makes the report of the same runs."""
    words = ["bash", f"scripts/reproduce_{options.subject}.sh", "--report-only"]
    for name, value in (("benchmark", ",".join(options.benchmarks)), ("archs", options.archs), ("norms", options.norms),
                        ("rows", options.rows), ("seeds", ",".join(map(str, options.seeds))),
                        ("updates", options.updates), ("results", matrix.relative(options.results))):
        words += [f"--{name}", str(value)] if value is not None else []
    return [*words, *options.overrides]


def environments(options):
    """The environment of each run that is to be at work at the same time. A run sees one GPU at most."""
    if options.gpus:
        import torch

        present = torch.cuda.device_count()
        for gpu in options.gpus:
            if not gpu.isdigit() or int(gpu) >= present:
                raise UserError(f"--gpus {gpu!r}: this machine has {present} GPUs"
                                + (f"; valid: {', '.join(map(str, range(present)))}" if present else ""))
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        names = visible.split(",") if visible else [str(i) for i in range(present)]
        return [{**os.environ, "CUDA_VISIBLE_DEVICES": names[int(gpu)]} for gpu in options.gpus]
    if options.jobs > cpus():
        raise UserError(f"--jobs {options.jobs}: this machine has {cpus()} processors; valid: 1 to {cpus()}")
    one = {**os.environ, "CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]}
    if options.jobs > 1:
        one.setdefault("OMP_NUM_THREADS", "1")
    return [one] * options.jobs


@dataclass
class State:
    """What the workers share."""

    waiting: collections.deque
    total: int
    results: Path
    started: int = 0
    stopped: int = 0  # the signal
    failed: dict = field(default_factory=dict)  # run name -> reason
    processes: set = field(default_factory=set)
    lock: threading.Lock = field(default_factory=threading.Lock)


@contextlib.contextmanager
def interruptible(state):
    """SIGINT and SIGTERM end what is running, which can be gone on with, and keep the rest from starting."""
    def stop(number, _):
        state.stopped = number
        for process in list(state.processes):
            process.terminate()

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def prepare(state, wanted):
    """Prepares the benchmarks that are not; the runs of one that cannot be prepared fail."""
    for benchmark in sorted(wanted):
        directory = data_root() / benchmark
        if not (directory / "prepared.json").is_file():
            with locked(directory, patience=math.inf):
                pass  # another invocation may be at work on it
        if (directory / "prepared.json").is_file():
            continue
        print(f"== data: {benchmark}", flush=True)
        problem = call(state, ["bash", "scripts/prepare.sh", benchmark], dict(os.environ), "")
        if problem:
            for run in [run for run in state.waiting if run.benchmark == benchmark]:
                state.waiting.remove(run)
                state.failed[f"{run.benchmark}/{run.name}"] = problem


def work(state, environment, several):
    """Takes runs until none is left. One that another process is at work on is put back, to be looked at again."""
    told = set()
    while not state.stopped:
        with state.lock:
            if not state.waiting:
                return
            run = state.waiting.popleft()
        name = f"{run.benchmark}/{run.name}"
        try:
            with row_lock(run) as lock:
                if lock is None:
                    if name not in told:
                        print(f"== {name}: another process is at work on it; going on with the others", flush=True)
                        told.add(name)
                    with state.lock:
                        state.waiting.append(run)
                        alone = all(f"{other.benchmark}/{other.name}" in told for other in state.waiting)
                    time.sleep(WAIT_S if alone else 0)
                    continue
                problem = carry_out(state, run, environment, f"{run.name}: " if several else "", lock)
        except UserError as error:
            problem = str(error)
        except Exception as error:  # a full disk, for one: the other rows go on
            problem = f"{type(error).__name__}: {error}"
        if problem and not state.stopped:
            print(f"== {name} failed: {problem}", file=sys.stderr, flush=True)
            state.failed[name] = problem


def row_place(run):
    """What stands for a row where locks are concerned: its lock is another than that of its training."""
    return run.directory.with_name(f"{run.name}.row")


@contextlib.contextmanager
def row_lock(run):
    """Holds a row from its training to its record; yields None if another process is at work on it."""
    run.directory.parent.mkdir(parents=True, exist_ok=True)
    with open(lock_path(row_place(run)), "a") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with locked(run.directory):
                pass  # a training that has outlived its script holds this one
        except (OSError, UserError):
            yield None
            return
        yield stream


def carry_out(state, run, environment, prefix, lock):
    """Trains and evaluates one run, as far as it is not done; gives the reason if it fails, else None."""
    with state.lock:
        state.started += 1
        print(f"== [{state.started}/{state.total}] {run.benchmark}/{run.name}", flush=True)
    if done(run, run.record(state.results)):
        print(f"{prefix}{matrix.relative(run.record(state.results))} is there already; nothing to do", flush=True)
        return None
    if launch.read_claim(run.directory):
        with contextlib.suppress(UserError):  # without SLURM nothing is queued
            for job in launch.jobs_of(run.directory, slurm.tasks()):
                return f"job {job.job} is {job.state}"
    for command in (training(run), run.evaluate_command(state.results)):
        problem = call(state, command, environment, prefix, lock)
        if problem or state.stopped:
            return problem
    return None


def training(run):
    """The command that trains a run, or goes on with it as it was begun; refuses if that was with other settings."""
    begun = run.directory / "run.json"
    if not begun.is_file():
        return run.train_command()
    refuse_others(read_json(begun)["overrides"], run, matrix.relative(run.directory))
    return run.train_command([])


def done(run, record):
    """Is there a record, of this run, and does it belong to what lies in the run's directory, if there is one?"""
    if not record.is_file():
        return False
    content = schema.read_record(record)
    refuse_others(content["overrides"], run, matrix.relative(record))
    evaluated = run.directory / "evaluation" / "record.json"
    return not run.directory.exists() or evaluated.is_file() and read_json(evaluated) == content


def refuse_others(overrides, run, what):
    """Refuses to take a run or a record for one with other settings."""
    there, wanted = matrix.identity(overrides, run), matrix.identity(run.overrides, run)
    differing = [key for key in {**there, **wanted} if there.get(key) != wanted.get(key)]
    if differing:
        key = differing[0]
        raise UserError(f"{what} was made with other overrides ({there.get(key, 'no ' + key)}, asked for "
                        f"{wanted.get(key, 'none')}); PN_RUNS_ROOT=DIR and --results DIR keep them apart")


def call(state, command, environment, prefix, lock=None):
    """Runs a command and shows its output line by line; gives the reason if it fails, else None."""
    print(f"{prefix}+ {shlex.join(command)}", flush=True)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
                               env=environment, pass_fds=() if lock is None else (lock.fileno(),))
    state.processes.add(process)
    if state.stopped:
        process.terminate()
    last = ""
    for line in process.stdout:
        print(prefix + line, end="", flush=True)
        last = line.strip() or last
    status = process.wait()
    state.processes.discard(process)
    return f"{command[1]} ended with exit status {status}: {last}" if status else None


def finish(options, runs, stem, failed):
    """Writes the report of the records that there are; exit status 1 if a run failed or has no record."""
    problems = dict(failed)
    for run in runs:
        if not run.record(options.results).is_file():
            problems.setdefault(f"{run.benchmark}/{run.name}", "no record")
    if len(problems) < len(runs):
        report.write(options.subject, stem, [run for run in runs if f"{run.benchmark}/{run.name}" not in problems],
                     list(problems), options.results)
    if problems:
        print(f"{len(problems)} of {len(runs)} runs are not in the report:", file=sys.stderr)
        for name, reason in problems.items():
            print(f"  {name}: {reason}", file=sys.stderr)
    return 1 if problems else 0
