"""Autograd functions of the norms. They hold no state and make no choice of policy.

The running statistics come in as arguments, the batch's statistics go out through the function ``collect``: those of the
forward pass as soon as they are known, those of the backward pass when it runs. A function ``reduce``, where one is given,
turns the sums of this process into those of all processes that share a batch, forward and backward: statistics and
gradients are then those of the whole batch.

Gradients are returned in the precision of the computation; autograd casts them to the dtypes of the parameters.
"""
import math
from contextlib import nullcontext
from typing import Any, Callable, ContextManager, NamedTuple, Optional, Sequence, Tuple

import torch
from torch import Tensor

from .kernels import choose, choose_for_gradient, eager, wants_gradient
from .kernels.interface import Backend, OwnStep, PowerNormSpec, plain, writable

__all__ = ["BatchSpec", "PowerNormSpec", "batch_norm", "batch_norm_formula", "layer_scale", "power_norm", "running_norm"]

layer_scale = eager.layer_scale

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


def _in_memory(grad: Tensor) -> Tensor:
    """The same values without torch's lazy zeros and negations."""
    if grad._is_zerotensor():
        return torch.zeros(grad.shape, dtype=grad.dtype, device=grad.device)
    return grad.resolve_neg()


_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)


def saved_tensors_are_hooked() -> bool:
    """Does somebody take over the tensors that are saved for the backward pass?"""
    return _hooks is None or _hooks(False) is not None


def in_transform() -> bool:
    """Is a function transform (``torch.func``) active?"""
    return torch._C._are_functorch_transforms_active()


def _transformed_gradient(grad_y: Tensor) -> bool:
    """Does a backward pass run under a transform: several gradients at once, or the gradient of a gradient?"""
    return in_transform() or torch._C._functorch.is_legacy_batchedtensor(grad_y)


def unwrapped(tensor: Tensor) -> Tensor:
    """The tensor beneath the wrappers of ``torch.func.grad``."""
    while torch._C._functorch.is_gradtrackingtensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor


# ---------------------------------------------------------------- Power Normalization


class _Call(NamedTuple):
    """What :func:`power_norm` passes through autograd unseen."""

    valid: Optional[Tensor]
    psi2: Tensor
    nu: Tensor
    spec: PowerNormSpec
    collect: Collect
    reduce: Optional[Reduce]
    guard: ContextManager[Any]
    step: Optional[OwnStep]
    hooked: bool


def _power_forward(x: Tensor, weight: Optional[Tensor], bias: Optional[Tensor], call: _Call):
    """The backend, and what it made of a forward pass."""
    valid, psi2, _, spec, collect, reduce, _, step, _ = call
    backend = choose(x, weight, bias, psi2, valid=valid)
    batch = None
    if reduce is not None and (spec.forward_batch or spec.backward_batch or spec.jump < math.inf):
        batch = eager.mean_of(reduce(backend.second_moment(x, valid, spec.groups)), psi2)
    # psi2 has passed the gate with the input
    if step is not None and backend is not eager and writable(psi2) and plain(step.iters) and writable(step.iters):
        y, r, saved, _ = backend.power_forward(x, weight, bias, valid, psi2, spec, batch, step)
    else:
        y, r, saved, tally = backend.power_forward(x, weight, bias, valid, psi2, spec, batch)
        collect("forward", tally)
    return backend, y, r, saved


def _power_backward(
    grad_y: Tensor,
    x: Tensor,
    r: Optional[Tensor],
    weight: Optional[Tensor],
    saved: Tensor,
    valid: Optional[Tensor],
    call: _Call,
    backend: Backend,
    want_x: bool,
) -> Tuple[Optional[Tensor], Optional[Tensor], Optional[Tensor]]:
    """Gradients of x, weight and bias."""
    if not plain(grad_y):
        grad_y = _in_memory(grad_y)
    # nu is read when the backward pass runs, by the method's definition: it is not a saved tensor
    with call.guard:
        backend = choose_for_gradient(backend, grad_y, x, r, weight, saved, valid, call.nu, hooked=call.hooked)
        step = call.step if backend is not eager and writable(call.nu) else None
        grads = backend.power_backward(grad_y, x, r, weight, valid, saved, call.nu, call.spec, want_x=want_x, step=step)
        if step is None:
            call.collect("backward", grads.tally)
    return grads.x, None if weight is None else grads.weight, grads.bias


