"""Batch normalization that knows padding: ``MaskedBatchNorm``."""
from typing import Any, Dict, Mapping, Optional, Tuple

import torch
from torch import Tensor

from .. import functional
from ..kernels import eager, memory
from .base import Device, State
from .checks import check_choice
from .distances import discrepancy, size_of
from .exact import ExactNorm
from .masks import valid_rows
from .staging import Sums

VARIANTS = ("masked", "reference")
#: weight of the old value in the running statistics: torch's default, and the authors'
ALPHA = {"masked": 0.9, "reference": 0.95}


class MaskedBatchNorm(ExactNorm):
    r"""Batch normalization with statistics over non-padding rows, running ones in evaluation.

    Without a mask it computes what ``torch.nn.BatchNorm1d(dim, momentum=1 - alpha_fwd)`` computes on the
    rows (after the layer scale, if ``groups`` is not 0): biased variance in training, unbiased in ``running_var``.

    ``variant="masked"`` takes mean and variance over the non-padding rows. ``variant="reference"`` is the arithmetic of the
    authors' released code, which made the BN rows of the paper's tables (34.4 and 28.2 BLEU): a layer scale over all
    channels, momentum 0.05, and padding filled with the mean of the other rows. So with L rows that count among n

    .. math::
        \mu = \frac1L \sum_{\text{valid}} u, \qquad \sigma^2 = \frac1n \sum_{\text{valid}} (u - \mu)^2, \qquad
        \text{running variance} \leftarrow 0.95\, (\cdot) + 0.05\, \tfrac{n}{n - 1} \sigma^2

    and the output at padding is ``bias``. If a mask is given in evaluation, its padding is filled, too.

    Args:
        dim: number of channels C
        eps: added to the variance under the root
        alpha_fwd: weight of the old value in the running mean and variance, in [0, 1] (``masked``: 0.9, ``reference``: 0.95)
        groups: channel groups of the layer scale before it, 0 for none
        variant: ``masked`` or ``reference``
        affine: learn ``weight`` and ``bias``
        batch_first, layout: where the channels are, see :class:`~.layouts.Norm`
        device, dtype: of the parameters; statistics are on that device and float32 or wider

    Shape:
        - input and output: as ``layout`` says, or ``N x C``
        - ``padding_mask``: the input's shape without C, batch first; bool, True at padding

    Raises:
        ValueError: an argument is outside its range, or ``groups`` does not divide ``dim``
    """

    VARIANTS = VARIANTS
    MEAN, MOMENT = "running_mean", "running_var"
    STATISTICS = {"running_mean": 0.0, "running_var": 1.0}
    STEPS = {"forward": ("iters", "running_mean", "running_var"), "backward": ()}

    running_mean: Tensor
    running_var: Tensor

    def __init__(
        self,
        dim: int,
        *,
        eps: float = 1e-5,
        alpha_fwd: Optional[float] = None,
        groups: int = 1,
        variant: str = "masked",
        affine: bool = True,
        batch_first: bool = False,
        layout: Optional[str] = None,
        device: Device = None,
        dtype: Optional[torch.dtype] = None,
    ):
        check_choice("variant", variant, VARIANTS)
        alpha = ALPHA[variant] if alpha_fwd is None else alpha_fwd
        super().__init__(
            dim, eps=eps, alpha_fwd=alpha, groups=groups, affine=affine, batch_first=batch_first,
            layout=layout, device=device, dtype=dtype,
        )
        self.variant = variant

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, variant={self.variant}"

    @classmethod
    def default_groups(cls, heads: int, **options: object) -> int:
        """Groups in a model with that many attention heads: the authors' BN has one."""
        return 1 if options.get("variant") == "reference" else super().default_groups(heads)

    @property
    def SUMS(self) -> Mapping[str, Tuple[str, ...]]:  # type: ignore[override]
        forward = ("u", "u^2", "rows of any kind") if self.variant == "reference" else ("u", "u^2")
        return {"forward": forward, "backward": ("weight * dy", "weight * dy * z")}

    def _load_from_state_dict(self, state_dict: Dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        tracked = state_dict.pop(f"{prefix}num_batches_tracked", None)  # of torch's batch norms, and the authors'
        if tracked is not None:
            state_dict.setdefault(f"{prefix}iters", tracked)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _evaluate(self, x: Tensor, padding_mask: Optional[Tensor]) -> Tensor:
        buffers, rows, groups = self._buffers, x, self.groups
        if self.variant == "reference" and padding_mask is not None:
            rows = self._filled(x, valid_rows(padding_mask, transposed=x.dim() == 3 and self.layout == "time_first"))
            groups = 0
        y = functional.running_norm(
            rows, *self._affine(), buffers["running_var"], groups, self.eps, buffers["running_mean"]
        )
        return memory.view_channels_second(y, x) if self._channels_second(x) else y

    def _filled(self, x: Tensor, valid: Tensor) -> Tensor:
        """``x`` after the layer scale, padding replaced by the mean of the other rows."""
        u = functional.layer_scale(x.reshape(-1, self.dim).to(eager.compute_dtype(x)), self.groups)
        mean = u.masked_fill(valid.logical_not().unsqueeze(1), 0.0).sum(0) / valid.sum().clamp(min=1)
        return torch.where(valid.unsqueeze(1), u, mean).view(x.shape).to(x.dtype)

    def scale_and_shift(self) -> Tuple[Tensor, Tensor]:
        return self._scale_and_shift(self.running_var, self.running_mean)

    def _batch_arguments(self) -> Tuple[Optional[Tensor], Tensor, functional.BatchSpec]:
        spec = functional.BatchSpec(self.groups, self.eps, centre=True, fill=self.variant == "reference")
        return self.running_mean, self.running_var, spec

    def _takes_known_step(self) -> bool:
        rule = type(self)
        return rule.advance is MaskedBatchNorm.advance and rule.step_ is MaskedBatchNorm.step_

    def advance(self, part: str, state: State, sums: Sums, alpha_fwd: float) -> Dict[str, Tensor]:
        if part == "backward":
            return {}
        mean, var, number = self._moments(sums)
        unbiased = torch.where(number > 1, var * number / (number - 1).clamp(min=1), var)
        new = {"iters": state["iters"] + 1}
        for name, batch in (("running_mean", mean), ("running_var", unbiased)):
            old = state[name]
            value = alpha_fwd * old + (1.0 - alpha_fwd) * batch
            new[name] = torch.where(sums.rows > 0, eager.finite_or(value, old), old)
        return new

    def _moments(self, forward: Sums) -> Tuple[Tensor, Tensor, Tensor]:
        """Mean and biased variance, and the number of rows that the variance is taken over."""
        if self.variant == "masked":
            mean, square = forward.means()
            return mean, (square - mean.square()).clamp(min=0), forward.rows
        total, square, number = forward.sums
        mean = total / forward.rows.clamp(min=1)
        return mean, ((square - total * mean) / number.clamp(min=1)).clamp(min=0), number

    def describe(self, state: State, forward: Sums, backward: Sums) -> Dict[str, Tensor]:
        (mean, var, _), (grad, grad_z) = self._moments(forward), backward.means()
        inv2 = 1.0 / (var + self.eps)
        return {
            "distance_mean": size_of(mean - state["running_mean"]),
            "distance_var": size_of(var - state["running_var"]),
            "size_mean": size_of(state["running_mean"]),
            "size_var": size_of(state["running_var"]),
            "gradient_mean": (grad.square() * inv2).sum(-1).sqrt(),
            "gradient_var": (grad_z.square() * inv2 * (var * inv2)).sum(-1).sqrt(),
            **discrepancy(
                (var + self.eps).sqrt(), (state["running_var"] + self.eps).sqrt(), mean, state["running_mean"]
            ),
        }
