"""Folding for inference and export: the same outputs by fewer operations."""
import copy
import subprocess
import sys

import pytest
import torch
import toy
from fairseq import checkpoint_utils, models, options, tasks
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.sequence_generator import SequenceGenerator
from fairseq_cli import eval_lm, generate, interactive, validate
from omegaconf import OmegaConf
from torch.nn.utils import prune
from torch.utils._python_dispatch import TorchDispatchMode

from fairseq_powernorm import export, kernels
from fairseq_powernorm.checkpoint import load
from fairseq_powernorm.convert import replace_norms
from fairseq_powernorm.fold import FoldedNorm, fold_norms
from fairseq_powernorm.models import base
from fairseq_powernorm.norms import MaskedBatchNorm, PowerNorm, RunningNorm

DECODER = {name: value for name, value in toy.SIZES.items() if "encoder" not in name}
LM = dict(tokens_per_sample=32, max_target_positions=32, sizes=DECODER)
TENSORIZED = dict(
    sizes=dict(decoder_embed_dim=16, decoder_ffn_embed_dim=32), tensorized_window=32, tensorized_rank=4,
    tokens_per_sample=32,
)
ADAPTIVE = dict(criterion="adaptive_loss", adaptive_softmax_cutoff="8,16", adaptive_softmax_dropout=0.0)


def all_norms(name):
    return dict.fromkeys(toy.ALL_POWER, name)


