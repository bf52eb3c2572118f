"""The checkpoints of a run: which there are, which of them are intact, and what they say of the training."""

import collections
import contextlib
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Pattern, Tuple

from ..errors import UserError

EPOCH = re.compile(r"checkpoint(\d+)\.pt")
#: more than any training has
MOST_UPDATES = 2**53
UPDATE = re.compile(r"checkpoint_\d+_(\d+)\.pt")


def found(directory: Path, pattern: Pattern[str]) -> List[Path]:
    """The checkpoints whose names match, oldest first."""
    matches = ((pattern.fullmatch(path.name), path) for path in directory.glob("checkpoint*.pt") if path.is_file())
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
    """Is every byte of the checkpoint, a zip archive, what was written? Reads all of it and compares checksums."""
    try:
        if not path.is_file():  # a pipe, which nobody writes to
            return False
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except Exception:  # a damaged header can make zipfile raise nearly anything
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
        fewer = "--average N takes fewer" if paths else f"--available takes {newest.name}"
        raise UserError(f"{directory} has {len(paths)} of the {number} checkpoints to average "
                        f"({', '.join(path.name for path in paths) or 'none'}); {fewer}")
    return refuse_damaged(paths[-number:])


# ---- what a checkpoint says ------------------------------------------------------------------------------------------


class Account(NamedTuple):
    """What a checkpoint says of the training that saved it."""

    path: Path
    updates: int
    epoch: Optional[int]
    valid_loss: Optional[float]


def account(path: Path) -> Optional[Account]:
    """What a checkpoint says, without torch and without its tensors; None if it cannot be read.

    Only the pickle in it is read, and no class that it names is looked up, so that a foreign file executes no code.
    """
    with contextlib.suppress(Exception):  # whatever a damaged file makes zipfile and pickle raise
        with zipfile.ZipFile(path) as archive:
            name = next(name for name in archive.namelist() if name.rpartition("/")[2] == "data.pkl")
            with archive.open(name) as stream:
                state = _Reader(stream).load()
        extra = state.get("extra_state") or {}
        updates = int(state["optimizer_history"][-1]["num_updates"])
        if not 0 <= updates <= MOST_UPDATES:
            return None
        epoch, loss = (extra.get("train_iterator") or {}).get("epoch"), extra.get("val_loss")
        return Account(path, updates, epoch if isinstance(epoch, int) and 0 <= epoch <= MOST_UPDATES else None,
                       float(loss) if isinstance(loss, (int, float)) else None)
    return None


def accounts(directory: Path) -> List[Account]:
    """What the checkpoints in a directory say, those that can be read, fewest updates first."""
    found = map(account, sorted(path for path in directory.glob("checkpoint*.pt") if path.is_file()))
    return sorted(filter(None, found), key=lambda each: (each.updates, each.path.name))


def validations(directory: Path, config: Any) -> List[Dict[str, Any]]:
    """What the log says of a validation, of those after which the checkpoints in a directory were saved, in that order."""
    metric = config.checkpoint.best_checkpoint_metric
    return [{"epoch": each.epoch, f"valid_{metric}": str(each.valid_loss), "valid_num_updates": str(each.updates)}
            for each in accounts(directory) if each.valid_loss is not None]


class _Nothing(dict):  # type: ignore[type-arg]
    """Stands for an object of any class."""

    def __new__(cls, *_: Any, **__: Any) -> "_Nothing":
        return super().__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__()

    def __setstate__(self, _: Any) -> None:
        """Forgets it."""

    def append(self, _: Any) -> None:
        """Forgets it, too."""

    def extend(self, _: Any) -> None:
        """And these."""


class _Reader(pickle.Unpickler):
    """Reads numbers, texts, lists and dictionaries; whatever else there is becomes nothing."""

    def find_class(self, module: str, name: str) -> Callable[..., Any]:
        plain: Dict[Tuple[str, str], Callable[..., Any]] = {("collections", "OrderedDict"): collections.OrderedDict}
        return plain.get((module, name), _Nothing)

    def persistent_load(self, _: Any) -> Any:
        return _Nothing()
