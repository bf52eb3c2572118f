"""Hydra's overrides of fairseq's settings: which there are, and which one stands for a flag of fairseq's command line.

What is known of fairseq's settings is read from its dataclasses, and those of this package, when somebody asks.
"""

import contextlib
import dataclasses
import difflib
import importlib
import io
import logging
import re
import shlex
import warnings
from typing import Any, Dict, Iterable, Iterator, List, Mapping, NamedTuple, Optional, Sequence, Tuple

from .errors import UserError

#: the group of fairseq's configuration that a flag chooses an implementation of, where it is not called like the group
CHOICES = {"arch": "model"}


def by_key(overrides: Sequence[str]) -> Dict[str, str]:
    """Overrides by the key that they set; a later one replaces an earlier one."""
    return {override.split("=", 1)[0].lstrip("+~"): override for override in overrides}


def quote(value: object) -> str:
    """A value of a hydra override, in quotes where hydra's grammar needs them."""
    text = str(value)
    return text if re.fullmatch(r"[\w./-]+", text, re.ASCII) else "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps fairseq's and hydra's logging and warnings off the terminal."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


class Setting(NamedTuple):
    """One of fairseq's settings.

    key: as in an override; flags: its names on fairseq's command line; default: its value where nothing is said;
    is_flag, is_list: is it true or false, a list?; link: is it the same as a setting of another group unless it is set?
    """

    key: str
    flags: Tuple[str, ...]
    default: Any = None
    is_flag: bool = False
    is_list: bool = False
    link: bool = False

    def override(self, value: Optional[str]) -> str:
        """The override for a flag with that value, as one types it into a shell, without a plus sign."""
        if self.is_flag:
            text = value.lower() if value and value.lower() in ("true", "false") else str(self.default is not True).lower()
        elif value is None:
            text = "[VALUE]" if self.is_list else "VALUE"
        elif self.is_list:
            text = "[" + value.strip("[]() ") + "]"
        else:
            text = quote(value)
        word = f"{self.key}={text}"
        return word if re.fullmatch(r"[\w.=\[\],/:-]+", word) else f'"{word}"' if '"' not in word else shlex.quote(word)


def fields(group: str, dataclass: Any) -> Dict[str, Setting]:
    """The settings of a dataclass by their keys."""
    found = {}
    for field in dataclasses.fields(dataclass):
        if field.name != "_name":
            key, alias = f"{group}.{field.name}", field.metadata.get("argparse_alias")
            flags = ("--" + field.name.replace("_", "-"), *([alias] if alias else []))
            link = isinstance(field.default, str) and field.default.startswith("${")
            kind = str(field.type)
            found[key] = Setting(key, flags, field.default, is_flag="bool" in kind, is_list="List[" in kind, link=link)
    return found


