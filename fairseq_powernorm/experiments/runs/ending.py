"""How a training has ended: whole, diverged, or by an error; from its log and its checkpoints, not from its exit status."""

import math
import re
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Tuple

from . import checkpoints, trainlog

#: exit status of a training that has diverged
DIVERGED = 3
#: what the log says of losses: in words, key, key of the number of updates
LOSSES = (("training loss", "loss", "num_updates"), ("validation loss", "valid_loss", "valid_num_updates"))
ERROR = re.compile(r"^(?:\[rank\d+\]: ?)?((?:[A-Za-z_]\w*\.)*[A-Z]\w*(?:Error|Exception|Iteration|Overflow))(: .*)?$")
DISK = re.compile(r"\[Errno \d+\] (No space left on device|File too large|Disk quota exceeded|Input/output error).*$")


class Ending(NamedTuple):
    """updates: of the newest whole checkpoint; diverged: what is not finite, if anything; problem: what else has failed."""

    updates: int = 0
    diverged: Optional[str] = None
    problem: Optional[str] = None


def tells(line: str) -> bool:
    """Can a line of the log say something of how training ends?"""
    return '{"' in line or any(word in line for word in ("Err", "Exception", "Iteration", "Overflow"))


def of_success(run: Path, lines: List[str]) -> Ending:
    """How a training has ended whose process says that all went well.

    Args:
        lines: what it has logged
    """
    reached = max((each.updates for each in checkpoints.accounts(run / "checkpoints")), default=0)
    done = updates(lines)
    newest = newest_whole(run)
    try:
        diverged = losses(lines) or (weights(newest.path) if newest else None)
    except ValueError as error:  # a checkpoint that is no model's
        return Ending(problem=str(error))
    if diverged is not None:
        return Ending(diverged=diverged)
    if newest is None:
        return Ending(problem=f"no checkpoint in {run / 'checkpoints'} is whole")
    if newest.updates < max(done, reached):
        return Ending(problem=f"there have been {max(done, reached):,} updates, but the newest checkpoint that is whole, "
                              f"{newest.path.name}, is of {newest.updates:,}: checkpoint.save_interval=1, or "
                              f"checkpoint.save_interval_updates with keep_interval_updates, saves the last one")
    return Ending(newest.updates)


def of_failure(lines: List[str]) -> Ending:
    """How a training has ended whose process says that something went wrong, as far as its log tells."""
    diverged = losses(lines)
    found = [(match[1].rpartition(".")[2], (match[2] or "").lstrip(": "))
             for match in (ERROR.search(line.rstrip()) for line in lines) if match]
    floating = [text for name, text in found if name == "FloatingPointError"]
    if floating:
        return Ending(diverged="; ".join(filter(None, [diverged, f"{floating[0]} (after {updates(lines):,} updates)"])))
    full = next(filter(None, (DISK.search(line.rstrip()) for line in reversed(lines))), None)
    problem = full[0] if full else ": ".join(filter(None, found[-1])) if found else None
    return Ending(diverged=None if full else diverged, problem=problem)


def newest_whole(run: Path) -> Optional[checkpoints.Account]:
    """The checkpoint with the most updates of those that are whole, the last one before others with as many."""
    found = sorted(checkpoints.accounts(run / "checkpoints"), key=lambda each: (each.updates, "last" in each.path.name))
    return next((each for each in reversed(found) if checkpoints.intact(each.path)), None)


def losses(lines: List[str]) -> Optional[str]:
    """The losses that are not finite at the end of a log, and since which update; None if all are."""
    since: Dict[str, Optional[Tuple[float, int]]] = {}
    for entry in filter(None, map(trainlog.parse_line, lines)):
        for what, key, number in LOSSES:
            if key in entry and number in entry:
                value = trainlog.as_number(entry[key])
                if math.isfinite(value):
                    since[what] = None
                elif since.get(what) is None:
                    since[what] = (value, int(entry[number]))
    found = [f"the {what} is {at[0]} from update {at[1]:,} on" for what, at in since.items() if at]
    return ", ".join(found) or None


def weights(path: Path) -> Optional[str]:
    """The first parameter or statistic in a whole checkpoint that is not finite; None if all are."""
    import torch

    from ...checkpoint import load
    from ...norms import NORMS, RunningNorm

    statistics = {"iters", *(each for kind in NORMS.values() if issubclass(kind, RunningNorm) for each in kind.STATISTICS)}
    for name, tensor in load(str(path))["model"].items():
        if not bool(torch.isfinite(tensor).all()):
            kind = "the norm statistics" if name.rpartition(".")[2] in statistics else "the weights"
            return f"{kind} {name} in {path.name} are not finite"
    return None


def updates(lines: List[str]) -> int:
    """The updates that a log reaches."""
    entries: List[Dict[str, Any]] = list(filter(None, map(trainlog.parse_line, lines)))
    keys = ("num_updates", "train_num_updates", "valid_num_updates")
    return max((int(entry[key]) for entry in entries for key in keys if key in entry), default=0)
