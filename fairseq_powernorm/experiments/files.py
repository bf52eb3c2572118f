"""Files that are written whole, JSON for people to read, checksums."""

import contextlib
import hashlib
import json
import os
from pathlib import Path
from typing import Any, List, Union

from .errors import UserError

AnyPath = Union[str, "os.PathLike[str]"]


def sha256(path: AnyPath) -> str:
    """The SHA-256 of a file, in hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        for block in iter(lambda: stream.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def write_bytes(path: AnyPath, content: bytes) -> None:
    """Writes a file so that a reader sees the old one or the new one, never a part; refuses where it cannot."""
    partial = Path(f"{path}.partial")
    if os.path.exists(path) and not os.path.isfile(path):  # as root, a device would be replaced as well
        raise UserError(f"cannot write {path}: it is there, and not a file")
    try:
        if partial.is_symlink() or partial.exists() and not partial.is_file():  # somebody else's
            partial.unlink()
        partial.write_bytes(content)
        os.replace(partial, path)
    except BaseException as error:  # of the disk, or of who interrupts it
        with contextlib.suppress(OSError):
            partial.unlink()
        if isinstance(error, OSError):
            raise UserError(f"cannot write {path}: {error.strerror}") from error
        raise


def write_text(path: AnyPath, text: str) -> None:
    """The same of a text. Half of a surrogate pair, which foreign JSON can hold, stays the escape that it is there."""
    write_bytes(path, text.encode("utf-8", "backslashreplace"))


def write_json(path: AnyPath, content: Any) -> None:
    """Writes a JSON file as write_text() does."""
    write_text(path, json_text(content) + "\n")


def read_json(path: AnyPath) -> Any:
    """The content of a JSON file; refuses one that is not there or not JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read {path}: {error}") from None


def json_text(content: Any, indent: int = 0, width: int = 160) -> str:
    """JSON, indented. What fits into a line of `width` characters is one, and so is a list of numbers of any length; the
    numbers, texts and lists of numbers of an object share lines."""
    text = json.dumps(content, ensure_ascii=False)
    if indent + len(text) <= width or is_plain(content):
        return text
    margin, shares = "\n" + " " * indent, False
    lines: List[str] = []
    is_object = isinstance(content, dict)
    for key, value in content.items() if is_object else ((None, value) for value in content):
        line = (f"{json.dumps(key, ensure_ascii=False)}: " if is_object else "") + json_text(value, indent + 2, width)
        if shares and is_plain(value) and indent + len(lines[-1]) + len(line) + 4 <= width:
            lines[-1] += f", {line}"
        else:
            lines.append(line)
        shares = is_plain(value)
    return text[0] + ",".join(f"{margin}  {line}" for line in lines) + margin + text[-1]


def is_plain(value: Any) -> bool:
    """Is it a number, a text, true, false or null, or a list of numbers?"""
    if isinstance(value, list):
        return not any(isinstance(inner, (dict, list, str)) for inner in value)
    return not isinstance(value, dict)
