"""The base of the norms that look at one row at a time: ``RowNorm``.

They know no batch: training and evaluation are one function, padded rows are normalized like all others and touch none of
them, and the gradient is that of the function, so every transform of torch applies.
"""
from typing import TYPE_CHECKING, Dict, Optional, Tuple

import torch
from torch import Tensor, nn

from .base import Device
from .checks import check_dense, check_dim, check_dtype, check_flag, plain_number
from .layouts import Norm


def weight_and_bias(dim: int, *, affine: bool) -> Dict[str, Tuple[int, float]]:
    """The ``parameters`` of a :class:`RowNorm` with ``weight`` and ``bias``, both None without ``affine``."""
    check_flag("affine", affine)
    size = dim if affine else 0
    return {"weight": (size, 1.0), "bias": (size, 0.0)}


class RowNorm(Norm):
    """Base of norms without statistics, for which a row is ``C`` channels of one token.

    A subclass says in ``_formula`` what it computes, in float32 whatever the dtype of input and parameters (in float64 for
    float64 input): what overflows in half precision, such as the sum of the squares of a row, does so nowhere.

    Args:
        dim: number of channels C
        parameters: name -> size and initial value of what is learned; size 0: the parameter is None
        batch_first, layout: where the channels are, see :class:`~.layouts.Norm`
        device, dtype: of the parameters

    Raises:
        ValueError: an argument is outside its range; or ``forward`` is given an input or a mask that does not fit
    """

    if TYPE_CHECKING:  # torch.jit.script would read annotations that are there
        weight: Optional[nn.Parameter]
        bias: Optional[nn.Parameter]

    def __init__(
        self,
        dim: int,
        parameters: Dict[str, Tuple[int, float]],
        *,
        batch_first: bool = False,
        layout: Optional[str] = None,
        device: Device = None,
        dtype: Optional[torch.dtype] = None,
    ):
        super().__init__(dim, batch_first=batch_first, layout=layout)
        check_dim(dim)
        self._initial = {name: plain_number(value) for name, (_, value) in parameters.items()}
        with torch.inference_mode(mode=False):  # or they could never be trained
            for name, (size, _) in parameters.items():
                new = nn.Parameter(torch.empty(size, device=device, dtype=dtype)) if size else None
                self.register_parameter(name, new)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the parameters to what they were at the beginning."""
        self._reset_parameters()

    def first_values(self) -> Dict[str, float]:
        return self._initial

    def extra_repr(self) -> str:
        return ", ".join(part for part in (str(self.dim), super().extra_repr()) if part)

    def _normalize(self, x: Tensor, padding_mask: Optional[Tensor]) -> Tensor:
        if not torch.jit.is_scripting():
            self._check(x)
            self._check_mask(padding_mask, x)
            swept = None if self.training else self._sweep(x)
            if swept is not None:
                return swept
        u = x if x.dtype == torch.float64 else x.float()
        return self._formula(u).to(x.dtype)

    def _check(self, x: Tensor) -> None:
        check_dense(x)
        if x.dim() < 1 or x.size(-1) != self.dim:
            raise ValueError(self._wrong_shape(x))
        check_dtype(x)

    def _sweep(self, x: Tensor) -> Optional[Tensor]:
        """The evaluation of rows ``... x C`` by a kernel; None where there is none, and ``_formula`` is to compute it."""
        return None

    def _formula(self, u: Tensor) -> Tensor:
        """The norm of rows ``... x C``, float32 or float64, in that dtype; never ``u`` itself."""
        raise NotImplementedError

    def _with_affine(self, z: Tensor) -> Tensor:
        """``weight * z + bias``, without what is None."""
        weight, bias = self.weight, self.bias
        if weight is not None:
            z = z * weight.to(z.dtype)
        if bias is not None:
            z = z + bias.to(z.dtype)
        return z
