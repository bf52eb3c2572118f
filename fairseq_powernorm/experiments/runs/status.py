"""Shows how runs are doing."""

import os
import re
import time
from pathlib import Path
from typing import Any, Dict, Iterable, Iterator, Optional, Sequence, Tuple

from ..cluster import slurm
from ..directories import in_use
from ..errors import UserError
from ..files import read_json
from ..paths import runs_root
from . import checkpoints, claims, trainlog

COLUMNS = ("run", "state", "updates", "valid loss", "time left", "last checkpoint", "restarts")


def status(directories: Sequence[str]) -> None:
    """Prints a line for each run in the directories; by default in the place of all runs."""
    places = [Path(os.path.abspath(name)) for name in directories] or [runs_root()]
    for place in places:
        if not place.is_dir():
            raise UserError(f"{place} is not a directory")
    runs = sorted({run for place in places for run in found(place)})
    if not runs:
        print(f"no runs in {', '.join(map(str, places))}")
        return
    try:
        queue: Optional[slurm.Queue] = slurm.tasks()
    except UserError:
        queue = None
    base = Path(os.path.commonpath([run.parent for run in runs]))
    rows = [COLUMNS, *(row(run, str(run.relative_to(base)), queue) for run in runs)]
    widths = [max(map(len, column)) for column in zip(*rows)]
    print(f"in {base}:")
    for cells in rows:
        line = "  ".join(cell.ljust(width) for cell, width in zip(cells, widths)).rstrip()
        print("".join(each if each.isprintable() else "?" for each in line))  # names may be somebody else's


def found(place: Path) -> Iterator[Path]:
    """The run directories in a place, those that only a job knows included; not what lies within a run. Of a link, the run
    to which it leads, and those that lie side by side there: further down, a link could lead around in a circle.
    """
    if (place / "run.json").is_file():
        yield place
        return
    for directory, names, files in os.walk(place):
        if "run.json" in files:
            yield Path(directory)
            names.clear()
        yield from claimed(Path(directory), files)
        for link in (path for path in (Path(directory, name) for name in names) if path.is_symlink()):
            yield from (path.parent for path in (link / "run.json", *link.glob("*/run.json")) if path.is_file())
            yield from claimed(link, (path.name for path in link.glob(".*.job")))


def claimed(directory: Path, files: Iterable[str]) -> Iterator[Path]:
    """The runs of a directory to which jobs lay claim by its files."""
    return (directory / name[1:-4] for name in files if re.fullmatch(r"\..+\.job", name))


def row(run: Path, name: str, queue: Optional[slurm.Queue]) -> Tuple[str, ...]:
    try:
        return cells(run, name, queue)
    except (UserError, OSError, KeyError, TypeError, AttributeError, ValueError, ArithmeticError, RecursionError) as error:
        return (name, f"unreadable: {error}", *[""] * (len(COLUMNS) - 2))


def cells(run: Path, name: str, queue: Optional[slurm.Queue]) -> Tuple[str, ...]:
    facts = read_json(run / "run.json") if (run / "run.json").is_file() else {"sessions": []}
    sessions, log = facts["sessions"], run / "train.log"
    curve = trainlog.curve(log) if log.is_file() else {"train": [], "valid": []}
    updates, left = progress(log) if log.is_file() else (0, None)
    saved = checkpoints.accounts(run / "checkpoints")
    updates = max([updates, trainlog.updates(curve), *(each.updates for each in saved)])
    finished = (run / "finished.json").is_file()
    state = state_of(run, finished, sessions, queue)
    limit, valid = max_update(run), curve["valid"]
    return (name, state, f"{updates:,}" + (f" of {limit:,}" if limit else ""),
            str(valid[-1].get("loss", "")) if valid else "",
            duration(left) if left is not None and state.startswith("running") else "", described(saved),
            str(max(0, len(sessions) - 1)))


def state_of(run: Path, finished: bool, sessions: Sequence[Dict[str, Any]], queue: Optional[slurm.Queue]) -> str:
    claim, jobs = claims.read_claim(run), claims.jobs_of(run, queue or {})
    if finished:  # what training goes on with has not
        job = f", job {jobs[-1].job}" if jobs else ""
        return f"finished (in evaluation{job})" if in_use(run) else "finished"
    if in_use(run) or any(job.state in ("RUNNING", "COMPLETING") for job in jobs):
        return f"running (job {jobs[0].job})" if jobs else "running"
    if jobs:
        return f"queued (job {jobs[0].job}: {jobs[0].reason})"
    if not sessions:
        return "not started" if queue is not None or not claim else f"queued, unless ended ({claim['submission']})"
    ended = sessions[-1]["exit_status"]
    if sessions[-1].get("diverged"):
        return "diverged"
    return "failed" if ended is not None and 0 < ended < 128 else "interrupted"


def progress(log: Path) -> Tuple[int, Optional[float]]:
    """(updates, seconds left at the present speed or None) by the newest line of progress."""
    newest = {}
    with open(log, encoding="utf-8", errors="replace") as lines:
        for line in lines:
            entry = trainlog.parse_line(line) if '"num_updates"' in line else None
            if entry and "loss" in entry:
                newest = entry
    updates = int(newest.get("num_updates", 0))
    limit, speed = max_update(log.parent), float(newest.get("ups") or 0)
    return updates, (limit - updates) / speed if limit and speed else None


def max_update(run: Path) -> int:
    """optimization.max_update of the run's resolved settings; 0 for none."""
    path = run / "config.yaml"
    try:
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
    except OSError:
        return 0
    block = re.search(r"^optimization:\n((?:[ -].*\n)*)", text, re.M)
    limit = block and re.search(r"^  max_update: (\d+)$", block[1], re.M)
    return int(limit[1]) if limit else 0


def described(saved: Sequence[checkpoints.Account]) -> str:
    """The newest checkpoint that can be read, with its updates and its age."""
    if not saved:
        return "none"
    newest = max(saved, key=lambda each: (each.updates, "last" in each.path.name))
    return f"{newest.path.name} ({newest.updates:,} updates, {duration(time.time() - newest.path.stat().st_mtime)} ago)"


def duration(seconds: float) -> str:
    seconds = int(seconds)
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds // size} {unit}"
    return f"{seconds} s"
