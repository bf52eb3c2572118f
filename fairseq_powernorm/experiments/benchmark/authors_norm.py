"""PN computed the way the authors' released layer computes it, as a measure for scripts/benchmark.py. Not for training.

It was written from a description of what that layer does: channels first in four dimensions, padding taken out by
indexing, every intermediate result a tensor of its own, buffers of shape (1, C, 1, 1) changed in each pass. A test
holds its arithmetic to that of ``PowerNorm(variant="reference")``.
"""

from typing import Any, Optional, Tuple

import torch
from torch import Tensor, nn


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        u: Tensor,
        weight: Tensor,
        bias: Tensor,
        valid_rows: Tensor,
        phi: Tensor,
        ema_gz: Tensor,
        alpha_fwd: float,
        alpha_bkw: float,
        eps: float,
    ) -> Tensor:
        channels = u.size(1)
        moment = (valid_rows * valid_rows).mean(dim=0).reshape(1, channels, 1, 1)
        z = u / (phi + eps).sqrt()
        y = weight.reshape(1, channels, 1, 1) * z + bias.reshape(1, channels, 1, 1)
        ctx.save_for_backward(z, moment, weight, ema_gz)
        ctx.settings = alpha_bkw, eps
        phi.copy_(alpha_fwd * phi + (1 - alpha_fwd) * moment)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tuple[Optional[Tensor], ...]:
        z, moment, weight, ema_gz = ctx.saved_tensors
        alpha_bkw, eps = ctx.settings
        dz = dy * weight.reshape(1, -1, 1, 1)
        g = dz - (1 - alpha_bkw) * ema_gz * z
        du = g / (moment + eps).sqrt()
        ema_gz.add_((g * z).mean(dim=3, keepdim=True).mean(dim=2, keepdim=True).mean(dim=0, keepdim=True))
        dweight = (dy * z).sum(dim=3).sum(dim=2).sum(dim=0)
        dbias = dy.sum(dim=3).sum(dim=2).sum(dim=0)
        return du, dweight, dbias, None, None, None, None, None, None


class AuthorsPowerNorm(nn.Module):
    """After its warm-up. x: T x B x C or N x C; padding_mask: B x T or N, True = padding."""

    running_phi: Tensor
    ema_gz: Tensor

    def __init__(
        self, dim: int, *, groups: int = 1, alpha_fwd: float = 0.9, alpha_bkw: float = 0.9, eps: float = 1e-5
    ) -> None:
        super().__init__()
        self.groups, self.alpha_fwd, self.alpha_bkw, self.eps = groups, alpha_fwd, alpha_bkw, eps
        self.weight, self.bias = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.zeros(dim))
        self.register_buffer("running_phi", torch.ones(1, dim, 1, 1))
        self.register_buffer("ema_gz", torch.zeros(1, dim, 1, 1))

    def forward(self, x: Tensor, padding_mask: Optional[Tensor] = None) -> Tensor:
        shape = x.shape
        if x.dim() == 2:
            x = x.unsqueeze(0)
            padding_mask = None if padding_mask is None else padding_mask.unsqueeze(1)
        length, batch, channels = x.shape
        grouped = x.view(length, batch, self.groups, channels // self.groups)
        moment = (grouped * grouped).mean(dim=3, keepdim=True)
        moment = moment.repeat(1, 1, 1, channels // self.groups)
        u = (grouped / torch.sqrt(moment + 1e-5)).view(length, batch, channels)
        valid_rows = u.clone() if padding_mask is None else u[~padding_mask.transpose(0, 1), :]
        valid_rows = valid_rows.reshape(-1, channels)
        first = u.permute(1, 2, 0).contiguous().unsqueeze(-1)
        if self.training:
            y: Tensor = _Function.apply(
                first, self.weight, self.bias, valid_rows.detach(), self.running_phi, self.ema_gz, self.alpha_fwd,
                self.alpha_bkw, self.eps,
            )
        else:
            z = first / (self.running_phi + self.eps).sqrt()
            y = self.weight.reshape(1, channels, 1, 1) * z + self.bias.reshape(1, channels, 1, 1)
        return y.squeeze(-1).permute(2, 0, 1).contiguous().view(shape)
