"""Normalization by statistics of the batch, PN-V and batch normalization, by the sweeps of the C kernel."""
import contextlib

import pytest
import torch

from fairseq_powernorm import kernels
from fairseq_powernorm.kernels import c, native
from fairseq_powernorm.kernels.interface import TOLERANCE
from fairseq_powernorm.norms import MaskedBatchNorm, PowerNormV, build_norm
from fairseq_powernorm.statistics import RunningStatistics

pytestmark = pytest.mark.skipif(c.unavailable() is not None, reason=str(c.unavailable()))

KINDS = ("batch", "batch:variant=reference", "power-v")
#: rows x sentences x channels -> groups of the layer scale; the numbers of channels are no multiples of a vector, too
SHAPES = {(5, 1, 16): (1,), (7, 3, 16): (0, 1), (33, 5, 40): (4,), (50, 3, 257): (0, 1)}


def inputs(shape, dtype=torch.float32, mean=0.3):
    """x, dy, weight, bias; x has another mean and deviation in each channel."""
    generator = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(shape, generator=generator) for _ in range(2))
    weight, bias = (torch.randn(shape[-1], generator=generator) for _ in range(2))
    x = x * (0.5 + torch.rand(shape[-1], generator=generator)) + mean * (1 + weight)
    return [each.to(dtype) for each in (x, dy, weight, bias)]


def padding(shape):
    """About a third of the rows, among them the first and the last of a sentence: True."""
    mask = torch.rand(shape[1], shape[0], generator=torch.Generator().manual_seed(1)) < 0.3
    mask[:, 0] = mask.size(0) > 1
    mask[0, -1] = False
    return mask


def steps(kind, groups, x, dy, weight, bias, mask, *, staged=False, dtype=None):
    """Outputs and gradients of two training steps, parameters' gradients, statistics, and the passes' names."""
    norm, found, names = build_norm(kind, x.size(-1), groups=groups).to(dtype or x.dtype), [], set()
    with torch.no_grad():
        norm.weight.copy_(weight)
        norm.bias.copy_(bias)
    statistics = RunningStatistics(norm) if staged else None
    for number in range(2):
        leaf = (x * (1 + 0.25 * number)).to(dtype or x.dtype).requires_grad_()
        with statistics.batch() if staged else contextlib.nullcontext():
            y = norm(leaf, mask)
            names.add(y.grad_fn.name())
            y.backward(dy.to(y.dtype))
        if staged:
            statistics.commit()
        found += [y.detach(), leaf.grad]
    with torch.no_grad():
        found.append(norm.eval()(leaf.detach()))
    return found, [each.grad for each in norm.parameters()], list(norm.buffers()), names


