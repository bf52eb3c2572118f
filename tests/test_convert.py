"""Norms of this package in place of those of a model: ``replace_norms``, and folding of what comes out."""
import copy
import functools
import pickle
from collections import deque
from dataclasses import dataclass
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from torch import nn

from fairseq_powernorm.convert import replace_norms
from fairseq_powernorm.fold import FoldedNorm, fold_norms
from fairseq_powernorm.masks import attach_mask, padding_mask
from fairseq_powernorm.norms import NORMS, LayerNorm, MaskedBatchNorm, PowerNorm, RMSNorm, RunningNorm, build_norm
from fairseq_powernorm.statistics import RunningStatistics

C, HEADS = 16, 4


class Shift(nn.Module):
    """An RMSNorm whose weight is stored as a difference from one, and whose parameters have names of their own."""

    def __init__(self, dim=C, eps=1e-6):
        super().__init__()
        self.gamma, self.epsilon = nn.Parameter(torch.randn(dim)), eps

    def forward(self, x):
        u = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.epsilon)
        return u * (1.0 + self.gamma)


class ForeignRMSNorm(Shift):
    def forward(self, x):
        u = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.epsilon)
        return (self.gamma * u).to(x.dtype)


class ShiftedNorm(Shift):
    pass


class OldLayerNorm(nn.Module):
    def __init__(self, dim=C):
        super().__init__()
        self.b_2, self.a_2, self.eps = nn.Parameter(torch.randn(dim)), nn.Parameter(torch.randn(dim)), 1e-12

    def forward(self, x):
        centred = x - x.mean(-1, keepdim=True)
        return self.a_2 * centred / (centred.pow(2).mean(-1, keepdim=True) + self.eps).sqrt() + self.b_2


