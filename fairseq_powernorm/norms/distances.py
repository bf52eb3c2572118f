"""How far the statistics of a step are from the running ones: what ``describe`` of the norms says."""
from typing import Dict, Optional

import torch
from torch import Tensor


def size_of(x: Tensor) -> Tensor:
    """Euclidean norm over channels divided by their number, ``... x C -> ...``."""
    norm: Tensor = torch.linalg.vector_norm(x, dim=-1)
    return norm / x.size(-1)


def discrepancy(
    deviation: Tensor, running_deviation: Tensor, mean: Optional[Tensor] = None, running_mean: Optional[Tensor] = None
) -> Dict[str, Tensor]:
    """The training-inference discrepancy of Wang et al. (NeurIPS 2022): how far evaluation is from this step's training.

    Args:
        deviation, running_deviation: ``... x C``, what training divides by and what evaluation would
        mean, running_mean: what they subtract; None in norms that subtract nothing

    Returns:
        ``discrepancy_mean``: distance of the means in deviations of the batch, and ``discrepancy_std``: relative difference
        of the deviations; both are means over channels (leading dimensions stay)
    """
    found = {"discrepancy_std": (running_deviation / deviation - 1.0).abs().mean(-1)}
    if mean is not None and running_mean is not None:
        found["discrepancy_mean"] = ((running_mean - mean).abs() / deviation).mean(-1)
    return found
