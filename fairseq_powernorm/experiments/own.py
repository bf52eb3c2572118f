"""Text and settings of the user's own: names of prepared data, and YAML files, read as what they are and never as code.

A YAML file is turned into hydra's overrides of a file in configs/, which pass the checks of those that are typed.
"""

import functools
import os
import re
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple

from . import recipes, trust
from .errors import UserError, choose
from .overrides import Settings, by_key, implementations
from .paths import data_root
from .recipes import Recipe, benchmark, benchmarks, is_lm, prepared
from .runs.launchers import PLACES

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}", re.ASCII)
VALID_NAME = "letters, digits, '_', '-' and '.', 64 at most, a letter or digit first"
LANGUAGE = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,15}", re.ASCII)
#: directories beside those of data, runs and records that have a meaning of their own
RESERVED = ("downloads", "slurm", "quickstart")
ENDS = (".yaml", ".yml")
#: what text is for -> the settings in configs/generic/ on which a recipe builds where nothing is said
TRANSLATION, LM = "translation", "language_model"
TASKS = (TRANSLATION, LM)
#: what a YAML file has beside settings
OWN_KEYS = ("base", "data", "name")
LARGEST_FILE = 1 << 20  # bytes of a YAML file
UNSAID = "???"  # in the files of configs/: a command gives it

Base = Tuple[str, Path, Optional[str]]  # base, folder and arch of a Recipe


# ---- names -----------------------------------------------------------------------------------------------------------


def check_name(option: str, text: str) -> str:
    """A name for data, runs and records of one's own; refuses what is none, a benchmark's and what has another meaning."""
    if not NAME.fullmatch(text) or text.endswith(ENDS):
        raise UserError(f"{option} {text!r} is no name; valid: {VALID_NAME}, no YAML file")
    if text in benchmarks():
        raise UserError(f"{option} {text!r} is the name of a benchmark, whose results it would be taken for; choose another")
    if text in RESERVED:
        raise UserError(f"{option} {text!r} has a meaning of its own; choose another")
    return text


def is_name(text: str) -> bool:
    """Can it be a benchmark's name, or one of one's own?"""
    return bool(NAME.fullmatch(text)) and text not in RESERVED


def is_path(text: str) -> bool:
    """Is it meant as the path of a YAML file?"""
    return "/" in text or os.sep in text or text.endswith(ENDS)


def names() -> List[str]:
    """The names of the user's own data that are prepared."""
    found = sorted(path.parent.name for path in data_root().glob("*/prepared.json"))
    return [name for name in found if name not in benchmarks() and is_name(name)]


def subject(option: str, text: str) -> str:
    """BENCH of a command line, the path of a YAML file made absolute; refuses what is neither this nor a known name."""
    if is_path(text):
        return os.path.abspath(text)
    if text in benchmarks() or text in names():
        return text
    own = f"; prepared text of your own: {', '.join(names())}" if names() else ""
    raise UserError(f"{option} {text!r} is unknown; valid: {', '.join(benchmarks())}{own}; or a YAML file, such as my.yaml. "
                    f"scripts/prepare.sh NAME prepares your own text")


# ---- data ------------------------------------------------------------------------------------------------------------


def task_of(data: str) -> Tuple[str, Dict[str, Any]]:
    """(what prepared data are for, settings that they ask for: group -> key -> value)."""
    if data in benchmarks():
        config = benchmark(data).load()
        languages = None if is_lm(config) else [config.task.source_lang, config.task.target_lang]
        joined = True
    else:
        check_name("data", data)
        directory, stamp = prepared(data)
        task, settings = stamp.get("task"), stamp.get("settings")
        if task not in TASKS or not isinstance(settings, dict):
            raise UserError(f"{directory / 'prepared.json'} does not say what the text is for; prepare it again, by "
                            f"scripts/prepare.sh {data} --force ...")
        languages, joined = settings.get("languages"), settings.get("joined_dictionary", True)
        if task == LM:
            languages = None
        elif not (isinstance(languages, list) and len(languages) == 2 and all(map(is_language, languages))):
            raise UserError(f"{directory / 'prepared.json'}: {languages!r} are no two languages")
    if languages is None:
        return LM, {}
    wanted: Dict[str, Any] = {"task": {"source_lang": languages[0], "target_lang": languages[1]}}
    if not joined:
        wanted["model"] = {"share_all_embeddings": False, "share_decoder_input_output_embed": True}
    return TRANSLATION, wanted


