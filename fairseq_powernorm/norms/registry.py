"""Norms by name, as flags and YAML files spell them: ``power``, or with options ``batch:variant=reference,groups=4``.

The names stand in :mod:`fairseq_powernorm.norm_names`. The options of a norm are the keyword-only arguments of its
constructor; their annotations (``bool``, ``int``, ``float``, ``str``, or ``Optional`` of one of these) say what a text is
turned into.
"""
import importlib
import inspect
import numbers
from typing import Any, Collection, Dict, Mapping, NamedTuple, Optional, Tuple, Type, get_args, get_type_hints

from torch import nn

from ..norm_names import NORM_CLASSES


def load() -> Dict[str, Type[nn.Module]]:
    """Name -> class of all norms."""
    found = {}
    for name, path in NORM_CLASSES.items():
        module, _, kind = path.partition(".")
        found[name] = getattr(importlib.import_module(f".{module}", __package__), kind)
    return found


#: the names of the command line and of YAML files
NORMS = load()

#: options that a model decides, not a text
BUILT_BY_THE_MODEL = ("batch_first", "layout", "device", "dtype")
#: options that may be given for norms of any name: each takes those that it has. All others are of one norm.
SHARED = ("eps", "alpha_fwd", "alpha_bkw", "warmup_updates", "groups", "variant", "affine", *BUILT_BY_THE_MODEL)

_BOOLS = {"true": True, "false": False}
#: type of an option -> what a value has to be, in words and as a type of Python's
_KINDS: Dict[type, Tuple[str, Type[Any]]] = {
    bool: ("true or false", bool),
    int: ("a whole number", numbers.Integral),
    float: ("a number", numbers.Real),
    str: ("a word", str),
}


def norm_class(name: str) -> Type[nn.Module]:
    """The class of the norm called ``name``; raises ValueError where there is none."""
    if name not in NORMS:
        raise ValueError(f"norm {name!r}: must be one of {', '.join(NORMS)}")
    return NORMS[name]


class _Option(NamedTuple):
    """An option of a norm: its type, a key of ``_KINDS`` (None: only a model decides it), and whether None is a value."""

    kind: Optional[type]
    optional: bool


def _options(name: str) -> Mapping[str, _Option]:
    constructor = norm_class(name).__init__
    hints = get_type_hints(constructor)
    found = {}
    for parameter in inspect.signature(constructor).parameters.values():
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY:
            hint = hints.get(parameter.name, type(parameter.default))
            among = get_args(hint) or (hint,)
            kinds = [each for each in among if each in _KINDS and parameter.name not in BUILT_BY_THE_MODEL]
            found[parameter.name] = _Option(kinds[0] if kinds else None, type(None) in among)
    return found


def norm_options(name: str) -> Tuple[str, ...]:
    """Names of the keyword arguments that the norm called ``name`` takes."""
    return tuple(_options(name))


def _unknown(text: str, problem: str, name: str) -> ValueError:
    valid = ", ".join(option for option, of in _options(name).items() if of.kind is not None)
    return ValueError(f"norm {text!r}: {problem}; options of {name!r}: {valid or 'none'}")


def parse_norm(text: str) -> Tuple[str, Dict[str, Any]]:
    """Name and options of a norm: ``NAME`` or ``NAME:OPTION=VALUE,...``.

    Args:
        text: for instance ``power:warmup_updates=4000,variant=algorithm2``

    Returns:
        a key of :data:`NORMS`, and keyword arguments of its class, each of the type that it takes

    Raises:
        ValueError: the norm or an option is unknown, or a value is of another type; names all of them and what is valid
    """
    name, colon, rest = str(text).partition(":")
    known = _options(name)
    options: Dict[str, Any] = {}
    for part in rest.split(",") if colon else ():
        option, equals, value = (each.strip() for each in part.partition("="))
        kind = known[option].kind if option in known else None
        if not equals or kind is None:
            raise _unknown(text, f"option {option!r} is unknown" if equals else f"{part!r} is no OPTION=VALUE", name)
        if option in options:
            raise ValueError(f"norm {text!r}: option {option!r} is given twice")
        options[option] = _read(text, option, value, kind)
    _check_variant(text, options, getattr(NORMS[name], "VARIANTS", ()))
    return name, options


def _read(text: str, option: str, value: str, kind: type) -> Any:
    """A value as the constructor takes it."""
    try:
        if not value:
            raise ValueError
        return _BOOLS[value.lower()] if kind is bool else kind(value)
    except (KeyError, ValueError):
        raise ValueError(f"norm {text!r}: {option}={value!r} must be {_KINDS[kind][0]}") from None


def _check_type(text: str, option: str, value: Any, known: _Option) -> None:
    """Refuse a value of Python's that is of another type than the option."""
    if known.kind is None or (value is None and known.optional):
        return
    expected, accepted = _KINDS[known.kind]
    if not isinstance(value, accepted) or (isinstance(value, bool) and known.kind is not bool):
        raise ValueError(f"norm {text!r}: {option}={value!r} must be {expected}")


def _check_variant(text: str, options: Mapping[str, Any], variants: Collection[str]) -> None:
    if variants and options.get("variant", next(iter(variants))) not in variants:
        raise ValueError(f"norm {text!r}: variant={options['variant']!r}: must be one of {', '.join(variants)}")


def build_norm(name: str, dim: int, **options: Any) -> nn.Module:
    """Build a norm for ``dim`` channels: ``build_norm("power:groups=4", 512)`` or ``build_norm("power", 512, groups=4)``.

    One set of options may serve all norms: of those in ``SHARED`` (``eps``, ``groups`` and others) each norm takes those
    that it has, and a ``variant`` if it is one of its own. Any other option must be the norm's.

    Args:
        name: a key of :data:`NORMS`, or with options, see :func:`parse_norm`; these go before the shared ones
        dim: number of channels C
        options: keyword arguments of the norm's class

    Raises:
        ValueError: the norm or an option is unknown, an option is given twice, or a value is of another type or outside its
            range; names norm, option, value and what is valid
    """
    text = name
    name, own = parse_norm(text)
    known = _options(name)
    for option, value in options.items():
        if option in known:
            _check_type(text, option, value, known[option])
        elif option not in SHARED:
            raise _unknown(text, f"option {option!r} is unknown", name)
        if option in own and option not in SHARED:
            raise ValueError(f"norm {text!r}: option {option!r} is given twice, once as {value!r}")
    _check_variant(text, options, sorted({each for kind in NORMS.values() for each in getattr(kind, "VARIANTS", ())}))
    if options.get("variant") not in getattr(NORMS[name], "VARIANTS", ()):
        options.pop("variant", None)  # that of another norm
    arguments = {option: value for option, value in {**options, **own}.items() if option in known}
    try:
        return NORMS[name](dim, **arguments)
    except ValueError as error:
        raise ValueError(f"norm {text!r}: {error}") from error


#: the same under an earlier name
create_norm = build_norm


def default_groups(name: str, heads: int, **options: Any) -> int:
    """Channel groups of a norm in a model with ``heads`` attention heads; 0 where it has none."""
    default = getattr(norm_class(name), "default_groups", None)
    return 0 if default is None else int(default(heads, **options))


def norms_with(entries: Collection[str]) -> Tuple[str, ...]:
    """Names of the norms whose state_dict, with their default options, has these entries and no others."""
    built = {name: build_norm(name, 2, device="meta", **getattr(kind, "REQUIRED", {})) for name, kind in NORMS.items()}
    return tuple(name for name, norm in built.items() if set(norm.state_dict()) == set(entries))
