"""Writes the report of a matrix of runs, from their records and from what the runs left."""

import itertools
import math
import os
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple

from ..directories import locked
from ..errors import UserError
from ..files import read_json, write_bytes, write_json, write_text
from ..paths import runs_root
from . import figures, render, schema, sections
from .matrix import BASELINE, NORMS, Row, Run, relative
from .significance import significance
from .table import Record, arch_of, lines

#: tables -> their titles; of the figures there are pictures only
TITLES = {"table1": "Table 1: machine translation", "table2": "Table 2: language modelling"}


def stem(subject: str, benchmarks: Sequence[str], updates: Optional[int], results: Path) -> Path:
    """What the files of a report are called, without their ends."""
    return results / "-".join([subject, "+".join(benchmarks), *([str(updates)] if updates is not None else [])])


def write(subject: str, path: Path, runs: Sequence[Run], missing: Sequence[str], results: Path) -> None:
    """Writes a report and says where.

    Args:
        subject: key of SUBJECTS
        path: of its files, without their ends
        runs: the runs that have records
        missing: names of the others
        results: directory of the records
    """
    results.mkdir(parents=True, exist_ok=True)
    records = {run.key: record_of(run, results) for run in runs}
    is_table = subject in TITLES
    with locked(runs_root() / f"report-{path.name}", patience=math.inf):
        written: List[str] = []

        def wrote(end: str) -> Path:
            written.append(f"{path}{end}")
            return Path(written[-1])

        pictured: Dict[Tuple[str, str, Row], Run] = {}  # the first seed of each row
        for run in runs:
            if not is_table or run.is_pictured:
                pictured.setdefault((run.benchmark, run.arch, run.row), run)
        data = figures.data_of(pictured.values(), earlier(f"{path}.figures.json"))
        write_json(wrote(".figures.json"), data)
        before = earlier(f"{path}.significance.json") if is_table else None
        tests = significance(runs, records, (before or {}).get("tests")) if is_table else {}
        parts = [section(group, records, data, tests) for group in grouped(runs)]
        for part in parts:
            for number, picture in part.pictures:
                write_bytes(wrote(picture_end(part, number)), picture)
        if is_table:
            if tests:
                write_json(wrote(".significance.json"), {"schema": 1, "kind": "significance", "tests": tests})
            title = TITLES[subject]
            text = render.as_markdown(title, parts, missing, lambda part, i: f"{path.name}{picture_end(part, i)}")
            print(text)
            write_text(wrote(".md"), text)
            write_text(wrote(".csv"), render.as_csv(parts))
            write_text(wrote(".html"), render.as_html(title, parts, missing, records))
    print("report: " + ", ".join(relative(Path(name)) for name in written))


def record_of(run: Run, results: Path) -> Record:
    """The record of a run; refuses that of another run in its place."""
    path = run.record(results)
    record = schema.read_record(path)
    wanted = {"benchmark": run.benchmark, "arch": run.arch, "norm": run.row.norm, "seed": run.seed}
    for key, value in wanted.items():
        found = arch_of(record) if key == "arch" else record[key]
        if found != value:
            raise UserError(f"{path} is the record of another run: its {key} is {found!r}, not {value!r}; move it away")
    return record


def picture_end(part: sections.Section, number: int) -> str:
    """The end of the name of a section's picture."""
    return f".{part.name}.figure{number + 1}.png"


def earlier(path: str) -> Optional[Dict[str, Any]]:
    """The content of a file of an earlier report, None if there is none."""
    return schema.check(read_json(path), path) if os.path.exists(path) else None


def grouped(runs: Sequence[Run]) -> List[List[Run]]:
    """The runs of each benchmark and architecture."""
    found: Dict[Tuple[str, str], List[Run]] = {}
    for run in runs:
        found.setdefault((run.benchmark, run.arch), []).append(run)
    return list(found.values())


def section(
    runs: Sequence[Run], records: Mapping[str, Record], data: Mapping[str, Any], tests: Mapping[str, Dict[str, Any]]
) -> sections.Section:
    """The section of the runs of a benchmark and architecture, with its pictures.

    Args:
        records: by the key of their runs
        data: of the figures
        tests: paired bootstrap tests by the key of the run
    """
    labels = {run.key: run.row_name for run in runs}
    table = lines({run.key: records[run.key] for run in runs})
    named = [(labels[line.names[0]], line) for line in table]
    baselines = {label: line.first for label, line in named if line.row.norm == BASELINE}
    norms = {
        norm: {label: line.first for label, line in named if line.row.norm == norm} for norm in NORMS if norm != BASELINE
    }

    def labelled(key: str) -> Dict[str, Any]:
        return {labels[name]: found for name, found in data[key].items() if name in labels}

    colours = dict(zip(dict.fromkeys(labels.values()), itertools.cycle(figures.COLOURS)))
    pictures = (
        figures.of_statistics(labelled("statistics"), figures.DISTANCES, colours),
        figures.of_statistics(labelled("statistics"), figures.GRADIENTS, colours),
        figures.of_singular_values(labelled("singular_values"), colours),
        figures.of_curves(baselines, {norm: found for norm, found in norms.items() if found}),
        figures.of_statistics(labelled("statistics"), figures.DISCREPANCIES, colours),
        figures.of_statistics(labelled("statistics"), figures.THEORY, colours),
    )
    there = [(number, picture) for number, picture in enumerate(pictures) if picture]
    return sections.section(runs[0].benchmark, runs[0].arch, table, tests, there)
