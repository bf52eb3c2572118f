"""Every YAML file in configs/ builds, and with every norm, and says all of what the scripts read from it."""

import re

import pytest
import torch
from toy import ROOT

CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))

pytest.importorskip("fairseq")

from fairseq_powernorm.experiments import settings  # noqa: E402
from fairseq_powernorm.experiments.data import recipe  # noqa: E402
from fairseq_powernorm.experiments.errors import UserError  # noqa: E402
from fairseq_powernorm.experiments.evaluation import perplexity  # noqa: E402
from fairseq_powernorm.experiments.overrides import by_key  # noqa: E402
from fairseq_powernorm.experiments.paths import PLUGIN  # noqa: E402
from fairseq_powernorm.experiments.runs import compose  # noqa: E402


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A data directory with nothing but dictionaries, under every language that a benchmark names."""
    directory = tmp_path_factory.mktemp("data-bin")
    for path in CONFIGS:
        config = settings.load(path.stem)
        names = ["dict.txt"] if settings.is_lm(config) else [
            f"dict.{language}.txt" for language in (config.task.source_lang, config.task.target_lang)]
        for name in names:
            (directory / name).write_text("".join(f"w{i} 1\n" for i in range(60)))
    return directory


def built(benchmark, overrides):
    """(configuration, task, model, criterion), the model without memory for its parameters."""
    with torch.device("meta"):
        return compose.build(compose.compose(benchmark, overrides))


def benchmarks(lm):
    return [path.stem for path in CONFIGS if settings.is_lm(settings.load(path.stem)) == lm]


@pytest.mark.slow
@pytest.mark.parametrize("benchmark, arch, norm", [
    *(("ptb", settings.architectures("ptb")[0], norm) for norm in ("batch", "prepbn", "rms")),
    *((name, arch, "power") for name in benchmarks(lm=True) for arch in settings.architectures(name))])
def test_language_models_build(benchmark, arch, norm, data, tmp_path):
    """configs/BENCH.yaml + configs/BENCH/ARCH.yaml + train.sh's overrides = that architecture, NORM everywhere."""
    overrides = [f"common.user_dir={PLUGIN}", f"task.data={data}", f"checkpoint.save_dir={tmp_path}",
                 *compose.arch_overrides(benchmark, arch),
                 *compose.norm_overrides(settings.load(benchmark).model, norm, "all")]
    # Bands and sizes for a dictionary of 60 words: the real ones are of another test.
    if "wiki103" in arch:
        overrides += [f"+model.adaptive_{part}_cutoff='20,40'" for part in ("softmax", "input")]
        overrides += ["+model.decoder_layers=1", "+model.decoder_ffn_embed_dim=64"]
    config, task, model, criterion = built(benchmark, overrides)
    assert (config.model._name, type(task).__name__) == (arch, "LanguageModelingPNTask")
    assert compose.norms_of(config.model) == (norm, "all")
    layer = model.decoder.layers[0]
    from fairseq_powernorm.norms import NORMS

    assert type(layer.self_attn_layer_norm) is type(layer.final_layer_norm) is NORMS[norm]
    assert config.model.norm_warmup_updates == config.lr_scheduler.warmup_updates, "the warm-up is one number"
    assert type(criterion).__name__ == ("AdaptiveLoss" if model.decoder.adaptive_softmax else "CrossEntropyCriterion")
    perplexity.check(config)


@pytest.mark.parametrize("path", sorted(
    path for path in (ROOT / "configs").glob("*/*.yaml") if path.parent.name not in ("launcher", "data", "generic")),
    ids=lambda path: path.stem)
def test_files_of_architectures(path):
    """configs/BENCH/ARCH.yaml begins as configs/BENCH.yaml does and chooses the architecture that it is named after."""
    package, launch = path.read_text(encoding="utf-8").split("\n")[:2]
    assert package == "# @package _global_"
    assert launch.startswith(f"# bash scripts/train.sh {path.parent.name} ") and launch.endswith(f" --arch {path.stem}")
    config = compose.compose(path.parent.name, compose.arch_overrides(path.parent.name, path.stem))
    assert config.model._name == path.stem


def test_data_settings():
    """Each translation benchmark has a file of data settings that the scripts take, and no language model has one; none of
    them goes through hydra, which would export it into every training process."""
    assert sorted(path.stem for path in (ROOT / "configs" / "data").glob("*.yaml")) == benchmarks(lm=False)
    for name in benchmarks(lm=False):
        assert recipe.checked(name, settings.data_settings(name)) == settings.data_settings(name)
    for name in benchmarks(lm=True):
        assert settings.data_settings(name) == {}
    for path in (ROOT / "configs").rglob("*.yaml"):
        assert "env_set" not in path.read_text(encoding="utf-8"), path


