"""The numbers that settings can have: what fairseq would take and then divide by, wait for, or run out of memory with."""

import dataclasses
import math
from typing import Any, Dict, Iterator, Tuple

from ..errors import LARGEST_SEED, UserError
from ..overrides import Settings

#: key -> (smallest, largest) where it is not what :func:`limits` says of all
LIMITS: Dict[str, Tuple[float, float]] = {
    "common.seed": (0, LARGEST_SEED),
    **dict.fromkeys(("common.log_interval", "checkpoint.save_interval", "dataset.validate_interval", "dataset.max_tokens",
                     "dataset.max_tokens_valid", "dataset.batch_size", "dataset.batch_size_valid",
                     "dataset.required_batch_size_multiple", "optimization.update_freq", "generation.beam",
                     "generation.nbest", "task.tokens_per_sample", "distributed_training.distributed_world_size",
                     "checkpoint.model_parallel_size", "common.model_parallel_size"), (1, 2**31 - 1)),
    **dict.fromkeys(("generation.lenpen", "generation.unkpen"), (-1e9, 1e9)),
    **dict.fromkeys(("model.dropout", "model.attention_dropout", "model.activation_dropout", "model.relu_dropout",
                     "criterion.label_smoothing"), (0, 1)),
    "dataset.num_workers": (0, 1024),
}
#: what no setting reaches
MOST = 2**31 - 1


def check(config: Any, settings: Settings) -> None:
    """Refuses a resolved configuration with a number outside of what its setting can have; names key, value and limits.

    settings: what is known of them, their defaults
    """
    from omegaconf import OmegaConf

    for key, value in _numbers(OmegaConf.to_container(config)):
        if key in settings.known and value == settings.known[key].default:
            continue
        smallest, largest = limits(key, settings)
        if not math.isfinite(value):
            raise UserError(f"{key}={value} is no finite number")
        if not smallest <= value <= largest:
            raise UserError(f"{key}={value}: must be from {smallest:g} to {largest:.15g}")


def limits(key: str, settings: Settings) -> Tuple[float, float]:
    """(smallest, largest) of a setting: below zero is what is so by default, as -1 is for "none"."""
    if key in LIMITS:
        return LIMITS[key]
    default: Any = settings.known[key].default if key in settings.known else None
    if default is None or default is dataclasses.MISSING or isinstance(default, str):
        negative = key not in settings.known  # nothing is known of it
    else:
        negative = isinstance(default, (int, float)) and default < 0
    return (-MOST if negative else 0), MOST


def _numbers(config: Any, prefix: str = "") -> Iterator[Tuple[str, float]]:
    if isinstance(config, dict):
        for name, value in config.items():
            yield from _numbers(value, f"{prefix}.{name}" if prefix else str(name))
    elif isinstance(config, (list, tuple)):
        for value in config:
            yield from _numbers(value, prefix)
    elif isinstance(config, (int, float)) and not isinstance(config, bool):
        yield prefix, config
