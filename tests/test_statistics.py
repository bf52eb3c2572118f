"""The statistics engine at layer level, in float64: one step per training step, however the batch is cut."""
import copy
import math
from datetime import timedelta
from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.utils.checkpoint
from torch import multiprocessing, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from fairseq_powernorm.norms import (
    BatchRenorm,
    MaskedBatchNorm,
    MovingAverageBatchNorm,
    PowerNorm,
    PowerNormV,
    ProgressiveBatchNorm,
    RegularizedBatchNorm,
    UnifiedNorm,
    build_norm,
    penalty,
)
from fairseq_powernorm.statistics import RunningStatistics, running_norms

C = 8
KINDS = {
    "batch": lambda **o: MaskedBatchNorm(C, groups=2, **o),
    "power-v": lambda **o: PowerNormV(C, groups=2, **o),
    "reference": lambda **o: PowerNorm(C, groups=2, warmup_updates=4, **o),
    "algorithm2": lambda **o: PowerNorm(C, groups=2, variant="algorithm2", **o),
    "batch-renorm": lambda **o: BatchRenorm(C, groups=2, warmup_updates=2, r_updates=4, d_updates=4, **o),
    "mabn": lambda **o: MovingAverageBatchNorm(C, groups=2, window=2, warmup_updates=3, rescale_after=4, **o),
    "un": lambda **o: UnifiedNorm(C, groups=2, window=2, warmup_updates=3, rescale_after=4, **o),
    "un-outliers": lambda **o: UnifiedNorm(C, groups=0, window=2, warmup_updates=1, filter_outliers=True, **o),
    "rbn": lambda **o: RegularizedBatchNorm(C, groups=2, **o),
    "prepbn": lambda **o: ProgressiveBatchNorm(C, groups=2, total_updates=6, **o),
}
EXACT = dict(rtol=1e-10, atol=1e-12)


def stack(kind, layers=2):
    """Two norms with a linear map between them, as float64, parameters and statistics away from their initial values."""
    torch.manual_seed(0)
    modules = []
    for _ in range(layers):
        norm = KINDS[kind]()
        with torch.no_grad():
            for name, tensor in norm.state_dict().items():
                if name != "iters":
                    tensor.copy_(torch.rand(tensor.shape) + 0.5)
        modules += [norm, nn.Linear(C, C)]
    return nn.ModuleList(modules).double().train()


def run(model, x, mask):
    """The model's output for x (T x B x C) and mask (B x T); no gradient arrives at padding, as in a Transformer."""
    for module in model:
        x = module(x, mask) if not isinstance(module, nn.Linear) else module(x)
    return (x * mask.t().logical_not().unsqueeze(-1)).pow(3).sum() + penalty(model)