@pytest.mark.parametrize("change, message", [
    ({"bpe_sise": 3}, "configs/data/demo.yaml: 'bpe_sise' is unknown; valid: bpe, bpe_size, "),
    ({"bpe_size": "many"}, "configs/data/demo.yaml: bpe_size: 'many' is str, not int"),
    ({"lowercase": 1}, "lowercase: 1 is int, not bool"),
    ({"clean_max": True}, "clean_max: True is bool, not int"),
    ({"clean_ratio": None}, "clean_ratio: None is NoneType, not float"),
    ({"bpe": None}, "bpe: None is NoneType, not str"),
    ({"bpe_size": 0}, "bpe_size: 0 is out of range; valid: 1 or more"),
    ({"valid_every": -3}, "valid_every: -3 is out of range; valid: 1 or more"),
    ({"clean_ratio": float("nan")}, "clean_ratio: nan is out of range; valid: 1 or more"),
    ({"cleaning": "authors", "clean_max": 80}, "clean_max: cleaning 'authors' sets it; give one of the two"),
    ({}, "configs/data/demo.yaml: bpe is missing"),
])
def test_wrong_data_settings(change, message):
    """A misspelt, missing or mistyped data setting is refused by name; a whole number serves where a fraction may stand."""
    found = {**settings.data_settings("demo"), **change} if change else {}
    with pytest.raises(UserError) as error:
        recipe.checked("demo", found)
    assert message in str(error.value)
    assert recipe.checked("demo", {**settings.data_settings("demo"), "clean_ratio": 2})["clean_ratio"] == 2.0


@pytest.mark.slow
@pytest.mark.parametrize("benchmark, norm, placement", [
    *(("demo", norm, "all") for norm in ("batch", "prepbn", "rms")), ("demo", "layer", "encoder"),
    ("iwslt14", "prepbn", "encoder"),
    *((name, "power", placement) for name in benchmarks(lm=False) for placement in settings.PLACEMENTS)])
def test_builds(benchmark, norm, placement, data, tmp_path):
    """configs/BENCH.yaml + train.sh's overrides = task, model and criterion, with NORM where the placement says."""
    overrides = [f"common.user_dir={PLUGIN}", f"task.data={data}", f"checkpoint.save_dir={tmp_path}",
                 *compose.norm_overrides(settings.load(benchmark).model, norm, placement)]
    if settings.load(benchmark).model._name.endswith("_big"):
        overrides += ["+model.encoder_layers=1", "+model.decoder_layers=1"]
    if norm == "prepbn" and not settings.load(benchmark).optimization.max_update:
        overrides.append("+model.norm_total_updates=100000")
    config, task, model, criterion = built(benchmark, overrides)
    assert compose.norms_of(config.model) == (norm, "encoder" if norm == "layer" else placement)
    assert (type(task).__name__, type(criterion).__name__) == (
        "TranslationPNTask", "LabelSmoothedCrossEntropyCriterion")
    encoder, decoder = type(model.encoder.layers[0].self_attn_layer_norm), type(model.decoder.layers[0].self_attn_layer_norm)
    assert (encoder is decoder) == (norm == "layer" or placement == "all")
    if "warmup_updates" in config.lr_scheduler:
        assert config.model.norm_warmup_updates == config.lr_scheduler.warmup_updates, "the warm-up is one number"


@pytest.mark.parametrize("benchmark, arch, overrides", [
    *((name, settings.architectures(name)[0], []) for name in ("demo", "multi30k", "iwslt14")),
    *(("ptb", arch, ["dataset.batch_size=7", "+optimizer.adam_eps=0.125"]) for arch in settings.architectures("ptb"))])
def test_differences_are_all_of_a_configuration(benchmark, arch, overrides, data, tmp_path):
    """The settings that a record keeps, filled up with fairseq's own defaults, are the settings of the run."""
    from fairseq.dataclass.configs import FairseqConfig
    from fairseq.dataclass.initialize import add_defaults
    from omegaconf import OmegaConf

    paths = [f"common.user_dir={PLUGIN}", f"task.data={data}", f"checkpoint.save_dir={tmp_path}"]
    config, *_ = built(benchmark, [*paths, *compose.arch_overrides(benchmark, arch), *overrides])
    kept = compose.differences(config)
    defaults = OmegaConf.create(OmegaConf.to_container(OmegaConf.structured(FairseqConfig), enum_to_str=True))
    defaults.merge_with({group: {"_name": value["_name"]} for group, value in kept.items() if "_name" in value})
    add_defaults(defaults)
    whole = OmegaConf.merge(OmegaConf.to_container(defaults, enum_to_str=True), kept, OmegaConf.from_dotlist(paths))
    whole, wanted = OmegaConf.to_container(whole, resolve=True), OmegaConf.to_container(config)
    for group, value in wanted.items():
        if isinstance(value, dict):
            assert {key: whole[group].get(key) for key in value} == value
        else:
            assert whole.get(group) == value
    leaves = sum(len(group) if isinstance(group, dict) else 1 for group in kept.values())
    assert leaves < 80 and str(tmp_path) not in str(kept)
    assert kept["model"]["_name"] == arch
    assert all(OmegaConf.select(OmegaConf.create(kept), key) is not None for key in by_key(overrides))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_header(path):
    """The head of each YAML file is hydra's package line and then the command that uses the file."""
    package, launch = path.read_text(encoding="utf-8").split("\n")[:2]
    assert package == "# @package _global_"
    assert launch.startswith(f"# bash scripts/train.sh {path.stem} ")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_checkpoints_are_bounded(path):
    """Each benchmark keeps a bounded number of checkpoints, the ones that are averaged, and drops no last batch."""
    config = compose.compose(path.stem, [])
    from fairseq_powernorm.experiments.runs import checkpoints

    _, number = checkpoints.kept(config)
    assert 1 < number <= 20
    assert config.dataset.required_batch_size_multiple == 1


