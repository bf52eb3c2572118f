"""Text and settings of one's own: what is prepared and recorded, what a YAML file may say, what is refused."""

import json
import os
import re
import shutil
from argparse import Namespace

import pytest
from pipelines import contents, write_text
from toy import ROOT

pytest.importorskip("fairseq")

from omegaconf import OmegaConf

from fairseq_powernorm.experiments import (
    own,
    prepare as command,
    recipes,
    settings,
    train,
)
from fairseq_powernorm.experiments.data import bpe, own_text, stages
from fairseq_powernorm.experiments.data.prepare import prepare
from fairseq_powernorm.experiments.directories import resumable_directory
from fairseq_powernorm.experiments.errors import UserError
from fairseq_powernorm.experiments.evaluation.evaluate import available_subset
from fairseq_powernorm.experiments.paths import PLUGIN
from fairseq_powernorm.experiments.reports import matrix, reproduce
from fairseq_powernorm.experiments.runs import compose, records

pytestmark = pytest.mark.slow

SIDES = {"source": "de", "target": "en"}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """talks, German and English without a test text, each with its dictionary; novels, for a language model."""
    home = tmp_path_factory.mktemp("own")
    before = os.environ.get("PN_DATA_ROOT")
    os.environ["PN_DATA_ROOT"] = str(home / "data")
    write_text(home / "text", train=40, valid=5, test=5)
    (home / "novels").mkdir()
    for split in ("train", "valid", "test"):
        shutil.copy(home / "text" / f"{split}.en", home / "novels" / f"{split}.txt")
        if split == "test":
            for language in SIDES.values():
                (home / "text" / f"{split}.{language}").unlink()
    prepare("talks", text_dir=str(home / "text"), bpe_size=60, separate_dictionaries=True, **SIDES)
    prepare("novels", text_dir=str(home / "novels"), lm=True)
    yield home
    if before is None:
        del os.environ["PN_DATA_ROOT"]
    else:
        os.environ["PN_DATA_ROOT"] = before


def refusal(function, *arguments, **keywords):
    """The message of a refusal, which is one line."""
    with pytest.raises(UserError) as error:
        function(*arguments, **keywords)
    assert "\n" not in str(error.value)
    return str(error.value)


# ---- prepare.sh ------------------------------------------------------------------------------------------------------


def test_prepared_data_say_what_they_are(home):
    """prepared.json names task, languages and steps, and each source and output by its hash; without test text valid is
    scored; a language model's dictionary is the words.
    """
    stamp = json.loads((home / "data" / "talks" / "prepared.json").read_text())
    assert (stamp["task"], stamp["settings"]["languages"]) == ("translation", ["de", "en"])
    assert (stamp["settings"]["joined_dictionary"], stamp["settings"]["bpe_size"]) == (False, 60)
    assert stamp["sources"] == contents(home / "text") and stamp["sentences"] == {"train": 40, "valid": 5}
    assert {path.name for path in (home / "data" / "talks" / "data-bin").glob("*.idx")} == {
        f"{split}.de-en.{language}.idx" for split in ("train", "valid") for language in ("de", "en")}
    assert available_subset(home / "data" / "talks", None) == "valid"
    assert "valid: valid" in refusal(available_subset, home / "data" / "talks", "test")
    novels = json.loads((home / "data" / "novels" / "prepared.json").read_text())
    assert novels["task"] == "language_model" and available_subset(home / "data" / "novels", None) == "test"
    words = {word for line in (home / "novels" / "train.txt").read_text().splitlines() for word in line.split()}
    dictionary = (home / "data" / "novels" / "data-bin" / "dict.txt").read_text().splitlines()
    assert {line.split()[0] for line in dictionary} >= words


