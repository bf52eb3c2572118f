"""Power Normalization in training, with the method's approximate gradient."""
import math
from contextlib import nullcontext
from typing import Any, ContextManager, Iterator, NamedTuple, Optional, Tuple

import torch
from torch import Tensor

from ..kernels import autograd_for, choose, choose_for_gradient, eager, memory
from ..kernels.interface import Backend, OwnStep, PowerNormSpec, StepSpec, plain, writable
from .common import (
    Collect,
    Function,
    Gradients,
    Reduce,
    in_memory,
    in_transform,
    saved_tensors_are_hooked,
    transformed_gradient,
    undifferentiable,
    unwrapped,
)

_NO_GUARD: ContextManager[Any] = nullcontext()


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
    channels_second: bool = False


def _power_forward(
    x: Tensor, weight: Optional[Tensor], bias: Optional[Tensor], call: _Call
) -> Tuple[Backend, Tensor, Optional[Tensor], Tensor]:
    """The backend, and what it made of a forward pass."""
    valid, psi2, _, spec, collect, reduce, _, step, _, _ = call
    backend = choose(x, weight, bias, psi2, valid=valid)
    batch = None
    if reduce is not None and (spec.forward_batch or spec.backward_batch or spec.jump < math.inf):
        batch = eager.mean_of(reduce(backend.second_moment(x, valid, spec.groups)), psi2)
    # psi2 has passed the gate with the input
    if step is not None and backend is not eager and writable(psi2) and plain(step.iters) and writable(step.iters):
        y, r, saved, _ = backend.power_forward(x, weight, bias, valid, psi2, spec, batch, step)
    else:
        y, r, saved, tally = backend.power_forward(x, weight, bias, valid, psi2, spec, batch)
        assert tally is not None
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
    *,
    want_x: bool,
) -> Gradients:
    """Gradients of x, weight and bias."""
    if not plain(grad_y):
        grad_y = in_memory(grad_y)
    # nu is read when the backward pass runs, by the method's definition: it is not a saved tensor
    with call.guard:
        backend = choose_for_gradient(backend, grad_y, x, r, weight, saved, valid, call.nu, hooked=call.hooked)
        step = call.step if backend is not eager and writable(call.nu) else None
        grads = backend.power_backward(grad_y, x, r, weight, valid, saved, call.nu, call.spec, want_x=want_x, step=step)
        if step is None:
            assert grads.tally is not None
            call.collect("backward", grads.tally)
    return grads.x, None if weight is None else grads.weight, grads.bias


class _PowerNorm(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Optional[Tensor], bias: Optional[Tensor], call: _Call) -> Tensor:
        ctx.kernel, y, r, saved = _power_forward(x, weight, bias, call)
        ctx.save_for_backward(x, r, weight, saved, call.valid)
        ctx.call = call
        ctx.set_materialize_grads(False)
        return memory.channels_second(y, x) if call.channels_second else y

    @staticmethod
    def backward(ctx: Any, grad_y: Optional[Tensor]) -> Gradients:
        if not torch.is_grad_enabled():
            return _backward(ctx, grad_y)
        with torch.no_grad():
            grads = _backward(ctx, grad_y)
        return undifferentiable(grads, "PowerNorm")


def _refuse_several(grad_y: Tensor) -> None:
    if transformed_gradient(grad_y):
        raise RuntimeError(
            "several gradients at once (vmap, is_grads_batched) through PowerNorm in training: each would be a step of nu; "
            "compute them one by one, or in evaluation mode"
        )


def _backward(ctx: Any, grad_y: Optional[Tensor]) -> Gradients:
    if grad_y is None:
        return None, None, None, None
    _refuse_several(grad_y)
    if ctx.call.channels_second:
        grad_y = grad_y.movedim(1, -1)
    x, r, weight, saved, valid = ctx.saved_tensors
    grad_x, grad_weight, grad_bias = _power_backward(
        grad_y, x, r, weight, saved, valid, ctx.call, ctx.kernel, want_x=ctx.needs_input_grad[0]
    )
    return grad_x, grad_weight, grad_bias if ctx.needs_input_grad[2] else None, None


