"""Trains one run: see scripts/train.sh, and scripts/launch.sh for several ranks."""

import argparse
import collections
import contextlib
import importlib.util
import os
import resource
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from ..directories import locked
from ..errors import UserError, choose
from ..evaluation import perplexity
from ..files import read_json, sha256, write_json
from ..paths import runs_root
from ..settings import (
    CONFIGS,
    NORMS,
    architectures,
    benchmarks,
    is_lm,
    load,
    norm_in_names,
    norm_name,
    placements,
    prepared,
)
from ..tools import cpus, tool
from . import batch, checkpoints, compose, trainlog

SCHEMA = 1
# Given by train.sh itself; another value would take the run's files away from its directory.
OURS = {"checkpoint.save_dir": "--run-dir DIR", "task.data": "PN_DATA_ROOT", "common.user_dir": "another checkout",
        "common.tensorboard_logdir": "--tensorboard"}
# Given by the launcher, which alone knows the places of the ranks.
PLACES = tuple(f"distributed_training.{key}" for key in (
    "distributed_world_size", "distributed_rank", "distributed_init_method", "distributed_port", "distributed_backend",
    "distributed_no_spawn", "device_id"))
WORLD_SIZE = PLACES[0]
STOP_PATIENCE = 10  # seconds from SIGTERM to SIGKILL


def parse(arguments):
    parser = argparse.ArgumentParser(prog="scripts/train.sh", add_help=False, allow_abbrev=False)
    parser.add_argument("benchmark")
    parser.add_argument("norm")
    parser.add_argument("--arch")
    parser.add_argument("--placement")
    parser.add_argument("--run-dir")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--tensorboard", action="store_true")
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_intermixed_args(arguments)
    choose("benchmark", options.benchmark, benchmarks())
    choose("norm", norm_name(options.norm), NORMS)
    valid = architectures(options.benchmark)
    options.arch = choose("--arch", options.arch or valid[0], valid)
    config = load(options.benchmark)
    valid = placements(config.model)
    if is_lm(config) and options.placement == "encoder":
        raise UserError(f"--placement 'encoder': {options.benchmark} trains a language model, which has no encoder; "
                        f"valid: {', '.join(valid)}")
    options.placement = choose("--placement", options.placement or valid[0], valid)
    for override in options.overrides:
        if "=" not in override and not override.startswith("~"):
            raise UserError(f"{override!r} is no hydra override; an override reads KEY=VALUE, such as common.seed=2")
    for key, instead in OURS.items():
        if key in compose.by_key(options.overrides):
            raise UserError(f"override {key} is train.sh's own; use {instead}")
    if options.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise UserError(f"--tensorboard: {sys.executable} has no tensorboard; install it with: pip install tensorboard")
    if options.tensorboard:
        options.overrides.append("common.tensorboard_logdir=tensorboard")  # in the run's directory, where hydra goes
    return options, config


def train(arguments, launcher=None):
    """Trains in one process, or in those that a launcher (see launch.py) starts."""
    options, config = parse(arguments)
    if launcher is None:
        refuse_several_processes()
    else:
        launcher.check_overrides(options.overrides)
    data, _ = prepared(options.benchmark)
    run = run_directory(options, config)
    leads = launcher is None or launcher.leads
    if leads and begun(run) and not options.resume:
        raise UserError(f"{run} exists already; --resume goes on with it, --run-dir DIR chooses another")
    with contextlib.ExitStack() as stack:
        lock = None
        if leads:
            lock = stack.enter_context(locked(run, *([launcher.patience] if launcher else [])))
        if launcher:
            launcher.check_claim(run)
        facts = started(options, data, run)
        finished = run / "finished.json"
        if finished.is_file() and read_json(finished)["overrides"] == facts["overrides"]:
            print(f"{run} has finished ({read_json(finished)['updates']:,} updates); nothing to do")
            return 0
        complete, resolved, facts["parameters"] = composed(options, config, facts, data, run)
        world = check_world(resolved, compose.by_key(facts["overrides"]), launcher)
        complete += [] if launcher else [f"{WORLD_SIZE}={world}"]
        complete += batch.overrides(resolved, world)
        if is_lm(resolved):
            perplexity.check(resolved)
        command = [tool("fairseq-hydra-train"), "--config-dir", str(CONFIGS), "--config-name", options.benchmark,
                   f"hydra.run.dir={compose.quote(run)}", "hydra.output_subdir=hydra", "hydra/job_logging=stdout", *complete]
        if leads:
            print(f"{options.benchmark}: {batch.described(resolved, world)}", flush=True)
        return session(run, facts, command, resolved, lock, launcher)


