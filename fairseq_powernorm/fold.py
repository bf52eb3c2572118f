r"""Folding for inference: the same outputs with fewer operations.

In evaluation, norms with running statistics are affine maps of the layer-scaled input u (u = x without layer scale),

.. math:: y = s \odot u + t, \qquad s = \gamma / \sqrt{\psi^2 + \epsilon}, \qquad t = \beta - s \odot \mu

in PN and PN-V (mu = 0) and BN, and similar ones in the others (``scale_and_shift``). If only linear maps read y, as in a
pre-norm layer, s and t go into their weights and biases, W y + c = (W s) u + (c + W t). Without layer scale nothing is then
left of the norm; with it, a root mean square norm without parameters. Elsewhere (post-norm, a projection tied to the
embedding) s and t stay.
"""
import logging
from collections import OrderedDict
from typing import TYPE_CHECKING, Any, Dict, List, Optional, Sequence, Set

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod

from . import kernels
from .kernels.interface import LAYER_SCALE_EPS
from .norms import Norm, RunningNorm
from .norms.layouts import CHANNELS_FIRST
from .norms.scriptable import own_evaluation
from .readers import LinearMap, linear_map, norm_readers
from .references import HOOKS

logger = logging.getLogger(__name__)

REFUSAL = "this model was folded for inference (--no-fold-norms turns that off) and cannot"


def refuse_training(mode: object = True) -> None:
    """Raise RuntimeError if a folded model is asked to train; the hook of its parameters, too, for any gradient."""
    if mode is not False:
        raise RuntimeError(f"{REFUSAL} be trained: its norms have no statistics any more; load the checkpoint again")


def refuse_loading() -> None:
    """Raise RuntimeError: a state_dict is about to be loaded into a folded model."""
    raise RuntimeError(f"{REFUSAL} load a state_dict: load the checkpoint into a new model, then fold that")


