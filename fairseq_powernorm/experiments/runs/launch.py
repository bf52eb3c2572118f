"""Trains one run on several ranks."""

import socket
from argparse import Namespace
from typing import Any, Sequence, Tuple

from ..commands import Parser, number_from
from ..errors import UserError, number
from . import train
from .launchers import Launcher, Slurm, Torchrun

PORT = 29400


def parse(arguments: Sequence[str]) -> Tuple[Launcher, Namespace, Any]:
    """(what starts the ranks, options of train.sh, the benchmark's configuration)"""
    parser = Parser(
        """
        Trains one model on several ranks, a process each: the GPUs of this machine, its processors, or those of many
        machines.
        """,
        """
        All machines need the prepared data, the same checkout and a common file system for the run directory.
        Interrupted, a run goes on with --resume on all machines. rank 0's output is train.log, that of the others logs/.
        """,
        train.BATCH)
    parser.add("--ranks", metavar="R", read=number_from(1), group="ranks",
               help="ranks on this machine; default: its visible GPUs. Ranks without a GPU: common.cpu=true")
    parser.add("--nodes", metavar="N", read=number_from(1), group="ranks",
               help="machines (default: 1); the same command is started on each of them, with the next two options")
    parser.add("--node-rank", metavar="I", read=number_from(0), group="ranks",
               help="the number of the machine, from 0; the first one writes the run's records")
    parser.add("--master", metavar="HOST:PORT", group="ranks",
               help=f"the first machine, and a free port there (default port: {PORT})")
    parser.add("--submission", metavar="NAME", group="ranks",
               help="be one rank, a task of that submission's job: scripts/slurm/train.sbatch says so")
    train.add_run(parser)
    options = parser.parse(arguments)
    return launcher_of(options), options, train.checked(options)


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


def launch(arguments: Sequence[str]) -> int:
    """Trains; gives the exit status."""
    launcher, options, config = parse(arguments)
    return train.carry_out(options, config, launcher)
