"""Autograd functions of the norms. They hold no state and make no choice of policy.

The running statistics come in as arguments, the batch's statistics go out: those of the forward pass as
non-differentiable outputs, those of the backward pass through the function ``collect``, which is called
once per backward pass. A function ``reduce``, where one is given, turns the sums of this process into those of all
processes that share a batch, forward and backward: statistics and gradients are then those of the whole batch.
"""
import math
from typing import Callable, NamedTuple, Optional, Sequence, Tuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .kernels import kernel

Moment = kernel.Moment

#: takes the sums of a backward pass (``C`` each) and the number of rows (scalar tensor)
Collect = Callable[[Sequence[Tensor], Tensor], None]
#: takes a vector of sums, returns their totals over all processes
Reduce = Callable[[Tensor], Tensor]


def _reduced(reduce: Optional[Reduce], *sums: Tensor) -> Sequence[Tensor]:
    """The given sums (``C`` or scalar) over all processes, in one call of ``reduce``."""
    if reduce is None:
        return sums
    total = reduce(torch.cat([each.reshape(-1) for each in sums]))
    return [part.view_as(each) for part, each in zip(total.split([each.numel() for each in sums]), sums)]


class PowerNormSpec(NamedTuple):
    """The constants of one call of :func:`power_norm`.

    Attributes:
        groups: channel groups of the layer scale, 0 for none
        eps: added to psi^2 under both roots
        nu_scale: factor of ``nu`` in the gradient, ``1 - alpha_bkw``
        gradient_scale: factor of the loss whose gradient arrives (the loss scale of fp16 training)
        forward_batch: divide the output by the batch's own second moment instead of ``psi2``
        backward_batch: divide the gradient by the batch's own second moment instead of ``psi2``
        skip_padding: backward statistics over non-padding rows only, no gradient through padding
        jump: channels whose second moment in this batch exceeds ``jump * (psi2 + eps)`` divide by the former
    """

    groups: int
    eps: float
    nu_scale: float
    gradient_scale: float
    forward_batch: bool
    backward_batch: bool
    skip_padding: bool
    jump: float = math.inf


class _PowerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, valid, psi2, nu, spec, collect, reduce):
        with torch.autocast(x.device.type, enabled=False):
            wide = x.to(kernel.compute_dtype(x))
            r = kernel.layer_scale_rsqrt(wide, spec.groups)
            u = kernel.scale_rows(wide, r)
            moment, everything = kernel.second_moments(u, valid, all_rows=not spec.skip_padding)
            running = psi2.to(wide.dtype)
            inv_batch = None
            if spec.forward_batch or spec.backward_batch or spec.jump < math.inf:
                batch = Moment(*_reduced(reduce, *moment)).mean(otherwise=psi2)
                running = torch.where(batch > spec.jump * (running + spec.eps), batch, running)
                inv_batch = kernel.inverse_root(batch, spec.eps)
            inv_running = kernel.inverse_root(running, spec.eps)
            inv_forward = inv_batch if spec.forward_batch else inv_running
            inv_backward = inv_batch if spec.backward_batch else inv_running
            y = kernel.affine(u, inv_forward, weight, bias, out=None if u is x else u).to(x.dtype)
        squares = moment if spec.skip_padding else everything
        ctx.save_for_backward(x, r, weight, bias, valid, inv_forward, inv_backward, *squares)
        # nu is read when the backward pass runs, by the method's definition: not a saved tensor
        ctx.nu, ctx.spec, ctx.collect = nu, spec, collect
        ctx.mark_non_differentiable(*moment)
        ctx.set_materialize_grads(False)
        return (y, *moment)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y, _total, _count):
        if grad_y is None:
            return (None,) * 9
        x, r, weight, bias, valid, inv_forward, inv_backward, square_total, count = ctx.saved_tensors
        spec = ctx.spec
        with torch.autocast(x.device.type, enabled=False):
            dtype = kernel.compute_dtype(x)
            u = kernel.scale_rows(x.to(dtype), r)
            grad = grad_y.to(dtype)
            wide_weight = None if weight is None else weight.to(dtype)
            nu = ctx.nu.to(dtype) * spec.gradient_scale * spec.nu_scale
            counted = valid if spec.skip_padding else None
            grad_sum, grad_u_sum = kernel.grad_sums(grad, u, counted)
            grad_z_sum = grad_u_sum * inv_forward
            # Lambda and Gamma of Algorithm 2, as sums: dL/dz * z and z^2
            weighted = grad_z_sum if wide_weight is None else grad_z_sum * wide_weight
            ctx.collect((weighted / spec.gradient_scale, square_total * inv_forward.square()), count)
            grad_x = None
            if ctx.needs_input_grad[0]:
                # dL/du = (weight * dy - nu * z) / psi
                scale = inv_backward if wide_weight is None else inv_backward * wide_weight
                grad_u = (grad * scale).addcmul_(u, -nu * inv_forward * inv_backward)
                grad_x = kernel.mask_rows_(kernel.scale_rows_backward(grad_u, u, r), counted).to(x.dtype)
            grad_weight = None if weight is None else grad_z_sum.to(weight.dtype)
            grad_bias = None if bias is None else grad_sum.to(bias.dtype)
        return grad_x, grad_weight, grad_bias, None, None, None, None, None, None