def test_prepared_again(home, capsys, monkeypatch):
    """The same once more, also by name alone, is nothing to do; other options, text or task are refused; nothing changes."""
    before = contents(home / "data")
    prepare("talks", text_dir=str(home / "text"), bpe_size=60, separate_dictionaries=True, **SIDES)
    prepare("talks")
    assert capsys.readouterr().out.count("nothing to do") == 2
    again = {"text_dir": str(home / "text"), "separate_dictionaries": True, **SIDES}
    assert "bpe_size is 60, asked for 10000" in refusal(prepare, "talks", **again)
    assert "for translation, asked for language_model" in refusal(prepare, "talks", lm=True, text_dir=str(home / "novels"))
    assert contents(home / "data") == before
    monkeypatch.setattr("fairseq_powernorm.experiments.data.prepare.locked", None)  # data that are shared need no lock
    prepare("novels", text_dir=str(home / "novels"), lm=True)
    assert "nothing to do" in capsys.readouterr().out


def test_interrupted(home, tmp_path, monkeypatch, capsys):
    """What is interrupted appears nowhere but in its place for unfinished data; the next run goes on after the stages that
    are whole, one with another text begins anew.
    """
    (tmp_path / "train.txt").write_text("a b\n")

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(stages, "binarize", interrupt)
    texts = ("a b\n", "a b\n", "b a\n")
    for text in texts:
        (tmp_path / "valid.txt").write_text(text)
        with pytest.raises(KeyboardInterrupt, match="the next run goes on after them"):
            prepare("short", lm=True, text_dir=str(tmp_path))
        assert "short" not in own.names() and (home / "data" / ".short.partial" / "raw" / "valid.txt").read_text() == text
    told = capsys.readouterr().out
    assert told.count("[1/2] text: done already") == told.count("which an interrupted run with other settings left") == 1


@pytest.mark.parametrize("name, options, message", [
    ("talks/../..", {}, "'talks/../..' is no name; valid: letters, digits"),
    (".hidden", {}, "is no name"),
    ("my.yaml", {}, "is no name"),
    ("downloads", {}, "has a meaning of its own"),
    ("multi3k", {}, "'multi3k' is unknown; valid: demo, "),
    ("new", {"text_dir": "x"}, "--source is missing: text of your own needs --source LANG and --target LANG"),
    ("new", {"source": "de"}, "--target is missing"),
    ("new", {"source": "de", "target": "de"}, "--source and --target are both 'de'"),
    ("new", {"source": "de/../x", "target": "en"}, "--source 'de/../x' is no language"),
    ("new", {"source": "de", "target": "${oc.env:HOME}"}, "is no language"),
    ("new", SIDES, "--text-dir is missing: new is no benchmark (demo, "),
    ("new", {**SIDES, "archive": "x.tgz"}, "--archive 'x.tgz' is for benchmarks"),
    ("new", {"lm": True, "bpe_size": 5}, "--bpe-size 5: the text of a language model (--lm) is used word by word"),
    ("new", {"lm": True, "source": "de"}, "--source 'de': the text of a language model"),
    ("talks", {"bpe_size": 5}, "--source is missing"),  # prepared already, with other options
    ("talks", {"force": True}, "--source is missing"),
    ("talks", {"archive": "x.tgz"}, "--archive 'x.tgz' is for benchmarks"),
    ("novels", {"lm": True}, "--text-dir is missing"),
    ("demo", {"source": "de"}, "--source 'de' is for text of your own; demo is a benchmark"),
    ("demo", {"clean": True}, "--clean is for text of your own"),
])
def test_wrong_options(name, options, message, home):
    """A name that is none, and options that are missing or do not fit, are refused in one line."""
    assert message in refusal(prepare, name, **options)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"schema": 2}'])
def test_damaged_stamp(content, tmp_path, capsys):
    """Where what an interrupted run left does not say what it is, the next one begins anew."""
    left = tmp_path / ".data.partial"
    (left / "raw").mkdir(parents=True)
    (left / "prepared.json").write_text(content)
    request = {"schema": 2, "sources": {"text": None}}
    with resumable_directory(tmp_path / "data", request):
        assert os.listdir(left) == ["prepared.json"] and json.loads((left / "prepared.json").read_text()) == request
    assert "other settings left" in capsys.readouterr().out


