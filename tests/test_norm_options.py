"""Norms written with options of their own, ``NAME:OPTION=VALUE,...``, and the options for all norms of a model."""
import subprocess
import sys
from typing import Optional

import pytest
import toy
from fairseq import checkpoint_utils
from fairseq.dataclass import utils
from fairseq_cli import train
from omegaconf import OmegaConf, ValidationError
from torch import nn

from fairseq_powernorm.norms import NORMS, build_norm, default_groups, norm_options, parse_norm
from fairseq_powernorm.options import NormOptions
from fairseq_powernorm.tasks import LanguageModelingPNConfig, TranslationPNConfig

LM = {name: value for name, value in toy.SIZES.items() if not name.startswith("encoder")}


def norms(**options):
    """Position -> norm of a small model's encoder."""
    encoder = toy.build(**options).encoder
    layer = encoder.layers[-1]
    return dict(self=layer.self_attn_layer_norm, ff=layer.final_layer_norm, final=encoder.layer_norm)


@pytest.mark.parametrize("name", NORMS)
def test_what_is_not_given_is_left_to_the_norm(name):
    """Without options for all norms each norm has the settings of its own constructor, groups by the attention heads."""
    for each in norms(encoder_norm_self=name, encoder_norm_ff=name).values():
        given = dict(groups=default_groups(name, heads=4)) if "groups" in norm_options(name) else {}
        assert repr(each) == repr(NORMS[name](16, **given, **getattr(NORMS[name], "REQUIRED", {})))


@pytest.mark.parametrize(
    "options,position,expected",
    [
        (dict(encoder_norm_self="power:alpha_fwd=0.8"), "self", dict(alpha_fwd=0.8, alpha_bkw=0.9)),
        (dict(encoder_norm_self="power:alpha_fwd=0.8", norm_alpha_fwd=0.5, norm_alpha_bkw=0.6), "self",
         dict(alpha_fwd=0.8, alpha_bkw=0.6)),
        (dict(encoder_norm_self="power:alpha_fwd=0.8", norm_alpha_fwd=0.5), "ff", dict(alpha_fwd=0.5)),
        (dict(encoder_norm_ff="power:groups=2,variant=algorithm2"), "ff", dict(groups=2, variant="algorithm2")),
        (dict(encoder_norm_ff="power:groups=2", norm_groups=0), "self", dict(groups=0)),
        (dict(encoder_norm_ff="rms:eps=0.5", norm_eps=0.25), "ff", dict(eps=0.5)),
        # the final norm is that of the feed-forward blocks, but for what is said of it
        (dict(encoder_norm_ff="power:warmup_updates=3"), "final", dict(warmup_updates=3)),
        (dict(encoder_norm_ff="power:warmup_updates=3", norm_warmup_updates=5), "final", dict(warmup_updates=3)),
        (dict(encoder_norm_ff="power:warmup_updates=3", norm_final_warmup_updates=7), "final", dict(warmup_updates=7)),
        (dict(encoder_norm_ff="power:warmup_updates=3", norm_final_warmup_updates=7), "ff", dict(warmup_updates=3)),
        (dict(encoder_norm_final="power:warmup_updates=9", norm_final_warmup_updates=7), "final", dict(warmup_updates=9)),
        (dict(norm_warmup_updates=5), "final", dict(warmup_updates=5)),
        # a variant of PN's is none of BN's, though both have one of that name
        (dict(encoder_norm_ff="batch", norm_variant="reference"), "ff", dict(variant="masked", alpha_fwd=0.9)),
        (dict(encoder_norm_ff="batch:variant=reference"), "ff", dict(variant="reference", alpha_fwd=0.95, groups=1)),
        (dict(encoder_norm_ff="batch:variant=reference", norm_alpha_fwd=0.5), "ff", dict(alpha_fwd=0.5)),
    ],
)  # fmt: skip
def test_which_option_counts(options, position, expected):
    """What a norm's own text says goes before the options for all norms, these before what the norm has by itself."""
    norm = norms(**options)[position]
    assert {name: getattr(norm, name) for name in expected} == expected


@pytest.mark.parametrize("options,expected", [
    (dict(max_update=70), 70),
    (dict(max_update=70, norm_total_updates=50), 50),
    (dict(max_update=70, norm_total_updates=50, encoder_norm_self="prepbn:total_updates=30"), 30),
    (dict(max_update=0), None),
    ({}, None),
])
def test_the_length_of_the_run(options, expected):
    """PRepBN takes what its text says, else --norm-total-updates, else --max-update; without any it is refused."""
    options = {"encoder_norm_self": "prepbn", "norm_total_updates": None, **options}
    if expected is None:
        with pytest.raises(ValueError, match="--encoder-norm-self 'prepbn': total_updates=None: must be .*--max-update"):
            toy.build(**options)
    else:
        assert norms(**options)["self"].total_updates == expected


