"""Where the channels are: ``batch_first`` and ``layout``, the same norm on the same rows."""
import copy
import inspect
import io
import pickle

import numpy as np
import pytest
import torch
from norm_cases import ALL, CASES, C, assert_all_close, make, new
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from fairseq_powernorm.fold import fold_norms
from fairseq_powernorm.norms import LAYOUTS, NORMS, Norm, parse_norm
from fairseq_powernorm.statistics import RunningStatistics

#: rows of the inputs: B, B x T, B x H x W, B x D x H x W
SHAPES = [(6,), (3, 5), (3, 2, 4), (2, 3, 2, 2)]
#: number of dimensions -> memory format in which channels are adjacent
ADJACENT = {4: torch.channels_last, 5: torch.channels_last_3d}


def rows_of(shape, step=0):
    """x, dy (shape x C), mask (shape), for rows in batch-first order."""
    draw = torch.Generator().manual_seed(step)
    x, dy = torch.randn(2, *shape, C, generator=draw).unbind()
    mask = torch.rand(shape, generator=draw) < 0.3
    return x, dy, mask


def channels_first(rows, adjacent=False):
    """``B x ... x C`` -> ``B x C x ...``, contiguous or with adjacent channels."""
    moved = rows.movedim(-1, 1)
    return moved.clone(memory_format=torch.preserve_format) if adjacent else moved.contiguous()


def trained(norm, shape, convert=lambda rows: rows, back=lambda y: y, call=None, masked=True):
    """Outputs, gradients and buffers of three training steps, and the evaluation after them."""
    found = []
    norm.train()
    for step in range(3):
        x, dy, mask = rows_of(shape, step)
        leaf = convert(x).requires_grad_()
        y = (norm if call is None else call)(leaf, mask if masked else None)
        assert y.shape == leaf.shape
        y.backward(convert(dy))
        found += [back(y.detach()), back(leaf.grad)]
    norm.eval()
    with torch.no_grad():
        found.append(back(norm(convert(rows_of(shape)[0]), mask if masked else None)))
    return [*found, *(p.grad for p in norm.parameters()), *norm.buffers()]


@pytest.mark.parametrize("name", NORMS)
def test_every_norm_has_them(name):
    """Each norm of the registry takes both keywords through the common base, and no text of a flag may choose them."""
    assert issubclass(NORMS[name], Norm)
    assert {"batch_first", "layout"} <= set(inspect.signature(NORMS[name].__init__).parameters)
    for layout in LAYOUTS:
        norm = new(name, layout=layout)
        assert norm.layout == layout and norm.batch_first == (layout == "batch_first")
        assert (f"layout={layout}" in repr(norm)) == (layout != "time_first")
    with pytest.raises(ValueError, match="option 'layout' is unknown"):
        parse_norm(f"{name}:layout=channels_first")


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shape, adjacent", [(SHAPES[0], False), *((s, a) for s in SHAPES[1:] for a in (False, True))])
@pytest.mark.parametrize("name, variant", ALL)
def test_channels_first_is_the_same_norm(name, variant, shape, adjacent, masked):
    """channels_first on B x C x ... is batch_first on B x ... x C: outputs, gradients, statistics, evaluation."""
    expected = trained(make(name, variant, layout="batch_first"), shape, masked=masked)
    found = trained(
        make(name, variant, layout="channels_first"), shape, lambda rows: channels_first(rows, adjacent),
        lambda y: y.movedim(1, -1), masked=masked,
    )  # fmt: skip
    assert_all_close(found, expected)


@pytest.mark.parametrize("shape", SHAPES[2:], ids=len)
@pytest.mark.parametrize("name, variant", ALL)
def test_batch_first_with_several_dimensions(name, variant, shape):
    """B x H x W x C with a mask B x H x W is N x C with its rows in that order."""
    twin = make(name, variant, batch_first=True)
    expected = trained(twin, shape, call=lambda x, mask: twin(x.reshape(-1, C), mask.reshape(-1)).view(x.shape))
    assert_all_close(trained(make(name, variant, batch_first=True), shape), expected, 1e-6)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("shape", SHAPES[1:], ids=len)
@pytest.mark.parametrize("name, variant", ALL)
def test_the_output_keeps_the_memory_format(name, variant, shape, train):
    """Contiguous in, contiguous out; adjacent channels in, adjacent channels out; at sizes of one, too."""
    norm = make(name, variant, layout="channels_first").train(train)
    x = channels_first(rows_of(shape)[0])
    assert norm(x).is_contiguous() and norm(x[:1]).is_contiguous()
    x = channels_first(rows_of(shape)[0], adjacent=True)
    assert norm(x).stride() == x.stride()
    if x.dim() in ADJACENT:
        assert norm(x).is_contiguous(memory_format=ADJACENT[x.dim()])
        single = x[:1, :, :1]
        assert norm(single).is_contiguous(memory_format=ADJACENT[x.dim()])