def assert_near(got, want, tolerance):
    assert (got.double() - want.double()).abs().max() <= tolerance * want.abs().max().clamp(min=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_training_and_evaluation(kind, dtype):
    """Two steps and an evaluation, with and without a mask, alone and staged, are those of float64, in C++ with the bits of
    Python.
    """
    rows, sums = TOLERANCE[dtype]
    rounded = 2.0**-8 if dtype is torch.bfloat16 else 2e-6  # parameters and their gradients are of that dtype, too
    in_cpp = kernels.autograd_for(torch.zeros(1, 1)) is not None
    for shape, some in SHAPES.items():
        tensors = inputs(shape, dtype)
        for groups in some:
            for mask in (None, padding(shape)):
                want = steps(kind, groups, *tensors, mask, dtype=torch.float64)
                assert want[3] == {"_BatchNormBackward"}
                results = []
                for context in (contextlib.nullcontext(), native.in_python()):
                    with context:
                        results.append(steps(kind, groups, *tensors, mask, staged=groups == 0))
                assert results[1][3] == {"_BatchSweepsBackward"}
                if in_cpp:
                    name = "PowerNormVBackward" if kind == "power-v" else "MaskedBatchNormBackward"
                    assert results[0][3] == {name}
                for part, tolerance in enumerate((max(2 * rows, 2 * rounded), 2 * rounded, 2 * sums)):
                    for got, same, wanted in zip(results[0][part], results[1][part], want[part]):
                        assert got.dtype is same.dtype and torch.equal(got, same)
                        assert_near(got, wanted, tolerance)


@pytest.mark.parametrize("kind", KINDS)
def test_each_set_of_instructions(kind):
    """The same with the plainer instructions of this processor, with several threads, and with rows taken one by one."""
    shape = (200, 1, 72)
    x, dy, weight, bias = inputs(shape)
    mask = padding(shape)
    want = steps(kind, 4, x, dy, weight, bias, mask, dtype=torch.float64)
    threads, usual = torch.get_num_threads(), (c.far_from(0), c.stream_from(0))
    try:
        for number in (0, 1, -1):
            c.use_instructions(number)
            torch.set_num_threads(2)
            for size in (1 << 60, 0):
                c.far_from(size)
                c.stream_from(size)
                got = steps(kind, 4, x, dy, weight, bias, mask)
                for part in range(3):
                    for one, other in zip(got[part], want[part]):
                        assert_near(one, other, 8e-6)
    finally:
        c.far_from(usual[0])
        c.stream_from(usual[1])
        c.use_instructions(-1)
        torch.set_num_threads(threads)


def test_a_large_mean_takes_nothing_from_the_variance():
    """Rows about 3000 with deviation 1 are normalized as in float64 computed from the same numbers; one row far off, too."""
    x, dy, weight, bias = inputs((300, 1, 8))
    x = x + 3000.0
    for far in (False, True):
        if far:
            x[17] = 0.0
        y = steps("batch", 0, x, dy, weight, bias, None)
        want = steps("batch", 0, x, dy, weight, bias, None, dtype=torch.float64)
        assert_near(y[0][0], want[0][0], 1e-3)  # the numbers themselves have 24 bits
        assert_near(y[2][2], want[2][2], 1e-4)  # running_var


@pytest.mark.parametrize("in_python", [False, True], ids=["C++", "Python"])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_do_not_count(kind, in_python):
    """Without a row that counts the running statistics serve; padding that is not finite reaches nothing else."""
    x, dy, *_ = inputs((6, 1, 16))
    with native.in_python() if in_python else contextlib.nullcontext():
        for broken in (False, True):
            mask = torch.tensor([[False] * 4 + [True] * 2]) if broken else torch.ones(1, 6, dtype=torch.bool)
            if broken:
                x[4], dy[4] = float("nan"), float("inf")
            results = []
            for kernel in ("c", "eager"):
                with kernels.only(kernel):
                    norm, leaf = build_norm(kind, 16, groups=4), x.clone().requires_grad_()
                    norm(leaf, mask).backward(dy)
                    others = [0, 1, 2, 3, 5]  # than the row that is not finite, whose own gradient has no meaning
                    results.append([leaf.grad[others], norm.weight.grad, norm.bias.grad, *norm.buffers()])
            for got, want in zip(*results):
                assert torch.isfinite(got).all()
                assert_near(got, want, 4e-6)


@pytest.mark.parametrize("in_python", [False, True], ids=["C++", "Python"])
@pytest.mark.parametrize("kind", KINDS)
def test_padding_that_is_very_large(kind, in_python):
    """Its own gradient is what arrives, times the scale: nothing that would be infinite is taken times zero."""
    x, dy, *_ = inputs((6, 1, 16))
    mask = torch.tensor([[False] * 4 + [True] * 2])
    x[4:], dy[4:] = 1e38, 0.0
    x[:4] *= 1e-3  # so that the statistics' gradient is large
    with native.in_python() if in_python else contextlib.nullcontext():
        norm, leaf = build_norm(kind, 16, groups=0), x.clone().requires_grad_()
        norm(leaf, mask).backward(dy)
    assert torch.isfinite(leaf.grad[:4]).all() and (leaf.grad[4:] == 0.0).all()


class Slow(MaskedBatchNorm):
    """A rule of its own for the running mean."""

    def advance(self, part, state, sums, alpha_fwd):
        return {**super().advance(part, state, sums, alpha_fwd), "running_mean": state["running_mean"] - 1.0}


def test_what_is_left_to_python():
    """A derived class's rule, second derivatives, a record of backward sums: the results of plain torch."""
    x, dy, *_ = inputs((5, 2, 8))
    norm = Slow(8)
    norm(x)
    assert torch.equal(norm.running_mean, -torch.ones(8)) and norm.iters == 1
    results = []
    for kernel in ("c", "eager"):
        with kernels.only(kernel):
            leaf, norm = x.clone().requires_grad_(), PowerNormV(8)
            (first,) = torch.autograd.grad(norm(leaf).pow(3).sum(), leaf, create_graph=True)
            first.pow(2).sum().backward()
            statistics, recorded = RunningStatistics(MaskedBatchNorm(8)), []
            statistics.switches.recording = True
            (kept,) = statistics.norms().values()
            with statistics.batch(gradient_scale=4.0):
                kept(x.clone().requires_grad_()).backward(dy)
            statistics.reduce()
            recorded = [torch.tensor(list(statistics.describe()[""].values()))]
            results.append([first, leaf.grad, *recorded])
    for got, want in zip(*results):
        assert_near(got, want, 1e-5)


def test_a_backward_pass_outside_of_its_batch():
    """A stage that has been closed refuses it."""
    norm, (x, dy, *_) = MaskedBatchNorm(8), inputs((5, 2, 8))
    statistics = RunningStatistics(norm)
    with statistics.batch():
        y = norm(x.requires_grad_())
    with pytest.raises(RuntimeError, match="a backward pass in training outside"):
        y.backward(dy)


@pytest.mark.parametrize("in_python", [False, True], ids=["C++", "Python"])
@pytest.mark.parametrize("kind", ["power", *KINDS])
def test_memory_that_was_given_back(kind, in_python):
    """Between forward and backward pass the memory of the input or of the mask is freed, or becomes too small: an error."""
    with native.in_python() if in_python else contextlib.nullcontext():
        for size in (0, 16):
            x, dy, *_ = inputs((40, 2, 8))
            y = build_norm(kind, 8)(x.requires_grad_())
            x.data.untyped_storage().resize_(size)
            with pytest.raises(RuntimeError, match="has been given back"):
                y.backward(dy)


def spread(vector, dtype=None):
    """The same values as a parameter of which every second element of memory is one."""
    memory = torch.zeros(2 * len(vector), dtype=dtype or vector.dtype)
    memory[::2] = vector.detach()
    return torch.nn.Parameter(memory[::2])


def change(norm, **parameters):
    for name, parameter in parameters.items():
        setattr(norm, name, parameter)


#: what is unusual -> the rows taken of x and dy (T x B x C), what is done to the norm, and to x and dy
UNUSUAL = {
    "no row": (slice(0), None, None),
    "one row": (slice(1), None, None),
    "fewer rows than threads": (slice(2), None, None),
    "every second row": (slice(None, None, 2), None, None),
    "sentences first in memory": (slice(None), None, lambda t: t.transpose(0, 1).contiguous().transpose(0, 1)),
    "channels far apart": (slice(None), None, lambda t: t.permute(2, 0, 1).contiguous().permute(1, 2, 0)),
    "one sentence for all": (slice(None), None, lambda t: t[:, :1].expand_as(t)),
    "parameters with gaps": (slice(None), lambda n: change(n, weight=spread(n.weight), bias=spread(n.bias)), None),
    "parameters in double": (slice(None), lambda n: change(n, weight=spread(n.weight, torch.double)), None),
    "parameters in half": (slice(None), lambda n: change(n, weight=spread(n.weight, torch.half)), None),
    "weight alone": (slice(None), lambda n: change(n, bias=None), None),
    "no parameters": (slice(None), lambda n: change(n, weight=None, bias=None), None),
    "weight frozen": (slice(None), lambda n: n.weight.requires_grad_(False), None),
    "bias frozen": (slice(None), lambda n: n.bias.requires_grad_(False), None),
    "a row that counts is infinite": (slice(None), None, lambda t: t.index_fill(0, torch.tensor([1]), float("inf"))),
}


def unusual_results(kind, groups, what, mask, *, want_x):
    """Output, gradients of two backward passes over one graph, statistics; the third backward pass is refused."""
    rows, to_norm, to_tensors = UNUSUAL[what]
    x, dy, *_ = (each[rows] if each.dim() == 3 else each for each in inputs((7, 3, 16)))
    mask = None if mask is None else mask[:, rows]
    norm = build_norm(kind, 16, groups=groups)
    if to_norm:
        to_norm(norm)
    if to_tensors:
        x, dy = (to_tensors(each) for each in (x, dy))
    leaf = x.detach().requires_grad_(want_x)
    found = []
    if want_x or any(each.requires_grad for each in norm.parameters()):
        y = norm(leaf, mask)
        for again in (True, False):
            y.backward(dy, retain_graph=again)
            found += [None if each.grad is None else each.grad.clone() for each in (leaf, *norm.parameters())]
        with pytest.raises(RuntimeError, match="second time"):
            y.backward(dy)
        found.append(y.detach())
    return [*found, *norm.buffers(), norm.eval()(x).detach()]


@pytest.mark.parametrize("in_python", [False, True], ids=["C++", "Python"])
@pytest.mark.parametrize("what", UNUSUAL)
def test_unusual_tensors(what, in_python):
    """Numbers of rows, memory, parameters and gradients of every kind: the results of plain torch, with no element of a
    tensor changed that is not the norm's own; a graph is kept for a second backward pass if that is asked for.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        with native.in_python() if in_python else contextlib.nullcontext():
            for kind, groups in zip(KINDS, (0, 1, 4)):
                for mask, want_x in ((None, True), (padding((7, 3)), False), (padding((7, 3)), True)):
                    if "infinite" in what and "reference" in kind and mask is not None:
                        continue  # its padding is the bias, where plain torch multiplies it by what is not finite
                    results = []
                    for kernel in ("c", "eager"):
                        with kernels.only(kernel):
                            results.append(unusual_results(kind, groups, what, mask, want_x=want_x))
                    for got, want in zip(*results):
                        assert (got is None) is (want is None)
                        if got is not None:
                            assert got.dtype is want.dtype and got.shape == want.shape
                            torch.testing.assert_close(got, want, rtol=2e-3 if got.dtype is torch.half else 1e-4,
                                                       atol=2e-3 if got.dtype is torch.half else 2e-5, equal_nan=True)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("kind", KINDS)
def test_second_derivatives(kind):
    """With a mask and parameters: those of float64, which plain torch computes; the graph of the first may be kept."""
    x, dy, *_ = inputs((6, 1, 8))
    mask = torch.tensor([[False] * 4 + [True] * 2])
    results = []
    for dtype in (torch.float32, torch.float64):
        norm, leaf = build_norm(kind, 8, groups=2).to(dtype), x.to(dtype).requires_grad_()
        y = norm(leaf, mask)
        first = torch.autograd.grad(y, [leaf, *norm.parameters()], dy.to(dtype), create_graph=True)
        second = torch.autograd.grad(sum(each.pow(2).sum() for each in first), [leaf, norm.weight])
        results.append([*first, *second, *torch.autograd.grad(y, [leaf], dy.to(dtype))])
    for got, want in zip(*results):
        assert_near(got.detach(), want.detach(), 2e-4)
