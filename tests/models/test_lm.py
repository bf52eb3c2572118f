"""Language models: causality, batches, options, sizes, and fairseq's commands for them."""
import copy
import math
import random
import re
import shlex
from argparse import Namespace

import fairseq
import pytest
import torch
import toy
from fairseq import checkpoint_utils, models, options, tasks
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from omegaconf import OmegaConf

from fairseq_powernorm.models import base
from fairseq_powernorm.models.tensorized_lm_pn import TensorizedLMPNConfig
from fairseq_powernorm.models.transformer_lm_pn import TransformerLMPNConfig
from fairseq_powernorm.norms import NORMS, LayerNorm, PowerNorm, RunningNorm
from fairseq_powernorm.statistics import RunningStatistics

SIZES = dict(
    decoder_layers=2, decoder_embed_dim=16, decoder_ffn_embed_dim=32, decoder_attention_heads=4, dropout=0.0,
    attention_dropout=0.0, activation_dropout=0.0,
)
TENSORIZED = {
    **{key: value for key, value in SIZES.items() if key not in ("decoder_attention_heads", "attention_dropout")},
    "tensorized_window": 8, "tensorized_rank": 5,
}
ADAPTIVE = dict(adaptive_softmax_cutoff="8,16", adaptive_input_cutoff="8,16", adaptive_softmax_dropout=0.0)
#: architecture -> options that make it small; the dictionary has 24 symbols
ARCHITECTURES = {
    "transformer_lm_pn": SIZES,
    "transformer_lm_pn_ptb": SIZES,
    "transformer_lm_pn_wiki103": {**SIZES, **ADAPTIVE},
    "tensorized_lm_pn": TENSORIZED,
    "tensorized_lm_pn_ptb": TENSORIZED,
    "tensorized_lm_pn_wiki103": {**TENSORIZED, **ADAPTIVE},
}
#: every norm in each kind of model, and the other architectures
IN_MODELS = [(arch, norm) for arch in ("transformer_lm_pn", "tensorized_lm_pn") for norm in NORMS]
IN_MODELS += [(arch, "power") for arch in ARCHITECTURES if arch not in ("transformer_lm_pn", "tensorized_lm_pn")]
LENGTH = 8


def build(arch, norm=None, **changes):
    norms = {} if norm is None else dict(decoder_norm_self=norm, decoder_norm_ff=norm)
    return toy.build(arch, sizes=ARCHITECTURES[arch], **{**norms, **changes})


def sentences(rows=3, length=LENGTH, seed=0):
    return torch.randint(4, 24, (rows, length), generator=torch.Generator().manual_seed(seed))


def log_probs(model, tokens):
    return model.get_normalized_probs(model(tokens), log_probs=True)


def norms_of(model):
    return [module for module in model.modules() if isinstance(module, tuple(NORMS.values()))]


# ---------------------------------------------------------------- causality


def reach_back(model, tokens):
    """The largest change of a log-probability at a position before the one token that was changed, over all positions.

    Also checks that the change is seen at its own position. Every pass begins with the same statistics.
    """
    largest = 0.0
    with torch.no_grad():
        before = log_probs(copy.deepcopy(model), tokens)
        for t in range(tokens.size(1)):
            changed = tokens.clone()
            changed[:, t] = 4 + (tokens[:, t] - 4 + 7) % 20
            after = log_probs(copy.deepcopy(model), changed)
            assert (after[:, t] != before[:, t]).any()
            if t:
                largest = max(largest, float((after[:, :t] - before[:, :t]).abs().max()))
    return largest


@pytest.mark.parametrize("arch, norm", IN_MODELS)
def test_no_token_is_seen_before_its_time(arch, norm):
    """In evaluation, changing token t changes no log-probability before t: a difference of exactly zero."""
    assert reach_back(build(arch, norm).eval(), sentences()) == 0.0


@pytest.mark.parametrize(
    "arch, norm, changes",
    [
        *((arch, norm, {}) for arch, norm in IN_MODELS if not issubclass(NORMS[norm], RunningNorm)),
        *((arch, "power", dict(norm_warmup_updates=0)) for arch in ARCHITECTURES),
        *((arch, "power", dict(norm_warmup_updates=0, norm_variant="algorithm2")) for arch in list(ARCHITECTURES)[::3]),
    ],
)
def test_nor_in_training_by_norms_without_batch_statistics(arch, norm, changes):
    """The same in training mode with the norms without statistics and with PN after its warm-up, which has running ones."""
    assert reach_back(build(arch, norm, **changes).train(), sentences()) == 0.0


