"""Batch Renormalization: ``BatchRenorm``."""
from functools import partial
from typing import Dict, Optional

import torch
from torch import Tensor

from .. import functional
from .base import Device, State
from .checks import check_number, check_updates
from .formula import FormulaNorm
from .staging import Sums


class BatchRenorm(FormulaNorm):
    r"""Batch Renormalization (Ioffe, NeurIPS 2017, Algorithm 1): batch normalization whose output is, within bounds, that
    of the running statistics.

    With mean :math:`\mu` and standard deviation :math:`\sigma` of the non-padding rows, ``s_B`` = sigma + eps, and the
    running mean m and deviation s of before the step

    .. math::
        y = \gamma \Bigl( \frac{u - \mu}{s_B}\, r + d \Bigr) + \beta, \qquad
        r = \mathrm{clamp}(s_B / s,\ 1/r_{max},\ r_{max}), \qquad d = \mathrm{clamp}((\mu - m) / s,\ \pm d_{max})

    and no gradient through r and d, an exact one through mu and s_B. Until ``warmup_updates`` steps are taken r = 1 and
    d = 0: batch normalization. Then the bounds grow linearly, :math:`r_{max}` from 1 to ``r_max`` within ``r_updates``
    steps, :math:`d_{max}` from 0 to ``d_max`` within ``d_updates``. Evaluation is ``(u - m) / s``.

    With RunningStatistics, m and s take one step per optimizer step, exactly that of one batch of all rows, however these
    are cut. mu and s_B are those of the micro-batch in progress, of this process or, with ``sync="exact"``, of all: k ranks
    with ``exact`` are one large batch, k micro-batches are not.

    Args:
        dim: number of channels C
        eps: added to the standard deviation
        alpha_fwd: weight of the old value in the running mean and deviation, in [0, 1]
        warmup_updates: steps of batch normalization
        r_max: largest factor r in the end, 1 or more
        d_max: largest shift d in the end
        r_updates, d_updates: steps within which the bounds grow
        groups: channel groups of a layer scale before it, 0 for none (as published)
        affine: learn ``weight`` and ``bias``
        batch_first, layout: where the channels are, see :class:`~.layouts.Norm`
        device, dtype: of the parameters; statistics are on that device and float32 or wider

    Shape:
        - input and output: as ``layout`` says, or ``N x C``
        - ``padding_mask``: the input's shape without C, batch first; bool, True at padding

    Raises:
        ValueError: an argument is outside its range, or ``groups`` does not divide ``dim``
    """

    CHECKS = {
        **FormulaNorm.CHECKS,
        "r_max": partial(check_number, least=1.0),
        "d_max": partial(check_number, least=0.0),
        **dict.fromkeys(("warmup_updates", "r_updates", "d_updates"), check_updates),
    }
    STATISTICS = {"running_mean": 0.0, "running_std": 1.0}
    STEPS = {"forward": ("iters", "running_mean", "running_std"), "backward": ()}
    MOMENT = "running_std"
    ROOT = "deviation"

    running_mean: Tensor
    running_std: Tensor

    def __init__(
        self,
        dim: int,
        *,
        eps: float = 1e-3,
        alpha_fwd: float = 0.99,
        warmup_updates: int = 5000,
        r_max: float = 3.0,
        d_max: float = 5.0,
        r_updates: int = 35000,
        d_updates: int = 20000,
        groups: int = 0,
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
        self.warmup_updates = warmup_updates
        self.r_max = r_max
        self.d_max = d_max
        self.r_updates = r_updates
        self.d_updates = d_updates

    def extra_repr(self) -> str:
        return (
            f"{super().extra_repr()}, warmup_updates={self.warmup_updates}, r_max={self.r_max}, d_max={self.d_max}, "
            f"r_updates={self.r_updates}, d_updates={self.d_updates}"
        )

    def _bound(self, steps: Tensor, largest: float, updates: int) -> Tensor:
        """A bound that grows from 0 to ``largest`` after the warm-up."""
        return largest * ((steps - self.warmup_updates) / max(updates, 1e-6)).clamp(0.0, 1.0)

    def _normalized(self, moments: functional.Moments, state: State, *, recomputed: bool) -> Tensor:
        u = moments.u
        running_mean, running_std = (state[name].to(u.dtype) for name in ("running_mean", "running_std"))
        mean = functional.standing_in(moments, moments.mean, running_mean)
        std = functional.standing_in(moments, functional.root(moments.var) + self.eps, running_std)
        z = self._watched((u - mean) / std, moments)
        if not self._batch_alone:
            steps = state["iters"].to(u.dtype)
            r_max = 1.0 + self._bound(steps, self.r_max - 1.0, self.r_updates)
            d_max = self._bound(steps, self.d_max, self.d_updates)
            r = torch.clamp(std.detach() / running_std, 1.0 / r_max, r_max)
            d = torch.clamp((mean.detach() - running_mean) / running_std, -d_max, d_max)
            z = z * r + d
        return self._with_affine(z)

    def advance(self, part: str, state: State, sums: Sums, alpha_fwd: float) -> Dict[str, Tensor]:
        if part == "backward":
            return {}
        mean, var = self._mean_and_var(sums)
        return self._moved(state, sums, alpha_fwd, {"running_mean": mean, "running_std": var.sqrt() + self.eps})

    def describe(self, state: State, forward: Sums, backward: Sums) -> Dict[str, Tensor]:
        _, var = self._mean_and_var(forward)
        running_var = (state["running_std"] - self.eps).clamp(min=0).square()
        inv2 = (var.sqrt() + self.eps).square().reciprocal()
        return self._describe(state, running_var, forward, backward, inv2, inv2)
