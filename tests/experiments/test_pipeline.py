"""prepare -> train -> resume -> evaluate, driven through the scripts as a user drives them, on a corpus of a few
sentences.
"""

import io
import json
import math
import os
import pathlib
import re
import shutil
import signal
import subprocess
import zipfile

import pytest
import torch
import warm
from omegaconf import OmegaConf
from pipelines import BIN, SMALL, Scripts, contents, demo, here, write_text
from toy import ROOT

from fairseq_powernorm.experiments.data import sources
from fairseq_powernorm.experiments.reports import schema
from fairseq_powernorm.experiments.runs import session, trainlog
from fairseq_powernorm.resume import num_updates

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def scripts(tmp_path_factory):
    """Scripts with the demo prepared from a few sentences of our own."""
    return demo(tmp_path_factory, "pipeline")


@pytest.fixture(scope="module")
def trained(scripts):
    """A finished run of PN, evaluated; interrupted on the way and resumed."""
    scripts.run = scripts.runs / "demo" / "power-seed3"
    scripts.run.mkdir(parents=True)
    (scripts.run / "run.json.partial").write_text("{")  # as of a process killed when it had just made the directory
    scripts.first = scripts.ok(
        "train", "demo", "power", "common.seed=3", *SMALL, "optimization.max_update=12", "--resume")
    scripts.second = scripts.ok("train", "demo", "power", "common.seed=3", "--resume", "optimization.max_update=30")
    scripts.third = scripts.ok("evaluate", "demo", scripts.run)
    return scripts


# ---- prepare -------------------------------------------------------------------------------------------------------------


def test_prepare_again_is_a_no_op(scripts):
    """prepare; prepare = prepare: the second says so and changes no byte."""
    before = contents(scripts.data)
    assert "nothing to do" in scripts.here("prepare", "demo", "--text-dir", scripts.text)
    assert contents(scripts.data) == before


def test_prepare_stamp(scripts):
    """prepared.json names each source and each output by its hash, and the settings."""
    stamp = json.loads((scripts.data / "demo" / "prepared.json").read_text())
    assert stamp["sources"] == contents(scripts.text)
    outputs = contents(scripts.data / "demo")
    del outputs["prepared.json"]
    assert stamp["outputs"] == outputs
    assert stamp["settings"]["languages"] == ["de", "en"] and stamp["sentences"] == {"train": 80, "valid": 15, "test": 16}


def test_prepare_other_settings(scripts, tmp_path):
    """Other settings or other text are refused, naming the difference; --force replaces what is there."""
    assert "bpe is subword_nmt, asked for sentencepiece" in scripts.refuses(
        "prepare", "demo", "--text-dir", scripts.text, "--bpe", "sentencepiece")
    other = write_text(tmp_path / "other", train=90)
    assert "other source text" in scripts.refuses("prepare", "demo", "--text-dir", other)
    mine = Scripts(tmp_path)
    shutil.copytree(scripts.data, mine.data)
    mine.here("prepare", "demo", "--text-dir", other, "--force")
    assert json.loads((mine.data / "demo" / "prepared.json").read_text())["sentences"]["train"] == 90
    assert [path.name for path in mine.data.iterdir() if path.is_dir()] == ["demo"]


def damage(text, kind):
    if kind == "missing":
        (text / "valid.en").unlink()
    elif kind == "unequal":
        with open(text / "train.de", "a") as stream:
            stream.write("Eine mehr .\n")
    elif kind == "empty":
        for language in ("de", "en"):
            (text / f"test.{language}").write_text("")
    elif kind == "utf-8":
        (text / "train.en").write_bytes(b"gut\n\xff\xfe schlecht\n" + (text / "train.en").read_bytes())


@pytest.mark.parametrize("kind, message", [
    ("missing", r"lacks valid\.en; it must hold train\.de"),
    ("unequal", r"unequal line counts: .*train\.de has 81, .*train\.en has 80"),
    ("empty", r"test\.de is empty"),
    ("utf-8", r"train\.en, line 2: not valid UTF-8"),
])
def test_prepare_refuses_bad_text(kind, message, tmp_path):
    """Bad text is refused with file and line, and nothing is left behind."""
    mine = Scripts(tmp_path)
    text = write_text(tmp_path / "text")
    damage(text, kind)
    assert re.search(message, mine.refuses("prepare", "demo", "--text-dir", text))
    assert not mine.data.exists()


