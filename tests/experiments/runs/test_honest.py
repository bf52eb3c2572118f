"""Runs that are killed, that diverge, that are somebody else's, on a full disk: they end as others do, or say so."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from pipelines import SMALL, contents, demo
from toy import ROOT

from fairseq_powernorm.checkpoint import load
from fairseq_powernorm.experiments import launch, submit, train
from fairseq_powernorm.experiments.directories import locked
from fairseq_powernorm.experiments.errors import UserError

pytestmark = pytest.mark.slow

TRAIN = ["demo", "power", *SMALL, "optimization.max_update=15"]
AVERAGE = ["--average", "2"]  # at the end of an epoch, none is kept


@pytest.fixture(scope="module")
def scripts(tmp_path_factory):
    """Scripts with the demo prepared, and a run of 15 updates that nothing disturbed, evaluated."""
    scripts = demo(tmp_path_factory, "honest")
    scripts.run = scripts.runs / "whole"
    scripts.ok("train", *TRAIN, "--run-dir", scripts.run)
    scripts.ok("evaluate", "demo", scripts.run, *AVERAGE)
    return scripts


def result(run):
    """What a run comes to: parameters, statistics, and the curve and the scores of its record."""
    record = json.loads((run / "evaluation" / "record.json").read_text())
    model = load(str(run / "checkpoints" / "checkpoint_last.pt"))["model"]
    kept = {key: record[key] for key in ("updates", "finished", "sacrebleu", "chrf", "averaged", "overrides")}
    # a validation whose line of the log a kill has cut off stands in the checkpoint, with its loss alone
    losses = {row["updates"]: row["loss"] for row in record["curve"]["valid"]}
    return {name: tensor.tolist() for name, tensor in model.items()}, kept, losses


def killed(process, line, sent):
    """Sends a signal to the script alone once a line of its output is there; gives the exit status and what it has said."""
    said = ""
    for said in process.stdout:
        if re.search(line, said):
            break
    process.send_signal(sent)
    output, _ = process.communicate(timeout=120)  # returns when no child holds the pipe any more
    return process.returncode, output


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a child with its parent")
def test_kills(scripts, tmp_path):
    """A training that is killed without warning, twice, and its evaluation, which is killed, too: nothing of them goes on,
    status tells what the checkpoints hold, and --resume ends in the very run that was not disturbed."""
    run, whole = tmp_path / "run", tmp_path / "whole"
    train = ["train", *TRAIN, "optimization.max_update=40"]  # long enough to be killed in
    words = [*train, "--run-dir", run, "--resume"]
    for line, cold in (("update 10 of 40", True), ("after 20 updates", False)):
        assert killed(scripts.start(*words, cold=cold), line, signal.SIGKILL)[0] == -signal.SIGKILL
        with locked(run, patience=60.0):
            pass  # a warm child is ended by a server, which may take it a moment
        log = (run / "train.log").read_bytes()
        assert not (run / "finished.json").exists()
        (row,) = [row for row in scripts.here("status", run).splitlines() if row.startswith("run ")][-1:]
        found = re.search(r"interrupted +(\d+) of 40 .*\((\d+) updates", row)
        assert found and int(found[1]) >= int(found[2]) >= 5, row
        assert "has not finished training; go on with it" in scripts.refuses("evaluate", "demo", run)
        assert (run / "train.log").read_bytes() == log, "nobody writes there any more"
    # the log of the last session, as if the process that wrote it had been killed before it could
    text = (run / "train.log").read_text()
    (run / "train.log").write_text("")
    (row,) = [row for row in scripts.here("status", run).splitlines() if row.startswith("run ")][-1:]
    assert f" {found[2]} of 40 " in row, "the checkpoints say so"
    (run / "train.log").write_text(text)
    scripts.ok(*words)
    assert killed(scripts.start("evaluate", "demo", run, *AVERAGE), "translating", signal.SIGKILL)[0] == -signal.SIGKILL
    assert not (run / "evaluation").exists()
    scripts.here("evaluate", "demo", run, *AVERAGE)
    scripts.ok(*train, "--run-dir", whole)
    scripts.here("evaluate", "demo", whole, *AVERAGE)
    assert result(run) == result(whole)


@pytest.mark.parametrize("sent, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_evaluate_interrupted(scripts, tmp_path, sent, status):
    """A signal ends an evaluation with one line; it leaves nothing, and evaluate again = evaluate."""
    run = tmp_path / "run"
    shutil.copytree(scripts.run, run, ignore=shutil.ignore_patterns("evaluation*", ".*"))
    before = contents(run)
    assert killed(scripts.start("evaluate", "demo", run, *AVERAGE), "averaging", sent) == (
        status, "scripts/evaluate.sh: error: interrupted\n")
    assert contents(run) == before


def test_diverged(scripts, tmp_path):
    """A training whose losses or weights are not finite has diverged, whether fairseq stops it or not: status 3, its own
    state, and a last line that says what and since when; no finished.json, and evaluation refuses it by that reason."""
    for name, more, message in (
            ("stopped", "max_update=40", r"the training loss is nan from update \d+ on.*gradients are Nan/Inf"),
            ("ended", "max_update=8", r"the validation loss is nan from update 5 on")):
        run = tmp_path / name
        status, output = scripts("train", *TRAIN, "--run-dir", run, "optimization.lr=[1e9]",
                                 "lr_scheduler.warmup_init_lr=1e9", f"optimization.{more}")
        last = output.splitlines()[-1]
        assert status == 3 and "Traceback" not in output and output.count("error: ") == 1, output
        assert re.search(f"^scripts/train.sh: error: training diverged: .*{message}", last), last
        assert not (run / "finished.json").exists()
        assert " diverged " in scripts.here("status", run)
        refusal = scripts.refuses("evaluate", "demo", run)
        assert f"{run}: training diverged: " in refusal and re.search(message, refusal)


def test_a_directory_of_somebody_else(scripts, tmp_path):
    """Overrides in a run's directory, its links and its configuration execute nothing, and nothing outside is written."""
    run, mark = tmp_path / "run", tmp_path / "was here"
    shutil.copytree(scripts.run, run, ignore=shutil.ignore_patterns("evaluation*", ".*"))
    plugin = tmp_path / "plugin"
    plugin.mkdir()
    (plugin / "__init__.py").write_text(f"open({str(mark)!r}, 'w')")
    facts = json.loads((run / "run.json").read_text())
    resume = ["train", *TRAIN[:2], "--run-dir", run, "--resume", "optimization.max_update=16"]
    for override in (f"common.user_dir={plugin}", f"+common={{user_dir: {plugin}}}", "hydra.searchpath=[file:///tmp]",
                     f"optimizer.adam_betas=\"open('{mark}', 'w')\""):
        (run / "run.json").write_text(json.dumps({**facts, "overrides": [*facts["overrides"], override]}))
        for command in (resume, ["launch", *resume[1:], "--ranks", "1", "common.cpu=true"], ["evaluate", "demo", run]):
            assert f"{run / 'run.json'}: override {override!r}: " in scripts.refuses(*command)
    (run / "run.json").write_text(json.dumps(facts))
    (run / "train.log").rename(tmp_path / "elsewhere")
    (run / "train.log").symlink_to(tmp_path / "elsewhere")
    assert "train.log is a link" in scripts.refuses(*resume)
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace("(0.9, 0.98)", f"open('{mark}', 'w')"))
    assert "reads like Python code" in scripts.refuses("evaluate", "demo", run)
    assert not mark.exists()


