"""Batch renormalization, MABN, UN, RBN and PRepBN: each against a second implementation, and what is its own."""
import contextlib
import copy

import pytest
import torch
from norm_cases import batch
from reference import REFERENCES, scaled
from torch import nn
from torch.utils.checkpoint import checkpoint

from fairseq_powernorm.fold import fold_norms
from fairseq_powernorm.norms import build_norm, penalty
from fairseq_powernorm.statistics import RunningStatistics

C = 8
#: name -> options with which every boundary is crossed within 50 steps
SMALL = {
    "batch-renorm": dict(warmup_updates=10, r_updates=20, d_updates=15, alpha_fwd=0.8),
    "mabn": dict(window=5, warmup_updates=12, rescale_after=25),
    "un": dict(window=4, warmup_updates=12, rescale_after=25),
    "rbn": dict(p_mean=0.7, p_var=0.3),
    "prepbn": dict(total_updates=30, alpha=0.7),
}
VARIANTS = {
    **{name: (name, options) for name, options in SMALL.items()},
    "mabn, window first": ("mabn", dict(window=14, warmup_updates=3, rescale_after=0)),
    "un, outliers": ("un", dict(SMALL["un"], filter_outliers=True)),
    "un, smooth": ("un", dict(SMALL["un"], alpha_bkw=0.3, alpha_fwd=0.5)),
    "rbn, post-norm": ("rbn", dict(p_mean=60.0, p_var=0.0)),
}


def build(variant, groups=0, **options):
    """A norm in float64 with parameters that are no round numbers."""
    name, small = VARIANTS[variant]
    norm = build_norm(name, C, groups=groups, **{**small, **options}).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.copy_(torch.rand(parameter.shape, generator=generator, dtype=torch.float64) + 0.5)
    return norm


def data(step, masked=True, size=1.0):
    """x and dy (T x B x C), mask (B x T); no gradient arrives at padding. At times a batch is far larger than others."""
    generator = torch.Generator().manual_seed(step)
    x, dy = torch.randn(2, 6, 4, C, generator=generator, dtype=torch.float64)
    x = (x * (4.0 if step % 9 == 8 else 1.0) + 0.3) * size * (1 + torch.arange(C) / C)
    lengths = torch.randint(1, 7, (4,), generator=generator) if masked else torch.full((4,), 6)
    mask = torch.arange(6).unsqueeze(0) >= lengths.unsqueeze(1)
    return x, dy * mask.t().logical_not().unsqueeze(-1), mask


def loss(norm, y, dy):
    return (y * dy).sum() + penalty(norm)


@pytest.mark.parametrize("groups, masked, staged", [(0, True, False), (2, True, True), (2, False, False)])
@pytest.mark.parametrize("variant", VARIANTS)
def test_second_implementation(variant, groups, masked, staged):
    """50 steps across every boundary: outputs, gradients, statistics and evaluation, alone and by RunningStatistics."""
    norm = build(variant, groups)
    other = REFERENCES[VARIANTS[variant][0]](norm)
    statistics = RunningStatistics(norm) if staged else None
    for step in range(50):
        x, dy, mask = data(step, masked)
        norm.zero_grad()
        leaf = x.clone().requires_grad_()
        if staged:
            with statistics.batch(gradient_scale=8.0):
                y = norm(leaf, mask)
                (loss(norm, y, dy) * 8.0).backward()
            statistics.commit()
            for tensor in (leaf, *norm.parameters()):
                tensor.grad /= 8.0
        else:
            y = norm(leaf, mask)
            loss(norm, y, dy).backward()
        valid = mask.t().logical_not().reshape(-1)
        found = [y.view(-1, C), leaf.grad.view(-1, C), norm.weight.grad, norm.bias.grad]
        expected = other.step(x.view(-1, C), dy.view(-1, C), valid)
        for one, two in zip(found, expected):
            torch.testing.assert_close(one.detach(), two, rtol=1e-9, atol=1e-11, msg=lambda m: f"step {step}: {m}")
        for name, buffer in other.buffers.items():
            torch.testing.assert_close(norm.get_buffer(name), buffer, rtol=1e-9, atol=1e-11)
        if variant == "prepbn":
            torch.testing.assert_close(norm.alpha.grad, other.alpha.grad, rtol=1e-9, atol=1e-11)
            torch.testing.assert_close(norm.layer_weight.grad, other.layer[0].grad, rtol=1e-9, atol=1e-11)
            other.alpha.grad = other.layer[0].grad = None
        if step % 7 == 6:
            rows = norm.eval()(x).view(-1, C)
            torch.testing.assert_close(rows, other.evaluate(scaled(x.view(-1, C), groups)), rtol=1e-9, atol=1e-11)
            norm.train()
    assert norm.steps() == 50


