"""The norms as stand-alone modules: against golden traces, equations, autograd and torch's own layers."""
import copy
import json
from contextlib import nullcontext

import numpy as np
import pytest
import torch
import torch.utils.checkpoint
from norm_cases import APPROXIMATE, RUNNING, new

from fairseq_powernorm import functional
from fairseq_powernorm.norms import NORMS, MaskedBatchNorm, PowerNorm, PowerNormV, build_norm
from fairseq_powernorm.statistics import RunningStatistics

EXACT = [name for name in RUNNING if name not in APPROXIMATE]
TOLERANCE = {"f32": 2e-6, "f64": 1e-12}
DTYPE = {"f32": torch.float32, "f64": torch.float64}


def relative(got, golden):
    """max|difference| / max|golden|, the golden traces' measure."""
    got = np.stack([g.detach().numpy() for g in got]) if isinstance(got, list) else got.detach().numpy()
    return np.abs(got - golden).max() / np.abs(golden).max()


def tensors(array, dtype):
    return torch.tensor(array).to(dtype)


def random_batch(T=5, B=3, C=8, seed=0, dtype=torch.float64, lengths=(5, 3, 1)):
    """x, dy (T x B x C) and a mask (B x T), right-padded to the given lengths."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(T, B, C, generator=generator, dtype=dtype) * 2 + 0.3
    g = torch.randn(T, B, C, generator=generator, dtype=dtype)
    mask = torch.arange(T).unsqueeze(0) >= torch.tensor(lengths).unsqueeze(1)
    return x, g, mask


def randomize(norm, seed=0):
    """Give every parameter and buffer but ``iters`` a value that is not its initial one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in norm.state_dict().items():
            if name != "iters":
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    return norm


def run_trace(norm, xs, gs, masks, weights=None):
    """Forward and backward of each step; the recorded quantities as lists."""
    got = {key: [] for key in ("out", "gx", "gw", "gb", "running_phi", "ema_gz", "iters", "running_mean", "running_var")}
    for step, (x, g, mask) in enumerate(zip(xs, gs, masks)):
        if weights is not None:
            with torch.no_grad():
                norm.weight.copy_(weights[step])
        norm.zero_grad()
        x = x.clone().requires_grad_()
        y = norm(x, mask)
        y.backward(g)
        values = dict(out=y, gx=x.grad, gw=norm.weight.grad, gb=norm.bias.grad, **dict(norm.named_buffers()))
        for key, value in values.items():
            got[key].append(value.detach().clone())
    return {key: value for key, value in got.items() if value}


# ---------------------------------------------------------------- golden traces


def settings_of(oracle, case):
    """The manifest's entry of one recorded case."""
    return json.loads((oracle / "layers" / "manifest.json").read_text())["cases"][case]


def power_norm_of(settings, dim):
    """PowerNorm with the settings of a recorded case."""
    return PowerNorm(
        dim,
        eps=settings.get("eps", 1e-5),
        alpha_fwd=settings["alpha_fwd"],
        alpha_bkw=settings["alpha_bkw"],
        warmup_updates=settings["warmup_iters"],
        groups=settings["group_num"],
    )


@pytest.mark.parametrize("precision", ["f32", "f64"])
@pytest.mark.parametrize("case", ["pn_a_w0_g1_m0", "pn_a_w0_g4_m1", "pn_a_w10_g1_m1", "pn_a_w10_g4_m0"])
def test_reference_matches_the_authors_code(oracle, case, precision):
    """30 training steps and an evaluation equal the recorded ones: outputs, gradients and buffers."""
    settings = settings_of(oracle, case)
    inputs = np.load(oracle / "layers" / f"{settings['inputs']}.npz")
    golden = np.load(oracle / "layers" / f"{case}.npz")
    dtype = DTYPE[precision]
    norm = power_norm_of(settings, inputs["x"].shape[-1]).to(dtype)
    with torch.no_grad():
        norm.weight.copy_(tensors(inputs["weight"], dtype))
        norm.bias.copy_(tensors(inputs["bias"], dtype))
    masks = [torch.tensor(m) if settings["mask"] else None for m in inputs["pad_mask"]]
    got = run_trace(norm, tensors(inputs["x"], dtype), tensors(inputs["g"], dtype), masks)
    for key in ("out", "gx", "gw", "gb", "running_phi", "ema_gz"):
        assert relative(got[key], golden[f"{precision}_{key}"]) < TOLERANCE[precision], key
    assert [int(i) for i in got["iters"]] == list(golden["iters"])
    norm.eval()
    mask = torch.tensor(inputs["pad_mask_eval"]) if settings["mask"] else None
    assert relative(norm(tensors(inputs["x_eval"], dtype), mask), golden[f"{precision}_eval_out"]) < TOLERANCE[precision]


