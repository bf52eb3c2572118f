"""Power Normalization: ``PowerNorm``, and what it shares with PN-V."""
import math
from typing import Any, Callable, Dict, Hashable, Optional, Tuple

import torch
from torch import Tensor

from .. import functional, operators
from ..kernels import choose, choose_for_step, eager, memory
from ..kernels.interface import OwnStep, PowerNormSpec, StepSpec
from .base import Device, RunningNorm, State
from .checks import check_interval, check_updates
from .distances import discrepancy, size_of
from .recomputation import Recomputations, inside_backward, recomputable
from .staging import Sums

VARIANTS = ("reference", "algorithm2")


class SecondMomentNorm(RunningNorm):
    """Base of PN and PN-V: the running second moment ``running_phi`` (psi^2) and the evaluation."""

    running_phi: Tensor

    def _evaluate(self, x: Tensor, padding_mask: Optional[Tensor]) -> Tensor:
        return functional.running_norm(
            x, *self._affine(), self._buffers["running_phi"], self.groups, self.eps,
            channels_second=self._channels_second(x),
        )  # fmt: skip

    def scale_and_shift(self) -> Tuple[Tensor, Tensor]:
        return self._scale_and_shift(self.running_phi)

    def _describe_psi2(self, state: State, forward: Sums) -> Dict[str, Tensor]:
        (batch,) = forward.means()
        return {
            "distance_psi2": size_of(batch - state["running_phi"]),
            "size_psi2": size_of(state["running_phi"]),
            **discrepancy((batch + self.eps).sqrt(), (state["running_phi"] + self.eps).sqrt()),
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

    **Without layer scale** (``groups=0``) PN as published can die, in two ways.

    (1) After the warm-up, only psi(t-1) scales the output, and psi^2 follows the activations at ``alpha_fwd`` per step. If
    they grow faster, the output grows with them, the next residual block receives more, and the excess multiplies from
    norm to norm through the depth: in a Transformer with too high a learning rate, second moments reach 10^9 psi^2 in the
    third step. Then psi^2 has absorbed the spike, and the output is nearly zero until psi^2 has forgotten it. Meanwhile nu,
    which decays only where z^2 is not small, keeps the value of the spike: gradients explode, and the model is dead or NaN.

    (2) The recursion of nu is stable only while the mean of z^2 is below ``2 / (1 - alpha_bkw)``. The mean is larger where
    psi^2 lags, and in ``reference`` wherever padded rows, which count in z^2 but not in psi^2, are several times as large
    as the others: nu then grows geometrically.

    The layer scale prevents both, because it gives every row the same size: no excess gets past the next norm. Without it,
    two bounds do so. They change no bit in a healthy run. (1) If the second moment of a channel in the batch exceeds
    ``JUMP / (1 - alpha_fwd)`` times psi^2(t-1), that is, if psi^2 would grow by a factor of more than ``JUMP`` in one step,
    the channel is divided by the batch's own second moment, and psi^2 takes in the threshold instead. (This does not apply
    in the first step or in the warm-up; the batch is that of one process unless its statistics are reduced in the forward
    pass.) (2) The factor of nu(t-1) is kept at or above -1.

    Args:
        dim: number of channels C
        eps: added to psi^2 under the root; the layer scale's own eps is always 1e-5
        alpha_fwd: alpha of psi^2, in [0, 1]
        alpha_bkw: alpha of nu, in [0, 1]
        warmup_updates: length of the warm-up in training steps, ``reference`` only
        groups: channel groups of the layer scale (the authors use the number of attention heads), 0 for none
        variant: ``reference`` or ``algorithm2``
        affine: learn ``weight`` (gamma) and ``bias`` (beta)
        batch_first, layout: where the channels are, see :class:`~.layouts.Norm`
        device, dtype: of the parameters; statistics are on that device and float32 or wider

    Shape:
        - input and output: as ``layout`` says, or ``N x C``
        - ``padding_mask``: the input's shape without C, batch first; bool, True at padding

    Raises:
        ValueError: an argument is outside its range, or ``groups`` does not divide ``dim``

    In training mode, a forward pass takes one step of psi^2 and ``iters``, and its backward pass one step of nu, unless a
    ``stage`` takes them over. Recomputation under activation checkpointing takes no step and sees the same statistics as
    the pass it repeats, which it recognizes by the sums of its input; if that is not certain, it is refused. A batch
    without a valid row leaves psi^2 as it is, and values that are not finite enter neither psi^2 nor nu.
    """

    CHECKS = {**SecondMomentNorm.CHECKS, "alpha_bkw": check_interval, "warmup_updates": check_updates}
    SUMS = {"forward": ("u^2",), "backward": ("weight * dy * z", "z^2")}
    VARIANTS = VARIANTS
    STATISTICS = {"running_phi": 1.0, "ema_gz": 0.0}
    STEPS = {"forward": ("running_phi", "iters"), "backward": ("ema_gz",)}
    OWN_LAYOUT = True
    #: without layer scale: growth of a second moment in one step beyond which psi^2 is no measure of it
    JUMP = 10.0

    ema_gz: Tensor

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
        batch_first: bool = False,
        layout: Optional[str] = None,
        device: Device = None,
        dtype: Optional[torch.dtype] = None,
    ):
        super().__init__(
            dim, eps=eps, alpha_fwd=alpha_fwd, groups=groups, affine=affine, batch_first=batch_first,
            layout=layout, device=device, dtype=dtype,
        )
        self.alpha_bkw = alpha_bkw
        self.warmup_updates = warmup_updates
        self.variant = variant
        self._recomputations = Recomputations()

    def extra_repr(self) -> str:
        return (
            f"{super().extra_repr()}, alpha_bkw={self.alpha_bkw}, "
            f"warmup_updates={self.warmup_updates}, variant={self.variant}"
        )

    def __getstate__(self) -> Dict[str, Any]:
        return {**super().__getstate__(), "_recomputations": None}

    def __setstate__(self, state: Dict[str, Any]) -> None:
        super().__setstate__(state)
        self._recomputations = Recomputations()

    # ------------------------------------------------------------------ constants

    @property
    def _warmup(self) -> int:
        return self.warmup_updates if self.variant == "reference" else 0

    @property
    def _jump(self) -> float:
        """Ratio S(t) / psi^2(t-1) of second moments that only a jump explains, as psi^2(t-1) >= (1 - alpha) S(t-1)."""
        if self.groups > 0 or self.alpha_fwd == 1.0:
            return math.inf
        return self.JUMP / (1.0 - self.alpha_fwd)

    def _spec(self) -> operators.OpaqueSpec:
        """The constants of a pass, but for the step count."""
        reference, stage = self.variant == "reference", self.stage
        switches = None if stage is None else stage.switches
        counting = switches is None or switches.counting
        # a tensor where the loss scale is one on the device
        gradient_scale: Any = 1.0 if switches is None else switches.gradient_scale
        return operators.OpaqueSpec(
            groups=self.groups,
            eps=self.eps,
            nu_scale=1.0 - self.alpha_bkw if counting else 0.0,
            gradient_scale=gradient_scale,
            warmup=self._warmup,
            trusted_after=max(1, self._warmup),
            batch_statistics=switches is not None and switches.batch_statistics,
            backward_batch=reference,
            skip_padding=not reference,
            own_step=stage is None,
            jump=self._jump,
        )

    def _spec_at(self, steps: int) -> PowerNormSpec:
        """The constants of a pass after ``steps`` steps, made once for all passes alike."""
        switches = None if self.stage is None else self.stage.switches
        kind: Tuple[Hashable, ...] = steps < self.warmup_updates, steps >= max(1, self.warmup_updates), steps > 0
        if switches is not None:
            if isinstance(switches.gradient_scale, Tensor):
                return self._spec().at(steps)
            kind += switches.counting, switches.batch_statistics
        scale = 1.0 if switches is None else switches.gradient_scale
        known: Optional[PowerNormSpec] = self._constants.get(kind)
        if known is None or known.gradient_scale != scale:  # one is kept, as each batch may have another scale
            known = self._constants[kind] = self._spec().at(steps)
        return known

    def _step_spec(self) -> StepSpec:
        """The constants of a step of the statistics."""
        known: Optional[StepSpec] = self._constants.get("step")
        if known is None:
            known = self._constants["step"] = self._make_step_spec()
        return known

    def _make_step_spec(self) -> StepSpec:
        return StepSpec(
            alpha_fwd=self.alpha_fwd,
            nu_scale=1.0 - self.alpha_bkw,
            eps=self.eps,
            warmup=self._warmup,
            trusted_after=max(1, self._warmup),
            jump=self._jump,
            nu_lowest=-1.0 if self.groups == 0 else -math.inf,
        )

    # ------------------------------------------------------------------ training

    def _train(self, x: Tensor, valid: Optional[Tensor], *, special: bool) -> Tensor:
        if special and operators.needed(x):
            return self._train_opaque(x, valid)
        with self._lock:
            if not special and (y := self._train_natively(x, valid)) is not None:
                return y
            if self.stage is None:
                return self._train_alone(x, valid)
            return self._pass(
                x, valid, self._spec_at(self.steps()), self.statistic("running_phi"), take_forward=not inside_backward()
            )

    def _train_natively(self, x: Tensor, valid: Optional[Tensor]) -> Optional[Tensor]:
        """An ordinary pass by the autograd function in C++; None, with nothing done, where that does not serve."""
        stage, step, sums = self.stage, None, functional.NO_STAGE
        if stage is None:
            if recomputable() or inside_backward() or not self._takes_known_step():
                return None
            step = self._step_spec()
        elif stage.switches.reduce is not None:
            return None
        elif stage.switches.counting:
            forward = None if inside_backward() else stage.parts["forward"]
            sums = functional.StageSums(forward, stage.parts["backward"], stage.switches)
        else:
            sums = functional.StageSums(None, None, stage.switches)
        buffers = self._buffers
        return functional.native_power_norm(
            x, *self._affine(), valid, buffers["running_phi"], buffers["ema_gz"], buffers["iters"],
            self._spec_at(self.steps()), self._take, self._lock, step, sums, channels_second=self._channels_second(x),
        )  # fmt: skip

    def _train_alone(self, x: Tensor, valid: Optional[Tensor]) -> Tensor:
        """Training without a stage: each forward pass takes a step, and one that is repeated must see what it saw."""
        psi2, recomputations = self.statistic("running_phi"), self._recomputations
        if inside_backward() and recomputations:
            with operators.outside_of_modes():
                rows = x.detach()
                known = recomputations.recall(choose(rows, valid=valid).second_moment(rows, valid, self.groups))
            assert known.spec is not None
            return self._pass(x, valid, known.spec, known.state, take_forward=False)
        steps = self.steps()
        spec = self._spec_at(steps)
        if not recomputable():
            own = None
            if self._takes_known_step():
                own = OwnStep(psi2, self.statistic("iters"), self.statistic("ema_gz"), self._step_spec())
            y = self._pass(x, valid, spec, psi2, own=own)
        else:
            with operators.outside_of_modes():
                before = psi2.clone()
            y = self._pass(x, valid, spec, psi2, remember=lambda tally: recomputations.remember(before, spec, tally))
        self.remember_steps(steps + 1)
        return y

    def _pass(
        self,
        x: Tensor,
        valid: Optional[Tensor],
        spec: PowerNormSpec,
        psi2: Tensor,
        *,
        take_forward: bool = True,
        remember: Optional[Callable[[Tensor], None]] = None,
        own: Optional[OwnStep] = None,
    ) -> Tensor:
        """One forward pass with given statistics and constants; its backward pass follows when it will."""

        def collect(part: str, tally: Tensor) -> None:
            if part == "backward" or take_forward:
                self._take(part, tally)
            if remember is not None and part == "forward":
                remember(tally)

        nu = self.statistic("ema_gz") if own is None else own.nu
        return functional.power_norm(
            x, *self._affine(), valid, psi2, nu, spec, collect, self._reduce, self._lock, own,
            channels_second=self._channels_second(x),
        )  # fmt: skip

    def _train_opaque(self, x: Tensor, valid: Optional[Tensor]) -> Tensor:
        """Training as operators that a compiler does not look into."""
        if self.stage is None and not (x.is_meta or self._takes_known_step()):
            raise RuntimeError(
                f"compiling or tracing a {type(self).__name__} in training, which has a step of its own: let "
                "fairseq_powernorm.statistics.RunningStatistics apply it"
            )
        parts = self.stage.parts if self.stage is not None and self.stage.switches.counting else {}
        rows, spec, scale = x if x.stride(-1) == 1 else x.contiguous(), self._spec(), None
        if isinstance(spec.gradient_scale, Tensor):  # operators take numbers and tensors apart
            scale, spec = spec.gradient_scale, spec._replace(gradient_scale=1.0)
        y = operators.power_norm(
            rows, self.weight, self.bias, valid, self.running_phi, self.ema_gz, self.iters, parts.get("forward"),
            parts.get("backward"), spec, self._make_step_spec() if self.stage is None else None, scale,
        )
        return memory.view_channels_second(y, x) if self._channels_second(x) else y

    # ------------------------------------------------------------------ statistics

    def _takes_known_step(self) -> bool:
        """Is the step of the running statistics that which kernels know, and not the rule of a derived class?"""
        rule = type(self)
        return rule.advance is PowerNorm.advance and rule.step_ is PowerNorm.step_

    def step_(self, part: str, tally: Tensor, buffers: State) -> None:
        if type(self).advance is not PowerNorm.advance:
            super().step_(part, tally, buffers)
            return
        backend = choose_for_step(tally, *(buffers[name] for name in self.STEPS[part]))
        if part == "forward":
            backend.advance_forward(tally, buffers["running_phi"], buffers["iters"], self._step_spec())
        else:
            backend.advance_backward(tally, buffers["ema_gz"], self._step_spec())

    def advance(self, part: str, state: State, sums: Sums, alpha_fwd: float) -> Dict[str, Tensor]:
        step = self._step_spec()
        if part == "backward":
            grad_z, z_square = sums.means()
            return {"ema_gz": eager.next_nu(state["ema_gz"], grad_z, z_square, sums.rows, step)}
        (batch,) = sums.means()
        new = eager.next_psi2(state["running_phi"], state["iters"], batch, sums.rows, step, alpha_fwd=alpha_fwd)
        return {"running_phi": new, "iters": state["iters"] + 1}

    def describe(self, state: State, forward: Sums, backward: Sums) -> Dict[str, Tensor]:
        (batch,), (_, z_square) = forward.means(), backward.means()
        psi2 = batch if self.variant == "reference" else state["running_phi"]
        nu = (1.0 - self.alpha_bkw) * state["ema_gz"]
        through_nu = (nu.square() / (psi2 + self.eps) * z_square).sum(-1).sqrt()
        largest = nu.abs().amax(-1)
        return {**self._describe_psi2(state, forward), "gradient_nu": through_nu, "nu_largest": largest}
