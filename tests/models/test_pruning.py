"""``--encoder-layers-to-keep`` and ``--decoder-layers-to-keep``: what is built, loaded and saved."""
import itertools
import re
import sys

import pytest
import torch
import toy
from fairseq import checkpoint_utils
from fairseq_cli import eval_lm, generate, train

from fairseq_powernorm import checkpoint, export
from fairseq_powernorm.models import pruning

LM = "transformer_lm_pn_ptb"
TENSORIZED = "tensorized_lm_pn_ptb"
TRANSLATION = "transformer_pn_iwslt_de_en"
SIDES = {TRANSLATION: ("encoder", "decoder"), LM: ("decoder",), TENSORIZED: ("decoder",)}


def build(arch, layers=4, seed=1, **options):
    sizes = {name: value for name, value in toy.SIZES.items() if name.split("_")[0] in (*SIDES[arch], "dropout")}
    if arch == TENSORIZED:
        sizes.pop("decoder_attention_heads")
    else:
        sizes.update(attention_dropout=0.0)
    sizes.update({f"{side}_layers": layers for side in SIDES[arch]}, activation_dropout=0.0)
    if arch != TRANSLATION:
        sizes.update(max_target_positions=16)
    return toy.build(arch, seed=seed, sizes=sizes, **options).eval()


def logits(model):
    source, lengths, target = toy.batch()
    inputs = (target,) if not hasattr(model, "encoder") else (source, lengths, target)
    with torch.no_grad():
        return model(*inputs)[0]


# ---------------------------------------------------------------- loading


@pytest.mark.parametrize("kept", ["0", "3", "0,2", "1,2,3", "2,0", "0, 1,2,3"])
@pytest.mark.parametrize("arch,side", [(arch, side) for arch in SIDES for side in SIDES[arch]])
def test_a_whole_checkpoint_is_pruned(arch, side, kept):
    """Loading all layers into a model that keeps some gives what taking the others out of the whole model gives; the
    stack of the other side, of which all layers are kept, stays whole."""
    whole = build(arch)
    pruned = build(arch, seed=2, **{f"{side}_layers_to_keep": kept})
    pruned.load_state_dict(whole.state_dict())
    stack = getattr(whole, side)
    stack.layers = torch.nn.ModuleList(stack.layers[int(n)] for n in sorted(kept.split(","), key=int))
    assert [len(getattr(pruned, each).layers) for each in SIDES[arch]] == [
        len(getattr(whole, each).layers) for each in SIDES[arch]
    ]
    torch.testing.assert_close(logits(pruned), logits(whole), rtol=0, atol=0)


@pytest.mark.parametrize("arch", SIDES)
def test_a_pruned_checkpoint_is_loaded_as_it_is(arch):
    """A checkpoint that has as many layers as are kept has been pruned already: it is loaded whole, into a model with the
    same option and into one with as many layers."""
    options = {f"{side}_layers_to_keep": "0,2" for side in SIDES[arch]}
    one = build(arch, **options)
    for other in (build(arch, seed=2, **options), build(arch, layers=2, seed=2)):
        other.load_state_dict(one.state_dict())
        torch.testing.assert_close(logits(other), logits(one), rtol=0, atol=0)


def test_both_sides_at_once():
    """Each side is pruned by its own list."""
    whole = build(TRANSLATION).state_dict()
    pruned = build(TRANSLATION, encoder_layers_to_keep="1,3", decoder_layers_to_keep="0")
    pruned.load_state_dict(whole)
    for new, old in (("encoder.layers.0", "encoder.layers.1"), ("encoder.layers.1", "encoder.layers.3"),
                     ("decoder.layers.0", "decoder.layers.0")):
        for name, value in pruned.state_dict().items():
            if name.startswith(new + "."):
                assert torch.equal(value, whole[old + name[len(new) :]]), name


@pytest.mark.parametrize("layers", [1, 3, 5])
def test_a_checkpoint_of_another_size_is_refused(layers):
    """Neither all layers nor those that are kept: an error that says how many there are and must be."""
    model = build(LM, decoder_layers_to_keep="0,2")
    with pytest.raises(
        ValueError, match=rf"--decoder-layers-to-keep 0,2 of 4 layers: the checkpoint has {layers}; must have 4, or 2"
    ):
        model.load_state_dict(build(LM, layers=layers).state_dict())


@pytest.mark.parametrize(
    "value", ["4", "0,4", "0,0", "1,01", "-1", "x", "0,x", "1.0", "", " ", ",", "0,,1", "0 1", "[0, 1]", "None"]
)
@pytest.mark.parametrize(
    "arch,side", [(TRANSLATION, "encoder"), (TRANSLATION, "decoder"), (LM, "decoder"), (TENSORIZED, "decoder")]
)
def test_wrong_values(arch, side, value):
    """What is no list of different layers of the model is refused before anything is built; the error names option, value,
    valid range and number of layers."""
    message = f"--{side}-layers-to-keep {value!r}: .* from 0 to 3 .--{side}-layers 4."
    with pytest.raises(ValueError, match=message.replace("[", r"\[")):
        build(arch, **{f"{side}_layers_to_keep": value})


def test_pruning_renames_layers_only():
    """Names that look like a layer's further in, or of the other side, stay."""
    state = {name: i for i, name in enumerate((
        "encoder.layers.0.fc1.weight", "encoder.layers.2.fc1.weight", "encoder.layers.1.inner.layers.0.weight",
        "decoder.layers.0.fc1.weight", "encoder.layers_of.0.weight", "encoder.layer_norm.weight",
    ))}  # fmt: skip
    pruned = pruning.prune(state, "encoder", pruning.KeptLayers((1, 2), 3))
    assert pruned == {
        "encoder.layers.1.fc1.weight": 1, "encoder.layers.0.inner.layers.0.weight": 2, "decoder.layers.0.fc1.weight": 3,
        "encoder.layers_of.0.weight": 4, "encoder.layer_norm.weight": 5,
    }  # fmt: skip


