"""From LayerNorm to batch normalization in the course of the training: ``ProgressiveBatchNorm``."""
from typing import Any, Dict, Optional, Tuple

import torch
from torch import Tensor, nn

from .. import functional
from ..kernels import eager
from .base import Device, State
from .checks import check_number, is_count
from .formula import FormulaNorm
from .scriptable import MixedEvaluation
from .staging import Sums


class ProgressiveBatchNorm(FormulaNorm):
    r"""Progressive re-parameterized batch normalization (PRepBN; Guo et al., SLAB, ICML 2024).

    .. math::
        y = \lambda\, \mathrm{LN}(u) + (1 - \lambda) \bigl(\mathrm{BN}(u) + \alpha u\bigr), \qquad
        \lambda = \max(0,\ 1 - t / T)

    after t of T = ``total_updates`` training steps. LN and BN (mean and biased variance of the non-padding rows in training;
    running ones, the variance unbiased, in evaluation) have a weight and a bias each, and :math:`\alpha` is learned.
    Evaluation computes the same mixture, with the lambda of its step; after T steps it is BN(u) + alpha u, an affine map,
    which :func:`~fairseq_powernorm.fold.fold_norms` folds: scale ``weight / sigma + alpha``. Before, it refuses.

    With RunningStatistics, t, mean and variance take one step per optimizer step, exactly that of one batch of all rows,
    however these are cut. BN's own mean and variance are those of the micro-batch in progress, of this process or, with
    ``sync="exact"``, of all: k ranks with ``exact`` are one large batch, k micro-batches are not. LN takes no part in this.

    Args:
        dim: number of channels C
        eps: added to the variance under the root, in both norms
        alpha_fwd: weight of the old value in the running mean and variance, in [0, 1]
        total_updates: T, 1 or more; fairseq's models know that of the run (``--max-update``), elsewhere it must be given
        alpha: alpha at the beginning
        groups: channel groups of a layer scale before it, 0 for none (as published)
        affine: learn ``weight`` and ``bias`` of both norms; alpha is learned anyway
        batch_first, layout: where the channels are, see :class:`~.layouts.Norm`
        device, dtype: of the parameters; statistics are on that device and float32 or wider

    Shape:
        - input and output: as ``layout`` says, or ``N x C``
        - ``padding_mask``: the input's shape without C, batch first; bool, True at padding

    Raises:
        ValueError: an argument is outside its range or missing, or ``groups`` does not divide ``dim``
    """

    #: the option without a default, with a value: for whoever builds one to look at it
    REQUIRED = {"total_updates": 1}
    STATISTICS = {"running_mean": 0.0, "running_var": 1.0}
    STEPS = {"forward": ("iters", "running_mean", "running_var"), "backward": ()}

    first_alpha = 1.0
    running_mean: Tensor
    running_var: Tensor
    layer_weight: Optional[nn.Parameter]
    layer_bias: Optional[nn.Parameter]

    def __init__(
        self,
        dim: int,
        *,
        eps: float = 1e-5,
        alpha_fwd: float = 0.9,
        total_updates: Optional[int] = None,
        alpha: float = 1.0,
        groups: int = 0,
        affine: bool = True,
        batch_first: bool = False,
        layout: Optional[str] = None,
        device: Device = None,
        dtype: Optional[torch.dtype] = None,
    ):
        check_number("alpha", alpha)
        super().__init__(
            dim, eps=eps, alpha_fwd=alpha_fwd, groups=groups, affine=affine, batch_first=batch_first,
            layout=layout, device=device, dtype=dtype,
        )
        self.total_updates: int = total_updates  # type: ignore[assignment]  # None is refused
        self.first_alpha = alpha
        with torch.inference_mode(mode=False):  # or it could never be trained
            self.alpha = nn.Parameter(torch.empty(1, device=device, dtype=dtype))
            for name in ("layer_weight", "layer_bias"):
                parameter = nn.Parameter(torch.empty(dim, device=device, dtype=dtype)) if affine else None
                self.register_parameter(name, parameter)
        self.reset_parameters()

    def _check_setting(self, name: str, value: Any) -> None:
        if name == "total_updates" and not is_count(value, least=1):
            raise ValueError(
                f"total_updates={value!r}: must be the number of training steps after which LayerNorm is gone, 1 or "
                "more; in fairseq --norm-total-updates or --max-update, if there is one, says it for all norms"
            )
        super()._check_setting(name, value)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, total_updates={self.total_updates}, alpha={self.first_alpha}"

    def first_values(self) -> Dict[str, float]:
        return {**super().first_values(), "alpha": self.first_alpha, "layer_weight": 1.0, "layer_bias": 0.0}

    def share(self, steps: Tensor) -> Tensor:
        """lambda after that many steps."""
        return (1.0 - steps / self.total_updates).clamp(min=0.0)

    def _mixed(self, u: Tensor, normalized: Tensor, steps: Tensor) -> Tensor:
        """The mixture, given BN(u)."""
        share = self.share(steps.to(u.dtype))
        # also where its share is zero: each parameter has a gradient in each step, on which data parallelism may rely
        centred = u - u.mean(-1, keepdim=True)
        layer = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + self.eps)
        if self.layer_weight is not None:
            layer = layer * self.layer_weight.to(u.dtype)
        if self.layer_bias is not None:
            layer = layer + self.layer_bias.to(u.dtype)
        return share * layer + (1.0 - share) * (normalized + self.alpha.to(u.dtype) * u)

    def _normalized(self, moments: functional.Moments, state: State, *, recomputed: bool) -> Tensor:
        running_mean, running_var = (state[name].to(moments.u.dtype) for name in ("running_mean", "running_var"))
        mean = functional.standing_in(moments, moments.mean, running_mean)
        var = functional.standing_in(moments, moments.var, running_var)
        z = self._watched((moments.u - mean) * torch.rsqrt(var + self.eps), moments)
        return self._mixed(moments.u, self._with_affine(z), state["iters"])

    def _evaluate(self, x: Tensor, padding_mask: Optional[Tensor]) -> Tensor:
        u = functional.layer_scale(x.to(eager.compute_dtype(x)), self.groups)
        running_mean, running_var = (self._buffers[name].to(u.dtype) for name in ("running_mean", "running_var"))
        normalized = self._with_affine((u - running_mean) * torch.rsqrt(running_var + self.eps))
        return self._mixed(u, normalized, self._buffers["iters"]).to(x.dtype)

    def __prepare_scriptable__(self) -> nn.Module:
        """See :class:`RunningNorm`."""
        return MixedEvaluation(self)

    def scale_and_shift(self) -> Tuple[Tensor, Tensor]:
        """See :class:`RunningNorm`; raises ValueError while LayerNorm has a share, which is no affine map."""
        steps = self.steps()
        if steps < self.total_updates:
            raise ValueError(
                f"prepbn after {steps} of total_updates={self.total_updates} steps: it still is a mixture with LayerNorm, "
                "which is no affine map and cannot be folded"
            )
        scale, shift = super().scale_and_shift()
        return scale + self.alpha.detach().to(scale.dtype), shift

    def advance(self, part: str, state: State, sums: Sums, alpha_fwd: float) -> Dict[str, Tensor]:
        if part == "backward":
            return {}
        mean, var = self._mean_and_var(sums)
        unbiased = torch.where(sums.rows > 1, var * sums.rows / (sums.rows - 1).clamp(min=1), var)
        return self._moved(state, sums, alpha_fwd, {"running_mean": mean, "running_var": unbiased})

    def describe(self, state: State, forward: Sums, backward: Sums) -> Dict[str, Tensor]:
        _, var = self._mean_and_var(forward)
        inv2 = (var + self.eps).reciprocal()
        return self._describe(state, state["running_var"], forward, backward, inv2, inv2 * (var * inv2))
