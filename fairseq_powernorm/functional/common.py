"""What the autograd functions share: the types of their callbacks, and the states of torch that they ask for."""
from typing import TYPE_CHECKING, Any, Callable, Optional, Sequence, Tuple

import torch
from torch import Tensor

#: what a backward pass returns: a gradient, or None, for each argument of the forward pass
Gradients = Tuple[Optional[Tensor], ...]
#: takes the name of a pass (``forward``, ``backward``) and its tally, ``[sums (C each), rows, 1]``
Collect = Callable[[str, Tensor], None]
#: takes a vector of sums, returns their totals over all processes
Reduce = Callable[[Tensor], Tensor]


class Function(torch.autograd.Function):
    """torch's, with a type for what it is called by."""

    if TYPE_CHECKING:

        @classmethod
        def apply(cls, *arguments: Any) -> Any: ...


def reduced(reduce: Optional[Reduce], *sums: Tensor) -> Sequence[Tensor]:
    """The given sums (``C`` or scalar) over all processes, in one call of ``reduce``."""
    if reduce is None:
        return sums
    total = reduce(torch.cat([each.reshape(-1) for each in sums]))
    return [part.view_as(each) for part, each in zip(total.split([each.numel() for each in sums]), sums)]


def in_memory(grad: Tensor) -> Tensor:
    """The same values without torch's lazy zeros and negations."""
    if grad._is_zerotensor():
        return torch.zeros(grad.shape, dtype=grad.dtype, device=grad.device)
    return grad.resolve_neg()


_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)


def saved_tensors_are_hooked() -> bool:
    """Does somebody take over the tensors that are saved for the backward pass?"""
    return _hooks is None or _hooks(False) is not None  # noqa: FBT003  (torch takes it by position only)


def in_transform() -> bool:
    """Is a function transform (``torch.func``) active?"""
    return torch._C._are_functorch_transforms_active()


def transformed_gradient(grad_y: Tensor) -> bool:
    """Does a backward pass run under a transform: several gradients at once, or the gradient of a gradient?"""
    return in_transform() or torch._C._functorch.is_legacy_batchedtensor(grad_y)


def undifferentiable(grads: Gradients, what: str) -> Gradients:
    """Approximate gradients; whoever differentiates them once more gets an error, not a part of the derivative."""
    message = f"the gradient of {what} in training is an approximation: it can't be differentiated"
    error: Any = torch._C._functions.DelayedError(message.encode(), len(grads))
    return tuple(error(*(None if each is None else each.requires_grad_() for each in grads)))


def unwrapped(tensor: Tensor) -> Tensor:
    """The tensor beneath the wrappers of ``torch.func.grad``."""
    while torch._C._functorch.is_gradtrackingtensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor


class _FinitePaddingGradient(Function):
    """Identity; a gradient that is not finite does not pass where ``valid`` is False."""

    @staticmethod
    def forward(x: Tensor, valid: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Gradients:
        (valid,) = ctx.saved_tensors
        return torch.where(valid | torch.isfinite(grad), grad, 0.0), None


class _TransformedFinitePaddingGradient(_FinitePaddingGradient):
    """The same with what function transforms need and compilers do not take."""

    generate_vmap_rule = True

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: Any) -> Tensor:
        return tangent.clone()


def finite_padding_gradient(y: Tensor, valid: Tensor) -> Tensor:
    """``y``, through which a gradient that is not finite does not pass where ``valid`` (``... x 1``) is False."""
    kind = _FinitePaddingGradient if torch.compiler.is_compiling() else _TransformedFinitePaddingGradient
    passed: Tensor = kind.apply(y, valid)
    return passed
