"""``translation_pn`` and ``language_modeling_pn``: fairseq's tasks, driving the running statistics of the norms.

A training step is what fairseq's trainer makes of it: statistics are collected in every forward and backward pass,
discarded along with the gradients, and applied when the optimizer takes its step.
"""
import logging
import math
import os
from dataclasses import dataclass
from typing import Any, Dict, Optional
from weakref import WeakSet

import torch
import torch.distributed as dist
from fairseq import utils
from fairseq.distributed import utils as distributed_utils
from fairseq.logging import metrics
from fairseq.models import ARCH_MODEL_REGISTRY
from fairseq.modules import LayerDropModuleList
from fairseq.optim.amp_optimizer import AMPOptimizer
from fairseq.tasks import register_task
from fairseq.tasks.language_modeling import LanguageModelingConfig, LanguageModelingTask
from fairseq.tasks.translation import TranslationConfig, TranslationTask
from omegaconf import II

from .fold import fold_norms, may_fold
from .models.base import PowerNormModel, check_kind
from .norms import RegularizedBatchNorm, penalty
from .options import (
    NORM_FIELDS,
    InferenceOptions,
    StatisticsOptions,
    check_statistics_options,
    flag,
    given_flags,
)
from .probe import GradientProbe
from .recorder import Recorder, check_target
from .statistics import RunningStatistics, running_norms

logger = logging.getLogger(__name__)

#: key of the norms' penalty in what a criterion and the trainer log
PENALTY = "norm_penalty"

#: updates in a row whose gradients may be not finite (without a loss scale) before training stops, as in plain fairseq
MAX_SKIPPED_UPDATES = 10


def gradient_scale(optimizer, device: torch.device):
    """Factor by which a fairseq optimizer multiplies the loss (a number, or a tensor that the host has not read)."""
    scaler = getattr(optimizer, "scaler", None)
    if scaler is None:
        return 1.0
    if isinstance(optimizer, AMPOptimizer):
        return scaler.scale(torch.ones((), device=device))
    return scaler.loss_scale


