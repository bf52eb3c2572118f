"""Several ranks: scripts/launch.sh, what is refused because ranks would train apart, and hydra's launchers."""
import json
import re
import shlex
import socket

import pytest
import torch
import toy
import warm
from checks.slurm_cluster import free_ports
from omegaconf import OmegaConf
from pipelines import SMALL, demo, fake_wandb

from fairseq_powernorm import ranks
from fairseq_powernorm.checkpoint import load
from fairseq_powernorm.experiments import launch
from fairseq_powernorm.experiments.errors import UserError
from fairseq_powernorm.experiments.runs import batch

pytestmark = pytest.mark.slow

#: SGD and unshuffled sentences, as tests/test_distributed.py explains; the batch is given in sentences
EXACT = [*SMALL, "common.cpu=true", "dataset.max_tokens=null", "dataset.curriculum=99", "optimization.max_update=8",
         "checkpoint.save_interval_updates=4", "model.dropout=0", "+model.norm_variant=algorithm2",
         "optimizer._name=sgd", "~optimizer.adam_betas", "optimization.lr=[0.1]", "+optimizer.lr=[0.1]",
         "+optimizer.momentum=0.0", "+optimizer.weight_decay=0.0"]


@pytest.fixture(scope="module")
def scripts(tmp_path_factory):
    scripts = demo(tmp_path_factory, "launch")
    scripts.environment["CUDA_VISIBLE_DEVICES"] = ""
    return scripts


@pytest.fixture(scope="module")
def two_nodes(scripts):
    """Two machines (one, over loopback) with two ranks each, by hand, which share out the batches of one GPU; and one
    process with all of them in one batch."""
    (port,) = free_ports(1)
    run = scripts.runs / "ranks"
    words = ["demo", "power", *EXACT, "dataset.batch_size=4", "optimization.update_freq=[4]", "--run-dir", run,
             "--nodes", 2, "--ranks", 2, "--master", f"127.0.0.1:{port}", "--tensorboard", "--wandb", "mine"]
    fake_wandb(scripts.runs.parent / "packages")
    environment = {"PYTHONPATH": str(scripts.runs.parent / "packages"), "NOTES": str(scripts.runs.parent / "notes"),
                   "PN_PROGRESS_SECONDS": "1"}
    machines = [scripts.start("launch", *words, "--node-rank", node, **environment) for node in (1, 0)]
    outputs = [machine.communicate(timeout=400)[0] for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], outputs
    scripts.ok("train", "demo", "power", *EXACT, "dataset.batch_size=16", "--run-dir", scripts.runs / "alone")
    return run, outputs[1]


def test_two_nodes_of_two_ranks(scripts, two_nodes):
    """Two nodes x two ranks, a batch each = one process with the four in one: parameters and statistics within 1e-5."""
    states = [load(str(run / "checkpoints" / "checkpoint_last.pt")) for run in (two_nodes[0], scripts.runs / "alone")]
    assert [state["optimizer_history"][-1]["num_updates"] for state in states] == [8, 8]
    ranks_, alone = (state["model"] for state in states)
    assert ranks_.keys() == alone.keys() and any(name.endswith("running_phi") for name in alone)
    errors = {name: float((ranks_[name] - value).abs().max() / value.abs().max().clamp(min=1e-30))
              for name, value in alone.items() if torch.is_floating_point(value)}
    assert max(errors.values()) < 1e-5, errors


def test_records_of_several_ranks(scripts, two_nodes):
    """One machine leads: one log, one session of four ranks, other ranks' logs, TensorBoard's file, one run of wandb's
    which no record mentions; the batch is said."""
    run, output = two_nodes
    facts = json.loads((run / "run.json").read_text())
    assert [(session["ranks"], session["exit_status"]) for session in facts["sessions"]] == [(4, 0)]
    assert json.loads((run / "finished.json").read_text())["updates"] == 8
    assert "an update takes 4 x 4 = 16 sentences: 4 ranks x 4 x update_freq 1\n" in output
    assert "optimization.update_freq=[4]" in facts["overrides"]
    assert "optimization.update_freq=[1]" in facts["sessions"][0]["command"]
    assert sorted(path.name for path in (run / "logs").iterdir()) == ["rank1.log", "rank2.log", "rank3.log"]
    assert (run / "train.log").read_text().count('"train_num_updates": "8"') == 1
    assert "at work, without news for" in output, "progress at a steady rhythm"
    assert list((run / "tensorboard").rglob("*tfevents*"))
    assert str(run) not in json.dumps(facts["overrides"])
    notes = [json.loads(line) for line in (scripts.runs.parent / "notes").read_text().splitlines()]
    begun = [note for note in notes if "init" in note]
    assert {note["init"]["project"] for note in begun} == {"mine"} and {note["init"]["name"] for note in begun} == {"ranks"}
    assert {note["told"]["WANDB_RUN_ID"] for note in begun} == {facts["wandb"]} and begun[0]["folder"] == str(run)
    assert {note["step"] for note in notes if "log" in note} >= {8}
    said = json.dumps(facts["sessions"]) + (run / "finished.json").read_text() + (run / "config.yaml").read_text()
    assert "mine" not in said and "tensorboard_logdir=" not in said


