"""Normalization layers: ``PowerNorm``, ``PowerNormV``, ``MaskedBatchNorm``, ``LayerNorm``, ``RMSNorm``.

All are drop-in ``nn.Module``s called as ``norm(x, padding_mask=None)`` with ``x`` of shape ``T x B x C`` or
``N x C`` and a bool mask of shape ``B x T`` (``N`` for two-dimensional input), True at padding. None of them
needs fairseq. Statistics are kept and computed in float32 (float64 for float64 input) whatever the dtype of
the input and of the parameters.

A norm with running statistics applies those of each training batch by itself. Where somebody else decides what a
training step is (several batches, several processes, steps that are skipped), :class:`~.statistics.RunningStatistics`
takes over: it gives each norm a :class:`Stage`, into which the norm adds its sums, and applies them once per step.
"""
import inspect
import math
from contextlib import nullcontext
from typing import Callable, Dict, Mapping, NamedTuple, Optional, Sequence, Tuple, Type

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import functional, kernels

VARIANTS = ("reference", "algorithm2")

# torch.compiler.disable loads torch's compiler at once, in every process; this one when it is first called.
_outside_of_compiled_code = getattr(torch, "_disable_dynamo", torch.compiler.disable)


class MaskSlot:
    """Holds the padding mask of the layer call in progress, for norms that are called without one."""

    def __init__(self):
        self.padding_mask: Optional[Tensor] = None


class Switches:
    """What the stages of one model have in common.

    Attributes:
        counting: whether the batch in progress counts. If not (a dummy batch), nothing is added and the batch is
            treated like padding: the norms pass on the gradient that arrives and add none
        gradient_scale: factor of the loss whose gradient arrives
        batch_statistics: PN divides by the batch's own second moment, as in its warm-up
        recording: PN-V and BN, too, add the sums of their backward pass (PN always does)
        reduce: turns a vector of sums into its total over all processes that share a batch; None if there is one
    """

    def __init__(self):
        self.counting = False
        self.gradient_scale = 1.0
        self.batch_statistics = False
        self.recording = False
        self.reduce: Optional[Callable[[Tensor], Tensor]] = None


class Stage:
    """Where a norm adds the sums of its batches, ``[sums (each C), rows, calls]``, for somebody else to apply.

    Args:
        switches: shared by all norms of a model
        parts: name of a part (``forward``, ``backward``) -> the vector to add to
    """

    def __init__(self, switches: Switches, parts: Mapping[str, Tensor]):
        self.switches = switches
        self.parts = parts

    def add(self, part: str, tally: Tensor) -> None:
        """Add the tally of one pass, ``[sums, rows, 1]``, if the batch counts."""
        if self.switches.counting:
            self.parts[part].add_(tally)


class Sums(NamedTuple):
    """Sums over the batches of one training step: one tensor (``... x C``) per name of ``RunningNorm.SUMS``.

    ``rows`` (``... x 1`` or a scalar) is the number of rows they were taken over.
    """

    sums: Sequence[Tensor]
    rows: Tensor

    @classmethod
    def of(cls, tally: Tensor, dim: int) -> "Sums":
        """Take ``[sums (C = dim each), rows, 1]`` (last dimension) apart."""
        return cls(tally[..., :-2].split(dim, dim=-1), tally[..., -2:-1])

    def means(self) -> Sequence[Tensor]:
        """Means over rows; 0 where there are none."""
        rows = self.rows.clamp(min=1)
        return [each / rows for each in self.sums]


State = Mapping[str, Tensor]


def inside_backward() -> bool:
    """True while an autograd backward pass runs: a forward pass then is a recomputation (activation checkpointing)."""
    return torch._C._current_graph_task_id() != -1


def _check_interval(name: str, value: float) -> None:
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{name}={value!r}: must lie in [0, 1]")


class LayerNorm(nn.LayerNorm):
    """torch's LayerNorm over the last dimension; the padding mask is accepted and not needed."""

    def __init__(self, dim: int, *, eps: float = 1e-5, affine: bool = True):
        super().__init__(dim, eps=eps, elementwise_affine=affine)

    def forward(self, x: Tensor, padding_mask: Optional[Tensor] = None) -> Tensor:
        return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)


