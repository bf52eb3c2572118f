"""Prints Markdown tables of records, of translation and of language models:

python -m fairseq_powernorm.experiments.table RECORD...

Runs that differ in their seed only share a line, with the mean and, behind ±, the standard deviation over the seeds.
"""

import argparse
import json
import math
import os
import statistics
import sys
from dataclasses import dataclass

from ..errors import UserError
from ..files import write_text
from ..settings import BATCH_REFERENCE, PLACEMENTS
from . import schema
from .matrix import BASELINE, NORMS, VARIANTS, Row

# Settings in which runs of a table may differ: those that name its lines, those that change nothing in the training.
OF_THE_LINE = {f"model.{key}" for key in (
    "encoder_norm_self", "encoder_norm_ff", "encoder_norm_final", "decoder_norm_self", "decoder_norm_ff",
    "decoder_norm_final", "norm_groups", "norm_variant")}
IRRELEVANT = {"common.seed", "task.seed", "common.cpu", "common.user_dir", "common.log_interval", "task.data",
              "checkpoint.save_dir", "task.norm_record", "task.norm_record_interval"}


def is_lm_record(record):
    return "perplexity" in record


def arch_of(record):
    return record["config"]["model"]["_name"]


def row_of(record):
    """The line of the matrix that a record belongs to."""
    model, norm = record["config"]["model"], record["norm"]
    running = norm in NORMS and norm != BASELINE
    return Row(norm, "" if norm == BASELINE else record["placement"], model.get("norm_groups") != 0 if running else None,
               record["variant"] or VARIANTS[0] if norm == "power" else None)


def settings_of(record):
    """Every setting that is not the default and tells runs apart, but for the seed, as key -> value."""
    flat = {}

    def walk(prefix, value):
        if isinstance(value, dict) and value:
            for key, inner in value.items():
                walk(f"{prefix}.{key}" if prefix else key, inner)
        elif prefix not in IRRELEVANT:
            flat[prefix] = value

    walk("", record["config"])
    return {**flat, "subset": record["subset"], "averaged": record["averaged"]}


@dataclass
class Line:
    """The records of the runs that differ in their seed only, by seed."""

    row: Row
    records: list
    names: list

    @property
    def first(self):
        return self.records[0]

    def values(self, metric):
        return [metric(record) for record in self.records]


def mean(values):
    return None if None in values else statistics.fmean(values)


def spread(values):
    """Standard deviation over the seeds (n - 1), None for one."""
    return None if None in values or len(values) < 2 else statistics.stdev(values)


def paired_t(differences):
    """Student's paired test of differences that one seed each has: (t, degrees of freedom, two-sided p).

    t = mean / (s / sqrt(n)) with s the standard deviation (n - 1) of n differences, n - 1 degrees of freedom. None for fewer
    than two differences, and where all are equal, which leaves t undefined.
    """
    if len(differences) < 2 or None in differences or len(set(differences)) == 1:
        return None
    freedom = len(differences) - 1
    t = statistics.fmean(differences) / (statistics.stdev(differences) / math.sqrt(len(differences)))
    return t, freedom, 1 - within_t(abs(t), freedom)


def within_t(t, freedom):
    """P(|T| < t) of Student's distribution: the finite series for a whole number of degrees of freedom."""
    angle = math.atan(t / math.sqrt(freedom))
    total = term = math.cos(angle) if freedom % 2 else 1.0
    for k in range(3 if freedom % 2 else 2, freedom, 2):
        term *= (k - 1) / k * math.cos(angle) ** 2
        total += term
    if freedom % 2 == 0:
        return math.sin(angle) * total
    return 2 / math.pi * (angle + (math.sin(angle) * total if freedom > 1 else 0.0))


def shown(values, digits=2):
    """The mean and the spread of values as text."""
    if None in values:
        return "not finite"
    deviation = spread(values)
    return f"{mean(values):.{digits}f}" + ("" if deviation is None else f" ± {deviation:.{digits}f}")


def lines(records):
    """The lines of a table: name -> record becomes [Line], sorted as the matrix is."""
    found, seeds = {}, {}
    for name, record in records.items():
        key = json.dumps([record["benchmark"], settings_of(record)], sort_keys=True)
        line = found.setdefault(key, Line(row_of(record), [], []))
        double = seeds.setdefault((key, record["seed"]), name)
        if double != name:
            raise UserError(f"{double} and {name} are records of equal runs: the same settings, seed {record['seed']}")
        line.records.append(record)
        line.names.append(name)
    for line in found.values():
        order = sorted(range(len(line.records)), key=lambda i: line.records[i]["seed"])
        line.records, line.names = [line.records[i] for i in order], [line.names[i] for i in order]
    return sorted(found.values(), key=lambda line: (line.first["benchmark"], arch_of(line.first), position(line.row)))


