"""The options that several commands have: one name, one meaning, one kind of value, whichever command it is.

A command says with :func:`add` (argparse) or with ``experiments.commands.Parser.add`` only what is its own: what the option
is by default there, or what it comes to. ``tests/experiments/test_options.py`` walks all commands.
"""

import argparse
import os
from typing import Any, Dict, NamedTuple, Optional, Tuple

#: ranks, machines, GPUs of a run
MOST = 65535


class Option(NamedTuple):
    """What an option means.

    Attributes:
        help: what it is for; a command may add more, behind a semicolon
        metavar: what stands for its value, None where it takes none
        kind: "flag", "text", "seeds" or "number"; or "optional", a text that only stands behind "="
        limits: the smallest and the largest value of a number
        names: earlier names, which still work
        instead: where else to look, for who gives a value that is no number
    """

    help: str
    metavar: Optional[str] = None
    kind: str = "text"
    limits: Tuple[int, Optional[int]] = (1, None)
    names: Tuple[str, ...] = ()
    instead: str = ""


OPTIONS: Dict[str, Option] = {
    "--arch": Option("an architecture other than that of configs/BENCH.yaml, with the settings of configs/BENCH/ARCH.yaml: "
                     "ptb has transformer_lm_pn_ptb, wikitext103 has transformer_lm_pn_wiki103; translation of your own "
                     "text has transformer_pn_tiny and transformer_pn_wmt_en_de", "ARCH"),
    "--available": Option("if something is missing, continue with what is there", kind="flag"),
    "--check": Option("end with exit status 1 if a check fails", kind="flag"),
    "--dry-run": Option("print what would be done, and do nothing", kind="flag"),
    "--force": Option("replace a result that already exists", kind="flag"),
    "--gpus": Option("GPUs of each run on a cluster, over all its nodes, with one rank (task) each; default: one per node. "
                     "An update covers as many tokens as on one GPU: they share optimization.update_freq, which G must "
                     "divide",
                     "G", "number", (1, MOST), instead="which GPUs of this machine: --gpu-ids LIST"),
    "--log-dir": Option("where the log of each job goes; default: logs/ in the submission's directory", "DIR"),
    "--nodes": Option("number of machines for each run; default: 1", "N", "number", (1, MOST)),
    "--output": Option("the file to write", "FILE"),
    "--partition": Option("the cluster's partition; default: that of the site file", "P"),
    "--placement": Option("where NORM stands: encoder (in the encoder's layers, with layer in the decoder's, as in the "
                          "paper) or all; default: encoder; for language models always all", "WHERE"),
    "--resume": Option("continue a run that already exists, with the overrides it was started with and any new ones; start "
                       "one that does not exist yet; leave a finished one as it is", kind="flag"),
    "--run-dir": Option("the run's directory; default: runs/BENCH/NORM[-all][-ARCH]-seedS ($PN_RUNS_ROOT/BENCH/...), with "
                        "ARCH if it is not the default one", "DIR"),
    "--seeds": Option("one run for each of these seeds, such as 1,2,3", "LIST", "seeds", names=("--array-seeds",)),
    "--site": Option("the cluster's settings; default: $PN_SLURM_SITE, else scripts/slurm/site.sh, else "
                     "scripts/slurm/site.example.sh", "FILE"),
    "--subset": Option("the part of the data: train, valid or test", "NAME"),
    "--tensorboard": Option("also write the curves for TensorBoard: to tensorboard/ in the run's directory or, with "
                            "--tensorboard=DIR, to DIR/BENCH/RUN", "DIR", "optional"),
    "--time": Option("time limit of a job, in the form that sbatch takes; default: that of the site file. A run may need "
                     "longer: its job stops before the limit and requeues itself", "T"),
    "--wandb": Option("also send the curves to this project of Weights & Biases, as run RUN in the group BENCH/RUN without "
                      "its seed; a run that is resumed remains one run there", "PROJECT"),
}


def meaning(name: str, more: str = "") -> str:
    """The help of an option of OPTIONS, with what a command adds."""
    return "; ".join(filter(None, [OPTIONS[name].help, more]))


def add(parser: argparse.ArgumentParser, name: str, more: str = "", **keywords: Any) -> None:
    """Adds an option of OPTIONS, a text or a flag, to a plain parser.

    Args:
        more: what it comes to in this command
        keywords: of ``add_argument``, beside its help
    """
    option = OPTIONS[name]
    if option.kind == "flag":
        keywords["action"] = "store_true"
    else:
        keywords["metavar"] = option.metavar
    parser.add_argument(name, *option.names, help=meaning(name, more).replace("%", "%%"), **keywords)


def check_output(path: str, overwrite: bool) -> None:
    """Raise ValueError if ``path`` exists and must not be overwritten, is no file that could be, or its directory does not
    exist.
    """
    if os.path.exists(path) and not os.path.isfile(path):  # as root, a device would be replaced as well
        raise ValueError(f"output {path!r}: is not a file, which it would have to be to be replaced; choose another name")
    if os.path.exists(path) and not overwrite:
        raise ValueError(f"output {path!r}: exists; choose another name or give --force")
    if not os.path.isdir(os.path.dirname(os.path.abspath(path))):
        raise ValueError(f"output {path!r}: its directory does not exist")