def test_text_that_changes_meanwhile(home, tmp_path, monkeypatch):
    """Text that is no longer what was looked through when it has been copied is refused, and makes no data."""
    for split in ("train", "valid"):
        (tmp_path / f"{split}.txt").write_text("a b\n")
    write = own_text.UserText.write

    def slow(text, directory):
        (tmp_path / "train.txt").write_text("a b c\n")
        write(text, directory)

    monkeypatch.setattr(own_text.UserText, "write", slow)
    assert "changed while it was being read" in refusal(prepare, "changing", lm=True, text_dir=str(tmp_path))
    assert not list((home / "data").glob(".changing*/")) and "changing" not in own.names()


@pytest.mark.parametrize("change, message", [
    ({"train.de": None}, "lacks train.de; it must hold train.de, train.en, "),
    ({"test.en": None}, "lacks test.en"),
    ({"train.de": b""}, "train.de is empty"),
    ({"train.de": b"\n \n"}, "train.de, line 1: empty"),
    ({"valid.en": b"one\n"}, "unequal line counts: "),
    ({"train.en": b"one\r\ntwo\r\n"}, "train.en, line 1: ends in CR LF, as on Windows"),
    ({"train.en": b"one\ntw\ro\n"}, "train.en, line 2: has a CR"),
    ({"train.en": b"one\ntw\0o\n"}, "train.en, line 2: has a null character"),
    ({"train.en": b"\xef\xbb\xbfone\ntwo\n"}, "train.en, line 1: begins with a byte order mark"),
    ({"train.en": b"one\nt\xe9\n"}, "train.en, line 2: not valid UTF-8"),
    ({"train.en": b"one\n\n"}, "train.en, line 2: empty; a sentence has words. --clean drops such pairs"),
    ({"train.en": b"one\n" + b"w " * 1001 + b"\n"}, "train.en, line 2: 1,001 words"),
    ({"train.en": b"one\n" + b"w" * 10001}, "line 2: 1 words, 10,001 characters; a sentence has 1,000 and 10,000"),
    ({"train.en": b"eins\nzwei\n"}, "train.de and {}/train.en are the same text"),
])
def test_wrong_text(change, message, tmp_path):
    """Text that cannot be trained on is refused in one line with the file and the line, before anything is made."""
    for split in ("train", "valid", "test"):
        (tmp_path / f"{split}.de").write_bytes(b"eins\nzwei\n")
        (tmp_path / f"{split}.en").write_bytes(b"one\ntwo\n")
    for name, content in change.items():
        (tmp_path / name).unlink()
        if content is not None:
            (tmp_path / name).write_bytes(content)
    found = refusal(own_text.UserText(tmp_path, ["de", "en"]).identity)
    assert message.format(tmp_path) in found and str(tmp_path) in found


@pytest.mark.parametrize("kind, line, message", [
    ("subword_nmt", "ein Ha@@ us", "@@ at the end of a word"), ("subword_nmt", "Haus@@", "@@ at the end of a word"),
    ("sentencepiece", "\u2581ein \u2581Haus", "the character \u2581 (U+2581)"),
    ("subword_nmt", "a@@b @@c \u2581", None), ("sentencepiece", "ein Ha@@ us", None), (None, "ein Ha@@ us \u2581", None)])
def test_text_that_is_split_already(kind, line, message, tmp_path):
    """Without a tokenizer, the marks of another BPE would be taken out of translations with those of ours, but stay in the
    reference; in a language model's text they are part of the words."""
    (tmp_path / "text").write_text(f"gut\n{line}\n", encoding="utf-8")
    words = dict(sentences=kind is not None, plain=True, bpe=kind)
    if message is None:
        assert own_text.check_text(tmp_path / "text", **words) == 2
    else:
        assert f"text, line 2: has {message}" in refusal(own_text.check_text, tmp_path / "text", **words)


