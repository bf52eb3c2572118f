"""The Triton backend for GPUs: float32, bfloat16 and float16, any number of channels (code: :mod:`.triton_device`).

One read of ``x`` and one write of ``y`` forward, one read of ``x`` and ``dy`` and one write of ``dx`` backward, no host
synchronization. Where the output needs the sums of its own batch (in the warm-up, or a channel that jumps) ``x`` is read
twice. Results are the same bit for bit from run to run on the same device. Saved for the backward pass are ``x``, one
float per row and group, and a few per channel.
"""
import math
import os
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, ContextManager, Iterator, Optional, Tuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from .interface import LAYER_SCALE_EPS, Backward, Forward, OwnStep, PowerNormSpec, StepSpec

if TYPE_CHECKING:
    from .triton_device import Launch

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
#: compute capability of the oldest GPUs that it is compiled for
CAPABILITY = (8, 0)

#: the module :mod:`.triton_device`, once Triton has been found to work
_code: Any = None
_unavailable: Optional[str] = None


def unavailable() -> Optional[str]:
    """Why this kernel cannot be used on this machine; None if it can. Triton is imported where there is a GPU only."""
    global _unavailable
    if _code is None and _unavailable is None:
        _unavailable = _load()
    return _unavailable


def _load() -> Optional[str]:
    """Import Triton and run a kernel; returns why that cannot be done."""
    global _code
    device = "cpu" if _interpreted() else "cuda"
    if device == "cuda":
        if not torch.cuda.is_available():
            return "there is no CUDA device"
        found = torch.cuda.get_device_capability()
        if found < CAPABILITY:
            return "the GPU's compute capability is {}.{}, not {}.{} or later".format(*found, *CAPABILITY)
    try:
        from . import triton_device
    except ImportError as error:
        return f"Triton cannot be imported: {error}"
    _code = triton_device
    try:
        evaluate(torch.ones(1, 1, device=device), None, None, None, 1, 1e-5)
    except Exception as error:  # no C compiler, another version's interface: whatever it is, torch serves
        _code = None
        return f"Triton does not work here: {type(error).__name__}: {' '.join(str(error).split())}"
    return None


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def serves(device_type: str, dtype: torch.dtype, *, asked: bool = False) -> bool:
    """Is this kernel made for tensors of that kind? Interpreted, which is for tests, only if it is ``asked`` for."""
    if _interpreted():
        return asked and device_type in ("cpu", "cuda") and dtype in _DTYPES
    return device_type == "cuda" and dtype in _DTYPES


def describe() -> str:
    """What is in use, for people."""
    return f"Triton {_code.triton.__version__}" + (" (interpreted)" if _interpreted() else "")


