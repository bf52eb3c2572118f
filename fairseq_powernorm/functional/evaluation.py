"""Normalization by running statistics."""
from typing import Any, Optional

import torch
from torch import Tensor

from ..kernels import choose, choose_for_gradient, eager, evaluate, memory, wants_gradient
from ..kernels.interface import Backend, PowerNormSpec, plain
from .common import Function, Gradients, in_memory, transformed_gradient


class _Evaluation(Function):
    """Evaluation by a backend without autograd of its own. Its gradient is that of training with psi^2 and without nu."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Optional[Tensor],
        bias: Optional[Tensor],
        psi2: Tensor,
        groups: int,
        eps: float,
        backend: Backend,
        channels_second: bool,
    ) -> Tensor:
        spec = PowerNormSpec(
            groups=groups,
            eps=eps,
            nu_scale=0.0,
            gradient_scale=1.0,
            forward_batch=False,
            backward_batch=False,
            skip_padding=False,
        )
        y, r, saved, _ = backend.power_forward(x, weight, bias, None, psi2, spec)
        # a training pass before the backward pass changes psi^2 in place
        ctx.save_for_backward(x, r, weight, bias, saved, psi2.clone())
        ctx.spec, ctx.kernel, ctx.channels_second = spec, backend, channels_second
        return memory.channels_second(y, x) if channels_second else y

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> Gradients:
        if ctx.channels_second:
            grad_y = grad_y.movedim(1, -1)
        x, r, weight, bias, saved, psi2 = ctx.saved_tensors
        if torch.is_grad_enabled() or transformed_gradient(grad_y):
            # the gradient is itself to be differentiated or transformed: ordinary autograd
            with torch.enable_grad():
                inputs = [each for each, needed in zip((x, weight, bias), ctx.needs_input_grad) if needed]
                y = eager.evaluate(x, weight, bias, psi2, ctx.spec.groups, ctx.spec.eps)
                found = iter(torch.autograd.grad(y, inputs, grad_y, create_graph=True))
            return *(next(found) if needed else None for needed in ctx.needs_input_grad[:3]), *[None] * 5
        if not plain(grad_y):
            grad_y = in_memory(grad_y)
        zero = torch.zeros(psi2.shape, dtype=torch.float32, device=psi2.device)
        backend = choose_for_gradient(ctx.kernel, grad_y, x, r, weight, saved, None, zero)
        grads = backend.power_backward(grad_y, x, r, weight, None, saved, zero, ctx.spec, want_x=ctx.needs_input_grad[0])
        return (
            grads.x, None if weight is None else grads.weight, grads.bias if ctx.needs_input_grad[2] else None,
            *[None] * 5,
        )  # fmt: skip


def running_norm(
    x: Tensor,
    weight: Optional[Tensor],
    bias: Optional[Tensor],
    psi2: Tensor,
    groups: int,
    eps: float,
    mean: Optional[Tensor] = None,
    *,
    channels_second: bool = False,
) -> Tensor:
    """Layer scale and normalization by running statistics, as in evaluation.

    Args:
        x: ``... x C``
        psi2: ``C``, the second moment, or the variance if ``mean`` is given
        weight, bias: ``C`` or None
        groups: channel groups of the layer scale, 0 for none
        eps: added to ``psi2``
        mean: ``C``, subtracted first; None for none
        channels_second: move the channels of the output, ``B x C x ...``

    Returns:
        tensor of ``x``'s shape (but for ``channels_second``) and dtype
    """
    if not wants_gradient(x, weight, bias):
        y = evaluate(x, weight, bias, psi2, groups, eps, mean)
    elif (backend := choose(x, weight, bias, psi2, mean)) is eager or mean is not None:
        y = eager.evaluate(x, weight, bias, psi2, groups, eps, mean)
    else:
        found: Tensor = _Evaluation.apply(x, weight, bias, psi2, groups, eps, backend, channels_second)
        return found
    return memory.view_channels_second(y, x) if channels_second else y
