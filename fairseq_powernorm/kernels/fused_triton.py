"""Triton kernels for GPUs: float32, bfloat16 and float16, any number of channels.

One read of ``x`` and one write of ``y`` forward, one read of ``x`` and ``dy`` and one write of ``dx`` backward. Notation as
in :mod:`.reference`; arithmetic in float32. A program owns one *slice* of channels (a group of the layer scale, or a block
of channels where there is none) and every P-th tile of rows; it adds up its columns in registers and writes them once, so
that ``P x C`` partial sums remain, which are added up in float64. No atomics: the same device gives the same bits.
"""
from typing import NamedTuple, Optional, Tuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .reference import LAYER_SCALE_EPS

#: dtypes of ``x`` and ``dy`` that the kernels take
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
#: channels of a slice where there is no layer scale
BLOCK = 256
#: elements of a tile
TILE = 4096
#: longest group of the layer scale: it lies in the registers of one program
MAX_GROUP = 16384


@triton.jit
def _forward(
    x_ptr, y_ptr, r_ptr, valid_ptr, scale_ptr, bias_ptr, squares_ptr, padding_ptr,
    rows, channels, size, eps,
    LAYER_SCALE: tl.constexpr, OUTPUT: tl.constexpr, SUMS: tl.constexpr, PADDING: tl.constexpr,
    HAS_VALID: tl.constexpr, HAS_BIAS: tl.constexpr, TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr,
):  # fmt: skip
    program, part = tl.program_id(0), tl.program_id(1)
    column = tl.arange(0, TILE_COLUMNS)[None, :]
    channel = part * size + column
    there = (column < size) & (channel < channels)
    if OUTPUT:
        scale = tl.load(scale_ptr + channel, mask=there, other=0.0)
        bias = tl.load(bias_ptr + channel, mask=there, other=0.0) if HAS_BIAS else 0.0
    squares = tl.zeros((TILE_ROWS, TILE_COLUMNS), tl.float32)
    padding = tl.zeros((TILE_ROWS, TILE_COLUMNS), tl.float32)
    for start in range(program * TILE_ROWS, rows, tl.num_programs(0) * TILE_ROWS):
        row = start + tl.arange(0, TILE_ROWS)[:, None]
        inside = there & (row < rows)
        offset = row.to(tl.int64) * channels + channel
        u = tl.load(x_ptr + offset, mask=inside, other=0.0).to(tl.float32)
        if LAYER_SCALE:
            r = 1.0 / tl.sqrt(tl.sum(u * u, axis=1, keep_dims=True) / size + eps)
            if OUTPUT:
                tl.store(r_ptr + row.to(tl.int64) * tl.num_programs(1) + part, r, mask=row < rows)
            u = u * r
        if OUTPUT:
            tl.store(y_ptr + offset, u * scale + bias, mask=inside)
        if SUMS:
            if HAS_VALID:
                counts = tl.load(valid_ptr + row, mask=row < rows, other=0) != 0
                squares += tl.where(counts, u * u, 0.0)
                if PADDING:
                    padding += tl.where(counts, 0.0, u * u)
            else:
                squares += u * u
    if SUMS:
        # row 0 of a tile holds the program's sum
        target = program.to(tl.int64) * channels + channel
        tl.store(squares_ptr + target, tl.sum(squares, axis=0, keep_dims=True), mask=there)
        if PADDING:
            tl.store(padding_ptr + target, tl.sum(padding, axis=0, keep_dims=True), mask=there)


