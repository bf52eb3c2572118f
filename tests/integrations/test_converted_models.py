"""Models of Hugging Face with norms of this package: conversion, masks, checkpoints, folding, generation."""
import pytest

pytest.importorskip("transformers", reason="transformers is not installed: the extra is integrations")

import torch
import transformers

from fairseq_powernorm.convert import replace_norms
from fairseq_powernorm.fold import FoldedNorm, fold_norms
from fairseq_powernorm.masks import attach_mask
from fairseq_powernorm.norms import PowerNorm, RunningNorm
from fairseq_powernorm.statistics import RunningStatistics

SIZES = dict(vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
NONE = dict(bos_token_id=None, eos_token_id=None, pad_token_id=0)


def gpt2():
    dropouts = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    return transformers.GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=4, n_positions=64, **dropouts, **NONE)


def bert():
    return transformers.BertConfig(**SIZES, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)


def t5():
    return transformers.T5Config(
        vocab_size=50, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, dropout_rate=0.0, decoder_start_token_id=0
    )  # fmt: skip


#: name -> class, its configuration, how many norms are replaced and how many left, weights stored as a difference from one
MODELS = {
    "bert": ("BertForMaskedLM", bert, 6, 0),
    "gpt2": ("GPT2LMHeadModel", gpt2, 5, 0),
    "llama": ("LlamaForCausalLM", lambda: transformers.LlamaConfig(**SIZES, num_key_value_heads=2, **NONE), 5, 0),
    "qwen3": (
        "Qwen3ForCausalLM", lambda: transformers.Qwen3Config(**SIZES, num_key_value_heads=2, head_dim=16, **NONE), 5, 4
    ),
    "gemma2": (
        "Gemma2ForCausalLM", lambda: transformers.Gemma2Config(**SIZES, num_key_value_heads=2, head_dim=8, **NONE), 9, 0
    ),
    "t5": ("T5ForConditionalGeneration", t5, 12, 0),
}  # fmt: skip


def build(name):
    torch.manual_seed(0)
    kind, config, *_ = MODELS[name]
    return getattr(transformers, kind)(config())


def randomized(model):
    """Parameters and statistics of norms as training leaves them."""
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, each in model.state_dict().items():
            if each.dim() == 1 and not name.endswith("iters"):
                each.add_(torch.rand(each.shape, generator=draw) * 0.5)
    return model


def batch(model, length=7, noise=0):
    """Two sentences, the second of them shorter; ``noise`` changes what stands in the padding."""
    tokens = torch.randint(1, 50, (2, length), generator=torch.Generator().manual_seed(2))
    mask = torch.ones(2, length, dtype=torch.long)
    mask[1, 4:] = 0
    tokens = torch.where(mask == 1, tokens, (tokens + noise) % 50)
    inputs = dict(input_ids=tokens, attention_mask=mask)
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = tokens[:, :3]
    return inputs


def logits(model, **inputs):
    with torch.no_grad():
        return model.eval()(**(inputs or batch(model))).logits


@pytest.mark.parametrize("name", MODELS)
def test_to_the_same_norms(name):
    """LayerNorm by LayerNorm or RMSNorm by RMSNorm: the same logits, whatever class the model had for them."""
    model = randomized(build(name))
    expected = logits(model)
    norm = "layer" if name in ("bert", "gpt2") else "rms"
    model, report = replace_norms(model, norm)
    assert (len(report.replaced), len(report.left)) == MODELS[name][2:]
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_padding_changes_no_statistic(name, checkpointing):
    """With attention_mask attached, training passes that differ in the padding alone leave the same buffers."""
    found = []
    for noise in (0, 5):
        model, _ = replace_norms(build(name), "power:variant=algorithm2")
        if checkpointing:
            model.gradient_checkpointing_enable()
        if model.config.is_encoder_decoder:
            attach_mask(model.encoder)
        else:
            attach_mask(model)
        statistics = RunningStatistics(model.train())
        inputs = batch(model, noise=noise)
        with statistics.batch():
            output = model(**inputs).logits
            kept = output if model.config.is_encoder_decoder else output[inputs["attention_mask"] == 1]
            kept.square().mean().backward()
        statistics.commit()
        found.append([buffer.clone() for module in model.modules() if isinstance(module, RunningNorm)
                      for buffer in module.buffers()])
        assert all(float(module.iters) == 1 for module in model.modules() if isinstance(module, RunningNorm))
    for one, other in zip(*found):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_layers_with_the_time_first():
    """XLNet computes on T x B x C: its norms get that layout, and padding under an attached mask changes no statistic."""
    found = []
    for noise in (0, 5):
        torch.manual_seed(0)
        sizes = dict(vocab_size=50, d_model=32, n_layer=2, n_head=4, d_inner=64, dropout=0.0)
        model = transformers.XLNetLMHeadModel(transformers.XLNetConfig(**sizes))
        replace_norms(model, "power:variant=algorithm2")
        norms = [module for module in model.modules() if isinstance(module, RunningNorm)]
        assert len(norms) == 4 and {norm.layout for norm in norms} == {"time_first"}
        attach_mask(model.train())
        inputs = batch(model, noise=noise)
        model(**inputs).logits[inputs["attention_mask"] == 1].square().mean().backward()
        found.append([buffer for norm in norms for buffer in norm.buffers()])
    for one, other in zip(*found):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    sizes = dict(d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4)
    config = transformers.FSMTConfig(langs=["en", "de"], src_vocab_size=50, tgt_vocab_size=50, **sizes)
    model, report = replace_norms(transformers.FSMTModel(config), "power")
    assert len(report.replaced) == 5
    assert all(module.layout == "time_first" for module in model.modules() if isinstance(module, RunningNorm))


