"""The norm options of models and tasks. What is not given is left to the norm."""
import re
import sys
from argparse import Namespace
from dataclasses import dataclass, field, fields
from typing import Any, Collection, Dict, Iterable, Mapping, MutableMapping, Optional, Sequence, Tuple, Type

from fairseq.dataclass import ChoiceEnum, FairseqDataclass
from omegaconf import II

from .norms import NORMS, VARIANTS, PowerNorm, build_norm, default_groups, norm_options as options_of, parse_norm
from .statistics import SYNC

VariantName: Any = ChoiceEnum(list(VARIANTS))
SyncName: Any = ChoiceEnum(list(SYNC))
#: how a norm is written in an option
NORM_SYNTAX = f"one of {', '.join(NORMS)}; with options of its own NAME:OPTION=VALUE,..., as in batch:variant=reference"
_NORM_OPTION = re.compile(r"(encoder_|decoder_)?norm(_|$)")
_CHECKED_OPTION = re.compile(rf"{_NORM_OPTION.pattern}|tensorized(_|$)")
#: options that say whether norms stand before or behind a block
ORDERS = ("post_norm", "encoder_normalize_before", "decoder_normalize_before")
TRUE = ("true", "yes", "on", "y", "1")  # as omegaconf reads them


@dataclass
class NormConstants(FairseqDataclass):
    """The constants of the norms, which every model has; the names of its options are checked."""

    norm_alpha_fwd: Optional[float] = field(
        default=None,
        metadata={
            "help": "weight of the old value in running statistics of the forward pass, in [0, 1] (default: the norm's own)"
        },
    )
    norm_alpha_bkw: Optional[float] = field(
        default=None,
        metadata={
            "help": "weight of the old value in running statistics of the backward pass, in [0, 1] (default: the norm's own)"
        },
    )
    norm_warmup_updates: Optional[int] = field(
        default=None,
        metadata={
            "help": "length of the warm-up, in which PN (reference) divides by batch statistics, and of those of "
            "batch-renorm, mabn and un; the authors use the warm-up of the learning rate (default: the norm's own)"
        },
    )
    norm_final_warmup_updates: Optional[int] = field(
        default=None,
        metadata={"help": "the same for the final norms (default: --norm-warmup-updates; the authors use 1000)"},
    )
    norm_total_updates: Optional[int] = field(
        default=II("optimization.max_update"),
        metadata={"help": "updates in which prepbn changes from LayerNorm to BN (default: --max-update, if limited)"},
    )
    norm_groups: Optional[int] = field(
        default=None,
        metadata={
            "help": "channel groups of the layer scale before BN, PN-V and PN (0 for none), and of group and group-scale "
            "(default: the norm's own for the number of attention heads)"
        },
    )
    norm_variant: Optional[VariantName] = field(
        default=None,
        metadata={
            "help": "arithmetic of PN: the authors' released code (reference, the default) or Algorithm 2 of the paper"
        },
    )
    norm_eps: Optional[float] = field(default=None, metadata={"help": "eps of every norm (default: the norm's own)"})

    @classmethod
    def check_keys(cls, options: Mapping[str, Any]) -> None:
        """Called before options from YAML are merged with the defaults; see :func:`reject_unknown`."""
        reject_unknown(options, cls)
        reject_both_orders({name for name in ORDERS if str(options.get(name)).lower() in TRUE})

    @classmethod
    def from_namespace(cls, args):
        """As in fairseq, which would drop a misspelt option without a word."""
        reject_unknown(vars(args), cls)
        return super().from_namespace(args)


@dataclass
class NormOptions(NormConstants):
    """Which norm stands where in an encoder-decoder model."""

    encoder_norm_self: str = field(default="power", metadata={"help": f"norm of encoder self-attention: {NORM_SYNTAX}"})
    encoder_norm_ff: str = field(default="power", metadata={"help": "norm of encoder feed-forward blocks"})
    encoder_norm_final: Optional[str] = field(
        default=None, metadata={"help": "norm after a pre-norm encoder stack (default: --encoder-norm-ff)"}
    )
    decoder_norm_self: str = field(
        default="layer", metadata={"help": "norm of decoder self-attention and encoder-decoder attention"}
    )
    decoder_norm_ff: str = field(default="layer", metadata={"help": "norm of decoder feed-forward blocks"})
    decoder_norm_final: Optional[str] = field(
        default=None, metadata={"help": "norm after a pre-norm decoder stack (default: --decoder-norm-ff)"}
    )


@dataclass
class LMNormOptions(NormConstants):
    """Which norm stands where in a language model, which has a decoder only: the ``encoder_norm_*`` are refused."""

    decoder_norm_self: str = field(default="power", metadata={"help": f"norm of self-attention: {NORM_SYNTAX}"})
    decoder_norm_ff: str = field(default="power", metadata={"help": "norm of feed-forward blocks"})
    decoder_norm_final: Optional[str] = field(
        default=None, metadata={"help": "norm after a pre-norm stack (default: --decoder-norm-ff)"}
    )


