"""The norms that are compared, each as a call that can be timed."""
import importlib
import os
import shutil

import torch

from fairseq_powernorm import kernels
from fairseq_powernorm.norms import PowerNorm

from ..errors import UserError
from .authors_norm import AuthorsPowerNorm


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
    groups = [g for g in options.groups if channels % g == 0]
    makers = {"layer": lambda: Call(torch.nn.LayerNorm(channels), takes_mask=False)}
    for name in options.contenders:
        if name == "layer-compiled":
            if shutil.which(os.environ.get("CXX", "g++")):
                makers[name] = lambda: Call(torch.compile(torch.nn.LayerNorm(channels), dynamic=False), takes_mask=False)
        elif name == "rms":
            makers[name] = lambda: Call(torch.nn.RMSNorm(channels), takes_mask=False)
        elif name == "batch" and rows > 1:
            makers[name] = lambda: Call(torch.nn.BatchNorm1d(channels), takes_mask=False)
        elif name in ("power", "power-torch"):
            for g in groups:
                makers[f"{name}-g{g}"] = lambda g=g, name=name: Call(
                    PowerNorm(channels, groups=g, warmup_updates=0), takes_mask=True,
                    kernel="eager" if name == "power-torch" else None)
        elif name == "authors" and which == "train":
            for g in groups:
                makers[f"{name}-g{g}"] = lambda g=g: Call(AuthorsPowerNorm(channels, groups=g), takes_mask=True)
    for name in options.extra:
        makers[name] = lambda name=name: Call(extra_class(name)(channels), takes_mask=False)
    calls = {}
    for name, make in makers.items():
        calls[name] = make()
        calls[name].norm.to(options.device, dtype).train(which != "eval")
    return calls


def one_call(call, x, dy, mask, which):
    """What is timed: a forward and a backward pass, a forward pass in training, or an evaluation."""
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
    def restricted():
        with kernels.only(name):
            function()

    return restricted
