"""Programs and distributions that belong to this interpreter, and this machine's processors."""

import contextlib
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Callable, Dict, Iterable, List, Mapping, Sequence, TextIO, cast

from .errors import UserError, number
from .paths import ROOT

MOST_THREADS = 65536
#: where programs start: anywhere, or where "python -m" finds no modules of somebody else's (see PYTHONSAFEPATH)
SAFE = None if sys.version_info >= (3, 11) else ROOT
TETHER = Path(__file__).with_name("runs") / "tether.py"
# Distributions on which the prepared data depend, and those on which the results depend as well.
DATA_TOOLS = ("regex", "sacremoses", "subword-nmt", "sentencepiece", "fairseq", "ve-fairseq", "fairseq-fixed")
TOOLS = (*DATA_TOOLS, "torch", "numpy", "hydra-core", "omegaconf", "sacrebleu", "fairseq_powernorm")

# What scripts/lib/environment.sh sets unless the user has: how OpenMP's threads wait, and what glibc does with memory.
PROCESSOR = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "GLIBC_TUNABLES", "MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_",
             "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_")


def processor_settings(environment: Mapping[str, str]) -> str:
    """Those of the variables in ``PROCESSOR`` that are set, for the log; empty if none is."""
    return " ".join(f"{name}={environment[name]}" for name in PROCESSOR if environment.get(name))


def cpus() -> int:
    """The processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def threads(environment: Mapping[str, str]) -> int:
    """The threads of a process that computes: OMP_NUM_THREADS, the first of it where it is a list, else the processors."""
    text = environment.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    return number("OMP_NUM_THREADS", text, 1, MOST_THREADS) if text else cpus()


def tool(name: str) -> str:
    """The path of a console script that belongs to this interpreter."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        raise UserError(f"{name} is not installed beside {sys.executable}")
    return found


def tied(command: Sequence[str]) -> List[str]:
    """The command as it is started: where the system is Linux, it ends when this process does, however that ends."""
    if sys.platform != "linux":
        return list(command)
    return [sys.executable, "-IS", str(TETHER), str(os.getpid()), *command]


def call(command: Sequence[str], lock: TextIO, follow: Callable[[str], object] = len) -> str:
    """Runs a command, which holds the lock, too; gives its output, or shows it and refuses to go on.

    follow: is given each line as it comes
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
                   "PYTHONIOENCODING": "utf-8"}
    lines: List[str] = []
    with subprocess.Popen(tied(command), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, encoding="utf-8",
                          env=environment, pass_fds=(lock.fileno(),), cwd=SAFE) as process:
        try:
            for line in cast(TextIO, process.stdout):
                lines.append(line)
                follow(line)
        except BaseException:  # as subprocess.run() has it
            process.kill()
            raise
    output = "".join(lines)
    if process.returncode:
        raise UserError(f"{shlex.join(command)} failed with exit status {process.returncode}:", output[-3000:])
    return output


def versions(distributions: Iterable[str]) -> Dict[str, str]:
    """The versions of those of the distributions that are installed."""
    from importlib import metadata

    found: Dict[str, str] = {}
    for name in distributions:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found

