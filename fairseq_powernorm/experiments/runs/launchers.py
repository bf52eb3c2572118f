"""The ways to start the ranks of a run: torchrun on each machine, or SLURM's tasks."""

import os
import socket
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

from ..errors import UserError, number
from ..overrides import by_key
from ..tools import cpus
from . import claims

PORT = 29400
MOST_RANKS = 16  # of a processor
SLURM_PATIENCE = 600  # seconds for what a requeued job left behind, on a node that does not answer, to end
RANK = Path(__file__).with_name("rank.py")
#: settings that are the launcher's, which alone knows the places of the ranks
PLACES = tuple(f"distributed_training.{key}" for key in (
    "distributed_world_size", "distributed_rank", "distributed_init_method", "distributed_port", "distributed_backend",
    "distributed_no_spawn", "device_id"))
WORLD_SIZE = PLACES[0]


class Launcher:
    """What the training asks of a way to start ranks.

    leads: does this process hold the run's lock and write its records? One process of a run does. counts_cpu: are all ranks
    children of this process? patience: seconds to wait for the run's lock. world: number of ranks, known after
    check_devices().
    """

    patience = 1.0
    counts_cpu = True
    leads: bool
    world: int

    def check_overrides(self, overrides: Sequence[str]) -> None:
        """Refuses overrides that are the launcher's own."""
        self.given = by_key(overrides)
        for key in PLACES:
            if key in self.given:
                raise UserError(f"override {key} is launch.sh's own; use --ranks, --nodes, --node-rank and --master")

    def check_claim(self, run: Path) -> None:
        """Refuses a run that another job will train."""

    def place(self, gpus: Optional[int]) -> None:
        """Finds the number of ranks and where they are; gpus: those that this process sees, None on a CPU."""
        raise NotImplementedError

    def command(self, command: List[str], logs: Path) -> Tuple[List[str], Dict[str, str]]:
        """The command that starts the ranks of this process, and its environment; logs: where those of other ranks go."""
        raise NotImplementedError

    def check_devices(self, config: Any) -> int:
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

    def distributed(self, method: str) -> List[str]:
        """The overrides that all ranks share."""
        if self.world == 1:
            return ["distributed_training.distributed_world_size=1"]
        return [f"distributed_training.{key}={value}" for key, value in (
            ("distributed_world_size", self.world), ("distributed_init_method", method), ("distributed_no_spawn", "true"),
            ("distributed_backend", "nccl" if self.on_gpu else "gloo"), ("ddp_backend", self.backend))]

    def environment(self, ranks_here: int) -> Dict[str, str]:
        """The environment of the ranks: the machine's processors shared out, unless OMP_NUM_THREADS says otherwise."""
        return {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or str(max(1, cpus() // ranks_here))}

    def facts(self) -> Dict[str, Any]:
        """What a session of run.json says of it."""
        return {"ranks": self.world}


class Torchrun(Launcher):
    """Ranks on this machine, or on machines on each of which somebody starts the same command."""

    def __init__(self, ranks: Optional[int], nodes: int, node: int, master: Optional[Tuple[str, int]]):
        self.ranks, self.nodes, self.node, self.master = ranks, nodes, node, master
        self.leads, self.counts_cpu = node == 0, nodes == 1

    def place(self, gpus: Optional[int]) -> None:
        if gpus is None and self.ranks is None:
            raise UserError("--ranks R: this is a run on a CPU; give the number of ranks on this machine")
        self.ranks_here = self.ranks or gpus or 1
        if gpus is None and self.ranks_here > MOST_RANKS * cpus():
            raise UserError(f"--ranks {self.ranks_here}: this machine has {cpus()} processors; valid: 1 to "
                            f"{MOST_RANKS * cpus()}")
        if gpus is not None and self.ranks_here > gpus:
            raise UserError(f"--ranks {self.ranks_here}: {gpus} GPU{'s are' if gpus > 1 else ' is'} visible on this machine "
                            f"(CUDA_VISIBLE_DEVICES); a rank needs one of its own, or common.cpu=true")
        self.world = self.ranks_here * self.nodes

    def command(self, command: List[str], logs: Path) -> Tuple[List[str], Dict[str, str]]:
        command = [*command, *self.distributed("env://")]
        if self.world == 1:
            return command, self.environment(1)
        where = ["--standalone"]
        if self.master is not None:
            where = [f"--nnodes={self.nodes}", f"--node-rank={self.node}", f"--master-addr={self.master[0]}",
                     f"--master-port={self.master[1]}"]
        return [sys.executable, "-m", "torch.distributed.run", *where, f"--nproc-per-node={self.ranks_here}", "--no-python",
                sys.executable, str(RANK), str(self.world), str(logs), "", *command], self.environment(self.ranks_here)


class Slurm(Launcher):
    """One rank, a task of the job step that train.sbatch starts."""

    patience = SLURM_PATIENCE
    counts_cpu = False

    def __init__(self, submission: str, master: Optional[str]):
        try:
            self.rank, self.world, self.local, nodes = (int(os.environ[f"SLURM_{name}"]) for name in (
                "PROCID", "STEP_NUM_TASKS", "LOCALID", "STEP_NUM_NODES"))
            job()
        except KeyError as error:
            raise UserError(f"--submission is for tasks of train.sbatch: {error.args[0]} is not set") from None
        except ValueError as error:
            raise UserError(f"--submission is for tasks of train.sbatch, to which SLURM gives numbers: {error}") from None
        if self.world > 1 and master is None:
            raise UserError(f"--submission {submission!r}: {self.world} tasks need --master HOST:PORT, where they meet")
        self.submission, self.master = submission, master
        self.leads, self.here = self.rank == 0, self.world // nodes

    def check_claim(self, run: Path) -> None:
        claim = claims.read_claim(run)
        if claim and claim["submission"] != self.submission:
            raise UserError(f"{run} belongs to another job now: {claim['submission']}, not {self.submission}")

    def place(self, gpus: Optional[int]) -> None:
        if gpus is None and not self.cpu:
            raise UserError("this task sees no GPU (PN_GRES of the site file asks for them); to train on processors: "
                            "common.cpu=true")
        # SLURM shows a task its own GPU only, or all of the job's on this node, as the site has set it up.
        if gpus is not None and gpus > 1 and gpus < self.here:
            raise UserError(f"{self.here} tasks of this job have {gpus} GPUs on this node: a rank needs one of its own")
        self.device = self.local if gpus is not None and gpus > 1 else 0

    def command(self, command: List[str], logs: Path) -> Tuple[List[str], Dict[str, str]]:
        command = [*command, *self.distributed(f"tcp://{self.master}")]
        environment = {**self.environment(1), "RANK": str(self.rank), "WORLD_SIZE": str(self.world),
                       "LOCAL_RANK": str(self.device)}
        if self.world == 1:
            del environment["RANK"], environment["WORLD_SIZE"], environment["LOCAL_RANK"]
            return command, environment
        tag = f"{job()}-restart{restart()}-"
        return [sys.executable, str(RANK), str(self.world), str(logs), tag, *command], environment

    def facts(self) -> Dict[str, Any]:
        return {"ranks": self.world, "job": job(), "restart": restart()}


def job() -> str:
    """What SLURM calls this task."""
    return f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"


def restart() -> int:
    """How often this task has been requeued."""
    return int(os.environ.get("SLURM_RESTART_COUNT") or 0)


def launcher_of(options: Namespace) -> Launcher:
    """What the options choose to start ranks; refuses those that do not go together."""
    if options.submission is not None:
        return Slurm(options.submission, options.master)
    if options.nodes is None and (options.node_rank is not None or options.master is not None):
        raise UserError("--node-rank and --master say where this machine stands among several: give --nodes N as well")
    nodes, node = options.nodes or 1, options.node_rank or 0
    if nodes > 1 and (options.node_rank is None or options.master is None):
        raise UserError(f"--nodes {nodes}: each of the {nodes} machines needs --node-rank I, from 0 to {nodes - 1}, and the "
                        f"same --master HOST[:PORT], the machine of --node-rank 0")
    if node >= nodes:
        raise UserError(f"--node-rank {node}: must be from 0 to {nodes - 1} with --nodes {nodes}")
    return Torchrun(options.ranks, nodes, node, address(options.master) if nodes > 1 else None)


def address(text: str) -> Tuple[str, int]:
    """(host, port) of HOST[:PORT]"""
    host, _, rest = text.partition(":")
    port = number("--master, its port", rest or str(PORT), 1, 65535)
    try:
        socket.getaddrinfo(host or "?", port)
    except (OSError, UnicodeError):
        raise UserError(f"--master {text!r}: the host {host!r} is unknown on this machine") from None
    return host, port
