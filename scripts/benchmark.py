"""Measures the norms against torch's LayerNorm: time, memory, accuracy, and whether the targets are met.

    python scripts/benchmark.py                      # the CPU, all levels; some minutes; prints tables
    python scripts/benchmark.py --device cuda        # the GPU
    python scripts/benchmark.py --output NAME        # ... and writes results/benchmark/NAME/: record.json, table.md, figure.png
    python scripts/benchmark.py --check              # ... and exits with status 1 if a target is missed
    python scripts/benchmark.py --levels layer --shapes 4096x512 --extra mypackage.norms:FastNorm

Levels: `accuracy` (a training step of PN against the authors' arithmetic in float64), `layer` (a norm alone, training and
evaluation), `encoder` (one Transformer layer, training), `step` (a whole update on 4,096 tokens: on a CPU of a 3+3-layer
Transformer, on a GPU of one as large as IWSLT's, in float16), `generation` (beam search). All contenders of a cell run in one
process in turns, so that whatever else the machine does meets them all, each time once untimed, if that is quick, and once
timed; a ratio is the median over rounds of a contender's time divided by LayerNorm's in the same round. Memory is recycled
between calls, as it is in a long training; --fresh maps new pages in every call instead (CPU). The fraction of the bandwidth
limit is the time in which a copy moves as many bytes as must be moved (training: five tensors; forward pass alone and
evaluation: two), divided by the time taken. On a GPU a norm alone is timed by the GPU's own events, behind other work, with
caches that hold nothing of it: without the time in which the host prepares it, which is given beside it; whole models are
timed by the clock. --extra adds module:Class, built as Class(channels) and called as norm(x) on N x C. Timings mean something
on a machine that does nothing else.
"""

import argparse
import ctypes
import importlib
import itertools
import json
import os
import platform
import shutil
import statistics
import sys
import time
from pathlib import Path

from fairseq_powernorm.experiments.settings import (
    ROOT, TOOLS, UserError, choose, locked, main, versions, whole_directory, write_json,
)

LEVELS = ("accuracy", "layer", "encoder", "step", "generation")
DEVICES = ("cpu", "cuda")
#: pass of a layer -> tensors of x's size that must be moved
PASSES = {"train": 5, "forward": 2, "eval": 2}
DTYPES = ("float32", "bfloat16", "float16")
SHAPES = {"cpu": "1x512,512x512,4096x512,16384x1024", "cuda": "4096x512,16384x512,16384x1024"}
CONTENDERS = ("layer", "layer-compiled", "rms", "batch", "power", "power-torch", "authors")
#: what must be shown on a device: description, level, pass, dtype, contender, numbers of rows, statistic over cells, bound of
#: the ratio to LayerNorm
LARGE, SMALL, ROW = {4096, 16384}, {512}, {1}
TARGETS = {"cpu": [
    ("training, float32, every cell", "layer", "train", "float32", "power", LARGE, max, 1.00),
    ("training, float32, median", "layer", "train", "float32", "power", LARGE, statistics.median, 0.70),
    ("training, bfloat16, every cell", "layer", "train", "bfloat16", "power", LARGE, max, 0.52),
    ("training, bfloat16, median", "layer", "train", "bfloat16", "power", LARGE, statistics.median, 0.45),
    ("evaluation, float32, median", "layer", "eval", "float32", "power", LARGE, statistics.median, 0.75),
    ("evaluation, bfloat16, median", "layer", "eval", "bfloat16", "power", LARGE, statistics.median, 0.55),
    ("plain torch, float32, every cell", "layer", "train", "float32", "power-torch", LARGE, max, 3.3),
    ("plain torch, bfloat16, every cell", "layer", "train", "bfloat16", "power-torch", LARGE, max, 2.5),
    ("512 rows, float32", "layer", "train", "float32", "power", SMALL, max, 1.1),
    ("512 rows, bfloat16", "layer", "train", "bfloat16", "power", SMALL, max, 1.1),
    ("one row, float32", "layer", "train", "float32", "power", ROW, max, 1.5),
    ("one row, bfloat16", "layer", "train", "bfloat16", "power", ROW, max, 1.5),
    ("whole training step", "step", "train", "float32", "power", None, max, 1.01),
], "cuda": [
    ("training, float32, every cell", "layer", "train", "float32", "power", {16384}, max, 1.00),
    ("training, bfloat16, every cell", "layer", "train", "bfloat16", "power", {16384}, max, 1.00),
    ("whole training step, float16", "step", "train", "float16", "power", None, max, 1.02),
]}
#: on a GPU: dtypes whose forward pass in training reaches at least that share of the bandwidth of a copy, and where
FORWARD_SHARE = ("float32", "bfloat16"), {16384}, 0.80
#: on a CPU: how many times slower than `power` the authors' arithmetic is, at least
SLOWER = [("authors' arithmetic, float32", "float32", 25.0), ("authors' arithmetic, bfloat16", "bfloat16", 35.0)]
SAVED = ("bytes saved for the backward pass / those of x", 1.01)


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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
    parser.add_argument("--seconds", type=float, default=2.0, help="measuring time of a cell (2), at least five rounds, 15 of models")
    parser.add_argument("--fresh", action="store_true", help="map new pages in every call instead of recycling memory")
    parser.add_argument("--quick", action="store_true", help="tiny sizes and one round: shows that it runs, times mean nothing")
    parser.add_argument("--check", action="store_true", help="exit with status 1 if a target is missed")
    parser.add_argument("--output", metavar="NAME", help="write results/benchmark/NAME, which must not exist")
    options = parser.parse_args(arguments)
    if not options.seconds > 0:
        parser.error(f"argument --seconds: {options.seconds}: must be positive")
    options.shapes = options.shapes or shapes(SHAPES[options.device])
    options.model_dtype = "float16" if options.device == "cuda" else "float32"
    if options.quick:
        options.shapes, options.seconds = [(min(rows, 32), 64) for rows, _ in options.shapes], 0.0
        options.contenders = [name for name in options.contenders if name != "layer-compiled"]
    return options


