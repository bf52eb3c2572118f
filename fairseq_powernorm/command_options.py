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
    "--arch": Option("another architecture than that of configs/BENCH.yaml, with the settings of configs/BENCH/ARCH.yaml: "
                     "ptb has transformer_lm_pn_ptb, wikitext103 has transformer_lm_pn_wiki103; text of your own for "
                     "translation has transformer_pn_tiny and transformer_pn_wmt_en_de", "ARCH"),
    "--available": Option("where something is missing, go on with what is there", kind="flag"),
    "--check": Option("end with exit status 1 if something is not as it ought to be", kind="flag"),
    "--dry-run": Option("print what would be done, and do nothing", kind="flag"),
    "--force": Option("make the result again, in place of what is there", kind="flag"),
    "--gpus": Option("GPUs of each run on a cluster, all nodes together, with a rank (a task) each; default: one per node. "
                     "An update takes as much as on one: they share out optimization.update_freq, which G must divide",
                     "G", "number", (1, MOST), instead="which GPUs of this machine: --gpu-ids LIST"),
    "--log-dir": Option("a log for each job; default: logs/ in the submission's directory", "DIR"),
    "--nodes": Option("machines of each run; default: 1", "N", "number", (1, MOST)),
    "--output": Option("the file to write", "FILE"),
    "--partition": Option("of the cluster; default: the site's", "P"),
    "--placement": Option("encoder (NORM in the encoder's layers, layer in the decoder's, as in the paper) or all; default: "
                          "encoder, and all for language models, which have NORM in all positions", "WHERE"),
    "--resume": Option("go on with a run that is there, with the overrides it was started with and any new ones; start one "
                       "that is not; leave one that has finished as it is", kind="flag"),
    "--run-dir": Option("default: runs/BENCH/NORM[-all][-ARCH]-seedS ($PN_RUNS_ROOT/BENCH/...), ARCH if it is not the "
                        "default", "DIR"),
    "--seeds": Option("a run with each of these seeds, such as 1,2,3", "LIST", "seeds", names=("--array-seeds",)),
    "--site": Option("the cluster's settings; default: $PN_SLURM_SITE, scripts/slurm/site.sh or, where that is missing, "
                     "scripts/slurm/site.example.sh", "FILE"),
    "--subset": Option("a part of the data: train, valid or test", "NAME"),
    "--tensorboard": Option("also write the curves for TensorBoard, to tensorboard/ in the run's directory or, with "
                            "--tensorboard=DIR, to DIR/BENCH/RUN", "DIR", "optional"),
    "--time": Option("time limit of a job, as sbatch takes it; default: the site's. A run may need longer: its job stops "
                     "before the limit and requeues itself", "T"),
    "--wandb": Option("also send the curves to that project of Weights & Biases, as the run RUN of the group BENCH/RUN "
                      "without its seed; a run that is gone on with stays one", "PROJECT"),
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
