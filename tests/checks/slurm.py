"""Runs on a real SLURM of one machine: see tests/checks/slurm.sh."""

import argparse
import datetime
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import slurm_cluster

from fairseq_powernorm.experiments.commands import main
from fairseq_powernorm.experiments.errors import UserError
from fairseq_powernorm.experiments.files import read_json
from fairseq_powernorm.experiments.paths import ROOT
from fairseq_powernorm.experiments.tools import TOOLS, versions

# A small model and 30 updates; they shrink what configs/demo.yaml says.
SMALL = ["common.cpu=true", "dataset.max_tokens=200", "optimization.max_update=30", "checkpoint.save_interval_updates=3",
         "dataset.validate_interval_updates=10", "checkpoint.keep_interval_updates=3", "common.log_interval=2",
         "lr_scheduler.warmup_updates=10", "generation.max_len_b=20", "generation.beam=2", "+model.encoder_layers=1",
         "+model.decoder_layers=1"]
UPDATES = 30
# While the file $PN_SLOW exists, copying checkpoint_last.pt takes a minute, half of it written: a run that is caught in
# the middle of saving, and that needs no processor meanwhile.
SLOW = """
import os, shutil, time
def copyfile(source, target, _copyfile=shutil.copyfile, **options):
    slow, end = os.environ.get("PN_SLOW", ""), time.time() + 60
    if os.path.basename(target).startswith("checkpoint_last.pt") and os.path.exists(slow):
        with open(source, "rb") as read, open(target, "wb") as written:
            written.write(read.read(os.path.getsize(source) // 2))
        while os.path.exists(slow) and time.time() < end:
            time.sleep(0.1)
    return _copyfile(source, target, **options)
shutil.copyfile = copyfile
"""
SITE = """
PN_TIME=30
PN_CPUS_PER_TASK=1
PN_WARNING=10
"""


class Check:
    """A prepared toy corpus, a cluster, and the scripts of the repository in their environment."""

    def __init__(self, home, lean, **cluster):
        self.home, self.lean, self.steps, self.begin = home, lean, [], time.time()
        self.slow, self.runs = home / "slow", home / "runs"
        for name in ("python", "cluster"):
            (home / name).mkdir()
        (home / "python" / "sitecustomize.py").write_text(SLOW)
        (home / "site.sh").write_text(SITE)
        (home / "no-gpus.sh").write_text(f"{SITE}PN_GRES=\n")
        self.cluster = slurm_cluster.Cluster(home / "cluster", **cluster)
        path = os.pathsep.join(filter(None, [str(home / "python"), os.environ.get("PYTHONPATH")]))
        self.environment = {**self.cluster.environment, "PYTHON": sys.executable, "PYTHONPATH": path,
                            "OMP_NUM_THREADS": "1", "PN_DATA_ROOT": str(home / "data"), "PN_RUNS_ROOT": str(self.runs),
                            "PN_SLURM_SITE": str(home / "site.sh"), "PN_SLOW": str(self.slow)}
        self.cluster.environment = self.environment

    def done(self, step):
        """Notes a step that came out as it should."""
        self.steps.append(step)
        print(f"ok   {time.time() - self.begin:5.0f} s  {step}", flush=True)

    def script(self, script, *arguments, status=0):
        """The output of a script of the repository, which has to end with a status."""
        words = [str(word) for word in arguments]
        done = subprocess.run(["bash", str(ROOT / "scripts" / script), *words], env=self.environment, text=True,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=600)
        if done.returncode != status:
            raise AssertionError(f"{script} {shlex.join(words)}: exit status {done.returncode}, not {status}:\n"
                                 f"{done.stdout[-3000:]}")
        return done.stdout

    def prepare(self):
        text = self.home / "text"
        text.mkdir()
        for split, number in (("train", 240), ("valid", 15), ("test", 16)):
            for language, word in (("de", "d"), ("en", "e")):
                (text / f"{split}.{language}").write_text("".join(
                    " ".join(f"{word}{i * 7 % 11}{word * (1 + (i + k) % 3)}" for k in range(3 + i % 4)) + ".\n"
                    for i in range(number)))
        self.script("prepare.sh", "demo", "--text-dir", text)

    def job(self, array, task):
        """(state, node) of a job of an array; (None, None) once it has left the queue."""
        for line in self.cluster.client("squeue", "-h", "-r", "-j", array, "-o", "%K %T %N", check=False).splitlines():
            words = line.split()
            if words[0] == str(task):
                return words[1], words[2] if len(words) > 2 else None
        return None, None

    def sessions(self, run):
        return read_json(run / "run.json")["sessions"] if (run / "run.json").is_file() else []

    def saved(self, run):
        """The updates of the run's newest checkpoint."""
        names = (path.stem.split("_") for path in (run / "checkpoints").glob("checkpoint_*_*.pt"))
        return max((int(name[2]) for name in names), default=0)

    def wait(self, condition, what, seconds=600):
        return self.cluster.wait(condition, seconds, what)

    def wait_training(self, array, task, run, sessions):
        """Until a job is in its so many-th session and has made a checkpoint in it."""
        def training():
            state = self.job(array, task)[0]
            assert state is not None, f"the job of {run.name} has ended"
            return len(self.sessions(run)) >= sessions and state == "RUNNING" and self.saved(run) > before
        before = self.saved(run)
        self.wait(training, f"session {sessions} of {run.name} to save a checkpoint")

    def wait_idle(self, what):
        self.wait(lambda: not self.cluster.client("squeue", "-h").strip(), f"{what} to end")

    def logs(self):
        return "".join(f"==== {path}\n{path.read_text(errors='replace')[-6000:]}\n"
                       for path in sorted(self.home.rglob("*.log")) if path.name != "generate.log")


