"""The tables of the READMEs: <!-- records: PATTERN... --> and <!-- end of records --> enclose that of some records."""

import re
from typing import Dict, Optional, Sequence

from ..errors import UserError
from ..files import read_json
from ..paths import ROOT
from . import schema, speed
from .matrix import relative
from .table import tables

#: the files with tables of records
READMES = ("README.md", "results/README.md")
#: columns that their tables do without where all lines agree: the text above a table says it
SAID = ("benchmark", "updates", "seeds")
BLOCK = re.compile(r"(<!-- records: (.*?) -->\n)(.*?)(<!-- end of records -->)", re.S)


def outdated() -> Dict[str, Optional[str]]:
    """file -> its text with the tables of today's records, None if these are its tables.

    Raises:
        UserError: a file has no place for tables, or a record is not valid
    """
    found: Dict[str, Optional[str]] = {}
    for name in READMES:
        text = (ROOT / name).read_text(encoding="utf-8")
        if not BLOCK.search(text):
            raise UserError(f"{ROOT / name} has no <!-- records: PATTERN... -->")
        wanted = BLOCK.sub(lambda block: block[1] + tables_of(block[2].split()) + block[4], text)
        found[name] = None if wanted == text else wanted
    return found


def tables_of(patterns: Sequence[str]) -> str:
    """The Markdown tables of the records that patterns name, from the root; of speeds, what they say in short."""
    paths = sorted({path for pattern in patterns for path in ROOT.glob(pattern)})
    if not paths:
        raise UserError(f"<!-- records: {' '.join(patterns)} --> names no record")
    contents = [read_json(path) for path in paths]
    if isinstance(contents[0], dict) and contents[0].get("kind") == "benchmark":
        return "\n".join(speed.summary(schema.check(content, path), path.parent) for content, path in zip(contents, paths))
    return tables({relative(path): schema.read_record(path) for path in paths}, SAID)
