"""Shims that let an unmodified fairseq run on current versions of its dependencies.

Applied once, when the plugin is imported, before anything of fairseq is used. None of them changes a file of
fairseq or turns a safety check off.
"""
import argparse
import codecs
import collections
import logging
import os
import types
import typing
import warnings

import numpy as np
import torch
from packaging.version import Version

from . import ranks, resume

logger = logging.getLogger(__name__)

#: warnings that every fairseq command prints and that its user can do nothing about: beginnings of their messages
KNOWN_WARNINGS = (
    r"hydra\.experimental\.\w+\(\) is no longer experimental",
    r"\s*The version_base parameter is not specified",
    r"In 'config': Usage of deprecated keyword in package header",
    r"\s*'config' is validated against ConfigStore schema with the same name",
    r"\s*The strict flag in the compose API is deprecated",
    r"`torch\.cuda\.amp\.\w+\(args\.\.\.\)` is deprecated",
    r"'pin_memory' argument is set as true but no accelerator is found",
    r"Support for mismatched key_padding_mask and attn_mask is deprecated",
    r"`torch\.jit\.script` is deprecated",
)


def silence_known_warnings() -> None:
    """Filter by message, so that a warning that is not on the list is still seen."""
    for message in KNOWN_WARNINGS:
        warnings.filterwarnings("ignore", message=message)


def restore_numpy_long() -> None:
    """numpy 2 dropped ``np.compat``, of which fairseq's datasets use one name, ``np.compat.long``."""
    if not hasattr(np, "compat"):
        np.compat = types.SimpleNamespace(long=int)


def allow_checkpoint_types() -> None:
    """Let torch's weights-only loading, the default from torch 2.6 on, read fairseq's checkpoints.

    An allow-list of plain data types; weights-only loading itself stays on. Before torch 2.6 a type is known by its
    own name only, so checkpoints of fairseq 0.8 and 0.9 that hold meters cannot be read there.
    """
    import omegaconf
    from fairseq.distributed.utils import _TensorPlaceholder
    from fairseq.logging import meters

    reconstruct = np.zeros(1).__reduce__()[0]
    allowed = [
        argparse.Namespace,
        # scores that --eval-bleu leaves in a checkpoint; numpy 1 and 2 save them under different names
        np.ndarray,
        np.dtype,
        type(np.dtype(np.int64)),
        type(np.dtype(np.float64)),
        (reconstruct, "numpy.core.multiarray._reconstruct"),
        (reconstruct, "numpy._core.multiarray._reconstruct"),
        # configurations, which the ranks of a distributed run send each other on resuming
        omegaconf.DictConfig,
        omegaconf.ListConfig,
        omegaconf.base.ContainerMetadata,
        omegaconf.base.Metadata,
        omegaconf.nodes.AnyNode,
        _TensorPlaceholder,
        typing.Any,
        dict,
        list,
        int,
        collections.defaultdict,
    ]
    # checkpoints of fairseq 0.8 and 0.9 hold their meters
    for name in ("AverageMeter", "TimeMeter", "StopwatchMeter"):
        meter = getattr(meters, name)
        allowed += [meter, (meter, f"fairseq.meters.{name}")]
    if Version(torch.__version__) < Version("2.6"):
        allowed = [reconstruct, codecs.encode, *(entry for entry in allowed if hasattr(entry, "__name__"))]
    torch.serialization.add_safe_globals(allowed)


def check_yaml_options() -> None:
    """Let an options class with a method ``check_keys`` see the options of a YAML file before they are merged.

    fairseq leaves the check to omegaconf, whose error names a misspelt option but neither its value nor the valid ones.
    """
    from fairseq.dataclass import utils

    merge = utils.merge_with_parent
    if hasattr(merge, "checks_keys"):
        return

    def merge_with_parent(dc, cfg, remove_missing=False):
        if hasattr(dc, "check_keys") and not remove_missing:
            dc.check_keys(cfg)
        return merge(dc, cfg, remove_missing)

    merge_with_parent.checks_keys = True
    utils.merge_with_parent = merge_with_parent


def copy_checkpoints_whole() -> None:
    """Let fairseq's copies of a checkpoint, the last and the best, replace the older file whole or not at all.

    fairseq writes over the older file, so that a process killed at that moment leaves neither.
    """
    from fairseq.file_io import PathManager

    copy = PathManager.copy
    if hasattr(copy, "is_whole"):
        return

    def copy_whole(src_path: str, dst_path: str, overwrite: bool = False) -> bool:
        if not overwrite or PathManager.path_requires_pathmanager(dst_path):
            return copy(src_path, dst_path, overwrite=overwrite)
        temporary = f"{dst_path}.tmp"  # named as fairseq names them
        try:
            done = copy(src_path, temporary, overwrite=True)
            if done:
                with open(temporary, "rb+") as stream:
                    os.fsync(stream.fileno())
                os.replace(temporary, dst_path)
        finally:
            if os.path.exists(temporary):
                os.remove(temporary)
        return dst_path if done == temporary else done

    copy_whole.is_whole = True
    PathManager.copy = staticmethod(copy_whole)


