"""channels_first without copies: PN, PN-V and BN read and write B x C x ... where it lies."""
import contextlib
import json

import pytest
import torch
from norm_cases import CASES, assert_all_close, make
from torch import nn

from fairseq_powernorm import kernels
from fairseq_powernorm.fold import fold_norms
from fairseq_powernorm.kernels import eager, native
from fairseq_powernorm.norms import MaskedBatchNorm, PowerNorm, build_norm

C = 24  # no whole number of vectors


def steps(norm, xs, *, moved, mask, convert=lambda tensor: tensor):
    """Outputs and gradients of some training steps, the evaluation, parameters' gradients and statistics, as rows."""
    found = []
    for x, dy in xs:
        leaf = (x.movedim(-1, 1).contiguous() if moved else x.clone()).requires_grad_()
        y = norm(convert(leaf) if moved else leaf, mask)
        assert y.is_contiguous() and y.shape == leaf.shape
        y.backward(convert(dy.movedim(-1, 1).contiguous()) if moved else dy)
        found += [y.detach(), leaf.grad]
    norm.eval()
    with torch.no_grad():
        found.append(norm(leaf, mask))
    found = [each.movedim(1, -1) if moved else each for each in found]
    return [*found, *(each.grad for each in norm.parameters()), *norm.buffers()]


def cases(shape, dtype, dim=C):
    draw = torch.Generator().manual_seed(0)
    xs = [torch.randn(2, *shape, dim, generator=draw).to(dtype).unbind() for _ in range(2)]
    return xs, torch.rand(shape, generator=draw) < 0.3


#: PN's second step is past the warm-up
POWER = "power:warmup_updates=1"
KINDS = (POWER, "power-v", "batch", "batch:variant=reference")


def pair(kind, dim=C, **options):
    """The same norm with either layout."""
    return [build_norm(kind, dim, layout=layout, **options) for layout in ("batch_first", "channels_first")]


@pytest.fixture(params=["C++", "Python"])
def c_kernel(request):
    """The C kernel, by either autograd function."""
    if kernels.KERNELS["c"].unavailable():
        pytest.skip(kernels.KERNELS["c"].unavailable())
    with kernels.only("c"), native.in_python() if request.param == "Python" else contextlib.nullcontext():
        yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 128), (3, 5, 7), (40, 3)], ids=str)
@pytest.mark.parametrize(
    "kind, groups, masked",
    [
        (POWER, 2, True), (POWER, 0, False), ("power:variant=algorithm2", 1, True), ("power-v", 2, True),
        ("power-v", 0, False), ("batch", 0, True), ("batch", 2, False), ("batch:variant=reference", 1, True),
    ],
)  # fmt: skip
def test_the_same_bits(c_kernel, kind, groups, masked, shape, dtype):
    """By the C kernel, channels_first on B x C x ... has the bits of batch_first: tiles hold the rows in the same order."""
    xs, mask = cases(shape, dtype)
    rows, first = pair(kind, groups=groups)
    mask = mask if masked else None
    expected, found = steps(rows, xs, moved=False, mask=mask), steps(first, xs, moved=True, mask=mask)
    assert all(torch.equal(one, other) for one, other in zip(found, expected))


@pytest.mark.parametrize("kind", KINDS)
def test_tiles_smaller_than_a_block(c_kernel, kind):
    """So many channels that a tile holds a part of a block of rows: sums in another order, the same numbers."""
    xs, mask = cases((2, 50), torch.float32, 2100)
    rows, first = pair(kind, 2100, groups=3)
    assert_all_close(steps(first, xs, moved=True, mask=mask), steps(rows, xs, moved=False, mask=mask), 1e-5)