def load(run):
    """The last checkpoint of a run."""
    from fairseq_powernorm.checkpoint import load

    return load(str(run / "checkpoints" / "checkpoint_last.pt"))


def parameters(run):
    """(updates, parameters and buffers and the optimizer's state) of a run's end."""
    import torch

    state = load(run)
    moments = {f"{index}.{key}": value for index, entry in state["last_optimizer_state"]["state"].items()
               for key, value in entry.items() if torch.is_tensor(value)}
    return state["optimizer_history"][-1]["num_updates"], {**state["model"], **moments}


def check_same(run, other):
    """Two runs ended after the same updates with the same tensors, bit for bit."""
    import torch

    (updates, one), (expected, two) = parameters(run), parameters(other)
    assert updates == expected == UPDATES, (updates, expected)
    assert one.keys() == two.keys()
    differing = [name for name, value in one.items() if not torch.equal(value, two[name])]
    assert not differing, f"{run} and {other} differ in {differing[:5]}"
    return len(one)


def readme_command():
    """The arguments of the submit.sh line in the section on clusters of the scripts' README."""
    section = re.search(r"^## Clusters\n(.*?)^## ", (ROOT / "scripts" / "README.md").read_text(encoding="utf-8") + "\n## ",
                        re.M | re.S)[1]
    line = re.search(r"^bash scripts/slurm/submit\.sh ((?:.*\\\n)*.*)$", section, re.M)[1]
    return shlex.split(line.replace("\\\n", " "), comments=True)


def submitted(output):
    """(number of the array, number of the evaluations, run directories) from what submit.sh prints."""
    runs = re.findall(r"^job (\d+)_\d+: (.*)$", output, re.M)
    return runs[0][0], re.search(r"^job (\d+)_I: evaluation", output, re.M)[1], [Path(run) for _, run in runs]


