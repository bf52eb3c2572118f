"""How far a long piece of work is: a bar where output goes to a terminal, lines where it does not."""

import os
import shutil
import sys
import threading
import time
from typing import Any, Iterable, Iterator, Optional, TextIO, TypeVar

Item = TypeVar("Item")

#: seconds between two lines, and between two pictures of a bar
TOLD_S, DRAWN_S = 10.0, 0.1
#: back to the beginning of the line, and nothing behind what follows
BEGIN, CLEAR = "\r", "\x1b[K"


def is_terminal(stream: TextIO) -> bool:
    """Can a line of this stream be written again? Not where TERM=dumb says so."""
    try:
        return stream.isatty() and os.environ.get("TERM", "") != "dumb"
    except ValueError:  # it is closed
        return False


class Progress:
    """Says how far a piece of work is, from wherever the work is done.

    Args:
        what: is being done, in a word or two
        total: of how many; None where nobody knows
        unit: of what is counted, such as "lines"; "B" are bytes
        stream: where it is shown; by default standard output
        initial: what an earlier piece of work has done of it, which says nothing of how fast this one is
        seconds: between two lines, where there is no terminal; None: there are none
    """

    def __init__(
        self,
        what: str,
        total: Optional[int] = None,
        unit: str = "",
        *,
        initial: int = 0,
        stream: Optional[TextIO] = None,
        seconds: Optional[float] = TOLD_S,
    ):
        self.what, self.total, self.unit, self.initial, self.seconds = what, total, unit, initial, seconds
        self.stream = sys.stdout if stream is None else stream
        self.is_bar = is_terminal(self.stream)
        self.begin = self.told = time.monotonic()
        self.drawn, self.picture, self.done, self.more = -DRAWN_S, "", 0, ""
        self.lock = threading.RLock()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        with self.lock:
            if self.picture:
                self.stream.write(BEGIN + CLEAR)
                self.stream.flush()
            self.picture, self.is_bar = "", False

    def reach(self, done: int, more: str = "") -> None:
        """So much is done. more: what else is to be said of it"""
        with self.lock:
            self.done, self.more = done, more or self.more
            now = time.monotonic()
            if self.is_bar:
                if now - self.drawn >= DRAWN_S or done == self.total:
                    self.drawn = now
                    self._draw()
            elif done and self.seconds is not None and now - self.told >= self.seconds:
                self.told = now
                print(f"  {self.what}: {self.counted()}", file=self.stream, flush=True)

    def counted(self) -> str:
        """Such as "300 of 1,000 lines"; bytes are given in MB."""
        scale, unit = (1e-6, "MB") if self.unit == "B" else (1, self.unit)
        whole = f" of {self.total * scale:,.0f}" if self.total else ""
        return f"{self.done * scale:,.0f}{whole} {unit}".rstrip()

    def say(self, line: str, stream: Optional[TextIO] = None) -> None:
        """Shows a line, above the bar if there is one. stream: another than that of the bar"""
        with self.lock:
            if self.picture:
                self.stream.write(BEGIN + CLEAR)
                self.stream.flush()
            print(line, file=stream or self.stream, flush=True)
            if self.picture:
                self._draw()

    def each(self, items: Iterable[Item]) -> Iterator[Item]:
        """The items, counted as they are taken."""
        for number, item in enumerate(items, 1):
            yield item
            self.reach(number)

    def _draw(self) -> None:
        """Writes the bar over the one before. A terminal's width may have changed since."""
        from tqdm import tqdm

        width = shutil.get_terminal_size().columns - 1
        scaled: Any = {"unit_scale": True} if self.unit == "B" else {"unit": f" {self.unit}".rstrip()}
        if not self.unit:
            scaled = {"unit": ""}
        self.picture = tqdm.format_meter(
            self.done, self.total or None, time.monotonic() - self.begin, ncols=width, prefix=f"  {self.what}",
            postfix=self.more or None, initial=min(self.initial, self.done), **scaled,
        )[:width]  # fmt: skip
        self.stream.write(BEGIN + self.picture + CLEAR)
        self.stream.flush()
