"""Overrides: which one stands for a flag of fairseq's, and which is meant by one that is misspelt."""
import argparse
import shlex

import pytest
import toy  # noqa: F401
from fairseq.dataclass.utils import gen_parser_from_dataclass
from omegaconf import OmegaConf

from fairseq_powernorm.experiments import overrides
from fairseq_powernorm.experiments.errors import UserError
from fairseq_powernorm.experiments.runs import compose
from fairseq_powernorm.experiments.settings import load
from fairseq_powernorm.experiments.train import parser

PATHS = ["common.user_dir=fairseq_powernorm", "task.data=data", "checkpoint.save_dir=save"]


def advised(*words, benchmark="demo"):
    """What train.sh says of words that are not its own."""
    with pytest.raises(UserError) as caught:
        parser().parse([benchmark, "power", *words])
    return str(caught.value)


@pytest.mark.parametrize(
    "words, override",
    [
        ("--lr 0.1", "optimization.lr=[0.1]"),
        ("--lr=0.1,0.2", "optimization.lr=[0.1,0.2]"),
        ("--update-freq 4", "optimization.update_freq=[4]"),
        ("--max-update 100", "optimization.max_update=100"),
        ("--max_update 100", "optimization.max_update=100"),
        ("--clip-norm 1.5", "optimization.clip_norm=1.5"),
        ("--seed 2", "common.seed=2"),
        ("--fp16", "common.fp16=true"),
        ("--memory-efficient-fp16", "common.memory_efficient_fp16=true"),
        ("--cpu", "common.cpu=true"),
        ("--log-interval 7", "common.log_interval=7"),
        ("--wandb-project mine", "common.wandb_project is this command's own; use --wandb"),
        ("--tensorboard-logdir logs", "common.tensorboard_logdir is this command's own; use --tensorboard"),
        ("--save-dir x", "checkpoint.save_dir is this command's own; use --run-dir DIR"),
        ("--patience 3", "checkpoint.patience=3"),
        ("--no-epoch-checkpoints", "checkpoint.no_epoch_checkpoints=true"),
        ("--max-sentences 32", "dataset.batch_size=32"),
        ("--max-tokens 4096", "dataset.max_tokens=4096"),
        ("--valid-subset valid,test", "\"dataset.valid_subset='valid,test'\""),
        ("--ddp-backend legacy_ddp", "distributed_training.ddp_backend=legacy_ddp"),
        ("--beam 4", "generation.beam=4"),
        ("--store-ema", "ema.store_ema=true"),
        ("-s de", "task.source_lang=de"),
        ("--eval-bleu", "+task.eval_bleu=true"),
        ("--dropout 0.3", "model.dropout=0.3"),
        ("--share-all-embeddings", "model.share_all_embeddings=true"),
        ("--encoder-layers 2", "+model.encoder_layers=2"),
        ("--norm-groups 4", "+model.norm_groups=4"),
        ("--optimizer nag", "optimizer._name=nag ~optimizer.adam_betas"),
        ("--optimizer sgd", "optimizer._name=sgd"),
        ("--adam-eps 1e-6", "+optimizer.adam_eps=1e-6"),
        ("--momentum 0.9", "optimizer adam has no such setting, but nag does: "
                           "optimizer._name=nag ~optimizer.adam_betas +optimizer.momentum=0.9"),
        ("--lr-scheduler fixed", "lr_scheduler._name=fixed ~lr_scheduler.warmup_init_lr"),
        ("--bpe subword_nmt", "+bpe._name=subword_nmt"),
        ("--warmup-updates 30", "lr_scheduler.warmup_updates=30"),
        ("--label-smoothing 0.2", "criterion.label_smoothing=0.2"),
        ("--max-updates 100", "did you mean --max-update? fairseq's settings are overrides: optimization.max_update=100"),
        ("--warmup-update 30", "did you mean --warmup-updates? "),
        ("--tokens-per-sample 32", "not of transformer_pn_tiny"),
        ("--lr", "optimization.lr=[VALUE]"),
    ],
)
def test_fairseqs_flags(words, override):
    """A flag of fairseq's own command line is answered with the override that does the same."""
    assert advised(*words.split()).endswith(override) or override in advised(*words.split()).split("\n")[0]
    assert advised(*words.split()).startswith(f"unknown option {words.split()[0].split('=')[0]}; ")


