"""Running statistics that take one step per optimizer step, however the batch is divided.

The recursions of all norms are linear in sums over rows. Therefore the sums of all micro-batches and processes can be added
up first and applied once: k processes, k micro-batches and one batch k times as large give the same statistics, and a
training step that is skipped leaves no trace. In a training loop of your own:

.. code-block:: python

    statistics = RunningStatistics(model)       # after model.to(device)
    for batches in data:                        # the micro-batches of one step
        for batch in batches:
            with statistics.batch(gradient_scale=scaler.get_scale()):
                scaler.scale(loss(model, batch)).backward()
        statistics.reduce()                     # one all-reduce for all norms
        optimizer.step()
        statistics.commit()                     # or statistics.discard()

:mod:`fairseq_powernorm.tasks` does this for fairseq.
"""
import math
import re
from contextlib import contextmanager
from numbers import Real
from typing import (
    Any,
    Callable,
    Dict,
    Hashable,
    Iterable,
    Iterator,
    List,
    Mapping,
    NamedTuple,
    Optional,
    Sequence,
    Tuple,
    Union,
)

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from .kernels import eager as kernel
from .norms import RunningNorm, Stage, Sums, Switches
from .norms.checks import check_flag
from .norms.staging import PARTS

#: how the statistics of several processes are combined, see :class:`RunningStatistics`
SYNC = ("off", "step", "exact")
#: what wrappers for data parallelism, activation checkpointing and compilation put into the names of modules
_WRAPPERS = re.compile(
    r"^((module|_orig_mod)\.)+|_fsdp_wrapped_module\.|_fpw_module\.|_checkpoint_wrapped_module\.|\b_orig_mod\."
)


class _Part(NamedTuple):
    """The sums of one part (forward, backward) of n norms of one kind, a row for each: ``[sums, rows, calls]``."""

    batch: Tensor  # of the batch in progress
    step: Tensor  # of the batches of the step so far, those with non-finite sums left out
    left_out: Tensor  # n x 1: how many were left out


class _Kind(NamedTuple):
    """Norms of the same class, size and settings: their statistics are applied together."""

    names: List[str]
    norms: List[RunningNorm]
    parts: Dict[str, _Part]

    def state(self) -> Dict[str, Tensor]:
        """The buffers of all norms by name, see :meth:`~.norms.RunningNorm.by_norm`, in the precision of the sums."""
        dtype, first = self.parts["forward"].step.dtype, self.norms[0]
        return {name: first.by_norm(name, each, len(self.norms)).to(dtype) for name, each in self.stacked().items()}

    def stacked(self) -> Dict[str, Tensor]:
        """A copy of the buffers of all norms, in their own precision."""
        return {name: torch.stack([norm.statistic(name) for norm in self.norms]) for name in self.norms[0].statistics()}

    def alike(self) -> Sequence["_Kind"]:
        """Norms whose statistics are applied together: these, or each by itself where settings of one were changed since."""
        if all(norm.settings() == self.norms[0].settings() for norm in self.norms):
            return [self]
        return [
            _Kind([name], [norm], {part: _Part(*(each[i : i + 1] for each in sums)) for part, sums in self.parts.items()})
            for i, (name, norm) in enumerate(zip(self.names, self.norms))
        ]

    def sums(self, part: str) -> Sums:
        return Sums.of(self.parts[part].step, self.norms[0].dim)


