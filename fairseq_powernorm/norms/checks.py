"""Checks of what norms are built with and called with; each raises ValueError, which says what is valid."""
import math
import numbers
from typing import Any, Callable, Collection, Mapping

import torch
from torch import Tensor

#: settings of a norm -> what raises ValueError for a value that one cannot have, given its name and the value
Checks = Mapping[str, Callable[[str, Any], None]]

INPUT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

#: numbers of norms become float32: the largest there is, and the smallest above 0 that no processor takes for 0
LARGEST, SMALLEST = torch.finfo(torch.float32).max, torch.finfo(torch.float32).tiny

#: counts are compared with the step count in float64, which knows each whole number below this
MOST = 2**53


def is_count(value: Any, *, least: int = 0) -> bool:
    """Is this a whole number, and neither too small nor too large to be counted to?"""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool) and least <= int(value) < MOST


def plain_number(value: Any) -> Any:
    """A number or bool of NumPy's, a fraction or the like as Python's own; what is none stays as it is."""
    if type(value).__module__ == "numpy" and getattr(value, "shape", None) == ():
        return value.item()
    if isinstance(value, numbers.Real) and not isinstance(value, (int, float)):
        return int(value) if isinstance(value, numbers.Integral) else float(value)
    return value


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def check_interval(name: str, value: float) -> None:
    """Raise ValueError unless 0 <= value <= 1."""
    if not (_is_number(value) and 0.0 <= value <= 1.0):
        raise ValueError(f"{name}={value!r}: must lie in [0, 1]")


def check_dim(dim: int) -> None:
    """Raise ValueError unless there are channels."""
    if not is_count(dim, least=1):
        raise ValueError(f"dim={dim!r}: must be a positive number of channels")


def check_number(name: str, value: float, *, least: float = -math.inf, above: float = -math.inf) -> None:
    """Raise ValueError unless ``value`` is finite, at least ``least`` and larger than ``above``, also in float32."""
    if not (_is_number(value) and abs(value) <= LARGEST and value >= max(least, above + SMALLEST)):
        limit = f", {least:g} or more" if least > -math.inf else f" above {above:g}" if above > -math.inf else ""
        raise ValueError(f"{name}={value!r}: must be a finite number{limit}, in float32")


def check_updates(name: str, value: int) -> None:
    """Raise ValueError for a number of steps that is not zero or positive."""
    if not is_count(value):
        raise ValueError(f"{name}={value!r}: must be zero or a positive number of steps")


def check_flag(name: str, value: bool) -> None:
    """Raise ValueError for anything but a bool, Python's or NumPy's."""
    if not isinstance(plain_number(value), bool):
        raise ValueError(f"{name}={value!r}: must be True or False")


def check_choice(name: str, value: str, choices: Collection[str]) -> None:
    """Raise ValueError for a value that is none of the choices."""
    if not (isinstance(value, str) and value in choices):
        raise ValueError(f"{name}={value!r}: must be one of {', '.join(choices)}")


def check_dense(x: Tensor) -> None:
    """Raise ValueError for a nested, sparse or otherwise packed input."""
    if x.is_nested:
        raise ValueError("input is a nested tensor: expected a dense one with a padding mask")
    if x.layout is not torch.strided:
        raise ValueError(f"input of layout {x.layout}: expected a dense tensor, torch.strided")


def check_dtype(x: Tensor) -> None:
    """Raise ValueError for an input that is not one of floating-point numbers."""
    if x.dtype not in INPUT_DTYPES:
        raise ValueError(f"input of dtype {x.dtype}: expected float16, bfloat16, float32 or float64")
