"""Clusters: what submit.sh refuses and prints, the batch script's logic, status.sh, and all of it on a real SLURM."""
import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time

import pytest
import torch
import toy
from checks import slurm_cluster
from pipelines import SMALL, demo, program

from fairseq_powernorm.experiments import submit
from fairseq_powernorm.experiments.errors import UserError

SLURM = toy.ROOT / "scripts" / "slurm"
#: tools of the shell and of Python, not of SLURM
CLIENTS = {"sbatch", "srun", "squeue", "scontrol", "scancel", "sinfo", "sacct", "salloc"}


@pytest.fixture(scope="module")
def scripts(tmp_path_factory):
    """Scripts with the demo prepared, on a machine that has all programs but SLURM's."""
    scripts = demo(tmp_path_factory, "submit")
    scripts.home, scripts.programs = scripts.data.parent, scripts.data.parent / "bin"
    scripts.programs.mkdir()
    for folder in os.environ["PATH"].split(os.pathsep):
        for entry in os.scandir(folder) if os.path.isdir(folder) else ():
            if entry.name not in CLIENTS and not (scripts.programs / entry.name).is_symlink():
                (scripts.programs / entry.name).symlink_to(entry.path)
    scripts.environment.update(PATH=str(scripts.programs), PN_SLURM_SITE=str(SLURM / "site.example.sh"))
    return scripts


@pytest.fixture
def with_slurm(scripts, tmp_path):
    """An environment with stand-ins of SLURM's clients, which note how they are called; QUEUE is what squeue prints."""
    for name in ("sbatch", "scontrol", "scancel"):
        program(tmp_path / "bin", name, f'echo "{name} $*" >>{tmp_path}/calls; [[ $* == *--parsable* ]] && echo 77 || true')
    program(tmp_path / "bin", "squeue", 'printf "%b" "${QUEUE:-}"')
    return {"PATH": f"{tmp_path / 'bin'}{os.pathsep}{scripts.programs}", "PN_RUNS_ROOT": str(tmp_path / "runs")}


# ---- submit.sh -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_submit_refuses(scripts, with_slurm, tmp_path, monkeypatch):
    """Wrong use is one clear error, and nothing is queued or written."""
    for name, value in {**scripts.environment, **with_slurm}.items():
        monkeypatch.setenv(name, value)

    def refused(*words):
        with pytest.raises(UserError) as error:
            submit.command(words)  # in this process, where fairseq is at hand
        return str(error.value)

    words = ("demo", "power", "layer", *SMALL)
    assert "benchmark 'dmeo' is unknown; valid: demo, " in refused("dmeo", "power")
    assert "norm 'powr' is unknown; valid: layer, rms" in refused("demo", "layer", "powr")
    assert "NORM is missing; usage: " in refused("demo")
    assert "--arch 'x' is unknown" in refused(*words, "--arch", "x")
    assert "--gpus 3 cannot be divided among --nodes 2" in refused(*words, "--nodes", "2", "--gpus", "3")
    assert "--nodes '0': must be a number" in refused(*words, "--nodes", "0")
    for seeds in ("1,a", "4294967296", "-1", "1.0"):
        assert "must be a number, 0 to 4294967295" in refused(*words, f"--array-seeds={seeds}")
    assert "--seeds '1,': must be words separated by commas" in refused(*words, "--array-seeds", "1,")
    assert "--seeds '1,2,1' names something twice" in refused(*words, "--array-seeds", "1,2,1")
    assert "both choose the seed" in refused(*words, "--array-seeds", "1", "common.seed=2")
    assert "power-seed1; each norm and each seed only once" in refused("demo", "power", "power", *SMALL)
    assert "--time '1 hour' is no time limit" in refused(*words, "--time", "1 hour")
    assert "--time 2: must be more than 150 s" in refused(*words, "--time", "2")
    assert "is not prepared; run: scripts/prepare.sh ptb" in refused("ptb", "power")
    assert "optimization.max_updtae" in refused(*words, "optimization.max_updtae=3")
    message = refused(*words, "distributed_training.distributed_world_size=2")
    assert "distributed_world_size is this command's own; use --nodes and --gpus" in message
    message = refused(*words, "checkpoint.keep_interval_updates=-1")
    assert "without checkpoint.keep_interval_updates fills the disk" in message
    assert "site file /none does not exist" in refused(*words, "--site", "/none")
    (tmp_path / "site.sh").write_text("PN_CPUS_PER_TASK=many\n")
    assert "site.sh 'many': must be a number, 1 or more" in refused(*words, "--site", str(tmp_path / "site.sh"))
    (tmp_path / "site.sh").write_text("PN_TIME=soon\n")
    assert "site.sh 'soon' is no time limit" in refused(*words, "--site", str(tmp_path / "site.sh"))
    (tmp_path / "site.sh").write_text("echo hello\nPN_ACCOUNT=$UNKNOWN\n")
    assert "site.sh does not work: " in refused(*words, "--site", str(tmp_path / "site.sh"))
    (tmp_path / "file").write_text("")
    assert f"--log-dir {tmp_path}/file/logs: {tmp_path}/file is not a directory" in refused(
        *words, "--log-dir", f"{tmp_path}/file/logs")
    assert "--log-dir /proc/logs cannot be written: /proc: " in refused(*words, "--log-dir", "/proc/logs")
    assert "2 ranks cannot share out optimization.update_freq=[1]" in refused(*words, "--gpus", "2")
    for name in ("a\nb", "\udcff"):
        message = refused(*words, "--records", f"{tmp_path}/{name}")
        assert "has characters that cannot be printed; a job's arguments are a line" in message and "\n" not in message
    monkeypatch.setenv("PATH", scripts.environment["PATH"])
    assert "no SLURM on this machine: sbatch is not in PATH" in refused(*words)
    status, output = scripts("slurm/submit", *words)
    assert status == 2 and re.fullmatch(r"scripts/slurm/submit.sh: error: no SLURM on this machine.*\n", output), output
    assert not (tmp_path / "runs").exists() and not (tmp_path / "calls").exists()