# ---------------------------------------------------------------- fairseq's commands


def command(monkeypatch, module, *words):
    """A command of fairseq in this process; what its main function returns."""
    returned = []
    main = module.main
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, words), "--user-dir", str(toy.ROOT / "fairseq_powernorm")])
    monkeypatch.setattr(module, "main", lambda *arguments: returned.append(main(*arguments)))
    module.cli_main()
    monkeypatch.undo()
    return returned[0]


RUN = (
    "--optimizer", "adam", "--lr", 0.005, "--max-tokens", 400, "--cpu", "--num-workers", 0, "--data-buffer-size", 0,
    "--no-epoch-checkpoints", "--no-progress-bar", "--disable-validation", "--dropout", 0, "--norm-warmup-updates", 3,
)  # fmt: skip
KINDS = {
    "translation": (
        "--task", "translation_pn", "--arch", "transformer_pn_tiny", "--encoder-embed-dim", 16, "--decoder-embed-dim", 16,
        "--encoder-ffn-embed-dim", 32, "--decoder-ffn-embed-dim", 32,
    ),
    "lm": (
        "--task", "language_modeling_pn", "--arch", LM, "--tokens-per-sample", 16, "--decoder-embed-dim", 16,
        "--decoder-ffn-embed-dim", 32,
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def lm_data(toy_data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lm")
    parts = [word for split in ("train", "valid", "test") for word in (f"--{split}pref", toy_data.parent / f"{split}.de")]
    toy.preprocess("--only-source", "--destdir", folder, *parts)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind,options", [("translation", dict(encoder="1,2,3", decoder="0,1")), ("lm", dict(decoder="1,3"))]
)
def test_a_run_of_some_layers(kind, options, toy_data, lm_data, tmp_path, monkeypatch, capsys):
    """Train; go on; generate or eval-lm of the checkpoint, of an average and of a whole model pruned for it; export: all
    load, and the saved configuration has the layers that the checkpoint has."""
    data = toy_data if kind == "translation" else lm_data
    flags = list(itertools.chain.from_iterable((f"--{side}-layers-to-keep", kept) for side, kept in options.items()))
    run = (data, *KINDS[kind], *RUN)

    def evaluate(path, *words):
        capsys.readouterr()
        if kind == "translation":
            # hypotheses of a model that has learned next to nothing have no end
            command(monkeypatch, generate, data, "--task", "translation_pn", "--cpu", "--beam", 2, "--num-workers", 0,
                    "--max-len-a", 1, "--max-len-b", 2, "--path", path, *words)
            return sorted(re.findall(r"^H-.*$", capsys.readouterr().out, re.M))
        return command(monkeypatch, eval_lm, data, "--task", "language_modeling_pn", "--cpu", "--num-workers", 0,
                       "--tokens-per-sample", 16, "--path", path, *words)["loss"]

    last = tmp_path / "run" / "checkpoint_last.pt"
    command(monkeypatch, train, *run, *flags, "--save-dir", last.parent, "--max-update", 2)
    command(monkeypatch, train, *run, *flags, "--save-dir", last.parent, "--max-update", 4)
    state = checkpoint.load(str(last))
    assert state["optimizer_history"][-1]["num_updates"] == 4
    model = state["cfg"]["model"]
    model = model if isinstance(model, dict) else vars(model)
    for side, kept in options.items():
        there = {name.split(".")[2] for name in state["model"] if name.startswith(f"{side}.layers.")}
        assert len(there) == model[f"{side}_layers"] == len(kept.split(",")) and model[f"{side}_layers_to_keep"] is None
    found = evaluate(last)
    assert found
    average = tmp_path / "average.pt"
    checkpoint.save(checkpoint.average_checkpoints([str(last)] * 2), str(average))
    assert evaluate(average) == found
    models, _, _ = checkpoint_utils.load_model_ensemble_and_task([str(last)])
    assert export.export(models[0], "torchscript", str(tmp_path / "model.ts")) < 1e-3
    # as checkpoints were written before the configuration was
    for side, kept in options.items():
        model.update({f"{side}_layers": 4, f"{side}_layers_to_keep": kept})
    old = tmp_path / "old.pt"
    checkpoint.save(state, str(old))
    assert evaluate(old) == found
    # of the pruned checkpoint, its first layer; then a layer that it does not have
    side, kept = next(iter(options.items()))
    evaluate(last, "--model-overrides", str({f"{side}_layers_to_keep": "0"}))
    with pytest.raises(ValueError, match=f"--{side}-layers-to-keep '3': .* from 0 to {len(kept.split(',')) - 1} "):
        evaluate(last, "--model-overrides", str({f"{side}_layers_to_keep": "3"}))
    monkeypatch.undo()
    # a whole model, pruned for evaluation and for further training
    whole, further = (tmp_path / name / "checkpoint_last.pt" for name in ("whole", "further"))
    command(monkeypatch, train, *run, "--save-dir", whole.parent, "--max-update", 2)
    found = evaluate(whole, "--model-overrides", str({f"{side}_layers_to_keep": kept for side, kept in options.items()}))
    with pytest.raises(ValueError, match="whole/checkpoint_last.pt': its optimizer .*; give --reset-optimizer"):
        command(monkeypatch, train, *run, *flags, "--save-dir", further.parent, "--max-update", 3, "--restore-file", whole)
    monkeypatch.undo()
    command(
        monkeypatch, train, *run, *flags, "--save-dir", further.parent, "--max-update", 1, "--finetune-from-model", whole
    )
    assert found and evaluate(further)
