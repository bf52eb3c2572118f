"""What a kernel backend offers, the types that pass between it and its callers, and the gate for tensors.

A backend computes Power Normalization for the tensors that it serves. ``eager`` (plain torch) serves all of them and is what
every other backend is held to. The others read and write memory through raw pointers: whatever reaches them has passed
:func:`readable` or :func:`writable`, and what does not pass goes to ``eager``.

Notation, for ``x`` of shape ``N x C`` (one row per token): ``r`` is the reciprocal root of the layer scale, ``N x G``;
``u = r * x``; ``inv`` is ``1 / sqrt(psi^2 + eps)`` per channel; ``z = inv * u``; ``y = weight * z + bias``.
"""
import math
from typing import NamedTuple, Optional, Protocol

import torch
from torch import Tensor

#: eps of the layer scale; a constant of the method, independent of the norm's own eps
LAYER_SCALE_EPS = 1e-5
#: what every backend is held to: dtype -> tolerance of max|difference from float64| / max|expected|, of values of rows (the
#: dtype's own precision) and of sums over rows (float32)
TOLERANCE = {torch.float32: (2e-6, 2e-6), torch.bfloat16: (4e-3, 2e-6), torch.float16: (5e-4, 2e-6)}

#: the classes of tensors that are nothing else besides
PLAIN = (Tensor, torch.nn.Parameter)
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class PowerNormSpec(NamedTuple):
    """The constants of one forward and backward pass.

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


class StepSpec(NamedTuple):
    """The constants of a step of the running statistics (``PowerNorm.advance``).

    Attributes:
        alpha_fwd: weight of the old psi^2
        nu_scale: ``1 - alpha_bkw``
        eps: added to psi^2 where the jump is measured
        warmup: steps before this one take a cumulative average first; 0 for ``algorithm2``
        trusted_after: steps after which psi^2 is an average of batches
        jump: from then on at most ``jump * (psi2 + eps)`` of a batch's second moment is taken in
        nu_lowest: lower bound of the factor of the old nu
    """

    alpha_fwd: float
    nu_scale: float
    eps: float
    warmup: int
    trusted_after: int
    jump: float
    nu_lowest: float


class OwnStep(NamedTuple):
    """Running statistics that take their step within a pass: the same step as ``advance_forward`` and ``advance_backward``.

    Attributes:
        psi2, nu: ``C``; iters: scalar; they have passed :func:`writable`
        spec: constants
    """

    psi2: Tensor
    iters: Tensor
    nu: Tensor
    spec: StepSpec


class BatchSpec(NamedTuple):
    """The constants of normalization by statistics of the batch.

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


class BatchStep(NamedTuple):
    """Running statistics that take their step within a pass: that of ``MaskedBatchNorm.advance``, or of PN-V's.

    Attributes:
        mean: ``C``, None without centring; moment: ``C``, variance or second moment; iters: scalar
        alpha_fwd: weight of their old values
    """

    mean: Optional[Tensor]
    moment: Tensor
    iters: Tensor
    alpha_fwd: float


class Forward(NamedTuple):
    """What a forward pass gives.

    Attributes:
        y: shape and dtype of ``x``, contiguous
        r: reciprocal root of the layer scale, ``N x groups``; None for ``groups == 0``
        saved: ``3 x C``, for the backward pass: ``1 / sqrt(psi^2 + eps)`` of the output, that of the gradient, and the
            sum of z^2 over the rows that count in the backward statistics
        tally: ``C + 2``: sums of u^2 over the rows that count, their number, 1; None after an :class:`OwnStep`
    """

    y: Tensor
    r: Optional[Tensor]
    saved: Tensor
    tally: Optional[Tensor]


class Backward(NamedTuple):
    """What a backward pass gives.

    Attributes:
        x: gradient of ``x``, or None if it is not wanted
        weight, bias: gradients (``C``), in the precision of the computation
        tally: ``2 C + 2``: sums of ``weight * dy * z`` (gradient scale taken out) and of z^2, number of rows, 1; None after
            an :class:`OwnStep`
    """

    x: Optional[Tensor]
    weight: Tensor
    bias: Tensor
    tally: Optional[Tensor]


class Backend(Protocol):
    """A kernel backend: a module with these functions. :mod:`.eager` documents their arguments.

    ``power_forward``, ``power_backward``, ``second_moment`` and ``evaluate`` take tensors that :func:`readable` lets
    through; ``advance_forward`` and ``advance_backward`` write to statistics that :func:`writable` lets through. A pass with
    ``step`` takes that step as well.
    """

    def serves(self, device_type: str, dtype: torch.dtype, *, asked: bool = False) -> bool:
        """Is this backend made for tensors of that kind? ``asked``: the user has named it."""

    def unavailable(self) -> Optional[str]:
        """Why it cannot be used on this machine; None if it can."""

    def describe(self) -> str:
        """What is in use, for people."""

    def second_moment(self, x: Tensor, valid: Optional[Tensor], groups: int) -> Tensor:
        """The tally of a forward pass alone."""

    def power_forward(
        self,
        x: Tensor,
        weight: Optional[Tensor],
        bias: Optional[Tensor],
        valid: Optional[Tensor],
        psi2: Tensor,
        spec: PowerNormSpec,
        batch: Optional[Tensor] = None,
        step: Optional[OwnStep] = None,
    ) -> Forward:
        """Forward pass of PN in training."""

    def power_backward(
        self,
        grad_y: Tensor,
        x: Tensor,
        r: Optional[Tensor],
        weight: Optional[Tensor],
        valid: Optional[Tensor],
        saved: Tensor,
        nu: Tensor,
        spec: PowerNormSpec,
        *,
        want_x: bool = True,
        step: Optional[OwnStep] = None,
    ) -> Backward:
        """Backward pass of PN."""

    def advance_forward(self, tally: Tensor, psi2: Tensor, iters: Tensor, step: StepSpec) -> None:
        """One step of psi^2 and the step count of n norms, in place."""

    def advance_backward(self, tally: Tensor, nu: Tensor, step: StepSpec) -> None:
        """One step of nu of n norms, in place."""

    def evaluate(
        self,
        x: Tensor,
        weight: Optional[Tensor],
        bias: Optional[Tensor],
        psi2: Optional[Tensor],
        groups: int,
        eps: float,
    ) -> Tensor:
        """PN in evaluation, without gradient."""


