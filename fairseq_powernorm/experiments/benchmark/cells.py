"""What is measured at each level: a cell is one size, dtype and pass, with all contenders in it."""
import functools
import itertools
import statistics
from argparse import Namespace
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Tuple

import torch
from fairseq.sequence_generator import SequenceGenerator
from torch import Tensor

from fairseq_powernorm.fold import fold_norms
from fairseq_powernorm.kernels.interface import TOLERANCE
from fairseq_powernorm.norms import PowerNorm

from .authors_norm import AuthorsPowerNorm
from .contenders import norms_for, one_call
from .models import Update, model_functions, model_measure, sentences, translation_model
from .options import PASSES
from .timing import ROUNDS_OF_MODELS, DeviceEvents, clock, host_seconds, in_turns, peak_bytes, saved_bytes, summarize

#: a cell of the record
Cell = Dict[str, Any]


class Job(NamedTuple):
    """A cell to measure.

    Attributes:
        cell: what it is, without its contenders
        weight: its share of the time
        measure: measures for so many seconds, 0 for one round, and gives the contenders
    """

    cell: Cell
    weight: float
    measure: Callable[[float], Dict[str, Dict[str, Any]]]


def inputs(options: Namespace, rows: int, channels: int, name: str) -> Tuple[Tensor, Tensor, Tensor]:
    """x, dy and a mask (True = padding) of about a fifth of the rows, on the device."""
    generator = torch.Generator().manual_seed(1)
    x, dy = (torch.randn(rows, channels, generator=generator).to(options.device, getattr(torch, name)) for _ in range(2))
    mask = torch.rand(rows, generator=generator) < 0.2
    mask[0] = False
    return x, dy, mask.to(options.device)


def cell_of(
    options: Namespace, level: str, which: str, rows: int, channels: int, dtype: str, masked: bool, memory: str = "recycled"
) -> Cell:
    """What a cell is, without its contenders."""
    return {"level": level, "pass": which, "rows": rows, "channels": channels, "dtype": dtype, "masked": masked,
            "device": options.device, "threads": torch.get_num_threads(), "memory": memory}


def accuracy(options: Namespace, cell: Cell, seconds: float) -> Dict[str, Dict[str, Any]]:
    """Largest errors of a training step of PN against the authors' arithmetic in float64, by the tolerance of a kernel."""
    rows, channels, masked = cell["rows"], cell["channels"], cell["masked"]
    x, dy, mask = inputs(options, rows, channels, cell["dtype"])
    contenders = {}
    for groups in (g for g in options.groups if channels % g == 0):
        found = []
        ours = PowerNorm(channels, groups=groups, warmup_updates=0).to(options.device)
        theirs = AuthorsPowerNorm(channels, groups=groups).to(options.device, torch.float64)
        norms: Tuple[Tuple[Any, torch.dtype], ...] = (ours, x.dtype), (theirs, torch.float64)
        for norm, dtype in norms:
            leaf = x.to(dtype, copy=True).requires_grad_()
            y = norm(leaf, mask if masked else None)
            y.backward(dy.to(dtype))
            found.append([y, leaf.grad, norm.weight.grad, norm.bias.grad, norm.running_phi, norm.ema_gz])
        errors = [
            float((one.double().view(other.shape) - other).abs().max() / other.abs().max()) for one, other in zip(*found)
        ]
        row, total = TOLERANCE[x.dtype]
        names = ("output", "gradient", "weight", "bias", "psi2", "nu")
        contenders[f"power-g{groups}"] = {
            "errors": dict(zip(names, errors)), "tolerances": [row, total],
            "worst": max(error / (row if i < 2 else total) for i, error in enumerate(errors)),
        }
    return contenders


def accuracy_jobs(options: Namespace, memory: str) -> Iterator[Job]:
    """A training step of PN, with and without a mask; which memory does not matter."""
    if memory != options.memory[-1]:
        return
    channels = options.shapes[0][1]
    for name, masked in itertools.product(options.dtype, (False, True)):
        cell = cell_of(options, "accuracy", "train", 512, channels, name, masked)
        yield Job(cell, 0.0, functools.partial(accuracy, options, cell))


def layer(options: Namespace, cell: Cell, seconds: float) -> Dict[str, Dict[str, Any]]:
    """A norm alone."""
    rows, channels, which = cell["rows"], cell["channels"], cell["pass"]
    on_gpu = options.device == "cuda"
    x, dy, some = inputs(options, rows, channels, cell["dtype"])
    out, leaf = torch.empty_like(x), x if which == "eval" else x.clone().requires_grad_()
    calls = norms_for(options, rows, channels, x.dtype, which)
    mask = some if cell["masked"] else None
    functions = {n: one_call(c, leaf, dy, mask, which) for n, c in calls.items()}
    functions["copy"] = functools.partial(out.copy_, x)
    slow = [n for n in functions if n.startswith("authors")]
    measure = DeviceEvents() if on_gpu else clock
    found = summarize(in_turns(functions, seconds, slow, measure), PASSES[which])
    for n, c in calls.items():
        if on_gpu:
            found[n]["host_seconds"] = host_seconds(functions[n])
        if which == "train" and n != "layer-compiled" and cell["memory"] == "recycled" and not cell["masked"]:
            found[n]["saved"] = saved_bytes(c, leaf, mask)
            found[n]["peak"] = peak_bytes(functions[n], x)
    return found


