"""Settings that name what is not there are refused before a training begins."""
import sys

import pytest
import torch
from omegaconf import OmegaConf

from fairseq_powernorm.experiments import tools, train as command
from fairseq_powernorm.experiments.errors import UserError
from fairseq_powernorm.experiments.overrides import Settings
from fairseq_powernorm.experiments.runs import batch, compose, limits, train
from fairseq_powernorm.experiments.runs.launchers import Launcher

SOUND = ["optimizer.adam_betas='(0.9, 0.98)'", "optimizer.adam_betas='[0, 0.5]'", "dataset.valid_subset=valid,test",
         "checkpoint.restore_file=before.pt", "checkpoint.restore_file=checkpoint_last.pt", "optimizer.lr=[]",
         "checkpoint.best_checkpoint_metric=nll_loss", "dataset.batch_size=3",
         "dataset.valid_subset='${dataset.train_subset}'", "checkpoint.finetune_from_model=before.pt"]
UNSOUND = [
    ("optimization.lr=[]", "must have one value at least"), ("optimization.update_freq=[]", "must have one value at least"),
    *((f"optimizer.adam_betas={value}", "must be two numbers from 0 to below 1")
      for value in ("x", "'(1,2,3)'", "'(0.9, 1.5)'", "'(0.9, -1)'", "0.9", "'(0.9, x)'", "null", "'" + "(" * 5000 + "'")),
    ("dataset.valid_subset=none", "there is no 'none' in "), ("dataset.valid_subset=valid,", "there is no '' in "),
    ("dataset.train_subset=../train", "valid: test, train, valid"), ("checkpoint.restore_file=/none", "no such file"),
    ("checkpoint.restore_file=.", "no such file"), ("checkpoint.finetune_from_model=/none", "no such file"),
    ("checkpoint.checkpoint_suffix=../x", "have none"),
    ("checkpoint.best_checkpoint_metric=bleu", "a validation does not compute it; valid: loss, ppl, nll_loss"),
    ("dataset.max_tokens=null", "one of them says how large a batch is"),
]


@pytest.fixture
def places(tmp_path):
    (tmp_path / "data-bin").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "before.pt").touch()
    for subset in ("train", "valid", "test"):
        (tmp_path / "data-bin" / f"{subset}.de-en.de.bin").touch()
    return tmp_path / "data-bin", tmp_path / "run" / "checkpoints"


def config(override=None):
    made = OmegaConf.create({
        "optimization": {"lr": [0.1], "update_freq": [1]}, "optimizer": {"_name": "adam", "adam_betas": "(0.9, 0.98)"},
        "dataset": {"train_subset": "train", "valid_subset": "valid", "max_tokens": 400, "batch_size": None},
        "checkpoint": {"restore_file": "checkpoint_last.pt", "finetune_from_model": None, "checkpoint_suffix": "",
                       "best_checkpoint_metric": "loss"},
        "criterion": {"_name": "label_smoothed_cross_entropy"}, "task": {"_name": "translation_pn"},
    })
    return OmegaConf.merge(made, OmegaConf.from_dotlist([override])) if override else made


@pytest.mark.parametrize("override", [None, *SOUND])
def test_what_is_there(override, places):
    """What is there, and what fairseq itself takes from elsewhere."""
    limits.check_references(config(override), *places)


@pytest.mark.parametrize("override, message", UNSOUND)
def test_what_is_not_there(override, message, places):
    """The setting, its value and what is valid, in one line."""
    with pytest.raises(UserError) as caught:
        limits.check_references(config(override), *places)
    assert message in str(caught.value) and override.partition("=")[0] in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("override", ["generation.no_repeat_ngram_size=2", "generation.nbest=3", "generation.unkpen=1"])
def test_translating(override):
    """What a translation would be made without is refused before training; what it is made with, and defaults, are not."""
    compose.check_values(compose.compose("demo", ["generation.beam=2", "generation.lenpen=0.6", "generation.nbest=1"]))
    with pytest.raises(UserError, match=f"{override}.*: scripts/evaluate.sh does not translate with it; valid: beam"):
        compose.check_values(compose.compose("demo", [override]))


