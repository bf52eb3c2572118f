"""A session of training: starts fairseq, follows its log, shows progress in short, writes the run's records."""

import collections
import contextlib
import os
import resource
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, Deque, Dict, List, Mapping, Optional, TextIO

from ..commands import called_as
from ..errors import UserError
from ..evaluation import perplexity
from ..files import write_json
from ..settings import is_lm
from ..tools import cpus, processor_settings
from . import checkpoints, trainlog
from .launchers import Launcher

STOP_PATIENCE = 10  # seconds from SIGTERM to SIGKILL


def session(
    run: Path,
    facts: Dict[str, Any],
    command: List[str],
    config: Any,
    lock: Optional[TextIO],
    launcher: Optional[Launcher] = None,
) -> int:
    """Trains until the end, an error or a signal; shows progress in short and logs everything. Gives the exit status."""
    from omegaconf import OmegaConf

    environment = None
    if launcher is not None:
        command, environment = launcher.command(command, run / "logs")
    if lock is None:  # another process leads the run, and writes its records
        return follow(command, environment)
    run.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileNotFoundError):
        (run / "finished.json").unlink()
    this = {"command": command, "threads": int((environment or os.environ).get("OMP_NUM_THREADS") or cpus()),
            **(launcher.facts() if launcher else {}),
            "wall_s": None, "cpu_s": None, "exit_status": None}  # null to the end of a session that is killed
    if facts["sessions"]:
        drop_statistics(run, config)
    facts["sessions"].append(this)
    write_json(run / "run.json", facts)
    (run / "config.yaml").write_text(OmegaConf.to_yaml(config), encoding="utf-8")
    with open(run / "command.txt", "a", encoding="utf-8") as stream:
        stream.write(shlex.join(command) + "\n")
    max_update = config.optimization.max_update
    remark = perplexity.remark(config.model) if is_lm(config) else ""
    if remark:
        print(f"these perplexities are {remark}", flush=True)
    print(f"training {run}: {facts['parameters']:,} parameters; everything is logged in {run / 'train.log'}", flush=True)

    begin, cpu = time.time(), children_cpu()
    # The child holds the lock as well: should this process be killed, nobody else can train there until it ends, too.
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
                               pass_fds=(lock.fileno(),), env=environment)
    assert process.stdout is not None
    stopped = stop_with_us(process)
    tail: Deque[str] = collections.deque(maxlen=20)
    try:
        with open(run / "train.log", "a", encoding="utf-8") as log, Rhythm() as rhythm:
            settings = processor_settings(environment or os.environ)
            if settings:
                log.write(f"environment: {settings}\n")
            for line in process.stdout:
                log.write(line)
                log.flush()
                tail.append(line)
                short = trainlog.brief(line.rstrip("\n"), max_update, remark)
                if short is not None:
                    rhythm.show(short)
    except OSError as error:  # a disk that is full, or nobody who reads what is shown
        stop(process)
        process.stdout.close()
        process.wait()
        raise UserError(f"{error.strerror}: progress can no longer be shown and logged in {run / 'train.log'}; training was "
                        f"stopped, and --resume goes on with it") from None
    status = process.wait()
    if stopped and status:
        status = -stopped[0]  # whatever the launcher made of it
    counted = launcher is None or launcher.counts_cpu
    this.update(wall_s=round(time.time() - begin, 1), cpu_s=round(children_cpu() - cpu, 1) if counted else None,
                exit_status=status)
    write_json(run / "run.json", facts)
    if status:
        print(f"the last lines of {run / 'train.log'}:\n{''.join(tail)}", file=sys.stderr)
        for path in sorted((run / "logs").glob("*rank*.log")):
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)[-5:]
            if lines and path.stat().st_mtime >= begin:
                print(f"the last lines of {path}:\n{''.join(lines)}", end="", file=sys.stderr)
        print(f"{called_as()}: error: training stopped with exit status {status}; --resume goes on with it", file=sys.stderr)
        return status if status > 0 else 128 - status
    updates = trainlog.updates(trainlog.curve(run / "train.log"))
    write_json(run / "finished.json", {"updates": updates, "overrides": facts["overrides"]})
    print(f"finished {run}: {updates:,} updates in {this['wall_s'] / 60:.1f} min")
    return 0


def drop_statistics(run: Path, config: Any) -> None:
    """Removes the run's own record of statistics (--norm-record) if no checkpoint is whole: training begins anew."""
    record = config.task.get("norm_record")
    path = Path(os.path.abspath(run / record)) if record else run
    if run in path.parents and not any(map(checkpoints.intact, (run / "checkpoints").glob("checkpoint*.pt"))):
        with contextlib.suppress(FileNotFoundError):
            path.unlink()


def follow(command: List[str], environment: Optional[Mapping[str, str]]) -> int:
    """Trains along with the process that leads the run; gives the exit status."""
    process = subprocess.Popen(command, env=environment)
    stopped = stop_with_us(process)
    status = process.wait()
    if stopped and status:
        status = -stopped[0]
    return status if status >= 0 else 128 - status


def stop_with_us(process: "subprocess.Popen[Any]") -> List[int]:
    """Lets SIGTERM and SIGINT to this process end the other, too; gives the list of signals that have come."""
    stopped: List[int] = []

    def pass_on(number: int, _frame: Any) -> None:
        stopped.append(number)
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


class Rhythm:
    """Shows lines of progress, and says so where none has come for $PN_PROGRESS_SECONDS (60)."""

    def __enter__(self) -> "Rhythm":
        self.seconds = float(os.environ.get("PN_PROGRESS_SECONDS") or 60)
        self.last, self.time, self.over = "nothing yet", time.monotonic(), threading.Event()
        self.thread = threading.Thread(target=self.beat, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.thread.join()

    def show(self, line: str) -> None:
        self.last, self.time = line.strip(), time.monotonic()
        print(line, flush=True)

    def beat(self) -> None:
        while not self.over.wait(self.seconds):
            silent = time.monotonic() - self.time
            if silent >= self.seconds:
                print(f"  at work, without news for {silent:.0f} s; the last: {self.last}", flush=True)


def children_cpu() -> float:
    """The processor time of the processes that were started here and have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime
