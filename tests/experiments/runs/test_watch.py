"""--tensorboard and --wandb: curves that go elsewhere as well, and no setting of a run."""
import importlib
import json
import signal
import sys
from argparse import Namespace

import pytest
from omegaconf import OmegaConf
from pipelines import fake_wandb

from fairseq_powernorm.experiments.directories import locked
from fairseq_powernorm.experiments.errors import UserError
from fairseq_powernorm.experiments.runs import records, session, watch


def options(**given):
    return Namespace(**{"benchmark": "demo", "tensorboard": None, "wandb": None, **given})


@pytest.mark.parametrize("given, message", [
    ({"wandb": "a/b"}, "--wandb 'a/b': must be a project's name"),
    ({"wandb": "a" * 129}, "at most 128 characters"),
    ({"wandb": " a"}, "must be a project's name"),
    ({"wandb": "a\nb"}, "must be a project's name"),
    ({"tensorboard": "/dev/null/x"}, "--tensorboard /dev/null/x: /dev/null is not a directory"),
    ({"tensorboard": "a\nb"}, "characters that cannot be printed"),
    ({"tensorboard": "a${b}"}, "hydra does not take"),
])
def test_what_cannot_be_is_refused(given, message, monkeypatch, tmp_path):
    """A project that wandb would not take, a directory that cannot be written: one line, before any training."""
    monkeypatch.setitem(watch.NEEDED, "wandb", (("json",), "wandb"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        watch.check(options(**given))
    assert message in str(caught.value) and "\n" not in str(caught.value) and not any(tmp_path.iterdir())


@pytest.mark.parametrize("name", sorted(watch.NEEDED))
def test_a_missing_package_is_named(name, monkeypatch, tmp_path):
    """The option, this Python and the line that installs the package; a folder of that name is none."""
    monkeypatch.setitem(watch.NEEDED, name, (("not_a_package",), name))
    (tmp_path / "not_a_package").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UserError, match=f"--{name}: {sys.executable} has no not_a_package; .*: pip install {name}$"):
        watch.check(options(**{name: ""}))


def test_words_say_the_same(monkeypatch, tmp_path):
    """The words of a command line for another command; a directory becomes an absolute path, wherever that one runs."""
    monkeypatch.setitem(watch.NEEDED, "wandb", (("json",), "wandb"))
    monkeypatch.chdir(tmp_path)
    given = options(wandb="-my project", tensorboard="there")
    watch.check(given)
    assert watch.words(given) == [f"--tensorboard={tmp_path}/there", "--wandb=-my project"]
    assert watch.words(options(tensorboard="")) == ["--tensorboard"] and watch.words(options()) == []
    run = tmp_path / "power-seed1"
    assert watch.overrides(given, run) == [
        f"common.tensorboard_logdir={tmp_path}/there/demo/power-seed1", "common.wandb_project='-my project'"]


def test_the_users_environment_goes_first(monkeypatch, tmp_path):
    """WANDB_NAME and its like stay what the user has set; an identity that is none is replaced."""
    monkeypatch.setenv("WANDB_NAME", "mine")
    facts = {"wandb": "../../x"}
    told = watch.environment(options(wandb="p"), tmp_path / "power-all-seed12", facts)
    assert told["WANDB_NAME"] == "mine" and told["WANDB_RUN_GROUP"] == "demo/power-all"
    assert told["WANDB_RUN_ID"] == facts["wandb"] and watch.ID.fullmatch(facts["wandb"])
    assert watch.environment(options(), tmp_path, {}) == {}


@pytest.fixture
def signals():
    """What this process does with signals, which a session changes, is put back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_session_tells_and_does_not_store_it(signals, tmp_path, capfd):
    """What is told to fairseq and to wandb is neither in run.json's sessions nor in config.yaml."""
    facts = {"schema": 1, "benchmark": "demo", "norm": "power", "placement": "encoder", "prepared_sha256": "0",
             "overrides": [], "parameters": 1, "sessions": []}
    given, run = options(wandb="my project", tensorboard=""), tmp_path / "power-seed1"
    config = OmegaConf.create({"task": {"_name": "translation_pn"}, "optimization": {"max_update": 1}})
    code = "import os, sys; print(sys.argv[1:], os.environ['WANDB_RUN_ID'])"
    with locked(run) as lock:
        watched = session.Watched(watch.overrides(given, run), watch.environment(given, run, facts))
        assert session.session(run, facts, [sys.executable, "-c", code, "common.seed=2"], config, lock, None, watched) == 1
    words = "['common.seed=2', 'common.tensorboard_logdir=tensorboard', \"common.wandb_project='my project'\"]"
    assert f"{words} {facts['wandb']}\n" in (run / "train.log").read_text()
    stored = records.read_run(run)
    assert stored["wandb"] == facts["wandb"] and stored["sessions"][0]["command"][-1] == "common.seed=2"
    assert watch.environment(given, run, stored)["WANDB_RUN_ID"] == facts["wandb"]
    assert "wandb" not in (run / "config.yaml").read_text()


def test_fairseq_sends_them(monkeypatch, tmp_path):
    """fairseq's bar writes TensorBoard's files and logs to wandb; settings that change do not end a run that goes on."""
    pytest.importorskip("tensorboard")
    pytest.importorskip("fairseq")
    importlib.import_module("fairseq_powernorm.register")
    from fairseq.logging import progress_bar

    fake_wandb(tmp_path)
    monkeypatch.setenv("NOTES", str(tmp_path / "notes"))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(progress_bar, "wandb", importlib.import_module("wandb"))
    bar = progress_bar.progress_bar(range(2), log_format="json", tensorboard_logdir=str(tmp_path / "curves"),
                                    wandb_project="p", wandb_run_name="power-seed1")
    bar.update_config({"max_update": 4})
    bar.print({"loss": 1.0}, tag="valid", step=4)
    notes = [json.loads(line) for line in (tmp_path / "notes").read_text().splitlines()]
    assert notes[0]["init"] == {"project": "p", "reinit": False, "name": "power-seed1"}
    assert notes[-1] == {"log": ["valid/loss"], "step": 4}
    assert list((tmp_path / "curves" / "valid").glob("*tfevents*"))
    sys.modules.pop("wandb")


def test_older_runs_have_stored_it(tmp_path):
    """What an earlier version stored as an override is left out as a run.json and a finished.json are read."""
    facts = {"schema": 1, "benchmark": "demo", "norm": "power", "placement": "encoder", "prepared_sha256": "0",
             "overrides": ["common.seed=2", "common.tensorboard_logdir=tensorboard", "+common.wandb_project=x"],
             "sessions": []}
    (tmp_path / "run.json").write_text(json.dumps(facts))
    (tmp_path / "finished.json").write_text(json.dumps({"updates": 4, "overrides": facts["overrides"]}))
    assert records.read_run(tmp_path)["overrides"] == ["common.seed=2"]
    assert records.read_finished(tmp_path)["overrides"] == ["common.seed=2"]