class Copies(TorchDispatchMode):
    """Counts the copies of tensors of one size."""

    def __init__(self, numel):
        super().__init__()
        self.numel, self.count = numel, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket in (torch.ops.aten.clone, torch.ops.aten.copy_):
            self.count += args[0].numel() == self.numel
        return function(*args, **(kwargs or {}))


def copies(norm, x, dy):
    """Copies of the input's size in a forward and in a backward pass."""
    x = x.requires_grad_()
    with Copies(x.numel()) as forward:
        y = norm(x)
    with Copies(x.numel()) as backward:
        torch.autograd.grad(y, x, dy)
    return forward.count, backward.count


@pytest.mark.parametrize("shape", SHAPES[1:], ids=len)
@pytest.mark.parametrize("name, variant", CASES)
def test_copies(name, variant, shape):
    """Adjacent channels cost no copy more than batch_first; contiguous ones two in the forward pass (rows and back), and
    at most one in the backward pass; those of PN, PN-V and BN are in test_channels_first.py.
    """
    rows, dy, _ = rows_of(shape)
    plain = copies(make(name, variant, layout="batch_first"), rows.clone(), dy)
    norm = make(name, variant, layout="channels_first")
    assert copies(norm, channels_first(rows, adjacent=True), channels_first(dy, adjacent=True)) == plain
    if norm.OWN_LAYOUT:
        return
    found = copies(norm, channels_first(rows), channels_first(dy))
    assert found[0] == plain[0] + 2 and found[1] <= plain[1] + 1


