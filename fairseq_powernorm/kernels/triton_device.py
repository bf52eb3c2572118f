"""The Triton code of the GPU kernel, and how it is launched: see :mod:`.triton` for what it computes.

Notation as in :mod:`.interface`; arithmetic in float32. A program of the two sweeps owns one *slice* of channels (a
group of the layer scale, or a block of channels where there is none) and every P-th tile of rows. It adds up its
columns in registers and writes them once, as one of P rows of partial sums; a second, small kernel adds those up in
float64 and turns them into what a pass gives, and a third one, of a program per norm, takes the step of the running
statistics. No atomics: on the same device the same input gives the same bits.

Partial sums are one float32 vector: the sums of the first kind (``P x C``), those of the second where there are two,
and the number of rows that each program counted (``P``).
"""
import functools
from typing import NamedTuple, Tuple

import torch
import triton
import triton.language as tl

#: channels of a slice where there is no layer scale
BLOCK = 256
#: elements of a tile, and of a tile for each warp
TILE, WARP = 2048, 256
#: elements of the largest tile of which another one is loaded ahead, into shared memory
AHEAD = 4096
#: programs of a sweep on each multiprocessor: what their registers allow
FORWARD_PROGRAMS, BACKWARD_PROGRAMS = 4, 2
#: channels, and partial sums of each, that a program of the small kernels adds up at a time
END_CHANNELS, END_PARTS = 32, 64
#: channels that a program that takes a step works on at a time
STEP_CHANNELS = 1024


@triton.jit
def inverse_root(second_moment, eps):
    return 1.0 / tl.sqrt(second_moment + eps)


@triton.jit
def is_finite(value):
    return tl.abs(value) <= 3.4028234663852886e38


@triton.jit
def value_of(number, THERE: tl.constexpr):
    """A number, or what it points to."""
    if THERE:
        return tl.load(number).to(tl.float32)
    else:
        return number