@pytest.mark.parametrize("arch", ["transformer_lm_pn_ptb", "tensorized_lm_pn_ptb"])
@pytest.mark.parametrize("norm", ["batch", "power-v", "power"])
def test_batch_statistics_are_seen_by_the_check(arch, norm):
    """BN, PN-V and PN within its warm-up mix positions in training: the check finds it, so that it can fail."""
    assert reach_back(build(arch, norm).train(), sentences()) > 0.0


@pytest.mark.parametrize("arch", [arch for arch in ARCHITECTURES if arch.startswith("tensorized")])
def test_the_noncausal_flag_is_seen_by_the_check(arch):
    """--tensorized-noncausal lets later tokens through, in evaluation too."""
    assert reach_back(build(arch, "layer", tensorized_noncausal=True).eval(), sentences()) > 0.0


# ---------------------------------------------------------------- batches


@pytest.mark.parametrize("arch, norm", IN_MODELS)
def test_a_sentence_alone_equals_itself_in_a_batch(arch, norm):
    """In evaluation the log-probabilities of a sentence do not depend on the others of its batch, nor on padding after
    it (where fairseq pads batches of language models, in generation too)."""
    model = build(arch, norm).double().eval()
    tokens = sentences()
    tokens[1, 5:] = tokens[2, 2:] = toy.PAD
    before = {name: value.clone() for name, value in model.named_buffers() if "norm" in name}
    with torch.no_grad():
        together = log_probs(model, tokens)
        for row, length in enumerate((8, 5, 2)):
            alone = log_probs(model, tokens[row : row + 1, :length])
            torch.testing.assert_close(together[row, :length], alone[0], rtol=1e-10, atol=1e-10)
    assert all(torch.equal(value, before[name]) for name, value in model.named_buffers() if "norm" in name)


