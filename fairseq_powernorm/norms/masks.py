"""Padding masks: bool, True at padding; checked once, and held for norms that are called without one."""
import threading
from typing import Any, Optional, Tuple

import torch
from torch import Tensor

HINT = "expected bool, True at padding; from an attention mask whose ones mark tokens: attention_mask == 0"


def check_mask(padding_mask: Optional[Tensor], x: Tensor, *, batch_first: bool) -> None:
    """Refuse a padding mask that does not fit the input ``x``.

    Args:
        padding_mask: ``B x T`` for three-dimensional ``x``, else one bool for each row (``N``, ``B x ...``); None is fine
        x: ``T x B x C`` (``B x ... x C`` with ``batch_first``) or ``N x C``
        batch_first: see ``x``

    Raises:
        ValueError: it is not bool, of another shape, or on another device
    """
    if padding_mask is None:
        return
    if not isinstance(padding_mask, Tensor):
        raise ValueError(f"padding_mask of type {type(padding_mask).__name__}: expected a tensor; {HINT}")
    if padding_mask.layout is not torch.strided or padding_mask.is_nested:
        raise ValueError(f"padding_mask of layout {padding_mask.layout}: expected a dense tensor, torch.strided")
    if padding_mask.dtype is not torch.bool:
        raise ValueError(f"padding_mask of dtype {padding_mask.dtype}: {HINT}")
    rows = x.shape[:-1]
    expected = rows[::-1] if len(rows) == 2 and not batch_first else rows
    if padding_mask.shape != expected:
        names = {1: "N", 2: "B x T", 3: "B x H x W"}.get(len(rows), "B x ...")
        order = "" if len(rows) < 2 else f" ({'batch' if batch_first else 'time'} first)"
        raise ValueError(
            f"padding_mask of shape {tuple(padding_mask.shape)}: expected {tuple(expected)}, {names}, for an input with "
            f"rows of shape {tuple(rows)}{order}"
        )
    if padding_mask.device != x.device:
        raise ValueError(f"padding_mask on {padding_mask.device}: expected it on {x.device}, as the input")


class MaskSlot:
    """Holds the padding mask of the call in progress, for norms that are called without one.

    Each thread has its own. The mask is prepared for the norms once, however many of them read it.
    """

    def __init__(self) -> None:
        self._local = threading.local()

    @property
    def padding_mask(self) -> Optional[Tensor]:
        """``B x T`` bool, True at padding; None if there is none."""
        mask: Optional[Tensor] = getattr(self._local, "mask", None)
        return mask

    @padding_mask.setter
    def padding_mask(self, mask: Optional[Tensor]) -> None:
        self._local.mask = mask
        self._local.valid = None

    def fitting(self, norm: Any, x: Tensor) -> Optional[Tensor]:
        """The mask of the call in progress for the rows ``x`` of that norm; raises ValueError where it does not fit."""
        mask = self.padding_mask
        norm._check_mask(mask, x)
        return mask

    def valid(self, mask: Tensor, transposed: bool) -> Tensor:
        """A mask as the norms read it, see :func:`valid_rows`; made once for all norms that read the same one."""
        known: Optional[Tuple[Tensor, bool, Tensor]] = getattr(self._local, "valid", None)
        if known is None or known[0] is not mask or known[1] is not transposed:
            known = self._local.valid = mask, transposed, valid_rows(mask, transposed)
        return known[2]

    def __reduce__(self) -> Tuple[Any, Tuple[()]]:
        """A copy is empty: a mask belongs to a call."""
        return type(self), ()


def valid_rows(padding_mask: Tensor, transposed: bool) -> Tensor:
    """One bool for each row of an input, contiguous, False at padding.

    Args:
        padding_mask: ``B x T``, or one bool for each row
        transposed: the input is ``T x B x C``
    """
    return (padding_mask.t() if transposed else padding_mask).logical_not().reshape(-1).contiguous()