def test_prepare_refuses_bad_arguments(tmp_path):
    """An unknown benchmark or BPE type is refused with the valid ones, a directory that is none with its name."""
    mine = Scripts(tmp_path)
    assert "'mutli30k' is unknown; valid: demo, " in mine.refuses("prepare", "mutli30k")
    assert "--bpe 'bpee' is unknown; valid: subword_nmt, sentencepiece" in mine.refuses("prepare", "demo", "--bpe", "bpee")
    assert "not a directory" in mine.refuses("prepare", "demo", "--text-dir", tmp_path / "none")
    assert "not a directory" in mine.refuses("prepare", "multi30k", DATA_ARCHIVES=str(tmp_path / "none"))
    (tmp_path / "multi30k").mkdir()
    assert "lacks train.de.gz" in mine.refuses("prepare", "multi30k", "--archive-dir", tmp_path)
    for name in "train.de train.en val.de val.en test_2016_flickr.de test_2016_flickr.en".split():
        (tmp_path / "multi30k" / f"{name}.gz").write_bytes(b"no gzip")
    assert "cannot unpack" in mine.refuses("prepare", "multi30k", "--archive-dir", tmp_path)
    import gzip

    (tmp_path / "multi30k" / "train.de.gz").write_bytes(gzip.compress(b"ein anderer Text\n"))
    assert re.search("SHA-256 of the uncompressed text is .*, expected 2c2b73fd",
                     mine.refuses("prepare", "multi30k", "--archive-dir", tmp_path))
    assert not [path for path in mine.data.iterdir() if path.is_dir()]


def test_prepare_anywhere(scripts, tmp_path):
    """prepare in a directory with blanks and commas = the same bytes; one with a colon, which fairseq reads as a border
    between paths, is refused before anything is made."""
    mine = Scripts(tmp_path / "a, b")
    mine.here("prepare", "demo", "--text-dir", scripts.text)
    assert contents(mine.data) == contents(scripts.data)
    colon = str(tmp_path / "a:b")
    assert "fairseq reads ':' as the border" in mine.refuses("prepare", "demo", PN_DATA_ROOT=colon)
    assert not os.path.exists(colon)


def test_prepare_without_network(tmp_path):
    """Without a network the message says which file is missing and how to give it."""
    mine = Scripts(tmp_path)
    nowhere = dict.fromkeys(("https_proxy", "HTTPS_PROXY", "http_proxy", "HTTP_PROXY"), "http://127.0.0.1:9")
    message = mine.refuses("prepare", "multi30k", **nowhere, no_proxy="", NO_PROXY="")
    assert "cannot download" in message and "--archive-dir" in message
    assert not (mine.data / "multi30k").exists()


def test_prepare_killed(scripts, tmp_path):
    """prepare, killed without warning in the middle, then prepare = prepare: the same bytes, nothing left over."""
    mine = Scripts(tmp_path)
    process = mine.start("prepare", "demo", "--text-dir", scripts.text)
    for line in process.stdout:
        if line.startswith("[6/6]"):
            break
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)  # returns when no child holds the pipe any more
    assert not (mine.data / "demo").exists() and (mine.data / ".demo.partial" / "bpe" / "codes").exists()
    again = mine.here("prepare", "demo", "--text-dir", scripts.text)
    assert again.count("done already") == 5 and "[6/6] binarization\n" in again
    assert contents(mine.data) == contents(scripts.data)


def test_prepare_interrupted(scripts, tmp_path):
    """^C is one line that says how to go on, and exit status 130; prepare again = prepare."""
    mine = Scripts(tmp_path)
    process = mine.start("prepare", "demo", "--text-dir", scripts.text, cold=True)  # a terminal signals all its processes
    for line in process.stdout:
        if line.startswith("[3/6]"):
            break
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in output, output
    assert output.splitlines()[-1] == (
        "scripts/prepare.sh: error: interrupted; stages that are whole are kept, and the next run goes on after them")
    assert "[1/6] text: done already" in mine.here("prepare", "demo", "--text-dir", scripts.text)
    assert contents(mine.data) == contents(scripts.data)


