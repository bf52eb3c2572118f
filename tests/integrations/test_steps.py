"""Statistics that follow an optimizer, in a loop of one's own; needs torch only."""
import copy

import pytest
import torch
from torch import nn

from fairseq_powernorm.integrations.steps import OptimizerStatistics, innermost
from fairseq_powernorm.norms import LayerNorm, PowerNorm

C = 8


def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(C, C), PowerNorm(C, variant="algorithm2"), nn.Linear(C, C)).double()


def rows(step):
    return torch.randn(12, C, generator=torch.Generator().manual_seed(step), dtype=torch.float64)


def loss_of(model, x):
    return model(x).pow(3).sum() / 12


def buffers(model):
    return [buffer.clone() for buffer in model.buffers()]


def train(model, following, optimizer, cut=1, factor=1.0, scaler=None):
    """Three steps of ``cut`` micro-batches, the loss multiplied by a number that the gradient is divided by again."""
    for step in range(3):
        for x in rows(step).chunk(cut):
            with following.batch(scaler):
                loss = loss_of(model, x) * factor
                (loss if scaler is None else scaler.scale(loss)).backward()
        for parameter in model.parameters():
            parameter.grad /= factor
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()
        following.discard()
        optimizer.zero_grad()


def trained(ranks=1, **options):
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    following = OptimizerStatistics(model, optimizer, ranks=ranks)
    train(model, following, optimizer, **options)
    following.release()
    return model


@pytest.mark.parametrize(
    "other", [dict(cut=4), dict(ranks=4, factor=4.0), dict(scaler=64.0), dict(cut=2, ranks=2, factor=2.0, scaler=8.0)]
)
def test_the_same_training_cut_and_scaled_in_other_ways(other):
    """Micro-batches, gradients that come ``ranks`` times too large before they are averaged, a loss scale, and all together:
    the same parameters and statistics.
    """
    if "scaler" in other:
        other = {**other, "scaler": torch.amp.GradScaler("cpu", init_scale=other["scaler"])}
    for one, two in zip(trained().state_dict().values(), trained(**other).state_dict().values()):
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-13)


def test_a_micro_batch_that_fails_leaves_nothing():
    """An error inside of a micro-batch, which the loop survives: the step is that of the other micro-batches."""
    model, twin = build(), build()
    for each, fails in ((model, True), (twin, False)):
        optimizer = torch.optim.SGD(each.parameters(), 0.0)
        following = OptimizerStatistics(each, optimizer)
        with following.batch():
            loss_of(each, rows(0)).backward()
        if fails:
            with pytest.raises(KeyError), following.batch():
                each(rows(1))
                raise KeyError
        optimizer.step()
        following.release()
    assert all(map(torch.equal, buffers(model), buffers(twin)))


def test_a_step_that_was_not_taken():
    """Without a step of the optimizer nothing is applied, and discard() forgets it; a step of another optimizer is none."""
    model = build()
    before = buffers(model)
    optimizer, other = (torch.optim.SGD(model.parameters(), 0.01) for _ in range(2))
    following = OptimizerStatistics(model, optimizer)
    with following.batch():
        loss_of(model, rows(0)).backward()
    other.step()
    assert all(map(torch.equal, before, buffers(model)))
    following.discard()
    optimizer.step()
    assert all(map(torch.equal, before, buffers(model)))


def test_release_takes_the_hook_off():
    """After release(), twice, the optimizer steps by itself and the norms apply their own statistics."""
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    following = OptimizerStatistics(model, optimizer)
    following.release()
    following.release()
    loss_of(model, rows(0)).backward()
    optimizer.step()
    assert model[1].iters == 1
    OptimizerStatistics(model, copy.deepcopy(optimizer))


def test_wrong_use():
    """nn.DataParallel, no norms with running statistics, taken twice, an unknown sync, no optimizer."""
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    with pytest.raises(ValueError, match="Loop: nn.DataParallel copies the model in each step, and the statistics"):
        OptimizerStatistics(nn.DataParallel(model), optimizer, owner="Loop")
    with pytest.raises(ValueError, match="Loop: no norm of the model has running statistics"):
        OptimizerStatistics(nn.Sequential(LayerNorm(C)), optimizer, owner="Loop")
    with pytest.raises(ValueError, match="sync='always': must be one of off, step, exact"):
        OptimizerStatistics(model, optimizer, sync="always")
    with pytest.raises(ValueError, match="optimizer of type Linear: must be a torch.optim.Optimizer, or wrap one"):
        OptimizerStatistics(model, model[0])
    OptimizerStatistics(model, optimizer)
    with pytest.raises(ValueError, match="Loop: the statistics of 1 have been taken over already"):
        OptimizerStatistics(model, optimizer, owner="Loop")


def test_innermost():
    """The optimizer inside of any number of wrappers."""
    optimizer = torch.optim.SGD(build().parameters(), 0.01)
    wrapped = type("Wrapper", (), {"optimizer": type("Wrapper", (), {"optimizer": optimizer})()})()
    assert innermost(wrapped) is innermost(optimizer) is optimizer