@triton.jit
def _backward(
    grad_ptr, x_ptr, r_ptr, valid_ptr, scale_ptr, through_ptr, grad_x_ptr, grad_sum_ptr, grad_u_sum_ptr,
    rows, channels, size,
    LAYER_SCALE: tl.constexpr, OUTPUT: tl.constexpr, SUMS: tl.constexpr, SKIP: tl.constexpr,
    HAS_VALID: tl.constexpr, TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr,
):  # fmt: skip
    program, part = tl.program_id(0), tl.program_id(1)
    column = tl.arange(0, TILE_COLUMNS)[None, :]
    channel = part * size + column
    there = (column < size) & (channel < channels)
    if OUTPUT:
        scale = tl.load(scale_ptr + channel, mask=there, other=0.0)
        through = tl.load(through_ptr + channel, mask=there, other=0.0)
    grad_sum = tl.zeros((TILE_ROWS, TILE_COLUMNS), tl.float32)
    grad_u_sum = tl.zeros((TILE_ROWS, TILE_COLUMNS), tl.float32)
    for start in range(program * TILE_ROWS, rows, tl.num_programs(0) * TILE_ROWS):
        row = start + tl.arange(0, TILE_ROWS)[:, None]
        inside = there & (row < rows)
        offset = row.to(tl.int64) * channels + channel
        grad = tl.load(grad_ptr + offset, mask=inside, other=0.0).to(tl.float32)
        u = tl.load(x_ptr + offset, mask=inside, other=0.0).to(tl.float32)
        if LAYER_SCALE:
            r = tl.load(r_ptr + row.to(tl.int64) * tl.num_programs(1) + part, mask=row < rows, other=0.0)
            u = u * r
        if HAS_VALID:
            counts = tl.load(valid_ptr + row, mask=row < rows, other=0) != 0
        if SUMS:
            if HAS_VALID and SKIP:
                grad_sum += tl.where(counts, grad, 0.0)
                grad_u_sum += tl.where(counts, grad * u, 0.0)
            else:
                grad_sum += grad
                grad_u_sum += grad * u
        if OUTPUT:
            if HAS_VALID and not SKIP:
                grad_u = grad * scale + tl.where(counts, u * through, 0.0)
            else:
                grad_u = grad * scale + u * through
            if LAYER_SCALE:
                dot = tl.sum(grad_u * u, axis=1, keep_dims=True)
                grad_u = r * (grad_u - u * (dot / size))
            if HAS_VALID and SKIP:
                grad_u = tl.where(counts, grad_u, 0.0)
            tl.store(grad_x_ptr + offset, grad_u, mask=inside)
    if SUMS:
        target = program.to(tl.int64) * channels + channel
        tl.store(grad_sum_ptr + target, tl.sum(grad_sum, axis=0, keep_dims=True), mask=there)
        tl.store(grad_u_sum_ptr + target, tl.sum(grad_u_sum, axis=0, keep_dims=True), mask=there)


class _Launch(NamedTuple):
    """How a kernel runs over ``N x C``: the grid, the channels of a slice, the tile and the warps of a program."""

    grid: Tuple[int, int]
    size: int
    tile_rows: int
    tile_columns: int
    warps: int


