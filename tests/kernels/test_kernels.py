"""The kernels: each held to the torch kernel, the choice among them, and their threads."""
import ctypes
import importlib.util
import os
import pathlib
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from fairseq_powernorm import kernels
from fairseq_powernorm.kernels import build, c, eager, triton
from fairseq_powernorm.kernels.__main__ import main as command
from fairseq_powernorm.kernels.interface import TOLERANCE, PowerNormSpec
from fairseq_powernorm.norms import PowerNorm, build_norm

needs_c = pytest.mark.skipif(c.unavailable() is not None, reason=f"the C kernel cannot be used: {c.unavailable()}")
#: kernel -> those that it is tested with on a CPU
DTYPES = {eager: list(TOLERANCE), c: [dtype for dtype in TOLERANCE if c.serves("cpu", dtype)]}


def assert_close(got, want, tolerance, name="", size=None):
    """max|difference| relative to max|expected| (or ``size``); NaN and inf stand at the same places."""
    assert got.shape == want.shape, name
    if want.numel():
        got, want = got.double(), want.double()
        finite = torch.isfinite(want)
        assert torch.equal(torch.isfinite(got), finite), name
        size = size or float(want[finite].abs().max() if finite.any() else 1.0) or 1.0
        worst = float((got - want)[finite].abs().max() if finite.any() else 0.0) / size
        assert worst <= tolerance, f"{name}: {worst}"


def inputs(shape, dtype, seed=0):
    """x, dy, and per channel: weight, bias, psi2, nu."""
    generator = torch.Generator().manual_seed(seed)
    x, dy = ((torch.randn(shape, generator=generator) * 2 + 0.3).to(dtype) for _ in range(2))
    return (x, dy, *(torch.rand(shape[-1], generator=generator) + 0.5 for _ in range(4)))


def padding(rows, seed=0):
    """valid: about two thirds of the rows."""
    return torch.rand(rows, generator=torch.Generator().manual_seed(seed)) < 0.67


def layouts(tensor):
    """The same values, contiguous and not."""
    yield tensor
    if tensor.dim() == 3:
        yield tensor.transpose(0, 1).contiguous().transpose(0, 1)  # B x T in memory
        yield tensor.transpose(0, 2).contiguous().transpose(0, 2)  # channels apart
    else:
        yield torch.stack([tensor, tensor], 1)[:, 0]  # every other row


def both_passes(kernel, x, dy, weight, bias, psi2, nu, valid, spec, batch=None):
    """Everything a forward and a backward pass give, by name."""
    forward = kernel.power_forward(x, weight, bias, valid, psi2, spec, batch)
    backward = kernel.power_backward(dy, x, forward.r, weight, valid, forward.saved, nu, spec)
    got = {f"forward {k}": v for k, v in forward._asdict().items()}
    got.update({f"backward {k}": v for k, v in backward._asdict().items()})
    return {name: value for name, value in got.items() if value is not None}


def compare(kernel, x, dy, weight, bias, psi2, nu, valid, spec, batch=None, exactly=True, roundings=1):
    """A kernel, over all layouts, against the torch kernel in float64 (or in the input's own precision).

    roundings: how many times the error of rounding to nearest that of the machine's rounding is
    """
    args = [x, dy, weight, bias, psi2, nu, valid, spec, batch]
    plain = both_passes(eager, *args)
    wide = [t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in args] if exactly else args
    want = both_passes(eager, *wide)
    # the gradient through the layer scale is a difference: its error is that of its terms
    inv_forward, inv_backward, _ = want["forward saved"]
    du = wide[1].abs() * inv_backward * (1 if weight is None else wide[2])
    terms = float((du + nu * spec.nu_scale * spec.gradient_scale * inv_forward * inv_backward * wide[0].abs()).max()
                  * (want["forward r"].max() if spec.groups else 1)) if exactly and x.numel() else None
    rows, sums = TOLERANCE[x.dtype]
    for x_layout, dy_layout in zip(layouts(x), layouts(dy)):
        got = both_passes(kernel, x_layout, dy_layout, *args[2:])
        assert set(got) == set(want)
        for name, value in got.items():
            assert value.dtype == plain[name].dtype, name
            is_row = name in ("forward y", "backward x")
            tolerance = rows * roundings if is_row else sums
            assert_close(value, want[name], tolerance, name, terms if name == "backward x" else None)