def data(step, sentences=4, length=5, padding=True):
    """x and mask of one large batch."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(length, sentences, C, generator=generator, dtype=torch.float64) * 2 + 0.3
    lengths = (
        torch.randint(1, length + 1, (sentences,), generator=generator) if padding else torch.full((sentences,), length)
    )
    return x, torch.arange(length).unsqueeze(0) >= lengths.unsqueeze(1)


def train(model, cut, steps=8, statistics=None, scale=1.0, padding=True):
    """Gradient descent in which each large batch is cut into ``cut`` micro-batches."""
    for step in range(steps):
        model.zero_grad()
        x, mask = data(step, padding=padding)
        for part, part_mask in zip(x.chunk(cut, dim=1), mask.chunk(cut)):
            if statistics is None:
                run(model, part, part_mask).backward()
            else:
                with statistics.batch(gradient_scale=scale):
                    (run(model, part, part_mask) * scale).backward()
        if statistics is not None:
            statistics.commit()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 1e-5 * parameter.grad / scale
    return model


def assert_same(one, other, **tolerance):
    """Parameters and buffers agree."""
    for (name, a), b in zip(one.state_dict().items(), other.state_dict().values()):
        torch.testing.assert_close(a, b, **(tolerance or dict(rtol=0, atol=0)), msg=lambda m: f"{name}: {m}")


@pytest.mark.parametrize("kind", KINDS)
def test_one_batch_per_step_is_what_the_norms_do_by_themselves(kind):
    """A step of one batch: parameters, buffers and step counts are those of norms that apply their own statistics."""
    alone = train(stack(kind), 1)
    staged = stack(kind)
    train(staged, 1, statistics=RunningStatistics(staged))
    assert_same(alone, staged, **EXACT)
    assert staged[0].iters == 8 and staged[0].steps() == 8


@pytest.mark.parametrize("cut", [2, 4])
def test_micro_batches_equal_one_large_batch(cut):
    """PN of Algorithm 2: k micro-batches of unequal token counts give the gradients and statistics of one batch."""
    models = [stack("algorithm2"), stack("algorithm2")]
    for model, pieces in zip(models, (1, cut)):
        train(model, pieces, statistics=RunningStatistics(model))
    assert_same(*models, **EXACT)


@pytest.mark.parametrize("kind", KINDS)
def test_statistics_of_micro_batches_are_pooled(kind):
    """Any norm that receives the same rows in k micro-batches takes the step of one batch: psi^2, mean and variance."""
    models = [stack(kind, layers=1), stack(kind, layers=1)]
    for model, pieces in zip(models, (1, 4)):
        train(model, pieces, steps=1, statistics=RunningStatistics(model))
    for name in ("running_phi", "running_mean", "running_var", "iters"):
        if hasattr(models[0][0], name):
            torch.testing.assert_close(getattr(models[0][0], name), getattr(models[1][0], name), **EXACT)


def test_without_the_engine_micro_batches_change_the_statistics():
    """The engine makes the difference: norms that apply each batch by themselves take k steps."""
    assert train(stack("algorithm2"), 4)[0].iters == 32


@pytest.mark.parametrize("kind", ["reference", "algorithm2"])
@pytest.mark.parametrize("scale", [2.0**15, 1000.0, torch.tensor(3.0)])
def test_the_gradient_scale_is_taken_out_of_nu(kind, scale):
    """A scaled loss gives the gradients, up to the scale, and the nu of the plain one; a number or a tensor."""
    models = [stack(kind), stack(kind)]
    for model, factor in zip(models, (1.0, scale)):
        train(model, 1, statistics=RunningStatistics(model), scale=factor)
    assert_same(*models, **EXACT)


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_that_does_not_count_leaves_nothing(kind):
    """A dummy batch: no statistics, and zero gradient everywhere where the loss is multiplied by zero."""
    model = stack(kind)
    statistics = RunningStatistics(model)
    train(model, 1, steps=2, statistics=statistics)
    before = copy.deepcopy(model.state_dict())
    model.zero_grad()
    x, mask = data(9)
    x.requires_grad_()
    with statistics.batch(counts=False):
        (run(model, x, mask) * 0).backward()
    assert not x.grad.any() and not any(p.grad.any() for p in model.parameters())
    assert statistics.batches == 0
    statistics.commit()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("kind", KINDS)
def test_discarded_and_uncounted_passes_change_nothing(kind):
    """A step thrown away, a refused pass outside of a step and evaluation leave every buffer bit-identical."""
    model = stack(kind)
    statistics = RunningStatistics(model)
    train(model, 1, steps=3, statistics=statistics)
    before = copy.deepcopy(model.state_dict())
    with statistics.batch():
        run(model, *data(5)).backward()
    statistics.discard()
    with pytest.raises(RuntimeError, match=r"a forward pass in training outside of RunningStatistics.batch\(\)"):
        run(model, *data(6)).backward()
    model.eval()
    run(model, *data(7))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    statistics.commit()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("kind", KINDS)
def test_an_exception_in_a_batch_leaves_nothing_of_it(kind):
    """Out of memory in the middle of a micro-batch: what was gathered before it stays, of it nothing."""
    models = [stack(kind), stack(kind)]
    for model, fails in zip(models, (False, True)):
        statistics = RunningStatistics(model)
        with statistics.batch():
            run(model, *data(0)).backward()
        if fails:
            with pytest.raises(RuntimeError, match="out of memory"), statistics.batch():
                run(model, *data(1)).backward()
                raise RuntimeError("out of memory")
        statistics.commit()
    assert_same(*models)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e200])
def test_a_batch_that_is_not_finite_is_left_out_and_counted(kind, bad):
    """One of two micro-batches is not finite (or its squares are not): the statistics are the other's, and it is named."""
    models = [stack(kind, layers=1), stack(kind, layers=1)]
    for model, with_bad in zip(models, (False, True)):
        model[0].groups = 0
        statistics = RunningStatistics(model)
        with statistics.batch():
            run(model, *data(0)).backward()
        if with_bad:
            x, mask = data(1)
            x[0, 0, 3] = bad
            with statistics.batch():
                run(model, x, mask).backward()
        left_out = statistics.reduce()
        assert list(left_out) == (["0"] if with_bad else []) and all(left_out.values())
        statistics.commit()
        assert statistics.left_out() == {}
    for name, buffer in models[0][0].named_buffers():
        assert torch.isfinite(buffer).all()
        torch.testing.assert_close(buffer, models[1][0].get_buffer(name), rtol=0, atol=0)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_recomputation_counts_once(kind, use_reentrant):
    """Activation checkpointing, two micro-batches: bit-identical parameters and buffers."""
    models = [stack(kind), stack(kind)]
    for model, checkpointed in zip(models, (False, True)):
        statistics = RunningStatistics(model)
        for step in range(6):
            model.zero_grad()
            x, mask = data(step)
            for part, part_mask in zip(x.chunk(2, dim=1), mask.chunk(2)):
                part = part.clone().requires_grad_()
                with statistics.batch():
                    if checkpointed:
                        loss = torch.utils.checkpoint.checkpoint(run, model, part, part_mask, use_reentrant=use_reentrant)
                    else:
                        loss = run(model, part, part_mask)
                    loss.backward()
            statistics.commit()
    assert_same(*models)


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_that_did_not_run_takes_no_step(kind):
    """LayerDrop: the norm that was left out keeps its buffers and step count, the other takes its step."""
    model = stack(kind)
    statistics = RunningStatistics(model)
    train(model, 1, steps=2, statistics=statistics)
    before = copy.deepcopy(model[2].state_dict())
    with statistics.batch():
        run(model[:2], *data(3)).backward()
    statistics.commit()
    assert all(torch.equal(before[name], value) for name, value in model[2].state_dict().items())
    assert [model[i].steps() for i in (0, 2)] == [3, 2] and model[0].iters == 3


