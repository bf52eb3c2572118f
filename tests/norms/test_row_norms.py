"""The norms without statistics: against second implementations in float64, by autograd, in half precision, at the edges."""
import copy
import io
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from norm_cases import C, batch, make
from torch import nn

from fairseq_powernorm import functional, kernels
from fairseq_powernorm.kernels import KERNELS, c
from fairseq_powernorm.kernels.interface import TOLERANCE
from fairseq_powernorm.norms import NORMS, RowNorm, build_norm

NAMES = [name for name, kind in NORMS.items() if issubclass(kind, RowNorm)]
#: texts of them with options that are no defaults
TEXTS = ["group-scale:groups=4,eps=0.01", "scale:eps=0.01", "ada:scale=1.5,k=0.2,eps=0.01", "group:groups=4,eps=0.01",
         "dyt:alpha=0.8", "derf:alpha=0.7,shift=0.1"]
SMALLEST = {torch.float16: 6e-8, torch.bfloat16: 1e-38}


# ---------------------------------------------------------------- second implementations, of rows N x C


def second_group_scale(x, p, groups=1, eps=1e-5):
    parts = [part / (part.pow(2).sum(1, keepdim=True) / part.size(1) + eps).sqrt() for part in x.chunk(groups, 1)]
    return torch.cat(parts, 1) * p["weight"] + p["bias"]


def second_scale(x, p, eps=1e-5):
    return F.normalize(x, eps=eps) * p["weight"]


def second_ada(x, p, scale=1.0, k=0.1, eps=1e-5):
    deviation = x.std(1, correction=1, keepdim=True)
    centred = x - x.sum(1, keepdim=True) / x.size(1)
    with torch.no_grad():
        damped = k * centred / (deviation + eps)
    return scale * (centred - centred * damped) / (deviation + eps)


def second_group(x, p, groups=1, eps=1e-5):
    return F.group_norm(x, groups, p["weight"], p["bias"], eps)


def second_dyt(x, p, alpha=None):
    power = torch.exp(-2 * p["alpha"] * x)
    return p["weight"] * (1 - power) / (1 + power) + p["bias"]


def second_derf(x, p, alpha=None, shift=None):
    z = p["alpha"] * x + p["shift"]
    size = z * z.sign()
    return p["weight"] * z.sign() * (1 - torch.exp(-z * z) * torch.special.erfcx(size)) + p["bias"]


SECOND = {"group-scale": second_group_scale, "scale": second_scale, "ada": second_ada, "group": second_group,
          "dyt": second_dyt, "derf": second_derf}


def second(text, x, parameters):
    """The second implementation of a norm's text, of ``T x B x C``."""
    name, _, options = text.partition(":")
    values = {key: float(value) for key, value in (each.split("=") for each in options.split(",") if each)}
    values = {key: int(value) if key == "groups" else value for key, value in values.items()}
    return SECOND[name](x.reshape(-1, x.size(-1)), parameters, **values).view_as(x)


def test_all_have_one():
    """Every norm of this kind is among the second implementations, and among the texts with options."""
    assert set(NAMES) == set(SECOND) == {text.partition(":")[0] for text in TEXTS}


@pytest.mark.parametrize("text", [*NAMES, *TEXTS])
def test_fifty_steps_of_training(text):
    """Outputs, gradients and parameters of 50 steps of SGD in float64 are those of the second implementation."""
    norm = build_norm(text, C).double()
    parameters = {key: p.detach().clone().requires_grad_() for key, p in norm.named_parameters()}
    optimizers = [torch.optim.SGD(each, 0.005, momentum=0.9) for each in (
        norm.parameters(), parameters.values()) if parameters]
    for step in range(50):
        x, dy, mask = batch(step, torch.float64)
        leaves = [(x * (1 + step % 3)).requires_grad_() for _ in range(2)]
        outputs = [norm(leaves[0], mask), second(text, leaves[1], parameters)]
        for optimizer, output in zip(optimizers or [None, None], outputs):
            if optimizer:
                optimizer.zero_grad()
            output.backward(dy)
        for optimizer in optimizers:
            optimizer.step()
        torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(leaves[0].grad, leaves[1].grad, rtol=1e-11, atol=1e-11)
        for key, parameter in norm.named_parameters():
            torch.testing.assert_close(parameter, parameters[key], rtol=1e-11, atol=1e-11)


