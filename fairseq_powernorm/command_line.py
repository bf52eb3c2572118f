"""How a command ends: with its exit status, and where it is refused or interrupted, or a disk is full, with one line."""

import contextlib
import errno
import io
import os
import signal
import sys
from typing import Callable, List, NoReturn, Optional, Sequence, Tuple, Type

#: what a disk says that is full, read-only or broken, and a path that leads nowhere
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.EACCES, errno.EPERM, errno.ENOTDIR,
        errno.EISDIR, errno.EEXIST, errno.ELOOP, errno.ENAMETOOLONG, errno.ESTALE)
#: the variable by which a script says how it was called
SCRIPT = "PN_SCRIPT"


def run(
    command: Callable[[List[str]], Optional[int]],
    arguments: Optional[Sequence[str]] = None,
    refusals: Tuple[Type[Exception], ...] = (),
) -> NoReturn:
    """Carries out a command, by default with the words of the command line, and ends with its exit status.

    A refusal, the disk's too, is one line on stderr and exit status 2. SIGINT and SIGTERM end a command as
    KeyboardInterrupt does, with one line and exit status 130 or 143; while it ends, further ones change nothing.

    Args:
        refusals: exceptions that are refusals
    """
    _open_streams()
    stopped = _stoppable()
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not _has_place() and not {"-h", "--help"}.intersection(words):
        _refuse("the current directory has been removed; change to one that is there")
    try:
        status = command(words)
        if stopped:  # and something has swallowed it
            raise KeyboardInterrupt
        sys.stdout.flush()
        sys.exit(status)
    except refusals as error:
        _refuse(error, 128 + stopped[0] if stopped else 2)
    except BrokenPipeError:  # "| head" has seen enough
        _drop_output()
        sys.exit(128 + signal.SIGPIPE)
    except OSError as error:
        if error.errno not in DISK:
            raise
        _refuse(f"{in_one_line(str(error.filename or 'cannot write'))}: {error.strerror}")
    except KeyboardInterrupt as error:
        _refuse("; ".join(["interrupted", *map(str, error.args)]), 128 + (stopped or [signal.SIGINT])[0])


def _has_place() -> bool:
    """Is there a current directory, from which relative paths lead?"""
    try:
        os.getcwd()
    except FileNotFoundError:
        return False
    return True


def _open_streams() -> None:
    """Lets standard streams that the caller has closed lead nowhere: a file would take their places, and their output."""
    for place, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(place)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free, this one
        if getattr(sys, name) is None:
            setattr(sys, name, open(place, mode, closefd=False))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal need not know every character


def _stoppable() -> List[int]:
    """Lets the first SIGINT or SIGTERM raise KeyboardInterrupt, and a third one end at once; gives the list of them."""
    stopped: List[int] = []

    def stop(received: int, _frame: object) -> None:
        stopped.append(received)
        if len(stopped) == 1:
            raise KeyboardInterrupt
        if len(stopped) > 2:
            os._exit(128 + received)

    for each in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(each) != signal.SIG_IGN:  # as nohup and "&" leave it
            signal.signal(each, stop)
    return stopped


def _drop_output() -> None:
    """What is still to be printed is not, and does no harm where Python ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _refuse(reason: object, status: int = 2) -> NoReturn:
    try:
        sys.stdout.flush()
    except OSError:  # the disk that is full
        _drop_output()
    with contextlib.suppress(OSError):
        print(f"{called_as()}: error: {reason}", file=sys.stderr, flush=True)
    sys.exit(status)


def in_one_line(text: str) -> str:
    """A text with escapes for what cannot be printed: line ends, and what moves a terminal's cursor."""
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode("ascii") for each in text)


def called_as() -> str:
    """What the user called: a script, or a module with ``python -m``."""
    script = os.environ.get(SCRIPT)
    if script:
        return script
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec is not None:
        name: str = spec.name
        return "python -m " + (name[: -len(".__main__")] if name.endswith(".__main__") else name)
    return os.path.basename(sys.argv[0])
