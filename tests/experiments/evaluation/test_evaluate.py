"""What an evaluation finds out before it begins, and what it says of where it ran."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

pytest.importorskip("fairseq")

from omegaconf import OmegaConf

from fairseq_powernorm.experiments import recipes
from fairseq_powernorm.experiments.errors import UserError
from fairseq_powernorm.experiments.evaluation import evaluate
from fairseq_powernorm.experiments.evaluation.job import Job, words_of
from fairseq_powernorm.experiments.files import sha256

FACTS = {"schema": 1, "benchmark": "demo", "norm": "power", "placement": "encoder", "prepared_sha256": "0", "overrides": [],
         "sessions": [{"command": ["train"], "threads": 1, "wall_s": None, "cpu_s": None, "exit_status": None}]}


@pytest.fixture
def run(tmp_path):
    """A run directory as far as an evaluation looks at it first."""
    for name, content in (("run.json", json.dumps(FACTS)), ("train.log", ""), ("config.yaml", "common: {}"),
                          ("finished.json", "{}")):
        (tmp_path / name).write_text(content)
    return tmp_path


@pytest.mark.parametrize("name", evaluate.FILES)
def test_a_directory_that_is_no_run(name, run):
    """A directory without a file that every run has is refused by the file's name."""
    (run / name).unlink()
    with pytest.raises(UserError, match=f"was not made by scripts/train.sh: it has no {name}"):
        evaluate.evaluate(run)


@pytest.mark.parametrize("content, missing", [
    *(({key: value for key, value in FACTS.items() if key != name}, f"{name} is missing") for name in FACTS),
    ({**FACTS, "sessions": []}, "it has no sessions"), ([], "it is list, not an object"),
    ("text", "it is str, not an object")])
def test_facts_of_something_else(content, missing, run):
    """A run.json that is not one of train.sh is refused by what it lacks."""
    (run / "run.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=f"was not written by scripts/train.sh: {missing}"):
        evaluate.evaluate(run)


def test_the_commit_of_a_machine_without_git(monkeypatch, tmp_path):
    """Without git the commit is unknown, which is no error."""
    monkeypatch.setenv("PATH", str(tmp_path))
    assert evaluate.commit() is None


def test_the_commit_of_another_repository(monkeypatch, tmp_path):
    """The commit is never that of a repository in which a copy without one of its own lies, or that GIT_DIR names."""
    identity = ["-c", "user.name=x", "-c", "user.email=x@x"]
    for words in (["init", "-q"], [*identity, "commit", "-q", "--allow-empty", "-m", "x"]):
        subprocess.run(["git", "-C", str(tmp_path), *words], check=True)
    ours = evaluate.commit()
    monkeypatch.setenv("GIT_DIR", str(tmp_path / ".git"))
    assert evaluate.commit() == ours
    monkeypatch.delenv("GIT_DIR")
    (tmp_path / "copy").mkdir()
    monkeypatch.setattr(evaluate, "ROOT", tmp_path / "copy")
    assert evaluate.commit() is None


@pytest.mark.parametrize("change, message", [
    (lambda state: state["model"]["norm.running_phi"].fill_(float("inf")), "running_phi has values that are not finite"),
    (lambda state: state["cfg"]["model"].update(dropout=0.5), "its model.dropout is 0.5, the run's is 0.1"),
    (lambda state: None, None)])
def test_weights(change, message, tmp_path):
    """A checkpoint with other settings than its run's, or with values that are not finite, is refused."""
    state = {"cfg": {"model": {"dropout": 0.1}}, "model": {"norm.running_phi": torch.ones(3), "norm.iters": torch.tensor(2)}}
    change(state)
    torch.save(state, tmp_path / "checkpoint1.pt")
    config = OmegaConf.create({"model": {"dropout": 0.1}})
    if message is None:
        evaluate.refuse_wrong_weights([tmp_path / "checkpoint1.pt"], config)
        return
    with pytest.raises(UserError, match=message):
        evaluate.refuse_wrong_weights([tmp_path / "checkpoint1.pt"], config)


def test_a_copy_that_cannot_be_written(tmp_path):
    """--record FILE: a directory, a place below a file, another record are refused, a new place and the same record not."""
    own = tmp_path / "record.json"
    own.write_text("{}")
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "nowhere").symlink_to(tmp_path / "none" / "deep")
    os.mkfifo(tmp_path / "links" / "pipe")
    for copy, message in ((tmp_path, "is a directory"), (own / "deep" / "record.json", "cannot be written"),
                          (Path("/proc/none/record.json"), "cannot be written"), (Path(os.devnull), "and not a file"),
                          (tmp_path / "links" / "nowhere" / "x.json", "cannot be written"),
                          (tmp_path / "links" / "nowhere", "and not a file"),
                          (tmp_path / "links" / "pipe", "and not a file"),
                          (tmp_path / ("x" * 250), "a name has 240 bytes at most")):
        with pytest.raises(UserError, match=message):
            evaluate.check_copy(copy, own, force=True)
    shutil.rmtree(tmp_path / "links")
    other = tmp_path / "other.json"
    other.write_text("[]")
    with pytest.raises(UserError, match="exists already; --force"):
        evaluate.check_copy(other, own, force=False)
    evaluate.check_copy(other, own, force=True)
    other.write_text("{}")
    evaluate.check_copy(other, own, force=False)
    evaluate.check_copy(tmp_path / "new" / "deep" / "record.json", own, force=False)
    assert sorted(os.listdir(tmp_path)) == ["other.json", "record.json"]


