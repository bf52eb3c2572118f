"""Carries out a measurement, and makes its record."""
import hashlib
import json
import logging
import os
import platform
import sys
import time
from argparse import Namespace
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Dict, Iterator, List, Sequence, Tuple

from ..directories import locked, whole_directory
from ..errors import UserError
from ..files import read_json, write_json
from ..paths import ROOT
from ..progress import Progress
from ..tools import TOOLS, versions
from .options import MEMORIES, parse

#: a cell of the record
Cell = Dict[str, Any]
#: seconds that a cell is measured at least, however late it is
LEAST = 0.3


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


def planned(options: Namespace, number: int) -> Iterator[Tuple[str, int]]:
    """(memory, threads) in the order in which they are measured: the default first, to which there is no way back."""
    own = options.threads or [number]
    return ((memory, threads) for memory in MEMORIES if memory in options.memory for threads in own)


def measured(options: Namespace, kept: Path, threads: int) -> List[Cell]:
    """All cells; those that an earlier command with the same arguments has left in `kept` are not measured again."""
    import torch

    from .cells import jobs
    from .timing import keep_memory

    found: List[Cell] = [] if not kept.exists() else read_json(kept)
    known = [{key: value for key, value in cell.items() if key != "contenders"} for cell in found]
    plan = list(planned(options, threads))
    waiting = []
    for memory, number in plan:
        torch.set_num_threads(number)
        waiting.append([job for job in jobs(options, memory) if job.cell not in known])
    left = sum(job.weight for each in waiting for job in each)
    end = time.monotonic() + options.seconds
    with Progress("cells", len(found) + sum(map(len, waiting)), stream=sys.stderr, seconds=None) as progress:
        for (memory, number), todo in zip(plan, waiting):
            torch.set_num_threads(number)
            if memory == "recycled":
                keep_memory()
            for job in todo:
                progress.reach(len(found))
                progress.say(" ".join(f"{key}={value}" for key, value in job.cell.items()))
                share = max(0.0, end - time.monotonic()) * job.weight / max(left, 1e-9)
                found.append(rounded({**job.cell, "contenders": job.measure(0.0 if options.fast else max(share, LEAST))}))
                left -= job.weight
                if options.name:
                    kept.parent.mkdir(parents=True, exist_ok=True)
                    write_json(kept, found)
    return found


def benchmark(arguments: Sequence[str]) -> int:
    """Measure what the arguments say, print it, write the record if it has a name; gives the exit status."""
    options = parse(arguments)
    target = ROOT / "results" / "benchmark" / (options.name or "")
    if options.name:
        if Path(options.name).name != options.name:
            raise UserError(f"--name {options.name!r}: must be a name without a directory")
        if target.exists():
            raise UserError(f"--name {options.name!r}: {target} exists; choose another name or remove it")

    # not before wrong options have been refused: these take seconds
    import torch

    from fairseq_powernorm import kernels

    from .contenders import extra_class
    from .report import figures, show
    from .targets import checks

    for name in options.extra:
        extra_class(name)
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device 'cuda': torch finds no CUDA device; valid here: cpu")
    name, reasons = kernels.explain(options.device, torch.float32)
    kernels.autograd_for(torch.zeros(1, 1))
    print(f"kernel: {kernels.KERNELS[name].describe()} {' '.join(reasons)}".rstrip())

    words = hashlib.sha256(json.dumps(list(arguments)).encode()).hexdigest()
    kept = target.with_name(f".{options.name}.{words[:12]}.json")
    with locked(target) if options.name else nullcontext():
        cells = measured(options, kept, torch.get_num_threads())
        record = {
            "schema": 1, "kind": "benchmark", "device": options.device, "processor": processor(options.device),
            "cores": os.cpu_count(), "memory": ",".join(options.memory), "kernel": kernels.KERNELS[name].describe(),
            "quick": options.fast, "arguments": list(arguments), "cells": cells,
            "checks": [] if options.fast else rounded(checks(cells)),
            "versions": {"python": platform.python_version(), **versions(TOOLS)},
        }
        print(show(record), end="")
        if options.name:
            from ..evaluation.evaluate import commit

            record["git_commit"] = commit()
            with whole_directory(target) as folder:
                write_json(folder / "record.json", record)
                (folder / "table.md").write_text(show(record), encoding="utf-8")
                logging.disable(logging.DEBUG)  # of whoever draws
                try:
                    pictures = figures(record)
                finally:
                    logging.disable(logging.NOTSET)
                for title, picture in pictures.items():
                    (folder / f"{title}.png").write_bytes(picture)
            kept.unlink()
            print(f"wrote {target.relative_to(ROOT)}")
    missed = [each["target"] for each in record["checks"] if not each["met"]]
    if options.check and missed:
        print(f"missed: {'; '.join(missed)}", file=sys.stderr)
        return 1
    return 0