def is_language(value: Any) -> bool:
    """Is it a code that files and settings can bear?"""
    return isinstance(value, str) and bool(LANGUAGE.fullmatch(value))


# ---- recipes ---------------------------------------------------------------------------------------------------------


def recipe(subject: str) -> Recipe:
    """The recipe of the user's prepared data, by name, or of a YAML file, by path; see :func:`.settings.recipe`."""
    if not is_path(subject):
        if subject not in names():
            choose("benchmark", subject, [*benchmarks(), *names()])
        return _of_data(subject, _age(data_root() / subject / "prepared.json"))
    path = Path(os.path.abspath(subject))
    return _of_file(path, _age(path), _age(data_root()))


def _age(path: Path) -> Optional[int]:
    return path.stat().st_mtime_ns if path.exists() else None


@functools.lru_cache(maxsize=64)
def _of_data(name: str, _: Optional[int]) -> Recipe:
    task, wanted = task_of(name)
    base = _base(task, f"data {name}")
    return Recipe(name, name, *base, overrides=tuple(_overrides(_load(base), wanted, f"data {name}")))


def _of_file(path: Path, *_: Optional[int]) -> Recipe:
    where = shown(path)
    content = read_yaml(path)
    own = {key: content.pop(key) for key in OWN_KEYS if key in content}
    for key, value in own.items():
        if not isinstance(value, str):
            raise UserError(f"{where}: {key} is {value!r}; valid: a name")
    name = check_name(f"{where}: name" if "name" in own else f"{where}: the file's name", own.get("name", path.stem))
    data = own.get("data", path.stem)
    if data not in [*benchmarks(), *names()]:
        asked = f"data {data!r}" if "data" in own else f"data {data!r}, by the file's name,"
        raise UserError(f"{where}: {asked} is not prepared; valid: {', '.join([*names(), *benchmarks()])}. "
                        f"scripts/prepare.sh {data} --text-dir DIR prepares it")
    task, wanted = task_of(data)
    base = _base(own.get("base", data if data in benchmarks() else task), f"{where}: base")
    config = _load(base)
    if is_lm(config) != (task == LM):
        raise UserError(f"{where}: base {own.get('base')!r} and data {data!r} do not go together: {data} is text for "
                        f"{'a language model' if task == LM else 'translation'}")
    stated = _checked(content, wanted, where)
    return Recipe(name, data, *base, overrides=tuple(_overrides(config, stated, where)), file=path)


def shown(path: Path) -> str:
    """A path as messages have it: from the directory where the user is, if it is there."""
    here = Path.cwd()
    return str(path.relative_to(here)) if here in path.parents else str(path)


def _base(text: str, where: str) -> Base:
    """What NAME or NAME/ARCH stands for."""
    name, _, arch = text.partition("/")
    choose(where, name, [*TASKS, *benchmarks()])
    folder = recipes.CONFIGS / "generic" if name in TASKS else recipes.CONFIGS
    if not arch:
        return name, folder, None
    valid = [path.stem for path in sorted((folder / name).glob("*.yaml"))]
    choose(where, text, [name, *(f"{name}/{each}" for each in valid)])
    return name, folder, arch


def _load(base: Base) -> Any:
    """The settings of a base, without what is changed of them."""
    return Recipe("", "", *base).load()


# ---- YAML ------------------------------------------------------------------------------------------------------------


