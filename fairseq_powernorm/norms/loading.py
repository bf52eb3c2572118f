"""What a loader leaves behind that has built a norm on the meta device and puts tensors in place of its own.

``norm`` is a norm with running statistics, whose base uses these functions.
"""
import logging
from typing import Any

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)


def is_lacking(norm: Any, value: Tensor) -> bool:
    """Is this memory that nobody has written, in place of what a checkpoint lacks?

    So Hugging Face's ``from_pretrained`` leaves it. It marks what the checkpoint has, and has put that in place before.
    """
    tensors = (value, *norm._parameters.values(), *norm._buffers.values())
    marked = [getattr(tensor, "_is_hf_initialized", False) for tensor in tensors]
    return any(marked) and not marked[0]


def check_values(norm: Any) -> None:
    """Statistics that came in place of meta tensors: what can't be a value is memory that nobody has written.

    So Hugging Face's ``from_pretrained`` leaves what the checkpoint lacks; it marks what the checkpoint had.
    """
    if torch.compiler.is_compiling():
        return
    norm.__dict__["_from_meta"] = False
    unmarked = {
        name: buffer
        for name, buffer in norm._buffers.items()
        if not buffer.is_meta and not getattr(buffer, "_is_hf_initialized", False)
    }
    counted = "iters" not in unmarked or _is_value(norm, "iters", unmarked["iters"])
    for name, buffer in unmarked.items():
        start = norm.STATISTICS.get(name, 0.0)
        # of a mean or nu nothing can be told by itself
        if not _is_value(norm, name, buffer) or (start == 0.0 and not counted):
            logger.warning("%s of a %s has no value yet: it begins as in a new one", name, type(norm).__name__)
            nn.init.constant_(buffer, start)


def _is_value(norm: Any, name: str, buffer: Tensor) -> bool:
    """Can a statistic be this? Steps are counted; second moments and variances, which begin at 1, are not all zero."""
    if not bool(torch.isfinite(buffer).all()):
        return False
    if name == "iters":
        return 0 <= float(buffer) < 2**53 and float(buffer).is_integer()
    return norm.STATISTICS[name] == 0.0 or bool((buffer >= 0.0).all() and buffer.max() > 1e-30)
