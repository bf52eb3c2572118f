"""``python -m fairseq_powernorm.experiments COMMAND [ARGUMENTS]``."""

import importlib
import sys
from typing import List

from .settings import choose, main

#: command -> the module and the function that it is, and what it does
COMMANDS = {
    "prepare": ("data.prepare", "prepare_or_refuse", "makes a benchmark's data ready for training"),
    "train": ("runs.train", "train", "trains one model"),
    "launch": ("runs.launch", "launch", "trains one model on several ranks"),
    "status": ("runs.status", "status", "shows how runs are doing"),
    "evaluate": ("evaluation.evaluate", "evaluate", "evaluates a trained model and writes its record"),
    "score": ("evaluation.score", "score", "scores translations against a reference"),
    "submit": ("cluster.submit", "submit", "queues runs on a cluster with SLURM"),
    "reproduce": ("reports.reproduce", "reproduce", "trains, evaluates and reports the rows of the paper's tables"),
    "table": ("reports.table", "table", "prints the table of records"),
    "plot_curves": ("reports.plot_curves", "plot", "draws the learning curves of records"),
    "schema": ("reports.schema", "check_files", "checks that files are valid records"),
    "report": ("reports.report", "readme", "writes the tables of README.md from the records"),
}


def run(arguments: List[str]) -> int:
    """Runs a command with its arguments and gives its exit status; without one, lists the commands."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: python -m fairseq_powernorm.experiments COMMAND [ARGUMENTS]\n")
        print("\n".join(f"  {name:<13}{purpose}" for name, (_, _, purpose) in COMMANDS.items()))
        return 0
    module, function, _ = COMMANDS[choose("command", arguments[0], tuple(COMMANDS))]
    return getattr(importlib.import_module(f".{module}", __package__), function)(arguments[1:])


if __name__ == "__main__":
    main(run, sys.argv[1:])
