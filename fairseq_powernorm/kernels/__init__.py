"""The arithmetic of the norms, without autograd and without state, and the choice among the backends that compute it.

``eager`` is plain torch and runs everywhere; :mod:`.interface` says what a backend offers.
``python -m fairseq_powernorm.kernels`` says which one is in use, and why.
"""
import logging
import math
import os
from contextlib import contextmanager
from typing import Any, Dict, Iterator, List, Optional, Set, Tuple

import torch
from torch import Tensor

from . import c, eager, triton
from .interface import Backend, BatchBackend, plain, readable, require_memory, transformed, writable

__all__ = [
    "KERNELS",
    "autograd_for",
    "batch_backend",
    "choose",
    "choose_for_gradient",
    "choose_for_step",
    "eager",
    "evaluate",
    "explain",
    "layer_scale",
    "only",
    "requested",
]

logger = logging.getLogger(__name__)

_is_compiling = torch.compiler.is_compiling

#: name -> backend; the first that serves a tensor is used
KERNELS: Dict[str, Backend] = {"triton": triton, "c": c, "eager": eager}
#: environment variable with the name of the only backend to use beside ``eager``
VARIABLE = "POWERNORM_KERNEL"
#: earlier names that the environment variable still understands
_ALIASES = {"torch": "eager"}

_Key = Tuple[str, torch.dtype]
_chosen: Dict[_Key, Backend] = {}
_logged: Set[str] = set()


def requested() -> Optional[str]:
    """The backend that the environment variable names, None if it names none.

    Raises:
        ValueError: it is unknown
        RuntimeError: it cannot be used on this machine
    """
    given = os.environ.get(VARIABLE)
    if not given:
        return None
    name = _ALIASES.get(given, given)
    if name not in KERNELS:
        raise ValueError(f"{VARIABLE}={given!r}: must be one of {', '.join(KERNELS)}")
    reason = KERNELS[name].unavailable()
    if reason is not None:
        raise RuntimeError(f"{VARIABLE}={given!r}: this kernel cannot be used: {reason}")
    return name


def explain(device_type: str, dtype: torch.dtype) -> Tuple[str, List[str]]:
    """Name of the backend for tensors of that kind, and why each backend before it in :data:`KERNELS` is not used."""
    only, reasons = requested(), []
    for name, kernel in KERNELS.items():
        if name != "eager" and only not in (None, name):
            reasons.append(f"{name}: {VARIABLE}={only}")
        elif not kernel.serves(device_type, dtype, asked=only == name):
            reasons.append(f"{name}: not made for {device_type} and {str(dtype).split('.')[-1]}")
        elif (reason := kernel.unavailable()) is not None:
            reasons.append(f"{name}: {reason}")
        else:
            return name, reasons
    raise AssertionError("eager serves everything")


def _find(key: _Key) -> Backend:
    name, reasons = explain(*key)
    kernel = KERNELS[name]
    if kernel is c:
        c.autograd()  # which the message describes
    _chosen[key] = kernel
    message = f"Power Normalization on {key[0]}: kernel {kernel.describe()}"
    if reasons:
        message += f" ({'; '.join(reasons)})"
    if message not in _logged:
        _logged.add(message)
        # a backend that is made for these tensors and cannot be used is worth a line wherever nobody has set up a log
        made_for = [each for name, each in KERNELS.items() if each is not eager and each.serves(*key)]
        slow = kernel is eager and requested() is None and any(each.unavailable() for each in made_for)
        logger.log(logging.WARNING if slow else logging.INFO, message)
    return kernel


@contextmanager
def only(name: str) -> Iterator[None]:
    """Inside, the backend called ``name`` is used where it serves, else ``eager``; for tests and measurements.

    Raises:
        ValueError, RuntimeError: it is unknown, or cannot be used on this machine
    """
    global _chosen
    before, variable = _chosen, os.environ.get(VARIABLE)
    os.environ[VARIABLE] = name
    try:
        requested()
        _chosen = {}
        yield
    finally:
        _chosen = before
        if variable is None:
            del os.environ[VARIABLE]
        else:
            os.environ[VARIABLE] = variable


def autograd_for(x: Tensor) -> Any:
    """The autograd function in C++ (:mod:`.native`) that may be asked first for a pass over ``x``; None if there is none.

    It has a gate of its own, and answers None where it leaves a call to Python.
    """
    if _is_compiling() or not x.is_cpu:
        return None
    key = ("cpu", x.dtype)
    return c.autograd() if (_chosen.get(key) or _find(key)) is c else None


def choose(x: Tensor, *vectors: Optional[Tensor], valid: Optional[Tensor] = None) -> Backend:
    """The backend for a pass over ``x``: the one place where it is chosen.

    Args:
        x: input, ``... x C``
        vectors: parameters and statistics (``C``), or None
        valid: bool, one for each row; or None

    Raises:
        ValueError: a vector or the mask is of another size
    """
    channels = x.size(-1)
    for each in vectors:
        if each is not None and each.numel() != channels:
            raise ValueError(f"per-channel tensor of shape {tuple(each.shape)}: expected {channels} values")
    if valid is not None and (valid.numel() * channels != x.numel() or valid.dtype is not torch.bool):
        rows = math.prod(x.shape[:-1])
        raise ValueError(
            f"mask of shape {tuple(valid.shape)} and dtype {valid.dtype}: expected {rows} bool, one for each row"
        )
    if transformed() or not plain(x):
        return eager
    key = (x.device.type, x.dtype)
    backend = _chosen.get(key) or _find(key)
    if backend is eager:
        return eager
    device = x.get_device()
    for each in vectors:
        if each is not None and not readable(each, device):
            return eager
    if valid is not None and not (plain(valid) and valid.get_device() == device and valid.is_contiguous()):
        return eager
    return backend


