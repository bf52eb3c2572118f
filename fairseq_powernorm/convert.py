"""Norms of this package in place of those of any model: torch's own, timm's, those of Hugging Face.

.. code-block:: python

    model, report = replace_norms(AutoModel.from_pretrained("..."), "power", warmup_updates=4000)
    print(report)                                # what was replaced by what, what was left alone and why
    attach_mask(model)                           # fairseq_powernorm.masks: padding counts in no statistic

Norms of other packages are taken by what they compute: a copy of each is run on a few random rows. ``w * u + b`` and
``(1 + w) * u + b`` are known, u being the row over its root mean square, or that after the mean is subtracted.
"""
import re
from fnmatch import fnmatchcase
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple, Type, Union

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from .masks import CallMasks
from .norms import NORMS, Norm, RunningNorm, build_norm, default_groups, norm_options, parse_norm
from .norms.layouts import CHANNELS_FIRST, layout_of
from .recognition import Function, Unknown, function_of
from .references import HOOKS, bound, swap

__all__ = ["KINDS", "Left", "Replaced", "Report", "replace_norms"]

Where = Union[None, str, Sequence[str], Callable[[str, nn.Module], bool]]

#: what is replaced if nothing else is said
KINDS: Tuple[Type[nn.Module], ...] = (nn.LayerNorm, nn.RMSNorm)
#: what ``kinds`` may name, beside norms of this package and of others
_KNOWN = (nn.LayerNorm, nn.RMSNorm, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
#: attributes that hold the number of attention heads, of a module or of its ``config``
_HEADS = ("num_attention_heads", "num_heads", "n_heads", "n_head", "nhead", "heads", "encoder_attention_heads")
#: norms of queries and keys, as they are called
_OF_HEADS = re.compile(r"(^|[._])((q|k|qk|query|key)_?(layer_?)?(norm|ln)s?|norm_(q|k|query|key))(\.|$)", re.IGNORECASE)
#: the norm of Gemma's vectors for each token and layer, as it is called
_OF_LAYERS = re.compile(r"(^|\.)per_layer_projection_norm$")
#: modules whose hidden states are T x B x C though nothing of torch's says so: file, classes
_TIME_FIRST = {
    "modeling_xlnet": ("XLNetRelativeAttention", "XLNetFeedForward"),
    "modeling_fsmt": ("EncoderLayer", "DecoderLayer"),
}


class Replaced(NamedTuple):
    """A norm that was replaced: its names in the model (several where it is shared), the old one and the new one, notes."""

    names: Tuple[str, ...]
    old: str
    new: str
    notes: Tuple[str, ...]


class Left(NamedTuple):
    """A norm that was left alone, and why."""

    name: str
    old: str
    reason: str


class Report(NamedTuple):
    """What :func:`replace_norms` has done; ``str`` of it is for people."""

    norm: str
    replaced: Tuple[Replaced, ...]
    left: Tuple[Left, ...]

    def __str__(self) -> str:
        lines = [f"{len(self.replaced)} norm{'s' * (len(self.replaced) != 1)} replaced by {self.norm}"]
        alike: Dict[Tuple[Any, ...], List[str]] = {}
        for each in self.replaced:
            alike.setdefault(each[1:], []).append(" = ".join(each.names) or "the model itself")
        for (old, new, notes), names in alike.items():
            lines += [f"  {len(names)} x {old} -> {new}", *(f"    ({note})" for note in notes), f"    {', '.join(names)}"]
        if self.left:
            lines.append(f"{len(self.left)} left alone")
            lines += [f"  {each.name}: {each.old}: {each.reason}" for each in self.left]
        return "\n".join(lines)


# ---------------------------------------------------------------- where it stands in the model


class _Place(NamedTuple):
    """A module that looks like a norm, its names, and the modules around it, the innermost first."""

    module: nn.Module
    names: List[str]
    around: List[nn.Module]


def _places(model: nn.Module) -> List[_Place]:
    found: Dict[int, _Place] = {}
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, module in modules.items():
        if id(module) in found:
            found[id(module)].names.append(name)
            continue
        parts = name.split(".") if name else []
        around = [modules[".".join(parts[:end])] for end in range(len(parts) - 1, -1, -1)]
        found[id(module)] = _Place(module, [name], around)
    return list(found.values())


def _heads(place: _Place, dim: int) -> int:
    """Attention heads, a divisor of ``dim``, of the innermost module around a norm that says so; 1 if none does."""
    for around in place.around:
        config = getattr(around, "config", None)
        for attributes in ({name: getattr(config, name, None) for name in _HEADS}, *map(vars, around.modules())):
            for name in _HEADS:
                heads = attributes.get(name)
                if isinstance(heads, int) and not isinstance(heads, bool) and heads > 0 and dim % heads == 0:
                    return heads
    return 1


def _layout(place: _Place) -> str:
    """Layout of the sequences around a norm: torch's modules say so, some are known, others have the batch first."""
    for kind in type(place.around[0]).__mro__ if place.around else ():
        if kind.__name__ in _TIME_FIRST.get(kind.__module__.rpartition(".")[2], ()):
            return "time_first"
    for around in place.around:
        for source in (around, *(each for each in around.modules() if isinstance(each, nn.MultiheadAttention))):
            if isinstance(getattr(source, "batch_first", None), bool):
                return layout_of(bool(source.batch_first), None)
        if hasattr(getattr(around, "config", None), "model_type"):
            break
    return "batch_first"


def _of_heads(place: _Place, dim: int) -> bool:
    """Does a norm normalize queries or keys of each attention head?"""
    if any(_OF_HEADS.search(name) for name in place.names):
        return True
    return bool(place.around) and getattr(place.around[0], "head_dim", None) == dim and _heads(place, 0) > 1


# ---------------------------------------------------------------- the new norm


def _check(name: str, module: nn.Module, function: Function) -> None:
    """Raise ValueError where a norm cannot be taken out without losing something."""
    problem = ""
    if any(type(each) is not nn.Parameter for each in (function.weight, function.bias) if each is not None):
        problem = "has parameters that are sharded or quantized: replace the norms before that is done to them"
    elif "forward" in vars(module):
        problem = "has a forward of its own instance, as accelerate's hooks give it: replace the norms before"
    if problem:
        raise ValueError(f"replace_norms: {name}: {type(module).__name__} {problem}; or leave it out with where=")


def _new_norm(
    place: _Place,
    function: Function,
    norm: str,
    tied: Dict[int, nn.Parameter],
    *,
    groups: Optional[int],
    copy_affine: bool,
    layout: Optional[str],
    options: Dict[str, Any],
) -> Tuple[nn.Module, List[str]]:
    """A new norm for that place, and what is to be said about it."""
    old, (name, own) = place.module, parse_norm(norm)
    notes = [function.found] if function.found else []
    arguments: Dict[str, Any] = {"affine": function.weight is not None or function.bias is not None}
    same = function.kind is NORMS[name] or (name, function.kind) in _SAME
    if same and function.eps is not None:
        arguments["eps"] = function.eps
    if same and isinstance(old, _BatchNorm):
        arguments["groups"] = 0
        if old.momentum is not None and "alpha_fwd" not in own:
            arguments["alpha_fwd"] = 1.0 - old.momentum
    elif "groups" in norm_options(name) and "groups" not in own:
        arguments["groups"] = default_groups(name, _heads(place, function.dim), **own) if groups is None else groups
    arguments["layout"] = CHANNELS_FIRST if function.channels_first else layout or _layout(place)
    parameters = [each for each in (function.weight, function.bias) if each is not None]
    like = next(iter([*parameters, *(each for around in place.around for each in around.parameters())]), None)
    if like is not None:
        arguments["device"] = like.device
        if like.is_floating_point():
            arguments["dtype"] = like.dtype
    new = build_norm(norm, function.dim, **{**arguments, **options})
    for key, value, offset in (("weight", function.weight, function.offset), ("bias", function.bias, 0.0)):
        fresh = getattr(new, key, None)
        if value is None:
            if fresh is not None and isinstance(new, nn.LayerNorm):  # as torch's without a bias
                setattr(new, key, None)
        elif not copy_affine:
            if fresh is not None:
                fresh.requires_grad_(value.requires_grad)
        elif fresh is None or fresh.shape != value.shape:
            if value.is_meta or key == "weight" or bool(value.any()):
                notes.append(f"its {key} is lost: {type(new).__name__} has none of that kind")
        else:
            if offset and id(value) not in tied:
                tied[id(value)] = nn.Parameter(value.detach() + offset, requires_grad=value.requires_grad)
            setattr(new, key, tied[id(value)] if offset else value)  # the parameter itself: tied ones stay tied
    if parameters and not any(each.requires_grad for each in parameters):
        new.requires_grad_(False)  # noqa: FBT003  # what a frozen norm did not have is frozen, too
    if isinstance(old, _BatchNorm) and name == "batch" and old.running_mean is not None:
        new.load_state_dict({k: v for k, v in old.state_dict().items() if k not in ("weight", "bias")}, strict=False)
    if isinstance(old, _BatchNorm) and isinstance(new, RunningNorm):
        kept = "kept none" if old.running_mean is None else "averaged over all steps" if old.momentum is None else None
        if kept is not None:
            notes.append(f"its running statistics are moving averages, where the {type(old).__name__} {kept}")
    new.train(old.training)
    for hooks in (*HOOKS, "_is_full_backward_hook"):
        if hooks in vars(old):
            vars(new)[hooks] = vars(old)[hooks]
    if isinstance(old, Norm) and hasattr(old, "mask_slot") and hasattr(new, "mask_slot"):
        new.mask_slot = old.mask_slot
    return new, notes


#: norms of this package that compute what torch's do, and so take their eps over
_SAME = {("layer", nn.LayerNorm), ("rms", nn.RMSNorm)} | {
    ("batch", each) for each in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
}


def _no_fused_path(place: _Place) -> bool:
    """Keep a layer of torch's, whose fused evaluation computes LayerNorm whatever norm stands there, from using it."""
    layer = place.around[0] if place.around else None
    if isinstance(layer, nn.TransformerEncoderLayer):
        layer.activation_relu_or_gelu = 0  # what torch asks for first; the ordinary path calls layer.activation
        for around in place.around:
            if isinstance(around, nn.TransformerEncoder):
                around.enable_nested_tensor = around.use_nested_tensor = False
        return True
    return False


# ---------------------------------------------------------------- the choice


def _checked_kinds(kinds: Sequence[Type[nn.Module]]) -> Tuple[Type[nn.Module], ...]:
    checked: Tuple[Any, ...] = (kinds,) if isinstance(kinds, type) else tuple(kinds)
    for kind in checked:
        known = isinstance(kind, type) and issubclass(kind, nn.Module)
        if known and kind.__module__.startswith("torch.nn."):
            known = issubclass(kind, _KNOWN)
        if not known or kind is nn.Module:
            text = kind.__name__ if isinstance(kind, type) else repr(kind)
            raise ValueError(
                f"replace_norms: kinds: {text}: must be classes, of {', '.join(each.__name__ for each in _KNOWN)}, norms of "
                "this package and norms of others"
            )
    if not checked:
        raise ValueError("replace_norms: kinds: must name at least one class")
    return checked


def _chosen(where: Where, names: Sequence[str], module: nn.Module) -> bool:
    if callable(where):
        return any(bool(where(name, module)) for name in names)
    patterns = (where,) if isinstance(where, str) else where
    return patterns is None or any(fnmatchcase(name, pattern) for name in names for pattern in patterns)


def _check_where(where: Where, names: Sequence[Sequence[str]], kinds: Tuple[Type[nn.Module], ...], any_chosen: bool) -> None:
    """Raise ValueError for a pattern that matches none of the norms, and where nothing is chosen."""
    everything = [name or "the model itself" for each in names for name in each]
    there = f"norms of these kinds are {', '.join(everything[:8])}{', ...' if len(everything) > 8 else ''}"
    if not everything:
        there = f"the model has no {' or '.join(each.__name__ for each in kinds)}, nor a norm that computes the same"
    if where is not None and not callable(where):
        for pattern in (where,) if isinstance(where, str) else where:
            if not any(fnmatchcase(name, pattern) for each in names for name in each):
                raise ValueError(f"replace_norms: where={pattern!r} matches no norm: {there}")
    if not any_chosen:
        raise ValueError(f"replace_norms: {there if where is None or not everything else f'where chooses none: {there}'}")


@torch.inference_mode(mode=False)  # what is made here is trained later
def replace_norms(
    model: nn.Module,
    norm: str = "power",
    *,
    kinds: Sequence[Type[nn.Module]] = KINDS,
    where: Where = None,
    groups: Optional[int] = None,
    copy_affine: bool = True,
    layout: Optional[str] = None,
    **options: Any,
) -> Tuple[nn.Module, Report]:
    """Replace norms of a model, in place, by norms of this package.

    A module used in several places is replaced once and stays shared, also in lists, dictionaries and attributes outside the
    tree of modules. The parameters are kept, so that tied ones stay tied and an optimizer still has them; if a package
    stores ``weight - 1``, as Gemma's RMSNorm does, a new parameter holds the weight. Device, dtype, mode, and the hooks of
    forward and backward passes are kept; a norm whose parameters are frozen stays frozen, with the parameters that it gains.
    If an error is raised, nothing has been changed.

    Norms of queries and keys (``q_norm``, ``k_norm``) stay as they are unless ``where`` names them, because the paper has no
    statistics over positions and heads together. So does Gemma's ``per_layer_projection_norm``, which sees a vector for
    each token and layer. The fused evaluation of ``nn.TransformerEncoderLayer``, which computes LayerNorm whatever norm the
    layer has, is turned off in the layers concerned.

    Args:
        model: any module, not yet wrapped for data parallelism, sharded or compiled
        norm: a key of :data:`~.norms.NORMS`, or with options, ``"power:variant=algorithm2"``
        kinds: classes to replace. ``nn.LayerNorm`` and ``nn.RMSNorm`` stand for all norms that compute the same.
            ``nn.BatchNorm1d`` and the like are replaced by norms with ``channels_first``; norms of this package may be named
        where: names or patterns (``"encoder.layers.*.norm1"``; a star matches dots, too), or a function of name and module
        groups: channel groups of the layer scale; None takes the norm's default for the number of attention heads that the
            modules around it or their ``config`` state, if that divides the channels, else for one head
        copy_affine: keep ``weight`` and ``bias``; otherwise they start at 1 and 0
        layout: of the norms over the last dimension, see :class:`~.norms.layouts.Norm`. None takes that of torch's attention
            beside the norm, if there is one, ``time_first`` in layers of XLNet and FSMT, else ``batch_first``. It matters
            only for padding masks, to tell which rows are padding
        options: of the norm, such as ``eps``, ``warmup_updates`` or ``variant``. The model's own ``eps`` is kept only if a
            norm is replaced by one that computes the same

    Returns:
        the model (or what replaces it, if it is a norm itself) and a :class:`Report`

    Raises:
        ValueError: the norm, an option or a kind is unknown; a pattern matches nothing; no norm is chosen; or a norm that is
            chosen cannot be replaced (over several dimensions, not initialized, sharded, or the model holds a method or
            function of it), with its name
    """
    for name in ("device", "dtype"):
        if name in options:
            raise ValueError(f"replace_norms: {name}={options[name]!r}: a new norm has that of the old one")
    parse_norm(norm)
    if layout is not None or "batch_first" in options:
        layout = layout_of(options.pop("batch_first", False), layout)
    chosen_kinds = _checked_kinds(kinds)
    candidates: List[Tuple[_Place, Function]] = []
    left: List[Left] = []
    names: List[Sequence[str]] = []
    for place in _places(model):
        name, module = place.names[0], place.module
        old = _text(module)
        try:
            function = function_of(module)
        except Unknown as problem:
            if problem.refused and issubclass(getattr(module, "cls_to_become", type(module)), chosen_kinds):
                names.append(place.names)
                if _chosen(where, place.names, module):
                    raise ValueError(f"replace_norms: {name}: {old} {problem}; or leave it out with where=") from problem
            left.append(Left(name, old, str(problem)))
            continue
        if function is None:
            continue
        if not (isinstance(module, chosen_kinds) or (function.found and function.kind in chosen_kinds)):
            left.append(Left(name, old, "of another kind"))
            continue
        names.append(place.names)
        if not _chosen(where, place.names, module):
            left.append(Left(name, old, "not chosen by where"))
        elif where is None and _of_heads(place, function.dim):
            left.append(Left(name, old, "normalizes queries or keys"))
        elif where is None and any(_OF_LAYERS.search(each) for each in place.names):
            left.append(Left(name, old, "normalizes a vector for each token and layer, which masks of tokens do not fit"))
        else:
            _check(name, module, function)
            candidates.append((place, function))
    _check_where(where, names, chosen_kinds, bool(candidates))
    held = bound(model, {id(place.module): place.names[0] or "the model itself" for place, _ in candidates})
    if held is not None:
        raise ValueError(f"replace_norms: {held}, which would go on with the old norm; or leave that out with where=")
    tied: Dict[int, nn.Parameter] = {}
    made = [
        _new_norm(
            place, function, norm, tied, groups=groups, copy_affine=copy_affine, layout=layout, options=options
        )
        for place, function in candidates
    ]  # fmt: skip
    replaced = []
    for (place, _), (new, notes) in zip(candidates, made):
        before = place.module
        if isinstance(new, RunningNorm) and isinstance(before, RunningNorm) and isinstance(new.mask_slot, CallMasks):
            new.mask_slot.pass_on(before, new)
        if not isinstance(new, nn.LayerNorm) and _no_fused_path(place):
            notes.append("the fused evaluation of its layer, which computes LayerNorm, is off")
        replaced.append(Replaced(tuple(place.names), _text(place.module), _text(new), tuple(notes)))
    new_of = {id(place.module): new for (place, _), (new, _) in zip(candidates, made)}
    if id(model) in new_of:
        model = new_of[id(model)]
    else:
        swap(model, new_of)
    return model, Report(norm, tuple(replaced), tuple(left))


def _text(module: nn.Module) -> str:
    return " ".join(repr(module).split())
