"""Power Normalization in training as opaque operators (``torch.library``): for compilers, exporters, fake and meta tensors.

A compiler sees four operators of the namespace ``fairseq_powernorm``. ``forward`` and ``backward`` compute and change
nothing; ``advance_forward_`` and ``advance_backward_`` change the running statistics that they declare. The autograd
function stands outside of them. What the operators run are the backends of :mod:`.kernels`, with the policy that
depends on the step count decided inside, when it is known.
"""
import math
from contextlib import nullcontext
from typing import Any, ContextManager, NamedTuple, Optional, Tuple

import torch
from torch import Tensor

from .functional.common import Function, Gradients
from .kernels import choose, choose_for_gradient, choose_for_step, eager
from .kernels.interface import PowerNormSpec, StepSpec

__all__ = ["OpaqueSpec", "needed", "power_norm", "snapshot"]


class OpaqueSpec(NamedTuple):
    """The constants of the operators: those of :class:`PowerNormSpec` before the step count is known.

    Attributes:
        warmup: steps that divide by the batch's own second moment
        trusted_after: steps after which ``jump`` bounds psi^2
        batch_statistics: divide by the batch's own second moment at every step
        own_step: psi^2 takes its step in this pass, so that a recomputation would not find it as it was
        groups, eps, nu_scale, gradient_scale, backward_batch, skip_padding, jump: see :class:`PowerNormSpec`
    """

    groups: int
    eps: float
    nu_scale: float
    gradient_scale: float
    warmup: int
    trusted_after: int
    batch_statistics: bool
    backward_batch: bool
    skip_padding: bool
    own_step: bool
    jump: float

    def at(self, steps: int) -> PowerNormSpec:
        """The constants of a pass after ``steps`` steps."""
        return PowerNormSpec(
            groups=self.groups,
            eps=self.eps,
            nu_scale=self.nu_scale,
            gradient_scale=self.gradient_scale,
            forward_batch=self.batch_statistics or steps < self.warmup,
            backward_batch=self.backward_batch,
            skip_padding=self.skip_padding,
            jump=self.jump if steps >= self.trusted_after else math.inf,
        )


def _schema(spec: Any) -> str:
    return ", ".join(f"{kind.__name__} {name}" for name, kind in spec.__annotations__.items())


_LIBRARY = torch.library.Library("fairseq_powernorm", "DEF")
_LIBRARY.define(
    "forward(Tensor x, Tensor? weight, Tensor? bias, Tensor? valid, Tensor psi2, Tensor iters, "
    f"{_schema(OpaqueSpec)}) -> (Tensor, Tensor, Tensor, Tensor)"
)
_LIBRARY.define(
    "backward(Tensor grad_y, Tensor x, Tensor r, Tensor? weight, Tensor? valid, Tensor saved, Tensor nu, Tensor? scale, "
    f"{_schema(OpaqueSpec)}) -> (Tensor, Tensor, Tensor, Tensor)"
)
_LIBRARY.define(f"advance_forward_(Tensor tally, Tensor(a!) psi2, Tensor(b!) iters, {_schema(StepSpec)}) -> ()")
_LIBRARY.define(f"advance_backward_(Tensor tally, Tensor(a!) nu, {_schema(StepSpec)}) -> ()")


def _forward(
    x: Tensor,
    weight: Optional[Tensor],
    bias: Optional[Tensor],
    valid: Optional[Tensor],
    psi2: Tensor,
    iters: Tensor,
    *constants: Any,
) -> Tuple[Tensor, ...]:
    spec = OpaqueSpec(*constants).at(int(iters.item()))
    found = choose(x, weight, bias, psi2, valid=valid).power_forward(x, weight, bias, valid, psi2, spec)
    # an operator returns tensors: an empty one stands for none
    assert found.tally is not None
    return found.y, x.new_empty(0) if found.r is None else found.r, found.saved, found.tally