def randomized(model, seed=3):
    """Statistics and parameters of a trained model's kind: channels of different size, no bias and no mean zero."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith(("iters", "version")) or not tensor.is_floating_point():
                continue
            if "layer_norm" in name:
                random = torch.rand(tensor.shape, generator=draw)
                tensor.copy_(random - 0.5 if name.endswith(("bias", "running_mean")) else random + 0.2)
                if name.endswith(("running_phi", "running_var")):
                    tensor.mul_(4.0)
            elif name.endswith("bias"):
                tensor.copy_(torch.randn(tensor.shape, generator=draw) * 0.3)
    return model.eval()


def build(arch="transformer_pn_iwslt_de_en", **settings):
    return randomized(toy.build(arch, **settings))


@torch.no_grad()
def log_probabilities(model):
    """Of a batch with padding; teacher forcing."""
    source, lengths, target = toy.batch()
    output = model(source, lengths, target) if hasattr(model, "encoder") else model(target)
    return model.get_normalized_probs(output, log_probs=True)


def beams(model, scripted=False):
    """Tokens and scores of a beam search with incremental decoding."""
    source, lengths, target = toy.batch()
    dictionary = toy.task().target_dictionary
    settings = dict(beam_size=3, max_len_b=8, unk_penalty=0.1)
    prefix = None
    if not hasattr(model, "encoder"):
        source, lengths, prefix = target[:, :3], torch.tensor([3, 3, 3]), target[:, :3]
    sample = {"net_input": {"src_tokens": source, "src_lengths": lengths}}
    if scripted:
        model = export.scriptable(model)
        if prefix is not None:  # fairseq's generator itself cannot be scripted without an encoder
            model = torch.jit.script(model)
    generator = SequenceGenerator([model], dictionary, **settings)
    if scripted and prefix is None:
        generator = torch.jit.script(generator)
    found = generator(sample, prefix_tokens=prefix)
    return [[(h["tokens"].tolist(), float(h["score"])) for h in each] for each in found]


def assert_same_beams(found, expected):
    assert [[tokens for tokens, _ in each] for each in found] == [[tokens for tokens, _ in each] for each in expected]
    for one, other in zip(found, expected):
        assert [score for _, score in one] == pytest.approx([score for _, score in other], abs=1e-5)


def running_norms(model):
    return [module for module in model.modules() if isinstance(module, RunningNorm)]


CASES = {
    **{
        f"{name}-{groups}-{placement}": dict(norm_groups=groups, **options)
        for name in ("power", "power-v", "batch")
        for groups in (0, 1, 4)
        for placement, options in (
            ("encoder", dict(encoder_norm_self=name, encoder_norm_ff=name)),
            ("all", all_norms(name)),
            ("shared", dict(share_all_embeddings=True, **all_norms(name))),
            ("post", dict(post_norm=True, **all_norms(name))),
        )
    },
    "algorithm2": dict(norm_variant="algorithm2", norm_groups=0, **toy.ALL_POWER),
    "mixed": dict(encoder_norm_self="power", encoder_norm_ff="rms", decoder_norm_self="batch", decoder_norm_ff="layer"),
    "wide-decoder": dict(decoder_embed_dim=32, decoder_output_dim=24, norm_groups=0, **toy.ALL_POWER),
    "wrapped": dict(
        checkpoint_activations=True, encoder_layerdrop=0.5, decoder_layerdrop=0.5, layernorm_embedding=True,
        quant_noise_pq=0.5, quant_noise_pq_block_size=4, norm_groups=0, **toy.ALL_POWER,
    ),
    "cross-self": dict(cross_self_attention=True, no_cross_attention=True, norm_groups=0, **toy.ALL_POWER),
    "lm": dict(arch="transformer_lm_pn", **LM),
    "lm-tied": dict(arch="transformer_lm_pn", share_decoder_input_output_embed=True, norm_groups=0, **LM),
    "lm-adaptive": dict(arch="transformer_lm_pn", norm_groups=0, **ADAPTIVE, **LM),
    "lm-adaptive-tied": dict(
        arch="transformer_lm_pn", norm_groups=0, adaptive_input=True, adaptive_input_cutoff="8,16",
        adaptive_input_factor=2, adaptive_softmax_factor=2, tie_adaptive_weights=True, tie_adaptive_proj=True,
        decoder_input_dim=16, decoder_output_dim=16, **ADAPTIVE, **LM,
    ),
    "tensorized": dict(arch="tensorized_lm_pn", norm_groups=0, **TENSORIZED),
    "tensorized-pre": dict(arch="tensorized_lm_pn", decoder_normalize_before=True, norm_groups=0, **TENSORIZED),
}


@pytest.mark.parametrize("case", CASES)
def test_log_probabilities_are_those_of_the_model(case):
    """folded(x) = model(x): to 1e-12 in float64, to 1e-5 in float32; the latter as well where nothing is float64."""
    settings = dict(CASES[case])
    if "decoder_embed_dim" in settings:
        settings["sizes"] = {**toy.SIZES, "decoder_embed_dim": settings.pop("decoder_embed_dim")}
    model = build(**settings)
    folded = fold_norms(copy.deepcopy(model))
    assert running_norms(model) and not running_norms(folded)
    torch.testing.assert_close(log_probabilities(folded), log_probabilities(model), rtol=0, atol=1e-5)
    wide = model.double()
    folded = fold_norms(copy.deepcopy(wide))
    if "adaptive" not in case:  # whose log-probabilities fairseq keeps in float32
        torch.testing.assert_close(log_probabilities(folded), log_probabilities(wide), rtol=0, atol=1e-12)


@pytest.mark.parametrize("steps", [0, 5, 1000])
def test_the_warm_up_changes_nothing(steps):
    """Evaluation divides by the running statistics at any step, in the middle of the warm-up too; so does the fold."""
    model = build(norm_warmup_updates=10, **toy.ALL_POWER)
    for norm in running_norms(model):
        norm.iters.fill_(steps)
    expected = log_probabilities(model)
    torch.testing.assert_close(log_probabilities(fold_norms(model)), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "case", ["power-0-all", "power-1-shared", "power-v-4-post", "batch-0-post", "lm", "lm-adaptive", "tensorized"]
)
def test_the_beams_are_those_of_the_model(case):
    """Beam search with incremental decoding finds the same hypotheses, with the same scores."""
    model = build(**CASES[case])
    assert_same_beams(beams(fold_norms(copy.deepcopy(model))), beams(model))


class Operations(TorchDispatchMode):
    """Counts the operations that torch executes."""

    def __init__(self):
        super().__init__()
        self.counts = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        self.counts[name] = self.counts.get(name, 0) + 1
        return function(*args, **(kwargs or {}))


def operations(model):
    with kernels.only("torch"), Operations() as mode:  # what another kernel does, torch does not see
        log_probabilities(model)
    return mode.counts


@pytest.mark.parametrize("name", ["power", "power-v", "batch"])
def test_without_layer_scale_no_norm_is_left(name):
    """A folded pre-norm model without layer scale executes no operation of a norm: none that identities would not."""
    model = build(norm_groups=0, **all_norms(name))
    nothing = copy.deepcopy(model)
    for owner in list(nothing.modules()):
        for attribute, child in list(owner.named_children()):
            if isinstance(child, RunningNorm):
                setattr(owner, attribute, torch.nn.Identity())
    nothing.decoder.output_projection.bias = torch.nn.Parameter(torch.zeros(24))
    counts = operations(nothing)
    assert sum(operations(model).values()) > sum(counts.values())
    found = operations(fold_norms(model))
    arithmetic = {"mul", "add", "addcmul", "div", "rsqrt", "sqrt", "pow", "mean", "linalg_vector_norm", "_to_copy"}
    arithmetic |= {"addmm", "mm", "bmm", "native_layer_norm", "rms_norm", "_fused_rms_norm", "native_batch_norm"}
    assert {k: v for k, v in found.items() if k in arithmetic} == {k: v for k, v in counts.items() if k in arithmetic}


def test_with_layer_scale_one_parameter_free_norm_is_left():
    """In a pre-norm model linear maps take scale and shift; tied to the embedding, or in post-norm, they stay."""

    def left(**settings):
        model = fold_norms(build(norm_groups=4, **toy.ALL_POWER, **settings))
        return {str(module) for module in model.modules() if isinstance(module, FoldedNorm)}

    bare, affine = "FoldedNorm(16, groups=4, affine=False)", "FoldedNorm(16, groups=4, affine=True)"
    assert left() == {bare}
    assert left(share_all_embeddings=True) == {bare, affine}
    assert left(post_norm=True) == {affine}


@pytest.mark.parametrize("case", ["power-0-shared", "lm-tied"])
def test_tied_weights_stay_tied(case):
    """A projection that is the input embedding, of one stack or of both, is left alone, and still is that embedding."""
    model = fold_norms(build(**CASES[case]))
    for stack in {getattr(model, "encoder", model.decoder), model.decoder}:
        assert model.decoder.output_projection.weight is stack.embed_tokens.weight
    assert model.decoder.output_projection.bias is None


def test_a_map_that_sees_something_else_than_its_norms_output():
    """A linear map before which a hook changes the input leaves scale and shift in the norm."""
    layer = build(norm_groups=0, **toy.ALL_POWER).encoder.layers[0]
    layer.fc1.register_forward_pre_hook(lambda module, inputs: (inputs[0].tanh(),))
    x, mask = torch.randn(5, 2, 16), torch.zeros(2, 5, dtype=torch.bool)
    expected = layer(x, mask)
    torch.testing.assert_close(fold_norms(layer)(x, mask), expected, rtol=0, atol=1e-5)
    assert layer.final_layer_norm.scale is not None and layer.self_attn_layer_norm.scale is None


def test_what_stands_at_padding_does_not_matter():
    """Wider padding, whose rows the folded biases change, leaves every word's log-probabilities as they were."""
    model = fold_norms(build(norm_groups=0, **toy.ALL_POWER))
    output = []
    for extra in (0, 4):
        source, lengths, target = toy.batch(extra_padding=extra)
        words = target.ne(toy.PAD)
        output.append(model(source, lengths, target)[0][words])
    torch.testing.assert_close(*output, rtol=0, atol=1e-5)


