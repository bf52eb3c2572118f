"""The base of the norms with running statistics: checks, masks, buffers that stay in float32, transforms of torch."""
import copy
import numbers
import threading
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Callable, Dict, Hashable, Mapping, Optional, Tuple, Union

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .. import functional, operators
from ..kernels import eager
from ..kernels.interface import PLAIN, transformed
from . import loading
from .checks import check_choice, check_dense, check_dim, check_dtype, check_flag, check_interval, check_number, is_count
from .layouts import Norm
from .masks import MaskSlot, valid_rows
from .scriptable import Evaluation
from .staging import Stage, Sums

State = Mapping[str, Tensor]
Device = Union[torch.device, str, int, None]


def _widened(value: Tensor) -> Tensor:
    """A value for a statistic: as it is, or float32 if it is narrower (half precision, integers, bool), without gradient."""
    wide = value.is_floating_point() and torch.finfo(value.dtype).bits >= 32
    value = value.detach() if value.requires_grad else value
    return value if wide else value.to(torch.float32)


class RunningNorm(Norm):
    """Base of the norms with running statistics.

    A training batch yields sums, named in ``SUMS``; ``advance`` computes the new running statistics from them. Either the
    norm applies them itself, or its ``stage`` takes them over. Statistics are float32 or wider: narrower values are widened
    wherever they come from. Several threads may share a norm: each pass takes its step of the statistics undisturbed.

    Args:
        dim: number of channels C
        eps: added to the second moment (or variance) under the root
        alpha_fwd: weight of the old value in the running statistics of the forward pass, in [0, 1]
        groups: channel groups of the layer scale ``u = x / sqrt(mean over the group of x^2 + 1e-5)`` that
            precedes the norm; 0 turns it off
        affine: learn ``weight`` and ``bias`` (``C``)
        batch_first, layout: where the channels are, see :class:`~.layouts.Norm`
        device, dtype: of the parameters, torch's defaults if None; statistics are on that device and float32 or wider
        windows: statistics that keep the values of several steps, ``W x C``: name -> W; the others are ``C``

    Raises:
        ValueError: an argument is outside its range, or ``groups`` does not divide ``dim``
    """

    CHECKS = {**Norm.CHECKS, "eps": partial(check_number, least=0.0), "alpha_fwd": check_interval}
    #: names of the sums over rows that a batch yields, by part: what ``advance`` and ``describe`` take
    SUMS: Mapping[str, Tuple[str, ...]] = {"forward": (), "backward": ()}
    #: buffers -> their values at the beginning
    STATISTICS: Mapping[str, float] = {}
    #: buffers that evaluation subtracts (None: nothing) and divides by, and how: ``added`` for ``sqrt(moment + eps)``,
    #: ``clamped`` for ``sqrt(max(moment, eps))``, ``deviation`` for ``moment`` itself
    MEAN: Optional[str] = None
    MOMENT: str = "running_phi"
    ROOT: str = "added"
    #: the buffers that a step of a part changes
    STEPS: Mapping[str, Tuple[str, ...]] = {"forward": (), "backward": ()}

    weight: Optional[nn.Parameter]
    bias: Optional[nn.Parameter]
    iters: Tensor
    if TYPE_CHECKING:
        _buffers: Dict[str, Tensor]  # type: ignore[assignment]  # a norm has no buffer that is None
        _constants: Dict[Hashable, Any]

    def __init__(
        self,
        dim: int,
        *,
        eps: float,
        alpha_fwd: float,
        groups: int,
        affine: bool,
        batch_first: bool,
        layout: Optional[str] = None,
        device: Device = None,
        dtype: Optional[torch.dtype] = None,
        windows: Mapping[str, int] = MappingProxyType({}),
    ):
        super().__init__(dim, batch_first=batch_first, layout=layout)
        check_dim(dim)
        check_flag("affine", affine)
        self.eps = eps
        self.alpha_fwd = alpha_fwd
        self.groups = groups
        #: set by a layer that knows the padding mask but whose code calls the norm without it
        self.mask_slot: Optional[MaskSlot] = None
        #: set by whoever applies the statistics instead of the norm
        self.stage: Optional[Stage] = None
        wide = torch.promote_types(dtype or torch.get_default_dtype(), torch.float32)
        with torch.inference_mode(mode=False):  # or it could never be trained
            for name in ("weight", "bias"):
                self.register_parameter(name, nn.Parameter(torch.empty(dim, device=device, dtype=dtype)) if affine else None)
            # floating point: integer buffers break exponential moving averages of a model
            self.register_buffer("iters", torch.empty((), device=device, dtype=wide))
            for name in self.STATISTICS:
                size = (windows[name], dim) if name in windows else (dim,)
                self.register_buffer(name, torch.empty(size, device=device, dtype=wide))
        self.windows = dict(windows)
        self._steps: Optional[Tuple[Tensor, int, int]] = None  # iters, its version, its value on the host
        self._lock = threading.Lock()
        self.reset_parameters()

    def extra_repr(self) -> str:
        own = (
            f"{self.dim}, eps={self.eps}, alpha_fwd={self.alpha_fwd}, groups={self.groups}, "
            f"affine={self.weight is not None}"
        )
        return ", ".join(part for part in (own, super().extra_repr()) if part)

    @classmethod
    def default_groups(cls, heads: int, **options: object) -> int:
        """Groups of the layer scale in a model with that many attention heads."""
        return heads

    # ------------------------------------------------------------------ life cycle

    def reset_running_stats(self) -> None:
        """Set the statistics and the step count to what they were at the beginning."""
        # torch.nn.init: Hugging Face's loading lets its functions pass over what the checkpoint had
        for name, buffer in self.statistics().items():
            nn.init.constant_(buffer, self.STATISTICS.get(name, 0.0))

    def reset_parameters(self) -> None:
        """Set statistics, ``weight`` (1) and ``bias`` (0) to what they were at the beginning."""
        self.reset_running_stats()
        self._reset_parameters()

    def first_values(self) -> Dict[str, float]:
        return {**super().first_values(), **self.STATISTICS}

    def statistics(self) -> Dict[str, Tensor]:
        """The step count and the running statistics, by name: not the other buffers that a norm may be given, by pruning."""
        return {name: self._buffers[name] for name in ("iters", *type(self).STATISTICS)}

    def settings(self) -> Tuple[Tuple[str, Any], ...]:
        """The norm's numbers and choices by name: norms of one class that share them share their arithmetic."""
        known: Optional[Tuple[Tuple[str, Any], ...]] = self._constants.get("settings")
        if known is None:
            known = self._constants["settings"] = tuple(
                (name, value)
                for name, value in sorted(vars(self).items())
                if isinstance(value, (bool, numbers.Number, str)) and not name.startswith("_") and name != "training"
            )
        return known

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "RunningNorm":
        before = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in self.statistics().items():
            old = before[name]
            if old.is_meta and not buffer.is_meta:  # memory without a value, as to_empty gives
                with torch.no_grad():
                    buffer.fill_(self.STATISTICS.get(name, 0.0))
            if _widened(buffer) is not buffer:  # .half() and the like: keep the statistics' own precision
                self._buffers[name] = _widened(buffer) if old.is_meta else _widened(old.to(buffer.device))
        return self

    def __setattr__(self, name: str, value: Any) -> None:
        """As in any norm; a setting that has changed is no part of what was prepared for calls."""
        was_setting = isinstance(vars(self).get(name), (numbers.Number, str))
        if (was_setting or not isinstance(value, Tensor)) and not name.startswith("_"):
            self.__dict__["_constants"] = {}
        super().__setattr__(name, value)

    def _check_setting(self, name: str, value: Any) -> None:
        if name == "groups" and (not is_count(value) or (value > 0 and self.dim % value)):
            divisors = [g for g in range(1, self.dim + 1) if self.dim % g == 0]
            raise ValueError(
                f"groups={value!r}: must be 0 (no layer scale) or divide the {self.dim} channels, one of {divisors}"
            )
        if name == "variant":
            check_choice(name, value, getattr(self, "VARIANTS", (value,)))
        super()._check_setting(name, value)

    def _arriving(self, name: str, value: Tensor) -> Tensor:
        """A statistic is widened to float32; one in place of a meta tensor may still be without a value."""
        if name != "iters" and name not in self.STATISTICS:
            return super()._arriving(name, value)
        in_doubt = loading.in_doubt(self, name, value)
        value = super()._arriving(name, value)
        if in_doubt:
            self.__dict__["_from_meta"] = (*self._from_meta, name)
        return _widened(value)

    def __getstate__(self) -> Dict[str, Any]:
        """A copy, or what is read back from a pickle, is on its own: it applies its statistics itself."""
        state = {**self.__dict__, "stage": None, "_steps": None, "_constants": {}}
        del state["_lock"]
        return state

    def __setstate__(self, state: Dict[str, Any]) -> None:
        super().__setstate__(state)
        earlier: Dict[str, Any] = {"_constants": {}, "windows": {}}  # pickled by an earlier version
        for name, value in earlier.items():
            self.__dict__.setdefault(name, value)
        if isinstance(self._from_meta, bool):  # the same
            self._from_meta = tuple(self.statistics()) if self._from_meta else ()
        self._lock = threading.Lock()

    def __deepcopy__(self, memo: Dict[int, Any]) -> "RunningNorm":
        """As usual, also where parameters are computed: torch copies such modules in a way that stops at a lock."""
        own: Any = parametrize.type_before_parametrizations(self)
        twin: RunningNorm = type(self).__new__(type(self))
        memo[id(self)] = twin
        own.__setstate__(twin, copy.deepcopy(own.__getstate__(self), memo))
        return twin

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.settle()
        super()._save_to_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, state_dict: Dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        for name, buffer in self.statistics().items():
            loaded = state_dict.get(prefix + name)
            if isinstance(loaded, Tensor):
                # the authors' code stores (1, C, 1, 1) and (1,)
                sizes, wanted = ([size for size in each.shape if size != 1] for each in (loaded, buffer))
                if loaded.shape != buffer.shape and sizes == wanted:
                    loaded = loaded.reshape(buffer.shape)
                state_dict[prefix + name] = _widened(loaded)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def __prepare_scriptable__(self) -> nn.Module:
        """What ``torch.jit.script`` compiles in place of this module: its evaluation."""
        return Evaluation(self)

    def settle(self) -> None:
        """Begin what a loader has put in place of meta tensors without a value; called before statistics are read."""
        if self._from_meta:
            loading.check_values(self)

    # ------------------------------------------------------------------ the step count

    def steps(self) -> int:
        """Training steps taken: ``iters`` on the host, read from an accelerator only after a change from outside."""
        iters = self._buffers["iters"]
        if iters.is_cpu or iters.is_inference():
            return int(iters.item())
        known = self._steps
        if known is None or known[0] is not iters or known[1] != iters._version:
            steps = int(iters.item())
            self.remember_steps(steps)
            return steps
        return known[2]

    def remember_steps(self, steps: int) -> None:
        """Say what ``iters`` has become, so that it need not be read from an accelerator."""
        iters = self._buffers["iters"]
        if not (iters.is_cpu or iters.is_inference()):
            self.__dict__["_steps"] = iters, iters._version, steps  # Module.__setattr__ is slow

    # ------------------------------------------------------------------ calls

    def _normalize(self, x: Tensor, padding_mask: Optional[Tensor]) -> Tensor:
        """Normalize rows, see :class:`~.layouts.Norm`.

        Args:
            x: float16, bfloat16, float32 or float64
            padding_mask: True at padding

        Returns:
            tensor of the shape and dtype of ``x``

        Raises:
            ValueError: a shape, dtype or device does not fit
            RuntimeError: a training pass outside of ``RunningStatistics.batch()``, or under a transform that has no meaning
        """
        if self._from_meta:
            loading.check_values(self)
        check_dense(x)
        transposed = self.layout == "time_first"
        if x.dim() < 2 or x.size(-1) != self.dim or (transposed and x.dim() > 3):
            raise ValueError(self._wrong_shape(x))
        check_dtype(x)
        if x.stride(-1) != 1 and not self._channels_second(x):
            x = x.contiguous()  # as is the output
        transposed = transposed and x.dim() == 3
        if padding_mask is not None:
            self._check_mask(padding_mask, x)
        if not self.training:
            return self._evaluate(x, padding_mask)
        special = transformed()
        if padding_mask is not None:
            valid = valid_rows(padding_mask, transposed)
        elif self.mask_slot is not None and (held := self.mask_slot.fitting(self, x)) is not None:
            valid = valid_rows(held, transposed) if special else self.mask_slot.valid(held, transposed)
        else:
            valid = None
        if self.stage is not None:
            self.stage.switches.check_open("forward")
            if not self.stage.switches.counting:
                valid = torch.zeros(x.numel() // self.dim, dtype=torch.bool, device=x.device)
        if special:
            self._refuse_transforms(x)
        return self._train(x, valid, special=special or type(x) not in PLAIN or x.is_meta)

    def _refuse_transforms(self, x: Tensor) -> None:
        """Raise RuntimeError where a training step has no meaning."""
        if torch.compiler.is_compiling():
            if self._reduce is not None:
                raise RuntimeError("statistics with sync='exact' cannot be compiled: use sync='step'")
            return
        if torch.jit.is_tracing():
            raise RuntimeError(f"torch.jit.trace of a {type(self).__name__} in training: call eval() first")
        transforms = torch._C._functorch.TransformType
        for interpreter in torch._C._functorch.get_interpreter_stack() or ():
            if interpreter.key() == transforms.Vmap:
                raise RuntimeError(
                    f"vmap over a {type(self).__name__} in training: every example would take a step of the statistics of "
                    "one batch; call eval() first"
                )

    def _evaluate(self, x: Tensor, padding_mask: Optional[Tensor]) -> Tensor:
        """Normalize ``x`` by the running statistics."""
        raise NotImplementedError

    def scale_and_shift(self) -> Tuple[Tensor, Tensor]:
        """The evaluation as an affine map ``scale * u + shift`` of the layer-scaled input: ``C`` each, in float64."""
        raise NotImplementedError

    def _scale_and_shift(self, moment: Tensor, mean: Optional[Tensor] = None) -> Tuple[Tensor, Tensor]:
        moment = moment.detach().to(eager.sum_dtype(moment))
        scale, shift = eager.inverse_root(moment, self.eps), torch.zeros_like(moment)
        if self.weight is not None:
            scale = scale * self.weight.detach()
        if self.bias is not None:
            shift = shift + self.bias.detach()
        return scale, shift if mean is None else shift - scale * mean.detach()

    def _train(self, x: Tensor, valid: Optional[Tensor], *, special: bool) -> Tensor:
        """Normalize ``x`` as in training and take in its statistics.

        Args:
            x: input
            valid: one bool for each row, in the order of ``x``
            special: the input is no ordinary tensor, or torch does something else with operations than computing them
        """
        raise NotImplementedError

    # ------------------------------------------------------------------ statistics

    def _affine(self) -> Tuple[Optional[Tensor], Optional[Tensor]]:
        """weight and bias, quickly; they need not be parameters (parametrizations, pruning)."""
        parameters = self._parameters
        try:
            return parameters["weight"], parameters["bias"]
        except KeyError:
            return self.weight, self.bias

    @property
    def _reduce(self) -> Optional[functional.Reduce]:
        return None if self.stage is None else self.stage.switches.reduce

    def statistic(self, name: str) -> Tensor:
        """A statistic to change in place: one that is none of inference mode's, and wide, whatever was done to it."""
        buffer = self._buffers[name]
        if torch.compiler.is_compiling():
            return buffer
        if buffer.dtype is torch.float32 and torch._C._has_storage(buffer) and not buffer.is_inference():
            return buffer
        buffer = functional.unwrapped(buffer)
        if buffer.is_inference() and not torch.is_inference_mode_enabled():
            buffer = self._buffers[name] = buffer.clone()
        if _widened(buffer) is not buffer:
            buffer = self._buffers[name] = _widened(buffer)
        return buffer

    def _take(self, part: str, tally: Tensor) -> None:
        """Take in the tally of one pass: into the stage, or as one step of the running statistics."""
        with operators.outside_of_modes():
            if self.stage is not None:
                self.stage.add(part, tally)
            else:
                # of the class: torch 2.4 compiles no mapping that it finds through the module
                self.step_(part, tally, {name: self.statistic(name) for name in type(self).STEPS[part]})

    def forget_batch(self) -> None:
        """Drop what the norm keeps of the batch in progress; called when that is over."""

    def step_(self, part: str, tally: Tensor, buffers: State) -> None:
        """One step of the running statistics of n norms with these settings, in place.

        Args:
            part: ``forward`` or ``backward``
            tally: ``n x (sums + 2)``: the sums of the part, rows, calls; a norm without a call takes no step
            buffers: those of ``STEPS[part]`` by name, ``n x C`` (``iters``: ``n``), or those of one norm
        """
        tally = tally.view(-1, tally.size(-1))
        count = tally.size(0)
        old = {name: self.by_norm(name, buffer, count).to(tally.dtype) for name, buffer in buffers.items()}
        called = tally[:, -1] > 0
        for name, new in self.advance(part, old, Sums.of(tally, self.dim), self.alpha_fwd).items():
            buffer = buffers[name]
            before = self.by_norm(name, buffer, count)
            new = eager.finite_or(new.to(buffer.dtype), before)
            taken = called.view(count, *(1,) * (before.dim() - 1))
            buffer.copy_(torch.where(taken, new, before).view(buffer.shape))

    def by_norm(self, name: str, buffer: Tensor, count: int) -> Tensor:
        """A statistic of ``count`` norms as ``count x C`` (a window: ``count x W x C``; ``iters``: ``count x 1``)."""
        return buffer.reshape(count, self.windows[name], self.dim) if name in self.windows else buffer.reshape(count, -1)

    def advance(self, part: str, state: State, sums: Sums, alpha_fwd: float) -> Dict[str, Tensor]:
        """What the buffers become by one step with the sums of one part.

        Pure. The tensors may have leading dimensions (``... x C``, windows ``... x W x C``, ``iters`` ``... x 1``): many
        norms at once.

        Args:
            part: ``forward`` or ``backward``
            state: the buffers by name
            sums: those of the part; no change where there are no rows or the result is not finite
            alpha_fwd: the norm's own, or 0 to replace the running statistics by those of the sums

        Returns:
            new values of the buffers that change
        """
        raise NotImplementedError

    def describe(self, state: State, forward: Sums, backward: Sums) -> Dict[str, Tensor]:
        """Distance of a step's statistics from the running ones, and norms of the gradient through the statistics.

        Args:
            state: the buffers before the step
            forward, backward: the step's sums

        Returns:
            quantity -> value (leading dimensions of ``state``). ``distance_*`` and ``size_*``: Euclidean norm over
            channels, divided by their number, of batch minus running statistics and of the running ones.
            ``gradient_*``: root mean square over rows of the norm of the term of dL/du that a statistic causes.
            ``discrepancy_*``: see :func:`discrepancy`
        """
        raise NotImplementedError
