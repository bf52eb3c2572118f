"""The arithmetic of the norms, without autograd and without state, and the choice among the kernels that compute it.

``reference`` is plain torch and runs everywhere; every other kernel offers the same functions for Power Normalization
(``second_moment``, ``power_forward``, ``power_backward``, ``evaluate``), is held to it, and says what it ``serves`` and
whether it is ``unavailable`` on this machine. ``python -m fairseq_powernorm.kernels`` says which one is in use, and why.
"""
import logging
import os
from contextlib import contextmanager
from types import ModuleType
from typing import Dict, Iterator, List, Optional, Set, Tuple

import torch
from torch import Tensor

from . import c, reference, triton

__all__ = ["KERNELS", "choose", "evaluate", "explain", "only", "reference", "requested", "wants_gradient"]

logger = logging.getLogger(__name__)

#: name -> kernel; the first that serves a tensor is used
KERNELS: Dict[str, ModuleType] = {"triton": triton, "c": c, "torch": reference}
#: environment variable with the name of the only kernel to use beside ``torch``
VARIABLE = "POWERNORM_KERNEL"

_PLAIN = (Tensor, torch.nn.Parameter)
_chosen: Dict[Tuple[str, torch.dtype], ModuleType] = {}
_logged: Set[str] = set()


def requested() -> Optional[str]:
    """The kernel that the environment variable names, None if it names none.

    Raises:
        ValueError: it is unknown
        RuntimeError: it cannot be used on this machine
    """
    name = os.environ.get(VARIABLE)
    if not name:
        return None
    if name not in KERNELS:
        raise ValueError(f"{VARIABLE}={name!r}: must be one of {', '.join(KERNELS)}")
    reason = KERNELS[name].unavailable()
    if reason is not None:
        raise RuntimeError(f"{VARIABLE}={name!r}: this kernel cannot be used: {reason}")
    return name


def explain(device_type: str, dtype: torch.dtype) -> Tuple[str, List[str]]:
    """Name of the kernel for tensors of that kind, and why each kernel before it in :data:`KERNELS` is not used."""
    only, reasons = requested(), []
    for name, kernel in KERNELS.items():
        if name != "torch" and only not in (None, name):
            reasons.append(f"{name}: {VARIABLE}={only}")
        elif not kernel.serves(device_type, dtype, asked=only == name):
            reasons.append(f"{name}: not made for {device_type} and {str(dtype).split('.')[-1]}")
        elif kernel.unavailable() is not None:
            reasons.append(f"{name}: {kernel.unavailable()}")
        else:
            return name, reasons
    raise AssertionError("the torch kernel serves everything")


def _find(key: Tuple[str, torch.dtype]) -> ModuleType:
    name, reasons = explain(*key)
    kernel = _chosen[key] = KERNELS[name]
    message = f"Power Normalization on {key[0]}: kernel {kernel.describe()}"
    if reasons:
        message += f" ({'; '.join(reasons)})"
    if message not in _logged:
        _logged.add(message)
        logger.info(message)
    return kernel


@contextmanager
def only(name: str) -> Iterator[None]:
    """Inside, the kernel called ``name`` is used where it serves, else ``torch``; for tests and measurements.

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


def choose(x: Tensor, *others: Optional[Tensor]) -> ModuleType:
    """The kernel for ``x`` (with parameters ``others``): the one place where it is chosen.

    Whatever is not plain memory goes to the torch kernel: tensors that are being traced, compiled or transformed, and
    subclasses of Tensor.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._are_functorch_transforms_active():
        return reference
    if type(x) not in _PLAIN or x.layout is not torch.strided:
        return reference
    for each in others:
        if each is not None and type(each) not in _PLAIN:
            return reference
    key = (x.device.type, x.dtype)
    return _chosen.get(key) or _find(key)


def evaluate(
    x: Tensor,
    weight: Optional[Tensor] = None,
    bias: Optional[Tensor] = None,
    psi2: Optional[Tensor] = None,
    groups: int = 1,
    eps: float = 1e-5,
) -> Tensor:
    """PN in evaluation by the fastest kernel: layer scale, then ``u * weight / sqrt(psi2 + eps) + bias``.

    Where a gradient is wanted or the call is traced, it is computed by the torch kernel, with ordinary autograd.

    Args:
        x: ``... x C``
        weight, bias: ``C`` or None
        psi2: ``C``, the running second moment; None if ``weight`` has it in it already
        groups: channel groups of the layer scale, 0 for none
        eps: added to ``psi2``

    Returns:
        tensor of ``x``'s shape and dtype
    """
    kernel = reference if wants_gradient(x, weight, bias) else choose(x, weight, bias)
    return kernel.evaluate(x, weight, bias, psi2, groups, eps)


def wants_gradient(*tensors: Optional[Tensor]) -> bool:
    """Would an operation on these tensors be differentiated?"""
    return torch.is_grad_enabled() and any(each is not None and each.requires_grad for each in tensors)
