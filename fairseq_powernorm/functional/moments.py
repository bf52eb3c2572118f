"""Mean and variance of the rows of a batch in differentiable operations of torch."""
from typing import Any, NamedTuple, Optional, Tuple

import torch
from torch import Tensor

from ..kernels import eager
from .common import Function, Gradients, Reduce, finite_padding_gradient


class Moments(NamedTuple):
    """Rows after the layer scale, and their statistics.

    Attributes:
        u: ``... x C``, in the precision of the computation; padded rows whose squares were not finite are zero
        valid: ``... x 1`` bool, False marks padding; None if there is none
        own: scalar, number of this process's rows that count
        total: scalar, that of all processes that share the batch
        mean, var: ``C``, mean and biased variance over the rows that count, with gradient; zero where there are none
        tally: sums of u and u^2 over this process's rows, without gradient
    """

    u: Tensor
    valid: Optional[Tensor]
    own: Tensor
    total: Tensor
    mean: Tensor
    var: Tensor
    tally: Tensor


class _Total(Function):
    """Sums over all processes, through which the gradients of all processes flow back."""

    @staticmethod
    def forward(sums: Tensor, reduce: Reduce) -> Tensor:
        return reduce(sums)

    @staticmethod
    def setup_context(ctx: Any, inputs: Tuple[Any, ...], output: Any) -> None:
        ctx.reduce = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Gradients:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "second derivatives are not available where statistics are reduced in every pass (sync 'exact')"
            )
        return ctx.reduce(grad), None


def _total(sums: Tensor, reduce: Reduce) -> Tensor:
    found: Tensor = _Total.apply(sums.to(eager.sum_dtype(sums)), reduce)
    return found.to(sums.dtype)


def scaled_rows(x: Tensor, valid: Optional[Tensor], groups: int) -> Tuple[Tensor, Optional[Tensor]]:
    """``u``, ``... x C``, and ``valid`` as ``... x 1``, as :class:`Moments` has them.

    Args:
        x: ``... x C``
        valid: bool, one for each row in the order of ``x``, False marks padding; None if there is none
        groups: channel groups of the layer scale, 0 for none
    """
    rows = x.to(eager.compute_dtype(x))
    column = None if valid is None else valid.view(*x.shape[:-1], 1)
    if column is not None:
        finite = torch.isfinite(rows.square()).all(-1, keepdim=True)
        rows = rows.masked_fill(column.logical_or(finite).logical_not(), 0.0)
    return eager.layer_scale(rows, groups), column


def sum_rows(q: Tensor, valid: Optional[Tensor] = None) -> Tensor:
    """Sum over the rows, ``... x C`` -> ``C``, whatever stands where ``valid`` (``... x 1``) is False."""
    return (q if valid is None else torch.where(valid, q, 0.0)).reshape(-1, q.size(-1)).sum(0)


def count_rows(u: Tensor, valid: Optional[Tensor]) -> Tensor:
    """Number of rows that count, a scalar of the dtype of ``u``."""
    return u.new_full((), u.numel() // u.size(-1)) if valid is None else valid.sum().to(u.dtype)


def batch_moments(x: Tensor, valid: Optional[Tensor], groups: int, reduce: Optional[Reduce] = None) -> Moments:
    """Layer scale, mean and variance of a batch.

    Args:
        x: ``... x C``
        valid: bool, one for each row in the order of ``x``, False marks padding; None if there is none
        groups: channel groups of the layer scale, 0 for none
        reduce: makes the statistics, and their gradient, those of all processes
    """
    u, column = scaled_rows(x, valid, groups)
    own = count_rows(u, column)
    own_sum = sum_rows(u, column)
    total, count = own_sum, own
    if reduce is not None:
        total, count = _total(torch.cat([own_sum, own.reshape(1)]), reduce).split([u.size(-1), 1])
        count = count.detach().reshape(())
    mean = total / count.clamp(min=1)
    own_square = sum_rows((u - mean).square(), column)
    square = own_square if reduce is None else _total(own_square, reduce)
    var = square / count.clamp(min=1)
    # sums about zero, which can be added up, in float64, where nothing is lost by taking them apart again
    wide = eager.sum_dtype(u)
    about, sums, squares, number = (each.detach().to(wide) for each in (mean, own_sum, own_square, own))
    tally = eager.tally(sums, squares + about * (2.0 * sums - number * about), rows=own.detach())
    return Moments(u, column, own, count, mean, var, tally)


def standing_in(moments: Moments, own: Tensor, running: Tensor) -> Tensor:
    """``own``, a statistic of the batch, or the running one where no row counts."""
    return torch.where(moments.total > 0, own, running.to(own.dtype))


def root(square: Tensor) -> Tensor:
    """Square root whose gradient at zero is zero, as that of torch's standard deviation."""
    positive = square > 0
    return torch.where(positive, torch.where(positive, square, 1.0).sqrt(), 0.0)


def output_like(y: Tensor, x: Tensor, valid: Optional[Tensor]) -> Tensor:
    """``y`` in the dtype of ``x``; no gradient that is not finite passes at padding."""
    return (y if valid is None else finite_padding_gradient(y, valid)).to(x.dtype)
