"""Prints a Markdown table of records: python scripts/lib/table.py RECORD..."""

import argparse
import sys

from settings import main, read_json

# heading -> value in a record
COLUMNS = {
    "benchmark": lambda record: record["benchmark"],
    "norm": lambda record: record["norm"],
    "placement": lambda record: record["placement"],
    "variant": lambda record: record["variant"] if record["norm"] == "power" else "",
    "seed": lambda record: record["seed"],
    "updates": lambda record: f"{record['updates']:,}",
    "tokenized BLEU": lambda record: f"{record['bleu_tokenized']['score']:.2f}",
    "sacreBLEU": lambda record: f"{record['sacrebleu']['score']:.2f}",
    "chrF": lambda record: f"{record['chrf']['score']:.2f}",
    "valid loss": lambda record: f"{record['curve']['valid'][-1]['loss']:.3f}" if record["curve"]["valid"] else "",
}


def table(arguments):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("records", nargs="+", metavar="RECORD")
    records = [read_json(path) for path in parser.parse_args(arguments).records]
    rows = [list(COLUMNS), ["---"] * len(COLUMNS)]
    rows += [[str(value(record)) for value in COLUMNS.values()] for record in records]
    for row in rows:
        print("| " + " | ".join(row) + " |")


if __name__ == "__main__":
    main(table, sys.argv[1:])
