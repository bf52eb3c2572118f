"""``save_pretrained`` and ``from_pretrained`` of models with norms of this package."""
import pytest

pytest.importorskip("transformers", reason="transformers is not installed: the extra is integrations")

import torch
from small_models import ALGORITHM2, assert_same, build, sentences, state, steps, with_norms
from torch import nn
from transformers import BertForMaskedLM

from fairseq_powernorm.norms import NORMS
from fairseq_powernorm.norms.layouts import Norm


class PowerNormBert(BertForMaskedLM):
    """BERT with PN or another norm in place of LayerNorm."""

    norm = ALGORITHM2

    def __init__(self, config):
        super().__init__(config)
        with_norms(self, self.norm)


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


@pytest.fixture()
def filled_memory():
    """What nobody has written is NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("without_bias", [False, True], ids=["", "without bias"])
@pytest.mark.parametrize("name", NORMS)
def test_a_checkpoint_of_layer_norm(name, without_bias, tmp_path, monkeypatch, filled_memory):
    """A LayerNorm model's checkpoint, or one of norms without bias: a norm has what is in it, and the rest, parameters and
    statistics, as when it is new.
    """
    plain = build("bert", None).float()
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.add_(0.25)
    for norm in plain.modules():
        if without_bias and isinstance(norm, nn.LayerNorm):
            norm.bias = None
    plain.save_pretrained(tmp_path)
    monkeypatch.setattr(PowerNormBert, "norm", "prepbn:total_updates=100" if name == "prepbn" else name)
    if name == "scale":  # has one number for all channels
        with pytest.raises(RuntimeError, match="(?i)mismatch"):
            PowerNormBert.from_pretrained(tmp_path)
        return
    model, saved, norms = PowerNormBert.from_pretrained(tmp_path), plain.state_dict(), 0
    for path, norm in model.named_modules():
        if isinstance(norm, Norm):
            norms += 1
            new = PowerNormBert(model.config).get_submodule(path).state_dict()
            assert_same({key: saved.get(f"{path}.{key}", value) for key, value in new.items()}, norm.state_dict())
    assert norms == 6
