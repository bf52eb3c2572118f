"""The autograd function in C++: held to that in Python bit for bit, what it leaves to Python, and how it is built."""
import contextlib
import gc
import os
import shutil
import subprocess
import sys
import threading
import weakref

import pytest
import torch
import toy
from torch import nn

from fairseq_powernorm import kernels
from fairseq_powernorm.fold import FoldedNorm
from fairseq_powernorm.kernels import build, c, native
from fairseq_powernorm.norms import PowerNorm
from fairseq_powernorm.statistics import RunningStatistics

pytestmark = pytest.mark.skipif(
    kernels.autograd_for(torch.zeros(1)) is None, reason=f"the autograd function in C++ is not in use: {native.describe()}"
)

IN_CPP, IN_PYTHON = "PowerNormBackward", "_PowerNormBackward"


def inputs(shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(shape, generator=generator) * 2 + 0.3).to(dtype) for _ in range(2)]


def steps(norm, x, dy, mask=None, *, staged=False, scale=1.0, layout=lambda x: x, batches=4):
    """Outputs, gradients and statistics of some training steps; what every backward pass was done by."""
    statistics, found, names = RunningStatistics(norm) if staged else None, [], set()
    for number in range(batches):
        leaf = (x * (1 + 0.1 * number)).requires_grad_()
        context = statistics.batch(gradient_scale=scale, counts=number != 2) if staged else contextlib.nullcontext()
        with context:
            y = norm(layout(leaf), mask)
            names.add(y.grad_fn.name())
            y.backward(layout(dy) * scale)
        if staged and number % 2:
            statistics.commit()
        found += [y.detach(), leaf.grad]
    return [*found, *(p.grad for p in norm.parameters()), *norm.buffers()], names


OPTIONS = {
    "reference": dict(warmup_updates=2),
    "algorithm2": dict(variant="algorithm2", groups=4),
    "no layer scale": dict(groups=0, warmup_updates=1),
    "no affine": dict(affine=False, groups=2),
}
LAYOUTS = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "channels apart": lambda x: x.transpose(0, 2).contiguous().transpose(0, 2),
}


@pytest.mark.parametrize("staged", [False, True], ids=["alone", "staged"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", OPTIONS)
def test_the_bits_are_those_of_python(options, dtype, staged):
    """Four steps by C++ and by Python, with and without mask, over layouts: results are the same bits."""
    x, dy = inputs((7, 3, 16), dtype)
    mask = torch.arange(7).unsqueeze(0) >= torch.tensor([7, 4, 1]).unsqueeze(1)
    for layout in LAYOUTS.values():
        for padding in (None, mask):
            results = []
            for context, name in ((contextlib.nullcontext(), IN_CPP), (native.in_python(), IN_PYTHON)):
                with context:
                    norm = PowerNorm(16, **OPTIONS[options]).to(dtype)
                    found, names = steps(norm, x, dy, padding, staged=staged, scale=8.0 if staged else 1.0, layout=layout)
                assert names == {name}
                results.append(found)
            assert len(results[0]) == len(results[1])
            for got, want in zip(*results):
                assert got.dtype == want.dtype and torch.equal(got, want)


def test_evaluation_has_the_bits_of_python():
    """PN and a folded norm, float32 and bfloat16, any layout."""
    for dtype in (torch.float32, torch.bfloat16):
        x, _ = inputs((7, 3, 16), dtype)
        norms = [PowerNorm(16, groups=4).to(dtype), FoldedNorm(16, 4), FoldedNorm(16, 2, torch.rand(16), torch.rand(16))]
        for norm in norms:
            norm.eval()
            for layout in LAYOUTS.values():
                with torch.no_grad():
                    got = norm(layout(x))
                    with native.in_python():
                        assert torch.equal(got, norm(layout(x)))


class Sub(torch.Tensor):
    """A tensor of another class."""


def wide_statistics(norm):
    return norm.double().float().register_buffer("ema_gz", torch.zeros(8, dtype=torch.float64))


@pytest.mark.parametrize("what", ["subclass", "half", "statistics", "forward mode", "mode", "checkpointed", "no gradient"])
def test_what_is_left_to_python(what):
    """Tensors that are not plain memory, other dtypes, transforms: the results of Python, not of C++."""
    norm, (x, _) = PowerNorm(8), inputs((5, 8))
    x.requires_grad_()
    context = contextlib.nullcontext()
    if what == "subclass":
        x = x.detach().as_subclass(Sub).requires_grad_()
    elif what == "half":
        x = x.detach().half().requires_grad_()
    elif what == "statistics":
        wide_statistics(norm)
    elif what == "forward mode":
        context = torch.autograd.forward_ad.dual_level()
    elif what == "mode":
        from torch.utils.flop_counter import FlopCounterMode

        context = FlopCounterMode(display=False)
    elif what == "checkpointed":
        context = torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t)
    elif what == "no gradient":
        context = torch.no_grad()
    with context:
        y = norm(x)
    assert y.grad_fn is None or y.grad_fn.name() != IN_CPP
    assert norm.iters == 1


def pack_elsewhere(convert):
    return torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: convert(t) if t.dim() == 2 else t)