def test_folding_twice_is_folding_once():
    """fold(fold(model)) = fold(model), to the last bit, and the model itself is what is returned."""
    model = build(share_all_embeddings=True, **toy.ALL_POWER)
    assert fold_norms(model) is model
    once = copy.deepcopy(model)
    fold_norms(model)
    assert str(model) == str(once)
    for name, tensor in once.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name


def test_models_without_our_norms_stay_as_they_are():
    """fairseq's own model is left alone, and may train; one of this package with LN gives the same, bit for bit."""
    plain = models.build_model(toy.Namespace(_name="transformer", arch="transformer", **toy.SIZES), toy.task())
    assert fold_norms(plain) is plain and plain.training
    layer = build(**all_norms("layer")).requires_grad_(False)
    expected = log_probabilities(layer)
    assert torch.equal(log_probabilities(fold_norms(layer)), expected)


def test_modules_outside_of_fairseq_fold_too():
    """A norm alone becomes its folded form; in any module it is replaced; the call with a mask still works."""
    x, mask = torch.randn(5, 3, 8), torch.zeros(3, 5, dtype=torch.bool)
    for norm in (PowerNorm(8, groups=2), PowerNorm(8, groups=0, affine=False), MaskedBatchNorm(8)):
        norm = randomized(torch.nn.ModuleDict({"layer_norm": norm})).layer_norm
        folded, inside = fold_norms(copy.deepcopy(norm)), fold_norms(torch.nn.Sequential(copy.deepcopy(norm)))
        torch.testing.assert_close(folded(x, mask), norm(x, mask))
        torch.testing.assert_close(inside(x), norm(x))
        for each in (folded, inside):
            with pytest.raises(RuntimeError, match="folded for inference"):
                each.train()