def test_sentencepiece(scripts, tmp_path):
    """--bpe sentencepiece: pieces in the data, and pieces joined again give the tokenized text back."""
    mine = Scripts(tmp_path)
    words = ["prepare", "demo", "--text-dir", scripts.text, "--bpe", "sentencepiece"]
    assert "cannot learn bpe_size" in mine.refuses(*words), "the few sentences hold fewer pieces than the demo asks for"
    mine.here(*words, "--bpe-size", "60")
    pieces = (mine.data / "demo" / "bpe" / "test.en").read_text(encoding="utf-8")
    assert "\u2581" in pieces
    joined = [line.replace(" ", "").replace("\u2581", " ").strip() for line in pieces.splitlines()]
    assert joined == (mine.data / "demo" / "tok" / "test.en").read_text(encoding="utf-8").splitlines()


def test_multi30k_real(corpora, tmp_path):
    """The real files pass their hashes and have the published numbers of sentences; of their beginning, lower-cased,
    normalized, tokenized text comes out, line for line."""
    mine, whole, beginning = Scripts(tmp_path), tmp_path / "whole", tmp_path / "beginning"
    languages = ["de", "en"]
    source = sources.source("multi30k", {"languages": languages}, text_dir=None, archive_dir=str(corpora), archive=None,
                            download_dir=tmp_path, allow_unverified=False)
    for folder in (whole, beginning):
        folder.mkdir()
    source.write(whole)
    for split, number in (("train", 29000), ("valid", 1014), ("test", 1000)):
        for language in languages:
            lines = (whole / f"{split}.{language}").read_text(encoding="utf-8").split("\n")
            assert len(lines) == number + 1
            (beginning / f"{split}.{language}").write_text("".join(f"{line}\n" for line in lines[:300]), encoding="utf-8")
    mine.here("prepare", "multi30k", "--text-dir", beginning, "--bpe-size", "300")
    text = (mine.data / "multi30k" / "tok" / "test.de").read_text(encoding="utf-8")
    assert text == text.lower() and text.count("\n") == 300 and " .\n" in text


# ---- train ---------------------------------------------------------------------------------------------------------------


def test_train_refuses(scripts, tmp_path):
    """Unknown names, foreign overrides and missing data are refused before a run directory exists."""
    before = contents(scripts.runs)
    unknown = scripts.refuses("train", "demo", "powr")
    assert "norm 'powr' is unknown; valid: layer, rms, batch, power-v, power" in unknown
    assert "benchmark 'dmeo' is unknown; valid: demo, " in scripts.refuses("train", "dmeo", "power")
    assert "--placement 'top' is unknown; valid: encoder, all" in scripts.refuses(
        "train", "demo", "power", "--placement", "top"
    )
    assert "'fast' is no hydra override" in scripts.refuses("train", "demo", "power", "fast")
    assert "use --run-dir" in scripts.refuses("train", "demo", "power", "checkpoint.save_dir=/nowhere")
    assert "optimization.max_updtae" in scripts.refuses("train", "demo", "power", "optimization.max_updtae=3")
    assert "--norm-groups 7" in scripts.refuses("train", "demo", "power", "+model.norm_groups=7")
    locks = {name for name in contents(scripts.runs) if name.endswith(".lock")}
    assert set(contents(scripts.runs)) - locks == set(before) - locks
    message = Scripts(tmp_path).refuses("train", "demo", "power")
    assert "is not prepared; run: scripts/prepare.sh demo" in message
    assert "/dev/null/x cannot be made: /dev/null: File exists" in scripts.refuses(
        "train", "demo", "power", "--run-dir", "/dev/null/x"
    )