SHAPES = [(1, 1), (1, 257), (5, 1), (7, 64), (130, 257), (67, 1000), (6, 11, 32), (9, 4, 512), (0, 8)]


@needs_c
@pytest.mark.parametrize("instructions", range(3))
@pytest.mark.parametrize("dtype", DTYPES[c])
@pytest.mark.parametrize("shape", SHAPES)
def test_c_is_exact(shape, dtype, instructions):
    """Both passes over odd shapes, groups, masks and layouts equal float64's, with each instruction set of this
    processor.
    """
    names = [c.use_instructions(n) for n in range(3)]
    if instructions >= len(set(names)):
        pytest.skip(f"this processor has {sorted(set(names))}")
    c.use_instructions(instructions)
    try:
        channels = shape[-1]
        x, dy, weight, bias, psi2, nu = inputs(shape, dtype)
        rows = x.numel() // channels
        for groups in {g for g in (0, 1, 4, 8, channels) if g == 0 or channels % g == 0}:
            for reference_variant in (True, False):
                spec = PowerNormSpec(groups, 1e-5, 0.1, 4.0, False, reference_variant, not reference_variant)
                compare(c, x, dy, weight, bias, psi2, nu, padding(rows), spec)
                for valid in (None, torch.zeros(rows, dtype=torch.bool)) if groups < 2 else ():
                    compare(c, x, dy, weight, bias, psi2, nu, valid, spec)
    finally:
        c.use_instructions(-1)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES)