@pytest.mark.parametrize("kind", KINDS)
def test_a_norm_used_twice_takes_one_step_of_both(kind):
    """A shared norm: its step is that of one batch of both inputs' rows."""
    model = stack(kind, layers=1)
    other = copy.deepcopy(model)
    x, mask = data(0)
    together, apart = RunningStatistics(other), RunningStatistics(model)
    with together.batch():
        other[0](x, mask)
    together.commit()
    with apart.batch():
        for part, part_mask in zip(x.chunk(2, dim=1), mask.chunk(2)):
            model[0](part, part_mask)
    apart.commit()
    for name, buffer in other[0].named_buffers():
        torch.testing.assert_close(model[0].get_buffer(name), buffer, **EXACT)


def test_norms_of_several_kinds_and_sizes_in_one_model():
    """Each norm takes the step that it would take alone, whatever stands beside it in the vector of sums."""
    def build():
        torch.manual_seed(0)
        return nn.ModuleList(
            build_norm(name, dim, groups=groups, variant=variant, warmup_updates=2)
            for name, dim, groups, variant in [
                ("power", 8, 1, "reference"), ("batch", 6, 0, "reference"), ("layer", 8, 1, "reference"),
                ("power", 8, 1, "reference"), ("power", 4, 2, "algorithm2"), ("power-v", 6, 1, "reference"),
            ]
        ).double()
    alone, staged = build(), build()
    statistics = RunningStatistics(staged)
    assert sorted(running_norms(staged)) == ["0", "1", "3", "4", "5"]
    for step in range(4):
        for model in (alone, staged):
            generator = torch.Generator().manual_seed(step)
            with statistics.batch():
                for norm, dim in zip(model, (8, 6, 8, 8, 4, 6)):
                    x = torch.randn(7, dim, dtype=torch.float64, generator=generator, requires_grad=True)
                    norm(x).pow(3).sum().backward()
        statistics.commit()
    for (name, a), b in zip(alone.named_buffers(), staged.buffers()):
        torch.testing.assert_close(a, b, **EXACT, msg=name)


