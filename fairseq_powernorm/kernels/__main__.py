"""``python -m fairseq_powernorm.kernels``: which kernel serves which tensors, and why; ``--build`` compiles."""
import argparse
import sys
from typing import Optional, Sequence

import torch

from .. import command_line
from . import KERNELS, VARIABLE, build, c, explain


def main(arguments: Optional[Sequence[str]] = None) -> int:
    """Returns the exit status: 2 where what is asked for cannot be had."""
    parser = argparse.ArgumentParser(
        prog="python -m fairseq_powernorm.kernels",
        description="Says which kernel computes Power Normalization on which device and dtype, and why. "
        f"The environment variable {VARIABLE} ({', '.join(KERNELS)}) restricts the choice.",
    )
    parser.add_argument(
        "--build", action="store_true", help="first rebuild the C kernel (with CC) and its autograd function in C++ (CXX)"
    )
    if parser.parse_args(arguments).build:
        try:
            print(f"built {build.build()}")
        except build.BuildError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        try:
            print(f"built {build.build_autograd()}")
        except build.BuildError as error:
            print(f"the autograd function in C++ is not built, that in Python serves: {error}", file=sys.stderr)
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    try:
        if c.unavailable() is None:
            c.autograd()
        for device in devices:
            for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
                name, reasons = explain(device, dtype)
                why = f" ({'; '.join(reasons)})" if reasons else ""
                print(f"{device:5} {str(dtype).split('.')[-1]:9} {KERNELS[name].describe()}{why}")
    except (ValueError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    command_line.run(main)