def test_a_norm_of_each_token_and_layer():
    """Gemma 3n normalizes B x T x layers x C in one place, which is left alone, with the reason; masks fit the others."""
    sizes = dict(SIZES, num_hidden_layers=2, num_key_value_heads=2, head_dim=8, hidden_size_per_layer_input=8, laurel_rank=4)
    config = transformers.Gemma3nTextConfig(
        **sizes, vocab_size_per_layer_input=50, num_kv_shared_layers=0, activation_sparsity_pattern=[0.0, 0.0],
        altup_num_inputs=2, layer_types=["full_attention"] * 2, **NONE,
    )  # fmt: skip
    model, report = replace_norms(transformers.Gemma3nForCausalLM(config), "power")
    left = {each.name.rpartition(".")[2]: each.reason for each in report.left}
    assert "a vector for each token and layer" in left["per_layer_projection_norm"]
    attach_mask(model.train())
    model(**batch(model)).logits.mean().backward()
    assert all(float(module.iters) > 0 for module in model.modules() if isinstance(module, RunningNorm))


@pytest.mark.parametrize("name", MODELS)
def test_folded(name):
    """replace_norms, then fold_norms: the same logits to 1e-5; known pre-norm layers hold no scale any more."""
    model, _ = replace_norms(build(name), "power")
    randomized(model)
    expected = logits(model)
    fold_norms(model)
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
    bare = sum(module.scale is None for module in model.modules() if isinstance(module, FoldedNorm))
    assert bare == {"gpt2": 4, "llama": 4, "qwen3": 4}.get(name, 0)


def test_an_encoder_and_a_decoder_have_a_mask_each():
    """The encoder's mask is refused for the decoder, whose sentences may have the same length; each part takes its own."""
    model, _ = replace_norms(build("t5"), "power")
    for argument, other in (("attention_mask", "decoder"), ("decoder_attention_mask", "encoder")):
        with pytest.raises(ValueError, match=f"argument='{argument}' of T5.* is no mask of its {other}, which has {other}"):
            attach_mask(model, argument)
    attach_mask(model.encoder), attach_mask(model.decoder)
    inputs = batch(model.train())
    model(**inputs, decoder_attention_mask=torch.ones_like(inputs["decoder_input_ids"])).logits.mean().backward()
    only, _ = replace_norms(build("t5"), "power", where="encoder.*")
    attach_mask(only)


def test_models_that_read_the_weight_of_a_norm():
    """Mamba asks for ``norm.weight.dtype``: trained with PN, and folded, as with its own norms."""
    config = transformers.MambaConfig(vocab_size=50, hidden_size=32, num_hidden_layers=2, state_size=4, **NONE)
    model, _ = replace_norms(transformers.MambaForCausalLM(config), "power")
    tokens = dict(input_ids=torch.tensor([[1, 2, 3, 4]]))
    model.train()(**tokens).logits.mean().backward()
    expected = logits(model, **tokens)
    torch.testing.assert_close(logits(fold_norms(model), **tokens), expected, rtol=1e-5, atol=1e-5)
    assert fold_norms(PowerNorm(8).to(torch.bfloat16)).weight.dtype is torch.bfloat16


