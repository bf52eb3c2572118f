"""What a report says of one benchmark and architecture: the rows of its table, and what a reader must know of them."""

from dataclasses import dataclass, field
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple

from ..overrides import by_key
from ..settings import PLACEMENTS, data_settings
from .matrix import BASELINE, ELSEWHERE, ELSEWHERE_LM, PAPER, SOURCES
from .significance import Test
from .table import (
    IRRELEVANT,
    LM_METRICS,
    METRICS,
    OF_THE_LINE,
    Line,
    Metric,
    PairedT,
    Record,
    cell,
    cells,
    is_lm_record,
    mean,
    paired_t,
    settings_of,
)

CAUSALITY = (
    "The paper's perplexities come from code whose attention sees the words that it has to predict; those "
    "here do not, unless they say so."
)


@dataclass
class Seed:
    """One run of a row."""

    seed: int
    score: str
    name: str  # the key of the run

    @property
    def anchor(self) -> str:
        """Its place in the HTML page."""
        return self.name.replace("/", "-")

    @property
    def record(self) -> str:
        """Its record, from the directory of the report."""
        return f"{self.name}.json"


@dataclass
class TableRow:
    """A row of the table."""

    line: Line
    cells: Dict[str, str]  # heading -> text of what names the row
    numbers: Dict[str, str]  # heading -> text of each metric
    difference: Optional[float]  # from LN, over the seeds that both have
    t: Optional[PairedT]  # of these differences
    tests: List[Optional[Test]]  # paired bootstrap tests by seed
    paper: Optional[float]  # the paper's value, where it is of this kind
    elsewhere: Sequence[Tuple[str, str]]  # what others have published: (value, name of the source)
    seeds: List[Seed]


@dataclass
class Section:
    """A benchmark and architecture in a report."""

    benchmark: str
    arch: str
    lines: Sequence[Line]
    rows: List[TableRow]
    pictures: Sequence[Tuple[int, bytes]] = field(default=())  # (number of the figure - 1, PNG)

    @property
    def name(self) -> str:
        return f"{self.benchmark}-{self.arch}"

    @property
    def is_lm(self) -> bool:
        return is_lm_record(self.lines[0].first)

    @property
    def metrics(self) -> Dict[str, Metric]:
        return LM_METRICS if self.is_lm else METRICS

    @property
    def heading(self) -> str:
        """The metric that is compared."""
        return next(iter(self.metrics))

    @property
    def tested(self) -> bool:
        """Is there a bootstrap test?"""
        return any(test for row in self.rows for test in row.tests)

    @property
    def has_t(self) -> bool:
        return any(row.t is not None for row in self.rows)

    @property
    def has_paper(self) -> bool:
        return any(row.paper is not None for row in self.rows)

    @property
    def has_elsewhere(self) -> bool:
        return any(row.elsewhere for row in self.rows)

    @property
    def paper_heading(self) -> str:
        return "paper, non-causal" if self.is_lm else "paper"

    def notes(self) -> List[str]:
        """What a reader of the table must know, a sentence each."""
        found = []
        if any(len(row.seeds) > 1 for row in self.rows):
            found.append("Mean ± standard deviation over the seeds.")
        if self.tested:
            found.append(
                "By seed: the difference from LN of the same seed, and p of sacreBLEU's paired bootstrap test (1,000 "
                "samples)."
            )
        elif not self.is_lm:
            found.append("No bootstrap test: it needs the translations of LN and of another norm, in the run directories.")
        if self.has_t:
            found.append(
                f"Paired t: Student's test of the differences in {self.heading} from LN of the same seed, two-sided, not "
                f"corrected for the number of rows."
            )
        if self.is_lm and self.has_paper:
            found.append(CAUSALITY)
        if self.has_elsewhere:
            names = dict.fromkeys(name for row in self.rows for _, name in row.elsewhere)
            sources = "; ".join(f"{name}: {SOURCES[name]}" for name in names)
            found.append(
                f"Published elsewhere, with other settings: {sources}. No independent report of PN above LN was found."
            )
        if self.is_lm and any(row.line.row.norm in ("dyt", "derf") for row in self.rows):
            found.append(ELSEWHERE_LM)
        changed = departures(self.lines)
        if self.has_paper and changed:
            found.append(f"The paper's values come from the whole recipe; here it was changed by {', '.join(changed)}.")
        for key, values in differing(self.lines).items():
            found.append(f"The runs differ in {key}: {', '.join(values)}.")
        return found


