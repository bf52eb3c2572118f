"""Hydra's overrides of fairseq's settings: what they say, and which one stands for an option of fairseq's command line."""

import re
from typing import Dict, Mapping, Optional, Sequence


def by_key(overrides: Sequence[str]) -> Dict[str, str]:
    """Overrides by the key that they set; a later one replaces an earlier one."""
    return {override.split("=", 1)[0].lstrip("+~"): override for override in overrides}


def quote(value: object) -> str:
    """A value of a hydra override, in quotes where hydra's grammar needs them."""
    text = str(value)
    return text if re.fullmatch(r"[\w./-]+", text, re.ASCII) else "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def of_flag(
    flag: str, value: Optional[str], places: Sequence[str], own: Mapping[str, Optional[str]]
) -> Optional[str]:
    """What to use instead of a flag of fairseq's: in words, None if fairseq has no such flag."""
    return None