@pytest.mark.parametrize("text", ["a b \u4e2d", "ab cd"])
def test_nothing_to_merge(text, tmp_path):
    """A text in which no word has two characters, or no two of them come twice, makes a BPE without merges."""
    (tmp_path / "text").write_text(f"{text}\n", encoding="utf-8")
    bpe.learn_subword_nmt([tmp_path / "text"], tmp_path, 10)
    assert (tmp_path / "codes").read_text() == "#version: 0.2\n"
    assert bpe.apply_subword_nmt(tmp_path, ["a \u4e2d bc"]) == ["a \u4e2d b@@ c"]


def test_texts_that_are_the_same(tmp_path, capsys):
    """Nobody is told a score of the training text without a word."""
    for split in ("train", "valid", "test"):
        (tmp_path / f"{split}.txt").write_text("another\n" if split == "test" else "the same\n")
    (tmp_path / "copy").mkdir()
    own_text.UserText(tmp_path, ["txt"]).write(tmp_path / "copy")
    assert capsys.readouterr().out == "  NOTE: train.txt and valid.txt are the same text\n"


def test_packed_and_endless_text(tmp_path, monkeypatch):
    """Files that are packed are named; a line without an end is refused when it is longer than a line may be; a language
    model's text may have empty lines, and --clean forgives them in training text.
    """
    (tmp_path / "train.txt.gz").touch()
    (tmp_path / "valid.txt").write_text("a\n\nb\n")
    text = own_text.UserText(tmp_path, ["txt"], plain=True)
    assert "lacks train.txt; " in refusal(text.identity) and "unpack train.txt.gz" in refusal(text.identity)
    (tmp_path / "train.txt").write_text("w " * 50 + "\n")
    assert set(text.identity()) == {"train.txt", "valid.txt"}
    (tmp_path / "test.txt").write_text("a\nb </s> c\n")
    assert "test.txt, line 2: the word '</s>' is fairseq's own; replace it in the text" in refusal(text.identity)
    monkeypatch.setattr(own_text, "LONGEST_LINE", 99)
    assert "train.txt, line 1: more than 99 bytes; break the text into lines" in refusal(text.identity)
    assert own_text.check_text(tmp_path / "valid.txt", sentences=True, forgiving=True) == 3
    assert "valid.txt, line 2: empty" in refusal(own_text.check_text, tmp_path / "valid.txt", sentences=True)


# ---- a recipe --------------------------------------------------------------------------------------------------------


def composed(subject, *overrides, data="none"):
    paths = [f"common.user_dir={PLUGIN}", f"task.data={data}", "checkpoint.save_dir=none"]
    return compose.compose(subject, [*paths, *overrides])


def test_data_by_name(home):
    """Prepared data by name are trained with the settings of configs/generic/, their languages and dictionaries; with every
    architecture that --arch offers a model is built.
    """
    assert own.names() == ["novels", "talks"]
    for name, encoder in (("talks", True), ("novels", False)):
        for arch in settings.architectures(name):
            places = compose.norm_overrides(settings.load(name).model, "power", "all")
            overrides = [*compose.arch_overrides(name, arch), *places, "+model.decoder_layers=1"]
            overrides += ["+model.encoder_layers=1"] if encoder else []
            config, _, model, _ = compose.build(composed(name, *overrides, data=home / "data" / name / "data-bin"))
            assert config.model._name == arch and compose.norms_of(config.model) == ("power", "all")
            if encoder:
                assert (config.task.source_lang, config.task.target_lang) == ("de", "en")
                assert model.encoder.embed_tokens is not model.decoder.embed_tokens
                assert model.decoder.output_projection.weight is model.decoder.embed_tokens.weight
    assert settings.architectures("talks")[0] == "transformer_pn_iwslt_de_en" and len(settings.architectures("talks")) == 3


def write(folder, text, name="my.yaml"):
    (folder / name).write_text(text)
    return str(folder / name)


