"""Normalization by second moments of several steps, with the gradient that moving averages replace: MABN and UN."""
from contextlib import nullcontext
from typing import Any, ContextManager, Iterator, NamedTuple, Optional, Tuple, Union

import torch
from torch import Tensor

from ..kernels import eager
from ..kernels.interface import plain
from .common import (
    Collect,
    Function,
    Gradients,
    Reduce,
    in_memory,
    in_transform,
    reduced,
    undifferentiable,
    unwrapped,
)

_NO_GUARD: ContextManager[Any] = nullcontext()


class WindowSpec(NamedTuple):
    """The constants of :func:`window_norm`.

    Attributes:
        groups: channel groups of the layer scale, 0 for none
        rescale: multiply the output by ``r`` (MABN); else only the gradients of x and weight (UN)
        alpha_bkw: weight of the old value in the running average of the gradient moment; None: there is none (MABN)
        gradient_scale: factor of the loss whose gradient arrives
        counting: whether the batch counts; if not, no gradient of the norm's own is added
    """

    groups: int
    rescale: bool
    alpha_bkw: Optional[float]
    gradient_scale: Union[float, Tensor]
    counting: bool


class WindowState(NamedTuple):
    """What the backward pass reads besides the rows.

    Attributes:
        steps: scalar, steps taken before the forward pass
        averaged: scalar bool: the mean of the window is used, not the batch's own moment
        outlier: scalar bool: the batch is kept out of the averages
        window: ``W x C``, gradient moments of earlier steps; read when the backward pass runs
        average: ``C``, their running average; read when the backward pass runs; None: there is none
    """

    steps: Tensor
    averaged: Tensor
    outlier: Tensor
    window: Tensor
    average: Optional[Tensor]


def slots(window: Tensor, steps: Tensor) -> Tensor:
    """The place in ``window`` (``... x W x C``) of the step after ``steps`` (``... x 1``) steps: bool, ``... x W x 1``.

    An average of models has averaged their step counts, too, which then are no whole numbers.
    """
    places = torch.arange(window.size(-2), device=window.device, dtype=steps.dtype).unsqueeze(-1)
    return places == torch.remainder(steps.floor(), window.size(-2)).unsqueeze(-1)


def put(window: Tensor, steps: Tensor, value: Tensor) -> Tensor:
    """``window`` with ``value`` (``... x C``) in the place of the step after ``steps`` steps."""
    return torch.where(slots(window, steps), value.unsqueeze(-2), window)


def gradient_moment(
    own: Tensor,
    steps: Tensor,
    averaged: Tensor,
    outlier: Tensor,
    window: Tensor,
    average: Optional[Tensor],
    alpha_bkw: Optional[float],
) -> Tuple[Tensor, Tensor, Optional[Tensor]]:
    """A step of the statistics of the backward pass: what z is multiplied by, the new window and the new average.

    Pure; leading dimensions are allowed: ``own`` ``... x C``, ``steps``, ``averaged`` and ``outlier`` ``... x 1``.

    Args:
        own: mean of the gradient times z over the step's rows
    """
    slot = own if average is None else torch.where(outlier, average, own)
    window = put(window, steps, slot)
    mean = torch.where(averaged, window.mean(-2), own)
    if average is None or alpha_bkw is None:
        return mean, window, None
    new = alpha_bkw * average + (1.0 - alpha_bkw) * mean
    return torch.where(outlier, own, new), window, new


def _backward(ctx: Any, grad_y: Tensor, tensors: Tuple[Any, ...], state: WindowState) -> Tuple[Gradients, Tensor]:
    """Gradients of x, weight and bias, and the tally of the pass."""
    spec: WindowSpec = ctx.spec
    x, weight, valid, inv, r = tensors
    dtype = eager.compute_dtype(x)
    rows, grad = x.reshape(-1, x.size(-1)).to(dtype), grad_y.reshape(-1, x.size(-1)).to(dtype)
    if valid is not None:
        rows, grad = (torch.where(valid.unsqueeze(1), each, 0.0) for each in (rows, grad))
    root = eager.layer_scale_rsqrt(rows, spec.groups)
    z = eager.scale_rows(rows, root) * inv
    grad_sum, grad_z_sum = grad.sum(0), (grad * z).sum(0) * r
    weighted = grad_z_sum if weight is None else grad_z_sum * weight.to(dtype)
    # a moment that is infinite makes every z zero: that is no statistic
    weighted = torch.where(inv > 0, weighted, torch.nan)
    own = grad.new_full((), rows.size(0)) if valid is None else valid.sum().to(dtype)
    tally = eager.tally(weighted / spec.gradient_scale, state.outlier.to(dtype) * own * torch.ones_like(inv), rows=own)
    total, count = reduced(ctx.reduce, weighted / spec.gradient_scale, own)
    moment, _, _ = gradient_moment(
        total / count.clamp(min=1), state.steps.reshape(1).to(dtype), state.averaged, state.outlier,
        state.window.to(dtype), None if state.average is None else state.average.to(dtype), spec.alpha_bkw,
    )  # fmt: skip
    grad_u = grad * (r * inv if weight is None else r * inv * weight.to(dtype))
    if spec.counting:
        grad_u = grad_u - z * (moment * spec.gradient_scale * inv)
    # z * inv is u: the layer scale's own gradient follows
    grad_rows = eager.scale_rows_backward(grad_u, eager.scale_rows(rows, root), root)
    if valid is not None:
        grad_rows = torch.where(valid.unsqueeze(1), grad_rows, 0.0)
    return (grad_rows.to(x.dtype).view(x.shape), None if weight is None else grad_z_sum, grad_sum), tally