class FoldedNorm(Norm):
    """What is left of a norm: ``y = scale * u + shift``, where u is x divided by its root mean square per group.

    Args:
        dim: number of channels C
        groups: channel groups of the layer scale, 0 for none
        scale, shift: ``C``, or None where linear maps have taken them over
        layout: see :class:`~.norms.layouts.Norm`
        weight: of the norm. What is kept is a tensor of its dtype without elements, as models ask for ``norm.weight.dtype``

    Shape:
        - input and output: as ``layout`` says. A padding mask is accepted and not needed.
    """

    OWN_LAYOUT = True
    if TYPE_CHECKING:  # torch.jit.script would read annotations that are there
        scale: Optional[Tensor]
        shift: Optional[Tensor]
        weight: Optional[Tensor]

    def __init__(
        self,
        dim: int,
        groups: int,
        scale: Optional[Tensor] = None,
        shift: Optional[Tensor] = None,
        layout: Optional[str] = None,
        weight: Optional[Tensor] = None,
    ):
        super().__init__(dim, layout=layout)
        self.groups = groups
        self.eps = LAYER_SCALE_EPS
        self.register_buffer("scale", scale)
        self.register_buffer("shift", shift)
        self.register_buffer("weight", None if weight is None else weight.detach().new_empty(0), persistent=False)
        self.eval()

    def extra_repr(self) -> str:
        own = f"{self.dim}, groups={self.groups}, affine={self.scale is not None}"
        return ", ".join(part for part in (own, super().extra_repr()) if part)

    def _normalize(self, x: Tensor, padding_mask: Optional[Tensor]) -> Tensor:
        y = self._evaluate(x)
        if not torch.jit.is_scripting():  # noqa: SIM102  (TorchScript passes over what is not for it only as an if of its own)
            if self._channels_second(x):
                return kernels.memory.view_channels_second(y, x)
        return y

    def _evaluate(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting():
            unchanged = self.groups == 0 and self.scale is None
            if not torch.jit.is_tracing() and x.device.type == "cpu" and not unchanged:
                return kernels.evaluate(x, self.scale, self.shift, groups=self.groups)
            if torch.jit.is_tracing() and torch.onnx.is_in_onnx_export() and not unchanged:  # which has no rms_norm
                return kernels.eager.evaluate(x, self.scale, self.shift, None, self.groups, self.eps)
        dtype = x.dtype
        if self.groups > 0:
            shape, size = list(x.size()), self.dim // self.groups  # as sizes, which ONNX keeps open
            x = F.rms_norm(x.reshape(shape[:-1] + [self.groups, size]), [size], None, self.eps).reshape(shape)
        scale, shift = self.scale, self.shift
        if scale is not None and shift is not None:
            x = torch.addcmul(shift, x, scale).to(dtype)
        return x

    def train(self, mode: bool = True) -> "FoldedNorm":
        """See torch; raises RuntimeError for ``mode=True``."""
        refuse_training(mode)
        return super().train(mode)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        refuse_loading()


@torch.inference_mode(mode=False)  # what is made here may be differentiated later
def fold_norms(model: nn.Module) -> nn.Module:
    """Fold the norms with running statistics of a model, in place, for inference.

    A folded model consists of parts of torch and fairseq, and of :class:`FoldedNorm`; ``torch.jit.script`` accepts a folded
    ``transformer_pn``. Log-probabilities and the decoder's state stay the same. The encoder's output of a pre-norm model
    becomes that before its final norm, which the decoder's attention to it absorbs. Other norms, and models without norms
    of this package, stay as they are. Folding again changes nothing. Hooks are kept; if a hook of a forward pass, on the
    norm or on what reads it, or a ``forward`` that was put on an instance of the latter, would see other values, the scale
    and shift stay in the norm.

    Args:
        model: a model of this package, or any module that contains norms of this package

    Returns:
        ``model`` itself in evaluation mode (or what replaces it, if it is a norm). It refuses to train, whether by
        ``train()`` or by a backward pass that reaches a parameter, and to load a state_dict.

    Raises:
        ValueError: a norm is not an affine map (yet), or evaluates in a way of its own, see :func:`unfoldable`; nothing has
            been changed
    """
    reason = unfoldable(model)
    if reason is not None:
        raise ValueError(reason)
    if isinstance(model, RunningNorm):
        return _folded(model)
    if not any(isinstance(module, RunningNorm) or hasattr(type(module), "stock") for module in model.modules()):
        return model
    model.eval()
    times_used, watched = _uses(model), _watched(model)
    for owner in list(model.modules()):
        for name, readers in norm_readers(owner).items():
            norm = owner.get_submodule(name)
            if any((norm in seen) != (reader in seen) for seen in watched for reader in readers):
                continue
            if not isinstance(norm, RunningNorm) or norm.layout == CHANNELS_FIRST:  # linear maps read rows
                continue
            if _fold_into(readers, norm, times_used):
                _replace(owner, name, _in_place_of(norm))
    folded: Dict[RunningNorm, FoldedNorm] = {}
    for owner in list(model.modules()):
        for name, child in list(owner._modules.items()):  # one that stands in two places has two names
            if isinstance(child, RunningNorm):
                _replace(owner, name, folded.setdefault(child, _folded(child)))
    for module in model.modules():
        _make_stock(module)
        if hasattr(type(module), "folded"):
            setattr(module, "folded", True)  # noqa: B010  (a model of the fairseq half, which this half does not know)
    for parameter in model.parameters():
        if parameter.requires_grad:  # and stays so: torch chooses the faster matrix products for such weights
            parameter.register_hook(refuse_training)
    return model


def may_fold(model: nn.Module) -> bool:
    """Can :func:`fold_norms` fold this model? If not, a warning says why its norms are evaluated as they are."""
    reason = unfoldable(model)
    if reason is not None:
        logger.warning("norms are evaluated as they are, not folded: %s", reason)
    return reason is None


def unfoldable(model: nn.Module) -> Optional[str]:
    """Why :func:`fold_norms` refuses a model: the first norm whose evaluation is no affine map; None if it does not."""
    for name, module in model.named_modules():
        if isinstance(module, RunningNorm):
            module.settle()
            for key in _pruning(module):  # else its weight is that of the last pass
                module._forward_pre_hooks[key](module, None)
            try:
                own = own_evaluation(module, "scale_and_shift")
                if own is not None:
                    raise ValueError(f"cannot be folded without losing something, as it {own}")
                module.scale_and_shift()
            except ValueError as error:
                return f"{name}: {error}" if name else str(error)
    return None


def _folded(norm: RunningNorm) -> FoldedNorm:
    """What stands in for a norm whose output is read by others than linear maps."""
    dtype = torch.promote_types(norm.iters.dtype, torch.float32)
    scale, shift = (each.to(dtype) for each in norm.scale_and_shift())
    return _in_place_of(norm, scale, shift)


def _in_place_of(norm: RunningNorm, scale: Optional[Tensor] = None, shift: Optional[Tensor] = None) -> FoldedNorm:
    folded = FoldedNorm(norm.dim, norm.groups, scale, shift, layout=norm.layout, weight=norm.weight)
    for name in (*HOOKS, "_is_full_backward_hook"):
        if name in vars(norm):
            vars(folded)[name] = vars(norm)[name]
    pruning = _pruning(norm)
    if pruning:  # the parameters are in the scale and shift
        others = OrderedDict((key, hook) for key, hook in norm._forward_pre_hooks.items() if key not in pruning)
        folded._forward_pre_hooks = others
    return folded


def _pruning(norm: nn.Module) -> List[int]:
    """Keys of the hooks that multiply a parameter by its mask before each pass."""
    return [key for key, hook in norm._forward_pre_hooks.items() if isinstance(hook, BasePruningMethod)]


def _watched(model: nn.Module) -> List[Set[nn.Module]]:
    """The parts of each module whose forward pass has hooks, or is one of that instance (adapters that wrap it): they see
    what goes in and comes out, and may add to it.
    """
    return [
        set(module.modules())
        for module in model.modules()
        if module._forward_hooks or len(module._forward_pre_hooks) > len(_pruning(module)) or "forward" in vars(module)
    ]


def _replace(owner: nn.Module, name: str, module: nn.Module) -> None:
    path, _, attribute = name.rpartition(".")
    setattr(owner.get_submodule(path), attribute, module)


def _make_stock(module: nn.Module) -> None:
    """Turn a module that differs from fairseq's or torch's only by what a padding mask needs into theirs.

    Not a subclass of one of these classes, which may differ in more.
    """
    if "stock" in vars(type(module)):
        module.__class__ = vars(type(module))["stock"]
        for name in ("mask_slot", "forward"):  # forward: activation checkpointing, which inference does not need
            module.__dict__.pop(name, None)


def _uses(model: nn.Module) -> Dict[int, int]:
    """How often each parameter's memory stands in a model: more than once where parameters are tied."""
    uses: Dict[int, int] = {}
    for _, module in model.named_modules(remove_duplicate=False):
        for parameter in module._parameters.values():
            if parameter is not None:
                uses[_memory(parameter)] = uses.get(_memory(parameter), 0) + 1
    return uses


def _memory(parameter: Tensor) -> int:
    return parameter.untyped_storage().data_ptr()


@torch.no_grad()
def _fold_into(readers: Sequence[nn.Module], norm: RunningNorm, times_used: Dict[int, int]) -> bool:
    """Multiply a norm's scale and shift into all of its readers, or into none: return whether that was done.

    None if one of them is not a plain linear map, is tied to another, or would overflow (float16).
    """
    maps: List[LinearMap] = []
    for reader in readers:
        found = linear_map(reader)
        if found is None or reader._parameters.get(found.weight) is None or reader._forward_pre_hooks:
            return False
        maps.append(found)
        if any(times_used[_memory(parameter)] > 1 for parameter in reader.parameters()):
            return False
    scale, shift = norm.scale_and_shift()
    new = []
    for reader, weight_name, bias_name, transposed in maps:
        old: Tensor = getattr(reader, weight_name)
        old_bias: Optional[Tensor] = getattr(reader, bias_name)
        weight = (old.t() if transposed else old).to(scale.dtype)
        bias = weight @ shift
        if old_bias is not None:
            bias = bias + old_bias
        weight = weight * scale
        weight = weight.t().contiguous() if transposed else weight
        new.append([nn.Parameter(each.to(old.dtype), requires_grad=old.requires_grad) for each in (weight, bias)])
    if not all(bool(torch.isfinite(each).all()) for tensors in new for each in tensors):
        return False
    for (reader, weight_name, bias_name, _), (weight, bias) in zip(maps, new):
        setattr(reader, weight_name, weight)
        if getattr(reader, bias_name) is not None or shift.any():
            setattr(reader, bias_name, bias)
    return bool(maps)