def power_norm(
    x: Tensor,
    weight: Optional[Tensor],
    bias: Optional[Tensor],
    valid: Optional[Tensor],
    psi2: Tensor,
    nu: Tensor,
    spec: PowerNormSpec,
    collect: Collect,
    reduce: Optional[Reduce] = None,
) -> Tuple[Tensor, Moment]:
    """Layer scale and Power Normalization of rows, with the method's approximate gradient (Algorithm 2).

    Args:
        x: ``N x C``, contiguous
        weight, bias: ``C`` or None
        valid: ``N`` bool, False marks padding; None if there is none
        psi2: ``C``, running second moment psi^2(t-1)
        nu: ``C``, read when the backward pass runs; ``spec.nu_scale * nu`` is the paper's nu(t-1)
        spec: constants of the call
        collect: called by the backward pass with the sums over rows of ``weight * dy * z`` (gradient scale taken
            out) and ``z^2``, and the number of rows
        reduce: makes the batch's second moment that of all processes, where ``spec`` divides by it

    Returns:
        ``y`` (``N x C``, dtype of ``x``) and the :class:`Moment` of this process's batch over non-padding rows
    """
    y, total, count = _PowerNorm.apply(x, weight, bias, valid, psi2, nu, spec, collect, reduce)
    return y, Moment(total, count)


class _BatchPowerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, valid, psi2, groups, eps, collect, reduce):
        with torch.autocast(x.device.type, enabled=False):
            wide = x.to(kernel.compute_dtype(x))
            r = kernel.layer_scale_rsqrt(wide, groups)
            u = kernel.scale_rows(wide, r)
            moment, _ = kernel.second_moments(u, valid, all_rows=False)
            whole = Moment(*_reduced(reduce, *moment))
            inv = kernel.inverse_root(whole.mean(otherwise=psi2), eps)
            y = kernel.affine(u, inv, weight, bias, out=None if u is x else u).to(x.dtype)
        ctx.save_for_backward(x, r, weight, bias, valid, inv, moment.count, whole.count)
        ctx.collect, ctx.reduce = collect, reduce
        ctx.mark_non_differentiable(*moment)
        ctx.set_materialize_grads(False)
        return (y, *moment)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y, _total, _count):
        if grad_y is None:
            return (None,) * 9
        x, r, weight, bias, valid, inv, own_count, count = ctx.saved_tensors
        with torch.autocast(x.device.type, enabled=False):
            dtype = kernel.compute_dtype(x)
            u = kernel.scale_rows(x.to(dtype), r)
            grad = grad_y.to(dtype)
            grad_sum, grad_u_sum = kernel.grad_sums(grad, u, None)
            grad_z_sum = grad_u_sum * inv
            scale = inv if weight is None else inv * weight.to(dtype)
            if ctx.collect is not None:
                ctx.collect((scale * grad_u_sum,), own_count)
            grad_x = None
            if ctx.needs_input_grad[0]:
                # d psi_B^2 / du is 2u / n on the rows that count and 0 on padding
                (grad_u_sum,) = _reduced(ctx.reduce, grad_u_sum)
                mean = (scale * grad_u_sum) * inv.square() / count.clamp(min=1)
                centre = u if valid is None else kernel.mask_rows_(u.clone(), valid)
                grad_u = (grad * scale).addcmul_(centre, -mean)
                grad_x = kernel.scale_rows_backward(grad_u, u, r).to(x.dtype)
            grad_weight = None if weight is None else grad_z_sum.to(weight.dtype)
            grad_bias = None if bias is None else grad_sum.to(bias.dtype)
        return grad_x, grad_weight, grad_bias, None, None, None, None, None, None