def _launch(x: Tensor, groups: int) -> _Launch:
    rows, channels = x.shape
    size = channels // groups if groups else min(channels, BLOCK)
    slices = groups or triton.cdiv(channels, size)
    tile_columns = triton.next_power_of_2(size)
    tile_rows = min(max(1, TILE // tile_columns), triton.next_power_of_2(max(rows, 1)))
    processors = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 2
    programs = max(1, min(triton.cdiv(rows, tile_rows), triton.cdiv(2 * processors, slices)))
    warps = 4 if tile_rows * tile_columns <= 2048 else 8
    return _Launch((programs, slices), size, tile_rows, tile_columns, warps)


def _total(partial: Tensor) -> Tensor:
    return partial.sum(0, dtype=torch.float64)


def supports(x: Tensor, groups: int) -> bool:
    """Can the kernels take ``x`` (``N x C``) with that many groups?"""
    return x.dtype in DTYPES and x.size(1) // max(groups, 1) <= MAX_GROUP


def normalize(
    x: Tensor,
    groups: int,
    scale: Optional[Tensor],
    bias: Optional[Tensor] = None,
    valid: Optional[Tensor] = None,
    sums: bool = False,
    padding_sums: bool = False,
) -> Tuple[Optional[Tensor], Optional[Tensor], Optional[Tensor], Optional[Tensor]]:
    """``y = scale * u + bias`` and the column sums of ``u^2``, in one sweep over ``x``.

    Args:
        x: ``N x C``, contiguous
        groups: channel groups of the layer scale, 0 for none
        scale: ``C``, float32; None computes the sums alone
        bias: ``C``, float32, or None
        valid: ``N`` bool, False marks padding; None if there is none
        sums: sum over the rows that count
        padding_sums: sum over padding as well

    Returns:
        ``y`` (``N x C``, dtype of ``x``), ``r`` (``N x groups``, float32; None without layer scale), the sums of
        ``u^2`` over rows that count and over padding (``C``, float64); None for what was not asked for
    """
    run = _launch(x, groups)
    rows, channels = x.shape
    output = scale is not None
    y = torch.empty_like(x) if output else None
    r = x.new_empty((rows, groups), dtype=torch.float32) if output and groups else None
    squares = x.new_empty((run.grid[0], channels), dtype=torch.float32) if sums else None
    padding = torch.empty_like(squares) if padding_sums and valid is not None else None
    _forward[run.grid](
        x, y, r, valid, scale, bias, squares, padding, rows, channels, run.size, LAYER_SCALE_EPS,
        LAYER_SCALE=groups > 0, OUTPUT=output, SUMS=sums, PADDING=padding is not None, HAS_VALID=valid is not None,
        HAS_BIAS=bias is not None, TILE_ROWS=run.tile_rows, TILE_COLUMNS=run.tile_columns, num_warps=run.warps,
    )  # fmt: skip
    return y, r, None if squares is None else _total(squares), None if padding is None else _total(padding)


def backward(
    grad: Tensor,
    x: Tensor,
    r: Optional[Tensor],
    scale: Optional[Tensor],
    through: Optional[Tensor],
    valid: Optional[Tensor] = None,
    sums: bool = True,
    skip_padding: bool = False,
) -> Tuple[Optional[Tensor], Optional[Tensor], Optional[Tensor]]:
    """``dL/dx`` from ``dL/du = scale * dy + through * u``, and the column sums of ``dy`` and ``dy * u``, in one sweep.

    Args:
        grad, x: ``N x C``, contiguous
        r: ``N x groups``, float32, from :func:`normalize`; None without layer scale
        scale, through: ``C``, float32; None computes the sums alone
        valid: ``N`` bool, False marks padding; None if there is none
        sums: compute the sums
        skip_padding: padding enters no sum and its gradient is zero; else it enters the sums, its ``dL/du`` is
            ``scale * dy``

    Returns:
        ``dL/dx`` (``N x C``, dtype of ``x``), the sums (``C``, float64) of ``dy`` and of ``dy * u``; None for what was not
        asked for
    """
    groups = 0 if r is None else r.size(1)
    run = _launch(x, groups)
    rows, channels = x.shape
    output = scale is not None
    grad_x = torch.empty_like(x) if output else None
    grad_sum = x.new_empty((run.grid[0], channels), dtype=torch.float32) if sums else None
    grad_u_sum = torch.empty_like(grad_sum) if sums else None
    _backward[run.grid](
        grad, x, r, valid, scale, through, grad_x, grad_sum, grad_u_sum, rows, channels, run.size,
        LAYER_SCALE=groups > 0, OUTPUT=output, SUMS=sums, SKIP=skip_padding, HAS_VALID=valid is not None,
        TILE_ROWS=run.tile_rows, TILE_COLUMNS=run.tile_columns, num_warps=run.warps,
    )  # fmt: skip
    return grad_x, None if grad_sum is None else _total(grad_sum), None if grad_u_sum is None else _total(grad_u_sum)
