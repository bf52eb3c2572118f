"""The package's own commands, given files and names that are not what they should be: one line, and nothing is written."""
import contextlib
import json
import os
import subprocess
import sys

import pytest
import torch
from toy import ROOT

from fairseq_powernorm import checkpoint, export, recalibrate, recorder
from fairseq_powernorm.command_options import check_output

#: what a file may hold that is no checkpoint -> its content, for torch.save unless it is bytes
FILES = {
    "empty.pt": b"", "text.pt": b"hello" * 100, "list.pt": [1, 2], "number.pt": {"model": 3},
    "texts.pt": {"model": {"a": "x"}},
    "nan.pt": {"model": {"a": torch.tensor([float("nan")])}}, "numbered.pt": {"model": {1: torch.ones(1)}},
    "sparse.pt": {"model": {"a": torch.sparse_coo_tensor([[0]], [1.0], (2,), check_invariants=True)}},
}
COMMANDS = {
    "average": (checkpoint, ["average", "--inputs", "FILE", "--output", "out.pt"]),
    "convert": (checkpoint, ["convert", "FILE", "out.pt"]),
    "export": (export, ["FILE", "--format", next(iter(export.FORMATS)), "--output", "out.pt"]),
    "recalibrate": (recalibrate, ["data", "--path", "FILE", "--output", "out.pt", "--batches", "1"]),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The files, and one that is a checkpoint of something, but not of fairseq."""
    made = tmp_path_factory.mktemp("files")
    for name, content in FILES.items():
        if isinstance(content, bytes):
            (made / name).write_bytes(content)
        else:
            torch.save(content, made / name)
    torch.save({"args": None, "cfg": None, "model": {"a": torch.ones(2)}}, made / "other.pt")
    whole = (made / "other.pt").read_bytes()
    at = whole.index(torch.ones(2).numpy().tobytes())
    (made / "flipped.pt").write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    (made / "rows.jsonl").write_text('{"update": 1, "norm": "a", "distance_psi2": 1.0}\n')
    (made / "deep.jsonl").write_text("[" * 50000 + "\n")
    os.mkfifo(made / "pipe")
    (made / "directory").mkdir()
    (made / "data").mkdir()
    return made


def refusal(module, words, capsys):
    """What a command says that refuses."""
    assert module.main(words) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"python -m {module.__name__}") and error.count("\n") == 1, error
    return error


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("name", [*FILES, "flipped.pt", "none.pt", "directory", "pipe", "", "x" * 300])
def test_what_is_no_checkpoint(command, name, folder, capsys, monkeypatch):
    """Each command refuses each of them by name."""
    monkeypatch.chdir(folder)
    module, words = COMMANDS[command]
    message = refusal(module, [name if word == "FILE" else word for word in words], capsys)
    assert repr(name) in message or command == "convert" and name == "nan.pt"  # it is nobody's before that
    assert not (folder / "out.pt").exists()


@pytest.mark.parametrize("command", ["convert", "export", "recalibrate"])
def test_what_is_not_fairseqs(command, folder, capsys, monkeypatch):
    """A checkpoint without what fairseq's have."""
    monkeypatch.chdir(folder)
    module, words = COMMANDS[command]
    refusal(module, ["other.pt" if word == "FILE" else word for word in words], capsys)


@pytest.mark.parametrize("name", ["nowhere/out.pt", "directory", "pipe", "other.pt/out.pt", "x" * 300, "\udcff/out.pt"])
@pytest.mark.parametrize("force", [[], ["--force"]])
def test_where_nothing_can_be_written(name, force, folder, capsys, monkeypatch):
    """No directory, no file that could be replaced (as root a device would be), no name: --force makes no difference."""
    monkeypatch.chdir(folder)
    before = sorted(os.listdir(folder))
    assert "output " in refusal(checkpoint, ["average", "--inputs", "other.pt", "--output", name, *force], capsys)
    assert sorted(os.listdir(folder)) == before
    with contextlib.suppress(OSError):
        assert not os.path.isfile(name)


def test_devices_stay():
    """/dev/null is not replaced by a file."""
    with pytest.raises(ValueError, match="output '/dev/null': is not a file"):
        check_output("/dev/null", overwrite=True)


@pytest.mark.parametrize("record, output", [
    *((record, "out.png") for record in ("none", "directory", "deep.jsonl", "empty.pt", "text.pt")),
    ("rows.jsonl", "nowhere/out.png"), ("rows.jsonl", "directory"), ("rows.jsonl", "pipe"), ("rows.jsonl", "out"),
    ("rows.jsonl", "out.xyz"),
])
def test_figures(record, output, folder, capsys, monkeypatch):
    """Records that are none, and pictures that cannot be written or are of no kind."""
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(folder)
    before = sorted(os.listdir(folder))
    refusal(recorder, [record, "--output", output], capsys)
    assert sorted(os.listdir(folder)) == before


@pytest.mark.parametrize(
    "change", [{"update": "1"}, {"update": None}, {"update": 1.5}, {"norm": 3}, {"size_psi2": 1}, {"distance_psi2": "much"}]
)
def test_records_of_other_kinds(change, tmp_path):
    """An entry whose update is no whole number, or whose quantities are none, is refused by its line."""
    path = tmp_path / "record.jsonl"
    path.write_text("".join(json.dumps({"update": 1, "norm": "a", **each}) + "\n" for each in ({}, change)))
    if "size_psi2" in change:
        assert len(recorder.read(str(path))) == 2
    else:
        with pytest.raises(ValueError, match="line 2 is no entry of a record"):
            recorder.read(str(path))


def test_a_record_that_is_no_text(tmp_path):
    """Bytes that are no UTF-8 are no entry, and the message names the file."""
    path = tmp_path / "record.jsonl"
    path.write_bytes(b"\x89PNG\n")
    with pytest.raises(ValueError, match="record '.*record.jsonl': line 1 is no entry of a record"):
        recorder.read(str(path))


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a disk that is full")
def test_no_place_for_output():
    """A closed standard output does no harm, one that is full or that nobody reads ends a command with one line, ^C too."""
    begin = "import os, signal, sys\nfrom fairseq_powernorm import command_line\ncommand_line.run(lambda words: "
    for what, shell, status, said in (
        ("print('x')", ">&-", 0, ""), ("print('x')", "> /dev/full", 2, "No space left on device"),
        ("print('x' * 100000)", "| true; exit ${PIPESTATUS[0]}", 141, ""),
        ("os.kill(os.getpid(), signal.SIGINT)", "", 130, "error: interrupted"),
        ("os.kill(os.getpid(), signal.SIGTERM)", "", 143, "error: interrupted"),
    ):
        words = [sys.executable, "-c", f"{begin}{what})"]
        done = subprocess.run(["bash", "-c", f'"$@" {shell}', "bash", *words], cwd=ROOT, stderr=subprocess.PIPE, text=True)
        assert done.returncode == status and said in done.stderr and "Traceback" not in done.stderr, done
        assert done.stderr.count("\n") == bool(said), done
