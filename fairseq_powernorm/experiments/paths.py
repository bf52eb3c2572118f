"""Where things lie: the package, the checkout, prepared data, runs."""

import os
from pathlib import Path

PLUGIN = Path(__file__).resolve().parents[1]
ROOT = PLUGIN.parent


def data_root() -> Path:
    """Where prepared data lie: $PN_DATA_ROOT, else data/ in the checkout."""
    return Path(os.path.abspath(os.environ.get("PN_DATA_ROOT") or ROOT / "data"))


def runs_root() -> Path:
    """Where runs lie: $PN_RUNS_ROOT, else runs/ in the checkout."""
    return Path(os.path.abspath(os.environ.get("PN_RUNS_ROOT") or ROOT / "runs"))
