"""The numbers that settings can have: what fairseq would take and then divide by, wait for, or run out of memory with."""

import ast
import dataclasses
import math
from pathlib import Path
from typing import Any, Dict, Iterator, List, Tuple

from ..errors import LARGEST_SEED, UserError
from ..overrides import Settings
from . import checkpoints

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
    **dict.fromkeys(("model.encoder_layers", "model.decoder_layers"), (0, 1000)),
}
#: of how a model translates, what scripts/evaluate.sh gives fairseq-generate
TRANSLATING = ("beam", "lenpen", "max_len_a", "max_len_b")
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
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{key}={value} is no finite number")
        if not smallest <= value <= largest:
            raise UserError(f"{key}={value}: must be from {smallest:g} to {largest:.15g}")


def check_translating(config: Any, settings: Settings) -> None:
    """Refuses a configuration with other settings of translation than evaluation heeds, and the record would show."""
    for name, value in (config.get("generation") or {}).items():
        known = settings.known.get(f"generation.{name}")
        if name not in TRANSLATING and known is not None and value != known.default:
            raise UserError(f"generation.{name}={value}: scripts/evaluate.sh does not translate with it; valid: "
                            f"{', '.join(TRANSLATING)}. fairseq-generate takes it as --{name.replace('_', '-')}")


def check_references(config: Any, data: Path, save_dir: Path) -> None:
    """Refuses settings that name what is not there, or are no value at all, which fairseq would find out in the middle.

    Args:
        config: as hydra composes it
        data, save_dir: the binarized data, and where checkpoints go, in the run's directory
    """
    from omegaconf import OmegaConf

    found: Any = OmegaConf.to_container(config)
    for group, key in (("optimization", "lr"), ("optimization", "update_freq")):
        if found[group].get(key) == []:
            raise UserError(f"{group}.{key}=[]: must have one value at least")
    if all(found["dataset"].get(key) is None for key in ("max_tokens", "batch_size")):
        raise UserError("dataset.max_tokens and dataset.batch_size are both null: one of them says how large a batch is")
    metric, valid = found["checkpoint"].get("best_checkpoint_metric"), metrics(found)
    if valid and metric is not None and metric not in valid:
        raise UserError(f"checkpoint.best_checkpoint_metric={metric}: a validation does not compute it; valid: "
                        f"{', '.join(valid)}")
    for key, value in found["optimizer"].items() if isinstance(found.get("optimizer"), dict) else ():
        if key.endswith("betas") and not _is_pair_of_shares(value):
            raise UserError(f"optimizer.{key}={value}: must be two numbers from 0 to below 1, such as '(0.9, 0.98)'")
    for key in ("train_subset", "valid_subset"):
        text = found["dataset"].get(key)
        for subset in text.split(",") if isinstance(text, str) and "${" not in text else ():
            there = sorted({path.name.split(".")[0] for path in data.glob("*.bin")})
            if subset not in there and not (key == "valid_subset" and found["dataset"].get("ignore_unused_valid_subsets")):
                raise UserError(f"dataset.{key}={text}: there is no {subset!r} in {data}; valid: {', '.join(there)}")
    checkpoint = found["checkpoint"]
    for key, usual in (("restore_file", "checkpoint_last.pt"), ("finetune_from_model", None)):
        name = checkpoint.get(key)
        starts = name not in (None, usual) and not checkpoints.accounts(save_dir)  # from it; later from the run's own
        if starts and not (save_dir.parent / str(name)).is_file():
            raise UserError(f"checkpoint.{key}={name}: no such file (a relative path is one from {save_dir.parent})")
    if checkpoint.get("checkpoint_suffix"):
        raise UserError(f"checkpoint.checkpoint_suffix={checkpoint['checkpoint_suffix']}: a run's checkpoints have none")


def metrics(config: Dict[str, Any]) -> List[str]:
    """What a validation computes, by which checkpoints can be compared; none where nothing is known of the criterion."""
    criterion, task = config.get("criterion") or {}, config.get("task") or {}
    if criterion.get("_name") not in ("label_smoothed_cross_entropy", "cross_entropy", "adaptive_loss"):
        return []
    smoothed = criterion["_name"] == "label_smoothed_cross_entropy"
    by_sentence = bool(config["optimization"].get("sentence_avg") or criterion.get("sentence_avg") is True)
    return ["loss", "ppl", *["nll_loss"] * (smoothed or by_sentence),
            *["accuracy"] * bool(smoothed and criterion.get("report_accuracy")), *["bleu"] * bool(task.get("eval_bleu"))]


def _is_pair_of_shares(value: Any) -> bool:
    """Is it, as fairseq reads it, a pair of numbers from 0 to below 1?"""
    if isinstance(value, str):
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            return False
    return (isinstance(value, (list, tuple)) and len(value) == 2
            and all(isinstance(each, (int, float)) and 0 <= each < 1 for each in value))


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