@pytest.mark.parametrize(
    "convert",
    [lambda t: t.double().float(), lambda t: t.t().contiguous().t(), lambda t: t.as_subclass(Sub)],
    ids=["a copy", "another layout", "another class"],
)
def test_saved_tensors_that_come_back_otherwise(convert):
    """Hooks may put saved tensors anywhere: the gradients and nu are the same."""
    results = []
    for hooks in (contextlib.nullcontext(), pack_elsewhere(convert)):
        norm, (x, dy) = PowerNorm(8, groups=2), inputs((5, 8))
        x.requires_grad_()
        statistics = RunningStatistics(norm)
        with statistics.batch(), hooks:
            y = norm(x)
            assert y.grad_fn.name() == IN_CPP
            y.backward(dy)
        statistics.commit()
        results.append([x.grad, norm.weight.grad, norm.bias.grad, norm.ema_gz])
    for got, want in zip(*results):
        torch.testing.assert_close(got, want, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("what", ["expanded", "zero", "negated", "channels apart", "released"])
def test_gradients_of_every_kind(what):
    """A gradient may be a broadcast number, torch's lazy zeros or negation, or without memory."""
    x, dy = inputs((5, 8))
    kinds = {
        "expanded": lambda: torch.ones(()).expand(5, 8),
        "zero": lambda: torch._efficientzerotensor((5, 8)),
        "negated": lambda: torch._neg_view(dy),
        "channels apart": lambda: dy.t().contiguous().t(),
    }
    if what == "released":
        norm, grad = PowerNorm(8), dy.clone()
        y = norm(x.requires_grad_())
        grad.untyped_storage().resize_(0)
        with pytest.raises(RuntimeError):
            y.backward(grad)
        return
    results = []
    for grad in (kinds[what](), kinds[what]().clone().contiguous().add(0.0).resolve_neg()):
        norm, leaf = PowerNorm(8, groups=2), x.clone().requires_grad_()
        norm(leaf).backward(grad)
        results.append([leaf.grad, norm.weight.grad, norm.ema_gz])
    for got, want in zip(*results):
        assert torch.equal(got, want)


def test_padding_that_is_not_finite():
    """NaN at padding reaches no gradient of a parameter: C++ leaves that backward pass to Python."""
    x, dy = inputs((5, 1, 8))
    mask = torch.tensor([[False, False, False, True, True]])
    for value, norm_options in ((float("nan"), {}), (float("inf"), dict(groups=0))):
        results = []
        for context in (contextlib.nullcontext(), native.in_python()):
            with context:
                norm, leaf, grad = PowerNorm(8, **norm_options), x.clone(), dy.clone()
                grad[3] = value
                norm(leaf.requires_grad_(), mask).backward(grad)
                results.append([leaf.grad[:3], norm.weight.grad, norm.bias.grad, *norm.buffers()])
        assert all(torch.isfinite(each).all() for each in results[0]) and norm.ema_gz.abs().max() > 0
        for got, want in zip(*results):
            assert torch.equal(got, want)


def test_autograds_own_checks():
    """A graph that was freed, an input changed in place, a second derivative, several gradients at once: refused."""
    norm, (x, dy) = PowerNorm(8), inputs((5, 8))
    x.requires_grad_()
    y = norm(x)
    y.backward(dy, retain_graph=True)
    y.backward(dy)
    with pytest.raises(RuntimeError, match="second time"):
        y.backward(dy)
    changed = x * 1.0
    y = norm(changed)
    changed.add_(1.0)
    with pytest.raises(RuntimeError, match="inplace operation"):
        y.backward(dy)
    (first,) = torch.autograd.grad(norm(x), x, dy, create_graph=True)
    with pytest.raises(RuntimeError, match="gradient of PowerNorm in training is an approximation"):
        first.sum().backward()
    with pytest.raises(RuntimeError, match="several gradients at once"):
        torch.autograd.grad(norm(x), x, torch.stack([dy, dy]), is_grads_batched=True)


def test_only_what_is_asked_for():
    """Gradients of x, weight and bias where they are wanted, each as if all were."""
    x, dy = inputs((5, 8))
    norm = PowerNorm(8)
    all_of = torch.autograd.grad(norm(x.requires_grad_()), (x, norm.weight, norm.bias), dy)
    for i, wanted in enumerate(("x", "weight", "bias")):
        norm = PowerNorm(8).requires_grad_(False)
        leaf = x.detach().clone()
        target = {"x": leaf, "weight": norm.weight, "bias": norm.bias}[wanted].requires_grad_()
        y = norm(leaf)
        assert y.grad_fn.name() == IN_CPP
        assert torch.equal(torch.autograd.grad(y, target, dy)[0], all_of[i])
    frozen = PowerNorm(8).requires_grad_(False)
    assert not frozen(x.detach()).requires_grad and frozen.iters == 1


def test_anomaly_mode_names_the_pass():
    """The forward pass of a gradient that is NaN is shown."""
    norm, (x, dy) = PowerNorm(8), inputs((5, 8))
    dy[0, 0] = float("nan")
    shown = pytest.warns(UserWarning, match="Error detected in PowerNormBackward")
    with shown, torch.autograd.detect_anomaly(check_nan=True), pytest.raises(RuntimeError, match="nan values"):
        norm(x.requires_grad_()).backward(dy)


def test_a_backward_pass_outside_of_its_batch():
    """A stage that has been closed refuses it, with nothing added; a dummy batch adds nothing either."""
    norm, (x, dy) = PowerNorm(8), inputs((5, 8))
    statistics = RunningStatistics(norm)
    with statistics.batch():
        y = norm(x.requires_grad_())
    with pytest.raises(RuntimeError, match="backward pass in training outside of"):
        y.backward(dy)
    statistics.discard()
    before = [each.clone() for each in norm.buffers()]
    with statistics.batch(counts=False):
        norm(x).backward(dy)
    statistics.commit()
    assert all(torch.equal(a, b) for a, b in zip(before, norm.buffers()))


def test_inference_mode():
    """Evaluation inside of it gives inference tensors; those cannot be trained on, as torch says."""
    norm, (x, _) = PowerNorm(8).eval(), inputs((5, 8))
    with torch.inference_mode():
        y = norm(x)
        assert y.is_inference()
    with pytest.raises(RuntimeError, match="[Ii]nference"):
        norm.train()(y)


def test_threads_share_a_norm():
    """Every pass of four threads takes its step, in C++ as in Python."""
    norm, (x, dy) = PowerNorm(64, warmup_updates=0), inputs((600, 64))
    errors = []

    def work():
        try:
            for _ in range(20):
                norm(x.clone().requires_grad_()).backward(dy)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and norm.iters == 80 and torch.isfinite(norm.ema_gz).all()


def test_nothing_is_left_behind():
    """Norm, input and graph go with their last reference, whether a backward pass ran or not."""
    norm, (x, dy) = PowerNorm(8), inputs((5, 8))
    for run in (True, False):
        leaf = x.clone().requires_grad_()
        known = [weakref.ref(leaf), weakref.ref(norm)]
        y = norm(leaf)
        if run:
            y.backward(dy)
        del y, leaf
        assert known[0]() is None
    del norm
    gc.collect()
    assert known[1]() is None


def test_a_norm_that_keeps_its_output_can_be_freed():
    """Once the backward pass has run: a node in C++ is no place where Python's garbage collector finds the way back."""
    norm, (x, dy) = PowerNorm(8), inputs((5, 8))
    norm.last = norm(x.requires_grad_())
    norm.last.backward(dy)
    known = weakref.ref(norm)
    del norm
    gc.collect()
    assert known() is None


def test_a_deep_graph_can_be_freed():
    """A chain of 20,000 norms takes no stack when it goes."""
    norm, (x, _) = PowerNorm(2), inputs((1, 2))
    y = x.requires_grad_()
    for _ in range(20_000):
        y = norm(y)
    del y


def test_optimizer_and_modules_see_ordinary_tensors():
    """A model with a norm learns as with Python: the same weights after some steps of Adam."""
    results = []
    for context in (contextlib.nullcontext(), native.in_python()):
        with context:
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(8, 8), PowerNorm(8), nn.Linear(8, 1))
            optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
            x, y = torch.randn(4, 30, 8), torch.randn(4, 30, 1)
            for step in range(4):
                optimizer.zero_grad()
                (model(x[step].unsqueeze(1)).squeeze(1) - y[step]).square().mean().backward()
                optimizer.step()
            results.append([*model.parameters(), *model.buffers()])
    for got, want in zip(*results):
        assert torch.equal(got, want)


