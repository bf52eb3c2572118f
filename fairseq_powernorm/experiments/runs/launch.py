"""Trains one run on several ranks: see scripts/launch.sh."""

import argparse
import os
import socket
import sys
from pathlib import Path

from ..errors import UserError, number
from ..files import read_json, write_json
from ..tools import cpus
from . import compose, train

PORT = 29400
SLURM_PATIENCE = 600  # seconds for what a requeued job left behind, on a node that does not answer, to end
EVALUATION = "-evaluation"  # the evaluations' job is named as the submission, and so
RANK = Path(__file__).with_name("rank.py")


def parse(arguments):
    """(launcher, arguments of train.sh)"""
    parser = argparse.ArgumentParser(prog="scripts/launch.sh", add_help=False, allow_abbrev=False)
    for name in ("ranks", "nodes", "node-rank", "master"):
        parser.add_argument(f"--{name}")
    parser.add_argument("--slurm", metavar="SUBMISSION")
    options, rest = parser.parse_known_args(arguments)
    return launcher_of(options), rest


def launcher_of(options):
    if options.slurm is not None:
        return Slurm(options.slurm, options.master)
    if options.nodes is None and (options.node_rank is not None or options.master is not None):
        raise UserError("--node-rank and --master say where this machine stands among several: give --nodes N as well")
    ranks = None if options.ranks is None else number("--ranks", options.ranks, 1)
    nodes = 1 if options.nodes is None else number("--nodes", options.nodes, 1)
    if nodes > 1 and (options.node_rank is None or options.master is None):
        raise UserError(f"--nodes {nodes}: each of the {nodes} machines needs --node-rank I, from 0 to {nodes - 1}, and the "
                        f"same --master HOST[:PORT], the machine of --node-rank 0")
    node = number("--node-rank", options.node_rank or "0", 0)
    if node >= nodes:
        raise UserError(f"--node-rank {node}: must be from 0 to {nodes - 1} with --nodes {nodes}")
    return Torchrun(ranks, nodes, node, address(options.master) if nodes > 1 else None)


def address(text):
    """(host, port) of HOST[:PORT]"""
    host, _, port = text.partition(":")
    port = number("--master, its port", port or str(PORT), 1, 65535)
    try:
        socket.getaddrinfo(host or "?", port)
    except (OSError, UnicodeError):
        raise UserError(f"--master {text!r}: the host {host!r} is unknown on this machine") from None
    return host, port


