"""What is measured, as the command line says it."""

from argparse import Namespace
from typing import List, Sequence, Tuple

from ..commands import Parser, one_of, words_of
from ..errors import UserError, number

LEVELS = ("accuracy", "layer", "encoder", "step", "generation")
#: those that are measured unless others are named
USUAL_LEVELS = ("accuracy", "layer", "step", "generation")
DEVICES = ("cpu", "cuda")
#: pass of a layer -> tensors of x's size that must be moved
PASSES = {"train": 5, "forward": 2, "eval": 2}
DTYPES = ("float32", "bfloat16", "float16")
SHAPES = {"cpu": "1x512,16x512,512x512,2048x512,4096x512,65536x512", "cuda": "4096x512,16384x512,16384x1024"}
#: how freed memory is kept: as glibc does by itself, or as in a long training under the scripts, which tell it to keep it
MEMORIES = ("default", "recycled")
#: those that are measured unless others are named
USUAL = ("layer", "rms", "batch-torch", "batch", "power-v", "power", "power-staged", "power-torch", "authors")
CONTENDERS = (*USUAL, "layer-compiled")
#: those that only say how slow the alternatives are, and the number of rows at which they do
SLOW, SLOW_ROWS = ("power-torch", "authors"), 4096


def numbers(option: str, text: str) -> List[int]:
    """Positive numbers with commas between them."""
    return [number(option, word, 1) for word in text.split(",")]


def shapes(option: str, text: str) -> List[Tuple[int, int]]:
    """ROWSxCHANNELS, several with commas between them."""
    found = []
    for word in text.split(","):
        rows, _, channels = word.partition("x")
        if not (rows.isdigit() and channels.isdigit() and int(rows) and int(channels)):
            raise UserError(f"{option} {word!r}: must be ROWSxCHANNELS, several with commas between them")
        found.append((int(rows), int(channels)))
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

        results/README.md says how its own table is made of NAME.
        """,
        """
        Levels: accuracy (a training step of PN against the authors' arithmetic in float64), layer (a norm alone,
        training and evaluation), encoder (one Transformer layer, training), step (a whole update on 4,096 tokens of a
        6+6-layer Transformer, and the share of it that the running statistics take; on a GPU in float16), generation (beam
        search with 5 hypotheses, one sentence and 64 at a time, norms folded). Whole models leave their norms' statistics to
        the task, as power-staged does; power takes its steps itself. power is PN as published after its warm-up, batch
        masked batch normalization, batch-torch torch's own; power-torch (PN without its kernels) and authors (their
        arithmetic) are measured at 4,096 rows only.

        All contenders of a cell run in one process in turns, so that whatever else the machine does meets them all, each
        time once untimed, if that is quick, and once timed; a ratio is the median over rounds of a contender's time
        divided by LayerNorm's in the same round. --memory: what glibc does with freed memory; `default` gives large blocks
        back, whose pages the system maps and clears anew in the next call, `recycled` keeps them, as the scripts tell it to.
        The fraction of the bandwidth limit is the time in which a copy moves as many bytes as must be moved (training: five
        tensors; forward pass alone and evaluation: two), divided by the time taken. On a GPU a norm alone is timed by the
        GPU's own events, behind other work, with caches that hold nothing of it: without the time in which the host prepares
        it, which is given beside it; whole models are timed by the clock. Timings mean something on a machine that does
        nothing else.

        --seconds is shared out among the cells; each takes a few rounds at least. With --name, cells are kept as they are
        measured: interrupted, the same command goes on where it was.
        """)
    made.add("--device", read=one_of(*DEVICES), default="cpu", help=f"what to measure: {', '.join(DEVICES)}")
    made.add("--levels", metavar="LIST", read=words_of(*LEVELS), default=",".join(USUAL_LEVELS),
             help=f"of {', '.join(LEVELS)}")
    made.add("--shapes", metavar="LIST", read=shapes,
             help="ROWSxCHANNELS of the level layer, with commas between them; default: "
                  + "; ".join(f"{each} on {device}" for device, each in SHAPES.items()))
    made.add("--dtype", metavar="LIST", read=words_of(*DTYPES), default="float32,bfloat16",
             help=f"of {', '.join(DTYPES)}, in accuracy and layer")
    made.add("--groups", metavar="LIST", read=numbers, default="4", help="channel groups of PN's layer scale")
    made.add("--memory", metavar="LIST", read=words_of(*MEMORIES), default=",".join(MEMORIES),
             help=f"of {', '.join(MEMORIES)}, in layer; a GPU has memory of its own")
    made.add("--threads", metavar="LIST", read=numbers, help="numbers of threads; default: torch's own")
    made.add("--contenders", metavar="LIST", read=words_of(*CONTENDERS), default=",".join(USUAL),
             help=f"of {', '.join(CONTENDERS)}; layer is always there")
    made.add("--extra", metavar="MODULE:CLASS", repeat=True,
             help="another norm beside them, built as CLASS(channels) and called as norm(x) on N x C; may be repeated")
    made.add("--seconds", metavar="S", read=duration, default="420", help="time for all cells together")
    made.add("--fast", flag=True, help="tiny sizes and one round: shows that it runs, times mean nothing")
    made.add("--check", flag=True, help="exit with status 1 if a target is missed")
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
    return options
