"""One rank of a run, in the place that torchrun or SLURM gave it: python rank.py WORLD LOGS TAG fairseq-hydra-train ...

Adds to the command what differs between ranks, and becomes it. Its end follows that of the process that started it.
"""

import ctypes
import os
import signal
import sys
import time
from typing import List, NoReturn

PR_SET_PDEATHSIG = 1


def main(world: str, logs: str, tag: str, command: List[str]) -> NoReturn:
    rank = int(os.environ["RANK"])
    if os.environ["WORLD_SIZE"] != world:
        sys.exit(f"error: rank {rank} was told of {world} ranks, but {os.environ['WORLD_SIZE']} were started: "
                 f"--nodes and --ranks must be the same on every machine")
    if sys.platform == "linux":
        # a rank whose launcher was killed would train on without the others, and without the run's lock
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if rank:
        # rank 0's output is the run's log
        os.makedirs(logs, exist_ok=True)
        log = os.open(os.path.join(logs, f"{tag}rank{rank}.log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        os.write(log, time.strftime(f"== rank {rank} of {world}, %Y-%m-%d %H:%M:%S\n").encode())
        os.dup2(log, 1)
        os.dup2(log, 2)
        command = [*command, "hydra.output_subdir=null"]
    os.execv(command[0], [*command, f"distributed_training.distributed_rank={rank}",
                          f"distributed_training.device_id={os.environ['LOCAL_RANK']}"])


if __name__ == "__main__":
    _, world, logs, tag, *command = sys.argv
    main(world, logs, tag, command)
