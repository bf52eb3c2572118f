"""The norms over a row's own channels, which torch computes: LayerNorm, and RMSNorm but for its evaluation on a CPU.

They take a padding mask as the others do, check it, and do not need it.
"""
from functools import partial
from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import kernels
from .base import Device
from .checks import check_dim, check_flag, check_number
from .layouts import Norm


def _check_eps(name: str, value: Any) -> None:
    """Raise ValueError for an eps that torch's RMSNorm cannot have; None is the smallest step of the input's dtype."""
    if value is not None:
        check_number(name, value, least=0.0)


class LayerNorm(Norm, nn.LayerNorm):
    """torch's LayerNorm over the last dimension.

    Args:
        dim: number of channels C
        eps: added to the variance
        affine: learn ``weight`` and ``bias``
        batch_first, layout: where the channels are, see :class:`~.layouts.Norm`
        device, dtype: of the parameters

    Raises:
        ValueError: an argument is outside its range; or ``forward`` is given a padding mask that does not fit
    """

    CHECKS = {**Norm.CHECKS, "eps": partial(check_number, least=0.0)}

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
        super().__init__(
            dim, batch_first=batch_first, layout=layout, normalized_shape=dim, eps=eps, elementwise_affine=affine,
            device=device, dtype=dtype,
        )  # fmt: skip

    def _normalize(self, x: Tensor, padding_mask: Optional[Tensor]) -> Tensor:
        if not torch.jit.is_scripting():
            self._check_mask(padding_mask, x)
        return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)


class RMSNorm(Norm, nn.RMSNorm):
    """torch's RMSNorm over the last dimension (no bias); in evaluation on a CPU by one sweep over the rows.

    Args:
        dim: number of channels C
        eps: added to the mean square
        affine: learn ``weight``
        batch_first, layout: where the channels are, see :class:`~.layouts.Norm`
        device, dtype: of the parameters

    Raises:
        ValueError: an argument is outside its range; or ``forward`` is given a padding mask that does not fit
    """

    CHECKS = {**Norm.CHECKS, "eps": _check_eps}

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
        super().__init__(
            dim, batch_first=batch_first, layout=layout, normalized_shape=dim, eps=eps, elementwise_affine=affine,
            device=device, dtype=dtype,
        )  # fmt: skip

    def _normalize(self, x: Tensor, padding_mask: Optional[Tensor]) -> Tensor:
        if not torch.jit.is_scripting():
            self._check_mask(padding_mask, x)
            if not self.training and not x.is_nested and x.shape[-1:] == self.normalized_shape:
                swept = kernels.layer_scale(x, self.weight, None, 1, self.eps)
                if swept is not None:
                    return swept
            if torch.jit.is_tracing() and torch.onnx.is_in_onnx_export():  # which has no rms_norm
                eps = torch.finfo(x.dtype).eps if self.eps is None else self.eps
                return kernels.eager.evaluate(x, self.weight, None, None, 1, eps)
        # torch 2.4 gives the wider dtype of input and weight
        return F.rms_norm(x, self.normalized_shape, self.weight, self.eps).to(x.dtype)