def running_norms(model: nn.Module) -> Dict[str, RunningNorm]:
    """The norms of a model that have running statistics, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, RunningNorm)}


class RunningStatistics:
    """Takes over the running statistics of all norms of a model: collects their sums and applies them once per step.

    Sums are kept in float64. If the sums of a batch are not finite in a norm, that norm's statistics leave the batch out.

    Args:
        model: must already be on its device; from now on its norms no longer update their statistics themselves
        sync: ``off`` keeps the statistics of each process separate; ``step`` adds up the sums of all processes, with
            one all-reduce per step; ``exact`` also does so in every forward pass in which a norm divides by statistics of
            the current batch (and in the backward pass of PN-V and BN), by blocking reductions in each norm
        group: process group of the processes that share a batch (default: all, if torch.distributed is in use)

    Raises:
        ValueError: ``sync`` is unknown, other RunningStatistics have taken the norms over, or they lie on several devices
    """

    def __init__(self, model: nn.Module, sync: str = "step", group: Optional[dist.ProcessGroup] = None):
        if sync not in SYNC:
            raise ValueError(f"sync={sync!r}: must be one of {', '.join(SYNC)}")
        self._group = group
        self._calls: Optional[Dict[str, float]] = None  # of each norm in this step, known after reduce
        #: counted micro-batches of the step so far
        self.batches = 0
        self.switches = Switches()
        kinds: Dict[Hashable, List[Tuple[str, RunningNorm]]] = {}
        norms = running_norms(model)
        short = {name: _WRAPPERS.sub("", name) for name in norms}
        if len(set(short.values())) < len(short):  # "module" is a part of the model's own
            short = {name: name for name in norms}
        for name, norm in norms.items():
            if norm.stage is not None:
                raise ValueError(f"{name}: RunningStatistics have taken this norm over already; release() them first")
            key = type(norm), norm.settings(), norm.iters.dtype, norm.iters.device
            kinds.setdefault(key, []).append((short[name], norm))
        devices = {str(norm.iters.device): name for named in kinds.values() for name, norm in named}
        if len(devices) > 1:
            places = ", ".join(f"{name} on {device}" for device, name in devices.items())
            raise ValueError(f"RunningStatistics: norms on several devices ({places}): must be one, as their sums are")
        self.kinds = self._allocate([([name for name, _ in named], [norm for _, norm in named]) for named in kinds.values()])
        several = dist.is_available() and dist.is_initialized() and dist.get_world_size(group) > 1
        self._shared = several and sync != "off" and len(kinds) > 0
        if self._shared and sync == "exact":
            self.switches.reduce = self._all_reduced

    def _allocate(self, kinds: Sequence[Tuple[Sequence[str], Sequence[RunningNorm]]]) -> List[_Kind]:
        """Lay out the sums of all norms in one vector, so that one all-reduce serves them all."""
        sizes = [
            (len(norms), len(norms[0].SUMS[part]) * norms[0].dim + 2) for _, norms in kinds for part in PARTS
        ]
        total = sum(n * (size + 1) for n, size in sizes)
        first = kinds[0][1][0].iters if kinds else torch.zeros(())
        dtype = kernel.sum_dtype(first)
        with torch.inference_mode(mode=False):  # or no batch could be added to them outside of it
            self._batch, self._step = (torch.zeros(total, dtype=dtype, device=first.device) for _ in range(2))
        allocated, start = [], 0
        for names, norms in kinds:
            parts = {}
            for part in PARTS:
                n, size = len(norms), len(norms[0].SUMS[part]) * norms[0].dim + 2
                middle, end = start + n * size, start + n * (size + 1)
                parts[part] = _Part(
                    self._batch[start:middle].view(n, size),
                    self._step[start:middle].view(n, size),
                    self._step[middle:end].view(n, 1),
                )
                start = end
            for i, norm in enumerate(norms):
                norm.stage = Stage(self.switches, {part: parts[part].batch[i] for part in PARTS})
            allocated.append(_Kind(list(names), list(norms), parts))
        return allocated

    def norms(self) -> Dict[str, RunningNorm]:
        """The norms that were taken over, by name."""
        return {name: norm for kind in self.kinds for name, norm in zip(kind.names, kind.norms)}

    def total(self, vector: Tensor) -> Tensor:
        """A vector of sums over all processes that share a batch; each of them calls this."""
        return self._all_reduced(vector) if self._shared else vector

    def _all_reduced(self, vector: Tensor) -> Tensor:
        total = vector.detach().clone()
        dist.all_reduce(total, group=self._group)
        return total

    def release(self) -> None:
        """Let the norms apply their statistics themselves again."""
        for kind in self.kinds:
            for norm in kind.norms:
                if norm.stage is not None and norm.stage.switches is self.switches:  # or others have taken it over since
                    norm.stage = None

    @contextmanager
    def batch(self, counts: bool = True, gradient_scale: Union[float, Tensor] = 1.0) -> Iterator[None]:
        """Around forward and backward pass of one micro-batch.

        Args:
            counts: False for a batch whose gradient is thrown away: it leaves no statistics, and no norm adds a
                gradient of its own to that which arrives
            gradient_scale: factor of the loss that is differentiated (the loss scale of fp16 training). ``torch.compile``
                compiles PN anew for each number, but not for each value of a tensor

        Raises:
            RuntimeError: a batch is in progress already, the sums of this step have been added up by :meth:`reduce`, or a
                norm has been released since, or taken over by others
            ValueError: ``gradient_scale`` is neither a number (finite, not 0) nor a tensor of one; or ``counts`` is no bool
        """
        switches = self.switches
        check_flag("counts", counts)
        if isinstance(gradient_scale, Tensor):
            one = gradient_scale.numel() == 1  # its value may be on another device
        else:
            one = isinstance(gradient_scale, Real) and math.isfinite(gradient_scale) and gradient_scale != 0
        if not one:
            raise ValueError(f"gradient_scale={gradient_scale!r}: must be a number, finite and not 0, or a tensor of one")
        if switches.open:
            raise RuntimeError("RunningStatistics.batch(): a batch is in progress already, here or in another thread")
        if self._calls is not None:
            raise RuntimeError(
                "RunningStatistics.batch(): the step has been reduced, and a second time would count its sums once for each "
                "process: call reduce() after the last batch of a step, then commit() or discard()"
            )
        for kind in self.kinds:
            for name, norm in zip(kind.names, kind.norms):
                if norm.stage is None or norm.stage.switches is not switches:
                    raise RuntimeError(
                        f"RunningStatistics.batch(): {name} is not in its charge any more (release(), or others have taken "
                        "it over), or never was (a copy): make new RunningStatistics of the model"
                    )
        switches.open, switches.counting, switches.gradient_scale = True, counts, gradient_scale
        self._forget_batch()
        try:
            yield
            self._add_batch()
            self.batches += counts
        finally:
            switches.open, switches.counting, switches.gradient_scale = False, False, 1.0
            self._batch.zero_()
            self._forget_batch()

    def _forget_batch(self) -> None:
        for kind in self.kinds:
            for norm in kind.norms:
                norm.forget_batch()

    @torch.no_grad()
    def _add_batch(self) -> None:
        for kind in self.kinds:
            for part in kind.parts.values():
                sums, calls = part.batch[:, :-1], part.batch[:, -1:]
                finite = torch.isfinite(sums).all(1, keepdim=True)
                part.step[:, :-1] += torch.where(finite, sums, 0.0)
                part.step[:, -1:] += calls
                part.left_out.add_(finite.logical_not())

    def reduce(self) -> Dict[str, int]:
        """Add up the sums of all processes, on every process; before :meth:`commit`. A second time it only says the same.

        Returns:
            name of a norm -> number of forward and backward passes of the step (over all processes) that were left
            out of its statistics because they were not finite; norms without any are not listed

        Raises:
            RuntimeError: a batch is in progress, whose sums would come too late
        """
        if self.switches.open:
            raise RuntimeError(
                "RunningStatistics.reduce(): a batch is in progress, whose sums would count in the next step: call reduce() "
                "and commit() after the 'with statistics.batch():' block"
            )
        if self._calls is None:
            if self._shared:
                dist.all_reduce(self._step, group=self._group)
            self._calls = self.passes()
        return self.left_out()

    def left_out(self, parts: Sequence[str] = PARTS) -> Dict[str, int]:
        """As :meth:`reduce` returns it, of this process alone while :meth:`reduce` has not been called."""
        counts = self._read(lambda part: part.left_out[:, 0])
        total = {name: int(sum(counts[part][name] for part in parts)) for name in counts[PARTS[0]]}
        return {name: count for name, count in total.items() if count}

    def passes(self) -> Dict[str, float]:
        """Name of a norm -> its forward passes in this step; of this process, or of all after :meth:`reduce`."""
        return self._read(lambda part: part.step[:, -1])["forward"]

    def _read(self, column: Callable[[_Part], Tensor]) -> Dict[str, Dict[str, float]]:
        """A number of each norm, by part and name, read from the device in one go."""
        keys = [(part, name) for kind in self.kinds for part in PARTS for name in kind.names]
        columns = [column(kind.parts[part]) for kind in self.kinds for part in PARTS]
        found: Dict[str, Dict[str, float]] = {part: {} for part in PARTS}
        for (part, name), value in zip(keys, torch.cat(columns).tolist() if columns else []):
            found[part][name] = value
        return found

    @torch.no_grad()
    def commit(self) -> None:
        """Take one step of all running statistics with the sums gathered, and begin anew.

        Calls :meth:`reduce` unless that was done. A norm through which no counted batch went takes no step.
        """
        self.reduce()
        calls = self._calls
        assert calls is not None
        for kind in self._alike():
            steps = [norm.steps() for norm in kind.norms]
            buffers = kind.stacked()
            for part in PARTS:
                kind.norms[0].step_(part, kind.parts[part].step, buffers)
            for name, values in buffers.items():
                torch._foreach_copy_([norm._buffers[name] for norm in kind.norms], list(values.unbind(0)))
            for name, norm, before in zip(kind.names, kind.norms, steps):
                norm.remember_steps(before + (calls[name] > 0))
        self.discard()

    @torch.no_grad()
    def replace(self) -> None:
        """Replace the running statistics of the forward pass by those of the sums gathered, and begin anew.

        Step counts, nu, windows of single steps, and norms without a counted row stay as they are.
        """
        self.reduce()
        for kind in self._alike():
            called = kind.parts["forward"].step[:, -1:] > 0
            old = kind.state()
            for name, new in kind.norms[0].advance("forward", old, kind.sums("forward"), 0.0).items():
                if name != "iters" and name not in kind.norms[0].windows:
                    for norm, value, taken in zip(kind.norms, new, called):
                        value = value.to(norm._buffers[name].dtype)  # may overflow
                        if bool(taken) and bool(torch.isfinite(value).all()):
                            norm._buffers[name].copy_(value)
        self.discard()

    def _alike(self) -> List[_Kind]:
        return [alike for kind in self.kinds for alike in kind.alike()]

    def discard(self) -> None:
        """Forget the sums gathered: the step is not taken."""
        self._step.zero_()
        self._calls = None
        self.batches = 0

    @torch.no_grad()
    def describe(self) -> Dict[str, Dict[str, float]]:
        """What :meth:`~.norms.RunningNorm.describe` says of each norm, by its name; between reduce and commit.

        Raises:
            RuntimeError: :meth:`reduce` has not been called for this step
        """
        calls = self._calls
        if calls is None:
            raise RuntimeError("RunningStatistics.describe(): call reduce() first, then describe(), then commit()")
        found: Dict[str, Dict[str, float]] = {}
        for kind in self._alike():
            values = kind.norms[0].describe(kind.state(), kind.sums("forward"), kind.sums("backward"))
            table = torch.stack(list(values.values()), 1).tolist()
            for name, row in zip(kind.names, table):
                if calls[name] > 0:
                    found[name] = dict(zip(values, row))
        return found


def call(model: nn.Module, batch: Any) -> Any:
    """``model(**batch)`` for a mapping, ``model(*batch)`` for a list or tuple, else (or if it is packed) ``model(batch)``.

    Tensors are brought to the device of the model's first parameter.
    """
    device = next((each.device for each in (*model.parameters(), *model.buffers())), torch.device("cpu"))

    def there(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to(device)
        if isinstance(value, Mapping):
            return {name: there(each) for name, each in value.items()}
        if isinstance(value, PackedSequence):
            return value.to(device)  # type: ignore[arg-type]  # torch declares the dtype only
        if isinstance(value, (list, tuple)):
            items = [there(each) for each in value]
            return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
        return value

    batch = there(batch)
    if isinstance(batch, dict):
        return model(**batch)
    return model(*batch) if isinstance(batch, (list, tuple)) and not isinstance(batch, PackedSequence) else model(batch)


@torch.no_grad()
def recalibrate(model: nn.Module, batches: Iterable[Any], forward: Callable[[nn.Module, Any], Any] = call) -> int:
    """Replace the running statistics of a model's norms by those of the given batches, by forward passes only.

    This is needed after averaging, because the statistics of averaged parameters are not the average of their statistics,
    and after fine-tuning with frozen norms. The running moments become those of all batches together. The model runs in
    training mode, including dropout, and each norm divides by the moments of the current batch, so that the result does not
    depend on the previous statistics. Parameters, step counts and PN's nu (which evaluation does not use) stay as they are.

    Use it instead of ``torch.optim.swa_utils.update_bn``, which knows only torch's batch norms and silently skips these.

    Args:
        model: is put into training mode for the duration, with all of its norms, even those that its own ``train`` would
            leave frozen; afterwards each module is in its previous mode
        batches: at least one; micro-batches of the usual training size
        forward: called as ``forward(model, batch)`` for each batch; by default, see :func:`call`, a mapping holds keyword
            arguments, a list or tuple positional ones, and anything else is the only argument

    Returns:
        number of batches

    Raises:
        ValueError: the model has no running statistics, there is no batch, none went through a norm in training, or a norm's
            statistics are not finite
    """
    modes = [(each, each.training) for each in model.modules()]
    statistics = RunningStatistics(model, "off")
    if not statistics.kinds:
        raise ValueError("no norm of the model has running statistics: there is nothing to estimate")
    statistics.switches.batch_statistics = True
    try:
        model.train()
        for norm in statistics.norms().values():
            norm.train()
        for batch in batches:
            with statistics.batch():
                forward(model, batch)
        count, left_out = statistics.batches, statistics.left_out()
        if not count:
            raise ValueError("no batches to estimate statistics from")
        if not any(statistics.passes().values()):
            raise ValueError("no batch went through a norm in training mode: there is nothing to estimate from")
        if left_out:
            raise ValueError(f"statistics of {next(iter(left_out))} are not finite")
        statistics.replace()
    finally:
        statistics.release()
        for each, training in modes:
            each.training = training
    return count
