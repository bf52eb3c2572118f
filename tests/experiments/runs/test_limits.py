"""Settings that name what is not there are refused before a training begins."""
import pytest
from omegaconf import OmegaConf

from fairseq_powernorm.experiments.errors import UserError
from fairseq_powernorm.experiments.runs import limits

SOUND = ["optimizer.adam_betas='(0.9, 0.98)'", "optimizer.adam_betas='[0, 0.5]'", "dataset.valid_subset=valid,test",
         "checkpoint.restore_file=before.pt", "checkpoint.restore_file=checkpoint_last.pt", "optimizer.lr=[]",
         "dataset.valid_subset='${dataset.train_subset}'", "checkpoint.finetune_from_model=before.pt"]
UNSOUND = [
    ("optimization.lr=[]", "must have one value at least"), ("optimization.update_freq=[]", "must have one value at least"),
    *((f"optimizer.adam_betas={value}", "must be two numbers from 0 to below 1")
      for value in ("x", "'(1,2,3)'", "'(0.9, 1.5)'", "'(0.9, -1)'", "0.9", "'(0.9, x)'", "null", "'" + "(" * 5000 + "'")),
    ("dataset.valid_subset=none", "there is no 'none' in "), ("dataset.valid_subset=valid,", "there is no '' in "),
    ("dataset.train_subset=../train", "valid: test, train, valid"), ("checkpoint.restore_file=/none", "no such file"),
    ("checkpoint.restore_file=.", "no such file"), ("checkpoint.finetune_from_model=/none", "no such file"),
    ("checkpoint.checkpoint_suffix=../x", "have none"),
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
        "dataset": {"train_subset": "train", "valid_subset": "valid"},
        "checkpoint": {"restore_file": "checkpoint_last.pt", "finetune_from_model": None, "checkpoint_suffix": ""},
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
