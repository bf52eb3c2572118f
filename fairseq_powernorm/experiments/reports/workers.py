"""Trains and evaluates runs, some at a time, so that kills, company and failures do no harm."""

import collections
import contextlib
import fcntl
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Deque, Dict, Iterator, List, Mapping, Optional, Sequence, Set, TextIO, cast

from .. import own
from ..cluster import slurm
from ..directories import Busy, lock_path, locked
from ..errors import UserError
from ..files import read_json, sha256
from ..paths import data_root
from ..progress import Progress
from ..runs import claims
from ..runs.records import read_run
from ..settings import recipe
from ..tools import cpus, tied
from . import matrix, schema

#: seconds between two looks at runs that other processes are at work on, when nothing else is left
WAIT_S = 5

Environment = Dict[str, str]


@dataclass
class State:
    """What the workers share."""

    waiting: Deque[matrix.Run]
    total: int
    results: Path
    watch: Sequence[str] = ()  # words of train.sh, see watch.words()
    started: int = 0
    over: int = 0  # runs that have ended, well or not
    progress: Progress = field(default_factory=lambda: Progress("runs", seconds=None))
    stopped: int = 0  # the signal
    failed: Dict[str, str] = field(default_factory=dict)  # key of a run -> reason
    processes: Set["subprocess.Popen[str]"] = field(default_factory=set)
    lock: threading.Lock = field(default_factory=threading.Lock)


