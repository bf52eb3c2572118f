"""A run's directory may be somebody else's: whatever it holds is read or refused in one line, and never executed."""
import json
import os
import pickle
import zipfile

import pytest

from fairseq_powernorm.experiments import own, recipes
from fairseq_powernorm.experiments.directories import in_use, locked, resumable_directory, whole_directory
from fairseq_powernorm.experiments.errors import UserError
from fairseq_powernorm.experiments.evaluation import evaluate
from fairseq_powernorm.experiments.runs import checkpoints, claims, records, status, trainlog

FACTS = {"schema": 1, "benchmark": "demo", "arch": "transformer_pn_tiny", "norm": "power", "placement": "encoder",
         "prepared_sha256": "0", "overrides": [], "parameters": 3,
         "sessions": [{"command": ["x"], "threads": 1, "wall_s": 1.0, "cpu_s": 1.0, "exit_status": 0}]}
CONFIG = """\
common: {seed: 1, user_dir: x}
task: {_name: translation_pn, source_lang: de, target_lang: en}
model: {_name: transformer_pn_tiny, encoder_norm_self: power, decoder_norm_self: layer}
checkpoint: {keep_last_epochs: 0, keep_interval_updates: 5, no_epoch_checkpoints: true, best_checkpoint_metric: loss}
generation: {beam: 2, lenpen: 1, max_len_a: 0, max_len_b: 20}
dataset: {max_tokens: 400}
optimization:
  max_update: 3
"""
LM = """\
common: {seed: 1, user_dir: x}
task: {_name: language_modeling_pn, tokens_per_sample: 8, add_bos_token: false}
model: {_name: x, decoder_norm_self: layer}
checkpoint: {keep_last_epochs: 0, keep_interval_updates: 5, no_epoch_checkpoints: true, best_checkpoint_metric: loss}
eval_lm: {context_window: 0, softmax_batch: 9}
dataset: {batch_size_valid: 3, max_tokens_valid: null}
"""
DEEP = "[" * 50000


def write(run, **files):
    """A run's directory."""
    (run / "checkpoints").mkdir(parents=True)
    whole = {"run.json": json.dumps(FACTS), "config.yaml": CONFIG, "train.log": "",
             "finished.json": '{"updates": 3, "overrides": []}'}
    for name, text in {**whole, **files}.items():
        (run / name).write_text(text, errors="surrogateescape")
    return run


def one_line(capsys, run):
    """What status.sh says of it: one line of printable characters."""
    status.status([str(run)])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and lines[2].isprintable()
    return lines[2]


@pytest.mark.parametrize("name, text", [
    *(("run.json", text) for text in (DEEP, "[]", "NaN", "", "\udcff", json.dumps({**FACTS, "norm": 3}),
                                      json.dumps({**FACTS, "benchmark": "../demo"}), json.dumps({**FACTS, "wandb": []}))),
    *(("finished.json", text) for text in (DEEP, "[]", "x", '{"updates": 1, "overrides": [1]}')),
])
def test_records(name, text, tmp_path, capsys):
    """JSON that is none, is too deep, or holds something else."""
    run = write(tmp_path / "run", **{name: text})
    with pytest.raises(UserError) as caught:
        evaluate.started(run, "demo", unfinished=False)
    assert name in str(caught.value) and "\n" not in str(caught.value)
    one_line(capsys, run)


@pytest.mark.parametrize("text, message", [
    (CONFIG + "x: [1]\n", "x is a list, not an object"),
    ("", "common is missing"), ("[1]", "not an object"), ("x", ""), ("common: {seed: 1}", "model is missing"),
    ("a: \0", ""), ("a: " + "[" * 3000, ""), ("a: [", ""), ("!!python/object/apply:os.system ['true']", "python/object"),
    ("a: &a [x]\nb: [*a, *a]\n", "has an alias 'a'"),
    (CONFIG.replace("task:", "tusk:"), "task is missing"), (CONFIG.replace("model:", "modell:"), "model is missing"),
    (CONFIG.replace("seed: 1", "seed: [1]"), "common.seed is [1], not int"),
    (CONFIG.replace("seed: 1", "seed: '${oc.env:HOME}'"), "has an interpolation"),
    (CONFIG.replace("updates: 5", "updates: x"), "checkpoint.keep_interval_updates is 'x', not int"),
    (CONFIG.replace("task: {", "task: null #"), "task is NoneType, not an object"),
    (CONFIG.replace("beam: 2", "beam: --eval"), "begins like an option"),
    (CONFIG.replace("beam: 2", "beam: x"), "generation.beam is 'x', not int"),
    (CONFIG.replace("decoder_norm_self", "decoder_norm"), "model.decoder_norm_self is missing"),
    (LM.replace("context_window: 0", "context_window: .inf"), "eval_lm.context_window is inf"),
])
def test_settings(text, message, tmp_path, capsys):
    """A config.yaml that is none, would execute something, grows without end, or lacks what is asked of it."""
    run = write(tmp_path / "run", **{"config.yaml": text})
    with pytest.raises(UserError) as caught:
        evaluate.load_config(run)
    assert message in str(caught.value) and "config.yaml" in str(caught.value) and "\n" not in str(caught.value)
    one_line(capsys, run)


