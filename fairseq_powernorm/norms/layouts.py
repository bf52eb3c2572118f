"""Where the channels of an input are: ``Norm``, the base of every norm."""
import numbers
from functools import partial
from typing import TYPE_CHECKING, Any, Dict, Optional, Tuple

import torch
from torch import Tensor, nn

from ..kernels.interface import PLAIN
from . import loading
from .checks import Checks, check_choice, check_dense, check_flag, plain_number
from .masks import check_mask

CHANNELS_FIRST = "channels_first"
#: layout -> shape of the input, with T for one or more dimensions where there may be several
LAYOUTS = {
    "time_first": "T x B x C",
    "batch_first": "B x T x C, or with several dimensions B x ... x C",
    CHANNELS_FIRST: "B x C x T, or with several dimensions B x C x ...",
}


def layout_of(batch_first: bool, layout: Optional[str]) -> str:
    """The layout that two options name: ``batch_first=True`` is short for ``layout="batch_first"``.

    Raises:
        ValueError: ``layout`` is unknown, ``batch_first`` is no bool, or the two contradict each other
    """
    check_flag("batch_first", batch_first)
    if layout is None:
        return "batch_first" if batch_first else "time_first"
    check_choice("layout", layout, LAYOUTS)
    if batch_first and layout != "batch_first":
        raise ValueError(f"layout={layout!r} with batch_first=True: must be one or the other")
    return layout


