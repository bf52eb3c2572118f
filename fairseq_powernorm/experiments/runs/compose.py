"""Composes a run's configuration exactly as fairseq-hydra-train does, and proves that it builds."""

import re
from pathlib import Path
from typing import Any, Dict, List, Sequence, Tuple

from .. import trust
from ..errors import UserError
from ..overrides import Settings, by_key, check, quiet, quote
from ..own import task_of
from ..paths import PLUGIN
from ..settings import NORM_OPTIONS, PLACEMENTS, architectures, placements, recipe
from ..tools import within_memory
from . import limits


def places(model: Any, placement: str) -> Dict[str, bool]:
    """option -> does NORM stand there?, for those of the four options that the model has."""
    return {option: chosen for option, chosen in zip(NORM_OPTIONS, PLACEMENTS[placement]) if option in model}


def norm_overrides(model: Any, norm: str, placement: str) -> List[str]:
    """The hydra overrides that put NORM at a placement of a model (its configuration), and LayerNorm elsewhere."""
    return [f"model.{option}={quote(norm) if chosen else 'layer'}" for option, chosen in places(model, placement).items()]


def arch_overrides(subject: str, arch: str) -> List[str]:
    """The hydra override that lays configs/BENCH/ARCH.yaml over configs/BENCH.yaml; none for the default."""
    return [] if arch == architectures(subject)[0] else [f"+{recipe(subject).base}={arch}"]


def norms_of(model: Any) -> Tuple[str, str]:
    """(norm, placement) of a model's configuration, ("custom", "custom") if it is none of train.sh's."""
    for placement in placements(model):
        chosen = places(model, placement)
        norm = model[next(iter(chosen))]
        if all(model[option] == (norm if wanted else "layer") for option, wanted in chosen.items()):
            return norm, placement
    return "custom", "custom"


def compose(subject: str, overrides: Sequence[str]) -> Any:
    """The composed configuration; fairseq must be importable (about 3 s). Refuses settings that there are not."""
    found, given = recipe(subject), by_key(overrides)
    arch = given[found.base].partition("=")[2] if found.base in given else None
    check(overrides, found.load(arch), found.where, [path.name for path in found.folder.iterdir() if path.is_dir()])
    overrides = [*found.groups, *found.overrides, *overrides]
    with quiet():
        from fairseq.dataclass.initialize import hydra_init

    import hydra
    from hydra.core.global_hydra import GlobalHydra

    old: Any = None
    if not hasattr(hydra, "initialize_config_dir"):  # hydra 1.0
        import hydra.experimental as old
    api: Any = old or hydra
    hydra_init(found.base)
    GlobalHydra.instance().clear()
    try:
        with quiet(), api.initialize_config_dir(config_dir=str(found.folder)):
            return api.compose(config_name=found.base, overrides=overrides)
    except Exception as error:  # hydra's errors share no base class
        reason = " ".join(f"{error}: {error.__cause__}".split() if error.__cause__ else str(error).split())
        raise UserError(f"{found.where} does not take these overrides: {' '.join(overrides)}: {reason}") from None


def check_languages(subject: str, composition: Any) -> None:
    """Refuses a composed configuration whose languages are not those of the data, by whose text it would be scored."""
    data = recipe(subject).data
    for key, wanted in task_of(data)[1].get("task", {}).items():
        found = composition.task.get(key)
        if found != wanted:
            raise UserError(f"task.{key}={found}: that of the data {data} is {wanted}; leave it out, or prepare the text "
                            f"for the other direction, under a name of its own")


def check_values(composition: Any) -> None:
    """Refuses a composed configuration with values that a run cannot have, wherever it runs."""
    trust.check_composed(composition)
    settings = Settings(composition)
    limits.check(composition, settings)
    limits.check_translating(composition, settings)


