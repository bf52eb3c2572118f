"""Autograd functions of the norms. They hold no state and make no choice of policy.

The running statistics come in as arguments, the batch's statistics go out through the function ``collect``: those of the
forward pass as soon as they are known, those of the backward pass when it runs. A function ``reduce``, where one is given,
turns the sums of this process into those of all processes that share a batch, forward and backward: statistics and
gradients are then those of the whole batch.
"""
import math
from typing import Callable, NamedTuple, Optional, Sequence, Tuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .kernels import choose, reference as kernel, wants_gradient

Moment = kernel.Moment
OwnStep = kernel.OwnStep
PowerNormSpec = kernel.PowerNormSpec
layer_scale = kernel.layer_scale

#: takes the name of a pass (``forward``, ``backward``) and its tally, ``[sums (C each), rows, 1]``
Collect = Callable[[str, Tensor], None]
#: takes a vector of sums, returns their totals over all processes
Reduce = Callable[[Tensor], Tensor]


def _reduced(reduce: Optional[Reduce], *sums: Tensor) -> Sequence[Tensor]:
    """The given sums (``C`` or scalar) over all processes, in one call of ``reduce``."""
    if reduce is None:
        return sums
    total = reduce(torch.cat([each.reshape(-1) for each in sums]))
    return [part.view_as(each) for part, each in zip(total.split([each.numel() for each in sums]), sums)]


class _Call(NamedTuple):
    """What :func:`power_norm` passes through autograd unseen."""

    valid: Optional[Tensor]
    psi2: Tensor
    nu: Tensor
    spec: PowerNormSpec
    collect: Collect
    reduce: Optional[Reduce]
    step: Optional[OwnStep]


class _PowerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, call):
        valid, psi2, _, spec, collect, reduce, step = call
        chosen = choose(x, weight, bias)
        batch = None
        if reduce is not None and (spec.forward_batch or spec.backward_batch or spec.jump < math.inf):
            batch = kernel.mean_of(reduce(chosen.second_moment(x, valid, spec.groups)), psi2)
        if step is not None and chosen.TAKES_STEPS:
            y, r, saved, _ = chosen.power_forward(x, weight, bias, valid, psi2, spec, batch, step)
        else:
            y, r, saved, tally = chosen.power_forward(x, weight, bias, valid, psi2, spec, batch)
            collect("forward", tally)
        ctx.save_for_backward(x, r, weight, saved, valid if spec.skip_padding else None)
        ctx.call, ctx.kernel = call, chosen
        ctx.dtypes = None if weight is None else weight.dtype, None if bias is None else bias.dtype
        ctx.set_materialize_grads(False)
        return y

    @staticmethod
    def backward(ctx, grad_y):
        # the wrapper, which makes a second derivative an error, costs as much as a small kernel
        return _power_norm_backward_once(ctx, grad_y) if torch.is_grad_enabled() else _power_norm_backward(ctx, grad_y)


def _power_norm_backward(ctx, grad_y):
    if grad_y is None:
        return None, None, None, None
    x, r, weight, saved, valid = ctx.saved_tensors
    _, _, nu, spec, collect, _, step = ctx.call
    want_x = ctx.needs_input_grad[0]
    # nu is read when the backward pass runs, by the method's definition: it is not a saved tensor
    if step is not None and ctx.kernel.TAKES_STEPS:
        grad_x, grad_weight, grad_bias, _ = ctx.kernel.power_backward(
            grad_y, x, r, weight, valid, saved, nu, spec, want_x, step
        )
    else:
        grad_x, grad_weight, grad_bias, tally = ctx.kernel.power_backward(
            grad_y, x, r, weight, valid, saved, nu, spec, want_x
        )
        collect("backward", tally)
    weight_dtype, bias_dtype = ctx.dtypes
    grad_weight = None if weight_dtype is None else grad_weight.to(weight_dtype)
    grad_bias = None if bias_dtype is None else grad_bias.to(bias_dtype)
    return grad_x, grad_weight, grad_bias, None


