"""What all models share: flat options, registration of architectures, refusal of tasks and checkpoints that do not fit.

Options are flat, as on the command line and in YAML files. Sizes that are not given come from the architecture
function, norm options from :mod:`fairseq_powernorm.options`.
"""
from argparse import Namespace
from contextlib import nullcontext
from dataclasses import field, fields
from typing import TYPE_CHECKING, Any, Callable, Collection, Dict, List, Mapping, NamedTuple, Optional, Tuple, Type

import torch
from fairseq.dataclass.utils import gen_parser_from_dataclass
from fairseq.models import (
    ARCH_MODEL_REGISTRY,
    MODEL_REGISTRY,
    FairseqEncoderDecoderModel,
    FairseqLanguageModel,
    register_model_architecture,
)
from fairseq.tasks import TASK_REGISTRY
from fairseq.tasks.language_modeling import LanguageModelingTask
from fairseq.tasks.translation import TranslationTask
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from ..checkpoint import check_same_norms
from ..fold import fold_norms, may_fold, refuse_loading, refuse_training
from ..norms import RunningNorm
from ..options import (
    NORM_FIELDS,
    STATISTICS_FIELDS,
    NormConstants,
    check_norms,
    flag,
    given_flags,
    norm_options,
    norm_sides,
    reject_both_orders,
    reject_unknown,
)
from .pruning import KeptLayers, kept_layers, prune


class Kind(NamedTuple):
    """Models and the tasks that train them."""

    name: str
    model: type
    task: type
    our_task: str


KINDS = (
    Kind("encoder-decoder models", FairseqEncoderDecoderModel, TranslationTask, "translation_pn"),
    Kind("language models", FairseqLanguageModel, LanguageModelingTask, "language_modeling_pn"),
)


def check_kind(arch: str, model: type, task: type) -> None:
    """Raise ValueError if ``arch``, an architecture of the class ``model``, is of another kind than ``task`` trains."""
    for kind in KINDS:
        if issubclass(task, kind.task) and not issubclass(model, kind.model):
            ours = (each for each, of in ARCH_MODEL_REGISTRY.items() if issubclass(of, PowerNormModel))
            fitting = [each for each in ours if issubclass(ARCH_MODEL_REGISTRY[each], kind.model)]
            other = [each.our_task for each in KINDS if issubclass(model, each.model)]
            hint = f"; with this architecture --task must be {other[0]}" if other else ""
            raise ValueError(
                f"--arch {arch} with --task {_name_of(task)}, which trains {kind.name}: with this task --arch must be one "
                f"of {', '.join(fitting)}, or another of fairseq's {kind.name}{hint}"
            )


#: options that fairseq compares with numbers in the settings themselves, which nothing fills in where the model's own name
#: stands for an architecture; no architecture of this package sets them
READ_BY_FAIRSEQ = ("base_layers",)


def flat_fields(
    config: type, *architectures: Callable, nested: Mapping[str, type] = {}, without: Collection[str] = ()
) -> List[Tuple[str, Any, Any]]:
    """Fields of a configuration of fairseq, for ``make_dataclass``, without nesting.

    Args:
        config: the dataclass
        architectures: fairseq's functions that fill in sizes; the options that any of them sets are None by default, so
            that an architecture can tell what was given. Every option that one of this package sets must be among them.
        nested: name -> dataclass of the fields that hold further options, ``NAME_OPTION`` on the command line
        without: names to leave out
    """
    by_architecture = {}
    for architecture in architectures:
        args = Namespace()
        architecture(args)
        by_architecture.update(vars(args))
    flat = []
    for outer in fields(config):
        for inner in fields(nested[outer.name]) if outer.name in nested else (outer,):
            name = f"{outer.name}_{inner.name}" if outer.name in nested else inner.name
            if inner.name.startswith("_") or name in without:
                continue
            kind = str if name.endswith("_layers_to_keep") else inner.type  # fairseq splits these at commas
            default: Any = inner.default
            own = not _is_interpolation(default) or default.startswith("${model.")  # else an option of task or command
            if name in by_architecture and own and name not in READ_BY_FAIRSEQ:
                default = None
            if default is None:
                kind = Optional[kind]
            flat.append((name, kind, field(default=default, metadata=dict(inner.metadata))))
    return flat