def disturbed_array(check):
    """The README's command: two norms; one is preempted twice, one reaches its time limit, a node goes down."""
    command = [*readme_command(), *SMALL]
    cluster, client = check.cluster, check.cluster.client
    check.slow.touch()
    output = check.script("slurm/submit.sh", *command)
    array, evaluation, (first, second) = submitted(output)
    submission = next((check.runs / "slurm").iterdir())
    check.done(f"submitted: {shlex.join(readme_command())}")

    for more in ((), ("--resume",)):
        refused = check.script("slurm/submit.sh", *command, *more, status=2)
        assert str(first) in refused and re.search("error: .*(exists already|belongs to job|is at work)", refused), refused
    assert len(list((check.runs / "slurm").iterdir())) == 1
    check.done("the same runs a second time: refused, nothing queued")

    # meanwhile the same runs, undisturbed
    alone = {}
    for norm in ("power", "layer"):
        run = check.runs / f"undisturbed-{norm}"
        alone[run] = subprocess.Popen(
            ["bash", str(ROOT / "scripts" / "train.sh"), "demo", norm, "--run-dir", str(run), "common.seed=1", *SMALL],
            env={**check.environment, "PN_SLOW": ""}, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT)

    def preempt():
        _, node = check.job(array, 0)
        urgent = client("sbatch", "--parsable", "-p", "high", "--gres=gpu:1", "--time=1", f"--nodelist={node}",
                        f"--output={check.home}/urgent.log", "--wrap=sleep 1").strip()
        check.wait(lambda: check.job(array, 0)[0] == "PENDING", "the preempted job to be requeued", 120)
        check.wait(lambda: not client("squeue", "-h", "-j", urgent, check=False).strip(), "the urgent job to end", 120)

    for session, time_ in ((1, "for the first time"), (2, "a second time")):
        check.wait_training(array, 0, first, session)
        preempt()
        check.done(f"{first.name} preempted {time_} and requeued")
    check.wait_training(array, 0, first, 3)
    log = (first / "train.log").read_text()
    whole = re.search(r"checkpoint_last\.pt(?:\.tmp)? is truncated or damaged; going on from (checkpoint_\d+_\d+\.pt)", log)
    assert whole, log
    check.done(f"it was writing its last checkpoint; it went on from a whole one, {whole[1]}")

    check.wait_training(array, 1, second, 1)
    # the limit is brought near, in whole minutes, but not nearer than the 40 s before it in which SLURM warns
    *_, minutes, seconds = client("squeue", "-h", "-r", "-j", f"{array}_1", "-o", "%M").strip().split(":")
    client("scontrol", "update", f"JobId={array}_1", f"TimeLimit={int(minutes) + (1 if int(seconds) < 15 else 2)}")
    check.wait(lambda: check.job(array, 1)[0] == "PENDING", f"{second.name} to reach its time limit", 400)
    client("scontrol", "update", f"JobId={array}_1", "TimeLimit=30")
    check.wait(lambda: len(check.sessions(second)) > 1, f"{second.name} to go on", 400)
    log = (submission / "logs" / f"{array}_1.log").read_text()
    assert "requeueing job" in log and "time limit" in log, log
    check.done(f"{second.name} reached its time limit and was requeued")
    assert re.search(rf"{second.name} +running \(job {array}_1\) +\d+ of {UPDATES} ", check.script("status.sh")), "status"
    check.done("status.sh shows it as running")

    check.wait_training(array, 1, second, 2)
    _, node = check.job(array, 1)
    sessions = len(check.sessions(second))
    cluster.kill_node(node, everything=True)
    if check.lean:  # what SLURM itself would find out within a minute or two
        client("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=lost")
    cluster.start_node(node)
    if check.lean:
        client("scontrol", "update", f"NodeName={node}", "State=RESUME")
    check.wait(lambda: len(check.sessions(second)) > sessions, "the job of the lost node to run again", 400)
    check.done(f"{node} went down with {second.name} on it and came back; the job was requeued")
    cluster.kill_node(node)
    cluster.start_node(node)
    check.done(f"the daemon of {node} killed and started again")

    check.slow.unlink()
    check.wait_idle("runs and evaluation")
    for run in (first, second):
        assert read_json(run / "finished.json")["updates"] == UPDATES, run
        ended = [session["exit_status"] for session in check.sessions(run)]
        assert ended[-1] == 0 and all(status in (None, -signal.SIGTERM) for status in ended[:-1]), ended
        assert {session["job"] for session in check.sessions(run)} == {f"{array}_{(first, second).index(run)}"}
    assert len(check.sessions(first)) >= 3 and len(check.sessions(second)) >= 3
    sessions = [len(check.sessions(run)) for run in (first, second)]
    check.done(f"both runs ended at update {UPDATES}, in {sessions[0]} and {sessions[1]} sessions")
    table = (submission / "table.md").read_text()
    assert [re.match(r"\| demo \| (\w+)", line)[1] for line in table.splitlines()[2:]] == ["layer", "power"], table
    assert table in next((submission / "logs").glob("*-report.log")).read_text()
    assert len(list((submission / "logs").glob(f"{evaluation}_*-evaluation.log"))) == 2
    check.done(f"evaluations, job {evaluation}, ran after them, then the report; table:\n{table.rstrip()}")
    again = check.script("slurm/submit.sh", *command, "--resume", "--dry-run")
    assert "aftercorr" in again
    assert [process.wait(300) for process in alone.values()] == [0, 0]
    tensors = sum(check_same(run, other) for run, other in zip((first, second), alone))
    check.done(f"parameters, statistics and optimizer state are those of undisturbed runs, bit for bit ({tensors} tensors)")


