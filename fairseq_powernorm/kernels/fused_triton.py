"""The Triton code of the GPU kernel, and how it is launched: see :mod:`.triton` for what it computes.

Notation as in :mod:`.reference`; arithmetic in float32. A program of the two sweeps owns one *slice* of channels (a group of the
layer scale, or a block of channels where there is none) and every P-th tile of rows. It adds up its columns in registers
and writes them once, as one of P rows of partial sums; a second, small kernel adds those up in float64 and turns them into
what a pass gives. No atomics: on the same device the same input gives the same bits.
"""
from typing import NamedTuple, Tuple

import torch
import triton
import triton.language as tl
from torch import Tensor

#: channels of a slice where there is no layer scale
BLOCK = 256
#: elements of a tile
TILE = 4096
#: longest group of the layer scale: it lies in the registers of one program
MAX_GROUP = 16384
#: channels, and partial sums of each, that a program of the small kernels adds up at a time
END_CHANNELS, END_PARTS = 32, 64


@triton.jit
def forward(
    x_ptr, y_ptr, r_ptr, valid_ptr, psi2_ptr, weight_ptr, bias_ptr, squares_ptr, padding_ptr, counts_ptr,
    rows, channels, size, eps, layer_scale_eps,
    LAYER_SCALE: tl.constexpr, OUTPUT: tl.constexpr, SAVE: tl.constexpr, SUMS: tl.constexpr, PADDING: tl.constexpr,
    DIVIDE: tl.constexpr, HAS_VALID: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr,
    TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr,
):  # fmt: skip
    """The sweep of a forward pass: y, r, and partial sums of u^2 over rows that count (and over padding)."""
    program, part = tl.program_id(0), tl.program_id(1)
    column = tl.arange(0, TILE_COLUMNS)[None, :]
    channel = part * size + column
    there = (column < size) & (channel < channels)
    if OUTPUT:
        scale = tl.full((1, TILE_COLUMNS), 1.0, tl.float32)
        if DIVIDE:
            scale = 1.0 / tl.sqrt(tl.load(psi2_ptr + channel, mask=there, other=1.0).to(tl.float32) + eps)
        if HAS_WEIGHT:
            scale *= tl.load(weight_ptr + channel, mask=there, other=0.0).to(tl.float32)
        bias = tl.zeros((1, TILE_COLUMNS), tl.float32)
        if HAS_BIAS:
            bias = tl.load(bias_ptr + channel, mask=there, other=0.0).to(tl.float32)
    squares = tl.zeros((TILE_ROWS, TILE_COLUMNS), tl.float32)
    padding = tl.zeros((TILE_ROWS, TILE_COLUMNS), tl.float32)
    number = tl.zeros((TILE_ROWS, 1), tl.int32)
    for start in range(program * TILE_ROWS, rows, tl.num_programs(0) * TILE_ROWS):
        row = start + tl.arange(0, TILE_ROWS)[:, None]
        inside = there & (row < rows)
        offset = row.to(tl.int64) * channels + channel
        u = tl.load(x_ptr + offset, mask=inside, other=0.0).to(tl.float32)
        if LAYER_SCALE:
            r = 1.0 / tl.sqrt(tl.sum(u * u, axis=1, keep_dims=True) / size + layer_scale_eps)
            if SAVE:
                tl.store(r_ptr + row.to(tl.int64) * tl.num_programs(1) + part, r, mask=row < rows)
            u = u * r
        if OUTPUT:
            tl.store(y_ptr + offset, u * scale + bias, mask=inside)
        if SUMS:
            if HAS_VALID:
                counts = tl.load(valid_ptr + row, mask=row < rows, other=0) != 0
                number += counts.to(tl.int32)
                squares += tl.where(counts, u * u, 0.0)
                if PADDING:
                    padding += tl.where(counts, 0.0, u * u)
            else:
                squares += u * u
    if SUMS:
        target = program.to(tl.int64) * channels + channel
        tl.store(squares_ptr + target, tl.sum(squares, axis=0, keep_dims=True), mask=there)
        if PADDING:
            tl.store(padding_ptr + target, tl.sum(padding, axis=0, keep_dims=True), mask=there)
        if HAS_VALID:
            if part == 0:
                tl.store(counts_ptr + program, tl.sum(tl.sum(number, axis=1), axis=0))


