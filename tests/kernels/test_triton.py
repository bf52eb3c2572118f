"""The Triton kernel: against eager, by Triton's interpreter where there is no GPU, and compiled for GPUs."""
import contextlib
import itertools
import sys

import pytest
import torch
import toy
from test_kernels import (
    MODULES,
    assert_close,
    both_passes,
    compare,
    compare_modules,
    inputs,
    layouts,
    padding,
    trained,
)
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fairseq_powernorm import kernels, operators
from fairseq_powernorm.kernels import eager, interface, triton as kernel
from fairseq_powernorm.kernels.__main__ import main as command
from fairseq_powernorm.kernels.interface import TOLERANCE, PowerNormSpec
from fairseq_powernorm.norms import PowerNorm
from fairseq_powernorm.statistics import RunningStatistics

if kernel.unavailable():
    pytest.skip(kernel.unavailable(), allow_module_level=True)

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
#: the interpreter rounds bfloat16 towards zero
ROUNDINGS = {dtype: 2 if dtype is torch.bfloat16 and not ON_GPU else 1 for dtype in TOLERANCE}
needs_gpu = pytest.mark.skipif(not ON_GPU, reason="there is no CUDA device")

SHAPES = [(1, 1), (1, 257), (5, 1), (7, 257), (5, 520), (70, 96), (6, 11, 32), (0, 8)]
ALGORITHM2 = PowerNormSpec(1, 1e-5, 0.1, 4.0, forward_batch=False, backward_batch=False, skip_padding=True)
REFERENCE = ALGORITHM2._replace(backward_batch=True, skip_padding=False)
WARMUP = REFERENCE._replace(forward_batch=True)
#: a channel in two jumps, whether or not the gradient is divided by the batch's second moment
JUMP, JUMP2 = REFERENCE._replace(jump=3.5), ALGORITHM2._replace(jump=3.5)
#: the interpreter takes every 23rd case, and so each dtype, shape, spec and mask; a GPU takes all
SPECS, MASKS = (REFERENCE, ALGORITHM2, WARMUP, JUMP, JUMP2), ("none", "some", "all")
CASES = list(itertools.product(TOLERANCE, SHAPES, SPECS, MASKS))
CASES = CASES if ON_GPU else CASES[::23]


def given(shape, dtype):
    """See :func:`test_kernels.inputs`; on the device."""
    return [each.to(DEVICE) for each in inputs(shape, dtype)]


def masked(mask, rows):
    """valid: no mask, about two thirds of the rows, or none of them."""
    valid = {"none": None, "some": padding(rows), "all": torch.zeros(rows, dtype=torch.bool)}[mask]
    return None if valid is None else valid.to(DEVICE)


