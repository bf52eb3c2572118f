"""A real SLURM of one machine in a directory of its own, for tests: no root, no systemd, no munge, no accounting.

Needs Debian's packages slurmctld, slurmd and slurm-client (written for 22.05). GPUs are fake: SLURM counts them and
nobody can compute with them. Partition ``low`` is preempted by partition ``high``, after a signal and a grace time.
"""

import contextlib
import os
import pwd
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "squeue", "scontrol", "scancel", "sinfo")
PATHS = ("/usr/sbin", "/usr/local/sbin")  # of the daemons, not in every user's PATH
GRACE = 15  # seconds

CONFIGURATION = """
ClusterName=powernorm
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/none
CredType=cred/none
AuthInfo=cred_expire=5
StateSaveLocation={home}/state
SlurmctldPidFile={home}/slurmctld.pid
SlurmctldLogFile={home}/slurmctld.log
SlurmdSpoolDir={home}/spool.%n
SlurmdPidFile={home}/slurmd.%n.pid
SlurmdLogFile={home}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SlurmctldParameters=preempt_send_user_signal
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
KillWait=5
SlurmdTimeout=10
ReturnToService=2
JobCompType=jobcomp/none
AccountingStorageType=accounting_storage/none
{nodes}
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 GraceTime={grace} MaxTime=60 PreemptMode=REQUEUE
PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF MaxTime=60
"""


def missing():
    """The programs of SLURM that this machine lacks."""
    path = os.pathsep.join((os.environ.get("PATH", ""), *PATHS))
    return [name for name in PROGRAMS if shutil.which(name, path=path) is None]


def free_ports(number):
    """Ports that nobody listens on."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def parent(pid):
    """The process that started another; 0 if that has ended."""
    with contextlib.suppress(OSError):
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return 0


def comm(pid):
    """A process's name; empty if it has ended."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text().strip()
    return ""


class Cluster:
    """A context: the daemons run inside it; ``environment`` is for the clients. home: a directory that exists."""

    def __init__(self, home, nodes=1, gpus=2, cpus=8):
        self.home, self.daemons = Path(home), {}
        self.nodes = ["localhost"] if nodes == 1 else [f"pn{i + 1}" for i in range(nodes)]
        port, *ports = free_ports(1 + nodes)
        lines = [f"NodeName={name} NodeAddr=127.0.0.1 Port={its} CPUs={cpus} RealMemory=1000 Gres=gpu:{gpus}"
                 for name, its in zip(self.nodes, ports)]
        user = pwd.getpwuid(os.getuid()).pw_name
        (self.home / "slurm.conf").write_text(CONFIGURATION.format(
            port=port, user=user, home=self.home, nodes="\n".join(lines), grace=GRACE))
        (self.home / "gres.conf").write_text("".join(
            f"NodeName={name} Name=gpu File=/dev/tty[0-{gpus - 1}]\n" for name in self.nodes))
        (self.home / "state").mkdir()
        for name in self.nodes:
            (self.home / f"spool.{name}").mkdir()
        self.environment = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM", "SBATCH"))}
        self.environment.update(SLURM_CONF=str(self.home / "slurm.conf"),
                                PATH=os.pathsep.join((os.environ.get("PATH", ""), *PATHS)))

    def __enter__(self):
        try:
            self.start("slurmctld", "-D")
            for name in self.nodes:
                self.start_node(name)
            self.wait(lambda: self.client("sinfo", "-h", "-o", "%T %D").split() == ["idle", str(len(self.nodes))], 30,
                      "the nodes to be idle")
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_):
        self.stop()

    def start(self, name, *arguments):
        with open(self.home / f"{name}.out", "a") as output:
            self.daemons[" ".join((name, *arguments[2:]))] = subprocess.Popen(
                [shutil.which(name, path=self.environment["PATH"]), *arguments], stdout=output, stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL, env=self.environment, start_new_session=True)

    def start_node(self, name):
        self.start("slurmd", "-D", "-N", name)

    def kill_node(self, name, everything=False):
        """Kills a node's daemon without warning; with everything, its jobs as well, as when the machine goes down."""
        daemon = self.daemons.pop(f"slurmd {name}")
        daemon.kill()
        daemon.wait()
        if everything:
            jobs = list(self.processes(node=name))
            # their supervisors first, or these would report the end of the jobs
            for pid in [*{parent(pid) for pid in jobs if comm(parent(pid)) == "slurmstepd"}, *jobs]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def processes(self, node=None):
        """The processes that belong to this cluster, and to no other: the environment that they were started with."""
        mark = f"SLURM_CONF={self.home / 'slurm.conf'}".encode()
        on_node = None if node is None else f"SLURMD_NODENAME={node}".encode()
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and int(entry.name) != os.getpid():
                with contextlib.suppress(OSError):
                    variables = (entry / "environ").read_bytes().split(b"\0")
                    if mark in variables and (on_node is None or on_node in variables):
                        yield int(entry.name)

    def client(self, *command, check=True):
        """Output of a client of SLURM."""
        done = subprocess.run([str(word) for word in command], env=self.environment, text=True, timeout=60,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        if check and done.returncode:
            raise RuntimeError(f"{' '.join(map(str, command))}: exit status {done.returncode}: {done.stdout}")
        return done.stdout

    def wait(self, condition, seconds, what):
        """Waits until condition() is true; gives its value."""
        end = time.time() + seconds
        while True:
            with contextlib.suppress(RuntimeError, subprocess.TimeoutExpired):
                found = condition()
                if found:
                    return found
            if time.time() > end:
                raise TimeoutError(f"waited {seconds} s for {what}")
            time.sleep(0.2)

    def stop(self):
        """Ends all jobs, then the daemons, then whatever is left of them."""
        with contextlib.suppress(Exception):
            self.client("scancel", "-u", pwd.getpwuid(os.getuid()).pw_name)
            self.wait(lambda: not self.client("squeue", "-h"), 10, "jobs to end")
        for daemon in self.daemons.values():
            daemon.terminate()
        for daemon in self.daemons.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                daemon.wait(5)
        for pid in list(self.processes()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for daemon in self.daemons.values():
            daemon.wait()
