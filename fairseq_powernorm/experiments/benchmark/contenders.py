"""The norms that are compared, each as a call that can be timed."""
import importlib
import os
import shutil
from argparse import Namespace
from typing import Any, Callable, Dict, Iterator, Optional

import torch
from torch import Tensor, nn

from fairseq_powernorm import kernels
from fairseq_powernorm.norms import MaskedBatchNorm, PowerNorm, PowerNormV
from fairseq_powernorm.statistics import RunningStatistics

from ..errors import UserError
from .authors_norm import AuthorsPowerNorm
from .options import SLOW, SLOW_ROWS


class Call:
    """A norm called as norm(x, mask), by a certain kernel and with a switch of its own."""

    def __init__(self, norm: nn.Module, *, takes_mask: bool, kernel: Optional[str] = None):
        self.norm, self.takes_mask, self.kernel = norm, takes_mask, kernel

    def __call__(self, x: Tensor, mask: Optional[Tensor]) -> Tensor:
        y: Tensor = self.norm(x, mask) if self.takes_mask else self.norm(x)
        return y

    def parameters(self) -> Iterator[nn.Parameter]:
        return self.norm.parameters()

    def stage(self) -> None:
        """Have the norm leave its sums to RunningStatistics, as it does in a task: in one batch that stays open."""
        self.batch = RunningStatistics(self.norm).batch()
        self.batch.__enter__()


def extra_class(name: str) -> Any:
    """The class that --extra names."""
    module, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"--extra {name!r}: must be MODULE:CLASS that can be imported: {error}") from None


def norms_for(options: Namespace, rows: int, channels: int, dtype: torch.dtype, which: str) -> Dict[str, Call]:
    """name -> Call of each contender at the level of a layer."""
    groups = [g for g in options.groups if channels % g == 0]
    calls = {"layer": Call(nn.LayerNorm(channels), takes_mask=False)}
    for name in options.contenders:
        if name == "layer-compiled":
            if shutil.which(os.environ.get("CXX", "g++")):
                compiled: Any = torch.compile(nn.LayerNorm(channels), dynamic=False)
                calls[name] = Call(compiled, takes_mask=False)
        elif name == "rms":
            calls[name] = Call(nn.RMSNorm(channels), takes_mask=False)
        elif name == "batch-torch" and rows > 1:
            calls[name] = Call(nn.BatchNorm1d(channels), takes_mask=False)
        elif name == "batch":
            calls[name] = Call(MaskedBatchNorm(channels, groups=0), takes_mask=True)
        elif name in SLOW and rows != SLOW_ROWS and not options.fast:
            continue
        elif name == "power-v":
            for g in groups:
                calls[f"{name}-g{g}"] = Call(PowerNormV(channels, groups=g), takes_mask=True)
        elif name in ("power", "power-torch"):
            for g in groups:
                norm = PowerNorm(channels, groups=g, warmup_updates=0)
                calls[f"{name}-g{g}"] = Call(norm, takes_mask=True, kernel="eager" if name == "power-torch" else None)
        elif name == "power-staged" and which != "eval":
            for g in groups:
                calls[f"{name}-g{g}"] = Call(PowerNorm(channels, groups=g, warmup_updates=0), takes_mask=True)
        elif name == "authors" and which == "train":
            for g in groups:
                calls[f"{name}-g{g}"] = Call(AuthorsPowerNorm(channels, groups=g), takes_mask=True)
    for name in options.extra:
        calls[name] = Call(extra_class(name)(channels), takes_mask=False)
    for call in calls.values():
        call.norm.to(options.device, dtype).train(which != "eval")
    for full, call in calls.items():
        if full.startswith("power-staged"):
            call.stage()
    return calls


def one_call(call: Call, x: Tensor, dy: Tensor, mask: Optional[Tensor], which: str) -> Callable[[], object]:
    """What is timed: a forward and a backward pass, a forward pass in training, or an evaluation."""
    def train() -> None:
        x.grad = None
        for parameter in call.parameters():
            parameter.grad = None
        call(x, mask).backward(dy)

    def evaluate() -> None:
        with torch.no_grad():
            call(x, mask)

    functions: Dict[str, Callable[[], object]] = {"train": train, "forward": lambda: call(x, mask), "eval": evaluate}
    function = functions[which]
    return function if call.kernel is None else on_kernel(call.kernel, function)


def on_kernel(name: str, function: Callable[[], object]) -> Callable[[], None]:
    """The function, with that kernel of PN."""
    def restricted() -> None:
        with kernels.only(name):
            function()

    return restricted