def test_train_leaves_its_settings(trained):
    """The run directory says what was run: commands, resolved settings, a log with all of fairseq's lines."""
    run = trained.run
    assert "update 10 of 12" in trained.first and "valid loss" in trained.first, "progress is shown"
    commands = (run / "command.txt").read_text().splitlines()
    assert len(commands) == 2 and all(
        "model.encoder_norm_ff=power model.decoder_norm_self=layer" in line for line in commands
    )
    assert "seed: 3" in (run / "config.yaml").read_text()
    facts = json.loads((run / "run.json").read_text())
    assert [session["exit_status"] for session in facts["sessions"]] == [0, 0]
    assert not list(run.glob("*.partial")), "what a process killed before run.json was there left is no run"
    assert "common.seed=3" in facts["overrides"] and "optimization.max_update=30" in facts["overrides"]
    log = (run / "train.log").read_text()
    assert f"num. shared model params: {facts['parameters']:,} " in log, "our count is fairseq's"


def test_train_resumed(trained):
    """--resume goes on where the run stopped, keeping its overrides; the number of checkpoints stays bounded."""
    assert "Loaded checkpoint" in (trained.run / "train.log").read_text()
    assert "update 15 of 30" in trained.second and "update 5 of" not in trained.second
    checkpoints = sorted(path.name for path in (trained.run / "checkpoints").iterdir())
    assert len(checkpoints) == 5, checkpoints  # three to average, the best, the last


def test_train_finished(trained):
    """A finished run is refused without --resume, and --resume does nothing but say so."""
    assert "exists already; --resume" in trained.refuses("train", "demo", "power", "common.seed=3")
    before = contents(trained.run)
    assert "has finished (30 updates)" in trained.here("train", "demo", "power", "common.seed=3", "--resume")
    assert contents(trained.run) == before


def test_train_resume_refuses_another_run(trained):
    """--resume refuses a run that was started with another norm, placement, or by something else."""
    assert "norm 'power', not 'layer'" in trained.refuses("train", "demo", "layer", "--run-dir", trained.run, "--resume")
    assert "placement 'encoder', not 'all'" in trained.refuses(
        "train", "demo", "power", "--placement", "all", "--run-dir", trained.run, "--resume")
    assert "was not made by scripts/train.sh" in trained.refuses(
        "train", "demo", "power", "--run-dir", trained.text, "--resume"
    )


def test_train_lock_and_interruption(trained, tmp_path):
    """While a run trains, no second process can; a run stopped by SIGTERM, its last checkpoint cut short, can be resumed."""
    run = tmp_path / "run"
    arguments = ["train", "demo", "layer", "--run-dir", run, "--resume", *SMALL]
    process = trained.start(*arguments, "optimization.max_update=100000")
    for line in process.stdout:
        if "after 10 updates" in line:
            break
    assert "another process is at work" in trained.refuses(*arguments)
    process.terminate()
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 143 and "--resume goes on with it" in output, output
    last = run / "checkpoints" / "checkpoint_last.pt"
    last.write_bytes(last.read_bytes()[:5000])
    # at the end of an epoch there is no checkpoint_E_U.pt: the best one may be the newest
    newest = max(num_updates(str(path)) for path in (run / "checkpoints").glob("checkpoint*.pt") if path != last)
    output = trained.ok(*arguments, f"optimization.max_update={newest + 1}")
    assert "checkpoint_last.pt is truncated or damaged; going on from checkpoint_" in output
    assert json.loads((run / "finished.json").read_text())["updates"] == newest + 1
    updates = [entry["updates"] for entry in trainlog.curve(run / "train.log")["valid"]]
    assert updates == sorted(set(updates)), "repeated updates count once"


