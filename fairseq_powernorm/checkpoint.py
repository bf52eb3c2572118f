"""Checkpoints: reads them safely, averages them, and converts those of the authors' code.

``python -m fairseq_powernorm.checkpoint average --inputs A.pt B.pt --output C.pt``
``python -m fairseq_powernorm.checkpoint convert THEIRS.pt OURS.pt``
"""
import argparse
import os
import sys
import zipfile
from contextlib import contextmanager
from typing import Any, Container, Dict, Iterable, Iterator, List, Mapping, NamedTuple, Optional, Sequence, Set, Tuple

import torch
from torch import Tensor, nn

from . import command_line, command_options, compat
from .command_options import check_output
from .norms import NORMS, norms_with

State = Dict[str, Any]

#: what no average is taken of
OF_THE_LAST = (".iters", ".window_m2", ".window_gz")

#: architectures of the authors' code under which they trained, and ours; sizes are stored with the checkpoint
AUTHORS_ARCHITECTURES = {
    "transformer_iwslt_de_en_v2": "transformer_pn_iwslt_de_en",
    "transformer_iwslt_de_en": "transformer_pn_iwslt_de_en",
    "transformer_wmt_en_de": "transformer_pn_wmt_en_de",
    "transformer_wmt_en_de_big": "transformer_pn_wmt_en_de_big",
    "transformer_vaswani_wmt_en_de_big": "transformer_pn_wmt_en_de_big",
    "transformer_wmt_en_de_big_t2t": "transformer_pn_wmt_en_de_big",
}
#: warm-up of the final norms in the authors' code, whatever --warmup-updates says
AUTHORS_FINAL_WARMUP = 1000
#: norms that the authors' flags offer, and what they are here
AUTHORS_NORMS = {"layer": "layer", "power": "power", "batch": "batch:variant=reference"}
#: the flags that name them
AUTHORS_NORM_OPTIONS = ("encoder_norm_self", "encoder_norm_ff", "decoder_norm_self", "decoder_norm_ff")


def load(path: str) -> State:
    """Read a fairseq checkpoint onto the CPU without executing code from it.

    Raises:
        ValueError: the file is missing, damaged, or not a fairseq checkpoint
    """
    check_intact(path)
    compat.allow_checkpoint_types()
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"checkpoint {path!r}: damaged, or not a checkpoint ({error})") from error
    if not isinstance(state, dict) or not isinstance(state.get("model"), dict):
        raise ValueError(f"checkpoint {path!r}: holds no model; must be one written by fairseq-train")
    for name, tensor in state["model"].items():
        if not (isinstance(name, str) and isinstance(tensor, Tensor) and tensor.layout is torch.strided):
            raise ValueError(f"checkpoint {path!r}: {name!r} of its model is no plain tensor")
    return state


def read_by_fairseq(path: str, overrides: Dict[str, Any]) -> Tuple[List[nn.Module], Any]:
    """(models, task) of a checkpoint that :func:`load` reads; overrides: of its settings.

    Raises:
        ValueError: it is damaged, not finite, or holds less than fairseq's checkpoints do
    """
    from fairseq import checkpoint_utils

    check_finite(load(path)["model"], path)
    try:
        models, _, task = checkpoint_utils.load_model_ensemble_and_task([path], overrides)
    except (KeyError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"checkpoint {path!r}: not one of fairseq's, or of another version ({reason})") from error
    return models, task


def check_intact(path: str) -> None:
    """Compare every byte of a checkpoint, a zip archive, with its checksums, which ``torch.load`` does not do.

    Files without checksums, as torch < 1.6 wrote them, pass.

    Raises:
        ValueError: there is no such file, or it is damaged
    """
    if not os.path.isfile(path):
        raise ValueError(f"checkpoint {path!r}: no such file")
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            # torch writes zeros where it is told to save the time for checksums
            has_checksums = any(info.CRC for info in archive.infolist())
            damaged = archive.testzip() if has_checksums else None
    except Exception as error:  # a damaged header can make zipfile raise nearly anything
        raise ValueError(f"checkpoint {path!r}: damaged ({error})") from error
    if damaged is not None:
        raise ValueError(f"checkpoint {path!r}: damaged (the checksum of {damaged} differs)")


def check_finite(model: Mapping[str, Tensor], path: str) -> None:
    """Raise ValueError, naming the checkpoint, if a parameter or buffer of a state_dict is NaN or infinite."""
    for name, tensor in model.items():
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"checkpoint {path!r}: {name} has values that are not finite: training has diverged")