def test_overrides_with_which_it_does_not_go_on(scripts, tmp_path):
    """A finished run that new overrides let fail at once is what it was before: finished, and to be gone on with. Another
    seed is none to go on with, and on a full disk nothing changes."""
    run = tmp_path / "run"
    shutil.copytree(scripts.run, run, ignore=shutil.ignore_patterns(".*"))
    before = contents(run)
    resume = ["train", *TRAIN[:2], "--run-dir", run, "--resume"]
    assert "it was started with common.seed=1, not 2" in scripts.refuses(*resume, "common.seed=2")
    assert contents(run) == before
    words = [ROOT / "scripts" / "train.sh", *resume[1:], "optimization.max_update=20"]
    done = subprocess.run(["bash", "-c", "ulimit -f 0; exec bash \"$@\"", "bash", *words], text=True,
                          env=scripts.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode == 2 and f"cannot write {run / 'run.json'}: File too large" in done.stdout, done.stdout
    assert contents(run) == before
    status, output = scripts(*resume, "+model.encoder_layers=2", "optimization.max_update=20")
    assert status == 1 and output.splitlines()[-1].endswith("; the run is left as it was, without the new overrides"), output
    after = contents(run)
    assert {name for name in before if before[name] != after[name]} == {"run.json", "command.txt", "train.log", *(
        name for name in before if name.startswith("hydra"))}
    facts = [json.loads((each / "run.json").read_text()) for each in (scripts.run, run)]
    assert facts[0]["overrides"] == facts[1]["overrides"] and [len(each["sessions"]) for each in facts] == [1, 2]
    assert "has finished (15 updates); nothing to do" in scripts.here(*resume)
    assert "nothing to do" in scripts.here("evaluate", run, *AVERAGE)


def test_a_run_that_starts_from_another(scripts, tmp_path):
    """From where a run starts, and what it leaves of that checkpoint behind, is said of its beginning: it goes on from its
    own checkpoint, with the optimizer and the updates of that, and takes no new start."""
    run, start = tmp_path / "run", tmp_path / "start.pt"
    shutil.copy(scripts.run / "checkpoints" / "checkpoint_last.pt", start)
    new = [f"checkpoint.restore_file={start}", "checkpoint.reset_optimizer=true", "checkpoint.reset_dataloader=true"]
    words = ["train", *TRAIN[:-1], "--run-dir", run, "--resume"]
    scripts.ok(*words, *new, "optimization.max_update=5")
    start.unlink()
    output = scripts.ok(*words, *new, "optimization.max_update=10")
    assert "finished" in output and "update 10 of 10" in output and "update 5 of 10" not in output
    loaded = [line.split(" (")[0] for line in (run / "train.log").read_text().splitlines() if "Loaded checkpoint" in line]
    assert loaded == [f"Loaded checkpoint {start}", f"Loaded checkpoint {run / 'checkpoints' / 'checkpoint_last.pt'}"]
    before = contents(run)
    for override in ("checkpoint.restore_file=other.pt", "checkpoint.reset_meters=true"):
        assert f"{override}: it has checkpoints, and goes on from the last" in scripts.refuses(*words, override)
    assert contents(run) == before


def test_a_checkpoint_on_a_full_disk(scripts, tmp_path):
    """A disk that is full while a checkpoint is written is the last line; no part of one stays, and --resume goes on."""
    words = ["demo", "power", *TRAIN[2:], "--run-dir", tmp_path / "run", "--resume"]
    command = ["bash", "-c", "ulimit -f 1000; exec bash \"$@\"", "bash", ROOT / "scripts" / "train.sh", *words]
    done = subprocess.run(command, text=True, env=scripts.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode == 1 and done.stdout.count("error: ") == 1, done.stdout
    assert re.search(r"error: training stopped with exit status 1: \[Errno 27\] File too large: '.*\.pt\.tmp'; --resume",
                     done.stdout.splitlines()[-1]), done.stdout
    assert not os.listdir(tmp_path / "run" / "checkpoints")
    assert " failed " in scripts.here("status", tmp_path / "run")
    scripts.ok("train", *words)


def test_nobody_reads(scripts, tmp_path):
    """A reader that has seen enough ends training, which says so; a closed output does not disturb it."""
    words = ["demo", "power", *TRAIN[2:], "optimization.max_update=5", "--resume"]
    shell = f'bash {ROOT}/scripts/train.sh "$@" 2>"$0" | head -n 3 >/dev/null; exit ${{PIPESTATUS[0]}}'
    errors = tmp_path / "errors"
    done = subprocess.run(["bash", "-c", shell, errors, *words, "--run-dir", tmp_path / "piped"], env=scripts.environment)
    assert done.returncode == 2, errors.read_text()
    assert "Broken pipe: progress can no longer be shown" in errors.read_text() and "Traceback" not in errors.read_text()
    shell = f'bash {ROOT}/scripts/train.sh "$@" >&- 2>&-'
    done = subprocess.run(["bash", "-c", shell, "bash", *words, "--run-dir", tmp_path / "closed"], env=scripts.environment)
    assert done.returncode == 0
    assert json.loads((tmp_path / "closed" / "finished.json").read_text())["updates"] == 5


def test_odd_names(scripts, tmp_path):
    """Blanks, commas, "=", "%", quotes and brackets in the names of directories make no difference."""
    odd = tmp_path / "a b,c=d%e'f\"g#é(h)[i]{j}"
    run = odd / "run"
    shutil.copytree(scripts.data, odd / "data")
    scripts.ok("train", *TRAIN, "--run-dir", run, PN_DATA_ROOT=str(odd / "data"))
    scripts.here("evaluate", "demo", run, *AVERAGE, PN_DATA_ROOT=str(odd / "data"))
    assert result(run) == result(scripts.run)
    assert torch.is_tensor(load(str(run / "evaluation" / "averaged.pt"))["model"]["encoder.embed_tokens.weight"])


@pytest.mark.parametrize("words, message", [
    (["optimization.max_update=-5"], "optimization.max_update=-5: must be from 0"),
    (["common.seed=-1"], "common.seed=-1: must be from 0 to 4294967295"),
    (["common.seed=4294967296"], "common.seed=4294967296: must be from 0 to 4294967295"),
    (["+model.norm_eps=inf"], "inf is no finite number"),
    (["+unknown.key=1"], "there is no setting unknown.key"),
    (["common.user_dir=/tmp"], "common.user_dir is this command's own; use another checkout"),
    (["common.seed=1\ncommon.seed=2"], "has characters that cannot be printed"),
    (["task.source_lang=en", "task.target_lang=de"], "task.source_lang=en: that of the data demo is de"),
    (["--run-dir", "a:b"], "fairseq reads ':' as the border between two paths"),
    (["--run-dir", "a\nb"], "has characters that cannot be printed"),
    (["--run-dir", ""], "--run-dir DIR needs a value"),
    (["--ranks", "99999999999"], "--ranks '99999999999': must be a number, 1 to 65535"),
    (["--nodes", "0"], "--nodes '0': must be a number, 1 to 65535"),
])
def test_refused_before_any_work(scripts, monkeypatch, words, message):
    """What cannot be trained is one line that names option, value and what is valid, by each command that trains, and leaves
    nothing but a lock that is free."""
    monkeypatch.setenv("PN_DATA_ROOT", str(scripts.data))
    monkeypatch.setenv("PN_RUNS_ROOT", str(scripts.runs))
    before = contents(scripts.runs)
    takes = {"--run-dir": (train, launch), "--ranks": (launch,), "--nodes": (launch, submit)}
    for command in takes.get(words[0], (train, launch, submit)):
        more = {launch: ["common.cpu=true"], submit: ["--dry-run"]}.get(command, [])
        with pytest.raises(UserError) as refusal:
            command.command(["demo", "power", *more, *words])
        assert message in str(refusal.value) and "\n" not in str(refusal.value)
    assert {name: there for name, there in contents(scripts.runs).items() if not name.endswith(".lock")} == {
        name: there for name, there in before.items() if not name.endswith(".lock")}


@pytest.mark.parametrize("name, message", [
    ("train.de-en.de.bin", "is not what scripts/prepare.sh made; --force"), ("dict.en.txt", "is not what scripts/"),
    ("train1.de-en.de.bin", "is not what scripts/prepare.sh made, and fairseq would read it as more text of train; move")])
def test_data_changed_since(scripts, tmp_path, monkeypatch, name, message):
    """Binarized data that are no longer what was prepared are not trained on, whichever command is to train."""
    monkeypatch.setenv("PN_DATA_ROOT", str(tmp_path / "data"))
    monkeypatch.setenv("PN_RUNS_ROOT", str(scripts.runs))
    shutil.copytree(scripts.data, tmp_path / "data")
    changed = tmp_path / "data" / "demo" / "data-bin" / name
    with open(changed, "ab") as stream:
        stream.write(b"\0")
    new = ["--run-dir", str(tmp_path / "new")]
    for command, more in ((train, new), (launch, [*new, "--ranks", "1", "common.cpu=true"]), (submit, ["--dry-run"])):
        with pytest.raises(UserError) as refusal:
            command.command(["demo", "power", *more])
        assert str(refusal.value).startswith(f"{changed} {message}")
