"""AdaNorm: centred and divided, scaled by how far a channel stands out, nothing to learn."""
from functools import partial
from typing import Optional

import torch
from torch import Tensor

from .base import Device
from .checks import check_dim, check_number
from .row import RowNorm


class AdaNorm(RowNorm):
    r"""AdaNorm (Xu et al., NeurIPS 2019, section 4): LayerNorm's ``z`` times ``scale * (1 - k * z)``, nothing to learn.

    With ``c`` the row minus its mean and ``s`` its standard deviation over channels (unbiased: by C - 1)

    .. math:: y = \text{scale} \cdot \frac{c - c \cdot \mathrm{sg}(k\, c / (s + \epsilon))}{s + \epsilon}

    No gradient goes through sg: what comes back is no derivative of the output, and a second derivative takes sg for a
    constant, too.

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

    CHECKS = {
        **RowNorm.CHECKS,
        **dict.fromkeys(("eps", "scale"), partial(check_number, above=0.0)),
        "k": partial(check_number, least=0.0),
    }

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
        check_dim(dim)
        if dim == 1:
            raise ValueError("dim=1: must be 2 or more, as one channel has no unbiased standard deviation")
        super().__init__(dim, {}, batch_first=batch_first, layout=layout, device=device, dtype=dtype)
        self.eps = eps
        self.scale = scale
        self.k = k

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, eps={self.eps}, scale={self.scale}, k={self.k}"

    def _formula(self, u: Tensor) -> Tensor:
        c = u - u.mean(-1, keepdim=True)
        var = c.square().sum(-1, keepdim=True) / (self.dim - 1)
        varies = var > 0.0  # in a constant row the root has no derivative: it is a constant, too
        s = torch.where(varies, var, 1.0).sqrt() * varies
        z = c / (s + self.eps)
        return self.scale * (z - z * (self.k * z).detach())