class RunningStatisticsTask:
    """Mixin for a fairseq task: one step of the running statistics per optimizer step.

    Without a loss scale (float32, bfloat16) fairseq stops at a gradient that is not finite. Here such an update is
    skipped, on all ranks alike, and reported; only the eleventh in a row stops the training.

    A task whose options derive from :class:`~.options.StatisticsOptions` has their flags, any other their defaults.
    """

    #: of the fairseq task that this is mixed into; None in tasks of fairseq's older kind, which have args
    cfg: Any
    #: what a model with running statistics asks for in a task that trains it
    drives_running_statistics = True

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._statistics: Optional[RunningStatistics] = None
        self._model: Optional[torch.nn.Module] = None
        self._recorder: Optional[Recorder] = None
        self._has_penalty = False
        self._probe: Optional[GradientProbe] = None
        self._gradient_is_finite = True
        self._loss_is_void = False
        self._skipped_in_a_row = 0
        self._warned = False
        self._trains = False

    def _option(self, name: str) -> Any:
        value = getattr(getattr(self, "args", None) if self.cfg is None else self.cfg, name, None)
        return getattr(StatisticsOptions(), name) if value is None else value

    # ------------------------------------------------------------------ what fairseq calls

    def begin_epoch(self, epoch, model):
        """Before any training: refuse what cannot work."""
        super().begin_epoch(epoch, model)
        record = self._option("norm_record")
        if record is not None and self._recorder is None:
            if not running_norms(model):
                raise ValueError(f"--norm-record {record!r}: no norm of the model has running statistics")
            updates = metrics.get_meter("default", "num_updates")  # logged when training resumes from a checkpoint
            self._recorder = Recorder(record, self._option("norm_record_interval"))
            self._recorder.check(new_run=updates is None or not updates.val)

    def train_step(self, sample, model, criterion, optimizer, update_num, ignore_grad=False, **kwargs):
        """See fairseq. A dummy batch (``ignore_grad``) leaves no statistics and no gradient."""
        if model is not self._model:
            self._take_over(model, update_num)
        if self._probe is not None and self._statistics.batches == 0:
            (self._probe.begin if self._recorder.due(update_num + 1) else self._probe.end)()
        scale = gradient_scale(optimizer, next(model.parameters()).device)
        with self._statistics.batch(counts=not ignore_grad, gradient_scale=scale):
            penalized = _penalized(criterion) if self._has_penalty else criterion
            return super().train_step(sample, model, penalized, optimizer, update_num, ignore_grad, **kwargs)

    def optimizer_step(self, optimizer, model, update_num):
        """Step of the optimizer and of the running statistics, or of neither."""
        statistics = self._statistics
        left_out = statistics.reduce()
        if self._gradient_is_finite:
            super().optimizer_step(optimizer, model, update_num)
            self._skipped_in_a_row = 0
            if self._recorder is not None and self._recorder.due(update_num + 1):
                gradients = self._probe.describe()  # on all ranks
                if _rank() == 0:
                    described = {name: {**row, **gradients.get(name, {})} for name, row in statistics.describe().items()}
                    self._recorder.write(update_num + 1, described)
            if statistics.batches > 1:
                self._warn_of_micro_batches()
            statistics.commit()
            self._report(left_out)
        elif isinstance(optimizer, AMPOptimizer):
            super().optimizer_step(optimizer, model, update_num)  # which only adapts the loss scale
            self._discard()
        else:
            statistics.discard()
            self._report(left_out, skipped=True)
            self._loss_is_void = True

    def reduce_metrics(self, logging_outputs, criterion):
        """See fairseq; the loss of an update that was skipped enters no average."""
        if self._loss_is_void:
            self._loss_is_void = False
            metrics.log_scalar("loss", float("nan"), 0)
        else:
            super().reduce_metrics(logging_outputs, criterion)
            if any(PENALTY in output for output in logging_outputs):
                total = sum(float(output.get(PENALTY, 0.0)) for output in logging_outputs)
                size = sum(output.get("sample_size", 0) for output in logging_outputs)
                metrics.log_scalar(PENALTY, total / max(1, size) / math.log(2), size, round=4)  # as fairseq's loss

    # ------------------------------------------------------------------ what the patched trainer calls, see patches

    def check_training(self):
        """Before any training, and only then: a checkpoint may be used where its record was not written.

        Raises:
            ValueError: the record cannot be written
        """
        self._trains = True
        if self._option("norm_record") is not None:
            check_target(self._option("norm_record"), self._option("norm_record_interval"))

    def forget_statistics(self):
        """The gradients are zeroed: what was gathered since the last step (overflow, out of memory) goes with them."""
        if self._statistics is not None and self._statistics.batches:
            self._discard()

    def judge_gradient(self, norm: torch.Tensor, optimizer) -> torch.Tensor:
        """Note whether the gradient is finite; if it is not and there is no loss scale, return a norm of zero.

        The trainer continues after a finite norm, and :meth:`optimizer_step` skips the update.
        """
        self._gradient_is_finite = bool(torch.isfinite(norm).all())
        if self._gradient_is_finite or getattr(optimizer, "scaler", None) is not None:
            return norm
        self._skipped_in_a_row += 1
        return norm if self._skipped_in_a_row > MAX_SKIPPED_UPDATES else torch.zeros_like(norm)

    # ------------------------------------------------------------------ how it is done

    def _take_over(self, model, update_num: int) -> None:
        """Take the norms' statistics over; when training resumes, continue the record."""
        sync, group = self._option("norm_sync"), distributed_utils.get_data_parallel_group()
        if self._statistics is not None and {*self._statistics.norms().values()} <= {*running_norms(model).values()}:
            self._statistics.release()  # the trainer has wrapped the same model anew: --quantization-config-path
            if self._probe is not None:
                self._probe.end()
        self._model, self._statistics = model, RunningStatistics(model, sync, group)
        self._has_penalty = any(isinstance(module, RegularizedBatchNorm) for module in model.modules())
        drop = max((module.p for module in model.modules() if isinstance(module, LayerDropModuleList)), default=0)
        if self._statistics.switches.reduce is not None and drop > 0:
            raise ValueError(
                f"--norm-sync exact with layer drop {drop}: the ranks drop different layers and would wait for each "
                "other for ever; must be step or off"
            )
        if self._recorder is not None:
            if _rank() == 0:
                self._recorder.go_on(update_num)
            self._statistics.switches.recording = True
            self._probe = GradientProbe(self._statistics.norms(), self._statistics.total)

    def _discard(self) -> None:
        """Discard what was gathered for a step, on this rank or, after the reduction, on any."""
        assert self._statistics is not None
        # the backward pass overflows in the normal course of fp16 training: fairseq reports that by itself
        left_out = self._statistics.left_out(("forward",))
        self._statistics.discard()
        self._report(left_out)

    def _report(self, left_out: Dict[str, int], skipped: bool = False) -> None:
        """Count what was not finite in the log, and warn once per log interval."""
        if not left_out and not skipped:
            return
        meter = metrics.get_meter("train_inner", "norm_nonfinite")
        silent = meter is None or not meter.sum
        metrics.log_scalar_sum("norm_nonfinite", max(1, sum(left_out.values())), priority=1000)
        if silent and _rank() == 0:
            what = ["gradient not finite, update skipped"] if skipped else []
            if left_out:
                what.append(f"statistics not finite and left out in {len(left_out)} norms, first {next(iter(left_out))}")
            logger.warning("; ".join(what))

    def _warn_of_micro_batches(self) -> None:
        """Once: exact statistics need the whole batch before the first norm is through with it."""
        if self._option("norm_sync") == "exact" and not self._warned and _rank() == 0:
            logger.warning(
                "--norm-sync exact: exact over ranks; each of the micro-batches of --update-freq is normalized by "
                "itself where a norm divides by statistics of the batch (BN, PN-V, PN's variant reference)"
            )
        self._warned = True


