"""What comes from a command line, a run's directory or a record is checked in one way, and is never code.

A directory may be somebody else's. Overrides that were stored pass the checks of those that are typed, and texts that
fairseq would evaluate, or omegaconf look up in the environment, are refused.
"""

import ast
import math
import os
import re
from pathlib import Path
from typing import Any, Iterable, Iterator, List, Mapping, Optional, Tuple

from .errors import UserError

#: keys that the commands give themselves -> what to use instead; another value would take the run's files from its
#: directory, or code from elsewhere
OURS = {"checkpoint.save_dir": "--run-dir DIR", "task.data": "PN_DATA_ROOT", "common.user_dir": "another checkout",
        "common.tensorboard_logdir": "--tensorboard", "common.wandb_project": "--wandb"}
#: where curves go as well is no setting of a run, though older runs have stored this override, and any of this key
TENSORBOARD, WANDB = "common.tensorboard_logdir=tensorboard", "common.wandb_project"
#: files that training writes, in a run's directory
WRITTEN = ("run.json", "run.json.partial", "finished.json", "finished.json.partial", "config.yaml", "config.yaml.partial",
           "command.txt", "train.log")
#: its folders
FOLDERS = ("checkpoints", "logs", "hydra", "tensorboard", "wandb", "evaluation")
#: those of them in which a training writes, and removes, under names that are known before
TRAINED = ("checkpoints", "logs", "hydra")
#: keys whose files a run has in its own directory
FILES = ("common.log_file", "common.aim_repo", "task.norm_record", "common_eval.results_path")
#: (key, value) of what would let a run end without its result, or an error look like a success
UNUSABLE = {("checkpoint.no_save", True): "a run is what its checkpoints are",
            ("common.suppress_crashes", True): "a failed training would look like one that has ended well",
            ("checkpoint.no_last_checkpoints", True): "a run goes on from its last checkpoint",
            ("checkpoint.write_checkpoints_asynchronously", True): "a checkpoint that is not written would go unnoticed"}
KEY = re.compile(r"(\+\+|\+|~)?([A-Za-z_]\w*(?:\.\w+)+)(?:=|$)", re.ASCII)
LINK = re.compile(r"\$\{[A-Za-z_]\w*(?:\.\w+)+\}", re.ASCII)


def check_overrides(overrides: Any, own: Mapping[str, Optional[str]], where: str = "") -> None:
    """Refuses hydra overrides that are more than one setting's value: other people's, and mistyped ones.

    Args:
        overrides: texts, as they are given to hydra
        own: keys that a command gives itself -> what to use instead, if anything
        where: the file that they were read from; empty for a command line
    """
    prefix = f"{where}: " if where else ""
    if not isinstance(overrides, list) or not all(isinstance(override, str) for override in overrides):
        raise UserError(f"{prefix}overrides must be a list of texts KEY=VALUE, not {overrides!r}")
    for override in overrides:
        problem = _problem(override, own)
        if problem:
            raise UserError(f"{prefix}override {override!r}: {problem}")


def of_training(overrides: Iterable[str]) -> List[str]:
    """Stored overrides without those that only say where curves go."""
    return [each for each in overrides if each != TENSORBOARD and each.partition("=")[0].lstrip("+~") != WANDB]


def check_stored(overrides: Any, own: Mapping[str, Optional[str]], where: str) -> List[str]:
    """As :func:`check_overrides`, but for what only older runs have stored; gives the overrides of training."""
    read = [each for each in overrides if each != TENSORBOARD] if isinstance(overrides, list) else overrides
    check_overrides(read, {key: instead for key, instead in own.items() if key != WANDB}, where)
    return of_training(read)


def _problem(override: str, own: Mapping[str, Optional[str]]) -> Optional[str]:
    """What is wrong with an override, if anything."""
    if not override.isprintable():
        return "has characters that cannot be printed; valid: a setting and its value in one line"
    found = KEY.match(override)
    if found is None:
        if re.match(r"[+~]*hydra\b", override):
            return "hydra's own settings are this command's; valid: fairseq's, GROUP.KEY=VALUE"
        return "must read GROUP.KEY=VALUE, such as common.seed=2"
    key = found[2]
    if key.startswith("hydra."):
        return "hydra's own settings are this command's; valid: fairseq's, GROUP.KEY=VALUE"
    if key in own:
        return "is this command's own" + (f"; use {own[key]}" if own[key] else "")
    if override.startswith("~") and key.endswith("._name"):
        return f"chooses an implementation, without which nothing is trained; another one: {key}=NAME"
    if override.startswith("~") and "=" not in override:
        return None
    try:
        value = value_of(override)
    except UserError as error:
        return str(error)
    for where, text in _texts(value):
        if isinstance(text, float) and not math.isfinite(text):
            return f"{text} is no finite number"
        if isinstance(text, str):
            problem = problem_of_text(text)
            if problem:
                return problem
        if where and (not isinstance(where, str) or not re.fullmatch(r"\w+", where)):
            return f"{where!r} is no key"
    return _problem_of_value(key, value)


