"""What is taken from a command line, a run's directory and a record: settings' values, no code, nothing outside."""

import json
import os

import pytest

pytest.importorskip("hydra")

from pathlib import Path

from fairseq_powernorm.experiments import trust
from fairseq_powernorm.experiments.errors import UserError
from fairseq_powernorm.experiments.files import write_text
from fairseq_powernorm.experiments.paths import for_fairseq
from fairseq_powernorm.experiments.runs import records

CODE = "__import__('os').system('true')"
FACTS = {"schema": 1, "benchmark": "demo", "arch": "transformer_pn_tiny", "norm": "power", "placement": "encoder",
         "prepared_sha256": "0", "overrides": [], "sessions": []}

SOUND = ["common.seed=2", "++common.seed=2", "+model.encoder_layers=1", "~optimizer.adam_betas", "optimization.lr=[0.1,0.2]",
         "optimizer.adam_betas='(0.9, 0.98)'", "model.encoder_norm_self='power:eps=0.001'",
         "dataset.valid_subset='valid,test'",
         "model.norm_warmup_updates=${lr_scheduler.warmup_updates}", "dataset.max_tokens=null", "+task.norm_record=a.jsonl",
         "dataset.valid_subset='a (b) = 50%, é'", "generation.lenpen=-1.5"]

UNSOUND = [
    *((f"{sign}common.user_dir={value}", "is this command's own; use another checkout")
      for sign in ("", "+", "++") for value in ("/tmp/evil", "'/tmp/evil'")),
    ("~common.user_dir", "is this command's own"),
    ("task.data=/tmp", "is this command's own"),
    ("checkpoint.save_dir=/tmp", "is this command's own"),
    ("common.tensorboard_logdir=/tmp", "use --tensorboard"),
    ("common={user_dir: /tmp/evil}", "must read GROUP.KEY=VALUE"),
    ("+common={user_dir: /tmp/evil}", "must read GROUP.KEY=VALUE"),
    ("common.user_dir =/tmp/evil", "must read GROUP.KEY=VALUE"),
    (" common.user_dir=/tmp/evil", "must read GROUP.KEY=VALUE"),
    ("'common.user_dir'=/tmp/evil", "must read GROUP.KEY=VALUE"),
    ("common@_global_.x=1", "must read GROUP.KEY=VALUE"),
    ("model@common=evil", "must read GROUP.KEY=VALUE"),
    ("common.seed=2\ncommon.user_dir=/tmp/evil", "characters that cannot be printed"),
    ("common.seed=2\x00", "characters that cannot be printed"),
    ("common.wandb_project=\udce9", "characters that cannot be printed"),
    ("hydra.searchpath=[file:///tmp]", "hydra's own settings"),
    ("+hydra/launcher=submitit", "hydra's own settings"),
    ("hydra/job_logging=evil", "hydra's own settings"),
    ("++hydra.callbacks.x={_target_: os.system}", "hydra's own settings"),
    ("+launcher=submitit", "must read GROUP.KEY=VALUE"),
    ("common.seed=${oc.env:HOME}", "an interpolation must be all of a value"),
    ("common.seed=$\\{oc.env\\:HOME\\}", "an interpolation must be all of a value"),
    ("dataset.valid_subset='x${common.seed}(1)'", "an interpolation must be all of a value"),
    ("dataset.valid_subset='${task.data}${oc.env:HOME}'", "an interpolation must be all of a value"),
    ("optimization.lr=[${oc.env:HOME}]", "an interpolation must be all of a value"),
    (f"optimizer.adam_betas=\"{CODE}\"", "reads like Python code"),
    (f"optimizer.adam_betas=\"  ({CODE}, 0.98)\"", "reads like Python code"),
    ("optimizer.adam_betas=\"[open('x', 'w') for _ in (1,)]\"", "reads like Python code"),
    (f"optimization.lr=[\"{CODE}\"]", "reads like Python code"),
    ("task.source_lang=--user-dir=/tmp/evil", "hydra cannot read it"),
    ("task.source_lang='--user-dir=/tmp/evil'", "begins like an option"),
    ("common.log_file=/tmp/x", "the name of a file in the run's directory"),
    ("common.log_file=../x", "the name of a file in the run's directory"),
    ("+task.norm_record=/tmp/x", "the name of a file in the run's directory"),
    *((f"{key}={name}", "and none that a run has anyway") for key in ("common.log_file", "+task.norm_record")
      for name in (".", "run.json", "train.log", "checkpoints/checkpoint_last.pt", "./finished.json.partial")),
    *((f"~{group}._name", "chooses an implementation") for group in ("model", "task", "optimizer", "criterion")),
    ("~optimizer._name=adam", "chooses an implementation"),
    ("common.suppress_crashes=true", "a failed training would look like"),
    ("checkpoint.no_last_checkpoints=true", "a run goes on from its last checkpoint"),
    ("checkpoint.write_checkpoints_asynchronously=true", "would go unnoticed"),
    ("checkpoint.no_save=True", "a run is what its checkpoints are"),
    ("common.log_format=simple", "valid: json"),
    ("optimization.clip_norm=inf", "no finite number"),
    ("optimization.lr=[nan]", "no finite number"),
    ("common.seed=1,2", "has several values; valid: one"),
    ("common.seed=range(3)", "has several values; valid: one"),
    ("common.seed=(1", "hydra cannot read it"),
    ("", "must read GROUP.KEY=VALUE"),
    ("=1", "must read GROUP.KEY=VALUE"),
]


