"""What a loader leaves behind that has built a norm on the meta device and puts tensors in place of its own.

``norm`` is a norm of this package, whose bases use these functions.
"""
import logging
from typing import Any, Collection

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)


#: by which Hugging Face's ``from_pretrained`` marks tensors that a checkpoint has, and modules that are done
MARK = "_is_hf_initialized"


def in_doubt(norm: Any, name: str, value: Tensor) -> bool:
    """May a tensor that is put in place of the parameter or buffer ``name`` be memory that nobody has written?"""
    old = norm._buffers.get(name, norm._parameters.get(name))
    if old is None or not old.is_meta or value.is_meta:
        return False
    return not (getattr(old, MARK, False) or getattr(value, MARK, False))


def arriving(norm: Any, name: str, value: Tensor) -> Tensor:
    """What becomes of a tensor that is put in place of the parameter or buffer ``name``.

    In place of a meta tensor it may be memory that nobody has written, for what a checkpoint lacks: so Hugging Face's
    ``from_pretrained`` leaves it. Version 5 marks values that the checkpoint has, and puts them in place first. Version 4
    puts what is lacking in place first, then marks the tensors that the checkpoint has, on the meta device still, and says
    of the module that it is done: :func:`begin_unwritten`. It puts each tensor in place by a ``load_state_dict`` of its own.
    """
    if not in_doubt(norm, name, value):
        return value
    if any(getattr(tensor, MARK, False) for tensor in (*norm._parameters.values(), *norm._buffers.values())):
        _begin(norm, name, value)
    else:
        norm.__dict__["_unwritten"] = (*norm._unwritten, name)
    return value


def begin_unwritten(norm: Any) -> None:
    """Give what came in place of meta tensors its first value, but for what is marked as a checkpoint's."""
    for name in norm._unwritten:
        tensor = norm._buffers.get(name, norm._parameters.get(name))
        if tensor is not None and not tensor.is_meta and not getattr(tensor, MARK, False):
            _begin(norm, name, tensor)
    norm.__dict__["_unwritten"] = ()


def written(norm: Any, names: Collection[str]) -> None:
    """These tensors have values, which nothing may overwrite: they were loaded from a state_dict of several."""
    for note in ("_unwritten", "_from_meta"):
        if getattr(norm, note):
            norm.__dict__[note] = tuple(name for name in getattr(norm, note) if name not in names)


def _begin(norm: Any, name: str, tensor: Tensor) -> None:
    with torch.no_grad():
        tensor.fill_(norm.first_values().get(name, 0.0))


def check_values(norm: Any) -> None:
    """Statistics that came in place of meta tensors: what can't be a value is memory that nobody has written.

    So Hugging Face's ``from_pretrained`` leaves what the checkpoint lacks; it marks what the checkpoint had.
    """
    if torch.compiler.is_compiling():
        return
    names = norm._from_meta
    norm.__dict__["_from_meta"] = ()
    unmarked = {
        name: buffer
        for name, buffer in norm.statistics().items()
        if name in names and not buffer.is_meta and not getattr(buffer, MARK, False)
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
