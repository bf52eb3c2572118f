"""The tables of a report as Markdown, as CSV and as a self-contained HTML page."""

import base64
import csv
import io
from pathlib import Path
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence, Tuple

from .sections import Section, TableRow
from .significance import Test
from .table import Record, cells, markdown, mean, spread

CAPTIONS = (
    "Figure 1. Distance of the batch's statistics from the running ones along training: mean over the model's norms "
    "(line) and their range (area).",
    "Figure 2. Size of the gradient through the statistics along training: mean over the model's norms (line) and "
    "their range (area).",
    "Figure 3. Singular values of the embedding matrix of the evaluated model.",
    "Figure 4. Training and validation loss; dashed: LN.",
    "Figure 5. Training-inference discrepancy along training: the distance of running from batch means in deviations of "
    "the batch, and the relative difference of the deviations, as means over channels: mean over the model's norms (line) "
    "and their range (area).",
    "Figure 6. Norm of the gradient that PN-V would let through, over that of BN, at the same place with the same gradient; "
    "the share of channels in which PN-V's is smaller; and the largest |nu| of PN. Mean over the model's norms (line) and "
    "their range (area).",
)
#: heading of the column that of_t() fills
T_TEST = "paired t over seeds"
#: heading of the column of what others have published
ELSEWHERE = "published elsewhere"
#: heading of the column that by_seed() fills
BY_SEED = "sacreBLEU against LN by seed (p)"


def of_t(row: TableRow) -> str:
    """The paired t-test of a row as text."""
    return "" if row.t is None else f"t = {row.t.t:.2f}, df = {row.t.freedom}, p = {row.t.p:.3f}"


def of_others(row: TableRow) -> str:
    """What others have published, as text."""
    return ", ".join(f"{value} ({source})" for value, source in row.elsewhere)


def by_seed(tests: Sequence[Optional[Test]]) -> str:
    """The bootstrap tests of a row as text: the difference for each seed, and its p-value if there is one."""

    def text(test: Optional[Test]) -> str:
        if test is None:
            return "-"
        difference = signed(test["score"] - test["baseline"])
        return difference if test["p_value"] is None else f"{difference} ({test['p_value']:.3f})"

    return ", ".join(map(text, tests)) if any(tests) else ""


def unrounded(tests: Sequence[Optional[Test]]) -> Dict[str, str]:
    """The same numbers, unrounded, as two columns of a CSV file."""

    def column(value: Callable[[Test], Optional[float]]) -> str:
        return " ".join("-" if test is None or value(test) is None else str(value(test)) for test in tests)

    if not any(tests):
        return {}
    return {
        "sacreBLEU against LN by seed": column(lambda test: test["score"] - test["baseline"]),
        "p": column(lambda test: test["p_value"]),
    }


def signed(number: Optional[float]) -> str:
    return "" if number is None else f"{number:+.2f}"


def plain_rows(part: Section) -> Tuple[List[str], List[List[str]]]:
    """(headings, rows) of a section's table as text."""
    headings = [*part.rows[0].cells, *part.metrics, "against LN"]
    rows = [[*row.cells.values(), *row.numbers.values(), signed(row.difference)] for row in part.rows]
    columns: List[Tuple[bool, str, Callable[[TableRow], str]]] = [
        (part.has_t, T_TEST, of_t),
        (part.tested, BY_SEED, lambda row: by_seed(row.tests)),
        (part.has_paper, part.paper_heading, lambda row: "" if row.paper is None else f"{row.paper:.1f}"),
        (part.has_elsewhere, ELSEWHERE, of_others),
    ]
    for is_there, heading, text in columns:
        if is_there:
            headings.append(heading)
            for shown, row in zip(rows, part.rows):
                shown.append(text(row))
    return headings, rows


def as_markdown(
    title: str, parts: Sequence[Section], missing: Sequence[str], picture_name: Callable[[Section, int], str]
) -> str:
    """A report in Markdown.

    Args:
        missing: the runs that are not in the table
        picture_name: the file of a section's picture, given its number
    """
    found = [f"# {title}\n"]
    for part in parts:
        headings, rows = plain_rows(part)
        links = [" ".join(f"[{seed.seed}]({seed.record})" for seed in row.seeds) for row in part.rows]
        found.append(f"## {part.benchmark}, {part.arch}\n")
        found.append(markdown([*headings, "records by seed"], [[*row, link] for row, link in zip(rows, links)]))
        found += [note + "\n" for note in part.notes()]
        found += [f"![{CAPTIONS[i]}]({picture_name(part, i)})\n" for i, _ in part.pictures]
    if missing:
        found.append("Not in the table: " + ", ".join(missing) + ".\n")
    return "\n".join(found)


def as_csv(parts: Sequence[Section]) -> str:
    """A line for each row of the tables, numbers unrounded."""
    stream = io.StringIO()
    names = list(dict.fromkeys(name for part in parts for name in part.metrics))
    fields = ["benchmark", "architecture", "norm", "placement", "layer scale", "variant", "updates", "seeds"]
    of_t = ("t", "degrees of freedom", "p of t")
    columns = [
        *fields,
        *(f"{name} {of}" for name in names for of in ("mean", "deviation")),
        "against LN",
        *of_t,
        "sacreBLEU against LN by seed",
        "p",
        *dict.fromkeys(part.paper_heading for part in parts),
        *([ELSEWHERE] if any(part.has_elsewhere for part in parts) else []),
    ]
    writer = csv.DictWriter(stream, columns, lineterminator="\n")
    writer.writeheader()
    for part in parts:
        for row in part.rows:
            line, numbers = row.line, {}
            for name, metric in part.metrics.items():
                values = line.values(metric)
                numbers[f"{name} mean"], numbers[f"{name} deviation"] = mean(values), spread(values)
            found: Dict[str, Any] = {key: text for key, text in cells(line).items() if key in fields}
            found.update(numbers)
            found.update(zip(of_t, row.t or ()))
            found.update(unrounded(row.tests))
            found.update(
                {
                    "architecture": part.arch,
                    "placement": line.row.placement,
                    "updates": " ".join(str(record["updates"]) for record in line.records),
                    "seeds": " ".join(str(seed.seed) for seed in row.seeds),
                    "against LN": row.difference,
                    part.paper_heading: row.paper,
                    **({ELSEWHERE: of_others(row)} if part.has_elsewhere else {}),
                }
            )
            writer.writerow(found)
    return stream.getvalue()


def as_html(title: str, parts: Sequence[Section], missing: Sequence[str], records: Mapping[str, Record]) -> str:
    """A page that holds its pictures; records: by the key of their runs."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(str(Path(__file__).parent)),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.j2").render(
        title=title,
        parts=parts,
        missing=missing,
        records=records,
        signed=signed,
        by_seed=by_seed,
        by_seed_heading=BY_SEED,
        of_t=of_t,
        t_heading=T_TEST,
        elsewhere_heading=ELSEWHERE,
        of_others=of_others,
        captions=CAPTIONS,
        base64=lambda picture: base64.b64encode(picture).decode(),
    )
