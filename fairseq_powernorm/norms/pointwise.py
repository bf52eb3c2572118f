"""The layers that take a norm's place without statistics of any kind: ``DynamicTanh`` and ``DynamicErf``."""
from typing import TYPE_CHECKING, Optional

import torch
from torch import Tensor, nn

from .base import Device
from .checks import check_number
from .row import RowNorm, weight_and_bias


class DynamicTanh(RowNorm):
    r"""DyT, dynamic tanh (Zhu et al., CVPR 2025, section 4): ``weight * tanh(alpha * x) + bias``.

    Args:
        dim: number of channels C
        alpha: the scalar ``alpha``, which is learned, at the beginning; above 0
        affine: learn ``weight`` and ``bias``
        batch_first, layout: where the channels are, see :class:`~.layouts.Norm`
        device, dtype: of the parameters

    Shape:
        - input and output: ``T x B x C`` or ``N x C``, or as ``layout`` says

    Raises:
        ValueError: an argument is outside its range; or ``forward`` is given an input or a mask that does not fit
    """

    if TYPE_CHECKING:  # torch.jit.script would read annotations that are there
        alpha: nn.Parameter

    def __init__(
        self,
        dim: int,
        *,
        alpha: float = 0.5,
        affine: bool = True,
        batch_first: bool = False,
        layout: Optional[str] = None,
        device: Device = None,
        dtype: Optional[torch.dtype] = None,
    ):
        check_number("alpha", alpha, above=0.0)
        super().__init__(
            dim, {"alpha": (1, alpha), **weight_and_bias(dim, affine=affine)}, batch_first=batch_first, layout=layout,
            device=device, dtype=dtype,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, alpha={self._initial['alpha']} at first, affine={self.weight is not None}"

    def _formula(self, u: Tensor) -> Tensor:
        return self._with_affine(torch.tanh(self.alpha.to(u.dtype) * u))


class DynamicErf(RowNorm):
    r"""Derf, dynamic erf (Chen et al., 2025): ``weight * erf(alpha * x + shift) + bias``.

    Args:
        dim: number of channels C
        alpha: the scalar ``alpha``, which is learned, at the beginning; above 0
        shift: the scalar ``shift``, which is learned, at the beginning
        affine: learn ``weight`` and ``bias``
        batch_first, layout: where the channels are, see :class:`~.layouts.Norm`
        device, dtype: of the parameters

    Shape:
        - input and output: ``T x B x C`` or ``N x C``, or as ``layout`` says

    Raises:
        ValueError: an argument is outside its range; or ``forward`` is given an input or a mask that does not fit
    """

    if TYPE_CHECKING:  # torch.jit.script would read annotations that are there
        alpha: nn.Parameter
        shift: nn.Parameter

    def __init__(
        self,
        dim: int,
        *,
        alpha: float = 0.5,
        shift: float = 0.0,
        affine: bool = True,
        batch_first: bool = False,
        layout: Optional[str] = None,
        device: Device = None,
        dtype: Optional[torch.dtype] = None,
    ):
        check_number("alpha", alpha, above=0.0)
        check_number("shift", shift)
        super().__init__(
            dim, {"alpha": (1, alpha), "shift": (1, shift), **weight_and_bias(dim, affine=affine)}, batch_first=batch_first,
            layout=layout, device=device, dtype=dtype,
        )  # fmt: skip

    def extra_repr(self) -> str:
        first = f"alpha={self._initial['alpha']} and shift={self._initial['shift']} at first"
        return f"{super().extra_repr()}, {first}, affine={self.weight is not None}"

    def _formula(self, u: Tensor) -> Tensor:
        return self._with_affine(torch.special.erf(self.alpha.to(u.dtype) * u + self.shift.to(u.dtype)))
