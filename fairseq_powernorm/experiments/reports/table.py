"""Markdown tables of records, of translation and of language models.

Runs that differ only in their seed share a line, with the mean and, behind ±, the standard deviation over the seeds.
"""

import json
import math
import statistics
from dataclasses import dataclass
from typing import Any, Callable, Dict, Iterable, List, Mapping, NamedTuple, Optional, Sequence, Tuple

from ...command_line import in_one_line
from ..errors import UserError
from ..settings import BATCH_REFERENCE, PLACEMENTS
from .matrix import BASELINE, NORMS, PAPER_NORMS, VARIANTS, Row

Record = Dict[str, Any]

#: settings in which runs of a table may differ because they name its lines
OF_THE_LINE = {f"model.{key}" for key in (
    "encoder_norm_self", "encoder_norm_ff", "encoder_norm_final", "decoder_norm_self", "decoder_norm_ff",
    "decoder_norm_final", "norm_groups", "norm_variant")}
#: and because they change nothing in the training
IRRELEVANT = {"common.seed", "task.seed", "common.cpu", "common.user_dir", "common.log_interval", "task.data",
              "checkpoint.save_dir", "task.norm_record", "task.norm_record_interval"}


def is_lm_record(record: Record) -> bool:
    return "perplexity" in record


def arch_of(record: Record) -> str:
    return str(record["config"]["model"]["_name"])


def row_of(record: Record) -> Row:
    """The line of the matrix that a record belongs to."""
    model, norm = record["config"]["model"], record["norm"]
    scaled = norm in PAPER_NORMS and norm != BASELINE
    return Row(norm, "" if norm == BASELINE else record["placement"], model.get("norm_groups") != 0 if scaled else None,
               record["variant"] or VARIANTS[0] if norm == "power" else None)


def settings_of(record: Record) -> Dict[str, Any]:
    """Every setting but the seed that is not the default and tells runs apart: key -> value."""
    flat = {}

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, dict) and value:
            for key, inner in value.items():
                walk(f"{prefix}.{key}" if prefix else key, inner)
        elif prefix not in IRRELEVANT:
            flat[prefix] = value

    walk("", record["config"])
    return {**flat, "subset": record["subset"], "averaged": record["averaged"]}


@dataclass
class Line:
    """The records of the runs that differ only in their seed, in the order of the seeds."""

    row: Row
    records: List[Record]
    names: List[str]

    @property
    def first(self) -> Record:
        return self.records[0]

    def values(self, of: "Metric") -> List[Optional[float]]:
        """A number of each record, None where it is not finite."""
        return [of.value(record) for record in self.records]


def finite(values: Iterable[Optional[float]]) -> Optional[List[float]]:
    """The values, None if one of them is None."""
    found = list(values)
    known = [value for value in found if value is not None]
    return known if len(known) == len(found) else None


def mean(values: Iterable[Optional[float]]) -> Optional[float]:
    """The mean; None if a value is None."""
    known = finite(values)
    return None if known is None else statistics.fmean(known)


def spread(values: Iterable[Optional[float]]) -> Optional[float]:
    """The standard deviation (n - 1); None for a single value, or if a value is None."""
    known = finite(values)
    return None if known is None or len(known) < 2 else statistics.stdev(known)


class PairedT(NamedTuple):
    """The result of Student's paired test."""

    t: float
    freedom: int
    p: float  # two-sided


def paired_t(differences: Sequence[Optional[float]]) -> Optional[PairedT]:
    """Student's paired test of differences, one for each seed.

    t = mean / (s / sqrt(n)) with s the standard deviation (n - 1) of n differences, n - 1 degrees of freedom. None for fewer
    than two differences, where one is not finite, and where all are equal, which leaves t undefined.
    """
    known = finite(differences)
    if known is None or len(known) < 2 or len(set(known)) == 1:
        return None
    freedom = len(known) - 1
    t = statistics.fmean(known) / (statistics.stdev(known) / math.sqrt(len(known)))
    return PairedT(t, freedom, 1 - within_t(abs(t), freedom))


def within_t(t: float, freedom: int) -> float:
    """P(|T| < t) of Student's distribution, by the finite series for a whole number of degrees of freedom."""
    angle = math.atan(t / math.sqrt(freedom))
    total = term = math.cos(angle) if freedom % 2 else 1.0
    for k in range(3 if freedom % 2 else 2, freedom, 2):
        term *= (k - 1) / k * math.cos(angle) ** 2
        total += term
    if freedom % 2 == 0:
        return math.sin(angle) * total
    return 2 / math.pi * (angle + (math.sin(angle) * total if freedom > 1 else 0.0))


def shown(values: Sequence[Optional[float]], digits: int = 2) -> str:
    """The mean and the standard deviation of values as text."""
    middle, deviation = mean(values), spread(values)
    if middle is None:
        return "not finite"
    return f"{middle:.{digits}f}" + ("" if deviation is None else f" ± {deviation:.{digits}f}")


def lines(records: Mapping[str, Record]) -> List[Line]:
    """The lines of a table of records (name -> record), in the order of the matrix."""
    found: Dict[str, Line] = {}
    seeds: Dict[Tuple[str, int], str] = {}
    for name, record in records.items():
        key = json.dumps([record["benchmark"], settings_of(record)], sort_keys=True)
        line = found.setdefault(key, Line(row_of(record), [], []))
        double = seeds.setdefault((key, record["seed"]), name)
        if double != name:
            raise UserError(f"{double} and {name} are records of equal runs: the same settings, seed {record['seed']}")
        other = differing_data(line.records[0], record) if line.records else None
        if other:
            raise UserError(f"{line.names[0]} and {name} are records of the same settings and other data, of which a mean "
                            f"says nothing: {other}")
        line.records.append(record)
        line.names.append(name)
    for line in found.values():
        order = sorted(range(len(line.records)), key=lambda i: line.records[i]["seed"])
        line.records, line.names = [line.records[i] for i in order], [line.names[i] for i in order]
    return sorted(found.values(), key=lambda line: (line.first["benchmark"], arch_of(line.first), position(line.row)))