def _is_interpolation(value: Any) -> bool:
    return isinstance(value, str) and value.startswith("${")


def given(args: Any) -> Dict[str, Any]:
    """The options of a Namespace, dataclass or DictConfig that have a value.

    References to other options (``${task.tokens_per_sample}``) are followed where that option can be seen.
    """
    values: Any = OmegaConf.to_container(args, enum_to_str=True) if isinstance(args, DictConfig) else dict(vars(args))
    for name, value in values.items():
        if _is_interpolation(value):
            try:
                values[name] = args[name] if isinstance(args, DictConfig) else None
            except OmegaConfBaseException:
                values[name] = None
    return {name: value for name, value in values.items() if value is not None}


def _kind_of(model: type) -> Kind:
    return next(kind for kind in KINDS if issubclass(model, kind.model))


def _name_of(task: type) -> str:
    return next((name for name, each in TASK_REGISTRY.items() if each is task), task.__name__)


def _refuse_task(what: str, model: type, task: type) -> None:
    raise ValueError(
        f"--task {_name_of(task)}: {what} needs a task that takes one step of the running statistics an update; must be "
        f"{_kind_of(model).our_task}, or a task of your own with the mixin fairseq_powernorm.tasks.RunningStatisticsTask"
    )


def fill(args: Namespace, **defaults) -> None:
    """Set those of the defaults that ``args`` lacks."""
    for name, value in defaults.items():
        if not hasattr(args, name):
            setattr(args, name, value)


def register_architecture(model: str, name: str):
    """Register ``fn(args)``, which fills in what ``args`` lacks, as an architecture of a model of this package.

    Works on a command line's Namespace, where options not given are absent, and on a DictConfig (hydra,
    checkpoints), where they are None.
    """

    def register(fn):
        @register_model_architecture(model, name)
        def fill_in(args):
            filled = Namespace(**given(args))
            fn(filled)
            MODEL_REGISTRY[model].check_options(filled)
            for key, value in vars(filled).items():
                setattr(args, key, value)

        return fn

    return register


class ModelOptions(NamedTuple):
    """The flat options of a model, complete and checked.

    Attributes:
        args: those of fairseq, with the number of layers that are kept
        norms: result of :func:`~fairseq_powernorm.options.norm_options`
        kept_layers: result of :func:`~fairseq_powernorm.models.pruning.kept_layers`
    """

    args: Namespace
    norms: Namespace
    kept_layers: Dict[str, KeptLayers]


if TYPE_CHECKING:
    _Mixin = torch.nn.Module
else:
    _Mixin = object


