"""Going on after a process was killed or stopped: what is loaded, and that the end is that of an undisturbed run."""
import itertools
import os
import re
import shutil

import pytest
import torch
import toy
from test_cli import TRAIN

from fairseq_powernorm import resume
from fairseq_powernorm.tasks import TranslationPNConfig, TranslationPNTask

pytestmark = pytest.mark.slow

#: 10 batches an epoch: checkpoints at the updates 4, 8, 12, 16, 20 and 24, and at the end of each epoch
RUN = (*TRAIN, "--max-tokens", 150, "--dropout", 0.1, "--save-interval-updates", 4, "--max-update", 26)

#: a user-dir that kills the process when it has copied half of checkpoint_last.pt for the fourth time: at update 12
KILLER = """
import os, shutil, signal
import fairseq_powernorm
copyfile, copies = shutil.copyfile, []
def killed(source, target, **options):
    copies.append(os.path.basename(target).startswith("checkpoint_last.pt"))
    if copies[-1] and sum(copies) == 4:
        with open(source, "rb") as read, open(target, "wb") as written:
            written.write(read.read(os.path.getsize(source) // 2))
        os.kill(os.getpid(), signal.SIGKILL)
    return copyfile(source, target, **options)
shutil.copyfile = killed
"""


def train(data, save_dir, *arguments, user_dir="fairseq_powernorm", **options):
    """fairseq-train; its status and all of its output."""
    done = toy.command(
        "fairseq-train", data, "--user-dir", user_dir, "--save-dir", save_dir, *RUN, *arguments, **options
    )
    return done.returncode, done.stdout + done.stderr


def train_on_two_ranks(data, save_dir, *arguments):
    """The same in two processes, which share the batches out."""
    done = toy.on_ranks(2, data, "--user-dir", "fairseq_powernorm", "--save-dir", save_dir, *RUN, *arguments)
    return done.stdout


def load(path):
    return torch.load(path, map_location="cpu", weights_only=True)


def tensors(value, name=""):
    """Every tensor and number of a nested structure by its place."""
    if isinstance(value, dict):
        value = list(value.items())
    elif not isinstance(value, (list, tuple)):
        return {name: value}
    else:
        value = list(enumerate(value))
    return dict(itertools.chain.from_iterable(tensors(v, f"{name}.{k}").items() for k, v in value))


def check_same_end(one, other):
    """The last checkpoints of two directories hold the same parameters, buffers and optimizer state, bit for bit."""
    one, other = (load(folder / "checkpoint_last.pt") for folder in (one, other))
    for key in ("model", "last_optimizer_state"):
        expected, found = tensors(one[key]), tensors(other[key])
        assert expected.keys() == found.keys()
        differing = [
            name for name, value in expected.items()
            if not (torch.equal(value, found[name]) if torch.is_tensor(value) else value == found[name])
        ]
        assert not differing, differing
    assert one["extra_state"]["train_iterator"] == other["extra_state"]["train_iterator"]