def test_train_on_a_full_disk(scripts, tmp_path):
    """A log that cannot be written is one clear line and the end of the training; --resume goes on with it."""
    arguments = ["demo", "power", "--run-dir", tmp_path / "run", "--resume", *SMALL, "optimization.max_update=2"]
    limited = "ulimit -f 12; exec bash \"$@\""  # kilobytes a file
    command = ["bash", "-c", limited, "bash", ROOT / "scripts" / "train.sh", *arguments]
    done = subprocess.run(command, text=True, env=scripts.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode == 2 and "Traceback" not in done.stdout and done.stdout.count("error: ") == 1, done.stdout
    assert "error: File too large: progress can no longer be shown and logged in " in done.stdout
    assert "finished" in scripts.ok("train", *arguments), "no process holds the run any more"


@pytest.mark.parametrize("command,status,message", [
    ("reproduce_table1.sh --dry-run | true", 128 + signal.SIGPIPE, ""),
    ("reproduce_table1.sh --dry-run > /dev/full", 2, "cannot write: No space left on device"),
])
def test_output_that_nobody_takes(command, status, message):
    """A pipe that is closed, and a full disk, end a script without a traceback."""
    done = subprocess.run(["bash", "-c", f"bash scripts/{command}; exit ${{PIPESTATUS[0]}}"], cwd=ROOT, text=True,
                          env={**os.environ, "PYTHON": warm.program("python")}, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT)
    expected = f"scripts/reproduce_table1.sh: error: {message}\n" if message else ""
    assert (done.returncode, done.stdout) == (status, expected)


def test_statistics_begin_anew(tmp_path):
    """A run with no whole checkpoint begins anew, and its record of statistics with it; one outside of it stays."""
    run, other = tmp_path / "run", tmp_path / "other.jsonl"
    checkpoint, record = run / "checkpoints" / "checkpoint_last.pt", run / "record.jsonl"
    checkpoint.parent.mkdir(parents=True)

    def dropped(name):
        record.write_text("{}\n"), other.write_text("{}\n")
        session.drop_statistics(run, OmegaConf.create({"task": {"norm_record": name}}))
        return [path.name for path in (record, other) if not path.exists()]

    assert dropped("record.jsonl") == ["record.jsonl"]
    checkpoint.write_bytes(b"PK cut short")
    assert dropped("record.jsonl") == ["record.jsonl"]
    assert dropped(str(other)) == dropped("../other.jsonl") == dropped(None) == []
    with zipfile.ZipFile(checkpoint, "w") as archive:
        archive.writestr("data", "x")
    assert dropped("record.jsonl") == []


# ---- evaluate ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def record(trained):
    return json.loads((trained.run / "evaluation" / "record.json").read_text())


def test_record_schema(record, trained):
    """The record is of the schema; no path of this machine."""
    assert not schema.problems(record, schema.TRANSLATION)
    assert (record["benchmark"], record["norm"], record["placement"], record["seed"]) == ("demo", "power", "encoder", 3)
    assert (record["updates"], record["sentences"], record["averaged"], record["beam"]) == (30, 16, 3, 2)
    assert [point["updates"] for point in record["curve"]["valid"]][-1] == 30 and len(record["curve"]["train"]) >= 2
    assert record["config"]["model"]["_name"] == "transformer_pn_tiny" and record["training"]["wall_s"] > 0
    assert set(record["checkpoints"]) == {path.name for path in (trained.run / "checkpoints").glob("checkpoint_*_*.pt")}
    text = json.dumps(record)
    assert str(trained.data.parent) not in text and str(ROOT) not in text and str(BIN) not in text
    assert {"python", "torch", "sacrebleu"} <= set(record["versions"])


def test_scores_are_those_of_the_tools(record, trained):
    """bleu_tokenized = fairseq-score and sacrebleu = the sacrebleu command, on the files that evaluation leaves."""
    folder = trained.run / "evaluation"

    def output(*command):
        return subprocess.run([str(word) for word in command], stdout=subprocess.PIPE, check=True, text=True).stdout

    score = output(warm.program("fairseq-score"), "--sys", folder / "hyp.tok", "--ref", folder / "ref.tok")
    assert record["bleu_tokenized"]["text"] in score
    assert f"BLEU4 = {record['bleu_tokenized']['score']:2.2f}," in score
    for name, metric in (("sacrebleu", "bleu"), ("chrf", "chrf")):
        theirs = json.loads(
            output(warm.program("sacrebleu"), folder / "ref.detok", "-i", folder / "hyp.detok", "-m", metric, "-w", 9)
        )
        assert theirs["score"] == pytest.approx(record[name]["score"], abs=1e-9)
        for part in theirs["signature"].split("|"):
            assert part in record[name]["signature"].split("|")


def test_references_are_the_text(trained):
    """ref.detok is the raw text and ref.tok the tokenized text, in order, with one hypothesis each."""
    folder = trained.run / "evaluation"
    assert (folder / "ref.detok").read_bytes() == (trained.text / "test.en").read_bytes()
    assert (folder / "ref.tok").read_bytes() == (trained.data / "demo" / "tok" / "test.en").read_bytes()
    assert "man &apos;s" in (folder / "ref.tok").read_text()
    assert len((folder / "hyp.tok").read_text().split("\n")) == len((folder / "hyp.detok").read_text().split("\n")) == 17


def test_evaluate_again(trained, record, tmp_path):
    """evaluate; evaluate = evaluate; --record copies the record and does not overwrite another; --force evaluates anew."""
    before = contents(trained.run)
    copy = tmp_path / "results" / "power.json"
    assert "nothing to do" in trained.here("evaluate", "demo", trained.run, "--record", copy)
    assert contents(trained.run) == before and json.loads(copy.read_text()) == record
    trained.here("evaluate", "demo", trained.run, "--record", copy)
    copy.write_text("another record")
    assert "exists already; --force overwrites it" in trained.refuses("evaluate", "demo", trained.run, "--record", copy)
    trained.here("evaluate", "demo", trained.run, "--record", copy, "--force")
    again = json.loads(copy.read_text())
    for key in ("tokens_per_s", "git_commit"):
        again.pop(key), record.pop(key)
    assert again == record


def test_evaluate_valid_and_average(trained):
    """--subset valid has its own directory; --average N averages the last N."""
    trained.here("evaluate", "demo", trained.run, "--subset", "valid", "--average", "1")
    record = json.loads((trained.run / "evaluation-valid" / "record.json").read_text())
    assert (record["subset"], record["averaged"], record["sentences"]) == ("valid", 1, 15)
    assert "other checkpoints; --force" in trained.refuses("evaluate", "demo", trained.run, "--subset", "valid")


@pytest.mark.parametrize("new, message", [
    (["generation.beam=1"], "now generation.beam=1; --force replaces it"),
    (["common.log_interval=7"], None)])
def test_evaluate_with_other_settings(new, message, trained, record):
    """A run may be gone on with other settings of translation and no update: its evaluation is not that with these."""
    path = trained.run / "run.json"
    before = path.read_text()
    facts = json.loads(before)
    path.write_text(json.dumps({**facts, "overrides": [*facts["overrides"], *new]}))
    try:
        if message:
            assert message in trained.refuses("evaluate", "demo", trained.run)
        else:
            assert "nothing to do" in trained.here("evaluate", "demo", trained.run)
    finally:
        path.write_text(before)


def test_evaluate_refuses(trained, tmp_path):
    """What cannot be evaluated is refused with the reason, and the run is left as it is."""
    run = tmp_path / "run"
    shutil.copytree(trained.run, run, ignore=shutil.ignore_patterns("evaluation*", ".*"))
    newest = sorted((run / "checkpoints").glob("checkpoint_*_*.pt"), key=lambda path: int(path.stem.split("_")[2]))[-1]
    assert "--subset 'tset' is unknown; valid: test, valid" in trained.refuses("evaluate", "demo", run, "--subset", "tset")
    assert "--average '0': must be a number" in trained.refuses("evaluate", "demo", run, "--average", "0")
    assert "not made by scripts/train.sh" in trained.refuses("evaluate", "demo", tmp_path)
    assert "benchmark 'demo', not 'multi30k'" in trained.refuses("evaluate", "multi30k", run)
    assert "has 3 of the 4 checkpoints" in trained.refuses("evaluate", "demo", run, "--average", "4")
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace("norm_warmup_updates: 10\n", "norm_warmup_updates: 11\n"))
    assert "does not belong to this run: its model.norm_warmup_updates is 10" in trained.refuses("evaluate", "demo", run)
    (run / "config.yaml").write_text(config)
    whole = newest.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    for damaged in (whole[:-1000], flipped):
        newest.write_bytes(damaged)
        assert f"truncated or damaged checkpoint: {newest}" in trained.refuses("evaluate", "demo", run)
    state = torch.load(io.BytesIO(whole), weights_only=False)
    state["model"]["decoder.layers.0.fc1.weight"][3, 5] = math.nan
    torch.save(state, newest)
    diverged = f"{str(newest)!r}: decoder.layers.0.fc1.weight has values that are not finite: training has diverged"
    assert diverged in trained.refuses("evaluate", "demo", run)
    newest.write_bytes(whole)
    (tmp_path / "a:b").symlink_to(run)
    assert "fairseq reads ':' as the border" in trained.refuses("evaluate", "demo", tmp_path / "a:b")
    assert f"{run / 'run.json'} is not a directory" in trained.refuses(
        "evaluate", "demo", run, "--record", run / "run.json" / "record.json")
    reference = trained.data / "demo" / "tok" / "test.en"
    text = reference.read_bytes()
    try:
        reference.write_bytes(text[:-20])
        assert f"{reference} is not what scripts/prepare.sh made" in trained.refuses("evaluate", "demo", run)
    finally:
        reference.write_bytes(text)
    newest.unlink()
    assert "has 2 of the 3 checkpoints" in trained.refuses("evaluate", "demo", run)
    (run / "finished.json").unlink()
    assert "has not finished training" in trained.refuses("evaluate", "demo", run)
    stamp = trained.data / "demo" / "prepared.json"
    text = stamp.read_text()
    try:
        stamp.write_text(text + " ")
        assert "was trained on other data" in trained.refuses("evaluate", "demo", run, "--unfinished")
    finally:
        stamp.write_text(text)
    assert not (run / "evaluation").exists()