_power_norm_backward_once = once_differentiable(_power_norm_backward)


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
    step: Optional[OwnStep] = None,
) -> Tensor:
    """Layer scale and Power Normalization of rows, with the method's approximate gradient (Algorithm 2).

    Args:
        x: ``... x C``
        weight, bias: ``C`` or None
        valid: bool, one for each row in the order of ``x``, False marks padding; None if there is none
        psi2: ``C``, running second moment psi^2(t-1)
        nu: ``C``, read when the backward pass runs; ``spec.nu_scale * nu`` is the paper's nu(t-1)
        spec: constants of the call
        collect: called in the forward pass with the sums of u^2 over this process's non-padding rows, and in the
            backward pass with those of ``weight * dy * z`` (gradient scale taken out) and ``z^2``
        reduce: makes the batch's second moment that of all processes, where ``spec`` divides by it
        step: the step of the running statistics; a kernel that takes it does so instead of ``collect``

    Returns:
        shape and dtype of ``x``
    """
    return _PowerNorm.apply(x, weight, bias, _Call(valid, psi2, nu, spec, collect, reduce, step))


class _BatchPowerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, valid, psi2, groups, eps, collect, reduce):
        with torch.autocast(x.device.type, enabled=False):
            wide = x.to(kernel.compute_dtype(x))
            r = kernel.layer_scale_rsqrt(wide, groups)
            u = kernel.scale_rows(wide, r)
            moment = Moment(kernel.masked_column_sum(u * u, valid), kernel.row_count(u, valid))
            whole = Moment(*_reduced(reduce, *moment))
            inv = kernel.inverse_root(whole.mean(otherwise=psi2), eps)
            y = kernel.affine(u, inv, weight, bias, out=None if u is x else u).to(x.dtype)
        collect("forward", kernel.tally(moment.total, rows=moment.count))
        ctx.save_for_backward(x, r, weight, bias, valid, inv, moment.count, whole.count)
        ctx.collect, ctx.reduce = collect, reduce
        ctx.set_materialize_grads(False)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y):
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
            ctx.collect("backward", kernel.tally(scale * grad_u_sum, rows=own_count))
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
    collect: Collect,
    reduce: Optional[Reduce] = None,
) -> Tensor:
    """Layer scale and PN-V of rows: the batch's own second moment, with its exact gradient (Algorithm 1).

    Arguments and result as for :func:`power_norm`, but for ``x``, which is ``N x C``; ``psi2`` (``C``) stands in where no
    row counts, and ``collect`` is called in the backward pass with the sum of ``weight * dy * z`` (gradient scale not
    taken out). The gradient is that of the function computed: a gradient that arrives at a padded row passes through it
    and through the batch's second moment.
    """
    return _BatchPowerNorm.apply(x, weight, bias, valid, psi2, groups, eps, collect, reduce)


class _Evaluation(torch.autograd.Function):
    """Evaluation by a kernel without autograd of its own. Its gradient is that of training with psi^2 and without nu."""

    @staticmethod
    def forward(ctx, x, weight, bias, psi2, groups, eps, chosen):
        spec = PowerNormSpec(groups, eps, 0.0, 1.0, False, False, False)
        y, r, saved, _ = chosen.power_forward(x, weight, bias, None, psi2, spec)
        ctx.save_for_backward(x, r, weight, bias, saved, psi2)
        ctx.spec, ctx.kernel = spec, chosen
        return y

    @staticmethod
    def backward(ctx, grad_y):
        x, r, weight, bias, saved, psi2 = ctx.saved_tensors
        if torch.is_grad_enabled():  # the gradient is itself to be differentiated: ordinary autograd
            inputs = [each for each, needed in zip((x, weight, bias), ctx.needs_input_grad) if needed]
            y = kernel.evaluate(x, weight, bias, psi2, ctx.spec.groups, ctx.spec.eps)
            found = iter(torch.autograd.grad(y, inputs, grad_y, create_graph=True))
            return (*(next(found) if needed else None for needed in ctx.needs_input_grad[:3]), None, None, None, None)
        grad_x, grad_weight, grad_bias, _ = ctx.kernel.power_backward(
            grad_y, x, r, weight, None, saved, torch.zeros_like(psi2), ctx.spec, ctx.needs_input_grad[0]
        )
        grad_weight = None if weight is None else grad_weight.to(weight.dtype)
        grad_bias = None if bias is None else grad_bias.to(bias.dtype)
        return grad_x, grad_weight, grad_bias, None, None, None, None


