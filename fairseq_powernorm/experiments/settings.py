"""What the YAML files of configs/ say of a benchmark: its architectures, placements of norms, data."""

import functools
import re
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

from ..norm_names import NORM_CLASSES
from .errors import UserError, choose
from .files import read_json
from .paths import PLUGIN, ROOT, data_root

CONFIGS = ROOT / "configs"
NORMS = tuple(NORM_CLASSES)
#: The authors' BN, of which the paper's values are; plain "batch" has true statistics of the tokens that are not padding.
BATCH_REFERENCE = "batch:variant=reference"
LM_TASK = "language_modeling_pn"
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


def is_lm(config: Any) -> bool:
    """Is this the configuration of a language model (else: of translation)?"""
    return bool(config.task._name == LM_TASK)


def placements(model: Any) -> Tuple[str, ...]:
    """The placements that a model's configuration can have, the default first."""
    return tuple(PLACEMENTS) if NORM_OPTIONS[0] in model else ("all",)


@functools.lru_cache(maxsize=None)
def architectures(benchmark: str) -> Tuple[str, ...]:
    """The architectures with settings for a benchmark, the default first; the others have configs/BENCH/ARCH.yaml."""
    return (load(benchmark).model._name, *sorted(path.stem for path in (CONFIGS / benchmark).glob("*.yaml")))


def benchmarks() -> List[str]:
    """The names of the benchmarks, which are those of the files in configs/."""
    if not CONFIGS.is_dir():
        raise UserError(
            f"{CONFIGS} does not exist: the experiments need a checkout of the repository, from which {PLUGIN} is used"
        )
    return sorted(path.stem for path in CONFIGS.glob("*.yaml"))


def load(benchmark: str, arch: Optional[str] = None) -> Any:
    """configs/BENCH.yaml, configs/BENCH/ARCH.yaml over it, as they stand there (interpolations resolve on access)."""
    from omegaconf import OmegaConf

    choose("benchmark", benchmark, benchmarks())
    config = OmegaConf.load(CONFIGS / f"{benchmark}.yaml")
    if arch not in (None, config.model._name):
        config = OmegaConf.merge(config, OmegaConf.load(CONFIGS / benchmark / f"{arch}.yaml"))
    return config


def data_settings(benchmark: str) -> Dict[str, Any]:
    """configs/data/BENCH.yaml, how a benchmark's text is prepared and scored; empty for a language model's text."""
    from omegaconf import OmegaConf

    if is_lm(load(benchmark)):
        return {}
    path = CONFIGS / "data" / f"{benchmark}.yaml"
    if not path.is_file():
        raise UserError(f"benchmark {benchmark!r}: {path}, which says how its text is prepared, does not exist")
    found: Any = OmegaConf.to_container(OmegaConf.load(path))
    return found or {}


def prepared(benchmark: str) -> Tuple[Path, Dict[str, Any]]:
    """The directory of a prepared benchmark and its stamp; refuses if it is not prepared."""
    directory = data_root() / benchmark
    if not (directory / "prepared.json").is_file():
        raise UserError(f"{directory} is not prepared; run: scripts/prepare.sh {benchmark}")
    return directory, read_json(directory / "prepared.json")
