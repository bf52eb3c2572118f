"""The settings of a training: those of a file in configs/, and what is changed of them."""

import functools
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, Iterable, List, Optional, Tuple

from . import trust
from .errors import UserError
from .files import read_json, sha256
from .paths import PLUGIN, ROOT, data_root

CONFIGS = ROOT / "configs"
LM_TASK = "language_modeling_pn"
#: bytes of a file of prepared data; of a larger one training does not compare the content
LARGEST_COMPARED = 1 << 30


def benchmarks() -> List[str]:
    """The names of the benchmarks, which are those of the files in configs/."""
    if not CONFIGS.is_dir():
        raise UserError(
            f"{CONFIGS} does not exist: the experiments need a checkout of the repository, from which {PLUGIN} is used"
        )
    return sorted(path.stem for path in CONFIGS.glob("*.yaml"))


def is_lm(config: Any) -> bool:
    """Is this the configuration of a language model (else: of translation)?"""
    return bool(config.task._name == LM_TASK)


@dataclass(frozen=True)
class Recipe:
    """The settings of a training: those of a file in configs/, and what is changed of them.

    name: of runs, records and tables; data: name of the prepared data; base: the file, without .yaml, in `folder`;
    arch: the architecture of the base to build on, None for its own; overrides: hydra's, which make this of the base;
    file: the YAML file of the user's that says so, if one does
    """

    name: str
    data: str
    base: str
    folder: Path
    arch: Optional[str] = None
    overrides: Tuple[str, ...] = ()
    file: Optional[Path] = None

    @property
    def groups(self) -> List[str]:
        """The hydra override that lays the settings of the base's architecture over it, if there are any."""
        return [] if self.arch is None else [f"+{self.base}={self.arch}"]

    @property
    def where(self) -> str:
        """The file that its settings stand in, for messages."""
        if self.file is not None:
            return str(self.file)
        return str((self.folder / f"{self.base}.yaml").relative_to(CONFIGS.parent))

    def load(self, arch: Optional[str] = None) -> Any:
        """The settings, with those of another architecture, as they stand in the files (interpolations resolve late)."""
        from omegaconf import OmegaConf

        config = OmegaConf.load(self.folder / f"{self.base}.yaml")
        if (arch or self.arch) not in (None, config.model._name):
            config = OmegaConf.merge(config, OmegaConf.load(self.folder / self.base / f"{arch or self.arch}.yaml"))
        if self.overrides:
            config = apply(config, self.overrides)
        return config

    def architectures(self) -> Tuple[str, ...]:
        """The architectures that train.sh --arch can choose, the default first."""
        return _architectures(self)


@functools.lru_cache(maxsize=None)
def _architectures(found: Recipe) -> Tuple[str, ...]:
    if found.file is not None:  # it says which one
        return (found.load().model._name,)
    return (found.load().model._name, *sorted(path.stem for path in (found.folder / found.base).glob("*.yaml")))


def benchmark(name: str) -> Recipe:
    """The recipe of a benchmark."""
    return Recipe(name, name, name, CONFIGS)


def apply(config: Any, overrides: Iterable[str]) -> Any:
    """A configuration with hydra's overrides, as they stand there."""
    from omegaconf import OmegaConf

    plain: Any = OmegaConf.to_container(config)
    for override in overrides:
        group, _, name = override.split("=", 1)[0].lstrip("+~").partition(".")
        if override.startswith("~"):
            plain.get(group, {}).pop(name, None)
        else:
            plain.setdefault(group, {})[name] = trust.value_of(override)
    return OmegaConf.create(plain)


def prepared(data: str) -> Tuple[Path, Dict[str, Any]]:
    """The directory of prepared data, a benchmark's or one's own, and its stamp; refuses if it is not prepared."""
    directory = data_root() / data
    if not (directory / "prepared.json").is_file():
        options = "" if data in benchmarks() else " --text-dir DIR with --source LANG --target LANG, or --lm"
        raise UserError(f"{directory} is not prepared; run: scripts/prepare.sh {data}{options}")
    return directory, read_stamp(directory / "prepared.json")


def read_stamp(path: Path) -> Dict[str, Any]:
    """prepared.json of prepared data, which may be somebody else's: its settings are texts and numbers, and no options."""
    stamp = read_json(path)
    if not isinstance(stamp, dict) or not isinstance(stamp.get("settings"), dict):
        raise UserError(f"{path} was not written by scripts/prepare.sh: it has no settings")
    trust.check_config(stamp["settings"], str(path))
    return stamp


def check_outputs(data: Path, stamp: Dict[str, Any], *read: str, largest: Optional[int] = None) -> None:
    """Refuses prepared data that are no longer what was prepared.

    Args:
        read: beginnings of the names, from `data`, of the files that are read
        largest: bytes of a file whose content is compared; None: of any
    """
    outputs = stamp.get("outputs")
    if not isinstance(outputs, dict):
        raise UserError(f"{data / 'prepared.json'} was not written by scripts/prepare.sh: it has no checksums of what was "
                        f"made; prepare the data again")
    for name, digest in outputs.items():
        path = data / name
        if name.startswith(read) and not (path.is_file() and _is(path, digest, largest)):
            raise UserError(f"{path} is not what scripts/prepare.sh made; --force prepares the data again")
    for path in (data / "data-bin").glob("*"):
        name = f"data-bin/{path.name}"
        part = re.match(r"data-bin/([a-z]+)[0-9]+\.", name)
        if part and name not in outputs and f"data-bin/{part[1]}.".startswith(read):
            raise UserError(f"{path} is not what scripts/prepare.sh made, and fairseq would read it as more text of "
                            f"{part[1]}; move it away")


def _is(path: Path, digest: str, largest: Optional[int]) -> bool:
    return largest is not None and path.stat().st_size > largest or sha256(path) == digest
