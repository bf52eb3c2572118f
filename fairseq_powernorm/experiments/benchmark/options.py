"""What is measured, as the command line says it."""

from argparse import Namespace
from typing import List, Sequence, Tuple

from ..commands import Parser, one_of, words_of
from ..errors import UserError, listed, number

LEVELS = ("accuracy", "layer", "encoder", "step", "generation")
#: those that are measured unless others are named
USUAL_LEVELS = ("accuracy", "layer", "step", "generation")
DEVICES = ("cpu", "cuda")
#: pass of a layer -> tensors of x's size that must be moved
PASSES = {"train": 5, "forward": 2, "eval": 2}
DTYPES = ("float32", "bfloat16", "float16")
SHAPES = {"cpu": "1x512,16x512,512x512,2048x512,4096x512,65536x512", "cuda": "4096x512,16384x512,16384x1024"}
#: of rows, and of channels, groups and threads: more than any machine measures
MOST_ROWS, MOST = 1 << 30, 1 << 16
#: how freed memory is kept: as glibc does by itself, or as in a long training under the scripts, which tell it to keep it
MEMORIES = ("default", "recycled")
#: those that are measured unless others are named
USUAL = ("layer", "rms", "batch-torch", "batch", "power-v", "power", "power-staged", "power-torch", "authors")
CONTENDERS = (*USUAL, "layer-compiled")
#: those that only say how slow the alternatives are, and the number of rows at which they do
SLOW, SLOW_ROWS = ("power-torch", "authors"), 4096


def numbers(option: str, text: str) -> List[int]:
    """Positive numbers with commas between them, none twice."""
    return [number(option, word, 1, MOST) for word in listed(option, text, None, ())]


def shapes(option: str, text: str) -> List[Tuple[int, int]]:
    """ROWSxCHANNELS, several with commas between them."""
    found = []
    for word in listed(option, text, None, ()):
        rows, _, channels = word.partition("x")
        try:
            found.append((number(option, rows, 1, MOST_ROWS), number(option, channels, 1, MOST)))
        except UserError:
            raise UserError(f"{option} {word!r}: must be ROWSxCHANNELS, several with commas between them, {MOST_ROWS:,} and "
                            f"{MOST:,} at most") from None
    return found


def duration(option: str, text: str) -> float:
    """A positive number of seconds."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise UserError(f"{option} {text!r}: must be a positive number of seconds")
    return value


def parser() -> Parser:
    """The options of the command."""
    made = Parser(
        """
        Measures the norms against torch's LayerNorm: time, memory, accuracy, and whether the targets are met.

          python scripts/benchmark.py                      # the CPU, about eight minutes; prints tables
          python scripts/benchmark.py --device cuda        # the GPU
          python scripts/benchmark.py --name NAME          # ... and writes results/benchmark/NAME/
          python scripts/benchmark.py --check              # ... and exits with status 1 if a target is missed
          python scripts/benchmark.py --levels layer --shapes 4096x512 --extra mypackage.norms:FastNorm

        results/README.md explains how its table is made from NAME.
        """,
        """
        The levels are accuracy (a training step of PN against the authors' arithmetic in float64), layer (a norm alone,
        training and evaluation), encoder (one Transformer layer, training), step (a whole update on 4,096 tokens of a
        6+6-layer Transformer, and the share of it that the running statistics take; on a GPU in float16) and generation
        (beam search with 5 hypotheses, for one sentence and for 64 at a time, with folded norms).

        Among the contenders, power is PN as published, after its warm-up, and batch is masked batch normalization;
        batch-torch is torch's own. In whole models the norms leave their statistics to the task, as power-staged does;
        power updates them itself. power-torch (PN without its kernels) and authors (the authors' arithmetic) are measured
        at 4,096 rows only.

        All contenders of a cell run in one process, in turns, so that whatever else the machine does affects them all. In
        each turn a contender runs once untimed, if that is quick, and once timed. A ratio is the median over the rounds of
        the contender's time divided by LayerNorm's in the same round. --memory says what glibc does with freed memory:
        `default` returns large blocks, whose pages the system has to map and clear again in the next call; `recycled` keeps
        them, as the scripts tell it to. The fraction of the bandwidth limit is the time that a copy needs to move the bytes
        that must be moved (training: five tensors; forward pass alone and evaluation: two), divided by the time taken.

        On a GPU, a norm alone is timed by the GPU's own events, behind other work, with none of its data in the caches. This
        leaves out the time in which the host prepares the work, which is given separately. Whole models are timed by the
        clock. Timings mean something only on a machine that does nothing else.

        The time of --seconds is divided among the cells, each of which takes at least a few rounds. With --name, cells are
        saved as they are measured: after an interruption, the same command continues where it was.
        """)
    made.add("--device", read=one_of(*DEVICES), default="cpu", help=f"where to measure: {', '.join(DEVICES)}")
    made.add("--levels", metavar="LIST", read=words_of(*LEVELS), default=",".join(USUAL_LEVELS),
             help=f"what to measure, a choice of {', '.join(LEVELS)}")
    made.add("--shapes", metavar="LIST", read=shapes,
             help="sizes at the level layer, each ROWSxCHANNELS; default: "
                  + "; ".join(f"{each} on {device}" for device, each in SHAPES.items()))
    made.add("--dtype", metavar="LIST", read=words_of(*DTYPES), default="float32,bfloat16",
             help=f"the dtypes at the levels accuracy and layer, a choice of {', '.join(DTYPES)}")
    made.add("--groups", metavar="LIST", read=numbers, default="4", help="channel groups of PN's layer scale")
    made.add("--memory", metavar="LIST", read=words_of(*MEMORIES), default=",".join(MEMORIES),
             help=f"use of freed memory at the level layer, a choice of {', '.join(MEMORIES)}; on a GPU it does not "
                  "matter; default: both")
    made.add("--threads", metavar="LIST", read=numbers, help="numbers of threads; default: torch's own")
    made.add("--contenders", metavar="LIST", read=words_of(*CONTENDERS), default=",".join(USUAL),
             help=f"the norms, a choice of {', '.join(CONTENDERS)}; layer is always measured")
    made.add("--extra", metavar="MODULE:CLASS", repeat=True,
             help="one more norm, built as CLASS(channels) and called as norm(x) on N x C; may be repeated")
    made.add("--seconds", metavar="S", read=duration, default="420", help="time for all cells together")
    made.add("--fast", flag=True, help="tiny sizes and one round: shows that it runs; the times mean nothing")
    made.add("--check", flag=True, help="that is, if a target is missed")
    made.add("--name", former="--output", metavar="NAME",
             help="write results/benchmark/NAME (record.json, table.md, training.png, evaluation.png), which must not exist")
    return made


def parse(arguments: Sequence[str]) -> Namespace:
    """The options of a command line; what depends on others is filled in."""
    options = parser().parse(arguments)
    options.shapes = options.shapes or shapes("--shapes", SHAPES[options.device])
    options.model_dtype = "float16" if options.device == "cuda" else "float32"
    if options.device == "cuda":
        options.memory = options.memory[-1:]
    if options.fast:
        options.shapes, options.seconds = list(dict.fromkeys((min(rows, 32), 64) for rows, _ in options.shapes)), 0.0
        options.contenders = [name for name in options.contenders if name != "layer-compiled"]
    sizes = sorted({channels for _, channels in options.shapes})
    for groups in options.groups:
        if all(channels % groups for channels in sizes):
            raise UserError(f"--groups {groups}: must divide the channels of a shape, {' or '.join(map(str, sizes))}; with "
                            f"none that does PN is not measured")
    return options
