"""Padding masks for the norms of a model whose code knows nothing of them.

.. code-block:: python

    attach_mask(model)                          # reads attention_mask of each call, whose ones mark tokens
    loss = model(input_ids, attention_mask=attention_mask, labels=labels).loss

    with padding_mask(model, mask):             # B x T bool, True at padding: where no argument holds the mask
        y = model(x)

Both hand the mask to every norm of the model for the time of the call, in each thread its own. Running statistics of a
training pass then leave padding out; evaluation does not need masks and does not look at them, so neither does generation
with a cache of keys and values.

**Activation checkpointing** computes parts of the call again in the backward pass, when the call has ended. Their masks are
found by the autograd node that runs: each call has numbered the nodes that it made, in their order.

**Norms that see another length** than the mask's (behind pooling, in a convolutional front end, in a decoder with a mask of
its own) get an error that names them. Attach the mask to the part of the model whose calls have one of their length, for
instance ``attach_mask(model.encoder)`` and ``attach_mask(model.decoder)``; what lies outside gets none.
"""
import inspect
import threading
import weakref
from contextlib import contextmanager
from typing import Any, Dict, Iterator, List, Mapping, NamedTuple, Optional, Sequence, Set, Tuple

import torch
from torch import Tensor, nn

from .norms import MaskSlot, Norm, RunningNorm
from .norms.masks import HINT
from .norms.recomputation import inside_backward

__all__ = ["AttachedMask", "attach_mask", "padding_mask"]

#: calls that are remembered for which nothing says that their graph is gone
MOST = 256


class _Begun:
    """A call in progress; no tuple, whose numbers ``torch.compile`` would take for constants of the model.

    Attributes:
        first: number of its first autograd node
        mask: its padding mask
    """

    def __init__(self, first: int, mask: Optional[Tensor]) -> None:
        self.first = first
        self.mask = mask


class _Call(NamedTuple):
    """A call that has ended.

    Attributes:
        thread: an object that each thread has of its own
        first, end: numbers of its autograd nodes, which each thread counts
        mask: its padding mask
        graph: dead when the autograd graph of its output is; None if that is not known
    """

    thread: object
    first: int
    end: int
    mask: Optional[Tensor]
    graph: Optional["weakref.ref[_Mark]"]


class _Mark:
    """Hangs on the autograd nodes of an output, and lives as long as one of them."""


def _mark(output: Any) -> Optional["weakref.ref[_Mark]"]:
    """A reference to a mark on the autograd nodes of the tensors of an output; None if it has none."""
    mark, marked, left = _Mark(), False, [output]
    while left:
        each = left.pop()
        if isinstance(each, Tensor):
            if each.grad_fn is not None:
                metadata: Any = each.grad_fn.metadata
                metadata.setdefault(_Mark, []).append(mark)  # a module around this one may have the same output
                marked = True
        elif isinstance(each, Mapping):
            left.extend(each.values())
        elif isinstance(each, (list, tuple)):
            left.extend(each)
    return weakref.ref(mark) if marked else None


