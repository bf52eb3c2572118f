"""What results/README.md says of a record of scripts/benchmark.py: a table, its pictures, a line for each whole model."""

import statistics
from pathlib import Path
from typing import Any, Dict, List, Sequence

from ..paths import ROOT

#: the folder of the README that says it
RESULTS = ROOT / "results"
#: of the level `layer`: (pass, dtype)
KINDS = (("train", "float32"), ("train", "bfloat16"), ("eval", "float32"), ("eval", "bfloat16"))
#: pictures that may lie beside a record, and what they show
PICTURES = {"training.png": "training", "evaluation.png": "evaluation"}


def summary(record: Dict[str, Any], folder: Path) -> str:
    """Markdown: the ratios to LayerNorm of the norms alone by number of rows, the pictures, what whole models take.

    Args:
        record: of a measurement
        folder: where it lies
    """
    cells = [cell for cell in record["cells"] if cell["level"] == "layer"]
    rows = sorted({cell["rows"] for cell in cells})
    names = [name for name in dict.fromkeys(name for cell in cells for name in cell["contenders"]) if name != "layer"]
    memories = ", ".join(dict.fromkeys(cell.get("memory", record["memory"]) for cell in cells))
    lines: List[str] = [
        f"{record['processor']}, {record['cores']} cores, torch {record['versions']['torch']}; time / LayerNorm's of the "
        f"norms alone, median (range) over the cells: memory {memories}; "
        f"{' and '.join(str(n) for n in dict.fromkeys(c['threads'] for c in cells))} threads; channels "
        f"{', '.join(str(n) for n in sorted({c['channels'] for c in cells}))}; with and without mask.",
        "", "| norm | pass, dtype | " + " | ".join(f"{n:,} row{'s' * (n > 1)}" for n in rows) + " |",
        "|" + " --- |" * (2 + len(rows))]
    for name in names:
        for which, dtype in KINDS:
            found = [spread([cell for cell in cells if cell["rows"] == n], name, which, dtype) for n in rows]
            if any(found):
                lines.append(f"| {name} | {which}, {dtype} | " + " | ".join(found) + " |")
    pictures = [f"![{what}: time by LayerNorm's over the number of rows]({folder.relative_to(RESULTS).as_posix()}/{name})"
                for name, what in PICTURES.items() if (folder / name).is_file()]
    whole = whole_models(record)
    return "\n".join([*lines, *[""] * bool(pictures), *pictures, *[""] * bool(whole), *whole]) + "\n"


def whole_models(record: Dict[str, Any]) -> List[str]:
    """A line for each cell of a whole model: PN's time by LayerNorm's."""
    lines, several = [], len({cell["threads"] for cell in record["cells"]}) > 1
    for cell in record["cells"]:
        entry = cell["contenders"].get("power")
        if cell["level"] in ("step", "generation", "encoder") and entry:
            low, high = entry["ratio_quartiles"]
            what = {"step": f"A training step of {cell['rows']:,} tokens", "encoder": "A layer of an encoder in training",
                    "generation": f"Beam search with {cell['rows']} hypotheses"}[cell["level"]]
            if several:
                what += f" on {cell['threads']} thread{'s' * (cell['threads'] > 1)}"
            line = f"- {what} takes {entry['ratio']:.3f} of LayerNorm's time with PN (quartiles {low:.3f} to {high:.3f})"
            if "statistics" in entry:
                line += f"; the running statistics of all its norms take {100 * entry['statistics']:.2f} % of it"
            lines.append(line + ".")
    return lines


def spread(cells: Sequence[Dict[str, Any]], name: str, which: str, dtype: str) -> str:
    """Median and range over the cells of a pass and dtype; empty where there are none."""
    values = [cell["contenders"][name]["ratio"] for cell in cells
              if (cell["pass"], cell["dtype"]) == (which, dtype) and name in cell["contenders"]]
    if len(values) < 2:
        return f"{values[0]:.2f}" if values else ""
    return f"{statistics.median(values):.2f} ({min(values):.2f} - {max(values):.2f})"