@pytest.mark.parametrize("config", [TranslationPNConfig, LanguageModelingPNConfig])
@pytest.mark.parametrize("text, expected", [("off", "off"), ("'off'", "off"), ("step", "step"), ("on", None)])
def test_words_that_yaml_reads_as_something_else(config, text, expected):
    """``norm_sync`` in a YAML file is what the flag is, though YAML reads off without quotes as false."""
    options = OmegaConf.create(f"norm_sync: {text}\n_name: x")
    if expected is None:
        with pytest.raises(ValidationError, match=r"expected one of \[off, step, exact\]"):
            utils.merge_with_parent(config(), options)
    else:
        assert str(utils.merge_with_parent(config(), options).norm_sync) == expected


@pytest.mark.parametrize("arch", ["transformer_lm_pn", "tensorized_lm_pn"])
def test_language_models(arch):
    """A language model takes the same texts."""
    model = toy.build(
        arch, sizes=dict(LM, max_target_positions=16), decoder_norm_self="batch:variant=reference",
        decoder_norm_ff="power:alpha_bkw=0.5",
    )  # fmt: skip
    layer = model.decoder.layers[0]
    assert layer.self_attn_layer_norm.variant == "reference" and layer.final_layer_norm.alpha_bkw == 0.5


def test_configurations_saved_before():
    """The options as checkpoints have them that were saved when each had a number: the same model as with none given."""
    before = dict(norm_alpha_fwd=0.9, norm_alpha_bkw=0.9, norm_warmup_updates=10000, norm_variant="reference", norm_eps=1e-5)
    for name in ("layer", "rms", "batch", "power-v", "power"):
        place = dict(encoder_norm_self=name, encoder_norm_ff=name)
        assert list(map(repr, norms(**place, **before).values())) == list(map(repr, norms(**place).values()))
    assert all(getattr(NormOptions(), name) is None for name in before)


@pytest.mark.parametrize("side", ["encoder", "decoder"])
@pytest.mark.parametrize("position", ["self", "ff", "final"])
@pytest.mark.parametrize(
    "text,message",
    [
        ("powr", "'powr': must be one of layer, rms, batch, power-v, power"),
        ("", "must be one of layer"),
        ("power:grops=2", "option 'grops' is unknown; options of 'power': eps, "),
        ("layer:groups=2", "option 'groups' is unknown; options of 'layer': eps, affine"),
        ("power:", "no OPTION=VALUE"),
        ("power:eps=small", "eps='small' must be a number"),
        ("power:alpha_fwd=2", r"alpha_fwd=2.0: must lie in \[0, 1\]"),
        ("power:variant=masked", "variant='masked': must be one of reference, algorithm2"),
        ("batch:groups=3", r"groups=3: must be 0 \(no layer scale\) or divide the 16 channels, one of \[1, 2, 4, 8, 16\]"),
        ("power:groups=-1", "groups=-1: must be 0"),
        ("power:groups=2.5", "groups='2.5' must be a whole number"),
        ("power:alpha_fwd=nan", "alpha_fwd=nan: must lie in"),
        ("power:affine=yes", "affine='yes' must be true or false"),
        ("power:variant=", "variant='' must be a word"),
        ("power:device=cpu", "option 'device' is unknown; options of 'power': eps, "),
        ("power:batch_first=true", "option 'batch_first' is unknown"),
        ("power:warmup_updates=1,warmup_updates=2", "given twice"),
        ("un:window=0", "window=0: must be 1 or more steps"),
        ("prepbn:total_updates=0", "total_updates=0: must be the number of training steps"),
    ],
)
def test_wrong_texts(side, position, text, message):
    """An error before anything is built, which names the flag, the value and what is valid."""
    with pytest.raises(ValueError, match=f"--{side}-norm-{position}.*{message}"):
        toy.build(**{f"{side}_norm_{position}": text})


