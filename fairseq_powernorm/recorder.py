"""Records the running statistics during training, and draws figures from the records (figures 1 and 2 of the paper).

A record is a text file with one JSON object per norm and recorded update: ``update`` (optimizer steps taken),
``norm`` (its name in the model) and the quantities of :meth:`~fairseq_powernorm.norms.RunningNorm.describe` and
:meth:`~fairseq_powernorm.probe.GradientProbe.describe`.

``python -m fairseq_powernorm.recorder RECORD... --output FIGURE.png``
"""
import argparse
import json
import os
import sys
from typing import Any, Dict, List, Mapping, Optional

from . import command_line, command_options

Row = Dict[str, Any]

#: panels of the figure: quantity -> title
PANELS = {
    "distance_mean": "batch mean - running mean",
    "distance_var": "batch variance - running variance",
    "distance_psi2": "batch second moment - running one",
    "gradient_mean": "gradient through the mean",
    "gradient_var": "gradient through the variance",
    "gradient_psi2": "gradient through the second moment",
    "gradient_nu": "gradient term of nu",
    "discrepancy_mean": "discrepancy of the mean",
    "discrepancy_std": "discrepancy of the deviation",
    "gradient_ratio": "gradient norm, PN-V's over BN's",
    "gradient_smaller": "channels where PN-V's is smaller",
    "nu_largest": "largest |nu|",
}
#: those that are drawn on a linear scale: shares
LINEAR = ("gradient_smaller",)


def check_target(path: str, interval: int) -> None:
    """Raise ValueError for a record that could not be written."""
    if interval < 1:
        raise ValueError(f"--norm-record-interval {interval}: must be 1 or more")
    if not os.path.isdir(os.path.dirname(os.path.abspath(path))):
        raise ValueError(f"--norm-record {path!r}: its directory does not exist")
    if os.path.isdir(path):
        raise ValueError(f"--norm-record {path!r}: is a directory")


class Recorder:
    """Appends to a record every ``interval`` updates.

    Args:
        path: the file
        interval: updates between two entries, at least 1

    Raises:
        ValueError: the record cannot be written
    """

    def __init__(self, path: str, interval: int):
        check_target(path, interval)
        self.path = path
        self.interval = interval

    def check(self, new_run: bool) -> List[Row]:
        """What the file holds; raises ValueError if it is no record, or if the run is new and must not touch it."""
        rows = read(self.path) if os.path.exists(self.path) else []
        if rows and new_run:
            raise ValueError(f"--norm-record {self.path!r}: holds the record of another run; choose another name")
        return rows

    def go_on(self, update: int) -> None:
        """Going on after ``update`` updates: drop what the file holds of later ones, which will come again."""
        rows = [row for row in self.check(new_run=update == 0) if row["update"] <= update]
        temporary = f"{self.path}.{os.getpid()}.tmp"
        with open(temporary, "w", encoding="utf-8") as stream:
            stream.writelines(map(_line, rows))
        os.replace(temporary, self.path)

    def due(self, update: int) -> bool:
        """Is this update to be recorded?"""
        return update % self.interval == 0

    def write(self, update: int, described: Mapping[str, Mapping[str, float]]) -> None:
        """Append what :meth:`~fairseq_powernorm.statistics.RunningStatistics.describe` says of one update."""
        with open(self.path, "a", encoding="utf-8") as stream:
            stream.writelines(_line({"update": update, "norm": norm, **row}) for norm, row in described.items())


def _line(row: Row) -> str:
    return json.dumps({key: float(f"{v:.6g}") if isinstance(v, float) else v for key, v in row.items()}) + "\n"


