"""The help of the commands that prepare, evaluate and report."""

import importlib
import os
import re
import subprocess
import sys

import pytest
from toy import ROOT

from fairseq_powernorm.experiments import reproduce
from fairseq_powernorm.experiments.reports import matrix

NAMES = ("prepare", "evaluate", "score", "table", "plot_curves", "schema", "report")
PARSERS = {
    **{name: importlib.import_module(f"fairseq_powernorm.experiments.{name}").parser for name in NAMES},
    **{f"reproduce {subject}": lambda subject=subject: reproduce.parser(subject) for subject in matrix.SUBJECTS},
}


@pytest.mark.parametrize("name", PARSERS)
def test_every_option_is_explained(name):
    """--help of a command says of each of its options and arguments what it is for, on the same line or the next one."""
    lines = PARSERS[name]().format_help().splitlines()
    entries = [i for i, line in enumerate(lines) if re.match(r"  (-|[A-Z_]+( |$))", line)]
    assert len(entries) >= 2
    for i in entries:
        assert re.match(r"  \S.*\S  +\S", lines[i]) or re.match(r" {10,}\S", lines[i + 1]), lines[i]


@pytest.mark.parametrize("name", PARSERS)
def test_help_needs_no_packages(name):
    """--help works where nothing is installed yet: with the standard library alone."""
    command, *subject = name.split()
    done = subprocess.run(
        [sys.executable, "-S", "-m", f"fairseq_powernorm.experiments.{command}", *subject, "--help"],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("usage: ") and not done.stderr, done.stderr