def _problem_of_value(key: str, value: Any) -> Optional[str]:
    """What would let a run end without its result, or write elsewhere, if anything."""
    if isinstance(value, bool) and (key, value) in UNUSABLE:
        return UNUSABLE[key, value]
    if key == "common.log_format" and value != "json":
        return "progress and curves are read from a log in JSON; valid: json"
    if key in FILES and value is not None and not _is_inside(value):
        return "must be the name of a file in the run's directory, and none that a run has anyway"
    return None


def check_composed(config: Any) -> None:
    """As :func:`check_overrides`, of a configuration that hydra has composed: a value has many spellings (1, yes, on), and
    may be that of another setting.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    for key in ("common.log_format", *FILES, *(key for key, _ in UNUSABLE)):
        try:
            value = OmegaConf.select(config, key)
        except OmegaConfBaseException as error:
            raise UserError(f"{key}: {' '.join(str(error).split())}") from None
        problem = _problem_of_value(key, value)
        if problem:
            raise UserError(f"{key}={value}: {problem}")


def value_of(override: str) -> Any:
    """The value that hydra makes of an override; raises UserError if it cannot be read, or is several."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    try:
        found = OverridesParser.create().parse_override(override)
        value = found.value()
    except Exception as error:  # of hydra's grammar, which are many
        reason = str(error).split("\n")[0]
        raise UserError(f"hydra cannot read it: {reason}") from None
    if found.is_sweep_override():
        raise UserError("has several values; valid: one. A list is in brackets: [1,2]; a comma in a text needs quotes")
    return value


def _texts(value: Any, key: Any = None) -> Iterator[Tuple[Any, Any]]:
    """(key, value) of all that a value holds; None is the key where there is none."""
    if isinstance(value, Mapping):
        for inner, each in value.items():
            yield from _texts(each, inner)
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from _texts(each, key)
    else:
        yield key, str(value) if isinstance(value, str) else value


def problem_of_text(text: str) -> Optional[str]:
    """What a text would do besides being one, if anything."""
    if "${" in text and not LINK.fullmatch(text):
        return "an interpolation must be all of a value, and that of another setting: ${GROUP.KEY}"
    if re.match(r"--?[A-Za-z]", text):
        return "begins like an option, as which fairseq's commands would take it"
    if calls(text):
        return "reads like Python code, which fairseq evaluates in some settings"
    return None


def calls(text: str) -> bool:
    """Would evaluating the text call something? fairseq evaluates betas, for one."""
    try:
        tree = ast.parse(text.strip(), mode="eval")
    except SyntaxError:
        return False
    except (ValueError, MemoryError, RecursionError):  # a null byte; nested too deeply to be known
        return True
    return any(isinstance(node, ast.Call) for node in ast.walk(tree))


def _is_inside(value: Any) -> bool:
    path = Path(str(value))
    if not isinstance(value, str) or not path.parts or path.is_absolute() or ".." in path.parts:
        return False
    return str(path) not in WRITTEN and path.parts[0] not in FOLDERS


def check_config(config: Any, where: str) -> None:
    """Refuses a configuration (resolved, as nested dictionaries) with texts that are more than texts."""
    for key, value in _texts(config):
        if isinstance(value, str):
            problem = "has an interpolation" if "${" in value else problem_of_text(value)
            if problem is None and not value.isprintable():
                problem = "has characters that cannot be printed"
            if problem:
                raise UserError(f"{where}: {key} {value!r}: {problem}")


def check_yaml(path: Path) -> None:
    """Refuses a YAML file in which a part stands for others: training writes none, and a few lines could be gigabytes."""
    import yaml

    with open(path, encoding="utf-8") as stream:
        for event in yaml.parse(stream, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
            if isinstance(event, yaml.AliasEvent):
                raise UserError(f"{path} has an alias {event.anchor!r}, which stands for another part of the file")


def check_files(directory: Path, names: Iterable[str]) -> None:
    """Refuses files of a directory that are links, through which writing would change other files, or no files."""
    for path in (directory / name for name in names):
        if path.is_symlink():
            raise UserError(f"{path} is a link; a run's records are files of its own directory")
        if path.exists() and not path.is_file():
            raise UserError(f"{path} is not a file, which a run's records are")


def check_places(directory: Path, names: Iterable[Any] = ()) -> None:
    """Refuses links, pipes and the like in a run's directory: training would change, or wait for, what is elsewhere.

    Args:
        names: values of FILES, None for none
    """
    places = [directory / folder for folder in TRAINED]
    places += [Path(place, name) for folder in TRAINED for place, folders, files in os.walk(directory / folder)
               for name in (*folders, *files)]
    for path in (directory / name for name in names if name):
        places += [path, *(parent for parent in path.parents if directory in parent.parents)]
    for path in places:
        if path.is_symlink() or path.exists() and not path.is_file() and not path.is_dir():
            raise UserError(f"{path} is {'a link' if path.is_symlink() else 'no file'}; training writes, and removes, files "
                            f"of the run's own directory only. A link may lead to the whole run")