class Launcher:
    """What train.py asks of a way to start ranks.

    leads: does this process hold the run's lock and write its records? One process of a run does. counts_cpu: are all ranks
    children of this process? world: number of ranks, known after check_devices().
    """

    patience = 1.0
    counts_cpu = True

    def check_overrides(self, overrides):
        """Refuses overrides that are the launcher's own."""
        self.given = compose.by_key(overrides)
        for key in train.PLACES:
            if key in self.given:
                raise UserError(f"override {key} is launch.sh's own; use --ranks, --nodes, --node-rank and --master")

    def check_claim(self, run):
        """Refuses a run that another job will train."""

    def check_devices(self, config):
        """Gives the number of ranks; refuses if this machine cannot have its part of them."""
        import torch

        self.cpu = config.common.cpu
        self.on_gpu = torch.cuda.is_available() and not self.cpu
        self.place(torch.cuda.device_count() if self.on_gpu else None)
        self.backend = config.distributed_training.ddp_backend
        if not self.on_gpu and self.backend == "pytorch_ddp":
            if "distributed_training.ddp_backend" in self.given:
                raise UserError("distributed_training.ddp_backend=pytorch_ddp needs GPUs in fairseq; on a CPU: legacy_ddp")
            self.backend = "legacy_ddp"
        return self.world

    def distributed(self, method):
        """The overrides that all ranks share."""
        if self.world == 1:
            return ["distributed_training.distributed_world_size=1"]
        return [f"distributed_training.{key}={value}" for key, value in (
            ("distributed_world_size", self.world), ("distributed_init_method", method), ("distributed_no_spawn", "true"),
            ("distributed_backend", "nccl" if self.on_gpu else "gloo"), ("ddp_backend", self.backend))]

    def environment(self, ranks_here):
        """The environment of the ranks: the machine's processors shared out, unless OMP_NUM_THREADS says otherwise."""
        return {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or str(max(1, cpus() // ranks_here))}

    def facts(self):
        """What a session of run.json says of it."""
        return {"ranks": self.world}


class Torchrun(Launcher):
    """Ranks on this machine, or on machines on each of which somebody starts the same command."""

    def __init__(self, ranks, nodes, node, master):
        self.ranks, self.nodes, self.node, self.master = ranks, nodes, node, master
        self.leads, self.counts_cpu = node == 0, nodes == 1

    def place(self, gpus):
        if gpus is None and self.ranks is None:
            raise UserError("--ranks R: this is a run on a CPU; give the number of ranks on this machine")
        self.ranks = self.ranks or gpus
        if gpus is not None and self.ranks > gpus:
            raise UserError(f"--ranks {self.ranks}: {gpus} GPU{'s are' if gpus > 1 else ' is'} visible on this machine "
                            f"(CUDA_VISIBLE_DEVICES); a rank needs one of its own, or common.cpu=true")
        self.world = self.ranks * self.nodes

    def command(self, command, logs):
        command = [*command, *self.distributed("env://")]
        if self.world == 1:
            return command, self.environment(1)
        where = ["--standalone"]
        if self.nodes > 1:
            where = [f"--nnodes={self.nodes}", f"--node-rank={self.node}", f"--master-addr={self.master[0]}",
                     f"--master-port={self.master[1]}"]
        return [sys.executable, "-m", "torch.distributed.run", *where, f"--nproc-per-node={self.ranks}", "--no-python",
                sys.executable, str(RANK), str(self.world), str(logs), "", *command], self.environment(self.ranks)


class Slurm(Launcher):
    """One rank, a task of the job step that train.sbatch starts."""

    patience = SLURM_PATIENCE
    counts_cpu = False

    def __init__(self, submission, master):
        try:
            self.rank, self.world, self.local, nodes = (int(os.environ[f"SLURM_{name}"]) for name in (
                "PROCID", "STEP_NUM_TASKS", "LOCALID", "STEP_NUM_NODES"))
        except KeyError as error:
            raise UserError(f"--slurm is for tasks that train.sbatch starts with srun: {error.args[0]} is not set") from None
        self.submission, self.master = submission, master
        self.leads, self.here = self.rank == 0, self.world // nodes

    def check_claim(self, run):
        claim = read_claim(run)
        if claim and claim["submission"] != self.submission:
            raise UserError(f"{run} belongs to another job now: {claim['submission']}, not {self.submission}")

    def place(self, gpus):
        if gpus is None and not self.cpu:
            raise UserError("this task sees no GPU (PN_GRES of the site file asks for them); to train on processors: "
                            "common.cpu=true")
        # SLURM shows a task its own GPU only, or all of the job's on this node, as the site has set it up.
        if gpus is not None and gpus > 1 and gpus < self.here:
            raise UserError(f"{self.here} tasks of this job have {gpus} GPUs on this node: a rank needs one of its own")
        self.device = self.local if gpus is not None and gpus > 1 else 0

    def command(self, command, logs):
        command = [*command, *self.distributed(f"tcp://{self.master}")]
        environment = {**self.environment(1), "RANK": str(self.rank), "WORLD_SIZE": str(self.world),
                       "LOCAL_RANK": str(self.device)}
        if self.world == 1:
            del environment["RANK"], environment["WORLD_SIZE"], environment["LOCAL_RANK"]
            return command, environment
        tag = f"{job()}-restart{restart()}-"
        return [sys.executable, str(RANK), str(self.world), str(logs), tag, *command], environment

    def facts(self):
        return {"ranks": self.world, "job": job(), "restart": restart()}


def job():
    return f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"


def restart():
    return int(os.environ.get("SLURM_RESTART_COUNT") or 0)


# A submission lays claim to the directories of its runs, so that no two jobs train in one. A claim is worth as much as the
# job that it names: who finds one asks SLURM.


def claim_path(run):
    return run.with_name(f".{run.name}.job")


def read_claim(run):
    path = claim_path(run)
    claim = read_json(path) if path.exists() else None
    if claim is not None and not (isinstance(claim, dict) and {"submission", "task"} <= claim.keys()):
        raise UserError(f"{path} does not say which job it belongs to; if none does, remove it")
    return claim


def write_claim(run, submission, task):
    claim_path(run).parent.mkdir(parents=True, exist_ok=True)
    write_json(claim_path(run), {"submission": submission, "task": task})
    return claim_path(run)


def jobs_of(run, queue):
    """The jobs of the queue (slurm.tasks()) that train a run and that evaluate it, as far as they have not ended."""
    claim = read_claim(run)
    found = [queue.get((claim["submission"] + kind, claim["task"])) for kind in ("", EVALUATION)] if claim else []
    return [job for job in found if job]


def launch(arguments):
    launcher, rest = parse(arguments)
    return train.train(rest, launcher)