@dataclass
class StatisticsOptions(FairseqDataclass):
    """How a training run drives the running statistics: options of the tasks."""

    norm_sync: SyncName = field(
        default="step",
        metadata={
            "help": "running statistics of several ranks: separate (off), combined by one all-reduce per update (step), or "
            "also by blocking reductions wherever a norm divides by statistics of the batch (exact: over ranks, but not "
            "over the micro-batches of --update-freq)"
        },
    )
    norm_record: Optional[str] = field(
        default=None,
        metadata={"help": "file for the distances of batch and running statistics in training, and their gradient terms"},
    )
    norm_record_interval: int = field(default=100, metadata={"help": "updates between two entries of --norm-record"})

    @classmethod
    def check_keys(cls, options: MutableMapping[str, Any]) -> None:
        """Called before options from YAML are merged with the defaults; see :func:`reject_unknown`."""
        reject_unknown(options, NormOptions)
        if options.get("norm_sync") is False:  # as YAML reads the word off without quotes
            options["norm_sync"] = "off"


@dataclass
class InferenceOptions(FairseqDataclass):
    """How a trained model is used: options of the tasks, given to each command anew."""

    no_fold_norms: bool = field(
        default=False,
        metadata={"help": "do not fold the norms of a model in generate, interactive, validate and eval-lm"},
    )


def _names(options) -> Tuple[str, ...]:
    return tuple(f.name for f in fields(options) if not f.name.startswith("_"))


#: options of the models, and of the tasks
NORM_FIELDS = _names(NormOptions)
STATISTICS_FIELDS = _names(StatisticsOptions)
INFERENCE_FIELDS = _names(InferenceOptions)


def flag(name: str) -> str:
    """Command-line spelling of an option."""
    return "--" + name.replace("_", "-")


def reject_unknown(options: Mapping[str, Any], model: Type[NormConstants]) -> None:
    """Raise ValueError for an option whose name looks like a norm option's and that is none of ``model`` or the tasks.

    The same for options of the tensorized attention.

    Args:
        options: names and values
        model: the options class of the model, or one of its bases
    """
    valid = tuple(f.name for f in fields(model) if _CHECKED_OPTION.match(f.name)) + STATISTICS_FIELDS
    for name in options:
        if _CHECKED_OPTION.match(name) and name not in valid:
            if name in NORM_FIELDS:
                problem = "this model has no encoder and no norm option"
            else:
                problem = "unknown norm option" if _NORM_OPTION.match(name) else "unknown option"
            value = options[name]
            raise ValueError(f"{problem} {name!r} = {value!r} ({flag(name)}): must be one of {', '.join(valid)}")


def reject_both_orders(given: Collection[str]) -> None:
    """Raise ValueError for options that ask for both orders, of which ``post_norm`` would win without a word.

    Args:
        given: names of the options that a user has set to true
    """
    for name in ORDERS[1:]:
        if "post_norm" in given and name in given:
            raise ValueError(f"{flag('post_norm')} and {flag(name)} exclude each other; give one of them")


