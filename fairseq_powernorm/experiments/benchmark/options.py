"""What is measured, as the command line says it."""

from argparse import Namespace
from typing import List, Sequence, Tuple

from ..commands import Parser, one_of, words_of
from ..errors import UserError, number

LEVELS = ("accuracy", "layer", "encoder", "step", "generation")
DEVICES = ("cpu", "cuda")
#: pass of a layer -> tensors of x's size that must be moved
PASSES = {"train": 5, "forward": 2, "eval": 2}
DTYPES = ("float32", "bfloat16", "float16")
SHAPES = {"cpu": "1x512,512x512,4096x512,16384x1024", "cuda": "4096x512,16384x512,16384x1024"}
CONTENDERS = ("layer", "layer-compiled", "rms", "batch", "power", "power-staged", "power-torch", "authors")




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

          python scripts/benchmark.py                      # the CPU, all levels; some minutes; prints tables
          python scripts/benchmark.py --device cuda        # the GPU
          python scripts/benchmark.py --name NAME          # ... and writes results/benchmark/NAME/
          python scripts/benchmark.py --check              # ... and exits with status 1 if a target is missed
          python scripts/benchmark.py --levels layer --shapes 4096x512 --extra mypackage.norms:FastNorm
        """,
        """
        Levels: accuracy (a training step of PN against the authors' arithmetic in float64), layer (a norm alone,
        training and evaluation), encoder (one Transformer layer, training), step (a whole update on 4,096 tokens: on a
        CPU of a 3+3-layer Transformer, on a GPU of one as large as IWSLT's, in float16), generation (beam search). Whole
        models leave their norms' statistics to the task, as power-staged does; power takes its steps itself.

        All contenders of a cell run in one process in turns, so that whatever else the machine does meets them all, each
        time once untimed, if that is quick, and once timed; a ratio is the median over rounds of a contender's time
        divided by LayerNorm's in the same round. Memory is recycled between calls, as it is in a long training; --fresh
        maps new pages in every call instead (CPU). The fraction of the bandwidth limit is the time in which a copy moves
        as many bytes as must be moved (training: five tensors; forward pass alone and evaluation: two), divided by the
        time taken. On a GPU a norm alone is timed by the GPU's own events, behind other work, with caches that hold
        nothing of it: without the time in which the host prepares it, which is given beside it; whole models are timed
        by the clock. Timings mean something on a machine that does nothing else.
        """)
    made.add("--device", read=one_of(*DEVICES), default="cpu", help=f"what to measure: {', '.join(DEVICES)}")
    made.add("--levels", metavar="LIST", read=words_of(*LEVELS), default=list(LEVELS),
             help=f"of {', '.join(LEVELS)}; default: all")
    made.add("--shapes", metavar="LIST", read=shapes,
             help="ROWSxCHANNELS of the levels accuracy and layer, with commas between them; default: "
                  + "; ".join(f"{each} on {device}" for device, each in SHAPES.items()))
    made.add("--dtype", metavar="LIST", read=words_of(*DTYPES), default="float32,bfloat16",
             help=f"of {', '.join(DTYPES)}, in accuracy and layer")
    made.add("--groups", metavar="LIST", read=numbers, default="1,4", help="channel groups of PN's layer scale")
    made.add("--threads", metavar="LIST", read=numbers,
             help="numbers of threads; default: on a CPU 1 and, if there are two cores, 2, on a GPU torch's own")
    made.add("--contenders", metavar="LIST", read=words_of(*CONTENDERS), default=list(CONTENDERS),
             help=f"of {', '.join(CONTENDERS)}; default: all; layer is always there")
    made.add("--extra", metavar="MODULE:CLASS", repeat=True,
             help="another norm beside them, built as CLASS(channels) and called as norm(x) on N x C; may be repeated")
    made.add("--seconds", metavar="S", read=duration, default="2",
             help="measuring time of a cell, at least five rounds, 15 of models")
    made.add("--fresh", flag=True, help="map new pages in every call instead of recycling memory")
    made.add("--quick", flag=True, help="tiny sizes and one round: shows that it runs, times mean nothing")
    made.add("--check", help="that is, if a target is missed")
    made.add("--name", former="--output",
             help="write results/benchmark/NAME (record.json, table.md, figure.png), which must not exist")
    return made


def parse(arguments: Sequence[str]) -> Namespace:
    """The options of a command line; what depends on others is filled in."""
    options = parser().parse(arguments)
    options.shapes = options.shapes or shapes("--shapes", SHAPES[options.device])
    options.model_dtype = "float16" if options.device == "cuda" else "float32"
    if options.quick:
        options.shapes, options.seconds = [(min(rows, 32), 64) for rows, _ in options.shapes], 0.0
        options.contenders = [name for name in options.contenders if name != "layer-compiled"]
    return options