def read(path: str) -> List[Row]:
    """The rows of a record; a last line that was not written to its end is left out.

    Raises:
        ValueError: the file is missing or is no record
    """
    if not os.path.isfile(path):
        raise ValueError(f"record {path!r}: no such file")
    with open(path, encoding="utf-8", errors="replace") as stream:
        lines = stream.readlines()
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            if type(row["update"]) is not int or type(row["norm"]) is not str:
                raise TypeError
            if not all(type(row.get(quantity, 0.0)) in (int, float) for quantity in PANELS):
                raise TypeError
        except (ValueError, KeyError, TypeError, RecursionError):
            if number == len(lines) and not line.endswith("\n"):
                break
            raise ValueError(f"record {path!r}: line {number} is no entry of a record") from None
        rows.append(row)
    return rows


def plot(records: Mapping[str, List[Row]], output: str) -> None:
    """Draw each quantity against updates: one colour per record, one thin line per norm, their mean in bold.

    Args:
        records: label -> rows
        output: file to write, of any format that matplotlib knows

    Raises:
        ValueError: there is nothing to draw, or the file cannot be written
    """
    command_options.check_output(output, overwrite=True)
    if not os.path.splitext(output)[1]:
        raise ValueError(f"output {output!r}: its name must end in what kind of picture it is, such as .png")
    panels = [name for name in PANELS if any(name in row for rows in records.values() for row in rows)]
    if not panels:
        raise ValueError("the records hold no entry that can be drawn")

    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = min(len(panels), 3)
    lines = -(-len(panels) // columns)
    size = (4.2 * columns, 3.2 * lines)
    figure, axes = pyplot.subplots(lines, columns, figsize=size, squeeze=False, layout="constrained")
    for axis, panel in zip(axes.flat, panels):
        for colour, (label, rows) in enumerate(records.items()):
            norms: Dict[str, List[Row]] = {}
            by_update: Dict[int, List[float]] = {}
            for row in rows:
                if panel in row:
                    norms.setdefault(row["norm"], []).append(row)
                    by_update.setdefault(row["update"], []).append(row[panel])
            for own in norms.values():
                updates, values = zip(*((row["update"], row[panel]) for row in own))
                axis.plot(updates, values, color=f"C{colour}", alpha=0.2, linewidth=0.6)
            if by_update:
                means = [sum(values) / len(values) for values in by_update.values()]
                axis.plot(list(by_update), means, color=f"C{colour}", linewidth=1.8, label=label)
        axis.set(title=PANELS[panel], xlabel="updates", yscale="linear" if panel in LINEAR else "log")
        axis.grid(alpha=0.3)
        axis.legend()
    for axis in list(axes.flat)[len(panels) :]:
        axis.remove()
    kind = os.path.splitext(output)[1].lstrip(".")
    temporary = f"{output}.{os.getpid()}.tmp"
    try:
        figure.savefig(temporary, dpi=150, format=kind)
        os.replace(temporary, output)
    except OSError as error:
        raise ValueError(f"output {output!r}: cannot be written: {error.strerror or error}") from error
    finally:
        pyplot.close(figure)
        if os.path.exists(temporary):
            os.remove(temporary)


def parser() -> argparse.ArgumentParser:
    """The options of the command."""
    parser = argparse.ArgumentParser(prog="python -m fairseq_powernorm.recorder", description=__doc__.split("\n")[0])
    parser.add_argument("records", nargs="+", metavar="RECORD", help="a file written by fairseq-train --norm-record")
    command_options.add(parser, "--output", "a figure, .png", required=True)
    parser.add_argument("--labels", nargs="+", metavar="LABEL", help="a label for each record (default: the file names)")
    return parser


def main(argv: Optional[List[str]] = None) -> int:
    """Command line; returns the exit status."""
    words = parser()
    args = words.parse_args(argv)
    labels = args.labels or [os.path.splitext(os.path.basename(path))[0] for path in args.records]
    try:
        if len(set(labels)) != len(args.records):
            raise ValueError(f"--labels {' '.join(labels)}: must be {len(args.records)} different ones, one per record")
        plot({label: read(path) for label, path in zip(labels, args.records)}, args.output)
    except ValueError as error:
        print(f"{words.prog}: {error}", file=sys.stderr)
        return 1
    print(f"wrote {args.output}")
    return 0


if __name__ == "__main__":
    command_line.run(main)