@triton.jit
def forward_end(
    squares_ptr, padding_ptr, counts_ptr, psi2_ptr, backward_psi2_ptr, saved_ptr, tally_ptr,
    rows, channels, parts, eps,
    SAVE: tl.constexpr, OWN: tl.constexpr, GIVEN: tl.constexpr, PADDING: tl.constexpr, HAS_VALID: tl.constexpr,
    CHANNELS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Totals of a forward pass's partial sums: its tally, and the ``3 x C`` saved for the backward pass."""
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    there = channel < channels
    total = tl.zeros((CHANNELS,), tl.float64)
    others = tl.zeros((CHANNELS,), tl.float64)
    count = tl.zeros((1,), tl.float64)
    for start in range(0, parts, PARTS):
        part = start + tl.arange(0, PARTS)
        inside = (part[:, None] < parts) & there[None, :]
        offset = part[:, None] * channels + channel[None, :]
        total += tl.sum(tl.load(squares_ptr + offset, mask=inside, other=0.0).to(tl.float64), axis=0)
        if PADDING:
            others += tl.sum(tl.load(padding_ptr + offset, mask=inside, other=0.0).to(tl.float64), axis=0)
        if HAS_VALID:
            count += tl.sum(tl.load(counts_ptr + part, mask=part < parts, other=0).to(tl.float64), axis=0)
    if not HAS_VALID:
        count += rows
    tl.store(tally_ptr + channel, total, mask=there)
    end = tl.arange(0, 1)
    if tl.program_id(0) == 0:
        tl.store(tally_ptr + channels + end, count)
        tl.store(tally_ptr + channels + 1 + end, tl.full((1,), 1.0, tl.float64))
    if SAVE:
        psi2 = tl.load(psi2_ptr + channel, mask=there, other=1.0).to(tl.float32)
        inv = 1.0 / tl.sqrt(psi2 + eps)
        back = psi2
        if OWN:
            back = tl.where(count > 0, (total / tl.maximum(count, 1.0)).to(tl.float32), psi2)
        if GIVEN:
            back = tl.load(backward_psi2_ptr + channel, mask=there, other=1.0).to(tl.float32)
        tl.store(saved_ptr + channel, inv, mask=there)
        tl.store(saved_ptr + channels + channel, 1.0 / tl.sqrt(back + eps), mask=there)
        tl.store(saved_ptr + 2 * channels + channel, (total + others).to(tl.float32) * inv * inv, mask=there)


@triton.jit
def backward(
    grad_ptr, x_ptr, r_ptr, valid_ptr, saved_ptr, weight_ptr, nu_ptr, grad_x_ptr, grad_sum_ptr, grad_u_sum_ptr, counts_ptr,
    rows, channels, size, nu_scale,
    LAYER_SCALE: tl.constexpr, OUTPUT: tl.constexpr, HAS_VALID: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr,
):  # fmt: skip
    """The sweep of a backward pass: dL/dx, and partial sums of dy and dy * u over the rows that count."""
    program, part = tl.program_id(0), tl.program_id(1)
    column = tl.arange(0, TILE_COLUMNS)[None, :]
    channel = part * size + column
    there = (column < size) & (channel < channels)
    if OUTPUT:
        # dL/du = (weight * dy - nu * z) / psi = scale * dy + through * u
        inv = tl.load(saved_ptr + channel, mask=there, other=0.0)
        scale = tl.load(saved_ptr + channels + channel, mask=there, other=0.0)
        through = tl.load(nu_ptr + channel, mask=there, other=0.0).to(tl.float32) * (-nu_scale) * inv * scale
        if HAS_WEIGHT:
            scale *= tl.load(weight_ptr + channel, mask=there, other=0.0).to(tl.float32)
    grad_sum = tl.zeros((TILE_ROWS, TILE_COLUMNS), tl.float32)
    grad_u_sum = tl.zeros((TILE_ROWS, TILE_COLUMNS), tl.float32)
    number = tl.zeros((TILE_ROWS, 1), tl.int32)
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
            # padding enters no sum and gets no gradient, whatever stands there
            counts = tl.load(valid_ptr + row, mask=row < rows, other=0) != 0
            number += counts.to(tl.int32)
            grad = tl.where(counts, grad, 0.0)
            u = tl.where(counts, u, 0.0)
        grad_sum += grad
        grad_u_sum += grad * u
        if OUTPUT:
            grad_u = grad * scale + u * through
            if LAYER_SCALE:
                grad_u = r * (grad_u - u * (tl.sum(grad_u * u, axis=1, keep_dims=True) / size))
                if HAS_VALID:
                    grad_u = tl.where(counts, grad_u, 0.0)
            tl.store(grad_x_ptr + offset, grad_u, mask=inside)
    target = program.to(tl.int64) * channels + channel
    tl.store(grad_sum_ptr + target, tl.sum(grad_sum, axis=0, keep_dims=True), mask=there)
    tl.store(grad_u_sum_ptr + target, tl.sum(grad_u_sum, axis=0, keep_dims=True), mask=there)
    if HAS_VALID:
        if part == 0:
            tl.store(counts_ptr + program, tl.sum(tl.sum(number, axis=1), axis=0))


@triton.jit
def backward_end(
    grad_sum_ptr, grad_u_sum_ptr, counts_ptr, saved_ptr, weight_ptr, grad_weight_ptr, grad_bias_ptr, tally_ptr,
    rows, channels, parts, gradient_scale,
    HAS_VALID: tl.constexpr, HAS_WEIGHT: tl.constexpr, CHANNELS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Totals of a backward pass's partial sums: its tally and the gradients of weight and bias."""
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    there = channel < channels
    grad_sum = tl.zeros((CHANNELS,), tl.float64)
    grad_u_sum = tl.zeros((CHANNELS,), tl.float64)
    count = tl.zeros((1,), tl.float64)
    for start in range(0, parts, PARTS):
        part = start + tl.arange(0, PARTS)
        inside = (part[:, None] < parts) & there[None, :]
        offset = part[:, None] * channels + channel[None, :]
        grad_sum += tl.sum(tl.load(grad_sum_ptr + offset, mask=inside, other=0.0).to(tl.float64), axis=0)
        grad_u_sum += tl.sum(tl.load(grad_u_sum_ptr + offset, mask=inside, other=0.0).to(tl.float64), axis=0)
        if HAS_VALID:
            count += tl.sum(tl.load(counts_ptr + part, mask=part < parts, other=0).to(tl.float64), axis=0)
    if not HAS_VALID:
        count += rows
    grad_z_sum = grad_u_sum * tl.load(saved_ptr + channel, mask=there, other=0.0)
    tl.store(grad_bias_ptr + channel, grad_sum.to(tl.float32), mask=there)
    tl.store(grad_weight_ptr + channel, grad_z_sum.to(tl.float32), mask=there)
    weighted = grad_z_sum
    if HAS_WEIGHT:
        weighted *= tl.load(weight_ptr + channel, mask=there, other=0.0).to(tl.float64)
    tl.store(tally_ptr + channel, weighted / gradient_scale, mask=there)
    squares = tl.load(saved_ptr + 2 * channels + channel, mask=there, other=0.0)
    tl.store(tally_ptr + channels + channel, squares.to(tl.float64), mask=there)
    end = tl.arange(0, 1)
    if tl.program_id(0) == 0:
        tl.store(tally_ptr + 2 * channels + end, count)
        tl.store(tally_ptr + 2 * channels + 1 + end, tl.full((1,), 1.0, tl.float64))


class Launch(NamedTuple):
    """How a sweep runs over ``N x C``: the grid (P, slices), channels of a slice, and a program's tile and warps."""

    grid: Tuple[int, int]
    size: int
    tile_rows: int
    tile_columns: int
    warps: int


def launch(x: Tensor, rows: int, groups: int) -> Launch:
    """The launch for ``rows`` rows of ``x`` (``... x C``)."""
    channels = x.size(-1)
    size = channels // groups if groups else min(channels, BLOCK)
    slices = groups or triton.cdiv(channels, size)
    tile_columns = triton.next_power_of_2(size)
    tile_rows = min(max(1, TILE // tile_columns), triton.next_power_of_2(max(rows, 1)))
    # two programs on each processor: what their registers allow
    processors = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 2
    programs = max(1, min(triton.cdiv(rows, tile_rows), triton.cdiv(2 * processors, slices)))
    return Launch((programs, slices), size, tile_rows, tile_columns, 4 if tile_rows * tile_columns <= 2048 else 8)
