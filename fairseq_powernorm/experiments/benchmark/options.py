"""Measures the norms against torch's LayerNorm: time, memory, accuracy, and whether the targets are met.

    python scripts/benchmark.py                      # the CPU, all levels; some minutes; prints tables
    python scripts/benchmark.py --device cuda        # the GPU
    python scripts/benchmark.py --output NAME        # ... and writes results/benchmark/NAME/
    python scripts/benchmark.py --check              # ... and exits with status 1 if a target is missed
    python scripts/benchmark.py --levels layer --shapes 4096x512 --extra mypackage.norms:FastNorm

Levels: `accuracy` (a training step of PN against the authors' arithmetic in float64), `layer` (a norm alone, training and
evaluation), `encoder` (one Transformer layer, training), `step` (a whole update on 4,096 tokens: on a CPU of a 3+3-layer
Transformer, on a GPU of one as large as IWSLT's, in float16), `generation` (beam search). All contenders of a cell run in
one process in turns, so that whatever else the machine does meets them all, each time once untimed, if that is quick, and
once timed; a ratio is the median over rounds of a contender's time divided by LayerNorm's in the same round. Memory is
recycled between calls, as it is in a long training; --fresh maps new pages in every call instead (CPU). The fraction of
the bandwidth limit is the time in which a copy moves as many bytes as must be moved (training: five tensors; forward pass
alone and evaluation: two), divided by the time taken. On a GPU a norm alone is timed by the GPU's own events, behind
other work, with caches that hold nothing of it: without the time in which the host prepares it, which is given beside it;
whole models are timed by the clock. --extra adds module:Class, built as Class(channels) and called as norm(x) on N x C.
Timings mean something on a machine that does nothing else.
"""
import argparse
import sys
from pathlib import Path

LEVELS = ("accuracy", "layer", "encoder", "step", "generation")
DEVICES = ("cpu", "cuda")
#: pass of a layer -> tensors of x's size that must be moved
PASSES = {"train": 5, "forward": 2, "eval": 2}
DTYPES = ("float32", "bfloat16", "float16")
SHAPES = {"cpu": "1x512,512x512,4096x512,16384x1024", "cuda": "4096x512,16384x512,16384x1024"}
CONTENDERS = ("layer", "layer-compiled", "rms", "batch", "power", "power-torch", "authors")


def numbers(text):
    try:
        values = [int(word) for word in text.split(",")]
    except ValueError:
        values = [0]
    if min(values) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: must be positive numbers with commas between them")
    return values


def shapes(text):
    try:
        values = [tuple(int(n) for n in word.split("x")) for word in text.split(",")]
    except ValueError:
        values = []
    if not values or any(len(pair) != 2 or min(pair) < 1 for pair in values):
        raise argparse.ArgumentTypeError(f"{text!r}: must be ROWSxCHANNELS, several with commas between them")
    return values


def words(valid):
    def parse(text):
        found = text.split(",")
        for word in found:
            if word not in valid:
                raise argparse.ArgumentTypeError(f"{word!r} is unknown; valid: {', '.join(valid)}")
        return found

    return parse


def parse(arguments):
    """The options of the command line; wrong ones end the program with a message that says what is valid."""
    called_by_name = Path(sys.argv[0]).name == "__main__.py"
    parser = argparse.ArgumentParser(
        prog="python -m fairseq_powernorm.experiments.benchmark" if called_by_name else None,
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=DEVICES, default="cpu", help="what to measure (cpu)")
    parser.add_argument("--levels", type=words(LEVELS), default=list(LEVELS), help=f"of {', '.join(LEVELS)} (all)")
    parser.add_argument("--shapes", "--rows", type=shapes, default=None, metavar="ROWSxCHANNELS,...",
                        help=f"of the levels `accuracy` and `layer` ({'; '.join(f'{d}: {s}' for d, s in SHAPES.items())})")
    parser.add_argument("--dtype", type=words(DTYPES), default=["float32", "bfloat16"],
                        help=f"of {', '.join(DTYPES)}, in `accuracy` and `layer` (float32,bfloat16)")
    parser.add_argument("--groups", type=numbers, default=[1, 4], help="channel groups of PN's layer scale (1,4)")
    parser.add_argument("--threads", type=numbers, default=None,
                        help="numbers of threads (cpu: 1 and, if there are two cores, 2; cuda: torch's own)")
    parser.add_argument("--contenders", type=words(CONTENDERS), default=list(CONTENDERS),
                        help=f"of {', '.join(CONTENDERS)} (all; `layer` always)")
    parser.add_argument("--extra", action="append", default=[], metavar="MODULE:CLASS", help="another norm beside them")
    parser.add_argument(
        "--seconds", type=float, default=2.0, help="measuring time of a cell (2), at least five rounds, 15 of models"
    )
    parser.add_argument("--fresh", action="store_true", help="map new pages in every call instead of recycling memory")
    parser.add_argument(
        "--quick", action="store_true", help="tiny sizes and one round: shows that it runs, times mean nothing"
    )
    parser.add_argument("--check", action="store_true", help="exit with status 1 if a target is missed")
    parser.add_argument("--output", metavar="NAME",
                        help="write results/benchmark/NAME (record.json, table.md, figure.png), which must not exist")
    options = parser.parse_args(arguments)
    if not options.seconds > 0:
        parser.error(f"argument --seconds: {options.seconds}: must be positive")
    options.shapes = options.shapes or shapes(SHAPES[options.device])
    options.model_dtype = "float16" if options.device == "cuda" else "float32"
    if options.quick:
        options.shapes, options.seconds = [(min(rows, 32), 64) for rows, _ in options.shapes], 0.0
        options.contenders = [name for name in options.contenders if name != "layer-compiled"]
    return options
