"""``save_pretrained`` and ``from_pretrained`` of models with norms that have running statistics."""
import pytest

pytest.importorskip("transformers", reason="transformers is not installed: the extra is integrations")

import torch
from small_models import ALGORITHM2, assert_same, build, sentences, state, steps, with_norms
from torch import nn
from transformers import BertForMaskedLM

from fairseq_powernorm.norms import PowerNorm, RunningNorm


class PowerNormBert(BertForMaskedLM):
    """BERT with PN in place of LayerNorm."""

    def __init__(self, config):
        super().__init__(config)
        with_norms(self, ALGORITHM2)


def trained():
    """A model whose statistics have taken two steps, in float32."""
    model = PowerNormBert(build("bert").config).train()
    for example in sentences(2):
        model(**{name: value[None] for name, value in example.items()}).loss.backward()
    assert steps(model) == {2}
    return model


def test_round_trip(tmp_path):
    """What is loaded has the bits of what was saved, statistics and step counts included, also where the model is loaded in
    half precision; and it goes on from there.
    """
    model = trained()
    model.save_pretrained(tmp_path)
    assert_same(state(model), state(PowerNormBert.from_pretrained(tmp_path)))
    half = PowerNormBert.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.bert.embeddings.LayerNorm.weight.dtype == torch.bfloat16
    assert_same(dict(model.named_buffers()), dict(half.named_buffers()))
    loaded = PowerNormBert.from_pretrained(tmp_path).train()
    for each in (model, loaded):
        example = sentences(3)[2]
        each(**{name: value[None] for name, value in example.items()}).loss.backward()
    assert_same(state(model), state(loaded))


def test_a_checkpoint_without_statistics(tmp_path):
    """A LayerNorm model's checkpoint: PN has its weights, and statistics as in a new norm, whatever was in memory before."""
    plain = build("bert", None).float()
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.add_(0.25)
    plain.save_pretrained(tmp_path)
    trained()  # and freed: statistics that look like some are in memory
    model = PowerNormBert.from_pretrained(tmp_path)
    new = PowerNorm(16)
    for norm in model.modules():
        if isinstance(norm, RunningNorm):
            assert_same(dict(norm.named_buffers()), dict(new.named_buffers()))
    assert_same(dict(plain.named_parameters()), dict(model.named_parameters()))


def test_a_checkpoint_without_the_bias(tmp_path):
    """A checkpoint of norms without bias, as RMSNorm's are: the bias of PN begins as zero."""
    plain = build("bert", None).float()
    for norm in plain.modules():
        if isinstance(norm, nn.LayerNorm):
            norm.bias = None
    plain.save_pretrained(tmp_path)
    for norm in PowerNormBert.from_pretrained(tmp_path).modules():
        if isinstance(norm, RunningNorm):
            assert not norm.bias.any() and (norm.weight == 1).all()