class PowerNormModel(_Mixin):
    """Mixin, before a model class of fairseq: options and checkpoints of a model with a choice of norms."""

    #: side -> how a checkpoint of the whole model is pruned when it is loaded; set by :meth:`build_model`
    kept_layers = {}  # type: ignore[var-annotated]  # an annotation would be read by torch.jit.script
    #: dataclass of the model's options
    options: Type[NormConstants]
    #: set by :func:`~fairseq_powernorm.fold.fold_norms`
    folded = False
    #: whether fairseq's preparation for inference folds the norms
    folds = True

    @classmethod
    def add_args(cls, parser):
        """Declare the flat options; defaults are left to the architecture.

        Raises:
            ValueError: the command line asks for this model and has a norm option that it does not have, or a task that
                cannot train it
        """
        gen_parser_from_dataclass(parser, cls.options(), delete_default=True)
        flags = given_flags()
        if ARCH_MODEL_REGISTRY.get(flags.get("arch")) is cls:  # fairseq calls this for every model of a --user-dir
            reject_unknown(flags, cls.options)
            reject_both_orders(flags)
            task = TASK_REGISTRY.get(flags.get("task", "translation"))  # fairseq's default
            if task is not None:
                check_kind(flags["arch"], cls, task)
                if not hasattr(task, "drives_running_statistics"):
                    if not issubclass(task, _kind_of(cls).task):
                        _refuse_task(f"--arch {flags['arch']}", cls, task)
                    for name in STATISTICS_FIELDS:
                        if name in flags:
                            _refuse_task(f"{flag(name)} {flags[name]}", cls, task)

    @classmethod
    def complete(cls, args: Namespace) -> None:
        """Fill in what an architecture leaves open."""
        raise NotImplementedError

    @classmethod
    def check_options(cls, args: Namespace) -> None:
        """Check complete options before anything is built.

        Raises:
            ValueError: names the option, its value and what is valid
        """
        check_norms(args, cls.options)
        kept_layers(args, norm_sides(cls.options))

    @classmethod
    def read_options(cls, cfg: Any, task: Any) -> ModelOptions:
        """Complete and check the flat options (Namespace or DictConfig).

        Raises:
            ValueError: an option is unknown or has an invalid value, or the task is of another kind
        """
        name = next(name for name, each in MODEL_REGISTRY.items() if each is cls)
        check_kind(getattr(cfg, "_name", None) or getattr(cfg, "arch", None) or name, cls, type(task))
        args = Namespace(**given(cfg))
        reject_unknown(vars(args), cls.options)
        norms = norm_options(args, cls.options)
        for name in NORM_FIELDS:
            if hasattr(args, name):
                delattr(args, name)
        cls.complete(args)
        cls.check_options(Namespace(**vars(args), **vars(norms)))
        kept = kept_layers(args, norm_sides(cls.options))
        for side, (layers, _) in kept.items():
            setattr(args, f"{side}_layers", len(layers))
            setattr(args, f"{side}_layers_to_keep", None)
        return ModelOptions(args, norms, kept)

    def write_options(self, cfg: Any) -> None:
        """Write the number of layers that were kept into the options that the model was built from.

        The configuration of a checkpoint then has as many layers as the checkpoint.
        """
        with open_dict(cfg) if OmegaConf.is_config(cfg) else nullcontext():
            for side, (layers, _) in self.kept_layers.items():
                setattr(cfg, f"{side}_layers", len(layers))
                setattr(cfg, f"{side}_layers_to_keep", None)

    def check_final_norms(self, options: Any) -> None:
        """Raise ValueError if options name a norm that would stand after layers behind which there is none."""
        for side in norm_sides(self.options):
            name = f"{side}_norm_final"
            text = getattr(options, name, None)
            if text is not None and getattr(self, side).layer_norm is None:
                raise ValueError(
                    f"{flag(name)} {text!r}: no norm stands after this {side}'s layers (post-norm, or "
                    f"--no-decoder-final-norm); leave it out, or give {flag(f'{side}_normalize_before')}"
                )

    def check_training_task(self, task: Any) -> None:
        """Raise ValueError if a task would train the model and leave its running statistics to chance.

        Without a task that drives them they would take a step in every forward pass, on each rank apart, with the loss
        scale of fp16 in them, and for updates that are skipped.
        """
        if not getattr(task, "drives_running_statistics", False):
            for name, module in self.named_modules():
                if isinstance(module, RunningNorm):
                    _refuse_task(f"norm {name}, which has running statistics,", type(self), type(task))

    def load_state_dict(self, state_dict, strict=True, model_cfg=None, args=None):
        """See fairseq; prunes a checkpoint of the whole model to the layers that are kept.

        fairseq's own pruning, which ``model_cfg`` and ``args`` are for, drops all layers of a stack that is not pruned,
        and prunes what was pruned already.

        Raises:
            ValueError: the checkpoint has another norm than the model somewhere, or another number of layers
        """
        if self.folded:
            refuse_loading()
        for side, kept in self.kept_layers.items():
            state_dict = prune(state_dict, side, kept)
        self.upgrade_state_dict(state_dict)  # fairseq's first versions had other names for the norms
        check_same_norms(self, state_dict)
        return super().load_state_dict(state_dict, strict)

    def train(self, mode: bool = True):
        """See torch; a folded model raises RuntimeError for ``mode=True``."""
        if self.folded:
            refuse_training(mode)
        return super().train(mode)

    def prepare_for_inference_(self, cfg):
        """Called by fairseq-generate, -interactive and -eval-lm: folds the norms, unless the task's options say no."""
        self.folds = not getattr(getattr(cfg, "task", None), "no_fold_norms", False)
        super().prepare_for_inference_(cfg)

    def make_generation_fast_(self, **kwargs):
        """See fairseq."""
        super().make_generation_fast_(**kwargs)
        if self.folds and may_fold(self):
            fold_norms(self)