@pytest.mark.parametrize("name, is_read", [
    ("data-bin/dict.en.txt", True), ("data-bin/test.de-en.en.bin", True), ("tok/test.en", True),
    ("data-bin/train.de-en.en.bin", False), ("tok/valid.en", False), ("bpe/test.en", False)])
@pytest.mark.parametrize("damage", ["change", "remove"])
def test_data_that_are_not_what_was_prepared(name, is_read, damage, tmp_path):
    """A file that the evaluation reads and that was changed or removed after its preparation is refused; others are not."""
    path = tmp_path / name
    path.parent.mkdir()
    path.write_text("prepared")
    job = Job(None, [], "test", tmp_path, {"outputs": {name: sha256(path)}}, None)
    job.check_data("tok/test.", "raw/test.")
    path.write_text("other") if damage == "change" else path.unlink()
    if not is_read:
        job.check_data("tok/test.", "raw/test.")
        return
    with pytest.raises(UserError, match=f"{name} is not what scripts/prepare.sh made; --force prepares the data again"):
        job.check_data("tok/test.", "raw/test.")


def test_data_before_a_training(tmp_path):
    """Of huge files a training compares no content; those that prepare.sh did not make must not be read with the others."""
    (tmp_path / "data-bin").mkdir()
    path = tmp_path / "data-bin" / "train.de-en.en.bin"
    path.write_text("prepared")
    stamp = {"outputs": {"data-bin/train.de-en.en.bin": "another"}}
    recipes.check_outputs(tmp_path, stamp, "data-bin/", largest=7)
    with pytest.raises(UserError, match="is not what scripts/prepare.sh made"):
        recipes.check_outputs(tmp_path, stamp, "data-bin/", largest=8)
    for wrong in ({}, {"outputs": [1]}):
        with pytest.raises(UserError, match="has no checksums of what was made"):
            recipes.check_outputs(tmp_path, wrong, "data-bin/")
    path.rename(path.with_name("train12.de-en.en.bin"))
    recipes.check_outputs(tmp_path, {"outputs": {}}, "data-bin/test.")
    with pytest.raises(UserError, match="fairseq would read it as more text of train"):
        recipes.check_outputs(tmp_path, {"outputs": {}}, "data-bin/train.")


@pytest.mark.parametrize("run, word, shown", [
    ("/a/run", "hydra.run.dir=/a/run", "hydra.run.dir=RUN_DIR"), ("/a/run", "/a/run/x/y.pt", "RUN_DIR/x/y.pt"),
    ("/a/run", "/a/run2/x.pt", "/a/run2/x.pt"), ("/r", "/of/r", "/of/r"), ("/a/b c's", "/a/b c's/x", "RUN_DIR/x"),
    ("/a/b c's", r"hydra.run.dir='/a/b c\'s'", "hydra.run.dir='RUN_DIR'"),
    ("/a/run", "task.data=DATA/demo", "task.data=data/demo"),
    ("/a/(b", "/a/(b/x", "RUN_DIR/x")])
def test_paths_in_a_record(run, word, shown, monkeypatch):
    """A record has no path of this machine, whatever characters it has, and no other path is taken for one."""
    monkeypatch.setenv("PN_DATA_ROOT", "/somewhere/data")
    assert evaluate.anonymous(word.replace("DATA", "/somewhere/data"), Path(run)) == shown


def test_words_of_options():
    """An option with a value is two words, True is the option alone, None is nothing; 0 is a value."""
    assert words_of({"--beam": 4, "--quiet": True, "--seed": None, "--num-workers": 0}) == [
        "--beam", "4", "--quiet", "--num-workers", "0"]
