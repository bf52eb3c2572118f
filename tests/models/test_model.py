"""``transformer_pn``: norm positions, masks, checkpointing, incremental decoding, options, golden traces."""
import argparse
import copy
import json
from argparse import Namespace

import numpy as np
import pytest
import torch
import toy
from fairseq import checkpoint_utils, models, tasks, utils
from fairseq.dataclass.utils import convert_namespace_to_omegaconf, merge_with_parent
from fairseq.models import ARCH_MODEL_NAME_REGISTRY, MODEL_DATACLASS_REGISTRY
from omegaconf import OmegaConf
from packaging.version import Version
from torch.utils._python_dispatch import TorchDispatchMode

from fairseq_powernorm import checkpoint
from fairseq_powernorm.norms import NORMS, LayerNorm, MaskedBatchNorm, PowerNorm, RunningNorm
from fairseq_powernorm.recorder import Recorder
from fairseq_powernorm.statistics import RunningStatistics

#: the authors' checkpoints hold fairseq's meters as well
reads_meters = pytest.mark.skipif(
    Version(torch.__version__) < Version("2.6"),
    reason="weights-only loading of torch < 2.6 cannot read the meters in this checkpoint",
)


def norms_of(model):
    return [(name, module) for name, module in model.named_modules() if isinstance(module, tuple(NORMS.values()))]


#: the norms of a model's four places, in which all norms stand once
MIXED = [dict(zip(toy.ALL_POWER, list(NORMS)[first:] + list(NORMS))) for first in range(0, len(NORMS), 4)]


def train_pass(model, batch, seed=0):
    """Forward and backward of a training step; returns the logits."""
    model.train()
    model.zero_grad()
    logits = model(*batch)[0]
    valid = batch[2].ne(toy.PAD)
    torch.manual_seed(seed)
    weights = torch.randn(logits.shape[-1], dtype=logits.dtype)
    (logits[valid].log_softmax(-1) * weights).sum().backward()
    return logits


# ---------------------------------------------------------------- positions and architectures


def test_the_authors_placement_is_the_default():
    """power in the encoder, layer in the decoder, final norms as the feed-forward blocks; groups = heads."""
    model = toy.build()
    kinds = {name: type(norm) for name, norm in norms_of(model)}
    assert len(kinds) == 2 * 2 + 1 + 2 * 3 + 1
    for name, kind in kinds.items():
        assert kind is (PowerNorm if name.startswith("encoder") else LayerNorm), name
    assert {norm.groups for _, norm in norms_of(model) if isinstance(norm, PowerNorm)} == {4}


def test_each_flag_reaches_its_positions():
    """The six placement options and the constants arrive at the norms they name."""
    model = toy.build(
        encoder_norm_self="rms", encoder_norm_ff="batch", encoder_norm_final="power-v", decoder_norm_self="power",
        decoder_norm_ff="batch", decoder_norm_final="layer", norm_alpha_fwd=0.5, norm_alpha_bkw=0.6,
        norm_warmup_updates=7, norm_groups=2, norm_variant="algorithm2", norm_eps=1e-3,
    )
    expected = {
        "encoder.layers.1.self_attn_layer_norm": "rms",
        "encoder.layers.1.final_layer_norm": "batch",
        "encoder.layer_norm": "power-v",
        "decoder.layers.1.self_attn_layer_norm": "power",
        "decoder.layers.1.encoder_attn_layer_norm": "power",
        "decoder.layers.1.final_layer_norm": "batch",
        "decoder.layer_norm": "layer",
    }
    modules = dict(model.named_modules())
    for name, norm in expected.items():
        assert type(modules[name]) is NORMS[norm], name
    power = modules["decoder.layers.0.self_attn_layer_norm"]
    assert (power.alpha_fwd, power.alpha_bkw, power.warmup_updates, power.groups, power.variant, power.eps) == (
        0.5, 0.6, 7, 2, "algorithm2", 1e-3,
    )
    assert modules["encoder.layer_norm"].alpha_fwd == 0.5 and modules["encoder.layers.0.final_layer_norm"].groups == 2


