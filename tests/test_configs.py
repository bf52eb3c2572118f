"""Every YAML file in configs/ builds with every norm, and says all of what the scripts read from it."""

import pathlib
import subprocess

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))

pytest.importorskip("fairseq")

from fairseq_powernorm.experiments import settings  # noqa: E402
from fairseq_powernorm.experiments.evaluation import perplexity  # noqa: E402
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


def benchmarks(lm):
    return [path.stem for path in CONFIGS if settings.is_lm(settings.load(path.stem)) == lm]


@pytest.mark.parametrize("norm", settings.NORMS)
@pytest.mark.parametrize("benchmark, arch", [
    (name, arch) for name in benchmarks(lm=True) for arch in settings.architectures(name)])
def test_language_models_build(benchmark, arch, norm, data, tmp_path):
    """configs/BENCH.yaml + configs/BENCH/ARCH.yaml + train.sh's overrides = that architecture, NORM everywhere."""
    overrides = [f"common.user_dir={settings.PLUGIN}", f"task.data={data}", f"checkpoint.save_dir={tmp_path}",
                 *compose.arch_overrides(benchmark, arch),
                 *compose.norm_overrides(settings.load(benchmark).model, norm, "all")]
    # Bands and sizes for a dictionary of 60 words: the real ones are of another test.
    if "wiki103" in arch:
        overrides += [f"+model.adaptive_{part}_cutoff='20,40'" for part in ("softmax", "input")]
        overrides += ["+model.decoder_layers=1", "+model.decoder_ffn_embed_dim=64"]
    config, task, model, criterion = compose.build(compose.compose(benchmark, overrides))
    assert (config.model._name, type(task).__name__) == (arch, "LanguageModelingPNTask")
    assert compose.norms_of(config.model) == (norm, "all")
    layer = model.decoder.layers[0]
    from fairseq_powernorm.norms import NORMS

    assert type(layer.self_attn_layer_norm) is type(layer.final_layer_norm) is NORMS[norm]
    assert config.model.norm_warmup_updates == config.lr_scheduler.warmup_updates, "the warm-up is one number"
    assert type(criterion).__name__ == ("AdaptiveLoss" if model.decoder.adaptive_softmax else "CrossEntropyCriterion")
    perplexity.check(config)


@pytest.mark.parametrize("path", sorted(
    path for path in (ROOT / "configs").glob("*/*.yaml") if path.parent.name != "launcher"), ids=lambda path: path.stem)
def test_files_of_architectures(path):
    """configs/BENCH/ARCH.yaml begins as configs/BENCH.yaml does and chooses the architecture that it is named after."""
    package, launch = path.read_text(encoding="utf-8").split("\n")[:2]
    assert package == "# @package _global_"
    assert launch.startswith(f"# bash scripts/train.sh {path.parent.name} ") and launch.endswith(f" --arch {path.stem}")
    config = compose.compose(path.parent.name, compose.arch_overrides(path.parent.name, path.stem))
    assert config.model._name == path.stem


@pytest.mark.parametrize("placement", settings.PLACEMENTS)
@pytest.mark.parametrize("norm", settings.NORMS)
@pytest.mark.parametrize("benchmark", benchmarks(lm=False))
def test_builds(benchmark, norm, placement, data, tmp_path):
    """configs/BENCH.yaml + train.sh's overrides = task, model and criterion, with NORM where the placement says."""
    overrides = [f"common.user_dir={settings.PLUGIN}", f"task.data={data}", f"checkpoint.save_dir={tmp_path}",
                 *compose.norm_overrides(settings.load(benchmark).model, norm, placement)]
    if settings.load(benchmark).model._name.endswith("_big"):
        overrides += ["+model.encoder_layers=1", "+model.decoder_layers=1"]
    config, task, model, criterion = compose.build(compose.compose(benchmark, overrides))
    assert compose.norms_of(config.model) == (norm, "encoder" if norm == "layer" else placement)
    assert (type(task).__name__, type(criterion).__name__) == (
        "TranslationPNTask", "LabelSmoothedCrossEntropyCriterion")
    encoder, decoder = type(model.encoder.layers[0].self_attn_layer_norm), type(model.decoder.layers[0].self_attn_layer_norm)
    assert (encoder is decoder) == (norm == "layer" or placement == "all")
    if "warmup_updates" in config.lr_scheduler:
        assert config.model.norm_warmup_updates == config.lr_scheduler.warmup_updates, "the warm-up is one number"


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
    with pytest.raises(settings.UserError, match="norm_aplha"):
        compose.build(compose.compose("demo", [f"common.user_dir={settings.PLUGIN}", "task.data=none",
                                               "checkpoint.save_dir=none", "+model.norm_aplha=0.5"]))


def test_plain_commands_help():
    """Each script prints its own help without needing an environment, and nothing of its code."""
    commands = [path for folder in ("scripts", "tests/checks") for path in sorted((ROOT / folder).glob("*.sh"))]
    for script in [*commands, ROOT / "scripts" / "slurm" / "submit.sh"]:
        done = subprocess.run(["bash", str(script), "--help"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                              env={"PATH": "/usr/bin:/bin"})
        assert done.returncode == 0, done.stdout
        assert str(script.relative_to(ROOT)) in done.stdout and "set -euo" not in done.stdout, done.stdout