@pytest.mark.parametrize("text", [CONFIG, LM, CONFIG.replace("max_tokens: 400", "max_tokens: null")])
def test_sound_settings(text, tmp_path):
    """What training writes is taken; code comes from this package whatever the file says."""
    config = evaluate.load_config(write(tmp_path / "run", **{"config.yaml": text}))
    assert config.common.user_dir.endswith("fairseq_powernorm")


@pytest.mark.parametrize("line", [
    '{"train_num_updates": "x"}', '{"valid_num_updates": Infinity}', '{"valid_num_updates": 1e999, "epoch": []}',
    '{"train_num_updates": []}', '{"valid_num_updates": null}', '{"num_updates": "x", "loss": 1}',
    '{"num_updates": "2", "loss": 1, "ups": "x"}', '{"num_updates": ' + "9" * 5000 + "}", '{"a":' * 50000, "\udcff{\"",
    '{"valid_num_updates": 1, "valid_loss": [1], "epoch": {}}',
])
def test_log(line, tmp_path, capsys):
    """Lines of a log that say nothing are passed over; those around them count."""
    sound = '{"epoch": 1, "valid_loss": "4.5", "valid_num_updates": "3"}'
    run = write(tmp_path / "run", **{"train.log": f"{line}\n{sound}\n"})
    curve = trainlog.curve(run / "train.log")
    assert curve["valid"][-1] == {"updates": 3, "epoch": 1, "loss": 4.5} and trainlog.updates(curve) == 3
    one_line(capsys, run)


class Evil:
    """Makes a file when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, (os.environ["PWNED"],)


SOUND = {"optimizer_history": [{"num_updates": 3}], "extra_state": {"val_loss": 1.0, "train_iterator": {"epoch": 1}}}


@pytest.mark.parametrize("state, updates", [
    (SOUND, 3), ({**SOUND, "model": Evil}, 3), (Evil, None), ([], None), (b"\x80\x04junk", None),
    ({**SOUND, "optimizer_history": [{"num_updates": 10**5000}]}, None),
    ({**SOUND, "optimizer_history": [{"num_updates": -3}]}, None),
    ({**SOUND, "optimizer_history": [{"num_updates": float("inf")}]}, None),
    ({**SOUND, "extra_state": {"train_iterator": {"epoch": 10**5000}}}, 3),
    ({**SOUND, "extra_state": [1]}, None), ({**SOUND, "extra_state": {"val_loss": 10**400}}, None),
])
def test_checkpoints(state, updates, tmp_path, capsys, monkeypatch):
    """A checkpoint that says what no training could is none; none of them executes anything."""
    monkeypatch.setenv("PWNED", str(tmp_path / "pwned"))
    if state is Evil or isinstance(state, dict) and state.get("model") is Evil:
        state = Evil() if state is Evil else {**state, "model": Evil()}
    run = write(tmp_path / "run")
    with zipfile.ZipFile(run / "checkpoints" / "checkpoint_1_3.pt", "w") as archive:
        archive.writestr("a/data.pkl", state if isinstance(state, bytes) else pickle.dumps(state, 2))
    found = checkpoints.accounts(run / "checkpoints")
    assert [each.updates for each in found] == ([] if updates is None else [updates])
    one_line(capsys, run)
    assert not (tmp_path / "pwned").exists()


def test_names(tmp_path, capsys):
    """Names that would move a terminal's cursor are shown without that."""
    write(tmp_path / "a\x1b[2Jb\nc")
    assert "a?[2Jb?c" in one_line(capsys, tmp_path)