def test_torch_is_exact(shape, dtype):
    """The torch kernel in float32 and bfloat16 against itself in float64, to the same tolerances."""
    x, dy, weight, bias, psi2, nu = inputs(shape, dtype)
    for groups in {g for g in (0, 1, 4) if g == 0 or shape[-1] % g == 0}:
        for reference_variant in (True, False):
            spec = PowerNormSpec(groups, 1e-5, 0.1, 4.0, False, reference_variant, not reference_variant)
            compare(eager, x, dy, weight, bias, psi2, nu, padding(x.numel() // shape[-1]), spec)


@pytest.mark.parametrize(
    "kernel,dtype",
    [
        pytest.param(kernel, dtype, marks=[needs_c] if kernel is c else [])
        for kernel, dtypes in DTYPES.items()
        for dtype in dtypes
    ],
)
@pytest.mark.parametrize("groups", [0, 4])
def test_the_batch_divides(groups, dtype, kernel):
    """Warm-up, a batch of several processes, a channel that jumps, no weight and bias, and evaluation."""
    x, dy, weight, bias, psi2, nu = inputs((50, 3, 64), dtype)
    valid, batch = padding(150), torch.rand(64) + 0.5
    jumping = psi2.clone()
    jumping[5] = 1e-4
    for forward_batch in (True, False):
        for known in (None, batch):
            for mask in (None, valid):
                spec = PowerNormSpec(groups, 1e-5, 0.1, 1.0, forward_batch, True, False, 100.0)
                compare(kernel, x, dy, weight, bias, psi2, nu, mask, spec, known)
                compare(kernel, x, dy, None, None, jumping, nu, mask, spec, known)
                spec = spec._replace(backward_batch=False, skip_padding=True)
                compare(kernel, x, dy, None, None, jumping, nu, mask, spec, known)
    rows, sums = TOLERANCE[dtype]
    assert_close(kernel.second_moment(x, valid, groups), eager.second_moment(x.double(), valid, groups), sums)
    for some in ((weight, bias, psi2), (weight, None, None), (None, None, None)):
        for each in layouts(x):
            assert_close(kernel.evaluate(each, *some, groups, 1e-5), eager.evaluate(x.double(), *some, groups, 1e-5), rows)
    for moment in (psi2, None):  # by whatever backend there is
        want = eager.evaluate(x.double(), weight, bias, moment, groups, 1e-5, batch)
        assert_close(kernels.evaluate(x, weight, bias, moment, groups, 1e-5, batch), want, rows)


@needs_c
@pytest.mark.parametrize("dtype", DTYPES[c])
@pytest.mark.parametrize("groups", [0, 4])
def test_c_and_large_tensors(groups, dtype):
    """Large tensors are stored past the caches, with the same bits; the rows of larger ones are taken one by one, which adds
    up sums in another order.
    """
    x, dy, weight, bias, psi2, nu = inputs((150, 1, 128), dtype)
    for mask in (None, padding(150)):
        spec = PowerNormSpec(groups, 1e-5, 0.1, 1.0, False, True, False)
        found = []
        usual = c.far_from(0), c.stream_from(0)
        try:
            for far in (1 << 60, 0):
                c.far_from(far)
                compare(c, x, dy, weight, bias, psi2, nu, mask, spec, None)
                for size in (1 << 60, 0):
                    c.stream_from(size)
                    found.append(both_passes(c, x, dy, weight, bias, psi2, nu, mask, spec))
        finally:
            c.far_from(usual[0])
            c.stream_from(usual[1])
        for want, got in zip(found[::2], found[1::2]):
            assert all(torch.equal(got[name], want[name]) for name in want)
        assert any(not torch.equal(found[0][name], found[2][name]) for name in found[0])


LARGE_PAGES = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")


def flags_of(tensor):
    """The flags of the mapping in which a tensor lies, as Linux names them."""
    address, inside = tensor.data_ptr() + tensor.nbytes // 2, False
    for line in pathlib.Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match("([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(found[1], 16) <= address < int(found[2], 16)
        elif inside and line.startswith("VmFlags:"):
            return line.split()[1:]
    raise AssertionError("no such mapping")


@needs_c
@pytest.mark.skipif(not LARGE_PAGES.exists(), reason="the system has no large pages")
def test_large_outputs_ask_for_large_pages():
    """An output of 16 MiB, whose pages the system has yet to give, lies on large ones if there are any."""
    libc, page, there = ctypes.CDLL(None), os.sysconf("SC_PAGESIZE"), ctypes.c_ubyte(1)
    kept = []  # all free memory that has been used
    while there.value & 1:
        kept.append(torch.empty(8192, 512))
        middle = kept[-1].data_ptr() + kept[-1].nbytes // 2
        assert libc.mincore(ctypes.c_void_p(middle // page * page), ctypes.c_size_t(1), ctypes.byref(there)) == 0
    x = torch.ones(8192, 512)
    for norm in (PowerNorm(512, warmup_updates=0), build_norm("batch", 512)):
        kept.append(x.clone().requires_grad_())
        kept.append(norm(kept[-1]))
        kept[-1].backward(x)
        for tensor in (kept[-1], kept[-2].grad):
            assert "hg" in flags_of(tensor)


@needs_c
def test_sums_over_a_million_rows_lose_nothing():
    """float32, 10^6 rows: per-channel sums equal those of float64 to float32's own precision."""
    rows = 1_000_000
    x, dy, weight, bias, psi2, nu = inputs((rows, 4), torch.float32)
    spec = PowerNormSpec(0, 1e-5, 0.1, 1.0, False, True, False)
    got = both_passes(c, x, dy, weight, bias, psi2, nu, None, spec)
    z = x.double() / (psi2.double() + 1e-5).sqrt()
    for name, want in (
        ("forward tally", x.double().square().sum(0)), ("backward weight", (dy.double() * z).sum(0)),
        ("backward bias", dy.double().sum(0)),
    ):
        torch.testing.assert_close(got[name].double()[:4], want, rtol=3e-7, atol=0, msg=name)
    assert got["forward tally"][4] == rows


@needs_c
def test_bfloat16_rounds_as_torch_does():
    """Ties to even, overflow, subnormal numbers, inf and NaN, in every position: the bits of torch's own conversion."""
    values = torch.tensor([1.00390625, 1.01171875, 3.4e38, 1e-40, float("inf"), float("-inf"), float("nan"), 1.0])
    x = torch.ones(9, 64, dtype=torch.bfloat16)
    weight = values.repeat(9)[:64].contiguous()
    got = c.evaluate(x, weight, None, None, 0, 0.0)
    want = weight.to(torch.bfloat16).expand(9, 64)
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got.nan_to_num(), want.nan_to_num())
    odd_nan = torch.full((64,), 0x7FFFFFFF, dtype=torch.int32).view(torch.float32)
    assert c.evaluate(x, odd_nan, None, None, 0, 0.0).isnan().all()
    assert c.evaluate(x, None, odd_nan, None, 0, 0.0).isnan().all()


@needs_c
@pytest.mark.parametrize("dtype", DTYPES[c])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 3e38])
def test_bad_rows_stay_bad_and_alone(dtype, bad):
    """NaN, inf or an overflowing square in one row: C and torch agree where the results are finite; padding is never
    read.
    """
    x, dy, weight, bias, psi2, nu = inputs((33, 64), dtype)
    x[7, 3] = bad
    for skip_padding in (True, False):
        spec = PowerNormSpec(4, 1e-5, 0.1, 1.0, False, not skip_padding, skip_padding)
        compare(c, x, dy, weight, bias, psi2, nu, None, spec, exactly=False)
    dy[7] = bad
    valid = torch.ones(33, dtype=torch.bool)
    valid[7] = False
    spec = PowerNormSpec(4, 1e-5, 0.1, 1.0, False, False, True)
    got = both_passes(c, x, dy, weight, bias, psi2, nu, valid, spec)
    assert torch.isfinite(got["backward x"]).all() and not got["backward x"][7].any()
    assert all(
        torch.isfinite(got[name]).all() for name in ("forward tally", "backward tally", "backward weight", "backward bias")
    )


@needs_c
def test_wrong_tensors_are_refused():
    """A per-channel tensor or a mask of the wrong size or kind is a ValueError, not a read out of bounds."""
    x, dy, weight, bias, psi2, nu = inputs((4, 8), torch.float32)
    for wrong in (weight[:7], weight[:1], torch.cat([weight, weight])):
        with pytest.raises(ValueError, match=rf"shape \({wrong.numel()},\): expected 8 values"):
            kernels.evaluate(x, wrong)
    for groups in (3, 16, -1):
        with kernels.only("c"), pytest.raises(ValueError, match=f"groups={groups}: must be 0"):
            kernels.evaluate(x, weight, groups=groups)
    for mask in (torch.ones(3, dtype=torch.bool), torch.ones(4, dtype=torch.uint8)):
        with pytest.raises(ValueError, match="expected 4 bool"):
            kernels.choose(x, weight, valid=mask)


# ---------------------------------------------------------------- the modules on them


def trained(norm, x, dy, mask, steps=4):
    """Output, gradients and buffers after some steps of its own."""
    for step in range(steps):
        norm.zero_grad()
        leaf = x.clone().requires_grad_()
        y = norm(leaf * (1 + 0.1 * step), mask)
        y.backward(dy)
    return [y.detach(), leaf.grad, *(p.grad for p in norm.parameters()), *norm.buffers()]


MODULES = [
    dict(warmup_updates=2), dict(variant="algorithm2"), dict(groups=0, warmup_updates=1), dict(affine=False, groups=4),
]


def compare_modules(name, options, device="cpu"):
    """Training steps and evaluation of PowerNorm with gradients, by the kernel of that name and by torch: float32,
    masked.
    """
    x, dy = (each.to(device) for each in inputs((9, 4, 32), torch.float32)[:2])
    mask = torch.arange(9).unsqueeze(0) >= torch.tensor([9, 5, 1, 7]).unsqueeze(1)
    mask, results = mask.to(device), []
    for kernel in (name, "eager"):
        with kernels.only(kernel):
            assert kernels.choose(x) is kernels.KERNELS[kernel]
            norm = PowerNorm(32, **options).to(device)
            found = trained(norm, x, dy, mask)
            norm.eval()
            leaf = x.clone().requires_grad_()
            y = norm(leaf, mask)
            y.backward(dy)
            with torch.no_grad():
                assert_close(norm(leaf, mask), y.detach(), 1e-6)
            results.append([*found, y.detach(), leaf.grad])
    for got, want in zip(*results):
        assert_close(got, want, 3e-6)


@needs_c
@pytest.mark.parametrize("options", MODULES, ids=str)
def test_a_module_on_c_equals_one_on_torch(options):
    """The same outputs, gradients and running statistics."""
    compare_modules("c", options)


@needs_c
def test_a_bfloat16_module(monkeypatch):
    """Parameters in bfloat16: gradients in their dtype, equal to the torch kernel's to their precision."""
    x, dy, *_ = inputs((64, 32), torch.bfloat16)
    results = []
    for kernel in (c, eager):
        monkeypatch.setattr(kernels, "_chosen", {("cpu", torch.bfloat16): kernel})
        results.append(trained(PowerNorm(32, variant="algorithm2").bfloat16(), x, dy, None))
    for got, want in zip(*results):
        assert_close(got, want, 2e-2 if got.dtype == torch.bfloat16 else 1e-3)


@needs_c
def test_evaluation_can_be_differentiated_twice():
    """The gradient of a gradient through the C kernel is the torch kernel's."""
    norm = build_norm("power", 8).eval()
    results = []
    for dtype in (torch.float32, torch.float64):
        norm, x = norm.to(dtype), torch.linspace(-2, 3, 40).view(5, 8).to(dtype).requires_grad_()
        (first,) = torch.autograd.grad(norm(x).pow(3).sum(), x, create_graph=True)
        results.append(torch.autograd.grad(first.square().sum(), x)[0])
    assert_close(results[0].double(), results[1], 1e-5)


@needs_c
@pytest.mark.parametrize("dtype", DTYPES[c])
def test_what_is_saved_for_the_backward_pass(dtype):
    """x itself, one float per row and group, and O(C) beside them: at most 1.01 of x; nothing else as large is allocated."""
    rows, channels = 4096, 512
    norm = PowerNorm(channels, warmup_updates=0)
    x = torch.randn(rows, channels).to(dtype).requires_grad_()
    saved = {}

    def pack(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = norm(x)
    size = x.numel() * x.element_size()
    assert x.untyped_storage().data_ptr() in saved and sum(saved.values()) <= 1.01 * size
    with torch.profiler.profile(profile_memory=True) as profile:
        y.backward(torch.ones_like(y))
        norm.eval()(x.detach())
    allocated = [e.cpu_memory_usage for e in profile.events() if e.name == "aten::empty"]
    assert sum(a >= size for a in allocated) == 2  # the gradient of x, and y


# ---------------------------------------------------------------- threads


THREADS = """
import importlib.util, os, torch
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name == "fairseq" else find(name, *a)  # it has an OpenMP
from fairseq_powernorm.kernels import c, eager
from fairseq_powernorm.norms import PowerNorm
count = lambda: len(os.listdir("/proc/self/task"))
torch.set_num_threads(3)
x = torch.randn(4096, 256)
torch.nn.functional.layer_norm(x, (256,))
before = count()
assert before >= 3, before
results = []
for threads in (3, 3, 1):
    torch.set_num_threads(threads)
    norm = PowerNorm(256, groups=4, warmup_updates=0)
    leaf = x.clone().requires_grad_()
    norm(leaf).pow(3).sum().backward()
    results.append([leaf.grad, norm.weight.grad, norm.running_phi, norm.ema_gz])
    assert count() <= before, (threads, before, count())  # some versions of torch end threads that they no longer need
runtimes = {line.split()[-1] for line in open("/proc/self/maps") if any(n in line for n in ("libgomp", "libiomp", "libomp"))}
assert len(runtimes) == 1, runtimes
assert all(torch.equal(a, b) for a, b in zip(results[0], results[1]))
for a, b in zip(results[0], results[2]):
    torch.testing.assert_close(a, b, rtol=1e-6, atol=0)
print(c.describe())
"""


@pytest.mark.slow
@needs_c
@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="counts threads in /proc")
def test_the_threads_are_torchs(root):
    """Three threads: the kernel starts none of its own and loads no second OpenMP; the same bits from run to run."""
    environment = {k: v for k, v in os.environ.items() if k not in ("OMP_NUM_THREADS", kernels.VARIABLE)}
    done = subprocess.run([sys.executable, "-c", THREADS], cwd=root, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "threads of torch" in done.stdout


# ---------------------------------------------------------------- choice


def test_the_command_says_which_kernel_is_in_use_and_why(monkeypatch, capsys):
    """One line per device and dtype; float16 and float64 go to torch on a CPU."""
    monkeypatch.delenv(kernels.VARIABLE, raising=False)
    assert command([]) == 0
    lines = {tuple(line.split()[:2]): line for line in capsys.readouterr().out.splitlines()}
    assert (
        "eager (plain torch) (triton: not made for cpu and float64; c: not made for cpu and float64)"
        in lines["cpu", "float64"]
    )
    for dtype in ("float32", "bfloat16"):
        reason, why = c.unavailable(), f"triton: not made for cpu and {dtype}"
        assert lines["cpu", dtype].endswith(
            f"{c.describe()} ({why})" if reason is None else f"eager (plain torch) ({why}; c: {reason})"
        )


def test_an_unknown_name_is_refused_by_the_command(monkeypatch, capsys):
    """By one line that names the valid ones."""
    monkeypatch.setenv(kernels.VARIABLE, "fast")
    assert command([]) == 2
    assert capsys.readouterr().err == "error: POWERNORM_KERNEL='fast': must be one of triton, c, eager\n"


@pytest.mark.parametrize("asked", ["eager", "torch"])
def test_torch_can_be_asked_for(asked, monkeypatch, capsys):
    """POWERNORM_KERNEL=eager, or torch, its earlier name: said by the command, and so."""
    monkeypatch.setenv(kernels.VARIABLE, asked)
    monkeypatch.setattr(kernels, "_chosen", {})
    assert command([]) == 0
    assert (
        "eager (plain torch) (triton: POWERNORM_KERNEL=eager; c: POWERNORM_KERNEL=eager)"
        in capsys.readouterr().out.splitlines()[0]
    )
    assert kernels.choose(torch.randn(3, 8)) is eager


def test_a_wrong_request_is_refused_by_the_first_pass(monkeypatch):
    """Naming the variable, the value and what is valid or missing; building a norm asks no environment."""
    monkeypatch.setattr(kernels, "_chosen", {})
    monkeypatch.setenv(kernels.VARIABLE, "fast")
    with pytest.raises(ValueError, match="POWERNORM_KERNEL='fast': must be one of triton, c, eager"):
        PowerNorm(8)(torch.ones(3, 8))
    monkeypatch.setenv(kernels.VARIABLE, "c")
    monkeypatch.setattr(c, "_library", None)
    monkeypatch.setattr(c, "_unavailable", None)
    monkeypatch.setattr(c, "_LIBRARY", pathlib.Path("nowhere"))
    with pytest.raises(RuntimeError, match="POWERNORM_KERNEL='c': this kernel cannot be used: it is not built"):
        PowerNorm(8)(torch.ones(3, 8))


def test_triton_is_for_gpus(monkeypatch):
    """Where Triton works it serves tensors on a GPU in three precisions; elsewhere, and on a CPU, it is not chosen
    unasked.
    """
    monkeypatch.delenv(kernels.VARIABLE, raising=False)
    for interpret, reason in (("0", None), ("1", None), ("0", "no reason")):
        monkeypatch.setenv("TRITON_INTERPRET", interpret)
        monkeypatch.setattr(triton, "unavailable", lambda: reason)
        found = {(device, dtype): kernels.explain(device, dtype)[0] for device in ("cpu", "cuda") for dtype in
                 (*TOLERANCE, torch.float64)}
        assert "triton" not in {name for (device, _), name in found.items() if device == "cpu"}
        expected = "triton" if interpret == "0" and reason is None else "eager"
        assert {found["cuda", dtype] for dtype in TOLERANCE} == {expected} and found["cuda", torch.float64] == "eager"
    assert kernels.explain("cuda", torch.float16)[1][0] == "triton: no reason"


@pytest.mark.slow
def test_without_a_gpu_triton_is_not_imported(root):
    """The package and its norms leave the module that imports Triton alone; a request for it is one line that says
    why it cannot be.
    """
    program = "import os, runpy, sys, fairseq_powernorm.norms as n, torch; n.PowerNorm(8)(torch.ones(3, 8))"
    program += "; print('fairseq_powernorm.kernels.triton_device' in sys.modules)"
    program += f"; os.environ['{kernels.VARIABLE}'] = 'triton'"
    program += "; runpy.run_module('fairseq_powernorm.kernels', run_name='__main__', alter_sys=True)"
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", kernels.VARIABLE)}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stdout) == (2, "False\n")
    assert done.stderr.splitlines()[-1] == (
        "error: POWERNORM_KERNEL='triton': this kernel cannot be used: there is no CUDA device")


def test_why_triton_cannot_be_used(monkeypatch):
    """Not installed, too old a GPU, or whatever goes wrong when a first kernel is run: said in one line."""
    monkeypatch.setattr(triton, "_code", None)

    def reason():
        monkeypatch.setattr(triton, "_unavailable", None)
        return triton.unavailable()

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert reason() == "the GPU's compute capability is 7.5, not 8.0 or later"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "fairseq_powernorm.kernels.triton_device", raising=False)
    monkeypatch.delattr(kernels, "triton_device", raising=False)
    assert reason().startswith("Triton cannot be imported: ")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setitem(sys.modules, "fairseq_powernorm.kernels.triton_device", SimpleNamespace())
    assert reason().startswith("Triton does not work here: AttributeError: ")


def test_without_the_library_torch_serves(monkeypatch, tmp_path, caplog):
    """Not built, built from other sources, or damaged: the torch kernel, with the reason in one log line."""
    library = tmp_path / build.NAME
    for content, reason in ((None, "not built"), (b"x", "other sources"), (build.source_hash().encode(), "does not load")):
        if content is not None:
            library.write_bytes(content)
        monkeypatch.setattr(c, "_library", None)
        monkeypatch.setattr(c, "_unavailable", None)
        monkeypatch.setattr(c, "_LIBRARY", library)
        monkeypatch.setattr(kernels, "_chosen", {})
        monkeypatch.setattr(kernels, "_logged", set())
        monkeypatch.delenv(kernels.VARIABLE, raising=False)
        caplog.clear()
        with caplog.at_level("INFO", logger=kernels.__name__):
            for _ in range(2):
                PowerNorm(8)(torch.randn(3, 8))
        (record,) = caplog.records
        assert record.levelname == "WARNING"
        assert "kernel eager (plain torch)" in record.getMessage() and reason in record.getMessage()


def test_a_build_without_a_compiler_says_so(monkeypatch, tmp_path, capsys):
    """No compiler, a wrong CC, one that fails: one line, the installed library stays."""
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.raises(build.BuildError, match="CC='no-such-compiler' is not a command"):
        build.build(tmp_path)
    monkeypatch.setenv("CC", "false")
    with pytest.raises(build.BuildError, match="false failed with exit status 1"):
        build.build(tmp_path)
    assert not list(tmp_path.iterdir())
    monkeypatch.delenv("CC")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(build.BuildError, match="no C compiler"):
        build.build(tmp_path)
    assert command(["--build"]) == 2
    assert capsys.readouterr().err.startswith("error: no C compiler")


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("setuptools") is None, reason="setuptools is not installed")
def test_installing_without_a_compiler(root, tmp_path):
    """setup.py's build, as pip runs it, without a compiler: a line, and no failure. tests/test_packaging.py has one."""
    shutil.copytree(
        root / "fairseq_powernorm", tmp_path / "fairseq_powernorm", ignore=shutil.ignore_patterns("*.so", "__pycache__")
    )
    for name in ("setup.py", "README.md"):
        shutil.copy(root / name, tmp_path)
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build", "--build-lib", "built"], cwd=tmp_path, capture_output=True, text=True,
        env={**os.environ, "CC": "no-such-compiler"},
    )
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "built" / "fairseq_powernorm" / "kernels"
    assert (folder / "csrc" / "powernorm.c").exists() and not (folder / build.NAME).exists()
    assert "the C kernel is not built, the torch kernel will serve: CC='no-such-compiler' is not a command" in done.stdout


def test_tensors_that_are_not_plain_memory_go_to_torch():
    """vmap, subclasses, other dtypes: the torch kernel."""
    x = torch.randn(3, 8)
    seen = []
    torch.vmap(lambda row: (seen.append(kernels.choose(row)), row)[1])(x)
    assert seen == [eager]
    assert kernels.choose(x.double()) is eager and kernels.choose(x.half()) is eager

    class Sub(torch.Tensor):
        pass

    assert kernels.choose(x.as_subclass(Sub)) is eager and kernels.choose(x, x[0].as_subclass(Sub)) is eager
    norm = PowerNorm(8).eval()
    torch.testing.assert_close(torch.vmap(norm)(x.view(3, 1, 8)).view(3, 8), norm(x))