def read_yaml(path: Path) -> Dict[str, Any]:
    """The content of a YAML file, {key: value or {key: value}}: no tag makes an object, no interpolation is resolved."""
    from omegaconf import OmegaConf

    where = shown(path)
    if not path.is_file():
        raise UserError(f"{where} {'is a directory' if path.is_dir() else 'does not exist'}; valid: a benchmark, "
                        f"{', '.join(benchmarks())}, the name of prepared text, or the path of a YAML file")
    if not path.name.endswith(ENDS):
        raise UserError(f"{where}: a file with settings ends in {' or '.join(ENDS)}")
    try:
        if path.stat().st_size > LARGEST_FILE:
            raise UserError(f"{where} has more than {LARGEST_FILE:,} bytes; settings have some hundred lines")
        text = path.read_text(encoding="utf-8")
        trust.check_yaml(path)
        content: Any = OmegaConf.to_container(OmegaConf.create(text)) if text.strip() else {}
    except UserError:
        raise
    except Exception as error:  # of YAML, omegaconf and the file's, which share no base class
        raise UserError(f"{where}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise UserError(f"{where}: holds no settings; they read GROUP: and, indented below it, KEY: VALUE")
    return content


def _checked(content: Mapping[str, Any], wanted: Mapping[str, Mapping[str, Any]], where: str) -> Dict[str, Dict[str, Any]]:
    """group -> key -> value of a file, what the data ask for included; refuses what contradicts the data."""
    stated: Dict[str, Dict[str, Any]] = {group: dict(values) for group, values in wanted.items()}
    for group, values in content.items():
        if values is None:
            stated.setdefault(group, {})
            continue
        if not isinstance(values, dict):
            raise UserError(f"{where}: {group}: {values!r} is not a group of settings; valid: {', '.join(OWN_KEYS)}, which "
                            f"are texts, and groups, with KEY: VALUE indented below them")
        for key, value in values.items():
            if value == UNSAID:
                continue
            asked = wanted.get(group, {})
            if key in asked and value != asked[key]:
                raise UserError(f"{where}: {group}.{key} is {value!r}, but that of the data is {asked[key]!r}; leave it out")
            stated.setdefault(group, {})[key] = value
    return stated


def _overrides(base: Any, stated: Mapping[str, Mapping[str, Any]], where: str) -> List[str]:
    """Hydra's overrides that make of a base what is stated: group -> key -> value.

    Raises:
        UserError: there is no such setting, or its value is more than a value
    """
    chosen = [f"{group}._name={values['_name']}" for group, values in stated.items() if "_name" in values]
    settings = Settings(base, chosen)
    valid = sorted({key.partition(".")[0] for key in settings.known} | set(settings.chosen))
    found: List[str] = []
    for group, values in stated.items():
        if group not in valid:
            near = [key for key in OWN_KEYS if key == group.lower()]
            raise UserError(f"{where}: there is no group {group!r}; valid: {', '.join([*OWN_KEYS, *valid])}"
                            + (f"; did you mean {near[0]}?" if near else ""))
        name = values.get("_name")
        if "_name" in values and not isinstance(name, str):
            raise UserError(f"{where}: {group}._name is {name!r}; valid: a name, or leave it out")
        if name is not None and name != ((base.get(group) or {}).get("_name")):
            if group == "task":
                raise UserError(f"{where}: task._name {name!r}: the data are for {base.task._name}; leave it out")
            choose(f"{where}: {group}._name", name, sorted(implementations(group)) or [name])
            found += settings.choice(group, name).split(" ")
        for key, value in values.items():
            if key != "_name":
                found.append(_override(settings, f"{group}.{key}", _typed(settings, f"{group}.{key}", value), where))
    ranks = dict.fromkeys(PLACES, "an override, or --ranks of scripts/launch.sh")
    trust.check_overrides(found, {**trust.OURS, **ranks}, where)
    for group, values in stated.items():
        for key, value in values.items():
            problem = settings.problem(f"{group}.{key}", _resolved(base, found, f"{group}.{key}", value, where))
            if problem:
                raise UserError(f"{where}: {group}.{key} is {value!r}: {problem}")
    return found


def _typed(settings: Settings, key: str, value: Any) -> Any:
    """A text, or a list of texts, as the numbers or the truth value that a setting makes of it; else the value itself."""
    from omegaconf.errors import OmegaConfBaseException

    texts = value if isinstance(value, list) else [value]
    if not texts or not all(isinstance(text, str) and "${" not in text for text in texts):
        return value
    try:
        found = settings.converted(key, value)
    except OmegaConfBaseException:  # refused later, by what the file says
        return value
    is_plain = all(isinstance(each, (bool, int, float)) for each in (found if isinstance(found, list) else [found]))
    return found if is_plain else value


def _resolved(base: Any, overrides: Sequence[str], key: str, value: Any, where: str) -> Any:
    """A value, that of another setting where it is an interpolation; refuses one that leads nowhere."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    if "${" not in str(value):
        return value
    try:
        found = OmegaConf.select(recipes.apply(base, overrides), key)
        return OmegaConf.to_container(found, resolve=True) if OmegaConf.is_config(found) else found
    except OmegaConfBaseException as error:
        reason = str(error).split("\n")[0]
        raise UserError(f"{where}: {key} is {value!r}, which leads to no setting: {reason}") from None


def _override(settings: Any, key: str, value: Any, where: str) -> str:
    """Hydra's override of a setting; refuses one that there is not, and a value that would be read as another."""
    group, _, name = key.partition(".")
    if not re.fullmatch(r"\w+", name, re.ASCII) or key not in settings.known and key not in settings.stated(group) and (
        group not in settings.open
    ):
        of = settings.chosen.get(group)
        near = settings.nearest(key)
        known = [each.partition(".")[2] for each in settings.known if each.startswith(f"{group}.")]
        raise UserError(f"{where}: there is no setting {key}" + (f" of {of}" if of else "")
                        + (f"; did you mean {near}?" if near else "") + f"; {group} has {', '.join(sorted(known))}")
    if key in settings.known and settings.known[key].is_list and not isinstance(value, (list, str, type(None))):
        raise UserError(f"{where}: {key} is a list: [{value}]")
    try:
        override = f"{settings.plus(key)}{key}={text_of(value)}"
    except (TypeError, ValueError) as error:  # an object, a number of thousands of digits
        raise UserError(f"{where}: {key}: {error}") from None
    if trust.value_of(override) != value:
        raise UserError(f"{where}: {key}: hydra cannot be told {value!r}")
    return override


def text_of(value: Any) -> str:
    """A value as hydra's overrides have it; a text stays one, whatever it looks like. Raises TypeError for an object."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, str):
        return "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"
    if isinstance(value, list):
        return "[" + ",".join(map(text_of, value)) + "]"
    raise TypeError(f"{value!r} is a {type(value).__name__}; valid: a number, a text, true, false, null, or a list of them")


# ---- what a run keeps of it ------------------------------------------------------------------------------------------


def told(found: Recipe) -> Optional[Dict[str, Any]]:
    """What run.json and a record say of a recipe beside its name; None for a benchmark's."""
    if found.file is None and found.name in benchmarks():
        return None
    arch = f"/{found.arch}" if found.arch else ""
    return {"base": f"{found.base}{arch}", "data": found.data, "overrides": list(found.overrides)}


def differing(there: Optional[Mapping[str, Any]], now: Optional[Mapping[str, Any]]) -> Optional[str]:
    """In what a recipe that a run keeps differs from another, in words; None if in nothing."""
    there, now = there or {}, now or {}
    for key in ("base", "data"):
        if there.get(key) != now.get(key):
            return f"{key} {there.get(key)!r}, now {now.get(key)!r}"
    old, new = by_key(there.get("overrides", [])), by_key(now.get("overrides", []))
    for key in {**old, **new}:
        if old.get(key) != new.get(key):
            return f"{old.get(key, f'no {key}')}, now {new.get(key, 'none')}"
    return None
