"""A session of training: starts fairseq, follows its log, shows progress in short, writes the run's records."""

import collections
import contextlib
import math
import os
import resource
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import MappingProxyType
from typing import Any, Deque, Dict, Iterable, List, Mapping, NamedTuple, Optional, Sequence, TextIO, Tuple

from ...command_line import called_as
from ..errors import UserError
from ..evaluation import perplexity
from ..files import write_json, write_text
from ..progress import Progress
from ..recipes import is_lm
from ..tools import processor_settings, threads, tied
from . import checkpoints, ending, records, trainlog
from .launchers import Launcher

LONGEST_PATIENCE = 1_000_000  # seconds
STOP_PATIENCE = 10  # seconds from SIGTERM to SIGKILL


class Watched(NamedTuple):
    """Where else the curves go, see :mod:`.watch`."""

    overrides: Sequence[str] = ()
    environment: Mapping[str, str] = MappingProxyType({})


UNWATCHED = Watched()


def session(
    run: Path,
    facts: Dict[str, Any],
    command: List[str],
    config: Any,
    lock: Optional[TextIO],
    launcher: Optional[Launcher] = None,
    watched: Watched = UNWATCHED,
) -> int:
    """Trains until the end, an error or a signal; shows progress in short and logs everything. Gives the exit status.

    Args:
        watched: what fairseq is told beside its command, which the run's records do not mention
    """
    from omegaconf import OmegaConf

    environment = None
    command = [*command, *watched.overrides]
    if launcher is not None:
        command, environment = launcher.command(command, run / "logs")
    if watched.environment:
        environment = {**(environment or os.environ), **watched.environment}
    if lock is None:  # another process leads the run, and writes its records
        return follow(command, environment)
    run.mkdir(parents=True, exist_ok=True)
    before = Before(run, facts["overrides"])
    this = {"command": [word for word in command if word not in watched.overrides],
            "threads": threads(environment or os.environ),
            **(launcher.facts() if launcher else {}),
            "wall_s": None, "cpu_s": None, "exit_status": None}  # null to the end of a session that is killed
    begun = 0
    try:
        if facts["sessions"]:
            begun = reached(run)
            trainlog.complete(run / "train.log", checkpoints.validations(run / "checkpoints", config))
            drop_statistics(run, config)
        facts["sessions"].append(this)
        write_json(run / "run.json", facts)
        write_text(run / "config.yaml", OmegaConf.to_yaml(config))
        for name, line in (("command.txt", shlex.join(command) + "\n"), ("train.log", "")):
            with open(run / name, "a", encoding="utf-8") as stream:
                stream.write(line)
    except BaseException:  # a disk that is full, a file that cannot be written: nothing has been trained
        with contextlib.suppress(UserError):
            before.put_back(*before.facts)
        raise
    with contextlib.suppress(FileNotFoundError):
        (run / "finished.json").unlink()
    remark = perplexity.remark(config.model) if is_lm(config) else ""
    if remark:
        print(f"these perplexities are {remark}", flush=True)
    print(f"training {run}: {facts['parameters']:,} parameters; everything is logged in {run / 'train.log'}", flush=True)

    begin, cpu = time.time(), children_cpu()
    lines: List[str] = []  # of the log that say how training has ended
    # The child holds the lock as well: should this process be killed, nobody else can train there until it ends, too.
    process = subprocess.Popen(tied(command), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
                               pass_fds=(lock.fileno(),), env=environment)
    stopped = stop_with_us(process)
    try:
        with open(run / "train.log", "a", encoding="utf-8") as log:
            settings = processor_settings(environment or os.environ)
            if settings:
                log.write(f"environment: {settings}\n")
            tail = show(process, log, config.optimization.max_update, remark, lines, begun)
    except OSError as error:  # a disk that is full, or nobody who reads what is shown
        stop(process)
        assert process.stdout is not None
        process.stdout.close()
        process.wait()
        raise UserError(f"{error.strerror}: progress can no longer be shown and logged in {run / 'train.log'}; training was "
                        f"stopped, and --resume goes on with it") from None
    status = process.wait()
    if stopped and status:
        status = -stopped[0]  # whatever the launcher made of it
    if status == 0:
        end = ending.of_success(run, lines)
    elif stopped:
        end = ending.Ending()
    else:
        end = ending.of_failure(lines)
    if status >= 0 and end.diverged:
        status, this["diverged"] = ending.DIVERGED, end.diverged
    elif status == 0 and end.problem:
        status = 1
    failed = status > 0 and not stopped and not end.diverged
    left = failed and before.changed and max(reached(run), ending.updates(lines)) <= begun
    if left:
        facts["overrides"] = before.overrides
    counted = launcher is None or launcher.counts_cpu
    this.update(wall_s=round(time.time() - begin, 1), cpu_s=round(children_cpu() - cpu, 1) if counted else None,
                exit_status=status)
    write_json(run / "run.json", facts)
    if left:
        before.put_back()
    if status == 0:
        write_json(run / "finished.json", {"updates": end.updates, "overrides": facts["overrides"]})
        print(f"finished {run}: {end.updates:,} updates in {this['wall_s'] / 60:.1f} min")
        return 0
    if end.diverged:
        message = f"training diverged: {end.diverged}; --resume goes on from the last checkpoint that is whole"
    elif stopped:
        message = "interrupted; --resume goes on with it"
    else:
        if not end.problem:
            show_last_lines(run, tail, begin)
        more = "the run is left as it was, without the new overrides" if left else "--resume goes on with it"
        message = f"training stopped with exit status {status}{f': {end.problem}' if end.problem else ''}; {more}"
    print(f"{called_as()}: error: {message}", file=sys.stderr)
    return status if status > 0 else 128 - status