# ---------------------------------------------------------------- how it comes to be there


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """Nothing loaded, nothing built: an empty folder to build in."""
    monkeypatch.setattr(native, "_loaded", False)
    monkeypatch.setattr(native, "_extension", None)
    monkeypatch.setattr(native, "_reason", "")
    monkeypatch.setattr(build, "autograd_folders", lambda: [tmp_path])
    return tmp_path


@pytest.mark.parametrize("choice", ["prebuilt", "python"])
def test_nothing_is_built_where_nobody_wants_it(fresh, monkeypatch, choice):
    """The environment variable turns the building off, or C++ altogether; the log says so."""
    monkeypatch.setenv(native.VARIABLE, choice)
    assert c.autograd() is None
    assert ("POWERNORM_AUTOGRAD=python" if choice == "python" else "not built") in c.describe()
    assert not list(fresh.glob("*.so")) and not list(fresh.glob("*.failed"))


def test_a_wrong_choice_is_refused(fresh, monkeypatch):
    """With the variable, the value and what is valid."""
    monkeypatch.setenv(native.VARIABLE, "cpp")
    with pytest.raises(ValueError, match="POWERNORM_AUTOGRAD='cpp': must be one of build, prebuilt, python"):
        c.autograd()


@pytest.mark.slow
def test_a_build_that_fails_is_not_tried_again(fresh, monkeypatch):
    """Its reason is kept and logged; a library that does not load is no error either."""
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(build.BuildError, match="false failed with exit status 1"):
        build.build_autograd()
    assert not build.start_autograd()
    monkeypatch.setenv(native.VARIABLE, "build")
    assert c.autograd() is None and "false failed with exit status 1" in c.describe()
    (fresh / build.autograd_name()).write_bytes(b"no library")
    monkeypatch.setattr(native, "_loaded", False)
    assert c.autograd() is None and "does not load" in c.describe()