@pytest.mark.parametrize("words, message", [
    (["--ranks", "0"], "--ranks"),
    (["common.cpu=true"], r"--ranks R: this is a run on a CPU"),
    (["--ranks", "65535", "common.cpu=true", "optimization.update_freq=[65535]"], "this machine has [0-9]+ processors"),
    (["--ranks", "2", "--nodes", "2"], r"--nodes 2: each of the 2 machines needs --node-rank I, from 0 to 1"),
    (["--nodes", "2", "--node-rank", "2", "--master", "h"], r"--node-rank 2: must be from 0 to 1"),
    (["--ranks", "2", "--node-rank", "0"], r"give --nodes N"),
    (["--nodes", "2", "--node-rank", "0", "--master", "host.invalid:29500"], r"'host.invalid' is unknown on this machine"),
    (["--nodes", "2", "--node-rank", "0", "--master", "localhost:x"], r"--master, its port 'x': must be a number, 1 to"),
    (["--ranks", "2", "common.cpu=true"], r"2 ranks cannot share out optimization.update_freq=\[1\].*numbers of ranks: 1; .*"
                                          r"dataset.max_tokens=512 optimization.update_freq=\[2\]"),
    (["--ranks", "3", "common.cpu=true", "optimization.update_freq=[4]"], r"3 ranks .* valid numbers of ranks: 1, 2, 4"),
    (["--ranks", "2", "distributed_training.distributed_world_size=2"],
     r"distributed_world_size is this command's own; use --ranks, --nodes"),
    (["--ranks", "2", "distributed_training.ddp_backend=pytorch_ddp"], r"pytorch_ddp needs GPUs"),
])
def test_launch_refuses(scripts, words, message):
    """What cannot be launched is refused before there is a run directory."""
    run = scripts.runs / "refused"
    refusal = scripts.refuses("launch", "demo", "power", "--run-dir", run, *words)
    assert re.search(message, refusal), refusal
    assert not run.exists()


@pytest.mark.parametrize("line", [
    line for name in ("README.md", "scripts/README.md")
    for line in re.findall(r"^bash scripts/launch.sh (.*)$", (toy.ROOT / name).read_text(encoding="utf-8"), re.M)
])
def test_the_lines_of_the_readmes(line, monkeypatch):
    """The ranks that they start can share out the batches of an update."""
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: [])  # host0
    launcher, options, config = launch.parse(shlex.split(line, comments=True))
    launcher.cpu = True
    launcher.place(None)
    given = [override.lstrip("+") for override in options.overrides]
    assert launcher.world > 1 and batch.overrides(OmegaConf.merge(config, OmegaConf.from_dotlist(given)), launcher.world)


def test_train_refuses_to_be_many(scripts):
    """train.sh started by torchrun or srun, or with a world size on a CPU, names launch.sh; fairseq would train copies."""
    words = ("train", "demo", "power", "--run-dir", scripts.runs / "refused")
    assert "torchrun started 2 processes" in scripts.refuses(*words, WORLD_SIZE="2", RANK="0")
    assert "srun started 4 processes" in scripts.refuses(*words, SLURM_STEP_NUM_TASKS="4")
    message = scripts.refuses(*words, "distributed_training.distributed_world_size=2")
    assert "use scripts/launch.sh --ranks 2" in message
    assert not (scripts.runs / "refused").exists()


def test_torchrun_without_flags_is_refused(toy_data, tmp_path):
    """Plain torchrun on a CPU, which silently trains independent copies, ends with an error before the first update."""
    done = toy.command(
        "torchrun", "--standalone", "--no-python", "--nproc_per_node", 2, warm.program("fairseq-train"), toy_data,
        "--user-dir", "fairseq_powernorm", "--task", "translation_pn", "--arch", "transformer_pn_tiny", "--cpu",
        "--optimizer", "sgd", "--lr", 0.1, "--max-tokens", 400, "--max-update", 2, "--save-dir", tmp_path / "save",
        "--log-interval", 1, "--data-buffer-size", 0, "--num-workers", 0, "--log-format", "json", check=False,
    )
    output = done.stdout + done.stderr
    assert done.returncode != 0 and "2 processes were started (WORLD_SIZE) but fairseq has 1 of them as ranks" in output
    assert not toy.losses(output) and not (tmp_path / "save" / "checkpoint_last.pt").exists()


def test_number_of_ranks():
    """Fewer ranks than processes are refused; no torchrun, one process, and a world that is whole are not."""
    for world, environment in ((1, {}), (1, {"RANK": "0", "WORLD_SIZE": "1"}), (4, {"RANK": "0", "WORLD_SIZE": "4"})):
        ranks.check_number(world, environment=environment)
    ranks.check_number(2, 2, {"RANK": "0", "WORLD_SIZE": "4"})
    with pytest.raises(ValueError, match="4 processes .* has 2 of them"):
        ranks.check_number(2, environment={"RANK": "0", "WORLD_SIZE": "4"})


def test_a_task_without_a_gpu(monkeypatch):
    """A task of a cluster that sees no GPU does not train on the processor unless it is told to; what is no task of
    an array, or does not know where the others are, is refused.
    """
    words = ["demo", "power", "--submission", "demo-1"]
    for name, value in (("PROCID", 0), ("STEP_NUM_TASKS", 2), ("LOCALID", 0), ("STEP_NUM_NODES", 1),
                        ("ARRAY_JOB_ID", 7), ("ARRAY_TASK_ID", 1)):
        with pytest.raises(UserError, match=f"tasks of train.sbatch: SLURM_{name} is not set"):
            launch.parse(words)
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    with pytest.raises(UserError, match="--submission 'demo-1': 2 tasks need --master HOST:PORT"):
        launch.parse(words)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    task = launch.parse([*words, "--master", "h:1"])[0]
    task.check_overrides([])
    config = OmegaConf.create({"common": {"cpu": False}, "distributed_training": {"ddp_backend": "legacy_ddp"},
                               "optimization": {"update_freq": [1]}})
    with pytest.raises(UserError, match="this task sees no GPU .* common.cpu=true"):
        task.check_devices(config)
    config.common.cpu = True
    assert task.check_devices(config) == 1


@pytest.mark.parametrize("parts", [False, True])
def test_ranks_with_other_settings(parts):
    """A setting or training data that differ are refused by name; places of ranks and of files may differ. Datasets of
    several parts (those of masked_lm) have a list of sizes."""
    from types import SimpleNamespace

    from fairseq.data import ListDataset, NestedDictionaryDataset
    from omegaconf import OmegaConf

    def facts(lr=0.1, rank=0, sizes=(3, 4)):
        config = OmegaConf.create({"optimization": {"lr": [lr]}, "task": {"data": f"/node{rank}"},
                                   "dataset": {"train_subset": "train"},
                                   "distributed_training": {"distributed_rank": rank, "device_id": rank}})
        dataset = ListDataset(torch.zeros(len(sizes), 1), torch.tensor(sizes))
        if parts:
            dataset = NestedDictionaryDataset({"tokens": dataset}, sizes=[dataset.sizes])
        return ranks.facts(config, SimpleNamespace(datasets={"train": dataset}))

    ranks.check_facts(facts(rank=1), facts(), 1)
    with pytest.raises(ValueError, match=r"optimization.lr is \[0.2\] for rank 1 and \[0.1\] for rank 0"):
        ranks.check_facts(facts(lr=0.2, rank=1), facts(), 1)
    with pytest.raises(ValueError, match="training data is 3 sentences or blocks, 7 tokens for rank 1"):
        ranks.check_facts(facts(rank=1, sizes=(3, 2, 2)), facts(), 1)
    with pytest.raises(ValueError, match="is not there for rank 1 and there for rank 0"):
        ranks.check_checkpoint("checkpoint_last.pt", False, True, 1)
    ranks.check_checkpoint("checkpoint_last.pt", True, True, 1)


def test_hydra_launcher(scripts, tmp_path):
    """fairseq-hydra-train -m with submitit's local launcher trains in a directory of its own, with the norm in both places
    of the encoder; the launcher for SLURM is the same with its own options (tests/checks/slurm.sh runs it)."""
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    words = ["fairseq-hydra-train", "--config-dir", "configs", "--config-name", "demo", f"hydra.sweep.dir={tmp_path}",
             f"common.user_dir={toy.ROOT / 'fairseq_powernorm'}", f"task.data={scripts.data / 'demo' / 'data-bin'}",
             "common.cpu=true", *SMALL, "optimization.max_update=5", "hydra.launcher.gpus_per_node=0"]
    toy.command(words[0], "-m", *words[1:], "+launcher=submitit_local", "model.encoder_norm_self=rms",
                cold=True)  # the job is pickled for a process that submitit starts by itself
    model = load(str(tmp_path / "0" / "checkpoints" / "checkpoint_last.pt"))["cfg"]["model"]
    assert (model["encoder_norm_self"], model["encoder_norm_ff"], model["decoder_norm_ff"]) == ("rms", "rms", "layer")
    shown = toy.command(words[0], "--cfg", "hydra", *words[1:], "+launcher=submitit").stdout
    assert "SlurmLauncher" in shown and "max_num_timeout: 100" in shown and "gpus_per_node: 0" in shown
