"""The autograd function in C++ over the sweeps of the C kernel: less work per call than that in Python, the same bits.

It is compiled on the user's machine for the torch that is installed there (:mod:`.build`): by the scripts, by ``python -m
fairseq_powernorm.kernels --build``, or in the background when a norm is first used on a CPU, for the processes that begin
later. Where it is not there, or does not serve a call, the functions in Python do.
"""
import ctypes
import importlib.util
import os
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Iterator

from . import build
from .interface import transformed

#: environment variable that says which is used: see :data:`CHOICES`
VARIABLE = "POWERNORM_AUTOGRAD"
CHOICES = {
    "build": "in C++; built in the background where it is not there yet (the default)",
    "prebuilt": "in C++ where it has been built",
    "python": "in Python",
}

#: the functions of the C kernel that it is given, in the order in which it takes them
_ENTRIES = ("forward", "backward", "evaluate", "batch_forward", "batch_backward", "batch_evaluate")

_loaded = False
_extension: Any = None
_reason = ""


def requested() -> str:
    """What the environment variable says.

    Raises:
        ValueError: it is unknown
    """
    given = os.environ.get(VARIABLE) or "build"
    if given not in CHOICES:
        raise ValueError(f"{VARIABLE}={given!r}: must be one of {', '.join(CHOICES)}")
    return given


def extension(library: ctypes.CDLL) -> Any:
    """The module with ``train``, ``train_batch`` and ``evaluate`` of ``csrc/autograd.cpp``; None where Python must do.

    It is loaded where torch computes operations and does nothing else with them, as it takes the modes of torch that are on
    meanwhile for the usual ones.

    Args:
        library: of the C kernel, whose sweeps it runs

    Raises:
        ValueError: the environment variable is wrong
    """
    if not _loaded:
        if transformed():
            return None
        _load(library)
    return _extension


def _load(library: ctypes.CDLL) -> None:
    global _loaded, _extension, _reason
    choice = requested()
    _loaded = True
    if choice == "python":
        _reason = f"{VARIABLE}=python"
    elif (path := build.find_autograd()) is not None:
        try:
            _extension = _import(path, library)
        except (ImportError, AttributeError, OSError) as error:
            _reason = f"that in C++ does not load: {error}; build it anew with: {build.BUILD}"
    elif choice == "build" and build.start_autograd():
        _reason = "that in C++ is being built, for processes that begin later"
    else:
        _reason = f"that in C++: {build.why_no_autograd()}"


def _import(path: Path, library: ctypes.CDLL) -> Any:
    spec = importlib.util.spec_from_file_location(build.AUTOGRAD, str(path))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    entries = (getattr(library, f"pn_{name}") for name in _ENTRIES)
    module.bind(*(ctypes.cast(entry, ctypes.c_void_p).value for entry in entries))
    return module


def describe() -> str:
    """What is in use, for people; loads nothing."""
    if _extension is not None:
        return "autograd in C++"
    return f"autograd in Python ({_reason})" if _reason else "autograd in Python"


@contextmanager
def in_python() -> Iterator[None]:
    """Inside, autograd is that in Python; for tests and measurements."""
    global _loaded, _extension, _reason
    before = _loaded, _extension, _reason
    _loaded, _extension, _reason = True, None, "asked for"
    try:
        yield
    finally:
        _loaded, _extension, _reason = before