# ---------------------------------------------------------------- measuring


def set_memory(fresh):
    """Tell glibc to keep freed memory (or to give large blocks back at once); elsewhere nothing is changed."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    trim_threshold, mmap_threshold, mmap_max = -1, -3, -4
    mallopt(mmap_max, 65536 if fresh else 0)
    mallopt(mmap_threshold, 128 * 1024)
    mallopt(trim_threshold, 128 * 1024 if fresh else 2**31 - 1)


#: seconds; a longer call is not repeated untimed
QUICK = 0.2
#: of whole models, of which a norm is so small a part that few rounds do not show it
ROUNDS_OF_MODELS = 15


def clock(function):
    """Seconds that a call takes, by the clock."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def device_clock(function):
    """Seconds that a call takes on the GPU, its host's work included, by the clock."""
    import torch

    torch.cuda.synchronize()
    return clock(lambda: (function(), torch.cuda.synchronize()))


class DeviceEvents:
    """Seconds that the GPU itself works for a call: between two events, behind other work while the host prepares it.

    That work writes more than the caches hold.
    """

    BYTES, SECONDS = 1 << 28, 0.003

    def __init__(self):
        import torch

        self.torch = torch
        self.other = torch.empty(self.BYTES, dtype=torch.uint8, device="cuda")
        self.times = 1
        self.times = max(1, round(self.SECONDS / min(self(self.other.zero_) for _ in range(3))))

    def __call__(self, function):
        begin, end = (self.torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(self.times):
            self.other.zero_()
        begin.record()
        function()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1000


def host_seconds(function):
    """Seconds after which the host goes on while the GPU works on a call, median."""
    import torch

    found = []
    for _ in range(11):
        torch.cuda.synchronize()
        found.append(clock(function))
    torch.cuda.synchronize()
    return statistics.median(found)


def in_turns(functions, seconds, slow=(), measure=clock, rounds=5):
    """name -> times in seconds, one per round; those named in `slow` take part in the first five rounds only.

    seconds: for how long, but at least that many rounds; 0: one round. A timed call follows an untimed one, where that is
    quick: what is timed is then the state that a contender leaves to itself, not that of the one before.
    """
    for function in functions.values():
        function()
    quick = [name for name, function in functions.items() if seconds and clock(function) < QUICK]
    times = {name: [] for name in functions}
    begin, order = time.perf_counter(), list(functions)
    for number in itertools.count(1):
        for name in order:
            if number <= 5 or name not in slow:
                if name in quick:
                    functions[name]()
                times[name].append(measure(functions[name]))
        order = order[1:] + order[:1]
        if number >= rounds and time.perf_counter() - begin > seconds or not seconds:
            return times


def quartiles(values):
    if len(values) < 2:
        return [values[0]] * 3
    return statistics.quantiles(values, n=4, method="inclusive")


def summarize(times, must_move=None):
    """For each contender: time, ratio to LayerNorm and fraction of the bandwidth limit; medians and quartiles."""
    copy = statistics.median(times.pop("copy")) if "copy" in times else None
    found = {}
    for name, values in times.items():
        low, middle, high = quartiles(values)
        ratios = quartiles([value / layer for value, layer in zip(values, times["layer"])])
        found[name] = {"seconds": middle, "seconds_quartiles": [low, high], "ratio": ratios[1],
                       "ratio_quartiles": [ratios[0], ratios[2]], "rounds": len(values)}
        if copy is not None:
            found[name]["bandwidth_fraction"] = copy * must_move / 2 / middle
    return found


def saved_bytes(norm, x, mask):
    """Bytes of the storages kept for the backward pass, parameters left out, by those of x."""
    import torch

    known, kept = {p.untyped_storage().data_ptr() for p in norm.parameters()}, {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = norm(x, mask)
    del y
    return sum(kept.values()) / (x.numel() * x.element_size())


def peak_bytes(call, x):
    """Largest amount of memory that the call held at a time beyond what was there, by the bytes of x."""
    import torch

    call()
    if x.is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return (torch.cuda.max_memory_allocated() - before) / (x.numel() * x.element_size())
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak / (x.numel() * x.element_size())


# ---------------------------------------------------------------- contenders


class Call:
    """A norm called as norm(x, mask), by a certain kernel and with a switch of its own."""

    def __init__(self, norm, takes_mask, kernel=None):
        self.norm, self.takes_mask, self.kernel = norm, takes_mask, kernel

    def __call__(self, x, mask):
        return self.norm(x, mask) if self.takes_mask else self.norm(x)

    def parameters(self):
        return self.norm.parameters()


def extra_class(name):
    module, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"--extra {name!r}: must be MODULE:CLASS that can be imported: {error}") from None


def norms_for(options, rows, channels, dtype, which):
    """name -> Call of each contender at the level of a layer."""
    import torch
    from fairseq_powernorm.experiments.benchmark.authors_norm import AuthorsPowerNorm
    from fairseq_powernorm.norms import PowerNorm

    groups = [g for g in options.groups if channels % g == 0]
    makers = {"layer": lambda: Call(torch.nn.LayerNorm(channels), False)}
    for name in options.contenders:
        if name == "layer-compiled":
            if shutil.which(os.environ.get("CXX", "g++")):
                makers[name] = lambda: Call(torch.compile(torch.nn.LayerNorm(channels), dynamic=False), False)
        elif name == "rms":
            makers[name] = lambda: Call(torch.nn.RMSNorm(channels), False)
        elif name == "batch" and rows > 1:
            makers[name] = lambda: Call(torch.nn.BatchNorm1d(channels), False)
        elif name in ("power", "power-torch"):
            for g in groups:
                makers[f"{name}-g{g}"] = lambda g=g, name=name: Call(
                    PowerNorm(channels, groups=g, warmup_updates=0), True, "torch" if name == "power-torch" else None)
        elif name == "authors" and which == "train":
            for g in groups:
                makers[f"{name}-g{g}"] = lambda g=g: Call(AuthorsPowerNorm(channels, groups=g), True)
    for name in options.extra:
        makers[name] = lambda name=name: Call(extra_class(name)(channels), False)
    calls = {}
    for name, make in makers.items():
        calls[name] = make()
        calls[name].norm.to(options.device, dtype).train(which != "eval")
    return calls


def one_call(call, x, dy, mask, which):
    """What is timed: a forward and a backward pass, a forward pass in training, or an evaluation."""
    import torch

    def train():
        x.grad = None
        for parameter in call.parameters():
            parameter.grad = None
        call(x, mask).backward(dy)

    def evaluate():
        with torch.no_grad():
            call(x, mask)

    function = {"train": train, "forward": lambda: call(x, mask), "eval": evaluate}[which]
    return function if call.kernel is None else on_kernel(call.kernel, function)


def on_kernel(name, function):
    """The function, with that kernel of PN."""
    from fairseq_powernorm import kernels

    def restricted():
        with kernels.only(name):
            function()

    return restricted


# ---------------------------------------------------------------- levels


def inputs(options, rows, channels, name):
    """x, dy and a mask (True = padding) of about a fifth of the rows, on the device."""
    import torch

    generator = torch.Generator().manual_seed(1)
    x, dy = (torch.randn(rows, channels, generator=generator).to(options.device, getattr(torch, name)) for _ in range(2))
    mask = torch.rand(rows, generator=generator) < 0.2
    mask[0] = False
    return x, dy, mask.to(options.device)


def cell_of(options, level, which, rows, channels, dtype, masked):
    import torch

    return {"level": level, "pass": which, "rows": rows, "channels": channels, "dtype": dtype, "masked": masked,
            "device": options.device, "threads": torch.get_num_threads()}


def accuracy_cells(options, say):
    """Largest errors of a training step of PN against the authors' arithmetic in float64, by the tolerance of a kernel."""
    import torch
    from fairseq_powernorm.experiments.benchmark.authors_norm import AuthorsPowerNorm
    from fairseq_powernorm.kernels.reference import TOLERANCE
    from fairseq_powernorm.norms import PowerNorm

    for (rows, channels), name, masked in itertools.product(options.shapes, options.dtype, (False, True)):
        x, dy, mask = inputs(options, rows, channels, name)
        cell = cell_of(options, "accuracy", "train", rows, channels, name, masked)
        say(cell)
        contenders = {}
        for groups in (g for g in options.groups if channels % g == 0):
            found = []
            for kind, dtype in ((PowerNorm, x.dtype), (AuthorsPowerNorm, torch.float64)):
                norm = kind(channels, groups=groups, **({"warmup_updates": 0} if kind is PowerNorm else {}))
                norm = norm.to(options.device, None if kind is PowerNorm else torch.float64)
                leaf = x.to(dtype, copy=True).requires_grad_()
                y = norm(leaf, mask if masked else None)
                y.backward(dy.to(dtype))
                found.append([y, leaf.grad, norm.weight.grad, norm.bias.grad, norm.running_phi, norm.ema_gz])
            errors = [float((one.double().view(other.shape) - other).abs().max() / other.abs().max()) for one, other in zip(*found)]
            row, total = TOLERANCE[x.dtype]
            names = ("output", "gradient", "weight", "bias", "psi2", "nu")
            contenders[f"power-g{groups}"] = {
                "errors": dict(zip(names, errors)), "tolerances": [row, total],
                "worst": max(error / (row if i < 2 else total) for i, error in enumerate(errors)),
            }
        yield {**cell, "contenders": contenders}


def layer_cells(options, say):
    import torch

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
            functions["copy"] = lambda: out.copy_(x)
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


def translation_model(norm, options, d, ffn, layers, symbols):
    """A Transformer with the given norm everywhere, and what counts its statistics."""
    from argparse import Namespace
    from types import SimpleNamespace

    import torch
    from fairseq_powernorm.experiments.benchmark.authors_norm import AuthorsPowerNorm
    from fairseq import models
    from fairseq.data import Dictionary

    import fairseq_powernorm  # noqa: F401
    from fairseq_powernorm.norms import PowerNorm
    from fairseq_powernorm.statistics import RunningStatistics

    dictionary = Dictionary()
    for i in range(symbols):
        dictionary.add_symbol(f"w{i}")
    kind = "power" if norm in ("power-torch", "authors") else norm
    sizes = {f"{side}_{key}": value for side in ("encoder", "decoder") for key, value in
             dict(layers=layers, embed_dim=d, ffn_embed_dim=ffn, attention_heads=4).items()}
    places = {f"{side}_norm_{place}": kind for side in ("encoder", "decoder") for place in ("self", "ff")}
    torch.manual_seed(1)
    task = SimpleNamespace(source_dictionary=dictionary, target_dictionary=dictionary)
    model = models.build_model(Namespace(
        _name="transformer_pn_iwslt_de_en", **sizes, **places, dropout=0.0, norm_warmup_updates=0,
        share_all_embeddings=True), task)
    if norm == "authors":
        for module in list(model.modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, PowerNorm):
                    theirs = AuthorsPowerNorm(child.dim, groups=child.groups)
                    theirs.forward = (lambda x, mask=None, slot=child.mask_slot, forward=theirs.forward:
                                      forward(x, slot.padding_mask if mask is None and slot is not None else mask))
                    setattr(module, name, theirs)
    model = model.to(options.device, getattr(torch, options.model_dtype))
    return model, RunningStatistics(model), dictionary


def model_measure(options):
    return device_clock if options.device == "cuda" else clock


def sentences(options, count, length, symbols, generator, torch):
    """Left-padded source and right-padded target of unequal lengths (pad = 1)."""
    lengths = torch.randint(max(1, length * 2 // 3), length + 1, (count,), generator=generator)
    lengths[0] = length
    source, target = (torch.randint(4, symbols, (count, length), generator=generator) for _ in range(2))
    positions = torch.arange(length)
    source[positions >= lengths.unsqueeze(1)] = 1
    target[positions >= lengths.unsqueeze(1)] = 1
    return [each.to(options.device) for each in (source.flip(1), lengths, target)]


def model_functions(options, make):
    """name -> function for each norm that a whole model can have."""
    functions = {}
    for name in ("layer", "rms", "batch", "power", "power-torch", "authors"):
        if name != "layer" and name not in options.contenders:
            continue
        if name == "authors" and options.model_dtype == "float16":  # its statistics would be float16, too
            continue
        function = make(name)
        if function is None:
            continue
        functions[name] = on_kernel("torch", function) if name == "power-torch" else function
    return functions


def encoder_cells(options, say):
    import torch

    d, length, count = (64, 8, 4) if options.quick else (512, 32, 128)

    def make(norm):
        model, running, _ = translation_model(norm, options, d, 2 * d, 1, 40)
        layer = model.encoder.layers[0].train()
        generator = torch.Generator().manual_seed(1)
        dtype = getattr(torch, options.model_dtype)
        x, dy = (torch.randn(length, count, d, generator=generator).to(options.device, dtype) for _ in range(2))
        x.requires_grad_()
        source, _, _ = sentences(options, count, length, 40, generator, torch)

        def function():
            x.grad = None
            layer.zero_grad()
            with running.batch():
                layer(x, source.eq(1)).backward(dy)
            running.discard()

        return function

    cell = cell_of(options, "encoder", "train", length * count, d, options.model_dtype, True)
    say(cell)
    yield {**cell, "contenders": summarize(in_turns(model_functions(options, make), options.seconds * 3, ("authors",),
                                                    model_measure(options), ROUNDS_OF_MODELS))}


class HalfPrecision:
    """Fairseq's own optimizer of --fp16: a float32 copy of the parameters, and a loss scale."""

    def __init__(self, model, on_gpu):
        from fairseq.dataclass.configs import FairseqConfig
        from fairseq.optim import FP16Optimizer
        from fairseq.optim.adam import FairseqAdamConfig
        from omegaconf import OmegaConf

        config = OmegaConf.structured(FairseqConfig)
        config.optimizer = OmegaConf.create({**OmegaConf.to_container(OmegaConf.structured(FairseqAdamConfig)), "lr": [1e-5]})
        config.optimizer._name = "adam"
        config.common.fp16, config.common.fp16_no_flatten_grads = True, not on_gpu
        self.optimizer = FP16Optimizer.build_optimizer(config, [p for p in model.parameters() if p.requires_grad])

    def zero_grad(self):
        self.optimizer.zero_grad()

    @property
    def scale(self):
        return self.optimizer.scaler.loss_scale

    def backward(self, loss):
        self.optimizer.backward(loss)

    def step(self):
        try:
            self.optimizer.clip_grad_norm(1.0)
            self.optimizer.step()
        except OverflowError:  # the scale has been halved
            pass


class SinglePrecision:
    """torch's Adam."""

    scale = 1.0

    def __init__(self, model, on_gpu):
        import torch

        self.clip = torch.nn.utils.clip_grad_norm_
        self.parameters = list(model.parameters())
        self.optimizer = torch.optim.Adam(self.parameters, lr=1e-5)

    def zero_grad(self):
        self.optimizer.zero_grad()

    def backward(self, loss):
        loss.backward()

    def step(self):
        self.clip(self.parameters, 1.0)
        self.optimizer.step()


def update(options, model, running, count, length, symbols):
    """One update of a model on count sentences, as a function."""
    import torch

    model.train()
    optimizer = (HalfPrecision if options.model_dtype == "float16" else SinglePrecision)(model, options.device == "cuda")
    source, lengths, target = sentences(options, count, length, symbols, torch.Generator().manual_seed(1), torch)

    def function():
        optimizer.zero_grad()
        with running.batch(gradient_scale=optimizer.scale):
            logits, _ = model(source, lengths, target)
            optimizer.backward(torch.nn.functional.cross_entropy(
                logits.flatten(0, 1).float(), target.flatten(), ignore_index=1, label_smoothing=0.1))
        running.reduce()
        optimizer.step()
        running.commit()

    return function


def step_cells(options, say):
    d, ffn, layers, symbols = (512, 1024, 6, 10000) if options.device == "cuda" else (256, 1024, 3, 8000)
    length, count = 32, 128
    if options.quick:
        d, ffn, layers, symbols, length, count = 16, 64, 3, 40, 8, 4

    def make(norm):
        model, running, _ = translation_model(norm, options, d, ffn, layers, symbols)
        return update(options, model, running, count, length, symbols)

    cell = cell_of(options, "step", "train", length * count, d, options.model_dtype, True)
    say(cell)
    functions = model_functions(options, make)
    yield {**cell, "contenders": summarize(in_turns(functions, options.seconds * 20, ("authors",), model_measure(options),
                                                    ROUNDS_OF_MODELS))}


def generation_cells(options, say):
    import torch
    from fairseq.sequence_generator import SequenceGenerator

    d, length, count, symbols = (16, 4, 2, 40) if options.quick else (256, 20, 32, 8000)

    def make(norm):
        if norm == "authors":
            return None
        model, _, dictionary = translation_model(norm, options, d, 4 * d, 3, symbols)
        generator = torch.Generator().manual_seed(1)
        source, lengths, _ = sentences(options, count, length, symbols, generator, torch)
        search = SequenceGenerator([model.eval()], dictionary, beam_size=5, max_len_a=0, max_len_b=length, min_len=length)
        sample = {"net_input": {"src_tokens": source, "src_lengths": lengths}}

        def function():
            with torch.no_grad():
                search.generate([model], sample)

        return function

    cell = cell_of(options, "generation", "eval", count * 5, d, options.model_dtype, True)
    say(cell)
    yield {**cell, "contenders": summarize(in_turns(model_functions(options, make), options.seconds * 5, (),
                                                    model_measure(options), ROUNDS_OF_MODELS))}


CELLS = {"accuracy": accuracy_cells, "layer": layer_cells, "encoder": encoder_cells, "step": step_cells, "generation": generation_cells}


# ---------------------------------------------------------------- what is said about it


def named(contenders, name):
    """The entries of a contender, whatever its groups."""
    return [(full, entry) for full, entry in contenders.items() if full == name or full.startswith(f"{name}-g")]


def checks(cells):
    """Each target of the cells' device that they say something about: description, value, bound, is it met?"""
    found = []
    device = cells[0]["device"] if cells else "cpu"

    def cells_of(level, which, dtype=None, rows=None):
        return [cell for cell in cells if (cell["level"], cell["pass"]) == (level, which)
                and (dtype is None or cell["dtype"] == dtype) and (rows is None or cell["rows"] in rows)]

    def values(cells, contender, key):
        return [entry[key] for cell in cells for _, entry in named(cell["contenders"], contender)]

    def judge(text, numbers, statistic, bound, at_least=False):
        if numbers:
            value = statistic(numbers)
            met = value >= bound if at_least else value <= bound
            found.append({"target": text, "value": value, "bound": f"{'>=' if at_least else '<='} {bound}", "met": met})

    for text, level, which, dtype, contender, rows, statistic, bound in TARGETS[device]:
        judge(text, values(cells_of(level, which, dtype, rows), contender, "ratio"), statistic, bound)
    if device == "cuda":
        dtypes, rows, share = FORWARD_SHARE
        for dtype in dtypes:
            numbers = values(cells_of("layer", "forward", dtype, rows), "power", "bandwidth_fraction")
            judge(f"forward pass, {dtype}, share of the bandwidth of a copy", numbers, min, share, at_least=True)
    for text, dtype, bound in SLOWER if device == "cpu" else ():
        numbers = []
        for cell in cells_of("layer", "train", dtype, LARGE):
            ours = {full.rpartition("-")[2]: entry["seconds"] for full, entry in named(cell["contenders"], "power")}
            numbers += [entry["seconds"] / ours[full.rpartition("-")[2]]
                        for full, entry in named(cell["contenders"], "authors") if full.rpartition("-")[2] in ours]
        judge(f"{text}, median", numbers, statistics.median, bound, at_least=True)
    for dtype in DTYPES:
        judge(f"{SAVED[0]}, {dtype}", values(cells_of("layer", "train", dtype, LARGE), "power", "saved"), max, SAVED[1])
    judge("errors of a training step / tolerances", values(cells_of("accuracy", "train"), "power", "worst"), max, 1.0)
    return found


def show(record):
    """The record as Markdown."""
    timed, accurate = [], []
    for cell in record["cells"]:
        for name, entry in cell["contenders"].items():
            words = [cell["level"], cell["pass"], f"{cell['rows']} x {cell['channels']}", cell["dtype"],
                     "yes" if cell["masked"] else "no", str(cell["threads"]), name]
            if cell["level"] == "accuracy":
                row = [*words[2:5], name, *(f"{error:.1e}" for error in entry["errors"].values()), f"{entry['worst']:.2f}"]
                accurate.append("| " + " | ".join(row) + " |")
                continue
            low, high = entry["ratio_quartiles"]
            optional = [f"{entry[key]:.2f}" if key in entry else "" for key in ("bandwidth_fraction", "saved", "peak")]
            host = f"{entry['host_seconds'] * 1e6:,.0f}" if "host_seconds" in entry else ""
            timed.append("| " + " | ".join([*words, f"{entry['seconds'] * 1e6:,.0f}", host,
                                            f"{entry['ratio']:.2f} ({low:.2f} - {high:.2f})", *optional]) + " |")
    lines = []
    if timed:
        lines += ["| level | pass | rows x C | dtype | mask | threads | norm | time (us) | host (us) | / LayerNorm (quartiles) "
                  "| of limit | saved / x | peak / x |", "|" + " --- |" * 13, *timed]
    if accurate:
        lines += [""] * bool(timed) + [
            "| rows x C | dtype | mask | norm | output | gradient | weight | bias | psi^2 | nu | worst / tolerance |",
            "|" + " --- |" * 11, *accurate]
    if record["checks"]:
        lines += ["", "| target | measured | bound | met |", "| --- | --- | --- | --- |"]
        lines += [f"| {c['target']} | {c['value']:.3f} | {c['bound']} | {'yes' if c['met'] else '**no**'} |"
                  for c in record["checks"]]
    return "\n".join(lines) + "\n"


def draw(record, path):
    """Ratios to LayerNorm: a panel for each level, pass and dtype, in it a row for each contender, in it a mark for each size,
    the median of its cells, with their range."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    panels = {}
    for cell in record["cells"]:
        if cell["level"] == "accuracy":
            continue
        contenders = panels.setdefault((cell["level"], cell["pass"], cell["dtype"]), {})
        for name, entry in cell["contenders"].items():
            contenders.setdefault(name, {}).setdefault((cell["rows"], cell["channels"]), []).append(entry["ratio"])
    if not panels:
        return
    heights = [1 + 0.25 * len(contenders) for contenders in panels.values()]
    figure, axes = pyplot.subplots(len(panels), 1, figsize=(8, sum(heights)), height_ratios=heights, layout="constrained",
                                   squeeze=False)
    for axis, ((level, which, dtype), contenders) in zip(axes[:, 0], panels.items()):
        known = [name for contender in CONTENDERS for name, _ in named(contenders, contender)]
        names = list(dict.fromkeys([*known, *contenders]))
        sizes = sorted({size for each in contenders.values() for size in each})
        for number, size in enumerate(sizes):
            here = [(row, contenders[name][size]) for row, name in enumerate(names) if size in contenders[name]]
            offset = 0.6 * ((number + 0.5) / len(sizes) - 0.5)
            middle = [statistics.median(values) for _, values in here]
            error = [[m - min(values) for m, (_, values) in zip(middle, here)],
                     [max(values) - m for m, (_, values) in zip(middle, here)]]
            axis.errorbar(middle, [row + offset for row, _ in here], xerr=error, fmt="o", markersize=4, elinewidth=1.5,
                          label=f"{size[0]} x {size[1]}")
        axis.axvline(1.0, color="black", linewidth=0.8)
        axis.set_yticks(range(len(names)), names)
        axis.invert_yaxis()
        if level == "layer":
            axis.set_xscale("log")
            axis.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
            axis.xaxis.set_minor_locator(ticker.NullLocator())
        axis.xaxis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
        axis.grid(axis="x", alpha=0.3)
        axis.set_title(f"{level}, {which}, {dtype}: time / LayerNorm", fontsize=9)
        axis.legend(title="rows x C", fontsize=7, title_fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def processor(device):
    """Name of what is measured."""
    if device == "cuda":
        import torch

        return torch.cuda.get_device_name()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def benchmark(arguments):
    options = parse(arguments)
    target = None
    if options.output:
        target = ROOT / "results" / "benchmark" / options.output
        if Path(options.output).name != options.output:
            raise UserError(f"--output {options.output!r}: must be a name without a directory")
        if target.exists():
            raise UserError(f"--output {options.output!r}: {target} exists; choose another name or remove it")
    for name in options.extra:
        extra_class(name)

    import torch
    from fairseq_powernorm import kernels

    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device 'cuda': torch finds no CUDA device; valid here: cpu")
    set_memory(options.fresh)
    name, reasons = kernels.explain(options.device, torch.float32)
    print(f"kernel: {kernels.KERNELS[name].describe()} {' '.join(reasons)}".rstrip())
    own = [torch.get_num_threads()] if options.device == "cuda" else [1, 2] if (os.cpu_count() or 1) > 1 else [1]
    threads = options.threads or own
    cells = []

    def say(cell):
        print(" ".join(f"{key}={value}" for key, value in cell.items()), file=sys.stderr, flush=True)

    for number in threads:
        torch.set_num_threads(number)
        for level in options.levels:
            cells += CELLS[level](options, say)
    record = {
        "schema": 1, "kind": "benchmark", "device": options.device, "processor": processor(options.device),
        "cores": os.cpu_count(), "memory": "fresh" if options.fresh else "recycled",
        "kernel": kernels.KERNELS[name].describe(), "quick": options.quick, "arguments": arguments, "cells": cells,
        "checks": [] if options.quick else checks(cells), "versions": {"python": platform.python_version(), **versions(TOOLS)},
    }
    print(show(record), end="")
    if target is not None:
        from fairseq_powernorm.experiments.evaluation.evaluate import commit

        record["git_commit"] = commit()
        with locked(target), whole_directory(target) as folder:
            write_json(folder / "record.json", record)
            (folder / "table.md").write_text(show(record), encoding="utf-8")
            draw(record, folder / "figure.png")
        print(f"wrote {target.relative_to(ROOT)}")
    missed = [each["target"] for each in record["checks"] if not each["met"]]
    if options.check and missed:
        print(f"missed: {'; '.join(missed)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    main(benchmark, sys.argv[1:])
