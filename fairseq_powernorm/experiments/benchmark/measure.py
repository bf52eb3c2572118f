"""Carries out a measurement, and makes its record."""
import os
import platform
import sys
from pathlib import Path
from typing import Any, Dict, List, Sequence

from ..directories import locked, whole_directory
from ..errors import UserError
from ..files import write_json
from ..paths import ROOT
from ..progress import Progress
from ..tools import TOOLS, versions
from .options import parse


def rounded(value: Any) -> Any:
    """What was measured, to six significant digits; it repeats to fewer."""
    if isinstance(value, dict):
        return {key: rounded(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [rounded(inner) for inner in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def processor(device: str) -> str:
    """Name of what is measured."""
    if device == "cuda":
        import torch

        return torch.cuda.get_device_name()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def benchmark(arguments: Sequence[str]) -> int:
    """Measure what the arguments say, print it, write the record if it has a name; gives the exit status."""
    options = parse(arguments)
    target = None
    if options.name:
        target = ROOT / "results" / "benchmark" / options.name
        if Path(options.name).name != options.name:
            raise UserError(f"--name {options.name!r}: must be a name without a directory")
        if target.exists():
            raise UserError(f"--name {options.name!r}: {target} exists; choose another name or remove it")

    # not before wrong options have been refused: these take seconds
    import torch

    from fairseq_powernorm import kernels

    from .cells import CELLS
    from .contenders import extra_class
    from .report import draw, show
    from .targets import checks
    from .timing import set_memory

    for name in options.extra:
        extra_class(name)
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device 'cuda': torch finds no CUDA device; valid here: cpu")
    set_memory(fresh=options.fresh)
    name, reasons = kernels.explain(options.device, torch.float32)
    print(f"kernel: {kernels.KERNELS[name].describe()} {' '.join(reasons)}".rstrip())
    own = [torch.get_num_threads()] if options.device == "cuda" else [1, 2] if (os.cpu_count() or 1) > 1 else [1]
    threads = options.threads or own
    cells: List[Dict[str, Any]] = []

    with Progress("levels", len(threads) * len(options.levels), stream=sys.stderr, seconds=None) as progress:

        def say(cell: Dict[str, Any]) -> None:
            progress.say(" ".join(f"{key}={value}" for key, value in cell.items()))

        for number in threads:
            torch.set_num_threads(number)
            for level in options.levels:
                progress.reach(progress.done, f"{level}, threads {number}")
                cells += rounded(CELLS[level](options, say))
                progress.reach(progress.done + 1)
    record = {
        "schema": 1, "kind": "benchmark", "device": options.device, "processor": processor(options.device),
        "cores": os.cpu_count(), "memory": "fresh" if options.fresh else "recycled",
        "kernel": kernels.KERNELS[name].describe(), "quick": options.quick, "arguments": list(arguments), "cells": cells,
        "checks": [] if options.quick else rounded(checks(cells)),
        "versions": {"python": platform.python_version(), **versions(TOOLS)},
    }
    print(show(record), end="")
    if target is not None:
        from ..evaluation.evaluate import commit

        record["git_commit"] = commit()
        with locked(target), whole_directory(target) as folder:
            write_json(folder / "record.json", record)
            (folder / "table.md").write_text(show(record), encoding="utf-8")
            draw(record, folder / "figure.png")
        print(f"wrote {target.relative_to(ROOT)}")
    missed = [each["target"] for each in record["checks"] if not each["met"]]
    if options.check and missed:
        print(f"missed: {'; '.join(missed)}", file=sys.stderr)
        return 1
    return 0

