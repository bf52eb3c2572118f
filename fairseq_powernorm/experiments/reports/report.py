"""Reports of a matrix of runs: Markdown and pictures, CSV, a self-contained HTML page, from records and what runs left.

python -m fairseq_powernorm.experiments.report --readme [--check]

writes the tables of the READMEs: between <!-- records: PATTERN... --> and <!-- end of records --> the table of the
records that the patterns name, or what a record of scripts/benchmark.py says in short. With --check it changes nothing
and fails if a table is not that of its records.
"""

import argparse
import base64
import csv
import io
import math
import os
import re
import sys
from pathlib import Path

from ..directories import locked
from ..errors import UserError
from ..evaluation import score
from ..files import read_json, write_json
from ..paths import ROOT, runs_root
from ..runs import compose
from ..settings import PLACEMENTS, data_settings
from . import figures, schema, speed
from .matrix import BASELINE, FIGURE_ROWS, NORMS, PAPER, relative
from .table import (
    IRRELEVANT,
    LM_METRICS,
    METRICS,
    OF_THE_LINE,
    cell,
    cells,
    is_lm_record,
    lines,
    markdown,
    mean,
    paired_t,
    settings_of,
    spread,
    tables,
)

TITLES = {"table1": "Table 1: machine translation", "table2": "Table 2: language modelling"}
CAPTIONS = (
    "Figure 1. Distance of the batch's statistics from the running ones along training: mean over the model's norms "
    "(line) and their range (area).",
    "Figure 2. Size of the gradient through the statistics along training: mean over the model's norms (line) and "
    "their range (area).",
    "Figure 3. Singular values of the embedding matrix of the evaluated model.",
    "Figure 4. Training and validation loss; dashed: LN.",
)
CAUSALITY = ("The paper's perplexities come from code whose attention sees the words that it has to predict; those "
             "here do not, unless they say so.")


def stem(subject, benchmarks, updates, results):
    """What the files of a report are called, without their ends."""
    return results / "-".join([subject, "+".join(benchmarks), *([str(updates)] if updates is not None else [])])


# ---- what a report says ----------------------------------------------------------------------------------------------


def write(subject, path, runs, missing, results):
    """Writes a report and says where.

    Args:
        subject: key of SUBJECTS
        path: of its files, without their ends
        runs: the runs that have records
        missing: names of the others
        results: directory of the records
    """
    results.mkdir(parents=True, exist_ok=True)
    records = {f"{run.benchmark}/{run.name}": schema.read_record(run.record(results)) for run in runs}
    with locked(runs_root() / f"report-{path.name}", patience=math.inf):
        pictured = {}  # the first seed of each row
        for run in runs:
            if subject not in TITLES or run.row_name in FIGURE_ROWS:
                pictured.setdefault((run.benchmark, run.arch, run.row), run)
        data = figures.data_of(pictured.values(), earlier(f"{path}.figures.json"))
        write_json(f"{path}.figures.json", data)
        found = [section(group, records, data) for group in grouped(runs)]
        written = [f"{path}.figures.json"]
        for part in found:
            for i, picture in part["pictures"]:
                written.append(picture_path(path, part, i))
                write_whole(written[-1], picture)
        if subject in TITLES:
            tests = significance(runs, records, earlier(f"{path}.significance.json"))
            if tests:
                write_json(f"{path}.significance.json", {"schema": 1, "kind": "significance", "tests": tests})
                written.append(f"{path}.significance.json")
            for part in found:
                add_table(part, records, tests)
            contents = {".md": as_markdown(subject, path, found, missing), ".csv": as_csv(found),
                        ".html": as_html(subject, found, missing, records)}
            print(contents[".md"])
            for end, content in contents.items():
                written.append(f"{path}{end}")
                write_whole(written[-1], content.encode())
    print("report: " + ", ".join(relative(Path(name)) for name in written))


def picture_path(path, part, i):
    """Where picture i of a section of the report lies."""
    return f"{path}.{part['name']}.figure{i + 1}.png"


def earlier(path):
    """The content of a file of an earlier report, None if there is none."""
    return schema.check(read_json(path), path) if os.path.exists(path) else None


def write_whole(path, content):
    partial = Path(f"{path}.partial")
    partial.write_bytes(content)
    os.replace(partial, path)


def grouped(runs):
    """The runs of each benchmark and architecture."""
    found = {}
    for run in runs:
        found.setdefault((run.benchmark, run.arch), []).append(run)
    return found.values()