def test_final_norms_have_a_warmup_of_their_own():
    """--norm-final-warmup-updates sets the final norms' warm-up, which otherwise is that of the layers."""
    for final, expected in ((None, 50), (9, 9)):
        model = toy.build(norm_warmup_updates=50, norm_final_warmup_updates=final)
        assert model.encoder.layer_norm.warmup_updates == expected
        assert model.encoder.layers[0].final_layer_norm.warmup_updates == 50


@pytest.mark.parametrize(
    "arch,layers,dim,ffn,heads",
    [
        ("transformer_pn_tiny", 4, 128, 256, 4),
        ("transformer_pn_iwslt_de_en", 6, 512, 1024, 4),
        ("transformer_pn_wmt_en_de", 6, 512, 2048, 8),
        ("transformer_pn_wmt_en_de_big", 6, 1024, 4096, 16),
    ],
)
def test_architectures(arch, layers, dim, ffn, heads):
    """Sizes, pre-norm and the authors' norms of each architecture, built on the meta device."""
    with torch.device("meta"):
        model = models.build_model(Namespace(_name=arch), toy.task())
    for stack in (model.encoder, model.decoder):
        assert len(stack.layers) == layers and stack.layer_norm is not None
        layer = stack.layers[0]
        assert (layer.embed_dim, layer.fc1.out_features, layer.self_attn.num_heads) == (dim, ffn, heads)
        assert layer.normalize_before
    assert model.encoder.layers[0].self_attn_layer_norm.groups == heads
    assert type(model.decoder.layers[0].self_attn_layer_norm) is LayerNorm


def test_the_same_model_from_every_kind_of_options():
    """Namespace (command line), DictConfig with and without None (YAML, checkpoint) build equal models."""
    sizes = {**toy.SIZES, "norm_groups": 2}
    reference = toy.build(randomize=False, **sizes).state_dict()
    for options in (
        OmegaConf.create({"_name": "transformer_pn_iwslt_de_en", **sizes}),
        OmegaConf.create({"_name": "transformer_pn_iwslt_de_en", "decoder_output_dim": None, **sizes}),
    ):
        torch.manual_seed(1)
        state = models.build_model(options, toy.task()).state_dict()
        assert list(state) == list(reference)
        # fairseq 0.12.2 keeps a buffer of uninitialized memory
        assert all(torch.equal(state[k], reference[k]) for k in state if not k.endswith("_float_tensor"))


@pytest.mark.parametrize(
    "options", [dict(post_norm=True), dict(encoder_normalize_before=False, decoder_normalize_before=False)]
)
def test_post_norm(options):
    """Post-norm stacks have no final norm, and train and evaluate with every norm."""
    for norms in MIXED:
        model = toy.build(**options, **norms).double()
        assert model.encoder.layer_norm is None and model.decoder.layer_norm is None
        train_pass(model, toy.batch())
        assert all(torch.isfinite(p.grad).all() for p in model.parameters())
        assert torch.isfinite(model.eval()(*toy.batch())[0]).all()


@pytest.mark.parametrize("text", ["true", "yes", "1"])
@pytest.mark.parametrize("arch", ["transformer_pn_tiny", "transformer_lm_pn_ptb"])
def test_both_orders_at_once(arch, text, monkeypatch):
    """Post-norm and pre-norm together are refused, as flags and in YAML; what an architecture fills in is no such wish."""
    config = type(MODEL_DATACLASS_REGISTRY[ARCH_MODEL_NAME_REGISTRY[arch]]())
    options = OmegaConf.create(f"post_norm: {text}\ndecoder_normalize_before: {text}\n_name: {arch}")
    with pytest.raises(ValueError, match="^--post-norm and --decoder-normalize-before exclude each other"):
        merge_with_parent(config(), options)
    monkeypatch.setattr("sys.argv", ["fairseq-train", "data", "--arch", arch, "--post-norm", "--decoder-normalize-before"])
    with pytest.raises(ValueError, match="^--post-norm and --decoder-normalize-before exclude each other"):
        models.ARCH_MODEL_REGISTRY[arch].add_args(argparse.ArgumentParser())
    filled = Namespace(post_norm=True)
    models.ARCH_CONFIG_REGISTRY[arch](filled)
    assert filled.decoder_normalize_before is False
    config.check_keys(vars(filled))


