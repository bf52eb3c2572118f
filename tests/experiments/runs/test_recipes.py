"""The recipes: each setting of configs/ against that of the authors' scripts, and the one rule for the batch."""

import math
import re

import pytest
import torch

pytest.importorskip("fairseq")

from fairseq_powernorm.experiments import settings
from fairseq_powernorm.experiments.errors import UserError
from fairseq_powernorm.experiments.paths import PLUGIN
from fairseq_powernorm.experiments.reports import matrix
from fairseq_powernorm.experiments.runs import batch, compose, train
from fairseq_powernorm.experiments.train import parse

#: The authors' settings, by the keys of fairseq's configuration. IWSLT14 and WMT14: the scripts that train them. PTB and
#: WikiText-103: the tensorized Transformer's. Baevski & Auli: the recipe in fairseq's examples/language_model for 8 GPUs.
#: Multi30k: Wu et al. (ACL 2021).
ADAM = {"optimizer._name": "adam", "optimizer.adam_betas": (0.9, 0.98)}
INVERSE_SQRT = {"lr_scheduler._name": "inverse_sqrt", "lr_scheduler.warmup_init_lr": 1e-7}
SMOOTHED = {"criterion._name": "label_smoothed_cross_entropy", "criterion.label_smoothing": 0.1}
TRANSLATION = {**ADAM, **INVERSE_SQRT, **SMOOTHED, "optimization.clip_norm": 0.0, "dataset.max_tokens": 4096,
               "model.share_all_embeddings": True, "model.norm_final_warmup_updates": 1000}
TENSORIZED = {"optimizer._name": "adam", "optimizer.adam_betas": (0.9, 0.999), "optimizer.weight_decay": 0.0,
              "lr_scheduler._name": "cosine", "lr_scheduler.min_lr": 0.0, "lr_scheduler.t_mult": 1,
              "optimization.lr": [0.00025], "optimization.clip_norm": 0.25, "optimization.update_freq": [1],
              "checkpoint.patience": -1, "model.norm_final_warmup_updates": 1000}
AUTHORS = {
    ("iwslt14", None): {
        **TRANSLATION, "optimizer.weight_decay": 0.0001, "lr_scheduler.warmup_updates": 8000,
        "model.norm_warmup_updates": 8000, "optimization.lr": [0.0015], "optimization.update_freq": [1],
        "optimization.max_update": 0, "optimization.max_epoch": 0, "checkpoint.keep_last_epochs": 5, "generation.beam": 5,
        "generation.lenpen": 1.0},
    ("wmt14", None): {
        **TRANSLATION, "optimizer.weight_decay": 0.0, "lr_scheduler.warmup_updates": 8000,
        "model.norm_warmup_updates": 8000, "optimization.lr": [0.003], "optimization.update_freq": [128],
        "optimization.max_update": 0, "optimization.max_epoch": 0, "checkpoint.keep_last_epochs": 10, "generation.beam": 4,
        "generation.lenpen": 0.6},
    ("multi30k", None): {
        **TRANSLATION, "lr_scheduler.warmup_updates": 2000, "optimization.lr": [0.005], "optimization.update_freq": [1],
        "optimization.max_update": 8000, "checkpoint.keep_last_epochs": 10, "generation.beam": 5,
        "checkpoint.patience": -1},
    ("ptb", None): {**TENSORIZED, "task.tokens_per_sample": 32, "dataset.batch_size": 120,
                    "optimization.max_update": 20000, "criterion._name": "cross_entropy"},
    ("wikitext103", None): {**TENSORIZED, "task.tokens_per_sample": 80, "dataset.batch_size": 60,
                            "optimization.max_update": 200000, "criterion._name": "adaptive_loss"},
    ("wikitext103", "transformer_lm_pn_wiki103"): {
        "optimizer._name": "nag", "optimizer.momentum": 0.99, "optimizer.weight_decay": 0.0,
        "lr_scheduler._name": "cosine", "lr_scheduler.warmup_updates": 16000, "lr_scheduler.warmup_init_lr": 1e-7,
        "lr_scheduler.min_lr": 0.0001, "lr_scheduler.t_mult": 2.0, "lr_scheduler.lr_period_updates": 270000,
        "lr_scheduler.lr_shrink": 0.75, "optimization.lr": [1.0], "optimization.max_update": 286000,
        "optimization.stop_min_lr": 1e-9, "optimization.clip_norm": 0.1, "optimization.update_freq": [8 * 3],
        "dataset.max_tokens": 3072, "dataset.batch_size": None, "task.tokens_per_sample": 3072,
        "task.sample_break_mode": "none", "distributed_training.ddp_backend": "legacy_ddp",
        "criterion._name": "adaptive_loss", "checkpoint.patience": -1, "model.norm_final_warmup_updates": 1000},
}
#: (dropout, attention dropout, activation dropout) of a layer
DROPOUTS = {("iwslt14", None): (0.3, 0.1, 0.1), ("wmt14", None): (0.3, 0.1, 0.1), ("multi30k", None): (0.3, 0.0, 0.0),
            ("wikitext103", "transformer_lm_pn_wiki103"): (0.3, 0.1, 0.1)}
