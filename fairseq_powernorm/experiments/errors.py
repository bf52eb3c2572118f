"""Input that a command refuses, and the checks of values that refuse it."""

from typing import Collection, Iterable, List, Optional, Sequence

from ..command_line import in_one_line

LARGEST_SEED = 2**32 - 1  # numpy's
LONGEST_NUMBER = 18  # digits, of what fits into 64 bits


class UserError(Exception):
    """Input that a command refuses; the message, one line, names the option, the value and what is valid.

    Args:
        message: what it quotes, such as a path, may hold anything
        output: the last lines of another program, which follow it
    """

    def __init__(self, message: str, output: str = "") -> None:
        super().__init__(in_one_line(message) + (f"\n{output}" if output else ""))


def choose(option: str, value: str, valid: Iterable[str]) -> str:
    """value if it is one of valid, else a refusal that lists them."""
    valid = tuple(valid)
    if value not in valid:
        raise UserError(f"{option} {value!r} is unknown; valid: {', '.join(valid)}")
    return value


def listed(option: str, text: Optional[str], valid: Optional[Collection[str]], default: Sequence[str]) -> List[str]:
    """The words of a comma-separated option, each one of valid (None: any) and none twice; default where it is None."""
    words = list(default) if text is None else text.split(",")
    for word in words:
        if valid is not None:
            choose(option, word, valid)
        elif not word:
            raise UserError(f"{option} {text!r}: must be words separated by commas")
    if len(set(words)) < len(words):
        raise UserError(f"{option} {text!r} names something twice")
    return words


def number(option: str, text: str, smallest: int, largest: Optional[int] = None) -> int:
    """A whole number within its limits."""
    is_number = text.isascii() and text.isdigit() and len(text) <= LONGEST_NUMBER
    if not is_number or not smallest <= int(text) <= (largest or int(text)):
        raise UserError(f"{option} {text!r}: must be a number, {smallest} {f'to {largest}' if largest else 'or more'}")
    return int(text)


def seeds(option: str, text: str) -> List[int]:
    """The seeds of a comma-separated option."""
    found = [number(option, seed, 0, LARGEST_SEED) for seed in listed(option, text, None, ())]
    if len(set(found)) < len(found):
        raise UserError(f"{option} {text!r} names something twice")
    return found