def test_hooks_see_what_they_saw():
    """A norm whose passes somebody looks at is folded, but not into what reads it, and its hooks stay."""
    layer = torch.nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, norm_first=True, batch_first=True)
    layer, _ = replace_norms(randomized(layer), "power")
    layer.eval().norm1.running_phi.fill_(3.0)
    seen, x = [], torch.randn(2, 5, 8)
    layer.norm1.register_forward_hook(lambda norm, args, y: seen.append(y))
    layer.norm2.register_forward_pre_hook(lambda norm, args: seen.append(args[0]))
    expected = layer(x)
    torch.testing.assert_close(fold_norms(layer)(x), expected)
    assert len(seen) == 4
    for one, other in zip(seen[:2], seen[2:]):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("how", ["hook", "forward"])
def test_adapters_of_what_reads_a_norm(how):
    """An adapter that adds to a linear map, from its input, by a hook or by a forward around that of the instance: outputs
    stay; the other norm is folded as ever.
    """
    layer = torch.nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, norm_first=True, batch_first=True)
    layer, _ = replace_norms(layer, "power:groups=0")
    layer.eval().norm1.running_phi.fill_(3.0)
    layer.norm2.running_phi.fill_(5.0)
    x, adapter = torch.randn(2, 5, 8), torch.nn.Linear(8, 16)
    if how == "hook":
        layer.linear1.register_forward_hook(lambda linear, args, y: y + adapter(args[0]))
    else:
        original = layer.linear1.forward
        layer.linear1.forward = lambda x: original(x) + adapter(x)
    expected = layer(x)
    torch.testing.assert_close(fold_norms(layer)(x), expected)
    assert layer.norm1.scale is None and layer.norm2.scale is not None


class Clamped(PowerNorm):
    """A norm with an evaluation of its own."""

    def forward(self, x, padding_mask=None):
        return super().forward(x, padding_mask).clamp(-0.1, 0.1)


class Negated(PowerNorm):
    """One that says what its evaluation is."""

    def _evaluate(self, x, padding_mask):
        return -super()._evaluate(x, padding_mask)

    def scale_and_shift(self):
        return tuple(-each for each in super().scale_and_shift())


def test_norms_that_evaluate_in_a_way_of_their_own():
    """They are refused by name, whether a class or an instance has the forward, when folded and when scripted; one that says
    what its evaluation is folds.
    """
    wrapped = PowerNorm(8)
    wrapped.forward = lambda x, original=wrapped.forward: original(x).clamp(-0.1, 0.1)
    for norm, what in ((Clamped(8), "a Clamped, which has forward"), (wrapped, "has a forward of its own instance")):
        model = torch.nn.Sequential(torch.nn.Linear(8, 8), norm).eval()
        with pytest.raises(ValueError, match=f"^1: cannot be folded.*{what}"):
            fold_norms(model)
        with pytest.raises(RuntimeError, match=what):
            torch.jit.script(norm)
    x, norm = torch.randn(5, 8), Negated(8).eval()
    torch.testing.assert_close(fold_norms(torch.nn.Sequential(norm))(x), norm(x))
    with pytest.raises(RuntimeError, match="a Negated, which has _evaluate of its own"):
        torch.jit.script(norm)


