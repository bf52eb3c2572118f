"""The rows of the paper's tables and figures: which runs they need, what these are called, which commands make them."""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple

from .. import trust
from ..errors import UserError
from ..overrides import by_key
from ..paths import ROOT, runs_root
from ..recipes import apply, is_lm
from ..runs import batch
from ..settings import (
    BATCH_REFERENCE,
    NORMS as NAMES,
    architectures,
    load,
    norm_in_names,
    norm_name,
    placements,
    recipe,
)

#: what is reproduced -> (the paper's benchmarks, which are the default; others of the same kind; default seeds)
SUBJECTS = {
    "table1": (("iwslt14", "wmt14"), ("multi30k", "demo"), (1, 2, 3)),
    "table2": (("ptb", "wikitext103"), (), (1, 2, 3)),
    "figures": (("iwslt14",), ("wmt14", "multi30k", "demo", "ptb", "wikitext103"), (1,)),
}
#: norm -> what varies: (layer scale off as well?, both variants?), of those that the paper compares
PAPER_NORMS = {"layer": (False, False), BATCH_REFERENCE: (False, False), "batch": (True, False), "power-v": (True, False),
               "power": (True, True)}
#: the same of all, each as it was published
NORMS = {**PAPER_NORMS, **{name: (False, False) for name in NAMES if name not in PAPER_NORMS}}
BASELINE = "layer"
VARIANTS = ("reference", "algorithm2")

#: of --updates; more than any training in the field has
MOST_UPDATES = 10**9

#: The paper's values, tokenized BLEU and perplexity, for the norms where it has them, with layer scale; its BN is that of
#: the authors' code. The published perplexities come from code whose attention sees the words that it has to predict
#: (fairseq_powernorm/README.md, Causality).
PAPER = {
    ("iwslt14", "transformer_pn_iwslt_de_en"): {"layer": 35.5, BATCH_REFERENCE: 34.4, "power-v": 35.5, "power": 35.9},
    ("wmt14", "transformer_pn_wmt_en_de_big"): {"layer": 29.5, BATCH_REFERENCE: 28.2, "power": 30.1},
    ("ptb", "tensorized_lm_pn_ptb"): {"layer": 53.2, BATCH_REFERENCE: 60.7, "power-v": 55.3, "power": 47.6},
    ("wikitext103", "tensorized_lm_pn_wiki103"): {"layer": 20.9, BATCH_REFERENCE: 27.2, "power-v": 21.3, "power": 17.9},
}

#: What others have published, tokenized BLEU: row -> (value, where), ...
ELSEWHERE = {
    ("iwslt14", "transformer_pn_iwslt_de_en"): {
        "layer": (("35.3", "Unified Normalization"), ("35.50 ± 0.04", "Transformer-Clinic, Pre-LN")),
        "batch": (("31.1", "Unified Normalization"),),
        "power-groups0": (("about 35.0", "authors of PN"),),
        "un": (("35.4", "Unified Normalization"),),
        "rbn": (("35.6", "RegularizedBN"),),
    },
}
#: where that is: name -> publication
SOURCES = {
    "Unified Normalization": "readme of github.com/hikvision-research/Unified-Normalization (Yang et al., MM 2022)",
    "Transformer-Clinic, Pre-LN": "github.com/LiyuanLucasLiu/Transformer-Clinic (Liu et al., EMNLP 2020)",
    "authors of PN": "the authors of PN, of their code without layer scale",
    "RegularizedBN": "Wang et al., NeurIPS 2022",
}
#: The same of language models of another kind: no row has them.
ELSEWHERE_LM = "Validation loss of GPT-2, published by Chen et al. (2025): LN 2.94, DyT 2.97, Derf 2.94."

