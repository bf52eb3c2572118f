"""Ranks that would train apart, each a model of its own or all a mixture, are refused before the first update."""
import os
from typing import Any, Dict, Mapping

import numpy as np

#: settings that say where a rank stands or where its files lie; they may differ, in whatever part of the configuration
#: they stand (an optimizer without a dataclass has a copy of the whole command line)
PLACES = (
    "distributed_rank", "device_id", "local_rank", "distributed_init_method", "distributed_port",
    "distributed_num_procs", "user_dir", "tensorboard_logdir", "wandb_project", "save_dir", "data", "job_logging_cfg",
)  # fmt: skip


def check_number(world_size: int, model_parallel_size: int = 1, environment: Mapping[str, str] = os.environ) -> None:
    """Compare the ranks that fairseq has with those that torchrun started.

    Raises:
        ValueError: there are fewer; each process would train alone (fairseq does that to torchrun on a CPU)
    """
    started = environment.get("WORLD_SIZE", "")
    if "RANK" in environment and started.isdigit() and world_size * model_parallel_size < int(started):
        raise ValueError(
            f"{started} processes were started (WORLD_SIZE) but fairseq has {world_size} of them as ranks: the others "
            "would train models of their own. On a CPU add --distributed-world-size, --distributed-rank, "
            "--distributed-init-method env://, --distributed-no-spawn and --distributed-backend gloo, or use "
            "scripts/launch.sh"
        )


def check_checkpoint(path: str, exists: bool, exists_for_first: bool, rank: int) -> None:
    """Compare what a rank and the first rank see of the checkpoint to resume from.

    Raises:
        ValueError: it is there for one of them only
    """
    if exists != exists_for_first:
        here, there = ("there", "not there") if exists else ("not there", "there")
        raise ValueError(
            f"checkpoint {path!r} is {here} for rank {rank} and {there} for rank 0: the checkpoint directory must be on "
            "a file system that all machines share"
        )


def facts(cfg, task) -> Dict[str, Any]:
    """What ranks must have in common: key -> value, of all settings and of the size of the training data."""
    from omegaconf import OmegaConf

    found = {}

    def flatten(value, name=""):
        if name.rpartition(".")[2] in PLACES:
            return
        if isinstance(value, dict):
            for key, inner in value.items():
                flatten(inner, f"{name}.{key}" if name else str(key))
        else:
            found[name] = str(value)

    config: Any = OmegaConf.to_container(cfg) if OmegaConf.is_config(cfg) else cfg
    flatten({key: vars(value) if hasattr(value, "__dict__") else value for key, value in config.items()})
    dataset = task.datasets.get(getattr(getattr(cfg, "dataset", None), "train_subset", "train"))
    sizes = getattr(dataset, "sizes", None)
    if sizes is not None:
        parts = sizes if isinstance(sizes, (list, tuple)) else [sizes]
        tokens = sum(int(np.asarray(each).sum()) for each in parts)
        found["the training data"] = f"{len(dataset):,} sentences or blocks, {tokens:,} tokens"
    return found


def check_facts(mine: Mapping[str, Any], first: Mapping[str, Any], rank: int) -> None:
    """Compare a rank's :func:`facts` with those of the first rank.

    Raises:
        ValueError: they differ
    """
    differing = [key for key in sorted({*mine, *first}) if mine.get(key) != first.get(key)]
    if differing:
        key = differing[0]
        more = f" ({len(differing)} differ: {', '.join(differing[:5])})" if len(differing) > 1 else ""
        raise ValueError(
            f"ranks would train apart: {key} is {mine.get(key)} for rank {rank} and {first.get(key)} for rank 0{more}; "
            "all ranks must be started with the same settings and data"
        )