@contextmanager
def whole_file(path: str, overwrite: bool = False) -> Iterator[str]:
    """Yields the name of a temporary file, which becomes ``path`` when the block ends well and vanishes when it does not.

    Raises:
        ValueError: ``path`` exists and ``overwrite`` is False, its directory does not exist, or it cannot be written
    """
    check_output(path, overwrite)
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise ValueError(f"output {path!r}: cannot be written: {error.strerror or error}") from error
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def save(state: State, path: str, overwrite: bool = False) -> None:
    """Write a checkpoint whole or not at all; raises ValueError as :func:`whole_file`."""
    # given a name, torch does not say why a file cannot be written
    with whole_file(path, overwrite) as temporary, open(temporary, "wb") as stream:
        torch.save(state, stream)


def check_same_norms(model: nn.Module, state_dict: Iterable[str]) -> None:
    """Raise ValueError if a norm of ``model`` has other parameters and buffers than the checkpoint has in its place."""
    norms = {prefix: module for prefix, module in model.named_modules() if prefix.endswith("layer_norm")}
    ours, theirs = _entries(norms, model.state_dict()), _entries(norms, state_dict)
    parts = {name.rpartition(".")[0].rpartition(".")[0] for name in state_dict}
    for prefix, module in norms.items():
        has, wanted = theirs[prefix], ours[prefix]
        if "num_batches_tracked" in has:  # of torch's batch norms, and the authors'
            has = has - {"num_batches_tracked"} | {"iters"}
        if has != wanted and (has or prefix.rpartition(".")[0] in parts):
            names = " or ".join(map(repr, norms_with(has))) or f"with {', '.join(sorted(has)) or 'no parameters'}"
            if has <= {"scale", "shift"}:
                names += " or what is left of one that was folded for inference"
            own = next((repr(name) for name, kind in NORMS.items() if type(module) is kind), type(module).__name__)
            raise ValueError(
                f"the checkpoint has norm {names} at {prefix}, the model {own}: give the --encoder-norm-* and "
                "--decoder-norm-* options that the checkpoint was trained with"
            )


def _entries(prefixes: Iterable[str], names: Iterable[str]) -> Dict[str, Set[str]]:
    """Prefix -> what stands under it among the names of a state_dict, without the prefix."""
    found: Dict[str, Set[str]] = {prefix: set() for prefix in prefixes}
    for name in names:
        prefix, norm, entry = name.partition("layer_norm.")
        if prefix + norm[:-1] in found:
            found[prefix + norm[:-1]].add(entry)
    return found


def average_checkpoints(paths: Sequence[str]) -> State:
    """Average the parameters and running statistics of checkpoints of one run.

    Second moments are averaged as moments: ``running_phi`` as it is, ``running_var`` and the square of ``running_std``
    together with the spread of ``running_mean``. Step counts, windows of single steps and integers come from the last
    checkpoint, and so does everything else except the optimizer's state, which is left out.

    Args:
        paths: checkpoint files, oldest first

    Returns:
        a checkpoint's content, in the dtypes of the last one

    Raises:
        ValueError: no file is given, one cannot be read or is damaged, their parameters differ in name or shape, or a value
            is not finite
    """
    if not paths:
        raise ValueError("no checkpoints to average")
    sums: Dict[str, Tensor] = {}
    state: State = {}
    for path in paths:
        state = load(path)
        check_finite(state["model"], path)
        model = _with_raw_moments(state["model"])
        shapes = {name: tuple(tensor.shape) for name, tensor in model.items()}
        if sums and shapes != {name: tuple(tensor.shape) for name, tensor in sums.items()}:
            differing = sorted(
                name for name in set(sums) | set(shapes) if name not in sums or shapes.get(name) != tuple(sums[name].shape)
            )
            raise ValueError(f"checkpoint {path!r}: {differing[0]!r} is missing or of another shape than in {paths[0]!r}")
        for name, tensor in model.items():
            if not tensor.is_floating_point() or name.endswith(OF_THE_LAST):
                sums[name] = tensor
            elif name in sums:
                sums[name] = sums[name] + tensor.double()  # not in place: tied ones in float64 are the same memory
            else:
                sums[name] = tensor.double()
    last = state["model"]
    averaged = {
        name: tensor if not tensor.is_floating_point() or name.endswith(OF_THE_LAST) else tensor / len(paths)
        for name, tensor in sums.items()
    }
    averaged = _with_central_moments(averaged)
    state["model"] = type(last)((name, averaged[name].to(tensor.dtype)) for name, tensor in last.items())
    state.pop("last_optimizer_state", None)
    return state