def test_known_values():
    """By hand, C = 2 or 4: a row (3, 4), whose length is 5, mean 3.5 and standard deviation sqrt(0.5)."""
    row = torch.tensor([[3.0, 4.0]], dtype=torch.float64)

    def of(text, x=row):
        return build_norm(text, x.size(1), dtype=x.dtype)(x)[0].tolist()

    root = 2**0.5
    assert of("scale") == pytest.approx([root * 0.6, root * 0.8], abs=1e-12)
    z = 0.5 / (0.5**0.5 + 1e-5)
    assert of("ada:k=0.2") == pytest.approx([-z - 0.2 * z * z, z - 0.2 * z * z], abs=1e-12)
    assert of("group-scale") == pytest.approx([3 / (12.5 + 1e-5) ** 0.5, 4 / (12.5 + 1e-5) ** 0.5], abs=1e-12)
    assert of("group-scale:groups=2") == pytest.approx([3 / (9 + 1e-5) ** 0.5, 4 / (16 + 1e-5) ** 0.5], abs=1e-12)
    four = torch.tensor([[1.0, 3.0, 10.0, 30.0]], dtype=torch.float64)
    small, large = 1 / (1 + 1e-5) ** 0.5, 10 / (100 + 1e-5) ** 0.5
    assert of("group:groups=2", four) == pytest.approx([-small, small, -large, large], abs=1e-12)
    assert of("dyt") == pytest.approx([math.tanh(1.5), math.tanh(2.0)], abs=1e-12)
    assert of("derf:shift=-1") == pytest.approx([math.erf(0.5), math.erf(1.0)], abs=1e-12)


def test_relations():
    """What one norm is of another: group-scale is PN's layer scale and RMSNorm, group is LayerNorm, ada with k = 0 is
    LayerNorm by the unbiased standard deviation.
    """
    x = batch(0, torch.float64)[0]
    for groups in (1, 2, 8):
        torch.testing.assert_close(build_norm("group-scale", C, groups=groups)(x), functional.layer_scale(x, groups))
    torch.testing.assert_close(build_norm("group-scale", C)(x), F.rms_norm(x, [C], eps=1e-5))
    torch.testing.assert_close(build_norm("group", C)(x), F.layer_norm(x, [C], eps=1e-5))
    unbiased = F.layer_norm(x, [C], eps=0.0) * ((C - 1) / C) ** 0.5
    torch.testing.assert_close(build_norm("ada:k=0,eps=1e-12", C)(x), unbiased)


# ---------------------------------------------------------------- gradients, precision


@pytest.mark.parametrize("text", [text for text in TEXTS if not text.startswith("ada")])
def test_gradients(text):
    """gradcheck of input and parameters, with a mask."""
    norm = make(text, dtype=torch.float64)
    x, _, mask = batch(0, torch.float64)
    names = [name for name, _ in norm.named_parameters()]

    def f(x, *values):
        return torch.func.functional_call(norm, dict(zip(names, values)), (x, mask[:2]))

    assert torch.autograd.gradcheck(f, (x[:, :2].clone().requires_grad_(), *norm.parameters()))


def test_gradient_of_ada():
    """The gradient is that of the formula with sg put in as a number: gradcheck of that function, and its gradient here."""
    x, dy, _ = batch(0, torch.float64)
    x, dy = x[:2, :2].clone().requires_grad_(), dy[:2, :2]
    frozen = (0.1 * (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1e-5)).detach()

    def f(x):
        c = x - x.mean(-1, keepdim=True)
        return (c - c * frozen) / (x.std(-1, keepdim=True) + 1e-5)

    assert torch.autograd.gradcheck(f, (x,))
    norm = build_norm("ada", C)
    torch.testing.assert_close(*(torch.autograd.grad(each(x), x, dy)[0] for each in (norm, f)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 300.0, 3e-4])
