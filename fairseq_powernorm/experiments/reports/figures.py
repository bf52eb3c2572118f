"""The paper's figures: their data, taken from run directories, and the pictures, drawn from data and records."""

import io
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Dict, Iterable, List, Mapping, Optional, Sequence, Tuple

from ...recorder import LINEAR, PANELS, read
from ..errors import UserError
from ..overrides import quiet
from . import matrix

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Record = Dict[str, Any]

#: quantities of figure 1 and of figure 2 that --norm-record records
DISTANCES = ("distance_mean", "distance_var", "distance_psi2")
GRADIENTS = ("gradient_mean", "gradient_var", "gradient_psi2", "gradient_nu")
#: of figure 5: training and inference, and of figure 6: the gradients of PN-V and BN, and nu
DISCREPANCIES = ("discrepancy_mean", "discrepancy_std")
THEORY = ("gradient_ratio", "gradient_smaller", "nu_largest")
#: of the rows, in turn
COLOURS = (*(f"C{i}" for i in range(10)), "black", "gold", "navy", "lime", "maroon", "magenta", "teal", "slateblue")
#: columns of figure 4
COLUMNS = 5


def statistics(path: Path) -> Dict[str, Any]:
    """What a record of --norm-record says, small enough to be kept: mean, smallest and largest over the norms.

    None where a value was not finite.
    """
    rows = read(str(path))
    updates = sorted({row["update"] for row in rows})
    found: Dict[str, Dict[str, List[Optional[float]]]] = {}
    for quantity in (*DISTANCES, *GRADIENTS, *DISCREPANCIES, *THEORY):
        values: Dict[int, List[float]] = {update: [] for update in updates}
        for row in rows:
            if quantity in row:
                values[row["update"]].append(row[quantity])
        if any(values.values()):
            found[quantity] = {
                name: [rounded(of(each)) if each and all(map(math.isfinite, each)) else None for each in values.values()]
                for name, of in (("mean", mean), ("smallest", min), ("largest", max))
            }
    return {"norms": len({row["norm"] for row in rows}), "updates": updates, "quantities": found}


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def rounded(value: float) -> float:
    """Five digits are more than a picture shows."""
    return float(f"{value:.5g}")


def singular_values(path: Path) -> List[float]:
    """Singular values, largest first, of the input embedding (words x channels) of the model in a checkpoint.

    With adaptive inputs, of the table of all words, each band projected as the model does. Raises ValueError if the file is
    damaged, or its model has no such table of finite numbers.
    """
    import torch

    from ...checkpoint import load

    with quiet():  # what loading imports turns logging on
        model = load(str(path))["model"]
    side = "encoder" if any(key.startswith("encoder.") for key in model) else "decoder"
    whole = model.get(f"{side}.embed_tokens.weight")
    bands = [whole] if whole is not None else []
    prefix = f"{side}.embed_tokens.embeddings"
    try:
        while f"{prefix}.{len(bands)}.0.weight" in model:
            words, projection = (model[f"{prefix}.{len(bands)}.{part}.weight"].double() for part in (0, 1))
            bands.append(words @ projection.mT)
        # By the square of the table: words are many, channels few.
        square: Any = sum(band.double().mT @ band.double() for band in bands)
        values = torch.linalg.eigvalsh(square).clamp(min=0).sqrt().flip(0)
        return [float(f"{value:.6g}") for value in values]
    except (KeyError, TypeError, RuntimeError) as error:  # no table, or NaN in it
        raise ValueError(f"checkpoint {str(path)!r}: its model has no embedding of words x channels ({error})") from None


def of_file(read_from: Callable[[Path], Any], path: Path) -> Any:
    """What a function reads from a file of a run; refuses one that is damaged."""
    try:
        return read_from(path)
    except ValueError as error:
        raise UserError(f"{error}; without {path} the figures are made of what the others hold") from None


def data_of(runs: Iterable[matrix.Run], earlier: Optional[Mapping[str, Any]]) -> Dict[str, Any]:
    """The figures' data: of the run directories that there are, else what an earlier file says.

    Args:
        runs: the runs to picture
        earlier: content of that file, or None
    """
    data: Dict[str, Any] = {"schema": 1, "kind": "figures", "statistics": {}, "singular_values": {}}
    for run in runs:
        name = f"{run.benchmark}/{run.name}"
        record = run.directory / matrix.NORM_RECORD
        averaged = run.directory / "evaluation" / "averaged.pt"
        best = run.directory / "checkpoints" / "checkpoint_best.pt"
        if record.is_file():
            data["statistics"][name] = of_file(statistics, record)
        if (run.directory / "evaluation").is_dir():
            path = averaged if averaged.is_file() else best
            if path.is_file():
                data["singular_values"][name] = {"checkpoint": path.name, "values": of_file(singular_values, path)}
        for key in ("statistics", "singular_values"):
            before = (earlier or {}).get(key, {})
            if name in before:
                data[key].setdefault(name, before[name])
    return data


