"""``python -m fairseq_powernorm.experiments.quickstart``, or ``scripts/quickstart.sh``: compares PN with LN on the demo."""

import subprocess
from typing import Sequence

from .commands import Parser, main
from .paths import ROOT, runs_root
from .plot_curves import command as plot_curves
from .table import command as table
from .tools import tied

NORMS = ("power", "layer")


def parser() -> Parser:
    """The options of the command."""
    return Parser(
        'Goes from a fresh checkout to a comparison of PN and LN on the artificial corpus "demo": BLEU and learning curves.',
        "It takes at most ten minutes on two cores once everything is downloaded. Run again, it continues where it stopped.",
    )


def command(arguments: Sequence[str]) -> int:
    """Prepares, trains, evaluates and compares; gives the exit status of the first step that fails."""
    parser().parse(arguments)
    runs = runs_root() / "quickstart"
    picture, records = runs / "valid_loss.png", [str(runs / norm / "evaluation" / "record.json") for norm in NORMS]
    steps = [("data", ["prepare.sh", "demo"])]
    for norm in NORMS:
        steps.append((f"training: {norm}", ["train.sh", "demo", norm, "--run-dir", str(runs / norm), "--resume"]))
        steps.append((f"evaluation: {norm}", ["evaluate.sh", str(runs / norm)]))
    for title, (script, *words) in steps:
        print(f"== {title}", flush=True)
        status = carry_out(["bash", str(ROOT / "scripts" / script), *words])
        if status:
            return status if status > 0 else 128 - status
    print("== result", flush=True)
    table(records)
    plot_curves([*records, "--output", str(picture)])
    print(f"""
The demo corpus is artificial: it shows that everything works, not which norm is better.
  learning curves   {picture}
  models and logs   {runs}/{{{','.join(NORMS)}}}/
  translations      evaluation/hyp.detok beside evaluation/ref.detok in each of them
Next, a real benchmark: bash scripts/prepare.sh multi30k && bash scripts/train.sh multi30k power""")
    return 0


def carry_out(command: Sequence[str]) -> int:
    """Runs a command to its end; one that is interrupted is ended first, as it wants to."""
    process = subprocess.Popen(tied(command))
    try:
        return process.wait()
    except KeyboardInterrupt:
        process.terminate()
        process.wait()
        raise


if __name__ == "__main__":
    main(command)
