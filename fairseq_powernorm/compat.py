"""Shims that let an unmodified fairseq run on current versions of its dependencies.

Applied when the plugin registers itself; safe to apply again. None of them turns a safety check off.
"""
import argparse
import codecs
import collections
import contextlib
import os
import types
import typing
import warnings
from typing import Iterator

import numpy as np
import torch
from packaging.version import Version

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
        setattr(np, "compat", types.SimpleNamespace(long=int))  # noqa: B010  (a name that numpy's types do not know)


def allow_checkpoint_types() -> None:
    """Let torch's weights-only loading, the default from torch 2.6 on, read fairseq's checkpoints.

    An allow-list of plain data types; weights-only loading itself stays on (before torch 2.6, :func:`weights_only` turns
    it on). What reads checkpoints outside of fairseq's commands calls this first. Before torch 2.6 a type is known by its
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


@contextlib.contextmanager
def weights_only() -> Iterator[None]:
    """Within it ``torch.load`` executes nothing from a file, whatever its caller leaves to a default of torch before 2.6."""
    variable = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    if Version(torch.__version__) >= Version("2.6"):
        yield
        return
    before = os.environ.get(variable)
    os.environ[variable] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[variable]
        else:
            os.environ[variable] = before


def apply() -> None:
    """Apply every shim."""
    silence_known_warnings()
    restore_numpy_long()
    allow_checkpoint_types()
