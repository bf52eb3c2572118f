"""Normalization by statistics of the batch, with its exact gradient: PN-V and batch normalization."""
from typing import Any, List, NamedTuple, Optional, Sequence, Tuple

import torch
from torch import Tensor

from ..kernels import autograd_for, batch_backend, choose, choose_for_gradient, eager, memory
from ..kernels.interface import Backend, BatchSpec, BatchStep, plain, require_memory, writable
from .common import (
    Collect,
    Function,
    Gradients,
    Reduce,
    finite_padding_gradient,
    in_memory,
    reduced,
    transformed_gradient,
)
from .power import NO_STAGE, StageSums


class _BatchCall(NamedTuple):
    """What :func:`batch_norm` passes through autograd unseen."""

    valid: Optional[Tensor]
    mean: Optional[Tensor]
    moment: Tensor
    spec: BatchSpec
    collect: Collect
    reduce: Optional[Reduce]
    step: Optional[BatchStep] = None
    channels_second: bool = False


def _batch_tally(spec: BatchSpec, mean: Optional[Tensor], second: Tensor, rows: Tensor, positions: Tensor) -> Tensor:
    """The tally of a forward pass: sums about zero, which can be added up, in float64, where nothing is lost by taking them
    apart again.

    Args:
        mean: ``C``, of the rows that count; None without centring
        second: ``C``, sum of squares about ``mean`` (about zero without)
        rows: number of rows that count
        positions: number of all rows
    """
    if mean is None:
        return eager.tally(second, rows=rows)
    mean, second, count = (each.to(eager.sum_dtype(each)) for each in (mean, second, rows))
    sums = [mean * count, second + mean.square() * count]
    if spec.fill:
        sums.append(torch.zeros_like(mean) + positions)
    return eager.tally(*sums, rows=rows)