def test_channels_that_linear_maps_do_not_read():
    """A norm of another dimension than the linear maps', though of one size, keeps its scale."""
    layer = torch.nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, norm_first=True, batch_first=True)
    layer.norm1, layer.norm2, layer.activation_relu_or_gelu = PowerNorm(8, layout="channels_first"), PowerNorm(8), 0
    layer.eval().norm1.running_phi.copy_(torch.arange(1.0, 9.0))
    x = torch.randn(2, 8, 8)
    expected = layer(x)
    torch.testing.assert_close(fold_norms(layer)(x), expected)


def test_frozen_models_pass_gradients_on():
    """A gradient of the input reaches no parameter that learns nothing: those that were folded into stay frozen."""
    layer = torch.nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, norm_first=True, batch_first=True)
    layer, _ = replace_norms(layer, "power:groups=0")
    layer.eval().requires_grad_(False)
    gradients = []
    for each in (layer, fold_norms(layer)):
        x = torch.ones(2, 5, 8, requires_grad=True)
        each(x).square().sum().backward()
        gradients.append(x.grad)
    torch.testing.assert_close(*gradients)


def test_pruned_norms():
    """What is folded is the parameter of now, not of the last pass; the norm itself stays as it is."""
    norm, x = PowerNorm(8).eval(), torch.randn(5, 8)
    prune.custom_from_mask(norm, "weight", torch.arange(8) % 2)
    with torch.no_grad():
        norm.weight_orig.fill_(5.0)
    folded = fold_norms(norm)
    torch.testing.assert_close(folded(x), norm(x))
    assert len(norm._forward_pre_hooks) == 1


def test_a_norm_in_two_places_of_one_module():
    """Both are folded."""
    norm = PowerNorm(8)
    model = fold_norms(torch.nn.Sequential(norm, torch.nn.Linear(8, 8), norm))
    assert model[0] is model[2] and isinstance(model[0], FoldedNorm)


def test_a_folded_model_refuses_to_train_and_to_load():
    """train(), in parts too, a backward pass and load_state_dict say why; eval(), copies and conversions work."""
    model = build(**toy.ALL_POWER)
    state = model.state_dict()
    folded = fold_norms(model)
    for part in (folded, folded.decoder, folded.encoder.layers[0]):
        with pytest.raises(RuntimeError, match="folded for inference .* cannot be trained"):
            part.train()
    folded.train(False)
    before = copy.deepcopy(folded.state_dict())
    with pytest.raises(RuntimeError, match="folded for inference .* cannot load a state_dict"):
        folded.load_state_dict(state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in folded.state_dict().items())
    source, lengths, target = toy.batch()
    with pytest.raises(RuntimeError, match="cannot be trained"):
        folded(source, lengths, target)[0].sum().backward()
    expected = log_probabilities(folded)
    assert torch.equal(log_probabilities(copy.deepcopy(folded).eval().to("cpu")), expected)
    assert log_probabilities(copy.deepcopy(folded).bfloat16()).sub(expected).abs().max() < 0.2
    with pytest.raises(RuntimeError, match="cannot be trained"):
        copy.deepcopy(folded).train()
    restored = build(seed=2, **toy.ALL_POWER)
    restored.load_state_dict(state)
    with pytest.raises(ValueError, match="the checkpoint has norm .* folded for inference"):
        restored.load_state_dict(folded.state_dict())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_folded_weights_are_rounded_once(dtype):
    """In half precision the folded weight is the exact product of what the model holds, rounded; float32 copies too."""
    model = build(norm_groups=0, **toy.ALL_POWER).to(dtype)
    layer = copy.deepcopy(model).encoder.layers[0]
    norm, linear = layer.final_layer_norm, layer.fc1
    scale = norm.weight.double() / (norm.running_phi.double() + norm.eps).sqrt()
    weight = linear.weight.double() * scale
    bias = linear.bias.double() + linear.weight.double() @ norm.bias.double()
    folded = fold_norms(model).encoder.layers[0].fc1
    assert folded.weight.dtype == dtype
    assert torch.equal(folded.weight, weight.to(dtype)) and torch.equal(folded.bias, bias.to(dtype))


