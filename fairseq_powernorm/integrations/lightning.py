"""Running statistics in Lightning's ``Trainer``: a callback.

.. code-block:: python

    import lightning
    import torch
    from torch import nn

    from fairseq_powernorm.integrations.lightning import RunningStatisticsCallback
    from fairseq_powernorm.norms import PowerNorm


    class Model(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(8, 8), PowerNorm(8), nn.Linear(8, 1))

        def training_step(self, x, index):
            return self.layers(x).square().mean()

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters())


    batches = torch.utils.data.DataLoader(torch.randn(32, 8), batch_size=2)
    trainer = lightning.Trainer(
        max_steps=4, accumulate_grad_batches=4, callbacks=[RunningStatisticsCallback()], logger=False,
        enable_checkpointing=False,
    )
    trainer.fit(Model(), batches)

Checkpoints need nothing more: the statistics are buffers of the model. :mod:`~fairseq_powernorm.integrations.steps`
explains the scale of nu. Lightning divides by ``accumulate_grad_batches`` even if the last step of an epoch has fewer
micro-batches; the gradient of that step, and with it nu, is that of the loss divided in this way.
"""
from typing import Any, Optional

try:
    from lightning.pytorch import Callback
except ImportError:  # the same under its other name
    from pytorch_lightning import Callback

from .steps import OptimizerStatistics, check_sync

#: strategies in which a rank has a model of its own, or a share of one, and gradients are averaged
_STRATEGIES = ("SingleDeviceStrategy", "DDPStrategy", "FSDPStrategy", "ModelParallelStrategy")


class RunningStatisticsCallback(Callback):  # type: ignore[misc]
    """One step of the running statistics with each step of the optimizer, for ``Trainer(callbacks=[...])``.

    Supports all norms with running statistics. It takes gradient accumulation, loss scaling (``precision="16-mixed"``),
    DDP, FSDP, ``ModelParallelStrategy``, the sanity check and validation during training into account. A module with manual
    optimization decides itself what a step is: there, use
    :class:`~fairseq_powernorm.integrations.steps.OptimizerStatistics` in its ``training_step``.

    Args:
        sync: ``step``, ``exact`` or ``off``, see :class:`~fairseq_powernorm.statistics.RunningStatistics`

    Raises:
        ValueError: ``sync`` is unknown; when ``fit`` begins: no norm of the module has running statistics, the callback is
            attached twice, the module optimizes manually, or the strategy is another one or uses tensor parallelism
    """

    def __init__(self, *, sync: str = "step"):
        super().__init__()
        check_sync(sync)
        self.sync = sync
        self._following: Optional[OptimizerStatistics] = None

    @property
    def following(self) -> OptimizerStatistics:
        """What follows the optimizer of the training in progress.

        Raises:
            RuntimeError: no training is in progress
        """
        if self._following is None:
            raise RuntimeError("RunningStatisticsCallback: no training is in progress")
        return self._following

    def release(self) -> None:
        """Let the norms apply their statistics themselves again."""
        if self._following is not None:
            self._following.release()
        self._following = None

    # ------------------------------------------------------------------ what the trainer calls

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Refuse what cannot work, before any of it."""
        if stage != "fit":
            return
        if sum(isinstance(each, RunningStatisticsCallback) for each in trainer.callbacks) > 1:
            raise ValueError("RunningStatisticsCallback: attached twice to one trainer; attach it once")
        if not pl_module.automatic_optimization:
            raise ValueError(
                "RunningStatisticsCallback: with manual optimization the module says what a step is; use "
                "fairseq_powernorm.integrations.steps.OptimizerStatistics in its training_step in place of the callback"
            )
        names = [each.__name__ for each in type(trainer.strategy).__mro__]
        if not any(name in _STRATEGIES for name in names):
            raise ValueError(
                f"RunningStatisticsCallback: strategy {names[0]} scales gradients in a way of its own; must be one of "
                f"{', '.join(_STRATEGIES)}"
            )

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Take the norms over, after the sanity check and after whatever a checkpoint held has been loaded."""
        self.release()
        mesh = getattr(trainer.strategy, "device_mesh", None)
        dimensions = getattr(mesh, "mesh_dim_names", None) or ()
        if mesh is not None and "tensor_parallel" in dimensions and mesh["tensor_parallel"].size() > 1:
            size = mesh["tensor_parallel"].size()
            raise ValueError(
                f"RunningStatisticsCallback: tensor_parallel_size={size}: must be 1, each rank needs its own data"
            )
        self._following = OptimizerStatistics(
            trainer.strategy.model,
            trainer.optimizers[0],
            sync=self.sync,
            ranks=trainer.world_size,
            owner="RunningStatisticsCallback",
        )

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """A micro-batch begins."""
        self.following.begin_batch(getattr(trainer.precision_plugin, "scaler", None))

    def on_before_zero_grad(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Statistics of steps that were skipped go with the gradients; the micro-batch in progress stays."""
        self.following.discard()

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        """The micro-batch has ended; the step of the optimizer may follow."""
        self.following.end_batch()

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """A micro-batch without a backward pass (``training_step`` returned None) leaves nothing."""
        self.following.abandon_batch()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """The same where no step follows."""
        self.following.abandon_batch()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Release the norms."""
        self.release()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Release the norms."""
        self.release()