def layer_jobs(options: Namespace, memory: str) -> Iterator[Job]:
    """Each pass, size and dtype; training with and without a mask."""
    passes = [which for which in PASSES if which != "forward" or options.device == "cuda"]
    for (rows, channels), name, which in itertools.product(options.shapes, options.dtype, passes):
        for masked in (False, True) if which == "train" and rows > 1 else (False,):
            cell = cell_of(options, "layer", which, rows, channels, name, masked, memory)
            weight = (2.0 if which == "train" else 1.0) * (4.0 if rows * channels >= 1 << 24 else 1.0)
            yield Job(cell, weight, functools.partial(layer, options, cell))


def encoder_jobs(options: Namespace, memory: str) -> Iterator[Job]:
    """One Transformer layer in training."""
    d, length, count = (64, 8, 4) if options.fast else (512, 32, 128)

    def make(norm: str) -> Callable[[], None]:
        model, running, _ = translation_model(norm, options, d, 2 * d, 1, 40)
        layer = model.encoder.layers[0].train()
        generator = torch.Generator().manual_seed(1)
        dtype = getattr(torch, options.model_dtype)
        x, dy = (torch.randn(length, count, d, generator=generator).to(options.device, dtype) for _ in range(2))
        x.requires_grad_()
        source, _, _ = sentences(options, count, length, 40, generator)

        def function() -> None:
            x.grad = None
            layer.zero_grad()
            with running.batch():
                layer(x, source.eq(1)).backward(dy)
            running.discard()

        return function

    def measure(seconds: float) -> Dict[str, Dict[str, Any]]:
        functions = model_functions(options, make)
        return summarize(in_turns(functions, seconds, ("authors",), model_measure(options), ROUNDS_OF_MODELS))

    if memory == options.memory[-1]:
        yield Job(cell_of(options, "encoder", "train", length * count, d, options.model_dtype, masked=True), 15.0, measure)


def step_jobs(options: Namespace, memory: str) -> Iterator[Job]:
    """A whole update, and what of it the running statistics take."""
    d, ffn, layers, symbols = (512, 1024, 6, 10000) if options.device == "cuda" else (256, 1024, 6, 8000)
    length, count = 32, 128
    if options.fast:
        d, ffn, layers, symbols, length, count = 16, 64, 3, 40, 8, 4

    def make(norm: str) -> Update:
        model, running, _ = translation_model(norm, options, d, ffn, layers, symbols)
        return Update(options, model, running, count, length, symbols)

    def measure(seconds: float) -> Dict[str, Dict[str, Any]]:
        functions: Dict[str, Any] = model_functions(options, make, ("layer", "power"))
        found = summarize(in_turns(functions, seconds, (), model_measure(options), ROUNDS_OF_MODELS))
        for name, entry in found.items():
            entry["statistics"] = statistics.median(functions[name].seconds) / found["layer"]["seconds"]
        return found

    if memory == options.memory[-1]:
        yield Job(cell_of(options, "step", "train", length * count, d, options.model_dtype, masked=True), 40.0, measure)


def generation_jobs(options: Namespace, memory: str) -> Iterator[Job]:
    """Beam search, as the commands do it: norms folded."""
    d, length, symbols = (16, 4, 40) if options.fast else (256, 20, 8000)
    for count in (1, 64) if memory == options.memory[-1] else ():

        def make(norm: str, count: int = count) -> Callable[[], None]:
            model, _, dictionary = translation_model(norm, options, d, 4 * d, 3, symbols)
            model = fold_norms(model.eval())
            generator = torch.Generator().manual_seed(1)
            source, lengths, _ = sentences(options, count, length, symbols, generator)
            search = SequenceGenerator([model], dictionary, beam_size=5, max_len_a=0, max_len_b=length, min_len=length)
            sample = {"net_input": {"src_tokens": source, "src_lengths": lengths}}

            def function() -> None:
                with torch.no_grad():
                    search.generate([model], sample)

            return function

        cell = cell_of(options, "generation", "eval", count * 5, d, options.model_dtype, masked=count > 1)
        yield Job(cell, 10.0, functools.partial(generation, options, make))


def generation(
    options: Namespace, make: Callable[[str], Optional[Callable[[], object]]], seconds: float
) -> Dict[str, Dict[str, Any]]:
    """Searches by models with LayerNorm and with PN."""
    functions = model_functions(options, make, ("layer", "power"))
    return summarize(in_turns(functions, seconds, (), model_measure(options), ROUNDS_OF_MODELS))


#: level -> its cells
JOBS = {
    "accuracy": accuracy_jobs,
    "layer": layer_jobs,
    "encoder": encoder_jobs,
    "step": step_jobs,
    "generation": generation_jobs,
}


def jobs(options: Namespace, memory: str) -> List[Job]:
    """All cells with that memory, for the present number of threads."""
    return [job for level in options.levels for job in JOBS[level](options, memory)]
