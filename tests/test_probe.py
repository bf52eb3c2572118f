"""The gradients that leave BN and PN-V: their identities, and what is measured of them along training."""
import json

import pytest
import torch
import toy
from torch import nn

from fairseq_powernorm.masks import padding_mask
from fairseq_powernorm.norms import NORMS, MaskedBatchNorm, PowerNormV, RunningNorm, build_norm
from fairseq_powernorm.probe import GradientProbe, gradient_norms
from fairseq_powernorm.statistics import RunningStatistics

B, C = 40, 6


def rows(seed, mean=0.0):
    """u and dL/dy, B x C in float64, channels of different means and sizes."""
    generator = torch.Generator().manual_seed(seed)
    u, d = torch.randn(2, B, C, generator=generator, dtype=torch.float64).unbind()
    return u * torch.linspace(0.3, 4.0, C, dtype=torch.float64) + mean, d + 0.2


def leaving(norm, u, d):
    """Squared norm, per channel, of the gradient that leaves a norm in training."""
    leaf = u.clone().requires_grad_()
    norm.train()(leaf).backward(d)
    return leaf.grad.square().sum(0)


def weighted(kind, eps):
    norm = kind(C, eps=eps, groups=0, dtype=torch.float64)
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(-1.0, 2.0, C, dtype=torch.float64))
    return norm


