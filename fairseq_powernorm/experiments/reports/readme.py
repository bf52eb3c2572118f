"""Writes the tables of README.md: <!-- records: PATTERN... --> and <!-- end of records --> enclose that of some records."""

import re
from typing import Sequence

from ..errors import UserError
from ..files import read_json, write_text
from ..paths import ROOT
from . import schema, speed
from .matrix import relative
from .table import tables

README = ROOT / "README.md"
BLOCK = re.compile(r"(<!-- records: (.*?) -->\n)(.*?)(<!-- end of records -->)", re.S)


def up_to_date(text: str) -> str:
    """The text of README.md with the tables of today's records; raises UserError if it has no place for them."""
    if not BLOCK.search(text):
        raise UserError(f"{README} has no <!-- records: PATTERN... -->")
    return BLOCK.sub(lambda block: block[1] + tables_of(block[2].split()) + block[4], text)


def write() -> bool:
    """Writes the tables; gives whether any of them was another one before."""
    text = README.read_text(encoding="utf-8")
    wanted = up_to_date(text)
    if wanted != text:
        write_text(README, wanted)
    return wanted != text


def tables_of(patterns: Sequence[str]) -> str:
    """The Markdown tables of the records that patterns name, from the root; of speeds, what they say in short."""
    paths = sorted({path for pattern in patterns for path in ROOT.glob(pattern)})
    if not paths:
        raise UserError(f"<!-- records: {' '.join(patterns)} --> names no record")
    contents = [read_json(path) for path in paths]
    if isinstance(contents[0], dict) and contents[0].get("kind") == "benchmark":
        return "\n".join(speed.summary(schema.check(content, path)) for content, path in zip(contents, paths))
    return tables({relative(path): schema.read_record(path) for path in paths})
