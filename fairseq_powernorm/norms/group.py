"""The norms over the channel groups of a row: ``GroupScaleNorm`` (PN's layer scale, alone) and ``GroupNorm``."""
from functools import partial
from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import kernels
from ..kernels.interface import LAYER_SCALE_EPS
from .base import Device
from .checks import check_number, is_count
from .row import RowNorm, weight_and_bias


class _Grouped(RowNorm):
    """Base of both: groups, ``weight`` and ``bias``."""

    CHECKS = {**RowNorm.CHECKS, "eps": partial(check_number, above=0.0)}
    #: fewest channels in a group
    SMALLEST = 1

    def __init__(
        self,
        dim: int,
        *,
        eps: float,
        groups: int,
        affine: bool,
        batch_first: bool,
        layout: Optional[str],
        device: Device,
        dtype: Optional[torch.dtype],
    ):
        super().__init__(
            dim, weight_and_bias(dim, affine=affine), batch_first=batch_first, layout=layout, device=device, dtype=dtype
        )
        self.eps = eps
        self.groups = groups

    @classmethod
    def default_groups(cls, heads: int, **options: object) -> int:
        """Groups in a model with that many attention heads."""
        return heads

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, eps={self.eps}, groups={self.groups}, affine={self.weight is not None}"

    def _check_setting(self, name: str, value: Any) -> None:
        smallest = self.SMALLEST
        if name == "groups" and (not is_count(value, least=1) or self.dim % value or self.dim // value < smallest):
            valid = [g for g in range(1, self.dim // smallest + 1) if self.dim % g == 0]
            size = f" into groups of {smallest} or more" if smallest > 1 else ""
            raise ValueError(f"groups={value!r}: must divide the {self.dim} channels{size}, one of {valid}")
        super()._check_setting(name, value)

    def _by_group(self, u: Tensor) -> Tensor:
        """``... x C`` -> ``... x groups x C / groups``"""
        return u.reshape(list(u.size())[:-1] + [self.groups, self.dim // self.groups])


class GroupScaleNorm(_Grouped):
    r"""The layer scale that PN begins with, alone: a row divided by the root mean square of each of its channel groups.

    .. math:: y = \gamma \odot \frac{x}{\sqrt{\text{mean of } x^2 \text{ over the channel group} + \epsilon}} + \beta

    The released code of Shen et al. (ICML 2020) has it before PN (``GroupScaling1D``): the difference to this norm is what
    PN adds to its own layer scale. With one group and no bias it is RMSNorm.

    Args:
        dim: number of channels C
        eps: added to the mean square, above 0
        groups: channel groups, a divisor of C
        affine: learn ``weight`` and ``bias``
        batch_first, layout: where the channels are, see :class:`~.layouts.Norm`
        device, dtype: of the parameters

    Shape:
        - input and output: ``T x B x C`` or ``N x C``, or as ``layout`` says

    Raises:
        ValueError: an argument is outside its range; or ``forward`` is given an input or a mask that does not fit
    """

    def __init__(
        self,
        dim: int,
        *,
        eps: float = LAYER_SCALE_EPS,
        groups: int = 1,
        affine: bool = True,
        batch_first: bool = False,
        layout: Optional[str] = None,
        device: Device = None,
        dtype: Optional[torch.dtype] = None,
    ):
        super().__init__(
            dim, eps=eps, groups=groups, affine=affine, batch_first=batch_first, layout=layout, device=device,
            dtype=dtype,
        )  # fmt: skip

    def _sweep(self, x: Tensor) -> Optional[Tensor]:
        return kernels.layer_scale(x, self.weight, self.bias, self.groups, self.eps)

    def _formula(self, u: Tensor) -> Tensor:
        grouped = self._by_group(u)
        z = grouped * torch.rsqrt(grouped.square().mean(-1, keepdim=True) + self.eps)
        return self._with_affine(z.reshape(u.shape))


class GroupNorm(_Grouped):
    r"""Group normalization (Wu & He, ECCV 2018, section 3.1) of a token: LayerNorm over each channel group of a row.

    .. math:: y = \gamma \odot \frac{x - \mu}{\sqrt{\sigma^2 + \epsilon}} + \beta, \qquad
        \mu, \sigma^2: \text{ mean and biased variance of the row over the channel group}

    No statistic spans several tokens, as it does in images: what a decoder has not seen yet has no influence. With one
    group it is LayerNorm.

    Args:
        dim: number of channels C
        eps: added to the variance, above 0
        groups: channel groups, of 2 channels or more each (one channel minus its own mean is 0)
        affine: learn ``weight`` and ``bias``
        batch_first, layout: where the channels are, see :class:`~.layouts.Norm`
        device, dtype: of the parameters

    Shape:
        - input and output: ``T x B x C`` or ``N x C``, or as ``layout`` says

    Raises:
        ValueError: an argument is outside its range; or ``forward`` is given an input or a mask that does not fit
    """

    SMALLEST = 2

    def __init__(
        self,
        dim: int,
        *,
        eps: float = 1e-5,
        groups: int = 1,
        affine: bool = True,
        batch_first: bool = False,
        layout: Optional[str] = None,
        device: Device = None,
        dtype: Optional[torch.dtype] = None,
    ):
        super().__init__(
            dim, eps=eps, groups=groups, affine=affine, batch_first=batch_first, layout=layout, device=device,
            dtype=dtype,
        )  # fmt: skip

    def _formula(self, u: Tensor) -> Tensor:
        grouped = self._by_group(u)
        return self._with_affine(F.layer_norm(grouped, [self.dim // self.groups], None, None, self.eps).reshape(u.shape))
