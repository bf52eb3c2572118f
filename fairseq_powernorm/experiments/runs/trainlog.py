"""Reads the log of a training run (common.log_format=json)."""

import json
import math
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

from ..files import AnyPath

#: a validation, or the training of an epoch: updates, epoch, loss, nll_loss, ppl, as far as the log has them
Entry = Dict[str, Any]


def parse_line(line: str) -> Optional[Dict[str, Any]]:
    """The JSON object at the end of a log line, or None."""
    start = line.find('{"')
    if start < 0:
        return None
    try:
        found = json.loads(line[start:])
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def curve(path: AnyPath, validations: Sequence[Dict[str, Any]] = ()) -> Dict[str, List[Entry]]:
    """{"train": [...], "valid": [...]}: one entry per epoch and per validation, with updates, loss, nll_loss and ppl.

    After a resumption training repeats the updates since the last checkpoint; the later account of them replaces the
    earlier one.

    Args:
        path: of the log
        validations: further ones, as the log has them; those that go beyond it are added
    """
    curves: Dict[str, List[Entry]] = {"train": [], "valid": []}
    with open(path, encoding="utf-8", errors="replace") as lines:
        for found in filter(None, map(parse_line, lines)):
            for subset, entries in curves.items():
                entry = _entry(found, subset)
                if entry is None:
                    continue
                while entries and entries[-1]["updates"] >= entry["updates"]:
                    entries.pop()
                entries.append(entry)
    for found in beyond(curves, validations):
        entry = _entry(found, "valid")
        if entry is not None:
            curves["valid"].append(entry)
    return curves


def _entry(found: Dict[str, Any], subset: str) -> Optional[Entry]:
    """A line's account of a subset, if it has one."""
    try:
        updates, epoch = int(found[f"{subset}_num_updates"]), found.get("epoch")
    except (KeyError, ValueError, TypeError, OverflowError):
        return None
    entry: Entry = {"updates": updates, "epoch": epoch if isinstance(epoch, int) else None}
    for key in ("loss", "nll_loss", "ppl"):
        if f"{subset}_{key}" in found:
            entry[key] = as_number(found[f"{subset}_{key}"])
    return entry


def as_number(value: Any) -> float:
    """A number of the log, NaN for null, which fairseq has for the mean of nothing."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan


def beyond(curves: Dict[str, List[Entry]], validations: Sequence[Dict[str, Any]]) -> List[Dict[str, Any]]:
    """Those of some validations, fewest updates first, that follow on what the curves have, each once."""
    valid = curves["valid"]
    reached, found = valid[-1]["updates"] if valid else 0, []
    for each in validations:
        if int(each["valid_num_updates"]) > reached:
            reached = int(each["valid_num_updates"])
            found.append(each)
    return found


def complete(path: Path, validations: Sequence[Dict[str, Any]]) -> None:
    """Adds validations to a log, after which checkpoints were saved, and which it lacks: who wrote it was killed before.

    Args:
        path: of the log, which need not exist
        validations: as the log has them, fewest updates first
    """
    text = path.read_bytes() if path.is_file() else b""
    there = curve(path) if text else {"train": [], "valid": []}
    lines = "" if not text or text.endswith(b"\n") else "\n"
    lines += "".join(f"as the checkpoints have it: {json.dumps(found)}\n" for found in beyond(there, validations))
    if lines:
        with open(path, "a", encoding="utf-8") as stream:
            stream.write(lines)


def updates(curves: Dict[str, List[Entry]]) -> int:
    """The number of updates that a run's curves reach."""
    return max((entry["updates"] for entries in curves.values() for entry in entries), default=0)


def progress_of(found: Dict[str, Any]) -> Optional[Tuple[int, str]]:
    """(updates, what else is said of them) of a line about updates; None for another."""
    if "num_updates" not in found or "loss" not in found:
        return None
    return int(found["num_updates"]), f"loss {found['loss']}, {found.get('wps', '?')} tokens/s"


def brief(line: str, max_update: int, remark: str = "") -> Optional[str]:
    """A log line as shown to the user: progress in short, None for the lines that are in the log only.

    remark: what is to be said of each perplexity
    """
    found = parse_line(line)
    if found is None:
        shown = ("rror", "stopping training", "is truncated or damaged; going on from")
        traceback = line.startswith((" ", "Error executing job"))  # what it comes to is the last line of the session
        return line if any(part in line for part in shown) and not traceback else None
    if "valid_loss" in found:
        return (f"  epoch {found['epoch']}: valid loss {found['valid_loss']}, perplexity {found.get('valid_ppl')} "
                f"{f'({remark}) ' if remark else ''}after {found['valid_num_updates']} updates")
    reached = progress_of(found)
    if reached is not None:
        done, more = reached
        left = (max_update - done) / float(found["ups"]) if max_update and float(found.get("ups", 0)) else None
        return (f"  update {done:,}" + (f" of {max_update:,}" if max_update else "")
                + f": {more}, lr {found.get('lr')}"
                + (f", about {left / 60:.0f} min left" if left is not None else ""))
    return None