@pytest.mark.parametrize("mean", [0.0, 1.0, -3.0])
@pytest.mark.parametrize("seed", range(5))
def test_identity_of_bn(seed, mean):
    """|dX|^2 = (w / sigma)^2 (|d|^2 - <d, 1>^2 / B - <d, xhat>^2 / B) for each channel, with d = dL/dy and eps = 0."""
    u, d = rows(seed, mean)
    norm = weighted(MaskedBatchNorm, 0.0)
    sigma = u.var(0, correction=0).sqrt()
    xhat = (u - u.mean(0)) / sigma
    bracket = d.square().sum(0) - d.sum(0) ** 2 / B - (d * xhat).sum(0) ** 2 / B
    torch.testing.assert_close(leaving(norm, u, d), (norm.weight / sigma).detach() ** 2 * bracket, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("mean", [0.0, 1.0, -3.0])
@pytest.mark.parametrize("seed", range(5))
def test_identity_of_pn_v(seed, mean):
    """|dX|^2 = (w / psi)^2 (|d|^2 - <d, x / psi>^2 / B) for each channel, with d = dL/dy and eps = 0."""
    u, d = rows(seed, mean)
    norm = weighted(PowerNormV, 0.0)
    psi = u.square().mean(0).sqrt()
    bracket = d.square().sum(0) - (d * u / psi).sum(0) ** 2 / B
    torch.testing.assert_close(leaving(norm, u, d), (norm.weight / psi).detach() ** 2 * bracket, rtol=1e-10, atol=1e-10)


def sums_of(u, d):
    return torch.stack([each.sum(0) for each in (u, u.square(), d, d.square(), d * u)])


@pytest.mark.parametrize("eps", [0.0, 1e-5, 0.5])
def test_with_eps(eps):
    """What is computed from sums are the squared norms by autograd, of both norms and any eps; leading dimensions stay."""
    pairs = [rows(seed, mean) for seed, mean in ((0, 0.0), (1, 2.0))]
    found = gradient_norms(torch.stack([sums_of(*each) for each in pairs]), torch.tensor([B, B]), eps)
    for norms, kind in zip(found, (MaskedBatchNorm, PowerNormV)):
        expected = torch.stack([leaving(kind(C, eps=eps, groups=0, dtype=torch.float64), *each) for each in pairs])
        torch.testing.assert_close(norms, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("seed", range(5))
def test_which_is_smaller_depends_on_the_mean(seed):
    """For channels of mean zero PN-V's gradient is never smaller than BN's: it lacks a term. For means of some size, here 3
    deviations, it is.
    """
    u, d = rows(seed)
    centred = u - u.mean(0)
    bn, pn_v = gradient_norms(sums_of(centred, d), torch.tensor(B), 0.0)
    assert (pn_v >= bn * (1 - 1e-12)).all() and (pn_v > bn).any()
    shifted = centred + 3 * centred.std(0)
    bn, pn_v = gradient_norms(sums_of(shifted, d), torch.tensor(B), 0.0)
    assert (pn_v < bn).all()


@pytest.mark.parametrize("kind, which", [("batch", 0), ("power-v", 1)])
@pytest.mark.parametrize("layout", ["time_first", "batch_first", "channels_first"])
@pytest.mark.parametrize("attached", [False, True])
def test_measured_at_a_norm(kind, which, layout, attached):
    """Where BN or PN-V itself stands, what is measured of it is the gradient that leaves it: with a mask, given to the norm
    or attached to the model, in any layout, with a loss scale; its ratio to the other is that of the identities.
    """
    norm = build_norm(kind, C, groups=0, layout=layout, dtype=torch.float64)
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(0.5, 2.0, C))
    u, d = (each.view(10, 4, C) for each in rows(0, 0.7))
    mask = torch.arange(10).unsqueeze(0) >= torch.tensor([[10], [7], [3], [9]])
    order = {"time_first": (0, 1, 2), "batch_first": (1, 0, 2), "channels_first": (1, 2, 0)}[layout]
    statistics = RunningStatistics(norm)
    probe = GradientProbe(statistics.norms(), statistics.total)
    probe.begin()
    leaf = u.clone().requires_grad_()
    d = d.masked_fill(mask.t().unsqueeze(-1), 0.0)
    with statistics.batch(gradient_scale=8.0), padding_mask(norm, mask if attached else None):
        norm(leaf.permute(order), None if attached else mask).backward(8.0 * d.permute(order))
    valid = mask.t().logical_not()
    bn, pn_v = gradient_norms(sums_of(u[valid], d[valid] * norm.weight.detach()), valid.sum(), norm.eps)
    torch.testing.assert_close((leaf.grad / 8.0).square().sum((0, 1)), (bn, pn_v)[which])
    found = probe.describe()[""]
    assert found["gradient_ratio"] == pytest.approx(float((pn_v.sum() / bn.sum()).sqrt()))
    assert found["gradient_smaller"] == pytest.approx(float((pn_v < bn).double().mean()))


@pytest.mark.parametrize("name", [name for name, kind in NORMS.items() if issubclass(kind, RunningNorm)])
def test_any_norm_can_be_measured(name):
    """Sums over micro-batches, after the layer scale; gathering changes no bit of training, and leaves nothing behind."""
    results = []
    for probed in (False, True):
        torch.manual_seed(0)
        norm = build_norm(name, 8, groups=2, **getattr(NORMS[name], "REQUIRED", {}))
        model = nn.Sequential(nn.Linear(8, 8), norm, nn.ReLU(inplace=True), nn.Linear(8, 8)).double()
        statistics = RunningStatistics(model)
        probe = GradientProbe(statistics.norms(), statistics.total)
        inputs = torch.randn(3, 20, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        if probed:
            probe.begin()
        for part, counts in zip(inputs, (True, True, False)):
            with statistics.batch(counts=counts):
                model(part).square().sum().backward()
        found = probe.describe()
        statistics.commit()
        probe.end()
        results.append([p.grad for p in model.parameters()] + list(model.buffers()))
        assert set(found) == ({"1"} if probed else set()) and not probe.describe()
        assert not model[1]._forward_hooks
    assert all(torch.equal(one, other) for one, other in zip(*results))
    assert 0.1 < found["1"]["gradient_ratio"] < 10 and 0 <= found["1"]["gradient_smaller"] <= 1


@pytest.mark.slow
def test_a_record_of_training(toy_data, tmp_path):
    """fairseq-train --norm-record writes discrepancies, the ratio and nu at each norm, at the updates that are recorded."""
    places = [word for place in toy.ALL_POWER for word in (f"--{place.replace('_', '-')}", "power")]
    record = tmp_path / "record"
    toy.command(
        "fairseq-train", toy_data, "--user-dir", "fairseq_powernorm", "--task", "translation_pn",
        "--arch", "transformer_pn_tiny", "--encoder-layers", 1, "--decoder-layers", 1,
        "--encoder-embed-dim", 32, "--decoder-embed-dim", 32, *places,
        "--optimizer", "adam", "--lr", 0.005, "--max-tokens", 200, "--update-freq", 2, "--max-update", 6, "--cpu",
        "--num-workers", 0, "--data-buffer-size", 0, "--disable-validation", "--no-save", "--norm-record", record,
        "--norm-record-interval", 3,
    )  # fmt: skip
    found = [json.loads(line) for line in record.read_text().splitlines()]
    assert {row["update"] for row in found} == {3, 6} and len(found) == 14
    for row in found:
        assert row["discrepancy_std"] > 0 and 0 < row["gradient_ratio"] < 10 and 0 <= row["gradient_smaller"] <= 1
        assert 0 <= row["nu_largest"] < float("inf")
