"""Outputs are ordinary tensors, and padding that is not finite stays where it is."""
import pytest
import torch
from norm_cases import ALL, CASES, C, assert_all_close, batch, make

INPLACE = {
    "relu": torch.relu_, "add": lambda y: y.add_(1.0), "mul": lambda y: y.mul_(2.0), "zero row": lambda y: y[0].zero_(),
    "dropout": lambda y: torch.nn.functional.dropout(y, 0.0, inplace=True), "view": lambda y: y.view(-1).mul_(3.0),
}


@pytest.mark.parametrize("operation", INPLACE)
@pytest.mark.parametrize("groups", [0, 2])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name, variant", ALL)
def test_outputs_can_be_changed_in_place(name, variant, training, groups, operation):
    """An operation in place on the output gives the gradients of the same operation on a copy of it."""
    results = []
    for copy in (False, True):
        norm = make(name, variant, groups=groups).train(training)
        x, dy, mask = batch()
        x.requires_grad_()
        y = norm(x, mask)
        y = y.clone() if copy else y
        INPLACE[operation](y)
        y.backward(dy)
        results.append([y, x.grad, *(p.grad for p in norm.parameters())])
    assert_all_close(*results, 0)


@pytest.mark.parametrize("two", [False, True])
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "channels apart"])
@pytest.mark.parametrize("name, variant", ALL)
def test_shape_dtype_and_memory(name, variant, layout, two):
    """The output has the input's shape and dtype and no memory in common with it, training or not."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = batch(0, dtype)[0]
        x = x[0] if two else x
        moved = x if two else x.transpose(0, 1)
        x = {"contiguous": x, "transposed": moved, "channels apart": torch.stack([x, x], -1)[..., 0]}[layout]
        for training in (True, False):
            norm = make(name, variant, dtype)
            y = norm.train(training)(x)
            assert y.shape == x.shape and y.dtype == dtype and not y._is_view()
            assert y.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", ["x", "dy", "both"])
@pytest.mark.parametrize("name, variant", CASES)
def test_padding_that_is_not_finite(name, variant, where, bad):
    """NaN or infinity in padded rows reaches no valid row, no gradient of any row, no parameter and no statistic."""
    results = []
    for value in (bad, 0.0):
        norm = make(name, variant, warmup_updates=1)
        for step in range(2):
            x, dy, mask = batch(step)
            padded = mask.t().unsqueeze(-1)
            x = x.masked_fill(padded, value if where != "dy" else 0.0).requires_grad_()
            dy = dy.masked_fill(padded, value if where != "x" else 0.0)
            norm.zero_grad()
            y = norm(x, mask)
            y.backward(dy)
            assert torch.isfinite(x.grad).all()
        valid = mask.t().logical_not()
        results.append(
            [y[valid], *(p.grad for p in norm.parameters()), *(b for k, b in norm.named_buffers() if k != "ema_gz")]
        )
        if not (name == "power" and variant == "reference" and where != "dy"):
            results[-1] += [x.grad[valid], *(b for k, b in norm.named_buffers() if k == "ema_gz")]
        else:  # the authors' nu counts padding: one such step leaves it as it was
            assert torch.isfinite(norm.ema_gz).all() and torch.isfinite(x.grad[valid]).all()
    assert_all_close(*results)


@pytest.mark.parametrize("groups", [0, 2])
@pytest.mark.parametrize("name, variant", CASES)
def test_padding_too_large_to_be_squared(name, variant, groups):
    """The smallest float, by which others mark padding, without a gradient there: as if there were zeros."""
    results = []
    for value in (torch.finfo(torch.float32).min, 0.0):
        norm = make(name, variant, groups=groups)
        x, dy, mask = batch()
        valid, padded = mask.t().logical_not(), mask.t().unsqueeze(-1)
        x = x.masked_fill(padded, value).requires_grad_()
        y = norm(x, mask)
        y.backward(dy.masked_fill(padded, 0.0))
        assert torch.isfinite(x.grad).all()
        statistics = [b for k, b in norm.named_buffers() if k != "ema_gz" or variant != "reference"]
        results.append([y[valid], x.grad[valid], *(p.grad for p in norm.parameters()), *statistics])
    assert_all_close(*results)


@pytest.mark.parametrize("name, variant", CASES)
def test_a_batch_of_padding_only(name, variant):
    """No row counts: outputs and gradients are finite, statistics stay as they are."""
    norm = make(name, variant, warmup_updates=0)
    before = {key: value.clone() for key, value in norm.named_buffers() if key not in ("iters", "ema_gz")}
    x, dy, mask = batch()
    x.requires_grad_()
    y = norm(x, torch.ones_like(mask))
    y.backward(torch.zeros_like(dy))
    assert torch.isfinite(y).all() and torch.isfinite(x.grad).all()
    for key, value in before.items():
        assert torch.equal(getattr(norm, key), value)


@pytest.mark.parametrize("shape", [(0, 3, C), (5, 0, C), (0, C)])
@pytest.mark.parametrize("name, variant", ALL)
def test_no_rows(name, variant, shape):
    """Empty batches pass, training or not, and leave the statistics finite."""
    for training in (True, False):
        norm = make(name, variant).train(training)
        x = torch.empty(shape, requires_grad=True)
        y = norm(x)
        y.sum().backward()
        assert y.shape == x.grad.shape == shape
        assert all(torch.isfinite(value).all() for value in norm.state_dict().values())