class Before:
    """A run as it was before a session with other overrides, to which it returns if they let training fail at once."""

    def __init__(self, run: Path, overrides: List[str]):
        self.run, self.overrides = run, overrides
        if (run / "run.json").is_file():
            self.overrides = records.read_run(run)["overrides"]
        self.changed = self.overrides != overrides
        self.facts = self._texts("run.json")
        self.files = self._texts("config.yaml", "finished.json") if self.changed else {}

    def _texts(self, *names: str) -> Dict[str, str]:
        return {name: (self.run / name).read_text(encoding="utf-8") for name in names if (self.run / name).is_file()}

    def put_back(self, *more: str) -> None:
        """What the session has replaced and removed is there again, but for the overrides, which are in run.json."""
        for name, text in {**self.files, **{name: self.facts[name] for name in more}}.items():
            write_text(self.run / name, text)


def reached(run: Path) -> int:
    """The updates of the newest checkpoint that can be read."""
    return max((each.updates for each in checkpoints.accounts(run / "checkpoints")), default=0)


def show(
    process: "subprocess.Popen[str]", log: TextIO, max_update: int, remark: str, lines: List[str], begun: int = 0
) -> Deque[str]:
    """Writes what a training says to its log, and shows progress in short; gives the last lines.

    Args:
        remark: what is to be said of each perplexity
        lines: takes those that say how training has ended, see :mod:`.ending`
        begun: updates of the sessions before
    """
    tail: Deque[str] = collections.deque(maxlen=20)
    assert process.stdout is not None
    with Progress("training", max_update or None, "up", initial=begun, seconds=None) as progress, Rhythm(progress) as rhythm:
        for line in process.stdout:
            log.write(line)
            log.flush()
            tail.append(line)
            if ending.tells(line):
                lines.append(line)
            reached = trainlog.progress_of(trainlog.parse_line(line) or {}) if progress.is_bar else None
            short = trainlog.brief(line.rstrip("\n"), max_update, remark)
            if short is not None:
                rhythm.show(short, reached)
    return tail


def show_last_lines(run: Path, tail: Iterable[str], begin: float) -> None:
    """The last lines of the log, and of those of other ranks that have written since `begin`."""
    print(f"the last lines of {run / 'train.log'}:\n{''.join(tail)}", file=sys.stderr)
    for path in sorted((run / "logs").glob("*rank*.log")):
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)[-5:]
        if lines and path.stat().st_mtime >= begin:
            print(f"the last lines of {path}:\n{''.join(lines)}", end="", file=sys.stderr)


def drop_statistics(run: Path, config: Any) -> None:
    """Removes the run's own record of statistics (--norm-record) if no checkpoint is whole: training begins anew."""
    record = config.task.get("norm_record")
    path = Path(os.path.abspath(run / record)) if record else run
    if run in path.parents and not any(map(checkpoints.intact, (run / "checkpoints").glob("checkpoint*.pt"))):
        with contextlib.suppress(FileNotFoundError):
            path.unlink()


def follow(command: List[str], environment: Optional[Mapping[str, str]]) -> int:
    """Trains along with the process that leads the run; gives the exit status."""
    process = subprocess.Popen(tied(command), env=environment)
    stopped = stop_with_us(process)
    status = process.wait()
    if stopped and status:
        status = -stopped[0]
        print(f"{called_as()}: error: interrupted; --resume goes on with it", file=sys.stderr)
    return status if status >= 0 else 128 - status


def stop_with_us(process: "subprocess.Popen[Any]") -> List[int]:
    """Lets SIGTERM and SIGINT to this process end the other, too; gives the list of signals that have come."""
    stopped: List[int] = []

    def pass_on(number: int, _frame: Any) -> None:
        stopped.append(number)
        if len(stopped) > 1:  # by who does not want to wait
            process.kill()
        else:
            stop(process)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, pass_on)
    return stopped


def stop(process: "subprocess.Popen[Any]") -> None:
    """Ends another process, by force if it takes its time."""
    process.terminate()
    timer = threading.Timer(STOP_PATIENCE, process.kill)
    timer.daemon = True
    timer.start()


def patience() -> float:
    """$PN_PROGRESS_SECONDS (60): how long training may show nothing before it says that it is at work; refuses what is no
    time.
    """
    text = os.environ.get("PN_PROGRESS_SECONDS") or "60"
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds <= LONGEST_PATIENCE:
        raise UserError(f"PN_PROGRESS_SECONDS={text}: must be a number of seconds, more than 0 and {LONGEST_PATIENCE:,} at "
                        f"most")
    return seconds


class Rhythm:
    """Shows lines of progress, or a bar and the lines that are more than that, and says so where none has come for
    $PN_PROGRESS_SECONDS (60).
    """

    def __init__(self, progress: Progress):
        self.progress = progress

    def __enter__(self) -> "Rhythm":
        self.seconds = patience()
        self.last, self.time, self.over = "nothing yet", time.monotonic(), threading.Event()
        self.thread = threading.Thread(target=self.beat, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.thread.join()

    def show(self, line: str, reached: Optional[Tuple[int, str]] = None) -> None:
        self.last, self.time = line.strip(), time.monotonic()
        if reached is None:
            self.progress.say(line)
        else:
            self.progress.reach(*reached)

    def beat(self) -> None:
        while not self.over.wait(self.seconds):
            silent = time.monotonic() - self.time
            if silent >= self.seconds:
                with contextlib.suppress(OSError):  # show() meets it as well, and says so
                    self.progress.say(f"  at work, without news for {silent:.0f} s; the last: {self.last}")


def children_cpu() -> float:
    """The processor time of the processes that were started here and have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime
