"""``python -m fairseq_powernorm.experiments.evaluate``, or ``scripts/evaluate.sh``:
evaluates a trained model and writes its record.
"""

from argparse import Namespace
from pathlib import Path
from typing import Sequence

from .commands import Parser, main, number_from, one_of
from .errors import UserError


def parser() -> Parser:
    """The options of the command."""
    made = Parser(
        """
        Averages the last checkpoints of a run, translates a subset, scores the translation, and writes one JSON record.
        For a language model it takes the checkpoint with the lowest validation loss and computes the perplexity, word by
        word, of the whole subset: once with each block on its own, and once with eval_lm.context_window tokens before
        each block. Line ends count as tokens.
        """,
        """
        The result is RUN_DIR/evaluation/ (RUN_DIR/evaluation-valid/ with --subset valid). For translation it holds
        hyp.tok, ref.tok, hyp.detok, ref.detok, averaged.pt, generate.log and record.json; for a language model
        eval-lm.log, eval-lm-contextN.log and record.json. results/README.md describes the record. If the result exists
        already, the command does nothing.

        The checkpoints are first compared with their checksums. One that is damaged or has weights that are not finite
        is refused.
        """,
    )
    made.add("run_dir", metavar="RUN_DIR", nargs="+",
             help="a run directory made by scripts/train.sh, which says what was trained; you may put the benchmark's name "
             "before it, which must then be the same")
    made.add("--subset", read=one_of("test", "valid"),
             help="test or valid; default: test, or valid for your own text if it has no test")
    made.add("--average", metavar="N", read=number_from(1),
             help="number of checkpoints to average; default: as many as checkpoint.keep_last_epochs (or "
             "checkpoint.keep_interval_updates) keeps; for a language model, only the best one by validation loss")
    made.add("--available",
             help="average fewer checkpoints if a short run has fewer, or take checkpoint_last.pt if it has none")
    made.add("--unfinished", flag=True, help="evaluate a run whose training is not complete")
    made.add("--record", metavar="FILE", help="copy the record to FILE as well")
    made.add("--force", help="the evaluation, and the FILE of --record")
    return made


def parse(arguments: Sequence[str]) -> Namespace:
    """The options of a command line: `run_dir`, and `benchmark`, None where only that is given."""
    options = parser().parse(arguments)
    *name, run = options.run_dir
    if len(name) > 1:
        raise UserError(f"{run!r} is one argument too many; one run is evaluated at a time: scripts/evaluate.sh RUN_DIR")
    if name and Path(name[0]).is_dir() and not Path(run).is_dir():
        raise UserError(f"{run!r} stands behind the run directory; write: scripts/evaluate.sh {name[0]}")
    options.run_dir, options.benchmark = run, name[0] if name else None
    return options


def command(arguments: Sequence[str]) -> None:
    """Evaluates the run that a command line asks for."""
    options = parse(arguments)
    from .evaluation.evaluate import evaluate

    evaluate(
        Path(options.run_dir),
        benchmark=options.benchmark,
        subset=options.subset,
        average=options.average,
        available=options.available,
        unfinished=options.unfinished,
        record=Path(options.record) if options.record else None,
        force=options.force,
    )


if __name__ == "__main__":
    main(command)