def test_a_scale_that_would_overflow_stays_in_the_norm():
    """A float16 weight that the product would make infinite keeps its norm."""
    layer = build(norm_groups=0, **toy.ALL_POWER).half().encoder.layers[0]
    layer.final_layer_norm.running_phi.fill_(1e-12)
    layer.fc1.weight.data[0, 0] = 6e4
    x = torch.randn(4, 2, 16).half()
    fold_norms(layer)
    assert layer.final_layer_norm.scale is not None and bool(torch.isfinite(layer.fc1.weight).all())
    assert bool(torch.isfinite(layer.final_layer_norm(x)).all())


# ---------------------------------------------------------------------- the commands


def save(path, command, seed=3):
    """A checkpoint as fairseq-train writes it, of a model whose statistics are not the initial ones."""
    cfg = convert_namespace_to_omegaconf(options.parse_args_and_arch(options.get_training_parser(), command))
    task = tasks.setup_task(cfg.task)
    model = randomized(task.build_model(cfg.model), seed)
    # a larger embedding, so that the beams of an untrained model differ in more than rounding
    torch.nn.init.normal_(model.decoder.output_projection.weight, std=0.3)
    history = {"criterion_name": "", "optimizer_name": "", "lr_scheduler_state": {}, "num_updates": 7}
    state = dict(
        args=None, cfg=OmegaConf.to_container(cfg), model=model.state_dict(), extra_state={},
        optimizer_history=[history],
    )
    torch.save(state, path)
    return path


def words(*parts, **flags):
    found = [str(part) for part in parts]
    for name, value in flags.items():
        found.append(f"--{name.replace('_', '-')}")
        found += [] if value is True else [str(value)]
    return found


SMALL = {name: value for name, value in toy.SIZES.items() if "dropout" not in name}


@pytest.fixture(scope="module")
def translation(toy_data, tmp_path_factory):
    """Data and two checkpoints of a translation model."""
    folder = tmp_path_factory.mktemp("translation")
    command = words(
        toy_data, user_dir=toy.ROOT / "fairseq_powernorm", task="translation_pn", arch="transformer_pn_tiny",
        share_all_embeddings=True, **SMALL, **toy.ALL_POWER,
    )
    return toy_data, [save(folder / f"{seed}.pt", command, seed) for seed in (3, 4)]


@pytest.fixture(scope="module")
def language(toy_data, tmp_path_factory):
    """Data and the checkpoint of a language model."""
    folder = tmp_path_factory.mktemp("language")
    texts = {f"{split}pref": toy_data.parent / f"{split}.en" for split in ("train", "valid", "test")}
    toy.preprocess(*words(only_source=True, destdir=folder / "bin", **texts))
    small = {name: value for name, value in SMALL.items() if "encoder" not in name}
    command = words(
        folder / "bin", user_dir=toy.ROOT / "fairseq_powernorm", task="language_modeling_pn", arch="transformer_lm_pn",
        tokens_per_sample=16, **small,
    )
    return folder / "bin", save(folder / "lm.pt", command)


def run(monkeypatch, capsys, main, *command):
    """Lines that a command of fairseq prints, and how often it folded a model; in this process."""
    calls = []
    for module in (base, sys.modules["fairseq_powernorm.tasks"]):
        monkeypatch.setattr(module, "fold_norms", lambda model: calls.append(model) or fold_norms(model))
    command = [main.__name__, *command, "--user-dir", str(toy.ROOT / "fairseq_powernorm"), "--cpu"]
    command += ["--num-workers", "0"]  # workers take seconds to end
    monkeypatch.setattr(sys, "argv", command)
    capsys.readouterr()
    main()
    return capsys.readouterr().out.splitlines(), len(calls)


