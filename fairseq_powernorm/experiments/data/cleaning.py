"""Which pairs of the training text stay, and which of them are set aside for validation."""

import contextlib
from pathlib import Path
from typing import Any, Mapping, NamedTuple, Optional, Sequence, Tuple

from ..errors import UserError

#: Moses' clean-corpus-n also drops pairs with a longer word
LONGEST_WORD = 1000


class Counts(NamedTuple):
    """Numbers of training pairs."""

    kept: int
    valid: int  # set aside for validation
    dropped: int


def select(
    sources: Sequence[Path],
    targets: Sequence[Tuple[Path, str]],
    limits: Optional[Mapping[str, Any]],
    every: Optional[int] = None,
) -> Counts:
    """Writes those training pairs that are within the limits.

    Args:
        sources: the two sides, and other texts that correspond to them line for line
        targets: (folder, language) for each of them; what is kept becomes folder/train.language
        limits: the settings `clean_ratio` and `clean_max`; a pair with an empty side is never within them. None: all stay
        every: every such pair that is kept goes to folder/valid.language instead. None: none does

    Raises:
        UserError: no pair is left for training or, with `every`, for validation
    """
    kept = valid = dropped = 0
    with contextlib.ExitStack() as stack:

        def opened(split: str) -> Sequence[Any]:
            return [stack.enter_context(open(folder / f"{split}.{language}", "wb")) for folder, language in targets]

        texts = [stack.enter_context(open(path, "rb")) for path in sources]
        train, validation = opened("train"), opened("valid") if every else ()
        for lines in zip(*texts):
            if limits is not None and not within(lines[0], lines[1], limits):
                dropped += 1
                continue
            if every and (kept + valid + 1) % every == 0:
                valid += 1
                streams = validation
            else:
                kept += 1
                streams = train
            for line, stream in zip(lines, streams):
                stream.write(line)
    if dropped:
        print(f"  dropped {dropped:,} training pairs with an empty side, too long, or of unequal lengths", flush=True)
    if kept == 0:
        raise UserError(
            "no sentence pair of the training text is left: each has a side that is empty, too long, or much longer than "
            "the other"
        )
    if every and valid == 0:
        raise UserError(f"too few training pairs, {kept}, to take one in {every} for validation")
    return Counts(kept, valid, dropped)


def within(first: bytes, second: bytes, limits: Mapping[str, Any]) -> bool:
    """Would Moses' clean-corpus-n keep this pair of tokenized sentences?"""
    sides = [side.decode("utf-8").split() for side in (first, second)]
    few, many = sorted(map(len, sides))
    if few == 0 or many > limits.get("clean_max", many):
        return False
    if "clean_ratio" in limits:
        return many / few <= limits["clean_ratio"] and all(len(word) <= LONGEST_WORD for words in sides for word in words)
    return True