class _PowerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, call):
        ctx.kernel, y, r, saved = _power_forward(x, weight, bias, call)
        ctx.save_for_backward(x, r, weight, saved, call.valid)
        ctx.call = call
        ctx.set_materialize_grads(False)
        return y

    @staticmethod
    def backward(ctx, grad_y):
        if not torch.is_grad_enabled():
            return _backward(ctx, grad_y)
        with torch.no_grad():
            grads = [None if each is None else each.requires_grad_() for each in _backward(ctx, grad_y)]
        # whoever differentiates the approximate gradient once more gets an error, not a part of the derivative
        error = torch._C._functions.DelayedError(b"the gradient of PowerNorm in training is an approximation: it can't be differentiated", len(grads))
        return error(*grads)


def _backward(ctx, grad_y):
    if grad_y is None:
        return None, None, None, None
    if _transformed_gradient(grad_y):
        raise RuntimeError(
            "several gradients at once (vmap, is_grads_batched) through PowerNorm in training: each would be a step of nu; "
            "compute them one by one, or in evaluation mode"
        )
    x, r, weight, saved, valid = ctx.saved_tensors
    grad_x, grad_weight, grad_bias = _power_backward(
        grad_y, x, r, weight, saved, valid, ctx.call, ctx.kernel, ctx.needs_input_grad[0]
    )
    return grad_x, grad_weight, grad_bias if ctx.needs_input_grad[2] else None, None


