"""Tasks and architectures that do not belong together."""
import sys
from argparse import Namespace
from types import SimpleNamespace

import pytest
import toy
from fairseq import models, tasks
from fairseq.distributed import LegacyDistributedDataParallel, ModuleProxyWrapper
from fairseq.tasks import FairseqTask, LegacyFairseqTask
from fairseq.tasks.translation import TranslationConfig
from fairseq_cli import train

from fairseq_powernorm.statistics import running_norms
from fairseq_powernorm.tasks import RunningStatisticsTask

FOR_TRANSLATION = r"--arch must be one of transformer_pn, .*with this architecture --task must be language_modeling_pn"
FOR_LM = r"--arch must be one of transformer_lm_pn, .*with this architecture --task must be translation_pn"


def run(monkeypatch, folder, data, *words):
    """fairseq-train in this process."""
    options = (
        "--optimizer", "sgd", "--lr", 0.1, "--max-tokens", 400, "--max-update", 1, "--cpu", "--num-workers", 0,
        "--data-buffer-size", 0, "--disable-validation", "--save-dir", folder, "--user-dir", toy.ROOT / "fairseq_powernorm",
    )  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["fairseq-train", *map(str, (data, *words, *options))])
    train.cli_main()


SMALL = ("--encoder-layers", 1, "--decoder-layers", 1, "--encoder-embed-dim", 16, "--decoder-embed-dim", 16)


@pytest.mark.parametrize(
    "words,message",
    [
        # language models for translation, by ours or fairseq's task; the default task is translation
        (("--task", "translation_pn", "--arch", "transformer_lm_pn"), FOR_TRANSLATION),
        (("--task", "translation_pn", "--arch", "tensorized_lm_pn_ptb"), FOR_TRANSLATION),
        (("--task", "translation", "--arch", "transformer_lm_pn_ptb"), FOR_TRANSLATION),
        (("--arch", "transformer_lm_pn_ptb"), FOR_TRANSLATION),
        (("--task", "translation_pn", "--arch", "transformer_lm"), FOR_TRANSLATION),
        # models for translation as language models
        (("--task", "language_modeling_pn", "--arch", "transformer_pn_tiny"), FOR_LM),
        (("--task", "language_modeling", "-a", "transformer_pn"), FOR_LM),
        (("--task", "language_modeling_pn", "--arch", "transformer"), FOR_LM),
        # neither
        (
            ("--task", "translation_pn", "--arch", "roberta"),
            "--arch roberta with --task translation_pn.*--arch must be one of",
        ),
        (("--task", "language_modeling_pn", "--arch", "wav2vec2"), "--arch wav2vec2 with --task language_modeling_pn"),
        # tasks that do not take steps of the statistics
        (
            ("--task", "translation", "--arch", "transformer_pn_tiny"),
            "--task translation: norm encoder.* must be translation_pn",
        ),
        (("--task", "masked_lm", "--arch", "transformer_lm_pn"), "--task masked_lm: --arch transformer_lm_pn needs"),
        (("--task", "denoising", "--arch", "transformer_pn"), "--task denoising: --arch transformer_pn needs"),
        (
            ("--task", "translation", "--arch", "transformer_pn_tiny", "--norm-sync", "off"),
            "--task translation: --norm-sync off needs",
        ),
        # a norm where there is none
        (
            ("--task", "translation_pn", "--arch", "transformer_pn", "--encoder-norm-final", "batch", *SMALL),
            "--encoder-norm-final 'batch': no norm stands after this encoder's layers",
        ),
        (
            (
                "--task", "translation_pn", "--arch", "transformer_pn_tiny", "--no-decoder-final-norm",
                "--decoder-norm-final", "rms",
            ),
            "--decoder-norm-final 'rms': no norm stands after this decoder's layers",
        ),  # fmt: skip
        (
            ("--task", "translation", "--arch", "transformer_pn", "--encoder-norm-final", "rms", "--encoder-norm-self",
             "layer", "--encoder-norm-ff", "layer", *SMALL),
            "--encoder-norm-final 'rms': no norm stands after this encoder's layers",
        ),
        # norm options for an architecture without norms to choose
        (
            ("--task", "translation_pn", "--arch", "transformer", "--norm-groups", 3),
            "--norm-groups 3: --arch transformer has no",
        ),
        (
            ("--task", "language_modeling_pn", "--arch", "transformer_lm", "--decoder-norm-ff=batch"),
            "--decoder-norm-ff batch: --arch transformer_lm has no norm options; must be one of .*transformer_lm_pn",
        ),
    ],
)
def test_combinations_that_cannot_train(words, message, toy_data, tmp_path, monkeypatch):
    """An error before training data is read, which names task and architecture and says what would fit; no checkpoint."""
    with pytest.raises(ValueError, match=message):
        run(monkeypatch, tmp_path / "run", toy_data, *words, *(SMALL if words[1] == "translation" else ()))
    assert not list(tmp_path.rglob("*.pt"))


@pytest.mark.parametrize(
    "words",
    [
        ("--task", "translation_pn", "--arch", "transformer", *SMALL),
        (
            "--task",
            "translation",
            "--arch",
            "transformer_pn",
            "--encoder-norm-self",
            "rms",
            "--encoder-norm-ff",
            "layer",
            *SMALL,
        ),
        ("--task", "translation_pn", "--arch", "transformer_pn", "--num-batch-buckets", 3, *SMALL),
    ],
)
def test_combinations_that_can_train(words, toy_data, tmp_path, monkeypatch):
    """Our task trains fairseq's models of its kind; fairseq's task trains our models where no norm has running
    statistics; and batches may be padded to a few lengths.
    """
    run(monkeypatch, tmp_path / "run", toy_data, *words)
    assert (tmp_path / "run" / "checkpoint_last.pt").is_file()


@pytest.mark.parametrize(
    "task,arch",
    [
        ("translation_pn", "transformer_lm_pn"), ("translation_pn", "transformer_lm"), ("translation", "transformer_lm_pn"),
        ("language_modeling_pn", "transformer_pn"), ("language_modeling", "transformer_pn_tiny"),
    ],
)  # fmt: skip
def test_configurations(task, arch):
    """The same where no command line is read, as in fairseq-hydra-train: when the model is built."""
    made = object.__new__(tasks.TASK_REGISTRY[task])
    with pytest.raises(ValueError, match=f"--arch {arch} with --task {task}, which trains"):
        made.build_model(Namespace(_name=arch))


def test_tasks_of_ones_own():
    """A task with the mixin may train a model with running statistics, and so may one that says that it drives them."""
    model = toy.build()
    model.check_training_task(object.__new__(type("Task", (RunningStatisticsTask,), {})))
    model.check_training_task(SimpleNamespace(drives_running_statistics=True))
    with pytest.raises(ValueError, match="RunningStatisticsTask"):
        model.check_training_task(SimpleNamespace())
    assert models.ARCH_MODEL_REGISTRY["transformer_pn"] is type(model)


@pytest.mark.parametrize("base,settings", [(FairseqTask, TranslationConfig()), (LegacyFairseqTask, Namespace(data="bin"))])
def test_options_of_ones_own_task(base, settings):
    """Where a task's options do not include those of the statistics, their defaults hold, and an update is one step."""
    made, model = type("Task", (RunningStatisticsTask, base), {})(settings), toy.build()
    source, lengths, target = toy.batch()
    optimizer = SimpleNamespace(backward=lambda loss: loss.backward(), step=lambda: None)
    before = model.encoder.layer_norm.steps()
    made.check_training()
    made.begin_epoch(1, model)
    for _ in range(2):
        made.train_step(None, model, lambda model, _: (model(source, lengths, target)[0].sum(), 1, {}), optimizer, 0)
    made.optimizer_step(optimizer, model, 0)
    assert model.encoder.layer_norm.steps() == before + 1


def test_a_model_that_is_wrapped_anew():
    """A trainer that wraps the model of several ranks anew, as ``--quantization-config-path`` makes it do, goes on: one step
    of the statistics an update."""
    made, model = type("Task", (RunningStatisticsTask, FairseqTask), {})(TranslationConfig()), toy.build()
    source, lengths, target = toy.batch()
    optimizer = SimpleNamespace(backward=lambda loss: loss.backward(), step=lambda: None)
    before = [norm.steps() for norm in running_norms(model).values()]
    for _ in range(2):
        wrapped = ModuleProxyWrapper(LegacyDistributedDataParallel(model, process_group=None))
        made.train_step(None, wrapped, lambda model, _: (model(source, lengths, target)[0].sum(), 1, {}), optimizer, 0)
        made.optimizer_step(optimizer, wrapped, 0)
    assert [norm.steps() for norm in running_norms(model).values()] == [steps + 2 for steps in before]