def test_a_compiler_that_is_missing_is_no_failure_to_remember(fresh, monkeypatch):
    """Whoever installs one later gets the function, without having to ask for it."""
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(build.BuildError, match="CXX='no-such-compiler' is not a command"):
        build.build_autograd()
    assert not list(fresh.iterdir()) and not build.start_autograd()


@pytest.mark.parametrize("cache, home", [("", "~"), ("relative", "/home/me"), ("/cache", "/home/me")])
def test_nothing_is_loaded_from_the_working_directory(monkeypatch, cache, home):
    """A user without a home or a cache with a relative path: only absolute folders are searched and written."""
    monkeypatch.setenv("XDG_CACHE_HOME", cache)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path.replace("~", home))
    expected = {"": [], "relative": ["/home/me/.cache"], "/cache": ["/cache"]}[cache]
    assert [str(folder.parent) for folder in build.autograd_folders()[1:]] == expected


def test_a_frozen_program_does_not_start_itself(fresh, monkeypatch):
    """There sys.executable is the program, not Python."""
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    monkeypatch.setattr(subprocess, "Popen", lambda *arguments, **options: pytest.fail("a process was started"))
    assert not build.start_autograd()


HOLD = "import fcntl, os, sys; fcntl.flock(os.open(sys.argv[1], os.O_RDONLY), 2); print(flush=True); input()"