def test_layer_norm_model_equals_fairseqs_transformer():
    """With ``layer`` everywhere, the outputs are those of fairseq's own ``transformer`` with the same parameters."""
    names = dict.fromkeys(toy.ALL_POWER, "layer")
    ours = toy.build(**names).eval()
    sizes = {**toy.SIZES, "encoder_normalize_before": True, "decoder_normalize_before": True}
    theirs = models.build_model(Namespace(arch="transformer", **sizes), toy.task()).eval()
    theirs.load_state_dict(ours.state_dict())
    torch.testing.assert_close(ours(*toy.batch())[0], theirs(*toy.batch())[0], rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------- masks


@pytest.mark.parametrize("norm", ["power", "power-v", "batch"])
@pytest.mark.parametrize("post_norm", [False, True])
def test_every_norm_gets_its_mask(norm, post_norm):
    """In a training pass each norm counts the non-padding tokens of its own side, encoder or decoder."""
    model = toy.build(post_norm=post_norm, **dict.fromkeys(toy.ALL_POWER, norm))
    source, _, target = batch = toy.batch()
    with RunningStatistics(model).batch():
        train_pass(model, batch)
        counted = {name: module.stage.parts["forward"][-2:].tolist() for name, module in norms_of(model)}
    for name, (rows, calls) in counted.items():
        tokens = source if name.startswith("encoder") else target
        assert (rows, calls) == (int(tokens.ne(toy.PAD).sum()), 1), name


@pytest.mark.parametrize("by_name", [False, True])
def test_a_decoder_layer_gets_its_mask_either_way(by_name):
    """fairseq's layers take the padding mask by name and by position."""
    layer = toy.build(**toy.ALL_POWER).train().decoder.layers[0]
    x, mask = torch.randn(5, 2, 16), torch.tensor([[False] * 5, [False] * 2 + [True] * 3])
    encoder_out, others = torch.randn(4, 2, 16), (None, None, None, None, None)
    with RunningStatistics(layer).batch():
        if by_name:
            layer(x, encoder_out, self_attn_padding_mask=mask)
        else:
            layer(x, encoder_out, *others, mask)
        counted = [norm.stage.parts["forward"][-2:].tolist() for _, norm in norms_of(layer)]
    assert counted == [[7, 1]] * 3


@pytest.mark.parametrize("post_norm", [False, True])
def test_wider_padding_changes_nothing(post_norm, monkeypatch):
    """algorithm2: more padding changes no buffer, no unpadded output and no gradient."""
    # fairseq's own is of float32; how it rounds depends on the number of keys and on how many the processor adds at once
    monkeypatch.setattr(utils, "softmax", lambda x, dim, onnx_trace: torch.softmax(x, dim))
    results = []
    for extra in (0, 3):
        model = toy.build(post_norm=post_norm, norm_variant="algorithm2", **toy.ALL_POWER).double()
        batch = toy.batch(extra)
        for _ in range(2):
            logits = train_pass(model, batch)
        results.append(
            [logits[batch[2].ne(toy.PAD)]]
            + [b for n, b in model.named_buffers() if "norm" in n]
            + [p.grad for p in model.parameters()]
        )
    assert len(results[0]) == 1 + 3 * len(norms_of(model)) + len(list(model.parameters()))
    for plain, wider in zip(*results):
        torch.testing.assert_close(plain, wider, rtol=1e-10, atol=1e-11)


def test_numbers_in_padding_do_not_reach_the_statistics():
    """algorithm2: the embedding of the padding symbol influences neither valid features nor any norm buffer."""
    results = []
    for garbage in (0.0, 50.0):
        model = toy.build(norm_variant="algorithm2", **toy.ALL_POWER).double()
        with torch.no_grad():
            model.encoder.embed_tokens.weight[toy.PAD] = garbage
            model.decoder.embed_tokens.weight[toy.PAD] = garbage
        source, lengths, target = toy.batch()
        for _ in range(2):
            model.train().zero_grad()
            features = model(source, lengths, target, features_only=True)[0][target.ne(toy.PAD)]
            features.square().sum().backward()
        results.append([features] + [b for n, b in model.named_buffers() if "norm" in n])
    assert len(results[0]) == 1 + 3 * len(norms_of(model))
    for clean, dirty in zip(*results):
        torch.testing.assert_close(clean, dirty, rtol=1e-12, atol=1e-12)


def test_mask_slots_are_empty_after_a_pass_and_after_an_error():
    """No mask outlives the call it belongs to, not even one that raises."""
    model = toy.build()
    slots = [module.mask_slot for module in model.modules() if getattr(module, "mask_slot", None) is not None]
    train_pass(model, toy.batch())
    assert all(slot.padding_mask is None for slot in slots)
    layer = model.encoder.layers[0]
    with pytest.raises((ValueError, RuntimeError, AssertionError)):
        layer(torch.randn(7, 3, 5), torch.zeros(3, 7, dtype=torch.bool))
    assert all(slot.padding_mask is None for slot in slots)


def test_a_copied_model_has_its_own_slots():
    """A deep copy's norms read the slots of the copy's layers."""
    twin = copy.deepcopy(toy.build())
    for stack in (twin.encoder, twin.decoder):
        for owner in [stack, *stack.layers]:
            for child in owner.children():
                if isinstance(child, RunningNorm):
                    assert child.mask_slot is owner.mask_slot


# ---------------------------------------------------------------- training and decoding features


@pytest.mark.parametrize(
    "norms, variant, warmup_updates",
    [(norms, "reference", 0) for norms in MIXED]
    + [(toy.ALL_POWER, "reference", 100), (toy.ALL_POWER, "algorithm2", 0)],
)
def test_activation_checkpointing_changes_nothing(norms, variant, warmup_updates):
    """--checkpoint-activations on and off: forward statistics are bit-identical over several steps, what depends on
    the gradient (which fairseq then adds up in another order, for every norm) equal to rounding."""
    results = []
    for recompute in (False, True):
        model = toy.build(
            checkpoint_activations=recompute, norm_variant=variant, norm_warmup_updates=warmup_updates, **norms,
        ).double()
        values = {}
        for step in range(3):
            train_pass(model, toy.batch(seed=step))
            values.update({f"{name} at step {step}": p.grad.clone() for name, p in model.named_parameters()})
        results.append({**values, **{name: b for name, b in model.named_buffers() if "norm" in name}})
    for name, plain in results[0].items():
        if name.endswith(("running_phi", "running_mean", "running_var", "iters")):
            assert torch.equal(plain, results[1][name]), name
        else:
            torch.testing.assert_close(plain, results[1][name], rtol=1e-10, atol=1e-12, msg=name)


@pytest.mark.parametrize("norms", MIXED)
@pytest.mark.parametrize("post_norm", [False, True])
def test_incremental_decoding_equals_full_decoding(norms, post_norm):
    """Token by token with cached states gives the logits of one pass over the whole prefix."""
    model = toy.build(post_norm=post_norm, **norms).double().eval()
    source, lengths, target = toy.batch()
    target = target.clone()
    target[:, 0] = 2
    with torch.no_grad():
        encoder_out = model.encoder(source, lengths)
        full = model.decoder(target, encoder_out=encoder_out)[0]
        state = {}
        for t in range(target.size(1)):
            step = model.decoder(target[:, : t + 1], encoder_out=encoder_out, incremental_state=state)[0]
            rows = target[:, t].ne(toy.PAD)
            # fairseq's cached attention takes its softmax in float32
            torch.testing.assert_close(step[rows, 0], full[rows, t], rtol=1e-5, atol=1e-6)


def test_evaluation_changes_no_buffer():
    """A forward pass in evaluation leaves every buffer bit-identical and sees each norm once."""
    model = toy.build().eval()
    before = {name: value.clone() for name, value in model.named_buffers()}
    with toy.counted_calls(norms_of(model)) as calls, torch.no_grad():
        model(*toy.batch())
    assert set(calls.values()) == {1}
    assert all(torch.equal(value, before[name]) for name, value in model.named_buffers())


def test_layerdrop():
    """A dropped layer's statistics stay as they are; those of the layers that ran move."""
    torch.manual_seed(0)
    model = toy.build(encoder_layerdrop=0.5, encoder_layers=6)
    dropped = ran = 0
    for step in range(4):
        before = [layer.self_attn_layer_norm.steps() for layer in list(model.encoder.layers.children())]
        train_pass(model, toy.batch(seed=step))
        after = [layer.self_attn_layer_norm.steps() for layer in list(model.encoder.layers.children())]
        dropped += sum(a == b for a, b in zip(after, before))
        ran += sum(a == b + 1 for a, b in zip(after, before))
    assert dropped and ran and dropped + ran == 24


def test_half_precision_keeps_the_statistics_in_float32():
    """model.half() halves parameters and leaves the norms' buffers in float32."""
    model = toy.build().half()
    assert {p.dtype for p in model.parameters()} == {torch.float16}
    assert {b.dtype for _, norm in norms_of(model) for b in norm.buffers()} == {torch.float32}


# ---------------------------------------------------------------- options


@pytest.mark.parametrize(
    "options,message",
    [
        (dict(encoder_norm_self="powr"), "--encoder-norm-self 'powr'.*layer, rms, batch, power-v, power"),
        (dict(decoder_norm_final="none"), "--decoder-norm-final 'none'.*layer, rms"),
        (dict(norm_variant="paper"), "--norm-variant 'paper'.*reference, algorithm2"),
        (dict(norm_groups=3), r"--norm-groups 3: --encoder-norm-self .*16 channels, one of \[1, 2, 4, 8, 16\]"),
        (dict(norm_groups=-1), "--norm-groups -1.*zero or positive"),
        (dict(norm_alpha_fwd=1.5), r"--norm-alpha-fwd 1.5.*\[0, 1\]"),
        (dict(norm_alpha_bkw=-0.5), r"--norm-alpha-bkw -0.5.*\[0, 1\]"),
        (dict(norm_warmup_updates=-1), "--norm-warmup-updates -1.*zero or positive"),
        (dict(norm_eps=-1.0), "--norm-eps -1.0.*zero or positive"),
        (dict(norm_aplha_fwd=0.5), "unknown norm option 'norm_aplha_fwd'.*norm_alpha_fwd"),
        (dict(encoder_norm_slef="power"), "unknown norm option 'encoder_norm_slef'.*encoder_norm_self"),
    ],
)
@pytest.mark.parametrize("arch", ["transformer_pn", "transformer_pn_tiny"])
def test_bad_options_are_named(arch, options, message):
    """An invalid norm option raises ValueError naming the option, its value and the valid choices."""
    with pytest.raises(ValueError, match=message):
        toy.build(arch, **options)


@pytest.mark.parametrize("shared", ["share_all_embeddings", "share_decoder_input_output_embed"])
def test_shared_embeddings_are_of_one_size(shared):
    """Where input and output share them, an output of another size is refused; else, or with adaptive softmax, built."""
    with pytest.raises(ValueError, match=f"--decoder-output-dim 8 .*share their embeddings .--{shared.replace('_', '-')}"):
        toy.build(decoder_output_dim=8, **{shared: True})
    toy.build(decoder_output_dim=8)
    toy.build(decoder_output_dim=8, adaptive_softmax_cutoff="8,16", **{shared: True})


@pytest.mark.parametrize("shared", ["share_all_embeddings", "share_decoder_input_output_embed"])
def test_shared_embeddings_and_adaptive_softmax(shared):
    """A model with both loads its own checkpoint."""
    made = dict(adaptive_softmax_cutoff="8,16", **{shared: True})
    state = toy.build(**made).state_dict()
    model = toy.build(seed=2, **made)
    model.load_state_dict(dict(state))
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_checkpoint_of_another_norm():
    """Loading a checkpoint whose norms differ raises ValueError naming the position and both norms."""
    for mine, theirs in (("power", "layer"), ("layer", "power"), ("power", "power-v"), ("rms", "layer")):
        model = toy.build(encoder_norm_ff=mine)
        state = toy.build(encoder_norm_ff=theirs).state_dict()
        with pytest.raises(ValueError, match=f"{theirs!r}.* at encoder.layers.0.final_layer_norm, the model {mine!r}"):
            model.load_state_dict(state)


def test_checkpoints_of_fairseqs_first_versions():
    """What fairseq's own transformer loads, with the norms under their first names, a model with LayerNorm loads too."""
    names = dict.fromkeys(toy.ALL_POWER, "layer")
    state = toy.build(**names).state_dict()
    first = dict(state)
    for side, attributes in (
        ("encoder", ("self_attn_layer_norm", "final_layer_norm")),
        ("decoder", ("self_attn_layer_norm", "encoder_attn_layer_norm", "final_layer_norm")),
    ):
        for number, attribute in enumerate(attributes):
            for layer in range(2):
                for kind in ("weight", "bias"):
                    value = first.pop(f"{side}.layers.{layer}.{attribute}.{kind}")
                    first[f"{side}.layers.{layer}.layer_norms.{number}.{kind}"] = value
    model = toy.build(seed=2, **names)
    model.load_state_dict(dict(first))
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    with pytest.raises(ValueError, match="'layer'.* at encoder.layers.0.self_attn_layer_norm, the model 'power'"):
        toy.build().load_state_dict(first)


# ---------------------------------------------------------------- golden traces


def test_the_authors_model_scores_as_recorded(oracle):
    """Their checkpoint, loaded as it is, gives the recorded log-probabilities within 2e-5, and batch0's states."""
    ensemble, _, _ = checkpoint_utils.load_model_ensemble_and_task(
        [str(oracle / "model" / "power_enc" / "checkpoint_best.pt")],
        arg_overrides={"data": str(oracle / "model" / "data" / "data-bin")},
    )
    model = ensemble[0].eval()
    golden = np.load(oracle / "model" / "power_enc" / "teacher_forced.npz")
    for row in range(len(golden["src"])):
        source = torch.tensor(golden["src"][row : row + 1, : golden["src_len"][row]]).long()
        length = int(golden["tgt_len"][row])
        previous = torch.tensor(golden["prev"][row : row + 1, :length]).long()
        target = torch.tensor(golden["tgt"][row, :length]).long()
        with torch.no_grad():
            scores = model(source, torch.tensor([source.size(1)]), previous)[0].log_softmax(-1)[0]
        picked = scores.gather(1, target.unsqueeze(1)).squeeze(1).numpy()
        np.testing.assert_allclose(picked, golden["tok_lp"][row, :length], atol=2e-5, rtol=0)
        if row < len(golden["full_lp_first10"]):
            np.testing.assert_allclose(scores.numpy(), golden["full_lp_first10"][row, :length], atol=2e-5, rtol=0)


@reads_meters
def test_the_authors_batch_norm_checkpoints(oracle, tmp_path):
    """A checkpoint of theirs with ``batch``, as it is and converted: their batch norm with its statistics, the same
    scores.
    """
    state = checkpoint.load(str(oracle / "model" / "power_enc" / "checkpoint_best.pt"))
    model = {}
    for name, tensor in state["model"].items():
        if name.endswith(".running_phi"):  # as their class names what it saves
            prefix = name[: -len("running_phi")]
            model[prefix + "running_mean"] = tensor.reshape(-1) - 0.7
            model[prefix + "running_var"] = tensor.reshape(-1)
            model[prefix + "num_batches_tracked"] = torch.tensor(1015)
        elif not name.endswith((".ema_gz", ".iters")):
            model[name] = tensor
    state["model"] = model
    state["args"].encoder_norm_self = state["args"].encoder_norm_ff = "batch"
    paths = [str(tmp_path / name) for name in ("theirs.pt", "ours.pt")]
    checkpoint.save(state, paths[0])
    checkpoint.save(checkpoint.convert_authors_checkpoint(state), paths[1])
    source = torch.tensor([[1, 1, 7, 9, 11, 2], [5, 6, 8, 12, 13, 2]])
    scores = []
    for path in paths:
        ensemble, _, _ = checkpoint_utils.load_model_ensemble_and_task(
            [path], arg_overrides={"data": str(oracle / "model" / "data" / "data-bin")}
        )
        norm = ensemble[0].encoder.layers[0].self_attn_layer_norm
        assert (type(norm), norm.variant, norm.groups, norm.alpha_fwd) == (MaskedBatchNorm, "reference", 1, 0.95)
        assert norm.steps() == 1015 and torch.equal(
            norm.running_mean, model["encoder.layers.0.self_attn_layer_norm.running_mean"]
        )
        assert ensemble[0].encoder.layer_norm.variant == "reference"
        scores.append(ensemble[0].eval()(source, torch.tensor([4, 6]), source)[0].detach())
    assert torch.equal(*scores)


def test_the_authors_training_run_is_repeated(oracle):
    """12 updates of their run: loss, gradients and buffers of every step equal the recorded ones."""
    trace = oracle / "train_trace" / "power_enc_untied"
    state = checkpoint.convert_authors_checkpoint(checkpoint.load(str(trace / "init.pt")))
    args = state["args"]
    args.data = str(oracle / "model" / "data" / "data-bin")
    del args.min_lr
    config = convert_namespace_to_omegaconf(args)
    model = tasks.setup_task(config.task).build_model(config.model)
    model.load_state_dict(state["model"], strict=True)
    golden, gradients, buffers = (np.load(trace / f"{name}.npz") for name in ("trace", "grads", "buffers"))
    smoothing, rate = 0.1, float(golden["lr"])
    model.train()
    compared = 0
    for step in range(12):
        source, lengths, previous, target = (
            torch.tensor(golden[f"{name}_{step}"])
            for name in ("src_tokens", "src_lengths", "prev_output_tokens", "target")
        )
        model.zero_grad()
        scores = model(source, lengths, previous)[0].log_softmax(-1)[target.ne(toy.PAD)]
        nll = -scores.gather(1, target[target.ne(toy.PAD)].unsqueeze(1)).sum()
        loss = (1 - smoothing) * nll - smoothing / scores.size(-1) * scores.sum()  # the formula of fairseq 0.8
        loss.backward()
        assert abs(loss.item() - golden["loss"][step]) / golden["loss"][step] < 1e-6
        tokens = float(golden["ntokens"][step])
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.grad /= tokens
                if f"step{step}/{name}" in gradients.files:
                    recorded = gradients[f"step{step}/{name}"]
                    error = np.abs(parameter.grad.numpy() - recorded).max() / max(1e-3, np.abs(recorded).max())
                    assert error < 5e-6, (step, name)
                    compared += 1
                parameter -= rate * parameter.grad
        for name, buffer in model.named_buffers():
            if name in buffers.files:
                recorded = buffers[name][step].reshape(buffer.shape)
                error = np.abs(buffer.numpy() - recorded).max() / np.abs(recorded).max()
                assert error < 3e-6, (step, name)
                compared += 1
    assert compared > 12 * 15


@reads_meters
def test_the_authors_options_survive_the_conversion(oracle):
    """Converted, their checkpoint has our architecture, their LR warm-up as PN's, and (C,) statistics."""
    original = checkpoint.load(str(oracle / "model" / "power_enc" / "checkpoint_best.pt"))
    converted = checkpoint.convert_authors_checkpoint(original)
    settings = json.loads((oracle / "model" / "power_enc" / "args.json").read_text())
    args = converted["args"]
    assert (args.arch, args.task) == ("transformer_pn_iwslt_de_en", "translation_pn")
    assert (args.norm_warmup_updates, args.norm_final_warmup_updates) == (settings["warmup_updates"], 1000)
    assert original["args"].arch == "transformer_iwslt_de_en_v2"
    for name, tensor in converted["model"].items():
        if name.endswith("running_phi"):
            assert tensor.shape == (32,) and original["model"][name].shape == (1, 32, 1, 1)


def gradients_without_layer_scale(seed, variant, steps=40):
    """Gradient norms of a 6+6-layer model with PN everywhere, trained by Adam at a learning rate far too high for it."""
    size = dict(encoder_layers=6, decoder_layers=6, encoder_embed_dim=32, decoder_embed_dim=32, encoder_ffn_embed_dim=64,
                decoder_ffn_embed_dim=64)
    model = toy.build("transformer_pn_tiny", seed=seed, randomize=False, norm_groups=0, norm_variant=variant,
                      norm_warmup_updates=0, **toy.ALL_POWER, **size).train()
    optimizer = torch.optim.Adam(model.parameters(), 0.1, betas=(0.9, 0.98))
    generator = torch.Generator().manual_seed(seed)
    norms = []
    for _ in range(steps):
        words = torch.randint(4, 24, (32, 6), generator=generator)
        previous = torch.cat([torch.full((32, 1), 2), words[:, :-1]], 1)
        logits = model(words.flip(1), torch.full((32,), 6), previous)[0]
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(logits.view(-1, logits.size(-1)), words.view(-1)).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), float("inf"))))
        optimizer.step()
    return norms


