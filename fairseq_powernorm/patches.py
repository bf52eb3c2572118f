"""What this package changes in fairseq itself: methods of its classes, each replaced once however often this is applied."""
import contextlib
import functools
import inspect
import logging
import os
from typing import Any, Callable, List, Optional, Tuple

import numpy as np
import torch

from . import checkpoint, compat, ranks, resume

logger = logging.getLogger(__name__)

#: attribute of a function of fairseq that has been replaced
_MARK = "replaced_by_fairseq_powernorm"


def is_replaced(function: Callable) -> bool:
    """Whether a function is what :func:`replace` put in the place of another."""
    return hasattr(function, _MARK)


def replace(owner: Any, name: str, replacement: Callable) -> None:
    """Let ``replacement(original, ...)`` stand for the function ``name`` of a class or module; the second time, do nothing.

    Args:
        owner: class or module of fairseq
        name: a method, static method or function of it
        replacement: called with the function that stood there before, followed by the arguments of the call
    """
    original = getattr(owner, name)
    if is_replaced(original):
        return

    @functools.wraps(original)
    def replaced(*args, **kwargs):
        return replacement(original, *args, **kwargs)

    setattr(replaced, _MARK, True)
    is_static = isinstance(inspect.getattr_static(owner, name), staticmethod)
    setattr(owner, name, staticmethod(replaced) if is_static else replaced)


def check_yaml_options(merge_with_parent, dc, cfg, remove_missing=False):
    """``fairseq.dataclass.utils.merge_with_parent``: an options class with a method ``check_keys`` sees a YAML file's first.

    fairseq leaves the check to omegaconf, whose error names a misspelt option but neither its value nor the valid ones.
    """
    if hasattr(dc, "check_keys") and not remove_missing:
        dc.check_keys(cfg)
    return merge_with_parent(dc, cfg, remove_missing)


def find_buckets(get_buckets, sizes, num_buckets):
    """``get_buckets``, for ``--num-batch-buckets``: numpy 2.4 dropped the older name of an argument that it uses."""
    try:
        return get_buckets(sizes, num_buckets)
    except TypeError:
        percentiles = np.percentile(sizes, np.linspace(0, 100, num_buckets + 1), method="lower")
        return np.unique(percentiles[1:])


def copy_whole(copy, src_path: str, dst_path: str, overwrite: bool = False):
    """``PathManager.copy``: the last and the best checkpoint replace the older file whole or not at all.

    fairseq writes over the older file, so that a process killed at that moment leaves neither.
    """
    from fairseq.file_io import PathManager

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


def load_safely(load, path: str, *args, **kwargs):
    """``load_checkpoint_to_cpu``: no code from the file is executed, and not one byte of it differs from what was written.

    Before torch 2.6, fairseq's call would execute what the file asks for; torch itself never compares checksums.
    """
    from fairseq.file_io import PathManager

    if not PathManager.path_requires_pathmanager(path):
        checkpoint.check_intact(path)
    with compat.weights_only():
        return load(path, *args, **kwargs)


def save_once(save, obj, stream):
    """``_torch_persistent_save``: an error of the disk is raised as it is, at once, and leaves no part of a checkpoint.

    fairseq tries three times, writes on behind what the attempt before has left, and raises an error of torch's that does
    not say why.
    """
    if isinstance(stream, str):
        return save(obj, stream)  # which opens it and comes back here
    watched = _Watched(stream)
    try:
        torch.save(obj, watched)
    except Exception as error:
        name = getattr(stream, "name", None)
        with contextlib.suppress(OSError):
            stream.close()
        if isinstance(name, str) and name.endswith(".tmp"):
            with contextlib.suppress(OSError):
                os.remove(name)
        if watched.error is None:
            raise
        raise OSError(watched.error.errno, watched.error.strerror, name) from error


class _Watched:
    """A stream to write to, which notes the error of the system that torch does not pass on."""

    def __init__(self, stream: Any):
        self.stream = stream
        self.error: Optional[OSError] = None

    def write(self, data) -> int:
        try:
            return self.stream.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self.stream.flush()


def load_whole_checkpoint(load_checkpoint, trainer, filename, *args, **kwargs):
    """``Trainer.load_checkpoint``: training resumes from a whole checkpoint of its directory.

    See :func:`resume.choose`; the first rank chooses for all. Another file given by ``--restore-file`` or
    ``--finetune-from-model`` is loaded as it is. From a checkpoint of the last update of all, written just before the
    process was killed, fairseq would train one update more; here it ends.
    """
    from fairseq.file_io import PathManager

    cfg, suffix = trainer.cfg.checkpoint, trainer.checkpoint_suffix
    if not PathManager.path_requires_pathmanager(cfg.save_dir):
        last = os.path.join(cfg.save_dir, f"{resume.LAST}{suffix}.pt")
        if cfg.restore_file == "checkpoint_last.pt" and filename == last:
            filename = os.path.join(cfg.save_dir, f"{_choose(trainer, cfg.save_dir)}{suffix}.pt")
            if not trainer.is_fsdp:
                _check_common(trainer, filename)
        if trainer.should_save_checkpoint_on_current_rank and not cfg.no_save:
            resume.remove_temporaries(cfg.save_dir, suffix)
    try:
        extra_state = load_checkpoint(trainer, filename, *args, **kwargs)
    except ValueError as error:
        if "parameter group" not in str(error):
            raise
        raise ValueError(
            f"checkpoint {filename!r}: its optimizer has been training other parameters than this model's ({error}); "
            "give --reset-optimizer, or --finetune-from-model in place of --restore-file"
        ) from error
    limit = trainer.cfg.optimization.max_update
    if extra_state is not None and 0 < limit <= trainer.get_num_updates():
        # fairseq looks at the limit after an update, and at this one before
        logger.info(f"{filename} has {trainer.get_num_updates()} updates, all of --max-update {limit}: nothing to train")
        trainer.cfg.optimization.stop_min_lr = float("inf")
    return extra_state


