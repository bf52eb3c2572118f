"""What all models share: flat options, registration of architectures, refusal of checkpoints with other norms.

Options are flat, as on the command line and in YAML files. Sizes that are not given come from the architecture
function, norm options from :mod:`fairseq_powernorm.options`.
"""
from argparse import Namespace
from dataclasses import field, fields
from typing import Any, Callable, Collection, Dict, List, Mapping, Optional, Tuple, Type

from fairseq.dataclass.utils import gen_parser_from_dataclass
from fairseq.models import ARCH_MODEL_REGISTRY, MODEL_REGISTRY, register_model_architecture
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ..checkpoint import check_same_norms
from ..fold import fold_norms, refuse_loading, refuse_training
from ..options import NORM_FIELDS, NormConstants, check_norms, given_flags, norm_options, reject_unknown


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
            default = inner.default
            own = not _is_interpolation(default) or default.startswith("${model.")  # else an option of task or command
            if name in by_architecture and own:
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
    values = OmegaConf.to_container(args, enum_to_str=True) if isinstance(args, DictConfig) else dict(vars(args))
    for name, value in values.items():
        if _is_interpolation(value):
            try:
                values[name] = args[name] if isinstance(args, DictConfig) else None
            except OmegaConfBaseException:
                values[name] = None
    return {name: value for name, value in values.items() if value is not None}


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
            check_norms(filled, MODEL_REGISTRY[model].options)
            for key, value in vars(filled).items():
                setattr(args, key, value)

        return fn

    return register


class PowerNormModel:
    """Mixin, before a model class of fairseq: options and checkpoints of a model with a choice of norms."""

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
            ValueError: the command line asks for this model and has a norm option that it does not have
        """
        gen_parser_from_dataclass(parser, cls.options(), delete_default=True)
        flags = given_flags()
        if ARCH_MODEL_REGISTRY.get(flags.get("arch")) is cls:  # fairseq calls this for every model of a --user-dir
            reject_unknown(flags, cls.options)

    @classmethod
    def complete(cls, args: Namespace) -> None:
        """Fill in what an architecture leaves open."""
        raise NotImplementedError

    @classmethod
    def read_options(cls, cfg: Any) -> Tuple[Namespace, Namespace]:
        """Complete and check the flat options (Namespace or DictConfig): those of fairseq and the norm options.

        Raises:
            ValueError: a norm option is unknown or has an invalid value
        """
        args = Namespace(**given(cfg))
        reject_unknown(vars(args), cls.options)
        norms = norm_options(args, cls.options)
        for name in NORM_FIELDS:
            if hasattr(args, name):
                delattr(args, name)
        cls.complete(args)
        check_norms(Namespace(**vars(args), **vars(norms)), cls.options)
        return args, norms

    def load_state_dict(self, state_dict, *args, **kwargs):
        """See fairseq; raises ValueError where the checkpoint has another norm than the model."""
        if self.folded:
            refuse_loading()
        check_same_norms(self, state_dict)
        return super().load_state_dict(state_dict, *args, **kwargs)

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
        if self.folds:
            fold_norms(self)