def _penalized(criterion):
    """The criterion with the norms' penalty added to its loss, which it sums over tokens, and to what it logs."""

    def with_penalty(model, sample):
        loss, sample_size, logging_output = criterion(model, sample)
        added = penalty(model)
        return loss + added, sample_size, {**logging_output, PENALTY: added.detach()}

    return with_penalty


def _rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


class PowerNormTask(RunningStatisticsTask):
    """Mixin, before a task class of fairseq: what the tasks of this package have in common.

    Raises:
        ValueError: the data directory is missing or holds no dictionaries, or an option of the statistics is invalid
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        #: models that were loaded from a checkpoint by a task that has seen no training
        self._loaded = WeakSet()

    @classmethod
    def add_args(cls, parser):
        """Declare the options.

        Raises:
            ValueError: the command line asks for this task and for an architecture of another kind, or has norm options
                for an architecture without them
        """
        super().add_args(parser)
        flags = given_flags()
        model = ARCH_MODEL_REGISTRY.get(flags.get("arch"))
        if model is None:
            return
        check_kind(flags["arch"], model, cls)
        if not issubclass(model, PowerNormModel):
            for name in NORM_FIELDS:
                if name in flags:
                    ours = [arch for arch, each in ARCH_MODEL_REGISTRY.items() if issubclass(each, PowerNormModel)]
                    raise ValueError(
                        f"{flag(name)} {flags[name]}: --arch {flags['arch']} has no norm options; must be one of "
                        f"{', '.join(ours)}"
                    )

    def build_model(self, cfg, from_checkpoint=False):
        """See fairseq; notes which models a command loads from a checkpoint, as fairseq-validate does.

        Raises:
            ValueError: the model is not of the kind that this task trains, or has an invalid option
        """
        arch = getattr(cfg, "_name", None) or getattr(cfg, "arch", None)
        if arch in ARCH_MODEL_REGISTRY:
            check_kind(arch, ARCH_MODEL_REGISTRY[arch], type(self))
        model = super().build_model(cfg, from_checkpoint)
        if isinstance(model, PowerNormModel):
            model.write_options(cfg)
        if from_checkpoint:
            self._loaded.add(model)
        return model

    def begin_epoch(self, epoch, model):
        """See fairseq; called in training only."""
        self._loaded.clear()
        super().begin_epoch(epoch, model)

    def begin_valid_epoch(self, epoch, model):
        """See fairseq; called in training only."""
        self._loaded.clear()
        super().begin_valid_epoch(epoch, model)

    def valid_step(self, sample, model, criterion):
        """See fairseq; folds the norms of a model that is evaluated and not trained."""
        if model in self._loaded:
            self._loaded.discard(model)
            # fairseq-validate drops an option that the checkpoint does not know
            if not (self.cfg.no_fold_norms or "no_fold_norms" in given_flags()) and may_fold(model):
                fold_norms(model)
        return super().valid_step(sample, model, criterion)

    @classmethod
    def setup_task(cls, cfg, **kwargs):
        """Check options and data directories, then set up fairseq's task."""
        check_statistics_options(cfg)
        for path in utils.split_paths(cfg.data or ""):
            if not os.path.isdir(path):
                raise ValueError(f"data {path!r}: not a directory; must be one written by fairseq-preprocess")
        return super().setup_task(cfg, **kwargs)

    def get_batch_iterator(self, dataset, *args, required_batch_size_multiple=1, epoch=1, **kwargs):
        """As in fairseq, but outside training no sentence is left out, and a restart finds the batches it had.

        fairseq drops a last batch whose size is not a multiple of ``--required-batch-size-multiple`` (8 by
        default), in validation and generation too (of whatever subset: that of training may be translated). Where it
        keeps the batches of the first epoch for all epochs, a restart in a later epoch would make others.
        """
        if not self._trains or dataset is not self.datasets.get(self.cfg.train_subset):
            required_batch_size_multiple = 1
        kept = self.can_reuse_epoch_itr(dataset) and not (
            kwargs.get("disable_iterator_cache")
            or kwargs.get("update_epoch_batch_itr")
            or getattr(self.cfg, "rebuild_batches", False)
        )
        restarted = kept and epoch > 1 and dataset not in self.dataset_to_epoch_iter
        iterator = super().get_batch_iterator(
            dataset, *args, required_batch_size_multiple=required_batch_size_multiple,
            epoch=1 if restarted else epoch, **kwargs,
        )
        if restarted:
            iterator.epoch = epoch
            dataset.set_epoch(epoch)
        return iterator


