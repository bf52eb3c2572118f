"""The paper's figures: their data, taken from run directories, and the pictures, drawn from data and records."""

import importlib
import io
import logging
import math

from ..runs import compose
from . import matrix

#: quantities of figure 1 and of figure 2 that --norm-record records
DISTANCES = ("distance_mean", "distance_var", "distance_psi2")
GRADIENTS = ("gradient_mean", "gradient_var", "gradient_psi2", "gradient_nu")


def package(module):
    """A module of fairseq_powernorm; fairseq, which it imports, turns logging on."""
    with compose.quiet():
        return importlib.import_module(f"fairseq_powernorm.{module}")


def statistics(path):
    """What a record of --norm-record says, small enough to be kept: mean, smallest and largest over the norms.

    None where a value was not finite.
    """
    rows = package("recorder").read(str(path))
    updates = sorted({row["update"] for row in rows})
    found = {}
    for quantity in (*DISTANCES, *GRADIENTS):
        values = {update: [] for update in updates}
        for row in rows:
            if quantity in row:
                values[row["update"]].append(row[quantity])
        if any(values.values()):
            series = found[quantity] = {}
            for name, of in (("mean", lambda v: sum(v) / len(v)), ("smallest", min), ("largest", max)):
                series[name] = [of(v) if v and all(map(math.isfinite, v)) else None for v in values.values()]
                series[name] = [None if v is None else float(f"{v:.5g}") for v in series[name]]
    return {"norms": len({row["norm"] for row in rows}), "updates": updates, "quantities": found}


def singular_values(path):
    """Singular values, largest first, of the input embedding (words x channels) of the model in a checkpoint.

    With adaptive inputs, of the table of all words, each band projected as the model does.
    """
    import torch

    model = package("checkpoint").load(str(path))["model"]
    side = "encoder" if any(key.startswith("encoder.") for key in model) else "decoder"
    whole = model.get(f"{side}.embed_tokens.weight")
    bands = [whole] if whole is not None else []
    prefix = f"{side}.embed_tokens.embeddings"
    while f"{prefix}.{len(bands)}.0.weight" in model:
        words, projection = (model[f"{prefix}.{len(bands)}.{part}.weight"].double() for part in (0, 1))
        bands.append(words @ projection.T)
    # By the square of the table: words are many, channels few.
    square = sum(band.double().T @ band.double() for band in bands)
    values = torch.linalg.eigvalsh(square).clamp(min=0).sqrt().flip(0)
    return [float(f"{value:.6g}") for value in values]


def data_of(runs, earlier):
    """The figures' data: of the run directories that there are, else what an earlier file says.

    Args:
        runs: the runs to picture
        earlier: content of the file, or None
    """
    data = {"schema": 1, "kind": "figures", "statistics": {}, "singular_values": {}}
    for run in runs:
        name = f"{run.benchmark}/{run.name}"
        record = run.directory / matrix.NORM_RECORD
        averaged = run.directory / "evaluation" / "averaged.pt"
        best = run.directory / "checkpoints" / "checkpoint_best.pt"
        if record.is_file():
            data["statistics"][name] = statistics(record)
        if (run.directory / "evaluation").is_dir():
            path = averaged if averaged.is_file() else best
            if path.is_file():
                data["singular_values"][name] = {"checkpoint": path.name, "values": singular_values(path)}
        for key in ("statistics", "singular_values"):
            if name in (earlier or {}).get(key, {}):
                data[key].setdefault(name, earlier[key][name])
    return data


# ---- pictures --------------------------------------------------------------------------------------------------------


def pyplot():
    import matplotlib

    matplotlib.use("Agg")
    logging.getLogger("matplotlib").setLevel(logging.WARNING)
    from matplotlib import pyplot as module

    return module


def png(figure):
    """A picture's bytes, the same for the same picture."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=110, metadata={"Software": None})
    pyplot().close(figure)
    return stream.getvalue()


def panels(number, columns=3):
    rows = -(-number // columns)
    columns = min(number, columns)
    size = (4.3 * columns, 3.3 * rows)
    figure, axes = pyplot().subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for axis in list(axes.flat)[number:]:
        axis.remove()
    return figure, list(axes.flat)[:number]


def finished(axis, **settings):
    axis.set(**settings)
    axis.grid(alpha=0.3)
    axis.legend(fontsize="small")


def of_statistics(labelled, quantities, colours):
    """Figures 1 and 2: quantities against updates, the mean over norms and the range of all; None without data.

    labelled: label -> statistics; colours: label -> colour
    """
    there = [name for name in quantities if any(name in found["quantities"] for found in labelled.values())]
    if not there:
        return None
    titles = package("recorder").PANELS
    figure, axes = panels(len(there))
    for axis, quantity in zip(axes, there):
        for label, found in labelled.items():
            series = found["quantities"].get(quantity)
            if series:
                mean, low, high = ([math.nan if v is None else v for v in series[key]]
                                   for key in ("mean", "smallest", "largest"))
                axis.plot(found["updates"], mean, color=colours[label], label=label)
                axis.fill_between(found["updates"], low, high, color=colours[label], alpha=0.15, linewidth=0)
        finished(axis, title=titles[quantity], xlabel="updates", yscale="log")
    return png(figure)


def of_singular_values(labelled, colours):
    """Figure 3: singular values, divided by the largest, of label -> values; None without data."""
    if not labelled:
        return None
    figure, (axis,) = panels(1)
    for label, found in labelled.items():
        largest = max(found["values"]) or 1.0
        relative = [value / largest for value in found["values"]]
        axis.plot(range(1, len(relative) + 1), relative, color=colours[label], label=label)
    finished(axis, title="singular values of the embedding", xlabel="index", ylabel="relative to the largest",
             yscale="log")
    return png(figure)


def curve(axis, label, record, subset, **style):
    """One learning curve: loss of the training epochs or of the validations against updates."""
    points = record["curve"][subset]
    losses = [math.nan if point.get("loss") is None else point["loss"] for point in points]
    if len(points) < 20:
        style.setdefault("marker", ".")
    axis.plot([point["updates"] for point in points], losses, label=label, **style)


def of_curves(baselines, norms):
    """Figure 4: training above, validation below, a column for each norm, LN (dashed) in each.

    baselines: label -> record; norms: norm -> {label: record}
    """
    columns = norms or {"": {}}
    figure, axes = panels(2 * len(columns), len(columns))
    for axis, (subset, norm) in zip(axes, ((subset, norm) for subset in ("train", "valid") for norm in columns)):
        for label, record in baselines.items():
            curve(axis, label, record, subset, color="black", linestyle="--", linewidth=1)
        for label, record in columns[norm].items():
            curve(axis, label, record, subset, linewidth=1)
        title = {"train": "training loss", "valid": "validation loss"}[subset]
        finished(axis, title=f"{norm}: {title}" if norm else title, xlabel="updates", ylabel="bits per token")
    return png(figure)
