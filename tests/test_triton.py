"""The Triton kernel: against the reference, by Triton's interpreter where there is no GPU, and compiled for GPUs."""
import itertools
import os
import sys

import pytest
import torch

import toy
from fairseq_powernorm.kernels import reference
from fairseq_powernorm.kernels import triton as kernel

if kernel.unavailable():
    pytest.skip(kernel.unavailable(), allow_module_level=True)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
#: dtype -> largest error of an output relative to the largest value: one unit in the last place, as the interpreter rounds down
TOLERANCES = {torch.float32: 3e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}
#: sums and what follows from them
SUMS = 3e-6
SHAPES = [(1, 1, 1), (1, 1, 0), (7, 257, 1), (33, 1000, 4), (64, 12, 4), (50, 600, 0), (70, 96, 3), (0, 8, 1)]
#: name -> (forward_batch, backward_batch, skip_padding, jump)
SPECS = {
    "algorithm2": (False, False, True, float("inf")),
    "reference": (False, True, False, float("inf")),
    "warm-up": (True, True, False, float("inf")),
    "jump": (False, True, False, 2.0),
}


def spec(name, groups):
    forward_batch, backward_batch, skip_padding, jump = SPECS[name]
    return reference.PowerNormSpec(groups, 1e-5, 0.1, 4.0, forward_batch, backward_batch, skip_padding, jump)


def error(value, expected, least=1e-30):
    """Largest difference, relative to the largest expected value."""
    if not expected.numel():
        return 0.0
    return float((value.double() - expected.double()).abs().max() / max(float(expected.abs().max()), least))


def inputs(rows, channels, dtype, mask, seed=1):
    torch.manual_seed(seed)
    x, grad = (torch.randn(rows, channels).to(DEVICE, dtype) for _ in range(2))
    weight, bias, nu = (torch.randn(channels, device=DEVICE) for _ in range(3))
    psi2 = torch.rand(channels, device=DEVICE) + 0.5
    valid = {"none": None, "some": torch.rand(rows) < 0.7, "all": torch.zeros(rows, dtype=torch.bool)}[mask]
    return x, grad, weight, bias, None if valid is None else valid.to(DEVICE), psi2, nu


def wide(*tensors):
    return [None if t is None else t.double() if t.is_floating_point() else t for t in tensors]


#: each variant, dtype and mask with some of the shapes, each shape with all of them
CASES = [
    case for i, case in enumerate(itertools.product(SPECS, TOLERANCES, ("none", "some", "all"), SHAPES)) if i % 5 == 0
]


@pytest.mark.parametrize("name,dtype,mask,shape", CASES)
def test_against_the_reference(name, dtype, mask, shape):
    """Output, gradients, sums and counts of a forward and a backward pass are the reference's in float64."""
    rows, channels, groups = shape
    x, grad, weight, bias, valid, psi2, nu = inputs(rows, channels, dtype, mask)
    s = spec(name, groups)
    forward = kernel.power_forward(x, weight, bias, valid, psi2, s)
    expected = reference.power_forward(*wide(x, weight, bias, valid, psi2), s)
    assert forward.y.dtype == dtype and error(forward.y, expected.y) < TOLERANCES[dtype]
    assert (forward.r is None) == (groups == 0) and (forward.r is None or error(forward.r, expected.r) < SUMS)
    assert error(forward.saved, expected.saved) < SUMS and error(forward.tally, expected.tally) < SUMS
    assert torch.equal(forward.tally[-2:], expected.tally[-2:])

    backward = kernel.power_backward(grad, x, forward.r, weight, valid, forward.saved, nu, s)
    expected_r, expected_saved = expected.r, expected.saved
    wanted = reference.power_backward(*wide(grad, x, expected_r, weight, valid, expected_saved, nu), s)
    assert backward.x.dtype == dtype
    # where a group has one channel its gradient cancels
    assert error(backward.x, wanted.x, least=float(grad.abs().max()) if rows else 1) < max(TOLERANCES[dtype], 1e-5)
    for one, other in ((backward.weight, wanted.weight), (backward.bias, wanted.bias), (backward.tally, wanted.tally)):
        assert error(one, other) < SUMS
    assert torch.equal(backward.tally[-2:], wanted.tally[-2:])
    again = kernel.power_backward(grad, x, forward.r, weight, valid, forward.saved, nu, s, want_x=False)
    assert again.x is None and torch.equal(again.tally, backward.tally) and torch.equal(again.weight, backward.weight)


