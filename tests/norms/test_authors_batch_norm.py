"""MaskedBatchNorm(variant="reference"): the authors' batch normalization."""
import numpy
import pytest
import torch
from norm_cases import C, batch

from fairseq_powernorm.norms import MaskedBatchNorm, build_norm, parse_norm
from fairseq_powernorm.statistics import RunningStatistics


def assert_golden(found, golden, tolerance):
    golden = torch.from_numpy(golden)
    assert float((found - golden).abs().max() / golden.abs().max()) <= tolerance


@pytest.mark.parametrize("staged", [False, True])
@pytest.mark.parametrize("dtype, name, tolerance", [(torch.float64, "f64", 1e-12), (torch.float32, "f32", 2e-6)])
@pytest.mark.parametrize("masked", [0, 1])
def test_golden_traces(oracle, masked, dtype, name, tolerance, staged):
    """Output, gradients, running statistics of ten steps, then evaluation with a mask; alone and by RunningStatistics."""
    trace = numpy.load(oracle / "layers" / f"syncbn_m{masked}.npz")
    norm = MaskedBatchNorm(C, variant="reference").to(dtype)
    statistics = RunningStatistics(norm) if staged else None
    with torch.no_grad():
        norm.weight.copy_(torch.from_numpy(trace["weight"]))
        norm.bias.copy_(torch.from_numpy(trace["bias"]))
    for step in range(10):
        x, g = (torch.from_numpy(trace[key][step]).to(dtype) for key in ("x", "g"))
        mask = torch.from_numpy(trace["pad_mask"][step]) if masked else None
        x.requires_grad_()
        norm.zero_grad()
        if staged:
            with statistics.batch():
                y = norm(x, mask)
                y.backward(g)
            statistics.commit()
        else:
            y = norm(x, mask)
            y.backward(g)
        found = {"out": y, "gx": x.grad, "gw": norm.weight.grad, "gb": norm.bias.grad}
        found.update(running_mean=norm.running_mean, running_var=norm.running_var)
        for key, value in found.items():
            assert_golden(value.detach(), trace[f"{name}_{key}"][step], tolerance)
    norm.eval()
    x = torch.from_numpy(trace["x_eval"]).to(dtype)
    y = norm(x, torch.from_numpy(trace["pad_mask_eval"]) if masked else None)
    assert_golden(y.detach(), trace[f"{name}_eval_out"], tolerance)


def test_its_defaults_are_the_authors():
    """Momentum 0.05 and one group for the whole row, whatever the model's heads; by name, too."""
    norm = build_norm("batch:variant=reference", C)
    assert (norm.variant, norm.alpha_fwd, norm.groups) == ("reference", 0.95, 1)
    assert MaskedBatchNorm.default_groups(8, variant="reference") == 1 and MaskedBatchNorm.default_groups(8) == 8
    assert parse_norm("batch:variant=reference") == ("batch", {"variant": "reference"})


def test_without_padding_it_is_batch_norm_of_the_layer_scaled_rows():
    """Ten steps and the evaluation equal torch.nn.BatchNorm1d(momentum=0.05) on u."""
    norm, other = MaskedBatchNorm(C, variant="reference").double(), torch.nn.BatchNorm1d(C, momentum=0.05).double()
    for step in range(10):
        x = batch(step, torch.float64)[0].reshape(-1, C)
        u = x * torch.rsqrt(x.square().mean(1, keepdim=True) + 1e-5)
        torch.testing.assert_close(norm(x), other(u))
    torch.testing.assert_close(norm.running_var, other.running_var)
    torch.testing.assert_close(norm.eval()(x), other.eval()(u))


@pytest.mark.parametrize("text, message", [
    ("batch:variant=algorithm2", "variant='algorithm2': must be one of masked, reference"),
    ("batch:momentum=0.1", "option 'momentum' is unknown; options of 'batch': eps, alpha_fwd, groups, variant, affine"),
    ("batch:eps=small", "eps='small' must be a number"),
    ("batch:affine=maybe", "affine='maybe' must be true or false"),
    ("power:warmup_updates=1.5", "warmup_updates='1.5' must be a whole number"),
    ("batch:", "'' is no OPTION=VALUE"),
    ("batch:eps=1,eps=2", "option 'eps' is given twice"),
    ("bach", "norm 'bach': must be one of layer, rms, batch, power-v, power"),
])
def test_wrong_texts_are_refused(text, message):
    """The error names the norm, the option, the value and what is valid."""
    with pytest.raises(ValueError) as error:
        build_norm(text, C)
    assert message in str(error.value)