class Settings:
    """The settings that a configuration has: those that every one has, and those of the implementations that it chooses.

    Args:
        config: a benchmark's settings (see :func:`.settings.load`), None for none
        overrides: of the configuration; they may choose other implementations
    """

    def __init__(self, config: Any = None, overrides: Sequence[str] = ()):
        with quiet():
            importlib.import_module("fairseq_powernorm.register")
            from fairseq.dataclass.configs import FairseqConfig
        self.config = config
        self.known: Dict[str, Setting] = {}
        self.dataclasses: Dict[str, Any] = {}  # group -> what its settings are declared by, where that is known
        self.chosen: Dict[str, Optional[str]] = {}  # group -> implementation, for the groups that have several
        self.open: List[str] = []  # groups whose implementation says nothing of its settings
        given = by_key(overrides)
        for field in dataclasses.fields(FairseqConfig):
            if field.name == "_name":
                continue
            if dataclasses.is_dataclass(field.type):
                self.known.update(fields(field.name, field.type))
                self.dataclasses[field.name] = field.type
                continue
            in_file = None if config is None else (config.get(field.name) or {}).get("_name")
            name = self.chosen[field.name] = (
                given[f"{field.name}._name"].partition("=")[2] if f"{field.name}._name" in given else in_file
            )
            dataclass = None if name is None else implementations(field.name).get(name)
            if dataclass is not None:
                self.known.update(fields(field.name, dataclass))
                self.dataclasses[field.name] = dataclass
            else:
                self.open.append(field.name)

    def problem(self, key: str, value: Any) -> Optional[str]:
        """Why a setting cannot have a value, which is of another type; None if it can, or nothing is known of it."""
        from omegaconf.errors import OmegaConfBaseException

        try:
            self.converted(key, value)
        except OmegaConfBaseException as error:
            return str(error).split("\n")[0]
        return None

    def converted(self, key: str, value: Any) -> Any:
        """A value as fairseq's configuration holds it, where something is known of the setting: 4 for the text "4".

        Raises:
            OmegaConfBaseException: the setting cannot have it
        """
        from omegaconf import OmegaConf

        if key not in self.known:
            return value
        group, _, name = key.partition(".")
        config = OmegaConf.structured(self.dataclasses[group])
        config[name] = value
        found = config[name]
        return OmegaConf.to_container(found) if OmegaConf.is_config(found) else found

    def stated(self, group: str) -> List[str]:
        """The keys that the configuration's file gives in a group, such as ``optimizer.adam_betas``."""
        in_file = ((self.config or {}).get(group) or {}).keys()  # "in" does not see what is stated as ???
        return [f"{group}.{name}" for name in in_file if name != "_name"]

    def plus(self, key: str) -> str:
        """The plus sign that an override needs for a key that the configuration does not have by itself."""
        group, _, name = key.partition(".")
        in_file = name == "_name" and self.chosen.get(group) or key in self.stated(group)
        return "+" if group in self.chosen and not in_file else ""

    def choice(self, group: str, name: str) -> str:
        """The overrides that choose an implementation, without the settings in the file that it does not have."""
        dataclass = implementations(group).get(name)
        known = self.stated(group) if dataclass is None else fields(group, dataclass)
        return " ".join([f"{self.plus(f'{group}._name')}{group}._name={name}",
                         *(f"~{key}" for key in self.stated(group) if key not in known)])

    def with_flag(self, flag: str) -> Optional[Setting]:
        """The setting of a flag."""
        found = [setting for setting in self.known.values() if flag in setting.flags]
        return min(found, key=lambda setting: setting.link) if found else None

    def nearest(self, key: str) -> Optional[str]:
        """The key that is most like one that there is not: of the same name in another group, or spelt alike."""
        name = key.rpartition(".")[2]
        same = [other for other, setting in self.known.items() if other.endswith(f".{name}") and not setting.link]
        near = difflib.get_close_matches(key, same or list(self.known), 1, 0.0 if same else 0.6)
        return near[0] if near else None


def implementations(group: str) -> Dict[str, Any]:
    """The implementations of a group: name -> the dataclass of its settings, where it has one."""
    from fairseq.models import ARCH_MODEL_NAME_REGISTRY, MODEL_DATACLASS_REGISTRY
    from fairseq.registry import REGISTRIES
    from fairseq.tasks import TASK_DATACLASS_REGISTRY

    found: Dict[str, Any] = {}
    if group == "model":
        models = MODEL_DATACLASS_REGISTRY
        archs = {arch: models[model] for arch, model in ARCH_MODEL_NAME_REGISTRY.items() if model in models}
        found = {**models, **archs}
    elif group == "task":
        found = TASK_DATACLASS_REGISTRY
    elif group in REGISTRIES:
        found = REGISTRIES[group]["dataclass_registry"]
    return found


