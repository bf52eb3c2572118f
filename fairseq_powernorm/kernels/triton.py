"""The Triton kernel for GPUs: float32, bfloat16 and float16, any number of channels (code: :mod:`.fused_triton`).

One read of ``x`` and one write of ``y`` forward, one read of ``x`` and ``dy`` and one write of ``dx`` backward, no host
synchronization. Results are the same bit for bit from run to run on the same device. Saved for the backward pass are
``x``, one float per row and group, and a few per channel.
"""
import math
import os
from types import ModuleType
from typing import Optional

import torch
from torch import Tensor

from .reference import LAYER_SCALE_EPS, Backward, Forward, PowerNormSpec, mean_of

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_code: Optional[ModuleType] = None
_unavailable: Optional[str] = None


def unavailable() -> Optional[str]:
    """Why this kernel cannot be used on this machine; None if it can."""
    global _code, _unavailable
    if _code is None and _unavailable is None:
        try:
            from . import fused_triton
        except ImportError as error:
            _unavailable = f"Triton cannot be imported: {error}"
        else:
            _code = fused_triton
    return _unavailable


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def serves(device_type: str, dtype: torch.dtype) -> bool:
    """Is this kernel made for tensors of that kind? With ``TRITON_INTERPRET=1``, which is for tests, on a CPU, too."""
    return dtype in _DTYPES and device_type == ("cpu" if _interpreted() else "cuda")


def describe() -> str:
    """What is in use, for people."""
    return "Triton (interpreted)" if _interpreted() else "Triton"


def _sweep(x, rows, groups, valid, psi2, weight, bias, eps, *, output, save=False, sums=False, padding=False):
    """Launch :func:`.fused_triton.forward`; gives y, r and the partial sums (squares, padding, counts)."""
    run, channels = _code.launch(x, rows, groups), x.size(-1)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device) if output else None
    r = x.new_empty((rows, groups), dtype=torch.float32) if save and groups else None
    squares = x.new_empty((run.grid[0], channels), dtype=torch.float32) if sums else None
    others = torch.empty_like(squares) if sums and padding else None
    counts = x.new_empty(run.grid[0], dtype=torch.int32) if sums and valid is not None else None
    if channels:
        _code.forward[run.grid](
            x, y, r, valid, psi2, weight, bias, squares, others, counts, rows, channels, run.size, eps, LAYER_SCALE_EPS,
            LAYER_SCALE=groups > 0, OUTPUT=output, SAVE=r is not None, SUMS=sums, PADDING=others is not None,
            DIVIDE=psi2 is not None, HAS_VALID=sums and valid is not None, HAS_WEIGHT=weight is not None,
            HAS_BIAS=bias is not None, TILE_ROWS=run.tile_rows, TILE_COLUMNS=run.tile_columns, num_warps=run.warps,
        )  # fmt: skip
    return y, r, (squares, others, counts)


def _total(x, rows, partial, psi2=None, backward_psi2=None, eps=0.0, *, save=False, own=False):
    """Launch :func:`.fused_triton.forward_end`; gives ``saved`` (or None) and the tally."""
    squares, others, counts = partial
    parts, channels = squares.shape
    saved = x.new_empty((3, channels), dtype=torch.float32) if save else None
    tally = x.new_empty(channels + 2, dtype=torch.float64)
    _code.forward_end[(_blocks(channels),)](
        squares, others, counts, psi2, backward_psi2, saved, tally, rows, channels, parts, eps,
        SAVE=save, OWN=own, GIVEN=backward_psi2 is not None, PADDING=others is not None, HAS_VALID=counts is not None,
        CHANNELS=_code.END_CHANNELS, PARTS=_code.END_PARTS, num_warps=4,
    )  # fmt: skip
    return saved, tally