@dataclass
class TranslationPNConfig(InferenceOptions, StatisticsOptions, TranslationConfig):
    """Options of :class:`TranslationPNTask`."""


@register_task("translation_pn", dataclass=TranslationPNConfig)
class TranslationPNTask(PowerNormTask, TranslationTask):
    """Translation, BLEU during validation (``--eval-bleu``, by sacreBLEU) included."""


@dataclass
class LanguageModelingPNConfig(InferenceOptions, StatisticsOptions, LanguageModelingConfig):
    """Options of :class:`LanguageModelingPNTask`."""

    train_subset: str = II("dataset.train_subset")


@register_task("language_modeling_pn", dataclass=LanguageModelingPNConfig)
class LanguageModelingPNTask(PowerNormTask, LanguageModelingTask):
    """Language modelling on blocks of ``--tokens-per-sample`` tokens; sampling by ``fairseq-interactive``."""

    def __init__(self, args, *more, **options):
        super().__init__(args, *more, **options)
        self.cfg = args  # where fairseq's newer tasks have their options

    def eval_lm_dataloader(self, dataset, *args, max_positions=None, **kwargs):
        """As in fairseq, which would leave out blocks that are longer than the model allows.

        Raises:
            ValueError: there is such a block
        """
        longest = int(max(dataset.sizes))
        if max_positions is not None and longest > max_positions:
            raise ValueError(
                f"--tokens-per-sample {self.cfg.tokens_per_sample}: a block of {longest} tokens is longer than the "
                f"{max_positions} that the model allows"
            )
        return super().eval_lm_dataloader(dataset, *args, max_positions=max_positions, **kwargs)


from . import register  # noqa: E402,F401  (whichever module for fairseq is imported first, all are registered)
