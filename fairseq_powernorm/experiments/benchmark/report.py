"""A record as Markdown and as a figure."""
import statistics
from pathlib import Path
from typing import Any, Dict, List, Mapping, Tuple

from .options import CONTENDERS


def named(contenders: Mapping[str, Any], name: str) -> List[Tuple[str, Any]]:
    """The entries of a contender, whatever its groups."""
    return [(full, entry) for full, entry in contenders.items() if full == name or full.startswith(f"{name}-g")]


def show(record: Mapping[str, Any]) -> str:
    """The record as Markdown."""
    timed, accurate = [], []
    for cell in record["cells"]:
        for name, entry in cell["contenders"].items():
            words = [cell["level"], cell["pass"], f"{cell['rows']} x {cell['channels']}", cell["dtype"],
                     "yes" if cell["masked"] else "no", str(cell["threads"]), name]
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
            "| level | pass | rows x C | dtype | mask | threads | norm | time (us) | host (us) | / LayerNorm (quartiles) "
            "| of limit | saved / x | peak / x |",
            "|" + " --- |" * 13,
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


def draw(record: Mapping[str, Any], path: Path) -> None:
    """Ratios to LayerNorm: a panel for each level, pass and dtype, in it a row for each contender, in it a mark for each
    size, the median of its cells, with their range."""
    from matplotlib import ticker
    from matplotlib.figure import Figure

    from ..reports.figures import png

    panels: Dict[Tuple[str, str, str], Dict[str, Dict[Tuple[int, int], List[float]]]] = {}
    for cell in record["cells"]:
        if cell["level"] == "accuracy":
            continue
        contenders = panels.setdefault((cell["level"], cell["pass"], cell["dtype"]), {})
        for name, entry in cell["contenders"].items():
            contenders.setdefault(name, {}).setdefault((cell["rows"], cell["channels"]), []).append(entry["ratio"])
    if not panels:
        return
    heights = [1 + 0.25 * len(contenders) for contenders in panels.values()]
    figure = Figure(figsize=(8, sum(heights)), layout="constrained")
    axes = figure.subplots(len(panels), 1, height_ratios=heights, squeeze=False)
    for axis, ((level, which, dtype), contenders) in zip(axes[:, 0], panels.items()):
        known = [name for contender in CONTENDERS for name, _ in named(contenders, contender)]
        names = list(dict.fromkeys([*known, *contenders]))
        sizes = sorted({size for each in contenders.values() for size in each})
        for number, size in enumerate(sizes):
            here = [(row, contenders[name][size]) for row, name in enumerate(names) if size in contenders[name]]
            offset = 0.6 * ((number + 0.5) / len(sizes) - 0.5)
            middle = [statistics.median(values) for _, values in here]
            error = [[m - min(values) for m, (_, values) in zip(middle, here)],
                     [max(values) - m for m, (_, values) in zip(middle, here)]]
            axis.errorbar(middle, [row + offset for row, _ in here], xerr=error, fmt="o", markersize=4, elinewidth=1.5,
                          label=f"{size[0]} x {size[1]}")
        axis.axvline(1.0, color="black", linewidth=0.8)
        axis.set_yticks(range(len(names)), names)
        axis.invert_yaxis()
        if level == "layer":
            axis.set_xscale("log")
            axis.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
            axis.xaxis.set_minor_locator(ticker.NullLocator())
        axis.xaxis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
        axis.grid(axis="x", alpha=0.3)
        axis.set_title(f"{level}, {which}, {dtype}: time / LayerNorm", fontsize=9)
        axis.legend(title="rows x C", fontsize=7, title_fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    path.write_bytes(png(figure, dpi=150))
