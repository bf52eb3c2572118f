"""Autograd functions of the norms. They hold no state and make no choice of policy.

The running statistics come in as arguments, the batch's statistics go out through the function ``collect``: those of the
forward pass as soon as they are known, those of the backward pass when it runs. A function ``reduce``, where one is given,
turns the sums of this process into those of all processes that share a batch, forward and backward: statistics and
gradients are then those of the whole batch.

Gradients are returned in the precision of the computation; autograd casts them to the dtypes of the parameters.
"""
from ..kernels.eager import layer_scale
from ..kernels.interface import BatchSpec, BatchStep, PowerNormSpec
from .batch import batch_norm, batch_norm_formula, native_batch_norm
from .common import Collect, Reduce, in_transform, saved_tensors_are_hooked, unwrapped
from .evaluation import running_norm
from .moments import Moments, batch_moments, output_like, root, standing_in, sum_rows
from .power import NO_STAGE, StageSums, native_power_norm, power_norm
from .window import WindowSpec, WindowState, gradient_moment, put, slots, window_norm

__all__ = [
    "NO_STAGE",
    "BatchSpec",
    "BatchStep",
    "Collect",
    "Moments",
    "PowerNormSpec",
    "Reduce",
    "WindowSpec",
    "WindowState",
    "batch_moments",
    "StageSums",
    "batch_norm",
    "batch_norm_formula",
    "gradient_moment",
    "in_transform",
    "layer_scale",
    "output_like",
    "native_batch_norm",
    "native_power_norm",
    "power_norm",
    "put",
    "root",
    "running_norm",
    "saved_tensors_are_hooked",
    "standing_in",
    "sum_rows",
    "slots",
    "unwrapped",
    "window_norm",
]
