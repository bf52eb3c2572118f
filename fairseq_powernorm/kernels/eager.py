"""The eager backend, plain torch: the arithmetic every other backend is held to, and the one that serves everywhere.

Notation as in :mod:`.interface`. Everything is computed in float32, or in float64 for float64 input. Only ``x`` and ``r``
are kept for the backward pass: ``u`` and ``z`` are cheaper to recompute than to store.
"""
import math
from typing import Iterator, NamedTuple, Optional, Tuple

import torch
from torch import Tensor

from . import memory
from .interface import LAYER_SCALE_EPS, Backward, Forward, OwnStep, PowerNormSpec
from .steps import (
    advance_backward as advance_backward,
    advance_forward as advance_forward,
    finite_or as finite_or,
    next_nu as next_nu,
    next_psi2 as next_psi2,
)


def compute_dtype(x: Tensor) -> torch.dtype:
    """float32, or float64 for float64 input: the precision in which ``x`` is normalized."""
    return torch.promote_types(x.dtype, torch.float32)


def sum_dtype(x: Tensor) -> torch.dtype:
    """dtype in which sums of several batches are added up: float64, or float32 where the device has no float64."""
    return torch.float32 if x.device.type == "mps" else torch.float64


def _by_group(x: Tensor, groups: int) -> Tensor:
    """View ``N x C`` as ``N x groups x C/groups``."""
    return x.view(x.size(0), groups, x.size(1) // groups)


def layer_scale_rsqrt(x: Tensor, groups: int, eps: float = LAYER_SCALE_EPS) -> Optional[Tensor]:
    """Reciprocal root of the layer scale, ``1 / sqrt(mean over a channel group of x^2 + eps)``.

    Args:
        x: ``N x C``, float32 or float64
        groups: number of contiguous channel groups; 0 turns the layer scale off
        eps: added to the mean square

    Returns:
        ``N x groups``, or None for ``groups == 0``
    """
    if groups == 0:
        return None
    norm = torch.linalg.vector_norm(_by_group(x, groups), dim=-1)
    return torch.rsqrt(norm.square() * (groups / x.size(1)) + eps)


def scale_rows(x: Tensor, r: Optional[Tensor], out: Optional[Tensor] = None) -> Tensor:
    """``u = r * x`` with ``r`` (``N x G``) spread over each group's channels; ``x`` itself without ``r``.

    ``out`` (outside autograd only) is the memory for ``u`` and may be ``x`` itself.
    """
    if r is None:
        return x
    if r.size(1) == 1:
        return torch.mul(x, r, out=out)
    groups = r.size(1)
    return torch.mul(
        _by_group(x, groups), r.unsqueeze(-1), out=None if out is None else _by_group(out, groups)
    ).view_as(x)


def layer_scale(x: Tensor, groups: int, eps: float = LAYER_SCALE_EPS) -> Tensor:
    """Layer scale ``u = x / sqrt(mean over a channel group of x^2 + eps)``, ordinary autograd.

    Args:
        x: ``... x C``, float32 or float64
        groups: number of contiguous channel groups, a divisor of C; 0 returns ``x``
        eps: added to the mean square

    Returns:
        tensor of ``x``'s shape and dtype
    """
    rows = x.reshape(-1, x.size(-1))
    # not by layer_scale_rsqrt: the Euclidean norm has no second derivative at zero
    r = torch.rsqrt(_by_group(rows, groups).square().mean(-1) + eps) if groups else None
    return scale_rows(rows, r).view(x.shape)


def scale_rows_backward(grad_u: Tensor, u: Tensor, r: Optional[Tensor], spare: Optional[Tensor] = None) -> Tensor:
    """Gradient of :func:`scale_rows` and its reciprocal root: ``r * (grad_u - u * mean over the group of grad_u * u)``.

    Overwrites ``grad_u``, and ``spare``, memory of the same size, if it is given.
    """
    if r is None:
        return grad_u
    products = torch.mul(grad_u, u, out=spare)
    grad, u = _by_group(grad_u, r.size(1)), _by_group(u, r.size(1))
    grad.addcmul_(u, _by_group(products, r.size(1)).sum(-1, keepdim=True), value=-1.0 / u.size(-1))
    return grad.mul_(r.unsqueeze(-1)).view_as(grad_u)


def column_sum(q: Tensor) -> Tensor:
    """Sum over rows, ``N x C`` -> ``C``. On a CPU a product with ones is several times faster than ``sum``."""
    if q.device.type == "cpu":
        return torch.mv(q.t(), q.new_ones(q.size(0)))
    return q.sum(0)


def masked_column_sum(q: Tensor, valid: Optional[Tensor]) -> Tensor:
    """Sum over the rows where ``valid`` (``N``, bool; None: all) is True, whatever stands in the others."""
    if valid is None:
        return column_sum(q)
    if q.device.type == "cpu":
        weights = valid.to(q.dtype)
        total = torch.mv(q.t(), weights)
        if torch.isfinite(total).all():
            return total
        # 0 * inf is NaN; the same product with zeros there has the same bits as with finite values
        return torch.mv(q.masked_fill(valid.logical_not().unsqueeze(1), 0).t(), weights)
    return column_sum(q.masked_fill(valid.logical_not().unsqueeze(1), 0))


def mask_rows_(q: Tensor, valid: Optional[Tensor]) -> Tensor:
    """Zero the rows of ``q`` (in place) where ``valid`` (``N``, bool) is False, whatever stood there."""
    return q if valid is None else q.masked_fill_(valid.logical_not().unsqueeze(1), 0)


def row_count(q: Tensor, valid: Optional[Tensor]) -> Tensor:
    """Number of rows that count, as a scalar tensor on ``q``'s device (no host synchronization)."""
    if valid is None:
        return q.new_full((), q.size(0))
    return valid.sum().to(q.dtype)


def inverse_root(second_moment: Tensor, eps: float) -> Tensor:
    """``1 / sqrt(psi^2 + eps)`` per channel."""
    return torch.rsqrt(second_moment + eps)


def _affine(u: Tensor, scale: Tensor, shift: Optional[Tensor], out: Optional[Tensor] = None) -> Tensor:
    """``scale * u + shift`` in one sweep; ``out`` (outside autograd only) may be ``u`` itself."""
    if shift is None:
        return torch.mul(u, scale, out=out)
    return torch.addcmul(shift, u, scale, out=out)


def affine(
    u: Tensor, inv: Tensor, weight: Optional[Tensor], bias: Optional[Tensor], out: Optional[Tensor] = None
) -> Tensor:
    """``y = weight * inv * u + bias``; ``out`` as for :func:`_affine`."""
    scale = inv if weight is None else inv * weight.to(inv.dtype)
    return _affine(u, scale, None if bias is None else bias.to(inv.dtype), out)


def grad_sums(
    grad: Tensor, u: Tensor, valid: Optional[Tensor], spare: Optional[Tensor] = None
) -> Tuple[Tensor, Tensor]:
    """Per-channel ``sum of dy`` and ``sum of dy * u``, over the rows where ``valid`` is True (all rows if None).

    Overwrites ``spare``, memory of the size of ``u``, if it is given.
    """
    return masked_column_sum(grad, valid), masked_column_sum(torch.mul(grad, u, out=spare), valid)


# ---------------------------------------------------------------- Power Normalization: what each kernel offers


def tally(*sums: Tensor, rows: Tensor) -> Tensor:
    """One vector ``[sums (C each), rows, 1]`` in :func:`sum_dtype`: sums over ``rows`` rows, ready to be added up."""
    dtype = sum_dtype(rows)
    one = rows.new_ones(1, dtype=dtype)
    return torch.cat([*(each.to(dtype) for each in sums), rows.reshape(1).to(dtype), one])


def mean_of(tally: Tensor, otherwise: Tensor) -> Tensor:
    """Second moment per channel from the tally of a forward pass; ``otherwise`` where no row counts."""
    mean = tally[:-2] / tally[-2].clamp(min=1)
    return torch.where(tally[-2] > 0, mean, otherwise.to(mean.dtype)).to(otherwise.dtype)


#: elements of a block of rows: few enough for a core's cache, enough to be worth a dozen calls of torch
BLOCK = 1 << 19


class _Block(NamedTuple):
    """Some rows to work on, and memory for what is computed of them, which the next block uses again.

    Attributes:
        rows: which
        u, spare: as many rows, in the dtype in which is computed
    """

    rows: slice
    u: Tensor
    spare: Tensor


def _blocks(x: Tensor, rows: memory.Rows, dtype: torch.dtype) -> Iterator[_Block]:
    """A CPU works on blocks of the rows of ``x`` that fit its cache, any other device on all rows at once."""
    number, channels = rows.number, rows.channels
    size = min(max(1, BLOCK // channels), number) if x.device.type == "cpu" else number
    u, spare = x.new_empty(2, size, channels, dtype=dtype)
    for block in rows.blocks(size):
        count = block.stop - block.start
        yield _Block(block, u[:count], spare[:count])


def _scaled(rows: memory.Rows, block: _Block, groups: int) -> Tuple[Tensor, Optional[Tensor]]:
    """``u`` and ``r`` of some rows; ``u`` lies in the block's memory, or are the rows where nothing is to be computed."""
    wide = rows.read(block.rows, block.u)
    r = layer_scale_rsqrt(wide, groups)
    return scale_rows(wide, r, out=block.u), r


def _part(valid: Optional[Tensor], block: slice) -> Optional[Tensor]:
    return None if valid is None else valid[block]


def second_moment(x: Tensor, valid: Optional[Tensor], groups: int) -> Tensor:
    """The tally of a forward pass (see :class:`Forward`) alone."""
    rows = memory.Rows(x)
    total = x.new_zeros(rows.channels, dtype=compute_dtype(x))
    with torch.autocast(x.device.type, enabled=False):
        for block in _blocks(x, rows, total.dtype):
            u, _ = _scaled(rows, block, groups)
            total += masked_column_sum(torch.mul(u, u, out=block.spare), _part(valid, block.rows))
    return tally(total, rows=row_count(total, valid) if valid is not None else total.new_full((), rows.number))


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
    """Forward pass of PN in training.

    Args:
        x: ``... x C``
        weight, bias: ``C`` or None
        valid: bool, one for each row in the order of ``x``, False marks padding; None if there is none
        psi2: ``C``, running second moment psi^2(t-1)
        spec: constants of the call
        batch: ``C``, the batch's own second moment, if it is not that of these rows alone
        step: the step that the running statistics take, see :class:`OwnStep`
    """
    rows = memory.Rows(x)
    dtype = compute_dtype(x)
    running = psi2.to(dtype)
    if batch is None and (spec.forward_batch or spec.jump < math.inf):
        batch = mean_of(second_moment(x, valid, spec.groups), running)
    if batch is not None:
        running = torch.where(batch > spec.jump * (running + spec.eps), batch, running)
    y = memory.empty(x)
    out = memory.Rows(y)
    r = None if spec.groups == 0 else x.new_empty(rows.number, spec.groups, dtype=dtype)
    total, everything = x.new_zeros(2, rows.channels, dtype=dtype)
    with torch.autocast(x.device.type, enabled=False):
        inv = inverse_root(batch if spec.forward_batch and batch is not None else running, spec.eps)
        scale = inv if weight is None else inv * weight.to(dtype)
        shift = None if bias is None else bias.to(dtype)
        for block in _blocks(x, rows, dtype):
            u, root = _scaled(rows, block, spec.groups)
            if r is not None and root is not None:
                r[block.rows] = root
            squares = torch.mul(u, u, out=block.spare)
            if valid is not None and not spec.skip_padding:
                everything += column_sum(squares)
            total += masked_column_sum(squares, _part(valid, block.rows))
            target = out.place(block.rows, dtype)
            found = _affine(u, scale, shift, out=block.spare if target is None else target)
            if target is None:
                out.write(block.rows, found)
    count = total.new_full((), rows.number) if valid is None else row_count(total, valid)
    own = tally(total, rows=count)
    if batch is None and spec.backward_batch:
        batch = mean_of(own, running)
    inv_backward = inverse_root(batch if spec.backward_batch and batch is not None else running, spec.eps)
    squares = total if valid is None or spec.skip_padding else everything
    saved = torch.stack([inv, inv_backward, squares * inv.square()])
    if step is not None:
        advance_forward(own, step.psi2, step.iters, step.spec)
    return Forward(y, r, saved, own if step is None else None)


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
    """Backward pass of PN: the approximate gradient of Algorithm 2.

    Args:
        grad_y: gradient of ``y``, shape and dtype of ``x``
        x, weight: as in the forward pass
        r, saved: what the forward pass gave
        valid: of the forward pass. With ``spec.skip_padding`` the other rows do not count and receive no gradient; without
            it they do, but for the channel groups (without layer scale: channels) in which x or dy is not finite: these
            count as zero and receive none
        nu: ``C``; ``spec.nu_scale * nu`` is the paper's nu(t-1)
        spec: constants of the call
        want_x: is the gradient of ``x`` wanted?
        step: the step that nu takes, see :class:`OwnStep`
    """
    found = _power_backward(grad_y, x, r, weight, valid, saved, nu, spec, want_x=want_x)
    if step is None or found.tally is None:
        return found
    advance_backward(found.tally, step.nu, step.spec)
    return found._replace(tally=None)


def _power_backward(
    grad_y: Tensor,
    x: Tensor,
    r: Optional[Tensor],
    weight: Optional[Tensor],
    valid: Optional[Tensor],
    saved: Tensor,
    nu: Tensor,
    spec: PowerNormSpec,
    *,
    want_x: bool,
) -> Backward:
    """The same without a step."""
    if valid is None or spec.skip_padding:
        return _rows_backward(grad_y, x, r, weight, valid, saved, nu, spec, want_x=want_x)
    if x.device.type == "cpu":  # where looking at a result costs nothing
        found = _rows_backward(grad_y, x, r, weight, None, saved, nu, spec, want_x=want_x)
        if torch.isfinite(found.weight).all():
            return found
    rows, grads = x.reshape(-1, x.size(-1)), grad_y.reshape(-1, x.size(-1))
    grads, rows, r = _finite_parts(valid, grads, rows, r)
    found = _rows_backward(grads, rows, r, weight, None, saved, nu, spec, want_x=want_x)
    return found if found.x is None else found._replace(x=found.x.view(x.shape))


def _finite_parts(
    valid: Tensor, grad: Tensor, x: Tensor, r: Optional[Tensor]
) -> Tuple[Tensor, Tensor, Optional[Tensor]]:
    """dy, x (``N x C``) and r of a backward pass in which padding counts, with zeros for what is not finite in it: for the
    channel group of a row, whose gradients depend on each other, or without layer scale for the channel.
    """
    finite = torch.isfinite(grad) & torch.isfinite(x)
    if r is None:
        bad = valid.unsqueeze(1).logical_or(finite).logical_not()
    else:
        by_group = _by_group(finite, r.size(1)).all(-1) & torch.isfinite(r)
        few = valid.unsqueeze(1).logical_or(by_group).logical_not()
        bad, r = few.repeat_interleave(x.size(1) // r.size(1), dim=1), r.masked_fill(few, 0)
    return grad.masked_fill(bad, 0), x.masked_fill(bad, 0), r


def _rows_backward(
    grad_y: Tensor,
    x: Tensor,
    r: Optional[Tensor],
    weight: Optional[Tensor],
    counted: Optional[Tensor],
    saved: Tensor,
    nu: Tensor,
    spec: PowerNormSpec,
    *,
    want_x: bool,
) -> Backward:
    """The same; ``counted``: the rows that count and receive a gradient, None for all."""
    rows, grads = memory.Rows(x), memory.Rows(grad_y)
    order = grads if rows.flat is not None else rows  # blocks that suit both: those of a flat one may be any
    dtype = compute_dtype(x)
    inv_forward, inv_backward, z_square = saved
    wide_weight = None if weight is None else weight.to(dtype)
    # dL/du = (weight * dy - nu * z) / psi = scale * dy + through * u
    scale = inv_backward if weight is None else inv_backward * wide_weight
    through = nu.to(dtype) * spec.gradient_scale * -spec.nu_scale * inv_forward * inv_backward
    grad_x = memory.empty(x) if want_x else None
    out = None if grad_x is None else memory.Rows(grad_x)
    grad_sum, grad_u_sum = x.new_zeros(2, rows.channels, dtype=dtype)
    with torch.autocast(x.device.type, enabled=False):
        for block in _blocks(x, order, dtype):
            part, root = _part(counted, block.rows), None if r is None else r[block.rows]
            u = scale_rows(rows.read(block.rows, block.u), root, out=block.u)
            grad = grads.read(block.rows, block.u.new_empty(block.u.shape))
            sums = grad_sums(grad, u, part, spare=block.spare)
            grad_sum += sums[0]
            grad_u_sum += sums[1]
            if out is not None:
                target = out.place(block.rows, dtype)
                grad_u = torch.mul(grad, scale, out=target).addcmul_(u, through)
                found = mask_rows_(scale_rows_backward(grad_u, u, root, spare=block.spare), part)
                if target is None:
                    out.write(block.rows, found)
    grad_z_sum = grad_u_sum * inv_forward
    # Lambda and Gamma of Algorithm 2, as sums: dL/dz * z and z^2
    weighted = grad_z_sum if weight is None else grad_z_sum * wide_weight
    count = grad_sum.new_full((), rows.number) if counted is None else row_count(grad_sum, counted)
    return Backward(grad_x, grad_z_sum, grad_sum, tally(weighted / spec.gradient_scale, z_square, rows=count))


def evaluate(
    x: Tensor,
    weight: Optional[Tensor],
    bias: Optional[Tensor],
    psi2: Optional[Tensor],
    groups: int,
    eps: float,
    mean: Optional[Tensor] = None,
) -> Tensor:
    """Evaluation, ``(u - mean) * weight / sqrt(psi2 + eps) + bias``: ordinary autograd.

    Args:
        x: ``... x C``
        weight, bias: ``C`` or None
        psi2: ``C``, or None: not divided
        groups: channel groups of the layer scale, 0 for none
        eps: added to ``psi2``, or without it to the mean square of the layer scale
        mean: ``C``, or None: nothing is subtracted

    Returns:
        tensor of ``x``'s shape and dtype
    """
    u = layer_scale(x.to(compute_dtype(x)), groups, eps if psi2 is None else LAYER_SCALE_EPS)
    if mean is not None:
        u = u - mean.to(u.dtype)
    inv = u.new_ones(u.size(-1)) if psi2 is None else inverse_root(psi2.to(u.dtype), eps)
    return affine(u, inv, weight, bias).to(x.dtype)


def serves(device_type: str, dtype: torch.dtype, *, asked: bool = False) -> bool:
    """This backend serves all tensors."""
    return True


def unavailable() -> Optional[str]:
    """None: it can be used everywhere."""
    return None


def describe() -> str:
    """What is in use, for people."""
    return "eager (plain torch)"