def failing_jobs(check):
    """A job that fails by its own error is not requeued; what SLURM itself refuses is refused before anything is queued."""
    output = check.script("slurm/submit.sh", "demo", "rms", "--gpus", "1", *SMALL,
                          "++task.norm_record=record")  # RMSNorm has none: found when training begins
    array, evaluation, (run,) = submitted(output)
    check.wait_idle("the failing job")
    assert len(check.sessions(run)) == 1 and check.sessions(run)[0]["exit_status"] == 1
    assert "failed" in check.script("status.sh", run)
    assert not (run / "evaluation").exists()
    check.done("a job that fails by its own error: not requeued, not evaluated, shown as failed")

    unknown = check.script("slurm/submit.sh", "demo", "layer", "--seeds", "9", "--partition", "lwo", *SMALL, status=2)
    assert "error: sbatch --test-only" in unknown and "partition" in unknown, unknown
    check.done("an unknown partition: refused by SLURM before anything was queued")


def ranks_on_nodes(check):
    """Two nodes with two ranks each and SGD = one process with batches four times as large."""
    words = ["demo", "power", *SMALL, "common.seed=5", "optimization.max_update=12", "dataset.curriculum=99",
             "model.dropout=0", "+model.norm_variant=algorithm2", "optimizer._name=sgd", "~optimizer.adam_betas",
             "optimization.lr=[0.1]", "+optimizer.lr=[0.1]", "+optimizer.momentum=0.0", "+optimizer.weight_decay=0.0",
             "dataset.max_tokens=null"]
    output = check.script("slurm/submit.sh", *words, "dataset.batch_size=4", "optimization.update_freq=[4]", "--nodes", "2",
                          "--gpus", "4", "--site", check.home / "no-gpus.sh")
    _, _, (run,) = submitted(output)
    assert "an update takes 4 x 4 = 16 sentences: 4 ranks x 4 x update_freq 1" in output
    alone = check.runs / "one-process"
    check.script("train.sh", *words, "dataset.batch_size=16", "--run-dir", alone)
    check.wait_idle("the ranks and their evaluation")
    (updates, one), (expected, two) = parameters(run), parameters(alone)
    assert updates == expected == 12
    error = max(float((one[name] - two[name]).abs().max() / two[name].abs().max().clamp(min=1e-30)) for name in two
                if two[name].is_floating_point())
    assert error < 1e-5, error
    check.done("two nodes x two ranks = one process with batches four times as large "
               f"(largest relative difference {error:.1e})")


def reproduced_table(check):
    """Rows x seeds of a table: trained, each evaluated, the report made; nothing of it is queued a second time."""
    settings = ("optimization.max_update", "checkpoint.save_interval", "dataset.validate_interval", "lr_scheduler")
    words = ["--benchmark", "demo", "--rows", "layer,power", "--seeds", "1,2", "--updates", "20", "--slurm", "--results",
             check.home / "results", *(word for word in SMALL if not word.startswith(settings))]
    output = check.script("reproduce_table1.sh", *words)
    names = [f"{row}-20-seed{seed}" for seed in (1, 2) for row in ("layer", "power")]
    assert [run.name for run in submitted(output)[2]] == names, output
    assert "nothing to queue" in check.script("reproduce_table1.sh", *words)
    check.wait_idle("the runs of the table")
    records = [check.home / "results" / "demo" / f"{name}.json" for name in names]
    assert all(read_json(record)["updates"] == 20 for record in records)
    report = (check.home / "results" / "table1-demo-20.md").read_text()
    assert all(f"({record.relative_to(check.home / 'results')})" in report for record in records), report
    assert check.script("reproduce_table1.sh", *words).count("is there already") == 4
    check.done("reproduce_table1.sh --slurm, two rows with two seeds: trained, evaluated, in the report; none queued twice")


