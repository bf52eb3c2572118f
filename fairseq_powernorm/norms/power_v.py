"""PN-V, Power Normalization with statistics of the batch: ``PowerNormV``."""
import math
from typing import Dict, Optional, Tuple

import torch
from torch import Tensor

from .. import functional
from ..kernels import choose_for_step, eager
from ..kernels.interface import StepSpec
from .base import Device, State
from .exact import ExactNorm
from .power import SecondMomentNorm
from .staging import Sums


class PowerNormV(ExactNorm, SecondMomentNorm):
    r"""PN-V (Shen et al., ICML 2020, Algorithm 1): the batch's own second moment, no centring, exact gradient.

    Training divides by ``sqrt(mean over non-padding rows of u^2 + eps)`` and lets the gradient through it;
    evaluation divides by the running average ``running_phi``, as :class:`PowerNorm` does.

    Args:
        dim: number of channels C
        eps: added to psi^2 under the root
        alpha_fwd: weight of the old value in the running average of psi^2, in [0, 1]
        groups: channel groups of the layer scale before it, 0 for none
        affine: learn ``weight`` and ``bias``
        batch_first, layout: where the channels are, see :class:`~.layouts.Norm`
        device, dtype: of the parameters; statistics are on that device and float32 or wider

    Shape:
        - input and output: as ``layout`` says, or ``N x C``
        - ``padding_mask``: the input's shape without C, batch first; bool, True at padding

    Raises:
        ValueError: an argument is outside its range, or ``groups`` does not divide ``dim``
    """

    SUMS = {"forward": ("u^2",), "backward": ("weight * dy * z",)}
    STATISTICS = {"running_phi": 1.0}
    STEPS = {"forward": ("running_phi", "iters"), "backward": ()}

    def __init__(
        self,
        dim: int,
        *,
        eps: float = 1e-5,
        alpha_fwd: float = 0.9,
        groups: int = 1,
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

    def _batch_arguments(self) -> Tuple[Optional[Tensor], Tensor, functional.BatchSpec]:
        return None, self.running_phi, functional.BatchSpec(self.groups, self.eps, centre=False)

    def _takes_known_step(self) -> bool:
        rule = type(self)
        return rule.advance is PowerNormV.advance and rule.step_ is PowerNormV.step_

    def step_(self, part: str, tally: Tensor, buffers: State) -> None:
        if type(self).advance is not PowerNormV.advance:  # a derived class with a rule of its own
            super().step_(part, tally, buffers)
        elif part == "forward":  # PN's step of psi^2, without warm-up and bounds
            psi2, iters = (buffers[name] for name in self.STEPS[part])
            choose_for_step(tally, psi2, iters).advance_forward(tally, psi2, iters, self._step_spec())

    def _step_spec(self) -> StepSpec:
        known: Optional[StepSpec] = self._constants.get("step")
        if known is None:
            known = self._constants["step"] = StepSpec(
                alpha_fwd=self.alpha_fwd,
                nu_scale=0.0,
                eps=self.eps,
                warmup=0,
                trusted_after=0,
                jump=math.inf,
                nu_lowest=-math.inf,
            )
        return known

    def advance(self, part: str, state: State, sums: Sums, alpha_fwd: float) -> Dict[str, Tensor]:
        if part == "backward":
            return {}
        old = state["running_phi"]
        (batch,) = sums.means()
        new = alpha_fwd * old + (1.0 - alpha_fwd) * batch
        return {
            "running_phi": torch.where(sums.rows > 0, eager.finite_or(new, old), old),
            "iters": state["iters"] + 1,
        }

    def describe(self, state: State, forward: Sums, backward: Sums) -> Dict[str, Tensor]:
        (batch,), (grad_z,) = forward.means(), backward.means()
        inv2 = 1.0 / (batch + self.eps)
        through_psi2 = (grad_z.square() * inv2 * (batch * inv2)).sum(-1).sqrt()
        return {**self._describe_psi2(state, forward), "gradient_psi2": through_psi2}