def _forward_fake(
    x: Tensor,
    weight: Optional[Tensor],
    bias: Optional[Tensor],
    valid: Optional[Tensor],
    psi2: Tensor,
    iters: Tensor,
    *constants: Any,
) -> Tuple[Tensor, ...]:
    spec, channels, dtype = OpaqueSpec(*constants), x.size(-1), eager.compute_dtype(x)
    if spec.own_step and _is_recomputed():
        raise RuntimeError(
            "activation checkpointing inside torch.compile around a PowerNorm that applies its own statistics: a "
            "recomputation would find those of the next step; let fairseq_powernorm.statistics.RunningStatistics apply them"
        )
    r = (x.numel() // channels, spec.groups) if spec.groups else (0,)
    return (
        torch.empty(x.shape, dtype=x.dtype, device=x.device),
        torch.empty(r, dtype=dtype if spec.groups else x.dtype, device=x.device),
        torch.empty((3, channels), dtype=dtype, device=x.device),
        torch.empty(channels + 2, dtype=eager.sum_dtype(x), device=x.device),
    )


def _is_recomputed() -> bool:
    """Is the compiler told to compute again, in the backward pass, what it is tracing?"""
    traceback = torch.fx.traceback
    return traceback.has_preserved_node_meta() and traceback.get_current_meta().get("recompute") is not None


def _backward(
    grad_y: Tensor,
    x: Tensor,
    r: Tensor,
    weight: Optional[Tensor],
    valid: Optional[Tensor],
    saved: Tensor,
    nu: Tensor,
    scale: Optional[Tensor],
    *constants: Any,
) -> Tuple[Tensor, ...]:
    spec: Any = OpaqueSpec(*constants).at(0)
    if scale is not None:  # the backends take a tensor, too
        spec = spec._replace(gradient_scale=scale)
    root = r if spec.groups else None
    backend = choose_for_gradient(choose(x, weight, valid=valid), grad_y, x, root, weight, saved, valid, nu)
    found = backend.power_backward(grad_y, x, root, weight, valid, saved, nu, spec)
    assert found.x is not None and found.tally is not None
    return found.x, found.weight, found.bias, found.tally


def _backward_fake(
    grad_y: Tensor,
    x: Tensor,
    r: Tensor,
    weight: Optional[Tensor],
    valid: Optional[Tensor],
    saved: Tensor,
    nu: Tensor,
    scale: Optional[Tensor],
    *constants: Any,
) -> Tuple[Tensor, ...]:
    channels, dtype = x.size(-1), eager.compute_dtype(x)
    return (
        torch.empty(x.shape, dtype=x.dtype, device=x.device),
        torch.empty(channels, dtype=dtype, device=x.device),
        torch.empty(channels, dtype=dtype, device=x.device),
        torch.empty(2 * channels + 2, dtype=eager.sum_dtype(x), device=x.device),
    )


def _advance_forward(tally: Tensor, psi2: Tensor, iters: Tensor, *constants: Any) -> None:
    choose_for_step(tally, psi2, iters).advance_forward(tally, psi2, iters, StepSpec(*constants))


def _advance_backward(tally: Tensor, nu: Tensor, *constants: Any) -> None:
    choose_for_step(tally, nu).advance_backward(tally, nu, StepSpec(*constants))


def _nothing(*arguments: Any) -> None:
    return None


_LIBRARY.define("snapshot(Tensor statistic) -> Tensor")
_LIBRARY.impl("snapshot", torch.clone, "CompositeExplicitAutograd")
torch.library.register_fake("fairseq_powernorm::snapshot", torch.clone, lib=_LIBRARY)


for _name, _compute, _fake in (
    ("forward", _forward, _forward_fake),
    ("backward", _backward, _backward_fake),
    ("advance_forward_", _advance_forward, _nothing),
    ("advance_backward_", _advance_backward, _nothing),
):
    for _device in ("CPU", "CUDA"):
        _LIBRARY.impl(_name, _compute, _device)
    torch.library.register_fake(f"fairseq_powernorm::{_name}", _fake, lib=_LIBRARY)

_OPERATORS = torch.ops.fairseq_powernorm


def snapshot(statistic: Tensor) -> Tensor:
    """A statistic as it is now, for a pass that is compiled.

    What a compiler can compute again in the backward pass it does, and from the statistic as it has become: unless, as
    here, it can't look into the operator.
    """
    now: Tensor = _OPERATORS.snapshot(statistic)
    return now


def needed(x: Tensor) -> bool:
    """Must training over ``x`` go through these operators? While it is compiled, traced, or computed without values."""
    if torch.compiler.is_compiling() or x.is_meta:
        return True
    from torch._subclasses.fake_tensor import FakeTensor

    return isinstance(x, FakeTensor) or _without_values()


def outside_of_modes() -> ContextManager[Any]:
    """Entered for what is done in a forward pass and not in its repetition, or the other way round.

    Selective activation checkpointing counts the operations of both.
    """
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() == 0 or _without_values():
        return nullcontext()
    return torch.utils._python_dispatch._disable_current_modes()


def _without_values() -> bool:
    """Is a mode active in which operations are traced, or computed without values?"""
    keys = torch._C._TorchDispatchModeKey
    return any(torch._C._get_dispatch_mode(key) is not None for key in (keys.FAKE, keys.PROXY, keys.FUNCTIONAL))


class _PowerNorm(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Optional[Tensor],
        bias: Optional[Tensor],
        valid: Optional[Tensor],
        psi2: Tensor,
        nu: Tensor,
        iters: Tensor,
        forward_sums: Optional[Tensor],
        backward_sums: Optional[Tensor],
        spec: OpaqueSpec,
        step: Optional[StepSpec],
        scale: Optional[Tensor],
    ) -> Tensor:
        y: Tensor
        y, r, saved, tally = _OPERATORS.forward(x, weight, bias, valid, psi2, iters, *spec)
        if forward_sums is not None:
            forward_sums.add_(tally)
        elif step is not None:
            _OPERATORS.advance_forward_(tally, psi2, iters, *step)
        ctx.save_for_backward(x, r, weight, saved, valid)
        ctx.nu, ctx.backward_sums, ctx.spec, ctx.step, ctx.scale = nu, backward_sums, spec, step, scale
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> Gradients:
        x, r, weight, saved, valid = ctx.saved_tensors
        grad_x, grad_weight, grad_bias, tally = _OPERATORS.backward(
            grad_y, x, r, weight, valid, saved, ctx.nu, ctx.scale, *ctx.spec
        )
        if ctx.backward_sums is not None:
            ctx.backward_sums.add_(tally)
        elif ctx.step is not None:
            _OPERATORS.advance_backward_(tally, ctx.nu, *ctx.step)
        return (
            grad_x,
            None if weight is None else grad_weight.to(weight.dtype),
            None if ctx.bias_dtype is None else grad_bias.to(ctx.bias_dtype),
            *[None] * 9,
        )


def power_norm(
    x: Tensor,
    weight: Optional[Tensor],
    bias: Optional[Tensor],
    valid: Optional[Tensor],
    psi2: Tensor,
    nu: Tensor,
    iters: Tensor,
    forward_sums: Optional[Tensor],
    backward_sums: Optional[Tensor],
    spec: OpaqueSpec,
    step: Optional[StepSpec],
    scale: Optional[Tensor] = None,
) -> Tensor:
    """As :func:`fairseq_powernorm.functional.power_norm`, statistics included.

    Args:
        x: ``... x C``
        weight, bias: ``C`` or None
        valid: bool, one for each row in the order of ``x``, False marks padding; None if there is none
        psi2, nu: ``C``; iters: scalar: the running statistics
        forward_sums, backward_sums: where the tallies of the passes are added
        spec: constants
        step: the step that the running statistics take instead; with neither, nothing is taken in
        scale: in place of ``spec.gradient_scale``, where that is a tensor

    Returns:
        shape and dtype of ``x``
    """
    y: Tensor = _PowerNorm.apply(x, weight, bias, valid, psi2, nu, iters, forward_sums, backward_sums, spec, step, scale)
    return y