def run_directory(options, config):
    """RUN: --run-dir, or NORM[-PLACEMENT][-ARCH]-seedS under the runs' root; defaults are not named."""
    if options.run_dir:
        return Path(os.path.abspath(options.run_dir))
    seed = compose.by_key(options.overrides).get("common.seed", f"={config.common.seed}").split("=", 1)[1]
    chosen = [norm_in_names(options.norm)]
    for value, default in ((options.placement, placements(config.model)[0]),
                           (options.arch, architectures(options.benchmark)[0])):
        chosen += [value] if value != default else []
    return runs_root() / options.benchmark / f"{'-'.join(chosen)}-seed{seed}"


def begun(run):
    """Does the run's directory hold anything but what is there before run.json: other ranks' logs, a part of it?"""
    return run.exists() and any(path.name not in ("logs", "run.json.partial") for path in run.iterdir())


def started(options, data, run):
    """run.json of a run that begins, or of that to go on with."""
    facts = {"schema": SCHEMA, "benchmark": options.benchmark, "arch": options.arch, "norm": options.norm,
             "placement": options.placement, "prepared_sha256": sha256(data / "prepared.json"),
             "overrides": options.overrides, "sessions": []}
    return resumed(run, facts) if begun(run) else facts


def resumed(run, wanted):
    """run.json of the run to go on with, new overrides added; refuses if it was started as something else."""
    if not (run / "run.json").is_file():
        raise UserError(f"cannot go on with {run}: it was not made by scripts/train.sh (it has no run.json)")
    facts = read_json(run / "run.json")
    facts.setdefault("arch", architectures(wanted["benchmark"])[0])  # older runs have the default
    for key in ("schema", "benchmark", "arch", "norm", "placement"):
        if facts.get(key) != wanted[key]:
            raise UserError(f"cannot go on with {run}: it was started with {key} {facts.get(key)!r}, not {wanted[key]!r}")
    if facts["prepared_sha256"] != wanted["prepared_sha256"]:
        raise UserError(f"cannot go on with {run}: the prepared data has changed since it was started")
    merged = {**compose.by_key(facts["overrides"]), **compose.by_key(wanted["overrides"])}
    return {**facts, "overrides": list(merged.values())}


def composed(options, config, facts, data, run):
    """(overrides, configuration, number of parameters) of a run: see compose.resolved()."""
    overrides = [*compose.arch_overrides(options.benchmark, options.arch),
                 *compose.norm_overrides(config.model, options.norm, options.placement), *facts["overrides"]]
    complete, resolved, parameters = compose.resolved(options.benchmark, overrides, data / "data-bin", run / "checkpoints")
    saving = resolved.checkpoint
    if saving.save_interval_updates > 0 and saving.keep_interval_updates < 1:
        raise UserError(f"checkpoint.save_interval_updates={saving.save_interval_updates} without "
                        f"checkpoint.keep_interval_updates fills the disk; give the number to keep, 1 or more")
    return complete, resolved, parameters


def refuse_several_processes():
    """train.sh is one process; several of it, started by torchrun or srun, would train apart."""
    for starter, variable in (("torchrun", "WORLD_SIZE"), ("srun", "SLURM_STEP_NUM_TASKS")):
        if os.environ.get(variable, "1") not in ("", "1"):
            raise UserError(f"{starter} started {os.environ[variable]} processes ({variable}), and each would train a model "
                            f"of its own; scripts/launch.sh or scripts/slurm/submit.sh starts ranks that train one")


def check_world(config, overrides, launcher):
    """The number of ranks: the launcher's, or one unless an override asks for more; refuses what this machine has not."""
    import torch

    if launcher is not None:
        return launcher.check_devices(config)
    world = config.distributed_training.distributed_world_size if WORLD_SIZE in overrides else 1
    on_gpu = torch.cuda.is_available() and not config.common.cpu
    if world > 1 and (not on_gpu or world > torch.cuda.device_count()):
        raise UserError(f"{WORLD_SIZE}={world}: "
                        f"{f'{torch.cuda.device_count()} GPUs are visible' if on_gpu else 'this is a CPU run'}; "
                        f"use scripts/launch.sh --ranks {world}")
    return world