def hydra_launcher(check):
    """fairseq-hydra-train -m with configs/launcher/submitit.yaml queues a job for each norm, and they train."""
    if subprocess.run([sys.executable, "-c", "import submitit, hydra_plugins.hydra_submitit_launcher"],
                      env=check.environment, stderr=subprocess.DEVNULL).returncode:
        print("skip hydra-submitit-launcher is not installed (pip install -e '.[slurm]')")
        return
    sweep = check.home / "sweep"
    command = [Path(sys.executable).with_name("fairseq-hydra-train"), "-m", "--config-dir", ROOT / "configs",
               "--config-name", "demo", "+launcher=submitit", f"hydra.sweep.dir={sweep}",
               f"common.user_dir={ROOT / 'fairseq_powernorm'}",
               f"task.data={check.home / 'data' / 'demo' / 'data-bin'}", "model.encoder_norm_self=power,layer",
               "hydra.launcher.timeout_min=3", "hydra.launcher.cpus_per_task=1", *SMALL]
    subprocess.run([str(word) for word in command], env=check.environment, check=True, timeout=900,
                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    for number, norm in enumerate(("power", "layer")):
        model = load(sweep / str(number))["cfg"]["model"]
        assert model["encoder_norm_self"] == model["encoder_norm_ff"] == norm
    check.done("fairseq-hydra-train -m +launcher=submitit trained two norms in two jobs")


def check(arguments):
    parser = argparse.ArgumentParser(prog="tests/checks/slurm.sh", add_help=False, allow_abbrev=False)
    for name in ("lean", "install", "keep"):
        parser.add_argument(f"--{name}", action="store_true")
    parser.add_argument("--record")
    options = parser.parse_args(arguments)
    missing = slurm_cluster.missing()
    if missing:
        raise UserError(f"SLURM is not installed here: {', '.join(missing)} missing; as root, --install installs it")
    home = Path(tempfile.mkdtemp(prefix="pn-slurm-"))
    try:
        run = Check(home, options.lean, nodes=2, gpus=1)
        run.prepare()
        try:
            with run.cluster:
                run.done("a SLURM of two nodes is up")
                disturbed_array(run)
                for part in () if options.lean else (failing_jobs, ranks_on_nodes, reproduced_table, hydra_launcher):
                    part(run)
        except BaseException:
            print(run.logs(), file=sys.stderr)
            raise
        left = list(run.cluster.processes())
        assert not left, left
        run.done("the SLURM has ended and left no process")
        if options.record:
            write_record(Path(options.record), run, options)
    finally:
        if options.keep:
            print(f"kept: {home}")
        else:
            shutil.rmtree(home, ignore_errors=True)


def write_record(path, run, options):
    from fairseq_powernorm.experiments.evaluation import evaluate

    slurm = run.cluster.client("slurmctld", "-V").strip()
    path.parent.mkdir(parents=True, exist_ok=True)
    head = [f"# tests/checks/slurm.sh{' --lean' if options.lean else ''}", "",
            f"{datetime.date.today()}, {slurm}, Python {platform.python_version()}, "
            + ", ".join(f"{name} {version}" for name, version in versions(TOOLS).items())
            + f", {os.cpu_count()} processors; commit {evaluate.commit()}; {time.time() - run.begin:.0f} s", ""]
    steps = [f"{number}. {step}".replace(str(run.home), "TMP").replace("\n", "\n\n   ", 1).replace("\n|", "\n   |")
             for number, step in enumerate(run.steps, 1)]
    path.write_text("\n".join([*head, *steps]) + "\n", encoding="utf-8")
    print(f"record: {path}")


if __name__ == "__main__":
    main(check, sys.argv[1:])