@pytest.mark.parametrize(
    "name,options,message",
    [
        ("powr", {}, "norm 'powr': must be one of layer, rms"),
        ("power", dict(grops=2), "norm 'power': option 'grops' is unknown; options of 'power': eps, alpha_fwd, "),
        ("power", dict(groups="2"), "norm 'power': groups='2' must be a whole number"),
        ("power", dict(groups=True), "norm 'power': groups=True must be a whole number"),
        ("power", dict(groups=3), r"norm 'power': groups=3: must be 0 .* one of \[1, 2, 4, 8\]"),
        ("power", dict(eps=None), "norm 'power': eps=None must be a number"),
        ("power", dict(affine=1), "norm 'power': affine=1 must be true or false"),
        ("layer", dict(variant="paper"), "norm 'layer': variant='paper': must be one of algorithm2, masked, reference"),
        ("power:alpha_fwd=2", {}, r"norm 'power:alpha_fwd=2': alpha_fwd=2.0: must lie in \[0, 1\]"),
        ("power:groups=2", dict(dim=0), "norm 'power:groups=2': dim=0"),
    ],
)
def test_wrong_arguments(name, options, message):
    """build_norm refuses what it would otherwise pass over or a constructor would choke on, and names it."""
    with pytest.raises(ValueError, match=message):
        build_norm(name, **{"dim": 8, **options})


@pytest.mark.parametrize(
    "options,message",
    [
        (dict(encoder_norm_self="group", norm_groups=0), "--norm-groups 0: --encoder-norm-self .group.: groups=0: must"),
        (dict(encoder_norm_ff="group-scale:groups=3"), "^--encoder-norm-ff 'group-scale:groups=3': groups=3: must divide"),
        (dict(encoder_norm_self="scale", norm_eps=0.0), "--norm-eps 0.0: --encoder-norm-self 'scale': eps=0.0: must be a"),
    ],
)
def test_options_for_all_norms_that_one_cannot_take(options, message):
    """The error names the option that is to blame: that for all norms, or the norm's own text."""
    with pytest.raises(ValueError, match=message):
        toy.build(**options)


class Own(nn.Module):
    """A norm with options of every type that no other norm has."""

    def __init__(self, dim: int, *, steps: int = 3, rate: Optional[float] = None, exact: bool = True, kind: str = "a"):
        super().__init__()
        self.given = steps, rate, exact, kind


def test_options_are_of_the_annotated_types(monkeypatch):
    """Texts become the types that the constructor's annotations say; an option of one norm is refused by the others."""
    monkeypatch.setitem(NORMS, "own", Own)
    assert build_norm("own:steps=4,rate=5,exact=false,kind=b", 8).given == (4, 5.0, False, "b")
    assert build_norm("own", 8, steps=4, rate=0.5, groups=2, variant="reference").given == (4, 0.5, True, "a")
    assert build_norm("own", 8, rate=None).given == (3, None, True, "a")
    assert type(parse_norm("own:rate=5")[1]["rate"]) is float
    for name, options, message in (
        ("power", dict(steps=4), "norm 'power': option 'steps' is unknown; options of 'power': eps"),
        ("power:steps=4", {}, "norm 'power:steps=4': option 'steps' is unknown"),
        ("own:steps=4", dict(steps=5), "option 'steps' is given twice, once as 5"),
        ("own:rate=fast", {}, "rate='fast' must be a number"),
    ):
        with pytest.raises(ValueError, match=message):
            build_norm(name, 8, **options)


def test_scripts_know_the_names_without_torch():
    """The names are at hand before torch is: the scripts' help takes a moment."""
    program = (
        "import sys; from fairseq_powernorm.experiments import settings; "
        "assert 'power' in settings.NORMS and 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=toy.ROOT)


@pytest.mark.parametrize("arch", ["transformer_pn", "transformer_pn_tiny"])
def test_checkpoints_know_them(arch, toy_data, tmp_path, monkeypatch):
    """Trained by fairseq-train, with a text in a flag, a checkpoint has the text, and the model that is built from it has
    the same norms; what was not given stays open."""
    words = (
        toy_data, "--user-dir", toy.ROOT / "fairseq_powernorm", "--task", "translation_pn", "--arch", arch,
        "--encoder-layers", 1,
        "--decoder-layers", 1, "--encoder-embed-dim", 16, "--decoder-embed-dim", 16, "--optimizer", "sgd", "--lr", 0.1,
        "--max-update", 1, "--max-tokens", 400, "--cpu", "--num-workers", 0, "--disable-validation", "--save-dir", tmp_path,
        "--encoder-norm-self", "batch:variant=reference", "--encoder-norm-ff=power:warmup_updates=4,alpha_fwd=0.8",
    )  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["fairseq-train", *map(str, words)])
    train.cli_main()
    (model,), config, _ = checkpoint_utils.load_model_ensemble_and_task([str(tmp_path / "checkpoint_last.pt")])
    layer, saved = model.encoder.layers[0], config.model if OmegaConf.is_config(config.model) else vars(config.model)
    assert layer.self_attn_layer_norm.variant == "reference"
    assert (layer.final_layer_norm.warmup_updates, layer.final_layer_norm.alpha_fwd) == (4, 0.8)
    assert saved["encoder_norm_self"] == "batch:variant=reference" and saved.get("norm_alpha_fwd") is None