@pytest.mark.slow
@pytest.mark.parametrize("dtype,shape,spec,mask", CASES, ids=str)
def test_triton_is_exact(dtype, shape, spec, mask):
    """Both passes over odd shapes, groups, masks and layouts equal float64's, to the tolerances of the other kernels."""
    x, dy, weight, bias, psi2, nu = given(shape, dtype)
    valid = masked(mask, x.numel() // shape[-1])
    for groups in (0, 1 if shape[-1] % 4 else 4):
        compare(kernel, x, dy, weight, bias, psi2, nu, valid, spec._replace(groups=groups), roundings=ROUNDINGS[dtype])


@pytest.mark.parametrize("spec", [WARMUP, JUMP, JUMP2], ids=str)
def test_the_batch_of_several_processes_divides(spec):
    """A second moment given from outside; no weight and bias; a scale of the loss that lies on the device."""
    x, dy, _, _, psi2, nu = given((33, 64), torch.float32)
    batch = psi2.flip(0) * 4
    compare(kernel, x, dy, None, None, psi2, nu, masked("some", 33), spec._replace(groups=4), batch)
    scaled = spec._replace(gradient_scale=torch.tensor(4.0, device=DEVICE))
    got, want = (both_passes(kernel, x, dy, None, None, psi2, nu, None, each, batch) for each in (scaled, spec))
    assert all(torch.equal(got[name], want[name]) for name in want)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape,groups", [((7, 257), 0), ((5, 520), 4), ((6, 11, 32), 1), ((0, 8), 1)])
def test_evaluation(shape, groups, dtype):
    """Evaluation with and without weight, bias and psi^2, in any layout, is that of eager in float64."""
    x, _, weight, bias, psi2, _ = given(shape, dtype)
    for some in ((weight, bias, psi2), (weight, None, None), (None, bias, psi2), (None, None, None)):
        want = eager.evaluate(x.double(), *some, groups, 1e-5)
        for each in layouts(x):
            got = kernel.evaluate(each, *some, groups, 1e-5)
            assert got.dtype == dtype
            assert_close(got, want, TOLERANCE[dtype][0] * ROUNDINGS[dtype])


@pytest.mark.parametrize("spec", [REFERENCE, ALGORITHM2, WARMUP, JUMP], ids=str)
def test_the_same_bits_again(spec):
    """A second run of both passes gives the same bits, and the sums alone are those of a forward pass."""
    x, dy, weight, bias, psi2, nu = given((70, 96), torch.float32)
    valid, spec = masked("some", 70), spec._replace(groups=4)
    first, again = (both_passes(kernel, x, dy, weight, bias, psi2, nu, valid, spec) for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert torch.equal(kernel.second_moment(x, valid, 4), first["forward tally"])


@pytest.mark.parametrize("groups", [0, 2])
def test_what_stands_in_padding(groups):
    """NaN and infinity in padded rows of x and dy reach no sum and no gradient of another row; with skip_padding, none."""
    x, dy, weight, bias, psi2, nu = given((40, 24), torch.float32)
    valid, spec = masked("some", 40), ALGORITHM2._replace(groups=groups)
    clean = both_passes(kernel, x, dy, weight, bias, psi2, nu, valid, spec)
    for bad in (x, dy):
        bad[~valid] = float("nan")
        bad[~valid, 0] = float("inf")
    found = both_passes(kernel, x, dy, weight, bias, psi2, nu, valid, spec)
    for name in clean:
        if name in ("forward y", "forward r"):
            assert torch.equal(found[name][valid], clean[name][valid]), name
        else:
            assert torch.equal(found[name], clean[name]), name


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("groups", [0, 2])
def test_padding_that_counts_and_is_not_finite(groups, bad):
    """What is not finite there is left out by its channel group (without layer scale: its channel), as eager does."""
    for place in range(2):
        given_ = given((40, 24), torch.float32)
        valid, spec = masked("some", 40), REFERENCE._replace(groups=groups)
        given_[place][~valid.repeat_interleave(24).view(40, 24) & (torch.arange(24, device=DEVICE) < 5)] = bad
        x, dy, *others = given_
        got, want = (both_passes(each, x, dy, *others, valid, spec) for each in (kernel, eager))
        for name in ("backward x", "backward weight", "backward bias"):
            assert torch.isfinite(got[name]).all()
            assert_close(got[name], want[name].double(), 1e-5, name)
        assert_close(got["backward tally"][:24], want["backward tally"][:24], 1e-5)
        assert float(got["backward tally"][-2]) == float(want["backward tally"][-2]) == 40


def test_odd_tensors():
    """Per-channel tensors with gaps are read as they are; of a wrong size or kind they are refused, and so are masks."""
    x, dy, weight, bias, psi2, nu = given((6, 16), torch.float32)
    want = both_passes(kernel, x, dy, weight, bias, psi2, nu, None, REFERENCE)
    apart = [torch.stack([each, -each], 1)[:, 0] for each in (weight, bias, psi2, nu)]
    got = both_passes(kernel, x, dy, *apart, None, REFERENCE)
    assert all(torch.equal(got[name], want[name]) for name in want)
    with kernels.only("triton"):
        with pytest.raises(ValueError, match=r"shape \(15,\): expected 16 values"):
            kernels.choose(x, weight[:15])
        for valid in (torch.ones(5, dtype=torch.bool, device=DEVICE), torch.ones(6, device=DEVICE)):
            with pytest.raises(ValueError, match="expected 6 bool"):
                kernels.choose(x, weight, valid=valid)


def test_many_rows():
    """Sums over 300,000 rows keep float32's precision: 1e-6 of the sum in float64."""
    x = (torch.randn(300_000, 2, generator=torch.Generator().manual_seed(1)) + 3).to(DEVICE)
    tally = kernel.second_moment(x, None, 0)
    assert_close(tally[:-2], x.double().square().sum(0), 1e-6)
    assert tally[-2] == 300_000


# ---------------------------------------------------------------- the modules on it


@pytest.mark.parametrize("options", MODULES, ids=str)
def test_a_module_on_triton_equals_one_on_torch(options):
    """The same outputs, gradients and running statistics, whose steps this kernel takes itself."""
    compare_modules("triton", options, DEVICE)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options, channels", [(dict(warmup_updates=3), 1030), (dict(groups=0, variant="algorithm2"), 40)], ids=str
)
def test_steps(options, channels):
    """A batch of padding alone counts as a step and changes psi^2 no more than one that is not finite; a jump is bounded."""
    x, dy = (each.to(DEVICE) for each in inputs((4, channels), torch.float32)[:2])
    results = []
    for name in ("triton", "eager"):
        norm, seen = PowerNorm(channels, **options).to(DEVICE), []
        with kernels.only(name):
            for scale in (1.0, None, 2.0, float("nan"), 1e3):
                mask = torch.ones(4, dtype=torch.bool, device=DEVICE) if scale is None else None
                norm((x * (scale or 1.0)).requires_grad_(), mask).backward(dy)
                seen.append([buffer.clone() for buffer in norm.buffers()])
        results.append(seen)
    for got, want in zip(*results):
        for one, other in zip(got, want):
            assert_close(one, other, 3e-6)
    ours = results[0]
    assert float(ours[-1][0]) == 5 and torch.isfinite(torch.cat([b.flatten() for b in ours[-1]])).all()
    for before, after in ((0, 1), (2, 3)):
        assert torch.equal(ours[after][1], ours[before][1])  # psi^2


def test_a_bfloat16_module():
    """Parameters in bfloat16: gradients in their dtype, equal to the torch kernel's to their precision."""
    x, dy, *_ = given((64, 32), torch.bfloat16)
    results = []
    for name in ("triton", "eager"):
        with kernels.only(name):
            results.append(trained(PowerNorm(32, variant="algorithm2").bfloat16().to(DEVICE), x, dy, None))
    for got, want in zip(*results):
        assert_close(got, want, 2e-2 if got.dtype == torch.bfloat16 else 1e-3)


def test_autocast():
    """Under autocast the norm computes as without it: in the precision of what arrives, statistics in float32."""
    x, dy, *_ = given((9, 4, 32), torch.float32)
    mask = masked("some", 36).view(4, 9)
    with kernels.only("triton"):
        plain = trained(PowerNorm(32, warmup_updates=2).to(DEVICE), x, dy, mask)
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            assert kernels.choose(nn.Linear(32, 8).to(DEVICE)(x)) is kernel
            cast = trained(PowerNorm(32, warmup_updates=2).to(DEVICE), x, dy, mask)
            y = PowerNorm(8).to(DEVICE)(nn.Linear(32, 8).to(DEVICE)(x), mask)
    assert all(torch.equal(one, other) for one, other in zip(cast, plain)) and y.dtype == torch.bfloat16


def test_gradients_of_an_evaluation():
    """First and second derivative of a norm in evaluation: the torch kernel's."""
    found = []
    for name in ("triton", "eager"):
        with kernels.only(name):
            norm, x = PowerNorm(8).to(DEVICE).eval(), torch.linspace(-2, 3, 40, device=DEVICE).view(5, 8).requires_grad_()
            (first,) = torch.autograd.grad(norm(x).pow(3).sum(), x, create_graph=True)
            found.append([first.detach(), torch.autograd.grad(first.square().sum(), x)[0]])
    for one, other in zip(*found):
        assert_close(one, other, 1e-5)


# ---------------------------------------------------------------- what a pass asks of the host and of the device


class Seen(TorchDispatchMode):
    """Names of what runs on the device, in order: Triton's kernels, and torch's operators but for views and allocations."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.names, self.inside = [], False
        monkeypatch.setattr(interface, "_dispatch_modes", lambda: 0)  # the gate sends what is under a mode to eager
        monkeypatch.setattr(operators, "outside_of_modes", contextlib.nullcontext)
        for name in ("forward", "forward_end", "advance_forward", "backward", "backward_end", "advance_backward"):
            monkeypatch.setattr(kernel._code, name, self.watched(name, getattr(kernel._code, name)))

    def watched(self, name, function):
        class Watched:
            def __getitem__(_, grid):
                def launch(*args, **kwargs):
                    self.names.append(name)
                    self.inside = True  # what the interpreter does is its own
                    try:
                        return function[grid](*args, **kwargs)
                    finally:
                        self.inside = False

                return launch

        return Watched()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        name = operator.overloadpacket.__name__
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in operator._schema.returns)
        reads = name == "_local_scalar_dense" and DEVICE == "cpu"  # the step count, which costs nothing there
        if not (self.inside or is_view or reads) and not name.startswith(("empty", "new_empty", "_unsafe_view", "detach")):
            self.names.append(name)
        return operator(*args, **(kwargs or {}))

    def take(self):
        names, self.names = self.names, []
        return names


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_what_a_pass_launches(dtype, monkeypatch):
    """Two kernels a pass, one more for the norm's own step, the mask: nothing else, and nothing that the host waits for."""
    norm = PowerNorm(32, groups=4, warmup_updates=1).to(DEVICE, dtype)
    x, dy, *_ = given((9, 4, 32), dtype)
    mask = torch.arange(9).unsqueeze(0) >= torch.tensor([9, 5, 1, 7]).unsqueeze(1)
    mask, leaf = mask.to(DEVICE), x.requires_grad_()
    casts = [] if dtype == torch.float32 else ["_to_copy", "_to_copy"]  # gradients of weight and bias
    with kernels.only("triton"):
        norm(leaf, mask).backward(dy)  # the warm-up; reads the number of steps
        with Seen(monkeypatch) as seen:
            y = norm(leaf, mask)
            assert seen.take() == ["logical_not", "clone", "forward", "forward_end", "advance_forward"]
            torch.autograd.grad(y, [leaf, *norm.parameters()], dy)
            assert seen.take() == ["backward", "backward_end", "advance_backward", *casts]
            norm(leaf)
            assert seen.take() == ["forward", "forward_end", "advance_forward"]
            with torch.no_grad():
                norm.eval()(leaf)
            assert seen.take() == ["forward"]
        running = RunningStatistics(nn.Sequential(norm.train()))
        with running.batch(), Seen(monkeypatch) as seen:
            y = norm(leaf)
            assert seen.take() == ["forward", "forward_end", "add_"]
            torch.autograd.grad(y, [leaf, *norm.parameters()], dy)
            assert seen.take() == ["backward", "backward_end", "add_", *casts]


@needs_gpu
def test_the_host_does_not_wait():
    """Torch's own check finds no synchronization in training steps with a mask."""
    norm, x = PowerNorm(32, warmup_updates=2).to(DEVICE), torch.randn(9, 4, 32, device=DEVICE)
    mask = (torch.arange(9).unsqueeze(0) >= torch.tensor([9, 5, 1, 7]).unsqueeze(1)).to(DEVICE)
    assert kernels.choose(x) is kernel
    norm(x.clone().requires_grad_(), mask).backward(x)  # reads the number of steps
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            norm(x.clone().requires_grad_(), mask).backward(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")


# ---------------------------------------------------------------- choice, compilation


@pytest.mark.skipif(ON_GPU, reason="there is a CUDA device: Triton serves it")
def test_the_interpreter_serves_only_if_asked(monkeypatch, capsys):
    """TRITON_INTERPRET=1 alone changes no choice; with POWERNORM_KERNEL=triton the command shows it."""
    monkeypatch.delenv(kernels.VARIABLE, raising=False)
    x = torch.randn(3, 8)
    with kernels.only("eager"):
        assert kernels.choose(x) is eager
    assert kernels.explain("cpu", torch.float32)[0] != "triton"
    with kernels.only("triton"):
        assert kernels.choose(x) is kernel and kernels.choose(x.double()) is eager
    for asked in (False, True):
        if asked:
            monkeypatch.setenv(kernels.VARIABLE, "triton")
        assert command([]) == 0
        lines = [line.split() for line in capsys.readouterr().out.splitlines()]
        uses = {dtype: rest[0] == "Triton" for _, dtype, *rest in lines}
        assert uses == {"float32": asked, "bfloat16": asked, "float16": asked, "float64": False}


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from importlib.util import module_from_spec, spec_from_file_location

spec = spec_from_file_location("triton_device", "fairseq_powernorm/kernels/triton_device.py")
triton_device = module_from_spec(spec)  # alone: without the package, which imports fairseq
spec.loader.exec_module(triton_device)
FLOATS = ("r", "psi2", "batch", "inv", "weight", "bias", "nu", "sums", "saved", "grad_weight", "grad_bias", "iters")
TENSORS = {**{name + "_ptr": "*fp32" for name in FLOATS}, "valid_ptr": "*i1", "tally_ptr": "*fp64"}
TYPES = {**TENSORS, **dict.fromkeys(("rows", "channels", "size", "parts"), "i32")}  # all else: a number
TRUE = ("LAYER_SCALE", "OUTPUT", "SAVE", "SUMS", "HAS_PSI2", "BACKWARD_BATCH", "HAS_VALID", "HAS_WEIGHT", "HAS_BIAS")
FALSE = ("PADDING", "HAS_INV", "FORWARD_BATCH", "JUMP", "HAS_BATCH", "SCALE_THERE")
FLAGS = {**dict.fromkeys(TRUE, True), **dict.fromkeys(FALSE, False), "inv_ptr": None, "batch_ptr": None}
FLAGS.update(TILE_ROWS=4, TILE_COLUMNS=512, STAGES=2, PARTS=triton_device.END_PARTS)
SWEEPS = ("forward", "backward")
OTHERS = [  # with what differs from FLAGS
    ("forward_end", {}), ("forward_end", dict(FORWARD_BATCH=True, JUMP=True, HAS_BATCH=True, PADDING=True)),
    ("advance_forward", {}), ("backward_end", {}), ("backward_end", dict(SCALE_THERE=True, HAS_VALID=False)),
    ("advance_backward", {}), ("forward", dict(HAS_INV=True, SUMS=False, SAVE=False, sums_ptr=None, r_ptr=None)),
    ("forward", dict(HAS_INV=True, HAS_PSI2=False, psi2_ptr=None, SUMS=False, LAYER_SCALE=False)),
    ("forward", dict(PADDING=True, OUTPUT=False, HAS_PSI2=False, psi2_ptr=None, y_ptr=None)),
    ("backward", dict(SCALE_THERE=True, LAYER_SCALE=False, r_ptr=None)),
    ("backward", dict(PADDING=True)), ("backward", dict(PADDING=True, LAYER_SCALE=False, r_ptr=None)),
    ("backward", dict(TILE_ROWS=1, TILE_COLUMNS=4096)), ("backward", dict(TILE_ROWS=1, TILE_COLUMNS=16384, STAGES=1)),
]


def compiled(capability, dtype, name, changes={}):
    kernel = getattr(triton_device, name)
    size = triton_device.STEP_CHANNELS if name.startswith("advance") else triton_device.END_CHANNELS
    flags, names = {**FLAGS, "CHANNELS": size, **changes}, kernel.arg_names
    flags = {each: value for each, value in flags.items() if each in names}
    for each, needed in (("inv_ptr", "HAS_INV"), ("batch_ptr", "HAS_BATCH")):
        if flags.get(needed):
            del flags[each]
    scale = {"gradient_scale": "*fp32"} if flags.get("SCALE_THERE") else {}
    types = {**TYPES, **scale, **{each + "_ptr": "*" + dtype for each in ("x", "y", "grad", "grad_x")}}
    aligned = {*(each for each in types if each.endswith("_ptr")), "channels", "size"} - flags.keys()
    source = ASTSource(
        kernel, signature={each: "constexpr" if each in flags else types.get(each, "fp32") for each in names},
        constexprs={(i,): flags[each] for i, each in enumerate(names) if each in flags},
        attrs={(i,): [["tt.divisibility", 16]] for i, each in enumerate(names) if each in aligned},
    )
    options = {"num_warps": 8 if name in SWEEPS else 4}
    done = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert done.metadata.shared <= 48 * 1024, (name, changes)
    return done.asm


for capability, dtype in ((80, "fp16"), (90, "fp32"), (90, "bf16")):
    for name in SWEEPS:
        code = compiled(capability, dtype, name)
        # the next tile is copied ahead, 16 bytes at a time, and results are stored so
        assert "cp.async.cg.shared.global" in code["ptx"] and "st.global.v4.b32" in code["ptx"], (capability, dtype, name)
        assert code["cubin"] and ".local" not in code["ptx"], (capability, dtype, name)
for name, changes in OTHERS:
    assert compiled(90, "fp32", name, changes)["cubin"], (name, changes)
print("compiled")
"""


@pytest.mark.slow
def test_compiles_for_gpus(tmp_path):
    """All of it compiles to machine code for A100 and H100, sweeps with 16-byte accesses and no array in local memory."""
    (tmp_path / "compile.py").write_text(COMPILE)
    environment = dict(TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path))
    done = toy.command(sys.executable, tmp_path / "compile.py", cold=True, **environment)
    assert done.stdout.endswith("compiled\n")
