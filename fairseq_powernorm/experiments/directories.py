"""Directories that one process at a time is at work in, and that appear when they are whole."""

import contextlib
import errno
import fcntl
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any, Dict, Iterator, TextIO

from .errors import UserError
from .files import read_json, write_json


class Busy(UserError):
    """Another process is at work in a directory."""


def lock_path(directory: Path) -> Path:
    """The file beside a directory that is its lock; of a link beside what it leads to, which has a name of its own, too."""
    if directory.is_symlink():
        target = Path(os.path.realpath(directory))
        if os.access(target.parent, os.W_OK):
            directory = target
    return directory.with_name(f".{directory.name}.lock")


@contextlib.contextmanager
def locked(directory: Path, patience: float = 1.0) -> Iterator[TextIO]:
    """Holds the lock of a directory that need not exist yet; refuses if another process holds it for `patience` seconds.

    The lock is a file beside the directory. It opens when the process ends, however it ends, and the children that were
    given the file have ended, too. in_use() holds it for an instant, hence the patience.

    Raises:
        Busy: another process holds it
        UserError: there is no place for it
    """
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        stream = open(lock_path(directory), "a")
    except OSError as error:
        raise UserError(f"{directory} cannot be made: {error.filename}: {error.strerror}") from None
    with stream:
        end = time.monotonic() + patience
        while True:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if error.errno not in (errno.EACCES, errno.EAGAIN):
                    raise UserError(f"{stream.name} cannot be locked: {error.strerror}; runs need a file system with "
                                    f"flock (on Lustre the mount option flock)") from None
            if time.monotonic() > end:
                raise Busy(f"another process is at work in {directory} (it holds {stream.name})")
            time.sleep(0.1)
        yield stream


def in_use(directory: Path) -> bool:
    """Is a process at work in the directory? Leaves no file."""
    try:
        with open(lock_path(directory)) as stream:
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False


@contextlib.contextmanager
def whole_directory(target: Path) -> Iterator[Path]:
    """Yields a temporary sibling that takes the place of target when the block ends well, and vanishes when it does not.

    What an earlier process left when it was killed is removed, and a target that it had set aside is put back. The caller
    holds a lock.
    """
    partial = put_back(target)
    remove(partial)
    partial.mkdir(parents=True)
    try:
        yield partial
    except BaseException:
        remove(partial)
        raise
    replace(target, partial)


def put_back(target: Path) -> Path:
    """Puts back a target that a killed process had set aside; gives the path of its temporary sibling."""
    aside = target.with_name(f".{target.name}.old")
    if aside.is_dir() and not aside.is_symlink() and not target.exists():
        aside.rename(target)
    remove(aside)
    return target.with_name(f".{target.name}.partial")


def replace(target: Path, partial: Path) -> None:
    """The temporary sibling takes the place of target."""
    aside = target.with_name(f".{target.name}.old")
    if os.path.lexists(target):
        target.rename(aside)
    partial.rename(target)
    remove(aside)


def remove(path: Path) -> None:
    """Removes whatever is there, a directory with all in it, but nothing that a link leads to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    elif os.path.lexists(path):
        path.unlink()


@contextlib.contextmanager
def resumable_directory(target: Path, request: Dict[str, Any]) -> Iterator[Path]:
    """As whole_directory, but what an earlier process left after the same request is kept, to be gone on with.

    The request stands in prepared.json from the beginning; the block adds to it. When the block fails, the sibling
    stays if it holds a directory that is whole, that is, whose name begins with no dot.
    """
    partial = put_back(target)
    stamp = partial / "prepared.json"
    if partial.is_symlink() or not partial.is_dir():
        remove(partial)
    if partial.exists():
        there: Any = None
        with contextlib.suppress(UserError):  # damaged, or not there
            there = read_json(stamp)
        is_stamp = isinstance(there, dict) and request.keys() <= there.keys()
        if is_stamp and same({key: there[key] for key in request}, request):
            print(f"going on with what an interrupted run left in {partial}", flush=True)
        else:
            print(f"removing {partial}, which an interrupted run with other settings left", flush=True)
            remove(partial)
    if not partial.exists():
        partial.mkdir(parents=True)
        write_json(stamp, request)
    try:
        yield partial
    except BaseException:
        if not any(path.is_dir() and not path.name.startswith(".") for path in partial.iterdir()):
            remove(partial)
        raise
    replace(target, partial)


def same(one: Any, other: Any) -> bool:
    """Are two requests the same? A value of None is not known yet, and the same as any other."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    return one is None or other is None or bool(one == other)


def check_writable(what: str, directory: Path) -> None:
    """Refuses a directory in which, once it is made, no file can be written; leaves nothing."""
    existing = directory
    while not os.path.lexists(existing):
        existing = existing.parent
    if not existing.is_dir():
        raise UserError(f"{what} {directory}: {existing} is not a directory")
    try:
        with contextlib.suppress(FileNotFoundError):
            os.lstat(directory)  # its name may be too long
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise UserError(f"{what} {directory} cannot be written: {existing}: {error.strerror}") from None