def _choose(trainer, directory: str) -> str:
    suffixes = [trainer.checkpoint_suffix]
    if trainer.is_fsdp and trainer.cfg.distributed_training.use_sharded_state:
        shards = range(trainer.data_parallel_world_size)
        suffixes = [f"{trainer.cfg.checkpoint.checkpoint_suffix}-shard{shard}" for shard in shards]
    chosen: Any = None
    error: Optional[str] = None
    if trainer.data_parallel_rank == 0:
        try:
            chosen = resume.choose(directory, suffixes)
        except ValueError as refusal:
            error = str(refusal)
    if trainer.data_parallel_world_size > 1:
        chosen, error = _of_the_first_rank(trainer, [chosen, error])
    if error:
        raise ValueError(error)
    return chosen


def _check_common(trainer, filename: str) -> None:
    """fairseq looks for the file on every rank and lets the first one send its content: it must be there for all."""
    if trainer.data_parallel_world_size > 1:
        exists = os.path.isfile(filename)
        ranks.check_checkpoint(filename, exists, _of_the_first_rank(trainer, exists), trainer.data_parallel_rank)


def _of_the_first_rank(trainer, value):
    """The value that the first rank calls this with, on every rank."""
    from fairseq.distributed import utils

    group, device = trainer.data_parallel_process_group, trainer.device
    return utils.broadcast_object(value, src_rank=0, group=group, dist_device=device)


def check_ranks(begin_epoch, trainer, epoch):
    """``Trainer.begin_epoch``: training begins only if all ranks train one model with the same settings and data.

    See :mod:`ranks`.
    """
    if not hasattr(trainer, "_ranks_checked"):
        trainer._ranks_checked = True
        ranks.check_number(trainer.data_parallel_world_size, trainer.cfg.common.model_parallel_size)
        if trainer.data_parallel_world_size > 1:
            mine = ranks.facts(trainer.cfg, trainer.task)
            ranks.check_facts(mine, _of_the_first_rank(trainer, mine), trainer.data_parallel_rank)
    return begin_epoch(trainer, epoch)


def check_task(init, trainer, cfg, task, model, *args, **kwargs):
    """``Trainer.__init__``: a model of this package refuses a task that cannot train it, and a task what it cannot do."""
    if hasattr(model, "check_training_task"):
        model.check_training_task(task)
        model.check_final_norms(cfg.model)
    if hasattr(task, "check_training"):
        task.check_training()
    return init(trainer, cfg, task, model, *args, **kwargs)


def forget_statistics(zero_grad, trainer):
    """``Trainer.zero_grad``: what a task has gathered with the gradients is thrown away with them."""
    if hasattr(trainer.task, "forget_statistics"):
        trainer.task.forget_statistics()
    return zero_grad(trainer)


def judge_gradient(clip_grad_norm, trainer, clip_norm):
    """``Trainer.clip_grad_norm``: the task sees the norm of the gradient, and what it returns is what the trainer sees."""
    norm = clip_grad_norm(trainer, clip_norm)
    if hasattr(trainer.task, "judge_gradient"):
        norm = trainer.task.judge_gradient(norm, trainer.optimizer)
    return norm


def let_settings_change(update_config, bar, config):
    """``WandBProgressBarWrapper.update_config``: the settings of a run that is gone on with may be others than before."""
    from fairseq.logging import progress_bar

    if progress_bar.wandb is not None:
        progress_bar.wandb.config.update(config, allow_val_change=True)
    bar.wrapped_bar.update_config(config)


def patches() -> List[Tuple[Any, str, Callable]]:
    """Class or module of fairseq, name in it, and what replaces it."""
    from fairseq import checkpoint_utils
    from fairseq.data import bucket_pad_length_dataset
    from fairseq.dataclass import utils
    from fairseq.file_io import PathManager
    from fairseq.logging.progress_bar import WandBProgressBarWrapper
    from fairseq.trainer import Trainer

    return [
        (utils, "merge_with_parent", check_yaml_options),
        (bucket_pad_length_dataset, "get_buckets", find_buckets),
        (checkpoint_utils, "load_checkpoint_to_cpu", load_safely),
        (checkpoint_utils, "_torch_persistent_save", save_once),
        (PathManager, "copy", copy_whole),
        (Trainer, "__init__", check_task),
        (Trainer, "load_checkpoint", load_whole_checkpoint),
        (Trainer, "begin_epoch", check_ranks),
        (Trainer, "zero_grad", forget_statistics),
        (Trainer, "clip_grad_norm", judge_gradient),
        (WandBProgressBarWrapper, "update_config", let_settings_change),
    ]


def apply() -> None:
    """Apply every patch; safe to call more than once."""
    for patch in patches():
        replace(*patch)
