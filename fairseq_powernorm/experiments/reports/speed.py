"""What README.md says of a measurement of speed: two tables of a record of scripts/benchmark.py."""

import statistics
from typing import Any, Dict, List, Sequence

#: of the level `layer`: (pass, dtype) of each column
COLUMNS = (("train", "float32"), ("train", "bfloat16"), ("eval", "float32"), ("eval", "bfloat16"))
#: rows at which a tensor is larger than what a core has to itself
LARGE = 4096


def summary(record: Dict[str, Any]) -> str:
    """Markdown: ratios to LayerNorm of the norms alone, median and range over the cells, and the targets."""
    cells = [cell for cell in record["cells"] if cell["level"] == "layer" and cell["rows"] >= LARGE]
    names = dict.fromkeys(name for cell in cells for name in cell["contenders"])
    lines: List[str] = [
        f"{record['processor']}, {record['cores']} cores, torch {record['versions']['torch']}; time / LayerNorm at "
        f"{' and '.join(shape(*s) for s in dict.fromkeys((c['rows'], c['channels']) for c in cells))}, "
        f"{' and '.join(str(n) for n in dict.fromkeys(c['threads'] for c in cells))} threads, with and without mask: "
        "median (range); last row: LayerNorm's share of what the memory's bandwidth allows.",
        "", "| norm | " + " | ".join(f"{which}, {dtype}" for which, dtype in COLUMNS) + " |", "|" + " --- |" * 5]
    for name in names:
        lines.append(f"| {name} | " + " | ".join(spread(cells, name, "ratio", *column) for column in COLUMNS) + " |")
    lines.append("| layer: of the bandwidth limit | "
                 + " | ".join(spread(cells, "layer", "bandwidth_fraction", *column) for column in COLUMNS) + " |")
    lines += ["", "| target | measured | bound | met |", "| --- | --- | --- | --- |"]
    lines += [f"| {each['target']} | {each['value']:.2f} | {each['bound']} | {'yes' if each['met'] else 'no'} |"
              for each in record["checks"]]
    return "\n".join(lines) + "\n"


def shape(rows: int, channels: int) -> str:
    return f"{rows} x {channels}"


def spread(cells: Sequence[Dict[str, Any]], name: str, key: str, which: str, dtype: str) -> str:
    """Median and range over the cells of a pass and dtype; empty where there are none."""
    values = [cell["contenders"][name][key] for cell in cells
              if (cell["pass"], cell["dtype"]) == (which, dtype) and name in cell["contenders"]]
    return f"{statistics.median(values):.2f} ({min(values):.2f} - {max(values):.2f})" if values else ""