class _WindowNorm(Function):
    """The rows, given what they are divided by; everything that the backward pass needs is an input."""

    @staticmethod
    def forward(
        x: Tensor,
        weight: Optional[Tensor],
        bias: Optional[Tensor],
        valid: Optional[Tensor],
        inv: Tensor,
        r: Tensor,
        state: Any,
        spec: WindowSpec,
        collect: Collect,
        reduce: Optional[Reduce],
        guard: ContextManager[Any],
    ) -> Tensor:
        u = eager.layer_scale(x.to(inv.dtype), spec.groups)
        return eager.affine(u, inv * r if spec.rescale else inv, weight, bias).to(x.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: Tuple[Any, ...], output: Any) -> None:
        x, weight, bias, valid, inv, r, ctx.state, ctx.spec, ctx.collect, ctx.reduce, ctx.guard = inputs
        ctx.save_for_backward(x, weight, valid, inv, r)
        ctx.has_bias = bias is not None
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad_y: Optional[Tensor]) -> Gradients:
        nothing = (None,) * 8
        if grad_y is None:
            return None, None, None, *nothing
        if torch.compiler.is_compiling():
            grads, tally = _backward(ctx, grad_y, ctx.saved_tensors, ctx.state)
            ctx.collect("backward", tally)
            return grads[0], grads[1], grads[2] if ctx.has_bias else None, *nothing
        if torch._C._functorch.is_batchedtensor(grad_y) or torch._C._functorch.is_legacy_batchedtensor(grad_y):
            raise RuntimeError(
                "several gradients at once (vmap, is_grads_batched) through a norm with a window in training: each would "
                "be a step of its averages; compute them one by one, or in evaluation mode"
            )
        if not plain(grad_y):
            grad_y = in_memory(grad_y)
        tensors = tuple(None if each is None else unwrapped(each) for each in ctx.saved_tensors)
        state: Iterator[Any] = (None if each is None else unwrapped(each) for each in ctx.state)
        with torch._C._DisableFuncTorch(), torch.no_grad(), ctx.guard:
            grads, tally = _backward(ctx, unwrapped(grad_y), tensors, WindowState(*state))
            ctx.collect("backward", tally)
        found: Gradients = grads[0], grads[1], grads[2] if ctx.has_bias else None
        if torch.is_grad_enabled() and not in_transform():
            found = undifferentiable(found, "a norm with a window")
        return *found, *nothing


def window_norm(
    x: Tensor,
    weight: Optional[Tensor],
    bias: Optional[Tensor],
    valid: Optional[Tensor],
    inv: Tensor,
    r: Tensor,
    state: WindowState,
    spec: WindowSpec,
    collect: Collect,
    reduce: Optional[Reduce] = None,
    guard: ContextManager[Any] = _NO_GUARD,
) -> Tensor:
    """Layer scale and division by moments of several steps, with the approximate gradient of MABN and UN.

    Padding takes no part in the gradients: it receives none and gives none.

    Args:
        x: ``... x C``
        weight, bias: ``C`` or None
        valid: bool, one for each row in the order of ``x``, False marks padding; None if there is none
        inv: ``C``, 1 / sqrt(variance + eps), in the precision of the computation
        r: ``C``, the factor that brings the output, or the gradient, to the scale of the running variance
        state: what the backward pass reads besides
        spec: constants
        collect: called in the backward pass with the sums of ``weight * dy * r * z`` (gradient scale taken out) and, C
            times, the number of rows if they are an outlier
        reduce: makes the gradient moment that of all processes
        guard: entered while the backward pass reads ``state`` and calls ``collect``

    Returns:
        shape and dtype of ``x``
    """
    y: Tensor = _WindowNorm.apply(x, weight, bias, valid, inv, r, state, spec, collect, reduce, guard)
    return y