def hypotheses(lines):
    """(kind, number) -> (score, words), of the lines of fairseq-generate and -interactive."""
    split = [line.split("\t") for line in lines if line[:2] in ("H-", "P-")]
    return {fields[0]: ([float(x) for x in fields[1].split()], fields[2:]) for fields in split}


def assert_same_hypotheses(one, other):
    assert list(one) == list(other) and one
    for key in one:
        assert one[key][1] == other[key][1]
        assert one[key][0] == pytest.approx(other[key][0], abs=2e-4)  # printed with four digits


@pytest.mark.slow
@pytest.mark.parametrize("command", ["generate", "ensemble", "interactive"])
def test_generation_folds_unless_told_not_to(translation, monkeypatch, capsys, tmp_path, command):
    """fairseq-generate (of two models, too) and -interactive: same hypotheses and scores with and without the flag."""
    data, checkpoints = translation
    shared = words(data, task="translation_pn", beam=3, max_len_b=8, max_len_a=0)
    if command == "interactive":
        text = tmp_path / "input"
        text.write_text("d1 d2 d3\nd7 d7\n")
        main, shared = interactive.cli_main, [*shared, "--path", str(checkpoints[0]), "--input", str(text)]
    else:
        paths = checkpoints if command == "ensemble" else checkpoints[:1]
        main = generate.cli_main
        shared += ["--path", ":".join(map(str, paths)), "--gen-subset", "valid", "--batch-size", "8"]
    folded, calls = run(monkeypatch, capsys, main, *shared)
    plain, none = run(monkeypatch, capsys, main, *shared, "--no-fold-norms")
    assert (calls, none) == (2 if command == "ensemble" else 1, 0)
    assert_same_hypotheses(hypotheses(folded), hypotheses(plain))


@pytest.mark.slow
def test_validate_folds_unless_told_not_to(translation, monkeypatch, capsys, caplog, tmp_path):
    """fairseq-validate: same loss; a checkpoint from before the option obeys the flag as well."""
    data, (path, _) = translation
    state = torch.load(path)
    del state["cfg"]["task"]["no_fold_norms"]
    torch.save(state, tmp_path / "old.pt")
    caplog.set_level("INFO")
    losses = []
    for checkpoint in (path, tmp_path / "old.pt"):
        for flags, expected in (((), 1), (("--no-fold-norms",), 0)):
            caplog.clear()
            command = words(data, task="translation_pn", path=checkpoint, batch_size=8)
            lines, calls = run(monkeypatch, capsys, validate.cli_main, *command, *flags)
            assert calls == expected
            line = [text for text in (*lines, *caplog.messages) if "| loss " in text][-1]
            losses.append(line[line.index("| loss ") :])
    assert len(set(losses)) == 1, losses


@pytest.mark.slow
def test_eval_lm_folds_unless_told_not_to(language, monkeypatch, capsys, caplog):
    """fairseq-eval-lm: same loss and perplexity with and without the flag."""
    data, path = language
    caplog.set_level("INFO")
    shared = words(data, task="language_modeling_pn", path=path)
    found = []
    for flags, expected in (((), 1), (("--no-fold-norms",), 0)):
        caplog.clear()
        lines, calls = run(
            monkeypatch, capsys, eval_lm.cli_main, *shared, "--tokens-per-sample", "16", "--gen-subset", "test", *flags
        )
        assert calls == expected
        found += [text for text in (*lines, *caplog.messages) if "Perplexity: " in text]
    assert len(found) == 2 and found[0] == found[1]


def test_validation_during_training_never_folds(translation):
    """Only what a command loads to evaluate is folded: not the model that trains, wherever it comes from."""
    data, (path, _) = translation
    sample = {"net_input": dict(zip(("src_tokens", "src_lengths", "prev_output_tokens"), toy.batch()))}

    def criterion(model, sample):
        return model(**sample["net_input"])[0].sum(), 1, {}

    for loaded in (False, True):
        (model,), cfg, task = checkpoint_utils.load_model_ensemble_and_task([str(path)])
        if loaded:
            task.begin_epoch(1, model)
            task.begin_valid_epoch(1, model)
        else:
            model = task.build_model(cfg.model)
        task.valid_step(sample, model, criterion)
        assert running_norms(model)
        model.train()


