"""Running statistics in ``transformers.Trainer``: a callback, or a mixin for a trainer class of one's own.

.. code-block:: python

    import torch
    from torch import nn
    from transformers import Trainer, TrainingArguments

    from fairseq_powernorm.integrations.hugging_face import RunningStatisticsCallback
    from fairseq_powernorm.norms import PowerNorm


    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(8, 8), PowerNorm(8), nn.Linear(8, 1))

        def forward(self, x, labels):
            return {"loss": (self.layers(x).squeeze(-1) - labels).square().mean()}


    data = [{"x": torch.randn(8), "labels": torch.randn(())} for _ in range(32)]
    arguments = TrainingArguments(
        per_device_train_batch_size=2, gradient_accumulation_steps=4, max_steps=4, report_to=[], save_strategy="no"
    )
    Trainer(Model(), arguments, train_dataset=data, callbacks=[RunningStatisticsCallback()]).train()

Checkpoints need nothing more: the statistics are buffers of the model. :mod:`~fairseq_powernorm.integrations.steps`
explains the scale of nu. Micro-batches equal one batch only if their losses add up to its. Those of transformers' causal
language models do, because they divide by the tokens of the whole step; a model that averages over each micro-batch, as
``BertForMaskedLM`` does, needs a ``compute_loss_func`` that divides by ``num_items_in_batch``.
"""
from typing import Any, Optional

from torch import nn
from transformers import TrainerCallback
from transformers.training_args import ParallelMode

from .accelerate import check_parallelism
from .steps import OptimizerStatistics, check_sync

#: how a trainer may run: alone, or one process for each device
_MODES = (ParallelMode.NOT_PARALLEL, ParallelMode.DISTRIBUTED)


class RunningStatisticsCallback(TrainerCallback):  # type: ignore[misc]
    """One step of the running statistics with each step of the optimizer, for ``Trainer(..., callbacks=[...])``.

    Supports all norms with running statistics. It takes gradient accumulation (including the last,
    shorter one of an epoch), loss scaling, DDP, FSDP and evaluation during training into account. After a training that
    ended with an error, the norms do not update their statistics until the next one, or until :meth:`release`.

    Args:
        sync: ``step``, ``exact`` or ``off``, see :class:`~fairseq_powernorm.statistics.RunningStatistics`

    Raises:
        ValueError: ``sync`` is unknown; at the beginning of training: no norm of the model has running statistics, the
            callback is attached twice, or the trainer uses ``nn.DataParallel``, DeepSpeed, or tensor or context parallelism
    """

    #: who speaks, in messages
    _owner = "RunningStatisticsCallback"

    def __init__(self, *, sync: str = "step"):
        check_sync(sync)
        self.sync = sync
        self._following: Optional[OptimizerStatistics] = None
        self._run: Optional[Any] = None

    @property
    def following(self) -> OptimizerStatistics:
        """What follows the optimizer of the training in progress.

        Raises:
            RuntimeError: no training is in progress
        """
        if self._following is None:
            raise RuntimeError(f"{self._owner}: no training is in progress")
        return self._following

    def release(self) -> None:
        """Let the norms apply their statistics themselves again."""
        if self._following is not None:
            self._following.release()
        self._following = self._run = None

    # ------------------------------------------------------------------ what the trainer calls

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the norms over, after whatever a checkpoint held has been loaded."""
        if self._run is state:
            raise ValueError(f"{self._owner}: attached twice to one trainer; attach it once")
        self.release()  # what is left of a training that has failed, or that begins anew with smaller batches
        model = kwargs["model"]
        self._check(args, model)
        self._following = OptimizerStatistics(
            model, kwargs["optimizer"], sync=self.sync, ranks=args.world_size, owner=self._owner
        )
        self._run = state

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The first micro-batch of a step follows."""
        self._begin_batch(kwargs["optimizer"])

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A micro-batch has ended, and another one of the same step may follow."""
        self.following.end_batch()
        self._begin_batch(kwargs["optimizer"])

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The last micro-batch of a step has ended."""
        self.following.end_batch()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The statistics have taken their step with the optimizer, or the trainer forgets the gradients now."""
        self.following.discard()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The micro-batch that would have followed does not."""
        self.following.abandon_batch()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Release the norms."""
        self.release()

    # ------------------------------------------------------------------ how it is done

    def _begin_batch(self, optimizer: Any) -> None:
        self.following.begin_batch(getattr(optimizer, "scaler", None))

    def _check(self, args: Any, model: nn.Module) -> None:
        """Raise ValueError for ways to train in which the statistics would be wrong."""
        if args.parallel_mode not in _MODES:
            raise ValueError(
                f"{self._owner}: parallel mode {args.parallel_mode.value!r} (nn.DataParallel, where a single process sees "
                "several GPUs) copies the model in each step, and the statistics of the copies are lost; start one process "
                "for each device, with torchrun or accelerate launch"
            )
        check_parallelism(self._owner, args.distributed_state.distributed_type, getattr(args, "parallelism_config", None))
        if (getattr(model, "tp_size", None) or 1) > 1:
            raise ValueError(f"{self._owner}: tensor parallelism (tp_size={model.tp_size}) is not supported")
        ddp = str(args.distributed_state.distributed_type.value).startswith("MULTI_")
        if self.sync == "off" and ddp and args.ddp_broadcast_buffers is not False:
            raise ValueError(
                f"{self._owner}: sync='off' keeps the statistics of each process, but DDP would overwrite them by those of "
                "rank 0; set ddp_broadcast_buffers=False in the TrainingArguments"
            )


class _FromTrainingStep(RunningStatisticsCallback):
    """The callback of the mixin, which says by itself when a micro-batch begins and ends."""

    _owner = "RunningStatisticsMixin"

    def _begin_batch(self, optimizer: Any) -> None:
        pass


class RunningStatisticsMixin:
    """The same as :class:`RunningStatisticsCallback` for a trainer class: ``class Mine(RunningStatisticsMixin, Trainer)``.

    A micro-batch is a call of ``training_step``: a training pass elsewhere is an error, not a part of the statistics.
    However a training ends, the norms are released.

    Args:
        norm_sync: ``step``, ``exact`` or ``off``; all others are the trainer's

    Raises:
        ValueError: as :class:`RunningStatisticsCallback`
    """

    def __init__(self, *args: Any, norm_sync: str = "step", **kwargs: Any):
        self._statistics = _FromTrainingStep(sync=norm_sync)
        super().__init__(*args, **kwargs)
        trainer: Any = self
        trainer.add_callback(self._statistics)

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """See the trainer."""
        trainer: Any = self
        with self._statistics.following.batch(getattr(trainer.optimizer, "scaler", None)):
            return super().training_step(*args, **kwargs)  # type: ignore[misc]

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """See the trainer."""
        try:
            return super().train(*args, **kwargs)  # type: ignore[misc]
        finally:
            self._statistics.release()
