"""Draws validation loss against updates, a line for each record.

python -m fairseq_powernorm.experiments.plot_curves RECORD... --output FILE.png
"""

import argparse
from pathlib import Path

from ..errors import UserError
from . import figures, schema


def plot(arguments):
    parser = argparse.ArgumentParser(prog="python -m fairseq_powernorm.experiments.plot_curves", description=__doc__)
    parser.add_argument("records", nargs="+", metavar="RECORD")
    parser.add_argument("--output", required=True, metavar="FILE.png")
    options = parser.parse_args(arguments)
    records = [schema.read_record(path) for path in options.records]
    figure, (axis,) = figures.panels(1)
    for path, record in zip(options.records, records):
        if not record["curve"]["valid"]:
            raise UserError(f"{path} has no validation curve")
        label = f"{record['norm']} ({record.get('arch', record['placement'])}), seed {record['seed']}"
        if not record.get("causal", True):
            label += ", not a language model"
        figures.curve(axis, label, record, "valid", marker=".")
    figures.finished(axis, xlabel="updates", ylabel="validation loss (bits per token)",
                     title=", ".join(sorted({record["benchmark"] for record in records})))
    Path(options.output).write_bytes(figures.png(figure))
    print(f"wrote {options.output}")