def test_sound_overrides():
    """What changes one setting, in any of hydra's spellings, is taken."""
    trust.check_overrides(SOUND, trust.OURS)


@pytest.mark.parametrize("override, message", UNSOUND)
def test_unsound_overrides(override, message, tmp_path):
    """An override that is more than a setting's value is refused alike where it is typed and where it was stored, in one
    line with the override."""
    with pytest.raises(UserError, match=message) as typed:
        trust.check_overrides([override], trust.OURS)
    assert "\n" not in str(typed.value)
    (tmp_path / "run.json").write_text(json.dumps({**FACTS, "overrides": ["common.seed=2", override]}))
    with pytest.raises(UserError, match=message) as stored:
        records.read_run(tmp_path)
    assert str(stored.value) == f"{tmp_path / 'run.json'}: {typed.value}"


@pytest.mark.parametrize("overrides, message", [
    *((["checkpoint.no_save=" + value], "checkpoint.no_save=True: a run is what") for value in ("1", "yes", "'on'")),
    (["checkpoint.no_save=${common.cpu}", "common.cpu=true"], "checkpoint.no_save=True: a run is what"),
    (["common.log_file=${common_eval.model_overrides}", "common_eval.model_overrides=/tmp/x"], "log_file=/tmp/x: must be"),
    (["+task.norm_record=${task.source_lang}", "task.source_lang=run.json"], "norm_record=run.json: must be"),
    (["common.log_file=${common.none}"], "common.log_file: "),
])
def test_other_spellings(overrides, message):
    """What an override cannot have as its value it cannot have in another spelling either, or by way of another setting."""
    from fairseq_powernorm.experiments.runs import compose

    trust.check_overrides(overrides, trust.OURS)
    paths = ["common.user_dir=x", "task.data=x", "checkpoint.save_dir=x"]
    compose.check_values(compose.compose("demo", [*paths, "common.log_file=mine.log", "+task.norm_record=mine.jsonl"]))
    with pytest.raises(UserError, match=message) as caught:
        compose.check_values(compose.compose("demo", [*paths, *overrides]))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("change, message", [
    ({"overrides": "common.seed=2"}, "overrides is str, not a list"),
    ({"overrides": [["common.seed=2"]]}, "overrides.0. is "),
    ({"overrides": {"common.seed": 2}}, "overrides is dict, not a list"),
    ({"sessions": {}}, "sessions is dict, not a list"),
    ({"sessions": [{}]}, r"sessions\[0\].command is missing"),
    ({"sessions": [{"command": ["x"], "threads": "1", "wall_s": None, "cpu_s": None, "exit_status": 0}]}, "threads is '1'"),
    ({"benchmark": "../evil"}, "benchmark '../evil' is unknown; valid: demo"),
    ({"norm": ["power"]}, "norm is "), ({"parameters": "many"}, "parameters is 'many'"), ({"more": 1}, "more is not a key"),
])
def test_facts_of_other_types(change, message, tmp_path):
    """A run.json with values of other types than train.sh writes is refused by the key."""
    (tmp_path / "run.json").write_text(json.dumps({**FACTS, **change}))
    with pytest.raises(UserError, match=message):
        records.read_run(tmp_path)