def test_names_are_the_packages():
    """The norm names and options that the scripts know without importing the package are the package's."""
    from fairseq_powernorm.norms import NORMS
    from fairseq_powernorm.options import NORM_FIELDS

    assert tuple(NORMS) == settings.NORMS and set(settings.NORM_OPTIONS) <= set(NORM_FIELDS)


def test_misspelt_norm_option():
    """A norm option that does not exist is refused when a run is composed, not ignored."""
    with pytest.raises(UserError, match="norm_aplha"):
        compose.build(compose.compose("demo", [f"common.user_dir={PLUGIN}", "task.data=none",
                                               "checkpoint.save_dir=none", "+model.norm_aplha=0.5"]))


# ---- configs/README.md -----------------------------------------------------------------------------------------------


def parsed(text):
    """Values as a YAML file gives them."""
    from omegaconf import OmegaConf

    return OmegaConf.to_container(OmegaConf.create(f"value: {text}"))["value"]


def documented():
    """heading -> its tables in configs/README.md, each a list of {column: text}."""
    sections = re.split(r"^## (.*)\n", (ROOT / "configs" / "README.md").read_text(encoding="utf-8"), flags=re.M)
    found = {}
    for heading, text in zip(sections[1::2], sections[2::2]):
        tables = re.findall(r"(?:^\|.*\|\n)+", text, re.M)
        rows = [[[cell.strip() for cell in line.split("|")[1:-1]] for line in lines.splitlines()] for lines in tables]
        found[heading.strip("`")] = [[dict(zip(table[0], row)) for row in table[2:]] for table in rows]
    return found


def settings_in(table, column):
    """key -> value of the rows of a table that name settings: `a.b`, or `a.b`, `a.c` with a value each or one for all."""
    found = {}
    for row in table:
        keys = re.findall(r"`(\w+\.\w+)`", row["setting"])
        values = row[column].split(", ") if len(keys) > 1 else [row[column]]
        for key, value in zip(keys, values if len(values) == len(keys) else values * len(keys)):
            assert key not in found, f"{key} stands there twice"
            found[key] = parsed(value)
    return found


def settings_of_file(path):
    """key -> value of a YAML file, but for those that train.sh gives."""
    from omegaconf import OmegaConf

    content = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    return {f"{group}.{key}": value for group, inner in content.items() for key, value in inner.items() if value != "???"}


@pytest.mark.parametrize("path", [*CONFIGS, *sorted((ROOT / "configs" / "generic").rglob("*.yaml")), *sorted(
    path for path in (ROOT / "configs").glob("*/*.yaml") if path.parent.name not in ("launcher", "data", "generic"))],
    ids=lambda path: path.stem)
def test_every_setting_is_documented(path):
    """The tables of configs/README.md name each setting of a YAML file with its value, and no other."""
    sections, common = documented(), settings_in(documented()["Settings of all benchmarks"][0], "value")
    if path in CONFIGS or path.parent.name == "generic":
        wanted = settings_of_file(path)
        assert {key: wanted.pop(key) for key in common} == common
        assert settings_in(sections[path.stem][0], "ours") == wanted
    else:
        tables = sections[path.parent.name][1:]
        found = [settings_in(table, "ours") for table in tables]
        assert settings_of_file(path) in found, "the table of its architecture"


def test_every_data_setting_is_documented():
    """The table of data settings names each one of each benchmark with its value, and no other."""
    (table,) = documented()["The text"]
    for name in benchmarks(lm=False):
        told = {row["setting"].strip("`"): parsed(row[name]) for row in table if row[name]}
        assert told == settings.data_settings(name)
    assert {row["setting"].strip("`") for row in table} == {
        key for name in benchmarks(lm=False) for key in settings.data_settings(name)}