def batch_power_norm(
    x: Tensor,
    weight: Optional[Tensor],
    bias: Optional[Tensor],
    valid: Optional[Tensor],
    psi2: Tensor,
    groups: int,
    eps: float,
    collect: Optional[Collect] = None,
    reduce: Optional[Reduce] = None,
) -> Tuple[Tensor, Moment]:
    """Layer scale and PN-V of rows: the batch's own second moment, with its exact gradient (Algorithm 1).

    Arguments and results as for :func:`power_norm`; ``psi2`` (``C``) stands in where no row counts, and
    ``collect`` is called with the sum of ``weight * dy * z`` (gradient scale not taken out) and the number of
    rows. The gradient is that of the function computed: a gradient that arrives at a padded row passes through it
    and through the batch's second moment.
    """
    y, total, count = _BatchPowerNorm.apply(x, weight, bias, valid, psi2, groups, eps, collect, reduce)
    return y, Moment(total, count)


def layer_scale(x: Tensor, groups: int) -> Tensor:
    """Layer scale ``u = x / sqrt(mean over a channel group of x^2 + 1e-5)``, ordinary autograd.

    Args:
        x: ``... x C``, float32 or float64
        groups: number of contiguous channel groups, a divisor of C; 0 returns ``x``

    Returns:
        tensor of ``x``'s shape and dtype
    """
    rows = x.reshape(-1, x.size(-1))
    return kernel.scale_rows(rows, kernel.layer_scale_rsqrt(rows, groups)).view(x.shape)


def running_norm(
    x: Tensor,
    weight: Optional[Tensor],
    bias: Optional[Tensor],
    psi2: Tensor,
    groups: int,
    eps: float,
    mean: Optional[Tensor] = None,
) -> Tensor:
    """Layer scale and normalization by running statistics, as in evaluation: ordinary autograd.

    Args:
        x: ``... x C``
        psi2: ``C``, the second moment, or the variance if ``mean`` is given
        weight, bias: ``C`` or None
        groups: channel groups of the layer scale, 0 for none
        eps: added to ``psi2``
        mean: ``C``, subtracted first; None for none

    Returns:
        tensor of ``x``'s shape and dtype
    """
    u = layer_scale(x.to(kernel.compute_dtype(x)), groups)
    inv = kernel.inverse_root(psi2.to(u.dtype), eps)
    if mean is not None:
        u = u - mean.to(u.dtype)
    return kernel.affine(u, inv, weight, bias).to(x.dtype)


