"""Plain-torch kernel: the arithmetic every other kernel is held to.

Notation, for ``x`` of shape ``N x C`` (one row per token): ``r`` is the reciprocal root of the
layer scale, ``N x G``; ``u = r * x``; ``inv`` is ``1 / sqrt(psi^2 + eps)`` per channel; ``z = inv * u``;
``y = weight * z + bias``. Everything is computed in float32, or in float64 for float64 input. Only
``x`` and ``r`` need to be kept for the backward pass: ``u`` and ``z`` are cheaper to recompute than to store.
"""
from typing import NamedTuple, Optional, Tuple

import torch
from torch import Tensor

#: eps of the layer scale; a constant of the method, independent of the norm's own eps
LAYER_SCALE_EPS = 1e-5


def compute_dtype(x: Tensor) -> torch.dtype:
    """float32, or float64 for float64 input: the precision in which ``x`` is normalized."""
    return torch.promote_types(x.dtype, torch.float32)


def sum_dtype(x: Tensor) -> torch.dtype:
    """dtype in which sums of several batches are added up: float64, or float32 where the device has no float64."""
    return torch.float32 if x.device.type == "mps" else torch.float64


def _by_group(x: Tensor, groups: int) -> Tensor:
    """View ``N x C`` as ``N x groups x C/groups``."""
    return x.view(x.size(0), groups, x.size(1) // groups)


def layer_scale_rsqrt(x: Tensor, groups: int) -> Optional[Tensor]:
    """Reciprocal root of the layer scale, ``1 / sqrt(mean over a channel group of x^2 + 1e-5)``.

    Args:
        x: ``N x C``, float32 or float64
        groups: number of contiguous channel groups; 0 turns the layer scale off

    Returns:
        ``N x groups``, or None for ``groups == 0``
    """
    if groups == 0:
        return None
    norm = torch.linalg.vector_norm(_by_group(x, groups), dim=-1)
    return torch.rsqrt(norm.square() * (groups / x.size(1)) + LAYER_SCALE_EPS)


def scale_rows(x: Tensor, r: Optional[Tensor]) -> Tensor:
    """``u = r * x`` with ``r`` (``N x G``) spread over each group's channels; ``x`` itself without ``r``."""
    if r is None:
        return x
    if r.size(1) == 1:
        return x * r
    return (_by_group(x, r.size(1)) * r.unsqueeze(-1)).view_as(x)


def scale_rows_backward(grad_u: Tensor, u: Tensor, r: Optional[Tensor]) -> Tensor:
    """Gradient of :func:`scale_rows` and its reciprocal root: ``r * (grad_u - u * mean over the group of grad_u * u)``.

    Overwrites ``grad_u``.
    """
    if r is None:
        return grad_u
    grad, u = _by_group(grad_u, r.size(1)), _by_group(u, r.size(1))
    dot = torch.linalg.vecdot(grad, u).unsqueeze_(-1)
    grad.addcmul_(u, dot, value=-1.0 / u.size(-1))
    return grad.mul_(r.unsqueeze(-1)).view_as(grad_u)


def column_sum(q: Tensor) -> Tensor:
    """Sum over rows, ``N x C`` -> ``C``. On a CPU a product with ones is several times faster than ``sum``."""
    if q.device.type == "cpu":
        return torch.mv(q.t(), q.new_ones(q.size(0)))
    return q.sum(0)


def mask_rows_(q: Tensor, valid: Optional[Tensor]) -> Tensor:
    """Zero the rows of ``q`` (in place) where ``valid`` (``N``, bool) is False, whatever stood there."""
    return q if valid is None else q.masked_fill_(valid.logical_not().unsqueeze(1), 0)


def row_count(q: Tensor, valid: Optional[Tensor]) -> Tensor:
    """Number of rows that count, as a scalar tensor on ``q``'s device (no host synchronization)."""
    if valid is None:
        return q.new_full((), q.size(0))
    return valid.sum().to(q.dtype)


class Moment(NamedTuple):
    """Sum of squares over the rows that count (``C``) and their number (scalar tensor)."""

    total: Tensor
    count: Tensor

    def mean(self, otherwise: Tensor) -> Tensor:
        """Second moment per channel; ``otherwise`` where no row counts."""
        mean = self.total / self.count.clamp(min=1)
        return torch.where(self.count > 0, mean, otherwise.to(mean.dtype))


def second_moments(u: Tensor, valid: Optional[Tensor], all_rows: bool) -> Tuple[Moment, Moment]:
    """``sum of u^2`` with the number of rows: over the rows where ``valid`` is True, and over all rows.

    The second is the first where ``valid`` is None or ``all_rows`` is False (it is then not needed).
    """
    squares = u * u
    everything = Moment(column_sum(squares), row_count(u, None)) if all_rows or valid is None else None
    if valid is None:
        return everything, everything
    moment = Moment(column_sum(mask_rows_(squares, valid)), row_count(u, valid))
    return moment, everything or moment


def inverse_root(second_moment: Tensor, eps: float) -> Tensor:
    """``1 / sqrt(psi^2 + eps)`` per channel."""
    return torch.rsqrt(second_moment + eps)


def affine(
    u: Tensor, inv: Tensor, weight: Optional[Tensor], bias: Optional[Tensor], out: Optional[Tensor] = None
) -> Tensor:
    """``y = weight * inv * u + bias`` in one sweep over ``u``; ``out`` (outside autograd only) may be ``u`` itself."""
    scale = inv if weight is None else inv * weight.to(inv.dtype)
    if bias is None:
        return torch.mul(u, scale, out=out)
    return torch.addcmul(bias.to(inv.dtype), u, scale, out=out)


def grad_sums(grad: Tensor, u: Tensor, valid: Optional[Tensor]) -> Tuple[Tensor, Tensor]:
    """Per-channel ``sum of dy`` and ``sum of dy * u``, over the rows where ``valid`` is True (all rows if None)."""
    products = mask_rows_(grad * u, valid)
    return column_sum(mask_rows_(grad.clone(), valid) if valid is not None else grad), column_sum(products)