def test_links_to_runs(tmp_path):
    """Runs that are elsewhere are shown where links to them, or to the place in which they lie, are; a circle ends."""
    write(tmp_path / "disk" / "demo" / "one")
    (tmp_path / "disk" / "demo" / ".two.job").touch()
    (tmp_path / "runs").mkdir()
    for name, place in (("bench", "disk/demo"), ("run", "disk/demo/one"), ("circle", "runs"), ("nothing", "none")):
        (tmp_path / "runs" / name).symlink_to(tmp_path / place)
    found = sorted(str(run.relative_to(tmp_path / "runs")) for run in status.found(tmp_path / "runs"))
    assert found == ["bench/one", "bench/two", "circle/run", "run"]


def test_identity_of_wandb_is_no_setting(tmp_path):
    """A run.json with what wandb calls the run is valid; it is checked where it is used (test_watch.py)."""
    run = write(tmp_path / "run", **{"run.json": json.dumps({**FACTS, "wandb": "../x"})})
    assert records.read_run(run)["wandb"] == "../x"


@pytest.mark.parametrize("name", ["evaluation", ".evaluation.partial", ".evaluation.old"])
@pytest.mark.parametrize("kind", ["directory", "link", "link to a file", "link to nothing", "file", "pipe"])
def test_places_of_an_evaluation(name, kind, tmp_path):
    """Whatever stands where an evaluation is made makes way, and what a link leads to stays as it is."""
    run, victim = tmp_path / "run", tmp_path / "victim"
    victim.mkdir()
    (victim / "file").write_text("theirs")
    run.mkdir()
    place = run / name
    if kind == "directory":
        place.mkdir()
        (place / "left").touch()
    elif kind == "file":
        place.touch()
    elif kind == "pipe":
        os.mkfifo(place)
    else:
        place.symlink_to({"link": victim, "link to a file": victim / "file", "link to nothing": tmp_path / "none"}[kind])
    with whole_directory(run / "evaluation") as made:
        (made / "record.json").touch()
    assert [path.name for path in run.iterdir()] == ["evaluation"]
    assert not (run / "evaluation").is_symlink() and os.listdir(run / "evaluation") == ["record.json"]
    assert [path.name for path in tmp_path.rglob("file")] == ["file"] and (victim / "file").read_text() == "theirs"


STAMP = {"task": "translation", "settings": {"languages": ["de", "en"], "bpe": "subword_nmt", "lowercase": False},
         "sentences": {"test": 3}, "outputs": {}, "benchmark": "talks"}


@pytest.mark.parametrize("change, message", [
    (None, "it has no settings"), ([], "it has no settings"), ("text", "it has no settings"), (DEEP, "cannot read"),
    ({"settings": []}, "it has no settings"), ({"settings": {"bpe": "--user-dir=/tmp/evil"}}, "begins like an option"),
    ({"settings": {"languages": ["de", "${oc.env:HOME}"]}}, "has an interpolation"),
    ({"settings": {"languages": ["de", "__import__('os').system('id')"]}}, "reads like Python code"),
])
def test_prepared_data(change, message, tmp_path, monkeypatch):
    """Prepared data may be somebody else's, too: what prepared.json says is text, and no option of fairseq's commands."""
    monkeypatch.setenv("PN_DATA_ROOT", str(tmp_path))
    (tmp_path / "talks").mkdir()
    stamp = {**STAMP, **change} if isinstance(change, dict) else change
    (tmp_path / "talks" / "prepared.json").write_text(stamp if stamp == DEEP else json.dumps(stamp))
    for read in (recipes.prepared, own.recipe):
        with pytest.raises(UserError, match=message) as caught:
            read("talks")
        assert "prepared.json" in str(caught.value) and "\n" not in str(caught.value)
    with resumable_directory(tmp_path / "other", {"settings": {}}) as partial:  # goes on with no such thing
        (partial / "prepared.json").write_text("[]")
    (tmp_path / "other").rename(tmp_path / ".other.partial")
    with resumable_directory(tmp_path / "other", {"settings": {}}) as partial:
        assert json.loads((partial / "prepared.json").read_text()) == {"settings": {}}


