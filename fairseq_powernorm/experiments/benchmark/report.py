"""A record as Markdown and as pictures."""
import statistics
from typing import Any, Dict, List, Mapping, Tuple


def named(contenders: Mapping[str, Any], name: str) -> List[Tuple[str, Any]]:
    """The entries of a contender, whatever its groups."""
    return [(full, entry) for full, entry in contenders.items() if full == name or full.startswith(f"{name}-g")]


def show(record: Mapping[str, Any]) -> str:
    """The record as Markdown."""
    timed, accurate = [], []
    for cell in record["cells"]:
        for name, entry in cell["contenders"].items():
            words = [cell["level"], cell["pass"], f"{cell['rows']} x {cell['channels']}", cell["dtype"],
                     "yes" if cell["masked"] else "no", cell.get("memory", record["memory"]), str(cell["threads"]), name]
            if cell["level"] == "accuracy":
                row = [*words[2:5], name, *(f"{error:.1e}" for error in entry["errors"].values()), f"{entry['worst']:.2f}"]
                accurate.append("| " + " | ".join(row) + " |")
                continue
            low, high = entry["ratio_quartiles"]
            optional = [f"{entry[key]:.2f}" if key in entry else "" for key in ("bandwidth_fraction", "saved", "peak")]
            host = f"{entry['host_seconds'] * 1e6:,.0f}" if "host_seconds" in entry else ""
            timed.append("| " + " | ".join([*words, f"{entry['seconds'] * 1e6:,.0f}", host,
                                            f"{entry['ratio']:.2f} ({low:.2f} - {high:.2f})", *optional]) + " |")
    lines: List[str] = []
    if timed:
        lines += [
            "| level | pass | rows x C | dtype | mask | memory | threads | norm | time (us) | host (us) "
            "| / LayerNorm (quartiles) | of limit | saved / x | peak / x |",
            "|" + " --- |" * 14,
            *timed,
        ]
    if accurate:
        lines += [""] * bool(timed) + [
            "| rows x C | dtype | mask | norm | output | gradient | weight | bias | psi^2 | nu | worst / tolerance |",
            "|" + " --- |" * 11, *accurate]
    if record["checks"]:
        lines += ["", "| target | measured | bound | met |", "| --- | --- | --- | --- |"]
        lines += [f"| {c['target']} | {c['value']:.3f} | {c['bound']} | {'yes' if c['met'] else '**no**'} |"
                  for c in record["checks"]]
    return "\n".join(lines) + "\n"


#: lines of a picture: contender, dtype, what it is called, colour
LINES = (("power", "float32", "PN", "C0"), ("power", "bfloat16", "PN, bfloat16", "C2"), ("power-v", "float32", "PN-V", "C1"),
         ("batch", "float32", "masked BN", "C3"))


def curve(record: Mapping[str, Any], which: str, contender: str, dtype: str) -> Dict[int, float]:
    """Rows -> ratio to LayerNorm of a norm alone: of the median cell, with memory as in a long training."""
    found: Dict[int, List[float]] = {}
    for cell in record["cells"]:
        kept = cell.get("memory", record["memory"]) == "recycled" or "recycled" not in record["memory"]
        if (cell["level"], cell["pass"], cell["dtype"]) == ("layer", which, dtype) and kept:
            for _, entry in named(cell["contenders"], contender):
                found.setdefault(cell["rows"], []).append(entry["ratio"])
    return {rows: statistics.median(values) for rows, values in sorted(found.items())}


def figures(record: Mapping[str, Any]) -> Dict[str, bytes]:
    """Name -> picture (PNG): time by LayerNorm's over the number of rows, one for training and one for evaluation."""
    from matplotlib.figure import Figure

    from ..reports.figures import png

    found: Dict[str, bytes] = {}
    for name, which in (("training", "train"), ("evaluation", "eval")):
        curves = {label: (curve(record, which, contender, dtype), colour) for contender, dtype, label, colour in LINES}
        curves = {label: (points, colour) for label, (points, colour) in curves.items() if points}
        if not curves:
            continue
        figure = Figure(figsize=(7, 4), layout="constrained")
        axis = figure.subplots()
        rows = sorted({number for points, _ in curves.values() for number in points})
        axis.axhline(1.0, color="black", linewidth=1.2)
        ends = {label: (list(points.values())[-1], colour) for label, (points, colour) in curves.items()}
        ends["LayerNorm"] = 1.0, "black"
        for label, (points, colour) in curves.items():
            axis.plot(list(points), list(points.values()), color=colour, marker="o", markersize=4, label=label)
        highest = max([1.0, *(value for points, _ in curves.values() for value in points.values())])
        place = -1.0
        for label, (value, colour) in sorted(ends.items(), key=lambda item: item[1][0]):
            place = max(value, place + 0.055 * highest * 1.1)  # labels do not cover each other
            axis.annotate(label, (rows[-1], place), xytext=(8, 0), textcoords="offset points", va="center", color=colour)
        axis.set_xscale("log", base=4)
        axis.set_xticks(rows, [f"{number:,}" for number in rows], rotation=30)  # neighbours may be close
        axis.minorticks_off()
        axis.set_ylim(0.0, max(highest, place) * 1.1)
        axis.set_xlabel("rows (tokens in a batch)")
        axis.set_ylabel("time / LayerNorm's")
        axis.set_title(f"{name.capitalize()}: below the line is faster than LayerNorm", fontsize=10)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
        found[name] = png(figure, dpi=150)
    return found