class CallMasks(MaskSlot):
    """The masks of the calls in progress, and of those that have ended and may be computed again in a backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self._ended: List[_Call] = []
        self._lock = threading.Lock()
        #: norm -> its name, for errors
        self.names: Dict[RunningNorm, str] = {}
        #: who has attached it to a model
        self.owner: Optional[AttachedMask] = None

    def __deepcopy__(self, memo: Dict[int, Any]) -> "CallMasks":
        """A new one in a copy of the whole model; a copied part is left to the calls of the model that it may return to."""
        if self.owner is not None and not self.owner.is_copied(memo):
            return self
        new = memo[id(self)] = CallMasks()
        return new

    def pass_on(self, old: RunningNorm, new: RunningNorm) -> None:
        """A new norm stands where ``old`` stood."""
        self.names[new] = self.names.pop(old, type(new).__name__)

    def begin(self, mask: Optional[Tensor]) -> None:
        """A call with that mask begins in this thread; one without a mask goes on with that of the call around it."""
        calls = self._calls()
        if mask is None and calls:
            mask = calls[-1].mask
        calls.append(_Begun(torch.autograd._get_sequence_nr(), mask))

    def end(self, output: Any = None) -> None:
        """The call of this thread that has begun last has ended, with that output."""
        calls = self._calls()
        if not calls:
            return  # an error in somebody else's hook came before its beginning
        call, end = calls.pop(), torch.autograd._get_sequence_nr()
        if end > call.first:  # there is something to differentiate
            ended = _Call(self._local.thread, call.first, end, call.mask, _mark(output))
            with self._lock:
                self._ended = [each for each in self._ended if each.graph is None or each.graph() is not None]
                self._ended = [*self._ended[1 - MOST :], ended]

    def _calls(self) -> List[_Begun]:
        calls: Optional[List[_Begun]] = getattr(self._local, "calls", None)
        if calls is None:
            calls = self._local.calls = []
            self._local.thread = object()
        return calls

    def fitting(self, norm: RunningNorm, x: Tensor) -> Optional[Tensor]:
        calls = self._calls()
        if calls:
            mask = calls[-1].mask
        elif self._ended and inside_backward():
            mask = self._of_repeated_call(x)
        else:
            return None
        if mask is not None and mask.dim() > 1 and x.dim() == 2 and mask.numel() == x.size(0):
            # a layer that has strung its rows together
            mask = (mask.transpose(0, 1) if norm.layout == "time_first" else mask).reshape(-1)
        try:
            norm._check_mask(mask, x)
        except ValueError as error:
            raise ValueError(
                f"{self.names.get(norm, type(norm).__name__)}: {error}; a norm that sees another length than the mask's "
                "must lie outside of the module that the mask is attached to, one that sees the time first needs "
                "layout='time_first' (fairseq_powernorm.masks)"
            ) from error
        return mask

    def _of_repeated_call(self, x: Tensor) -> Optional[Tensor]:
        """The mask of the call that is computed again: that in which the autograd node in progress was made."""
        node = torch._C._current_autograd_node()
        number = -1 if node is None else node._sequence_nr()
        found: Dict[object, _Call] = {}  # thread -> the innermost of its calls
        for call in self._ended:
            if call.first <= number < call.end and (call.graph is None or call.graph() is not None):
                inner = found.setdefault(call.thread, call)
                if call.first > inner.first:  # of those that began at the same node the inner one has ended first
                    found[call.thread] = call
        masks = [call.mask for call in found.values()]
        if len(masks) > 1:  # replicas
            masks = [mask for mask in masks if mask is None or mask.device == x.device]
        if any(not _same(mask, masks[0]) for mask in masks[1:]):
            raise RuntimeError(
                "activation checkpointing in several threads on one device: the padding mask of the call that is computed "
                "again is that of one of them, and nothing says of which; use one process for each"
            )
        return masks[0] if masks else None


def _same(one: Optional[Tensor], other: Optional[Tensor]) -> bool:
    if one is None or other is None:
        return one is other
    return one is other or (one.shape == other.shape and torch.equal(one, other))


def _norms(model: nn.Module, what: str) -> Dict[str, RunningNorm]:
    """The norms of a model that need masks, by name; those that read one from their own layer are left to it."""
    if not isinstance(model, nn.Module):
        raise ValueError(f"{what}: {type(model).__name__!r} is no module")
    modules = list(model.named_modules())
    if not any(isinstance(module, Norm) for _, module in modules):
        raise ValueError(
            f"{what}: the {type(model).__name__} has no norm of fairseq_powernorm; fairseq_powernorm.convert.replace_norms "
            "puts them there"
        )
    norms = {name or type(module).__name__: module for name, module in modules if isinstance(module, RunningNorm)}
    return {name: norm for name, norm in norms.items() if norm.mask_slot is None or isinstance(norm.mask_slot, CallMasks)}


def _slots(norms: Dict[str, RunningNorm]) -> Set[CallMasks]:
    """The holders of masks of these norms; a new one for those that have none."""
    new = CallMasks()
    slots = set()
    for name, norm in norms.items():
        if norm.mask_slot is None:
            norm.mask_slot = new
        assert isinstance(norm.mask_slot, CallMasks)
        norm.mask_slot.names.setdefault(norm, name)
        slots.add(norm.mask_slot)
    return slots


@contextmanager
def padding_mask(model: nn.Module, mask: Optional[Tensor]) -> Iterator[None]:
    """Within this context, norms of ``model`` that are called in this thread without a mask use ``mask``.

    Activation checkpointing may compute a training pass from within this context again after it has ended.

    Args:
        model: a module with norms of this package, before or after it was wrapped or compiled
        mask: bool, True at padding, of the shape that the norms' ``layout`` asks for: ``B x T``, ``B x H x W``; or None. It
            is copied: what is written into it later does not count, not even where a pass is computed again

    Raises:
        ValueError: the mask is no bool tensor, or the model has no norm of this package; and from a norm whose input has
            another size, with its name
    """
    if mask is not None and (not isinstance(mask, Tensor) or mask.dtype is not torch.bool):
        raise ValueError(f"padding_mask: {_described(mask)}: {HINT}")
    slots = _slots(_norms(model, "padding_mask"))
    mask = None if mask is None else mask.clone()
    for slot in slots:
        slot.begin(mask)
    try:
        yield
    finally:
        for slot in slots:
            slot.end()


class AttachedMask:
    """Reads the mask from the calls of a module; made by :func:`attach_mask`, taken off by :meth:`remove`."""

    def __init__(self, model: nn.Module, argument: str, valid: int, position: Optional[int]):
        self.argument = argument
        self.valid = valid
        self._position = position
        self._model = model
        norms = _norms(model, "attach_mask")
        for name, norm in norms.items():
            slot = norm.mask_slot
            if isinstance(slot, CallMasks) and slot.owner is not None and slot.owner.has(norm):
                other = slot.owner
                raise ValueError(
                    f"attach_mask: {name} takes its mask from the argument {other.argument!r} of a "
                    f"{type(other._model).__name__} already; remove() that first"
                )
        self._slot = CallMasks()
        self._names: Dict[RunningNorm, str] = {norm: name for name, norm in norms.items()}
        self._own()
        self._hooks: Sequence[Any] = (
            model.register_forward_pre_hook(self._begin, with_kwargs=True, prepend=True),
            model.register_forward_hook(self._end, always_call=True),
        )

    def _own(self) -> None:
        self._slot.owner, self._slot.names = self, self._names
        for norm in self._names:
            norm.mask_slot = self._slot

    def __setstate__(self, state: Dict[str, Any]) -> None:
        """A copy, or what is read back from a pickle, owns the masks of the copied model."""
        self.__dict__.update(state)
        if self._hooks:
            self._own()

    def has(self, norm: nn.Module) -> bool:
        """Does a norm stand in the model? Copies of it, and those that were taken out, do not."""
        return any(each is norm for each in self._model.modules())

    def is_copied(self, memo: Dict[int, Any]) -> bool:
        """Is the model among what :func:`copy.deepcopy` has begun to copy?"""
        return id(self._model) in memo

    def remove(self) -> None:
        """Take the hooks off; the norms see no mask any more. A second time does nothing."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = ()
        for norm in self._names:
            if norm.mask_slot is self._slot:
                norm.mask_slot = None

    def __enter__(self) -> "AttachedMask":
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()

    def _begin(self, module: nn.Module, args: Tuple[Any, ...], kwargs: Dict[str, Any]) -> None:
        mask = None
        if any(norm.training for norm in self._names):
            given = kwargs.get(self.argument)
            if given is None and self._position is not None and self._position < len(args):
                given = args[self._position]
            if given is not None:
                mask = self._padding(given)
        self._slot.begin(mask)

    def _end(self, module: nn.Module, args: Tuple[Any, ...], output: Any) -> None:
        self._slot.end(output)

    def _padding(self, given: Any) -> Tensor:
        """An argument as a padding mask."""
        name = f"attach_mask: {self.argument}: {_described(given)}"
        if not isinstance(given, Tensor):
            raise ValueError(f"{name}: must be a tensor, B x T, with {self.valid} at tokens and {1 - self.valid} at padding")
        if given.dim() not in (1, 2):
            raise ValueError(
                f"{name}: must be B x T, one for each token; a mask of the attention between tokens does not say which of "
                "them are padding: give that to padding_mask(model, mask)"
            )
        if given.is_floating_point():
            if not bool(((given == 0) | (given == 1)).all()):
                raise ValueError(
                    f"{name}: must hold {self.valid} at tokens and {1 - self.valid} at padding; for numbers that are "
                    "added to attention scores use padding_mask(model, numbers < 0)"
                )
        elif given.is_complex():
            raise ValueError(f"{name}: must be bool, integer or floating point")
        return given == 0 if self.valid else given != 0