def section(
    benchmark: str,
    arch: str,
    lines: Sequence[Line],
    tests: Mapping[str, Test],
    pictures: Sequence[Tuple[int, bytes]] = (),
) -> Section:
    """The section of the runs of a benchmark and architecture.

    Args:
        tests: paired bootstrap tests by the key of the run
        pictures: (number of the figure - 1, PNG)
    """
    made = Section(benchmark, arch, lines, [], pictures)
    value = made.metrics[made.heading].value
    baseline = next((line for line in lines if line.row.norm == BASELINE), None)
    of_baseline = {record["seed"]: value(record) for record in baseline.records} if baseline else {}
    default_placement = "all" if made.is_lm else next(iter(PLACEMENTS))
    unnamed = {"benchmark", "architecture", "seeds", "subset", *made.metrics}
    for line in lines:
        own = {record["seed"]: value(record) for record in line.records}
        differences: List[Optional[float]] = []
        if line is not baseline:
            differences = [minus(own[seed], of_baseline[seed]) for seed in own if seed in of_baseline]
        of_kind = all(map(scored_as_published, line.records))
        published = of_kind and line.row.published(default_placement)
        made.rows.append(
            TableRow(
                line=line,
                cells={key: text for key, text in cells(line).items() if key not in unnamed},
                numbers={heading: cell(line, heading, metric) for heading, metric in made.metrics.items()},
                difference=mean(differences) if differences else None,
                t=paired_t(differences),
                tests=[tests.get(name) for name in line.names],
                paper=PAPER.get((benchmark, arch), {}).get(line.row.norm) if published else None,
                elsewhere=ELSEWHERE.get((benchmark, arch), {}).get(line.row.name(default_placement), ()) if of_kind else (),
                seeds=[
                    Seed(record["seed"], f"{value(record):.2f}", name) for record, name in zip(line.records, line.names)
                ],
            )
        )
    return made


def minus(one: Optional[float], other: Optional[float]) -> Optional[float]:
    """The difference; None if one of the two is not finite."""
    return None if one is None or other is None else one - other


def scored_as_published(record: Record) -> bool:
    """Is this the paper's kind of number: of the test set, of the published text, and with compounds split where its are?"""
    if record["subset"] != "test":
        return False
    if is_lm_record(record):
        return bool(record["tokens"]["published_corpus"])
    split = data_settings(record["benchmark"]).get("split_compounds", False)
    return bool(record["bleu_tokenized"].get("split_compounds", False) == split)


def departures(lines: Sequence[Line]) -> List[str]:
    """The overrides that change the recipe of configs/BENCH.yaml: all but those that name a line of the table."""
    found: Dict[str, Any] = {}
    for record in (record for line in lines for record in line.records):
        for key, override in by_key(record["overrides"]).items():
            if key not in OF_THE_LINE | IRRELEVANT:
                found[override] = None
    return list(found)


def differing(lines: Sequence[Line]) -> Dict[str, List[str]]:
    """Settings, beside those that name the lines, in which the runs of a table differ: key -> values."""
    settings = [settings_of(line.first) for line in lines]
    found = {}
    for key in sorted({key for each in settings for key in each} - OF_THE_LINE):
        values = sorted({str(each.get(key, "default")) for each in settings})
        if len(values) > 1:
            found[key] = values
    return found