def truncate(path):
    os.truncate(path, os.path.getsize(path) // 2)


@pytest.fixture(scope="module")
def undisturbed(toy_data, tmp_path_factory):
    """A run of 26 updates, in its third epoch; and its losses."""
    folder = tmp_path_factory.mktemp("undisturbed")
    _, output = train(toy_data, folder)
    state = load(folder / "checkpoint_last.pt")
    assert state["extra_state"]["train_iterator"]["epoch"] == 3
    assert any(name.endswith("running_phi") for name in state["model"])
    return folder, toy.losses(output)


def test_killed_while_copying(toy_data, undisturbed, tmp_path):
    """kill -9 in the middle of copying checkpoint_last.pt leaves the older one whole; the same command again goes on
    from it, at the beginning of the second epoch, to the end of an undisturbed run, and leaves no temporary."""
    (tmp_path / "killer").mkdir()
    (tmp_path / "killer" / "__init__.py").write_text(KILLER)
    run = tmp_path / "run"
    status, _ = train(toy_data, run, user_dir=tmp_path / "killer", check=False)
    assert status == -9
    assert resume.num_updates(run / "checkpoint_2_12.pt") == 12
    assert resume.num_updates(run / "checkpoint_last.pt") == 10
    assert [resume.whole(path) for path in run.glob("*.tmp")] == [False]
    (run / "checkpoint_2_11.pt.tmp").write_bytes(b"PK")  # as of a process killed in the first save of another run
    _, output = train(toy_data, run)
    assert "checkpoint_last.pt (epoch 2 @ 10 updates)" in output and "truncated" not in output
    check_same_end(undisturbed[0], run)
    assert not list(run.glob("*.tmp"))


def test_truncated_last_checkpoint(toy_data, undisturbed, tmp_path):
    """checkpoint_last.pt and the newest others truncated: one warning that names both files, and the run goes on from
    the newest whole one, in the middle of the second epoch, to the same end with the same losses."""
    run = tmp_path / "run"
    shutil.copytree(undisturbed[0], run)
    (run / "checkpoint_best.pt").unlink()
    for name in ("last", "3_24"):
        truncate(run / f"checkpoint_{name}.pt")
    _, output = train(toy_data, run)
    assert re.findall(r"WARNING.*?(\w+\.pt) is truncated or damaged; going on from (\w+\.pt).* (\d+) updates", output) == [
        ("checkpoint_last.pt", "checkpoint_2_16.pt", "16")
    ]
    check_same_end(undisturbed[0], run)
    assert toy.losses(output) == {update: loss for update, loss in undisturbed[1].items() if update > 16}


def test_truncated_and_no_other(toy_data, undisturbed, tmp_path):
    """checkpoint_last.pt truncated and no whole checkpoint: an error that names it, and nothing is overwritten."""
    last = tmp_path / "checkpoint_last.pt"
    shutil.copy(undisturbed[0] / "checkpoint_last.pt", last)
    shutil.copy(undisturbed[0] / "checkpoint_last.pt", tmp_path / "other.pt")
    truncate(last)
    before = last.read_bytes()
    status, output = train(toy_data, tmp_path, check=False)
    assert status == 1
    assert re.search(r"ValueError: checkpoint '.*/checkpoint_last.pt': truncated or damaged, .*remove it", output)
    assert last.read_bytes() == before and len(list(tmp_path.iterdir())) == 2


def test_stopped_in_the_second_epoch(toy_data, tmp_path):
    """Stop after 8 of 13 updates of two batches each, in the middle of the second epoch, and go on: parameters,
    buffers, optimizer state and losses of never having stopped."""
    arguments = ("--update-freq", 2, "--max-update")
    _, once = train(toy_data, tmp_path / "once", *arguments, 13)
    _, first = train(toy_data, tmp_path / "twice", *arguments, 8)
    _, second = train(toy_data, tmp_path / "twice", *arguments, 13)
    assert "checkpoint_last.pt (epoch 2 @ 8 updates)" in second
    check_same_end(tmp_path / "once", tmp_path / "twice")
    assert len(toy.losses(once)) == 13 and toy.losses(once) == {**toy.losses(first), **toy.losses(second)}


def test_truncated_on_two_ranks(toy_data, tmp_path):
    """On two ranks: one warning, and both go on from the newest whole checkpoint, in the middle of the second epoch, to
    the end of an undisturbed run and with its losses."""
    once = train_on_two_ranks(toy_data, tmp_path / "once", "--max-update", 9)
    shutil.copytree(tmp_path / "once", tmp_path / "twice")
    (tmp_path / "twice" / "checkpoint_best.pt").unlink()
    truncate(tmp_path / "twice" / "checkpoint_last.pt")
    twice = train_on_two_ranks(toy_data, tmp_path / "twice", "--max-update", 9)
    assert twice.count("is truncated or damaged; going on from checkpoint_2_8.pt") == 1
    assert "checkpoint_2_8.pt (epoch 2 @ 8 updates)" in twice
    check_same_end(tmp_path / "once", tmp_path / "twice")
    assert toy.losses(twice) == {9: toy.losses(once)[9]}


def test_going_on_with_a_complete_run(toy_data, undisturbed, tmp_path):
    """The checkpoint of the last update of all, as of a process killed just after it: no update more, nothing rewritten."""
    run = tmp_path / "run"
    shutil.copytree(undisturbed[0], run)
    _, output = train(toy_data, run)
    assert "has 26 updates, all of --max-update 26: nothing to train" in output and "done training" in output
    assert not toy.losses(output)
    for path in undisturbed[0].iterdir():
        assert (run / path.name).read_bytes() == path.read_bytes()


@pytest.fixture
def save(tmp_path):
    """Write a small checkpoint of so many updates under a name."""
    def save(name, updates, **options):
        state = {"model": {"weight": torch.ones(1000)}, "optimizer_history": [{"num_updates": updates}]}
        torch.save(state, tmp_path / name, **options)
        return tmp_path / name

    return save


def test_the_newest_whole_checkpoint_is_chosen(save, tmp_path, caplog):
    """The most updates decide, whatever fairseq calls the file; other files, suffixes and temporaries do not count."""
    truncate(save("checkpoint_last.pt", 90))
    for name, updates in (
        ("checkpoint_best.pt", 10), ("checkpoint_1_20.pt", 20), ("checkpoint.best_loss_4.6011.pt", 30),
        ("checkpoint3.pt", 40),
    ):
        save(name, updates)
        assert resume.choose(str(tmp_path)) == name[: -len(".pt")]
    for name in ("averaged.pt", "checkpoint_4_50-b.pt", "checkpoint_4_50.pt.tmp", "checkpoint.best_loss_4.6011-b.pt"):
        save(name, 50)
    truncate(save("checkpoint_4_60.pt", 60))
    save("checkpoint_best.pt", 40)  # the same, under a name that another file may soon have
    caplog.clear()
    assert resume.choose(str(tmp_path)) == "checkpoint3"
    assert len(caplog.records) == 1
    save("checkpoint_last.pt", 40)
    caplog.clear()
    assert resume.choose(str(tmp_path)) == "checkpoint_last" and not caplog.records


def test_checkpoints_of_several_files(save, tmp_path):
    """One damaged shard makes a checkpoint damaged, and all shards must have the same updates."""
    shards = ["-shard0", "-shard1"]
    for name, both in (("last", (9, 9)), ("best", (7, 8)), ("1_6", (6, 6)), ("1_3", (3, 3))):
        for shard, updates in zip(shards, both):
            save(f"checkpoint_{name}{shard}.pt", updates)
    assert resume.choose(str(tmp_path), shards) == "checkpoint_last"
    truncate(tmp_path / "checkpoint_last-shard1.pt")
    assert resume.choose(str(tmp_path), shards) == "checkpoint_1_6"
    (tmp_path / "checkpoint_1_6-shard1.pt").unlink()
    assert resume.choose(str(tmp_path), shards) == "checkpoint_1_3"


def test_whole(save):
    """Empty, cut short, zeros where a lost machine wrote nothing: damaged. Of the older format: not."""
    path = save("checkpoint.pt", 1)
    content = path.read_bytes()
    assert resume.whole(path)
    size = len(content)
    zeros = bytes(size)
    for damaged in (b"", content[:1], content[:-1], content[: size // 2], content[:100] + zeros[100:], zeros):
        path.write_bytes(damaged)
        assert not resume.whole(path) and resume.num_updates(path) is None
    assert resume.whole(save("old.pt", 5, _use_new_zipfile_serialization=False))
    assert resume.num_updates("old.pt") is None and resume.num_updates(path.with_name("old.pt")) == 5


def test_one_flipped_bit(save, tmp_path):
    """A checkpoint whose size is right but one bit of whose tensors is not: another one is chosen, and what loads it by
    fairseq's own function is told."""
    from fairseq import checkpoint_utils

    import fairseq_powernorm.register  # noqa: F401

    save("checkpoint_1_5.pt", 5)
    path = save("checkpoint_last.pt", 9)
    content = bytearray(path.read_bytes())
    content[content.index(torch.ones(1000).numpy().tobytes()) + 2001] ^= 4
    path.write_bytes(content)
    assert not resume.whole(path) and resume.choose(str(tmp_path)) == "checkpoint_1_5"
    with pytest.raises(ValueError, match=r"checkpoint_last\.pt'?: damaged"):
        checkpoint_utils.load_checkpoint_to_cpu(str(path))


def test_no_code_of_a_checkpoint_is_executed(tmp_path):
    """What fairseq loads by its own function may hold code, which torch refuses: in every version of torch."""
    import pickle

    from fairseq import checkpoint_utils

    import fairseq_powernorm.register  # noqa: F401

    class Code:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    torch.save({"model": {}, "extra_state": Code()}, tmp_path / "checkpoint.pt")
    with pytest.raises((pickle.UnpicklingError, RuntimeError)):
        checkpoint_utils.load_checkpoint_to_cpu(str(tmp_path / "checkpoint.pt"))
    assert not (tmp_path / "executed").exists()


def test_killed_in_the_first_save(save, tmp_path):
    """No checkpoint_last.pt but its temporary: go on from what else was saved; a first start if that is nothing."""
    assert resume.choose(str(tmp_path)) == "checkpoint_last"
    truncate(save("checkpoint_last.pt.tmp", 5))
    save("checkpoint_best.pt.tmp", 5), save("checkpoint_1_5-b.pt.tmp", 5)
    assert resume.choose(str(tmp_path)) == "checkpoint_last"
    save("checkpoint_1_5.pt", 5)
    resume.remove_temporaries(str(tmp_path))
    assert {path.name for path in tmp_path.glob("*.tmp")} == {"checkpoint_last.pt.tmp", "checkpoint_1_5-b.pt.tmp"}
    assert resume.choose(str(tmp_path)) == "checkpoint_1_5"


def test_a_failed_copy_leaves_the_older_file(tmp_path, monkeypatch):
    """A copy that fails half-way leaves the older file and no temporary; one that works returns its target."""
    from fairseq.file_io import PathManager

    source, target = str(tmp_path / "source"), str(tmp_path / "checkpoint_last.pt")
    for path, text in ((source, "new"), (target, "old")):
        with open(path, "w") as stream:
            stream.write(text)

    def full(source, target):
        with open(target, "w") as stream:
            stream.write("n")
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfile", full)
        with pytest.raises(OSError, match="no space"):
            PathManager.copy(source, target, overwrite=True)
    assert sorted(os.listdir(tmp_path)) == ["checkpoint_last.pt", "source"] and open(target).read() == "old"
    assert PathManager.copy(source, target, overwrite=True) == target and open(target).read() == "new"


@pytest.mark.parametrize("case", ["kept", "remade", "rebuilt", "shards"])
def test_batches_after_a_restart(toy_data, case):
    """A restart after any batch of three epochs, the last of an epoch included: the batches that would have come.

    Where fairseq keeps the first epoch's batches, with ``--update-epoch-batch-itr``, with ``rebuild_batches``, and
    where each epoch has its own directory of data.
    """
    sharded = case == "shards"

    def start(epoch):
        data = os.pathsep.join([str(toy_data)] * (2 if sharded else 1))
        cfg = TranslationPNConfig(data=data, source_lang="de", target_lang="en", train_subset="train")
        cfg.dataset_impl, cfg.required_seq_len_multiple = "mmap", 1
        task = TranslationPNTask.setup_task(cfg)
        task.cfg.rebuild_batches = case == "rebuilt"
        task.check_training()
        task.load_dataset("train", epoch=epoch, combine=True)
        return task, iterator(task, epoch)

    def iterator(task, epoch):
        return task.get_batch_iterator(
            dataset=task.dataset("train"), max_tokens=150, max_positions=(64, 64), ignore_invalid_inputs=True,
            required_batch_size_multiple=8, seed=1, epoch=epoch, disable_iterator_cache=sharded,
            update_epoch_batch_itr=case == "remade",
        )

    def batches(task, epochs, state=None):
        """(state of the iterator after the batch, the batch's sentences), as fairseq-train goes through the epochs."""
        if state is not None:
            epochs.load_state_dict(state)
        while epochs.next_epoch_idx <= 3:
            for batch in epochs.next_epoch_itr():
                yield epochs.state_dict(), batch["id"].tolist()
            if sharded:
                task.load_dataset("train", epoch=epochs.next_epoch_idx, combine=True)
            epochs = iterator(task, epochs.next_epoch_idx)

    expected = list(batches(*start(1)))
    assert len(expected) == 30 and len({str(sorted(batch)) for _, batch in expected}) == (10 if case == "kept" else 30)
    for done, (state, _) in enumerate(expected[:-1], 1):
        assert list(batches(*start(state["epoch"]), state)) == expected[done:], f"after {done} batches"