@pytest.mark.parametrize("name", NAMES)
def test_half_precision(name, scale, dtype, half):
    """Input, and parameters too, in half precision: the result is the rounded one of float64, whatever squares would do."""
    norm = make(name)
    if half:
        norm = norm.to(dtype)
    truth = copy.deepcopy(norm).double()
    results = []
    x, dy, _ = batch()
    for each, kind in ((norm, dtype), (truth, torch.float64)):
        leaf = (x * scale).to(dtype).to(kind).requires_grad_()
        y = each(leaf)
        y.backward(dy.to(dtype).to(kind))
        assert y.dtype == leaf.grad.dtype == kind
        results.append([y, leaf.grad, *(p.grad for p in each.parameters())])
    tolerance = TOLERANCE[dtype][0]
    for found, wanted in zip(*results):
        largest = wanted.abs().max()
        assert (found.double() - wanted).abs().max() <= 2 * tolerance * largest + SMALLEST[dtype]


@pytest.mark.parametrize("name", NAMES)
def test_autocast(name):
    """Under autocast to bfloat16 float32 stays float32, and every number is that without."""
    norm = make(name)
    x = batch()[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(norm(x), norm(x))
        found = norm(x)
    assert found.dtype == torch.float32 and torch.equal(found, norm(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
@pytest.mark.parametrize("value", [0.0, 1.0, 6e4])
@pytest.mark.parametrize("name", NAMES)
def test_constant_rows(name, value, dtype):
    """Rows of zeros, and of one number: outputs, gradients and second derivatives are finite."""
    norm = make(name)
    if dtype is torch.float64:
        norm = norm.double()
    x = torch.full((3, C), value, dtype=dtype, requires_grad=True)
    y = norm(x)
    (first,) = torch.autograd.grad(y, x, torch.full_like(y, 0.01), create_graph=True)
    found = [y, first]
    if first.requires_grad:
        found.append(torch.autograd.grad(first.float().sum(), x, allow_unused=True)[0])
    assert all(torch.isfinite(each).all() for each in found if each is not None)


@pytest.mark.parametrize("name", NAMES)
def test_rows_are_alone(name):
    """A row is the same whatever the others are, to the last bit: NaN and infinity stay in theirs."""
    norm = make(name)
    x, dy, mask = batch()
    whole = x.clone().requires_grad_()
    norm(whole, mask).backward(dy)
    broken = x.clone()
    broken[0, 0], broken[1, 2] = torch.nan, torch.inf
    broken.requires_grad_()
    y = norm(broken, mask)
    y.backward(dy)
    for t, b in ((2, 0), (4, 1), (0, 2)):
        assert torch.equal(y[t, b], norm(x)[t, b]) and torch.equal(broken.grad[t, b], whole.grad[t, b])


# ---------------------------------------------------------------- life cycle, errors


@pytest.mark.parametrize("name", NAMES)
def test_life_cycle(name):
    """Copied, pickled, saved, loaded, reset: the same parameters, dtype and numbers; a new one is what reset gives."""
    norm, x = make(name), batch()[0]
    stream = io.BytesIO()
    torch.save(norm.state_dict(), stream)
    stream.seek(0)
    loaded = build_norm(name, C, groups=getattr(norm, "groups", 1))
    assert loaded.load_state_dict(torch.load(stream, weights_only=True)) == ([], [])
    for twin in (copy.deepcopy(norm), pickle.loads(pickle.dumps(norm)), loaded):
        assert torch.equal(twin(x), norm(x)) and repr(twin) == repr(norm)
        assert not {p.data_ptr() for p in twin.parameters()} & {p.data_ptr() for p in norm.parameters()}
    norm.reset_parameters()
    fresh = build_norm(name, C, groups=getattr(norm, "groups", 1))
    assert all(torch.equal(norm.state_dict()[key], value) for key, value in fresh.state_dict().items())
    with torch.inference_mode():
        made = build_norm(name, C)
    made(x.clone().requires_grad_()).sum().backward()
    assert not list(norm.buffers()) and norm.train() is norm


@pytest.mark.parametrize("name", NAMES)
def test_parameters_can_be_sharded(name):
    """No parameter is a scalar, which FullyShardedDataParallel refuses; what is one number has one element."""
    assert all(p.dim() == 1 and p.numel() in (1, C) for p in build_norm(name, C).parameters())


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_compiled(name):
    """torch.compile(fullgraph=True) of a norm in float32 and in bfloat16, with a mask: forward and backward as without."""
    torch._dynamo.reset()
    for dtype in (torch.float32, torch.bfloat16):
        norm = make(name, dtype=dtype)
        x, dy, mask = batch(0, dtype)
        results = []
        for f in (norm, torch.compile(norm, fullgraph=True, backend="aot_eager")):
            norm.zero_grad()
            leaf = x.clone().requires_grad_()
            y = f(leaf, mask)
            y.backward(dy)
            results.append([y, leaf.grad, *(p.grad.clone() for p in norm.parameters())])
        for one, other in zip(*results):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    "text,dim,message",
    [
        ("scale:eps=0", 8, r"norm 'scale:eps=0': eps=0.0: must be a finite number above 0"),
        ("scale:eps=inf", 8, "eps=inf: must be a finite number above 0"),
        ("group-scale:eps=1e-46", 8, "eps=1e-46: must be a finite number above 0, in float32"),
        ("dyt:alpha=1e39", 8, r"alpha=1e\+39: must be a finite number above 0, in float32"),
        ("group:groups=3", 8, r"groups=3: must divide the 8 channels into groups of 2 or more, one of \[1, 2, 4\]"),
        ("group:groups=8", 8, r"groups=8: must divide the 8 channels into groups of 2 or more, one of \[1, 2, 4\]"),
        ("group-scale:groups=0", 8, r"groups=0: must divide the 8 channels, one of \[1, 2, 4, 8\]"),
        ("group-scale:eps=nan", 8, "eps=nan"),
        ("ada:scale=0", 8, "scale=0.0: must be a finite number above 0"),
        ("ada:k=-1", 8, "k=-1.0: must be a finite number, 0 or more"),
        ("ada", 1, "norm 'ada': dim=1: must be 2 or more"),
        ("ada:affine=true", 8, "option 'affine' is unknown; options of 'ada': eps, scale, k"),
        ("dyt:alpha=0", 8, "alpha=0.0: must be a finite number above 0"),
        ("derf:shift=nan", 8, "shift=nan: must be a finite number"),
        ("derf:eps=1", 8, "option 'eps' is unknown; options of 'derf': alpha, shift, affine"),
        *((name, 0, "dim=0: must be a positive number of channels") for name in NAMES),
    ],
)
def test_wrong_arguments(text, dim, message):
    """Refused with norm, option, value and what is valid."""
    with pytest.raises(ValueError, match=message):
        build_norm(text, dim)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_wrong_inputs(name, training):
    """Another number of channels, which would broadcast, integers, nested and sparse tensors, and masks that do not fit."""
    norm = build_norm(name, C).train(training)
    x = torch.randn(5, 3, C)
    for wrong, mask, message in (
        (torch.randn(5, 3, 1), None, rf"input of shape \(5, 3, 1\): expected T x B x {C}"),
        (x.long(), None, "input of dtype torch.int64: expected float16"),
        (torch.nested.nested_tensor([torch.ones(2, C), torch.ones(2, C)]), None, "expected a dense"),
        (torch.ones(3, C).to_sparse(), None, "expected a dense"),
        (x, torch.zeros(5, 3, dtype=torch.bool), r"padding_mask of shape \(5, 3\): expected \(3, 5\)"),
        (x, torch.zeros(3, 5), "padding_mask of dtype torch.float32"),
    ):
        with pytest.raises(ValueError, match=message):
            norm(wrong, mask)


@pytest.mark.parametrize(
    "text,expected",
    [
        ("group-scale:groups=2", "GroupScaleNorm(8, eps=1e-05, groups=2, affine=True)"),
        ("scale:affine=false", "ScaleNorm(8, eps=1e-05, affine=False)"),
        ("ada", "AdaNorm(8, eps=1e-05, scale=1.0, k=0.1)"),
        ("group", "GroupNorm(8, eps=1e-05, groups=1, affine=True)"),
        ("dyt", "DynamicTanh(8, alpha=0.5 at first, affine=True)"),
        ("derf:shift=1", "DynamicErf(8, alpha=0.5 and shift=1.0 at first, affine=True)"),
    ],
)
def test_text_of_a_module(text, expected):
    """What print(model) shows; the layout where it is not the default."""
    assert str(build_norm(text, 8)) == expected
    assert "layout=channels_first" in str(build_norm(text, 8, layout="channels_first"))


def test_only_what_is_learned_is_a_parameter():
    """affine=False leaves the scalars of dyt and derf, and nothing in the others; ScaleNorm keeps its first length."""
    left = {name: [key for key, _ in build_norm(name, C, affine=False).named_parameters()] for name in NAMES}
    assert left == {"group-scale": [], "scale": [], "ada": [], "group": [], "dyt": ["alpha"], "derf": ["alpha", "shift"]}
    x = batch()[0]
    lengths = build_norm("scale", C, affine=False)(x).norm(dim=-1)
    torch.testing.assert_close(lengths, torch.full_like(lengths, C**0.5))
    assert isinstance(build_norm("dyt", C).weight, nn.Parameter)


# ---------------------------------------------------------------- evaluation by a sweep


def operations(function):
    """Names of torch's operations that a call runs."""
    with torch.autograd.profiler.profile() as profile:
        function()
    return {event.name for event in profile.function_events}


@pytest.mark.skipif(c.unavailable() is not None, reason=str(c.unavailable()))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "text", ["rms", "rms:affine=false", "rms:eps=0.01", "group-scale:groups=4", "group-scale:affine=false,eps=1e-8"]
)
def test_evaluation_by_a_sweep(text, dtype):
    """RMSNorm and the layer scale without a gradient on a CPU are one sweep over the rows, of whatever strides, and give
    what training gives; a gradient is computed by torch's operations as ever, and another width is refused.
    """
    norm = build_norm(text, C)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.copy_(torch.randn(C, generator=torch.Generator().manual_seed(1)))
    x = batch(0, dtype)[0]
    for rows in (x, x[:0], x[:1, :1], x[::2], x.transpose(0, 1), x.expand(2, *x.shape), x[0, 0]):
        want = norm.train()(rows)
        norm.eval()
        with torch.no_grad():
            got = norm(rows)
        assert got.dtype is want.dtype and got.shape == want.shape
        torch.testing.assert_close(got, want.detach(), rtol=8e-3 if dtype is torch.bfloat16 else 4e-6, atol=4e-6)
    wanted = x.clone().requires_grad_()
    norm(wanted).sum().backward()
    assert torch.isfinite(wanted.grad).all() and wanted.grad.any()
    with torch.no_grad(), pytest.raises((ValueError, RuntimeError)):
        norm(x[..., 1:])
    with torch.no_grad():
        assert not [name for name in operations(lambda: norm(x)) if "norm" in name or "mul" in name or "pow" in name]


@pytest.mark.parametrize("kernel", ["eager", "c", "triton"])
def test_another_eps_is_kept(kernel):
    """In evaluation rms and group-scale add the eps that they were given, not that of PN's layer scale."""
    if KERNELS[kernel].unavailable():
        pytest.skip(KERNELS[kernel].unavailable())
    x = batch(0, torch.float32)[0] * 1e-3
    for eps in (1e-2, 1e-6, 1e-12):
        want = F.rms_norm(x, [C], eps=eps)
        with torch.no_grad(), kernels.only(kernel):
            for text in (f"rms:eps={eps}", f"group-scale:eps={eps}"):
                torch.testing.assert_close(build_norm(text, C).eval()(x), want)
            torch.testing.assert_close(kernels.evaluate(x, groups=1, eps=eps), want)
            running = torch.full((C,), 3.0)  # whose eps it is then
            want_running = F.rms_norm(x, [C], eps=1e-5) / (3.0 + eps) ** 0.5
            torch.testing.assert_close(kernels.evaluate(x, psi2=running, groups=1, eps=eps), want_running)
