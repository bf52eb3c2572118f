"""SLURM's clients."""

import shlex
import shutil
import subprocess
from typing import Dict, NamedTuple, Optional, Sequence, Tuple

from ..errors import UserError

CLIENTS = ("sbatch", "squeue", "scontrol", "scancel")
TIMEOUT = 120  # seconds; a busy controller takes its time


class Task(NamedTuple):
    """A job of the queue, or a task of an array."""

    job: str
    state: str
    reason: str


#: (name of the job, number in its array) -> the task
Queue = Dict[Tuple[str, Optional[int]], Task]


def check_installed() -> None:
    """Refuses a machine without SLURM's clients."""
    for name in CLIENTS:
        if shutil.which(name) is None:
            raise UserError(f"no SLURM on this machine: {name} is not in PATH; --dry-run shows what would be queued, and "
                            f"scripts/launch.sh trains without SLURM")


def client(*command: str) -> str:
    """The output of one of SLURM's clients; refuses to go on if it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=TIMEOUT)
    except OSError as error:
        raise UserError(f"{command[0]} cannot be started: {error.strerror}") from None
    except subprocess.TimeoutExpired:
        raise UserError(f"{command[0]} has not answered for {TIMEOUT} s") from None
    if done.returncode:
        reason = "; ".join(line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip())
        raise UserError(f"{shlex.join(command)} failed: {reason or f'exit status {done.returncode}'}")
    return done.stdout


def sbatch(command: Sequence[str]) -> str:
    """Queues a job; gives its number."""
    return client(*command).strip().split(";")[0]  # JOB or JOB;CLUSTER


def check_options(command: Sequence[str]) -> None:
    """Lets SLURM look at the options of sbatch without queueing anything."""
    client("sbatch", "--test-only", *(word for word in command[1:]
                                      if not word.startswith(("--parsable", "--dependency", "--hold"))))


def tasks() -> Queue:
    """All of the user's jobs in the queue."""
    found: Queue = {}
    for line in client("squeue", "--noheader", "--array", "--me", "--format=%K|%i|%T|%r|%j").splitlines():
        task, job, state, reason, name = line.strip().split("|", 4)  # a name may have any characters
        found[name, int(task) if task.isdigit() else None] = Task(job, state, reason)
    return found