def _with_raw_moments(model: Dict[str, Tensor]) -> Dict[str, Tensor]:
    """The same with E[x^2] in place of each ``running_var`` and ``running_std`` that has a mean (float64)."""
    return {
        name: tensor if spread is None else tensor.double().pow(spread.power) + model[spread.mean].double().square()
        for name, tensor, spread in ((name, tensor, _spread(model, name)) for name, tensor in model.items())
    }


def _with_central_moments(model: Dict[str, Tensor]) -> Dict[str, Tensor]:
    """Inverse of :func:`_with_raw_moments`."""
    return {
        name: tensor if spread is None else (tensor - model[spread.mean].square()).clamp(min=0).pow(1 / spread.power)
        for name, tensor, spread in ((name, tensor, _spread(model, name)) for name, tensor in model.items())
    }


class _Spread(NamedTuple):
    """A statistic of the spread about a mean: the mean's name, and the power of the statistic that is a variance."""

    mean: str
    power: int


def _spread(model: Container[str], name: str) -> Optional[_Spread]:
    """What kind of spread the entry ``name`` is, None if it is none; UN and MABN have a ``running_var`` about zero."""
    prefix, _, statistic = name.rpartition(".")
    mean, power = f"{prefix}.running_mean", {"running_var": 1, "running_std": 2}.get(statistic)
    return None if power is None or mean not in model else _Spread(mean, power)


def convert_authors_checkpoint(state: State) -> State:
    """Turn a checkpoint of the authors' code (fairseq 0.8) into one of ``transformer_pn``.

    The options of that code become those of this package (its LR warm-up is PN's warm-up too, its final norms warm
    up for 1000 updates), statistics of shape ``(1, C, 1, 1)`` become ``(C,)`` and the step counts floating point.

    Raises:
        ValueError: the checkpoint stores no Namespace, or uses an architecture or norm that has no counterpart
    """
    args = state.get("args")
    if not isinstance(args, argparse.Namespace):
        raise ValueError("checkpoint stores no Namespace of options under 'args'; must be one of the authors' code")
    arch = getattr(args, "arch", None)
    if arch not in AUTHORS_ARCHITECTURES:
        raise ValueError(f"arch {arch!r}: must be one of {', '.join(AUTHORS_ARCHITECTURES)}")
    args = argparse.Namespace(**vars(args))
    for name in AUTHORS_NORM_OPTIONS:
        norm = getattr(args, name, None)
        if norm not in AUTHORS_NORMS:
            raise ValueError(f"{name} {norm!r}: can be converted only from {', '.join(AUTHORS_NORMS)}")
        setattr(args, name, AUTHORS_NORMS[norm])
    args.arch = AUTHORS_ARCHITECTURES[arch]
    args.task = "translation_pn"
    args.norm_variant = "reference"
    args.norm_warmup_updates = args.warmup_updates
    args.norm_final_warmup_updates = AUTHORS_FINAL_WARMUP
    model = type(state["model"])()
    for name, tensor in state["model"].items():
        if name.endswith((".running_phi", ".ema_gz")):
            tensor = tensor.reshape(-1)
        elif name.endswith((".iters", ".num_batches_tracked")):
            name = name.replace(".num_batches_tracked", ".iters")
            tensor = tensor.reshape(()).float()
        model[name] = tensor
    return {**state, "args": args, "model": model}


def parser() -> argparse.ArgumentParser:
    """The options of the commands."""
    parser = argparse.ArgumentParser(prog="python -m fairseq_powernorm.checkpoint", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    average = commands.add_parser("average", help="average the parameters and running statistics of several checkpoints")
    average.add_argument("--inputs", nargs="+", required=True, metavar="FILE", help="checkpoints, oldest first")
    command_options.add(average, "--output", required=True)
    convert = commands.add_parser("convert", help="convert a checkpoint of the authors' code")
    convert.add_argument("input", metavar="THEIRS", help="a checkpoint of the authors' code")
    convert.add_argument("output", metavar="OURS", help="the file to write, a checkpoint of transformer_pn")
    for command in (average, convert):
        command_options.add(command, "--force")
    return parser


def main(argv: Optional[List[str]] = None) -> int:
    """Command line; returns the exit status."""
    words = parser()
    args = words.parse_args(argv)
    try:
        check_output(args.output, args.force)
        if args.command == "average":
            state = average_checkpoints(args.inputs)
        else:
            state = convert_authors_checkpoint(load(args.input))
        save(state, args.output, overwrite=args.force)
    except ValueError as error:
        print(f"{words.prog} {args.command}: {error}", file=sys.stderr)
        return 1
    print(f"wrote {args.output}")
    return 0


if __name__ == "__main__":
    command_line.run(main)