class Norm(nn.Module):
    """Base of every norm: the layout of its input, and the padding mask that goes with it.

    A norm computes on rows, ``... x C``, in ``_normalize``; this base class converts the input and the output. If the
    channels come first and are not adjacent in memory, the output is contiguous, too; this takes a copy each way, unless the
    norm reads and writes such memory itself, as PN, PN-V and BN do on a CPU. In ``torch.channels_last`` memory (or any other
    with adjacent channels) there is no copy, and the output keeps the format.

    Args:
        dim: number of channels C
        batch_first: short for ``layout="batch_first"``
        layout: ``time_first`` for ``T x B x C`` (default), ``batch_first`` for ``B x T x C`` or with several dimensions
            ``B x H x W x C``, ``channels_first`` for ``B x C x T`` or ``B x C x H x W``. All take ``N x C`` as well.
        options: of the next class

    Shape:
        - input and output: as ``layout`` says, or ``N x C``
        - ``padding_mask``: bool, True at padding: the input's shape without C and batch first, so ``B x T`` or
          ``B x H x W``; ``N`` for two-dimensional input

    Raises:
        ValueError: ``layout`` is unknown or contradicts ``batch_first``; or ``forward`` is given what does not fit
    """

    #: setting -> the check of its values, whenever it is set
    CHECKS: Checks = {"layout": partial(check_choice, choices=LAYOUTS)}
    #: does ``_normalize`` take rows whose channels are not adjacent, and give its output in the layout of the norm?
    OWN_LAYOUT = False
    if TYPE_CHECKING:  # torch.jit.script would read annotations that are there
        _unwritten: Tuple[str, ...]
        _from_meta: Tuple[str, ...]
    #: tensors that a loader has put in place of meta tensors, perhaps without a value, see loading.arriving()
    _unwritten = ()
    #: statistics among them, and among those that were there before others were marked, see loading.check_values()
    _from_meta = ()
    #: torch.jit.script would compile a property
    __jit_unused_properties__ = ["batch_first"]

    def __init__(self, dim: int, *, batch_first: bool = False, layout: Optional[str] = None, **options: Any):
        layout = layout_of(batch_first, layout)
        super().__init__(**options)
        self.dim = dim
        self.layout = layout

    @property
    def batch_first(self) -> bool:
        """Is the layout ``batch_first``? Setting it chooses between that and ``time_first``."""
        return self.layout == "batch_first"

    @batch_first.setter
    def batch_first(self, value: bool) -> None:
        self.layout = layout_of(value, None)

    def extra_repr(self) -> str:
        layout = f"layout={self.layout}" if self.layout != "time_first" else ""
        return ", ".join(part for part in (super().extra_repr(), layout) if part)

    def first_values(self) -> Dict[str, float]:
        """Parameters and buffers -> their values at the beginning."""
        return {"weight": 1.0, "bias": 0.0}

    def _reset_parameters(self) -> None:
        """Give parameters their first values; one that was pruned is kept under another name."""
        for name, value in self.first_values().items():
            parameter = self._parameters.get(name, self._parameters.get(f"{name}_orig"))
            if parameter is not None:
                nn.init.constant_(parameter, value)

    def __setattr__(self, name: str, value: Any) -> None:
        """As in any module, but settings are checked, and their numbers become Python's, which C++ and caches take for what
        they are; and a tensor that a loader puts here without a value begins as in a new norm.
        """
        if isinstance(value, Tensor) and isinstance(vars(self).get(name), numbers.Number) and value.numel() == 1:
            value = value.item()
        value = plain_number(value)
        self._check_setting(name, value)
        if name == loading.MARK:
            loading.begin_unwritten(self)
        elif isinstance(value, Tensor) and (name in self._parameters or name in self._buffers):
            value = self._arriving(name, value)
        super().__setattr__(name, value)

    def _check_setting(self, name: str, value: Any) -> None:
        """Raise ValueError for a value that the setting ``name`` cannot have."""
        check = self.CHECKS.get(name)
        if check is not None:
            check(name, value)

    def _arriving(self, name: str, value: Tensor) -> Tensor:
        """What ``value`` becomes as the parameter or buffer ``name``."""
        return loading.arriving(self, name, value)

    def _load_from_state_dict(self, state_dict: Dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        if prefix or len(state_dict) > 1:  # else it may be Hugging Face's loading
            loading.written(self, [name for name in (*self._unwritten, *self._from_meta) if prefix + name in state_dict])

    def __setstate__(self, state: Dict[str, Any]) -> None:
        batch_first = state.pop("batch_first", False)  # pickled by an earlier version
        state.setdefault("layout", layout_of(batch_first, None))
        if "dim" not in state and "normalized_shape" in state:
            (state["dim"],) = state["normalized_shape"]
        super().__setstate__(state)  # type: ignore[no-untyped-call]

    def forward(self, x: Tensor, padding_mask: Optional[Tensor] = None) -> Tensor:
        """Normalize ``x``, see the class; ``padding_mask`` is True at padding."""
        # symbolic tracing takes the norm as a whole; TorchScript passes over what is not for it only as an if of its own
        if not torch.jit.is_scripting():  # noqa: SIM102
            if type(x) not in PLAIN and isinstance(x, torch.fx.Proxy):
                return x.tracer.create_proxy("call_module", x.tracer.path_of_module(self), (x, padding_mask), {})
        if self.layout != "channels_first":  # TorchScript knows no constants of a module
            return self._normalize(x, padding_mask)
        if not torch.jit.is_scripting():
            self._check_channels_first(x)
        rows, last = x.movedim(1, -1), x.dim() - 1  # ONNX by tracing takes a negative place for what it is
        if not torch.jit.is_scripting():  # noqa: SIM102
            if self.OWN_LAYOUT:
                return self._normalize(rows, padding_mask)
        if rows.stride(-1) == 1:
            return self._normalize(rows, padding_mask).movedim(last, 1)
        return self._normalize(rows.contiguous(), padding_mask).movedim(last, 1).contiguous()

    def _channels_second(self, x: Tensor) -> bool:
        """Do the channels of the rows ``x`` come second in what :meth:`_normalize` gives?"""
        return self.OWN_LAYOUT and self.layout == CHANNELS_FIRST and x.dim() > 2

    def _check_channels_first(self, x: Tensor) -> None:
        check_dense(x)
        if x.dim() < 2 or x.size(1) != self.dim:
            raise ValueError(self._wrong_shape(x))

    def _wrong_shape(self, x: Tensor) -> str:
        shape = LAYOUTS[self.layout].replace("C", str(self.dim))
        return (
            f"input of shape {tuple(x.shape)}: expected {shape}, or N x {self.dim}; that is layout={self.layout!r}, the "
            f"others are {', '.join(sorted(LAYOUTS.keys() - {self.layout}))}"
        )

    def _normalize(self, x: Tensor, padding_mask: Optional[Tensor]) -> Tensor:
        """Normalize rows.

        Args:
            x: ``T x B x C`` with layout ``time_first``, else ``B x ... x C``; or ``N x C``
            padding_mask: ``B x T`` (``B x ...``, ``N``), not checked yet
        """
        raise NotImplementedError

    def _check_mask(self, padding_mask: Optional[Tensor], x: Tensor) -> None:
        """Refuse a padding mask that does not fit the rows ``x`` of :meth:`_normalize`; raises ValueError."""
        if padding_mask is not None:
            if x.dim() == 2 and getattr(padding_mask, "shape", None) == (x.size(0), 1):  # N sentences of one token
                padding_mask = padding_mask.squeeze(1)
            check_mask(padding_mask, x, batch_first=self.layout != "time_first")