def session(run, facts, command, config, lock, launcher=None):
    """Trains until the end, an error or a signal; shows progress in short and logs everything. Gives the exit status."""
    from omegaconf import OmegaConf

    environment = None
    if launcher is not None:
        command, environment = launcher.command(command, run / "logs")
    if lock is None:  # another process leads the run, and writes its records
        return follow(command, environment)
    run.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileNotFoundError):
        (run / "finished.json").unlink()
    this = {"command": command, "threads": int((environment or os.environ).get("OMP_NUM_THREADS") or cpus()),
            **(launcher.facts() if launcher else {}),
            "wall_s": None, "cpu_s": None, "exit_status": None}  # null to the end of a session that is killed
    if facts["sessions"]:
        drop_statistics(run, config)
    facts["sessions"].append(this)
    write_json(run / "run.json", facts)
    (run / "config.yaml").write_text(OmegaConf.to_yaml(config), encoding="utf-8")
    with open(run / "command.txt", "a", encoding="utf-8") as stream:
        stream.write(shlex.join(command) + "\n")
    max_update = config.optimization.max_update
    remark = perplexity.remark(config.model) if is_lm(config) else ""
    if remark:
        print(f"these perplexities are {remark}", flush=True)
    print(f"training {run}: {facts['parameters']:,} parameters; everything is logged in {run / 'train.log'}", flush=True)

    begin, cpu = time.time(), children_cpu()
    # The child holds the lock as well: should this process be killed, nobody else can train there until it ends, too.
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
                               pass_fds=(lock.fileno(),), env=environment)
    stopped = stop_with_us(process)
    tail = collections.deque(maxlen=20)
    try:
        with open(run / "train.log", "a", encoding="utf-8") as log, Rhythm() as rhythm:
            for line in process.stdout:
                log.write(line)
                log.flush()
                tail.append(line)
                short = trainlog.brief(line.rstrip("\n"), max_update, remark)
                if short is not None:
                    rhythm.show(short)
    except OSError as error:  # a disk that is full, or nobody who reads what is shown
        stop(process)
        process.stdout.close()
        process.wait()
        raise UserError(f"{error.strerror}: progress can no longer be shown and logged in {run / 'train.log'}; training was "
                        f"stopped, and --resume goes on with it") from None
    status = process.wait()
    if stopped and status:
        status = -stopped[0]  # whatever the launcher made of it
    counted = launcher is None or launcher.counts_cpu
    this.update(wall_s=round(time.time() - begin, 1), cpu_s=round(children_cpu() - cpu, 1) if counted else None,
                exit_status=status)
    write_json(run / "run.json", facts)
    if status:
        print(f"the last lines of {run / 'train.log'}:\n{''.join(tail)}", file=sys.stderr)
        for path in sorted((run / "logs").glob("*rank*.log")):
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)[-5:]
            if lines and path.stat().st_mtime >= begin:
                print(f"the last lines of {path}:\n{''.join(lines)}", end="", file=sys.stderr)
        print(f"error: training stopped with exit status {status}; --resume goes on with it", file=sys.stderr)
        return status if status > 0 else 128 - status
    updates = trainlog.updates(trainlog.curve(run / "train.log"))
    write_json(run / "finished.json", {"updates": updates, "overrides": facts["overrides"]})
    print(f"finished {run}: {updates:,} updates in {this['wall_s'] / 60:.1f} min")
    return 0


def drop_statistics(run, config):
    """Removes the run's own record of statistics (--norm-record) if no checkpoint is whole: training begins anew."""
    record = config.task.get("norm_record")
    path = Path(os.path.abspath(run / record)) if record else run
    if run in path.parents and not any(map(checkpoints.intact, (run / "checkpoints").glob("checkpoint*.pt"))):
        with contextlib.suppress(FileNotFoundError):
            path.unlink()


def follow(command, environment):
    """Trains along with the process that leads the run; gives the exit status."""
    process = subprocess.Popen(command, env=environment)
    stopped = stop_with_us(process)
    status = process.wait()
    if stopped and status:
        status = -stopped[0]
    return status if status >= 0 else 128 - status


def stop_with_us(process):
    """Lets SIGTERM and SIGINT to this process end the other, too; gives the list of signals that have come."""
    stopped = []

    def pass_on(number, _frame):
        stopped.append(number)
        stop(process)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, pass_on)
    return stopped


def stop(process):
    """Ends another process, by force if it takes its time."""
    process.terminate()
    timer = threading.Timer(STOP_PATIENCE, process.kill)
    timer.daemon = True
    timer.start()


class Rhythm:
    """Shows lines of progress, and says so where none has come for $PN_PROGRESS_SECONDS (60)."""

    def __enter__(self):
        self.seconds = float(os.environ.get("PN_PROGRESS_SECONDS") or 60)
        self.last, self.time, self.over = "nothing yet", time.monotonic(), threading.Event()
        self.thread = threading.Thread(target=self.beat, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.over.set()
        self.thread.join()

    def show(self, line):
        self.last, self.time = line.strip(), time.monotonic()
        print(line, flush=True)

    def beat(self):
        while not self.over.wait(self.seconds):
            silent = time.monotonic() - self.time
            if silent >= self.seconds:
                print(f"  at work, without news for {silent:.0f} s; the last: {self.last}", flush=True)


def children_cpu():
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime
