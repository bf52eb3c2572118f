"""Draws validation loss against updates, a line for each record.

python scripts/lib/plot_curves.py RECORD... --output FILE.png
"""

import argparse
import sys

from settings import UserError, main, read_json


def plot(arguments):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("records", nargs="+", metavar="RECORD")
    parser.add_argument("--output", required=True, metavar="FILE.png")
    options = parser.parse_args(arguments)
    records = [read_json(path) for path in options.records]

    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for path, record in zip(options.records, records):
        points = record["curve"]["valid"]
        if not points:
            raise UserError(f"{path} has no validation curve")
        label = f"{record['norm']} ({record.get('arch', record['placement'])}), seed {record['seed']}"
        if not record.get("causal", True):
            label += ", not a language model"
        axes.plot([point["updates"] for point in points], [point["loss"] for point in points], marker=".", label=label)
    axes.set(xlabel="updates", ylabel="validation loss (bits per token)", title=", ".join(
        sorted({record["benchmark"] for record in records})))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(options.output, dpi=150)
    print(f"wrote {options.output}")


if __name__ == "__main__":
    main(plot, sys.argv[1:])
