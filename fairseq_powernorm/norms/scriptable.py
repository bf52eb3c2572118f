"""The evaluation of a norm in the part of Python that ``torch.jit.script`` compiles."""
from typing import TYPE_CHECKING, Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.interface import LAYER_SCALE_EPS
from .layouts import Norm


def own_evaluation(norm: nn.Module, told_by: str) -> Optional[str]:
    """What of a norm's evaluation is its own and would be left out by what this package knows of it: a phrase, or None.

    That is a ``forward`` of the instance, or of a class derived outside of this package without the method ``told_by``.
    """
    if "forward" in vars(norm):
        return "has a forward of its own instance, as wrappers and accelerate's hooks give it"
    for kind in type(norm).__mro__:
        if told_by in vars(kind) or kind.__module__.startswith(f"{__package__}."):
            break
        own = [name for name in ("forward", "_normalize", "_evaluate") if name in vars(kind)]
        if own:
            return f"is a {kind.__name__}, which has {own[0]} of its own, but no {told_by}"
    return None


class Evaluation(Norm):
    """Evaluation of a norm with running statistics, with its parameters and buffers under their own names.

    ``torch.jit.script`` leaves it in the place of the norm in the model that it was given, too. There it refuses to train.

    Args:
        norm: in evaluation

    Shape:
        - input and output: those of ``norm``. A padding mask is accepted and not needed.

    Raises:
        RuntimeError: ``norm`` is in training, has a mask attached, or evaluates in a way of its own
    """

    if TYPE_CHECKING:  # the compiler would read annotations that are there
        moment: Tensor
        mean: Optional[Tensor]
        weight: Optional[nn.Parameter]
        bias: Optional[nn.Parameter]

    def __init__(self, norm: Any):
        if norm.training:
            raise RuntimeError(f"torch.jit.script of a {type(norm).__name__} in training: call eval() first")
        if getattr(norm.mask_slot, "owner", None) is not None:  # whose hooks would be compiled, too
            raise RuntimeError("torch.jit.script of a model with attach_mask: remove() that first, evaluation needs no mask")
        if (own := own_evaluation(norm, "__prepare_scriptable__")) is not None:
            raise RuntimeError(f"torch.jit.script would lose something of a norm that {own}")
        super().__init__(norm.dim, layout=norm.layout)
        for name in ("weight", "bias"):
            self.register_parameter(name, getattr(norm, name))
        for name, buffer in norm.named_buffers(recurse=False):
            self.register_buffer(name, buffer)
        #: the buffers that are divided by and subtracted, under a second name
        mean = norm.MEAN and getattr(norm, norm.MEAN)
        self.register_buffer("moment", getattr(norm, norm.MOMENT), persistent=False)
        self.register_buffer("mean", mean, persistent=False)
        self.root: str = norm.ROOT
        self.groups: int = norm.groups
        self.size: int = norm.dim // max(1, norm.groups)
        self.eps: float = norm.eps
        self.scale_eps: float = LAYER_SCALE_EPS
        self.train(mode=False)

    def train(self, mode: bool = True) -> "Evaluation":
        """See torch; raises RuntimeError for ``mode=True``."""
        if mode:
            raise RuntimeError(
                "torch.jit.script has put evaluations in place of the norms of the model that it was given, which cannot be "
                "trained: script copy.deepcopy(model), and go on with the model itself"
            )
        return super().train(mode)

    def _rows(self, x: Tensor) -> Tensor:
        """Rows after the layer scale, in float32 or float64."""
        u = x if x.dtype == torch.float64 else x.float()
        if self.groups > 0:
            shape = u.size()
            grouped = u.reshape(list(shape[:-1]) + [self.groups, self.size])
            u = F.rms_norm(grouped, [self.size], None, self.scale_eps).reshape(shape)
        return u

    def _by_running_statistics(self, u: Tensor) -> Tensor:
        if self.mean is not None:
            u = u - self.mean
        if self.root == "deviation":
            u = u / self.moment
        elif self.root == "clamped":
            u = u * torch.rsqrt(self.moment.clamp(min=self.eps))
        else:
            u = u * torch.rsqrt(self.moment + self.eps)
        if self.weight is not None:
            u = u * self.weight
        if self.bias is not None:
            u = u + self.bias
        return u

    def _normalize(self, x: Tensor, padding_mask: Optional[Tensor]) -> Tensor:
        return self._by_running_statistics(self._rows(x)).to(x.dtype)


class MixedEvaluation(Evaluation):
    """The same for :class:`~.progressive.ProgressiveBatchNorm`."""

    if TYPE_CHECKING:
        alpha: nn.Parameter
        layer_weight: Optional[nn.Parameter]
        layer_bias: Optional[nn.Parameter]
        iters: Tensor

    def __init__(self, norm: Any):
        super().__init__(norm)
        for name in ("alpha", "layer_weight", "layer_bias"):
            self.register_parameter(name, getattr(norm, name))
        self.total_updates: int = norm.total_updates

    def _normalize(self, x: Tensor, padding_mask: Optional[Tensor]) -> Tensor:
        u = self._rows(x)
        share = (1.0 - self.iters / self.total_updates).clamp(min=0.0)
        layer = F.layer_norm(u, [u.size(-1)], None, None, self.eps)
        if self.layer_weight is not None:
            layer = layer * self.layer_weight
        if self.layer_bias is not None:
            layer = layer + self.layer_bias
        y = share * layer + (1.0 - share) * (self._by_running_statistics(u) + self.alpha * u)
        return y.to(x.dtype)