class BatchBackend(Protocol):
    """What a backend may offer besides: normalization by statistics of the batch, PN-V's and batch normalization's.

    The tensors have passed the same gate. :func:`fairseq_powernorm.functional.batch_norm` explains the arguments.
    """

    def batch_forward(
        self,
        x: Tensor,
        weight: Optional[Tensor],
        bias: Optional[Tensor],
        valid: Optional[Tensor],
        mean: Optional[Tensor],
        moment: Tensor,
        spec: BatchSpec,
        step: Optional[BatchStep] = None,
    ) -> Forward:
        """Forward pass of training. ``saved`` is ``2 x C``: mean (0 without) and ``1 / sqrt(moment + eps)``."""

    def batch_backward(
        self,
        grad_y: Tensor,
        x: Tensor,
        r: Optional[Tensor],
        weight: Optional[Tensor],
        valid: Optional[Tensor],
        saved: Tensor,
        spec: BatchSpec,
        *,
        want_x: bool = True,
    ) -> Optional[Backward]:
        """Backward pass; None where a sum is not finite and there is padding, which may have made it so."""

    def batch_evaluate(
        self,
        x: Tensor,
        weight: Optional[Tensor],
        bias: Optional[Tensor],
        mean: Tensor,
        moment: Tensor,
        groups: int,
        eps: float,
    ) -> Tensor:
        """Evaluation, without gradient."""


# ---------------------------------------------------------------- the gate


_is_compiling = torch.compiler.is_compiling
_function_transforms = torch._C._are_functorch_transforms_active
_dispatch_modes = torch._C._len_torch_dispatch_stack
_tracing = torch._C._get_tracing_state
_forward_ad = torch.autograd.forward_ad


def transformed() -> bool:
    """Is torch doing something else with operations than computing them?

    True while code is compiled or traced, under a function transform, a forward-mode derivative or a dispatch mode (fake
    tensors, selective checkpointing, counters): raw pointers would bypass it.
    """
    return (
        _is_compiling()
        or _function_transforms()
        or _dispatch_modes() > 0
        or _forward_ad._current_level >= 0
        or _tracing() is not None
    )


_has_storage = torch._C._has_storage
#: no memory lies below: what is left of a pointer whose storage was released is the tensor's offset
_LOWEST = 1 << 32


def plain(tensor: Tensor) -> bool:
    """Is this tensor nothing but strided memory of its own class?

    Not a subclass (fake, distributed, quantized ... tensors), not sparse or nested, not wrapped by a transform, not one of
    torch's lazy views (negation) or zeros, and none whose storage has been released.
    """
    return (
        type(tensor) in PLAIN
        and _has_storage(tensor)
        and not (tensor.is_neg() or tensor._is_zerotensor() or tensor.is_nested)
        and (tensor.data_ptr() > _LOWEST or _whole(tensor))
    )


def _whole(tensor: Tensor) -> bool:
    """Does the storage hold all elements? Asked where the pointer looks like none."""
    if tensor.is_meta:
        return False
    if tensor.numel() == 0:
        return True
    last = tensor.storage_offset() + sum((size - 1) * stride for size, stride in zip(tensor.size(), tensor.stride()))
    return (last + 1) * tensor.element_size() <= tensor.untyped_storage().nbytes()


def require_memory(*tensors: Optional[Tensor]) -> None:
    """Refuse tensors of a backward pass whose memory has been given back since the forward pass.

    Raises:
        RuntimeError: a storage no longer holds all elements
    """
    for each in tensors:
        if each is None or type(each) not in PLAIN or not _has_storage(each) or each.is_nested or each.is_meta:
            continue
        if not (each._is_zerotensor() or _whole(each)):
            raise RuntimeError(
                f"backward pass: the memory of a saved tensor of shape {tuple(each.shape)} has been given back (its storage "
                "was resized) since the forward pass"
            )


def readable(tensor: Tensor, device: int) -> bool:
    """May a backend read the floating-point vector ``tensor``? ``device``: of the input, as ``get_device()`` numbers it."""
    return plain(tensor) and tensor.get_device() == device and tensor.dtype in _FLOATS


def writable(tensor: Tensor) -> bool:
    """May a backend write float32 numbers through the pointer of a plain tensor, all of whose memory is its own?"""
    return (
        tensor.dtype is torch.float32
        and tensor.is_contiguous()
        and not tensor.requires_grad
        and (not tensor.is_inference() or torch.is_inference_mode_enabled())
    )
