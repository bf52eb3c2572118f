"""Measures the norms against torch's LayerNorm on this machine's CPU: time, memory, and whether the targets are met.

    python scripts/benchmark.py                      # all levels; some minutes; prints tables
    python scripts/benchmark.py --output NAME        # ... and writes results/benchmark/NAME/: record.json, table.md, figure.png
    python scripts/benchmark.py --check              # ... and exits with status 1 if a target is missed
    python scripts/benchmark.py --levels layer --shapes 4096x512 --extra mypackage.norms:FastNorm

Levels: `layer` (a norm alone, training and evaluation), `encoder` (one Transformer layer, training), `step` (a whole update
of a 3+3-layer Transformer on 4,096 tokens), `generation` (beam search). All contenders of a cell run in one process in
turns, so that whatever else the machine does meets them all; a ratio is the median over rounds of a contender's time divided by
LayerNorm's in the same round. Memory is recycled between calls, as it is in a long training; --fresh maps new pages
in every call instead. The fraction of the bandwidth limit is the time in which a copy moves as many bytes as must be moved
(training: five tensors; evaluation: two), divided by the time taken. --extra adds module:Class, built as Class(channels) and
called as norm(x) on N x C. Timings mean something on a machine that does nothing else.
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

sys.path[:0] = [str(Path(__file__).resolve().parent / "lib"), str(Path(__file__).resolve().parents[1])]

from settings import ROOT, TOOLS, UserError, choose, locked, main, versions, whole_directory, write_json  # noqa: E402

LEVELS = ("layer", "encoder", "step", "generation")
PASSES = ("train", "eval")
DTYPES = ("float32", "bfloat16")
CONTENDERS = ("layer", "layer-compiled", "rms", "batch", "power", "power-torch", "authors")
#: what must be shown: description -> (level, pass, dtype, contender, channels by rows, statistic over cells, bound). A bound is
#: on the ratio to LayerNorm, or with "slower" on how many times slower than `power` a contender is, at least.
LARGE, SMALL, ROW = {4096, 16384}, {512}, {1}
TARGETS = [
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
]
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
    parser.add_argument("--levels", type=words(LEVELS), default=list(LEVELS), help=f"of {', '.join(LEVELS)} (all)")
    parser.add_argument("--shapes", "--rows", type=shapes, default=shapes("1x512,512x512,4096x512,16384x1024"),
                        metavar="ROWSxCHANNELS,...", help="of the level `layer` (1x512,512x512,4096x512,16384x1024)")
    parser.add_argument("--dtype", type=words(DTYPES), default=list(DTYPES), help=f"of {', '.join(DTYPES)} (all)")
    parser.add_argument("--groups", type=numbers, default=[1, 4], help="channel groups of PN's layer scale (1,4)")
    parser.add_argument("--threads", type=numbers, default=None, help="numbers of threads (1 and, if there are two cores, 2)")
    parser.add_argument("--contenders", type=words(CONTENDERS), default=list(CONTENDERS),
                        help=f"of {', '.join(CONTENDERS)} (all; `layer` always)")
    parser.add_argument("--extra", action="append", default=[], metavar="MODULE:CLASS", help="another norm beside them")
    parser.add_argument("--seconds", type=float, default=2.0, help="measuring time of a cell (2), at least five rounds")
    parser.add_argument("--fresh", action="store_true", help="map new pages in every call instead of recycling memory")
    parser.add_argument("--quick", action="store_true", help="tiny sizes and one round: shows that it runs, times mean nothing")
    parser.add_argument("--check", action="store_true", help="exit with status 1 if a target is missed")
    parser.add_argument("--output", metavar="NAME", help="write results/benchmark/NAME, which must not exist")
    options = parser.parse_args(arguments)
    if not options.seconds > 0:
        parser.error(f"argument --seconds: {options.seconds}: must be positive")
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


def in_turns(functions, seconds, slow=()):
    """name -> times in seconds, one per round; those named in `slow` take part in the first five rounds only."""
    for function in functions.values():
        function()
        if seconds:
            function()
    times = {name: [] for name in functions}
    begin, order = time.perf_counter(), list(functions)
    for number in itertools.count():
        for name in order:
            if number < 5 or name not in slow:
                start = time.perf_counter()
                functions[name]()
                times[name].append(time.perf_counter() - start)
        order = order[1:] + order[:1]
        if number >= 4 and time.perf_counter() - begin > seconds or not seconds:
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


def norms_for(options, rows, channels, dtype, training):
    """name -> Call of each contender at the level of a layer."""
    import torch
    from authors_norm import AuthorsPowerNorm
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
        elif name == "authors" and training:
            for g in groups:
                makers[f"{name}-g{g}"] = lambda g=g: Call(AuthorsPowerNorm(channels, groups=g), True)
    for name in options.extra:
        makers[name] = lambda name=name: Call(extra_class(name)(channels), False)
    calls = {}
    for name, make in makers.items():
        calls[name] = make()
        calls[name].norm.to(dtype).train(training)
    return calls


def one_call(call, x, dy, mask, training):
    """What is timed: a forward and a backward pass, or an evaluation."""
    import torch

    def train():
        x.grad = None
        for parameter in call.parameters():
            parameter.grad = None
        call(x, mask).backward(dy)

    def evaluate():
        with torch.no_grad():
            call(x, mask)

    function = train if training else evaluate
    return function if call.kernel is None else on_kernel(call.kernel, function)


def on_kernel(name, function):
    """The function, with that kernel of PN."""
    from fairseq_powernorm import kernels

    def restricted():
        with kernels.only(name):
            function()

    return restricted


# ---------------------------------------------------------------- levels


def layer_cells(options, say):
    import torch

    for (rows, channels), name, training in itertools.product(options.shapes, options.dtype, (True, False)):
        dtype = getattr(torch, name)
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(rows, channels, generator=generator).to(dtype)
        dy = torch.randn(rows, channels, generator=generator).to(dtype)
        some = torch.rand(rows, generator=generator) < 0.2  # True = padding
        some[0] = False
        out = torch.empty_like(x)
        for masked in (False, True):
            leaf = x.clone().requires_grad_() if training else x
            calls = norms_for(options, rows, channels, dtype, training)
            mask = some if masked else None
            functions = {n: one_call(c, leaf, dy, mask, training) for n, c in calls.items()}
            functions["copy"] = lambda: out.copy_(x)
            slow = [n for n in functions if n.startswith("authors")]
            cell = {"level": "layer", "pass": "train" if training else "eval", "rows": rows, "channels": channels,
                    "dtype": name, "masked": masked, "threads": torch.get_num_threads()}
            say(cell)
            found = summarize(in_turns(functions, options.seconds, slow), 5 if training else 2)
            if training:
                for n, c in calls.items():
                    if n != "layer-compiled":
                        found[n]["saved"] = saved_bytes(c, leaf, mask)
                        found[n]["peak"] = peak_bytes(functions[n], x)
            yield {**cell, "contenders": found}


def translation_model(norm, options, d, ffn, layers, symbols):
    """A Transformer with the given norm everywhere, and what counts its statistics."""
    from argparse import Namespace
    from types import SimpleNamespace

    import torch
    from authors_norm import AuthorsPowerNorm
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
    return model, RunningStatistics(model), dictionary


def sentences(count, length, symbols, generator, torch):
    """Left-padded source and right-padded target of unequal lengths (pad = 1)."""
    lengths = torch.randint(max(1, length * 2 // 3), length + 1, (count,), generator=generator)
    lengths[0] = length
    source, target = (torch.randint(4, symbols, (count, length), generator=generator) for _ in range(2))
    positions = torch.arange(length)
    source[positions >= lengths.unsqueeze(1)] = 1
    target[positions >= lengths.unsqueeze(1)] = 1
    return source.flip(1), lengths, target


def model_functions(options, make):
    """name -> function for each norm that a whole model can have."""
    functions = {}
    for name in ("layer", "rms", "batch", "power", "power-torch", "authors"):
        if name != "layer" and name not in options.contenders:
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
        x = torch.randn(length, count, d, generator=generator).requires_grad_()
        dy = torch.randn(length, count, d, generator=generator)
        source, _, _ = sentences(count, length, 40, generator, torch)

        def function():
            x.grad = None
            layer.zero_grad()
            with running.batch():
                layer(x, source.eq(1)).backward(dy)
            running.discard()

        return function

    cell = {"level": "encoder", "pass": "train", "rows": length * count, "channels": d, "dtype": "float32", "masked": True,
            "threads": torch.get_num_threads()}
    say(cell)
    yield {**cell, "contenders": summarize(in_turns(model_functions(options, make), options.seconds * 3, ("authors",)))}


def step_cells(options, say):
    import torch

    d, length, count, symbols = (16, 8, 4, 40) if options.quick else (256, 32, 128, 8000)

    def make(norm):
        model, running, _ = translation_model(norm, options, d, 4 * d, 3, symbols)
        model.train()
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-5)
        generator = torch.Generator().manual_seed(1)
        source, lengths, target = sentences(count, length, symbols, generator, torch)

        def function():
            optimizer.zero_grad()
            with running.batch():
                logits, _ = model(source, lengths, target)
                torch.nn.functional.cross_entropy(
                    logits.flatten(0, 1), target.flatten(), ignore_index=1, label_smoothing=0.1, reduction="sum").backward()
            running.reduce()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            running.commit()

        return function

    cell = {"level": "step", "pass": "train", "rows": length * count, "channels": d, "dtype": "float32", "masked": True,
            "threads": torch.get_num_threads()}
    say(cell)
    yield {**cell, "contenders": summarize(in_turns(model_functions(options, make), options.seconds * 20, ("authors",)))}


def generation_cells(options, say):
    import torch
    from fairseq.sequence_generator import SequenceGenerator

    d, length, count, symbols = (16, 4, 2, 40) if options.quick else (256, 20, 32, 8000)

    def make(norm):
        if norm == "authors":
            return None
        model, _, dictionary = translation_model(norm, options, d, 4 * d, 3, symbols)
        generator = torch.Generator().manual_seed(1)
        source, lengths, _ = sentences(count, length, symbols, generator, torch)
        search = SequenceGenerator([model.eval()], dictionary, beam_size=5, max_len_a=0, max_len_b=length, min_len=length)
        sample = {"net_input": {"src_tokens": source, "src_lengths": lengths}}

        def function():
            with torch.no_grad():
                search.generate([model], sample)

        return function

    cell = {"level": "generation", "pass": "eval", "rows": count * 5, "channels": d, "dtype": "float32", "masked": True,
            "threads": torch.get_num_threads()}
    say(cell)
    yield {**cell, "contenders": summarize(in_turns(model_functions(options, make), options.seconds * 5))}


CELLS = {"layer": layer_cells, "encoder": encoder_cells, "step": step_cells, "generation": generation_cells}


# ---------------------------------------------------------------- what is said about it


def named(contenders, name):
    """The entries of a contender, whatever its groups."""
    return [(full, entry) for full, entry in contenders.items() if full == name or full.startswith(f"{name}-g")]


def checks(cells):
    """Each target that the cells say something about: description, value, bound, is it met?"""
    found = []
    for text, level, which, dtype, contender, rows, statistic, bound in TARGETS:
        values = [entry["ratio"] for cell in cells
                  if (cell["level"], cell["pass"], cell["dtype"]) == (level, which, dtype) and (not rows or cell["rows"] in rows)
                  for _, entry in named(cell["contenders"], contender)]
        if values:
            value = statistic(values)
            found.append({"target": text, "value": value, "bound": f"<= {bound}", "met": value <= bound})
    large = [cell for cell in cells if cell["level"] == "layer" and cell["pass"] == "train" and cell["rows"] in LARGE]
    for text, dtype, bound in SLOWER:
        values = []
        for cell in large:
            ours = {full.rpartition("-")[2]: entry for full, entry in named(cell["contenders"], "power")}
            values += [entry["seconds"] / ours[full.rpartition("-")[2]]["seconds"]
                       for full, entry in named(cell["contenders"], "authors")
                       if cell["dtype"] == dtype and full.rpartition("-")[2] in ours]
        if values:
            value = statistics.median(values)
            found.append({"target": f"{text}, median", "value": value, "bound": f">= {bound}", "met": value >= bound})
    values = [entry["saved"] for cell in large for _, entry in named(cell["contenders"], "power")]
    if values:
        found.append({"target": SAVED[0], "value": max(values), "bound": f"<= {SAVED[1]}", "met": max(values) <= SAVED[1]})
    return found


def show(record):
    """The record as Markdown."""
    lines = ["| level | pass | rows x C | dtype | mask | threads | norm | time (us) | / LayerNorm (quartiles) | of limit "
             "| saved / x | peak / x |", "|" + " --- |" * 12]
    for cell in record["cells"]:
        for name, entry in cell["contenders"].items():
            low, high = entry["ratio_quartiles"]
            optional = [f"{entry[key]:.2f}" if key in entry else "" for key in ("bandwidth_fraction", "saved", "peak")]
            lines.append("| " + " | ".join([
                cell["level"], cell["pass"], f"{cell['rows']} x {cell['channels']}", cell["dtype"],
                "yes" if cell["masked"] else "no", str(cell["threads"]), name, f"{entry['seconds'] * 1e6:,.0f}",
                f"{entry['ratio']:.2f} ({low:.2f} - {high:.2f})", *optional]) + " |")
    if record["checks"]:
        lines += ["", "| target | measured | bound | met |", "| --- | --- | --- | --- |"]
        lines += [f"| {c['target']} | {c['value']:.3f} | {c['bound']} | {'yes' if c['met'] else '**no**'} |"
                  for c in record["checks"]]
    return "\n".join(lines) + "\n"


def draw(record, path):
    """Ratios to LayerNorm, a bar for each contender (median of its cells), a panel for each pass and dtype of a layer."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = {}
    for cell in record["cells"]:
        key = f"{cell['level']}, {cell['pass']}, {cell['dtype']}"
        for name, entry in cell["contenders"].items():
            panels.setdefault(key, {}).setdefault(name, []).append(entry["ratio"])
    figure, axes = pyplot.subplots(len(panels), 1, figsize=(7, 2.2 * len(panels)), layout="constrained", squeeze=False)
    for axis, (title, ratios) in zip(axes[:, 0], panels.items()):
        middle = [statistics.median(values) for values in ratios.values()]
        error = [[m - min(v) for m, v in zip(middle, ratios.values())], [max(v) - m for m, v in zip(middle, ratios.values())]]
        axis.barh(list(ratios), middle, xerr=error)
        axis.axvline(1.0, color="black", linewidth=0.8)
        axis.set_xscale("log")
        axis.set_title(f"{title}: time / LayerNorm, median and range of the cells", fontsize=9)
        axis.invert_yaxis()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def processor():
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

    set_memory(options.fresh)
    name, reasons = kernels.explain("cpu", torch.float32)
    print(f"kernel: {kernels.KERNELS[name].describe()} {' '.join(reasons)}".rstrip())
    threads = options.threads or ([1, 2] if (os.cpu_count() or 1) > 1 else [1])
    cells = []

    def say(cell):
        print(" ".join(f"{key}={value}" for key, value in cell.items()), file=sys.stderr, flush=True)

    for number in threads:
        torch.set_num_threads(number)
        for level in options.levels:
            cells += CELLS[level](options, say)
    record = {
        "schema": 1, "kind": "benchmark", "processor": processor(), "cores": os.cpu_count(), "memory": "fresh" if options.fresh else "recycled",
        "kernel": kernels.KERNELS[name].describe(), "quick": options.quick, "arguments": arguments, "cells": cells,
        "checks": [] if options.quick else checks(cells), "versions": {"python": platform.python_version(), **versions(TOOLS)},
    }
    print(show(record), end="")
    if target is not None:
        from evaluate import commit

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