@pytest.mark.parametrize("shape", SHAPES[1:3], ids=len)
@pytest.mark.parametrize("name, variant", CASES)
def test_folded_and_scripted(name, variant, shape):
    """fold_norms and torch.jit.script keep the layout: the same evaluation."""
    norm = make(name, variant, layout="channels_first").eval()
    norm.iters.fill_(1000)  # PRepBN folds at the end
    x = channels_first(rows_of(shape)[0])
    expected = norm(x)
    torch.testing.assert_close(torch.jit.script(copy.deepcopy(norm))(x), expected, rtol=1e-5, atol=1e-5)
    folded = fold_norms(copy.deepcopy(norm))
    assert folded.layout == "channels_first"
    torch.testing.assert_close(folded(x), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.jit.script(folded)(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["layer", "rms"])
def test_scripted_norms_of_torch(name):
    """LayerNorm and RMSNorm are scripted as they are, in either mode, also where a loader has put their tensors."""
    norm = make(name, layout="channels_first")
    x = channels_first(rows_of((3, 5))[0])
    torch.testing.assert_close(torch.jit.script(norm)(x), norm(x))
    loaded = make(name, layout="channels_first").to("meta")
    for key, parameter in norm.named_parameters():
        setattr(loaded, key, parameter)
    torch.testing.assert_close(torch.jit.script(loaded)(x), norm(x))
    loaded.load_state_dict(norm.state_dict())
    torch.testing.assert_close(torch.jit.script(loaded)(x), norm(x))


@pytest.mark.slow
@pytest.mark.parametrize("name, variant", CASES)
def test_exported(name, variant):
    """torch.export of the evaluation, any batch size and length; torch.fx takes the norm as one call."""
    norm = make(name, variant, layout="channels_first").eval()
    x = channels_first(rows_of((3, 5))[0])
    sizes = {"x": {0: torch.export.Dim("batch", max=64), 2: torch.export.Dim("length", max=64)}, "padding_mask": None}
    exported = torch.export.export(norm, (x, None), dynamic_shapes=sizes).module()
    other = channels_first(rows_of((4, 7))[0])
    torch.testing.assert_close(exported(other, None), norm(other), rtol=1e-5, atol=1e-5)
    graph = torch.fx.symbolic_trace(nn.Sequential(norm))
    assert [node.op for node in graph.graph.nodes] == ["placeholder", "call_module", "output"]
    torch.testing.assert_close(graph(x), norm(x))


@pytest.mark.slow
@pytest.mark.parametrize("adjacent", [False, True])
@pytest.mark.parametrize("name, variant", [("power", "reference"), ("layer", None)])
def test_compiled(name, variant, adjacent):
    """torch.compile(fullgraph=True) trains as eager code does; test_transforms.py has every norm in the usual layout."""
    torch._dynamo.reset()

    def convert(rows):
        return channels_first(rows, adjacent)

    expected = trained(make(name, variant, layout="channels_first"), (3, 5), convert)
    norm = make(name, variant, layout="channels_first")
    compiled = torch.compile(norm, fullgraph=True, backend="aot_eager")

    assert_all_close(trained(norm, (3, 5), convert, call=compiled), expected)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name, variant", CASES)
def test_checkpointed(name, variant, reentrant):
    """Activation checkpointing changes no bit."""
    expected = trained(make(name, variant, layout="channels_first"), (3, 2, 4), channels_first)
    norm = make(name, variant, layout="channels_first")
    found = trained(
        norm, (3, 2, 4), channels_first, call=lambda x, mask: checkpoint(norm, x, mask, use_reentrant=reentrant)
    )
    assert all(torch.equal(one, other) for one, other in zip(found, expected))


@pytest.mark.parametrize("name", NORMS)
def test_statistics_of_micro_batches(name):
    """RunningStatistics takes the same step from norms of either layout: the layout is no part of the arithmetic."""
    model = nn.ModuleDict({layout: make(name, layout=layout) for layout in ("batch_first", "channels_first")})
    statistics = RunningStatistics(model)
    for step in range(2):
        rows, dy, mask = rows_of((3, 5), step)
        with statistics.batch():
            model["batch_first"](rows.clone().requires_grad_(), mask).backward(dy)
            model["channels_first"](channels_first(rows).requires_grad_(), mask).backward(channels_first(dy))
    statistics.commit()
    for one, other in zip(model["batch_first"].buffers(), model["channels_first"].buffers()):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("name, variant", ALL)
def test_pickles_of_earlier_versions(name, variant):
    """A norm pickled before there were layouts, with batch_first or without it, has the layout that it had."""
    new = {"layout", "dim"} if name in ("layer", "rms") else {"layout"}
    for before, layout in ((None, "time_first"), (False, "time_first"), (True, "batch_first")):
        norm = make(name, variant)
        blank = copy.deepcopy(norm)
        state = norm.__getstate__() if name not in ("layer", "rms") else norm.__dict__
        state = {key: value for key, value in state.items() if key not in new}
        blank.__setstate__(state if before is None else {**state, "batch_first": before})
        assert (blank.layout, blank.dim) == (layout, C) and blank.batch_first == (layout == "batch_first")
        assert pickle.loads(pickle.dumps(blank)).layout == layout
    stream = io.BytesIO()
    torch.save(make(name, variant, layout="channels_first"), stream)
    stream.seek(0)
    assert torch.load(stream, weights_only=False).layout == "channels_first"


@pytest.mark.parametrize("name", NORMS)
def test_batch_first_can_be_set(name):
    """The attribute batch_first, as before, chooses between the two layouts of sequences."""
    norm = new(name)
    norm.batch_first = True
    assert norm.layout == "batch_first"
    norm.batch_first = False
    assert norm.layout == "time_first"


WRONG = {
    "unknown": (dict(layout="channel_first"), None, None, "layout='channel_first': must be one of time_first, batch_"),
    "both": (dict(layout="channels_first", batch_first=True), None, None, "layout='channels_first' with batch_first=True"),
    "size": (dict(layout="channels_first"), (3, 5, C), None, r"input of shape \(3, 5, 16\): expected B x 16 x T"),
    "vector": (dict(layout="channels_first"), (C,), None, r"input of shape \(16,\): expected B x 16 x T"),
    "mask": (dict(layout="channels_first"), (3, C, 5), (5, 3), r"mask of shape \(5, 3\): expected \(3, 5\), B x T, .*batch"),
    "image": (dict(layout="channels_first"), (3, C, 2, 4), (3, 8), r"shape \(3, 8\): expected \(3, 2, 4\), B x H x W"),
    "last": (dict(layout="batch_first"), (3, 2, 4, C), (2, 4), r"mask of shape \(2, 4\): expected \(3, 2, 4\), B x H x W"),
}


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("case", WRONG)
def test_wrong_use(name, case):
    """An error that names what was given and what is expected."""
    options, shape, mask, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        norm = new(name, **options)
        norm(torch.zeros(shape), None if mask is None else torch.zeros(mask, dtype=torch.bool))


@pytest.mark.parametrize("kind", [float, torch.tensor, np.float32])
@pytest.mark.parametrize("name, variant", CASES)
def test_numbers_that_are_set_later(name, variant, kind):
    """An eps that is set between two passes serves the next one, whatever holds the number."""
    x = rows_of((3, 5))[0]
    for train in (False, True):
        changed, built = make(name, variant).train(train), make(name, variant, eps=0.5).train(train)
        changed(x)
        built.load_state_dict(changed.state_dict())
        changed.eps = kind(0.5)
        assert torch.equal(changed(x), built(x))


@pytest.mark.parametrize("name, variant", CASES)
@pytest.mark.parametrize("option", ["layout", "variant"])
def test_choices_that_are_set_later(name, variant, option):
    """They are checked as those of the constructor are."""
    norm = make(name, variant)
    if hasattr(norm, option):
        with pytest.raises(ValueError, match=f"{option}='typo': must be one of"):
            setattr(norm, option, "typo")
        assert getattr(norm, option) == (variant if option == "variant" else "time_first")


@pytest.mark.parametrize("name, variant", CASES)
def test_images_need_a_layout(name, variant):
    """Four dimensions without a layout are refused, with the layouts that take them."""
    with pytest.raises(ValueError, match=r"\(3, 2, 4, 16\): expected T x B x 16.*others are batch_first, channels_first"):
        make(name, variant)(torch.zeros(3, 2, 4, C))