def test_the_example_of_the_readme(home, tmp_path):
    """The example of configs/README.md composes to what it says, and what it leaves out is the base's."""
    section = (ROOT / "configs" / "README.md").read_text().split("## Settings of your own")[1]
    text = re.search(r"```yaml\n(.*?)```", section, re.S)[1]
    path = write(tmp_path, text)
    found = settings.recipe(path)
    assert (found.name, found.data, found.base) == ("talks-wide", "talks", "translation")
    stated = OmegaConf.to_container(OmegaConf.create(text))
    config, loaded = composed(path), settings.load(path)
    for group in set(stated) - set(own.OWN_KEYS):
        for key, value in stated[group].items():
            assert OmegaConf.to_container(config)[group][key] == value == loaded[group][key], f"{group}.{key}"
    base = settings.load("talks")
    assert config.optimization.max_update != base.optimization.max_update
    assert config.generation.beam == 5 and config.lr_scheduler.warmup_updates == config.model.norm_warmup_updates == 4000
    assert config.dataset.num_workers == 0 and config.task.source_lang == "de"
    for key in own.OWN_KEYS:
        assert f"{key}: " in text


def test_bases(home, tmp_path):
    """A file builds on the base that it names, an architecture of a benchmark included; by default on that of its data. What
    an implementation that it chooses does not know is left out; values that are not given (???) and groups without
    content count as not there.
    """
    path = write(tmp_path, "data: novels\nbase: ptb/transformer_lm_pn_ptb\noptimizer: {_name: nag, momentum: 0.9}\ntask:\n")
    config = composed(path)
    assert (config.model._name, config.task.tokens_per_sample) == ("transformer_lm_pn_ptb", 32)
    assert (config.optimizer._name, config.optimizer.momentum) == ("nag", 0.9)
    assert settings.architectures(path) == ("transformer_lm_pn_ptb",)
    path = write(tmp_path, "data: multi30k\noptimizer: {_name: nag}\ncommon:\n  user_dir: ???\n")
    config = composed(path)
    assert config.model.dropout == 0.3 and settings.load(path).lr_scheduler.warmup_updates == 2000
    assert config.task.source_lang == "en" and "adam_betas" not in config.optimizer
    shutil.copy(ROOT / "configs" / "multi30k.yaml", tmp_path / "copy.yaml")
    assert "task.source_lang is 'en', but that of the data is 'de'" in refusal(settings.recipe, write(
        tmp_path, "data: talks\n" + (tmp_path / "copy.yaml").read_text()))
    text = (tmp_path / "copy.yaml").read_text().replace("source_lang: en", "").replace("target_lang: de", "")
    copied = settings.load(write(tmp_path, text.replace("share_all_embeddings: true", ""), "talks.yaml"))
    assert (copied.optimization.max_update, copied.task.source_lang) == (8000, "de")


