"""Checks of the numbers that norms are built with; each raises ValueError with the option, its value and what is valid."""
import numbers
from typing import Any

#: counts are kept in floating point, which knows each whole number below this
MOST = 2**53


def is_count(value: Any, *, least: int = 0) -> bool:
    """Is this a whole number, and neither too small nor too large to be counted to?"""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool) and least <= int(value) < MOST


def check_interval(name: str, value: float) -> None:
    """Raise ValueError unless 0 <= value <= 1."""
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{name}={value!r}: must lie in [0, 1]")


def check_number(name: str, value: float, *, least: float = 0.0) -> None:
    """Raise ValueError unless ``value`` is finite and at least ``least``."""
    if not least <= value < float("inf"):
        raise ValueError(f"{name}={value!r}: must be a finite number, {least:g} or more")


def check_updates(**options: int) -> None:
    """Raise ValueError for a number of steps that is not zero or positive."""
    for name, value in options.items():
        if not is_count(value):
            raise ValueError(f"{name}={value!r}: must be zero or a positive number of steps")