def of_flag(
    flag: str, value: Optional[str], config: Any, overrides: Sequence[str], own: Mapping[str, Optional[str]]
) -> Optional[str]:
    """What to use instead of a flag of fairseq's command line, in words; None where it has none like it.

    Args:
        flag: such as ``--lr``
        value: the word behind it, if any
        config, overrides: of the command line, see :func:`.settings.configuration`
        own: keys that the command sets itself -> what to use instead, if anything
    """
    try:
        settings = Settings(config, overrides)
    except ImportError:
        return None
    flag = re.sub("(?<=.)_", "-", flag)
    setting = settings.with_flag(flag)
    if setting is not None:
        return _instead(settings, setting, value, own)
    group = CHOICES.get(flag[2:], flag[2:].replace("-", "_"))
    if group in settings.chosen:
        return _instead(settings, Setting(f"{group}._name", (flag,)), value, own)
    for group, chosen in settings.chosen.items():
        others = {name: fields(group, dataclass) for name, dataclass in implementations(group).items()}
        with_it = {name: each for name, known in others.items() for each in known.values() if flag in each.flags}
        if with_it:
            name = min(with_it, key=lambda name: (not name.endswith("_pn"), len(name)))
            override = settings.plus(with_it[name].key) + with_it[name].override(value)
            if chosen is None:
                return f"it is a setting of {group} {name}: {override}"
            if group in ("model", "task"):  # others train something else
                return f"it is a setting of {group} {name}, not of {chosen}"
            return f"{group} {chosen} has no such setting, but {name} does: {settings.choice(group, name)} {override}"
    flags = {each: setting for setting in settings.known.values() for each in setting.flags if not setting.link}
    for name in (*CHOICES, *settings.chosen):
        each = "--" + name.replace("_", "-")
        flags[each] = Setting(f"{CHOICES.get(name, name)}._name", (each,))
    near = difflib.get_close_matches(flag, flags, 1, 0.8)
    return f"did you mean {near[0]}? {_instead(settings, flags[near[0]], value, own)}" if near else None


def _instead(settings: Settings, setting: Setting, value: Optional[str], own: Mapping[str, Optional[str]]) -> str:
    if setting.key in own:
        return f"{setting.key} is this command's own" + (f"; use {own[setting.key]}" if own[setting.key] else "")
    group, _, name = setting.key.partition(".")
    chooses = name == "_name" and value is not None
    words = settings.choice(group, value or "") if chooses else settings.plus(setting.key) + setting.override(value)
    return f"fairseq's settings are overrides: {words}"


def check(overrides: Sequence[str], config: Any, where: str, folders: Iterable[str]) -> None:
    """Refuses an override of a setting that there is not, and says which one is most like it.

    Args:
        config: the settings that they change
        where: the file of these
        folders: the groups that its folder has beside those of fairseq's configuration
    """
    settings = Settings(config, overrides)
    groups = {key.partition(".")[0] for key in settings.known} | set(settings.chosen)
    choices = groups | set(folders)
    for key, override in by_key(overrides).items():
        group, _, name = key.partition(".")
        name = name.partition(".")[0]
        if re.match("hydra[./]", key) or "/" in key or "@" in key or (not name and group in choices):
            continue
        short = f"{group}.{name}" if name else group
        is_known = short in settings.known or short in settings.stated(group)
        is_known = is_known or group in settings.chosen and (name == "_name" or group in settings.open)
        if not is_known:
            near = settings.nearest(short)
            raise UserError(f"override {override}: there is no setting {short}"
                            + (f"; did you mean {settings.plus(near)}{near}?" if near else
                               f"; settings begin with one of {', '.join(sorted(groups))}"))
        sign, value = re.match(r"[+~]*", override), override.partition("=")[2]
        assert sign is not None
        if sign[0] == "" and settings.plus(short) and key == short and name != "_name":
            raise UserError(f"override {override}: {where} has no {key}; to add it: +{override}")
        if sign[0] == "+" and not settings.plus(short) and key == short:
            raise UserError(f"override {override}: {key} is there without being added; to change it: {override[1:]}")
        if short in settings.known and settings.known[short].is_list and value and not re.match(r"\[|null|\$|'|\"", value):
            raise UserError(f"override {override}: {key} is a list: {override.partition('=')[0]}=[{value}]")