@pytest.mark.parametrize("text, message", [
    ("data: talks\nmodel: {dropuot: 0.1}", "there is no setting model.dropuot of transformer_pn_iwslt_de_en; did you mean "
                                           "model.dropout?; model has activation_dropout, "),
    ("data: talks\noptimisation: {lr: [0.1]}", "there is no group 'optimisation'; valid: base, "),
    ("data: talks\noptimization: {lr: 0.1}", "optimization.lr is a list: [0.1]"),
    ("data: talks\noptimization: 5", "optimization: 5 is not a group of settings"),
    ("data: talks\nmodel: {dropout: {a: 1}}", "model.dropout: {'a': 1} is a dict; valid: a number"),
    ("data: talks\noptimizer: {_name: adamm}", "optimizer._name 'adamm' is unknown; valid: adam, "),
    ("data: talks\ntask: {_name: language_modeling_pn}", "task._name 'language_modeling_pn': the data are for translation"),
    ("data: talks\ntask: {target_lang: fr}", "task.target_lang is 'fr', but that of the data is 'en'; leave it out"),
    ("data: talks\nbase: iwslt", "base 'iwslt' is unknown; valid: translation, language_model, demo, "),
    ("data: talks\nbase: ptb", "base 'ptb' and data 'talks' do not go together: talks is text for translation"),
    ("data: talks\nbase: ptb/lstm", "base 'ptb/lstm' is unknown; valid: ptb, ptb/transformer_lm_pn_ptb"),
    ("data: tolks", "data 'tolks' is not prepared; valid: novels, talks, demo, "),
    ("data: 7", "data is 7; valid: a name"),
    ("data: ../talks", "data '../talks' is not prepared"),
    ("data: talks\nname: ../x", "name '../x' is no name"),
    ("data: talks\nname: iwslt14", "name 'iwslt14' is the name of a benchmark"),
    ("", "data 'my', by the file's name, is not prepared; valid: novels, "),
    ("- data", "holds no settings"),
    ("data: [", "not YAML: "),
    ("data: talks\ncommon: !!python/object/apply:os.system [id]", "not YAML: "),
    ("data: talks\na: &a {b: 1}\nc: *a", "has an alias 'a', which stands for another part"),
    ("data: talks\ndata: talks", "not YAML: "),
    ("data: talks\ncommon: {user_dir: /tmp/evil}", "common.user_dir"),
    ("data: talks\ncheckpoint: {save_dir: /tmp/evil}", "is this command's own; use --run-dir DIR"),
    ("data: talks\ncommon: {seed: '${oc.env:HOME}'}", "an interpolation must be all of a value, and that of another"),
    ("data: talks\noptimizer: {adam_betas: \"__import__('os')\"}", "reads like Python code, which fairseq evaluates"),
    ("data: talks\ncommon: {log_file: /etc/x}", "must be the name of a file in the run's directory"),
    ("data: talks\noptimization: {clip_norm: .nan}", "optimization.clip_norm: hydra cannot be told nan"),
    ("data: talks\noptimisation:", "there is no group 'optimisation'; valid: base, "),
    ("data: talks\nmodel: {_name: null}", "model._name is None; valid: a name"),
    ("data: talks\noptimizer: {_name: [adam]}", "optimizer._name is ['adam']; valid: a name"),
    ("data: talks\ncommon: {seed: many}", "common.seed is 'many': Value 'many' of type 'str' could not be converted to"),
    ("data: talks\ncheckpoint: {keep_interval_updates: null}", "keep_interval_updates is None: field"),
    ("data: talks\nlr_scheduler: {warmup_updates: 1.5}", "lr_scheduler.warmup_updates is 1.5: Value '1.5' of type"),
    ("data: talks\noptimization: {update_freq: many}", "optimization.update_freq is 'many': Invalid value"),
    ("data: talks\ncommon: {seed: '${no.thing}'}", "common.seed is '${no.thing}', which leads to no setting"),
    ("data: talks\ncommon: {seed: '${common.seed}'}", "common.seed is '${common.seed}', which leads to no setting"),
    ("data: talks\noptimization: {max_update: '${model._name}'}", "max_update is '${model._name}': Value 'transformer"),
    ("data: talks\noptimization: {lr: [0x" + "F" * 5000 + "]}", "optimization.lr: Exceeds the limit"),
    ("data: talks\ndistributed_training: {distributed_world_size: 4}", "is this command's own; use an override, or --ranks"),
    ("data: talks\nhydra: {run: {dir: /tmp}}", "there is no group 'hydra'"),
    ("data: talks\nmodel: {'dropout=1,model.x': 1}", "there is no setting model.dropout=1,model.x"),
])
def test_wrong_files(text, message, home, tmp_path):
    """What a file says that cannot be, or would be more than settings, is refused in one line that names the file."""
    found = refusal(settings.recipe, write(tmp_path, text))
    assert message in found and "my.yaml" in found


