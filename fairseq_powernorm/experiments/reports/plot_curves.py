"""Draws validation loss against updates, a line for each record."""

from pathlib import Path
from typing import Sequence

from ..errors import UserError
from ..files import write_bytes
from . import figures, schema


def plain(text: str) -> str:
    """A text as it is, without what matplotlib would take for a formula."""
    return text.replace("$", r"\$")


def plot(paths: Sequence[str], output: Path) -> None:
    """Writes a PNG of the records in some files; raises UserError if one has no validation curve."""
    records = [schema.read_record(path) for path in paths]
    figure, (axis,) = figures.panels(1)
    for path, record in zip(paths, records):
        if not record["curve"]["valid"]:
            raise UserError(f"{path} has no validation curve")
        label = f"{record['norm']} ({record.get('arch', record['placement'])}), seed {record['seed']}"
        if not record.get("causal", True):
            label += ", not a language model"
        figures.curve(axis, plain(label), record, "valid", marker=".")
    title = ", ".join(sorted({record["benchmark"] for record in records}))
    figures.finish(axis, xlabel="updates", ylabel="validation loss (bits per token)", title=plain(title))
    write_bytes(output, figures.png(figure))
