"""The one rule for the batch: a configuration states the batches of an update on one GPU, and ranks share them out.

An update takes optimization.update_freq x dataset.max_tokens tokens (or dataset.batch_size sentences or blocks), however
many ranks there are: each of R ranks gathers update_freq / R batches.
"""

import math
from typing import Any, List, Sequence, Tuple

from ..errors import UserError
from ..recipes import is_lm

SIZES = ("dataset.max_tokens", "dataset.batch_size")


def update_freq(config: Any, ranks: int = 1) -> List[int]:
    """The batches that each rank gathers for an update, a number for each epoch (the last one for all that follow).

    Raises UserError, with the numbers of ranks that are valid, if the ranks cannot share them out evenly.
    """
    from omegaconf import OmegaConf

    stated = list(OmegaConf.select(config, "optimization.update_freq") or [1])
    if not all(isinstance(number, int) and number > 0 for number in stated):
        raise UserError(f"optimization.update_freq={stated}: must be a list of numbers, 1 or more")
    if all(number % ranks == 0 for number in stated):
        return [number // ranks for number in stated]
    common = math.gcd(*stated)
    valid = [number for number in range(1, common + 1) if common % number == 0]
    smaller = ranks // math.gcd(common, ranks)
    sizes = sizes_of(config)
    advice = ""
    if all(size % smaller == 0 for _, size in sizes):
        advice = ("; the same updates of smaller batches: "
                  + " ".join(f"{key}={size // smaller}" for key, size in sizes)
                  + f" {override([number * smaller for number in stated])}")
    raise UserError(f"{ranks} ranks cannot share out optimization.update_freq={stated}, the batches of an update on one "
                    f"GPU; valid numbers of ranks: {', '.join(map(str, valid))}{advice}")


def override(frequencies: Sequence[int]) -> str:
    """The hydra override of optimization.update_freq."""
    return f"optimization.update_freq=[{','.join(map(str, frequencies))}]"


def overrides(config: Any, ranks: int) -> List[str]:
    """The hydra overrides that share out an update among ranks: none for one; raises UserError as update_freq does."""
    frequencies = update_freq(config, ranks)
    return [override(frequencies)] if ranks > 1 else []


def sizes_of(config: Any) -> List[Tuple[str, int]]:
    """[(key, number)] of the limits that a batch has."""
    from omegaconf import OmegaConf

    found = [(key, OmegaConf.select(config, key)) for key in SIZES]
    return [(key, size) for key, size in found if size]


def described(config: Any, ranks: int) -> str:
    """What an update takes, in words: at most so much, as batches are cut at the ends of sentences."""
    sentences = f"blocks of {config.task.tokens_per_sample} tokens" if is_lm(config) else "sentences"
    unit = dict(zip(SIZES, ("tokens", sentences)))
    stated, own = update_freq(config), update_freq(config, ranks)
    parts = []
    for epoch, (batches, gathered) in enumerate(zip(stated, own), 1):
        limits = " or ".join(f"{batches} x {size} = {batches * size:,} {unit[key]}: {ranks} rank{'s' * (ranks > 1)} "
                             f"x {size} x update_freq {gathered}" for key, size in sizes_of(config))
        parts.append((f"in epoch {epoch}: " if len(stated) > 1 else "") + limits)
    return "an update takes " + "; ".join(parts)
