"""``python -m fairseq_powernorm.experiments.reproduce``, or ``scripts/reproduce_*.sh``:
trains, evaluates and reports the rows of the paper's tables.
"""

import argparse
import os
from pathlib import Path
from typing import List, Optional

from .commands import Parser, add_slurm, main, number_from, one_of, words_of
from .paths import ROOT
from .reports import matrix
from .runs.launchers import PLACES
from .trust import OURS as TRAINING

ROWS = {
    "table1": """
        Trains and evaluates every row of the paper's Table 1 (machine translation) and writes the table.

        The rows are LN, BN as in the authors' code (batch-reference), BN with true masked statistics (batch), PN-V, and PN
        as in the authors' code (reference) and as in the paper (algorithm2). Each norm but LN is placed in the encoder,
        as the authors do, and in all positions; each of these but batch-reference with and without layer scale.
        """,
    "table2": """
        Trains and evaluates every row of the paper's Table 2 (language modelling) and writes the table.

        The rows are LN, BN as in the authors' code (batch-reference), BN with true masked statistics (batch), PN-V, and PN
        as in the authors' code (reference) and as in the paper (algorithm2), all in all positions; each but LN and
        batch-reference with and without layer scale.
        """,
    "figures": """
        Draws the paper's figures: 1, the distance between batch and running statistics during training; 2, the gradient
        through the statistics; 3, the singular values of the embedding matrix; 4, the learning curves. Two more are
        not in the paper: 5, how far evaluation is from training for each norm with running statistics; 6, the gradients
        of PN-V and BN compared, and nu. The command trains and evaluates the runs that the figures need (LN, BN, PN-V and
        PN), which are also those of the tables.
        """,
}
FILES = {
    "table1": "The report is results/table1-BENCH[-UPDATES].{html,md,csv} with pictures and their data beside it.",
    "table2": "The report is results/table2-BENCH[-UPDATES].{html,md,csv} with pictures and their data beside it.",
    "figures": """The pictures are results/figures-BENCH[-UPDATES].BENCH-ARCH.figure[1-6].png. Their data lie beside them in
        results/figures-BENCH[-UPDATES].figures.json, so that --report-only can draw them again without the runs.""",
}
EPILOG = """
        Without --slurm each run has at most one GPU; with it, the G GPUs of a run share the batches that one GPU would
        have. The runs go to runs/BENCH/ROW[-ARCH]-UPDATES-seedS ($PN_RUNS_ROOT/BENCH/...), their records to
        results/BENCH/ROW[-ARCH]-UPDATES-seedS.json. UPDATES is early-stop if only early stopping ends training; ARCH
        appears if the benchmark has several.
        {files}

        Run again, the command continues where it was interrupted, run by run. Started twice at the same time, the two share
        the runs. With --slurm, nothing is queued for a run that has a record or a job already. A run that fails does not
        stop the others; it is named at the end, and the exit status is 1.
        """
ROW_NAMES = {
    "table1": "only these rows, such as power-all-groups0. A row is NORM[-all][-algorithm2][-groups0]: -all for all "
    "positions, -algorithm2 for the paper's algorithm, -groups0 for no layer scale. The word all: the rows of every norm; "
    "default: those of the paper's norms, or of --norms",
    "table2": "only these rows, such as power-groups0. A row is NORM[-algorithm2][-groups0]: -algorithm2 for the paper's "
    "algorithm, -groups0 for no layer scale. The word all: the rows of every norm; default: those of the paper's norms, or "
    "of --norms",
    "figures": f"the rows to compare; default: {','.join(matrix.FIGURE_ROWS)}",
}


def parser(subject: str) -> Parser:
    """The options of the command that reproduces one of matrix.SUBJECTS."""
    paper, others, seeds = matrix.SUBJECTS[subject]
    made = Parser(ROWS[subject], EPILOG.format(files=FILES[subject]), subcommand=subject)
    more = f"; also {', '.join(others)}" if others else ""
    made.add("--benchmark", metavar="LIST", help=f"the benchmarks; default: {','.join(paper)}{more}")
    made.add("--archs", metavar="LIST",
             help="the architectures; default: the paper's. Beside the tensorized Transformers, ptb has "
             "transformer_lm_pn_ptb and wikitext103 has transformer_lm_pn_wiki103")
    made.add("--norms", metavar="LIST", help=f"only the rows of these norms, a choice of {', '.join(matrix.NORMS)}")
    made.add("--rows", metavar="LIST", help=ROW_NAMES[subject])
    made.add("--seeds", help=f"default: {','.join(map(str, seeds))}")
    made.add("--updates", metavar="N", read=number_from(10, matrix.MOST_UPDATES),
             help="updates of each run, instead of optimization.max_update in configs/BENCH.yaml. Warm-ups, other settings "
             "that count updates, and the number of epochs averaged shrink in proportion; where only early stopping "
             "ends training, in proportion to 100,000 (iwslt14) or 30,000 (wmt14)")
    made.add("--jobs", metavar="N", read=number_from(1),
             help="number of runs at a time, on the CPU; if more than one, each has one thread unless OMP_NUM_THREADS is "
             "set; default: 1")
    made.add("--gpu-ids", metavar="LIST", read=words_of(),
             help="run on these GPUs of this machine, such as 0,1,2,3, one run at a time on each")
    made.add("--slurm", flag=True,
             help="queue the runs on a cluster with SLURM, an evaluation after each and the report after all of them")
    made.add("--results", metavar="DIR", help="where the records and the report go; default: results")
    made.add("--dry-run", help="the size of an update, every command with an estimate of its GPU hours, and the total")
    made.add("--report-only", flag=True, help="write the report from the records that exist")
    for name in ("--tensorboard", "--wandb"):
        made.add(name)
    add_slurm(made)
    made.add_overrides("hydra overrides for every run, such as common.cpu=true or common.fp16=true",
                       {**dict.fromkeys((*TRAINING, *PLACES)), **matrix.OURS})
    return made


def parse(arguments: List[str]) -> argparse.Namespace:
    """The options of a command line, the first word of which is one of matrix.SUBJECTS."""
    whole = Parser("Trains, evaluates and reports the runs of one of the paper's tables, or draws its figures.")
    whole.add("subject", metavar="SUBJECT", read=one_of(*matrix.SUBJECTS),
              help=f"{', '.join(matrix.SUBJECTS)}; what each of them takes: SUBJECT --help")
    subject: str = whole.parse(arguments[:1]).subject
    options = parser(subject).parse(arguments[1:])
    options.subject = subject
    options.results = Path(os.path.abspath(options.results or ROOT / "results"))
    for name in ("site", "log_dir"):  # a relative path is one from where the user is
        if getattr(options, name):
            setattr(options, name, os.path.abspath(getattr(options, name)))
    return options


def command(arguments: List[str]) -> Optional[int]:
    """Reproduces what a command line asks for."""
    options = parse(arguments)
    from .reports.reproduce import reproduce

    return reproduce(options)


if __name__ == "__main__":
    main(command)