def test_buffers_keep_float32_and_sums_do_not_overflow():
    """A half-precision model with the engine: float32 statistics equal to those of the float32 model's rounded input."""
    def steps(dtype):
        torch.manual_seed(0)
        model = nn.ModuleList([PowerNorm(C, groups=0, variant="algorithm2")]).to(dtype)
        statistics = RunningStatistics(model)
        generator = torch.Generator().manual_seed(0)
        for _ in range(5):
            x = (torch.randn(5000, C, generator=generator) * 20).half()
            g = torch.randn(5000, C, generator=generator).half()
            with statistics.batch():
                model[0](x.to(dtype).requires_grad_()).backward(g.to(dtype))
            statistics.commit()
        return model[0]
    half, single = steps(torch.float16), steps(torch.float32)
    assert half.running_phi.dtype == torch.float32
    for name in ("running_phi", "ema_gz"):
        torch.testing.assert_close(getattr(half, name), getattr(single, name), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_is_on_its_own(kind):
    """deepcopy (as moving averages of a model make it) while the engine is at work: the copy applies its statistics
    itself.
    """
    model = stack(kind)
    statistics = RunningStatistics(model)
    other = copy.deepcopy(model)
    assert other[0].stage is None and model[0].stage is not None
    run(other, *data(0)).backward()
    assert other[0].iters == 1 and model[0].iters == 0
    statistics.release()
    run(model, *data(0)).backward()
    assert_same(model, other)


def test_unknown_sync_is_named():
    """ValueError naming the value and the choices."""
    with pytest.raises(ValueError, match="sync='always': must be one of off, step, exact"):
        RunningStatistics(stack("batch"), sync="always")


# ---------------------------------------------------------------- what the recorder writes


def through_statistics(norm, x, dy, parts):
    """Terms of dL/du by autograd: the gradient through each of the batch's statistics, as a root mean square over rows."""
    u = x.clone().requires_grad_()
    statistics = {name: part(u.detach()).requires_grad_() for name, part in parts.items()}
    (norm(u, statistics) * dy).sum().backward()
    found = {}
    for name, part in parts.items():
        (grad_u,) = torch.autograd.grad(part(u), u, statistics[name].grad)
        found[name] = grad_u.square().sum(1).mean().sqrt()
    return found


@pytest.mark.parametrize("scale", [1.0, 64.0])
@pytest.mark.parametrize("kind", ["batch", "power-v"])
def test_recorded_gradient_terms_are_those_of_autograd(kind, scale):
    """gradient_mean, gradient_var, gradient_psi2: norms of the terms that autograd sends through each statistic."""
    norm = {"batch": MaskedBatchNorm, "power-v": PowerNormV}[kind](C, groups=0).double()
    with torch.no_grad():
        norm.weight.copy_(torch.rand(C) + 0.5)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, C, generator=generator, dtype=torch.float64) * 2 + 0.5
    dy = torch.randn(50, C, generator=generator, dtype=torch.float64)
    statistics = RunningStatistics(nn.ModuleList([norm]))
    statistics.switches.recording = True
    with statistics.batch(gradient_scale=scale):
        norm(x.clone().requires_grad_()).backward(dy * scale)
    statistics.reduce()
    found = statistics.describe()["0"]
    w, b, eps = norm.weight.detach(), norm.bias.detach(), norm.eps
    if kind == "batch":
        # the variance about a mean that is held fixed: at the batch mean its derivative in the mean is zero
        mean = x.mean(0)
        parts = {"mean": lambda u: u.mean(0), "var": lambda u: (u - mean).square().mean(0)}
        expected = through_statistics(
            lambda u, s: w * (u - s["mean"]) / (s["var"] + eps).sqrt() + b, x, dy, parts
        )
        assert found["distance_mean"] == pytest.approx(float((x.mean(0) - norm.running_mean).norm() / C))
        assert found["distance_var"] == pytest.approx(float((x.var(0, unbiased=False) - norm.running_var).norm() / C))
        assert found["size_var"] == pytest.approx(float(norm.running_var.norm() / C))
    else:
        parts = {"psi2": lambda u: u.square().mean(0)}
        expected = through_statistics(lambda u, s: w * u / (s["psi2"] + eps).sqrt() + b, x, dy, parts)
        assert found["distance_psi2"] == pytest.approx(float((x.square().mean(0) - norm.running_phi).norm() / C))
    for name, value in expected.items():
        assert found[f"gradient_{name}"] == pytest.approx(float(value), rel=1e-9)