def given_flags(argv: Optional[Sequence[str]] = None) -> Dict[str, str]:
    """Option -> value of the flags of a command line (default: this process's)."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    given = {}
    for word, following in zip(arguments, [*arguments[1:], ""]):
        if word == "-a":
            given["arch"] = following
        elif word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            given[name.replace("-", "_")] = value if equals else following
    return given


def norm_sides(model: Type[NormConstants]) -> Tuple[str, ...]:
    """Which of ``encoder`` and ``decoder`` a model with these options has."""
    return tuple(side for side in ("encoder", "decoder") if f"{side}_norm_self" in model.__dataclass_fields__)


def _choice(name: str, value: Any, choices: Iterable[str]) -> str:
    if str(value) not in choices:
        raise ValueError(f"{flag(name)} {str(value)!r}: must be one of {', '.join(choices)}")
    return str(value)


class ChosenNorms(Namespace):
    """The norm options of a model, complete and checked: which norm stands where, and its constants."""

    def settings(self, side: str, position: str, dim: int, heads: int) -> Tuple[str, Dict[str, Any]]:
        """Name and keyword arguments, for :func:`~fairseq_powernorm.norms.build_norm`, of one norm of the model.

        What the norm's own text says (``power:groups=2``) goes before the options for all norms; what neither says is left
        to the norm.

        Args:
            side: ``encoder`` or ``decoder``
            position: ``self``, ``ff`` or ``final``
            dim: channels
            heads: attention heads, which the norm's default number of groups may depend on

        Raises:
            ValueError: the number of groups does not divide ``dim``, or another value is outside its range; names the option
        """
        option = f"{side}_norm_{position}"
        final = position == "final"
        inherited = final and getattr(self, option) is None
        if inherited:
            option = f"{side}_norm_ff"
        text = getattr(self, option)
        name, own = parse_norm(text)
        warmup_updates = self.norm_warmup_updates
        if final and self.norm_final_warmup_updates is not None:
            warmup_updates = self.norm_final_warmup_updates
            if inherited:  # what is said of final norms goes before what is said of the others
                own.pop("warmup_updates", None)
        groups = own.get("groups", self.norm_groups)
        if groups is None:
            groups = default_groups(**{"name": name, "heads": heads, **own})
        shared = dict(
            eps=self.norm_eps,
            alpha_fwd=self.norm_alpha_fwd,
            alpha_bkw=self.norm_alpha_bkw,
            warmup_updates=warmup_updates,
            total_updates=self.norm_total_updates if "total_updates" in options_of(name) else None,
            groups=groups,
            variant=self.norm_variant if issubclass(NORMS[name], PowerNorm) else None,
        )
        settings = {**{key: value for key, value in shared.items() if value is not None}, **own}
        try:
            build_norm(name, dim, device="meta", **settings)
        except ValueError as error:
            reason = _reason(error, name)
            culprit = reason.partition("=")[0]
            where = f"{flag(option)} {text!r}"
            if culprit in shared and culprit not in own:
                where = f"{flag(f'norm_{culprit}')} {shared[culprit]}: {where}"
            raise ValueError(f"{where}: {reason}") from None
        return name, settings


def _reason(error: ValueError, text: str) -> str:
    """What an error of :mod:`~fairseq_powernorm.norms.registry` says of the norm with this text."""
    return str(error).rpartition(f"norm {text!r}: ")[2]


def norm_options(args: Any, model: Type[NormConstants] = NormOptions) -> ChosenNorms:
    """Read the norm options from a Namespace or DictConfig, fill in which norms stand where and check every value.

    Args:
        args: options of a model, others among them
        model: the options class of the model, or one of its bases

    Raises:
        ValueError: names the option, its value and what is valid
    """
    defaults = model()
    found = {name: getattr(args, name, None) for name in NORM_FIELDS if name in model.__dataclass_fields__}
    options = ChosenNorms(**{k: getattr(defaults, k) if v is None else v for k, v in found.items()})
    options.norm_total_updates = _total_updates(options.norm_total_updates, args)
    for name in ("norm_alpha_fwd", "norm_alpha_bkw"):
        value = getattr(options, name)
        if value is not None and not 0.0 <= value <= 1.0:
            raise ValueError(f"{flag(name)} {value}: must lie in [0, 1]")
    for name in ("norm_warmup_updates", "norm_final_warmup_updates", "norm_groups", "norm_eps"):
        value = getattr(options, name)
        if value is not None and not value >= 0:
            raise ValueError(f"{flag(name)} {value}: must be zero or positive")
    if options.norm_variant is not None:
        options.norm_variant = _choice("norm_variant", options.norm_variant, VARIANTS)
    for side in norm_sides(model):
        for position in ("self", "ff", "final"):
            name = f"{side}_norm_{position}"
            if getattr(options, name) is not None:  # a final norm may be that of the feed-forward blocks
                setattr(options, name, _checked_norm(name, getattr(options, name), options.norm_total_updates))
    return options


def _total_updates(given: Any, args: Any) -> Optional[int]:
    """Length of the run as far as it is known: ``--norm-total-updates``, else ``--max-update``; 0 is no limit."""
    for value in (given, getattr(args, "max_update", None)):
        if value is not None and not isinstance(value, str):  # a text refers to an option that can't be seen from here
            return int(value) or None
    return None


def _checked_norm(option: str, text: Any, total_updates: Optional[int]) -> str:
    """The text of a norm, if the norm can be built from it."""
    try:
        name, own = parse_norm(str(text))
        left_open = {"total_updates"} & set(options_of(name)) - set(own)
        known = dict.fromkeys(left_open, total_updates)
        build_norm(str(text), dim=8 * max(1, own.get("groups", 1)), device="meta", **known)
    except ValueError as error:
        raise ValueError(f"{flag(option)} {str(text)!r}: {_reason(error, str(text))}") from None
    return str(text)


def check_statistics_options(cfg: Any) -> None:
    """Check those of :class:`StatisticsOptions` that do not depend on where a task is set up.

    Raises:
        ValueError: names the option, its value and what is valid
    """
    _choice("norm_sync", cfg.norm_sync, SYNC)


def check_norms(args: Any, model: Type[NormConstants] = NormOptions) -> None:
    """Check all norm options of a complete set of model options, sizes included, before anything is built.

    Raises:
        ValueError: names the option, its value and what is valid
    """
    options = norm_options(args, model)
    for side in norm_sides(model):
        for position in ("self", "ff", "final"):
            dim, heads = getattr(args, f"{side}_embed_dim"), getattr(args, f"{side}_attention_heads")
            options.settings(side, position, dim, heads)


from . import register  # noqa: E402,F401  (whichever module for fairseq is imported first, all are registered)