def test_no_files(home, tmp_path, monkeypatch):
    """A file that does not exist, a directory, another kind of file and one that is not UTF-8 are refused as such; so is the
    name of a benchmark. A relative path is one from where the user is.
    """
    monkeypatch.chdir(tmp_path)
    for path, message in (("none.yaml", "none.yaml does not exist; valid: a benchmark, demo"), ("./", "is a directory"),
                          ("./notes.txt", "ends in .yaml or .yml"), ("latin.yaml", "not YAML")):
        (tmp_path / "notes.txt").touch()
        (tmp_path / "latin.yaml").write_bytes(b"data: t\xe9\n")
        assert message in refusal(settings.recipe, own.subject("benchmark", path))
    assert "'ptb' is the name of a benchmark" in refusal(settings.recipe, write(tmp_path, "data: novels", "ptb.yaml"))
    write(tmp_path, "data: talks")
    options = train.parser().parse(["my.yaml", "power"])
    assert options.benchmark == str(tmp_path / "my.yaml") and settings.recipe(options.benchmark).name == "my"
    assert "benchmark 'tolks' is unknown; valid: demo, " in refusal(train.parser().parse, ["tolks", "power"])
    assert "prepared text of your own: novels, talks; or a YAML file" in refusal(train.parser().parse, ["tolks", "power"])


def test_overrides_of_a_file(home, tmp_path):
    """Overrides of the command line go before a file's; those of settings that the file adds take no plus sign; a flag of
    fairseq is answered with the override that the file's configuration takes.
    """
    path = write(tmp_path, "data: talks\noptimizer: {adam_eps: 1e-6}\nmodel: {dropout: 0.25}\n")
    assert composed(path).optimizer.adam_eps == 1e-6
    config = composed(path, "optimizer.adam_eps=0.125", "model.dropout=0.5", "+optimizer.use_old_adam=true")
    assert (config.optimizer.adam_eps, config.model.dropout, config.optimizer.use_old_adam) == (0.125, 0.5, True)
    assert "is there without being added" in refusal(composed, path, "+optimizer.adam_eps=0.125")
    assert "my.yaml has no optimizer.use_old_adam; to add it: +" in refusal(composed, path, "optimizer.use_old_adam=true")
    assert "optimizer.adam_eps=0.1" in refusal(train.parser().parse, [path, "power", "--adam-eps", "0.1"])


def test_numbers_in_quotes(home, tmp_path):
    """A number or a truth value in quotes is what it is without them, wherever the file is read; a text stays one."""
    path = write(tmp_path, 'data: talks\noptimization: {max_update: "1000", lr: ["1e-2"], update_freq: ["2"]}\n'
                           'common: {seed: "07", log_format: json}\ncheckpoint: {no_epoch_checkpoints: "no"}\n'
                           'task: {max_source_positions: "${optimization.max_update}"}\n'
                           'optimizer: {adam_betas: "(0.9, 0.98)"}')
    config = settings.load(path)
    assert (config.optimization.max_update, config.optimization.lr, config.optimization.update_freq) == (1000, [0.01], [2])
    assert config.common.seed == 7 and config.checkpoint.no_epoch_checkpoints is False
    assert config.optimizer.adam_betas == "(0.9, 0.98)" and config.task.max_source_positions == 1000
    options = options_of("table1", benchmark=path, rows="layer")
    reproduce.check(options)
    assert reproduce.chosen(options)[0].name == "layer-1000-seed1"
    assert composed(path).optimization.max_update == 1000


# ---- runs ------------------------------------------------------------------------------------------------------------


def run_of(subject, folder, monkeypatch):
    """What train.sh would write into run.json, and the options."""
    monkeypatch.setenv("PN_RUNS_ROOT", str(folder / "runs"))
    options = train.parser().parse([subject, "power"])
    from fairseq_powernorm.experiments.runs import train as training

    config = training.checked(options)
    run = training.run_directory(options, config)
    return training, options, run, recipes.prepared(settings.recipe(options.benchmark).data)[0]


