"""Which checkpoint training resumes from after a process or a machine died while it saved one."""
import glob
import logging
import os
import re
import zipfile
from typing import Optional, Sequence

import torch

from . import checkpoint, compat

logger = logging.getLogger(__name__)

LAST = "checkpoint_last"
#: what fairseq calls checkpoints, without suffix and ending: checkpointE, checkpoint_E_U, the best, the N best
NAMES = r"checkpoint(?:\d+|_\d+_\d+|_best|_last|\.best_.+_-?\d+\.\d+)"


def whole(path: str) -> bool:
    """Is every byte of the checkpoint what was written? Reads all of it, see :func:`checkpoint.check_intact`.

    torch's older format, a row of pickles without checksums, counts as whole.

    Raises:
        OSError: the file cannot be read
    """
    with open(path, "rb") as stream:
        start = stream.read(2)
    if start != b"PK":
        return start[:1] == b"\x80"
    try:
        checkpoint.check_intact(path)
    except ValueError:
        return False
    return zipfile.is_zipfile(path)


def num_updates(path: str) -> Optional[int]:
    """The updates after which a checkpoint was saved, without reading its tensors; None if it is missing or damaged."""
    compat.allow_checkpoint_types()
    try:
        if not whole(path):
            return None
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        return int(state["optimizer_history"][-1]["num_updates"])
    except Exception:  # whatever a damaged file makes torch raise
        return None


def choose(directory: str, suffixes: Sequence[str] = ("",)) -> str:
    """The name, without suffix and ending, of the checkpoint in ``directory`` to resume from.

    ``checkpoint_last``, be it there or not, unless it is damaged or saving it was cut short: then the one with the most
    updates of those that are whole, with a warning.

    Args:
        suffixes: those of the files that make up one checkpoint (several if it is sharded)

    Raises:
        ValueError: the last checkpoint is damaged and no other one is whole
    """
    def files(name):
        return [os.path.join(directory, f"{name}{suffix}.pt") for suffix in suffixes]

    damaged = [path for path in files(LAST) if os.path.exists(path) and not whole(path)]
    # killed in the first save of all, which leaves nothing but a temporary
    unfinished = [f"{path}.tmp" for path in files(LAST) if not os.path.exists(path) and os.path.exists(f"{path}.tmp")]
    if not damaged and not unfinished:
        return LAST
    matches = (re.fullmatch(rf"({NAMES}){re.escape(suffixes[0])}\.pt", name) for name in os.listdir(directory))
    updates = {}
    for name in {match[1] for match in matches if match} - {LAST}:
        found = {num_updates(path) for path in files(name)}
        if len(found) == 1 and None not in found:
            updates[name] = found.pop()
    if updates:
        name = max(sorted(updates), key=lambda name: (updates[name], "best" not in name))
        logger.warning(
            f"{(damaged + unfinished)[0]} is truncated or damaged; going on from {os.path.basename(files(name)[0])} of the "
            f"same directory, which has {updates[name]} updates"
        )
        return name
    if not damaged:
        return LAST
    raise ValueError(
        f"checkpoint {damaged[0]!r}: truncated or damaged, and no other checkpoint there is whole; put a whole one in "
        "its place, or remove it to train from the beginning"
    )


def remove_temporaries(directory: str, suffix: str = "") -> None:
    """Remove what killed processes left of checkpoints that they were writing.

    The temporary of the last checkpoint stays: the next save overwrites it, and :func:`choose` looks for it.
    """
    for path in glob.glob(os.path.join(glob.escape(directory), "checkpoint*.pt.tmp")):
        name = os.path.basename(path)
        if re.fullmatch(rf"{NAMES}{re.escape(suffix)}\.pt\.tmp", name) and not name.startswith(LAST):
            os.remove(path)
