"""What a norm computes: those of torch and of this package by their class, those of others by running a copy of them."""
import copy
import inspect
import math
import re
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Tuple, Type

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from .fold import FoldedNorm
from .norms import Norm
from .norms.layouts import CHANNELS_FIRST
from .norms.scriptable import own_evaluation
from .references import HOOKS

__all__ = ["Function", "Unknown", "function_of"]

#: attributes with the eps of a norm
EPS = ("eps", "variance_epsilon", "epsilon", "norm_eps", "layer_norm_eps")


class Function(NamedTuple):
    """What a norm computes.

    Attributes:
        kind: class of torch's that computes it, apart from ``offset``
        dim: number of channels
        weight, bias: its parameters, or None
        offset: added to ``weight``: 1 where that is stored as a difference from one
        channels_first: it normalizes over the second dimension
        eps: None if it is not known
        found: how it was recognized, where that was not by its class
    """

    kind: Type[nn.Module]
    dim: int
    weight: Optional[nn.Parameter]
    bias: Optional[nn.Parameter]
    offset: float = 0.0
    channels_first: bool = False
    eps: Optional[float] = None
    found: str = ""


class Unknown(Exception):
    """A module that looks like a norm and is none that can be replaced.

    Args:
        reason: for people
        refused: it is a norm of a kind that could be replaced
    """

    def __init__(self, reason: str, *, refused: bool = False):
        super().__init__(reason)
        self.refused = refused


def function_of(module: nn.Module) -> Optional[Function]:
    """What a norm computes; None if it does not look like one; raises Unknown if that is nothing known."""
    weight: Any = getattr(module, "weight", None)
    bias: Any = getattr(module, "bias", None)
    if isinstance(module, FoldedNorm):
        raise Unknown("was folded for inference")
    if isinstance(module, Norm):
        if isinstance(module, (nn.LayerNorm, nn.RMSNorm)) and own_evaluation(module, "_formula") is not None:
            raise Unknown("is derived from a norm of this package and has a forward of its own")
        eps: Any = getattr(module, "eps", None)
        return Function(type(module), module.dim, weight, bias, eps=eps, channels_first=module.layout == CHANNELS_FIRST)
    parameters = list(module.parameters(recurse=False))
    lazy = any(is_lazy(each) for each in parameters)
    if lazy and isinstance(module, (_BatchNorm, nn.LayerNorm, nn.RMSNorm)):
        raise Unknown("has no size yet: run the model once, then replace its norms", refused=True)
    if parametrize.is_parametrized(module) and isinstance(module, (_BatchNorm, nn.LayerNorm, nn.RMSNorm)):
        raise Unknown("has parameters that are computed: replace the norms before that is done to them", refused=True)
    if isinstance(module, _BatchNorm):
        if type(module).forward not in (_BatchNorm.forward, nn.SyncBatchNorm.forward):  # timm's have an activation behind
            raise Unknown("is derived from torch's and has a forward of its own, which may do more", refused=True)
        return Function(type(module), module.num_features, weight, bias, eps=module.eps, channels_first=True)
    if type(module) in (nn.LayerNorm, nn.RMSNorm):
        shape: Any = module.normalized_shape
        if len(shape) != 1:
            raise Unknown(f"normalizes over {len(shape)} dimensions, {tuple(shape)}, not over channels", refused=True)
        eps = torch.finfo(torch.float32).eps if module.eps is None else module.eps
        return Function(type(module), shape[0], weight, bias, eps=eps)
    if not isinstance(module, (nn.LayerNorm, nn.RMSNorm)) and not re.search("norm", type(module).__name__, re.IGNORECASE):
        return None
    if any(True for _ in module.children()) or type(module).__name__.startswith("_"):
        return None  # a layer or a model that is called after its norm, or a parametrization
    if type(module).__module__.startswith("torch.nn."):
        raise Unknown("normalizes over more than the channels of a row")
    return _measured(module)


def _measured(module: nn.Module) -> Function:
    """What a norm of another package computes, by running a copy of it."""
    taken = inspect.signature(module.forward).parameters.values()
    more = [each.name for each in taken if each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)][1:]
    if more:
        raise Unknown(f"its forward takes more than the input: {', '.join(more)}")
    parameters = dict(module.named_parameters(recurse=False))
    shape = getattr(module, "normalized_shape", None)
    dims = {each.numel() for each in parameters.values()} or {math.prod(shape) if isinstance(shape, (tuple, list)) else 0}
    if any(each.dim() != 1 for each in parameters.values()) or len(dims) != 1 or len(parameters) > 2:
        raise Unknown("its parameters are not one or two vectors of one size")
    if any(True for _ in module.buffers(recurse=False)):
        raise Unknown("it has buffers")
    (dim,) = dims
    if dim < 2:
        raise Unknown("its number of channels is not known")
    draw = torch.Generator("cpu").manual_seed(1)
    options: Dict[str, Any] = dict(generator=draw, dtype=torch.float64, device="cpu")
    try:
        twin = copy.deepcopy(module)
    except Exception as error:
        raise Unknown(f"cannot be copied ({type(error).__name__})") from error
    for hooks in HOOKS:
        getattr(twin, hooks, {}).clear()
    values = {name: torch.randn(dim, **options) for name in parameters}
    for name, value in values.items():
        setattr(twin, name, nn.Parameter(value, requires_grad=False))
    twin.eval()
    problem, ran = "", False
    for shape, axis in (((7, dim), -1), ((2, dim, 3, 2), 1)):
        x = 100.0 * (torch.randn(shape, **options) + 0.5)  # large and not centred: eps does not show, the mean does
        try:
            with torch.no_grad():
                y = twin(x)
        except Exception as error:
            problem = f"cannot be run by itself ({type(error).__name__}: {str(error).splitlines()[0][:80]})"
            continue
        ran = True
        if not isinstance(y, Tensor) or y.shape != x.shape:
            continue
        rows, found = x.movedim(axis, -1), y.movedim(axis, -1).double()
        for kind in (nn.LayerNorm, nn.RMSNorm):
            centred = rows - rows.mean(-1, keepdim=True) if kind is nn.LayerNorm else rows
            u = centred / centred.square().mean(-1, keepdim=True).sqrt()
            for weight, bias in _roles(list(values)):
                for offset in (0.0, 1.0) if weight else (0.0,):
                    scale = values[weight] + offset if weight else 1.0
                    if torch.allclose(found, u * scale + (values[bias] if bias else 0.0), rtol=1e-3, atol=1e-3):
                        eps = next((e for e in (getattr(module, name, None) for name in EPS) if isinstance(e, float)), None)
                        text = f"{kind.__name__} by what it computes" + (", with 1 + weight" if offset else "")
                        return Function(
                            kind, dim, parameters[weight] if weight else None, parameters[bias] if bias else None, offset,
                            axis == 1, eps, text,
                        )  # fmt: skip
    raise Unknown("computes neither LayerNorm nor RMSNorm" if ran else problem)


def _roles(names: List[str]) -> Iterator[Tuple[Optional[str], Optional[str]]]:
    """The ways in which parameters can be weight and bias."""
    if len(names) == 2:
        yield names[0], names[1]
        yield names[1], names[0]
    elif names:
        yield names[0], None
        yield None, names[0]
    else:
        yield None, None