def test_a_language_models_flags():
    """The settings are those of the benchmark that is named, and of its architecture."""
    assert advised("--decoder-layers", "3", benchmark="ptb").endswith(": +model.decoder_layers=3")
    assert advised("--tokens-per-sample", "3", benchmark="ptb").endswith(": task.tokens_per_sample=3")
    assert "is a setting of model transformer_pn" in advised("--encoder-layers", "3", benchmark="ptb")


def test_a_flag_that_nobody_has():
    """It is answered with the options that there are."""
    assert advised("--quickly").startswith("unknown option --quickly; valid: --help, --run-dir, --resume, --arch, ")


def sample(setting):
    """A value for a flag other than its default."""
    if setting.is_list:
        return "2"
    return {int: "3", float: "0.25"}.get(type(setting.default))


def test_each_flag_and_its_override_do_the_same():
    """For every flag of fairseq's general settings that takes a number or none: the configuration that the advised
    override composes has the value that fairseq's own parser gives the flag."""
    settings = overrides.Settings(load("demo"))
    chosen, wanted, unlike = [], {}, {"distributed_training.distributed_world_size", "common.user_dir"}
    from fairseq.dataclass.configs import FairseqConfig

    for group in ("common", "dataset", "optimization", "checkpoint", "generation", "distributed_training", "ema"):
        command_line = argparse.ArgumentParser()
        gen_parser_from_dataclass(command_line, FairseqConfig.__dataclass_fields__[group].type())
        for key, setting in settings.known.items():
            value = None if setting.is_flag else sample(setting)
            if not key.startswith(f"{group}.") or key in unlike or setting.link or not (setting.is_flag or value):
                continue
            told = overrides.of_flag(setting.flags[0], value, load("demo"), [], {})
            chosen += shlex.split(told.rpartition(": ")[2])
            parsed = command_line.parse_args([setting.flags[0], *([] if value is None else [value])])
            wanted[key] = getattr(parsed, key.partition(".")[2])
    assert len(wanted) > 100
    config = compose.compose("demo", [*PATHS, *chosen])
    for key, value in wanted.items():
        found = OmegaConf.select(config, key)
        assert (list(found) if isinstance(value, list) else found) == value, key


@pytest.mark.parametrize(
    "override, message",
    [
        ("optimization.max_updtae=3", "there is no setting optimization.max_updtae; did you mean optimization.max_update?"),
        ("+optimization.max_updtae=3", "did you mean optimization.max_update?"),
        ("optimisation.lr=[3]", "did you mean optimization.lr?"),
        ("common.lr=[3]", "did you mean optimization.lr?"),
        ("seed=2", "did you mean common.seed?"),
        ("+model.encoder_layrs=1", r"did you mean \+model.encoder_layers?"),
        ("model.encoder_layers=1", r"configs/demo.yaml has no model.encoder_layers; to add it: \+model.encoder_layers=1"),
        ("+common.seed=1", "common.seed is there without being added; to change it: common.seed=1"),
        ("optimization.lr=0.1", r"optimization.lr is a list: optimization.lr=\[0.1\]"),
        ("+nothing.like=it", "settings begin with one of bmuf, bpe, checkpoint, common"),
        ("optimization.max_update=many", "'many'.*could not be converted to Integer"),
        ("optimization.lr=[0.1", "no viable alternative"),
    ],
)
def test_wrong_overrides(override, message):
    """An override that cannot be is refused in one line, with the one that is most like it."""
    with pytest.raises(UserError, match=message) as caught:
        compose.compose("demo", [*PATHS, override])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("words", ["--momentum 0.9", "--lr-scheduler fixed", "--optimizer sgd", "--criterion cross_entropy"])
def test_another_implementation(words):
    """The overrides that are advised for a flag of another implementation give one that fairseq takes."""
    from fairseq.dataclass.initialize import add_defaults

    config = compose.compose("demo", [*PATHS, *shlex.split(advised(*words.split()).rpartition(": ")[2])])
    add_defaults(config)


def test_right_overrides():
    """Settings, implementations, what is hydra's own, and settings of an implementation that does not list them pass."""
    right = ["optimization.lr=[0.1]", "optimizer._name=sgd", "+optimizer.momentum=0.5", "~optimizer.adam_betas",
             "+model.encoder_layers=1", "hydra.run.dir=x", "++common.seed=3"]
    config = compose.compose("demo", [*PATHS, *right])
    assert (config.common.seed, config.optimizer.momentum, config.model.encoder_layers) == (3, 0.5, 1)
    compose.compose("demo", [*PATHS, "optimizer._name=nag", "~optimizer.adam_betas"])