class _TransformedPowerNorm(Function):
    """The same under ``torch.func.grad``: what the backward pass needs are outputs, and no tensor may stay wrapped."""

    @staticmethod
    def forward(
        x: Tensor, weight: Optional[Tensor], bias: Optional[Tensor], call: _Call
    ) -> Tuple[Tensor, Optional[Tensor], Tensor]:
        with torch._C._DisableFuncTorch():
            _, y, r, saved = _power_forward(x, weight, bias, call)
        return y, r, saved

    @staticmethod
    def setup_context(ctx: Any, inputs: Tuple[Any, ...], output: Any) -> None:
        x, weight, _, ctx.call = inputs
        _, r, saved = output
        ctx.mark_non_differentiable(*(each for each in (r, saved) if each is not None))
        ctx.save_for_backward(x, weight, r, saved)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad_y: Optional[Tensor], _: Any, __: Any) -> Gradients:
        if grad_y is None:
            return None, None, None, None
        tensors = (grad_y, *ctx.saved_tensors, ctx.call.valid, ctx.call.psi2, ctx.call.nu)
        bare: Iterator[Any] = (None if each is None else unwrapped(each) for each in tensors)
        bare_y, x, weight, r, saved, valid, psi2, nu = bare
        call = ctx.call._replace(valid=valid, psi2=psi2, nu=nu)
        with torch._C._DisableFuncTorch(), torch.no_grad():
            backend = choose(x, weight, valid=valid)
            return *_power_backward(bare_y, x, r, weight, saved, valid, call, backend, want_x=True), None


class StageSums(NamedTuple):
    """Where a stage wants the sums of a pass.

    Attributes:
        forward, backward: vectors that the tallies are added to; None: not at all
        switches: has an attribute ``open``: may a backward pass run?
    """

    forward: Optional[Tensor]
    backward: Optional[Tensor]
    switches: Any


NO_STAGE = StageSums(None, None, None)


def native_power_norm(
    x: Tensor,
    weight: Optional[Tensor],
    bias: Optional[Tensor],
    valid: Optional[Tensor],
    psi2: Tensor,
    nu: Tensor,
    iters: Tensor,
    spec: PowerNormSpec,
    collect: Collect,
    guard: ContextManager[Any],
    step: Optional[StepSpec] = None,
    stage: StageSums = NO_STAGE,
    *,
    channels_second: bool = False,
) -> Optional[Tensor]:
    """:func:`power_norm` by the autograd function in C++; None, with nothing done, where that does not serve.

    Args:
        x, weight, bias, valid, psi2, nu, spec, channels_second: as there
        iters: scalar, the step count
        collect: called instead of what ``step`` and ``stage`` say where a backward pass must be left to Python
        guard: a lock, held already; it is taken while the backward pass reads nu
        step: the step that the running statistics take, unless ``stage`` is given
    """
    autograd = autograd_for(x)
    if autograd is None:
        return None
    y: Optional[Tensor] = autograd.train(
        x, weight, bias, valid, psi2, nu, iters, spec, step, *stage, _native_backward, collect, guard,
        channels_second,
    )
    return y


def _native_backward(
    collect: Collect,
    guard: ContextManager[Any],
    spec: PowerNormSpec,
    grad_y: Tensor,
    x: Tensor,
    r: Optional[Tensor],
    weight: Optional[Tensor],
    saved: Tensor,
    valid: Optional[Tensor],
    nu: Tensor,
    want_x: bool,
) -> Gradients:
    """The backward pass that C++ leaves to Python: gradients of x, weight and bias."""
    _refuse_several(grad_y)
    call = _Call(valid, nu, nu, spec, collect, None, guard, None, hooked=True)
    backend = choose(x, weight, valid=valid)
    return _power_backward(grad_y, x, r, weight, saved, valid, call, backend, want_x=want_x)


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
    guard: ContextManager[Any] = _NO_GUARD,
    step: Optional[OwnStep] = None,
    *,
    channels_second: bool = False,
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
        channels_second: move the channels of the output, ``B x C x ...``

    Returns:
        shape (but for ``channels_second``) and dtype of ``x``
    """
    call = _Call(valid, psi2, nu, spec, collect, reduce, guard, step, saved_tensors_are_hooked(), channels_second)
    if in_transform():
        transformed: Tensor = _TransformedPowerNorm.apply(x, weight, bias, call)[0]
        return memory.view_channels_second(transformed, x) if channels_second else transformed
    y: Tensor = _PowerNorm.apply(x, weight, bias, call)
    return y
