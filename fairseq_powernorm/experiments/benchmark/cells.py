"""What is measured at each level: a cell is one size, dtype and pass, with all contenders in it."""
import functools
import itertools
from argparse import Namespace
from typing import Any, Callable, Dict, Iterator, Optional, Tuple

import torch
from fairseq.sequence_generator import SequenceGenerator
from torch import Tensor

from fairseq_powernorm.kernels.interface import TOLERANCE
from fairseq_powernorm.norms import PowerNorm

from .authors_norm import AuthorsPowerNorm
from .contenders import norms_for, one_call
from .models import model_functions, model_measure, sentences, translation_model, update
from .options import PASSES
from .timing import ROUNDS_OF_MODELS, DeviceEvents, clock, host_seconds, in_turns, peak_bytes, saved_bytes, summarize

#: a cell of the record
Cell = Dict[str, Any]


def inputs(options: Namespace, rows: int, channels: int, name: str) -> Tuple[Tensor, Tensor, Tensor]:
    """x, dy and a mask (True = padding) of about a fifth of the rows, on the device."""
    generator = torch.Generator().manual_seed(1)
    x, dy = (torch.randn(rows, channels, generator=generator).to(options.device, getattr(torch, name)) for _ in range(2))
    mask = torch.rand(rows, generator=generator) < 0.2
    mask[0] = False
    return x, dy, mask.to(options.device)


def cell_of(
    options: Namespace, level: str, which: str, rows: int, channels: int, dtype: str, masked: bool
) -> Cell:
    """What a cell is, without its contenders."""
    return {"level": level, "pass": which, "rows": rows, "channels": channels, "dtype": dtype, "masked": masked,
            "device": options.device, "threads": torch.get_num_threads()}


def accuracy_cells(options: Namespace, say: Callable[[Cell], None]) -> Iterator[Cell]:
    """Largest errors of a training step of PN against the authors' arithmetic in float64, by the tolerance of a kernel."""
    for (rows, channels), name, masked in itertools.product(options.shapes, options.dtype, (False, True)):
        x, dy, mask = inputs(options, rows, channels, name)
        cell = cell_of(options, "accuracy", "train", rows, channels, name, masked)
        say(cell)
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
        yield {**cell, "contenders": contenders}


def layer_cells(options: Namespace, say: Callable[[Cell], None]) -> Iterator[Cell]:
    """A norm alone."""
    on_gpu = options.device == "cuda"
    measure = DeviceEvents() if on_gpu else clock
    passes = [which for which in PASSES if which != "forward" or on_gpu]
    for (rows, channels), name, which in itertools.product(options.shapes, options.dtype, passes):
        x, dy, some = inputs(options, rows, channels, name)
        out = torch.empty_like(x)
        for masked in (False, True):
            leaf = x if which == "eval" else x.clone().requires_grad_()
            calls = norms_for(options, rows, channels, x.dtype, which)
            mask = some if masked else None
            functions = {n: one_call(c, leaf, dy, mask, which) for n, c in calls.items()}
            functions["copy"] = functools.partial(out.copy_, x)
            slow = [n for n in functions if n.startswith("authors")]
            cell = cell_of(options, "layer", which, rows, channels, name, masked)
            say(cell)
            found = summarize(in_turns(functions, options.seconds, slow, measure), PASSES[which])
            for n, c in calls.items():
                if on_gpu:
                    found[n]["host_seconds"] = host_seconds(functions[n])
                if which == "train" and n != "layer-compiled":
                    found[n]["saved"] = saved_bytes(c, leaf, mask)
                    found[n]["peak"] = peak_bytes(functions[n], x)
            yield {**cell, "contenders": found}


def encoder_cells(options: Namespace, say: Callable[[Cell], None]) -> Iterator[Cell]:
    """One Transformer layer in training."""
    d, length, count = (64, 8, 4) if options.quick else (512, 32, 128)

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

    cell = cell_of(options, "encoder", "train", length * count, d, options.model_dtype, masked=True)
    say(cell)
    yield {**cell, "contenders": summarize(in_turns(model_functions(options, make), options.seconds * 3, ("authors",),
                                                    model_measure(options), ROUNDS_OF_MODELS))}


def step_cells(options: Namespace, say: Callable[[Cell], None]) -> Iterator[Cell]:
    """A whole update."""
    d, ffn, layers, symbols = (512, 1024, 6, 10000) if options.device == "cuda" else (256, 1024, 3, 8000)
    length, count = 32, 128
    if options.quick:
        d, ffn, layers, symbols, length, count = 16, 64, 3, 40, 8, 4

    def make(norm: str) -> Callable[[], None]:
        model, running, _ = translation_model(norm, options, d, ffn, layers, symbols)
        return update(options, model, running, count, length, symbols)

    cell = cell_of(options, "step", "train", length * count, d, options.model_dtype, masked=True)
    say(cell)
    functions = model_functions(options, make)
    yield {**cell, "contenders": summarize(in_turns(functions, options.seconds * 20, ("authors",), model_measure(options),
                                                    ROUNDS_OF_MODELS))}


def generation_cells(options: Namespace, say: Callable[[Cell], None]) -> Iterator[Cell]:
    """Beam search."""
    d, length, count, symbols = (16, 4, 2, 40) if options.quick else (256, 20, 32, 8000)

    def make(norm: str) -> Optional[Callable[[], None]]:
        if norm == "authors":
            return None
        model, _, dictionary = translation_model(norm, options, d, 4 * d, 3, symbols)
        generator = torch.Generator().manual_seed(1)
        source, lengths, _ = sentences(options, count, length, symbols, generator)
        search = SequenceGenerator([model.eval()], dictionary, beam_size=5, max_len_a=0, max_len_b=length, min_len=length)
        sample = {"net_input": {"src_tokens": source, "src_lengths": lengths}}

        def function() -> None:
            with torch.no_grad():
                search.generate([model], sample)

        return function

    cell = cell_of(options, "generation", "eval", count * 5, d, options.model_dtype, masked=True)
    say(cell)
    yield {**cell, "contenders": summarize(in_turns(model_functions(options, make), options.seconds * 5, (),
                                                    model_measure(options), ROUNDS_OF_MODELS))}


#: level -> what measures it
CELLS = {
    "accuracy": accuracy_cells,
    "layer": layer_cells,
    "encoder": encoder_cells,
    "step": step_cells,
    "generation": generation_cells,
}