def _blocks(channels: int) -> int:
    return -(-channels // _code.END_CHANNELS)


def _flat(valid: Optional[Tensor]) -> Optional[Tensor]:
    return None if valid is None else valid.contiguous()


def second_moment(x: Tensor, valid: Optional[Tensor], groups: int) -> Tensor:
    """See :func:`.reference.second_moment`."""
    x, rows = x.contiguous(), x.numel() // x.size(-1)
    _, _, partial = _sweep(x, rows, groups, _flat(valid), None, None, None, 0.0, output=False, sums=True)
    return _total(x, rows, partial)[1]


def power_forward(
    x: Tensor,
    weight: Optional[Tensor],
    bias: Optional[Tensor],
    valid: Optional[Tensor],
    psi2: Tensor,
    spec: PowerNormSpec,
    batch: Optional[Tensor] = None,
) -> Forward:
    """See :func:`.reference.power_forward`."""
    x, valid, rows = x.contiguous(), _flat(valid), x.numel() // x.size(-1)
    own = spec.backward_batch and batch is None
    if batch is None and (spec.forward_batch or spec.jump < math.inf):
        batch = mean_of(second_moment(x, valid, spec.groups), psi2)
    if batch is not None:
        psi2 = torch.where(batch > spec.jump * (psi2 + spec.eps), batch, psi2)
    divisor = batch if spec.forward_batch else psi2
    back = None
    if not own and (spec.backward_batch or spec.forward_batch):
        back = batch if spec.backward_batch else psi2
    y, r, partial = _sweep(
        x, rows, spec.groups, valid, divisor, weight, bias, spec.eps, output=True, save=True, sums=True,
        padding=valid is not None and not spec.skip_padding,
    )  # fmt: skip
    saved, tally = _total(x, rows, partial, divisor, back, spec.eps, save=True, own=own)
    return Forward(y, r, saved, tally)


def power_backward(
    grad_y: Tensor,
    x: Tensor,
    r: Optional[Tensor],
    weight: Optional[Tensor],
    valid: Optional[Tensor],
    saved: Tensor,
    nu: Tensor,
    spec: PowerNormSpec,
    want_x: bool = True,
) -> Backward:
    """See :func:`.reference.power_backward`."""
    x, grad_y, rows, channels = x.contiguous(), grad_y.contiguous(), x.numel() // x.size(-1), x.size(-1)
    valid = _flat(valid) if spec.skip_padding else None
    run = _code.launch(x, rows, spec.groups)
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device) if want_x else None
    grad_sum, grad_u_sum = x.new_empty((2, run.grid[0], channels), dtype=torch.float32)
    counts = None if valid is None else x.new_empty(run.grid[0], dtype=torch.int32)
    _code.backward[run.grid](
        grad_y, x, r, valid, saved, weight, nu, grad_x, grad_sum, grad_u_sum, counts, rows, channels, run.size,
        float(spec.gradient_scale) * spec.nu_scale, LAYER_SCALE=spec.groups > 0, OUTPUT=want_x, HAS_VALID=valid is not None,
        HAS_WEIGHT=weight is not None, TILE_ROWS=run.tile_rows, TILE_COLUMNS=run.tile_columns, num_warps=run.warps,
    )  # fmt: skip
    grad_weight, grad_bias = x.new_empty((2, channels), dtype=torch.float32)
    tally = x.new_empty(2 * channels + 2, dtype=torch.float64)
    _code.backward_end[(_blocks(channels),)](
        grad_sum, grad_u_sum, counts, saved, weight, grad_weight, grad_bias, tally, rows, channels, run.grid[0],
        float(spec.gradient_scale), HAS_VALID=valid is not None, HAS_WEIGHT=weight is not None,
        CHANNELS=_code.END_CHANNELS, PARTS=_code.END_PARTS, num_warps=4,
    )  # fmt: skip
    return Backward(grad_x, grad_weight, grad_bias, tally)


def evaluate(
    x: Tensor, weight: Optional[Tensor], bias: Optional[Tensor], psi2: Optional[Tensor], groups: int, eps: float
) -> Tensor:
    """See :func:`.reference.evaluate`, but without gradient."""
    x, rows = x.contiguous(), x.numel() // x.size(-1)
    return _sweep(x, rows, groups, None, psi2, weight, bias, eps, output=True)[0]
