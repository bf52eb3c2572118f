"""``--encoder-layers-to-keep`` and ``--decoder-layers-to-keep``: a model of some of the layers of another (LayerDrop)."""
import re
from typing import Any, Collection, Dict, Mapping, NamedTuple, Tuple

from ..options import flag


class KeptLayers(NamedTuple):
    """The layers of a stack that ``--encoder-layers-to-keep`` or ``--decoder-layers-to-keep`` leaves.

    Attributes:
        layers: their numbers before, ascending
        before: how many there were
    """

    layers: Tuple[int, ...]
    before: int


def kept_layers(args: Any, sides: Collection[str]) -> Dict[str, KeptLayers]:
    """Read ``*_layers_to_keep`` from complete model options; a side of which all layers are kept is not listed.

    Raises:
        ValueError: names the option, its value and what is valid
    """
    found = {}
    for side in sides:
        name = f"{side}_layers_to_keep"
        given, before = getattr(args, name, None), getattr(args, f"{side}_layers")
        if given is None:
            continue
        words = [word.strip() for word in str(given).split(",")]
        layers = sorted({int(word) for word in words if re.fullmatch("[0-9]+", word)})
        if len(layers) < len(words) or layers[-1] >= before:
            raise ValueError(
                f"{flag(name)} {given!r}: must be different numbers of layers, separated by commas, each from 0 to "
                f"{before - 1} ({flag(f'{side}_layers')} {before})"
            )
        if getattr(args, "base_layers", None):
            raise ValueError(f"{flag(name)} {given!r}: not possible with --base-layers {args.base_layers}")
        found[side] = KeptLayers(tuple(layers), before)
    return found


def prune(state_dict: Mapping[str, Any], side: str, kept: KeptLayers) -> Mapping[str, Any]:
    """Leave the layers of one side out of a checkpoint that are not kept, and number the others anew.

    A checkpoint that has only as many layers as are kept stays as it is: it was pruned before.

    Raises:
        ValueError: it has another number of layers
    """
    layer_name = re.compile(rf"({side}\.layers\.)([0-9]+)(\..*)")
    matches = {name: layer_name.fullmatch(name) for name in state_dict}
    number = len({match[2] for match in matches.values() if match})
    if number in (0, len(kept.layers)):
        return state_dict
    if number != kept.before:
        option = flag(f"{side}_layers_to_keep")
        raise ValueError(
            f"{option} {','.join(map(str, kept.layers))} of {kept.before} layers: the checkpoint has {number}; must have "
            f"{kept.before}, or {len(kept.layers)} if it has been pruned already"
        )
    new_number = {str(layer): new for new, layer in enumerate(kept.layers)}
    pruned = {}
    for name, value in state_dict.items():
        match = matches[name]
        if match is None:
            pruned[name] = value
        elif match[2] in new_number:
            pruned[f"{match[1]}{new_number[match[2]]}{match[3]}"] = value
    return pruned