def section(runs, records, data):
    """What the report says of one benchmark and architecture, but for its table."""
    benchmark, arch = runs[0].benchmark, runs[0].arch
    of_names = {f"{run.benchmark}/{run.name}": run for run in runs}
    table = lines({name: records[name] for name in of_names})
    row_names = {id(line): of_names[line.names[0]].row_name for line in table}
    labels = {name: run.row_name for name, run in of_names.items()}
    baselines = {row_names[id(line)]: line.first for line in table if line.row.norm == BASELINE}
    norms = {norm: {row_names[id(line)]: line.first for line in table if line.row.norm == norm}
             for norm in NORMS if norm != BASELINE}

    def labelled(key):
        return {labels[name]: found for name, found in data[key].items() if name in labels}

    colours = {label: f"C{i}" for i, label in enumerate(dict.fromkeys(labels.values()))}
    pictures = enumerate((
        figures.of_statistics(labelled("statistics"), figures.DISTANCES, colours),
        figures.of_statistics(labelled("statistics"), figures.GRADIENTS, colours),
        figures.of_singular_values(labelled("singular_values"), colours),
        figures.of_curves(baselines, {norm: found for norm, found in norms.items() if found}),
    ))
    return {"name": f"{benchmark}-{arch}", "benchmark": benchmark, "arch": arch, "lines": table,
            "pictures": [(i, picture) for i, picture in pictures if picture], "differing": differing(table)}


def differing(table):
    """Settings, beside those that name the lines, in which the runs of a table differ: key -> values."""
    settings = [settings_of(line.first) for line in table]
    found = {}
    for key in sorted({key for each in settings for key in each} - OF_THE_LINE):
        values = sorted({str(each.get(key, "default")) for each in settings})
        if len(values) > 1:
            found[key] = values
    return found


def significance(runs, records, before):
    """name -> paired bootstrap test of a run against LN of the same seed: what an earlier report says, as long as the
    scores are those of the records, else from the translations, if they are there."""
    tests = {}
    known = (before or {"tests": {}})["tests"]
    baselines = {(run.benchmark, run.arch, run.seed): run for run in runs if run.row.norm == BASELINE}
    for key, baseline in baselines.items():
        against = f"{baseline.benchmark}/{baseline.name}"
        if is_lm_record(records[against]):
            continue
        others = {f"{run.benchmark}/{run.name}": run for run in runs
                  if (run.benchmark, run.arch, run.seed) == key and run.row.norm != BASELINE}

        def current(name, test, against=against):
            return (test["against"] == against and close(test["score"], records[name])
                    and close(test["baseline"], records[against]))

        tests.update({name: known[name] for name in others if name in known and current(name, known[name])})
        missing = {name: run for name, run in others.items() if name not in tests}
        texts = {name: translation(run) for name, run in {**missing, against: baseline}.items()}
        reference = reference_of(baseline)
        systems = {name: texts[name] for name in missing if texts[name]}
        if not systems or not texts[against] or not reference:
            continue
        lowercase = "case:lc" in records[against]["sacrebleu"]["signature"]
        print(f"testing {len(systems)} runs against {against} (paired bootstrap)", flush=True)
        for name, test in score.paired_bootstrap(texts[against], systems, reference, lowercase).items():
            test = {"against": against, **test}
            if current(name, test):  # else the translations are not those of the record
                tests[name] = test
    return tests


def close(number, record):
    return abs(number - record["sacrebleu"]["score"]) < 1e-9


def translation(run):
    path = run.directory / "evaluation" / "hyp.detok"
    return score.lines_of(path) if path.is_file() else None


def reference_of(run):
    path = run.directory / "evaluation" / "ref.detok"
    return score.lines_of(path) if path.is_file() else None


# ---- the table -------------------------------------------------------------------------------------------------------


def add_table(part, records, tests):
    """Adds to a section its rows: cells as in table.py, the difference from LN and its significance, the paper's."""
    lm = is_lm_record(part["lines"][0].first)
    metrics = LM_METRICS if lm else METRICS
    heading = next(iter(metrics))
    value, _ = metrics[heading]
    baseline = next((line for line in part["lines"] if line.row.norm == BASELINE), None)
    of_baseline = {} if baseline is None else {record["seed"]: value(record) for record in baseline.records}
    part.update(metrics=metrics, heading=heading, rows=[], tested=any(name in tests for line in part["lines"]
                                                                     for name in line.names), lm=lm)
    for line in part["lines"]:
        own = {record["seed"]: value(record) for record in line.records}
        common = [seed for seed in own if seed in of_baseline]
        differences = [own[seed] - of_baseline[seed] for seed in common]
        published = (line.row.published("all" if lm else next(iter(PLACEMENTS)))
                     and all(map(scored_as_published, line.records)))
        part["rows"].append({
            "line": line, "cells": {key: text for key, text in cells(line).items() if key not in
                                    ("benchmark", "architecture", "seeds", "subset", *metrics)},
            "numbers": {name: cell(line, name, metrics) for name in metrics},
            "difference": mean(differences) if common and line is not baseline else None,
            "t": paired_t(differences) if line is not baseline else None,
            "tests": [tests.get(name) for name in line.names],
            "paper": PAPER.get((part["benchmark"], part["arch"]), {}).get(line.row.norm) if published else None,
            "seeds": [{"seed": record["seed"], "score": f"{value(record):.2f}", "name": name,
                       "anchor": name.replace("/", "-"), "record": f"{name}.json"}
                      for record, name in zip(line.records, line.names)],
        })
    part["has_paper"] = any(row["paper"] is not None for row in part["rows"])
    part["paper_heading"] = LM_PAPER if lm else "paper"
    part["has_t"] = any(row["t"] is not None for row in part["rows"])