def _on(x: Tensor) -> ContextManager[Any]:
    """Triton launches on the current device: makes it that of ``x``."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def _forward(
    x: Tensor,
    run: "Launch",
    shape: Tuple[int, int],
    groups: int,
    valid: Optional[Tensor],
    psi2: Optional[Tensor],
    weight: Optional[Tensor],
    bias: Optional[Tensor],
    eps: float,
    *,
    scale_eps: float = LAYER_SCALE_EPS,
    y: Optional[Tensor] = None,
    r: Optional[Tensor] = None,
    inv: Optional[Tensor] = None,
    sums: Optional[Tensor] = None,
    padding: bool = False,
) -> None:
    """Launch :func:`.triton_device.forward`."""
    _code.forward[run.grid](
        x, y, r, valid, psi2, inv, weight, bias, sums, *shape, run.size, eps, scale_eps,
        LAYER_SCALE=groups > 0, OUTPUT=y is not None, SAVE=r is not None, SUMS=sums is not None, PADDING=padding,
        HAS_PSI2=psi2 is not None, HAS_INV=inv is not None, HAS_VALID=sums is not None and valid is not None,
        HAS_WEIGHT=weight is not None, HAS_BIAS=bias is not None, TILE_ROWS=run.tile_rows,
        TILE_COLUMNS=run.tile_columns, STAGES=run.stages, num_warps=run.warps,
    )  # fmt: skip


def _forward_end(
    x: Tensor,
    run: "Launch",
    shape: Tuple[int, int],
    sums: Tensor,
    valid: Optional[Tensor],
    psi2: Optional[Tensor],
    batch: Optional[Tensor],
    saved: Optional[Tensor],
    spec: PowerNormSpec,
    *,
    padding: bool,
) -> Tensor:
    """Launch :func:`.triton_device.forward_end`; gives the tally."""
    channels = shape[1]
    tally = x.new_empty(channels + 2, dtype=torch.float64)
    _code.forward_end[(_blocks(channels),)](
        sums, psi2, batch, saved, tally, *shape, run.grid[0], spec.eps, spec.jump,
        SAVE=saved is not None, FORWARD_BATCH=spec.forward_batch, BACKWARD_BATCH=spec.backward_batch,
        JUMP=spec.jump < math.inf, HAS_BATCH=batch is not None, PADDING=padding, HAS_VALID=valid is not None,
        CHANNELS=_code.END_CHANNELS, PARTS=_code.END_PARTS, num_warps=4,
    )  # fmt: skip
    return tally


def _blocks(channels: int) -> int:
    return int(-(-channels // _code.END_CHANNELS))


def _shape(x: Tensor) -> Tuple[int, int]:
    """Rows and channels."""
    channels = x.size(-1)
    return x.numel() // channels, channels


def _partial(x: Tensor, run: "Launch", kinds: int) -> Tensor:
    """Memory for the partial sums of a sweep."""
    return x.new_empty(run.grid[0] * (kinds * x.size(-1) + 1), dtype=torch.float32)


def _contiguous(*tensors: Optional[Tensor]) -> Iterator[Optional[Tensor]]:
    return (None if each is None else each.contiguous() for each in tensors)


def second_moment(x: Tensor, valid: Optional[Tensor], groups: int) -> Tensor:
    """See :func:`.eager.second_moment`."""
    x, shape = x.contiguous(), _shape(x)
    (valid,) = _contiguous(valid)
    run = _code.launch(x.device, *shape, groups, _code.FORWARD_PROGRAMS)
    sums = _partial(x, run, 1)
    spec = PowerNormSpec(
        groups=groups, eps=0.0, nu_scale=0.0, gradient_scale=1.0, forward_batch=False, backward_batch=False,
        skip_padding=True,
    )
    with _on(x):
        _forward(x, run, shape, groups, valid, None, None, None, 0.0, sums=sums)
        return _forward_end(x, run, shape, sums, valid, None, None, None, spec, padding=False)


def power_forward(
    x: Tensor,
    weight: Optional[Tensor],
    bias: Optional[Tensor],
    valid: Optional[Tensor],
    psi2: Tensor,
    spec: PowerNormSpec,
    batch: Optional[Tensor] = None,
    step: Optional[OwnStep] = None,
) -> Forward:
    """See :func:`.eager.power_forward`."""
    x, shape, groups = x.contiguous(), _shape(x), spec.groups
    rows, channels = shape
    psi2 = psi2.contiguous()
    weight, bias, batch, valid = _contiguous(weight, bias, batch, valid)
    run = _code.launch(x.device, rows, channels, groups, _code.FORWARD_PROGRAMS)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    r = x.new_empty((rows, groups), dtype=torch.float32) if groups else None
    padding = valid is not None and not spec.skip_padding
    sums, saved = _partial(x, run, 1 + padding), x.new_empty((3, channels), dtype=torch.float32)
    # does y need the sums? is it to be corrected by them?
    later = spec.forward_batch and batch is None
    again = spec.jump < math.inf and not spec.forward_batch
    divisor = batch if spec.forward_batch else psi2
    with _on(x):
        _forward(
            x, run, shape, groups, valid, None if later else divisor, weight, bias, spec.eps,
            y=None if later else y, r=r, sums=sums, padding=padding,
        )
        tally = _forward_end(x, run, shape, sums, valid, psi2, batch, saved, spec, padding=padding)
        if later or again:
            _forward(x, run, shape, groups, None, None if later else divisor, weight, bias, spec.eps, y=y, inv=saved)
    if step is not None:
        advance_forward(tally, step.psi2, step.iters, step.spec)
    return Forward(y, r, saved, tally if step is None else None)


def power_backward(
    grad_y: Tensor,
    x: Tensor,
    r: Optional[Tensor],
    weight: Optional[Tensor],
    valid: Optional[Tensor],
    saved: Tensor,
    nu: Tensor,
    spec: PowerNormSpec,
    *,
    want_x: bool = True,
    step: Optional[OwnStep] = None,
) -> Backward:
    """See :func:`.eager.power_backward`."""
    x, grad_y, rows, channels = x.contiguous(), grad_y.contiguous(), *_shape(x)
    nu = nu.contiguous()
    weight, valid = _contiguous(weight, valid)
    scale = spec.gradient_scale
    run = _code.launch(x.device, rows, channels, spec.groups, _code.BACKWARD_PROGRAMS)
    on_device = isinstance(scale, Tensor) and scale.device == x.device  # then the host does not wait for it
    scale = scale if on_device else float(scale)
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device) if want_x else None
    sums = _partial(x, run, 2)
    grad_weight, grad_bias = x.new_empty((2, channels), dtype=torch.float32).unbind()
    tally = x.new_empty(2 * channels + 2, dtype=torch.float64)
    with _on(x):
        _code.backward[run.grid](
            grad_y, x, r, valid, saved, weight, nu, grad_x, sums, rows, channels, run.size, scale, spec.nu_scale,
            SCALE_THERE=on_device, LAYER_SCALE=spec.groups > 0, OUTPUT=want_x, HAS_VALID=valid is not None,
            PADDING=not spec.skip_padding, HAS_WEIGHT=weight is not None, TILE_ROWS=run.tile_rows,
            TILE_COLUMNS=run.tile_columns, STAGES=run.stages, num_warps=run.warps,
        )  # fmt: skip
        _code.backward_end[(_blocks(channels),)](
            sums, saved, weight, grad_weight, grad_bias, tally, rows, channels, run.grid[0], scale,
            SCALE_THERE=on_device, HAS_VALID=valid is not None and spec.skip_padding, HAS_WEIGHT=weight is not None,
            CHANNELS=_code.END_CHANNELS, PARTS=_code.END_PARTS, num_warps=4,
        )  # fmt: skip
    if step is not None:
        advance_backward(tally, step.nu, step.spec)
    return Backward(grad_x, grad_weight, grad_bias, tally if step is None else None)


def advance_forward(tally: Tensor, psi2: Tensor, iters: Tensor, step: StepSpec) -> None:
    """See :func:`.eager.advance_forward`."""
    channels = tally.size(-1) - 2
    limited = step.jump < math.inf and step.alpha_fwd > 0.0
    with _on(tally):
        _code.advance_forward[(tally.numel() // (channels + 2),)](
            tally, psi2, iters, channels, step.alpha_fwd, step.eps, step.warmup, step.trusted_after,
            step.jump if limited else 0.0, JUMP=limited, CHANNELS=_code.STEP_CHANNELS, num_warps=4,
        )  # fmt: skip
    increment_version(psi2)
    increment_version(iters)


def advance_backward(tally: Tensor, nu: Tensor, step: StepSpec) -> None:
    """See :func:`.eager.advance_backward`."""
    channels = tally.size(-1) // 2 - 1
    with _on(tally):
        _code.advance_backward[(tally.numel() // (2 * channels + 2),)](
            tally, nu, channels, step.nu_scale, step.nu_lowest, CHANNELS=_code.STEP_CHANNELS, num_warps=4
        )  # fmt: skip
    increment_version(nu)


def evaluate(
    x: Tensor, weight: Optional[Tensor], bias: Optional[Tensor], psi2: Optional[Tensor], groups: int, eps: float
) -> Tensor:
    """See :func:`.eager.evaluate`, but without gradient."""
    x, shape = x.contiguous(), _shape(x)
    weight, bias, psi2 = _contiguous(weight, bias, psi2)
    run = _code.launch(x.device, *shape, groups, _code.FORWARD_PROGRAMS)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    with _on(x):
        _forward(
            x, run, shape, groups, None, psi2, weight, bias, eps,
            scale_eps=eps if psi2 is None else LAYER_SCALE_EPS, y=y,
        )  # fmt: skip
    return y
