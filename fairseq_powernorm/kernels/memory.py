"""Where the rows of a tensor lie in memory, and memory laid out alike."""
from typing import Iterator, Optional

import torch
from torch import Tensor


def positions(x: Tensor) -> int:
    """How many rows of each example of ``B x ... x C`` lie side by side, as those of ``B x C x ...`` do.

    0 where channels are adjacent instead, or nothing is.
    """
    shape, strides = x.shape, x.stride()
    if len(shape) < 3 or strides[-1] == 1:
        return 0
    side_by_side = 1
    for i in range(len(shape) - 2, 0, -1):
        if shape[i] != 1:
            if strides[i] != side_by_side:
                return 0
            side_by_side *= shape[i]
    return side_by_side if side_by_side > 1 else 0


def empty(x: Tensor, dtype: Optional[torch.dtype] = None) -> Tensor:
    """Memory for the values of ``x`` (``... x C``): channels adjacent, or :func:`positions` where those of ``x`` are."""
    dtype = dtype or x.dtype
    if x.is_contiguous() or not (side_by_side := positions(x)):
        return torch.empty(x.shape, dtype=dtype, device=x.device)
    shape = x.shape
    strides, step = [side_by_side], 1
    for size in reversed(shape[1:-1]):
        strides.append(step)
        step *= size
    strides.append(shape[-1] * side_by_side)
    return torch.empty_strided(shape, strides[::-1], dtype=dtype, device=x.device)


def channels_second(y: Tensor, x: Tensor) -> Tensor:
    """The output ``B x ... x C`` of a pass over rows ``x`` as ``B x C x ...``.

    Channels stay adjacent if those of ``x`` are, else it is contiguous. It is the fresh memory ``y`` itself wherever it lies
    so: a view of it that an autograd function returns could not be changed in place.
    """
    order = y.movedim(-1, 1)
    if x.stride(-1) == 1 or order.is_contiguous():
        return y.as_strided_(order.shape, order.stride())
    return order.contiguous()


def view_channels_second(y: Tensor, x: Tensor) -> Tensor:
    """The same by ordinary operations, for what is differentiated or traced."""
    order = y.movedim(y.dim() - 1, 1)  # ONNX by tracing takes a negative place for what it is
    return order if x.stride(-1) == 1 else order.contiguous()


class Rows:
    """The rows of ``... x C``, block by block, wherever they lie: no copy of all of them is made where :func:`positions` lie
    side by side.

    Attributes:
        number, channels: N and C
        flat: ``N x C``, where the rows are such a view of the tensor, or had to be copied; else None
    """

    def __init__(self, x: Tensor):
        self.channels = x.size(-1)
        self.number = x.numel() // self.channels if self.channels else 0
        self._inner = 0 if x.is_contiguous() else positions(x)
        self.flat: Optional[Tensor] = None
        if self._inner:
            self._examples = x.as_strided((x.size(0), self._inner, self.channels), (x.stride(0), 1, x.stride(-1)))
        else:
            self.flat = x.reshape(-1, self.channels)

    def blocks(self, size: int) -> Iterator[slice]:
        """All rows in parts of ``size`` at most, which are whole examples or lie within one where there is no ``flat``."""
        within = self._inner if self._inner > size else self.number
        size = size // self._inner * self._inner if 0 < self._inner <= size else size
        for first in range(0, self.number, max(1, within)):
            for begin in range(first, first + within, max(1, size)):
                yield slice(begin, min(begin + size, first + within))

    def _part(self, block: slice) -> Tensor:
        """``examples x rows x C``."""
        example, first = divmod(block.start, self._inner)
        count = block.stop - block.start
        if count < self._inner:
            return self._examples[example : example + 1, first : first + count]
        return self._examples[example : example + count // self._inner]

    def read(self, block: slice, out: Tensor) -> Tensor:
        """These rows in the dtype of ``out``: as they lie, or in ``out`` (``n x C``)."""
        if self.flat is not None:
            rows = self.flat[block]
            return rows if rows.dtype == out.dtype else out.copy_(rows)
        part = self._part(block)
        out.view(part.shape).copy_(part)
        return out

    def place(self, block: slice, dtype: torch.dtype) -> Optional[Tensor]:
        """Where these rows may be written to directly, in that dtype; None: through :meth:`write`."""
        return self.flat[block] if self.flat is not None and self.flat.dtype == dtype else None

    def write(self, block: slice, values: Tensor) -> None:
        """Put ``n x C`` there."""
        if self.flat is not None:
            self.flat[block].copy_(values)
        else:
            part = self._part(block)
            part.copy_(values.view(part.shape))
