"""What is trained: a benchmark of configs/, prepared text of the user's own, or a YAML file of theirs.

The commands take one of the three as BENCH: the name of a benchmark, the name of prepared data, the path of a YAML file.
All of them are a :class:`.recipes.Recipe`, which says what stands in configs/ and what is changed of it.
"""

import contextlib
import re
from typing import Any, Dict, List, Optional, Sequence, Tuple

from ..norm_names import NORM_CLASSES
from . import own, recipes
from .errors import UserError
from .recipes import Recipe, benchmark, benchmarks, is_lm

NORMS = tuple(NORM_CLASSES)
#: The authors' BN, of which the paper's values are; plain "batch" has true statistics of the tokens that are not padding.
BATCH_REFERENCE = "batch:variant=reference"
BPE_TYPES = ("subword_nmt", "sentencepiece")
# The four options that carry a norm's name, and the placements: placement -> does NORM stand there (else LayerNorm)? A
# language model has the decoder's two options and one placement.
NORM_OPTIONS = ("encoder_norm_self", "encoder_norm_ff", "decoder_norm_self", "decoder_norm_ff")
PLACEMENTS = {"encoder": (True, True, False, False), "all": (True, True, True, True)}


def norm_name(norm: str) -> str:
    """The name of a norm that may have options: NAME[:OPTION=VALUE[,...]]."""
    return norm.partition(":")[0]


def norm_in_names(norm: str) -> str:
    """A norm with its options as a part of names of files and rows, such as batch-reference."""
    return re.sub("[:,=]", "-", norm.replace(":variant=", "-"))


def placements(model: Any) -> Tuple[str, ...]:
    """The placements that a model's configuration can have, the default first."""
    return tuple(PLACEMENTS) if NORM_OPTIONS[0] in model else ("all",)


def recipe(subject: str) -> Recipe:
    """What BENCH stands for: a benchmark's name, that of prepared data, or the path of a YAML file.

    Raises:
        UserError: it is none of them, or says what cannot be
    """
    if subject in benchmarks():
        return benchmark(subject)
    return own.recipe(subject)


def architectures(subject: str) -> Tuple[str, ...]:
    """The architectures that train.sh --arch can choose, the default first; the others have configs/BENCH/ARCH.yaml."""
    return recipe(subject).architectures()


def load(subject: str, arch: Optional[str] = None) -> Any:
    """The settings of BENCH: configs/BENCH.yaml, configs/BENCH/ARCH.yaml over it, or what the user's own are."""
    return recipe(subject).load(arch)


def data_settings(benchmark: str) -> Dict[str, Any]:
    """configs/data/BENCH.yaml, how a benchmark's text is prepared and scored; empty for a language model's and one's own."""
    from omegaconf import OmegaConf

    if benchmark not in benchmarks() or is_lm(load(benchmark)):
        return {}
    path = recipes.CONFIGS / "data" / f"{benchmark}.yaml"
    if not path.is_file():
        raise UserError(f"benchmark {benchmark!r}: {path}, which says how its text is prepared, does not exist")
    found: Any = OmegaConf.to_container(OmegaConf.load(path))
    return found or {}


def configuration(words: Sequence[str]) -> Tuple[Any, List[str]]:
    """The settings that the words of a command line choose, None for none, and its overrides."""
    parts = [part for word in words for part in word.partition("=")[2 * word.startswith("--")].split(",")]
    config = None
    with contextlib.suppress(UserError, ImportError):
        known = {*benchmarks(), *own.names()}
        subject = next((part for part in parts if part in known or part.endswith(own.ENDS)), None)
        if subject is not None:
            config = load(subject, next((part for part in parts if part in architectures(subject)), None))
    return config, [word for word in words if re.match(r"[+~\w.]+=", word)]
