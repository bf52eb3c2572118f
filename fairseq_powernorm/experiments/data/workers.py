"""Text on its way from file to file, line by line, through as many processes as there are processors."""

import collections
import concurrent.futures.process
import functools
import itertools
import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path
from typing import Callable, Deque, Iterable, Iterator, List

from ..errors import UserError
from ..progress import Progress
from ..tools import cpus

#: lines that a process is given at a time
BATCH = 500

Lines = Iterable[str]
#: makes lines of lines, one for each
Process = Callable[[Lines], Iterator[str]]


def transform(source: Path, target: Path, process: Process) -> None:
    """Writes process(lines of source) to target, and says every few seconds how far it is."""
    progress = Progress(f"{source.parent.name}/{source.name}", lines_in(source), "lines")
    with progress, open(source, encoding="utf-8", newline="\n") as text, \
            open(target, "w", encoding="utf-8", newline="\n") as out:
        for line in progress.each(process(line.rstrip("\r\n") for line in text)):
            out.write(line + "\n")
    print(f"  {target.parent.name.lstrip('.')}/{target.name}: {progress.done:,} lines", flush=True)


def lines_in(path: Path) -> int:
    """The number of lines of a file."""
    with open(path, "rb") as lines:
        return sum(1 for _ in lines)


class Workers:
    """A process for each processor. Lines come back in order; only as many are held as keep the processes busy."""

    def __init__(self) -> None:
        # They inherit nothing, neither the lock nor open files.
        self.pool = concurrent.futures.ProcessPoolExecutor(
            cpus(), mp_context=multiprocessing.get_context("spawn"), initializer=start_worker
        )

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_: object) -> None:
        self.pool.shutdown()

    def map(self, function: Callable[[List[str]], List[str]]) -> Process:
        """Given a function of a list of lines, the same of an iterator of lines, in parallel."""
        return functools.partial(self._map, function)

    def _map(self, function: Callable[[List[str]], List[str]], lines: Lines) -> Iterator[str]:
        lines = iter(lines)
        running: Deque[concurrent.futures.Future[List[str]]] = collections.deque()
        try:
            for batch in iter(lambda: list(itertools.islice(lines, BATCH)), []):
                running.append(self.pool.submit(function, batch))
                if len(running) > 2 * cpus():
                    yield from running.popleft().result()
            while running:
                yield from running.popleft().result()
        except concurrent.futures.process.BrokenProcessPool:
            raise UserError("a worker process was killed, perhaps for want of memory; run again to go on") from None


def start_worker() -> None:
    """Makes a worker end when its parent is gone (a parent that is killed cannot tell it), and leaves ^C to the parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