#: the validation without a better loss, counted from the best one, with which training ends; the others train to the end
ENDS_AT = {"iwslt14": 6, "wmt14": 11}
EVERY = [(benchmark, arch if number else None) for benchmark in settings.benchmarks()
         for number, arch in enumerate(settings.architectures(benchmark))]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """(benchmark, arch) -> (resolved configuration, model) as train.sh builds it, of few words and layers."""
    directory, found = tmp_path_factory.mktemp("data-bin"), {}
    for name in ("dict.txt", "dict.de.txt", "dict.en.txt"):
        (directory / name).write_text("".join(f"w{i} 1\n" for i in range(60)))

    def build(benchmark, arch):
        if (benchmark, arch) not in found:
            config = settings.load(benchmark, arch)
            overrides = [f"common.user_dir={PLUGIN}", f"task.data={directory}", f"checkpoint.save_dir={directory}",
                         *compose.arch_overrides(benchmark, arch or config.model._name)]
            if "big" in config.model._name:
                overrides += ["+model.encoder_layers=1", "+model.decoder_layers=1"]
            if "wiki103" in config.model._name:
                overrides += ["+model.decoder_layers=1", "+model.decoder_ffn_embed_dim=64",
                              *(f"+model.adaptive_{part}_cutoff='20,40'" for part in ("softmax", "input"))]
            with torch.device("meta"):  # no memory for parameters
                config, _, model, _ = compose.build(compose.compose(benchmark, overrides))
            found[benchmark, arch] = config, model
        return found[benchmark, arch]

    return build


@pytest.mark.parametrize("key, authors", [
    pytest.param((benchmark, arch, key), value, id=f"{arch or benchmark}-{key}")
    for (benchmark, arch), values in AUTHORS.items() for key, value in values.items()])
def test_settings_are_the_authors(key, authors, built):
    """A setting of the resolved configuration = that of the authors' script."""
    from omegaconf import OmegaConf

    benchmark, arch, name = key
    ours = OmegaConf.select(built(benchmark, arch)[0], name)
    if isinstance(authors, tuple):
        ours = tuple(float(number) for number in re.findall(r"[\d.]+", str(ours)))
    assert ours == authors


@pytest.mark.parametrize("benchmark, arch", DROPOUTS, ids=lambda value: str(value))
def test_dropouts_are_the_authors(benchmark, arch, built):
    """The dropouts of each layer that is built = the authors'."""
    model = built(benchmark, arch)[1]
    for stack in filter(None, (getattr(model, "encoder", None), model.decoder)):
        for layer in stack.layers:
            found = (layer.dropout_module.p, layer.self_attn.dropout_module.p, layer.activation_dropout_module.p)
            assert found == DROPOUTS[benchmark, arch]


