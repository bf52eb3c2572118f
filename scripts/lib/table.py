"""Prints Markdown tables of records, of translation and of language models: python scripts/lib/table.py RECORD..."""

import argparse
import sys

from settings import main, read_json


def perplexity(record, key):
    """A perplexity of a record as text; what is not a language model's says so."""
    if record[key] is None:
        return ""
    return f"{record[key]['score']:.2f}" + ("" if record["causal"] else " (not a language model's)")


# heading -> value in a record, of a translation model and of a language model
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

LM_COLUMNS = {
    "benchmark": lambda record: record["benchmark"],
    "architecture": lambda record: record["arch"],
    "norm": lambda record: record["norm"],
    "variant": lambda record: record["variant"] if record["norm"] == "power" else "",
    "seed": lambda record: record["seed"],
    "updates": lambda record: f"{record['updates']:,}",
    "subset": lambda record: record["subset"],
    "perplexity": lambda record: perplexity(record, "perplexity"),
    "context": lambda record: record["perplexity_context"]["context_window"] if record["perplexity_context"] else "",
    "perplexity with context": lambda record: perplexity(record, "perplexity_context"),
}


def table(arguments):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("records", nargs="+", metavar="RECORD")
    records = [read_json(path) for path in parser.parse_args(arguments).records]
    tables = []
    for columns, is_lm in ((COLUMNS, False), (LM_COLUMNS, True)):
        rows = [[str(value(record)) for value in columns.values()]
                for record in records if ("perplexity" in record) == is_lm]
        if rows:
            rows = [list(columns), ["---"] * len(columns), *rows]
            tables.append("".join("| " + " | ".join(row) + " |\n" for row in rows))
    print("\n".join(tables), end="")


if __name__ == "__main__":
    main(table, sys.argv[1:])
