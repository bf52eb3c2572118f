"""Norms by name, as flags and YAML files spell them: ``power``, or with options ``batch:variant=reference,groups=4``."""
import inspect
from typing import Any, Dict, List, Mapping, Tuple, Type

from torch import nn

from .base import RunningNorm
from .batch import MaskedBatchNorm
from .layer import LayerNorm, RMSNorm
from .power import PowerNorm
from .power_v import PowerNormV

#: the names of the command line and of YAML files
NORMS: Dict[str, Type[nn.Module]] = {
    "layer": LayerNorm,
    "rms": RMSNorm,
    "batch": MaskedBatchNorm,
    "power-v": PowerNormV,
    "power": PowerNorm,
}

#: options that a model decides, not a text
BUILT_BY_THE_MODEL = ("batch_first", "layout", "device", "dtype")
_BOOLS = {"true": True, "false": False}


def norm_class(name: str) -> Type[nn.Module]:
    """The class of the norm called ``name``; raises ValueError where there is none."""
    if name not in NORMS:
        raise ValueError(f"norm {name!r}: must be one of {', '.join(NORMS)}")
    return NORMS[name]


def norm_options(name: str) -> Tuple[str, ...]:
    """Names of the keyword arguments that the norm called ``name`` takes."""
    return tuple(_parameters(name))


def _parameters(name: str) -> Mapping[str, inspect.Parameter]:
    parameters = inspect.signature(norm_class(name).__init__).parameters.values()
    return {p.name: p for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}


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
    parameters = {option: p for option, p in _parameters(name).items() if option not in BUILT_BY_THE_MODEL}
    options: Dict[str, Any] = {}
    for part in rest.split(",") if colon else ():
        option, equals, value = (each.strip() for each in part.partition("="))
        if not equals or option not in parameters:
            problem = f"option {option!r} is unknown" if equals else f"{part!r} is no OPTION=VALUE"
            raise ValueError(f"norm {text!r}: {problem}; options of {name!r}: {', '.join(parameters) or 'none'}")
        if option in options:
            raise ValueError(f"norm {text!r}: option {option!r} is given twice")
        options[option] = _value(text, option, value, parameters[option])
    return name, options


def _value(text: str, option: str, value: str, parameter: inspect.Parameter) -> Any:
    """A value as the constructor takes it."""
    kind = str if isinstance(parameter.default, str) else type(parameter.default)
    if parameter.default is None:
        kind = float
    expected = {bool: "true or false", int: "a whole number", float: "a number", str: "a word"}[kind]
    try:
        if kind is bool:
            return _BOOLS[value.lower()]
        if not value:
            raise ValueError
        return kind(value)
    except (KeyError, ValueError):
        raise ValueError(f"norm {text!r}: {option}={value!r} must be {expected}") from None


def create_norm(text: str, dim: int, **shared: Any) -> nn.Module:
    """Build a norm from its text; what the text says goes before what all norms share.

    Args:
        text: see :func:`parse_norm`
        dim: number of channels C
        shared: options for whichever norm has them

    Raises:
        ValueError: see :func:`parse_norm` and :func:`build_norm`
    """
    name, options = parse_norm(text)
    variants = getattr(NORMS[name], "VARIANTS", ())
    try:
        if options.get("variant", variants and variants[0]) not in variants and variants:
            raise ValueError(f"variant={options['variant']!r}: must be one of {', '.join(variants)}")
        return build_norm(name, dim, **{**shared, **options})
    except ValueError as error:
        raise ValueError(f"norm {text!r}: {error}") from None


def build_norm(name: str, dim: int, **options: Any) -> nn.Module:
    """Build the norm called ``name`` for ``dim`` channels.

    One set of options serves all norms: each takes those that it has (a LayerNorm only ``eps``, ``affine`` and
    ``layout``), and a ``variant`` if it is one of its own.

    Args:
        name: a key of :data:`NORMS`, or with options, see :func:`parse_norm`
        dim: number of channels C
        options: keyword arguments of the norm classes

    Raises:
        ValueError: ``name`` or an option is unknown, or a value is outside its range
    """
    if ":" in name:
        return create_norm(name, dim, **options)
    kind = norm_class(name)
    known: List[str] = sorted({option for each in NORMS for option in norm_options(each)})
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ValueError(f"norm option {unknown[0]!r}={options[unknown[0]]!r}: must be one of {', '.join(known)}")
    if "variant" in options:
        variants = sorted({variant for each in NORMS.values() for variant in getattr(each, "VARIANTS", ())})
        if options["variant"] not in variants:
            raise ValueError(f"variant={options['variant']!r}: must be one of {', '.join(variants)}")
        if options["variant"] not in getattr(kind, "VARIANTS", ()):
            options.pop("variant")
    own = norm_options(name)
    return kind(dim, **{option: value for option, value in options.items() if option in own})


def default_groups(name: str, heads: int, **options: Any) -> int:
    """Channel groups of the layer scale of a norm in a model with ``heads`` attention heads; 0 where it has none."""
    kind = norm_class(name)
    return kind.default_groups(heads, **options) if issubclass(kind, RunningNorm) else 0
