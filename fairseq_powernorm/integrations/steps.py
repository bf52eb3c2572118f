"""Running statistics that follow an optimizer, in a training loop that somebody else runs.

The loop tells when a micro-batch begins and ends. The optimizer itself signals, through a hook of torch's, that it has taken
a step, and the statistics then take theirs: with and without gradient accumulation, and not if a loss scaler skips the step.

**The scale of nu.** PN's nu is a mean of gradients, so it has the unit of the loss that the optimizer minimizes. Trainers
divide the loss of a micro-batch by the number of micro-batches, or sum it and divide by the number of tokens of the whole
step: either way the gradients of the micro-batches add up to that of the step, and there is nothing to correct. A loss
scale multiplies them and is divided out before the step. Data parallelism, DDP as well as FSDP, *averages* over ranks: what
arrives at a norm is the number of ranks times its share of the optimizer's gradient. :class:`OptimizerStatistics` corrects
for both. So nu, and with Algorithm 2 the parameters, are the same for k ranks, k micro-batches and one batch.
"""
import logging
from contextlib import contextmanager
from typing import Any, ContextManager, Dict, Iterator, Optional, Union

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..statistics import SYNC, RunningStatistics, running_norms

logger = logging.getLogger(__name__)


class _Abandoned(Exception):
    """Ends a micro-batch whose sums are thrown away."""


def check_sync(sync: str) -> None:
    """Raise ValueError unless ``sync`` is one of the ways to combine the statistics of several processes."""
    if sync not in SYNC:
        raise ValueError(f"sync={sync!r}: must be one of {', '.join(SYNC)}")