@pytest.mark.parametrize("benchmark, arch", EVERY, ids=lambda value: str(value))
def test_final_norms_warm_up(benchmark, arch, built):
    """The norms after the stacks warm up for 1,000 updates in every configuration, whatever the layers' norms do."""
    from fairseq_powernorm.norms import PowerNorm

    config, model = built(benchmark, arch)
    assert config.model.norm_final_warmup_updates == 1000
    for stack in filter(None, (getattr(model, "encoder", None), model.decoder)):
        final = getattr(stack, "layer_norm", None)
        assert not isinstance(final, PowerNorm) or final.warmup_updates == 1000
    layers = (getattr(model, "encoder", None) or model.decoder).layers
    assert layers[0].final_layer_norm.warmup_updates == config.lr_scheduler.warmup_updates


@pytest.mark.parametrize("benchmark, arch", EVERY, ids=lambda value: str(value))
def test_where_training_ends(benchmark, arch, built, monkeypatch):
    """By fairseq's own rule training ends at the sixth (IWSLT14) or eleventh (WMT14) validation in a row that is worse than
    the best, and no sooner; a better one starts the count anew. The others never end before their schedule."""
    from fairseq_cli.train import should_stop_early

    config = built(benchmark, arch)[0]
    for name in ("best", "num_runs"):
        monkeypatch.delattr(should_stop_early, name, raising=False)
    end = ENDS_AT.get(benchmark, math.inf)
    losses = [3.0, *[3.1] * min(end - 1, 60), 2.9, *[2.95] * min(end, 60)]
    stops = [should_stop_early(config, loss) for loss in losses]
    for name in ("best", "num_runs"):
        monkeypatch.setattr(should_stop_early, name, None, raising=False)  # undone: nothing of it is left
    assert stops == [False] * (len(losses) - 1) + [end < math.inf]
    assert end < math.inf or config.optimization.max_update > 0, "something ends training"


# ---- the batch -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("benchmark, arch", EVERY, ids=lambda value: str(value))
def test_ranks_share_out_the_batch(benchmark, arch, built):
    """Ranks x update_freq of a rank = update_freq of one GPU for each number of ranks that divides it; each other one is
    refused with those that do. What is said of an update names the same total for all of them."""
    config = built(benchmark, arch)[0]
    (stated,) = config.optimization.update_freq
    valid = [ranks for ranks in range(1, stated + 1) if stated % ranks == 0]
    totals = set()
    for ranks in range(1, 2 * stated + 2):
        if ranks in valid:
            assert [ranks * number for number in batch.update_freq(config, ranks)] == [stated]
            assert batch.overrides(config, ranks) == (
                [] if ranks == 1 else [f"optimization.update_freq=[{stated // ranks}]"])
            totals.add(batch.described(config, ranks).split(":")[0])
        else:
            with pytest.raises(UserError) as error:
                batch.update_freq(config, ranks)
            assert f"{ranks} ranks cannot share out optimization.update_freq=[{stated}]" in str(error.value)
            assert f"valid numbers of ranks: {', '.join(map(str, valid))}" in str(error.value)
    assert len(totals) == 1


@pytest.mark.parametrize("benchmark, arch, overrides, ranks, text", [
    ("wmt14", None, {}, 8, "an update takes 128 x 4096 = 524,288 tokens: 8 ranks x 4096 x update_freq 16"),
    ("wmt14", None, {}, 1, "an update takes 128 x 4096 = 524,288 tokens: 1 rank x 4096 x update_freq 128"),
    ("wikitext103", "transformer_lm_pn_wiki103", {}, 8,
     "an update takes 24 x 3072 = 73,728 tokens: 8 ranks x 3072 x update_freq 3"),
    ("ptb", None, {}, 1, "an update takes 1 x 120 = 120 blocks of 32 tokens: 1 rank x 120 x update_freq 1"),
    ("iwslt14", None, {"optimization.update_freq": [8], "dataset.max_tokens": 512}, 4,
     "an update takes 8 x 512 = 4,096 tokens: 4 ranks x 512 x update_freq 2"),
    ("iwslt14", None, {"optimization.update_freq": [16, 8]}, 8,
     "an update takes in epoch 1: 16 x 4096 = 65,536 tokens: 8 ranks x 4096 x update_freq 2; in epoch 2: 8 x 4096 = "
     "32,768 tokens: 8 ranks x 4096 x update_freq 1"),
    ("demo", None, {"dataset.max_tokens": None, "dataset.batch_size": 4, "optimization.update_freq": [4]}, 4,
     "an update takes 4 x 4 = 16 sentences: 4 ranks x 4 x update_freq 1"),
])
def test_what_an_update_takes(benchmark, arch, overrides, ranks, text):
    """The words for an update, of tokens, sentences and blocks, of one rank and several, in several epochs."""
    from omegaconf import OmegaConf

    config = settings.load(benchmark, arch)
    for key, value in overrides.items():
        OmegaConf.update(config, key, value)
    assert batch.described(config, ranks) == text


