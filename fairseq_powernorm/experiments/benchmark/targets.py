"""What must be shown, and whether a record's numbers show it."""
import statistics
import sys
from typing import Any, Callable, Collection, Dict, List, Optional, Sequence, Tuple

from .options import DTYPES
from .report import named

#: what must be shown on a device: description, level, pass, dtype, contender, numbers of rows, statistic over cells,
#: bound of the ratio to LayerNorm. They are what the project has set itself, whatever a record shows: where one is missed,
#: results/README.md says so, and why.
LARGE, SMALL, ROW = range(2048, sys.maxsize), range(256, 513), {1}
TARGETS: Dict[str, List[Tuple[Any, ...]]] = {"cpu": [
    ("training, float32, every cell", "layer", "train", "float32", "power", LARGE, max, 1.0),
    ("training, bfloat16, every cell", "layer", "train", "bfloat16", "power", LARGE, max, 0.5),
    ("evaluation, float32, every cell", "layer", "eval", "float32", "power", LARGE, max, 0.7),
    ("evaluation, bfloat16, every cell", "layer", "eval", "bfloat16", "power", LARGE, max, 0.4),
    ("PN-V, training, float32, every cell", "layer", "train", "float32", "power-v", LARGE, max, 1.5),
    ("masked BN, training, float32, every cell", "layer", "train", "float32", "batch", LARGE, max, 1.5),
    ("a few hundred rows, float32", "layer", "train", "float32", "power", SMALL, max, 1.1),
    ("a few hundred rows, bfloat16", "layer", "train", "bfloat16", "power", SMALL, max, 1.1),
    ("one row, training", "layer", "train", None, "power", ROW, max, 1.6),
    ("one row, evaluation", "layer", "eval", None, "power", ROW, max, 1.5),
    ("one row, PN-V", "layer", "train", "float32", "power-v", ROW, max, 1.5),
    ("one row, masked BN", "layer", "train", "float32", "batch", ROW, max, 1.5),
    ("whole training step", "step", "train", "float32", "power", None, max, 1.01),
    ("generation with folded norms", "generation", "eval", "float32", "power", None, max, 1.0),
], "cuda": [
    ("training, float32, every cell", "layer", "train", "float32", "power", {16384}, max, 1.00),
    ("training, bfloat16, every cell", "layer", "train", "bfloat16", "power", {16384}, max, 1.00),
    ("whole training step, float16", "step", "train", "float16", "power", None, max, 1.02),
]}
#: on a GPU: dtypes whose forward pass in training reaches at least that share of the bandwidth of a copy, and where
FORWARD_SHARE = ("float32", "bfloat16"), {16384}, 0.80
#: on a CPU: how many times slower than `power` the authors' arithmetic is, at least
SLOWER = [("authors' arithmetic, float32", "float32", 25.0), ("authors' arithmetic, bfloat16", "bfloat16", 35.0)]
#: of the time of a step, what the running statistics take, but for the sums that the norms make
STATISTICS = ("running statistics / training step", 0.01)
SAVED = ("bytes saved for the backward pass / those of x", 1.01)


def checks(cells: Sequence[Dict[str, Any]]) -> List[Dict[str, Any]]:
    """Each target of the cells' device that they say something about: description, value, bound, is it met?"""
    found: List[Dict[str, Any]] = []
    device = cells[0]["device"] if cells else "cpu"

    def cells_of(
        level: str, which: str, dtype: Optional[str] = None, rows: Optional[Collection[int]] = None
    ) -> List[Dict[str, Any]]:
        return [cell for cell in cells if (cell["level"], cell["pass"]) == (level, which)
                and (dtype is None or cell["dtype"] == dtype) and (rows is None or cell["rows"] in rows)]

    def values(cells: Sequence[Dict[str, Any]], contender: str, key: str) -> List[float]:
        return [entry[key] for cell in cells for _, entry in named(cell["contenders"], contender) if key in entry]

    def judge(
        text: str,
        numbers: Sequence[float],
        statistic: Callable[[Sequence[float]], float],
        bound: float,
        *,
        at_least: bool = False,
    ) -> None:
        if numbers:
            value = statistic(numbers)
            met = value >= bound if at_least else value <= bound
            found.append({"target": text, "value": value, "bound": f"{'>=' if at_least else '<='} {bound}", "met": met})

    for text, level, which, dtype, contender, rows, statistic, bound in TARGETS[device]:
        judge(text, values(cells_of(level, which, dtype, rows), contender, "ratio"), statistic, bound)
    if device == "cuda":
        dtypes, rows, share = FORWARD_SHARE
        for dtype in dtypes:
            numbers = values(cells_of("layer", "forward", dtype, rows), "power", "bandwidth_fraction")
            judge(f"forward pass, {dtype}, share of the bandwidth of a copy", numbers, min, share, at_least=True)
    for text, dtype, bound in SLOWER if device == "cpu" else ():
        numbers = []
        for cell in cells_of("layer", "train", dtype, LARGE):
            ours = {full.rpartition("-")[2]: entry["seconds"] for full, entry in named(cell["contenders"], "power")}
            numbers += [entry["seconds"] / ours[full.rpartition("-")[2]]
                        for full, entry in named(cell["contenders"], "authors") if full.rpartition("-")[2] in ours]
        judge(f"{text}, median", numbers, statistics.median, bound, at_least=True)
    judge(STATISTICS[0], [entry["statistics"] for cell in cells_of("step", "train")
                          for _, entry in named(cell["contenders"], "power") if "statistics" in entry], max, STATISTICS[1])
    for dtype in DTYPES:
        judge(f"{SAVED[0]}, {dtype}", values(cells_of("layer", "train", dtype, LARGE), "power", "saved"), max, SAVED[1])
    judge("errors of a training step / tolerances", values(cells_of("accuracy", "train"), "power", "worst"), max, 1.0)
    return found
