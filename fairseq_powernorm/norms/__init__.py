"""Normalization layers: ``PowerNorm``, ``PowerNormV``, ``MaskedBatchNorm``, and the norms that they are compared with.

All are drop-in ``nn.Module``s called as ``norm(x, padding_mask=None)`` with ``x`` of shape ``T x B x C`` or ``N x C``
(``layout`` chooses others) and a bool mask of shape ``B x T`` (``N`` for two-dimensional input), True at padding.
They need torch and nothing else. Statistics are kept and computed in float32 (float64 for float64 input) whatever the dtype
of the input and of the parameters.

A norm with running statistics updates them with each training batch. If a training step is something else (several
batches, several processes, steps that are skipped), :class:`~fairseq_powernorm.statistics.RunningStatistics` takes over:
it gives each norm a :class:`Stage`, to which the norm adds its sums, and applies them once per step.
"""
from .ada import AdaNorm
from .base import RunningNorm
from .batch import MaskedBatchNorm
from .batch_renorm import BatchRenorm
from .group import GroupNorm, GroupScaleNorm
from .layer import LayerNorm, RMSNorm
from .layouts import LAYOUTS, Norm
from .masks import MaskSlot
from .pointwise import DynamicErf, DynamicTanh
from .power import VARIANTS, PowerNorm, SecondMomentNorm
from .power_v import PowerNormV
from .progressive import ProgressiveBatchNorm
from .registry import NORMS, build_norm, create_norm, default_groups, norm_options, norms_with, parse_norm
from .regularized import RegularizedBatchNorm, penalty
from .row import RowNorm
from .scale import ScaleNorm
from .staging import Stage, Sums, Switches
from .window import MovingAverageBatchNorm, UnifiedNorm

__all__ = [
    "LAYOUTS",
    "NORMS",
    "VARIANTS",
    "AdaNorm",
    "BatchRenorm",
    "DynamicErf",
    "DynamicTanh",
    "GroupNorm",
    "GroupScaleNorm",
    "LayerNorm",
    "MaskSlot",
    "MaskedBatchNorm",
    "MovingAverageBatchNorm",
    "Norm",
    "PowerNorm",
    "PowerNormV",
    "ProgressiveBatchNorm",
    "RMSNorm",
    "RegularizedBatchNorm",
    "RowNorm",
    "RunningNorm",
    "ScaleNorm",
    "SecondMomentNorm",
    "Stage",
    "Sums",
    "Switches",
    "UnifiedNorm",
    "build_norm",
    "create_norm",
    "default_groups",
    "norm_options",
    "norms_with",
    "parse_norm",
    "penalty",
]
