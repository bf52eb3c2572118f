"""The Triton kernels: against the reference by Triton's interpreter, and compiled for GPUs that need not be there."""
import os
import sys

import pytest
import torch

import toy
from fairseq_powernorm.kernels import reference

pytest.importorskip("triton", reason="Triton is not installed: pip install triton")

from fairseq_powernorm.kernels import fused_triton  # noqa: E402

#: dtype -> largest error of an output, relative to the largest value: half of the spacing of bfloat16 (float16) values
#: near it, doubled, as the interpreter rounds down
TOLERANCES = {torch.float32: 3e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}
SHAPES = [(1, 1, 1), (1, 1, 0), (7, 257, 1), (33, 1000, 4), (64, 12, 4), (50, 600, 0), (70, 96, 3), (0, 8, 1)]


def error(value, expected, least=1e-30):
    if not expected.numel():
        return 0.0
    return float((value.double() - expected).abs().max() / max(float(expected.abs().max()), least))


def masks(rows):
    some = torch.rand(rows, generator=torch.Generator().manual_seed(1)) < 0.7
    return {"none": None, "some": some, "all": torch.zeros(rows, dtype=torch.bool)}


@pytest.mark.parametrize("mask", ["none", "some", "all"])
@pytest.mark.parametrize("rows,channels,groups", SHAPES)
@pytest.mark.parametrize("dtype", fused_triton.DTYPES)
def test_against_the_reference(dtype, rows, channels, groups, mask):
    """Outputs, reciprocal roots, gradients and column sums of both kernels are the reference's in float64; NaN in padded
    rows reaches no sum."""
    torch.manual_seed(1)
    x, grad = torch.randn(rows, channels).to(dtype), torch.randn(rows, channels).to(dtype)
    scale, bias, through = torch.rand(channels) + 0.5, torch.randn(channels), torch.randn(channels)
    valid = masks(rows)[mask]
    if mask == "some" and rows > 1:
        x[valid.logical_not().nonzero()[0]] = float("nan")
        x[valid.logical_not().nonzero()[0], 0] = float("inf")
    y, r, squares, padding = fused_triton.normalize(x, groups, scale, bias, valid, sums=True, padding_sums=True)

    wide, wide_grad = x.double(), grad.double()
    expected_r = reference.layer_scale_rsqrt(wide, groups)
    u = reference.scale_rows(wide, expected_r)
    expected, everything = reference.second_moments(u, valid, all_rows=True)
    clean = slice(None) if valid is None or mask == "all" else valid
    assert error(y[clean], (u * scale + bias)[clean]) < TOLERANCES[dtype]
    assert error(squares, expected.total) < 3e-6 and squares.isfinite().all()
    assert r is None if not groups else error(r[clean], expected_r[clean]) < 3e-6
    if mask == "all":
        assert error(padding, everything.total) < 3e-6 and not squares.any()
    for skip in (False, True):
        if mask == "some" and not skip:
            x = torch.randn(rows, channels).to(dtype)
            _, r, _, _ = fused_triton.normalize(x, groups, scale)
            wide = x.double()
            expected_r = reference.layer_scale_rsqrt(wide, groups)
            u = reference.scale_rows(wide, expected_r)
        counted = valid if skip else None
        grad_x, grad_sum, grad_u_sum = fused_triton.backward(grad, x, r, scale, through, valid, skip_padding=skip)
        centre = u if valid is None or skip else reference.mask_rows_(u.clone(), valid)
        expected_x = reference.scale_rows_backward(wide_grad * scale + centre * through, u, expected_r)
        expected_x = reference.mask_rows_(expected_x, counted)
        expected_sums = reference.grad_sums(wide_grad, u, counted)
        assert error(grad_x, expected_x, least=float(grad.abs().max()) if rows else 1) < max(TOLERANCES[dtype], 1e-5)
        assert error(grad_sum, expected_sums[0]) < 3e-6
        assert error(grad_u_sum, expected_sums[1]) < 3e-6
        sums_alone = fused_triton.backward(grad, x, r, None, None, valid, skip_padding=skip)
        assert sums_alone[0] is None and torch.equal(sums_alone[1], grad_sum) and torch.equal(sums_alone[2], grad_u_sum)


def test_many_rows():
    """Sums over 300,000 rows keep float32's precision: 1e-6 of the sum in float64."""
    x = torch.randn(300_000, 2, generator=torch.Generator().manual_seed(1)) + 3
    _, _, squares, _ = fused_triton.normalize(x, 0, None, sums=True)
    assert error(squares, x.double().square().sum(0)) < 1e-6


COMPILE = """
import sys, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from fairseq_powernorm.kernels import fused_triton

sums = ("r_ptr", "scale_ptr", "bias_ptr", "through_ptr", "squares_ptr", "grad_sum_ptr", "grad_u_sum_ptr")
numbers = {"rows": "i32", "channels": "i32", "size": "i32", "eps": "fp32"}
flags = dict(
    padding_ptr=None, LAYER_SCALE=True, OUTPUT=True, SUMS=True, PADDING=False, SKIP=False, HAS_VALID=True, HAS_BIAS=True,
    TILE_ROWS=8, TILE_COLUMNS=512,
)
for capability in (80, 90):
    for dtype in ("fp32", "bf16", "fp16"):
        for kernel in (fused_triton._forward, fused_triton._backward):
            tensors = dict.fromkeys(sums, "*fp32")
            tensors.update(dict.fromkeys(("x_ptr", "y_ptr", "grad_ptr", "grad_x_ptr"), "*" + dtype), valid_ptr="*i1")
            names, types = kernel.arg_names, {**tensors, **numbers}
            aligned = {*tensors, "channels", "size"}
            source = ASTSource(
                kernel, signature={name: types.get(name, "constexpr") for name in names},
                constexprs={(i,): flags[name] for i, name in enumerate(names) if name in flags},
                attrs={(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name in aligned},
            )
            done = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 8})
            assert done.asm["cubin"] and ".local" not in done.asm["ptx"], (capability, dtype, kernel)
            assert "v4.b32" in done.asm["ptx"], (capability, dtype, kernel)
print("compiled")
"""


def test_compiles_for_gpus(tmp_path):
    """Both kernels compile to machine code for A100 and H100, with 16-byte loads and without spilled registers."""
    (tmp_path / "compile.py").write_text(COMPILE)
    done = toy.command(
        sys.executable, tmp_path / "compile.py", TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path), PYTHONPATH=path(),
    )
    assert done.stdout.endswith("compiled\n")


def path():
    return os.pathsep.join(filter(None, [str(toy.ROOT), os.environ.get("PYTHONPATH")]))