@pytest.mark.parametrize("precision", ["f32", "f64"])
def test_reference_matches_the_authors_code_on_ragged_batches(oracle, precision):
    """The same with T, B and the weight changing at each step, masked, with a warm-up of 6."""
    golden = np.load(oracle / "layers" / "pn_ragged.npz")
    settings = settings_of(oracle, "pn_ragged")
    dtype, steps = DTYPE[precision], settings["steps"]
    norm = power_norm_of(settings, golden["x_0"].shape[-1]).to(dtype)
    with torch.no_grad():
        norm.bias.copy_(tensors(golden["bias"], dtype))
    got = run_trace(
        norm,
        [tensors(golden[f"x_{t}"], dtype) for t in range(steps)],
        [tensors(golden[f"g_{t}"], dtype) for t in range(steps)],
        [torch.tensor(golden[f"pad_mask_{t}"]) for t in range(steps)],
        [tensors(golden["weight_t"][t], dtype) for t in range(steps)],
    )
    for t in range(steps):
        assert relative(got["out"][t], golden[f"{precision}_out_{t}"]) < TOLERANCE[precision]
        assert relative(got["gx"][t], golden[f"{precision}_gx_{t}"]) < TOLERANCE[precision]
    for key in ("gw", "gb", "running_phi", "ema_gz"):
        assert relative(got[key], golden[f"{precision}_{key}"]) < TOLERANCE[precision], key
    assert [int(i) for i in got["iters"]] == list(golden["iters"])
    evaluated = norm.eval()(tensors(golden["x_eval"], dtype), torch.tensor(golden["pad_mask_eval"]))
    assert relative(evaluated, golden[f"{precision}_eval_out"]) < TOLERANCE[precision]


@pytest.mark.parametrize("precision", ["f32", "f64"])
@pytest.mark.parametrize("groups", [1, 2, 4, 8, 16])
def test_layer_scale_matches_the_authors_code(oracle, groups, precision):
    """Output and gradient of the layer scale alone, with tiny and all-zero rows among the input."""
    golden = np.load(oracle / "layers" / "groupscaling.npz")
    x = tensors(golden["x"], DTYPE[precision]).requires_grad_()
    u = functional.layer_scale(x, groups)
    u.backward(tensors(golden["g"], DTYPE[precision]))
    assert relative(u, golden[f"{precision}_g{groups}_out"]) < TOLERANCE[precision]
    assert relative(x.grad, golden[f"{precision}_g{groups}_gx"]) < TOLERANCE[precision]


@pytest.mark.parametrize("precision", ["f32", "f64"])
def test_batch_norm_without_padding_matches_the_authors_code(oracle, precision):
    """Unmasked, MaskedBatchNorm is what the released flag value ``batch`` builds (momentum 0.05)."""
    golden = np.load(oracle / "layers" / "syncbn_m0.npz")
    dtype = DTYPE[precision]
    norm = MaskedBatchNorm(golden["x"].shape[-1], alpha_fwd=0.95).to(dtype)
    with torch.no_grad():
        norm.weight.copy_(tensors(golden["weight"], dtype))
        norm.bias.copy_(tensors(golden["bias"], dtype))
    got = run_trace(norm, tensors(golden["x"], dtype), tensors(golden["g"], dtype), [None] * len(golden["x"]))
    for key in ("out", "gx", "gw", "gb", "running_mean", "running_var"):
        assert relative(got[key], golden[f"{precision}_{key}"]) < TOLERANCE[precision], key
    assert relative(norm.eval()(tensors(golden["x_eval"], dtype)), golden[f"{precision}_eval_out"]) < TOLERANCE[precision]


@pytest.mark.parametrize("precision", ["f32", "f64"])
def test_batch_norm_with_padding_keeps_the_authors_running_mean(oracle, precision):
    """Masked, theirs fills padding with the mean of the other rows: the same running mean, another variance by design."""
    golden = np.load(oracle / "layers" / "syncbn_m1.npz")
    dtype = DTYPE[precision]
    norm = MaskedBatchNorm(golden["x"].shape[-1], alpha_fwd=0.95).to(dtype)
    masks = [torch.tensor(mask) for mask in golden["pad_mask"]]
    got = run_trace(norm, tensors(golden["x"], dtype), tensors(golden["g"], dtype), masks)
    assert relative(got["running_mean"], golden[f"{precision}_running_mean"]) < TOLERANCE[precision]
    assert relative(got["running_var"], golden[f"{precision}_running_var"]) > 1e-3


# ---------------------------------------------------------------- equations