def differing_data(one: Record, other: Record) -> Optional[str]:
    """In what the data of two runs with the same settings differ as far as their records show it, in words."""
    facts: Dict[str, Callable[[Record], Any]] = {"parameters of the model": lambda record: record["parameters"]}
    if is_lm_record(one):
        facts["tokens of the text"] = lambda record: record["tokens"]["scored"]
    else:
        facts["words of the reference"] = lambda record: record["bleu_tokenized"]["reference_length"]
    differing = [f"{fact(one):,} and {fact(other):,} {what}" for what, fact in facts.items() if fact(one) != fact(other)]
    return ", ".join(differing) or None


def position(row: Row) -> Tuple[int, bool, int, bool]:
    """Where the line of a row stands: by norm, variant and placement, with layer scale before without."""
    norms, placements = list(dict.fromkeys([BASELINE, "rms", *NORMS])), list(PLACEMENTS)
    return (norms.index(row.norm) if row.norm in norms else len(norms), (row.variant or VARIANTS[0]) != VARIANTS[0],
            placements.index(row.placement) if row.placement in placements else -1, row.layer_scale is False)


def layer_scale(line: Line) -> str:
    """Is there layer scale before the norm? As text."""
    if line.row.layer_scale is None:
        return ""
    if line.row.norm == BATCH_REFERENCE:
        return "1 group"  # its own, whatever --norm-groups says
    groups = line.first["config"]["model"].get("norm_groups")
    return "no" if groups == 0 else "yes" if groups is None else f"{groups} groups"


def last_valid_loss(record: Record) -> Optional[float]:
    valid = record["curve"]["valid"]
    return valid[-1].get("loss") if valid else None


class Metric(NamedTuple):
    """A column of numbers."""

    value: Callable[[Record], Optional[float]]
    digits: int = 2


#: heading -> metric, for translation
METRICS = {
    "tokenized BLEU": Metric(lambda record: record["bleu_tokenized"]["score"]),
    "length ratio": Metric(lambda record: record["bleu_tokenized"]["ratio"], 3),
    "sacreBLEU": Metric(lambda record: record["sacrebleu"]["score"]),
    "chrF": Metric(lambda record: record["chrf"]["score"]),
    "valid loss": Metric(last_valid_loss, 3),
}
#: and for language models
LM_METRICS = {
    "perplexity": Metric(lambda record: record["perplexity"]["score"]),
    "perplexity with context": Metric(lambda record: (record["perplexity_context"] or {}).get("score")),
}


def updates(line: Line) -> str:
    """The updates of the runs; the smallest and the largest number where early stopping made them differ."""
    found = sorted({record["updates"] for record in line.records})
    return f"{found[0]:,}" + (f" to {found[-1]:,}" if len(found) > 1 else "")


def seeds(line: Line) -> str:
    return ", ".join(str(record["seed"]) for record in line.records)


def cell(line: Line, heading: str, metric: Metric) -> str:
    """A number of a line as text. What is not a language model's says so; what the records lack is empty."""
    text = shown(line.values(metric), metric.digits)
    if is_lm_record(line.first):
        if heading == "perplexity with context" and line.first["perplexity_context"] is None:
            return ""
        return text + ("" if line.first["causal"] else " (not a language model's)")
    if heading == "valid loss" and not line.first["curve"]["valid"]:
        return ""
    return text


def cells(line: Line) -> Dict[str, str]:
    """A line of the table: heading -> text."""
    lm = is_lm_record(line.first)
    metrics = LM_METRICS if lm else METRICS
    context = line.first["perplexity_context"] if lm else None
    return {
        "benchmark": line.first["benchmark"], **({"architecture": line.first["arch"]} if lm else {}),
        "norm": line.row.norm, **({} if lm else {"placement": line.row.placement or line.first["placement"]}),
        "layer scale": layer_scale(line), "variant": line.row.variant or "", "updates": updates(line),
        "seeds": seeds(line),
        **({"subset": line.first["subset"]} if lm else {}),
        **({"context": str(context["context_window"]) if context else ""} if lm else {}),
        **{heading: cell(line, heading, metric) for heading, metric in metrics.items()},
    }


def markdown(headings: Sequence[str], rows: Iterable[Iterable[str]]) -> str:
    """A table. What a text of a record may hold does not end a cell, or a line."""
    lines = ([in_one_line(text).replace("|", "\\|") for text in row] for row in (headings, ["---"] * len(headings), *rows))
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def tables(records: Mapping[str, Record], said: Sequence[str] = ()) -> str:
    """The Markdown tables of records (name -> record), translation first.

    Args:
        said: headings of columns that are left out where all lines agree, because the text around the table says it
    """
    found = [cells(line) for line in lines(records)]
    kinds = [[row for row in found if ("perplexity" in row) == lm] for lm in (False, True)]
    texts = []
    for rows in filter(None, kinds):
        headings = [name for name in rows[0] if name not in said or len({row[name] for row in rows}) > 1]
        texts.append(markdown(headings, [[row[name] for name in headings] for row in rows]))
    return "\n".join(texts)