def test_a_refused_number_of_ranks_is_told_what_to_do():
    """The advice of a refusal is another statement of the same update, which that number of ranks can share out."""
    from omegaconf import OmegaConf

    for benchmark, ranks in (("iwslt14", 8), ("ptb", 6), ("demo", 64)):
        config = settings.load(benchmark)
        with pytest.raises(UserError) as error:
            batch.update_freq(config, ranks)
        advice = str(error.value).partition("the same updates of smaller batches: ")[2].split()
        other = OmegaConf.merge(config, OmegaConf.from_dotlist(advice))
        before, after = (batch.described(each, 1).partition(" = ")[2].split(":")[0] for each in (config, other))
        assert advice and before == after and len(batch.update_freq(other, ranks)) == 1


# ---- the rows --------------------------------------------------------------------------------------------------------


def test_the_papers_values_are_of_the_authors_norms():
    """The paper's BN is the authors' BN, a row of its own; no value of the paper stands beside masked BN."""
    assert all("batch" not in values and settings.BATCH_REFERENCE in values for values in matrix.PAPER.values())
    rows = [row.norm for row in matrix.rows(settings.load("iwslt14").model)]
    assert rows.count(settings.BATCH_REFERENCE) == 2 and "batch" in rows


@pytest.mark.parametrize("overrides, cpu, gpus, world", [
    ({}, False, 8, 1), ({}, False, 0, 1), ({}, True, 8, 1),
    ({"distributed_training.distributed_world_size": 4}, False, 8, 4),
    ({"distributed_training.distributed_world_size": 1}, True, 0, 1),
    ({"distributed_training.distributed_world_size": 4}, False, 2, None),
    ({"distributed_training.distributed_world_size": 4}, True, 8, None)])
def test_train_takes_one_gpu_unless_told_otherwise(overrides, cpu, gpus, world, monkeypatch):
    """train.sh is one rank however many GPUs there are, unless an override asks for more, which must be there."""
    import torch
    from omegaconf import OmegaConf

    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    config = OmegaConf.create({"common": {"cpu": cpu}, "distributed_training": {"distributed_world_size": max(1, gpus)}})
    for key, value in overrides.items():
        OmegaConf.update(config, key, value)
    if world is not None:
        assert train.check_world(config, overrides, None) == world
    else:
        with pytest.raises(UserError, match="distributed_world_size=4: .* use scripts/launch.sh --ranks 4"):
            train.check_world(config, overrides, None)


@pytest.mark.parametrize("norm, name", [
    ("power", "power-seed1"), ("batch:variant=reference", "batch-reference-seed1"),
    ("power:alpha_fwd=0.95,groups=2", "power-alpha_fwd-0.95-groups-2-seed1")])
def test_norms_with_options(norm, name, tmp_path, monkeypatch):
    """train.sh takes NAME:OPTION=VALUE, gives it to the model as it is, and its directory a name that every shell takes."""
    monkeypatch.setenv("PN_RUNS_ROOT", str(tmp_path))
    options, config = parse(["demo", norm])
    assert train.run_directory(options, config) == tmp_path / "demo" / name
    composed = compose.compose("demo", compose.norm_overrides(config.model, options.norm, options.placement))
    assert compose.norms_of(composed.model) == (norm, "encoder")
    with pytest.raises(UserError, match="norm 'btach' is unknown; valid: layer, "):
        parse(["demo", norm.replace(settings.norm_name(norm), "btach")])