# ---------------------------------------------------------------------- export


@pytest.mark.slow
@pytest.mark.parametrize("case", ["power-4-shared", "batch-1-post", "lm"])
def test_scripted_generation_finds_the_same_beams(case):
    """torch.jit.script(SequenceGenerator) of the folded model (with a scripted LM) finds what the unfolded one does."""
    model = build(**CASES[case])
    expected = beams(model)
    assert_same_beams(beams(model, scripted=True), expected)


PROGRAM = """
import sys, importlib.abc
class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in ('fairseq', 'fairseq_powernorm'): raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Block())
import torch, onnxruntime
for kind in ('translation', 'language'):
    inputs, lengths, expected = torch.load(f'{kind}.pt')
    source, words = inputs.get('src_tokens'), inputs['prev_output_tokens']
    model = torch.jit.load(f'{kind}.torchscript')
    output = model(words) if source is None else model(source, lengths, words)
    found = model.get_normalized_probs(output, True)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    session = onnxruntime.InferenceSession(f'{kind}.onnx')
    found, = session.run(None, {name: each.numpy() for name, each in inputs.items()})
    torch.testing.assert_close(torch.tensor(found), expected, rtol=0, atol=1e-5)
assert not any(name.startswith('fairseq') for name in sys.modules)
"""


@pytest.mark.slow
def test_exported_files_need_torch_or_onnxruntime_only(translation, language, tmp_path, capsys):
    """The command's files give the checkpoint's log-probabilities where neither fairseq nor this package is there."""
    for kind, path in (("translation", translation[1][0]), ("language", language[1])):
        (model,), _, _ = checkpoint_utils.load_model_ensemble_and_task([str(path)])
        model.eval()
        for file_format in ("torchscript", "onnx"):
            output = tmp_path / f"{kind}.{file_format}"
            assert export.main([str(path), "--format", file_format, "--output", str(output)]) == 0
            assert "log-probabilities within" in capsys.readouterr().out
        source, lengths, target = toy.batch(extra_padding=2)
        inputs = {"prev_output_tokens": target, **({"src_tokens": source} if kind == "translation" else {})}
        with torch.no_grad():
            expected = export.LogProbabilities(model)(**inputs)
        torch.save((inputs, lengths, expected), tmp_path / f"{kind}.pt")
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_export_command_refuses(translation, tmp_path, capsys):
    """One line that names what is wrong; an existing file stays; nothing half-written is left."""
    _, (path, _) = translation
    there = tmp_path / "there"
    there.write_text("mine")
    state, diverged = load(str(path)), tmp_path.with_name("diverged.pt")
    state["model"]["decoder.layers.0.fc1.weight"][0, 0] = torch.nan
    torch.save(state, diverged)
    for command, message in (
        ([diverged, "--format", "onnx", "--output", tmp_path / "new"], "fc1.weight has values that are not finite"),
        ([path, "--format", "onnx", "--output", there], "exists"),
        ([path, "--format", "onnx", "--output", tmp_path / "no" / "file"], "its directory does not exist"),
        ([tmp_path / "none.pt", "--format", "onnx", "--output", tmp_path / "new"], "no such file"),
        ([path, "--format", "onnx", "--output", tmp_path / "new", "--data", tmp_path / "none"], "not a directory"),
    ):
        assert export.main([str(word) for word in command]) == 1
        error = capsys.readouterr().err.strip()
        assert message in error and len(error.splitlines()) == 1
    with pytest.raises(SystemExit) as exit:
        export.main([str(path), "--format", "tflite", "--output", str(tmp_path / "new")])
    assert exit.value.code == 2 and "torchscript" in capsys.readouterr().err
    for arch, settings in (("tensorized_lm_pn", TENSORIZED), ("transformer_lm_pn", dict(**ADAPTIVE, **LM))):
        with pytest.raises(ValueError, match="must be one of|cannot be exported"):
            export.export(build(arch, **settings), "torchscript", str(tmp_path / "new"))
    assert there.read_text() == "mine" and [each.name for each in tmp_path.iterdir()] == ["there"]
