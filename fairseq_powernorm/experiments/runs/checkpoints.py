"""The checkpoints of a run: which there are, which of them are intact."""

import re
from pathlib import Path
from typing import Any, List, Optional, Pattern, Tuple

from ..errors import UserError

EPOCH = re.compile(r"checkpoint(\d+)\.pt")
UPDATE = re.compile(r"checkpoint_\d+_(\d+)\.pt")


def found(directory: Path, pattern: Pattern[str]) -> List[Path]:
    """The checkpoints whose names match, oldest first."""
    matches = ((pattern.fullmatch(path.name), path) for path in directory.glob("checkpoint*.pt"))
    return [path for _, path in sorted((int(match[1]), path) for match, path in matches if match)]


def kept(config: Any) -> Tuple[Pattern[str], int]:
    """(pattern, number) of the checkpoints that a run's configuration keeps for averaging."""
    checkpoint = config.checkpoint
    if checkpoint.keep_last_epochs > 0 and not checkpoint.no_epoch_checkpoints:
        return EPOCH, checkpoint.keep_last_epochs
    if checkpoint.keep_interval_updates > 0:
        return UPDATE, checkpoint.keep_interval_updates
    raise UserError("the run keeps no checkpoints for averaging: checkpoint.keep_last_epochs and "
                    "checkpoint.keep_interval_updates are both off; give --average N")


def intact(path: Path) -> bool:
    """Is every byte of the checkpoint what was written? See :func:`fairseq_powernorm.resume.whole`."""
    from ...resume import whole  # loads torch

    try:
        return whole(str(path))
    except OSError:
        return False


def best(directory: Path) -> List[Path]:
    """The checkpoint with the lowest validation loss, in a list; refuses if there is none or it is damaged."""
    path = directory / "checkpoint_best.pt"
    if not path.is_file():
        raise UserError(f"{directory} has no {path.name}, the checkpoint with the lowest validation loss; "
                        f"--average N takes the last N")
    return refuse_damaged([path])


def refuse_damaged(paths: List[Path]) -> List[Path]:
    """paths, if each of them is whole."""
    damaged = [str(path) for path in paths if not intact(path)]
    if damaged:
        raise UserError(f"truncated or damaged checkpoint: {', '.join(damaged)}")
    return paths


def last(config: Any, directory: Path, number: Optional[int], available: bool = False) -> List[Path]:
    """The run's last checkpoints to average, oldest first; refuses if there are too few or one is damaged.

    available: take as many as there are, checkpoint_last.pt if none was kept, where a short run has fewer
    """
    if number is None:
        pattern, number = kept(config)
    else:
        pattern = EPOCH if config.checkpoint.keep_last_epochs > 0 and not config.checkpoint.no_epoch_checkpoints else UPDATE
    paths = found(directory, pattern)
    newest = directory / "checkpoint_last.pt"
    if available and not paths and newest.is_file():
        paths = [newest]
    if len(paths) < number and not (available and paths):
        raise UserError(f"{directory} has {len(paths)} of the {number} checkpoints to average "
                        f"({', '.join(path.name for path in paths) or 'none'}); --average N takes fewer")
    return refuse_damaged(paths[-number:])