@pytest.mark.parametrize("variant", ["reference", "algorithm2"])
def test_recorded_term_of_nu_is_that_of_the_gradient(variant):
    """gradient_nu: the difference that nu makes to dL/dx, as a root mean square over rows (no layer scale)."""
    norm = PowerNorm(C, groups=0, variant=variant, warmup_updates=0).double()
    with torch.no_grad():
        norm.running_phi.copy_(torch.rand(C) + 0.5)
        norm.ema_gz.copy_(torch.rand(C))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, C, generator=generator, dtype=torch.float64)
    dy = torch.randn(50, C, generator=generator, dtype=torch.float64)

    def gradient(norm):
        u = x.clone().requires_grad_()
        norm(u).backward(dy)
        return u.grad
    without = copy.deepcopy(norm)
    without.ema_gz.zero_()
    expected = (gradient(copy.deepcopy(norm)) - gradient(without)).square().sum(1).mean().sqrt()
    statistics = RunningStatistics(nn.ModuleList([norm]))
    with statistics.batch():
        gradient(norm)
    statistics.reduce()
    assert statistics.describe()["0"]["gradient_nu"] == pytest.approx(float(expected), rel=1e-9)


# ---------------------------------------------------------------- two processes


def begin(rank, work, folder):
    """One of the processes: what ``work`` returns in the first is kept in the folder."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=timedelta(seconds=120)
    )
    found = work(rank)
    if rank == 0:
        torch.save(found, folder / "found")
    dist.barrier()
    dist.destroy_process_group()


def two_ranks(work, folder):
    """What ``work(rank)``, carried out in two processes joined by gloo, returns in the first."""
    # a fork has torch loaded already, but CUDA does not survive it
    method = "spawn" if torch.cuda.is_available() else "fork"
    multiprocessing.start_processes(begin, (work, folder), 2, start_method=method)
    return torch.load(folder / "found")


def train_rank(rank, kind, sync, padding):
    """Each rank has half of the sentences of each batch; at every third step the second has a dummy batch."""
    model = stack(kind)
    statistics = RunningStatistics(model, sync)
    for step in range(8):
        model.zero_grad()
        x, mask = data(step, padding=padding)
        counts = not (rank == 1 and step % 3 == 2)
        with statistics.batch(counts=counts):
            (run(model, x.chunk(2, 1)[rank], mask.chunk(2)[rank]) * counts).backward()
        for parameter in model.parameters():
            dist.all_reduce(parameter.grad)
        statistics.commit()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 1e-5 * parameter.grad
    return model


def train_whole(kind, padding):
    """The same in one process: without the half that was a dummy batch."""
    model = stack(kind)
    statistics = RunningStatistics(model, "off")
    for step in range(8):
        model.zero_grad()
        x, mask = data(step, padding=padding)
        if step % 3 == 2:
            x, mask = x.chunk(2, 1)[0], mask.chunk(2)[0]
        with statistics.batch():
            run(model, x, mask).backward()
        statistics.commit()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 1e-5 * parameter.grad
    return model


def difference(a, b):
    return max(float((p - q).abs().max() / q.abs().max()) for p, q in zip(a.state_dict().values(), b.state_dict().values()))


def equal_on_both(model):
    whole = torch.cat([t.reshape(-1) for t in model.state_dict().values()])
    both = [torch.empty_like(whole) for _ in range(2)]
    dist.all_gather(both, whole)
    return torch.equal(*both)


TWO_RANKS = [
    ("batch", "exact", True), ("power-v", "exact", True), ("reference", "exact", False), ("algorithm2", "exact", True),
    ("algorithm2", "step", True), ("batch", "step", True), ("power-v", "step", True), ("reference", "step", False),
    ("algorithm2", "off", True),
    *((kind, sync, True) for sync in ("exact", "step")
      for kind in ("batch-renorm", "mabn", "un", "un-outliers", "rbn", "prepbn")),
]  # fmt: skip


def compare_with_one(rank):
    """(kind, sync) -> how far two ranks are from one process, and whether they are the same."""
    found = {}
    for kind, sync, padding in TWO_RANKS:
        model = train_rank(rank, kind, sync, padding)
        found[kind, sync] = difference(model, train_whole(kind, padding)), equal_on_both(model)
    return found


@pytest.mark.slow
def test_two_ranks_equal_one_batch(tmp_path):
    """Two processes, each with half of every batch, one of them sometimes with a dummy batch: parameters and buffers of
    one process to 1e-10, identical on both. All norms with ``exact`` from the first step (``reference``, which counts
    padding in nu, without padding), Algorithm 2 with ``step``; and where that is not promised, they differ.
    """
    found = two_ranks(compare_with_one, tmp_path)
    assert len(found) == 21
    for (kind, sync), (difference, same) in found.items():
        assert same == (sync != "off"), (kind, sync)
        if sync == "exact" or (kind, sync) == ("algorithm2", "step"):
            assert difference < 1e-10, (kind, sync, difference)
        else:
            assert difference > 1e-6, (kind, sync, difference)


def count_reductions(rank):
    """sync -> number of all-reduces of a step with two micro-batches."""
    found, calls, all_reduce = {}, [], dist.all_reduce
    for sync in ("off", "step", "exact"):
        model = stack("reference")
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(dist, "all_reduce", lambda *words, **more: (calls.append(1), all_reduce(*words, **more)))
            train(model, 2, steps=1, statistics=RunningStatistics(model, sync))
        found[sync] = len(calls)
        calls.clear()
    return found


@pytest.mark.slow
def test_one_all_reduce_per_step(tmp_path):
    """With ``step`` two micro-batches cost one all-reduce for all norms together, with ``off`` none."""
    # exact: two norms, two micro-batches, one reduction in each forward pass
    assert two_ranks(count_reductions, tmp_path) == {"off": 0, "step": 1, "exact": 5}


def test_a_step_is_reduced_once():
    """A second reduce() changes nothing and says the same; a batch after it is refused until the step is over."""
    model = stack("algorithm2")
    statistics = RunningStatistics(model)
    added = []
    statistics._shared, statistics._group = True, None
    with pytest.MonkeyPatch.context() as patched:  # two ranks with the same batches
        patched.setattr(torch.distributed, "all_reduce", lambda vector, group: (added.append(1), vector.mul_(2)))
        with statistics.batch():
            run(model, *data(0)).backward()
        assert statistics.reduce() == statistics.reduce() == {}
        with pytest.raises(RuntimeError, match="the step has been reduced.* then commit"), statistics.batch():
            pass
        statistics.commit()
        with statistics.batch():
            pass
    assert len(added) == 1


@pytest.mark.parametrize("name, option, value", [
    ("power-v", "alpha_fwd", 0.5), ("power", "alpha_bkw", 0.5), ("batch", "alpha_fwd", 0.5), ("mabn", "alpha_fwd", 0.5),
])
def test_settings_may_change_between_steps(name, option, value):
    """That of one norm alone: each norm takes its own steps."""
    models = [nn.Sequential(*(build_norm(name, C) for _ in range(3))) for _ in range(2)]
    statistics = RunningStatistics(models[0])
    for model in models:
        setattr(model[1], option, value)
    x = data(0)[0].float()
    for scale in (1.0, 3.0, 5.0):
        with statistics.batch():
            (models[0](scale * x).square().sum()).backward()
        statistics.reduce()
        assert list(statistics.describe()) == ["0", "1", "2"]
        statistics.commit()
        (models[1](scale * x).square().sum()).backward()
    assert_same(*models)


def test_others_who_have_taken_over_stay():
    """release() a second time leaves alone whoever has the norms by then."""
    model = stack("batch")
    first = RunningStatistics(model)
    first.release()
    RunningStatistics(model)
    first.release()
    assert all(norm.stage is not None for norm in running_norms(model).values())


def test_norms_on_several_devices_are_refused():
    """With a norm of each."""
    with pytest.raises(ValueError, match="0 on cpu, 1 on meta"):
        RunningStatistics(nn.Sequential(build_norm("power", C), build_norm("batch", C, device="meta")))


def test_a_step_in_the_middle_of_a_batch_is_refused():
    """Its sums would count in the next step; the batch, and the step after it, are as if nobody had asked."""
    norm = KINDS["batch"]()
    statistics = RunningStatistics(norm)
    with statistics.batch():
        norm(data(0)[0])
        for step in (statistics.reduce, statistics.commit, statistics.replace):
            with pytest.raises(RuntimeError, match=r"commit\(\) after the 'with statistics.batch\(\):' block"):
                step()
    statistics.commit()
    assert norm.iters == 1


@pytest.mark.parametrize("name, option, value", [("batch", "variant", "reference"), ("un", "filter_outliers", True)])
def test_a_setting_that_needs_other_sums(name, option, value):
    """It is refused in the next pass, with what is to be done."""
    norm = build_norm(name, C)
    statistics = RunningStatistics(norm)
    setattr(norm, option, value)
    with pytest.raises(RuntimeError, match="one of its settings was changed.*make new ones"), statistics.batch():
        norm(data(0)[0].float().requires_grad_()).sum().backward()
    statistics.release()
    with RunningStatistics(norm).batch():
        norm(data(0)[0].float().requires_grad_()).sum().backward()


@pytest.mark.parametrize("how", ["released", "copied"])
def test_norms_that_are_in_nobodys_charge(how):
    """Statistics that are released, or copied along with a model, say so, as their norms take their steps by themselves."""
    norm = KINDS["batch"]()
    statistics = RunningStatistics(norm)
    if how == "copied":
        norm, statistics = copy.deepcopy((norm, statistics))
    else:
        statistics.release()
    with pytest.raises(RuntimeError, match="not in its charge"), statistics.batch():
        pass
    with RunningStatistics(norm).batch():
        norm(data(0)[0])


@pytest.mark.parametrize(
    "option, value",
    [*(("gradient_scale", value) for value in (None, "8", torch.ones(2), 0.0, math.inf, math.nan)), ("counts", "false")],
)
def test_what_a_batch_cannot_take(option, value):
    """A scale is one number by which can be divided, and counts a bool: by name and value, before the batch."""
    statistics = RunningStatistics(KINDS["reference"]())
    with pytest.raises(ValueError, match=f"{option}=.*: must be"), statistics.batch(**{option: value}):
        pass
    assert not statistics.switches.open


def test_a_part_that_is_called_module():
    """Names lose what wrappers put before them, unless two norms would have the same."""
    model = nn.Sequential(build_norm("power", C))
    model.module = nn.Sequential(build_norm("power", C))
    statistics = RunningStatistics(model)
    assert list(statistics.norms()) == ["0", "module.0"]
    with statistics.batch():
        model(data(0)[0].float())
    assert statistics.passes() == {"0": 1.0, "module.0": 1.0}
    assert list(RunningStatistics(nn.DataParallel(nn.Sequential(build_norm("power", C)))).norms()) == ["0"]
    wrapped = nn.Sequential(checkpoint_wrapper(nn.Sequential(build_norm("power", C))))
    assert list(RunningStatistics(nn.DataParallel(torch.compile(wrapped))).norms()) == ["0.0"]


def test_classes_of_one_name_are_kept_apart():
    """Two classes whose norms print alike and step otherwise: each by its own rule, however they are arranged."""

    def doubled():
        class PowerNormV(KINDS["power-v"]().__class__):
            def advance(self, part, state, sums, alpha_fwd):
                return {name: 2 * value for name, value in super().advance(part, state, sums, alpha_fwd).items()}

        return PowerNormV(C)

    for order in ((0, 1), (1, 0)):
        norms = [type(KINDS["power-v"]())(C), doubled()]
        assert repr(norms[0]) == repr(norms[1])
        statistics = RunningStatistics(nn.ModuleList([norms[i] for i in order]))
        with statistics.batch():
            for norm in norms:
                norm(data(0)[0].float())
        statistics.commit()
        assert norms[0].iters == 1 and norms[1].iters == 2
        torch.testing.assert_close(2 * norms[0].running_phi, norms[1].running_phi)


def test_norms_are_taken_over_once():
    """A second RunningStatistics for the same norms is refused until the first has released them; so is a batch in a
    batch.
    """
    model = stack("algorithm2")
    statistics = RunningStatistics(model)
    with pytest.raises(ValueError, match=r"taken this norm over already; release\(\) them first"):
        RunningStatistics(model)
    with pytest.raises(RuntimeError, match="a batch is in progress already"), statistics.batch(), statistics.batch():
        pass
    statistics.release()
    RunningStatistics(model)


@pytest.mark.parametrize("kind", KINDS)
def test_a_backward_pass_outside_of_its_batch_is_refused(kind):
    """Forward inside, backward outside: nothing would be counted, and PN would send back a gradient without nu."""
    model = stack(kind)
    statistics = RunningStatistics(model)
    with statistics.batch():
        loss = run(model, *data(0))
    with pytest.raises(RuntimeError, match=r"a backward pass in training outside of RunningStatistics.batch\(\)"):
        loss.backward()


def test_settings_that_are_no_numbers_of_python_keep_norms_apart():
    """Norms that differ in such a number only take the steps of their own: the same as with Python's numbers."""
    found = []
    for number in (np.float32, torch.tensor, Fraction, float):
        model = nn.Sequential(*(MaskedBatchNorm(2) for _ in range(2)))
        for norm, alpha in zip(model, (0.25, 0.75)):
            norm.alpha_fwd = number(alpha)
        statistics = RunningStatistics(model)
        with statistics.batch():
            model(torch.arange(8.0).view(4, 2))
        statistics.commit()
        found.append([norm.running_mean for norm in model])
    for each in found[:-1]:
        torch.testing.assert_close(each, found[-1])


def test_a_gradient_scale_of_each_batch_is_not_kept():
    """A loop that weights each micro-batch otherwise takes no more memory the longer it runs."""
    norm = KINDS["reference"]()
    statistics, sizes = RunningStatistics(norm), set()
    for scale in (1.0, 0.5, 0.25, 0.125):
        with statistics.batch(gradient_scale=scale):
            norm(data(0)[0]).sum().backward()
        sizes.add(len(norm._constants))
    assert len(sizes) == 1
