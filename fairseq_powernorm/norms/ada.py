"""AdaNorm: centred and divided, scaled by how far a channel stands out, nothing to learn."""
from typing import Optional

import torch
from torch import Tensor

from .base import Device
from .row import RowNorm, check_number


class AdaNorm(RowNorm):
    r"""AdaNorm (Xu et al., NeurIPS 2019, section 4): LayerNorm without ``weight`` and ``bias``, times ``scale * (1 - k * z)``.

    With ``c`` the row minus its mean and ``s`` its standard deviation over channels (unbiased: the sum of ``c^2`` over C - 1)

    .. math:: y = \text{scale} \cdot \frac{c - c \cdot \mathrm{sg}(k\, c / (s + \epsilon))}{s + \epsilon}

    No gradient goes through sg. So the second derivative is that of this gradient's own formula, with sg constant in it.

    Args:
        dim: number of channels C, 2 or more
        eps: added to the standard deviation, above 0
        scale: factor of the output, above 0; the paper takes 1 to 2
        k: how much a channel is damped that stands out, 0 or more
        batch_first, layout: where the channels are, see :class:`~.layouts.Norm`
        device, dtype: accepted, as there are no parameters

    Shape:
        - input and output: ``T x B x C`` or ``N x C``, or as ``layout`` says

    Raises:
        ValueError: an argument is outside its range; or ``forward`` is given an input or a mask that does not fit
    """

    def __init__(
        self,
        dim: int,
        *,
        eps: float = 1e-5,
        scale: float = 1.0,
        k: float = 0.1,
        batch_first: bool = False,
        layout: Optional[str] = None,
        device: Device = None,
        dtype: Optional[torch.dtype] = None,
    ):
        if dim == 1:
            raise ValueError("dim=1: must be 2 or more, as one channel has no unbiased standard deviation")
        check_number("eps", eps, above=0.0)
        check_number("scale", scale, above=0.0)
        if not 0.0 <= k < float("inf"):
            raise ValueError(f"k={k!r}: must be a finite number, zero or positive")
        super().__init__(dim, {}, batch_first=batch_first, layout=layout, device=device, dtype=dtype)
        self.eps = eps
        self.scale = scale
        self.k = k

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, eps={self.eps}, scale={self.scale}, k={self.k}"

    def _formula(self, u: Tensor) -> Tensor:
        c = u - u.mean(-1, keepdim=True)
        # by vector_norm, whose gradient at 0 is 0: constant rows
        s = torch.linalg.vector_norm(c, dim=-1, keepdim=True) * (self.dim - 1) ** -0.5
        z = c / (s + self.eps)
        return self.scale * (z - z * (self.k * z).detach())