def innermost(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer of torch's inside the wrappers of a trainer.

    Raises:
        ValueError: there is none
    """
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ValueError(f"optimizer of type {type(optimizer).__name__}: must be a torch.optim.Optimizer, or wrap one")
    return optimizer


class OptimizerStatistics:
    """Takes over the running statistics of a model until :meth:`release`: one step of them per step of an optimizer.

    .. code-block:: python

        import torch
        from torch import nn

        from fairseq_powernorm.integrations.steps import OptimizerStatistics
        from fairseq_powernorm.norms import PowerNorm

        model = nn.Sequential(nn.Linear(8, 8), PowerNorm(8), nn.Linear(8, 1))
        optimizer = torch.optim.AdamW(model.parameters())
        following = OptimizerStatistics(model, optimizer)
        for _ in range(4):                              # micro-batches of one step
            with following.batch():
                model(torch.randn(6, 8)).mean().div(4).backward()
        optimizer.step()                                # the statistics take their step, too
        optimizer.zero_grad()
        following.discard()                             # nothing, unless the step was skipped

    Args:
        model: on its device already
        optimizer: a ``torch.optim.Optimizer``, or what wraps one in an attribute ``optimizer``
        sync: ``step``, ``exact`` or ``off``, see :class:`~fairseq_powernorm.statistics.RunningStatistics`
        ranks: number of processes over which gradients are averaged
        owner: who asks, for messages

    Raises:
        ValueError: the model has no norm with running statistics, somebody else has taken them over, ``nn.DataParallel`` is
            in use, ``sync`` is unknown, or ``off`` where DDP would broadcast the buffers of rank 0
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any,
        *,
        sync: str = "step",
        ranks: int = 1,
        owner: str = "OptimizerStatistics",
    ):
        check_sync(sync)
        for module in model.modules():
            if isinstance(module, nn.DataParallel):
                raise ValueError(
                    f"{owner}: nn.DataParallel copies the model in each step, and the statistics of the copies are lost; "
                    "use DistributedDataParallel, with one process for each device"
                )
            if sync == "off" and isinstance(module, nn.parallel.DistributedDataParallel) and module.broadcast_buffers:
                raise ValueError(
                    f"{owner}: sync='off' keeps the statistics of each process, but DDP would overwrite them by those of "
                    "rank 0; give DDP broadcast_buffers=False"
                )
        norms = running_norms(model)
        if not norms:
            raise ValueError(f"{owner}: no norm of the model has running statistics")
        for name, norm in norms.items():
            if norm.stage is not None:
                raise ValueError(
                    f"{owner}: the statistics of {name} have been taken over already; attach one callback (or mixin, or "
                    "RunningStatistics), once, and release() what is left of a training that has failed"
                )
        inner = innermost(optimizer)
        #: the statistics that this drives
        self.statistics = RunningStatistics(model, sync)
        self._ranks = ranks
        self._device = next(iter(norms.values())).iters.device
        self._batch: Optional[ContextManager[None]] = None
        self._warned = False
        self._hook = inner.register_step_post_hook(self._after_step)

    # ------------------------------------------------------------------ micro-batches

    @contextmanager
    def batch(self, scaler: Optional[Any] = None) -> Iterator[None]:
        """Around forward and backward pass of one micro-batch; a step of the optimizer in it ends it.

        Args:
            scaler: the ``GradScaler`` that multiplies the loss, if there is one
        """
        self.begin_batch(scaler)
        try:
            yield
        except BaseException:
            self.abandon_batch()
            raise
        self.end_batch()

    def begin_batch(self, scaler: Optional[Any] = None) -> None:
        """Before the forward pass of a micro-batch; one that has not been ended is abandoned."""
        self.abandon_batch()
        batch = self.statistics.batch(gradient_scale=self._gradient_scale(scaler))
        batch.__enter__()
        self._batch = batch

    def end_batch(self) -> None:
        """After the backward pass: its sums belong to the step. Without a micro-batch in progress: nothing."""
        batch, self._batch = self._batch, None
        if batch is not None:
            batch.__exit__(None, None, None)

    def abandon_batch(self) -> None:
        """Throw the sums of the micro-batch in progress away, as one without a backward pass has no gradient."""
        batch, self._batch = self._batch, None
        if batch is not None:
            batch.__exit__(_Abandoned, _Abandoned(), None)

    def _gradient_scale(self, scaler: Optional[Any]) -> Union[float, Tensor]:
        if scaler is None or not scaler.is_enabled():
            return float(self._ranks)
        scale: Tensor = scaler.scale(torch.full((), float(self._ranks), device=self._device))  # the host reads nothing
        return scale

    # ------------------------------------------------------------------ steps

    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """The optimizer has taken a step, or left it out by itself as fused ones do at an overflow.

        None is the step without a batch and with learning rates of zero by which an optimizer makes its state for torch's
        checkpoints of sharded models.
        """
        nothing = self._batch is None and not self.statistics.batches
        if nothing and not any(group.get("lr", 1.0) for group in optimizer.param_groups):
            return
        found_inf = getattr(optimizer, "found_inf", None)  # left there by the loss scaler for the time of the step
        if found_inf is None or not bool(found_inf):
            self.end_batch()
            self.commit()

    def commit(self) -> None:
        """Take one step of the statistics with what has been gathered, on all ranks together."""
        left_out = self.statistics.reduce()
        self.statistics.commit()
        self._report(left_out)

    def discard(self) -> None:
        """Forget the sums of the step, as with its gradients: nothing is left to forget after a step that was taken."""
        self.statistics.discard()

    def release(self) -> None:
        """Let the norms apply their statistics themselves again. May be called twice."""
        self.abandon_batch()
        self._hook.remove()
        self.statistics.release()

    def _report(self, left_out: Dict[str, int]) -> None:
        """Warn once of sums that were not finite."""
        if left_out and not self._warned and (not dist.is_available() or not dist.is_initialized() or dist.get_rank() == 0):
            self._warned = True
            logger.warning(
                "statistics not finite and left out in %d norms, first %s; reported once",
                len(left_out), next(iter(left_out)),
            )
