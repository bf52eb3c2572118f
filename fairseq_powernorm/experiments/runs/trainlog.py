"""Reads the log of a training run (common.log_format=json)."""

import json
from typing import Any, Dict, List, Optional

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
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def curve(path: AnyPath) -> Dict[str, List[Entry]]:
    """{"train": [...], "valid": [...]}: one entry per epoch and per validation, with updates, loss, nll_loss and ppl.

    After a resumption training repeats the updates since the last checkpoint; the later account of them replaces the
    earlier one.
    """
    curves: Dict[str, List[Entry]] = {"train": [], "valid": []}
    with open(path, encoding="utf-8", errors="replace") as lines:
        for line in lines:
            found = parse_line(line)
            for subset, entries in curves.items():
                if not found or f"{subset}_num_updates" not in found:
                    continue
                entry = {"updates": int(found[f"{subset}_num_updates"]), "epoch": found.get("epoch")}
                for key in ("loss", "nll_loss", "ppl"):
                    if f"{subset}_{key}" in found:
                        entry[key] = float(found[f"{subset}_{key}"])
                while entries and entries[-1]["updates"] >= entry["updates"]:
                    entries.pop()
                entries.append(entry)
    return curves


def updates(curves: Dict[str, List[Entry]]) -> int:
    """The number of updates that a run's curves reach."""
    return max((entry["updates"] for entries in curves.values() for entry in entries), default=0)


def brief(line: str, max_update: int, remark: str = "") -> Optional[str]:
    """A log line as shown to the user: progress in short, None for the lines that are in the log only.

    remark: what is to be said of each perplexity
    """
    found = parse_line(line)
    if found is None:
        shown = ("rror", "stopping training", "is truncated or damaged; going on from")
        return line if any(part in line for part in shown) else None
    if "valid_loss" in found:
        return (f"  epoch {found['epoch']}: valid loss {found['valid_loss']}, perplexity {found.get('valid_ppl')} "
                f"{f'({remark}) ' if remark else ''}after {found['valid_num_updates']} updates")
    if "num_updates" in found and "loss" in found:
        done = int(found["num_updates"])
        left = (max_update - done) / float(found["ups"]) if max_update and float(found.get("ups", 0)) else None
        return (f"  update {done:,}" + (f" of {max_update:,}" if max_update else "")
                + f": loss {found['loss']}, {found.get('wps', '?')} tokens/s, lr {found.get('lr')}"
                + (f", about {left / 60:.0f} min left" if left is not None else ""))
    return None
