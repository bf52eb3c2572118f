"""Where things lie: the package, the checkout, prepared data, runs."""

import os
from pathlib import Path

from .errors import UserError

#: variables of the environment that hold a path
VARIABLES = ("PN_DATA_ROOT", "PN_RUNS_ROOT", "PN_SLURM_SITE", "DATA_ARCHIVES", "MOSES")
PLUGIN = Path(__file__).resolve().parents[1]
ROOT = PLUGIN.parent


def data_root() -> Path:
    """Where prepared data lie: $PN_DATA_ROOT, else data/ in the checkout."""
    return Path(os.path.abspath(os.environ.get("PN_DATA_ROOT") or ROOT / "data"))


def runs_root() -> Path:
    """Where runs lie: $PN_RUNS_ROOT, else runs/ in the checkout."""
    return Path(os.path.abspath(os.environ.get("PN_RUNS_ROOT") or ROOT / "runs"))


def go_to_root() -> None:
    """Makes the checkout the current directory, here and of what is started; paths in the environment still lead where they
    led.
    """
    for name in filter(os.environ.get, VARIABLES):
        os.environ[name] = os.path.abspath(os.environ[name])
    os.chdir(ROOT)


def for_fairseq(what: str, path: Path) -> Path:
    """A path that fairseq and hydra are to be given; raises UserError, which says what it is, if they would read another."""
    text, problem = str(path), ""
    if os.pathsep in text:
        problem = f"fairseq reads {os.pathsep!r} as the border between two paths"
    elif not text.isprintable():
        problem = "it has characters that cannot be printed"
    elif "${" in text or "\\" in text:
        problem = "hydra does not take '${' and backslashes as they are"
    if problem:
        raise UserError(f"{what} {text!r}: {problem}; move it, or give the path of a link to it")
    return path