def algorithm2_by_loops(x, g, mask, weight, bias, psi2, ema, alpha_f, alpha_b, eps, groups):
    """Algorithm 2 with masks, one row and channel after the other in Python floats."""
    T, B, C = x.shape
    rows = [(t, b) for t in range(T) for b in range(B) if not mask[b, t]]
    width = C // groups if groups else C
    u, root = {}, {}
    for t in range(T):
        for b in range(B):
            row = [float(v) for v in x[t, b]]
            for k in range(0, C, width):
                block = row[k : k + width]
                root[t, b, k // width] = (sum(v * v for v in block) / width + 1e-5) ** 0.5 if groups else 1.0
            u[t, b] = [v / root[t, b, c // width] for c, v in enumerate(row)]
    psi = [(float(p) + eps) ** 0.5 for p in psi2]
    y, dx = torch.zeros_like(x), torch.zeros_like(x)
    dw, db, new_psi2, new_ema = [0.0] * C, [0.0] * C, [0.0] * C, [0.0] * C
    for c in range(C):
        nu = (1 - alpha_b) * float(ema[c])
        z = {(t, b): u[t, b][c] / psi[c] for t in range(T) for b in range(B)}
        dz = {(t, b): float(g[t, b, c]) * float(weight[c]) for t, b in rows}
        for t, b in z:
            y[t, b, c] = float(weight[c]) * z[t, b] + float(bias[c])
        gamma = sum(z[r] ** 2 for r in rows) / len(rows)
        big_lambda = sum(dz[r] * z[r] for r in rows) / len(rows)
        new_nu = nu * (1 - (1 - alpha_b) * gamma) + (1 - alpha_b) * big_lambda
        new_ema[c] = new_nu / (1 - alpha_b)
        new_psi2[c] = alpha_f * float(psi2[c]) + (1 - alpha_f) * sum(u[r][c] ** 2 for r in rows) / len(rows)
        dw[c] = sum(float(g[t, b, c]) * z[t, b] for t, b in rows)
        db[c] = sum(float(g[t, b, c]) for t, b in rows)
        for r in rows:
            dx[r[0], r[1], c] = (dz[r] - nu * z[r]) / psi[c]
    for t, b in rows:  # through the layer scale: (du - u * mean(du * u)) / root
        if groups:
            for k in range(0, C, width):
                du = [float(v) for v in dx[t, b, k : k + width]]
                dot = sum(d * v for d, v in zip(du, u[t, b][k : k + width])) / width
                for c in range(k, k + width):
                    dx[t, b, c] = (du[c - k] - u[t, b][c] * dot) / root[t, b, k // width]
    return y, dx, dw, db, new_psi2, new_ema


@pytest.mark.parametrize("groups", [0, 1, 4])
@pytest.mark.parametrize("alphas", [(0.9, 0.9), (0.7, 0.95)])
def test_algorithm2_equals_the_papers_equations(groups, alphas):
    """Three masked steps equal Algorithm 2 evaluated with loops: output, gradients, psi^2 and nu / (1 - alpha_b)."""
    norm = randomize(PowerNorm(8, variant="algorithm2", groups=groups, alpha_fwd=alphas[0], alpha_bkw=alphas[1]).double())
    for step in range(3):
        x, g, mask = random_batch(seed=step)
        expected = algorithm2_by_loops(
            x, g, mask, norm.weight.tolist(), norm.bias.tolist(), norm.running_phi.tolist(), norm.ema_gz.tolist(),
            *alphas, norm.eps, groups,
        )
        norm.zero_grad()
        x.requires_grad_()
        y = norm(x, mask)
        y.backward(g)
        for got, want in zip(
            (y, x.grad, norm.weight.grad, norm.bias.grad, norm.running_phi, norm.ema_gz), expected
        ):
            torch.testing.assert_close(got.detach(), torch.as_tensor(want, dtype=got.dtype), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("groups", [0, 1, 2])
@pytest.mark.parametrize("kind", EXACT)
def test_exact_gradients(kind, groups, masked):
    """In training the gradient is that of the function computed (gradcheck, float64), but where it is approximate."""
    norm = randomize(new(kind, dim=4, groups=groups).double())
    norm.iters.fill_(2)
    x, _, mask = random_batch(3, 2, 4, lengths=(3, 1))

    def function(x, weight, bias):
        state = {name: buffer.clone() for name, buffer in norm.named_buffers()}  # which takes the step of each call
        state.update(weight=weight, bias=bias)
        return torch.func.functional_call(norm, state, (x, mask if masked else None))

    inputs = (x.requires_grad_(), norm.weight.detach().requires_grad_(), norm.bias.detach().requires_grad_())
    assert torch.autograd.gradcheck(function, inputs)


@pytest.mark.parametrize("kind", RUNNING)
@pytest.mark.parametrize("groups", [0, 2])
def test_evaluation_has_exact_gradients(kind, groups):
    """In evaluation every norm is an ordinary differentiable function of x, weight and bias."""
    norm = randomize(new(kind, dim=4, groups=groups).double()).eval()
    x, _, mask = random_batch(3, 2, 4, lengths=(3, 1))

    def function(x, weight, bias):
        return torch.func.functional_call(norm, {"weight": weight, "bias": bias}, (x, mask))

    inputs = (x.requires_grad_(), norm.weight.detach().requires_grad_(), norm.bias.detach().requires_grad_())
    assert torch.autograd.gradcheck(function, inputs)


def test_power_norm_v_against_autograd():
    """PN-V equals u * weight / sqrt(mean of u^2 over valid rows + eps) + bias, differentiated by autograd."""
    norm = randomize(PowerNormV(8, groups=4, alpha_fwd=0.8).double())
    before = norm.running_phi.clone()
    x, g, mask = random_batch()
    x1, x2 = x.clone().requires_grad_(), x.clone().requires_grad_()
    norm(x1, mask).backward(g)
    u = functional.layer_scale(x2, 4)
    moment = u[~mask.t()].square().mean(0)
    (u * norm.weight.detach() * torch.rsqrt(moment + norm.eps)).backward(g)
    torch.testing.assert_close(x1.grad, x2.grad, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(norm.running_phi, 0.8 * before + 0.2 * moment.detach(), rtol=1e-12, atol=1e-12)


def test_batch_norm_equals_torchs():
    """Without mask and layer scale: outputs, gradients, running statistics and evaluation of torch.nn.BatchNorm1d."""
    ours, theirs = MaskedBatchNorm(8, groups=0, alpha_fwd=0.9).double(), torch.nn.BatchNorm1d(8, momentum=0.1).double()
    for seed in range(3):
        x, g, _ = random_batch(seed=seed)
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        ya, yb = ours(a), theirs(b.view(-1, 8)).view_as(b)
        ya.backward(g)
        yb.backward(g)
        torch.testing.assert_close(ya, yb, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-11, atol=1e-12)
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x.view(-1, 8)).view_as(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", RUNNING)
def test_masked_statistics_equal_those_of_the_valid_rows_alone(kind):
    """Buffers and valid outputs are the same for a padded batch and for its valid rows without padding."""
    padded = randomize(new(kind, dim=8, groups=4, warmup_updates=0).double())
    packed = copy.deepcopy(padded)
    x, _, mask = random_batch()
    valid = ~mask.t()
    y = padded(x, mask)
    torch.testing.assert_close(y[valid], packed(x[valid]), rtol=1e-12, atol=1e-12)
    for (name, a), b in zip(padded.named_buffers(), packed.buffers()):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12, msg=name)


@pytest.mark.parametrize("kind", RUNNING)
def test_alpha_one_keeps_and_alpha_zero_replaces_the_running_statistics(kind):
    """alpha_fwd = 1 leaves the running statistics as they are; 0 makes them the batch's own."""
    x, _, mask = random_batch()
    kept = randomize(new(kind, dim=8, alpha_fwd=1.0, groups=1, warmup_updates=0).double())
    before = copy.deepcopy(dict(kept.named_buffers()))
    kept(x, mask)
    for name in set(before) - {"iters", *kept.windows}:
        torch.testing.assert_close(dict(kept.named_buffers())[name], before[name], rtol=0, atol=0)
    replaced = new(kind, dim=8, alpha_fwd=0.0, groups=1, warmup_updates=0).double()
    replaced(x, mask)
    u = functional.layer_scale(x, 1)[~mask.t()]
    expected = {
        "running_mean": u.mean(0),
        "running_var": u.var(0, unbiased=kind in ("batch", "prepbn")) if kind not in APPROXIMATE else u.square().mean(0),
        "running_phi": u.square().mean(0),
        "running_std": u.std(0, unbiased=False) + replaced.eps,
    }
    for name in set(expected) & set(before):
        torch.testing.assert_close(replaced.get_buffer(name), expected[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", RUNNING)
def test_a_derived_class_may_have_a_step_of_its_own(kind):
    """Its ``advance`` is what the running statistics become, by the norm itself and by RunningStatistics: here, nothing."""

    def advance(norm, part, state, sums, alpha_fwd):
        return {"iters": state["iters"] + 1} if part == "forward" else {}

    x, g, _ = random_batch(dtype=torch.float32)
    for staged in (False, True):
        norm = new(kind, dim=8)
        norm.__class__ = type("Own", (type(norm),), {"advance": advance})
        before = copy.deepcopy({name: value for name, value in norm.named_buffers() if name != "iters"})
        statistics = RunningStatistics(norm) if staged else None
        with statistics.batch() if statistics else nullcontext():
            norm(x.requires_grad_()).backward(g)
        if statistics:
            statistics.commit()
        assert norm.iters == 1
        for name, value in before.items():
            assert torch.equal(norm.get_buffer(name), value), (name, staged)


@pytest.mark.parametrize("kind", RUNNING)
def test_a_training_pass_between_an_evaluation_and_its_backward_pass(kind):
    """The gradient of an evaluation is that of the statistics it saw, also the second derivative."""
    norm, x = randomize(new(kind, dim=8, warmup_updates=0)).eval(), torch.randn(6, 8)
    found = []
    for between in (False, True):
        leaf = x.clone().requires_grad_()
        y = norm.eval()(leaf)
        if between:
            norm.train()(torch.randn(6, 8))
        (first,) = torch.autograd.grad(y.square().sum(), leaf, create_graph=True)
        found.append((first.detach(), *torch.autograd.grad(first.square().sum(), leaf)))
    for one, other in zip(*found):
        torch.testing.assert_close(one, other)


# ---------------------------------------------------------------- padding


@pytest.mark.parametrize("garbage", [7.0, 1e30, float("nan"), float("inf")])
def test_algorithm2_ignores_padding(garbage):
    """What stands at padding changes no buffer, no valid output, no gradient; nothing flows into or out of it."""
    results = []
    for fill in (0.0, garbage):
        norm = randomize(PowerNorm(8, variant="algorithm2", groups=4).double())
        x, g, mask = random_batch()
        x[mask.t()] = fill
        g[mask.t()] = fill
        for _ in range(2):  # the second step has nu != its start
            norm.zero_grad()
            x = x.detach().requires_grad_()
            y = norm(x, mask)
            y.backward(g)
        assert (x.grad[mask.t()] == 0).all()
        results.append((y[~mask.t()], x.grad, norm.weight.grad, norm.bias.grad, *norm.buffers()))
    for clean, dirty in zip(*results):
        assert torch.equal(clean, dirty)


@pytest.mark.parametrize("kind", RUNNING)
def test_forward_statistics_ignore_padding(kind):
    """For every norm, in training: what stands at padding changes no forward statistic and no valid output."""
    results = []
    for fill in (0.0, 123.0):
        norm = randomize(new(kind, dim=8, groups=2, warmup_updates=3).double())
        x, _, mask = random_batch()
        x[mask.t()] = fill
        y = norm(x, mask)
        results.append((y[~mask.t()], *norm.buffers()))
    for clean, dirty in zip(*results):
        assert torch.equal(clean, dirty)


@pytest.mark.parametrize("kind", RUNNING)
@pytest.mark.parametrize("rows", [0, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_batch_without_a_valid_row_leaves_the_statistics(kind, rows, dtype):
    """An empty batch and one of padding alone give finite outputs and gradients and change no running statistic."""
    norm = randomize(new(kind, dim=8, warmup_updates=10).to(dtype))
    before = copy.deepcopy({k: v for k, v in norm.named_buffers() if k != "iters"})
    x = torch.randn(rows, 2, 8, dtype=dtype, requires_grad=True)
    y = norm(x, torch.ones(2, rows, dtype=torch.bool))
    y.sum().backward()
    assert torch.isfinite(y).all() and torch.isfinite(x.grad).all()
    for name, value in before.items():
        if name != "ema_gz":  # reference: its backward statistics take in padding
            assert torch.equal(dict(norm.named_buffers())[name], value), name


@pytest.mark.parametrize("kind", RUNNING)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_batch_never_enters_a_buffer(kind, bad):
    """After one batch with NaN or inf the running statistics are what they were before it."""
    norm = randomize(new(kind, dim=8, groups=0, warmup_updates=0))
    before = copy.deepcopy({k: v for k, v in norm.named_buffers() if k != "iters"})
    x = torch.randn(4, 2, 8)
    x[1, 1, 3] = bad
    x.requires_grad_()
    norm(x).sum().backward()
    for name, value in before.items():
        assert torch.equal(dict(norm.named_buffers())[name], value), name


# ---------------------------------------------------------------- without layer scale


class Unbounded(PowerNorm):
    """PN without layer scale as released and as published: no bound on a jump."""

    JUMP = float("inf")


def spiked(kind, variant, spike, steps=160):
    """Rows of unit size, but for one batch of the given size at step 20: largest |y|, |dL/dx| and |nu| of each step."""
    norm = kind(8, groups=0, warmup_updates=5, variant=variant)
    generator = torch.Generator().manual_seed(1)
    found = []
    for step in range(1, steps + 1):
        x = (torch.randn(64, 8, generator=generator) * (spike if step == 20 else 1)).requires_grad_()
        y = norm(x)
        y.backward(torch.randn(64, 8, generator=generator) + y.detach().clamp(-1, 1))
        found.append([float(t.detach().abs().max()) for t in (y, x.grad, norm.ema_gz)])
    return torch.tensor(found), norm


@pytest.mark.parametrize("variant", ["reference", "algorithm2"])
def test_a_jump_of_the_second_moment_does_not_spread_without_layer_scale(variant):
    """A batch 10^4 times as large: outputs, gradients and nu stay small in it and after it; unbounded, they explode."""
    bounded, _ = spiked(PowerNorm, variant, 1e4)
    unbounded, _ = spiked(Unbounded, variant, 1e4)
    assert bounded.max() < 20 and bounded[-1, 0] > 1
    assert unbounded[:, 0].max() > 1e4 and unbounded[:, 1:].max() > 1e3
    assert unbounded[25:60, 0].max() < 0.1  # psi^2 is far too large for a long time


@pytest.mark.parametrize("size", [0.01, 1.0, 100.0])
@pytest.mark.parametrize("variant", ["reference", "algorithm2"])
def test_the_bounds_leave_a_healthy_run_alone(variant, size):
    """Rows of any size, growing twofold at one step: bit-identical to the unbounded arithmetic, buffers and gradients."""
    generator = torch.Generator().manual_seed(0)
    norms = [kind(8, groups=0, warmup_updates=5, variant=variant) for kind in (PowerNorm, Unbounded)]
    for step in range(60):
        x = torch.randn(64, 8, generator=generator) * size * (1 if step < 30 else 2)
        g = torch.randn(64, 8, generator=generator)
        grads = []
        for norm in norms:
            u = x.clone().requires_grad_()
            norm(u).backward(g)
            grads.append(u.grad)
        assert torch.equal(*grads)
    assert all(torch.equal(a, b) for a, b in zip(norms[0].state_dict().values(), norms[1].state_dict().values()))


def test_large_padding_does_not_make_nu_diverge_without_layer_scale():
    """`reference` counts padding in nu: with padded rows ten times as large its recursion would grow at every step."""
    norm = PowerNorm(8, groups=0, warmup_updates=0)
    generator = torch.Generator().manual_seed(0)
    mask = torch.arange(40).unsqueeze(0).expand(4, 40) >= 20
    for _ in range(100):
        x = torch.randn(40, 4, 8, generator=generator) * (1 + 9 * mask.t().unsqueeze(-1))
        norm(x.requires_grad_(), mask).backward(torch.randn(40, 4, 8, generator=generator))
    assert norm.ema_gz.abs().max() < 100


@pytest.mark.parametrize("kind", list(NORMS))
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.float32])
def test_masks_that_are_not_bool_are_refused(kind, dtype):
    """Elsewhere the ones of an integer mask are the tokens: it is refused, with the comparison that makes it one of ours."""
    x, g, mask = random_batch()
    norm = new(kind, dim=8).double()
    for mode in (True, False):
        with pytest.raises(ValueError, match="attention_mask == 0"):
            norm.train(mode)(x, mask.to(dtype))


@pytest.mark.parametrize("make", [lambda mask: mask.tolist(), lambda mask: mask.numpy(), lambda mask: mask.to_sparse()])
@pytest.mark.parametrize("kind", list(NORMS))
def test_masks_that_are_no_dense_tensors_are_refused(kind, make):
    """In both modes, whether the norm needs a mask or not."""
    x, g, mask = random_batch()
    norm = new(kind, dim=8).double()
    for mode in (True, False):
        with pytest.raises(ValueError, match="padding_mask of .*: expected a .*tensor"):
            norm.train(mode)(x, make(mask))


@pytest.mark.parametrize("kind", list(NORMS))
def test_masks_of_sentences_of_one_token(kind):
    """N x 1 for an input of N x C: a mask B x T with T = 1."""
    x, g, mask = random_batch()
    norm, other = (new(kind, dim=8).double() for _ in range(2))
    assert torch.equal(norm(x[0], mask[:, :1]), other(x[0], mask[:, 0]))


# ---------------------------------------------------------------- drop-in module


@pytest.mark.parametrize("kind", list(NORMS))
def test_two_and_three_dimensional_input_and_layouts(kind):
    """N x C equals T x B x C, and a non-contiguous input equals its contiguous copy, gradients included."""
    x, g, mask = random_batch()
    reference = None
    for view in ("3d", "2d", "transposed", "strided"):
        norm = randomize(new(kind, dim=8, groups=2, warmup_updates=1).double())
        leaf = x.clone().requires_grad_()
        if view == "2d":
            y = norm(leaf.reshape(-1, 8), mask.t().reshape(-1)).view_as(x)
        elif view == "transposed":
            batch_first = leaf.transpose(0, 1).contiguous()
            y = norm(batch_first.transpose(0, 1), mask)
        elif view == "strided":
            y = norm(leaf.repeat_interleave(2, dim=-1)[..., ::2], mask)
        else:
            y = norm(leaf, mask)
        y.backward(g)
        result = [y, leaf.grad, *(p.grad for p in norm.parameters()), *norm.buffers()]
        reference = reference or result
        for a, b in zip(result, reference):
            torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("kind", RUNNING)
@pytest.mark.parametrize("dtype,tolerance", [(torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("parameters", ["same", "float32"])
def test_half_precision(kind, dtype, tolerance, parameters):
    """Half-precision input (and parameters): float32 statistics, results within rounding of float32 ones."""
    x, g, mask = random_batch(dtype=torch.float32)
    x, g = x.to(dtype), g.to(dtype)
    results = []
    for low in (True, False):
        norm = randomize(new(kind, dim=8, groups=2, warmup_updates=1))
        with torch.no_grad():  # values that both precisions hold
            for parameter in norm.parameters():
                parameter.copy_(parameter.to(dtype))
        if low and parameters == "same":
            norm.to(dtype)
        for _ in range(2):
            norm.zero_grad()
            leaf = (x if low else x.float()).clone().requires_grad_()
            y = norm(leaf, mask)
            y.backward(g if low else g.float())
        if low:
            assert y.dtype == leaf.grad.dtype == dtype
            assert all(buffer.dtype == torch.float32 for buffer in norm.buffers())
        results.append([y, leaf.grad, norm.weight.grad, norm.bias.grad])
        results.append(list(norm.buffers()))
    for low, full in zip(results[0], results[2]):
        torch.testing.assert_close(low.float(), full, rtol=tolerance, atol=tolerance)
    for low, full in zip(results[1], results[3]):  # the statistics see the same numbers
        torch.testing.assert_close(low, full, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", RUNNING)
def test_changing_precision_keeps_the_statistics(kind):
    """half(), bfloat16() and back leave every statistic bit-identical; double() widens them."""
    norm = randomize(new(kind, dim=8))
    before = copy.deepcopy(dict(norm.named_buffers()))
    norm.half().bfloat16().float()
    for name, value in before.items():
        assert torch.equal(dict(norm.named_buffers())[name], value), name
    assert all(buffer.dtype == torch.float64 for buffer in norm.double().buffers())


@pytest.mark.parametrize("kind", RUNNING)
def test_autocast_does_not_touch_the_statistics(kind):
    """Under autocast a float32 input is normalized, and its statistics are taken, in float32 as without it."""
    results = []
    for enabled in (False, True):
        norm = randomize(new(kind, dim=8, groups=2, warmup_updates=1))
        x, g, mask = random_batch(dtype=torch.float32)
        x.requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            y = norm(x, mask)
        y.backward(g)
        results.append([y, x.grad, *norm.buffers()])
    for plain, autocast in zip(*results):
        assert torch.equal(plain, autocast)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("kind", RUNNING)
@pytest.mark.parametrize("warmup_updates", [0, 100])
def test_activation_checkpointing_changes_nothing(kind, use_reentrant, warmup_updates):
    """With and without recomputation: gradients and buffers are bit-identical over several steps."""
    results = []
    for recompute in (False, True):
        norm = randomize(new(kind, dim=8, groups=2, warmup_updates=warmup_updates).double())
        grads = []
        for seed in range(3):
            x, g, mask = random_batch(seed=seed)
            x.requires_grad_()
            if recompute:
                y = torch.utils.checkpoint.checkpoint(norm, x, mask, use_reentrant=use_reentrant)
            else:
                y = norm(x, mask)
            y.backward(g)
            grads += [y, x.grad]
        results.append(grads + [norm.weight.grad, norm.bias.grad, *norm.buffers()])
    for plain, recomputed in zip(*results):
        assert torch.equal(plain, recomputed)


@pytest.mark.parametrize("kind", RUNNING)
def test_copies_are_independent(kind):
    """A deep copy taken in the middle of training goes on as the original does and shares nothing with it."""
    norm = new(kind, dim=8, warmup_updates=3).double()
    x, g, mask = random_batch()
    norm(x.requires_grad_(), mask).backward(g)
    twin = copy.deepcopy(norm)
    restored = new(kind, dim=8, warmup_updates=3).double()
    restored.load_state_dict(norm.state_dict())
    for seed in range(1, 5):
        for each in (norm, twin, restored):
            each.zero_grad()
            x, g, mask = random_batch(seed=seed)
            each(x.requires_grad_(), mask).backward(g)
    for name, value in norm.state_dict().items():
        assert torch.equal(value, twin.state_dict()[name]), name
        assert torch.equal(value, restored.state_dict()[name]), name
        assert value.data_ptr() != twin.state_dict()[name].data_ptr()


def test_buffers_are_floating_point_and_named_as_saved_checkpoints_have_them():
    """The names and shapes in a state_dict are a contract with saved checkpoints."""
    state = PowerNorm(8).state_dict()
    assert {k: tuple(v.shape) for k, v in state.items()} == {
        "weight": (8,), "bias": (8,), "running_phi": (8,), "ema_gz": (8,), "iters": (),
    }
    assert all(value.is_floating_point() for value in state.values())


def test_the_authors_state_dict_loads():
    """Statistics of shape (1, C, 1, 1) and an integer step count of shape (1,) load; the given dict is not changed."""
    theirs = {
        "weight": torch.rand(8), "bias": torch.rand(8), "running_phi": torch.rand(1, 8, 1, 1),
        "ema_gz": torch.rand(1, 8, 1, 1), "iters": torch.tensor([17]),
    }
    norm = PowerNorm(8)
    norm.load_state_dict(theirs)
    assert torch.equal(norm.running_phi, theirs["running_phi"].flatten())
    assert torch.equal(norm.ema_gz, theirs["ema_gz"].flatten())
    assert norm.steps() == 17
    assert theirs["running_phi"].shape == (1, 8, 1, 1)
    with pytest.raises(RuntimeError, match="running_phi"):
        PowerNorm(4).load_state_dict(theirs)


@pytest.mark.parametrize("kind", list(NORMS))
def test_without_affine_parameters(kind):
    """affine=False has no weight and no bias and equals those of a new norm, gradients included."""
    options = dict(dim=8, dtype=torch.float64)
    plain, unit = new(kind, affine=False, **options), new(kind, **options)
    assert not {"weight", "bias"} & set(dict(plain.named_parameters()))
    results = []
    for norm in (plain, unit):
        x, g, mask = random_batch()
        x.requires_grad_()
        y = norm(x, mask)
        y.backward(g)
        results.append((y, x.grad))
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_memory_kept_for_the_backward_pass():
    """PN keeps its input and one number per row and group, no N x C temporary."""
    norm = PowerNorm(64, groups=4, warmup_updates=0)
    x = torch.randn(100, 64, requires_grad=True)
    kept = {}

    def pack(tensor):
        kept[tensor.data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        norm(x)
    assert sum(kept.values()) <= x.numel() + 100 * 4 + 8 * 64


# ---------------------------------------------------------------- errors and the table


@pytest.mark.parametrize(
    "arguments,message",
    [
        (dict(dim=0), "dim=0"),
        (dict(groups=3), r"groups=3.*\[1, 2, 4, 8\]"),
        (dict(groups=-1), "groups=-1"),
        (dict(alpha_fwd=1.5), r"alpha_fwd=1.5.*\[0, 1\]"),
        (dict(alpha_bkw=-0.1), r"alpha_bkw=-0.1.*\[0, 1\]"),
        (dict(alpha_fwd=float("nan")), "alpha_fwd=nan"),
        (dict(eps=-1e-5), "eps=-1e-05"),
        (dict(warmup_updates=-1), "warmup_updates=-1"),
        (dict(variant="paper"), "variant='paper'.*reference, algorithm2"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    """An invalid argument raises ValueError naming the argument, its value and what is valid."""
    with pytest.raises(ValueError, match=message):
        PowerNorm(**{"dim": 8, **arguments})


@pytest.mark.parametrize("kind", RUNNING)
@pytest.mark.parametrize(
    "x,mask,message",
    [
        (torch.randn(5, 3, 7), None, r"\(5, 3, 7\): expected T x B x 8"),
        (torch.randn(8), None, r"\(8,\): expected"),
        (torch.ones(5, 8, dtype=torch.long), None, r"input of dtype torch.int64: expected float16"),
        (torch.ones(5, 8, dtype=torch.complex64), None, r"input of dtype torch.complex64: expected float16"),
        (torch.randn(5, 3, 8), torch.zeros(5, 3, dtype=torch.bool),
         r"padding_mask of shape \(5, 3\): expected \(3, 5\)"),
        (torch.randn(5, 8), torch.zeros(4, dtype=torch.bool), r"padding_mask of shape \(4,\): expected \(5,\)"),
        (torch.randn(5, 3, 8), torch.zeros(3, 5), r"dtype torch.float32: expected bool"),
    ],
)
@pytest.mark.parametrize("training", [True, False])
def test_bad_inputs_are_named(kind, x, mask, message, training):
    """A wrong shape or dtype of input or mask raises ValueError stating the one found and the one expected."""
    with pytest.raises(ValueError, match=message):
        new(kind, dim=8).train(training)(x, mask)


def test_build_norm():
    """The table's names build their classes, each taking the options it has; unknown names and options are errors."""
    options = dict(eps=1e-3, alpha_fwd=0.5, alpha_bkw=0.6, warmup_updates=7, groups=2, variant="algorithm2", affine=True)
    for name, cls in NORMS.items():
        norm = new(name, dim=8, **options)
        assert type(norm) is cls and getattr(norm, "eps", 1e-3) == 1e-3
    norm = build_norm("power", 8, **options)
    assert (norm.alpha_fwd, norm.alpha_bkw, norm.warmup_updates, norm.groups, norm.variant) == (
        0.5, 0.6, 7, 2, "algorithm2",
    )
    with pytest.raises(ValueError, match="'powr'.*layer, rms, batch, power-v, power"):
        build_norm("powr", 8)
    with pytest.raises(ValueError, match="option 'aplha_fwd' is unknown; options of 'power': .*alpha_fwd"):
        build_norm("power", 8, aplha_fwd=0.5)


def test_layer_and_rms_norm_are_torchs():
    """``layer`` and ``rms`` compute what torch's own modules compute, mask or no mask; the output has the input's dtype."""
    x, _, mask = random_batch()
    assert torch.equal(build_norm("layer", 8).double()(x, mask), torch.nn.LayerNorm(8).double()(x))
    assert torch.equal(build_norm("rms", 8).double()(x, mask), torch.nn.RMSNorm(8, eps=1e-5).double()(x))
    for name in ("layer", "rms"):
        assert build_norm(name, 8)(x.bfloat16(), mask).dtype is torch.bfloat16