def build(config: Any) -> Tuple[Any, Any, Any, Any]:
    """Resolves a composed configuration with fairseq's defaults and builds its task, model and criterion.

    Returns (resolved configuration, task, model, criterion).
    """
    from fairseq import tasks, utils
    from fairseq.dataclass.initialize import add_defaults
    from fairseq.dataclass.utils import omegaconf_no_object_check
    from omegaconf import OmegaConf

    with quiet():
        utils.import_user_module(config.common)
        try:
            add_defaults(config)
            with omegaconf_no_object_check():
                config = OmegaConf.create(OmegaConf.to_container(config, resolve=True, enum_to_str=True))
            OmegaConf.set_struct(config, True)  # noqa: FBT003
            with within_memory():
                task = tasks.setup_task(config.task)
                model = task.build_model(config.model)
                criterion = task.build_criterion(config.criterion)
        except Exception as error:  # whatever fairseq or the plugin objects to
            reason = " ".join(str(error).split())
            raise UserError(f"these settings do not build a model: {type(error).__name__}: {reason}") from None
    return config, task, model, criterion


#: settings that only say where files lie: (group, key)
PATHS = (("common", "user_dir"), ("task", "data"), ("checkpoint", "save_dir"), ("common", "tensorboard_logdir"),
         ("common", "wandb_project"))


def differences(config: Any) -> Dict[str, Any]:
    """The settings of a resolved configuration that differ from the defaults of fairseq and of the package, as nested
    dictionaries; `_name`, which chooses an implementation and with it the defaults, always; PATHS never."""
    with quiet():
        from fairseq import utils
        from fairseq.dataclass.configs import FairseqConfig
        from fairseq.dataclass.initialize import add_defaults

        utils.import_user_module(config.common)
    from omegaconf import OmegaConf

    found: Any = OmegaConf.to_container(config)
    for group, key in PATHS:
        found[group].pop(key, None)
    schema: Any = OmegaConf.create(OmegaConf.to_container(OmegaConf.structured(FairseqConfig), enum_to_str=True))
    for group, settings in found.items():
        if isinstance(settings, dict) and settings.get("_name"):
            schema[group] = {"_name": settings["_name"]}
    add_defaults(schema)
    defaults: Any = OmegaConf.to_container(schema, enum_to_str=True)

    def default_of(value: Any) -> Any:
        """What a default means in this configuration: ${optimization.lr} is its learning rate."""
        link = re.fullmatch(r"\$\{([\w.]+)\}", value) if isinstance(value, str) else None
        return OmegaConf.select(config, link[1]) if link else value

    def walk(settings: Dict[str, Any], defaults: Dict[str, Any]) -> Dict[str, Any]:
        kept = {}
        for key, value in settings.items():
            default = defaults.get(key)
            if isinstance(value, dict) and isinstance(default, dict):
                value, default = walk(value, default), {}
            if value and key == "_name" or value != default_of(default):
                kept[key] = value
        return kept

    return walk(found, defaults)


def resolved(
    subject: str, overrides: Sequence[str], data: Path, save_dir: Path
) -> Tuple[List[str], Any, int]:
    """compose + build with the paths that train.sh gives; returns (all overrides, configuration, parameters)."""
    found = recipe(subject)
    complete = [f"common.user_dir={quote(PLUGIN)}", f"task.data={quote(data)}", f"checkpoint.save_dir={quote(save_dir)}",
                *overrides]
    composition = compose(subject, complete)
    complete = [*found.groups, *found.overrides, *complete]
    for group, key, path in (("task", "data", data), ("checkpoint", "save_dir", save_dir)):
        read = composition[group][key]
        if read != str(path):
            raise UserError(f"{group}.{key} {str(path)!r}: hydra reads it as {read!r}; move it, or give the path of a "
                            f"link to it")
    check_values(composition)
    check_languages(subject, composition)
    limits.check_references(composition, data, save_dir)
    config, _, model, _ = build(composition)
    return complete, config, sum(parameter.numel() for parameter in model.parameters())