@pytest.mark.parametrize("variant", ["reference", pytest.param("algorithm2", marks=pytest.mark.slow)])
def test_training_without_layer_scale_recovers_from_too_high_a_learning_rate(variant, monkeypatch):
    """Gradients become small again within 40 steps; without the bound on a jump they stay a thousand times as large."""
    bounded = gradients_without_layer_scale(2, variant)
    monkeypatch.setattr(PowerNorm, "JUMP", float("inf"))
    unbounded = gradients_without_layer_scale(2, variant)
    assert max(bounded[-10:]) < 50, bounded
    assert not max(unbounded[-10:]) < 1000 * max(bounded[-10:]), unbounded


class Operations(TorchDispatchMode):
    """Counts the operations that torch executes."""

    number = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.number += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.slow
def test_recording_costs_as_much_for_many_norms_as_for_few(tmp_path):
    """Describing norms and writing them down takes the same few operations however many norms of a kind there are, and
    however many rows went through them: next to nothing beside a step."""
    found = []
    for layers, length in ((1, 4), (3, 16)):
        model = toy.build(encoder_layers=layers, decoder_layers=layers, **toy.ALL_POWER).train()
        statistics, recorder = RunningStatistics(model), Recorder(str(tmp_path / f"record{layers}"), 1)
        statistics.switches.recording = True
        words, lengths = torch.randint(4, 24, (8, length)), torch.full((8,), length)
        with Operations() as step:
            with statistics.batch():
                model(words, lengths, words)[0].sum().backward()
            statistics.reduce()
        with Operations() as recording:
            recorder.write(1, statistics.describe())
        found.append(recording.number)
    assert len(recorder.check(new_run=False)) == 3 * 5 + 2
    assert found[0] == found[1] < 0.1 * step.number, (found, step.number)
