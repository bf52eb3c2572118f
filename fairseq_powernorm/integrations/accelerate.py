"""Running statistics in training loops written with ``accelerate``.

.. code-block:: python

    import torch
    from accelerate import Accelerator
    from torch import nn

    from fairseq_powernorm.integrations.accelerate import AcceleratedStatistics
    from fairseq_powernorm.norms import PowerNorm

    model = nn.Sequential(nn.Linear(8, 8), PowerNorm(8), nn.Linear(8, 1))
    optimizer = torch.optim.AdamW(model.parameters())
    batches = torch.utils.data.DataLoader(torch.randn(32, 8), batch_size=2)

    accelerator = Accelerator(gradient_accumulation_steps=4)
    model, optimizer, batches = accelerator.prepare(model, optimizer, batches)
    statistics = AcceleratedStatistics(accelerator, model, optimizer)
    for x in batches:
        with accelerator.accumulate(model), statistics.batch():
            accelerator.backward(model(x).square().mean())
            optimizer.step()
            optimizer.zero_grad()

Checkpoints need nothing more: the statistics are buffers of the model. :mod:`~fairseq_powernorm.integrations.steps`
explains the scale of nu.
"""
from contextlib import contextmanager
from typing import Any, Iterator, Optional

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn
from torch.distributed.algorithms.join import Joinable, JoinHook

from .steps import OptimizerStatistics


def check_parallelism(owner: str, kind: Any, config: Any) -> None:
    """Raise ValueError unless a model is trained by one process, or by several that average their gradients.

    Args:
        owner: who asks, for the message
        kind: accelerate's ``DistributedType``
        config: its ``ParallelismConfig``, or None
    """
    name = str(kind.value)
    if name not in ("NO", "FSDP") and not name.startswith("MULTI_"):
        raise ValueError(f"{owner}: distributed type {name} scales gradients in a way of its own; must be none, DDP or FSDP")
    for each in ("tp", "cp", "sp"):
        size = getattr(config, f"{each}_size", 1)
        if size > 1:
            raise ValueError(f"{owner}: ParallelismConfig with {each}_size={size}: must be 1, each rank needs its own data")


class AcceleratedStatistics(OptimizerStatistics, Joinable):
    """One step of the running statistics with each step of the optimizer, in a loop written with ``accelerate``.

    Supports all norms with running statistics, under DDP and FSDP, too. Where ranks may have different numbers of batches,
    pass this after the model: ``Join([model, statistics])``, or ``accelerator.join_uneven_inputs([model, statistics])``.

    Args:
        accelerator: whose ``backward`` and ``accumulate`` are used
        model, optimizer: as ``accelerator.prepare`` has returned them
        sync: ``step``, ``exact`` or ``off``, see :class:`~fairseq_powernorm.statistics.RunningStatistics`

    Raises:
        ValueError: the optimizer is not prepared, no norm of the model has running statistics, they have been taken over
            already, ``sync`` is unknown, or DeepSpeed, Megatron, or tensor or context parallelism is in use
    """

    def __init__(self, accelerator: Accelerator, model: nn.Module, optimizer: Any, *, sync: str = "step"):
        Joinable.__init__(self)
        owner = type(self).__name__
        if not isinstance(optimizer, AcceleratedOptimizer):
            raise ValueError(
                f"{owner}: optimizer of type {type(optimizer).__name__}: pass model and optimizer as accelerator.prepare() "
                "returns them"
            )
        check_parallelism(owner, accelerator.distributed_type, getattr(accelerator, "parallelism_config", None))
        super().__init__(model, optimizer, sync=sync, ranks=accelerator.num_processes, owner=owner)
        self._accelerator = accelerator
        self._model = model
        self._sync = sync
        self._told = False

    @contextmanager
    def batch(self, scaler: Optional[Any] = None) -> Iterator[None]:
        """Around forward pass, ``accelerator.backward``, ``optimizer.step`` and ``optimizer.zero_grad`` of one micro-batch.

        Args:
            scaler: the ``GradScaler`` that multiplies the loss, if it is not the accelerator's

        Raises:
            RuntimeError: the model is in a ``Join`` without the statistics, or after them
        """
        self._check_join()
        self._told = False
        with super().batch(self._accelerator.scaler if scaler is None else scaler):
            yield
        if self._joined and not self._told:
            self._tell(step=False)
        if self._accelerator.sync_gradients:
            self.discard()  # nothing is left of a step that was taken; this one was skipped, and its gradients are gone

    def commit(self) -> None:
        """Take one step of the statistics, on all ranks together.

        Raises:
            RuntimeError: the optimizer takes a step, but nothing went through the model in :meth:`batch`
        """
        if not self.statistics.batches:
            raise RuntimeError(
                "AcceleratedStatistics: the optimizer has taken a step without a batch: wrap forward pass, backward pass "
                "and optimizer.step() in 'with accelerator.accumulate(model), statistics.batch():'"
            )
        if self._joined:
            self._tell(step=True)
        super().commit()

    # ------------------------------------------------------------------ ranks that have run out of batches

    @property
    def _joined(self) -> bool:
        return bool(self._join_config.enable) and self._sync != "off"

    def _check_join(self) -> None:
        model = getattr(self._model, "_join_config", None)
        if self._sync == "off" or model is None or not model.enable:
            return
        if not self._join_config.enable or self._join_config.is_first_joinable:
            raise RuntimeError(
                "AcceleratedStatistics: a rank without batches would keep the others waiting for its statistics: join both, "
                "the model first, as in accelerator.join_uneven_inputs([model, statistics])"
            )

    def _tell(self, *, step: bool) -> bool:
        """Say whether this micro-batch ends with a step, and hear whether that of any rank does."""
        self._told = True
        flag = torch.tensor([float(step)], device=self._device)
        dist.all_reduce(flag)
        return bool(flag.item() > 0)

    def _shadow(self) -> None:
        """Take part in what the other ranks reduce for one of their micro-batches, with nothing to add."""
        self.discard()
        if self._tell(step=False):
            self.statistics.reduce()
            self.discard()

    def join_hook(self, **kwargs: Any) -> JoinHook:
        """See ``torch.distributed.algorithms.Joinable``.

        Raises:
            ValueError: ``sync="exact"``, where each pass of a norm waits for all ranks
        """
        if self._sync == "exact":
            raise ValueError("AcceleratedStatistics: sync='exact' needs a batch on each rank; must be step or off in a Join")
        return _Shadow(self)

    @property
    def join_device(self) -> torch.device:
        """Of the statistics."""
        return self._device

    @property
    def join_process_group(self) -> Any:
        """All ranks."""
        return dist.group.WORLD


class _Shadow(JoinHook):
    """What a rank without batches does, beside what the model does for each micro-batch of the others."""

    def __init__(self, statistics: AcceleratedStatistics):
        self._statistics = statistics

    def main_hook(self) -> None:
        if self._statistics._sync != "off":
            self._statistics._shadow()