@pytest.mark.parametrize("arch", ["tensorized_lm_pn_ptb", "tensorized_lm_pn_wiki103"])
def test_padding_on_the_left_of_a_tensorized_window(arch):
    """The same with the padding before the sentence (fairseq never pads language models so)."""
    model = build(arch).double().eval()
    tokens = sentences(rows=1)
    with torch.no_grad():
        for length in (1, 5):
            padded = torch.cat([torch.full((1, LENGTH - length), toy.PAD), tokens[:, :length]], dim=1)
            alone = log_probs(model, tokens[:, :length])
            torch.testing.assert_close(log_probs(model, padded)[:, LENGTH - length :], alone, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("arch", ["transformer_lm_pn_ptb", "tensorized_lm_pn_ptb"])
@pytest.mark.parametrize("post_norm", [False, True])
def test_every_norm_gets_its_mask(arch, post_norm):
    """In training each norm, final ones included, counts the tokens that are not padding."""
    model = build(arch, "power", decoder_normalize_before=not post_norm).train()
    tokens = sentences()
    tokens[1, 5:] = tokens[2, 2:] = toy.PAD
    with RunningStatistics(model).batch():
        model(tokens)
        counted = [module.stage.parts["forward"][-2:].tolist() for module in norms_of(model)]
    assert counted == [[8 + 5 + 2, 1]] * (2 * 2 + (not post_norm))


@pytest.mark.parametrize("arch", ["transformer_lm_pn_ptb", "transformer_lm_pn_wiki103"])
@pytest.mark.parametrize("norm", list(NORMS))
def test_incremental_decoding_equals_full_decoding(arch, norm):
    """Token by token with cached states gives the features of one pass over the text."""
    model = build(arch, norm).double().eval()
    tokens = sentences()
    with torch.no_grad():
        full, state = model(tokens)[0], {}
        for t in range(LENGTH):
            step = model.decoder(tokens[:, : t + 1], incremental_state=state)[0]
            # fairseq's cached attention takes its softmax in float32
            torch.testing.assert_close(step[:, 0], full[:, t], rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------- options and sizes


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_power_norm_everywhere_is_the_default(arch):
    """PN at every position of a language model; groups = heads, of which the tensorized attention has one."""
    norms = norms_of(build(arch))
    final = arch in ("transformer_lm_pn", "transformer_lm_pn_ptb")  # Baevski & Auli have none, post-norm neither
    assert [type(norm) for norm in norms] == [PowerNorm] * (4 + final)
    assert {norm.groups for norm in norms} == {1 if arch.startswith("tensorized") else 4}


def test_each_flag_reaches_its_positions():
    """The placement options and the constants arrive at the norms they name."""
    model = build(
        "transformer_lm_pn", decoder_norm_self="rms", decoder_norm_ff="batch", decoder_norm_final="power",
        norm_alpha_fwd=0.5, norm_warmup_updates=7, norm_final_warmup_updates=3, norm_groups=2, norm_eps=1e-3,
    )
    layer = model.decoder.layers[1]
    kinds = [type(norm) for norm in (layer.self_attn_layer_norm, layer.final_layer_norm, model.decoder.layer_norm)]
    assert kinds == [NORMS["rms"], NORMS["batch"], NORMS["power"]]
    batch = layer.final_layer_norm
    assert (batch.alpha_fwd, batch.groups, layer.self_attn_layer_norm.eps) == (0.5, 2, 1e-3)
    assert model.decoder.layer_norm.warmup_updates == 3


def test_pre_and_post_norm():
    """transformer_lm_pn is pre-norm but for --post-norm; tensorized_lm_pn is post-norm as published."""
    for arch, changes, pre_norm in (
        ("transformer_lm_pn", {}, True),
        ("transformer_lm_pn_ptb", dict(post_norm=True), False),
        ("transformer_lm_pn_wiki103", dict(decoder_normalize_before=False), False),
        ("tensorized_lm_pn", {}, False),
        ("tensorized_lm_pn_wiki103", dict(decoder_normalize_before=True), True),
    ):
        decoder = build(arch, **changes).decoder
        assert {layer.normalize_before for layer in decoder.layers} == {pre_norm}, arch
        if not pre_norm:
            assert decoder.layer_norm is None


@pytest.mark.parametrize("adaptive", [False, True])
def test_layer_norm_model_equals_fairseqs_transformer_lm(adaptive):
    """With ``layer`` everywhere, the outputs are those of fairseq's own ``transformer_lm`` with the same parameters."""
    changes = {**SIZES, **ADAPTIVE, "adaptive_input": True, "tie_adaptive_weights": True} if adaptive else SIZES
    ours = toy.build("transformer_lm_pn", sizes=changes, decoder_norm_self="layer", decoder_norm_ff="layer").eval()
    assert {type(norm) for norm in norms_of(ours)} == {LayerNorm}
    args = Namespace(arch="transformer_lm_gpt", activation_fn="relu", **changes)
    theirs = models.build_model(args, toy.task()).eval()
    theirs.load_state_dict(ours.state_dict())
    torch.testing.assert_close(log_probs(ours, sentences()), log_probs(theirs, sentences()), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "arch,symbols,millions",
    [
        ("transformer_lm_pn_wiki103", 267744, (246, 248)),  # Baevski & Auli: 247M
        ("tensorized_lm_pn_wiki103", 267744, (85, 86)),  # Ma et al.: 85.3M
        ("transformer_lm_pn_ptb", 10000, (5, 7)),
        ("tensorized_lm_pn_ptb", 10000, (6, 7.5)),
    ],
)
def test_parameter_counts(arch, symbols, millions):
    """The number of parameters of each architecture at the size of its corpus, on the meta device."""
    task = toy.task()
    task.source_dictionary.pad_to_multiple_(symbols)
    with torch.device("meta"):
        model = models.build_model(Namespace(_name=arch), task)
    parameters = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    assert millions[0] <= parameters <= millions[1]
    if arch == "transformer_lm_pn_wiki103":
        layer = model.decoder.layers[0]
        assert (len(model.decoder.layers), layer.embed_dim, layer.fc1.out_features, layer.nh) == (16, 1024, 4096, 8)
        assert model.decoder.adaptive_softmax.cutoff == [20000, 60000, symbols]


@pytest.mark.parametrize("arch", [arch for arch in ARCHITECTURES if not arch.endswith("wiki103")])
def test_the_same_model_from_every_kind_of_options(arch):
    """Namespace (command line), DictConfig with and without None, with references (YAML) build equal models."""
    reference = build(arch, randomize=False, norm_groups=2).state_dict()
    given = {"_name": arch, **ARCHITECTURES[arch], "norm_groups": 2}
    by_reference = {**given, "tokens_per_sample": "${task.tokens_per_sample}"}
    whole = OmegaConf.create({"task": {"tokens_per_sample": 8}, "model": by_reference})
    for changed in (OmegaConf.create(given), OmegaConf.create({**given, "decoder_output_dim": None}), whole.model):
        torch.manual_seed(1)
        model = models.build_model(changed, toy.task())
        state = model.state_dict()
        assert list(state) == list(reference)
        # fairseq 0.12.2 keeps a buffer of uninitialized memory
        assert all(torch.equal(state[k], reference[k]) for k in state if not k.endswith("_float_tensor"))
    if arch.startswith("transformer"):
        assert model.max_positions() == 8


def registered(*names):
    return [arch for name in names for arch in models.ARCH_MODEL_INV_REGISTRY[name]]


@pytest.mark.parametrize("arch", registered("transformer_pn", "transformer_lm_pn", "tensorized_lm_pn"))
@pytest.mark.parametrize("changes", [{}, dict(dropout=0.25, decoder_layers=3, decoder_norm_ff="rms")])
def test_an_architecture_sets_the_same_options_on_every_route(arch, changes):
    """What an architecture sets on a command line's options, it sets on those of a YAML file, which hold defaults."""
    line = Namespace(**changes)
    model = models.ARCH_MODEL_REGISTRY[arch]
    yaml = OmegaConf.structured(model.options(**changes))
    OmegaConf.set_struct(yaml, False)
    for route in (line, yaml):
        models.ARCH_CONFIG_REGISTRY[arch](route)
    filled = [base.given(route) for route in (line, yaml)]
    if arch not in models.MODEL_REGISTRY:  # there the architecture of the name sets nothing, the model completes
        assert len(filled[0]) > 20
    for name, value in filled[0].items():
        assert filled[1][name] == value, name


@pytest.mark.parametrize("arch", registered("transformer_pn", "transformer_lm_pn", "tensorized_lm_pn"))
def test_what_fairseq_compares_with_numbers_is_one(arch):
    """fairseq's trainer and its start of several ranks read ``base_layers`` from the settings as they are."""
    assert OmegaConf.structured(models.ARCH_MODEL_REGISTRY[arch].options()).base_layers == 0


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize(
    "changes,message",
    [
        (dict(encoder_norm_self="power"), "has no encoder.*'encoder_norm_self' = 'power'.*decoder_norm_self"),
        (dict(decoder_norm_self="powr"), "--decoder-norm-self 'powr'.*layer, rms, batch, power-v, power"),
        (dict(norm_aplha_fwd=0.5), "unknown norm option 'norm_aplha_fwd'.*norm_alpha_fwd"),
        (dict(norm_groups=3), r"--norm-groups 3: --decoder-norm-self .*16 channels, one of \[1, 2, 4, 8, 16\]"),
        (dict(tensorized_nocausal=True), "unknown option 'tensorized_nocausal'.*decoder_norm_self"),
    ],
)
def test_bad_options_are_named(arch, changes, message):
    """An option that is invalid, misspelt or an encoder's raises ValueError naming it, its value and the valid ones."""
    with pytest.raises(ValueError, match=message):
        build(arch, **changes)


@pytest.mark.parametrize("arch", ["tensorized_lm_pn", "transformer_lm_pn_ptb"])
@pytest.mark.parametrize("side", ["input", "output"])
def test_tied_embeddings_are_of_one_size(arch, side):
    """Where the architecture ties them, an input or output of another size than the other is refused; of the same, built."""
    with pytest.raises(ValueError, match=f"--decoder-{side}-dim 8.*share their embeddings"):
        build(arch, **{f"decoder_{side}_dim": 8})
    build(arch, decoder_input_dim=8, decoder_output_dim=8)


@pytest.mark.parametrize("arch", ["tensorized_lm_pn", "transformer_lm_pn_ptb"])
def test_tied_embeddings_and_adaptive_softmax(arch):
    """Where the architecture ties embeddings, a model with adaptive softmax loads its own checkpoint."""
    state = build(arch, adaptive_softmax_cutoff="8,16").state_dict()
    model = build(arch, adaptive_softmax_cutoff="8,16", seed=2)
    model.load_state_dict(dict(state))
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_options_of_softmax_attention_are_not_those_of_the_tensorized_model():
    """What would have no effect is no option: attention dropout, heads, absolute positions."""
    for name in ("attention_dropout", "decoder_attention_heads", "decoder_learned_pos"):
        assert name in TransformerLMPNConfig.__dataclass_fields__
        assert name not in TensorizedLMPNConfig.__dataclass_fields__
    with pytest.raises(ValueError, match="--tensorized-rank 0: must be positive"):
        build("tensorized_lm_pn", tensorized_rank=0)


def test_checkpoint_of_another_norm():
    """Loading a checkpoint whose norms differ raises ValueError naming the position and both norms."""
    state = build("tensorized_lm_pn_ptb", "layer").state_dict()
    with pytest.raises(ValueError, match="'layer' .* at decoder.layers.0.self_attn_layer_norm, the model 'power'"):
        build("tensorized_lm_pn_ptb", "power").load_state_dict(state)


# ---------------------------------------------------------------- fairseq's commands

WORDS = 12
TOKENS = 8
COMMON = ("--user-dir", "fairseq_powernorm", "--task", "language_modeling_pn", "--cpu", "--num-workers", 0)
TRAIN = dict(
    decoder_layers=2, decoder_embed_dim=16, decoder_ffn_embed_dim=32, tokens_per_sample=TOKENS, batch_size=8,
    optimizer="adam", lr=0.01, norm_warmup_updates=10, max_update=20, log_format="json", log_interval=1,
    data_buffer_size=0, seed=1,
)  # fmt: skip
ARCH_OPTIONS = {
    "transformer_lm_pn_ptb": {},
    "tensorized_lm_pn_ptb": dict(tensorized_window=TOKENS, tensorized_rank=5),
}


@pytest.fixture(scope="module")
def lm_data(tmp_path_factory):
    """A binarized toy corpus whose words follow each other by a rule."""
    folder = tmp_path_factory.mktemp("lm")
    draw = random.Random(1)
    for split, size in (("train", 100), ("valid", 21), ("test", 27)):
        lines = []
        for _ in range(size):
            word, words = draw.randrange(WORDS), []
            for _ in range(draw.randrange(3, 12)):
                words.append(f"w{word}")
                word = (word * 3 + draw.choice((1, 2))) % WORDS
            lines.append(" ".join(words) + "\n")
        (folder / f"{split}.txt").write_text("".join(lines))
    toy.preprocess(
        "--only-source", "--destdir", folder / "bin",
        *(word for s in ("train", "valid", "test") for word in (f"--{s}pref", folder / f"{s}.txt")),
    )
    return folder / "bin"


@pytest.fixture(scope="module")
def trained(lm_data, tmp_path_factory):
    """arch -> (save directory, losses) of 20 updates by fairseq-train."""
    runs = {}
    for arch, changes in ARCH_OPTIONS.items():
        folder = tmp_path_factory.mktemp(arch)
        settings = {**TRAIN, **changes}
        done = toy.command(
            "fairseq-train", lm_data, *COMMON, "--arch", arch, "--save-dir", folder, "--no-epoch-checkpoints",
            *(word for key, value in settings.items() for word in ("--" + key.replace("_", "-"), value)),
        )
        runs[arch] = folder, toy.losses(done.stdout + done.stderr)
    return runs


def load(folder, data):
    """(model in evaluation, task) of a run's last checkpoint."""
    ensemble, _, task = checkpoint_utils.load_model_ensemble_and_task(
        [str(folder / "checkpoint_last.pt")], arg_overrides={"data": str(data)}
    )
    return ensemble[0].eval(), task


def expected_bits(model, task, context):
    """Bits a token of the test set: blocks of TOKENS - context tokens, after at most ``context`` tokens before it."""
    task.load_dataset("test")
    blocks = [task.dataset("test")[i] for i in range(len(task.dataset("test")))]
    text = torch.cat([block["source"] for block in blocks])
    target = torch.cat([block["target"] for block in blocks])
    step, bits = TOKENS - context, []
    with torch.no_grad():
        for start in range(0, len(text), step):
            first = max(0, start - context)
            scores = log_probs(model, text[None, first : start + step])[0, start - first :]
            bits.append(-scores.gather(1, target[start : start + step, None]) / math.log(2))
    return float(torch.cat(bits).mean())


@pytest.mark.slow
@pytest.mark.parametrize("arch,context", [("transformer_lm_pn_ptb", 0), ("tensorized_lm_pn_ptb", 5)])
def test_eval_lm(lm_data, trained, arch, context):
    """fairseq-eval-lm's loss is that of the model block by block, with and without --context-window."""
    folder, losses = trained[arch]
    assert len(losses) == 20 and losses[20] < losses[1]
    done = toy.command(
        "fairseq-eval-lm", lm_data, *COMMON, "--path", folder / "checkpoint_last.pt", "--gen-subset", "test",
        "--tokens-per-sample", TOKENS, "--context-window", context, "--batch-size", 3,
    )
    (reported,) = re.findall(r"Loss \(base 2\): ([\d.]+)", done.stdout + done.stderr)
    assert float(reported) == pytest.approx(expected_bits(*load(folder, lm_data), context), abs=2e-4)


@pytest.mark.slow
@pytest.mark.parametrize("arch,context", [("transformer_lm_pn_ptb", 3), ("tensorized_lm_pn_ptb", 0)])
def test_eval_lm_in_this_process(lm_data, trained, arch, context):
    """The same for the other two of the four cases, by the function behind the command."""
    from fairseq_cli import eval_lm

    folder = trained[arch][0]
    words = (lm_data, *COMMON, "--path", folder / "checkpoint_last.pt", "--gen-subset", "test", "--batch-size", 4,
             "--tokens-per-sample", TOKENS, "--context-window", context)  # fmt: skip
    words = [str(toy.ROOT / word) if word == "fairseq_powernorm" else str(word) for word in words]
    args = options.parse_args_and_arch(options.get_eval_lm_parser(), words)
    results = eval_lm.main(convert_namespace_to_omegaconf(args))
    assert float(results["loss"]) == pytest.approx(expected_bits(*load(folder, lm_data), context), abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "arch,message", [("transformer_lm_pn_ptb", "a block of 20. tokens is longer than the 8"),
                     ("tensorized_lm_pn_ptb", "a block of 20. tokens.*--tensorized-window 8")],
)  # fmt: skip
def test_blocks_that_are_too_long_are_an_error(lm_data, trained, arch, message):
    """eval-lm with --tokens-per-sample beyond the model's: an error instead of a perplexity of what fits."""
    model, task = load(trained[arch][0], lm_data)
    task.args.tokens_per_sample = 1024
    task.load_dataset("test")
    with pytest.raises(ValueError, match=message):
        for batch in task.eval_lm_dataloader(task.dataset("test"), max_positions=model.max_positions()):
            model(**batch["net_input"])


def sampled(lm_data, folder, prompts, *arguments):
    """[(words, bits of each word and of the end)] of fairseq-interactive's hypotheses."""
    done = toy.command(
        "fairseq-interactive", lm_data, *COMMON, "--path", folder / "checkpoint_last.pt", "--buffer-size", len(prompts),
        "--batch-size", len(prompts), *arguments, stdin="".join(prompt + "\n" for prompt in prompts),
    )
    texts = re.findall(r"^H-\d+\t\S+\t(.*)$", done.stdout, re.M)
    scores = [[float(s) for s in line.split()] for line in re.findall(r"^P-\d+\t(.*)$", done.stdout, re.M)]
    return list(zip(texts, scores))


@pytest.mark.slow
@pytest.mark.parametrize(
    "arch,arguments",
    [
        ("transformer_lm_pn_ptb", ("--sampling", "--sampling-topk", 4, "--beam", 1, "--nbest", 1, "--seed", 3)),
        ("tensorized_lm_pn_ptb", ("--beam", 2, "--max-len-b", 15, "--min-len", 14)),
    ],
)
def test_sampling(lm_data, trained, arch, arguments):
    """fairseq-interactive continues prompts of different lengths in one batch, and the score of every word is the
    model's log-probability of it given the text before, of which the tensorized model sees the last window."""
    folder = trained[arch][0]
    prompts = ["w1 w4", "w2", "w5 w3 w11 w10"]
    model, task = load(folder, lm_data)
    dictionary = task.source_dictionary
    results = sampled(lm_data, folder, prompts, *arguments)
    assert len(results) == len(prompts)
    for prompt, (text, scores) in zip(prompts, results):
        assert text.startswith(prompt) and text != prompt
        words = [dictionary.eos(), *(dictionary.index(word) for word in text.split()), dictionary.eos()]
        if arch.startswith("tensorized"):
            assert len(words) > 2 * TOKENS - 1
        assert len(scores) == len(words) - 1
        with torch.no_grad():
            for t, score in enumerate(scores):
                given = torch.tensor([words[max(0, t + 1 - TOKENS) : t + 1]])
                bits = float(log_probs(model, given)[0, -1, words[t + 1]]) / math.log(2)
                assert bits == pytest.approx(score, abs=1e-4)  # printed with four digits


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["transformer_lm_pn", "tensorized_lm_pn"])
def test_the_name_of_a_model_trains(arch, lm_data, tmp_path, monkeypatch):
    """``--arch`` with the name of a model itself, which no architecture fills in."""
    from fairseq_cli import train

    settings = {**TRAIN, **(ARCH_OPTIONS["tensorized_lm_pn_ptb"] if arch.startswith("tensorized") else {}), "max_update": 1}
    flags = [word for key, value in settings.items() for word in ("--" + key.replace("_", "-"), value)]
    line = ["fairseq-train", lm_data, *COMMON, "--arch", arch, "--save-dir", tmp_path, "--disable-validation", *flags]
    line = [str(toy.ROOT / word) if word == "fairseq_powernorm" else str(word) for word in line]
    monkeypatch.setattr("sys.argv", line)
    train.cli_main()
    assert len(load(tmp_path, lm_data)[0].decoder.layers) == 2


@pytest.mark.slow
def test_yaml_route(lm_data, trained, tmp_path):
    """fairseq-hydra-train with the same settings in a YAML file: the same loss at each update, to the last digit."""
    arch = "tensorized_lm_pn_ptb"
    model = {key: value for key, value in TRAIN.items() if key.startswith(("decoder", "norm"))}
    config = {
        "common": {"user_dir": str(toy.ROOT / "fairseq_powernorm"), "cpu": True, "seed": 1, "log_format": "json",
                   "log_interval": 1},
        "task": {"_name": "language_modeling_pn", "data": str(lm_data), "tokens_per_sample": TOKENS},
        "model": {"_name": arch, **model, **ARCH_OPTIONS[arch]},
        "criterion": {"_name": "cross_entropy"},
        "optimizer": {"_name": "adam"},
        "lr_scheduler": {"_name": "fixed"},
        "dataset": {"batch_size": 8, "num_workers": 0, "data_buffer_size": 0},
        "optimization": {"lr": [0.01], "max_update": 20},
        "checkpoint": {"save_dir": str(tmp_path / "run"), "no_epoch_checkpoints": True},
    }  # fmt: skip
    (tmp_path / "lm.yaml").write_text("# @package _global_\n" + OmegaConf.to_yaml(OmegaConf.create(config)))
    done = toy.command(
        "fairseq-hydra-train", "--config-dir", tmp_path, "--config-name", "lm", f"hydra.run.dir={tmp_path / 'hydra'}",
        "hydra/job_logging=stdout",
    )
    assert toy.losses(done.stdout + done.stderr) == trained[arch][1]
    saved = torch.load(tmp_path / "run" / "checkpoint_last.pt", weights_only=True)
    assert saved["cfg"]["model"]["tensorized_noncausal"] is False
    assert all(float(value) == 20 for name, value in saved["model"].items() if name.endswith(".iters"))


def parsed(*words):
    """Configuration of a fairseq-train command line."""
    args = options.parse_args_and_arch(options.get_training_parser(), [str(word) for word in words])
    return convert_namespace_to_omegaconf(args)


def test_the_noncausal_flag_stands_in_the_configuration(lm_data):
    """tensorized_noncausal of a model's configuration tells the published behaviour from the default."""
    for words, noncausal in ((("--tensorized-noncausal",), True), ((), False)):
        config = parsed(lm_data, "--task", "language_modeling_pn", "--arch", "tensorized_lm_pn_ptb", *words)
        assert config.model.tensorized_noncausal is noncausal
        assert config.model.tensorized_window == 32 and config.model.decoder_norm_self == "power"


def test_validation_covers_everything(lm_data):
    """language_modeling_pn batches all blocks, where fairseq 0.12.3's task drops the last; training is as there."""
    covered = {}
    for name in ("language_modeling", "language_modeling_pn"):
        config = parsed(lm_data, "--task", name, "--arch", "tensorized_lm_pn_ptb", "--tokens-per-sample", 8)
        task = tasks.setup_task(config.task)
        for use in ("train", "valid", "training"):
            split = "train" if use == "training" else use
            if use == "training" and hasattr(task, "check_training"):
                task.check_training()
            task.load_dataset(split)
            batches = task.get_batch_iterator(task.dataset(split), max_sentences=16, required_batch_size_multiple=8)
            covered[name, use] = sorted(map(len, batches.frozen_batches))
    for split in ("train", "valid"):
        blocks = len(task.dataset(split))
        assert blocks % 8 and sum(covered["language_modeling_pn", split]) == blocks
        if not fairseq.__version__.startswith("0.12.2"):
            assert sum(covered["language_modeling", split]) < blocks
    assert covered["language_modeling_pn", "training"] == covered["language_modeling", "training"]


def test_missing_data_is_named(tmp_path):
    """A data directory that is not there: ValueError that names it."""
    config = parsed(tmp_path / "nowhere", "--task", "language_modeling_pn", "--arch", "transformer_lm_pn_ptb")
    with pytest.raises(ValueError, match="nowhere.*fairseq-preprocess"):
        tasks.setup_task(config.task)


def test_the_commands_of_the_readme(monkeypatch):
    """Every command of the section on language models is one that fairseq parses, with the models it names."""
    text = (toy.ROOT / "fairseq_powernorm" / "README.md").read_text(encoding="utf-8")
    section = text.split("## Language models")[1].split("\n## ")[0]
    (block,) = re.findall(r"```bash\n(.*?)```", section, re.S)
    parsers = {
        "fairseq-preprocess": options.get_preprocessing_parser,
        "fairseq-train": options.get_training_parser,
        "fairseq-eval-lm": options.get_eval_lm_parser,
        "fairseq-interactive": options.get_interactive_generation_parser,
    }
    monkeypatch.chdir(toy.ROOT)
    seen = []
    for line in block.replace("\\\n", " ").splitlines():
        program, *words = shlex.split(line, comments=True)
        monkeypatch.setattr("sys.argv", [program, *words])
        parser = parsers[program]()
        if program == "fairseq-preprocess":
            parser.parse_args(words)
        else:
            assert options.parse_args_and_arch(parser, words).task == "language_modeling_pn"
        seen.append(program)
    assert set(seen) == set(parsers)
    named = set(re.findall(r"`((?:transformer|tensorized)_lm_pn\w*)`", section))
    assert named == set(registered("transformer_lm_pn", "tensorized_lm_pn"))


@pytest.mark.parametrize(
    "words,message",
    [
        (("--encoder-norm-self", "power"), r"has no encoder.*'encoder_norm_self' = 'power'.*decoder_norm_self"),
        (("--tensorized-nocausal",), r"unknown option 'tensorized_nocausal'.*tensorized_noncausal"),
    ],
)
def test_bad_flags_stop_the_command_line(lm_data, words, message, monkeypatch):
    """Flags of an encoder, and misspelt ones: an error that lists the valid ones, before anything is built."""
    line = ["fairseq-train", str(lm_data), "--arch", "tensorized_lm_pn_ptb", "--task", "language_modeling_pn", *words]
    monkeypatch.setattr("sys.argv", line)
    with pytest.raises(ValueError, match=message):
        options.parse_args_and_arch(options.get_training_parser(), line[1:])