@pytest.mark.parametrize("rows,channels,groups", SHAPES[2:6])
@pytest.mark.parametrize("dtype", list(TOLERANCES))
def test_evaluation(dtype, rows, channels, groups):
    """Evaluation with and without weight, bias and psi^2 is the reference's in float64; a view of T x B x C, too."""
    x, _, weight, bias, _, psi2, _ = inputs(rows, channels, dtype, "none")
    for given in ((weight, bias, psi2), (weight, None, None), (None, bias, psi2), (None, None, None)):
        y = kernel.evaluate(x, *given, groups, 1e-5)
        assert y.dtype == dtype and error(y, reference.evaluate(*wide(x, *given), groups, 1e-5)) < TOLERANCES[dtype]
    if rows % 2 == 0:
        view = x.view(2, rows // 2, channels).transpose(0, 1)
        y = kernel.evaluate(view, weight, bias, psi2, groups, 1e-5)
        assert torch.equal(y, kernel.evaluate(x, weight, bias, psi2, groups, 1e-5).view(2, -1, channels).transpose(0, 1))


@pytest.mark.parametrize("groups", [0, 2])
def test_what_stands_in_padding(groups):
    """NaN and infinity in padded rows of x and dy reach no sum and no gradient of another row; with skip_padding, none."""
    x, grad, weight, bias, valid, psi2, nu = inputs(40, 24, torch.float32, "some")
    s = spec("algorithm2", groups)
    clean = kernel.power_forward(x, weight, bias, valid, psi2, s)
    expected = kernel.power_backward(grad, x, clean.r, weight, valid, clean.saved, nu, s)
    for bad in (x, grad):
        bad[~valid] = float("nan")
        bad[~valid, 0] = float("inf")
    forward = kernel.power_forward(x, weight, bias, valid, psi2, s)
    backward = kernel.power_backward(grad, x, forward.r, weight, valid, forward.saved, nu, s)
    assert torch.equal(forward.tally, clean.tally) and torch.equal(forward.saved, clean.saved)
    assert torch.equal(forward.y[valid], clean.y[valid])
    assert all(torch.equal(one, other) for one, other in zip(backward, expected))


@pytest.mark.parametrize("mask", ["none", "some"])
def test_second_moment(mask):
    """The tally alone is that of a forward pass; with it given, a forward pass divides by it."""
    x, _, weight, bias, valid, psi2, _ = inputs(33, 20, torch.float32, mask)
    s = spec("warm-up", 4)
    tally = kernel.second_moment(x, valid, 4)
    forward = kernel.power_forward(x, weight, bias, valid, psi2, s)
    assert torch.equal(tally, forward.tally)
    batch = reference.mean_of(tally, psi2)
    given = kernel.power_forward(x, weight, bias, valid, psi2, s, batch)
    assert error(given.y, forward.y) < SUMS and error(given.saved, forward.saved) < SUMS
    doubled = kernel.power_forward(x, weight, bias, valid, psi2, s, 2 * batch)
    assert error(doubled.saved[1], torch.rsqrt(2 * batch + 1e-5)) < SUMS


def test_many_rows():
    """Sums over 300,000 rows keep float32's precision: 1e-6 of the sum in float64."""
    x = (torch.randn(300_000, 2, generator=torch.Generator().manual_seed(1)) + 3).to(DEVICE)
    tally = kernel.second_moment(x, None, 0)
    assert error(tally[:-2], x.double().square().sum(0)) < 1e-6 and tally[-2] == 300_000


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from fairseq_powernorm.kernels import fused_triton

FLOATS = ("r", "psi2", "backward_psi2", "weight", "bias", "nu", "squares", "saved", "grad_sum", "grad_u_sum", "grad_weight", "grad_bias")
NUMBERS = {"rows": "i32", "channels": "i32", "size": "i32", "parts": "i32", "eps": "fp32", "layer_scale_eps": "fp32"}
NUMBERS.update(nu_scale="fp32", gradient_scale="fp32")
TENSORS = {**{name + "_ptr": "*fp32" for name in FLOATS}, "valid_ptr": "*i1", "counts_ptr": "*i32", "tally_ptr": "*fp64"}
FLAGS = dict.fromkeys(("LAYER_SCALE", "OUTPUT", "SAVE", "SUMS", "DIVIDE", "OWN", "HAS_VALID", "HAS_WEIGHT", "HAS_BIAS"), True)
FLAGS.update(
    PADDING=False, GIVEN=False, padding_ptr=None, TILE_ROWS=8, TILE_COLUMNS=512, CHANNELS=fused_triton.END_CHANNELS,
    PARTS=fused_triton.END_PARTS,
)
for capability in (80, 90):
    for dtype in ("fp32", "bf16", "fp16"):
        for name in ("forward", "forward_end", "backward", "backward_end"):
            kernel = getattr(fused_triton, name)
            tensors = {**TENSORS, **{each + "_ptr": "*" + dtype for each in ("x", "y", "grad", "grad_x")}}
            types = {**tensors, **NUMBERS}
            names = kernel.arg_names
            aligned = {*tensors, "channels", "size"}
            source = ASTSource(
                kernel, signature={each: "constexpr" if each in FLAGS else types[each] for each in names},
                constexprs={(i,): FLAGS[each] for i, each in enumerate(names) if each in FLAGS},
                attrs={(i,): [["tt.divisibility", 16]] for i, each in enumerate(names) if each in aligned - FLAGS.keys()},
            )
            warps = 4 if name.endswith("end") else 8
            done = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})
            assert done.asm["cubin"] and ".local" not in done.asm["ptx"], (capability, dtype, name)
            assert name.endswith("end") or "v4.b32" in done.asm["ptx"], (capability, dtype, name)
print("compiled")
"""


def test_compiles_for_gpus(tmp_path):
    """All of it compiles to machine code for A100 and H100, sweeps with 16-byte loads, none with spilled registers."""
    (tmp_path / "compile.py").write_text(COMPILE)
    path = os.pathsep.join(filter(None, [str(toy.ROOT), os.environ.get("PYTHONPATH")]))
    done = toy.command(
        sys.executable, tmp_path / "compile.py", TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path), PYTHONPATH=path
    )
    assert done.stdout.endswith("compiled\n")