#: Assumptions of the estimates. Trainable scalars with the benchmark's own dictionary, and the time of an update on one
#: GPU: UPDATE_S for everything that does not grow with the batch, and 6 operations per parameter and token at
#: OPERATIONS_PER_S, about what fairseq reaches with fp16 on an A100. Translation of the test set is not counted.
PARAMETERS = {
    "transformer_pn_tiny": 2.6e6, "transformer_pn_iwslt_de_en": 37e6, "transformer_pn_wmt_en_de": 60e6,
    "transformer_pn_wmt_en_de_big": 210e6,
    "tensorized_lm_pn_ptb": 6.7e6, "transformer_lm_pn_ptb": 5.7e6,
    "tensorized_lm_pn_wiki103": 85e6, "transformer_lm_pn_wiki103": 247e6,
}
#: Where only early stopping ends training, so many updates are assumed; --updates shortens it in proportion to them.
TYPICAL_UPDATES = {"iwslt14": 100_000, "wmt14": 30_000}
#: Stands for the number of updates in names where only early stopping ends training.
EARLY_STOP = "early-stop"
UPDATE_S = 0.05
#: tokens of a sentence, where a batch is so many sentences
SENTENCE = 30
OPERATIONS_PER_S = 20e12

#: The rows that the figures compare, by default and in the report of a table.
FIGURE_ROWS = ("layer", norm_in_names(BATCH_REFERENCE), "batch", "power-v", "power")

#: The warm-up of PN (reference) in the norms after the stacks.
FINAL_WARMUP = "model.norm_final_warmup_updates"
#: settings in updates, which --updates scales with the length of training
SCALED = ("lr_scheduler.warmup_updates", "lr_scheduler.lr_period_updates", "dataset.validate_interval_updates",
          "checkpoint.save_interval_updates", FINAL_WARMUP)
#: override -> the option to use instead
OURS = {"optimization.max_update": "--updates", "common.seed": "--seeds", "model.norm_groups": "--rows",
        "model.norm_variant": "--rows", "model.encoder_norm_self": "--rows", "model.encoder_norm_ff": "--rows",
        "model.decoder_norm_self": "--rows", "model.decoder_norm_ff": "--rows", "model._name": "--archs",
        "task.norm_record": None, "task.norm_record_interval": None}
#: Statistics along training for figures 1, 2, 5 and 6, in the run directory (where fairseq-hydra-train is at work).
NORM_RECORD = "norm-record.jsonl"


@dataclass(frozen=True)
class Row:
    """A line of the table: which norm, where ("" for LN, which is everywhere), with layer scale or not, and how."""

    norm: str
    placement: str
    layer_scale: Optional[bool] = None  # None: the norm was published without one
    variant: Optional[str] = None  # None: the norm has none

    def name(self, default_placement: str) -> str:
        """NORM[-PLACEMENT][-VARIANT][-groups0]; defaults are not named."""
        parts = [norm_in_names(self.norm)]
        parts += [self.placement] if self.placement not in ("", default_placement) else []
        parts += [self.variant] if self.variant not in (None, VARIANTS[0]) else []
        parts += ["groups0"] if self.layer_scale is False else []
        return "-".join(parts)

    def published(self, default_placement: str) -> bool:
        """Is this the paper's form of the norm: the authors' placement, with layer scale, by their released code?"""
        return (self.placement in ("", default_placement) and self.layer_scale is not False
                and self.variant in (None, VARIANTS[0]))


def rows(model: Any) -> List[Row]:
    """The rows for a model (its configuration), LN first."""
    found = []
    for norm, (without_layer_scale, variants) in NORMS.items():
        if norm == BASELINE:
            found.append(Row(norm, ""))
            continue
        for variant in VARIANTS if variants else (None,):
            for placement in placements(model):
                with_layer_scale = True if norm in PAPER_NORMS else None
                for layer_scale in (with_layer_scale, False) if without_layer_scale else (with_layer_scale,):
                    found.append(Row(norm, placement, layer_scale, variant))
    return found


