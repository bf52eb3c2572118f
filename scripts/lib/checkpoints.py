"""The checkpoints of a run: which there are, which of them are whole."""

import re
import zipfile

from settings import UserError

EPOCH = re.compile(r"checkpoint(\d+)\.pt")
UPDATE = re.compile(r"checkpoint_\d+_(\d+)\.pt")


def found(directory, pattern):
    """The checkpoints whose names match, oldest first."""
    matches = ((pattern.fullmatch(path.name), path) for path in directory.glob("checkpoint*.pt"))
    return [path for _, path in sorted((int(match[1]), path) for match, path in matches if match)]


def kept(config):
    """(pattern, number) of the checkpoints that a run's configuration keeps for averaging."""
    checkpoint = config.checkpoint
    if checkpoint.keep_last_epochs > 0 and not checkpoint.no_epoch_checkpoints:
        return EPOCH, checkpoint.keep_last_epochs
    if checkpoint.keep_interval_updates > 0:
        return UPDATE, checkpoint.keep_interval_updates
    raise UserError("the run keeps no checkpoints for averaging: checkpoint.keep_last_epochs and "
                    "checkpoint.keep_interval_updates are both off; give --average N")


def whole(path):
    """Is the checkpoint complete? torch saves zip archives, of which a truncated one lacks its directory."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (OSError, EOFError, zipfile.BadZipFile):
        return False


def last(config, directory, number):
    """The run's last checkpoints to average, oldest first; refuses if there are too few or one is damaged."""
    if number is None:
        pattern, number = kept(config)
    else:
        pattern = EPOCH if config.checkpoint.keep_last_epochs > 0 and not config.checkpoint.no_epoch_checkpoints else UPDATE
    paths = found(directory, pattern)
    if len(paths) < number:
        raise UserError(f"{directory} has {len(paths)} of the {number} checkpoints to average "
                        f"({', '.join(path.name for path in paths) or 'none'}); --average N takes fewer")
    paths = paths[-number:]
    damaged = [str(path) for path in paths if not whole(path)]
    if damaged:
        raise UserError(f"truncated or damaged checkpoint: {', '.join(damaged)}")
    return paths


def mend_last(directory):
    """Makes checkpoint_last.pt whole before training goes on from it; gives what was done, or None.

    fairseq copies that file without care, so a process killed at the wrong moment leaves part of it.
    """
    target = directory / "checkpoint_last.pt"
    if not target.exists() or whole(target):
        return None
    for path in sorted(directory.glob("checkpoint*.pt"), key=lambda path: path.stat().st_mtime, reverse=True):
        if path != target and "best" not in path.name and whole(path):
            partial = directory / "last.partial"
            partial.write_bytes(path.read_bytes())
            partial.replace(target)
            return f"{target.name} was truncated; going on from {path.name}"
    raise UserError(f"{target} is truncated or damaged, and no other checkpoint there is whole; remove the run directory")
