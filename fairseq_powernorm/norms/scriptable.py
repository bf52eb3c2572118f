"""The evaluation of a norm in the part of Python that ``torch.jit.script`` compiles."""
from typing import TYPE_CHECKING, Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.interface import LAYER_SCALE_EPS
from .layouts import Norm


class Evaluation(Norm):
    """Evaluation of a norm with running statistics, with its parameters and buffers under their own names.

    Args:
        norm: in evaluation

    Shape:
        - input and output: those of ``norm``. A padding mask is accepted and not needed.
    """

    if TYPE_CHECKING:  # the compiler would read annotations that are there
        moment: Tensor
        mean: Optional[Tensor]
        weight: Optional[nn.Parameter]
        bias: Optional[nn.Parameter]

    def __init__(self, norm: Any):
        super().__init__(norm.dim, layout=norm.layout)
        for name in ("weight", "bias"):
            self.register_parameter(name, getattr(norm, name))
        for name, buffer in norm.named_buffers(recurse=False):
            self.register_buffer(name, buffer)
        #: the buffer of the second moment or variance, and whether ``running_mean`` is subtracted
        self.centred = hasattr(norm, "running_mean")
        self.register_buffer("moment", norm.running_var if self.centred else norm.running_phi, persistent=False)
        self.register_buffer("mean", norm.running_mean if self.centred else None, persistent=False)
        self.groups: int = norm.groups
        self.size: int = norm.dim // max(1, norm.groups)
        self.eps: float = norm.eps
        self.scale_eps: float = LAYER_SCALE_EPS
        self.train(mode=False)

    def _normalize(self, x: Tensor, padding_mask: Optional[Tensor]) -> Tensor:
        u = x if x.dtype == torch.float64 else x.float()
        if self.groups > 0:
            shape = u.size()
            grouped = u.reshape(list(shape[:-1]) + [self.groups, self.size])
            u = F.rms_norm(grouped, [self.size], None, self.scale_eps).reshape(shape)
        if self.mean is not None:
            u = u - self.mean
        u = u * torch.rsqrt(self.moment + self.eps)
        if self.weight is not None:
            u = u * self.weight
        if self.bias is not None:
            u = u + self.bias
        return u.to(x.dtype)