@pytest.mark.parametrize("empty", ["padding", "not finite", "no rows"])
@pytest.mark.parametrize("staged", [False, True])
@pytest.mark.parametrize("name", ["mabn", "un"])
def test_a_step_without_a_moment_leaves_no_gap_in_the_window(name, staged, empty):
    """A place that was empty has the running variance, here 1: the next steps average over it and their own moments."""
    norm = build_norm(name, C, window=2, warmup_updates=0, rescale_after=9, alpha_fwd=1.0).double()
    statistics = RunningStatistics(norm) if staged else None
    rows = torch.randn(3, 6, 4, C, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3.0
    nothing = {"padding": rows[1], "not finite": rows[1] * torch.nan, "no rows": rows[1, :0]}[empty]
    for x in (rows[0], nothing, rows[2]):
        mask = torch.full((x.size(1), x.size(0)), empty == "padding" and x is nothing)
        with statistics.batch() if staged else contextlib.nullcontext():
            y = norm(x.clone().requires_grad_(), mask)
            y.sum().backward()
        if staged:
            statistics.commit()
    moments = torch.stack([torch.ones(C, dtype=torch.float64), rows[2].square().mean((0, 1))])
    mean = moments.mean(0) if name == "mabn" else moments.log().mean(0).exp()
    torch.testing.assert_close(y.detach(), rows[2] / (mean + norm.eps).sqrt())


@pytest.mark.parametrize("name", ["mabn", "un"])
def test_an_average_of_models_trains_on(name):
    """Its step count may be no whole number: its steps have a place in the windows all the same."""
    norms = [build_norm(name, C, window=2, warmup_updates=0, rescale_after=9) for _ in range(2)]
    for norm, steps in zip(norms, (4.0, 4.5)):
        norm.iters.fill_(steps)
        for step in range(3):
            x = data(step)[0].float().requires_grad_()
            norm(x).sum().backward()
    for one, other in zip(norms[0].buffers(), norms[1].buffers()):
        assert one.dim() == 0 or torch.equal(one, other)


def test_outliers_are_found():
    """The data of the test above hold batches that the filter keeps out: with it the run is another one."""
    results = []
    for variant in ("un", "un, outliers"):
        norm = build(variant)
        for step in range(50):
            norm(*data(step)[::2])
        results.append(norm.running_var)
    assert (results[0] - results[1]).abs().max() > 0.1


def test_defaults_are_the_published_ones():
    """Momenta, windows, warm-ups and bounds that the authors' code has."""
    for name, expected in {
        "batch-renorm": dict(eps=1e-3, alpha_fwd=0.99, r_max=3.0, d_max=5.0, groups=0),
        "mabn": dict(alpha_fwd=0.98, window=16, warmup_updates=100, rescale_after=1000, groups=0),
        "un": dict(alpha_fwd=0.9, alpha_bkw=0.9, window=4, warmup_updates=4000, filter_outliers=False, masked=True),
        "rbn": dict(alpha_fwd=0.95, p_mean=0.1, p_var=0.01),
        "prepbn:total_updates=9": dict(alpha_fwd=0.9, first_alpha=1.0, total_updates=9),
    }.items():
        norm = build_norm(name, C)
        assert {key: getattr(norm, key) for key in expected} == expected
        assert type(norm).default_groups(8) == 0


def test_bounds_of_batch_renorm_are_the_published_ones():
    """With the defaults r <= clamp(2 t / 35000 + 25/35, 1, 3) and |d| <= clamp(5 t / 20000 - 25/20, 0, 5)."""
    for t in (0, 5000, 9000, 25000, 40000, 10**6):
        norm = build_norm("batch-renorm", C).double()
        norm.iters.fill_(t)
        norm.running_std.fill_(1e-9)  # r and d are at their bounds
        x = torch.randn(50, C, dtype=torch.float64) + torch.where(torch.arange(C) % 2 == 0, 9.0, -9.0)
        r = min(max(2 * t / 35000 + 25 / 35, 1), 3)
        d = min(max(5 * t / 20000 - 25 / 20, 0), 5) * x.mean(0).sign()
        expected = (x - x.mean(0)) / (x.std(0, unbiased=False) + 1e-3) * r + d
        torch.testing.assert_close(norm(x), expected)


@pytest.mark.parametrize("masked", [True, False])
def test_unified_norm_without_the_mask(masked):
    """masked=false: padding counts in the statistics and receives gradients, as in the authors' Transformers."""
    norm, packed = build("un", masked=masked), build("un")
    for step in range(20):
        x, dy, mask = data(step)
        results = []
        for each, given in ((norm, mask), (packed, mask if masked else None)):
            leaf = x.clone().requires_grad_()
            each(leaf, given).backward(dy)
            results.append(leaf.grad)
        assert torch.equal(*results)
    assert all(torch.equal(a, b) for a, b in zip(norm.buffers(), packed.buffers()))


@pytest.mark.parametrize("name", ["mabn"])
def test_gradient_of_the_warm_up_is_exact(name):
    """While MABN averages over nothing its gradient is that of the function (gradcheck, float64, valid rows)."""
    norm = build_norm(name, C, groups=2).double()
    x, _, mask = data(0)
    valid = mask.t().logical_not()

    def function(x, weight, bias):
        state = {key: buffer.clone() for key, buffer in norm.named_buffers()}
        return torch.func.functional_call(norm, {**state, "weight": weight, "bias": bias}, (x, mask))[valid]

    inputs = (x.requires_grad_(), norm.weight.detach().requires_grad_(), norm.bias.detach().requires_grad_())
    assert torch.autograd.gradcheck(function, inputs)


@pytest.mark.parametrize("variant", VARIANTS)
def test_resumed_runs_are_the_same_bit_for_bit(variant):
    """A state_dict saved at any step and loaded into a new norm goes on exactly: windows, averages, lambda."""
    whole = build(variant).float()
    for stop in (3, 13, 17, 30):
        first = copy.deepcopy(whole)
        first.reset_running_stats()
        norms = [first, None]
        for step in range(stop + 8):
            if step == stop:
                norms[1] = build(variant).float()
                norms[1].load_state_dict(copy.deepcopy(first.state_dict()))
            x, dy, mask = data(step)
            grads = []
            for norm in filter(None, norms):
                leaf = x.float().requires_grad_()
                loss(norm, norm(leaf, mask), dy.float()).backward()
                grads.append(leaf.grad)
            assert torch.equal(grads[0], grads[-1])
        assert all(torch.equal(a, b) for a, b in zip(*(norm.buffers() for norm in norms)))


@pytest.mark.parametrize("steps", [0, 13, 40])
@pytest.mark.parametrize("groups", [0, 2])
@pytest.mark.parametrize("variant", VARIANTS)
def test_folds(variant, groups, steps):
    """In evaluation the folded norm is the norm to 1e-12; PRepBN is refused by name until LayerNorm is gone."""
    norm = nn.Sequential(build(variant, groups))
    for step in range(steps):
        norm[0](*data(step)[::2])
    norm.eval()
    x = data(99)[0]
    if variant == "prepbn" and steps < 30:
        with pytest.raises(ValueError, match=rf"0: prepbn after {steps} of total_updates=30 steps: .* cannot be folded"):
            fold_norms(norm)
    else:
        torch.testing.assert_close(fold_norms(copy.deepcopy(norm))(x), norm(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("text, message", [
    ("mabn:window=0", "window=0: must be 1 or more steps"),
    ("un:warmup_updates=-1", "warmup_updates=-1: must be zero or a positive number of steps"),
    ("un:rescale_after=-1", "rescale_after=-1: must be zero"),
    ("un:alpha_bkw=2", r"alpha_bkw=2.0: must lie in \[0, 1\]"),
    ("un:masked=no", "masked='no' must be true or false"),
    ("mabn:masked=false", "option 'masked' is unknown; options of 'mabn': eps, alpha_fwd, window"),
    ("rbn:p_mean=-1", "p_mean=-1.0: must be a finite number, 0 or more"),
    ("rbn:p_var=inf", "p_var=inf: must be a finite number"),
    ("rbn:eps=1e39", r"eps=1e\+39: must be a finite number, 0 or more, in float32"),
    ("prepbn", "total_updates=None: must be the number of training steps after which LayerNorm is gone, 1 or more"),
    ("prepbn:total_updates=0", "total_updates=0: must be"),
    ("prepbn:total_updates=5,alpha=nan", "alpha=nan: must be a finite number"),
    ("batch-renorm:r_max=0.5", "r_max=0.5: must be a finite number, 1 or more"),
    ("batch-renorm:d_max=-1", "d_max=-1.0: must be a finite number, 0 or more"),
    ("batch-renorm:d_updates=-1", "d_updates=-1: must be zero or a positive"),
])
def test_wrong_options_are_refused(text, message):
    """The error names the norm, the option, the value and what is valid."""
    with pytest.raises(ValueError, match=f"norm '{text}': .*{message}"):
        build_norm(text, C)


# ---------------------------------------------------------------- the penalty of RBN


class Two(nn.Module):
    """Two regularized norms between linear maps, the second used twice."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        self.linear = nn.Linear(C, C).double()
        self.norms = nn.ModuleList([build("rbn"), build("rbn, post-norm")])

    def part(self, x, mask):
        return self.norms[1](torch.tanh(self.linear(self.norms[1](self.norms[0](self.linear(x), mask), mask))), mask)

    def forward(self, x, mask, reentrant=None):
        if reentrant is None:
            return self.part(x, mask)
        return checkpoint(self.part, x, mask, use_reentrant=reentrant)


def gradients(model, x, mask, dy, reentrant=None, factor=1.0):
    """Of one batch with the penalty, and the penalty's value."""
    model.zero_grad()
    leaf = x.clone().requires_grad_()
    y = model(leaf, mask, reentrant)
    value = penalty(model)
    (((y * dy).sum() + value) * factor).backward()
    return [leaf.grad / factor, *(p.grad / factor for p in model.parameters())], value.detach()


@pytest.mark.parametrize("staged", [False, True])
@pytest.mark.parametrize("reentrant", [True, False])
def test_the_penalty_under_activation_checkpointing(reentrant, staged):
    """Either kind of checkpointing: the value once, the gradients and statistics as without, scaled loss or not."""
    results = []
    for kind in (None, reentrant):
        model = Two()
        statistics = RunningStatistics(model) if staged else None
        found = []
        for step in range(3):
            x, dy, mask = data(step)
            if staged:
                with statistics.batch(gradient_scale=16.0):
                    grads, value = gradients(model, x, mask, dy, kind, 16.0)
                statistics.commit()
            else:
                grads, value = gradients(model, x, mask, dy, kind)
            assert value > 0
            found += [*grads, value]
        results.append(found + list(model.buffers()))
    for one, other in zip(*results):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_the_gradient_of_the_penalty_alone():
    """penalty(model) is differentiable: autograd's gradient of P with the running values held fixed."""
    norm = build("rbn")
    x, _, mask = data(3)
    valid = mask.t().logical_not()
    leaf, other = (x.clone().requires_grad_() for _ in range(2))
    mean, var = other[valid].mean(0), other[valid].var(0, unbiased=False)
    next_mean = 0.95 * norm.running_mean + 0.05 * mean.detach()
    next_var = 0.95 * norm.running_var + 0.05 * var.detach()
    expected = 0.7 * (next_mean - mean).square().sum() + 0.3 * (next_var - var).abs().sum()
    norm(leaf, mask)
    assert norm.iters == 1
    y = norm(leaf, mask)  # its graph keeps a penalty, that of the pass before is gone with its output
    del y
    norm = build("rbn")
    y = norm(leaf, mask)
    found = penalty(norm)
    torch.testing.assert_close(found, expected)
    for each in (found, expected):
        each.backward()
    torch.testing.assert_close(leaf.grad, other.grad)
    assert y.requires_grad and penalty(norm) == 0


def test_nobody_has_to_ask_for_the_penalty():
    """Passes whose penalty is never taken leave none to the next batch, be they differentiated or not."""
    norm = build("rbn")
    x, dy, mask = data(0)
    for _ in range(3):
        norm(x.clone().requires_grad_(), mask)
    assert penalty(norm) == 0
    y = norm(x.clone().requires_grad_(), mask)
    y.backward(dy)
    assert penalty(norm) == 0 and penalty(nn.Linear(2, 2)) == 0
    norm.eval()(x)
    assert penalty(norm) == 0


def test_each_micro_batch_has_its_penalty():
    """Micro-batches: penalty and gradients of each as of a step of its own from the same committed statistics; nothing of
    one is left to the next, and a batch that does not count has none.
    """
    model = Two()
    statistics = RunningStatistics(model)
    for step in range(3):
        x, dy, mask = data(step)
        with statistics.batch(counts=False):
            assert gradients(model, x, mask, dy)[1] == 0
        with statistics.batch():
            model(data(7)[0], mask)  # nobody asks for its penalty
        with statistics.batch():
            grads, value = gradients(model, x, mask, dy)
        alone = Two()
        with RunningStatistics(alone).batch():
            expected, wanted = gradients(alone, x, mask, dy)
        torch.testing.assert_close([*grads, value], [*expected, wanted])


def test_export_with_a_penalty_is_refused():
    """The penalty of an exported graph would be lost: an error that says what to build instead."""
    x, _, mask = batch()
    norm = build_norm("rbn", x.size(-1))
    with pytest.raises(Exception, match="p_mean=0, p_var=0"):
        torch.export.export(norm, (x, mask))