# rows and parts differ from batch to batch: what is compiled does not depend on them
@triton.jit(do_not_specialize=["rows"])
def forward(
    x_ptr, y_ptr, r_ptr, valid_ptr, psi2_ptr, inv_ptr, weight_ptr, bias_ptr, sums_ptr,
    rows, channels, size, eps, layer_scale_eps,
    LAYER_SCALE: tl.constexpr, OUTPUT: tl.constexpr, SAVE: tl.constexpr, SUMS: tl.constexpr, PADDING: tl.constexpr,
    HAS_PSI2: tl.constexpr, HAS_INV: tl.constexpr, HAS_VALID: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr, TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The sweep of a forward pass: y, r, and partial sums of u^2 over rows that count (and over padding).

    y is divided by the root of psi2 + eps, or multiplied by inv where there is one. Where there are both, y has been
    computed with psi2 already, and is computed again only where inv is another than its inverse root.
    """
    program, part = tl.program_id(0), tl.program_id(1)
    column = tl.arange(0, TILE_COLUMNS)[None, :]
    channel = part * size + column
    there = (column < size) & (channel < channels)
    if OUTPUT:
        scale = tl.full((1, TILE_COLUMNS), 1.0, tl.float32)
        if HAS_PSI2:
            scale = inverse_root(tl.load(psi2_ptr + channel, mask=there, other=1.0).to(tl.float32), eps)
        if HAS_INV:
            inv = tl.load(inv_ptr + channel, mask=there, other=0.0)
            if HAS_PSI2:
                others = tl.sum(tl.sum((there & (inv != scale)).to(tl.int32), axis=1), axis=0)
                rows = tl.where(others > 0, rows, 0)
            scale = inv
        if HAS_WEIGHT:
            scale *= tl.load(weight_ptr + channel, mask=there, other=0.0).to(tl.float32)
        bias = tl.zeros((1, TILE_COLUMNS), tl.float32)
        if HAS_BIAS:
            bias = tl.load(bias_ptr + channel, mask=there, other=0.0).to(tl.float32)
    squares = tl.zeros((TILE_ROWS, TILE_COLUMNS), tl.float32)
    padding = tl.zeros((TILE_ROWS, TILE_COLUMNS), tl.float32)
    number = tl.zeros((TILE_ROWS, 1), tl.int32)
    for start in tl.range(program * TILE_ROWS, rows, tl.num_programs(0) * TILE_ROWS, num_stages=STAGES):
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
        programs = tl.num_programs(0).to(tl.int64)
        target = sums_ptr + program.to(tl.int64) * channels + channel
        tl.store(target, tl.sum(squares, axis=0, keep_dims=True), mask=there)
        if PADDING:
            tl.store(target + programs * channels, tl.sum(padding, axis=0, keep_dims=True), mask=there)
        if HAS_VALID:
            if part == 0:
                counted = tl.sum(tl.sum(number, axis=1), axis=0).to(tl.float32)
                tl.store(sums_ptr + (1 + PADDING) * programs * channels + program, counted)


@triton.jit
def total_of(sums_ptr, channel, there, channels, parts, CHANNELS: tl.constexpr, PARTS: tl.constexpr):
    """Sums of the columns of ``parts x channels`` partial sums, in float64."""
    total = tl.zeros((CHANNELS,), tl.float64)
    for start in range(0, parts, PARTS):
        part = start + tl.arange(0, PARTS)[:, None]
        inside = (part < parts) & there[None, :]
        found = tl.load(sums_ptr + part.to(tl.int64) * channels + channel[None, :], mask=inside, other=0.0)
        total += tl.sum(found.to(tl.float64), axis=0)
    return total


@triton.jit
def count_of(counts_ptr, parts, PARTS: tl.constexpr):
    """The number of rows that all programs counted, float64, of shape 1."""
    count = tl.zeros((1,), tl.float64)
    for start in range(0, parts, PARTS):
        part = start + tl.arange(0, PARTS)
        count += tl.sum(tl.load(counts_ptr + part, mask=part < parts, other=0.0).to(tl.float64), axis=0)
    return count


@triton.jit
def store_rows(tally_ptr, count):
    """The end of a tally: number of rows, 1."""
    end = tl.arange(0, 1)
    if tl.program_id(0) == 0:
        tl.store(tally_ptr + end, count)
        tl.store(tally_ptr + 1 + end, tl.full((1,), 1.0, tl.float64))


@triton.jit(do_not_specialize=["rows", "parts"])
def forward_end(
    sums_ptr, psi2_ptr, batch_ptr, saved_ptr, tally_ptr,
    rows, channels, parts, eps, jump,
    SAVE: tl.constexpr, FORWARD_BATCH: tl.constexpr, BACKWARD_BATCH: tl.constexpr, JUMP: tl.constexpr,
    HAS_BATCH: tl.constexpr, PADDING: tl.constexpr, HAS_VALID: tl.constexpr,
    CHANNELS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Totals of a forward pass's partial sums: its tally, and the ``3 x C`` saved for the backward pass."""
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    there = channel < channels
    plane = parts.to(tl.int64) * channels
    total = total_of(sums_ptr, channel, there, channels, parts, CHANNELS, PARTS)
    if HAS_VALID:
        count = count_of(sums_ptr + (1 + PADDING) * plane, parts, PARTS)
    else:
        count = tl.zeros((1,), tl.float64) + rows
    tl.store(tally_ptr + channel, total, mask=there)
    store_rows(tally_ptr + channels, count)
    if SAVE:
        running = tl.load(psi2_ptr + channel, mask=there, other=1.0).to(tl.float32)
        if HAS_BATCH:
            batch = tl.load(batch_ptr + channel, mask=there, other=1.0).to(tl.float32)
        else:
            batch = tl.where(count > 0, (total / tl.maximum(count, 1.0)).to(tl.float32), running)
        if JUMP:
            running = tl.where(batch > jump * (running + eps), batch, running)
        inv = inverse_root(batch if FORWARD_BATCH else running, eps)
        if PADDING:
            total += total_of(sums_ptr + plane, channel, there, channels, parts, CHANNELS, PARTS)
        tl.store(saved_ptr + channel, inv, mask=there)
        tl.store(saved_ptr + channels + channel, inverse_root(batch if BACKWARD_BATCH else running, eps), mask=there)
        tl.store(saved_ptr + 2 * channels + channel, total.to(tl.float32) * inv * inv, mask=there)


@triton.jit
def new_psi2(tally_ptr, psi2_ptr, channel, there, rows, eps, kept, share, limit):
    """psi^2 after a step, float32."""
    old = tl.load(psi2_ptr + channel, mask=there, other=0.0).to(tl.float64)
    moment = tl.load(tally_ptr + channel, mask=there, other=0.0) / tl.maximum(rows, 1.0)
    moment = tl.where(moment > limit * (old + eps), limit * (old + eps), moment)
    return (kept * old + share * moment).to(tl.float32)


@triton.jit
def advance_forward(
    tally_ptr, psi2_ptr, iters_ptr, channels, alpha, eps, warmup, trusted_after, jump, JUMP: tl.constexpr,
    CHANNELS: tl.constexpr,
):  # fmt: skip
    """A program per norm: psi^2 and the step count after a step, see :func:`.eager.advance_forward`."""
    norm = tl.program_id(0).to(tl.int64)
    tally_ptr += norm * (channels + 2)
    psi2_ptr += norm * channels
    rows = tl.load(tally_ptr + channels)
    called = tl.load(tally_ptr + channels + 1) > 0
    number = tl.load(iters_ptr + norm) + 1.0
    cumulative = tl.where(number < warmup, 1.0 / number.to(tl.float64), 0.0)
    kept = alpha * (1.0 - cumulative)
    limit = tl.where(number > trusted_after, jump, float("inf")) if JUMP else float("inf")
    bad = tl.zeros((CHANNELS,), tl.int32)
    for start in range(0, channels, CHANNELS):
        channel = start + tl.arange(0, CHANNELS)
        there = channel < channels
        new = new_psi2(tally_ptr, psi2_ptr, channel, there, rows, eps, kept, 1.0 - kept, limit)
        bad += (there & (is_finite(new) == 0)).to(tl.int32)
    taken = tl.where((tl.sum(bad, axis=0) == 0) & (rows > 0) & called, channels, 0)
    for start in range(0, channels, CHANNELS):
        channel = start + tl.arange(0, CHANNELS)
        there = channel < channels
        new = new_psi2(tally_ptr, psi2_ptr, channel, there, rows, eps, kept, 1.0 - kept, limit)
        tl.store(psi2_ptr + channel, new, mask=channel < taken)
    tl.store(iters_ptr + norm, number, mask=called)


@triton.jit(do_not_specialize=["rows"])
def backward(
    grad_ptr, x_ptr, r_ptr, valid_ptr, saved_ptr, weight_ptr, nu_ptr, grad_x_ptr, sums_ptr,
    rows, channels, size, gradient_scale, nu_scale,
    SCALE_THERE: tl.constexpr, LAYER_SCALE: tl.constexpr, OUTPUT: tl.constexpr, HAS_VALID: tl.constexpr,
    PADDING: tl.constexpr, HAS_WEIGHT: tl.constexpr, TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """The sweep of a backward pass: dL/dx, and partial sums of dy and dy * u over the rows that count: with PADDING all of
    them, but for what is not finite in padding.

    gradient_scale is a number, or (SCALE_THERE) a pointer to it.
    """
    program, part = tl.program_id(0), tl.program_id(1)
    column = tl.arange(0, TILE_COLUMNS)[None, :]
    channel = part * size + column
    there = (column < size) & (channel < channels)
    if OUTPUT:
        # dL/du = (weight * dy - nu * z) / psi = scale * dy + through * u
        inv = tl.load(saved_ptr + channel, mask=there, other=0.0)
        scale = tl.load(saved_ptr + channels + channel, mask=there, other=0.0)
        through = tl.load(nu_ptr + channel, mask=there, other=0.0).to(tl.float32) * (-nu_scale) * inv * scale
        through *= value_of(gradient_scale, SCALE_THERE)
        if HAS_WEIGHT:
            scale *= tl.load(weight_ptr + channel, mask=there, other=0.0).to(tl.float32)
    grad_sum = tl.zeros((TILE_ROWS, TILE_COLUMNS), tl.float32)
    grad_u_sum = tl.zeros((TILE_ROWS, TILE_COLUMNS), tl.float32)
    number = tl.zeros((TILE_ROWS, 1), tl.int32)
    for start in tl.range(program * TILE_ROWS, rows, tl.num_programs(0) * TILE_ROWS, num_stages=STAGES):
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
            if PADDING:
                finite = is_finite(grad) & is_finite(u)
                if LAYER_SCALE:
                    finite = tl.sum((there & (finite == 0)).to(tl.int32), axis=1, keep_dims=True) == 0
                counts = counts | finite
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
    plane = tl.num_programs(0).to(tl.int64) * channels
    target = sums_ptr + program.to(tl.int64) * channels + channel
    tl.store(target, tl.sum(grad_sum, axis=0, keep_dims=True), mask=there)
    tl.store(target + plane, tl.sum(grad_u_sum, axis=0, keep_dims=True), mask=there)
    if HAS_VALID:
        if part == 0:
            tl.store(sums_ptr + 2 * plane + program, tl.sum(tl.sum(number, axis=1), axis=0).to(tl.float32))


@triton.jit(do_not_specialize=["rows", "parts"])
def backward_end(
    sums_ptr, saved_ptr, weight_ptr, grad_weight_ptr, grad_bias_ptr, tally_ptr,
    rows, channels, parts, gradient_scale,
    SCALE_THERE: tl.constexpr, HAS_VALID: tl.constexpr, HAS_WEIGHT: tl.constexpr, CHANNELS: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    """Totals of a backward pass's partial sums: its tally and the gradients of weight and bias."""
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    there = channel < channels
    plane = parts.to(tl.int64) * channels
    grad_sum = total_of(sums_ptr, channel, there, channels, parts, CHANNELS, PARTS)
    grad_u_sum = total_of(sums_ptr + plane, channel, there, channels, parts, CHANNELS, PARTS)
    if HAS_VALID:
        count = count_of(sums_ptr + 2 * plane, parts, PARTS)
    else:
        count = tl.zeros((1,), tl.float64) + rows
    grad_z_sum = grad_u_sum * tl.load(saved_ptr + channel, mask=there, other=0.0)
    tl.store(grad_bias_ptr + channel, grad_sum.to(tl.float32), mask=there)
    tl.store(grad_weight_ptr + channel, grad_z_sum.to(tl.float32), mask=there)
    weighted = grad_z_sum
    if HAS_WEIGHT:
        weighted *= tl.load(weight_ptr + channel, mask=there, other=0.0).to(tl.float64)
    tl.store(tally_ptr + channel, weighted / value_of(gradient_scale, SCALE_THERE), mask=there)
    squares = tl.load(saved_ptr + 2 * channels + channel, mask=there, other=0.0)
    tl.store(tally_ptr + channels + channel, squares.to(tl.float64), mask=there)
    store_rows(tally_ptr + 2 * channels, count)


@triton.jit
def new_nu(tally_ptr, nu_ptr, channel, there, channels, rows, nu_scale, lowest):
    """nu after a step, float32."""
    old = tl.load(nu_ptr + channel, mask=there, other=0.0).to(tl.float64)
    rows = tl.maximum(rows, 1.0)
    grad_z = tl.load(tally_ptr + channel, mask=there, other=0.0) / rows
    kept = 1.0 - nu_scale * (tl.load(tally_ptr + channels + channel, mask=there, other=0.0) / rows)
    return (old * tl.where(kept < lowest, lowest, kept) + grad_z).to(tl.float32)


@triton.jit
def advance_backward(tally_ptr, nu_ptr, channels, nu_scale, lowest, CHANNELS: tl.constexpr):
    """A program per norm: nu after a step, see :func:`.eager.advance_backward`."""
    norm = tl.program_id(0).to(tl.int64)
    tally_ptr += norm * (2 * channels + 2)
    nu_ptr += norm * channels
    rows = tl.load(tally_ptr + 2 * channels)
    called = tl.load(tally_ptr + 2 * channels + 1) > 0
    bad = tl.zeros((CHANNELS,), tl.int32)
    for start in range(0, channels, CHANNELS):
        channel = start + tl.arange(0, CHANNELS)
        there = channel < channels
        new = new_nu(tally_ptr, nu_ptr, channel, there, channels, rows, nu_scale, lowest)
        bad += (there & (is_finite(new) == 0)).to(tl.int32)
    taken = tl.where((tl.sum(bad, axis=0) == 0) & (rows > 0) & called, channels, 0)
    for start in range(0, channels, CHANNELS):
        channel = start + tl.arange(0, CHANNELS)
        there = channel < channels
        new = new_nu(tally_ptr, nu_ptr, channel, there, channels, rows, nu_scale, lowest)
        tl.store(nu_ptr + channel, new, mask=channel < taken)


class Launch(NamedTuple):
    """How a sweep runs over ``N x C``: grid (P, slices), channels of a slice, a program's tile, tiles in flight, warps."""

    grid: Tuple[int, int]
    size: int
    tile_rows: int
    tile_columns: int
    stages: int
    warps: int


def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 1 for the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def power_of_2(number: int) -> int:
    """The smallest power of 2 that is not smaller."""
    return 1 << max(number - 1, 0).bit_length()


@functools.lru_cache(maxsize=4096)
def launch(device: torch.device, rows: int, channels: int, groups: int, most: int) -> Launch:
    """The launch for ``rows x channels`` with at most that many programs on each multiprocessor."""
    size = channels // groups if groups else min(channels, BLOCK)
    slices = groups or -(-channels // size)
    tile_columns = power_of_2(size)
    tile_rows = min(max(1, TILE // tile_columns), power_of_2(rows))
    programs = max(1, min(-(-rows // tile_rows), -(-most * processors(device) // slices)))
    tile = tile_rows * tile_columns
    return Launch(
        (programs, slices), size, tile_rows, tile_columns, 2 if tile <= AHEAD else 1, min(max(tile // WARP, 4), 16)
    )
