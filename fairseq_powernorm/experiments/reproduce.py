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

        The rows: LN; BN by the authors' code (batch-reference) and with true masked statistics (batch), PN-V and PN,
        each in the encoder, as the authors have them, and in all positions, all but batch-reference with and without
        layer scale; PN by the authors' code (reference) and by the paper (algorithm2).
        """,
    "table2": """
        Trains and evaluates every row of the paper's Table 2 (language modelling) and writes the table.

        The rows: LN; BN by the authors' code (batch-reference) and with true masked statistics (batch), PN-V and PN
        in all positions, all but batch-reference with and without layer scale; PN by the authors' code (reference)
        and by the paper (algorithm2).
        """,
    "figures": """
        Draws the paper's figures: 1, the distance of batch and running statistics along training; 2, the gradient
        through the statistics; 3, the singular values of the embedding matrix; 4, the learning curves. It trains and
        evaluates the runs they need, LN, BN, PN-V and PN, which are those of the tables.
        """,
}
FILES = {
    "table1": "The report is results/table1-BENCH[-UPDATES].{html,md,csv} with pictures and their data beside it.",
    "table2": "The report is results/table2-BENCH[-UPDATES].{html,md,csv} with pictures and their data beside it.",
    "figures": """The pictures are results/figures-BENCH[-UPDATES].BENCH-ARCH.figure[1-6].png, their data beside them in
        results/figures-BENCH[-UPDATES].figures.json, so that --report-only draws them again without the runs.""",
}
EPILOG = """
        Without --slurm a run has one GPU at most; with it, its G GPUs share out the batches of one. UPDATES in names
        is early-stop where only early stopping ends training, ARCH is named where the benchmark has several. The runs
        lie in runs/BENCH/ROW[-ARCH]-UPDATES-seedS ($PN_RUNS_ROOT/BENCH/...), their records in
        results/BENCH/ROW[-ARCH]-UPDATES-seedS.json.
        {files}

        Run again, it goes on where it was interrupted, run by run; started twice, the two share the runs; with
        --slurm, nothing is queued for a run that has a record, or a job. A run that fails does not stop the others:
        it is named at the end, and the exit status is 1.
        """
ROW_NAMES = {
    "table1": "these rows only, NORM[-all][-algorithm2][-groups0]: in all positions, by the paper's algorithm, without "
    "layer scale (groups0), such as power-all-groups0; all: of every norm; default: of the paper's norms, or of --norms",
    "table2": "these rows only, NORM[-algorithm2][-groups0]: by the paper's algorithm, without layer scale; all: of every "
    "norm; default: of the paper's norms, or of --norms",
    "figures": f"the rows that are compared; default: {','.join(matrix.FIGURE_ROWS)}",
}


def parser(subject: str) -> Parser:
    """The options of the command that reproduces one of matrix.SUBJECTS."""
    paper, others, seeds = matrix.SUBJECTS[subject]
    made = Parser(ROWS[subject], EPILOG.format(files=FILES[subject]), subcommand=subject)
    more = f"; also {', '.join(others)}" if others else ""
    made.add("--benchmark", metavar="LIST", help=f"default: {','.join(paper)}{more}")
    made.add("--archs", metavar="LIST",
             help="default: the paper's; for language models, beside the tensorized Transformers, transformer_lm_pn_ptb of "
             "ptb and transformer_lm_pn_wiki103 of wikitext103")
    made.add("--norms", metavar="LIST", help=f"the rows of these norms only, of {','.join(matrix.NORMS)}")
    made.add("--rows", metavar="LIST", help=ROW_NAMES[subject])
    made.add("--seeds", help=f"default: {','.join(map(str, seeds))}")
    made.add("--updates", metavar="N", read=number_from(10, matrix.MOST_UPDATES),
             help="updates of each run instead of optimization.max_update of configs/BENCH.yaml; warm-ups and all that is "
             "counted in updates, and the number of epochs averaged, shrink in proportion: to 100,000 (iwslt14) or 30,000 "
             "(wmt14) where only early stopping ends training")
    made.add("--jobs", metavar="N", read=number_from(1),
             help="runs at a time, on the CPU, a thread each unless OMP_NUM_THREADS is set; default: 1")
    made.add("--gpu-ids", metavar="LIST", read=words_of(),
             help="a run at a time on each of these GPUs of this machine, such as 0,1,2,3")
    made.add("--slurm", flag=True,
             help="queue the runs on a cluster with SLURM, an evaluation of each and, behind all, the report")
    made.add("--results", metavar="DIR", help="where records and report go; default: results")
    made.add("--dry-run", help="what an update takes, every command with an estimate of its GPU hours, and the total")
    made.add("--report-only", flag=True, help="write the report of the records that there are")
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
    return options


def command(arguments: List[str]) -> Optional[int]:
    """Reproduces what a command line asks for."""
    options = parse(arguments)
    from .reports.reproduce import reproduce

    return reproduce(options)


if __name__ == "__main__":
    main(command)