def test_one_process_builds_at_a_time(fresh):
    """Another one is told so at once, and goes on with Python."""
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(fresh)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        holder.stdout.readline()
        with pytest.raises(build.BuildError, match="another process is building it"):
            build.build_autograd()
        assert build.start_autograd()
        assert not list(fresh.glob("*.failed"))
    finally:
        holder.communicate(b"\n")


def test_another_torch_is_another_file(fresh, monkeypatch, tmp_path):
    """The file's name changes with torch's version, so that what was compiled for one is not loaded by another."""
    before = build.autograd_name()
    (tmp_path / "version.py").write_text("__version__ = '99.0'")
    monkeypatch.setattr(build, "_torch", lambda: tmp_path)
    assert build.autograd_name() != before and build.find_autograd() is None


#: a compiler that puts a library that was compiled before where it is told to
COMPILER = """#!/bin/sh
while [ "$1" != -o ]; do shift; done
cp "{library}" "$2"
"""


@pytest.mark.slow
def test_it_is_built_in_the_background(tmp_path, root):
    """A first process trains with Python and starts the build, which the next one finds done.

    The compiler's part is left out: that these sources compile is why this file's tests are not skipped.
    """
    ignore = shutil.ignore_patterns(f"{build.AUTOGRAD}*", "__pycache__")
    shutil.copytree(root / "fairseq_powernorm", tmp_path / "fairseq_powernorm", ignore=ignore)
    compiler = tmp_path / "compiler"
    compiler.write_text(COMPILER.format(library=build.find_autograd()))
    compiler.chmod(0o755)
    waiting = "import subprocess as s; start = s.Popen; s.Popen = lambda *a, **k: (p := start(*a, **k), p.wait())[0];"
    train = (
        "import logging, torch; logging.basicConfig(level='INFO'); from fairseq_powernorm.norms import PowerNorm;"
        "PowerNorm(8)(torch.randn(3, 8))"
    )
    environment = {**os.environ, native.VARIABLE: "build", "PYTHONPATH": str(tmp_path), "CXX": str(compiler)}
    logs = [
        subprocess.run([sys.executable, "-c", text], cwd=tmp_path, env=environment, capture_output=True, text=True).stderr
        for text in (waiting + train, train)
    ]
    assert "autograd in Python (that in C++ is being built, for processes that begin later)" in logs[0]
    assert "autograd in C++" in logs[1], logs


FIRST_IN_A_TRACE = """
import torch
from fairseq_powernorm.norms import build_norm
x = torch.randn(3, 2, 8)
for name in ("power", "rms"):
    norm = build_norm(name, 8).eval()
    with torch.no_grad():
        torch.testing.assert_close(torch.jit.trace(norm, x)(2 * x), norm(2 * x))
"""


@pytest.mark.slow
def test_a_first_call_in_a_trace():
    """A process whose first norm is traced gets a graph that depends on its input, and so do the norms after it."""
    toy.command("python", "-c", FIRST_IN_A_TRACE)