@pytest.mark.parametrize("kind", KINDS[1:])
def test_second_derivatives(c_kernel, kind):
    """The exact gradient of channels_first can be differentiated once more, as that of batch_first."""
    ((x, dy), _), mask = cases((3, 7), torch.float32)
    found = []
    for norm in pair(kind, groups=2):
        moved = norm.layout == "channels_first"
        leaf, dleaf = ((each.movedim(-1, 1).contiguous() if moved else each.clone()).requires_grad_() for each in (x, dy))
        (grad,) = torch.autograd.grad(norm(leaf, mask), leaf, dleaf, create_graph=True)
        second = torch.autograd.grad(grad.square().sum(), (leaf, dleaf))
        found.append([each.movedim(1, -1) if moved else each for each in (grad.detach(), *second)])
    assert_all_close(*found, 1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_padding_that_is_not_finite(c_kernel, kind):
    """A gradient and an input at padding that are not finite reach no other position and no parameter in either layout."""
    xs, mask = cases((3, 7), torch.float32)
    mask[0, 2] = True
    for each in (*xs[0], *xs[1]):
        each[0, 2] = float("inf")
    rows, first = pair(kind, groups=2)
    expected, found = steps(rows, xs, moved=False, mask=mask), steps(first, xs, moved=True, mask=mask)
    for one, other in zip(found, expected):
        one, other = (each[~mask] if each.dim() == 3 else each for each in (one, other))
        assert torch.isfinite(one).all()
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


PARTS = {
    "channels": lambda tensor: torch.cat([tensor, tensor], 1).chunk(2, 1)[1],
    "positions": lambda tensor: torch.cat([tensor, tensor], 2)[:, :, tensor.size(2) :],
    "examples": lambda tensor: tensor.repeat_interleave(2, 0)[::2],
    "turned": lambda tensor: tensor.transpose(0, 2).contiguous().transpose(0, 2),
}


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_parts_of_a_tensor(kind, part, dtype):
    """Inputs and gradients that are parts of larger tensors, or lie otherwise: the same numbers, contiguous output."""
    xs, mask = cases((3, 20), dtype)
    rows, first = pair(kind, groups=2)
    expected = steps(rows, xs, moved=False, mask=mask)
    found = steps(first, xs, moved=True, mask=mask, convert=PARTS[part])
    assert_all_close(found, expected, 1e-6 if dtype is torch.float32 else 2e-3)


@pytest.mark.parametrize("block", [1, 13 * C, 50 * C, 1 << 19], ids=["one row", "within", "examples", "all"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_eager_blocks(monkeypatch, block, dtype):
    """Plain torch takes blocks of positions of an example, or of whole examples: the same numbers whatever their size."""
    xs, mask = cases((5, 20), dtype)
    for kind, groups in ((POWER, 2), ("power:variant=algorithm2", 0)):
        rows, first = pair(kind, groups=groups)
        expected = steps(rows, xs, moved=False, mask=mask)
        with monkeypatch.context() as patch:
            patch.setattr(eager, "BLOCK", block)
            found = steps(first, xs, moved=True, mask=mask)
        assert_all_close(found, expected, 1e-12 if dtype is torch.float64 else 2e-3)


@pytest.mark.parametrize("block", [7 * C, 50 * C])
@pytest.mark.parametrize("kind, groups", [(POWER, 2), ("power:variant=algorithm2", 0)])
def test_eager_blocks_of_inputs_and_gradients_that_lie_otherwise(monkeypatch, kind, groups, block):
    """channels_last inputs whose gradients are contiguous, and the other way round: the same numbers, block by block."""
    x, dy = torch.randn(2, 4, C, 5, 3, dtype=torch.float64).unbind()
    found = []
    for formats in ((torch.contiguous_format,) * 2, (torch.channels_last, torch.contiguous_format),
                    (torch.contiguous_format, torch.channels_last)):  # fmt: skip
        leaf, gradient = (each.contiguous(memory_format=to) for each, to in zip((x, dy), formats))
        leaf = leaf.clone().requires_grad_()
        norm = build_norm(kind, C, layout="channels_first", groups=groups)
        with monkeypatch.context() as patch:
            patch.setattr(eager, "BLOCK", block)
            norm(leaf).backward(gradient)
        found.append([leaf.grad, *(each.grad for each in norm.parameters()), norm.ema_gz])
    for each in found[1:]:
        assert_all_close(each, found[0], 1e-12)


def allocations(call, size, path):
    """What ``call`` returns, and how often it allocates ``size`` bytes or more."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        found = call()
    profile.export_chrome_trace(str(path))
    events = json.loads(path.read_text())["traceEvents"]
    return found, sum(each["name"] == "[memory]" and each["args"]["Bytes"] >= size for each in events)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize(
    "kind, dtype",
    [*((kind, torch.float32) for kind in KINDS), (POWER, torch.bfloat16), ("batch", torch.bfloat16), (POWER, torch.float64)],
)
def test_memory(monkeypatch, tmp_path, kind, dtype, train):
    """A pass allocates its result and nothing else of the input's size: by the C kernel, and PN's training by torch."""
    if dtype is torch.float64:
        if not train:
            pytest.skip("evaluation by plain torch is ordinary operations")
        monkeypatch.setattr(eager, "BLOCK", 1 << 10)
    elif kernels.KERNELS["c"].unavailable():
        pytest.skip(kernels.KERNELS["c"].unavailable())
    norm = build_norm(kind, C, layout="channels_first").train(train)
    x, dy = torch.randn(2, 4, C, 16, 16, dtype=dtype).unbind()
    x.requires_grad_(train)
    norm(x).sum().backward() if train else norm(x)  # what is allocated once
    with contextlib.nullcontext() if train else torch.no_grad():
        y, count = allocations(lambda: norm(x), x.nbytes, tmp_path / "trace")
    assert count == 1 and y.is_contiguous()
    if train:
        found, count = allocations(lambda: torch.autograd.grad(y, x, dy), x.nbytes, tmp_path / "trace")
        assert count == 1 and found[0].is_contiguous()


def test_memory_of_a_folded_norm(tmp_path):
    """A folded norm allocates its result, and nothing else of the input's size; the numbers are those of the norm."""
    if kernels.KERNELS["c"].unavailable():
        pytest.skip(kernels.KERNELS["c"].unavailable())
    norm = PowerNorm(C, layout="channels_first", groups=2)
    x = torch.randn(4, C, 16, 16)
    norm(x)
    expected, folded = norm.eval()(x), fold_norms(norm)
    with torch.no_grad():
        y, count = allocations(lambda: folded(x), x.nbytes, tmp_path / "trace")
    assert count == 1 and y.is_contiguous()
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name, variant", CASES)
@pytest.mark.parametrize("train", [True, False])
def test_changed_in_place(name, variant, train):
    """The output may be changed in place, as nn.ReLU(inplace=True) does; PN's, PN-V's and in training BN's is no view, whose
    gradient would be copied.
    """
    x, dy = torch.randn(2, 3, 16, 5).unbind()
    found = []
    for inplace in (False, True):
        norm = make(name, variant, layout="channels_first").train(train)
        leaf = x.clone().requires_grad_()
        y = norm(leaf)
        if train or not isinstance(norm, MaskedBatchNorm):
            assert not (norm.OWN_LAYOUT and y._is_view())
        nn.ReLU(inplace=inplace)(y).backward(dy)
        found.append(leaf.grad)
    assert torch.equal(*found)