class _MaskedBatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, valid, running_mean, running_var, groups, eps, collect, reduce):
        with torch.autocast(x.device.type, enabled=False):
            wide = x.to(kernel.compute_dtype(x))
            r = kernel.layer_scale_rsqrt(wide, groups)
            u = kernel.scale_rows(wide, r)
            count = kernel.row_count(u, valid)
            some, denominator = count > 0, count.clamp(min=1)
            kept = u if valid is None else kernel.mask_rows_(u.clone(), valid)
            mean = torch.where(some, kernel.column_sum(kept) / denominator, running_mean.to(u.dtype))
            centred = u - mean
            squares = kernel.mask_rows_(centred * centred, valid)
            var = torch.where(some, kernel.column_sum(squares) / denominator, running_var.to(u.dtype))
            own = (mean, var, count)
            if reduce is not None:
                # moments about zero add up; in float64 nothing is lost by taking them apart again
                first, second, count = _reduced(reduce, *moments_about_zero(mean, var, count))
                some, denominator = count > 0, count.clamp(min=1)
                mean = torch.where(some, first / denominator, running_mean).to(u.dtype)
                var = torch.where(some, second / denominator - (first / denominator).square(), running_var).to(u.dtype)
                count, centred = count.to(u.dtype), u - mean
            inv = kernel.inverse_root(var, eps)
            y = kernel.affine(centred, inv, weight, bias, out=centred).to(x.dtype)
        ctx.save_for_backward(x, r, weight, bias, valid, mean, inv, own[2], count)
        ctx.collect, ctx.reduce = collect, reduce
        ctx.mark_non_differentiable(*own)
        ctx.set_materialize_grads(False)
        return (y, *own)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y, _mean, _var, _count):
        if grad_y is None:
            return (None,) * 10
        x, r, weight, bias, valid, mean, inv, own_count, count = ctx.saved_tensors
        with torch.autocast(x.device.type, enabled=False):
            dtype = kernel.compute_dtype(x)
            u = kernel.scale_rows(x.to(dtype), r)
            centred = u - mean
            grad = grad_y.to(dtype)
            grad_sum, grad_centred_sum = kernel.grad_sums(grad, centred, None)
            grad_weight = None if weight is None else (grad_centred_sum * inv).to(weight.dtype)
            grad_bias = None if bias is None else grad_sum.to(bias.dtype)
            scale = inv if weight is None else inv * weight.to(dtype)
            if ctx.collect is not None:
                ctx.collect((scale / inv * grad_sum, scale * grad_centred_sum), own_count)
            grad_x = None
            if ctx.needs_input_grad[0]:
                grad_sum, grad_centred_sum = _reduced(ctx.reduce, grad_sum, grad_centred_sum)
                denominator = count.clamp(min=1)
                # mean and variance depend on the rows that count, every row on them
                through = centred.mul_(-scale * grad_centred_sum * inv.square() / denominator)
                through = kernel.mask_rows_(through.sub_(scale * grad_sum / denominator), valid)
                grad_x = kernel.scale_rows_backward(through.addcmul_(grad, scale), u, r).to(x.dtype)
        return grad_x, grad_weight, grad_bias, None, None, None, None, None, None, None


def moments_about_zero(mean: Tensor, var: Tensor, count: Tensor) -> Tuple[Tensor, Tensor, Tensor]:
    """Sums of x and x^2 over ``count`` rows of the given mean and biased variance, in float64: they can be added up."""
    mean, var, count = (each.to(kernel.sum_dtype(each)) for each in (mean, var, count))
    return mean * count, (var + mean.square()) * count, count


def masked_batch_norm(
    x: Tensor,
    weight: Optional[Tensor],
    bias: Optional[Tensor],
    valid: Optional[Tensor],
    running_mean: Tensor,
    running_var: Tensor,
    groups: int,
    eps: float,
    collect: Optional[Collect] = None,
    reduce: Optional[Reduce] = None,
) -> Tuple[Tensor, Tensor, Tensor, Tensor]:
    """Layer scale and batch normalization of rows with statistics over non-padding rows, exact gradient.

    Args:
        x: ``N x C``, contiguous
        weight, bias: ``C`` or None
        valid: ``N`` bool, False marks padding; None if there is none
        running_mean, running_var: ``C``, stand in where no row counts
        groups: channel groups of the layer scale, 0 for none
        eps: added to the variance
        collect: called by the backward pass with the sums over rows of ``weight * dy`` and ``weight * dy * z``
            (gradient scale not taken out), and the number of rows
        reduce: makes mean, variance and their gradient those of the batch of all processes

    Returns:
        ``y`` (``N x C``, dtype of ``x``), and without gradient, of this process's batch: mean, biased variance
        (``C``), number of rows (scalar)
    """
    return _MaskedBatchNorm.apply(
        x, weight, bias, valid, running_mean, running_var, groups, eps, collect, reduce
    )