class _TransformedPowerNorm(torch.autograd.Function):
    """The same under ``torch.func.grad``: what the backward pass needs are outputs, and no tensor may stay wrapped."""

    @staticmethod
    def forward(x, weight, bias, call):
        with torch._C._DisableFuncTorch():
            backend, y, r, saved = _power_forward(x, weight, bias, call)
        return y, r, saved

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, _, ctx.call = inputs
        _, r, saved = output
        ctx.mark_non_differentiable(*(each for each in (r, saved) if each is not None))
        ctx.save_for_backward(x, weight, r, saved)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, grad_y, _, __):
        if grad_y is None:
            return None, None, None, None
        tensors = (grad_y, *ctx.saved_tensors, ctx.call.valid, ctx.call.psi2, ctx.call.nu)
        grad_y, x, weight, r, saved, valid, psi2, nu = (None if each is None else unwrapped(each) for each in tensors)
        call = ctx.call._replace(valid=valid, psi2=psi2, nu=nu)
        with torch._C._DisableFuncTorch(), torch.no_grad():
            backend = choose(x, weight, valid=valid)
            return *_power_backward(grad_y, x, r, weight, saved, valid, call, backend, True), None


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
    guard: ContextManager[Any] = nullcontext(),
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
        guard: entered while the backward pass reads nu and calls ``collect``
        step: the step of the running statistics that a backend may take in place of ``collect``

    Returns:
        shape and dtype of ``x``
    """
    call = _Call(valid, psi2, nu, spec, collect, reduce, guard, step, saved_tensors_are_hooked())
    if in_transform():
        return _TransformedPowerNorm.apply(x, weight, bias, call)[0]
    return _PowerNorm.apply(x, weight, bias, call)


# ---------------------------------------------------------------- normalization by statistics of the batch, exact gradient


class BatchSpec(NamedTuple):
    """The constants of :func:`batch_norm`.

    Attributes:
        groups: channel groups of the layer scale, 0 for none
        eps: added to the second moment or variance
        centre: subtract the mean: batch normalization; else PN-V
        fill: padding takes the place of the mean and counts in the variance: the authors' batch normalization
    """

    groups: int
    eps: float
    centre: bool
    fill: bool = False


class _BatchCall(NamedTuple):
    """What :func:`batch_norm` passes through autograd unseen."""

    valid: Optional[Tensor]
    mean: Optional[Tensor]
    moment: Tensor
    spec: BatchSpec
    collect: Collect
    reduce: Optional[Reduce]


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


class _BatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, call):
        valid, running_mean, running_moment, spec, collect, reduce = call
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
                if mean is not None:
                    whole = torch.where(count > 0, sums[0] / count.clamp(min=1), running_mean)
                    second = second - count * whole.square()
                    shift = (mean - whole.to(dtype))
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
        return y

    @staticmethod
    def backward(ctx, grad_y):
        if grad_y is None:
            return None, None, None, None
        x, r, weight, bias, valid, mean, inv, own_count, count, denominator = ctx.saved_tensors
        _, _, _, spec, collect, reduce = ctx.call
        if torch.is_grad_enabled() or _transformed_gradient(grad_y):
            # the gradient is itself to be differentiated or transformed: that of the formula
            if reduce is not None:
                raise RuntimeError("second derivatives are not available where statistics are reduced in every pass (sync 'exact')")
            with torch.enable_grad():
                inputs = [each for each, needed in zip((x, weight, bias), ctx.needs_input_grad) if needed]
                y, _ = batch_norm_formula(x, weight, bias, *ctx.call[:4])
                found = iter(torch.autograd.grad(y, inputs, grad_y, create_graph=torch.is_grad_enabled()))
            return *(next(found) if needed else None for needed in ctx.needs_input_grad[:3]), None
        if not plain(grad_y):
            grad_y = _in_memory(grad_y)
        dtype, shape = eager.compute_dtype(x), x.shape
        rows, grad = x.reshape(-1, x.size(-1)), grad_y.reshape(-1, x.size(-1)).to(dtype)
        with torch.autocast(x.device.type, enabled=False):
            u = eager.scale_rows(rows.to(dtype), r)
            if valid is not None and x.device.type != "cpu":
                u, grad = eager.finite_padding(valid, u, grad)
            grad_sum, grad_c_sum, centred, grad_stat = _batch_grad_sums(u, grad, mean, valid, spec)
            if valid is not None and x.device.type == "cpu" and not bool(torch.isfinite(grad_sum + grad_c_sum).all()):
                u, grad = eager.finite_padding(valid, u, grad)
                grad_sum, grad_c_sum, centred, grad_stat = _batch_grad_sums(u, grad, mean, valid, spec)
            scale = inv if weight is None else inv * weight.to(dtype)
            tally = [scale * grad_c_sum] if mean is None else [scale / inv * grad_stat, scale * grad_c_sum]
            collect("backward", eager.tally(*tally, rows=own_count))
            grad_x = None
            if ctx.needs_input_grad[0]:
                stat, c_sum = _reduced(reduce, grad_stat, grad_c_sum)
                # mean and second moment depend on the rows that count, every row on them
                through = centred * (-scale * c_sum * inv.square() / denominator.clamp(min=1))
                if mean is not None:
                    through -= scale * stat / count.clamp(min=1)
                eager.mask_rows_(through, valid)
                if spec.fill:
                    grad = grad if valid is None else eager.mask_rows_(grad.clone(), valid)
                grad_u = through.addcmul_(grad, scale)
                grad_x = eager.scale_rows_backward(grad_u, u, r).to(x.dtype).view(shape)
        grad_weight = None if weight is None else grad_c_sum * inv
        return grad_x, grad_weight, grad_sum if ctx.needs_input_grad[2] else None, None


def _batch_grad_sums(u: Tensor, grad: Tensor, mean: Optional[Tensor], valid: Optional[Tensor], spec: BatchSpec):
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
) -> Tensor:
    """Layer scale and normalization of rows by statistics of the batch, with its exact gradient: PN-V and batch normalization.

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

    Returns:
        shape and dtype of ``x``
    """
    return _BatchNorm.apply(x, weight, bias, _BatchCall(valid, mean, moment, spec, collect, reduce))


class _FinitePaddingGradient(torch.autograd.Function):
    """Identity; a gradient that is not finite does not pass where ``valid`` is False."""

    @staticmethod
    def forward(x, valid):
        return x.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx, grad):
        (valid,) = ctx.saved_tensors
        return torch.where(valid | torch.isfinite(grad), grad, 0.0), None


class _TransformedFinitePaddingGradient(_FinitePaddingGradient):
    """The same with what function transforms need and compilers do not take."""

    generate_vmap_rule = True

    @staticmethod
    def jvp(ctx, tangent, _):
        return tangent.clone()


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
        bad = row_valid.logical_or(torch.isfinite(rows).all(1, keepdim=True)).logical_not()
        rows = rows.masked_fill(bad, 0.0)
    u = layer_scale(rows, spec.groups)
    positions = u.new_full((), u.size(0))
    count = positions if valid is None else valid.sum().to(dtype)
    denominator = (positions if spec.fill else count).clamp(min=1)
    kept = u if row_valid is None else torch.where(row_valid, u, 0.0)
    own_mean = None
    if spec.centre:
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
        compiling = torch.compiler.is_compiling()
        y = (_FinitePaddingGradient if compiling else _TransformedFinitePaddingGradient).apply(y, row_valid)
    return y.to(x.dtype).reshape(x.shape), tally


# ---------------------------------------------------------------- evaluation


class _Evaluation(torch.autograd.Function):
    """Evaluation by a backend without autograd of its own. Its gradient is that of training with psi^2 and without nu."""

    @staticmethod
    def forward(ctx, x, weight, bias, psi2, groups, eps, backend):
        spec = PowerNormSpec(groups, eps, 0.0, 1.0, False, False, False)
        y, r, saved, _ = backend.power_forward(x, weight, bias, None, psi2, spec)
        ctx.save_for_backward(x, r, weight, bias, saved, psi2)
        ctx.spec, ctx.kernel = spec, backend
        return y

    @staticmethod
    def backward(ctx, grad_y):
        x, r, weight, bias, saved, psi2 = ctx.saved_tensors
        if torch.is_grad_enabled() or _transformed_gradient(grad_y):
            # the gradient is itself to be differentiated or transformed: ordinary autograd
            with torch.enable_grad():
                inputs = [each for each, needed in zip((x, weight, bias), ctx.needs_input_grad) if needed]
                y = eager.evaluate(x, weight, bias, psi2, ctx.spec.groups, ctx.spec.eps)
                found = iter(torch.autograd.grad(y, inputs, grad_y, create_graph=True))
            return *(next(found) if needed else None for needed in ctx.needs_input_grad[:3]), None, None, None, None
        if not plain(grad_y):
            grad_y = _in_memory(grad_y)
        zero = torch.zeros(psi2.shape, dtype=torch.float32, device=psi2.device)
        backend = choose_for_gradient(ctx.kernel, grad_y, x, r, weight, saved, None, zero)
        grads = backend.power_backward(grad_y, x, r, weight, None, saved, zero, ctx.spec, want_x=ctx.needs_input_grad[0])
        return (
            grads.x, None if weight is None else grads.weight, grads.bias if ctx.needs_input_grad[2] else None,
            None, None, None, None,
        )  # fmt: skip


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
        backend = choose(x, weight, bias, psi2)
        if backend is eager:
            return eager.evaluate(x, weight, bias, psi2, groups, eps)
        if wants_gradient(x, weight, bias):
            return _Evaluation.apply(x, weight, bias, psi2, groups, eps, backend)
        return backend.evaluate(x, weight, bias, psi2, groups, eps)
    u = layer_scale(x.to(eager.compute_dtype(x)), groups) - mean.to(eager.compute_dtype(x))
    return eager.affine(u, eager.inverse_root(psi2.to(u.dtype), eps), weight, bias).to(x.dtype)