def scored_as_published(record):
    """Is this the paper's kind of number: of the test set, of the published text, and with compounds split where its are?"""
    if record["subset"] != "test":
        return False
    if is_lm_record(record):
        return record["tokens"]["published_corpus"]
    return record["bleu_tokenized"].get("split_compounds", False) == data_settings(record["benchmark"]).get(
        "split_compounds", False)


def departures(rows):
    """The overrides of runs that change the recipe of configs/BENCH.yaml: all but those that name a line of the table."""
    found = {}
    for record in (record for row in rows for record in row["line"].records):
        found.update({override: None for key, override in compose.by_key(record["overrides"]).items()
                      if key not in OF_THE_LINE | IRRELEVANT})
    return list(found)


#: heading of the paper's perplexities
LM_PAPER = "paper, non-causal"
#: heading of the column that of_t() fills
T_TEST = "paired t over seeds"


def of_t(row):
    """The paired t-test of a row as text."""
    return "" if row["t"] is None else "t = {:.2f}, df = {}, p = {:.3f}".format(*row["t"])


#: heading of the column that by_seed() fills
BY_SEED = "sacreBLEU against LN by seed (p)"


def by_seed(row):
    """The paired tests of a row as text: the difference for each seed, and its p-value unless there is none."""
    def text(test):
        if test is None:
            return "-"
        difference = signed(test["score"] - test["baseline"])
        return difference if test["p_value"] is None else f"{difference} ({test['p_value']:.3f})"

    return ", ".join(map(text, row["tests"])) if any(row["tests"]) else ""


def unrounded(row):
    """The same numbers, unrounded, as two columns of a CSV file."""
    def column(value):
        return " ".join("-" if test is None or value(test) is None else str(value(test)) for test in row["tests"])

    return {"sacreBLEU against LN by seed": column(lambda test: test["score"] - test["baseline"]),
            "p": column(lambda test: test["p_value"])} if any(row["tests"]) else {}


def signed(number):
    return "" if number is None else f"{number:+.2f}"


def notes(part):
    """What a reader of the table must know, a sentence each."""
    found = []
    several = max(len(row["seeds"]) for row in part["rows"]) > 1
    if several:
        found.append("Mean ± standard deviation over the seeds.")
    if part["tested"]:
        found.append("By seed: the difference from LN of the same seed, and p of sacreBLEU's paired bootstrap test (1,000 "
                     "samples).")
    elif not part["lm"]:
        found.append("No bootstrap test: it needs the translations of LN and of another norm, in the run directories.")
    if part["has_t"]:
        found.append(f"Paired t: Student's test of the differences in {part['heading']} from LN of the same seed, "
                     f"two-sided, not corrected for the number of rows.")
    if part["lm"] and part["has_paper"]:
        found.append(CAUSALITY)
    changed = departures(part["rows"])
    if part["has_paper"] and changed:
        found.append(f"The paper's values come from the whole recipe; here it was changed by {', '.join(changed)}.")
    for key, values in part["differing"].items():
        found.append(f"The runs differ in {key}: {', '.join(values)}.")
    return found


def plain_rows(part):
    """(headings, rows) of a section's table as text."""
    headings = [*part["rows"][0]["cells"], *part["metrics"], "against LN", *([T_TEST] if part["has_t"] else []),
                *([BY_SEED] if part["tested"] else []), *([part["paper_heading"]] if part["has_paper"] else [])]
    rows = []
    for row in part["rows"]:
        paper = [] if not part["has_paper"] else ["" if row["paper"] is None else f"{row['paper']:.1f}"]
        rows.append([*map(str, row["cells"].values()), *row["numbers"].values(), signed(row["difference"]),
                     *([of_t(row)] if part["has_t"] else []), *([by_seed(row)] if part["tested"] else []), *paper])
    return headings, rows