@pytest.mark.parametrize("config, valid", [
    ({"criterion": {"_name": "cross_entropy"}}, "loss ppl"), ({"criterion": {"_name": "mine"}}, ""), ({}, ""),
    ({"criterion": {"_name": "adaptive_loss"}, "optimization": {"sentence_avg": True}}, "loss ppl nll_loss"),
    ({"criterion": {"_name": "label_smoothed_cross_entropy", "report_accuracy": True}, "task": {"eval_bleu": True}},
     "loss ppl nll_loss accuracy bleu"),
])
def test_what_a_validation_computes(config, valid):
    """By criterion and task; nothing is said of a criterion that somebody has added."""
    assert limits.metrics({"optimization": {}, **config}) == valid.split()


@pytest.mark.parametrize("key, value", [("optimization.max_update", 10**400), ("dataset.max_tokens", -(10**400)),
                                        ("optimization.clip_norm", 1e300), ("optimization.lr", [10**400])])
def test_numbers_that_no_setting_reaches(key, value):
    """However many digits they have."""
    found = config()
    OmegaConf.update(found, key, value)
    with pytest.raises(UserError, match=f"^{key}=.*: must be from"):
        limits.check(found, Settings())


@pytest.mark.parametrize("value", ["[[1]]", "[x]", "[0]", "[1.5]", "[null]"])
def test_batches_that_cannot_be_gathered(value):
    """optimization.update_freq is a list of numbers."""
    with pytest.raises(UserError, match="must be a list of numbers, 1 or more"):
        batch.update_freq(config(f"optimization.update_freq={value}"))


@pytest.mark.parametrize("override, seed", [
    ("common.seed=7", 7), ("++common.seed=007", 7), ("common.seed=1_0", 10), ("common.seed='7'", 7), ("a.b=1", 3),
    *((f"common.seed={value}", None) for value in ("-1", "4294967296", "1.5", "1e2", "null", "true", "../../x", "x", "''",
                                                   "${common.log_interval}", "[1]", "9" * 400)),
    ("~common.seed", None)])
def test_seeds(override, seed):
    """The seed that names a run's directory is a number, however it is spelt; what is none is refused before anything is
    made."""
    if seed is not None:
        assert train.seed_of(["common.seed=5", override] if seed != 3 else [override], 3) == seed
        return
    with pytest.raises(UserError, match="seed.*0 to 4294967295"):
        train.seed_of([override], 3)


@pytest.mark.parametrize("text, message", [
    ("power:eps=../../z", "norm 'power:eps=../../z': eps='../../z' must be a number"), ("power:", "'' is no OPTION=VALUE"),
    ("power:x=/etc/y", "norm 'power:x=/etc/y': option 'x' is unknown"), ("power: eps=1", "norm 'power: eps=1': has blanks"),
    ("power:eps=1\n", "has blanks")])
def test_norms(text, message, tmp_path, monkeypatch):
    """A norm's options, which name the run's directory, are looked at before that is made, or its lock, anywhere."""
    monkeypatch.setenv("PN_RUNS_ROOT", str(tmp_path / "runs"))
    with pytest.raises(UserError, match=message):
        command.parse(["demo", text])
    command.parse(["demo", "power:eps=1e-3,variant=algorithm2"])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name, value", [
    *(("PN_PROGRESS_SECONDS", value) for value in ("abc", "0", "-1", "nan", "inf", "1e300")),
    *(("OMP_NUM_THREADS", value) for value in ("abc", "0", "-1", "1.5", "9" * 30, "x,2"))])
def test_variables(name, value, monkeypatch):
    """Variables that are no numbers are refused by their names before anything is looked at."""
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=f"^{name}.*must be a number"):
        train.train(None, None, Launcher())


def test_a_model_that_is_too_large(monkeypatch):
    """A model that no memory holds is refused in one line, not ended by the system; the limit is for the model alone."""
    if sys.platform != "linux" or torch.cuda.is_available():
        pytest.skip("the limit is one of Linux, where no GPU is")
    monkeypatch.setattr(tools, "free_memory", lambda: 100_000_000)
    with pytest.raises(RuntimeError), tools.within_memory():
        torch.empty(1_000_000_000, dtype=torch.uint8)
    torch.empty(200_000_000, dtype=torch.uint8)
    assert tools.resource.getrlimit(tools.resource.RLIMIT_AS)[0] == tools.resource.RLIM_INFINITY
    monkeypatch.undo()
    assert tools.free_memory() > 0


def test_threads():
    """OpenMP's list of threads by level: the first."""
    assert [tools.threads({"OMP_NUM_THREADS": value}) for value in ("4,2", " 3 ", "2")] == [4, 3, 2]
    assert tools.threads({}) == tools.threads({"OMP_NUM_THREADS": ""}) == tools.cpus()
