"""Estimates the running statistics of a checkpoint again, by forward passes, for instance after averaging or fine-tuning.

What it does is :func:`fairseq_powernorm.statistics.recalibrate`, which serves any model and batches of any kind.

``python -m fairseq_powernorm.recalibrate DATA-BIN --path CHECKPOINT.pt --output NEW.pt --batches 200``
"""
import argparse
import os
import sys
from typing import List, Optional

import torch

from . import checkpoint, command_line, command_options
from .statistics import recalibrate, running_norms


def _load(options):
    """Model, task and a shuffled list of batches for a checkpoint; raises ValueError."""
    from fairseq import utils

    from . import register  # noqa: F401

    if not os.path.isdir(options.data):
        raise ValueError(f"data {options.data!r}: not a directory; must be one written by fairseq-preprocess")
    models, task = checkpoint.read_by_fairseq(options.path, {"data": options.data})
    try:
        task.load_dataset(options.subset)
    except FileNotFoundError as error:
        raise ValueError(f"--subset {options.subset!r}: {error}") from error
    model = models[0]
    iterator = task.get_batch_iterator(
        task.dataset(options.subset),
        max_tokens=options.max_tokens,
        max_positions=utils.resolve_max_positions(task.max_positions(), model.max_positions()),
        ignore_invalid_inputs=True,
        seed=options.seed,
    ).next_epoch_itr(shuffle=True)
    return model, iterator


def _first(iterator, number: int, device):
    from fairseq import utils

    for done, sample in enumerate(iterator, 1):
        yield utils.move_to_cuda(sample) if device.type == "cuda" else sample
        if done % 50 == 0 or done == number:
            print(f"  {done} batches", flush=True)
        if done == number:
            return


def parser() -> argparse.ArgumentParser:
    """The options of the command."""
    parser = argparse.ArgumentParser(prog="python -m fairseq_powernorm.recalibrate", description=__doc__.split("\n")[0])
    parser.add_argument("data", metavar="DATA-BIN", help="binarized training data of the checkpoint's task")
    parser.add_argument("--path", required=True, metavar="CHECKPOINT", help="the checkpoint, which stays as it is")
    command_options.add(parser, "--output", required=True)
    parser.add_argument("--batches", type=int, required=True, metavar="N", help="number of training batches to run over")
    parser.add_argument("--max-tokens", type=int, default=4096, metavar="N", help="most tokens in a batch (default: 4096)")
    command_options.add(parser, "--subset", "default: train", default="train")
    parser.add_argument("--seed", type=int, default=1, help="seed for the choice of batches and for dropout (default: 1)")
    parser.add_argument("--cpu", action="store_true", help="do not use a GPU")
    command_options.add(parser, "--force")
    return parser


def main(argv: Optional[List[str]] = None) -> int:
    """Command line; returns the exit status."""
    words = parser()
    options = words.parse_args(argv)
    try:
        for name in ("batches", "max_tokens"):
            if getattr(options, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(options, name)}: must be 1 or more")
        checkpoint.check_output(options.output, options.force)
        torch.manual_seed(options.seed)
        model, iterator = _load(options)
        device = torch.device("cuda" if torch.cuda.is_available() and not options.cpu else "cpu")
        model.to(device)
        count = recalibrate(
            model, _first(iterator, options.batches, device), lambda model, sample: model(**sample["net_input"])
        )
        state = checkpoint.load(options.path)
        for prefix, norm in running_norms(model).items():
            state["model"].update((f"{prefix}.{name}", buffer.cpu()) for name, buffer in norm.named_buffers())
        checkpoint.save(state, options.output, overwrite=options.force)
    except ValueError as error:
        print(f"{words.prog}: {error}", file=sys.stderr)
        return 1
    all_of_them = " (all there are)" if count < options.batches else ""
    print(f"wrote {options.output}: statistics of {count} batches{all_of_them}")
    return 0


if __name__ == "__main__":
    command_line.run(main)