def position(row):
    """Where the line of a row stands: by norm, variant, placement, and with layer scale before without."""
    norms, placements = [BASELINE, "rms", *list(NORMS)[1:]], list(PLACEMENTS)
    return (norms.index(row.norm) if row.norm in norms else len(norms), (row.variant or VARIANTS[0]) != VARIANTS[0],
            placements.index(row.placement) if row.placement in placements else -1, row.layer_scale is False)


def layer_scale(line):
    """What stands before the norm, as text."""
    if line.row.layer_scale is None:
        return ""
    if line.row.norm == BATCH_REFERENCE:
        return "1 group"  # its own, whatever --norm-groups says
    groups = line.first["config"]["model"].get("norm_groups")
    return "no" if groups == 0 else "yes" if groups is None else f"{groups} groups"


def last_valid_loss(record):
    valid = record["curve"]["valid"]
    return valid[-1]["loss"] if valid else None


# heading -> (what of a record, digits shown)
METRICS = {
    "tokenized BLEU": (lambda record: record["bleu_tokenized"]["score"], 2),
    "length ratio": (lambda record: record["bleu_tokenized"]["ratio"], 3),
    "sacreBLEU": (lambda record: record["sacrebleu"]["score"], 2),
    "chrF": (lambda record: record["chrf"]["score"], 2),
    "valid loss": (last_valid_loss, 3),
}
LM_METRICS = {
    "perplexity": (lambda record: record["perplexity"]["score"], 2),
    "perplexity with context": (lambda record: (record["perplexity_context"] or {}).get("score"), 2),
}


def updates(line):
    """Updates of the runs, the smallest and the largest number where early stopping made them differ."""
    found = sorted({record["updates"] for record in line.records})
    return f"{found[0]:,}" + (f" to {found[-1]:,}" if len(found) > 1 else "")


def seeds(line):
    return ", ".join(str(record["seed"]) for record in line.records)


def cell(line, heading, metrics):
    """A number of a line as text; what is not a language model's says so, what a record lacks is empty."""
    value, digits = metrics[heading]
    if is_lm_record(line.first):
        if heading == "perplexity with context" and line.first["perplexity_context"] is None:
            return ""
        return shown(line.values(value), digits) + ("" if line.first["causal"] else " (not a language model's)")
    if heading == "valid loss" and not line.first["curve"]["valid"]:
        return ""
    return shown(line.values(value), digits)


def cells(line):
    """A line of the table, as heading -> text."""
    lm = is_lm_record(line.first)
    metrics = LM_METRICS if lm else METRICS
    context = line.first["perplexity_context"] if lm else None
    return {
        "benchmark": line.first["benchmark"], **({"architecture": line.first["arch"]} if lm else {}),
        "norm": line.row.norm, **({} if lm else {"placement": line.row.placement or line.first["placement"]}),
        "layer scale": layer_scale(line), "variant": line.row.variant or "", "updates": updates(line),
        "seeds": seeds(line),
        **({"subset": line.first["subset"]} if lm else {}),
        **({"context": context["context_window"] if context else ""} if lm else {}),
        **{heading: cell(line, heading, metrics) for heading in metrics},
    }


def markdown(headings, rows):
    return "".join("| " + " | ".join(map(str, row)) + " |\n" for row in (headings, ["---"] * len(headings), *rows))


def tables(records):
    """The Markdown tables of records (name -> record), of translation first."""
    found = [cells(line) for line in lines(records)]
    kinds = [[row for row in found if ("perplexity" in row) == lm] for lm in (False, True)]
    return "\n".join(markdown(list(rows[0]), [row.values() for row in rows]) for rows in kinds if rows)


def table(arguments):
    parser = argparse.ArgumentParser(prog="python -m fairseq_powernorm.experiments.table", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", metavar="FILE", help="write the tables to FILE as well")
    parser.add_argument("--available", action="store_true",
                        help="leave out records that do not exist; name them, and end with exit status 1")
    parser.add_argument("records", nargs="+", metavar="RECORD")
    options = parser.parse_args(arguments)
    missing = [path for path in options.records if options.available and not os.path.exists(path)]
    text = tables({path: schema.read_record(path) for path in options.records if path not in missing})
    print(text, end="")
    if options.output:
        write_text(options.output, text)
    for path in missing:
        print(f"error: no record {path}", file=sys.stderr)
    return 1 if missing else 0
