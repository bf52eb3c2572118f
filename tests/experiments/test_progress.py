"""Progress: a bar where there is a terminal, lines where there is none, and the same log in both cases."""
import io
import json
import os
import sys

import pytest
from experiments.runs.test_watch import signals  # noqa: F401
from omegaconf import OmegaConf

from fairseq_powernorm.experiments import progress
from fairseq_powernorm.experiments.data.workers import transform
from fairseq_powernorm.experiments.directories import locked
from fairseq_powernorm.experiments.evaluation.job import Matches
from fairseq_powernorm.experiments.progress import BEGIN, CLEAR, Progress
from fairseq_powernorm.experiments.runs import session
from fairseq_powernorm.experiments.tools import call


class Terminal:
    """A terminal, by which this process shows something."""

    def __init__(self):
        self.master, slave = os.openpty()
        self.stream = os.fdopen(slave, "w", encoding="utf-8", newline="")

    def shown(self):
        """What has been shown, all of it: more is not to come."""
        self.stream.flush()
        found = b""
        os.set_blocking(self.master, False)
        with pytest.raises(BlockingIOError):
            while True:
                found += os.read(self.master, 1 << 16)
        self.stream.close()
        os.close(self.master)
        return found.decode().replace("\r\n", "\n")

    def lines(self):
        """What stays in view."""
        screen = []
        for line in self.shown().split("\n"):
            screen.append(line.rpartition(BEGIN)[2].replace(CLEAR, ""))
        return screen


@pytest.fixture
def terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(progress, "DRAWN_S", 0.0)
    return Terminal()


def test_a_terminal_has_a_bar(terminal):
    """The bar is written over itself, with what is done of how much; lines stand above it, and in the end it is gone."""
    with Progress("work", 4, "lines", stream=terminal.stream) as work:
        work.reach(1)
        work.say("half way")
        work.reach(2, "loss 3")
    text = terminal.shown()
    assert f"{BEGIN}{CLEAR}half way\n{BEGIN}  work" in text and "25%" in text and "1/4" in text and "loss 3" in text
    assert text.endswith(BEGIN + CLEAR) and text.count("\n") == 1


@pytest.mark.parametrize("columns", [20, 79, 200])
def test_a_bar_is_one_line(terminal, monkeypatch, columns):
    """However narrow a terminal is, the bar does not wrap; without a total it says how much is done."""
    monkeypatch.setenv("COLUMNS", str(columns))
    with Progress("a long piece of work", stream=terminal.stream) as work:
        work.reach(1234, "some more that is to be said of it " * 3)
    pictures = [each.split(CLEAR)[0] for each in terminal.shown().split(BEGIN)]
    assert max(map(len, pictures)) < columns and (columns < 79 or "1234" in "".join(pictures))


@pytest.mark.parametrize("kind", ["file", "dumb", "closed"])
def test_no_terminal_no_bar(kind, terminal, monkeypatch):
    """A file, a terminal that cannot go back, and a stream that is closed get no control characters."""
    monkeypatch.setattr(progress, "TOLD_S", 0.0)
    stream = terminal.stream if kind == "dumb" else io.StringIO()
    if kind == "dumb":
        monkeypatch.setenv("TERM", "dumb")
    if kind == "closed":
        stream.close()
        assert not progress.is_terminal(stream)
        return
    with Progress("work", 3_000_000, "B", stream=stream, seconds=0.0) as work:
        work.reach(2_000_000)
        work.say("a line")
    text = terminal.shown() if kind == "dumb" else stream.getvalue()
    assert text == "  work: 2 of 3 MB\na line\n"


def test_lines_come_now_and_then():
    """Without a terminal there is a line every few seconds, and none where nothing but the end is of interest."""
    for seconds, wanted in ((3600.0, ""), (None, ""), (0.0, "  work: 1 lines\n  work: 2 lines\n")):
        stream = io.StringIO()
        with Progress("work", unit="lines", stream=stream, seconds=seconds) as work:
            assert list(work.each("ab")) == ["a", "b"]
        assert stream.getvalue() == wanted


#: what fairseq says, as far as it matters here
LOG = [
    '2026 | INFO | train_inner | {"epoch": 1, "loss": "4.5", "wps": "100", "ups": "2", "num_updates": "2", "lr": "0.1"}',
    '2026 | INFO | valid | {"epoch": 1, "valid_loss": "4.1", "valid_ppl": "9.2", "valid_num_updates": "2"}',
    '2026 | INFO | train_inner | {"epoch": 2, "loss": "3.5", "wps": "100", "ups": "2", "num_updates": "4", "lr": "0.1"}',
]


@pytest.mark.parametrize("is_terminal", [True, False])
def test_training(is_terminal, signals, terminal, monkeypatch, tmp_path):  # noqa: F811
    """The log that records are made of has every line as it came; updates are a bar on a terminal, validations stay."""
    stream = terminal.stream if is_terminal else io.StringIO()
    monkeypatch.setattr(sys, "stdout", stream)
    facts = {"schema": 1, "benchmark": "demo", "norm": "power", "placement": "encoder", "prepared_sha256": "0",
             "overrides": [], "parameters": 1, "sessions": []}
    config = OmegaConf.create({"task": {"_name": "translation_pn"}, "optimization": {"max_update": 4}})
    run = tmp_path / "run"
    with locked(run) as lock:
        code = f"print({chr(10).join(LOG)!r})"
        session.session(run, facts, [sys.executable, "-c", code], config, lock)
    assert [line for line in (run / "train.log").read_text().splitlines() if "{" in line] == LOG
    lines = terminal.lines() if is_terminal else stream.getvalue().split("\n")
    assert ("  epoch 1: valid loss 4.1, perplexity 9.2 after 2 updates" in lines)
    assert ("  update 2 of 4: loss 4.5, 100 tokens/s, lr 0.1, about 0 min left" in lines) != is_terminal
    assert lines[-1] == ""


def test_preparation(terminal, monkeypatch, tmp_path):
    """Text goes from file to file as ever, with a bar over its lines, and how many they were stays."""
    monkeypatch.setattr(sys, "stdout", terminal.stream)
    (tmp_path / "source").write_text("a\nb\nc\n")
    transform(tmp_path / "source", tmp_path / "target", lambda lines: (line.upper() for line in lines))
    assert (tmp_path / "target").read_text() == "A\nB\nC\n"
    assert terminal.lines()[0].endswith("/target: 3 lines")


def test_evaluation(terminal, tmp_path):
    """What a program shows is counted as it comes, and its output is what it was."""
    code = "print('x'); print('H-0\\t1'); print('H-1\\t2')"
    with open(tmp_path / "lock", "w") as lock, Progress("translating", 2, "sentences", stream=terminal.stream) as work:
        output = call([sys.executable, "-c", code], lock, Matches(r"H-\d+\t", work).count)
        assert work.done == 2
    assert output == "x\nH-0\t1\nH-1\t2\n" and "2/2" in terminal.shown()
    assert json.dumps(output)