class LayerNorm2d(nn.LayerNorm):
    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class OtherNorm(nn.Module):
    """Looks like a norm and is none that anybody knows."""

    def __init__(self, dim=C):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        return x * self.weight / x.abs().sum(-1, keepdim=True)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.num_heads, self.head_dim = HEADS, C // HEADS
        self.qkv, self.q_norm, self.norm_of_keys = nn.Linear(C, 3 * C), nn.LayerNorm(C // HEADS), nn.LayerNorm(C // HEADS)

    def forward(self, x):
        q, k, v = (each.unflatten(-1, (HEADS, -1)).transpose(-3, -2) for each in self.qkv(x).chunk(3, -1))
        y = nn.functional.scaled_dot_product_attention(self.q_norm(q), self.norm_of_keys(k), v)
        return y.transpose(-3, -2).flatten(-2)


class Block(nn.Module):
    def __init__(self, norm=nn.LayerNorm):
        super().__init__()
        self.norm1, self.attention, self.norm2, self.linear = norm(C), Attention(), norm(C), nn.Linear(C, C)

    def forward(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.linear(self.norm2(x))


def randomized(model, seed=0):
    """Parameters and statistics as training leaves them."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, each in model.state_dict().items():
            if each.is_floating_point() and not name.endswith("iters"):
                each.copy_(torch.rand(each.shape, generator=draw) * 0.5 + (0.5 if each.dim() < 2 else -0.25))
    return model


def x_of(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("norm", NORMS)
def test_every_norm(norm):
    """Every norm of the registry takes the place of LayerNorm, with weight, groups of the heads and batch-first layout."""
    model = randomized(nn.Sequential(Block(), nn.LayerNorm(C)))
    weights = {name: model.get_submodule(name).weight for name in ("0.norm1", "0.norm2", "1")}
    model, report = replace_norms(model, norm, **getattr(NORMS[norm], "REQUIRED", {}))
    for name, weight in weights.items():
        new = model.get_submodule(name)
        assert type(new) is NORMS[norm] and new.layout == "batch_first"
        if getattr(new, "weight", None) is not None and new.weight.shape == weight.shape:
            assert new.weight is weight
        if name != "1" and norm in ("power", "power-v", "batch"):
            assert new.groups == HEADS
    assert model(x_of(2, 5, C)).shape == (2, 5, C)
    assert [each.names for each in report.replaced] == [("0.norm1",), ("0.norm2",), ("1",)]
    assert "3 norms replaced by" in str(report) and "0.attention.q_norm" in str(report)


@pytest.mark.parametrize(
    "old, name",
    [
        (nn.LayerNorm(C, eps=1e-3), "layer"), (nn.LayerNorm(C, bias=False), "layer"),
        (nn.LayerNorm(C, elementwise_affine=False), "layer"), (OldLayerNorm(), "layer"), (LayerNorm2d(C, eps=0.1), "layer"),
        (LayerNorm(C, batch_first=True), "layer"), (nn.RMSNorm(C), "rms"), (nn.RMSNorm(C, eps=0.1), "rms"),
        (ForeignRMSNorm(eps=0.1), "rms"), (ShiftedNorm(eps=0.1), "rms"), (RMSNorm(C, eps=0.1), "rms"),
        (nn.BatchNorm1d(C, momentum=0.3), "batch"), (nn.BatchNorm1d(C, affine=False, eps=0.1), "batch"),
        (nn.BatchNorm2d(C), "batch"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
)  # fmt: skip
def test_the_same_function(old, name):
    """A norm replaced by one that computes the same computes the same, in training and in evaluation, with its eps."""
    old = randomized(old)
    x = x_of(3, C, 2, 2) if isinstance(old, (LayerNorm2d, nn.BatchNorm2d)) else x_of(7, C)
    kinds = (nn.LayerNorm, nn.RMSNorm, nn.BatchNorm1d, nn.BatchNorm2d)
    new, _ = replace_norms(copy.deepcopy(old), name, kinds=kinds)
    for _ in range(2):
        torch.testing.assert_close(new(x), old(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(new.eval()(x), old.eval()(x), rtol=1e-5, atol=1e-5)
    assert [each.shape for each in new.parameters()] == [each.shape for each in old.parameters()]


def test_there_and_back():
    """LayerNorm to LayerNorm changes no bit of outputs nor a name of the state_dict; nor does LayerNorm to PN and back."""
    model = randomized(nn.Sequential(Block(), nn.LayerNorm(C, eps=1e-3)))
    x, before = x_of(2, 5, C), copy.deepcopy(model)
    replace_norms(model, "layer")
    assert torch.equal(model(x), before(x)) and list(model.state_dict()) == list(before.state_dict())
    replace_norms(model, "power", eps=0.5)
    assert not torch.equal(model(x), before(x))
    replace_norms(model, "layer", kinds=[PowerNorm], eps=1e-5)
    model[1].eps = 1e-3
    assert torch.equal(model(x), before(x)) and list(model.state_dict()) == list(before.state_dict())


@pytest.mark.parametrize("pickled", [False, True])
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_torchs_fused_evaluation_does_not_bypass_them(activation, norm_first, pickled):
    """An nn.TransformerEncoder in evaluation gives what its layers give step by step, with padding and without gradient."""
    layer = nn.TransformerEncoderLayer(
        C, HEADS, 2 * C, dropout=0.0, activation=activation, batch_first=True, norm_first=norm_first
    )
    encoder = nn.TransformerEncoder(layer, 2, nn.LayerNorm(C), enable_nested_tensor=not norm_first)
    model, report = replace_norms(randomized(encoder), "power")
    randomized(model).eval()
    if pickled:
        model = pickle.loads(pickle.dumps(model))
    x, padding = x_of(3, 6, C), torch.zeros(3, 6, dtype=torch.bool)
    padding[0, 4:] = True
    y = x
    for each in model.layers:
        def attend(z, each=each):
            return each.self_attn(z, z, z, key_padding_mask=padding, need_weights=True)[0]

        def feed(z, each=each):
            return each.linear2(each.activation(each.linear1(z)))

        if norm_first:
            y = y + attend(each.norm1(y))
            y = y + feed(each.norm2(y))
        else:
            y = each.norm1(y + attend(y))
            y = each.norm2(y + feed(y))
    with torch.no_grad():
        found = model(x, src_key_padding_mask=padding)
    torch.testing.assert_close(found[~padding], model.norm(y)[~padding], rtol=1e-4, atol=1e-5)
    assert "fused evaluation" in str(report)


def test_the_fused_evaluation_stays_where_it_is_right():
    """LayerNorm by LayerNorm: the layer keeps its fused path."""
    model = nn.TransformerEncoderLayer(C, HEADS, batch_first=True)
    replace_norms(model, "layer")
    assert model.activation_relu_or_gelu


@pytest.mark.parametrize("batch_first", [False, True])
def test_transformers_of_torch(batch_first):
    """nn.Transformer says where its batch is: masks fit, and padding enters no statistic."""
    torch.manual_seed(0)
    model = nn.Transformer(C, HEADS, 1, 1, 2 * C, dropout=0.0, batch_first=batch_first)
    replace_norms(model, "power-v", alpha_fwd=0.0)
    source, target = x_of(2, 5, C), x_of(2, 3, C, seed=1)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    attach_mask(model.encoder, "src_key_padding_mask", valid=0)
    found = []
    for noise in (0.0, 5.0):
        noisy = source + noise * padding[:, :, None]
        arguments = [each if batch_first else each.transpose(0, 1) for each in (noisy, target)]
        model(*arguments, src_key_padding_mask=padding, memory_key_padding_mask=padding)
        found.append([each.clone() for name, each in model.named_buffers() if name.endswith("phi")])
    for one, other in zip(*found):
        torch.testing.assert_close(one, other)


def test_shared_and_tied():
    """A module in two places is replaced once and stays shared; parameters of two modules that are one stay one."""
    model = nn.ModuleDict(dict(a=Block(), b=Block()))
    model["b"].norm1 = model["a"].norm1
    model["b"].norm2.weight = model["a"].norm2.weight
    model["c"], model["d"] = Shift(), nn.Sequential(ShiftedNorm(), ShiftedNorm())
    model["d"][1].gamma = model["d"][0].gamma
    _, report = replace_norms(model, "power")
    assert model["a"].norm1 is model["b"].norm1 and model["a"].norm2 is not model["b"].norm2
    assert model["a"].norm2.weight is model["b"].norm2.weight
    assert model["d"][0].weight is model["d"][1].weight
    assert ("a.norm1", "b.norm1") in [each.names for each in report.replaced]
    assert isinstance(model["c"], Shift)  # by its name it is no norm


@pytest.mark.parametrize("kind", [ForeignRMSNorm, ShiftedNorm, OldLayerNorm])
def test_norms_of_others_are_named(kind):
    """The report says what was taken for what, and what was left and why."""
    model = nn.Sequential(kind(), OtherNorm(), nn.GroupNorm(2, C), nn.BatchNorm1d(C), nn.utils.weight_norm(nn.Linear(2, 2)))
    model, report = replace_norms(model)
    assert [type(each).__name__ for each in model][:2] == ["PowerNorm", "OtherNorm"]
    assert kind.__name__ in str(report) and "by what it computes" in str(report)
    reasons = {each.name: each.reason for each in report.left}
    assert reasons == {
        "1": "computes neither LayerNorm nor RMSNorm", "2": "normalizes over more than the channels of a row",
        "3": "of another kind",
    }  # fmt: skip


class GatedRMSNorm(ForeignRMSNorm):
    def forward(self, x, gate=None):
        return super().forward(x if gate is None else x * gate.sigmoid())


def test_norms_of_more_than_their_input():
    """A norm that takes a gate as well computes RMSNorm when run by itself; it is left as it is."""
    model, report = replace_norms(nn.Sequential(GatedRMSNorm(), nn.RMSNorm(C)))
    assert isinstance(model[0], GatedRMSNorm) and len(report.replaced) == 1
    assert report.left[0].reason == "its forward takes more than the input: gate"


def test_norms_of_queries_and_keys():
    """They are known by their names, or by that of what holds one for each head; others only end like them."""
    stay = ("q_norm", "k_layernorm", "attn_qnorm", "key_norm", "q_ln", "norm_k", "qk_norm")
    go = ("block_norm", "seq_norm", "mask_norm", "norm_keys_out")
    model = nn.ModuleDict({name: nn.LayerNorm(C) for name in (*stay, *go)})
    model["q_layernorm"] = nn.ModuleDict({"norms": nn.ModuleList([nn.LayerNorm(C)])})
    _, report = replace_norms(model)
    assert {name for each in report.replaced for name in each.names} == set(go)


def test_what_stays():
    """Device, dtype, mode, frozen parameters and hooks of the old norm are those of the new one."""
    seen = []
    model = nn.Sequential(nn.LayerNorm(C, dtype=torch.bfloat16), nn.LayerNorm(C, device="meta")).eval()
    model[0].weight.requires_grad_(False)
    handle = model[0].register_forward_hook(lambda module, inputs, output: seen.append(type(module).__name__))
    replace_norms(model, copy_affine=False)
    assert not model[0].training and model[0].weight.dtype == torch.bfloat16 and model[0].running_phi.dtype == torch.float32
    assert not model[0].weight.requires_grad and model[0].bias.requires_grad
    assert all(each.is_meta for each in (*model[1].parameters(), *model[1].buffers()))
    model[0](torch.randn(3, C))
    handle.remove()
    model[0](torch.randn(3, C))
    assert seen == ["PowerNorm"]


def test_backward_hooks_stay():
    """A full backward hook of the old norm sees the gradients of the new one."""
    seen, model = [], nn.Sequential(nn.LayerNorm(C), nn.Linear(C, 2))
    model[0].register_full_backward_hook(lambda module, before, after: seen.append((type(module).__name__, after[0].shape)))
    replace_norms(model)
    model(x_of(3, C).requires_grad_()).sum().backward()
    assert seen == [("PowerNorm", (3, C))]


def test_affine():
    """No affine map where there was none; copy_affine=False begins at 1 and 0; what is lost is said."""
    model, _ = replace_norms(nn.Sequential(nn.LayerNorm(C, elementwise_affine=False)))
    assert model[0].weight is None and model[0].bias is None
    model, _ = replace_norms(randomized(nn.Sequential(nn.LayerNorm(C))), copy_affine=False)
    assert bool((model[0].weight == 1).all()) and bool((model[0].bias == 0).all())
    _, report = replace_norms(randomized(nn.Sequential(nn.LayerNorm(C))), "rms")
    assert "its bias is lost" in str(report)


def test_where():
    """Patterns go over dots, a function sees name and module, and either may choose norms of single heads."""
    def chosen(where):
        _, report = replace_norms(nn.Sequential(Block(), Block()), where=where)
        return [name for each in report.replaced for name in each.names]

    assert chosen("0.*") == ["0.norm1", "0.attention.q_norm", "0.attention.norm_of_keys", "0.norm2"]
    assert chosen(["*.norm1", "1.norm2"]) == ["0.norm1", "1.norm1", "1.norm2"]
    assert chosen(lambda name, module: name.endswith("q_norm")) == ["0.attention.q_norm", "1.attention.q_norm"]
    assert chosen(None) == ["0.norm1", "0.norm2", "1.norm1", "1.norm2"]
    model, _ = replace_norms(nn.Sequential(Block()), where="*q_norm")
    model(x_of(2, 5, C)).sum().backward()


def test_groups():
    """Those given, else those of the norm for the heads that divide its channels, else for one head."""
    def groups(norm="power", model=None, **options):
        return [each.groups for each in replace_norms(model or nn.Sequential(Block()), norm, **options)[0].modules()
                if isinstance(each, RunningNorm)]

    assert groups() == [4, 4] and groups(groups=2) == [2, 2] and groups("power:groups=8") == [8, 8]
    assert groups("batch:variant=reference") == [1, 1]
    assert groups(model=nn.Sequential(nn.LayerNorm(C))) == [1]
    assert groups(model=nn.ModuleList([Attention(), nn.LayerNorm(6)])) == [1]


def test_channels_first():
    """LayerNorm over the channels of images, and BatchNorm, are replaced by norms with channels_first."""
    model = nn.Sequential(nn.Conv2d(3, C, 3), LayerNorm2d(C), nn.Conv2d(C, C, 3), nn.BatchNorm2d(C), nn.Flatten(2))
    model, report = replace_norms(model, "power", kinds=(nn.LayerNorm, nn.BatchNorm2d))
    assert len(report.replaced) == 2 and all(model[i].layout == "channels_first" for i in (1, 3))
    model(x_of(2, 3, 8, 8)).sum().backward()


def test_layout():
    """A layout that is given counts for the norms over the last dimension."""
    for options, layout in ((dict(layout="time_first"), "time_first"), (dict(batch_first=True), "batch_first")):
        model, _ = replace_norms(nn.Sequential(Block(), LayerNorm2d(C)), **options)
        assert model[0].norm1.layout == layout and model[1].layout == "channels_first"


class Pair(NamedTuple):
    first: nn.Module
    second: nn.Module


@dataclass(frozen=True)
class Data:
    norm: nn.Module


class Holder(nn.Module):
    """Norms in its tree, and beside it wherever Python can hold them."""

    def __init__(self, extra=lambda one, other: None):
        super().__init__()
        self.one, self.other, self.linear = nn.LayerNorm(C), nn.LayerNorm(C), nn.Linear(C, C)
        self.listed, self.named = [self.one, [self.other]], {"one": self.one, 3: (self.other, "text")}
        self.pair, self.several = Pair(self.one, self.other), frozenset([self.one, self.linear])
        self.__dict__["hidden"] = self.one
        self.names, self.queue = {self.other: "other", self.linear: "linear"}, deque([self.linear, self.one])
        self.space, self.data = SimpleNamespace(norm=self.one), Data(self.other)
        self.helpers = [nn.Sequential(self.other)]  # a module beside the tree
        self.listed.append(self.listed)  # which holds itself
        self.__dict__["extra"] = extra(self.one, self.other)


def test_norms_beside_the_tree():
    """Norms that a model also holds in lists, dictionaries (as keys, too), tuples, sets, queues and attributes are the new
    ones there, too.
    """
    model = Holder()
    untouched = model.named[3][1], model.linear
    replace_norms(model, "power", where="one")
    replace_norms(model, "rms", where="other")
    assert isinstance(model.one, PowerNorm) and isinstance(model.other, RMSNorm)
    assert model.listed[0] is model.one and model.listed[1] == [model.other] and model.listed[2] is model.listed
    assert model.named["one"] is model.one and model.named[3] == (model.other, untouched[0])
    assert model.pair == Pair(model.one, model.other) and model.several == {model.one, untouched[1]}
    assert model.hidden is model.one and model.helpers[0][0] is model.other
    assert model.names == {model.other: "other", untouched[1]: "linear"} and list(model.names)[0] is model.other
    assert list(model.queue) == [untouched[1], model.one]
    assert model.space.norm is model.one and model.data.norm is model.other


def test_replaced_under_inference_mode():
    """What is made there can be trained and, folded there, differentiated: nothing of it belongs to that mode."""
    layer = nn.TransformerEncoderLayer(C, 2, 16, norm_first=True, batch_first=True, dropout=0.0)
    with torch.inference_mode():
        model, _ = replace_norms(nn.ModuleList([layer, ShiftedNorm()]), "power")
        statistics = RunningStatistics(model)
    x = torch.randn(2, 3, C)
    with statistics.batch():
        model[1](model[0](x)).sum().backward()
    statistics.commit()
    expected = model.eval()[0](x)
    with torch.inference_mode():
        fold_norms(model)
    leaf = x.clone().requires_grad_()
    y = model.requires_grad_(requires_grad=False)[0](leaf)
    y.sum().backward()
    torch.testing.assert_close(y, expected)
    assert torch.isfinite(leaf.grad).all()


@pytest.mark.parametrize(
    "extra",
    [
        lambda one, other: [other.forward], lambda one, other: functools.partial(one),
        lambda one, other: {0: other.extra_repr},
        lambda one, other: lambda x: one(x),
        lambda one, other: [lambda x, norm=one: norm(x)],
    ],
    ids=["list", "partial", "dict", "function", "default"],
)
def test_methods_of_norms_beside_the_tree(extra):
    """A method of a norm that the model has put aside would go on with the old norm: refused, with nothing changed."""
    model = Holder(extra)
    with pytest.raises(ValueError, match=r"replace_norms: Holder.extra holds a (method of other|functools.partial|func)"):
        replace_norms(model)
    assert type(model.one) is type(model.other) is type(model.listed[0]) is nn.LayerNorm


def test_the_model_itself():
    """A norm by itself is replaced by what is returned."""
    model, report = replace_norms(nn.LayerNorm(C), "batch")
    assert isinstance(model, MaskedBatchNorm) and "the model itself" in str(report)


def test_running_statistics_of_batch_norm():
    """BatchNorm's running statistics and step count go on in MaskedBatchNorm."""
    old = nn.BatchNorm1d(C, momentum=0.3)
    old(x_of(8, C))
    new, _ = replace_norms(copy.deepcopy(old), "batch", kinds=[nn.BatchNorm1d])
    assert float(new.iters) == 1 and torch.equal(new.running_var, old.running_var)
    old(x_of(8, C, seed=1)), new(x_of(8, C, seed=1))
    torch.testing.assert_close(new.running_var, old.running_var)
    torch.testing.assert_close(new.running_mean, old.running_mean)


@pytest.mark.parametrize(
    "options, kept", [(dict(track_running_stats=False), "kept none"), (dict(momentum=None), "averaged over all steps")]
)
def test_other_running_statistics_are_noted(options, kept):
    """A BatchNorm that evaluates by other statistics than a moving average: the report says so."""
    for name, noted in (("batch", True), ("power", True), ("layer", False)):
        _, report = replace_norms(nn.BatchNorm1d(C, **options), name, kinds=[nn.BatchNorm1d])
        assert (f"where the BatchNorm1d {kept}" in str(report)) is noted


@pytest.mark.parametrize("groups", [0, HEADS])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", ["power", "power-v", "batch"])
def test_folded(name, bias, groups):
    """replace_norms, then fold_norms: the same outputs; in pre-norm layers of torch linear maps take the scale over."""
    encoder = nn.TransformerEncoderLayer(C, HEADS, 2 * C, batch_first=True, norm_first=True, bias=bias)
    decoder = nn.TransformerDecoderLayer(C, HEADS, 2 * C, batch_first=True, norm_first=True, bias=bias)
    model = nn.ModuleDict(
        dict(
            encoder=nn.TransformerEncoder(encoder, 2, nn.LayerNorm(C), enable_nested_tensor=False),
            decoder=nn.TransformerDecoder(decoder, 1, nn.LayerNorm(C)),
        )
    )
    replace_norms(model, name, groups=groups)
    randomized(model).eval()
    source, target = x_of(2, 5, C), x_of(2, 3, C, seed=1)

    @torch.no_grad()
    def output(model):
        return model["decoder"](target, model["encoder"](source))

    expected = output(model)
    fold_norms(model)
    torch.testing.assert_close(output(model), expected, rtol=1e-5, atol=1e-5)
    folded = {name: module for name, module in model.named_modules() if isinstance(module, FoldedNorm)}
    bare = sorted(name for name, module in folded.items() if module.scale is None)
    linear = ["decoder.layers.0.norm3", "encoder.layers.0.norm2", "encoder.layers.1.norm2"]
    attention = ["decoder.layers.0.norm1", "encoder.layers.0.norm1", "encoder.layers.1.norm1"] * bias
    assert bare == sorted(linear + attention) and len(folded) == 9


@pytest.mark.parametrize("post", ["post-norm", "subclass"])
def test_folded_where_others_read_the_norm(post):
    """Layers in which more than the linear maps read a norm, or may: the scale stays, and so do the outputs."""
    class Layer(nn.TransformerEncoderLayer):
        pass

    kind = Layer if post == "subclass" else nn.TransformerEncoderLayer
    model, _ = replace_norms(kind(C, HEADS, 2 * C, batch_first=True, norm_first=post == "subclass"), "power")
    randomized(model).eval()
    with torch.no_grad():
        expected = model(x_of(2, 5, C))
        assert all(each.scale is not None for each in fold_norms(model).modules() if isinstance(each, FoldedNorm))
        torch.testing.assert_close(model(x_of(2, 5, C)), expected, rtol=1e-5, atol=1e-5)


def test_a_convolutional_model():
    """1-D convolutions with channels_first norms: padding changes no statistic, and the model learns with masks."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(3, C, 3, padding=1), nn.BatchNorm1d(C), nn.ReLU(), nn.Conv1d(C, C, 1), nn.BatchNorm1d(C))
    replace_norms(model, "power:variant=algorithm2", kinds=[nn.BatchNorm1d])
    x = x_of(2, 3, 6)
    mask = torch.zeros(2, 6, dtype=torch.bool)
    mask[1, 4:] = True
    with padding_mask(model, mask):
        model(x).square().sum().backward()
    rows = model[0](x).movedim(1, -1)[~mask]
    expected = build_norm("power:variant=algorithm2", C)
    expected(rows)
    torch.testing.assert_close(model[1].running_phi, expected.running_phi)


class Lazy(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LazyBatchNorm1d()


class Activated(nn.BatchNorm1d):
    def forward(self, x):
        return super().forward(x).relu()


class PlainBatchNorm(nn.BatchNorm1d):
    pass


def parametrized():
    model = nn.Sequential(nn.LayerNorm(C))
    nn.utils.parametrize.register_parametrization(model[0], "weight", nn.Identity())
    return model


def hooked():
    model = nn.Sequential(nn.LayerNorm(C))
    model[0].forward = lambda x: x
    return model


def folded():
    return nn.Sequential(fold_norms(PowerNorm(C).eval()))


WRONG = {
    "norm": (Block, dict(norm="powr"), "'powr'"),
    "option": (Block, dict(grops=2), "option 'grops' is unknown; options of 'power'"),
    "groups": (Block, dict(groups=3), "groups=3"),
    "layout": (Block, dict(layout="first"), "layout='first': must be one of"),
    "dtype": (Block, dict(dtype=torch.float16), "dtype=torch.float16: a new norm has that of the old one"),
    "kind": (Block, dict(kinds=[nn.Linear]), "kinds: Linear: must be classes, of LayerNorm"),
    "kind's name": (Block, dict(kinds=["LayerNorm"]), "kinds: 'LayerNorm': must be classes"),
    "no kind": (Block, dict(kinds=[]), "at least one class"),
    "pattern": (Block, dict(where=["norm1", "layers.*"]), r"where='layers.\*' matches no norm: .* are norm1"),
    "function": (Block, dict(where=lambda name, module: False), "where chooses none: norms of these kinds are norm1"),
    "none": (lambda: nn.Linear(2, 2), {}, "the model has no LayerNorm or RMSNorm, nor a norm that computes the same"),
    "dimensions": (lambda: nn.Sequential(nn.LayerNorm((4, 8))), {}, r"0: LayerNorm\(\(4, 8\).* over 2 dimensions.*where="),
    "lazy": (Lazy, dict(kinds=[nn.BatchNorm1d]), "norm: .* has no size yet"),
    "more": (lambda: nn.Sequential(Activated(C)), dict(kinds=[nn.BatchNorm1d]), "0: .* has a forward of its own"),
    "parametrized": (parametrized, {}, "0: .* has parameters that are computed"),
    "accelerate": (hooked, {}, "0: LayerNorm has a forward of its own instance"),
    "folded": (folded, {}, "no LayerNorm"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_use(case):
    """An error that names what was given and what is valid, before anything is changed."""
    make, options, message = WRONG[case]
    model = make()
    before = repr(model)
    with pytest.raises(ValueError, match=message):
        replace_norms(model, **options)
    assert repr(model) == before


def test_derived_classes():
    """A class that only has another name is replaced; one of this package's with a forward of its own is left, and named."""

    class Doubled(LayerNorm):
        def forward(self, x, padding_mask=None):
            return 2 * super().forward(x, padding_mask)

    model = nn.Sequential(PlainBatchNorm(C), Doubled(C), LayerNorm(C))
    _, report = replace_norms(model, kinds=[nn.BatchNorm1d, nn.LayerNorm])
    assert [type(each) for each in model] == [PowerNorm, Doubled, PowerNorm]
    assert "has a forward of its own" in report.left[0].reason


@pytest.mark.parametrize("name", NORMS)
def test_frozen_norms_stay_frozen(name):
    """With the parameters that they did not have; a norm that learns learns all of them."""
    options = dict(total_updates=3) if name == "prepbn" else {}
    model = nn.Sequential(nn.RMSNorm(C).requires_grad_(False), nn.RMSNorm(C))
    replace_norms(model, name, **options)
    assert not any(each.requires_grad for each in model[0].parameters())
    assert all(each.requires_grad for each in model[1].parameters())


def test_left_out_what_cannot_be_replaced():
    """What is refused can be left out by where."""
    model = nn.Sequential(nn.LayerNorm((4, 8)), nn.LayerNorm(8))
    _, report = replace_norms(model, where="1")
    assert isinstance(model[1], PowerNorm) and report.left[0].name == "0"