def test_evaluate_anywhere_and_without_git(trained, record, tmp_path):
    """A run and data in directories with blanks and commas, on a machine without git = the same record but the commit; the
    plugin that the run's configuration names is not imported."""
    run, data, tools = tmp_path / "a, b" / "run", tmp_path / "c, d" / "data", tmp_path / "tools"
    shutil.copytree(trained.run, run, ignore=shutil.ignore_patterns("evaluation*", ".*"))
    shutil.copytree(trained.data, data)
    tools.mkdir()
    for folder in map(pathlib.Path, os.environ["PATH"].split(os.pathsep)):
        for path in folder.iterdir() if folder.is_dir() else ():
            if path.name != "git" and not (tools / path.name).exists():
                (tools / path.name).symlink_to(path)
    plugin = tmp_path / "plugin"
    plugin.mkdir()
    (plugin / "__init__.py").write_text(f"open({str(tmp_path / 'was here')!r}, 'w')")
    config = OmegaConf.load(run / "config.yaml")
    config.common.user_dir = str(plugin)
    OmegaConf.save(config, run / "config.yaml")
    trained.ok("evaluate", "demo", run, PN_DATA_ROOT=str(data), PATH=str(tools))
    assert not (tmp_path / "was here").exists()
    found = json.loads((run / "evaluation" / "record.json").read_text())
    assert found["git_commit"] is None
    for each in (found, record):
        for key in ("tokens_per_s", "git_commit", "commands"):
            del each[key]
    assert found == record


def test_table_and_curves(trained, record, tmp_path):
    """table gives a line for each run, plot_curves a PNG picture; a run named twice is refused."""
    path = str(trained.run / "evaluation" / "record.json")
    other = tmp_path / "other.json"
    record["config"]["optimization"]["lr"] = [0.1]
    other.write_text(json.dumps(record))
    status, output, _ = here("table", path, other)
    lines = output.splitlines()
    assert status == 0 and len(lines) == 4 and lines[2].startswith("| demo | power | encoder | yes | reference | 30 | 3 |")
    other.write_text(pathlib.Path(path).read_text())
    status, _, errors = here("table", path, other)
    assert status == 2 and "records of equal runs" in errors
    picture = tmp_path / "curves.png"
    assert here("plot_curves", path, "--output", picture)[0] == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