@pytest.mark.parametrize("norm", ["power", "batch:variant=reference"])
def test_generation_with_a_cache(norm):
    """Step by step with a cache of keys and values, an attention mask attached: the tokens of generation without a cache."""
    model, _ = replace_norms(build("gpt2"), norm)
    attach_mask(model)
    randomized(model).eval()
    inputs = {key: value[:1] for key, value in batch(model).items()}
    settings = dict(max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert torch.equal(model.generate(**inputs, **settings), model.generate(**inputs, **settings, use_cache=False))


class Converted(transformers.GPT2LMHeadModel):
    """A model that has its norms replaced as it is built."""

    def __init__(self, config):
        super().__init__(config)
        replace_norms(self, "power", warmup_updates=3)


def trained(model):
    attach = attach_mask(model)
    for _ in range(2):
        inputs = batch(model)
        model.train()(**inputs, labels=inputs["input_ids"]).loss.backward()
    attach.remove()
    return model


def assert_equal(found, expected):
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_from_pretrained(tmp_path, caplog):
    """A model that replaces its norms as it is built: saved and loaded, every bit of parameters and buffers is there."""
    model = trained(Converted(gpt2()))
    model.save_pretrained(tmp_path)
    loaded = Converted.from_pretrained(tmp_path)
    assert_equal(loaded.state_dict(), model.state_dict())
    assert torch.equal(logits(loaded), logits(model)) and "no value yet" not in caplog.text


def test_from_pretrained_without_buffers(tmp_path):
    """From a checkpoint of the stock model the parameters arrive bit for bit, and the statistics begin as in a new norm."""
    stock = randomized(build("gpt2"))
    stock.save_pretrained(tmp_path)
    model = Converted.from_pretrained(tmp_path)
    by_hand, _ = replace_norms(stock, "power", warmup_updates=3)
    logits(model)  # the first call finds the buffers that the checkpoint lacks
    assert_equal(model.state_dict(), by_hand.state_dict())
    assert torch.equal(logits(model), logits(by_hand))
    assert_equal(trained(model).state_dict(), trained(by_hand).state_dict())


def test_replaced_after_loading(tmp_path):
    """from_pretrained, replace_norms, training, save_pretrained: the file loads into a model that was converted likewise."""
    build("gpt2").save_pretrained(tmp_path / "stock")
    model, _ = replace_norms(transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "stock"), "power", warmup_updates=3)
    trained(model).save_pretrained(tmp_path / "converted")
    loaded = Converted.from_pretrained(tmp_path / "converted")
    assert_equal(loaded.state_dict(), model.state_dict())
    again, _ = replace_norms(transformers.GPT2LMHeadModel(gpt2()), "power", warmup_updates=3)
    again.load_state_dict(model.state_dict())
    assert torch.equal(logits(again), logits(loaded))


def test_images_with_channels_first():
    """ConvNeXt, whose LayerNorms stand in either layout: each gets its own."""
    torch.manual_seed(0)
    config = transformers.ConvNextConfig(hidden_sizes=[16, 32], depths=[1, 1], num_stages=2)
    model, report = replace_norms(transformers.ConvNextForImageClassification(config), "power")
    layouts = [module.layout for module in model.modules() if isinstance(module, PowerNorm)]
    assert sorted(set(layouts)) == ["batch_first", "channels_first"] and len(report.replaced) == 5
    model(pixel_values=torch.randn(2, 3, 32, 32)).logits.sum().backward()


def test_another_length_in_a_part_of_the_model():
    """Speech: the mask counts samples at the model and frames at its encoder, to which it is attached; else an error."""
    torch.manual_seed(0)
    config = transformers.Wav2Vec2Config(
        **SIZES, conv_dim=(16, 16), conv_stride=(5, 2), conv_kernel=(10, 3), num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=2, feat_extract_norm="layer", mask_time_prob=0.0, layerdrop=0.0,
    )  # fmt: skip
    model, _ = replace_norms(transformers.Wav2Vec2ForCTC(config), "power")
    inputs = dict(input_values=torch.randn(2, 400), attention_mask=torch.ones(2, 400, dtype=torch.long))
    with attach_mask(model), pytest.raises(ValueError, match=r"layer_norm: .*\(2, 400\): expected \(2, .*must lie outside"):
        model(**inputs)
    with attach_mask(model.wav2vec2.encoder):
        model(**inputs).logits.sum().backward()
