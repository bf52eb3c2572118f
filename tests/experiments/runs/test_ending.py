"""How a training has ended, by its log and its checkpoints."""

import json
import math
import os
import signal
import struct
import subprocess
import sys
import time

import pytest
import torch

pytest.importorskip("fairseq")

from omegaconf import OmegaConf

from fairseq_powernorm.experiments import commands, tools
from fairseq_powernorm.experiments.errors import UserError
from fairseq_powernorm.experiments.overrides import Settings
from fairseq_powernorm.experiments.runs import checkpoints, ending, limits, trainlog


def save(run, name, updates, loss=1.5, weight=1.0, phi=1.0, statistic="running_phi"):
    (run / "checkpoints").mkdir(exist_ok=True)
    state = {"model": {f"norm.{statistic}": torch.tensor([phi]), "fc.weight": torch.tensor([weight, 1.0])},
             "optimizer_history": [{"num_updates": updates}],
             "extra_state": {"train_iterator": {"epoch": 2}, "val_loss": loss}}
    torch.save(state, run / "checkpoints" / f"{name}.pt")


def inner(updates, loss):
    return f'[x] {json.dumps({"epoch": 1, "loss": str(loss), "num_updates": str(updates)})}\n'


def valid(updates, loss):
    return json.dumps({"epoch": 1, "valid_loss": str(loss), "valid_num_updates": str(updates)}) + "\n"


@pytest.mark.parametrize("lines, saved, expected", [
    ([inner(10, 2.0), valid(10, 1.5)], {}, ending.Ending(10)),
    ([inner(5, "nan"), inner(10, 2.0), valid(10, 1.5)], {}, ending.Ending(10)),
    ([inner(5, "nan"), inner(10, "inf"), valid(10, 1.5)], {}, "the training loss is nan from update 5 on"),
    ([inner(10, 2.0), valid(5, 1.5), valid(10, "nan")], {}, "the validation loss is nan from update 10 on"),
    ([valid(10, 1.5)], {"weight": math.inf}, "the weights fc.weight in checkpoint_last.pt are not finite"),
    *(([valid(10, 1.5)], {"phi": math.nan, "statistic": name},
       f"the norm statistics norm.{name} in checkpoint_last.pt are not finite")
      for name in ("running_phi", "ema_gz", "running_std", "window_gz")),
])
def test_losses_and_weights(lines, saved, expected, tmp_path):
    """A training that says that all is well has finished if its last losses, weights and statistics are finite, and else
    diverged, with what and since when."""
    save(tmp_path, "checkpoint_best", 5)
    save(tmp_path, "checkpoint_last", 10, **saved)
    expected = expected if isinstance(expected, ending.Ending) else ending.Ending(diverged=expected)
    assert ending.of_success(tmp_path, lines) == expected


def test_no_checkpoint_of_the_last_update(tmp_path):
    """A training is whole only if its newest checkpoint is, and is that of the last update of the log."""
    assert "no checkpoint in " in ending.of_success(tmp_path, [inner(10, 2.0)]).problem
    save(tmp_path, "checkpoint_1_5", 5)
    assert "10 updates, but the newest checkpoint that is whole, checkpoint_1_5.pt, is of 5" in ending.of_success(
        tmp_path, [inner(10, 2.0)]).problem
    save(tmp_path, "checkpoint_last", 10, weight=1234.5)
    assert ending.of_success(tmp_path, [inner(10, 2.0)]) == ending.Ending(10)
    path = tmp_path / "checkpoints" / "checkpoint_last.pt"
    whole = bytearray(path.read_bytes())
    whole[whole.index(struct.pack("<f", 1234.5))] ^= 1
    path.write_bytes(whole)
    assert not checkpoints.intact(path)
    assert "checkpoint_1_5.pt, is of 5" in ending.of_success(tmp_path, [inner(10, 2.0)]).problem


@pytest.mark.parametrize("lines, expected", [
    ([inner(5, 2.0), "FloatingPointError: Minimum loss scale reached (0.0001).\n", "StopIteration\n"],
     ending.Ending(diverged="Minimum loss scale reached (0.0001). (after 5 updates)")),
    ([inner(5, "nan"), "[rank0]: FloatingPointError: gradients are Nan/Inf\n"],
     ending.Ending(diverged="the training loss is nan from update 5 on; gradients are Nan/Inf (after 5 updates)")),
    (["OSError: [Errno 28] No space left on device: 'x.pt.tmp'\n", "RuntimeError: file write failed\n"],
     ending.Ending(problem="[Errno 28] No space left on device: 'x.pt.tmp'")),
    ([inner(5, 2.0), "ValueError: a\n", "torch.OutOfMemoryError: CUDA out of memory\n"],
     ending.Ending(problem="OutOfMemoryError: CUDA out of memory")),
    ([inner(5, 2.0)], ending.Ending()),
])
def test_failures(lines, expected):
    """The reason of an error is that of the log which says most, wherever it stands; fairseq's ways to stop at numbers that
    are not finite are divergence."""
    assert all(ending.tells(line) for line in lines)
    assert ending.of_failure(lines) == expected