def as_markdown(subject, path, parts, missing):
    found = [f"# {TITLES[subject]}\n"]
    for part in parts:
        headings, rows = plain_rows(part)
        links = [" ".join(f"[{seed['seed']}]({seed['record']})" for seed in row["seeds"]) for row in part["rows"]]
        found.append(f"## {part['benchmark']}, {part['arch']}\n")
        found.append(markdown([*headings, "records by seed"], [[*row, link] for row, link in zip(rows, links)]))
        found += [note + "\n" for note in notes(part)]
        found += [f"![{CAPTIONS[i]}]({Path(picture_path(path, part, i)).name})\n" for i, _ in part["pictures"]]
    if missing:
        found.append("Not in the table: " + ", ".join(missing) + ".\n")
    return "\n".join(found)


def as_csv(parts):
    """A line for each row of the table, numbers unrounded."""
    stream = io.StringIO()
    names = list(dict.fromkeys(name for part in parts for name in part["metrics"]))
    fields = ["benchmark", "architecture", "norm", "placement", "layer scale", "variant", "updates", "seeds"]
    writer = csv.DictWriter(stream, [*fields, *(f"{name} {of}" for name in names for of in ("mean", "deviation")),
                                     "against LN", "t", "degrees of freedom", "p of t", "sacreBLEU against LN by seed", "p",
                                     *dict.fromkeys(part["paper_heading"] for part in parts)], lineterminator="\n")
    writer.writeheader()
    for part in parts:
        for row in part["rows"]:
            line = row["line"]
            numbers = {}
            for name, (value, _) in part["metrics"].items():
                values = line.values(value)
                numbers[f"{name} mean"], numbers[f"{name} deviation"] = mean(values), spread(values)
            told = {key: text for key, text in cells(line).items() if key in fields}
            writer.writerow({
                **told, "architecture": part["arch"], "placement": line.row.placement,
                "updates": " ".join(str(record["updates"]) for record in line.records),
                "seeds": " ".join(str(seed["seed"]) for seed in row["seeds"]), **numbers,
                "against LN": row["difference"],
                **dict(zip(("t", "degrees of freedom", "p of t"), row["t"] or ())),
                **unrounded(row), part["paper_heading"]: row["paper"]})
    return stream.getvalue()


def as_html(subject, parts, missing, records):
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(loader=FileSystemLoader(str(Path(__file__).parent)), autoescape=True,
                              undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    for part in parts:
        part["images"] = [{"caption": CAPTIONS[i], "data": base64.b64encode(picture).decode()}
                          for i, picture in part["pictures"]]
    return environment.get_template("report.html.j2").render(
        title=TITLES[subject], parts=parts, missing=missing, records=records, notes=notes, signed=signed,
        by_seed=by_seed, by_seed_heading=BY_SEED, of_t=of_t, t_heading=T_TEST)


# ---- READMEs ----------------------------------------------------------------------------------------------------------

#: the files with tables of records
READMES = ("README.md", "results/README.md")
BLOCK = re.compile(r"(<!-- records: (.*?) -->\n)(.*?)(<!-- end of records -->)", re.S)


def readme(arguments):
    parser = argparse.ArgumentParser(prog="python -m fairseq_powernorm.experiments.report", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--readme", action="store_true", required=True)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args(arguments)
    stale = 0
    for name in READMES:
        path = ROOT / name
        text = path.read_text(encoding="utf-8")
        wanted = BLOCK.sub(lambda block: block[1] + tables_of(block[2].split()) + block[4], text)
        if "<!-- records: " not in text:
            raise UserError(f"{path} has no <!-- records: PATTERN... -->")
        if wanted == text:
            print(f"{name} is that of its records")
        elif options.check:
            print(f"{name} is not that of its records; python -m fairseq_powernorm.experiments.report --readme writes it",
                  file=sys.stderr)
            stale = 1
        else:
            write_whole(path, wanted.encode())
            print(f"{name} written")
    return stale


def tables_of(patterns):
    """The Markdown tables of the records that patterns name, from the root."""
    paths = sorted(path for pattern in patterns for path in ROOT.glob(pattern))
    if not paths:
        raise UserError(f"<!-- records: {' '.join(patterns)} --> names no record")
    contents = [read_json(path) for path in paths]
    if isinstance(contents[0], dict) and contents[0].get("kind") == "benchmark":
        return "\n".join(speed.summary(schema.check(content, path)) for content, path in zip(contents, paths))
    return tables({relative(path): schema.read_record(path) for path in dict.fromkeys(paths)})