# ---- pictures --------------------------------------------------------------------------------------------------------


def png(figure: "Figure", dpi: int = 110) -> bytes:
    """A picture's bytes, the same for the same picture; with 256 colours it takes a third of the space."""
    from PIL import Image  # matplotlib needs it

    full, small = io.BytesIO(), io.BytesIO()
    figure.savefig(full, format="png", dpi=dpi)
    # Pillow's usual way would give lines the colours of each other where there are many
    colours = Image.open(full).convert("RGB").quantize(256, method=Image.Quantize.FASTOCTREE)
    colours.save(small, format="png", optimize=True)
    return small.getvalue()


def panels(number: int, columns: int = 3) -> Tuple["Figure", List["Axes"]]:
    """A figure with so many axes. It belongs to no window system, so it needs no backend and no closing."""
    from matplotlib.figure import Figure

    rows = -(-number // columns)
    columns = min(number, columns)
    figure = Figure(figsize=(4.3 * columns, 3.3 * rows), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in axes[number:]:
        axis.remove()
    return figure, axes[:number]


def finish(axis: "Axes", **settings: Any) -> None:
    """Titles, labels and scales of an axis, a grid and a legend."""
    axis.set(**settings)
    axis.grid(alpha=0.3)
    axis.legend(fontsize="small")


def of_statistics(
    labelled: Mapping[str, Mapping[str, Any]], quantities: Sequence[str], colours: Mapping[str, str]
) -> Optional[bytes]:
    """Figures 1, 2, 5 and 6: quantities against updates, the mean over the norms and their range; None without data.

    Args:
        labelled: label -> what statistics() gives
        colours: label -> colour
    """
    there = [name for name in quantities if any(name in found["quantities"] for found in labelled.values())]
    if not there:
        return None
    figure, axes = panels(len(there))
    for axis, quantity in zip(axes, there):
        for label, found in labelled.items():
            series = found["quantities"].get(quantity)
            if series:
                mean, low, high = ([math.nan if v is None else v for v in series[key]]
                                   for key in ("mean", "smallest", "largest"))
                axis.plot(found["updates"], mean, color=colours[label], label=label)
                axis.fill_between(found["updates"], low, high, color=colours[label], alpha=0.15, linewidth=0)
        finish(axis, title=PANELS[quantity], xlabel="updates", yscale="linear" if quantity in LINEAR else "log")
    return png(figure)


def of_singular_values(
    labelled: Mapping[str, Mapping[str, Any]], colours: Mapping[str, str]
) -> Optional[bytes]:
    """Figure 3: singular values, divided by the largest, of label -> {"values"}; None without data."""
    if not labelled:
        return None
    figure, (axis,) = panels(1)
    for label, found in labelled.items():
        largest = max(found["values"]) or 1.0
        relative = [value / largest for value in found["values"]]
        axis.plot(range(1, len(relative) + 1), relative, color=colours[label], label=label)
    finish(axis, title="singular values of the embedding", xlabel="index", ylabel="relative to the largest", yscale="log")
    return png(figure)


def curve(axis: "Axes", label: str, record: Record, subset: str, **style: Any) -> None:
    """One learning curve: loss of the training epochs or of the validations against updates."""
    points = record["curve"][subset]
    losses = [math.nan if point.get("loss") is None else point["loss"] for point in points]
    if len(points) < 20:
        style.setdefault("marker", ".")
    axis.plot([point["updates"] for point in points], losses, label=label, **style)


def of_curves(baselines: Mapping[str, Record], norms: Mapping[str, Mapping[str, Record]]) -> bytes:
    """Figure 4: training above, validation below, a column for each norm (COLUMNS beside each other), LN (dashed) in each.

    Args:
        baselines: label -> record
        norms: norm -> {label: record}
    """
    columns: Mapping[str, Mapping[str, Record]] = norms or {"": {}}
    width = min(len(columns), COLUMNS)
    bands = [list(columns)[i : i + width] for i in range(0, len(columns), width)]
    figure, axes = panels(2 * width * len(bands), width)
    places = [(subset, band[i] if i < len(band) else None)
              for band in bands for subset in ("train", "valid") for i in range(width)]
    for axis, (subset, norm) in zip(axes, places):
        if norm is None:
            axis.remove()
            continue
        for label, record in baselines.items():
            curve(axis, label, record, subset, color="black", linestyle="--", linewidth=1)
        for label, record in columns[norm].items():
            curve(axis, label, record, subset, linewidth=1)
        title = {"train": "training loss", "valid": "validation loss"}[subset]
        finish(axis, title=f"{norm}: {title}" if norm else title, xlabel="updates", ylabel="bits per token")
    return png(figure)
