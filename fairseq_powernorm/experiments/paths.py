"""Where things lie: the package, the checkout, prepared data, runs."""

import os
from pathlib import Path

from .errors import UserError

PLUGIN = Path(__file__).resolve().parents[1]
ROOT = PLUGIN.parent


def data_root() -> Path:
    """Where prepared data lie: $PN_DATA_ROOT, else data/ in the checkout."""
    return Path(os.path.abspath(os.environ.get("PN_DATA_ROOT") or ROOT / "data"))


def runs_root() -> Path:
    """Where runs lie: $PN_RUNS_ROOT, else runs/ in the checkout."""
    return Path(os.path.abspath(os.environ.get("PN_RUNS_ROOT") or ROOT / "runs"))


def for_fairseq(what: str, path: Path) -> Path:
    """A path that fairseq is to be given; raises UserError, which says what it is, if fairseq would take it for several."""
    if os.pathsep in str(path):
        raise UserError(f"{what} {str(path)!r}: fairseq reads {os.pathsep!r} as the border between two paths; move it, or "
                        f"give the path of a link to it")
    return path