def test_what_checkpoints_say(tmp_path):
    """Updates, epoch and validation are read without torch, and no name in a pickle is looked up; a damaged file is left
    out. They complete a log that lacks them, once."""
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "was here"),)

    save(tmp_path, "checkpoint_1_5", 5, loss=2.5)
    save(tmp_path, "checkpoint_last", 10)
    torch.save(Evil(), tmp_path / "checkpoints" / "checkpoint_best.pt")
    (tmp_path / "checkpoints" / "checkpoint2.pt").write_bytes(b"PK cut short")
    found = checkpoints.accounts(tmp_path / "checkpoints")
    assert [each[1:] for each in found] == [(5, 2, 2.5), (10, 2, 1.5)]
    assert not (tmp_path / "was here").exists()
    config = OmegaConf.create({"checkpoint": {"best_checkpoint_metric": "loss"}})
    validations = checkpoints.validations(tmp_path / "checkpoints", config)
    log = tmp_path / "train.log"
    log.write_text(valid(5, 2.5) + '{"epoch": 1, "valid_l')  # as the process that wrote it was killed
    expected = [{"updates": 5, "epoch": 1, "loss": 2.5}, {"updates": 10, "epoch": 2, "loss": 1.5}]
    assert trainlog.curve(log, validations)["valid"] == expected
    trainlog.complete(log, validations)
    assert trainlog.curve(log)["valid"] == expected
    text = log.read_text()
    trainlog.complete(log, validations)
    assert log.read_text() == text, "once"


@pytest.mark.parametrize("group, key, value", [
    ("optimization", "max_update", -5), ("common", "seed", -1), ("common", "seed", 2**32), ("dataset", "max_tokens", 0),
    ("dataset", "batch_size", -1), ("optimization", "update_freq", [0]), ("optimization", "lr", [1e30]),
    ("optimization", "clip_norm", math.inf), ("common", "log_interval", 0), ("checkpoint", "save_interval", 0),
    ("model", "dropout", 1.5), ("dataset", "num_workers", -1), ("checkpoint", "keep_last_epochs", -2**40)])
def test_numbers_out_of_range(group, key, value):
    """A number that its setting cannot have is refused with the setting, the value and what is valid; defaults are valid."""
    settings = Settings()
    config = {group: {"x": None, key: value}, "generation": {"lenpen": -1.0}}
    with pytest.raises(UserError, match=rf"^{group}\.{key}=.*(must be from|is no finite number)"):
        limits.check(OmegaConf.create(config), settings)
    defaults = {"checkpoint": {"keep_last_epochs": -1, "patience": -1},
                "optimization": {"max_update": 0, "stop_min_lr": -1.0}}
    limits.check(OmegaConf.create(defaults), settings)


# ---- signals ---------------------------------------------------------------------------------------------------------

#: a command that is at work until it is ended, and so are what it has started and that in turn
COMMAND = """
import subprocess, sys
from fairseq_powernorm.experiments import commands, tools
def command(words):
    child = "import time; print('at work', flush=True); time.sleep(600)"
    subprocess.run(tools.tied([sys.executable, "-c", child]), pass_fds=[int(words[0])])
commands.main(command)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a child with its parent")
@pytest.mark.parametrize("sent, status, said", [
    ([signal.SIGTERM], 143, "interrupted"), ([signal.SIGINT], 130, "interrupted"),
    ([signal.SIGTERM] * 2, 143, "interrupted"), ([signal.SIGKILL], -9, None)])
def test_no_child_is_left(sent, status, said):
    """TERM and INT end a command with one line, however often they come, and its child with it; so does KILL, unsaid."""
    end, ours = os.pipe()
    environment = {**os.environ, commands.SCRIPT: "scripts/any.sh"}
    process = subprocess.Popen([sys.executable, "-c", COMMAND, str(ours)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               text=True, env=environment, pass_fds=[ours])
    os.close(ours)
    assert process.stdout.readline() == "at work\n"
    for each in sent:
        process.send_signal(each)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == status
    assert errors == (f"scripts/any.sh: error: {said}\n" if said else "")
    begin = time.monotonic()
    assert os.read(end, 1) == b"" and time.monotonic() - begin < 60, "nobody holds the other end"
    os.close(end)


def test_a_child_of_a_parent_that_is_gone():
    """A command that is started for a parent that has ended meanwhile does not begin."""
    words = tools.tied([sys.executable, "-c", "print('begun')"])
    if sys.platform == "linux":
        words[words.index(str(os.getpid()))] = "1"
        done = subprocess.run(words, stdout=subprocess.PIPE)
        assert (done.returncode, done.stdout) == (128 + signal.SIGKILL, b"")


@pytest.mark.parametrize("closing", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams(closing, tmp_path):
    """A stream that the caller has closed leads nowhere: no file of the command's takes its place."""
    program = tmp_path / "program.py"
    program.write_text(
        "from fairseq_powernorm.experiments import commands\n"
        "def command(words):\n"
        "    with open(words[0], 'w') as stream:\n"
        "        print('shown', flush=True)\n"
        "        assert stream.fileno() > 2\n"
        "commands.main(command)\n")
    target = tmp_path / "file"
    done = subprocess.run(["bash", "-c", f'"$@" {closing}', "bash", sys.executable, str(program), str(target)])
    assert done.returncode == 0 and target.read_text() == ""