def running_norm(
    x: Tensor,
    weight: Optional[Tensor],
    bias: Optional[Tensor],
    psi2: Tensor,
    groups: int,
    eps: float,
    mean: Optional[Tensor] = None,
) -> Tensor:
    """Layer scale and normalization by running statistics, as in evaluation.

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
    if mean is None:
        chosen = choose(x, weight, bias)
        if chosen is not kernel and wants_gradient(x, weight, bias):
            return _Evaluation.apply(x, weight, bias, psi2, groups, eps, chosen)
        return chosen.evaluate(x, weight, bias, psi2, groups, eps)
    u = layer_scale(x.to(kernel.compute_dtype(x)), groups) - mean.to(kernel.compute_dtype(x))
    return kernel.affine(u, kernel.inverse_root(psi2.to(u.dtype), eps), weight, bias).to(x.dtype)


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
            # moments about zero add up; in float64 nothing is lost by taking them apart again
            own = _moments_about_zero(mean, var, count)
            collect("forward", kernel.tally(*own[:2], rows=own[2]))
            own_count = count
            if reduce is not None:
                first, second, count = _reduced(reduce, *own)
                some, denominator = count > 0, count.clamp(min=1)
                mean = torch.where(some, first / denominator, running_mean).to(u.dtype)
                var = torch.where(some, second / denominator - (first / denominator).square(), running_var).to(u.dtype)
                count, centred = count.to(u.dtype), u - mean
            inv = kernel.inverse_root(var, eps)
            y = kernel.affine(centred, inv, weight, bias, out=centred).to(x.dtype)
        ctx.save_for_backward(x, r, weight, bias, valid, mean, inv, own_count, count)
        ctx.collect, ctx.reduce = collect, reduce
        ctx.set_materialize_grads(False)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y):
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
            ctx.collect("backward", kernel.tally(scale / inv * grad_sum, scale * grad_centred_sum, rows=own_count))
            grad_x = None
            if ctx.needs_input_grad[0]:
                grad_sum, grad_centred_sum = _reduced(ctx.reduce, grad_sum, grad_centred_sum)
                denominator = count.clamp(min=1)
                # mean and variance depend on the rows that count, every row on them
                through = centred.mul_(-scale * grad_centred_sum * inv.square() / denominator)
                through = kernel.mask_rows_(through.sub_(scale * grad_sum / denominator), valid)
                grad_x = kernel.scale_rows_backward(through.addcmul_(grad, scale), u, r).to(x.dtype)
        return grad_x, grad_weight, grad_bias, None, None, None, None, None, None, None


def _moments_about_zero(mean: Tensor, var: Tensor, count: Tensor) -> Tuple[Tensor, Tensor, Tensor]:
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
    collect: Collect,
    reduce: Optional[Reduce] = None,
) -> Tensor:
    """Layer scale and batch normalization of rows with statistics over non-padding rows, exact gradient.

    Args:
        x: ``N x C``, contiguous
        weight, bias: ``C`` or None
        valid: ``N`` bool, False marks padding; None if there is none
        running_mean, running_var: ``C``, stand in where no row counts
        groups: channel groups of the layer scale, 0 for none
        eps: added to the variance
        collect: called in the forward pass with the sums of u and u^2 over this process's non-padding rows, and in the
            backward pass with those of ``weight * dy`` and ``weight * dy * z`` over all rows (gradient scale not taken out)
        reduce: makes mean, variance and their gradient those of the batch of all processes

    Returns:
        ``N x C``, dtype of ``x``
    """
    return _MaskedBatchNorm.apply(
        x, weight, bias, valid, running_mean, running_var, groups, eps, collect, reduce
    )
