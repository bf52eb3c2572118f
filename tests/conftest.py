"""Shared fixtures. Golden traces and real corpora are found through the environment variable PN_SHARED."""
import os
import pathlib

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def root():
    """The repository's root directory."""
    return ROOT


def _shared(part):
    base = os.environ.get("PN_SHARED")
    if not base:
        pytest.skip(f"PN_SHARED is not set: the {part} are not at hand")
    return pathlib.Path(base)


@pytest.fixture(scope="session")
def oracle():
    """Directory of the golden traces of the authors' code."""
    return _shared("golden traces") / "oracle"


@pytest.fixture(scope="session")
def corpora():
    """Directory of real corpora."""
    return _shared("real corpora") / "data"