class _BatchNorm(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Optional[Tensor], bias: Optional[Tensor], call: _BatchCall) -> Tensor:
        valid, running_mean, running_moment, spec, collect, reduce, *_ = call
        rows, dtype = x.reshape(-1, x.size(-1)), eager.compute_dtype(x)
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        out = y.view(rows.shape) if dtype is x.dtype else torch.empty(rows.shape, dtype=dtype, device=x.device)
        with torch.autocast(x.device.type, enabled=False):
            wide = rows.to(dtype)
            r = eager.layer_scale_rsqrt(wide, spec.groups)
            u = eager.scale_rows(wide, r, out=out)
            count = eager.row_count(u, valid)
            positions = u.new_full((), u.size(0))
            mean = None
            if spec.centre:
                assert running_mean is not None
                kept = u if valid is None else eager.mask_rows_(u.clone(), valid)
                own = eager.column_sum(kept) / count.clamp(min=1)
                mean = torch.where(count > 0, own, running_mean.to(dtype))
                u = torch.sub(u, mean, out=out)
                if spec.fill:
                    eager.mask_rows_(u, valid)
            second = eager.masked_column_sum(u * u, valid)
            tally = _batch_tally(spec, mean, second, count, positions)
            collect("forward", tally)
            own_count = count
            denominator = positions if spec.fill else count
            if reduce is not None:
                totals = reduce(tally)
                *sums, count, _ = totals.split([*[u.size(1)] * (len(totals) // u.size(1)), 1, 1])
                count = count.reshape(())
                denominator = sums[2] if spec.fill else count
                second = sums[-1 if not spec.centre else 1]
                if mean is not None and running_mean is not None:
                    whole = torch.where(count > 0, sums[0] / count.clamp(min=1), running_mean)
                    second = second - count * whole.square()
                    shift = mean - whole.to(dtype)
                    u = eager.mask_rows_(u.add_(shift), valid) if spec.fill else u.add_(shift)
                    mean = whole.to(dtype)
            moment = torch.where(count > 0, second / denominator.clamp(min=1), running_moment.to(second.dtype)).to(dtype)
            inv = eager.inverse_root(moment, spec.eps)
            eager.affine(u, inv, weight, bias, out=out)
            if out.dtype is not y.dtype:
                y.view(rows.shape).copy_(out)
        ctx.save_for_backward(
            x, r, weight, bias, valid, mean, inv, own_count, count.to(dtype), denominator.to(dtype)
        )
        ctx.call = call
        ctx.set_materialize_grads(False)
        return memory.channels_second(y, x) if call.channels_second else y

    @staticmethod
    def backward(ctx: Any, grad_y: Optional[Tensor]) -> Gradients:
        if grad_y is None:
            return None, None, None, None
        if ctx.call.channels_second:
            grad_y = grad_y.movedim(1, -1)
        x, r, weight, bias, valid, mean, inv, own_count, count, denominator = ctx.saved_tensors
        if torch.is_grad_enabled() or transformed_gradient(grad_y):
            return *_formula_backward(ctx.call, ctx.needs_input_grad, grad_y, x, weight, bias), None
        require_memory(grad_y, x, r, weight, valid, mean, inv)
        if not plain(grad_y):
            grad_y = in_memory(grad_y)
        counts = _Counts(own_count, count, denominator)
        wanted = ctx.needs_input_grad
        return *_eager_backward(ctx.call, wanted, grad_y, x, r, weight, valid, mean, inv, counts), None


class _Counts(NamedTuple):
    """Scalars: the rows of this process that count, those of all processes, and the number that a variance is divided by."""

    own: Tensor
    all: Tensor
    denominator: Tensor


def _eager_backward(
    call: _BatchCall,
    wanted: Sequence[bool],
    grad_y: Tensor,
    x: Tensor,
    r: Optional[Tensor],
    weight: Optional[Tensor],
    valid: Optional[Tensor],
    mean: Optional[Tensor],
    inv: Tensor,
    counts: _Counts,
) -> Gradients:
    """Gradients of x, weight and bias, as far as they are wanted, in plain torch."""
    spec, reduce = call.spec, call.reduce
    dtype, shape = eager.compute_dtype(x), x.shape
    rows, grad = x.reshape(-1, x.size(-1)), grad_y.reshape(-1, x.size(-1)).to(dtype)
    with torch.autocast(x.device.type, enabled=False):
        u = eager.scale_rows(rows.to(dtype), r)
        if valid is not None and x.device.type != "cpu":
            u, grad, r = _finite_padding(valid, u, grad, r)
        grad_sum, grad_c_sum, centred, grad_stat = _batch_grad_sums(u, grad, mean, valid, spec)
        if valid is not None and x.device.type == "cpu" and not bool(torch.isfinite(grad_sum + grad_c_sum).all()):
            u, grad, r = _finite_padding(valid, u, grad, r)
            grad_sum, grad_c_sum, centred, grad_stat = _batch_grad_sums(u, grad, mean, valid, spec)
        scale = inv if weight is None else inv * weight.to(dtype)
        tally = [scale * grad_c_sum] if mean is None else [scale / inv * grad_stat, scale * grad_c_sum]
        call.collect("backward", eager.tally(*tally, rows=counts.own))
        grad_x = None
        if wanted[0]:
            stat, c_sum = reduced(reduce, grad_stat, grad_c_sum)
            # mean and second moment depend on the rows that count, every row on them
            through = centred * (-scale * c_sum * inv.square() / counts.denominator.clamp(min=1))
            if mean is not None:
                through -= scale * stat / counts.all.clamp(min=1)
            eager.mask_rows_(through, valid)
            if spec.fill:
                grad = grad if valid is None else eager.mask_rows_(grad.clone(), valid)
            grad_u = through.addcmul_(grad, scale)
            grad_x = eager.scale_rows_backward(grad_u, u, r)
            if spec.fill:  # of zero, but for a layer scale that is not finite
                grad_x = eager.mask_rows_(grad_x, valid)
            grad_x = grad_x.to(x.dtype).view(shape)
    return grad_x, None if weight is None else grad_c_sum * inv, grad_sum if wanted[2] else None


def _finite_padding(valid: Tensor, *rows: Optional[Tensor]) -> List[Any]:
    """The given tensors (``N x ...``, or None) with those padded rows zeroed in which any of them is not finite."""
    finite = torch.stack([torch.isfinite(each).all(1) for each in rows if each is not None]).all(0)
    bad = valid.logical_or(finite).logical_not().unsqueeze(1)
    return [None if each is None else each.masked_fill(bad, 0) for each in rows]


def _formula_backward(
    call: _BatchCall, wanted: Sequence[bool], grad_y: Tensor, x: Tensor, weight: Optional[Tensor], bias: Optional[Tensor]
) -> Gradients:
    """A gradient that is itself to be differentiated or transformed: that of the formula."""
    if call.reduce is not None:
        raise RuntimeError(
            "second derivatives are not available where statistics are reduced in every pass (sync 'exact')"
        )
    with torch.enable_grad():
        inputs: Any = [each for each, needed in zip((x, weight, bias), wanted) if needed]
        y, _ = batch_norm_formula(x, weight, bias, *call[:4])
        found = iter(torch.autograd.grad(y, inputs, grad_y, create_graph=torch.is_grad_enabled()))
    return tuple(next(found) if needed else None for needed in wanted[:3])


# ---------------------------------------------------------------- by the sweeps of a backend


class _BatchSweeps(Function):
    """The same by a backend that has sweeps for it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Optional[Tensor], bias: Optional[Tensor], call: _BatchCall) -> Tensor:
        valid, mean, moment, spec, collect, _, step, _ = call
        ctx.kernel = choose(x, weight, bias, mean, moment, valid=valid)
        sweeps = batch_backend(ctx.kernel)
        assert sweeps is not None
        y, r, saved, tally = sweeps.batch_forward(x, weight, bias, valid, mean, moment, spec, step)
        if tally is not None:
            collect("forward", tally)
        ctx.save_for_backward(x, r, weight, bias, saved, valid)
        ctx.call = call
        ctx.set_materialize_grads(False)
        return memory.channels_second(y, x) if call.channels_second else y

    @staticmethod
    def backward(ctx: Any, grad_y: Optional[Tensor]) -> Gradients:
        if grad_y is None:
            return None, None, None, None
        if ctx.call.channels_second:
            grad_y = grad_y.movedim(1, -1)
        return *_backward_by(ctx.kernel, ctx.call, ctx.needs_input_grad, grad_y, *ctx.saved_tensors), None


def _backward_by(
    kernel: Backend,
    call: _BatchCall,
    wanted: Sequence[bool],
    grad_y: Tensor,
    x: Tensor,
    r: Optional[Tensor],
    weight: Optional[Tensor],
    bias: Optional[Tensor],
    saved: Tensor,
    valid: Optional[Tensor],
) -> Gradients:
    """Gradients of x, weight and bias by the backend of the forward pass, or in plain torch where that must be."""
    if torch.is_grad_enabled() or transformed_gradient(grad_y):
        return _formula_backward(call, wanted, grad_y, x, weight, bias)
    if not plain(grad_y):
        grad_y = in_memory(grad_y)
    spec = call.spec
    sweeps = batch_backend(choose_for_gradient(kernel, grad_y, x, r, weight, saved, valid, call.moment))
    found = None
    if sweeps is not None:
        found = sweeps.batch_backward(grad_y, x, r, weight, valid, saved, spec, want_x=wanted[0])
    if found is None or found.tally is None:
        dtype = eager.compute_dtype(x)
        mean, inv = saved.to(dtype)
        rows = inv.new_full((), x.numel() // x.size(-1))
        own = rows if valid is None else valid.sum().to(dtype)
        counts = _Counts(own, own, rows if spec.fill else own)
        centre = mean if spec.centre else None
        return _eager_backward(call, wanted, grad_y, x, r, weight, valid, centre, inv, counts)
    call.collect("backward", found.tally)
    return found.x, None if weight is None else found.weight, found.bias if wanted[2] else None


def native_batch_norm(
    x: Tensor,
    weight: Optional[Tensor],
    bias: Optional[Tensor],
    valid: Optional[Tensor],
    mean: Optional[Tensor],
    moment: Tensor,
    iters: Tensor,
    spec: BatchSpec,
    collect: Collect,
    alpha_fwd: Optional[float] = None,
    stage: StageSums = NO_STAGE,
    *,
    channels_second: bool = False,
) -> Optional[Tensor]:
    """:func:`batch_norm` by the autograd function in C++; None, with nothing done, where that does not serve.

    Args:
        x, weight, bias, valid, mean, moment, spec, channels_second: as there
        iters: scalar, the step count
        collect: called with the sums of a backward pass that is left to Python: the one that a stage records
        alpha_fwd: the running statistics take their step here, with that weight of their old values; None: they do not
        stage: where the sums of the forward pass are added, and whether a batch is in progress
    """
    autograd = autograd_for(x)
    if autograd is None:
        return None
    y: Optional[Tensor] = autograd.train_batch(
        x, weight, bias, valid, mean, moment, iters, spec, alpha_fwd, stage.forward, stage.switches, _native_backward,
        collect, channels_second,
    )  # fmt: skip
    return y


def _native_backward(
    collect: Collect,
    spec: BatchSpec,
    grad_y: Tensor,
    x: Tensor,
    r: Optional[Tensor],
    weight: Optional[Tensor],
    bias: Optional[Tensor],
    saved: Tensor,
    valid: Optional[Tensor],
    mean: Optional[Tensor],
    moment: Tensor,
    *wanted: bool,
) -> Gradients:
    """The backward pass that C++ leaves to Python: gradients of x, weight and bias."""
    call = _BatchCall(valid, mean, moment, spec, collect, None)
    return _backward_by(choose(x, weight, valid=valid), call, wanted, grad_y, x, r, weight, bias, saved, valid)


def _batch_grad_sums(
    u: Tensor, grad: Tensor, mean: Optional[Tensor], valid: Optional[Tensor], spec: BatchSpec
) -> Tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sums over rows of dy and of dy * centred u, the centred u, and the sum of the dy that reach the mean."""
    centred = u if mean is None else u - mean
    if spec.fill:
        eager.mask_rows_(centred, valid)
    grad_sum, grad_c_sum = eager.grad_sums(grad, centred, None)
    return grad_sum, grad_c_sum, centred, eager.masked_column_sum(grad, valid) if spec.fill else grad_sum


def batch_norm(
    x: Tensor,
    weight: Optional[Tensor],
    bias: Optional[Tensor],
    valid: Optional[Tensor],
    mean: Optional[Tensor],
    moment: Tensor,
    spec: BatchSpec,
    collect: Collect,
    reduce: Optional[Reduce] = None,
    step: Optional[BatchStep] = None,
    *,
    channels_second: bool = False,
) -> Tensor:
    """Layer scale and normalization by statistics of the batch, with its exact gradient: PN-V and batch normalization.

    The gradient is that of the function computed: one that arrives at a padded row passes through it and through the
    statistics. Padding that is not finite reaches no other row and no parameter.

    Args:
        x: ``... x C``
        weight, bias: ``C`` or None
        valid: bool, one for each row in the order of ``x``, False marks padding; None if there is none
        mean, moment: ``C``, running mean (None without centring) and second moment or variance: stand in where no row counts
        spec: constants
        collect: called in the forward pass with the sums of u (with centring) and u^2 over this process's non-padding rows
            (and, with filling, with the number of all rows, C times), and in the backward pass with those of
            ``weight * dy`` (with centring) and ``weight * dy * z`` (gradient scale not taken out)
        reduce: makes statistics and their gradient those of the batch of all processes
        step: the step of the running statistics that a backend may take in place of ``collect``
        channels_second: move the channels of the output, ``B x C x ...``

    Returns:
        shape (but for ``channels_second``) and dtype of ``x``
    """
    backend = choose(x, weight, bias, mean, moment, valid=valid)
    call = _BatchCall(valid, mean, moment, spec, collect, reduce, None, channels_second)
    if reduce is not None or batch_backend(backend) is None:
        y: Tensor = _BatchNorm.apply(x, weight, bias, call)
        return y
    if step is not None and not all(
        each is None or (plain(each) and writable(each)) for each in (step.mean, step.moment, step.iters)
    ):
        step = None
    swept: Tensor = _BatchSweeps.apply(x, weight, bias, call._replace(step=step))
    return swept


def batch_norm_formula(
    x: Tensor,
    weight: Optional[Tensor],
    bias: Optional[Tensor],
    valid: Optional[Tensor],
    mean: Optional[Tensor],
    moment: Tensor,
    spec: BatchSpec,
) -> Tuple[Tensor, Tensor]:
    """What :func:`batch_norm` computes, in differentiable operations of torch: for transforms and compilers.

    Returns:
        output, and the tally of the forward pass, without gradient
    """
    dtype = eager.compute_dtype(x)
    rows = x.reshape(-1, x.size(-1)).to(dtype)
    row_valid = None if valid is None else valid.unsqueeze(1)
    if row_valid is not None:
        bad = row_valid.logical_or(torch.isfinite(rows.square()).all(1, keepdim=True)).logical_not()
        rows = rows.masked_fill(bad, 0.0)
    u = eager.layer_scale(rows, spec.groups)
    positions = u.new_full((), u.size(0))
    count = positions if valid is None else valid.sum().to(dtype)
    denominator = (positions if spec.fill else count).clamp(min=1)
    kept = u if row_valid is None else torch.where(row_valid, u, 0.0)
    own_mean = None
    if spec.centre:
        assert mean is not None
        own_mean = torch.where(count > 0, kept.sum(0) / count.clamp(min=1), mean.to(dtype))
        u = u - own_mean
        if row_valid is not None:
            kept = torch.where(row_valid, u, 0.0)
            u = kept if spec.fill else u
        else:
            kept = u
    second = kept.square().sum(0)
    found = torch.where(count > 0, second / denominator, moment.to(dtype))
    tally = _batch_tally(
        spec, None if own_mean is None else own_mean.detach(), second.detach(), count, positions
    )
    y = eager.affine(u, eager.inverse_root(found, spec.eps), weight, bias)
    if row_valid is not None:
        y = finite_padding_gradient(y, row_valid)
    return y.to(x.dtype).reshape(x.shape), tally
