"""Checks of the numbers that norms are built with; each raises ValueError with the option, its value and what is valid."""


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
        if value < 0:
            raise ValueError(f"{name}={value!r}: must be zero or a positive number of steps")
