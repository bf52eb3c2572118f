"""ScaleNorm: a row divided by its length, times one number that is learned."""
from functools import partial
from typing import Optional

import torch
from torch import Tensor

from .base import Device
from .checks import check_dim, check_flag, check_number
from .row import RowNorm


class ScaleNorm(RowNorm):
    r"""ScaleNorm (Nguyen & Salazar, IWSLT 2019): ``weight * x / max(|x|, eps)`` for each row ``x``.

    Args:
        dim: number of channels C
        eps: smallest length that is divided by, above 0
        affine: learn ``weight``, one number, which begins at the square root of C; else it stays there
        batch_first, layout: where the channels are, see :class:`~.layouts.Norm`
        device, dtype: of the parameter

    Shape:
        - input and output: ``T x B x C`` or ``N x C``, or as ``layout`` says

    Raises:
        ValueError: an argument is outside its range; or ``forward`` is given an input or a mask that does not fit
    """

    CHECKS = {**RowNorm.CHECKS, "eps": partial(check_number, above=0.0)}

    def __init__(
        self,
        dim: int,
        *,
        eps: float = 1e-5,
        affine: bool = True,
        batch_first: bool = False,
        layout: Optional[str] = None,
        device: Device = None,
        dtype: Optional[torch.dtype] = None,
    ):
        check_dim(dim)
        check_flag("affine", affine)
        # one element, not a scalar, which sharding does not take
        parameters = {"weight": (1 if affine else 0, dim**0.5)}
        super().__init__(dim, parameters, batch_first=batch_first, layout=layout, device=device, dtype=dtype)
        self.eps = eps

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, eps={self.eps}, affine={self.weight is not None}"

    def _formula(self, u: Tensor) -> Tensor:
        # the square is clamped, not its root: at zero a root has no derivative, and vector_norm no second one
        z = u * torch.rsqrt(u.square().sum(-1, keepdim=True).clamp(min=max(self.eps**2, 1e-37)))
        return z * (self.dim**0.5 if self.weight is None else self.weight.to(u.dtype))
