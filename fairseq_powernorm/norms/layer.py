"""The norms over a row's own channels, which torch computes: LayerNorm and RMSNorm.

They take a padding mask as the others do, check it, and do not need it.
"""
from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import Device
from .masks import check_mask


class LayerNorm(nn.LayerNorm):
    """torch's LayerNorm over the last dimension.

    Args:
        dim: number of channels C
        eps: added to the variance
        affine: learn ``weight`` and ``bias``
        batch_first: the input is ``B x T x C``, not ``T x B x C``
        device, dtype: of the parameters

    Raises:
        ValueError: ``forward`` is given a padding mask that does not fit
    """

    def __init__(
        self,
        dim: int,
        *,
        eps: float = 1e-5,
        affine: bool = True,
        batch_first: bool = False,
        device: Device = None,
        dtype: Optional[torch.dtype] = None,
    ):
        super().__init__(dim, eps=eps, elementwise_affine=affine, device=device, dtype=dtype)
        self.batch_first = batch_first

    def forward(self, x: Tensor, padding_mask: Optional[Tensor] = None) -> Tensor:
        if not torch.jit.is_scripting():
            check_mask(padding_mask, x, batch_first=self.batch_first)
        return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)


class RMSNorm(nn.RMSNorm):
    """torch's RMSNorm over the last dimension (no bias).

    Args:
        dim: number of channels C
        eps: added to the mean square
        affine: learn ``weight``
        batch_first: the input is ``B x T x C``, not ``T x B x C``
        device, dtype: of the parameters

    Raises:
        ValueError: ``forward`` is given a padding mask that does not fit
    """

    def __init__(
        self,
        dim: int,
        *,
        eps: float = 1e-5,
        affine: bool = True,
        batch_first: bool = False,
        device: Device = None,
        dtype: Optional[torch.dtype] = None,
    ):
        super().__init__(dim, eps=eps, elementwise_affine=affine, device=device, dtype=dtype)
        self.batch_first = batch_first

    def forward(self, x: Tensor, padding_mask: Optional[Tensor] = None) -> Tensor:
        if not torch.jit.is_scripting():
            check_mask(padding_mask, x, batch_first=self.batch_first)
        # torch 2.4 gives the wider dtype of input and weight
        return F.rms_norm(x, self.normalized_shape, self.weight, self.eps).to(x.dtype)
