"""``python -m fairseq_powernorm.experiments.train``, or ``scripts/train.sh``: trains one model."""

from argparse import Namespace
from typing import Any, Sequence, Tuple

from .commands import Parser, add_benchmark, add_norm, main
from .runs.launchers import PLACES, WORLD_SIZE
from .trust import OURS

BATCH = """An update covers optimization.update_freq x dataset.max_tokens tokens (or x dataset.batch_size sentences or
blocks) on any number of GPUs: they share optimization.update_freq, which their number must divide. The size of an update
is printed."""


def add_training(parser: Parser, ranks: str = "") -> None:
    """The options of a run that train.sh, launch.sh and slurm/submit.sh share.

    ranks: the options by which the command says where the ranks are; without any, overrides may say it
    """
    for name in ("--arch", "--placement", "--tensorboard", "--wandb"):
        parser.add(name)
    parser.add_overrides(
        "hydra overrides of configs/BENCH.yaml, such as optimization.max_update=4000 common.seed=2",
        {**OURS, **(dict.fromkeys(PLACES, ranks) if ranks else {})})


def add_run(parser: Parser, ranks: str = "") -> None:
    """All that train.sh takes, which launch.sh takes, too; ranks: as :func:`add_training` has it"""
    add_benchmark(parser, "what is trained, prepared by scripts/prepare.sh")
    add_norm(parser)
    parser.add("--run-dir")
    parser.add("--resume")
    add_training(parser, ranks)


def parser() -> Parser:
    """The options of the command."""
    made = Parser(
        "Trains one model with fairseq-hydra-train and the settings of configs/BENCH.yaml.",
        f"""
        {WORLD_SIZE}=N trains on N GPUs of this machine instead of one.

        The run directory holds checkpoints/, train.log (everything fairseq says), config.yaml (all settings, resolved),
        command.txt, run.json and, once training is complete, finished.json. Progress is shown every
        common.log_interval updates; after PN_PROGRESS_SECONDS (default: 60) without any, a line says that training is
        still at work. For several ranks use scripts/launch.sh.

        However this command ends, training ends with it. (After a SIGKILL only Linux can do that; elsewhere training
        runs on to its end, without a log.) Exit status: 0 finished, 2 refused, 3 diverged (a loss, or weights in the
        last checkpoint, are not finite), 130 or 143 interrupted, otherwise that of the training itself. The last line
        gives the reason.
        """,
        BATCH)
    add_run(made)
    return made


def parse(arguments: Sequence[str]) -> Tuple[Namespace, Any]:
    """(the options of a command line, the benchmark's configuration)"""
    options = parser().parse(arguments)
    from .runs.train import checked

    return options, checked(options)


def command(arguments: Sequence[str]) -> int:
    """Trains what a command line asks for."""
    options, config = parse(arguments)
    from .runs.train import train

    return train(options, config)


if __name__ == "__main__":
    main(command)