@dataclass(frozen=True)
class Run:
    """One training of the matrix."""

    benchmark: str  # its name, or that of the user's text or file: of directories and records
    subject: str  # what the commands are given as BENCH
    arch: str
    row: Row
    row_name: str
    seed: int
    updates: Optional[int]  # None: until early stopping ends it
    tokens: int  # of an update
    average: Optional[int]  # checkpoints to average, where a shortened run has other ones than its YAML file says
    overrides: Tuple[str, ...]

    @property
    def name(self) -> str:
        """ROW[-ARCH]-UPDATES-seedS, ARCH where the benchmark has several: of the run directory and of the record."""
        arch = [self.arch] if len(architectures(self.subject)) > 1 else []
        return "-".join([self.row_name, *arch, str(self.updates or EARLY_STOP), f"seed{self.seed}"])

    @property
    def directory(self) -> Path:
        return runs_root() / self.benchmark / self.name

    @property
    def key(self) -> str:
        """BENCH/NAME, by which reports tell runs apart."""
        return f"{self.benchmark}/{self.name}"

    def record(self, results: Path) -> Path:
        """Its record in a directory of records."""
        return results / self.benchmark / f"{self.name}.json"

    def train_command(self, overrides: Optional[Sequence[str]] = None) -> List[str]:
        """The command that trains it, with its overrides or others."""
        placement = ["--placement", self.row.placement] if self.row.placement else []
        arch = ["--arch", self.arch] if self.arch != architectures(self.subject)[0] else []
        return ["bash", "scripts/train.sh", self.subject, self.row.norm, *arch, *placement, "--run-dir",
                relative(self.directory), "--resume", *(self.overrides if overrides is None else overrides)]

    def evaluate_command(self, results: Path) -> List[str]:
        """The command that evaluates it and copies its record to a directory of records."""
        average = [] if self.average is None else ["--average", str(self.average), "--available"]
        record = relative(self.record(results))
        return ["bash", "scripts/evaluate.sh", relative(self.directory), *average, "--record", record]

    @property
    def gpu_hours(self) -> Optional[float]:
        """The estimate for its training; see PARAMETERS. None for an architecture that is not there."""
        if self.arch not in PARAMETERS:
            return None
        seconds = UPDATE_S + 6 * PARAMETERS[self.arch] * self.tokens / OPERATIONS_PER_S
        return (self.updates or TYPICAL_UPDATES[recipe(self.subject).base]) * seconds / 3600

    @property
    def is_pictured(self) -> bool:
        """Is it in the figures of a table: a norm in its usual form and place?"""
        return self.row_name == norm_in_names(self.row.norm)

    @property
    def final_warmup_matters(self) -> bool:
        """Does the warm-up of the norms after the stacks matter? To norms that have one, in pre-norm models."""
        warms_up = takes(self.row.norm, "warmup_updates") and self.row.variant != VARIANTS[1]
        return warms_up and not self.arch.startswith("tensorized")


def relative(path: Path) -> str:
    """A path as the commands are given it, which run in the repository."""
    return str(path.relative_to(ROOT)) if ROOT in path.parents else str(path)


def whole(subject: str, config: Any) -> int:
    """The updates of a whole training: optimization.max_update or, where only early stopping ends it, what is typical."""
    from omegaconf import OmegaConf

    found = OmegaConf.select(config, "optimization.max_update") or TYPICAL_UPDATES.get(recipe(subject).base)
    if not found:
        raise UserError(f"{recipe(subject).where} has no optimization.max_update, by which runs are named and which "
                        f"--updates replaces")
    return int(found)


def length(subject: str, config: Any, updates: Optional[int]) -> Tuple[Optional[int], List[str]]:
    """(updates of a run, the overrides that make it so): every setting in updates is scaled in proportion.

    None as the number of updates: until early stopping ends training
    """
    from omegaconf import OmegaConf

    full, limit = whole(subject, config), OmegaConf.select(config, "optimization.max_update") or None
    if updates in (None, limit):
        return limit, []
    overrides = [f"optimization.max_update={updates}"]
    for key in SCALED:
        value = OmegaConf.select(config, key)
        if value is not None and value > 0:
            overrides.append(f"{key}={max(1, int(value * updates // full))}")
    return updates, overrides