def _described(given: object) -> str:
    if isinstance(given, Tensor):
        return f"{str(given.dtype).split('.')[-1]} of shape {tuple(given.shape)}"
    return f"{type(given).__name__}"


def attach_mask(model: nn.Module, argument: str = "attention_mask", valid: int = 1) -> AttachedMask:
    """Pass a mask that is an argument of each call of ``model`` to its norms, as their padding mask.

    Attach it to the module whose ``forward`` has the argument, before that module is wrapped for data parallelism or
    compiled. A call without the argument, or with None, has no padding. Masks are ignored in evaluation.

    Args:
        model: a module with norms of this package
        argument: name of the parameter of ``model.forward``, given by position or by keyword: ``B x T`` (``N`` if the norms'
            inputs are ``N x C``), bool, integer or floating point with values 0 and 1
        valid: 1 if values other than zero mark tokens, 0 if they mark padding (``src_key_padding_mask`` of torch's modules)

    Returns:
        a handle with ``remove()``

    Raises:
        ValueError: ``forward`` has no such argument, ``valid`` is neither 0 nor 1, the model has no norm of this package, or
            one of its norms has a mask attached already, or is of the decoder where the argument is the encoder's mask (or
            the other way round); and from a call, if the mask is of another kind or size
    """
    if valid not in (0, 1):
        raise ValueError(f"attach_mask: valid={valid!r}: must be 1 (what is not zero marks tokens) or 0 (it marks padding)")
    norms = _norms(model, "attach_mask")
    parameters = inspect.signature(model.forward).parameters
    kinds = {parameter.kind for parameter in parameters.values()}
    if argument in parameters:
        names = [name for name, each in parameters.items() if each.kind is not inspect.Parameter.KEYWORD_ONLY]
        position = names.index(argument) if argument in names else None
    elif inspect.Parameter.VAR_KEYWORD in kinds and inspect.Parameter.VAR_POSITIONAL not in kinds:
        position = None
    else:
        raise ValueError(
            f"attach_mask: argument={argument!r}: forward of {type(model).__name__} has none of that name, only "
            f"{', '.join(parameters) or 'none'}; attach the mask to the module whose forward has it"
        )
    if any(name.startswith("decoder_input") for name in parameters):  # an encoder and a decoder, with a mask each
        other = "encoder" if argument.startswith("decoder") else "decoder"
        for name in norms:
            if other in name.split("."):
                raise ValueError(
                    f"attach_mask: argument={argument!r} of {type(model).__name__} is no mask of its {other}, which has "
                    f"{name}; attach a mask to each part, as attach_mask(model.encoder) and attach_mask(model.decoder)"
                )
    return AttachedMask(model, argument, int(valid), position)