def resume_from_whole_checkpoints() -> None:
    """Let training that goes on in its directory do so from a whole checkpoint: see :func:`resume.choose`.

    The first rank chooses for all. Another file given by ``--restore-file`` or ``--finetune-from-model`` is loaded as
    it is. From a checkpoint of the last update of all, written just before the process was killed, fairseq would train
    one update more; here it ends.
    """
    from fairseq.distributed import utils
    from fairseq.file_io import PathManager
    from fairseq.trainer import Trainer

    load = Trainer.load_checkpoint
    if hasattr(load, "from_whole"):
        return

    def choose(trainer, directory):
        suffixes = [trainer.checkpoint_suffix]
        if trainer.is_fsdp and trainer.cfg.distributed_training.use_sharded_state:
            shards = range(trainer.data_parallel_world_size)
            suffixes = [f"{trainer.cfg.checkpoint.checkpoint_suffix}-shard{shard}" for shard in shards]
        chosen, error = None, None
        if trainer.data_parallel_rank == 0:
            try:
                chosen = resume.choose(directory, suffixes)
            except ValueError as refusal:
                error = str(refusal)
        if trainer.data_parallel_world_size > 1:
            chosen, error = utils.broadcast_object(
                [chosen, error], src_rank=0, group=trainer.data_parallel_process_group, dist_device=trainer.device
            )
        if error:
            raise ValueError(error)
        return chosen

    def check_common(trainer, filename):
        """fairseq looks for the file on every rank and lets the first one send its content: it must be there for all."""
        if trainer.data_parallel_world_size > 1:
            exists = os.path.isfile(filename)
            first = utils.broadcast_object(
                exists, src_rank=0, group=trainer.data_parallel_process_group, dist_device=trainer.device
            )
            ranks.check_checkpoint(filename, exists, first, trainer.data_parallel_rank)

    def load_checkpoint(self, filename, *args, **kwargs):
        cfg, suffix = self.cfg.checkpoint, self.checkpoint_suffix
        if not PathManager.path_requires_pathmanager(cfg.save_dir):
            last = os.path.join(cfg.save_dir, f"{resume.LAST}{suffix}.pt")
            if cfg.restore_file == "checkpoint_last.pt" and filename == last:
                filename = os.path.join(cfg.save_dir, f"{choose(self, cfg.save_dir)}{suffix}.pt")
                if not self.is_fsdp:
                    check_common(self, filename)
            if self.should_save_checkpoint_on_current_rank and not cfg.no_save:
                resume.remove_temporaries(cfg.save_dir, suffix)
        extra_state = load(self, filename, *args, **kwargs)
        limit = self.cfg.optimization.max_update
        if extra_state is not None and 0 < limit <= self.get_num_updates():
            # fairseq looks at the limit after an update, and at this one before
            logger.info(f"{filename} has {self.get_num_updates()} updates, all of --max-update {limit}: nothing to train")
            self.cfg.optimization.stop_min_lr = float("inf")
        return extra_state

    load_checkpoint.from_whole = True
    Trainer.load_checkpoint = load_checkpoint


def check_ranks() -> None:
    """Let training begin only if all ranks train one model with the same settings and data: see :mod:`ranks`."""
    from fairseq.distributed import utils
    from fairseq.trainer import Trainer

    begin_epoch = Trainer.begin_epoch
    if hasattr(begin_epoch, "checks_ranks"):
        return

    def begin_epoch_together(self, epoch):
        if not hasattr(self, "_ranks_checked"):
            self._ranks_checked = True
            ranks.check_number(self.data_parallel_world_size, self.cfg.common.model_parallel_size)
            if self.data_parallel_world_size > 1:
                mine = ranks.facts(self.cfg, self.task)
                first = utils.broadcast_object(
                    mine, src_rank=0, group=self.data_parallel_process_group, dist_device=self.device
                )
                ranks.check_facts(mine, first, self.data_parallel_rank)
        return begin_epoch(self, epoch)

    begin_epoch_together.checks_ranks = True
    Trainer.begin_epoch = begin_epoch_together


def apply() -> None:
    """Apply every shim; safe to call more than once."""
    silence_known_warnings()
    restore_numpy_long()
    allow_checkpoint_types()
    check_yaml_options()
    copy_checkpoints_whole()
    resume_from_whole_checkpoints()
    check_ranks()
