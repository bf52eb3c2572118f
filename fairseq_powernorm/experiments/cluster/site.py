"""A cluster's settings: scripts/slurm/site.example.sh, and the file that stands for it."""

import os
import re
import subprocess
from argparse import Namespace
from pathlib import Path
from typing import List

from ..errors import UserError, number
from ..paths import ROOT

SCRIPTS = ROOT / "scripts" / "slurm"
SITE = ("PN_ACCOUNT", "PN_PARTITION", "PN_TIME", "PN_CPUS_PER_TASK", "PN_GRES", "PN_WARNING")


def seconds(option: str, text: str) -> int:
    """The length of a time as sbatch takes it: M, M:S, H:M:S, D-H, D-H:M or D-H:M:S."""
    found = re.fullmatch(r"(?:([0-9]+)-)?([0-9]+)(?::([0-9]+))?(?::([0-9]+))?", text)
    if not found:
        raise UserError(f"{option} {text!r} is no time limit; valid: MINUTES, HOURS:MINUTES:SECONDS, DAYS-HOURS")
    days, first, second, third = (int(group or 0) for group in found.groups())
    if found[1] is not None or found[4] is not None:
        return days * 86400 + first * 3600 + second * 60 + third
    return first * 60 + second


class Site:
    """A cluster's settings: those of site.example.sh where the file does not give its own.

    options: --site, --time and --partition, which go before the file's
    """

    def __init__(self, options: Namespace):
        chosen = options.site or os.environ.get("PN_SLURM_SITE")
        usual = SCRIPTS / "site.sh"
        self.path = Path(os.path.abspath(chosen or (usual if usual.exists() else SCRIPTS / "site.example.sh")))
        if not self.path.is_file():
            raise UserError(f"site file {self.path} does not exist; copy scripts/slurm/site.example.sh there")
        # what the file itself prints goes to stderr
        script = ("exec 3>&1 >&2; set -eu; . \"$1\"; . \"$2\"; printf '%s\\0' " + " ".join(f'"${name}"' for name in SITE)
                  + ' "${#PN_CONTAINER[@]}" ${PN_SBATCH[@]+"${PN_SBATCH[@]}"} >&3')
        done = subprocess.run(["bash", "-c", script, "site", str(SCRIPTS / "site.example.sh"), str(self.path)],
                              capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL)
        values = done.stdout.split("\0")[:-1]
        if done.returncode or len(values) <= len(SITE):
            raise UserError(f"site file {self.path} does not work: "
                            f"{' '.join(done.stderr.split()) or f'exit status {done.returncode}'}")
        self.account, self.partition, self.time, cpus, self.gres, warning, container = values[:7]
        self.sbatch = values[7:]
        self.cpus, self.warning = (number(f"{name} of {self.path}", value, 1) for name, value in (
            ("PN_CPUS_PER_TASK", cpus), ("PN_WARNING", warning)))
        self.container = container != "0"
        self.partition = options.partition or self.partition
        option, limit = ("--time", options.time) if options.time else (f"PN_TIME of {self.path}", self.time)
        # SLURM looks every half minute and warns as much earlier
        if limit and seconds(option, limit) <= self.warning + 30:
            raise UserError(f"{option} {limit}: must be more than {self.warning + 30} s, for a job stops and requeues "
                            f"itself {self.warning} s before its limit (PN_WARNING of {self.path}), and up to 30 s earlier")
        self.time = limit

    def options(self, per_node: int) -> List[str]:
        """The options of sbatch that every job has."""
        chosen = [("account", self.account), ("partition", self.partition), ("time", self.time),
                  ("cpus-per-task", self.cpus), ("gres", f"{self.gres}:{per_node}" if self.gres else "")]
        return [*(f"--{name}={value}" for name, value in chosen if value), *self.sbatch]