@pytest.mark.parametrize("change, lm, message", [
    ({}, False, None), ({"settings": {**STAMP["settings"], "clean_max": 3}, "types": 3}, False, None),
    ({"types": 3, "published": False, "settings": {}}, True, None),
    ({}, True, "types is missing"), ({"outputs": [1]}, False, "outputs is list, not an object"),
    ({"sentences": {"test": "3"}}, False, r"sentences\['test'\] is '3', not int"),
    *(({"settings": {**STAMP["settings"], key: value}}, False, f"settings.{key}") for key, value in (
        ("bpe", "x"), ("bpe", None), ("lowercase", 1), ("languages", "de"), ("languages", ["de"]),
        ("languages", ["de", "../x"]))),
])
def test_prepared_data_of_an_evaluation(change, lm, message, tmp_path):
    """What an evaluation reads of prepared.json is there, and of the types that prepare.sh writes."""
    if message is None:
        records.check_stamp({**STAMP, **change}, tmp_path, lm=lm)
        return
    with pytest.raises(UserError, match=f"was not written by scripts/prepare.sh: {message}"):
        records.check_stamp({**STAMP, **change}, tmp_path, lm=lm)


def test_another_evaluation(tmp_path, monkeypatch):
    """An evaluation/record.json that is no record is not copied, and a run that does not say its size is not evaluated."""
    run = write(tmp_path / "run", **{"run.json": json.dumps({key: FACTS[key] for key in FACTS if key != "parameters"})})
    with pytest.raises(UserError, match="it does not say how many parameters there are"):
        evaluate.started(run, "demo", unfinished=False)
    monkeypatch.setattr(evaluate, "prepared", lambda _: (tmp_path, STAMP))
    monkeypatch.setattr(evaluate.checkpoints, "last", lambda *_, **__: [])
    (tmp_path / "prepared.json").touch()
    (run / "run.json").write_text(json.dumps({**FACTS, "prepared_sha256": evaluate.sha256(tmp_path / "prepared.json")}))
    (run / "evaluation").mkdir()
    for text in ("[]", '{"subset": "test", "checkpoints": {}}', DEEP):
        (run / "evaluation" / "record.json").write_text(text)
        with pytest.raises(UserError, match="--force evaluates again"):
            evaluate.evaluate(run, record=tmp_path / "copy.json")
    turned = {**STAMP, "settings": {**STAMP["settings"], "languages": ["en", "de"]}}
    monkeypatch.setattr(evaluate, "prepared", lambda _: (tmp_path, turned))
    with pytest.raises(UserError, match="config.yaml: a model from de to en, but .* holds text from en to de"):
        evaluate.evaluate(run, record=tmp_path / "copy.json", force=True)
    assert not (tmp_path / "copy.json").exists()


@pytest.mark.parametrize("name", ["checkpoints/checkpoint_last.pt", "train.log", "config.yaml", "run.json", "finished.json",
                                  "../.run.lock", "../.run.job"])
def test_pipes(name, tmp_path, capsys):
    """A pipe that nobody writes to keeps nobody waiting."""
    run = write(tmp_path / "run")
    (run / name).unlink(missing_ok=True)
    os.mkfifo(run / name)
    one_line(capsys, run)
    assert not in_use(run)
    if "lock" in name:
        with pytest.raises(UserError, match=".run.lock, the lock of .*, is not a file"), locked(run):
            pass
    assert not checkpoints.found(run / "checkpoints", checkpoints.UPDATE)
    assert not checkpoints.intact(run / "checkpoints" / "checkpoint_last.pt")


@pytest.mark.parametrize("text", ["[]", "3", '{"submission": "a"}', '{"submission": [], "task": 1}',
                                  '{"submission": "a", "task": "1"}', DEEP])
def test_claims(text, tmp_path):
    """A claim that is none is refused by its path."""
    claims.claim_path(tmp_path / "run").write_text(text)
    with pytest.raises(UserError, match=".run.job"):
        claims.jobs_of(tmp_path / "run", {})


def test_two_names_of_a_directory(tmp_path):
    """A directory and a link to it are one: whoever is at work in it by one name keeps others out by the other."""
    (tmp_path / "disk" / "run").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "run")
    (tmp_path / "empty").symlink_to(tmp_path / "disk" / "new")
    for one, other in (("link", "disk/run"), ("disk/run", "link"), ("empty", "disk/new")):
        with locked(tmp_path / one):
            assert in_use(tmp_path / other)
            with pytest.raises(UserError, match="another process is at work"), locked(tmp_path / other, patience=0):
                pass
        assert not in_use(tmp_path / other)