def test_norms_and_overrides_of_submit():
    """Words with a norm's options are norms, KEY=VALUE and ~KEY are overrides, whatever their order."""
    words = ["batch:variant=reference", "common.seed=2", "power", "~optimizer.adam_betas", "a.b='c:d'"]
    options = submit.parse(["demo", *words])
    assert options.norms == ["batch:variant=reference", "power"]
    assert options.overrides == ["common.seed=2", "~optimizer.adam_betas", "a.b='c:d'"]


@pytest.mark.slow
def test_submit_refuses_runs_in_use(scripts, with_slurm, tmp_path):
    """A run directory that exists, in which a process works, or that a queued job will use, is refused."""
    import fcntl

    runs = tmp_path / "runs" / "demo"
    words = ("demo", "power", "layer", *SMALL)
    (runs / "layer-seed1").mkdir(parents=True)
    (runs / "layer-seed1" / "run.json").write_text("{}")
    assert "layer-seed1 exists already; --resume" in scripts.refuses("submit", *words, **with_slurm)
    (runs / "layer-seed1" / "run.json").unlink()
    with open(runs / ".power-seed1.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        message = scripts.refuses("submit", *words, "--resume", **with_slurm)
        assert "another process is at work in" in message and "power-seed1" in message
    (runs / ".power-seed1.job").write_text(json.dumps({"submission": "demo-x", "task": 3}))
    message = scripts.refuses("submit", *words, "--resume", QUEUE="3|55_3|PENDING|Priority|demo-x\n", **with_slurm)
    assert "power-seed1 belongs to job 55_3, which is PENDING; scancel 55_3" in message
    assert not (tmp_path / "calls").exists()


@pytest.mark.slow
def test_submit_queues_all_jobs_or_none(scripts, with_slurm, tmp_path):
    """One array over norms x seeds, held until evaluations and table are queued behind it; all of them or none."""
    words = ("demo", "power", "layer", "--array-seeds", "4,5", "--gpus", "4", "--nodes", "2", *SMALL,
             "dataset.max_tokens=100", "optimization.update_freq=[4]")
    output = scripts.ok("slurm/submit", *words, **with_slurm)
    calls = [shlex.split(line) for line in (tmp_path / "calls").read_text().splitlines()]
    assert [call[0] for call in calls] == ["sbatch"] * 6 + ["scontrol"]
    assert ["--test-only" in call for call in calls] == [True] * 3 + [False] * 4 and calls[6][1:] == ["release", "77"]
    assert {"--array=0-3", "--hold", "--nodes=2", "--ntasks-per-node=2", "--gres=gpu:2",
            "--signal=B:USR1@120"} <= set(calls[3])
    assert {"--array=0-3", "--dependency=aftercorr:77", "--kill-on-invalid-dep=yes", "--gres=gpu:1"} <= set(calls[4])
    assert "--dependency=afterany:77" in calls[5]
    (submission,) = (tmp_path / "runs" / "slurm").iterdir()
    assert f"--job-name={submission.name}" in calls[3] and f"--output={submission}/logs/%A_%a.log" in calls[3]
    assert (submission / "logs").is_dir()
    tasks, evaluations = ([shlex.split(line) for line in (submission / name).read_text().splitlines()]
                          for name in ("tasks", "evaluations"))
    assert [words[0] for words in evaluations] == [task[task.index("--run-dir") + 1] for task in tasks]
    assert [(task[1], task[task.index("--run-dir") + 1].rpartition("/")[2]) for task in tasks] == [
        (norm, f"{norm}-seed{seed}") for norm in ("power", "layer") for seed in (4, 5)]
    assert all("--resume" in task and "+model.encoder_layers=1" in task for task in tasks)
    assert "an update takes 4 x 100 = 400 tokens: 4 ranks x 100 x update_freq 1\n" in output
    queue = f"N/A|9|RUNNING|None|a|b\n2|77_2|PENDING|Priority|{submission.name}\n"
    status = scripts.here("status", QUEUE=queue, **with_slurm)
    assert re.search(r"layer-seed4 +queued \(job 77_2: Priority\)", status)
    assert re.search(r"power-seed4 +not started", status)

    program(tmp_path / "bin", "sbatch", '[[ $* != *afterany* ]] || { echo "no such qos" >&2; exit 1; }; echo 78')
    (tmp_path / "calls").unlink()
    message = scripts.refuses("submit", "demo", "rms", *SMALL, **with_slurm)  # in squeue's eyes, all are gone
    assert "no such qos" in message and (tmp_path / "calls").read_text() == "scancel 78\n" * 2
    assert len(list((tmp_path / "runs" / "slurm").iterdir())) == 1
    assert not list((tmp_path / "runs" / "demo").glob(".rms*")), "no claim is left"


@pytest.mark.slow
def test_dry_run(scripts, tmp_path):
    """--dry-run prints the batch scripts, all files and the commands; it needs no SLURM and writes nothing."""
    before = sorted(scripts.home.rglob("*"))
    site = tmp_path / "site.sh"
    site.write_text("PN_ACCOUNT=abc PN_PARTITION=gpus PN_GRES=gpu:a100 PN_SBATCH=(--qos='a b')\n"
                    "PN_CONTAINER=(apptainer exec x)\n")
    output = scripts.ok("slurm/submit", "demo", "power", "--site", str(site), "--time", "1-0", *SMALL, "--dry-run",
                        "--array-seeds", "7")
    for name in ("train.sbatch", "evaluate.sbatch", "report.sbatch", "job.sh"):
        assert (SLURM / name).read_text() in output
    array, evaluation, report, release = output.splitlines()[-4:]
    assert {"--account=abc", "--partition=gpus", "--gres=gpu:a100:1", "--time=1-0", "--qos=a b", "--array=0-0"} <= set(
        shlex.split(array))
    assert "--dependency=aftercorr:TRAINING" in evaluation and "--dependency=afterany:EVALUATION" in report
    assert release == "scontrol release TRAINING"
    assert "demo power" in output and "common.seed=7" in output and "export PYTHON" not in output
    assert sorted(scripts.home.rglob("*")) == before


# ---- train.sbatch --------------------------------------------------------------------------------------------------------


class Job:
    """train.sbatch as SLURM starts it, with stand-ins of srun, scontrol and scancel; squeue and requeues are noted."""

    def __init__(self, folder, srun, preempted="None", requeue="exit 0", nodes=1, run_time="00:10:00"):
        self.folder = folder
        program(folder / "bin", "srun", f"""
            [[ $* != *--overlap* ]] || {{ echo overlap >>{folder}/calls; exit 1; }}
            printf '%s\\n' "$*" >>{folder}/calls; {srun}""")
        program(folder / "bin", "scancel", f'echo "scancel $*" >>{folder}/calls; kill -TERM $(cat {folder}/srun.pid)')
        program(folder / "bin", "scontrol", f"""
            case $* in
                'show hostnames '*) echo node1; echo node2 ;;
                'show node '*) echo 'NodeName=node1 CoresPerSocket=1 NodeAddr=10.0.0.1 Port=6818' ;;
                'show job '*) echo 'JobId=9 JobState=RUNNING Reason=None PreemptTime={preempted}' \\
                    'RunTime={run_time} TimeLimit=1-00:00:00 X=1' ;;
                requeue*) echo "scontrol $*" >>{folder}/calls; {requeue} ;;
            esac""")
        program(folder / "bin", "sleep", f"""
            [ "$1" != 600 ] || echo "waits for its end" >>{folder}/calls
            exec "$(type -aP sleep | tail -n 1)" "$@\"""")
        submission = folder / "demo-1"
        submission.mkdir()
        (submission / "tasks").write_text(f"demo layer --run-dir /a\ndemo power --run-dir '{folder}/b c'\n")
        (submission / "submission.sh").write_text(f"PN_SITE={SLURM / 'site.example.sh'}\n")
        self.process = subprocess.Popen(
            ["bash", str(SLURM / "train.sbatch"), str(toy.ROOT), str(submission)], text=True, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, start_new_session=True,
            env={**os.environ, "PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}", "SLURM_JOB_ID": "123456",
                 "SLURM_ARRAY_JOB_ID": "100", "SLURM_ARRAY_TASK_ID": "1", "SLURM_JOB_NODELIST": "node[1-2]",
                 "SLURM_JOB_NUM_NODES": str(nodes), "SLURM_RESTART_COUNT": "2"})

    def wait_for(self, text):
        end = time.time() + 300
        while not (self.folder / "calls").exists() or text not in (self.folder / "calls").read_text():
            assert time.time() < end and self.process.poll() is None, text
            time.sleep(0.05)  # a look at a file, not a guess at how long something takes

    def end(self):
        output, _ = self.process.communicate(timeout=300)
        assert (self.folder / "calls").exists(), output
        return self.process.returncode, output, (self.folder / "calls").read_text()

    def kill(self):
        os.killpg(self.process.pid, signal.SIGKILL)
        return self.end()


@pytest.fixture
def job(tmp_path):
    """Starts a job, whose processes do not survive the test."""
    started = []

    def start(srun, **options):
        started.append(Job(tmp_path, srun, **options))
        return started[-1]

    yield start
    for job in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(job.process.pid, signal.SIGKILL)


def trains(folder, status):
    """An srun that trains until it is stopped, and says when it does."""
    return (f"trap 'exit {status}' TERM; echo $$ >{folder}/srun.pid; echo training >>{folder}/calls; "
            "while :; do sleep 0.1; done")


def test_job_that_ends(job):
    """The job's own line of the submission is trained, on the first node's address and a port of the job's; status 0."""
    status, output, calls = job("exit 0").end()
    assert status == 0 and "requeue" not in calls
    command = "bash scripts/launch.sh demo power --run-dir .*/b c --submission demo-1 --master 10.0.0.1:23456\n"
    assert re.search(command, calls)
    assert "--kill-on-bad-exit=1" in calls and "job 100_1, restart 2, on node[1-2]" in output


def test_job_that_fails_by_its_own_error(job):
    """It ends with the error's status, and is not requeued."""
    status, output, calls = job("echo boom; exit 3").end()
    assert status == 3 and "requeue" not in calls and "boom" in output and "status 3" in output


def test_job_that_is_warned(job, tmp_path):
    """USR1 ends the ranks and requeues this task of the array, once; the script does not leave before SLURM ends it."""
    job = job(trains(tmp_path, 143))
    job.wait_for("training")
    os.kill(job.process.pid, signal.SIGUSR1)
    job.wait_for("scontrol requeue 100_1\nwaits for its end\n")
    assert job.process.poll() is None
    status, output, calls = job.kill()
    assert calls.count("requeue") == 1 and "scancel --signal=TERM 123456.0\n" in calls
    assert "requeueing job 100_1: time limit or preemption" in output


@pytest.mark.parametrize("saved", [True, False])
def test_job_whose_time_limit_is_too_short(job, tmp_path, saved):
    """At the time limit a job in which a checkpoint was saved is requeued; one that would never get so far ends."""
    job = job(trains(tmp_path, 143), run_time="23:57:30")
    job.wait_for("training")
    checkpoints = tmp_path / "b c" / "checkpoints"
    checkpoints.mkdir(parents=True)
    (checkpoints / "checkpoint_1_5.pt").write_text("")
    if not saved:
        os.utime(checkpoints / "checkpoint_1_5.pt", (1e9, 1e9))  # by the session before
    os.kill(job.process.pid, signal.SIGUSR1)
    if saved:
        job.wait_for("scontrol requeue 100_1\n")
        return
    status, output, calls = job.end()
    assert status == 1 and "requeue" not in calls
    assert "no checkpoint was saved within the time limit, 1-00:00:00; not requeued" in output


def test_job_that_cannot_be_requeued(job, tmp_path):
    """It ends with a status other than 0 and the reason."""
    job = job(trains(tmp_path, 143), requeue="echo 'slurm_requeue error: denied'; exit 1")
    job.wait_for("training")
    os.kill(job.process.pid, signal.SIGUSR1)
    status, output, _ = job.end()
    assert status == 1 and "denied" in output and "ERROR: job 100_1 could not be requeued" in output


@pytest.mark.slow
@pytest.mark.parametrize("late", [True, False])
def test_job_warned_when_it_has_finished(job, tmp_path, late):
    """USR1 in the moment in which training ends well: the job has ended well. late: it has ended while USR1 is handled."""
    job = job(trains(tmp_path, 0))
    if late:
        scancel = tmp_path / "bin" / "scancel"
        scancel.write_text(scancel.read_text() + "sleep 1\n")
    job.wait_for("training")
    os.kill(job.process.pid, signal.SIGUSR1)
    status, _, calls = job.end()
    assert status == 0 and "requeue" not in calls


def test_job_preempted_without_a_warning(job):
    """Where SLURM ends the ranks only, it requeues the job itself at the end of the grace time: the script waits for it."""
    job = job("exit 143", preempted="2030-01-01T00:00:00")
    for line in job.process.stdout:
        if "job 100_1 is preempted" in line:
            break
    job.wait_for("waits for its end\n")
    assert job.process.poll() is None
    assert "requeue" not in job.kill()[2]


def test_job_that_lost_a_node(job):
    """Ranks that fail on several nodes of which one does not answer: requeued, for SLURM notices much later."""
    job = job("exit 1", nodes=2)
    job.wait_for("scontrol requeue 100_1\n")
    assert "one of its nodes does not answer" in job.kill()[1]


# ---- status.sh -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_status(scripts, tmp_path):
    """Each state is told from the files of a run: updates of how many, validation loss, time left, checkpoint, restarts."""
    import fcntl

    def run(name, statuses, finished=False, saved=((10, True), (20, True))):
        folder = tmp_path / "some" / name
        (folder / "checkpoints").mkdir(parents=True)
        (folder / "run.json").write_text(json.dumps({"sessions": [{"exit_status": status} for status in statuses]}))
        (folder / "config.yaml").write_text("model:\n  max_update: 7\noptimization:\n  lr:\n  - 0.1\n  max_update: 100\n")
        log = ""
        for updates, whole in saved:
            path = folder / "checkpoints" / f"checkpoint_1_{updates}.pt"
            log += json.dumps({"epoch": 1, "valid_loss": f"{updates / 10}", "valid_num_updates": f"{updates}"}) + "\n"
            torch.save({"optimizer_history": [{"num_updates": updates}], "extra_state": {}}, path)
            if not whole:
                os.truncate(path, 50)
        (folder / "train.log").write_text(log + 'x | {"epoch": 1, "loss": "2.5", "num_updates": "25", "ups": "0.5"}\n')
        if finished:
            (folder / "finished.json").write_text('{"updates": 100}')
        return folder

    run("a-finished", [0], finished=True)
    run("b-killed", [None])
    run("c-stopped", [-15, -15, -9])
    run("d-failed", [None, 1])
    run("e-cut", [None], saved=((10, True), (20, False)))
    run("f-running", [None, None])
    run("g-evaluated", [0], finished=True)
    diverged = run("l-diverged", [3]) / "run.json"
    diverged.write_text(diverged.read_text().replace("3", '3, "diverged": "the training loss is nan"'))
    ahead = run("m-ahead", [None])  # its log was lost with the process that wrote it
    torch.save({"optimizer_history": [{"num_updates": 60}]}, ahead / "checkpoints" / "checkpoint_last.pt")
    for name, text in (("h-half", "{"), ("i-other", "[]"), ("j-older", '{"sessions": [{}]}')):
        (tmp_path / "some" / name).mkdir()
        (tmp_path / "some" / name / "run.json").write_text(text)
    (tmp_path / "some" / ".k-claimed.job").write_text("[]")
    (tmp_path / "some" / "run.json" / "loop").mkdir(parents=True)
    (tmp_path / "some" / "run.json" / "loop" / "loop").symlink_to(tmp_path)
    with contextlib.ExitStack() as stack:
        for name in ("f-running", "g-evaluated"):
            lock = stack.enter_context(open(tmp_path / "some" / f".{name}.lock", "w"))
            fcntl.flock(lock, fcntl.LOCK_EX)
        lines = scripts.here("status", str(tmp_path)).splitlines()
    odd = [line for line in lines if " unreadable: " in line]
    assert [line.split()[0] for line in odd] == ["h-half", "i-other", "j-older", "k-claimed"]
    lines = [line for line in lines if line not in odd]
    rows = {line.split()[0]: re.split(r" {2,}", line) for line in lines[2:]}
    assert [row[1] for row in rows.values()] == [
        "finished", "interrupted", "interrupted", "failed", "interrupted", "running", "finished (in evaluation)",
        "diverged", "interrupted"]
    assert rows["m-ahead"][2] == "60 of 100" and "checkpoint_last.pt (60 updates, " in rows["m-ahead"][4]
    assert all(row[2:4] == ["25 of 100", "2.0"] for name, row in rows.items() if name != "m-ahead")
    assert [row[-1] for row in rows.values()] == ["0", "0", "2", "1", "0", "1", "0", "0", "0"]
    assert rows["f-running"][4] == "2 min" and "checkpoint_1_20.pt (20 updates, " in rows["f-running"][5]
    assert any("checkpoint_1_10.pt (10 updates, " in cell for cell in rows["e-cut"]), "only whole checkpoints count"
    assert "no runs in" in scripts.here("status", str(scripts.programs))
    assert "is not a directory" in scripts.refuses("status", str(tmp_path / "none"))


# ---- a real SLURM --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(bool(slurm_cluster.missing()), reason="SLURM is not installed: see tests/checks/slurm.sh --install")
def test_on_a_real_slurm():
    """The README's command on a real SLURM of two nodes: preemption, time limit and a lost node, with the end of undisturbed
    runs; tests/checks/slurm.sh says what it checks."""
    done = toy.command("bash", "tests/checks/slurm.sh", "--lean", timeout=600, PYTHON=sys.executable)
    steps = [line for line in done.stdout.splitlines() if line.startswith("ok ")]
    assert "bit for bit" in done.stdout and len(steps) >= 12, done.stdout
