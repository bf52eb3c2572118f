"""Modules that a model holds outside of its tree as well: in lists, dictionaries and attributes that torch does not see."""
import functools
from collections import deque
from dataclasses import is_dataclass
from types import CellType, FunctionType, SimpleNamespace
from typing import Any, Dict, List, Optional, Set

from torch import Tensor, nn

#: attributes with the hooks of a module
HOOKS = (
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs", "_backward_hooks", "_backward_pre_hooks",
)  # fmt: skip
#: what holds no module
_PLAIN = (str, bytes, int, float, complex, type(None), Tensor)


def _has_attributes(value: Any) -> bool:
    """Is it a module, or an object that does nothing but hold others?"""
    if isinstance(value, (nn.Module, SimpleNamespace)):
        return True
    return is_dataclass(value) and not isinstance(value, type) and hasattr(value, "__dict__")


def swap(model: nn.Module, new_of: Dict[int, nn.Module]) -> None:
    """Put new modules wherever ``model`` holds old ones: in its tree, in lists, tuples, sets and dictionaries, and in
    attributes, its own and those of data classes and namespaces.

    Args:
        model: changed in place
        new_of: ``id`` of an old module -> the new one
    """
    _swapped(model, new_of, set())


def _swapped(value: Any, new_of: Dict[int, nn.Module], seen: Set[int]) -> Any:
    """What is to stand in place of ``value``: itself, but with the new modules in it."""
    if isinstance(value, _PLAIN):
        return value
    if id(value) in new_of:
        return new_of[id(value)]
    if id(value) in seen:
        return value
    if isinstance(value, dict):
        seen.add(id(value))
        for key, each in list(value.items()):
            found = _swapped(each, new_of, seen)
            if found is not each:
                value[key] = found
        if any(id(key) in new_of for key in value):
            items = [(new_of.get(id(key), key), each) for key, each in value.items()]
            value.clear()
            value.update(items)
    elif isinstance(value, (list, deque)):
        seen.add(id(value))
        for i, each in enumerate(value):
            found = _swapped(each, new_of, seen)
            if found is not each:
                value[i] = found
    elif isinstance(value, (tuple, set, frozenset)):
        items = list(value)
        found = [_swapped(each, new_of, seen) for each in items]
        if any(one is not other for one, other in zip(found, items)):
            return type(value)(*found) if hasattr(value, "_fields") else type(value)(found)
    elif _has_attributes(value):
        seen.add(id(value))
        _swapped(vars(value), new_of, seen)
    return value


def _held(function: Any) -> List[Any]:
    """What a partial or a function keeps for its calls: arguments, defaults, variables from around it."""
    if isinstance(function, functools.partial):
        return [function.func, *function.args, *function.keywords.values()]
    cells = [cell.cell_contents for cell in function.__closure__ or () if cell != CellType()]
    return [*cells, *(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]


def bound(model: nn.Module, modules: Dict[int, str]) -> Optional[str]:
    """Where ``model`` holds a method or function of one of these modules, which would go on with the old one, or None.

    Args:
        model: any
        modules: ``id`` of a module -> its name
    """
    left: List[Any] = [(type(model).__name__, model)]
    seen: Set[int] = set()
    while left:
        where, value = left.pop()
        if isinstance(value, _PLAIN) or id(value) in seen or id(value) in modules:
            continue
        seen.add(id(value))
        owner = getattr(value, "__self__", None) if callable(value) and not isinstance(value, nn.Module) else None
        if id(owner) in modules:
            return f"{where} holds a method of {modules[id(owner)]}"
        if isinstance(value, dict):
            left.extend((where, each) for each in value.values())
        elif isinstance(value, (list, tuple, set, frozenset, deque)):
            left.extend((where, each) for each in value)
        elif isinstance(value, (functools.partial, FunctionType)):
            held = _held(value)
            left.extend((where, each) for each in held)
            if any(id(each) in modules for each in held):
                kind = "functools.partial" if isinstance(value, functools.partial) else "function"
                return f"{where} holds a {kind} of a norm"
        elif _has_attributes(value):
            left.extend((f"{type(value).__name__}.{name}", each) for name, each in vars(value).items())
    return None