@pytest.mark.parametrize("config, message", [
    ({"optimizer": {"adam_betas": CODE}}, "reads like Python code"),
    ({"task": {"source_lang": "--user-dir=/tmp"}}, "an option"),
    ({"generation": {"beam": "${oc.env:HOME}"}}, "an interpolation"),
    ({"model": {"a": ["x\ny"]}}, "cannot be printed")])
def test_configurations(config, message):
    """A resolved configuration holds numbers and texts: code, interpolations and options are refused by their key."""
    trust.check_config({"optimizer": {"adam_betas": "(0.9, 0.98)", "lr": -1, "x": None}}, "config.yaml")
    with pytest.raises(UserError, match=f"config.yaml: .*{message}"):
        trust.check_config(config, "config.yaml")


def test_paths(tmp_path):
    """Blanks, commas, "=", "%", quotes and letters of any language are taken in paths; what fairseq or hydra would read
    otherwise is not."""
    sound = Path("/tmp/a b,c=d%e'f\"g#é/[x]{y}")
    assert for_fairseq("run directory", sound) == sound
    for text in ("/tmp/a:b", "/tmp/a\nb", "/tmp/${oc.env:HOME}", "/tmp/a\\b", "/tmp/\udce9"):
        with pytest.raises(UserError, match="^run directory '"):
            for_fairseq("run directory", Path(text))
    (tmp_path / "train.log").symlink_to(os.devnull)
    with pytest.raises(UserError, match="train.log is a link"):
        trust.check_files(tmp_path, records.WRITTEN)
    (tmp_path / "train.log").unlink()
    trust.check_files(tmp_path, records.WRITTEN)
    os.mkfifo(tmp_path / "train.log")
    with pytest.raises(UserError, match="train.log is not a file"):
        trust.check_files(tmp_path, records.WRITTEN)


@pytest.mark.parametrize("name", ["checkpoints", "checkpoints/checkpoint_last.pt", "checkpoints/a/b", "logs/rank1.log",
                                  "hydra/config.yaml", "a/norm.jsonl", "a"])
def test_places(name, tmp_path):
    """Through a link in a run's directory, or a pipe, nothing is written: not where training writes by itself, nor where a
    setting says so. A link to the run is none in it."""
    run, victim = tmp_path / "run", tmp_path / "victim"
    (run / name).parent.mkdir(parents=True, exist_ok=True)
    victim.mkdir()
    (tmp_path / "link").symlink_to(run)
    for place in (run, tmp_path / "link"):
        trust.check_places(place, (None, "a/norm.jsonl"))
        (run / name).symlink_to(victim)
        with pytest.raises(UserError, match=f"/{name} is a link; training writes"):
            trust.check_places(place, (None, "a/norm.jsonl"))
        (run / name).unlink()
        os.mkfifo(run / name)
        with pytest.raises(UserError, match=f"/{name} is no file; training writes"):
            trust.check_places(place, (None, "a/norm.jsonl"))
        (run / name).unlink()


@pytest.mark.parametrize("kind", ["link", "pipe", "file"])
def test_a_file_that_stands_in_the_way(kind, tmp_path):
    """What is there under the name by which a file is written at first is replaced; what a link leads to stays."""
    partial = tmp_path / "run.json.partial"
    (tmp_path / "victim").write_text("theirs")
    if kind == "link":
        partial.symlink_to(tmp_path / "victim")
    elif kind == "pipe":
        os.mkfifo(partial)
    else:
        partial.touch()
    write_text(tmp_path / "run.json", "{}")
    assert sorted(os.listdir(tmp_path)) == ["run.json", "victim"] and (tmp_path / "victim").read_text() == "theirs"