def batch_backend(backend: Backend) -> Optional[BatchBackend]:
    """The backend as one that normalizes by statistics of the batch; None if it does not."""
    return c if backend is c else None


def choose_for_gradient(
    backend: Backend,
    grad_y: Tensor,
    x: Tensor,
    r: Optional[Tensor],
    weight: Optional[Tensor],
    saved: Tensor,
    valid: Optional[Tensor],
    nu: Tensor,
    *,
    hooked: bool = True,
) -> Backend:
    """``backend``, which made the forward pass, or ``eager`` if it must not read one of these tensors.

    Args:
        hooked: saved tensors come back from wherever hooks have put them; else they are those of the forward pass

    Raises:
        RuntimeError: the memory of one of them has been given back since the forward pass
    """
    require_memory(grad_y, x, r, weight, saved, valid)
    if backend is eager:
        return eager
    device = x.get_device()
    if not hooked:
        fits = grad_y.dtype is x.dtype and grad_y.shape == x.shape and grad_y.get_device() == device
        return backend if fits and plain(grad_y) and readable(nu, device) and not transformed() else eager
    if choose(x, weight, nu, valid=valid) is not backend:
        return eager
    for each, dtype, shape in ((grad_y, x.dtype, x.shape), (r, torch.float32, None), (saved, torch.float32, None)):
        if each is not None and not (
            plain(each)
            and each.dtype is dtype
            and each.get_device() == device
            and (each.shape == shape if shape is not None else each.is_contiguous())
        ):
            return eager
    return backend


def choose_for_step(tally: Tensor, *statistics: Tensor) -> Backend:
    """The backend for a step of running statistics, which it writes: float32 memory that is wholly their own."""
    if transformed() or not (plain(tally) and tally.dtype is torch.float64 and tally.is_contiguous()):
        return eager
    key = (tally.device.type, torch.float32)
    backend = _chosen.get(key) or _find(key)
    if backend is eager:
        return eager
    device = tally.get_device()
    for each in statistics:
        if each.get_device() != device or not (plain(each) and writable(each)):
            return eager
    return backend


def evaluate(
    x: Tensor,
    weight: Optional[Tensor] = None,
    bias: Optional[Tensor] = None,
    psi2: Optional[Tensor] = None,
    groups: int = 1,
    eps: float = 1e-5,
    mean: Optional[Tensor] = None,
) -> Tensor:
    """Evaluation by the fastest backend: layer scale, then ``(u - mean) * weight / sqrt(psi2 + eps) + bias``.

    Where a gradient is wanted or the call is traced, it is computed by ``eager``, with ordinary autograd.

    Args:
        x: ``... x C``
        weight, bias: ``C`` or None
        psi2: ``C``, the running second moment; None if ``weight`` has it in it already
        groups: channel groups of the layer scale, 0 for none
        eps: added to ``psi2``, or without it to the mean square of the layer scale
        mean: ``C``; None: nothing is subtracted

    Returns:
        tensor of ``x``'s shape and dtype
    """
    autograd = autograd_for(x)
    if autograd is not None and (y := autograd.evaluate(x, weight, bias, psi2, groups, eps, mean)) is not None:
        found: Tensor = y
        return found
    backend = eager if wants_gradient(x, weight, bias) else choose(x, weight, bias, psi2, mean)
    if mean is None:
        return backend.evaluate(x, weight, bias, psi2, groups, eps)
    sweeps = batch_backend(backend)
    if sweeps is None or psi2 is None:
        return eager.evaluate(x, weight, bias, psi2, groups, eps, mean)
    return sweeps.batch_evaluate(x, weight, bias, mean, psi2, groups, eps)


def layer_scale(
    x: Tensor, weight: Optional[Tensor], bias: Optional[Tensor], groups: int, eps: Optional[float]
) -> Optional[Tensor]:
    """The layer scale alone, ``x * weight / sqrt(mean over the group of x^2 + eps) + bias``, by a sweep on a CPU.

    Args:
        x: ``... x C``
        weight, bias: ``C`` or None
        groups: channel groups
        eps: added to the mean square; None is torch's own choice

    Returns:
        tensor of ``x``'s shape and dtype; None, with nothing done, where torch's operations are to compute it: a gradient is
        wanted, the call is compiled, traced or transformed, ``eps`` is None, or no sweep serves ``x``
    """
    if eps is None or _is_compiling() or not x.is_cpu:
        return None
    autograd = autograd_for(x)
    if autograd is not None and (y := autograd.evaluate(x, weight, bias, None, groups, eps, None)) is not None:
        found: Tensor = y
        return found
    # a trace would keep what choose() looks at
    if transformed() or wants_gradient(x, weight, bias) or (backend := choose(x, weight, bias)) is eager:
        return None
    return backend.evaluate(x, weight, bias, None, groups, eps)


def wants_gradient(*tensors: Optional[Tensor]) -> bool:
    """Would an operation on these tensors be differentiated?"""
    return torch.is_grad_enabled() and any(each is not None and each.requires_grad for each in tensors)