def test_a_run_keeps_its_recipe(home, tmp_path, monkeypatch):
    """run.json holds name, data and what the file says; a run goes on with the same file only, and what is stored passes the
    checks of a file.
    """
    path = write(tmp_path, "data: talks\nmodel: {dropout: 0.25}\n")
    training, options, run, data = run_of(path, tmp_path, monkeypatch)
    assert run == tmp_path / "runs" / "my" / "power-seed1"
    facts = training.started(options, data, run)
    assert facts["benchmark"] == "my" and facts["recipe"]["base"] == "translation" and facts["recipe"]["data"] == "talks"
    assert "+model.dropout=0.25" in facts["recipe"]["overrides"]
    run.mkdir(parents=True)
    (run / "run.json").write_text(json.dumps(facts))
    assert training.started(options, data, run) == facts and records.data_of(facts) == "talks"
    write(tmp_path, "data: talks\nmodel: {dropout: 0.5}\n")
    os.utime(path, ns=(1, 1))  # however coarse the clock of the file system is
    message = refusal(training.started, options, data, run)
    assert "it was started with" in message and "model.dropout=0.25, now" in message
    for change, message in (({"data": "../talks"}, "'../talks' is no name"), ({"overrides": ["hydra.run.dir=/"]}, "hydra"),
                            ({"overrides": ["common.user_dir=/tmp/evil"]}, "is this command's own"), ({"data": 5}, "is 5")):
        (run / "run.json").write_text(json.dumps({**facts, "recipe": {**facts["recipe"], **change}}))
        assert message in refusal(records.read_run, run)
    (run / "run.json").write_text(json.dumps({**facts, "benchmark": ".."}))
    assert "'..' is no name" in refusal(records.read_run, run)


def options_of(subject, **given):
    names = ("benchmark", "archs", "norms", "rows", "seeds", "jobs", "slurm", "report_only", "gpus", "gpu_ids", "nodes",
             "time", "partition", "site", "log_dir", "tensorboard", "wandb", "updates")
    return Namespace(**{**dict.fromkeys(names), "overrides": [], "subject": subject, **given})


def test_reproduce_takes_them(home, tmp_path):
    """--benchmark takes names of data and files of the table's kind; runs are named after the file that they are given."""
    path = write(tmp_path, "data: talks\nmodel: {_name: transformer_pn_tiny}\noptimization: {max_update: 60}\n")
    options = options_of("table1", benchmark=f"talks,{path},demo", rows="layer,power", updates=30)
    reproduce.check(options)
    runs = reproduce.chosen(options)
    assert {run.key.rpartition("/")[0] for run in runs} == {"talks", "my", "demo"} and len(runs) == 3 * 2 * 3
    run = next(run for run in runs if run.benchmark == "my")
    assert run.name == "layer-30-seed1" and run.train_command()[:4] == ["bash", "scripts/train.sh", path, "layer"]
    assert "optimization.max_update=30" in run.overrides and run.evaluate_command(tmp_path)[2].endswith("my/layer-30-seed1")
    assert "about" in matrix.plan_line(run, tmp_path)
    for base, kept, average in (("iwslt14", "keep_last_epochs: 0", 1), ("demo", "keep_interval_updates: -1", 1),
                                ("demo", "keep_last_epochs: 7", 5)):  # demo has no checkpoints of epochs
        config = settings.load(write(tmp_path, f"data: talks\nbase: {base}\ncheckpoint: {{{kept}}}\n", "few.yaml"))
        assert matrix.average(str(tmp_path / "few.yaml"), config, 30) == average
    for subject, benchmark, message in (
        ("table2", path, "my is translation; its table is scripts/reproduce_table1.sh"),
        ("table1", "novels", "novels is a language model; its table is scripts/reproduce_table2.sh"),
        ("table1", "tolks", "'tolks' is unknown; valid: iwslt14, wmt14, multi30k, demo, text of your own, novels, talks"),
        ("table1", "ptb", "--benchmark 'ptb' is unknown"),
        ("table1", write(tmp_path, "data: talks\nmodel: {norm_groups: 4}", "groups.yaml"),
         "groups.yaml sets model.norm_groups, which tells rows of a table apart"),
        ("table1", f"{path},{tmp_path}/./my.yaml", "two of them have the name of their results in common"),
    ):
        assert message in refusal(reproduce.check, options_of(subject, benchmark=benchmark))


def test_help_says_what_is_expected():
    """prepare.sh --help shows both forms and the files."""
    text = " ".join(command.parser().format_help().split())
    for each in ("--source de --target en --text-dir DIR", "--lm --text-dir DIR", "train.de, train.en", "UTF-8", "optional"):
        assert each in text
