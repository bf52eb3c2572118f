"""See unchanged.sh: trains with another revision's scripts, repeats its commands with this package, compares everything."""
import functools
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
#: what fairseq logs of the time and the memory that it took, in training and in validation
TIMES = {f"{part}{name}" for part in ("", "train_", "valid_") for name in ("wps", "ups", "wall", "train_wall", "gb_free")}


def main(revision: str, updates: str = "60") -> int:
    with tempfile.TemporaryDirectory() as home:
        there, here, old = Path(home, "there"), Path(home, "here"), Path(home, "old")
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(old)], check=True)
        subprocess.run(["git", "-C", str(old), "checkout", "--quiet", revision], check=True)
        for norm in ("layer", "power"):
            trained = script(old, there, norm, updates)
            own = script(ROOT, here, norm, updates)
            words = shlex.split((trained / "command.txt").read_text())
            print(f"{norm}: words of {revision} only, and of this checkout only:")
            print(*sorted(set(words) ^ set(shlex.split((own / "command.txt").read_text()))), sep="\n", end="\n\n")
            repeated = Path(home, f"repeated-{norm}")
            places = {f"{old}/fairseq_powernorm": f"{ROOT}/fairseq_powernorm", str(trained): str(repeated)}
            command = [functools.reduce(lambda word, place: word.replace(*place), places.items(), word) for word in words]
            repeated.mkdir()
            with open(repeated / "train.log", "w") as log:
                subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=True, cwd=home,
                               env={**os.environ, "PYTHONPATH": str(ROOT)})
            compare(norm, trained, repeated)
    print("the same, to the last bit")
    return 0


def script(root: Path, roots: Path, norm: str, updates: str) -> Path:
    """The run directory of a short run by the scripts of a checkout."""
    environment = {**os.environ, "PN_DATA_ROOT": str(roots / "data"), "PN_RUNS_ROOT": str(roots / "runs"), "PYTHONPATH": ""}
    settings = [f"optimization.max_update={updates}", "common.cpu=true", "common.log_interval=1"]
    for words in (["prepare.sh", "demo"], ["train.sh", "demo", norm, *settings]):  # prepared, it does nothing
        subprocess.run(["bash", str(root / "scripts" / words[0]), *words[1:]], check=True, env=environment)
    return roots / "runs" / "demo" / f"{norm}-seed1"


def compare(norm: str, one: Path, two: Path) -> None:
    first, second = (list(tensors(torch.load(path / "checkpoints" / "checkpoint_last.pt", weights_only=False)))
                     for path in (one, two))
    assert [name for name, _ in first] == [name for name, _ in second]
    differing = [name for (name, a), (_, b) in zip(first, second) if a.dtype != b.dtype or not torch.equal(a, b)]
    assert not differing, f"{norm}: {len(differing)} tensors differ, the first {differing[0]}"
    logs = [entries(path / "train.log") for path in (one, two)]
    assert logs[0], f"{norm}: nothing was logged"
    assert logs[0] == logs[1], f"{norm}: the logged losses differ"
    print(f"{norm}: {len(first)} tensors and {len(logs[0])} lines of the log are the same\n", flush=True)


def tensors(part, name=""):
    """The tensors of a checkpoint's model and optimizer, by name."""
    if isinstance(part, torch.Tensor):
        yield name, part
    elif isinstance(part, dict):
        for key, value in part.items():
            if name or key in ("model", "last_optimizer_state"):
                yield from tensors(value, f"{name}.{key}")
    elif isinstance(part, (list, tuple)):
        for number, value in enumerate(part):
            yield from tensors(value, f"{name}.{number}")


def entries(log: Path):
    """What fairseq logged as JSON, without times."""
    found = (re.search(r"\{.*\}$", line) for line in log.read_text(errors="replace").splitlines() if '"epoch": ' in line)
    parsed = [json.loads(match[0]) for match in found if match]
    return [{key: value for key, value in entry.items() if key not in TIMES} for entry in parsed]


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