class RMSNorm(nn.RMSNorm):
    """torch's RMSNorm over the last dimension (no bias); the padding mask is accepted and not needed."""

    def __init__(self, dim: int, *, eps: float = 1e-5, affine: bool = True):
        super().__init__(dim, eps=eps, elementwise_affine=affine)

    def forward(self, x: Tensor, padding_mask: Optional[Tensor] = None) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight, self.eps)


def _narrower(value: Tensor, buffer: Tensor) -> bool:
    return torch.finfo(value.dtype).bits < min(32, torch.finfo(buffer.dtype).bits)


def _finite_or(new: Tensor, old: Tensor) -> Tensor:
    """``new`` if all of its C channels are finite, else ``old``: one bad batch never enters a buffer."""
    return torch.where(torch.isfinite(new).all(-1, keepdim=True), new, old)


def _size(x: Tensor) -> Tensor:
    """Euclidean norm over channels divided by their number, ``... x C -> ...``."""
    return torch.linalg.vector_norm(x, dim=-1) / x.size(-1)


class RunningNorm(nn.Module):
    """Base of the norms with running statistics: checks, mask handling, buffers that stay in float32.

    A training batch yields sums, named in ``SUMS``; ``advance`` says what the running statistics become by them. Either
    the norm applies them itself, or its ``stage`` takes them.

    Args:
        dim: number of channels C
        eps: added to the second moment (or variance) under the root
        alpha_fwd: weight of the old value in the running statistics of the forward pass, in [0, 1]
        groups: channel groups of the layer scale ``u = x / sqrt(mean over the group of x^2 + 1e-5)`` that
            precedes the norm; 0 turns it off
        affine: learn ``weight`` and ``bias`` (``C``)

    Raises:
        ValueError: an argument is outside its range, or ``groups`` does not divide ``dim``
    """

    #: names of the sums over rows that a batch yields, by part: what ``advance`` and ``describe`` take
    SUMS: Mapping[str, Tuple[str, ...]] = {"forward": (), "backward": ()}

    def __init__(self, dim: int, eps: float, alpha_fwd: float, groups: int, affine: bool):
        super().__init__()
        if dim < 1:
            raise ValueError(f"dim={dim!r}: must be a positive number of channels")
        if not eps >= 0.0:
            raise ValueError(f"eps={eps!r}: must be zero or positive")
        _check_interval("alpha_fwd", alpha_fwd)
        kernels.requested()  # a wrong request is refused here, not in the first forward pass
        if groups < 0 or (groups > 0 and dim % groups):
            divisors = [g for g in range(1, dim + 1) if dim % g == 0]
            raise ValueError(
                f"groups={groups!r}: must be 0 (no layer scale) or divide the {dim} channels, one of {divisors}"
            )
        self.dim = dim
        self.eps = eps
        self.alpha_fwd = alpha_fwd
        self.groups = groups
        #: set by a layer that knows the padding mask but whose code calls the norm without it
        self.mask_slot: Optional[MaskSlot] = None
        #: set by whoever applies the statistics instead of the norm
        self.stage: Optional[Stage] = None
        if affine:
            self.weight = nn.Parameter(torch.ones(dim))
            self.bias = nn.Parameter(torch.zeros(dim))
        else:
            self.register_parameter("weight", None)
            self.register_parameter("bias", None)
        # floating point: integer buffers break exponential moving averages of a model
        self.register_buffer("iters", torch.zeros((), dtype=torch.float32))
        self._steps: Optional[Tuple[Tensor, int, int]] = None  # iters, its version, its value on the host

    def extra_repr(self) -> str:
        return (
            f"{self.dim}, eps={self.eps}, alpha_fwd={self.alpha_fwd}, groups={self.groups}, "
            f"affine={self.weight is not None}"
        )

    def _apply(self, fn, recurse=True):
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in self._buffers.items():
            if _narrower(buffer, before[name]):  # .half() and the like: keep the statistics' own precision
                self._buffers[name] = before[name].to(buffer.device)
        return self

    def __setattr__(self, name, value):
        """As in any module, but a buffer is never replaced by a half-precision copy of itself (as sharding does)."""
        buffer = self.__dict__.get("_buffers", {}).get(name)
        if buffer is not None and isinstance(value, Tensor) and _narrower(value, buffer):
            value = buffer.to(value.device)
        super().__setattr__(name, value)

    def __getstate__(self):
        """A copy, or what is read back from a pickle, is on its own: it applies its statistics itself."""
        return {**self.__dict__, "stage": None}

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        for name, buffer in self._buffers.items():
            loaded = state_dict.get(prefix + name)
            # the authors' code stores (1, C, 1, 1) and (1,)
            if loaded is not None and loaded.shape != buffer.shape and loaded.numel() == buffer.numel():
                state_dict[prefix + name] = loaded.reshape(buffer.shape)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def steps(self) -> int:
        """Training steps taken: ``iters`` on the host, read from the device only after a change from outside."""
        iters, known = self._buffers["iters"], self._steps
        if known is None or known[0] is not iters or known[1] != iters._version:
            self.remember_steps(int(iters.item()))
        return self._steps[2]

    def remember_steps(self, steps: int) -> None:
        """Say what ``iters`` has become, so that it need not be read from the device."""
        iters = self._buffers["iters"]
        self.__dict__["_steps"] = iters, iters._version, steps  # Module.__setattr__ is slow

    def _padding_mask(self, x: Tensor, padding_mask: Optional[Tensor]) -> Optional[Tensor]:
        """Check the input; return its mask, the slot's if the call gave none."""
        if x.dim() not in (2, 3) or x.size(-1) != self.dim:
            raise ValueError(f"input of shape {tuple(x.shape)}: expected T x B x {self.dim} or N x {self.dim}")
        if not x.is_floating_point():
            raise ValueError(f"input of dtype {x.dtype}: expected float16, bfloat16, float32 or float64")
        if padding_mask is None and self.mask_slot is not None:
            padding_mask = self.mask_slot.padding_mask
        if padding_mask is None:
            return None
        if x.dim() == 2 and padding_mask.dim() == 2:  # N x 1: one column of N sentences of length 1
            padding_mask = padding_mask.squeeze(1)
        expected = (x.size(1), x.size(0)) if x.dim() == 3 else (x.size(0),)
        if tuple(padding_mask.shape) != expected:
            raise ValueError(
                f"padding_mask of shape {tuple(padding_mask.shape)}: expected {expected} "
                f"({'B x T' if x.dim() == 3 else 'N'}) for an input of shape {tuple(x.shape)}"
            )
        if padding_mask.is_floating_point():
            raise ValueError(f"padding_mask of dtype {padding_mask.dtype}: expected bool, True at padding")
        return padding_mask.to(torch.bool)

    def forward(self, x: Tensor, padding_mask: Optional[Tensor] = None) -> Tensor:
        """Normalize ``x``.

        Args:
            x: ``T x B x C`` or ``N x C``, float16, bfloat16, float32 or float64
            padding_mask: ``B x T`` (``N`` for two-dimensional input) bool, True at padding

        Returns:
            tensor of the shape and dtype of ``x``

        Raises:
            ValueError: a shape or dtype does not fit
        """
        padding_mask = self._padding_mask(x, padding_mask)
        if not self.training:
            return self._evaluate(x)
        valid = None if padding_mask is None else padding_mask.t().reshape(-1).logical_not()
        if not self._counting:
            valid = torch.zeros(x.numel() // self.dim, dtype=torch.bool, device=x.device)
        return (self._train_uncompiled if torch.compiler.is_compiling() else self._train)(x, valid)

    @_outside_of_compiled_code
    def _train_uncompiled(self, x: Tensor, valid: Optional[Tensor]) -> Tensor:
        """Buffers that change inside a compiled region give wrong gradients: training stays outside of it."""
        return self._train(x, valid)

    def _evaluate(self, x: Tensor) -> Tensor:
        """Normalize ``x`` (any leading shape) by the running statistics."""
        raise NotImplementedError

    def scale_and_shift(self) -> Tuple[Tensor, Tensor]:
        """The evaluation as an affine map ``scale * u + shift`` of the layer-scaled input: ``C`` each, in float64."""
        raise NotImplementedError

    def _scale_and_shift(self, moment: Tensor, mean: Optional[Tensor] = None) -> Tuple[Tensor, Tensor]:
        moment = moment.detach().to(functional.kernel.sum_dtype(moment))
        scale, shift = functional.kernel.inverse_root(moment, self.eps), torch.zeros_like(moment)
        if self.weight is not None:
            scale, shift = scale * self.weight.detach(), shift + self.bias.detach()
        return scale, shift if mean is None else shift - scale * mean.detach()

    def _train(self, x: Tensor, valid: Optional[Tensor]) -> Tensor:
        """Normalize ``x`` as in training and take in its statistics; ``valid``: one bool for each row, in the order of ``x``."""
        raise NotImplementedError

    @property
    def _counting(self) -> bool:
        return self.stage is None or self.stage.switches.counting

    @property
    def _reduce(self) -> Optional[Callable[[Tensor], Tensor]]:
        return None if self.stage is None else self.stage.switches.reduce

    def _take(self, part: str, tally: Tensor) -> None:
        """Take in the tally of one pass: into the stage, or as one step of the running statistics."""
        with torch.no_grad() if torch.is_grad_enabled() else nullcontext():
            if self.stage is not None:
                self.stage.add(part, tally)
            else:
                self._step(part, tally)

    def _step(self, part: str, tally: Tensor) -> None:
        """One step of the running statistics."""
        sums = Sums.of(tally.to(self.iters.dtype), self.dim)
        for name, value in self.advance(part, self._buffers, sums, self.alpha_fwd).items():
            self._buffers[name].copy_(value.view_as(self._buffers[name]))

    def _collect_exact(self, recomputed: bool) -> functional.Collect:
        """For the norms with an exact gradient: their backward pass changes no statistics, it is only recorded."""

        def collect(part: str, tally: Tensor) -> None:
            if part == "forward":
                if not recomputed:
                    self._take(part, tally)
            elif self.stage is not None and self.stage.switches.recording:
                tally[:-2] /= self.stage.switches.gradient_scale
                self._take(part, tally)

        return collect

    def advance(self, part: str, state: State, sums: Sums, alpha_fwd: float) -> Dict[str, Tensor]:
        """What the buffers become by one step with the sums of one part.

        Pure. The tensors may have leading dimensions (``... x C``, ``iters`` ``... x 1``): many norms at once.

        Args:
            part: ``forward`` or ``backward``
            state: the buffers by name
            sums: those of the part; no change where there are no rows or the result is not finite
            alpha_fwd: the norm's own, or 0 to replace the running statistics by those of the sums

        Returns:
            new values of the buffers that change
        """
        raise NotImplementedError

    def describe(self, state: State, forward: Sums, backward: Sums) -> Dict[str, Tensor]:
        """Distance of a step's statistics from the running ones, and norms of the gradient through the statistics.

        Args:
            state: the buffers before the step
            forward, backward: the step's sums

        Returns:
            quantity -> value (leading dimensions of ``state``). ``distance_*`` and ``size_*``: Euclidean norm over
            channels, divided by their number, of batch minus running statistics and of the running ones.
            ``gradient_*``: root mean square over rows of the norm of the term of dL/du that a statistic causes.
        """
        raise NotImplementedError


class SecondMomentNorm(RunningNorm):
    """Base of PN and PN-V: the running second moment ``running_phi`` (psi^2) and the evaluation."""

    def __init__(self, dim: int, eps: float, alpha_fwd: float, groups: int, affine: bool):
        super().__init__(dim, eps, alpha_fwd, groups, affine)
        self.register_buffer("running_phi", torch.ones(dim))

    def _evaluate(self, x: Tensor) -> Tensor:
        return functional.running_norm(x, self.weight, self.bias, self.running_phi, self.groups, self.eps)

    def scale_and_shift(self) -> Tuple[Tensor, Tensor]:
        return self._scale_and_shift(self.running_phi)

    def _describe_psi2(self, state: State, forward: Sums) -> Dict[str, Tensor]:
        (batch,) = forward.means()
        return {
            "distance_psi2": _size(batch - state["running_phi"]),
            "size_psi2": _size(state["running_phi"]),
        }


class PowerNorm(SecondMomentNorm):
    r"""Power Normalization (Shen et al., ICML 2020, Algorithm 2) after an optional layer scale.

    The forward pass divides by the running root mean square of step ``t - 1`` and the backward pass replaces
    the gradient through the statistics by a running average:

    .. math::
        z = u / \sqrt{\psi^2(t-1) + \epsilon}, \qquad y = \gamma z + \beta, \qquad
        \psi^2(t) = \alpha_f \psi^2(t-1) + (1 - \alpha_f)\, \overline{u^2} \\
        \tilde g = \gamma\, dy - \nu(t-1) z, \qquad du = \tilde g / \psi, \qquad
        \nu(t) = \nu(t-1) \bigl(1 - (1-\alpha_b)\, \overline{z^2}\bigr) + (1-\alpha_b)\, \overline{\gamma\, dy\, z}

    Bars are means over rows. ``running_phi`` holds psi^2 and ``ema_gz`` holds ``nu / (1 - alpha_bkw)``.

    ``variant="algorithm2"`` is the above, word for word: no warm-up, every mean over non-padding rows, and no
    gradient through padding (nor from it, into ``weight`` and ``bias``). ``variant="reference"`` is the arithmetic of
    the authors' released code, which made the published numbers: (1) while ``t <= warmup_updates`` the forward
    pass divides by the batch's own second moment, and while ``t < warmup_updates`` ``running_phi`` first
    takes a cumulative average, then the exponential one; (2) the backward pass divides by the batch's own
    second moment at every step; (3) the forward statistics skip padding, the backward statistics and the
    gradients of ``weight`` and ``bias`` do not, and padded rows receive a gradient.

    **Without layer scale** (``groups=0``) PN as published can die, in two ways. (1) After the warm-up nothing but
    psi(t-1) scales the output, and psi^2 follows the activations at ``alpha_fwd`` per step. When they grow faster, the
    output grows with them, the next residual block receives more, and the excess multiplies from norm to norm through
    the depth: in a Transformer whose learning rate is too high for it, second moments of 10^9 psi^2 in the third step.
    Then psi^2 has taken in the spike and the output is nearly zero until it is forgotten, while nu, which decays only
    where z^2 is not small, stays at the value of the spike: gradients explode, and the model is dead or NaN. (2) The
    recursion of nu is stable only while the mean of z^2 is below ``2 / (1 - alpha_bkw)``. It exceeds that where psi^2
    lags, and in ``reference`` wherever padded rows, which count in z^2 and not in psi^2, are several times as large as
    the others: nu then grows geometrically. The layer scale prevents both, as it sets every row to the same size: no
    excess gets past the next norm. Two bounds replace it, idle in a healthy run, whose arithmetic they leave as it is,
    bit for bit: (1) a channel whose second moment in the batch exceeds ``JUMP / (1 - alpha_fwd)`` times psi^2(t-1),
    which takes a growth of more than ``JUMP`` in one step, divides by the batch's own second moment, and psi^2 takes in
    the threshold instead of it (not in the first step, nor in the warm-up; the batch is that of one process unless its
    statistics are reduced in the forward pass); (2) the factor of nu(t-1) is kept at or above -1.

    Args:
        dim: number of channels C
        eps: added to psi^2 under the root; the layer scale's own eps is always 1e-5
        alpha_fwd: alpha of psi^2, in [0, 1]
        alpha_bkw: alpha of nu, in [0, 1]
        warmup_updates: length of the warm-up in training steps, ``reference`` only
        groups: channel groups of the layer scale (the authors use the number of attention heads), 0 for none
        variant: ``reference`` or ``algorithm2``
        affine: learn ``weight`` (gamma) and ``bias`` (beta)

    Shape:
        - input and output: ``T x B x C`` or ``N x C``
        - ``padding_mask``: ``B x T`` or ``N``, bool, True at padding

    Raises:
        ValueError: an argument is outside its range, or ``groups`` does not divide ``dim``

    A forward pass in training mode takes one step of psi^2 and ``iters`` by itself, its backward pass one
    step of nu, unless a ``stage`` takes them. Recomputation under activation checkpointing takes none and sees the same
    statistics as the pass it repeats. A batch without a valid row leaves psi^2 as it is, and non-finite statistics
    enter neither psi^2 nor nu.
    """

    SUMS = {"forward": ("u^2",), "backward": ("weight * dy * z", "z^2")}
    #: without layer scale: growth of a second moment in one step beyond which psi^2 is no measure of it
    JUMP = 10.0

    def __init__(
        self,
        dim: int,
        *,
        eps: float = 1e-5,
        alpha_fwd: float = 0.9,
        alpha_bkw: float = 0.9,
        warmup_updates: int = 10000,
        groups: int = 1,
        variant: str = "reference",
        affine: bool = True,
    ):
        super().__init__(dim, eps, alpha_fwd, groups, affine)
        _check_interval("alpha_bkw", alpha_bkw)
        if warmup_updates < 0:
            raise ValueError(f"warmup_updates={warmup_updates!r}: must be zero or a positive number of steps")
        if variant not in VARIANTS:
            raise ValueError(f"variant={variant!r}: must be one of {', '.join(VARIANTS)}")
        self.alpha_bkw = alpha_bkw
        self.warmup_updates = warmup_updates
        self.variant = variant
        self.register_buffer("ema_gz", torch.zeros(dim))
        self._last_forward: Optional[Tuple[Tensor, bool]] = None  # what a recomputation has to see again

    def extra_repr(self) -> str:
        return (
            f"{super().extra_repr()}, alpha_bkw={self.alpha_bkw}, "
            f"warmup_updates={self.warmup_updates}, variant={self.variant}"
        )

    @property
    def _jump(self) -> float:
        """Ratio S(t) / psi^2(t-1) of second moments that only a jump explains, as psi^2(t-1) >= (1 - alpha) S(t-1)."""
        if self.groups > 0 or self.alpha_fwd == 1.0:
            return math.inf
        return self.JUMP / (1.0 - self.alpha_fwd)

    @property
    def _trusted_after(self) -> int:
        """Steps after which psi^2 is an average of batches and divides."""
        return max(1, self.warmup_updates if self.variant == "reference" else 0)

    def _train(self, x: Tensor, valid: Optional[Tensor]) -> Tensor:
        reference, stage = self.variant == "reference", self.stage
        psi2, nu = self._buffers["running_phi"], self._buffers["ema_gz"]
        recomputed = self._last_forward is not None and inside_backward()
        steps = self.steps()
        if not recomputed:
            in_warmup = reference and steps < self.warmup_updates
            # a stage leaves the buffers alone until the step is over; without one, this very pass changes them
            if stage is None:
                psi2 = psi2.clone()
            self.__dict__["_last_forward"] = psi2, in_warmup
        psi2, in_warmup = self._last_forward
        switches = None if stage is None else stage.switches
        spec = functional.PowerNormSpec(
            groups=self.groups,
            eps=self.eps,
            nu_scale=1.0 - self.alpha_bkw if self._counting else 0.0,
            gradient_scale=1.0 if switches is None else switches.gradient_scale,
            forward_batch=in_warmup or (switches is not None and switches.batch_statistics),
            backward_batch=reference,
            skip_padding=not reference,
            jump=self._jump if steps >= self._trusted_after else math.inf,
        )

        def collect(part: str, tally: Tensor) -> None:
            if part == "backward" or not recomputed:
                self._take(part, tally)

        own = self._own_step(steps) if stage is None and not recomputed else None
        y = functional.power_norm(x, self.weight, self.bias, valid, psi2, nu, spec, collect, self._reduce, own)
        if not recomputed and stage is None:
            self.remember_steps(steps + 1)
        return y

    def _own_step(self, steps: int) -> Optional[functional.OwnStep]:
        """The step that follows ``steps`` steps, as ``advance`` takes it; None where statistics are not float32."""
        buffers = self._buffers
        psi2, nu, iters = buffers["running_phi"], buffers["ema_gz"], buffers["iters"]
        if not psi2.dtype == nu.dtype == iters.dtype == torch.float32:
            return None
        warmup = self.warmup_updates if self.variant == "reference" else 0
        limited = steps >= self._trusted_after and self.alpha_fwd > 0.0
        return functional.OwnStep(
            psi2,
            nu,
            iters,
            alpha=self.alpha_fwd,
            limit=self._jump if limited else math.inf,
            share=1.0 / (steps + 1) if steps + 1 < warmup else 0.0,
            nu_scale=1.0 - self.alpha_bkw,
            nu_lowest=-1.0 if self.groups == 0 else -math.inf,
        )

    def advance(self, part: str, state: State, sums: Sums, alpha_fwd: float) -> Dict[str, Tensor]:
        if part == "backward":
            nu = state["ema_gz"]
            grad_z, z_square = sums.means()
            kept = 1.0 - (1.0 - self.alpha_bkw) * z_square
            if self.groups == 0:
                kept = kept.clamp(min=-1.0)
            new = nu * kept + grad_z
            return {"ema_gz": torch.where(sums.rows > 0, _finite_or(new, nu), nu)}
        step = state["iters"] + 1
        old = state["running_phi"]
        (batch,) = sums.means()
        if self._jump < math.inf and alpha_fwd > 0.0:
            batch = torch.where(step > self._trusted_after, torch.minimum(batch, self._jump * (old + self.eps)), batch)
        new = old
        if self.variant == "reference":
            cumulative = old * (step - 1) / step + batch / step
            new = torch.where(step < self.warmup_updates, cumulative, old)
        new = alpha_fwd * new + (1.0 - alpha_fwd) * batch
        return {"running_phi": torch.where(sums.rows > 0, _finite_or(new, old), old), "iters": step}

    def describe(self, state: State, forward: Sums, backward: Sums) -> Dict[str, Tensor]:
        (batch,), (_, z_square) = forward.means(), backward.means()
        psi2 = batch if self.variant == "reference" else state["running_phi"]
        nu = (1.0 - self.alpha_bkw) * state["ema_gz"]
        through_nu = (nu.square() / (psi2 + self.eps) * z_square).sum(-1).sqrt()
        return {**self._describe_psi2(state, forward), "gradient_nu": through_nu}


class PowerNormV(SecondMomentNorm):
    r"""PN-V (Shen et al., ICML 2020, Algorithm 1): the batch's own second moment, no centring, exact gradient.

    Training divides by ``sqrt(mean over non-padding rows of u^2 + eps)`` and lets the gradient through it;
    evaluation divides by the running average ``running_phi``, as :class:`PowerNorm` does.

    Args:
        dim: number of channels C
        eps: added to psi^2 under the root
        alpha_fwd: weight of the old value in the running average of psi^2, in [0, 1]
        groups: channel groups of the layer scale before it, 0 for none
        affine: learn ``weight`` and ``bias``

    Shape:
        - input and output: ``T x B x C`` or ``N x C``
        - ``padding_mask``: ``B x T`` or ``N``, bool, True at padding

    Raises:
        ValueError: an argument is outside its range, or ``groups`` does not divide ``dim``
    """

    SUMS = {"forward": ("u^2",), "backward": ("weight * dy * z",)}

    def __init__(
        self, dim: int, *, eps: float = 1e-5, alpha_fwd: float = 0.9, groups: int = 1, affine: bool = True
    ):
        super().__init__(dim, eps, alpha_fwd, groups, affine)

    def _train(self, x: Tensor, valid: Optional[Tensor]) -> Tensor:
        return functional.batch_power_norm(
            x.reshape(-1, self.dim), self.weight, self.bias, valid, self.running_phi.clone(), self.groups, self.eps,
            self._collect_exact(inside_backward()), self._reduce,
        ).view(x.shape)

    def advance(self, part: str, state: State, sums: Sums, alpha_fwd: float) -> Dict[str, Tensor]:
        if part == "backward":
            return {}
        old = state["running_phi"]
        (batch,) = sums.means()
        new = alpha_fwd * old + (1.0 - alpha_fwd) * batch
        return {"running_phi": torch.where(sums.rows > 0, _finite_or(new, old), old), "iters": state["iters"] + 1}

    def describe(self, state: State, forward: Sums, backward: Sums) -> Dict[str, Tensor]:
        (batch,), (grad_z,) = forward.means(), backward.means()
        inv2 = 1.0 / (batch + self.eps)
        through_psi2 = (grad_z.square() * inv2 * (batch * inv2)).sum(-1).sqrt()
        return {**self._describe_psi2(state, forward), "gradient_psi2": through_psi2}


class MaskedBatchNorm(RunningNorm):
    """Batch normalization with statistics over non-padding rows, running ones in evaluation.

    Without a mask it computes what ``torch.nn.BatchNorm1d(dim, momentum=1 - alpha_fwd)`` computes on the
    rows (after the layer scale, if ``groups`` is not 0): biased variance in training, unbiased in ``running_var``.

    Args:
        dim: number of channels C
        eps: added to the variance under the root
        alpha_fwd: weight of the old value in the running mean and variance, in [0, 1]
        groups: channel groups of the layer scale before it, 0 for none
        affine: learn ``weight`` and ``bias``

    Shape:
        - input and output: ``T x B x C`` or ``N x C``
        - ``padding_mask``: ``B x T`` or ``N``, bool, True at padding

    Raises:
        ValueError: an argument is outside its range, or ``groups`` does not divide ``dim``
    """

    SUMS = {"forward": ("u", "u^2"), "backward": ("weight * dy", "weight * dy * z")}

    def __init__(
        self, dim: int, *, eps: float = 1e-5, alpha_fwd: float = 0.9, groups: int = 1, affine: bool = True
    ):
        super().__init__(dim, eps, alpha_fwd, groups, affine)
        self.register_buffer("running_mean", torch.zeros(dim))
        self.register_buffer("running_var", torch.ones(dim))

    def _evaluate(self, x: Tensor) -> Tensor:
        return functional.running_norm(
            x, self.weight, self.bias, self.running_var, self.groups, self.eps, self.running_mean
        )

    def scale_and_shift(self) -> Tuple[Tensor, Tensor]:
        return self._scale_and_shift(self.running_var, self.running_mean)

    def _train(self, x: Tensor, valid: Optional[Tensor]) -> Tensor:
        return functional.masked_batch_norm(
            x.reshape(-1, self.dim), self.weight, self.bias, valid, self.running_mean.clone(), self.running_var.clone(),
            self.groups, self.eps, self._collect_exact(inside_backward()), self._reduce,
        ).view(x.shape)

    def advance(self, part: str, state: State, sums: Sums, alpha_fwd: float) -> Dict[str, Tensor]:
        if part == "backward":
            return {}
        mean, var = self._moments(sums)
        unbiased = torch.where(sums.rows > 1, var * sums.rows / (sums.rows - 1).clamp(min=1), var)
        new = {"iters": state["iters"] + 1}
        for name, batch in (("running_mean", mean), ("running_var", unbiased)):
            old = state[name]
            value = alpha_fwd * old + (1.0 - alpha_fwd) * batch
            new[name] = torch.where(sums.rows > 0, _finite_or(value, old), old)
        return new

    @staticmethod
    def _moments(forward: Sums) -> Tuple[Tensor, Tensor]:
        """Mean and biased variance."""
        mean, square = forward.means()
        return mean, (square - mean.square()).clamp(min=0)

    def describe(self, state: State, forward: Sums, backward: Sums) -> Dict[str, Tensor]:
        (mean, var), (grad, grad_z) = self._moments(forward), backward.means()
        inv2 = 1.0 / (var + self.eps)
        return {
            "distance_mean": _size(mean - state["running_mean"]),
            "distance_var": _size(var - state["running_var"]),
            "size_mean": _size(state["running_mean"]),
            "size_var": _size(state["running_var"]),
            "gradient_mean": (grad.square() * inv2).sum(-1).sqrt(),
            "gradient_var": (grad_z.square() * inv2 * (var * inv2)).sum(-1).sqrt(),
        }


#: the names of the command line and of YAML files
NORMS: Dict[str, Type[nn.Module]] = {
    "layer": LayerNorm,
    "rms": RMSNorm,
    "batch": MaskedBatchNorm,
    "power-v": PowerNormV,
    "power": PowerNorm,
}


def norm_options(name: str) -> Tuple[str, ...]:
    """Names of the keyword arguments that the norm called ``name`` takes."""
    parameters = inspect.signature(NORMS[name].__init__).parameters.values()
    return tuple(p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY)


def build_norm(name: str, dim: int, **options) -> nn.Module:
    """Build the norm called ``name`` for ``dim`` channels.

    One set of options serves all norms: each takes those that it has (a LayerNorm only ``eps`` and ``affine``).

    Args:
        name: a key of :data:`NORMS`
        dim: number of channels C
        options: keyword arguments of the norm classes

    Raises:
        ValueError: ``name`` or an option is unknown, or a value is outside its range
    """
    if name not in NORMS:
        raise ValueError(f"norm {name!r}: must be one of {', '.join(NORMS)}")
    known = sorted({option for each in NORMS for option in norm_options(each)})
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ValueError(f"norm option {unknown[0]!r}={options[unknown[0]]!r}: must be one of {', '.join(known)}")
    own = norm_options(name)
    return NORMS[name](dim, **{option: value for option, value in options.items() if option in own})