def environments(jobs: int, gpus: Sequence[str]) -> List[Environment]:
    """The environment of each run that is to be at work at the same time; a run sees one GPU at most.

    Args:
        jobs: how many runs, if `gpus` is empty
        gpus: one run on each of these
    """
    if gpus:
        import torch

        present = torch.cuda.device_count()
        for gpu in gpus:
            if gpu not in map(str, range(present)):
                valid = f"; valid: {', '.join(map(str, range(present)))}" if present else ""
                raise UserError(f"--gpu-ids {gpu!r}: this machine has {present} GPUs{valid}")
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        names = visible.split(",") if visible else [str(i) for i in range(present)]
        return [{**os.environ, "CUDA_VISIBLE_DEVICES": names[int(gpu)]} for gpu in gpus]
    if jobs > cpus():
        raise UserError(f"--jobs {jobs}: this machine has {cpus()} processors; valid: 1 to {cpus()}")
    one = {**os.environ, "CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]}
    if jobs > 1:
        one.setdefault("OMP_NUM_THREADS", "1")
    return [one] * jobs


def carry_out_all(
    runs: Sequence[matrix.Run], results: Path, slots: Sequence[Environment], watch: Sequence[str] = ()
) -> State:
    """Prepares the data of runs, trains and evaluates them, as many at a time as there are slots."""
    state = State(collections.deque(runs), len(runs), results, watch)
    state.progress.total = len(runs)
    with interruptible(state), state.progress:
        prepare(state, {recipe(run.subject).data for run in runs})
        workers = [
            threading.Thread(target=work, args=(state, slot), kwargs={"several": len(slots) > 1}, daemon=True)
            for slot in slots
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    return state


@contextlib.contextmanager
def interruptible(state: State) -> Iterator[None]:
    """SIGINT and SIGTERM end what is running, which can be resumed, and keep the rest from starting."""

    def stop(number: int, _: object) -> None:
        state.stopped = number
        for process in list(state.processes):
            process.terminate()

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def prepare(state: State, wanted: Set[str]) -> None:
    """Prepares the benchmarks that are not; the runs of one that cannot be prepared fail."""
    for benchmark in sorted(wanted):
        directory = data_root() / benchmark
        while not state.stopped and not (directory / "prepared.json").is_file():
            with contextlib.suppress(Busy), locked(directory):
                break  # else another invocation is at work on it
        if state.stopped or (directory / "prepared.json").is_file():
            continue
        state.progress.say(f"== data: {benchmark}")
        problem = call(state, ["bash", "scripts/prepare.sh", benchmark], dict(os.environ))
        if problem:
            for run in [run for run in state.waiting if recipe(run.subject).data == benchmark]:
                state.waiting.remove(run)
                state.failed[run.key] = problem


def work(state: State, environment: Environment, *, several: bool) -> None:
    """Takes runs until none is left. One that another process is at work on is put back, to be looked at again.

    Args:
        several: other workers are at work, too, so that each line of output must say whose it is
    """
    told: Set[str] = set()
    while not state.stopped:
        with state.lock:
            if not state.waiting:
                return
            run = state.waiting.popleft()
        try:
            with row_lock(run) as lock:
                if lock is None:
                    if run.key not in told:
                        state.progress.say(f"== {run.key}: another process is at work on it; going on with the others")
                        told.add(run.key)
                    with state.lock:
                        state.waiting.append(run)
                        alone = all(other.key in told for other in state.waiting)
                    time.sleep(WAIT_S if alone else 0)
                    continue
                problem = carry_out(state, run, environment, f"{run.name}: " if several else "", lock)
        except UserError as error:
            problem = str(error)
        except Exception as error:  # a full disk, for one: the other rows go on
            problem = f"{type(error).__name__}: {error}"
        if problem and not state.stopped:
            state.progress.say(f"== {run.key} failed: {problem}", sys.stderr)
            state.failed[run.key] = problem
        with state.lock:
            state.over += 1
            state.progress.reach(state.over)


def row_place(run: matrix.Run) -> Path:
    """What stands for a row where locks are concerned: its lock is another than that of its training."""
    return run.directory.with_name(f"{run.name}.row")


@contextlib.contextmanager
def row_lock(run: matrix.Run) -> Iterator[Optional[TextIO]]:
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


def carry_out(
    state: State, run: matrix.Run, environment: Environment, prefix: str = "", lock: Optional[TextIO] = None
) -> Optional[str]:
    """Trains and evaluates one run, as far as that is not done; gives the reason if it fails, else None.

    Args:
        prefix: of each line that the run shows
        lock: of the row, which the programs that are started hold, too
    """
    with state.lock:
        state.started += 1
        state.progress.say(f"== [{state.started}/{state.total}] {run.key}")
    record = run.record(state.results)
    if done(run, record):
        state.progress.say(f"{prefix}{matrix.relative(record)} is there already; nothing to do")
        return None
    if claims.read_claim(run.directory):
        with contextlib.suppress(UserError):  # without SLURM nothing is queued
            for job in claims.jobs_of(run.directory, slurm.tasks()):
                return f"job {job.job} is {job.state}"
    for command in (training(run, state.watch), run.evaluate_command(state.results)):
        problem = call(state, command, environment, prefix, lock)
        if problem or state.stopped:
            return problem
    return None


def training(run: matrix.Run, watch: Sequence[str] = ()) -> List[str]:
    """The command that trains a run, or resumes it as it was begun; refuses if that was with other settings."""
    begun = run.directory / "run.json"
    if not begun.is_file():
        return [*run.train_command(), *watch]
    refuse_others(read_run(run.directory), run, matrix.relative(run.directory))
    return [*run.train_command([]), *watch]


def done(run: matrix.Run, record: Path) -> bool:
    """Is there a record of this run, and does it belong to what lies in the run's directory, if there is one?"""
    if not record.is_file():
        return False
    content = schema.read_record(record)
    refuse_others(content, run, matrix.relative(record))
    stamp = data_root() / recipe(run.subject).data / "prepared.json"
    if (run.directory / "run.json").is_file() and stamp.is_file() and (
        read_run(run.directory)["prepared_sha256"] != sha256(stamp)
    ):
        raise UserError(f"{matrix.relative(run.directory)} was trained on other data than {stamp.parent} holds now, "
                        f"on which the others are trained; prepare the data as they were, or move the run away")
    evaluated = run.directory / "evaluation" / "record.json"
    return not run.directory.exists() or evaluated.is_file() and read_json(evaluated) == content


def refuse_others(content: Mapping[str, Any], run: matrix.Run, what: str) -> None:
    """Refuses to take a run or a record, given what it says of itself, for one with other settings."""
    changed = own.differing(content.get("recipe"), own.told(recipe(run.subject)))
    if changed:
        raise UserError(f"{what} was made with other settings ({changed}); PN_RUNS_ROOT=DIR and --results DIR keep them "
                        f"apart")
    there: Mapping[str, Any] = matrix.identity(content["overrides"], run)
    wanted: Mapping[str, Any] = matrix.identity(run.overrides, run)
    differing = [key for key in {**there, **wanted} if there.get(key) != wanted.get(key)]
    if differing:
        key = differing[0]
        raise UserError(
            f"{what} was made with other overrides ({there.get(key, 'no ' + key)}, asked for "
            f"{wanted.get(key, 'none')}); PN_RUNS_ROOT=DIR and --results DIR keep them apart"
        )


def call(
    state: State, command: Sequence[str], environment: Environment, prefix: str = "", lock: Optional[TextIO] = None
) -> Optional[str]:
    """Runs a command and shows its output line by line; gives the reason if it fails, else None."""
    state.progress.say(f"{prefix}+ {shlex.join(command)}")
    process = subprocess.Popen(
        tied(command),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=environment,
        pass_fds=() if lock is None else (lock.fileno(),),
    )
    state.processes.add(process)
    if state.stopped:
        process.terminate()
    last = ""
    try:
        for line in cast(TextIO, process.stdout):
            state.progress.say(prefix + line.rstrip("\n"))
            last = line.strip() or last
    except BaseException:  # nobody takes the output any more; the next run must not begin beside this one
        process.terminate()
        raise
    finally:
        cast(TextIO, process.stdout).close()  # before the wait: it may be writing
        status = process.wait()
        state.processes.discard(process)
    return f"{command[1]} ended with exit status {status}: {last}" if status else None