def average(subject: str, config: Any, updates: Optional[int]) -> Optional[int]:
    """The number of checkpoints to average of a run of so many updates; None: what its YAML file, or an LM, has.

    Epochs do not get shorter, so fewer of them are averaged, in proportion. Checkpoints that are saved after a number of
    updates follow one another faster: see SCALED. A run that keeps none of both has its last one.
    """
    if is_lm(config):
        return None
    saving = config.checkpoint
    epochs = 0 if saving.get("no_epoch_checkpoints") else int(saving.get("keep_last_epochs", 0))
    kept = int(saving.get("keep_interval_updates", 0))
    if max(epochs, kept) < 1:
        return 1
    if updates is None:
        return None
    return max(1, min(epochs, epochs * updates // whole(subject, config))) if epochs > 0 else kept


def runs(
    subject: str, arch: str, seeds: Sequence[int], updates: Optional[int], overrides: Sequence[str]
) -> Iterator[Run]:
    """Every run of a benchmark's architecture: all rows with the first seed, then all with the second, and so on."""
    config, name = load(subject, arch), recipe(subject).name
    number, scaled = length(subject, config, updates)
    interval = max(1, (number or whole(subject, config)) // 100)
    tokens = tokens_of(config, by_key(overrides))  # what is a row's own changes no batch
    for seed in seeds:
        for row in rows(config.model):
            own = [f"common.seed={seed}", *scaled]
            own += ["+model.norm_groups=0"] if row.layer_scale is False else []
            own += [f"+model.norm_variant={row.variant}"] if row.variant not in (None, VARIANTS[0]) else []
            if number is None and takes(row.norm, "total_updates"):  # where the configuration knows no end
                own += [f"+model.norm_total_updates={whole(subject, config)}"]
            if has_statistics(row.norm):
                own += [f"+task.norm_record={NORM_RECORD}", f"+task.norm_record_interval={interval}"]
            merged = {**by_key(own), **by_key(overrides)}
            yield Run(name, subject, arch, row, row.name(placements(config.model)[0]), seed, number,
                      tokens, average(subject, config, updates), tuple(merged.values()))


def has_statistics(norm: str) -> bool:
    """Does a norm have running statistics, which can be recorded?"""
    from ...norms import NORMS as CLASSES, RunningNorm

    return issubclass(CLASSES[norm_name(norm)], RunningNorm)


def takes(norm: str, option: str) -> bool:
    """Is this an option of a norm?"""
    from ...norms import norm_options

    return option in norm_options(norm_name(norm))


def tokens_of(config: Any, overrides: Dict[str, str]) -> int:
    """Tokens of a full batch, all gathered for an update, with overrides (by key); refuses overrides that do not say so."""
    from omegaconf.errors import OmegaConfBaseException

    config = apply(config, overrides.values())
    try:
        size = config.dataset.get("max_tokens")
        if size is None:
            size = int(config.dataset.batch_size) * int(config.task.get("tokens_per_sample") or SENTENCE)
        return int(size) * batch.update_freq(config)[0]
    except (TypeError, ValueError, OmegaConfBaseException) as error:
        raise UserError(f"dataset.max_tokens, or dataset.batch_size, does not say how large a batch is: "
                        f"{' '.join(str(error).split())}") from None


def identity(overrides: Sequence[str], run: Run) -> Dict[str, str]:
    """Overrides by key, without those that do not change the training of a run."""
    return {key: value for key, value in by_key(trust.of_training(overrides)).items()
            if not key.startswith("task.norm_record") and (key != FINAL_WARMUP or run.final_warmup_matters)}


def plan_line(run: Run, results: Path, watch: Sequence[str] = ()) -> str:
    """The commands of a run, to be pasted into a shell, with its estimated cost."""
    cost = "no estimate" if run.gpu_hours is None else f"about {hours(run.gpu_hours)} GPU hours"
    return (f"{shlex.join([*run.train_command(), *watch])}    # {cost}\n"
            f"{shlex.join(run.evaluate_command(results))}")


def hours(number: float) -> str:
    """An estimate as text, two digits where it is small."""
    return f"{number:,.0f}" if number >= 100 else f"{number:.2g}"
